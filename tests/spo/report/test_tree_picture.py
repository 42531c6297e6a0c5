"""docs/tree.svg shows the tree of docs/tree.safetensors, with its values, and nothing overlaps."""

import dataclasses
import math
import runpy
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from spo import Forest, load_recipe
from spo.learn.model import sequence_logprobs
from spo.learn.policy import load_policy
from spo.models.tokenizer import load_tokenizer
from spo.records import concat

ROOT = Path(__file__).parents[3]
PICTURE, FOREST = ROOT / "docs" / "tree.svg", ROOT / "docs" / "tree.safetensors"
SVG = "{http://www.w3.org/2000/svg}"
SIZE = {"t": 18, "a": 13, "v": 11.5, "s": 11.5}  # px, of the classes; others have 12
MONO, SANS, BOLD = 0.61, 0.58, 0.66  # em, a character's mean width in the widest of the fonts
tool = runpy.run_path(str(ROOT / "tools" / "tree_picture.py"))


@pytest.fixture(scope="module")
def forest():
    return Forest.load(FOREST)


def decode(ids):
    tokenizer = load_tokenizer(load_recipe("spo-tree").policy)
    return tokenizer.decode(ids, skip_special_tokens=True)


def draw(nodes):
    return tool["Drawing"](nodes, 16).svg()


def groups(root):
    return {int(g.get("data-node")): g for g in root.iter(f"{SVG}g") if g.get("data-node")}


def texts(element):
    return [t.text for t in element.iter(f"{SVG}text")]


def place(text):
    """x from and to, y from and to, of a text in the widest font."""
    looks = (text.get("class") or "").split()
    size = next((SIZE[look] for look in looks if look in SIZE), 12)
    font = MONO if "m" in looks else BOLD if {"t", "h", "a"} & set(looks) else SANS
    width = size * font * len(text.text)
    x, y = float(text.get("x")), float(text.get("y"))
    x -= {"end": width, "middle": width / 2}.get(text.get("text-anchor"), 0)
    return x, x + width, y - 0.75 * size, y + 0.2 * size


def test_the_same_bytes_again(forest):
    again = draw(tool["nodes_of"](forest, decode))
    assert again.encode() == PICTURE.read_bytes(), "run python tools/tree_picture.py"
    assert len(again.encode()) < 40_000
    assert again.count("http") == 1  # the name of SVG itself: nothing is fetched


def test_values_and_advantages_by_hand(forest):
    parent, rewards = forest.parent.tolist(), forest.rewards.tolist()
    children = [[c for c, p in enumerate(parent) if p == n] for n in range(len(parent))]

    def value(n):
        below = [value(c) for c in children[n]]
        return sum(below) / len(below) if below else rewards[n]

    shown = groups(ET.parse(PICTURE).getroot())
    assert sorted(shown) == list(range(len(parent)))
    for n, group in shown.items():
        words, fill = texts(group), group.find(f"{SVG}rect").get("fill")
        if children[n]:
            assert f"V {value(n):.2f}" in words
        else:
            assert f"{rewards[n]:g}" in words and len(group.findall(f"{SVG}g/{SVG}circle")) == 1
        if parent[n] < 0:
            continue
        advantage = value(n) - value(parent[n])
        red, blue = int(fill[1:3], 16), int(fill[5:], 16)
        if abs(advantage) < 1e-9:
            assert "0" in words and abs(red - blue) < 8
        else:
            assert f"{advantage:+.2f}".replace("-", "−") in words
            assert (blue > red) == (advantage > 0)


def test_the_tree_shows_what_spo_adds(forest):
    """A right first step keeps its credit, a wrong second one has the blame."""
    nodes = tool["nodes_of"](forest, decode)
    path = [nodes[i] for i in tool["blamed_path"](nodes)]
    assert [tool["sign"](node.advantage) for node in path] == [1, -1, 0]
    assert {node.reward for node in nodes} == {None, 0.0, 1.0}
    assert sum(n.advantage for n in path) == pytest.approx(path[-1].reward - nodes[0].value)
    assert [node.text.split(" ↵ ")[0] for node in path] == [
        "10 + 6 = 16",
        "16 - 2 - 2 = 0",
        "0 + 4 = 4",
    ]


def test_the_tree_is_of_the_embedded_policy(forest):
    model = load_policy(load_recipe("spo-tree").policy)
    leaf = int(forest.is_leaf.nonzero()[-1])
    path = forest.path(leaf)
    sampled = [t for n in path[1:] for t in forest.tokens(n)]
    bounds = [(int(forest.cu_tokens[n]), int(forest.cu_tokens[n + 1])) for n in path[1:]]
    stored = [p for a, b in bounds for p in forest.rollout_logprobs[a:b].tolist()]
    scored = sequence_logprobs(model, forest.tokens(path[0]), sampled, forest.temperature)
    assert scored == pytest.approx(stored, abs=1e-3)


def test_text_fits_its_box_and_nothing_overlaps():
    root = ET.parse(PICTURE).getroot()
    width, height = float(root.get("width")), float(root.get("height"))
    assert width <= 880
    for group in groups(root).values():
        rect = group.find(f"{SVG}rect")
        x, y = float(rect.get("x")), float(rect.get("y"))
        for text in group.findall(f"{SVG}text"):
            left, right, top, bottom = place(text)
            beside = left > x + float(rect.get("width")) or top > y + float(rect.get("height"))
            if not beside:  # the reward stands right of its box, the answer below the prompt
                assert left >= x and right <= x + float(rect.get("width")), text.text
                assert top >= y and bottom <= y + float(rect.get("height")), text.text
    every = [(t.text, place(t)) for t in root.iter(f"{SVG}text")]
    for text, (left, right, top, bottom) in every:
        assert left >= 0 and right <= width and top >= 0 and bottom <= height, text
    for (one, a), (other, b) in combinations(every, 2):
        apart = a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2]
        assert apart, f"{one!r} and {other!r}"


def test_boxes_of_a_column_stand_apart():
    root = ET.parse(PICTURE).getroot()
    columns = {}
    for group in groups(root).values():
        rect = group.find(f"{SVG}rect")
        x, y, height = (float(rect.get(key)) for key in ("x", "y", "height"))
        columns.setdefault(x, []).append((y, y + height))
    assert len(columns) == 4
    for boxes in columns.values():
        assert all(above[1] + 6 <= below[0] for above, below in pairwise(sorted(boxes)))


def test_text_is_never_markup(forest):
    nodes = tool["nodes_of"](forest, decode)
    nodes[1] = dataclasses.replace(nodes[1], text='<b onload="x">&amp;</b>')
    root = ET.fromstring(draw(nodes))
    assert '<b onload="x">&amp;</b>' in texts(groups(root)[1])


def test_what_makes_no_picture(forest):
    with pytest.raises(ValueError, match="expected one tree"):
        tool["nodes_of"](concat([forest, forest]), decode)
    nodes = tool["nodes_of"](forest, decode)
    right = [dataclasses.replace(n, reward=n.reward and math.ceil(n.reward) or None) for n in nodes]
    with pytest.raises(ValueError, match="no response of the tree is wrong"):
        tool["blamed_path"](right)
