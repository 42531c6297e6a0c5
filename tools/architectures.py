"""Trains and samples a small model of every causal architecture of transformers, or is refused.

    python tools/architectures.py [NAME ...] [--json FILE] [--table docs/models.md] [--jobs N]

Every model type that transformers lists is made at small size with random weights, and the trainer
and the embedded engine are compared with transformers' own logits (tools/architecture_checks.py).
What trains differs by at most 1e-4 nats, what is refused is refused at load in a sentence of `spo`;
the rest is WRONG. Exits with 1 if anything is wrong, or if fewer than 45 model types train.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import resource
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from architecture_table import counts, outcome, title, write

TIMEOUT = 150.0  # seconds for one architecture
MEMORY = 10 << 30  # bytes that one process may allocate
LARGE = 2 << 30  # bytes after which a process ends, since it does not give them back
TRAIN = 45  # architectures that must train


def work() -> None:
    """The child: reads names, writes a JSON line for every stage and for the result of each."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    import transformers
    from small_models import architectures

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    facts = {"transformers": transformers.__version__, "torch": torch.__version__}
    facts |= {"commit": commit(), "names": architectures()}
    print(json.dumps(facts), file=answers)
    for line in sys.stdin:
        name = line.strip()
        for row in architecture_rows(name):
            print(json.dumps(row), file=answers)
        large = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > LARGE >> 10
        print(json.dumps({"done": True, "large": large}), file=answers)


def commit() -> str:
    """Of the package that is checked; with a "+" if its files differ from it."""
    import spo

    command = ["git", "-C", str(Path(spo.__file__).parent), "describe", "--always", "--dirty=+"]
    done = subprocess.run([*command, "--exclude=*"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def architecture_rows(name: str) -> Iterator[dict[str, Any]]:
    """What was found so far of an architecture and of its other forms, after every stage."""
    from architecture_checks import Truth, check_engine, check_trainer, judged
    from small_models import other_forms, small_model

    forms: list[dict[str, Any]] = [{}]
    for form in forms:
        shown = ", ".join(form.get("layer_types", form))
        row: dict[str, Any] = {"name": name, "form": shown, "stage": "unbuilt"}
        yield row
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            try:
                model = small_model(name, folder, form)
                truth = Truth(folder)
            except Exception as error:  # not ours: the table tells it
                row["unbuilt"] = " ".join(str(error).split())[:300]
            else:
                row |= {"class": type(model).__name__, "causal": truth.causal, "stage": "trainer"}
                yield row
                row |= {"trainer": judged(check_trainer, folder, truth), "stage": "engine"}
                yield row
                row |= {"engine": judged(check_engine, folder, truth)}
                forms += [] if form else other_forms(model, truth.causal)
        yield row | {"stage": ""}


class Child:
    """A process that checks architectures one after another; made anew after it died."""

    def __init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | os.environ
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--work"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
        self.facts = self._line(time.monotonic() + TIMEOUT) or {}

    def _line(self, deadline: float) -> dict[str, Any] | None:
        """The next answer; None if it does not come."""
        assert self.process.stdout is not None
        held = b""
        while not held.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            byte = os.read(self.process.stdout.fileno(), 1)
            if not byte:
                return None
            held += byte
        return json.loads(held)

    def check(self, name: str) -> list[dict[str, Any]]:
        """The rows of one architecture; if the process dies or hangs, the last says where.

        A form that does not build is none.
        """
        assert self.process.stdin is not None
        rows: list[dict[str, Any]] = [{"name": name, "form": "", "stage": "unbuilt"}]
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died; then no answer comes
            self.process.stdin.write(f"{name}\n".encode())
            self.process.stdin.flush()
        while (row := self._line(start + TIMEOUT)) is not None:
            if row.get("done"):
                if row["large"]:
                    self.close()
                break
            if rows[-1]["form"] != row["form"]:
                rows.append(row)
            rows[-1] = row
        else:
            late = time.monotonic() >= start + TIMEOUT
            self.close()
            code = self.process.returncode
            reason = f"no end within {TIMEOUT:.0f} s" if late else f"the process died ({code})"
            stage = rows[-1]["stage"]
            wrong = {"kind": "WRONG", "reason": reason}
            rows[-1] |= {stage: reason if stage == "unbuilt" else wrong} if stage else {}
        for row in rows:
            del row["stage"]
        return [row for row in rows if not row["form"] or "unbuilt" not in row]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def sweep(names: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """The facts first, then the rows as they come; all architectures if no name is given."""
    first = Child()
    known = first.facts.pop("names")
    for name in names:
        if name not in known:
            raise SystemExit(f"expected model types of transformers with a head, found {name!r}")
    yield first.facts
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    rows: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()
    chosen = names or known
    for name in chosen:
        waiting.put(name)

    def run(child: Child) -> None:
        while not waiting.empty():
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            if child.process.poll() is not None:
                child = Child()
            rows.put(child.check(name))
        child.close()

    for i in range(min(jobs, len(chosen))):
        child = first if i == 0 else Child()
        threading.Thread(target=run, args=(child,), daemon=True).start()
    for _ in chosen:
        yield from rows.get()


def line(row: dict[str, Any]) -> str:
    """One architecture in a line."""
    kind = outcome(row)
    name = title(row)
    if kind == "unbuilt":
        return f"unbuilt  {name:26} {row['unbuilt']}"
    parts = []
    for side in ("trainer", "engine"):
        verdict = row.get(side, {"kind": "not tried", "reason": ""})
        figures = f"{verdict['logprobs']:.1e}" if verdict["kind"] == "right" else verdict["reason"]
        settings = verdict.get("settings") or ""
        parts.append(f"{side}: {verdict['kind']} {settings} {figures}".replace("  ", " "))
    return f"{kind:8} {name:26} {' | '.join(parts)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="model types; by default all")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--table", type=Path, help="write the table between the marks of this page")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return 0
    found = sweep(arguments.names, arguments.jobs)
    results = next(found) | {"date": date.today().isoformat(), "rows": []}
    for row in found:
        print(line(row), flush=True)
        results["rows"].append(row)
    results["rows"].sort(key=lambda row: (row["name"], row["form"]))
    if arguments.json:
        rows = ",\n".join(json.dumps(row) for row in results["rows"])
        facts = json.dumps({k: v for k, v in results.items() if k != "rows"})
        arguments.json.write_text(f'{facts[:-1]}, "rows": [\n{rows}\n]}}\n')
    if arguments.table:
        write(results, arguments.table)
    number = counts(results)
    print(", ".join(f"{count} {kind}" for kind, count in number.items()))
    few = not arguments.names and number["trains"] < TRAIN
    return int(number["WRONG"] > 0 or few)


if __name__ == "__main__":
    sys.exit(main())
