"""Partitions and shapes with numbers worked by hand."""

import math
import time

import numpy as np
import pytest

from spo.config.policy import PolicyConfig
from spo.config.shape import Growing
from spo.grow.chain import (
    ChainConfig,
    ChainShape,
    cutpoint_partition,
    fixed_partition,
    step_partition,
)
from spo.grow.shapes import Tree, TreeShape, star
from spo.grow.steps import line_ends, sentence_ends
from spo.models.tokenizer import load_tokenizer
from spo.records import LENGTH, SEGMENT, STOP, Completion, Prompt


def sample(token_ids, logprobs=None, finish=STOP, index=0):
    logprobs = logprobs or [0.0] * len(token_ids)
    return Completion(0, index, tuple(token_ids), tuple(logprobs), finish, 3, 3)


def tree():
    return Tree(0, Prompt((10, 11), "a", "arithmetic"))


LOW, HIGH = math.log(0.5), math.log(0.95)


@pytest.mark.parametrize(
    ("pattern", "interval", "starts"),
    [("lhhhh", 2, [0]), ("hlhlhl", 2, [0, 1, 5]), ("h", 5, [0])],  # more in test_segments.py
)
def test_cutpoints(pattern, interval, starts):
    logprobs = np.array([LOW if c == "l" else HIGH for c in pattern])
    assert cutpoint_partition(0.9, interval)(np.arange(len(pattern)), logprobs) == starts


def test_fixed():
    assert fixed_partition(4)(np.arange(9), np.zeros(9)) == [0, 4, 8]
    assert fixed_partition(4)(np.arange(8), np.zeros(8)) == [0, 4]
    assert fixed_partition(4)(np.arange(1), np.zeros(1)) == [0]


def test_steps():
    cut = step_partition(lambda token: "\n" if token == 9 else "a b", line_ends, max_steps=3)
    ids = np.array([1, 2, 9, 3, 9, 9, 4, 5, 9])
    assert cut(ids, np.zeros(9)) == [0, 3, 6]  # a run of breaks is one; the last ends the text
    assert cut(np.array([1, 9, 1, 9, 1, 9, 1, 9, 1]), np.zeros(9)) == [0, 2, 4]  # at most 3
    assert cut(np.array([1, 2]), np.zeros(2)) == [0]


@pytest.mark.parametrize(
    "steps",
    [
        ["We add.", " Then we stop.\n", "Done"],
        ["Is it 5?", " Yes!", " Then 1.5 e.g. Two vs. Three, no."],
        ["Let $x = 5. A$ hold.", " $y$ is 3.", " \\(z. A\\) too"],
        [
            "So $x = 5.$",
            " Then\n\n",
            "\\[ a. B\n= c \\]\n",
            "\\begin{align} a. B\n\\end{align}\n",
            "end",
        ],
        ["We can do it.", " The value is x.", " It costs ($\\$5.\\ A$).", " Then (Fig. A)."],
        ["It costs $5.", " Then $6.", " So $11.\n", "Open \\[ xyz.", " Cut"],
    ],
)
def test_sentences_end_outside_of_math(steps):
    cut = step_partition(chr, sentence_ends)
    ids = np.array([ord(letter) for letter in "".join(steps)])
    assert cut(ids, np.zeros(len(ids))) == [sum(map(len, steps[:i])) for i in range(len(steps))]
    assert step_partition(chr, sentence_ends, 2)(ids, np.zeros(len(ids))) == [0, len(steps[0])]


def test_what_opens_and_never_closes_costs_little():
    start = time.process_time()
    for opened in ("\\[", "$$ x", "\\begin{a}", "\\begin{", "\\(", "[asy]", "$x "):
        assert sentence_ends(opened * (40_000 // len(opened)) + ". A") == [
            40_000 // len(opened) * len(opened) + 1
        ]
    assert time.process_time() - start < 10


def test_a_boundary_inside_a_token_comes_before_the_next():
    pieces = ["x.", " Y", "\n\nz", "www.", " ", "A", "\n"]
    cut = step_partition(pieces.__getitem__, sentence_ends)
    assert cut(np.arange(7), np.zeros(7)) == [0, 1, 3, 4]


def test_a_token_adds_its_own_text():
    tokenizer = load_tokenizer(PolicyConfig())
    text = "\n".join(["3 + 4 = 7", "7 * 2 = 14"])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shape = ChainConfig(partition="sentences").make(Growing(64, tokenizer))
    (start,) = shape.partition(np.array(ids), np.zeros(len(ids)))[1:]
    assert tokenizer.decode(ids[start:]).strip() == "7 * 2 = 14"
    assert "7 * 2" not in tokenizer.decode(ids[:start])


def test_tree_grows_level_by_level():
    shape = TreeShape((2, 3), (4,), 10)
    grown = tree()
    (root,) = shape.start(grown)
    assert (root.parent, root.n, root.max_new_tokens) == (0, 2, 4)
    (child,) = shape.extend(grown, root, sample([1, 2, 3, 4], finish=LENGTH, index=1))
    assert (child.parent, child.n, child.max_new_tokens, child.path) == (1, 3, 6, (1,))
    assert grown.nodes[1].finish == SEGMENT
    assert shape.extend(grown, root, sample([1, 7])) == []  # an early stop is a leaf
    assert grown.nodes[2].finish == STOP
    assert shape.extend(grown, child, sample([5] * 6, finish=LENGTH)) == []
    assert grown.nodes[3].finish == LENGTH and grown.nodes[3].parent == 1
    assert grown.response_ids(3) == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5]


def test_star_is_a_tree_of_one_level():
    shape = star(5, 20)
    (root,) = shape.start(tree())
    assert (root.n, root.max_new_tokens, shape.max_level) == (5, 20, 0)


def test_chain_cuts_probes_and_leaves():
    shape = ChainShape(2, 3, cutpoint_partition(0.9, 1), 12)
    grown = tree()
    (trunk,) = shape.start(grown)
    probes = shape.extend(grown, trunk, sample([1, 2, 3, 4, 5], [HIGH, LOW, HIGH, LOW, HIGH]))
    nodes = grown.nodes[1:]
    assert [list(n.token_ids) for n in nodes] == [[1], [2, 3], [4, 5]]
    assert [n.finish for n in nodes] == [SEGMENT, SEGMENT, STOP]
    assert all(n.trained and not n.in_value for n in nodes)
    assert [(p.parent, p.n, p.max_new_tokens) for p in probes] == [(1, 3, 11), (2, 3, 9)]
    assert shape.extend(grown, probes[0], sample([9], finish=STOP)) == []
    probe = grown.nodes[4]
    assert (probe.parent, probe.trained, probe.in_value) == (1, False, True)


def test_chain_shares_equal_segments():
    shape = ChainShape(3, 2, cutpoint_partition(0.9, 1), 12)
    grown = tree()
    (trunk,) = shape.start(grown)
    first = shape.extend(grown, trunk, sample([1, 2, 3, 4], [HIGH, HIGH, LOW, HIGH]))
    # The sampler's logprobs of the shared prefix differ a little; the cut must not.
    second = shape.extend(grown, trunk, sample([1, 2, 7], [HIGH, math.log(0.899), LOW]))
    assert len(first) == 1 and second == []  # the boundary after (1, 2) is probed once
    shared = grown.nodes[1]
    assert (list(shared.token_ids), shared.weight) == ([1, 2], 2)
    assert [list(n.token_ids) for n in grown.nodes[2:]] == [[3, 4], [7]]
    shape.extend(grown, trunk, sample([1, 2, 3, 4], [HIGH, HIGH, LOW, HIGH]))
    assert [n.weight for n in grown.nodes[1:]] == [3, 2, 1]  # an equal trajectory adds no node


def test_chain_without_cutpoint_and_with_probed_prompt():
    shape = ChainShape(1, 4, cutpoint_partition(0.9, 5), 12, probe_prompt=True)
    grown = tree()
    trunk, prompt_probes = shape.start(grown)
    assert (prompt_probes.parent, prompt_probes.n, prompt_probes.probe) == (0, 4, True)
    assert shape.extend(grown, trunk, sample([1, 2], [HIGH, HIGH])) == []
    assert len(grown.nodes) == 2 and grown.nodes[1].finish == STOP


def test_chain_rescores():
    def rescore(prefix, ids):
        return {((10, 11), (1, 2, 3)): [LOW, HIGH, LOW]}[tuple(prefix), tuple(ids)]

    shape = ChainShape(1, 2, cutpoint_partition(0.9, 1), 12, rescore=rescore)
    grown = tree()
    (trunk,) = shape.start(grown)
    shape.extend(grown, trunk, sample([1, 2, 3], [HIGH] * 3))
    assert [list(n.token_ids) for n in grown.nodes[1:]] == [[1, 2], [3]]
    assert grown.nodes[1].logprobs == pytest.approx([LOW, HIGH])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TreeShape((), (), 8), "widths"),
        (lambda: TreeShape((2, 0), (4,), 8), "widths"),
        (lambda: TreeShape((2, 2), (), 8), "one length per level except the last"),
        (lambda: TreeShape((2, 2), (8,), 8), "fewer tokens before"),
        (lambda: TreeShape((2, 2), (0,), 8), "expected positive"),
        (lambda: ChainShape(0, 4, fixed_partition(3), 8), "group_size"),
        (lambda: fixed_partition(0), "expected 1 or more"),
    ],
)
def test_impossible_shapes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_aligned_segments_leave_one_token_to_recompute():
    shape = TreeShape((2, 2, 2), (100, 70), 400, align=32)
    assert shape.segments(65) == (96, 64)  # 65 + 96 = 161 = 5 * 32 + 1
    assert shape.segments(40) == (89, 64)  # 129 = 4 * 32 + 1; nearest to 100 of 89 and 121
    assert shape.segments(48) == (113, 64)  # 161; 81 is 19 away, 113 only 13
    assert shape.segments(1) == (96, 64)
    for prompt in range(1, 200):
        prefix = prompt
        for asked, taken in zip((100, 70), shape.segments(prompt), strict=True):
            prefix += taken
            assert prefix % 32 == 1 and abs(taken - asked) <= 16
    assert TreeShape((2, 2, 2), (100, 70), 400).segments(40) == (100, 70)


def test_aligned_tree_keeps_its_length():
    shape = TreeShape((1, 1), (40,), 100, align=32)
    grown = tree()  # a prompt of 2 tokens: the segment ends at 33
    (root,) = shape.start(grown)
    assert root.max_new_tokens == 31
    (child,) = shape.extend(grown, root, sample([1] * 31, finish=LENGTH))
    assert child.max_new_tokens == 69


def test_segments_shorter_than_a_block_are_not_aligned():
    with pytest.raises(ValueError, match="cache block of 32"):
        TreeShape((2, 2), (8,), 100, align=32)
    with pytest.raises(ValueError, match="before the last level than max_new_tokens=80, found 80"):
        TreeShape((2, 2), (64,), 80, align=32)
