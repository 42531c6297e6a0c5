"""Rollouts of trees: what sharing prefixes, alignment, order and streaming are worth.

The same trees or chains (same seeds, node lengths drawn once from (seed, tree, path), no early stop
unless asked for) are grown in several ways on one engine:

    naive       every request recomputes its whole prefix
    level       prefixes cached; a level starts when the one above has ended everywhere
    group       prefixes cached; a node branches when all its siblings have ended (the paper's code)
    frontier    prefixes cached; a node branches in the step after it ends, first come first served
    depth       the same, deepest node of the first tree first (what `spo` does)
    aligned     depth, with segments that end one token after the edge of a cache block
    stream      depth, the next iteration's prompts admitted while the last leaves of this one run;
                against "no stream", iterations one after the other; the cache is forgotten after
                each of them, as after an update of the weights

Every figure is a counter of the engine or a clock. The cache is reset before every run, a first
run is discarded, the order of the ways is drawn anew for every round; medians and ranges are given,
and a difference inside the range is called none. The bound on prefilled tokens is exact for a cache
of full blocks: P for the first request of a prompt and ((L - 1) mod block) + 1 for every other
request of length L.

    python benchmarks/rollout_tree.py                       one case, in under three minutes
    python benchmarks/rollout_tree.py --full --json FILE    every case, about an hour
    python benchmarks/rollout_tree.py --case 6-6-6 stream   some of them
    python benchmarks/rollout_tree.py --case sweep          one setting at a time
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it also runs where nothing is installed
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def engine_name(wanted: str) -> str:
    """vLLM where it is installed; else the embedded engine, and a line that says so."""
    if wanted != "auto":
        return wanted
    if importlib.util.find_spec("vllm"):
        return "vllm"
    print("vLLM is not installed here: this measures the embedded engine (hf).", flush=True)
    return "hf"


def run_case(name: str, case: argparse.Namespace, engine: str, swept: bool) -> dict:
    """Measure one case and print each run as it ends."""
    start = time.monotonic()
    from benchmarks.rollouts import tables
    from benchmarks.rollouts.cases import describe
    from benchmarks.rollouts.measure import measure

    def ready(settings: dict) -> None:
        rounds = f"{case.repeats} rounds" if case.repeats > 1 else "1 round"
        say(f"{name}: {describe(settings)}, engine {engine}, at most {rounds}.")
        say("Starting the engine and warming up ...")
        print(tables.heading("round, way"), flush=True)

    def watch(run: dict, repeat: int) -> None:
        print(tables.line(f"{repeat + 1:>5}  {run['way']}", run), flush=True)

    record = measure(case, engine, watch, ready) | {"swept": swept}
    print(f"\n{tables.summary(record)}", flush=True)
    say(f"Measured with {tables.where(record)}, in {time.monotonic() - start:.0f} s.")
    return record


def saved(path: Path) -> dict:
    """The cases of an earlier run; ValueError where the file holds something else."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text() or "{}")
    if not isinstance(found, dict):
        raise ValueError(f"found a {type(found).__name__} in {path}")
    return found


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {text}")
    return int(text)


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 0 and below 1, found {text}")
    return float(text)


def say(text: str) -> None:
    """A paragraph in lines of 80 characters."""
    print(textwrap.fill(text, 80), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    from benchmarks.rollouts.cases import CASES, DEFAULT, SWEPT

    warnings.simplefilter("ignore", FutureWarning)  # vLLM's, about PyTorch, between the rows
    given = parse(argv, {})
    chosen = given.case or (list(CASES) if given.full else [DEFAULT])
    points = {name: CASES[name] for name in chosen if name in CASES}
    points |= SWEPT if "sweep" in chosen else {}
    engine = engine_name(given.engine)
    try:
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            saved(given.json)
    except (OSError, ValueError) as error:
        print(f"rollout_tree: --json: expected a file of results, {error}", file=sys.stderr)
        return 1
    for name, settings in points.items():
        case = parse(argv, settings)
        if engine == "hf":  # it shares every token of a prefix: nothing to align
            case.ways = [way for way in case.ways if way != "aligned"]
        try:
            title = name if engine == "vllm" else f"{name}, embedded engine"
            record = run_case(title, case, engine, name in SWEPT)
        except ValueError as error:
            print(f"rollout_tree: {error}", file=sys.stderr)
            return 1
        if given.json:  # cases measured apart from each other stand in one file
            found = saved(given.json) | {title: record}
            given.json.write_text(json.dumps(found) + "\n")
        if given.plot:
            from benchmarks.rollouts.occupancy import write_plot
            from benchmarks.rollouts.tables import ways_of

            path = given.plot / f"occupancy-{name.replace(', ', '-').replace(' ', '-')}.svg"
            write_plot(path, record["runs"], ways_of(record), case.max_num_seqs)
    return 0


OUTPUT = ("json", "plot", "full", "quick", "case", "engine")  # no settings of a case


def parse(argv: Sequence[str] | None, settings: dict) -> argparse.Namespace:
    """The command line, on top of a case's settings; the rest of it where those are empty."""
    from benchmarks.rollouts.cases import CASES, QUICK, WAYS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*CASES, "sweep"]
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--full", action="store_true", help="every case, about an hour")
    some.add_argument("--case", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--engine", choices=("auto", "vllm", "hf"), default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny trees: does it run at all?")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no round after that")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--widths", type=positive, nargs="+", default=[6, 6, 6])
    parser.add_argument("--chain", type=positive, nargs=2, metavar=("GROUP", "PROBES"))
    parser.add_argument(
        "--prompt", type=positive, nargs="+", default=[100, 160], help="lowest, highest"
    )
    parser.add_argument("--segment", type=positive, default=128, help="tokens per segment")
    parser.add_argument("--spread", type=share, default=0.0, help="samples end up to this early")
    parser.add_argument("--trees", type=positive, default=1, help="per iteration")
    parser.add_argument("--iterations", type=count, default=0, help="of the streams; 0: none")
    parser.add_argument("--max-num-seqs", type=positive, default=64, help="slots of the engine")
    parser.add_argument("--block-size", type=positive, default=32)
    parser.add_argument("--cache-mib", type=positive, default=2048)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--hidden", type=positive, default=512)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--vocabulary", type=positive, default=16384)
    parser.add_argument("--json", type=Path, help="results, by case; others in the file stay")
    parser.add_argument("--plot", type=Path, help="folder for drawings of slots used over time")
    parser.set_defaults(**settings)
    arguments = parser.parse_args(argv)
    if arguments.quick and settings:
        vars(arguments).update(QUICK)
    if "depth" not in arguments.ways and (arguments.ways or not arguments.iterations):
        parser.error("--ways: depth is what the others are compared with; name it too")
    if arguments.prompt[0] > arguments.prompt[-1]:
        parser.error(f"--prompt: expected the lowest first, found {arguments.prompt}")
    if arguments.vocabulary < 3:
        parser.error(f"--vocabulary: expected at least 3, found {arguments.vocabulary}")
    if settings:
        arguments.until = time.monotonic() + 60 * arguments.minutes
        for name in OUTPUT:
            delattr(arguments, name)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
