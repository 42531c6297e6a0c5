"""Write the figures of README.md and docs/kernels.md from the committed results.

python benchmarks/readme.py     # and python benchmarks/plot.py for the drawings
"""

from __future__ import annotations

import json
from pathlib import Path

import evidence
import kernel_tables
import results
import rollout_tables

from spo.report.compare import verdict

ROOT = Path(__file__).parents[1]
RESULTS = results.ROOT / "cpu"


def demo() -> str:
    """Pass@1 before and after, from `spo compare … --json`."""
    record = json.loads((RESULTS / "demo.json").read_text())
    rows = ["| `make demo` | Pass@1 before | after | sampled (T = 1) before | after | tokens | s |"]
    rows.append("|---|---|---|---|---|---|---|")
    for name, evals in record["runs"].items():
        cells = [
            f"{line[kind]:.3f} ± {line[f'{kind}_stderr']:.3f}"
            for kind in ("greedy", "sampled")
            for line in (evals[0], evals[-1])
        ]
        last = evals[-1]
        rows.append(
            f"| {name} | {' | '.join(cells)} | {last['generated_tokens'] / 1000:.0f}k "
            f"| {last['seconds']:.0f} |"
        )
    return "\n".join(
        [*rows, "", verdict(record["runs"]), "The task saturates and ranks no methods."]
    )


def rollouts() -> dict[str, dict]:
    """The cases of `rollout_tree.py --json`."""
    return json.loads((RESULTS / "rollout_tree.json").read_text())


def write_between(path: Path, mark: str, body: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, rest = path.read_text().split(start)
    tail = rest.split(end)[1]
    path.write_text(f"{head}{start}\n\n{body}\n\n{end}{tail}")


def bodies() -> dict[tuple[Path, str], str]:
    """What belongs between the marks of each file."""
    tables = [kernel_tables.overview(device, results.ROOT) for device in results.devices()]
    cases = rollouts()
    shown = [rollout_tables.markdown(cases[name]) for name in ("6-6-6", "stream")]
    figures = "\n\n".join([*filter(None, tables), *shown, demo()])
    docs = ROOT / "docs"
    paper = docs / "paper.md"
    return {
        (ROOT / "README.md", "figures"): figures,
        (docs / "rollout.md", "rollouts"): rollout_tables.everything(cases),
        (docs / "kernels.md", "kernels"): kernel_tables.everything(results.ROOT),
        (paper, "methods"): evidence.methods("arithmetic"),
        (paper, "methods, long"): evidence.methods("long-arithmetic"),
        (paper, "ablations"): evidence.ablations(),
        (paper, "estimators"): evidence.estimators(),
    }


def main() -> None:
    for (path, mark), body in bodies().items():
        write_between(path, mark, body)


if __name__ == "__main__":
    main()
