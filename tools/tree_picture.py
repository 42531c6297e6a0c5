"""Draw one small SPO-tree as docs/tree.svg: `python tools/tree_picture.py`.

The tree stands in docs/tree.safetensors, so the picture has the same bytes wherever it is made.
`--grow` samples the tree again first. The problem was chosen: its numbers need no modulus, and both
a wrong first step and a wrong second step show. The samples were taken as they came.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from xml.sax.saxutils import escape

from spo import Forest, load_recipe
from spo.credit.values import Values
from spo.grow.sampler import Sampler
from spo.models.tokenizer import load_tokenizer, response_text, stop_token_ids
from spo.tasks.problem import CLOSE

DOCS = Path(__file__).resolve().parents[1] / "docs"
SEED, PROBLEM = 3, 435
RECIPE = [
    "engine={name: hf, max_num_seqs: 32, max_model_len: 96}",
    "shape={kind: tree, widths: [3, 2, 2], segment_tokens: [6, 8]}",
    f"train.seed={SEED}",
]

MONO = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
SANS = "system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif"
INK, QUIET, LINE, PAPER = "#1f2328", "#57606a", "#b6bec7", "#ffffff"
BLUE, ORANGE, GREY = (33, 102, 172), (224, 120, 20), (140, 149, 159)  # also told apart colour-blind
DARK = {1: "#0b4a8f", -1: "#933f00", 0: QUIET}  # text of each sign

VERDICTS = {1: "right: keeps credit", -1: "wrong: gets the blame", 0: "nothing left to lose"}

CHAR = 7.3  # width of a character of a segment, 12 px
LONGEST = 27  # characters of a segment's text; what is longer is cut
MARGIN, GAP, ROW, BOX, LEAF = 20, 28, 34, 46, 26
TOP = 112  # of the first leaf
MOST_LEAVES = 24


@dataclass(frozen=True)
class Node:
    """A segment, ready to draw."""

    text: str
    tokens: int
    parent: int  # -1 for the prompt
    value: float
    advantage: float
    reward: float | None  # None unless it is a leaf
    depth: int
    y: float  # of its middle


def grow() -> Forest:
    """The tree of the embedded policy under one problem of the arithmetic task."""
    with Sampler(load_recipe("spo-tree", RECIPE)) as sampler:
        (prompt,) = islice(sampler.train_prompts(), PROBLEM, PROBLEM + 1)
        return sampler.grow([prompt])[0]


def nodes_of(forest: Forest, decode: Callable[[list[int]], str]) -> list[Node]:
    """All nodes of a forest's one tree, placed. Raises ValueError if they make no small picture."""
    leaves = int(forest.is_leaf.sum())
    if len(forest.prompts) != 1 or not 0 < leaves <= MOST_LEAVES:
        raise ValueError(
            f"expected one tree with 1 to {MOST_LEAVES} leaves, found {len(forest.prompts)} with "
            f"{leaves}"
        )
    rule = Values()
    values = rule.values(forest)
    advantages = rule.advantages(forest, values)
    nodes, row = [], 0
    for i in range(forest.num_nodes):
        leaf = bool(forest.is_leaf[i])
        nodes.append(
            Node(
                text=" ↵ ".join(decode(forest.tokens(i)).strip().split("\n")),
                tokens=len(forest.tokens(i)),
                parent=int(forest.parent[i]),
                value=float(values[i]),
                advantage=float(advantages[i]),
                reward=float(forest.rewards[i]) if leaf else None,
                depth=len(forest.path(i)) - 1,
                y=TOP + ROW * row + LEAF / 2,
            )
        )
        row += leaf
    for i in reversed(range(len(nodes))):  # children come after their parents
        below = [node.y for node in nodes if node.parent == i]
        if below:
            nodes[i] = dataclasses.replace(nodes[i], y=(below[0] + below[-1]) / 2)
    return nodes


def blamed_path(nodes: Sequence[Node]) -> list[int]:
    """From the first segment to the end of the wrong response with the clearest mistake."""
    paths = []
    for i, node in enumerate(nodes):
        path = [i] if node.reward == 0 else []
        while path and nodes[path[0]].depth > 1:
            path.insert(0, nodes[path[0]].parent)
        if path:
            paths.append(path)
    if not paths:
        raise ValueError("no response of the tree is wrong: there is nothing to blame")
    return min(reversed(paths), key=lambda path: min(nodes[i].advantage for i in path))


def signed(number: float) -> str:
    """With its sign, two digits; a plain 0 for zero."""
    return f"{number:+.2f}".replace("-", "−") if abs(number) >= 0.005 else "0"


def sign(number: float) -> int:
    return (number >= 0.005) - (number <= -0.005)


def tint(advantage: float, largest: float, strength: float) -> str:
    """Blue for a positive advantage, orange for a negative one, grey for none."""
    colour = {1: BLUE, -1: ORANGE, 0: GREY}[sign(advantage)]
    share = strength * (0.25 + 0.75 * min(1, abs(advantage) / largest)) if sign(advantage) else 0.12
    if strength == 1:  # a border
        share = 1 if sign(advantage) else 0.6
    return "#" + "".join(f"{round(255 + (c - 255) * share):02x}" for c in colour)


def short(text: str) -> str:
    """What a box has room for. A closing tag says nothing that its opening one does not."""
    if text.endswith(f" {CLOSE}"):
        text = text.removesuffix(CLOSE) + "…"
    return text if len(text) <= LONGEST else text[: LONGEST - 1].rstrip() + "…"


def text(x: float, y: float, words: str, look: str, anchor: str = "start", fill: str = INK) -> str:
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    ink = "" if fill == INK else f' fill="{fill}"'
    return f'<text x="{x:g}" y="{y:g}" class="{look}"{place}{ink}>{escape(words)}</text>'


def box(
    x: float, y: float, width: float, height: float, advantage: float, largest: float, bold: bool
) -> str:
    border = f'stroke="{tint(advantage, largest, 1)}"'
    if bold:
        border = f'stroke="{INK}" stroke-width="2.5"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="{tint(advantage, largest, 0.5)}" {border}/>'
    )


class Drawing:
    """The lines of one SVG file."""

    def __init__(self, nodes: Sequence[Node], answer: object):
        self.nodes, self.path, self.answer = nodes, blamed_path(nodes), answer
        self.largest = max(abs(node.advantage) for node in nodes)
        depths = range(max(node.depth for node in nodes) + 1)
        longest = [max(len(short(n.text)) for n in nodes if n.depth == d) for d in depths]
        self.widths = [max(CHAR * chars + 24, 138) for chars in longest]
        self.widths[0] = max(CHAR * max(map(len, prompt_lines(nodes[0]))) + 24, 150)
        self.widths[-1] += 34  # a leaf's advantage stands beside its text
        self.left = [MARGIN + sum(self.widths[:d]) + GAP * d for d in depths]
        self.right = self.left[-1] + self.widths[-1]
        self.width = self.right + 46 + MARGIN
        self.bottom = max(node.y for node in nodes) + LEAF / 2
        self.height = self.bottom + 206

    def svg(self) -> str:
        """The whole file."""
        words = "An SPO-tree of reasoning segments, each coloured by its own advantage"
        head = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width:g}" '
            f'height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'fill="{INK}" role="img" aria-label="{words}">',
            f"<title>{words}</title>",
            "<style>"
            f"text{{font:12px {SANS}}}.m{{font:12px {MONO}}}.h{{font-weight:600}}"
            ".t{font-size:18px;font-weight:600}.a{font-size:13px;font-weight:700}"
            ".v,.s{font-size:11.5px}"
            "</style>",
            f'<rect x="0.5" y="0.5" width="{self.width - 1:g}" height="{self.height - 1:g}" '
            f'rx="10" fill="{PAPER}" stroke="#d0d7de"/>',
        ]
        parts = [*head, *self.heading(), *self.edges()]
        parts += [self.node(i) for i in range(len(self.nodes))]
        return "\n".join([*parts, *self.comparison(), "</svg>"]) + "\n"

    def heading(self) -> list[str]:
        """Title, legend, names of the columns."""
        lines = [
            text(MARGIN, 34, "One SPO-tree: every segment has its own advantage", "t"),
            text(
                MARGIN,
                56,
                "V = mean reward of the branches below; advantage = V(segment) − V(its parent)",
                "",
                fill=QUIET,
            ),
        ]
        x = self.width - MARGIN - 214
        lines.append(text(x - 10, 56, "advantage:", "s", "end", QUIET))
        for advantage, words in ((-1, "negative"), (0, "zero"), (1, "positive")):
            swatch = box(x, 45, 13, 13, advantage * self.largest, self.largest, False)
            lines.append(swatch.replace('rx="6"', 'rx="3"'))
            lines.append(text(x + 20, 56, words, "s", fill=QUIET))
            x += 86 if words == "negative" else 60
        last = len(self.left) - 1
        for depth, left in enumerate(self.left):
            size = max(node.tokens for node in self.nodes if node.depth == depth)
            words = f"segment {depth}, " + ("to the end" if depth == last else f"{size} tokens")
            lines.append(text(left, 94, words if depth else "prompt", "s h", fill=QUIET))
        lines.append(text(self.width - MARGIN, 94, "reward", "s h", "end", QUIET))
        return lines

    def edges(self) -> list[str]:
        """A curve from every node to its children; those of the blamed path come last, thick."""
        thin, thick = [], []
        for i, node in enumerate(self.nodes):
            if node.parent < 0:
                continue
            x, end = self.left[node.depth] - GAP, self.left[node.depth]
            y, middle = self.nodes[node.parent].y, self.left[node.depth] - GAP / 2
            curve = f"M{x:g} {y:g}C{middle:g} {y:g} {middle:g} {node.y:g} {end:g} {node.y:g}"
            (thick if i in self.path else thin).append(curve)
        return [
            f'<path d="{"".join(thin)}" fill="none" stroke="{LINE}" stroke-width="1.5"/>',
            f'<path d="{"".join(thick)}" fill="none" stroke="{INK}" stroke-width="2.5"/>',
        ]

    def node(self, i: int) -> str:
        """One segment: its box, text, value and advantage; of a leaf, what it earned."""
        node = self.nodes[i]
        x, width = self.left[node.depth], self.widths[node.depth]
        height = BOX if node.reward is None else LEAF
        y = node.y - height / 2
        lines = [box(x, y, width, height, node.advantage, self.largest, i in self.path)]
        ink = DARK[sign(node.advantage)]
        if node.parent < 0:
            word, problem = prompt_lines(node)
            lines = [box(x, y - 9, width, height + 18, 0, 1, False).replace('rx="6"', 'rx="14"')]
            lines.append(text(x + 12, y + 9, word, "m", fill=QUIET))
            lines.append(text(x + 12, y + 26, problem, "m"))
            lines.append(text(x + 12, y + 45, f"V {node.value:.2f}", "v", fill=QUIET))
            lines.append(text(x + 12, y + 75, f"right answer: {self.answer}", "s", fill=QUIET))
        elif node.reward is None:
            lines.append(text(x + 12, y + 19, short(node.text), "m"))
            lines.append(text(x + 12, y + 37, f"V {node.value:.2f}", "v", fill=QUIET))
            lines.append(text(x + width - 12, y + 37, signed(node.advantage), "a", "end", ink))
        else:
            lines.append(text(x + 12, y + 17, short(node.text), "m"))
            lines.append(text(x + width - 12, y + 17, signed(node.advantage), "a", "end", ink))
            lines += [mark(self.right + 19, node.y, node.reward)]
            lines.append(text(self.right + 34, node.y + 4, f"{node.reward:g}", "v"))
        return f'<g data-node="{i}">' + "".join(lines) + "</g>"

    def comparison(self) -> list[str]:
        """The blamed response under GRPO, one number, and under SPO, a number per segment."""
        nodes = [self.nodes[i] for i in self.path]
        total = nodes[-1].value - self.nodes[0].value
        top = self.bottom + 26
        begin = self.left[1]
        lines = [
            f'<path d="M{MARGIN} {top - 2:g}H{self.width - MARGIN:g}" stroke="#d0d7de"/>',
            text(MARGIN, top + 24, "The thick path is one wrong response. Its tokens get:", "h"),
            text(MARGIN, top + 60, "GRPO", "h"),
            text(MARGIN, top + 77, "reward − mean reward", "s", fill=QUIET),
            text(MARGIN, top + 116, "SPO", "h"),
            text(MARGIN, top + 133, "V(segment) − V(parent)", "s", fill=QUIET),
        ]
        y = top + 42
        lines.append(box(begin, y, self.right - begin, 44, total, self.largest, False))
        lines.append(text(begin + 12, y + 27, signed(total), "a", fill=DARK[sign(total)]))
        words = "for every token: the right step is blamed with the wrong one"
        lines.append(text(begin + 62, y + 27, words, "s"))
        y = top + 98
        for node in nodes:
            x, width = self.left[node.depth], self.widths[node.depth]
            lines.append(box(x, y, width, 44, node.advantage, self.largest, False))
            ink = DARK[sign(node.advantage)]
            lines.append(text(x + 12, y + 18, signed(node.advantage), "a", fill=ink))
            lines.append(text(x + 12, y + 34, VERDICTS[sign(node.advantage)], "s"))
        terms = " + ".join(signed(node.advantage) for node in nodes)
        terms = terms.replace("+ +", "+ ").replace("+ −", "− ")
        words = f"The sum is GRPO's: {terms} = {signed(total)}."
        words += " GRPO also divides by the standard deviation."
        lines.append(text(begin, y + 64, words, "s", fill=QUIET))
        return lines


def mark(x: float, y: float, reward: float) -> str:
    """A tick in a full disc for a right response, a cross in an empty one for a wrong one."""
    disc, sign_ink = (INK, PAPER) if reward > 0 else (PAPER, INK)
    shape = "M-3.6 0.2L-1 3L3.8 -2.6" if reward > 0 else "M-2.8 -2.8L2.8 2.8M2.8 -2.8L-2.8 2.8"
    return (
        f'<g transform="translate({x:g} {y:g})"><circle r="7.5" fill="{disc}" stroke="{INK}"/>'
        f'<path d="{shape}" fill="none" stroke="{sign_ink}" stroke-width="1.8"/></g>'
    )


def prompt_lines(node: Node) -> list[str]:
    """The task's name and the problem."""
    word, _, problem = node.text.partition(" ")
    return [word, short(problem)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forest", type=Path, default=DOCS / "tree.safetensors")
    parser.add_argument("--grow", action="store_true", help="sample the tree and write --forest")
    parser.add_argument("-o", "--output", type=Path, default=DOCS / "tree.svg")
    arguments = parser.parse_args()
    if arguments.grow:
        grow().save(arguments.forest)
    policy = load_recipe("spo-tree").policy
    tokenizer = load_tokenizer(policy)
    stops = stop_token_ids(policy, tokenizer)
    forest = Forest.load(arguments.forest)
    nodes = nodes_of(forest, lambda ids: response_text(tokenizer, ids, stops))
    arguments.output.write_text(Drawing(nodes, forest.prompts[0].answer).svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
