"""Write the figures of README.md and docs/ from the committed results, and draw them.

python -m benchmarks.figures.pages
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import ROOT
from benchmarks.figures import evidence, headline, kernels, results, steps
from benchmarks.provenance import where
from benchmarks.rollouts import tables
from spo.report.compare import verdict


def demo() -> str:
    """Pass@1 before and after, from `spo compare … --json`."""
    _, record = results.newest("demo")
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
    place = where([record], "trainer")
    return "\n".join([*rows, "", f"{verdict(record['runs'])} Measured on {place}."])


def write_between(path: Path, name: str, body: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, rest = path.read_text().split(start)
    tail = rest.split(end)[1]
    path.write_text(f"{head}{start}\n\n{body}\n\n{end}{tail}")


def bodies() -> dict[tuple[Path, str], str]:
    """What belongs between the marks of each file."""
    docs = ROOT / "docs"
    paper = docs / "paper.md"
    return {
        (ROOT / "README.md", "figures"): headline.body(),
        (docs / "rollout.md", "rollouts"): results.on_every_device(
            "rollout_tree", tables.everything
        ),
        (docs / "rollout.md", "shared prefix"): steps.shared_prefix(),
        (docs / "packing.md", "training step"): steps.training_step(),
        (docs / "kernels.md", "kernels"): kernels.everything(),
        (paper, "demo"): demo(),
        (paper, "methods"): evidence.methods("arithmetic"),
        (paper, "methods, long"): evidence.methods("long-arithmetic"),
        (paper, "ablations"): evidence.ablations(),
        (paper, "estimators"): evidence.estimators(),
    }


def main() -> None:
    from benchmarks.figures import plot

    plot.main([])
    for (path, name), body in bodies().items():
        write_between(path, name, body)


if __name__ == "__main__":
    main()
