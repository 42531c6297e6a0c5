"""`spo.Forest`: a forest as a person asks it for trees, nodes, text, values and advantages.

    forest = spo.Forest.load("runs/spo-tree/forest-last.safetensors")
    best = max(forest.tree(3).leaves, key=lambda leaf: leaf.reward)

Nothing is computed, loaded or decoded before it is asked for.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spo import records
from spo.config.credit import Rule
from spo.config.policy import PolicyConfig
from spo.credit.worth import RuleLike, node_advantages, node_values, rule_of, rule_of_origin
from spo.extras import missing
from spo.records import Prompt
from spo.report.html import CONTEXT, Page, TreeView, report_page, text_pieces

if TYPE_CHECKING:
    import pandas

FINISH = ("prompt", "stop", "length", "segment")
"""Words for `Forest.finish`: a root; ended by itself; cut by the limit; ended at a boundary."""


@dataclass(frozen=True, eq=False, repr=False)
class Forest(records.Forest):
    """The trees of one rollout, node by node or as arrays; `spo.records.Forest` has the tensors.

    Text needs the tokenizer of the policy that the forest was grown with, which is loaded at its
    first use. A `rule` says what a node is worth: a name (`values`), a `Rule`, or a `Recipe` that
    has one. The default is the property `rule`.
    """

    own_tokenizer: Any = None  # of `with_tokenizer`

    @classmethod
    def of(cls, forest: records.Forest, tokenizer: Any = None) -> Forest:
        """The same forest, of this class; the tensors are shared."""
        fields = {f.name: getattr(forest, f.name) for f in dataclasses.fields(records.Forest)}
        return cls(**fields, own_tokenizer=tokenizer)

    def with_tokenizer(self, tokenizer: Any) -> Forest:
        """The same forest, whose text is decoded by this tokenizer of transformers."""
        return dataclasses.replace(self, own_tokenizer=tokenizer)

    def __repr__(self) -> str:
        graded = self.rewards[self.rewards.isfinite()]
        text = f"{len(self.prompts)} trees, {self.num_nodes} nodes, {self.num_generated} sampled "
        text += f"tokens, {graded.numel()} rewards"
        if graded.numel():
            text += f" with mean {float(graded.mean()):.3g}"
        if self.origin is not None:
            text += f"; recipe {self.origin.recipe}, policy {self.origin.policy}"
        return f"<spo.Forest: {text}>"

    @property
    def trees(self) -> list[ForestTree]:
        return [ForestTree(self, index) for index in range(len(self.prompts))]

    def tree(self, index: int) -> ForestTree:
        """One tree; -1 is the last. Raises IndexError, or TypeError for what is no integer."""
        return ForestTree(self, _checked("tree", index, len(self.prompts)))

    def node(self, index: int) -> ForestNode:
        """The node at this index of the tensors; -1 is the last. Raises as `tree` does."""
        return ForestNode(self, _checked("node", index, self.num_nodes))

    @cached_property
    def _children(self) -> list[list[int]]:
        children: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                children[parent].append(node)
        return children

    @cached_property
    def _depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self.parent.tolist():
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    @cached_property
    def tokenizer(self) -> Any:
        """That of `with_tokenizer`, else that of the origin's policy.

        Raises ValueError with one sentence if it cannot be loaded. Code that comes with a policy is
        never run here.
        """
        if self.own_tokenizer is not None:
            return self.own_tokenizer
        way = "give its tokenizer: forest.with_tokenizer(tokenizer)"
        if self.origin is None:
            raise ValueError(f"text: the forest does not say which policy it was grown with; {way}")
        from spo.models.tokenizer import load_tokenizer  # transformers takes seconds

        try:
            return load_tokenizer(PolicyConfig(path=self.origin.policy))
        except ValueError as error:
            raise ValueError(
                f"text: the policy {self.origin.policy}, which the forest was grown with, has no "
                f"tokenizer here ({error}); {way}"
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones included, exactly as they spell it."""
        from spo.models.tokenizer import exact_text

        return exact_text(self.tokenizer, list(token_ids))

    def text(self, node: int) -> str:
        """The text that a node adds to its path; a character that it cuts is shown as U+FFFD."""
        before: list[int] = []
        for above in reversed(self.path(node)[:-1]):
            before = self.tokens(above) + before
            if len(before) >= CONTEXT:
                break
        ids = self.tokens(node)
        pieces = text_pieces(self.decode, before[-CONTEXT:], ids, [False] * len(ids), [])
        return "".join(piece for piece in pieces if isinstance(piece, str))

    @cached_property
    def rule(self) -> Rule:
        """The recipe's credit rule; `Values()` if it is not known, not ours or has a critic."""
        return rule_of_origin(self.origin)

    def values(self, rule: RuleLike | None = None) -> Tensor:
        """(S,) fp32, the Monte-Carlo value of every node; NaN if it has none.

        A rule that is not of differences of values leaves the values as `Values()` has them.
        """
        return node_values(self, self.rule if rule is None else rule_of(rule))

    def advantages(self, rule: RuleLike | None = None) -> Tensor:
        """(S,) fp32, the credit of every node; 0 if it does not train.

        Where a rule's credit differs from token to token, it is the node's largest by magnitude.
        Raises ValueError if the rule needs the models of the run (gae) or cannot credit the forest.
        """
        return node_advantages(self, self.rule if rule is None else rule_of(rule))

    @cached_property
    def _worth(self) -> tuple[list[float], list[float]]:
        """Values and advantages of the nodes, by the default rule."""
        return self.values().tolist(), self.advantages().tolist()

    def to_pandas(self, rule: RuleLike | None = None, *, text: bool = True) -> pandas.DataFrame:
        """A frame with one row per node, in the order of the tensors; `node` is its index.

        Args:
            text: with the column `text`, which needs the tokenizer.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(missing(error) or str(error), name=error.name) from error
        columns: dict[str, Any] = {
            "tree": self.prompt.numpy(),
            "parent": self.parent.numpy(),
            "depth": self._depths,
            "num_tokens": self.cu_tokens.diff().numpy(),
            "finish": [FINISH[code] for code in self.finish.tolist()],
            "reward": self.rewards.numpy(),
            "value": self.values(rule).numpy(),
            "advantage": self.advantages(rule).numpy(),
            "logprob": [float(self.node(i).logprobs.sum()) for i in range(self.num_nodes)],
            "weight": self.weight.numpy(),
            "trained": self.trained.numpy(),
            "in_value": self.in_value.numpy(),
            "born": self.born.numpy(),
        }
        if text:
            columns["text"] = [self.text(node) for node in range(self.num_nodes)]
        return pandas.DataFrame(columns, index=pandas.RangeIndex(self.num_nodes, name="node"))

    def view(
        self,
        title: str,
        rule: RuleLike | None,
        prob_threshold: float | None,
        tree: int | None = None,
    ) -> TreeView:
        """What the viewer shows: all trees, or one. Tokens below the threshold are underlined."""
        values, advantages = self.values(rule), self.advantages(rule)
        forest = self
        if tree is not None:
            nodes = self.prompt == tree
            forest = records.select(self, torch.arange(len(self.prompts)) == tree)
            values, advantages = values[nodes], advantages[nodes]
        kept = None
        if prob_threshold is not None:
            kept = forest.rollout_logprobs < math.log(prob_threshold)
        return TreeView(title, forest, values, advantages, self.decode, kept)

    def show(self, tree: int = 0, rule: RuleLike | None = None) -> Page:
        """The viewer with one tree: as the last line of a notebook's cell it is drawn there.

        In a script: `forest.show(3).save("tree.html")`. Raises as `tree` and `text` do.
        """
        index = self.tree(tree).index
        threshold = self.origin.prob_threshold if self.origin is not None else None
        title = f"Tree {index}"
        return report_page(trees=[self.view(title, rule, threshold, index)], title=title)

    def _repr_html_(self) -> str:
        """The first tree in a notebook; the line of `repr` if there is none, or no text."""
        line = f"<pre>{escape(repr(self))}</pre>"
        try:
            return line + (self.show()._repr_html_() if self.prompts else "")
        except ValueError as error:
            return f"{line}<pre>{escape(str(error))}</pre>"


@dataclass(frozen=True)
class ForestTree:
    """One tree of a forest: a prompt, and what grew under it."""

    forest: Forest = dataclasses.field(repr=False, hash=False)
    index: int

    @property
    def prompt(self) -> Prompt:
        return self.forest.prompts[self.index]

    @property
    def nodes(self) -> list[ForestNode]:
        """All nodes, parents before children."""
        found = (self.forest.prompt == self.index).nonzero()[:, 0]
        return [ForestNode(self.forest, node) for node in found.tolist()]

    @property
    def root(self) -> ForestNode:
        """The node with the tokens of the prompt."""
        return self.nodes[0]

    @property
    def leaves(self) -> list[ForestNode]:
        """The nodes whose response has ended."""
        ended = self.forest.is_leaf.tolist()
        return [node for node in self.nodes if ended[node.index]]

    def show(self, rule: RuleLike | None = None) -> Page:
        """See `Forest.show`."""
        return self.forest.show(self.index, rule)


@dataclass(frozen=True)
class ForestNode:
    """One node of a forest: a segment of tokens. Worth is by the forest's default rule."""

    forest: Forest = dataclasses.field(repr=False, hash=False)
    index: int  # in the forest's tensors

    @property
    def tree(self) -> ForestTree:
        return ForestTree(self.forest, int(self.forest.prompt[self.index]))

    @property
    def parent(self) -> ForestNode | None:
        """None for a root."""
        above = int(self.forest.parent[self.index])
        return ForestNode(self.forest, above) if above >= 0 else None

    @property
    def children(self) -> list[ForestNode]:
        return [ForestNode(self.forest, child) for child in self.forest._children[self.index]]

    @property
    def path(self) -> list[ForestNode]:
        """The nodes from the root to this one, both included."""
        return [ForestNode(self.forest, node) for node in self.forest.path(self.index)]

    @property
    def depth(self) -> int:
        """Number of nodes above; 0 for a root."""
        return self.forest._depths[self.index]

    @property
    def token_ids(self) -> list[int]:
        return self.forest.tokens(self.index)

    @property
    def num_tokens(self) -> int:
        return int(self.forest.cu_tokens[self.index + 1] - self.forest.cu_tokens[self.index])

    @property
    def logprobs(self) -> Tensor:
        """(num_tokens,) fp32, of each token when it was sampled; 0 on prompts."""
        start, end = self.forest.cu_tokens[self.index : self.index + 2].tolist()
        return self.forest.rollout_logprobs[start:end]

    @property
    def text(self) -> str:
        """See `Forest.text`."""
        return self.forest.text(self.index)

    @property
    def response(self) -> str:
        """The text from the end of the prompt to the end of this node."""
        return self.forest.decode([t for node in self.path[1:] for t in node.token_ids])

    @property
    def finish(self) -> str:
        """One of `FINISH`."""
        return FINISH[int(self.forest.finish[self.index])]

    @property
    def reward(self) -> float:
        """NaN unless the node is a graded leaf."""
        return float(self.forest.rewards[self.index])

    @property
    def value(self) -> float:
        """NaN if the node has none."""
        return self.forest._worth[0][self.index]

    @property
    def advantage(self) -> float:
        """0 if the node does not train."""
        return self.forest._worth[1][self.index]


def _checked(name: str, index: int, size: int) -> int:
    """`index` as an int from 0 on. Raises TypeError if it is none, IndexError if it is outside."""
    try:
        found = operator.index(index)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, found {index!r}") from None
    if not -size <= found < size:
        expected = f"expected an index from {-size} to {size - 1}" if size else "there is none"
        raise IndexError(f"{name}: {expected}, found {found}")
    return found % size
