"""`spo.Forest`: trees, nodes, text, worth, frame and page, against numbers worked by hand."""

import dataclasses
import html
import json
import math
import re
from pathlib import Path

import pytest
import torch
from forests import random_forest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sentences import one_sentence

import spo
from spo import records
from spo.credit.values import Values
from spo.grow.assemble import assemble
from spo.grow.sampler import origin_of
from spo.grow.shapes import Node, Tree
from spo.records import LENGTH, SEGMENT, STOP, Origin, Prompt, concat, select
from spo.report.pages import write_forest_page

ROOT = Path(__file__).parents[2]
NAN = math.nan
LOO = Origin("mine", "embedded", {"type": "values", "baseline": "loo"}, 0.5)


class Bytes:
    """A tokenizer whose ids are the bytes of the text."""

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return bytes(ids).decode("utf-8", errors="replace")


def grown(question, *nodes, index=0):
    """A tree of (parent, text, reward), or (parent, bytes, reward)."""
    tree = Tree(index, Prompt(tuple(question.encode()), "4", "arithmetic"))
    for parent, text, reward in nodes:
        ids = text if isinstance(text, bytes) else text.encode()
        finish = SEGMENT if reward != reward else LENGTH if reward == 0 else STOP
        tree.nodes.append(
            Node(parent, tuple(ids), (-0.5,) * len(ids), True, True, finish, 7, reward)
        )
    return tree


# prompt -> A(inner), B(early leaf, 1); A -> 1, 0, 0.  V(A) = 1/3, V(prompt) = 2/3
STEPS = ((0, "A: ", NAN), (0, "B 4", 1.0), (1, "4", 1.0), (1, "5", 0.0), (1, "six", 0.0))
VALUES = [2 / 3, 1 / 3, 1, 1, 0, 0]
PLAIN = [0, -1 / 3, 1 / 3, 2 / 3, -1 / 3, -1 / 3]
LEAVE_ONE_OUT = [0, -2 / 3, 2 / 3, 1, -0.5, -0.5]


def small(origin=None, trees=1):
    every = [grown("2+2?", *STEPS, index=i) for i in range(trees)]
    return spo.Forest.of(assemble(every, 0.6, origin), Bytes())


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), torch.tensor(expected, dtype=torch.float32))


def test_values_and_advantages_worked_by_hand():
    forest = small()
    close(forest.values(), VALUES)
    close(forest.advantages(), PLAIN)
    recipe = spo.load_recipe("spo-tree", ["credit.baseline=loo"])
    for rule in (Values(baseline="loo"), recipe):
        close(forest.advantages(rule), LEAVE_ONE_OUT)
    close(small(LOO).advantages(), LEAVE_ONE_OUT)
    close(small(LOO).advantages("values"), PLAIN)
    close(forest.advantages("correct"), [0, 0, 1, 1, 0, 0])
    close(forest.values("correct"), VALUES)
    assert [node.value for node in forest.tree(0).nodes] == forest.values().tolist()
    assert [node.advantage for node in small(LOO).tree(0).nodes] == pytest.approx(LEAVE_ONE_OUT)


def test_the_frame_holds_the_same_numbers():
    forest = small(LOO, trees=2)
    frame = forest.to_pandas()
    assert list(frame.index) == list(range(12)) and frame.index.name == "node"
    close(frame["value"].tolist(), VALUES * 2)
    close(frame["advantage"].tolist(), LEAVE_ONE_OUT * 2)
    close(forest.to_pandas("values")["advantage"].tolist(), PLAIN * 2)
    second = frame[frame["tree"] == 1]
    assert second["parent"].tolist() == [-1, 6, 6, 7, 7, 7]
    assert second["depth"].tolist() == [0, 1, 1, 2, 2, 2]
    assert second["text"].tolist() == ["2+2?", "A: ", "B 4", "4", "5", "six"]
    assert second["num_tokens"].tolist() == [4, 3, 3, 1, 1, 3]
    assert second["logprob"].tolist() == [0, -1.5, -1.5, -0.5, -0.5, -1.5]
    ends = ["prompt", "segment", "stop", "stop", "length", "length"]
    assert second["finish"].tolist() == ends
    assert second["born"].tolist() == [-1] + [7] * 5
    graded = frame[frame["reward"].notna()].groupby("tree")["reward"].mean()
    assert graded.tolist() == [0.5, 0.5]
    assert "text" not in small().with_tokenizer(None).to_pandas(text=False)


def test_a_tree_and_its_nodes():
    forest = small(trees=3)
    tree = forest.tree(1)
    assert tree == forest.trees[1] == forest.tree(-2) and tree.prompt is forest.prompts[1]
    assert tree.root.text == "2+2?" and tree.root.parent is None and tree.root.finish == "prompt"
    a, b = tree.root.children
    assert [node.text for node in a.children] == ["4", "5", "six"] and b.children == []
    assert [leaf.index for leaf in tree.leaves] == [8, 9, 10, 11]
    six = tree.leaves[-1]
    assert six == forest.node(11) and six.parent == a and six.tree == tree
    assert {six: 1}[forest.node(11)] == 1 and six not in (a, forest.node(10))
    assert six.path == [tree.root, a, six] and six.depth == 2
    assert six.response == "A: six" and six.token_ids == list(b"six") and six.num_tokens == 3
    assert six.logprobs.tolist() == [-0.5] * 3 and (six.reward, six.finish) == (0, "length")
    assert math.isnan(a.reward) and a.finish == "segment"
    assert "3 trees, 18 nodes, 33 sampled tokens, 12 rewards with mean 0.5" in repr(forest)
    assert "recipe mine, policy embedded" in repr(small(LOO))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12))
def test_parents_children_and_depths_agree(seed, trees, nodes):
    record, _ = random_forest(seed, trees, nodes)
    forest = spo.Forest.of(record)
    everyone = [node for tree in forest.trees for node in tree.nodes]
    assert [node.index for node in everyone] == list(range(forest.num_nodes))
    for node in everyone:
        assert node.tree.root == node.path[0] and node.path[-1] == node
        assert node.depth == len(node.path) - 1
        assert all(child.parent == node and child.index > node.index for child in node.children)
        if node.parent is None:
            assert node == node.tree.root
        else:
            assert node.parent.children.count(node) == 1
        assert sum((above.token_ids for above in node.path), []) == record.path_ids(node.index)
        assert len(node.token_ids) == node.num_tokens == node.logprobs.numel()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")), min_size=1))
def test_the_texts_of_a_path_are_its_text(parts):
    chain = grown("é?", *((i, part, NAN) for i, part in enumerate(parts)))
    last = spo.Forest.of(assemble([chain], 1.0), Bytes()).node(-1)
    assert [node.text for node in last.path] == ["é?", *parts]
    assert last.response == "".join(parts)


def test_a_character_cut_between_nodes_is_whole_in_the_later_one():
    first, second = "é".encode()[:1], "é".encode()[1:] + b"!"
    last = spo.Forest.of(assemble([grown("?", (0, first, NAN), (1, second, 1.0))], 1.0), Bytes())
    assert [node.text for node in last.tree(0).nodes] == ["?", "\ufffd", "é!"]
    assert last.tree(0).leaves[0].response == "é!"


def test_the_text_of_the_policy_s_own_tokens():
    """A forest of the embedded policy is read without a word about its tokenizer."""
    policy = spo.Recipe().policy
    from spo.models.tokenizer import exact_text, load_tokenizer

    tokenizer = load_tokenizer(policy)
    words = ["arithmetic 13 - 7\n", "13 - 7 ", "= 6\n", "<answer> 6 </answer>\n"]
    ids = [tuple(tokenizer.encode(part, add_special_tokens=False)) for part in words]
    tree = Tree(0, Prompt(ids[0], 6, "arithmetic"))
    for parent, part in enumerate(ids[1:]):
        finish = (SEGMENT, SEGMENT, STOP)[parent]
        tree.nodes.append(
            Node(parent, part, (-1.0,) * len(part), True, True, finish, 0, (NAN, NAN, 1.0)[parent])
        )
    forest = spo.Forest.of(assemble([tree], 1.0, LOO))
    (leaf,) = forest.tree(0).leaves
    assert "".join(node.text for node in leaf.path) == exact_text(tokenizer, sum(ids, ()))
    assert leaf.response == exact_text(tokenizer, sum(ids[1:], ()))
    assert forest.with_tokenizer(tokenizer).node(-1).text == leaf.text


def test_without_a_tokenizer_one_sentence_says_what_to_do(tmp_path):
    unknown = small().with_tokenizer(None)
    with one_sentence(["does not say which policy", "with_tokenizer"]):
        _ = unknown.node(0).text
    gone = dataclasses.replace(LOO, policy=str(tmp_path / "gone"))
    for ask in (lambda f: f.node(1).response, lambda f: f.show(), lambda f: f.to_pandas()):
        with one_sentence([f"policy {tmp_path / 'gone'}", "no folder", "with_tokenizer"]):
            ask(small(gone).with_tokenizer(None))
    assert "with_tokenizer" in unknown._repr_html_() and "iframe" not in unknown._repr_html_()
    close(unknown.advantages(), PLAIN)  # numbers need no tokenizer


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        (lambda f: f.tree(2), IndexError, "tree: expected an index from -2 to 1, found 2"),
        (lambda f: f.tree(-3), IndexError, "tree: expected an index from -2 to 1, found -3"),
        (lambda f: f.show(5), IndexError, "tree: expected an index from -2 to 1, found 5"),
        (lambda f: f.node(12), IndexError, "node: expected an index from -12 to 11, found 12"),
        (lambda f: f.tree("0"), TypeError, "tree: expected an integer, found '0'"),
        (lambda f: f.tree(0.0), TypeError, "tree: expected an integer, found 0.0"),
        (lambda f: f.advantages(3), ValueError, "rule: expected a name, a Rule or a Recipe"),
        (lambda f: f.advantages("valeus"), ValueError, "credit.type: expected values, gae"),
        (lambda f: f.advantages("gae"), ValueError, "asks for the run's models (critic)"),
    ],
)
def test_odd_questions_are_one_sentence(ask, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)) as raised:
        ask(small(trees=2))
    assert "\n" not in str(raised.value)


def test_a_forest_without_trees():
    empty = select(small(LOO), torch.tensor([False]))
    assert empty.trees == [] and len(empty.to_pandas()) == 0 and "0 trees" in repr(empty)
    assert empty.values().shape == empty.advantages().shape == (0,)
    assert "0 trees" in empty._repr_html_()
    with pytest.raises(IndexError, match="tree: there is none, found 0"):
        empty.tree(0)


def drawn(page):
    """The data inside of a page."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(data)["trees"][0]


def test_the_viewer_shows_one_tree_and_no_text_is_markup(tmp_path):
    hostile = "</script><img src=x onerror=alert(1)>&amp;\"'"
    other = grown("what is 9?", *STEPS)
    trees = [other, grown(hostile, (0, hostile, NAN), (1, "x", 1.0), (1, "y", 0.0), index=1)]
    forest = spo.Forest.of(assemble(trees, 1.0, LOO), Bytes())
    page = forest.show(1)
    tree = drawn(page.html)
    pieces = [p if isinstance(p, str) else p[0] for p in tree["text"][1]]
    assert "".join(pieces) == hostile
    assert tree["advantage"] == pytest.approx(forest.advantages()[6:].tolist())
    assert "<img" not in page.html and "what is 9?" not in page.html
    frame = page._repr_html_()
    assert re.fullmatch(
        r'<iframe srcdoc="[^"<>]*" sandbox="allow-scripts" style="[^"]*"></iframe>', frame
    )
    (inside,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(inside) == page.html
    page.save(tmp_path / "tree.html")
    assert (tmp_path / "tree.html").read_text(encoding="utf-8") == page.html
    assert forest.tree(1).show().html == page.html
    assert html.escape(forest.show(0).html) in forest._repr_html_()
    kept = forest.show(1, "values")
    assert drawn(kept.html)["advantage"] == pytest.approx(forest.advantages("values")[6:].tolist())


def test_its_own_page_needs_no_recipe(tmp_path):
    small(LOO).save(tmp_path / "f.safetensors")
    page = write_forest_page(tmp_path / "f.safetensors").read_text(encoding="utf-8")
    assert drawn(page)["advantage"] == pytest.approx(LEAVE_ONE_OUT, abs=1e-5)


def test_what_a_forest_came_from_stays_with_it(tmp_path):
    forest = small(LOO, trees=2)
    forest.save(tmp_path / "f.safetensors")
    loaded = spo.Forest.load(tmp_path / "f.safetensors")
    assert loaded == forest and loaded.origin == LOO and type(loaded) is spo.Forest
    assert records.Forest.load(tmp_path / "f.safetensors") == forest
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "f.safetensors").read_bytes() == (
        tmp_path / "again.safetensors"
    ).read_bytes()
    first = select(forest, torch.tensor([True, False]))
    assert first == small(LOO) and type(first) is spo.Forest
    assert first.node(1).text == "A: "  # by the tokenizer that was given
    assert concat([first, first]) == forest
    other = dataclasses.replace(first, origin=dataclasses.replace(LOO, policy="other"))
    assert first != other and concat([first, other]).origin is None
    assert first != dataclasses.replace(first, rewards=first.rewards + 1)
    assert first != dataclasses.replace(first, prompts=()) and first != "a forest"


def test_a_damaged_origin_is_one_sentence(tmp_path):
    file = tmp_path / "f.safetensors"
    tensors = {name: getattr(small(), name) for name in records.FOREST_TENSORS}
    for origin in ({"recipe": "r"}, {"a": 1}, 3, []):
        head = {"format": records.FOREST_FORMAT, "prompts": [], "temperature": 1.0}
        save_file(tensors, file, metadata={"spo": json.dumps(head | {"origin": origin})})
        with one_sentence(["f.safetensors is not a forest file"]):
            spo.Forest.load(file)


def test_a_file_of_an_earlier_version_loads():
    forest = spo.Forest.load(ROOT / "docs" / "tree.safetensors")
    assert forest.origin is None and forest.num_nodes > 1
    assert forest.rule == Values() and forest.advantages().abs().max() > 0


def test_the_origin_of_a_recipe():
    recipe = spo.load_recipe("grpo", ["policy.path=models/mine", "loss.prob_threshold=0.8"])
    origin = origin_of(recipe)
    assert (origin.recipe, origin.policy, origin.prob_threshold) == ("grpo", "models/mine", 0.8)
    assert spo.Forest.of(assemble([], 1.0, origin)).rule == recipe.credit
    assert recipe.credit.scale == "std"  # so the line above tells it from the default
    ours = spo.load_recipe("ppo")
    assert spo.Forest.of(assemble([], 1.0, origin_of(ours))).rule == Values()  # it has a critic


def test_a_rule_from_outside_is_named_without_its_folder():
    file = ROOT / "tests" / "spo" / "outside" / "rule" / "rule.py"
    (name,) = re.findall(r"class (\w+)\(Rule\)", file.read_text())
    recipe = spo.load_recipe("grpo", [f"credit={{type: '{file}:{name}'}}"])
    origin = origin_of(recipe)
    assert origin.credit["type"] == f"rule.py:{name}"
    star = grown("2+2?", (0, "4", 1.0), (0, "567", 0.0))
    forest = spo.Forest.of(assemble([star], 1.0, origin))
    assert forest.rule == Values()  # opening a file runs no code
    close(forest.advantages(), [0, 0.5, -0.5])
    for rule in (recipe, recipe.credit, f"{file}:{name}"):  # 0.01 for each token above the mean
        close(forest.advantages(rule), [0, 0.51, -0.51])
