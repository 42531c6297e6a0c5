#!/usr/bin/env bash
# Build and run the native tests.  Usage: run.sh [BIN_DIR [SANITIZERS]]
# BIN_DIR holds cmake, ctest and ninja (a virtual environment's bin); default: what PATH has.
# SANITIZERS, such as address,undefined: build with these; default: none.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
[ $# -eq 0 ] || PATH="$(cd "$1" && pwd):$PATH"
sanitize="${2:-}"
build="$root/build/native${sanitize:+-sanitize}"
cmake -S "$root" -B "$build" -G Ninja -DSPO_TESTS=ON -DCMAKE_BUILD_TYPE=Release \
  -DSPO_SANITIZE="$sanitize" >/dev/null
cmake --build "$build" --parallel 2
ctest --test-dir "$build" --output-on-failure --parallel 2
