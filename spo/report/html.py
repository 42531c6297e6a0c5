"""Makes the report: data embedded as JSON, style and scripts inline, nothing loaded.

Text of prompts and models is never markup. The page shows it through text nodes only, every `<` in
the embedded JSON is escaped, and the page's content security policy allows only the scripts and
styles written here, and no address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from torch import Tensor

from spo.metrics import finite_tree
from spo.records import PROMPT, Forest

SCRIPTS = ("page", "curves", "map", "reader", "tree")  # in the order they run
CONTEXT = 4  # tokens decoded before a piece, so that split characters and word starts are right


@dataclass(frozen=True)
class RunCurve:
    """One run's learning curve."""

    name: str
    metrics: list[dict]  # lines of metrics.jsonl, as `spo.metrics.read_metrics` returns them


@dataclass(frozen=True)
class TreeView:
    """A forest to show; each root becomes an entry in the list of prompts."""

    title: str
    forest: Forest
    values: Tensor  # (S,) fp32, NaN for none
    advantages: Tensor  # (S,) fp32, NaN for none
    decode: Callable[[list[int]], str]  # token ids to text
    kept: Tensor | None = None  # (T,) bool, rollout_logprobs < log(prob_threshold): underlined


@dataclass(frozen=True)
class Page:
    """One self-contained HTML page; a notebook draws it in a frame of its own."""

    html: str = field(repr=False)

    def save(self, path: str | os.PathLike) -> None:
        """Write it as a file."""
        with open(path, "wb") as file:
            file.write(self.html.encode())

    def _repr_html_(self) -> str:
        # The frame's scripts reach nothing of the notebook around it.
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts" '
            'style="width: 100%; height: 45em; border: 0"></iframe>'
        )


def write_report(
    path: str | os.PathLike,
    runs: Sequence[RunCurve] = (),
    trees: Sequence[TreeView] = (),
    title: str = "SPO report",
    notes: Sequence[str] = (),
) -> None:
    """Write `report_page` as a file."""
    report_page(runs, trees, title, notes).save(path)


def report_page(
    runs: Sequence[RunCurve] = (),
    trees: Sequence[TreeView] = (),
    title: str = "SPO report",
    notes: Sequence[str] = (),
) -> Page:
    """Curves and trees as one page; the same input gives the same bytes.

    Raises ValueError if there is neither a run nor a tree, or a tensor does not fit its forest.
    """
    if not runs and not trees:
        raise ValueError("runs and trees: expected at least one run or tree, found none")
    data = {"runs": [_curve(run) for run in runs], "trees": [_tree(tree) for tree in trees]}
    style = _part("report.css")
    script = "\n".join(_part(f"{name}.js") for name in SCRIPTS)
    slots = {
        "csp": f"default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{_sha256(style)}'; script-src '{_sha256(script)}'",
        "title": escape(title),
        "notes": "".join(f"<li>{escape(note)}</li>" for note in notes),
        "table": _accuracy_table(runs),
        "data": embed_json(data),
        "style": style,
        "script": script,
    }
    # Split once, so that the name of a slot inside the data is not replaced.
    pieces = _part("template.html").split("%%")
    page = "".join(slots[piece] if i % 2 else piece for i, piece in enumerate(pieces))
    return Page(page.encode("utf-8", "xmlcharrefreplace").decode())  # surrogates have no UTF-8


def embed_json(data: object) -> str:
    """JSON that is safe inside <script>: ASCII, no `<`, `>` or `&`; NaN and infinity are null."""
    text = json.dumps(finite_tree(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def text_pieces(
    decode: Callable[[list[int]], str],
    before: list[int],
    ids: list[int],
    marked: list[bool],
    logprobs: list[float],
) -> list[str | tuple[str, float]]:
    """Text of `ids`, cut around marked tokens: unmarked text as str, marked as (text, probability).

    Tokens are decoded after the ones `before` them: a tokenizer may drop the first space, or need
    several tokens for one character. A token that ends inside a character is merged with the next.
    """
    pieces: list[str | tuple[str, float]] = []
    start = 0
    while start < len(ids):
        stop = start + 1
        while not marked[start] and stop < len(ids) and not marked[stop]:
            stop += 1
        context = (before + ids[max(0, start - CONTEXT) : start])[-CONTEXT:]
        last = min(stop + CONTEXT - 1, len(ids))  # a character has at most 4 bytes
        while (text := _decode_after(decode, context, ids[start:stop])).endswith("\ufffd"):
            if stop == last:
                break
            stop += 1
        pieces.append((text, _round(math.exp(logprobs[start]), 3)) if marked[start] else text)
        start = stop
    return pieces


def _decode_after(decode: Callable[[list[int]], str], context: list[int], ids: list[int]) -> str:
    head = decode(context).rstrip("\ufffd") if context else ""
    text = decode(context + ids)
    return text[len(head) :] if text.startswith(head) else decode(ids)


def _part(name: str) -> str:
    return files("spo.report").joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _round(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _curve(run: RunCurve) -> dict:
    """Columns per stage; NaN if a line lacks the metric."""
    curve: dict = {"name": run.name}
    for stage in ("eval", "train"):
        lines = [line for line in run.metrics if line["stage"] == stage]
        keys = dict.fromkeys(
            key for line in lines for key, value in line.items() if isinstance(value, (int, float))
        )
        curve[stage] = {key: [line.get(key, math.nan) for line in lines] for key in keys}
    return curve


def _tree(view: TreeView) -> dict:
    forest, nodes = view.forest, view.forest.num_nodes
    for name, tensor, length in (
        ("values", view.values, nodes),
        ("advantages", view.advantages, nodes),
        ("kept", view.kept, forest.token_ids.numel()),
    ):
        if tensor is not None and tuple(tensor.shape) != (length,):
            raise ValueError(f"{name}: expected shape ({length},), found {tuple(tensor.shape)}")
    cu, parent = forest.cu_tokens.tolist(), forest.parent.tolist()
    ids, logprobs = forest.token_ids.tolist(), forest.rollout_logprobs.tolist()
    kept = view.kept.tolist() if view.kept is not None else [False] * len(ids)
    finish = forest.finish.tolist()
    tails: list[list[int]] = []  # the last tokens of the path to each node
    text = []
    for s in range(nodes):
        span = slice(cu[s], cu[s + 1])
        before = tails[parent[s]] if parent[s] >= 0 else []
        marked = [False] * (cu[s + 1] - cu[s]) if finish[s] == PROMPT else kept[span]
        text.append(text_pieces(view.decode, before, ids[span], marked, logprobs[span]))
        tails.append((before + ids[span])[-CONTEXT:])
    return {
        "title": view.title,
        "temperature": forest.temperature,
        "text": text,
        "parent": parent,
        "tokens": forest.cu_tokens.diff().tolist(),
        "value": [_round(v, 6) for v in view.values.tolist()],
        "advantage": [_round(a, 6) for a in view.advantages.tolist()],
        "reward": forest.rewards.tolist(),
        "in_value": forest.in_value.int().tolist(),
        "trained": forest.trained.int().tolist(),
        "finish": finish,
        "weight": forest.weight.tolist(),
        "born": forest.born.tolist(),
        "prompt": forest.prompt.tolist(),
        "answers": [str(prompt.answer) for prompt in forest.prompts],
    }


def _accuracy_table(runs: Sequence[RunCurve]) -> str:
    """First and last evaluation of every run and set, with standard errors."""
    rows = []
    for run in runs:
        evals = [line for line in run.metrics if line["stage"] == "eval"]
        last = evals[-1] if evals else {}
        sets = ["", *(key.removesuffix("greedy") for key in last if key.endswith("/greedy"))]
        for name in sets:
            label = ", ".join([run.name, *filter(None, [name[:-1]])])
            cells = [f'<th scope="row">{escape(label)}</th>']
            for kind in (f"{name}greedy", f"{name}sampled"):
                scored = [line for line in evals if math.isfinite(line.get(kind, math.nan))]
                first = scored[0] if len(scored) > 1 else {}
                end = scored[-1] if scored else {}
                cells += [_percent(first, kind), _percent(end, kind), _change(first, end, kind)]
            problems = last.get(f"{name}problems")
            cells.append("–" if problems is None else f"{problems:,}")
            cells.append(f"{last['generated_tokens']:,}" if evals else "–")
            row = cells[0] + "".join(f"<td>{cell}</td>" for cell in cells[1:])
            rows.append(f"<tr>{row}</tr>")
    return "".join(rows)


def _percent(line: dict, kind: str) -> str:
    if kind not in line:
        return "–"
    error = line.get(f"{kind}_stderr", math.nan)
    spread = f" <small>± {100 * error:.1f}</small>" if math.isfinite(error) else ""
    return f"{100 * line[kind]:.1f}{spread}"


def _change(first: dict, last: dict, kind: str) -> str:
    """Difference with the two errors added in quadrature, as if the samples were independent."""
    if kind not in first or kind not in last:
        return "–"
    error = math.hypot(*(line.get(f"{kind}_stderr", math.nan) for line in (first, last)))
    spread = f" <small>± {100 * error:.1f}</small>" if math.isfinite(error) else ""
    return f"<b>{100 * (last[kind] - first[kind]):+.1f}</b>{spread}".replace("-", "−")
