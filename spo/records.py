"""The records that stages pass on. All are frozen: a stage returns a new one.

Dimension letters: B prompts, S segments (nodes), T packed tokens, N loss rows, H hidden states.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

F = TypeVar("F", bound="Forest")  # `spo.Forest` among them

FOREST_FORMAT = "spo.forest.1"

PROMPT, STOP, LENGTH, SEGMENT = 0, 1, 2, 3
"""`Forest.finish`: a root; ended by a stop token; cut by the token limit; ended at a boundary."""


@dataclass(frozen=True)
class Prompt:
    """One problem, tokenised."""

    prompt_ids: tuple[int, ...]  # token ids, never re-tokenised afterwards
    answer: Any  # JSON value that the task's grader understands
    task: str  # name of the task that grades it
    opening: str = ""  # start of the response that is part of the prompt, for the grader
    columns: dict[str, Any] = field(default_factory=dict, hash=False)  # others of the row, JSON


@dataclass(frozen=True)
class Sampling:
    """How an engine draws the tokens of a request."""

    seed: int  # of sample 0; sample i has the seed `seed + i`
    temperature: float = 1.0  # 0 is greedy
    stop_token_ids: tuple[int, ...] = ()  # a sample ends with the first of these
    stop: tuple[str, ...] = ()  # and with the token that completes one of these texts
    vocab_size: int | None = None  # ids from here on are never sampled; None: every id may be
    # For evaluation alone: of the probabilities at the temperature, `min_p` drops those below this
    # share of the largest, `top_k` then keeps so many (0: all), and `top_p` the fewest whose sum is
    # at least this share of what is left. Logprobs stay those of the whole distribution.
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        """Whether some ids that the policy may draw are never sampled."""
        off = self.top_p >= 1 and self.top_k == 0 and self.min_p == 0
        return self.temperature > 0 and not off


@dataclass(frozen=True)
class Request:
    """A request to an engine for `n` samples of one prefix."""

    key: int  # unique among the requests in flight
    prefix_ids: tuple[int, ...]
    n: int
    max_new_tokens: int
    sampling: Sampling
    priority: int = 0  # lower is served first
    prompt_size: int | None = None  # tokens of the prefix before the response; None: all of them


@dataclass(frozen=True)
class Completion:
    """One finished sample of a request."""

    key: int
    index: int  # which of the request's n samples
    token_ids: tuple[int, ...]  # sampled tokens, the stop token included
    logprobs: tuple[float, ...]  # of each sampled token at the request's temperature
    finish: int  # STOP or LENGTH
    first_version: int  # weight version that sampled the first token
    last_version: int  # weight version that sampled the last token
    error: str | None = None  # why the sample failed; then there are no tokens


@dataclass(frozen=True)
class Origin:
    """The settings that a forest was grown with, as far as its text and its credit need them."""

    recipe: str  # its name
    policy: str  # policy.path as the recipe gives it; the text needs this policy's tokenizer
    credit: Mapping[str, Any]  # the group `credit`, `type` included; a file without its folder
    prob_threshold: float | None = None  # loss.prob_threshold


@dataclass(frozen=True, eq=False)
class Forest:
    """Trees of token segments under prompts; flat, parents before children, CPU tensors.

    A root holds its prompt's tokens. `save` writes one safetensors file, which the viewer, the
    replay buffer, the integrations and the tests read. Two forests are equal if all tensors are
    (NaN equals NaN) and all else is. `spo.Forest` adds what a person asks a forest for.
    """

    token_ids: Tensor  # (T,) int32
    rollout_logprobs: Tensor  # (T,) fp32, at the sampling temperature; 0 on prompt tokens
    cu_tokens: Tensor  # (S+1,) int64, node s holds tokens cu_tokens[s]:cu_tokens[s+1]
    parent: Tensor  # (S,) int32, -1 for a root
    rewards: Tensor  # (S,) fp32, NaN unless the node is a graded leaf
    in_value: Tensor  # (S,) bool, counts towards its parent's value
    trained: Tensor  # (S,) bool, its tokens get a gradient
    finish: Tensor  # (S,) int8, PROMPT, STOP, LENGTH or SEGMENT
    weight: Tensor  # (S,) int32, number of trajectories through the node
    prompt: Tensor  # (S,) int32, index of the tree's prompt in `prompts`
    born: Tensor  # (S,) int32, weight version that sampled the node; -1 for a root
    prompts: tuple[Prompt, ...] = ()  # (B,)
    temperature: float = 1.0  # of the sampling
    origin: Origin | None = None  # None: not known

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Forest):
            return NotImplemented
        rest = ("prompts", "temperature", "origin")
        return all(getattr(self, name) == getattr(other, name) for name in rest) and all(
            _same(getattr(self, name), getattr(other, name)) for name in FOREST_TENSORS
        )

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def num_nodes(self) -> int:
        return self.parent.numel()

    @property
    def num_generated(self) -> int:
        """Number of sampled tokens (each unique token once)."""
        roots = self.parent < 0
        return int((self.cu_tokens.diff()[~roots]).sum())

    @property
    def is_leaf(self) -> Tensor:
        """(S,) bool, nodes whose response has ended, so that they earn a reward."""
        return (self.finish == STOP) | (self.finish == LENGTH)

    def tokens(self, node: int) -> list[int]:
        """Token ids of one node."""
        return self.token_ids[self.cu_tokens[node] : self.cu_tokens[node + 1]].tolist()

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`, both included."""
        nodes = [node]
        while (node := int(self.parent[node])) >= 0:
            nodes.append(node)
        return nodes[::-1]

    def path_ids(self, node: int) -> list[int]:
        """Token ids from the start of the prompt to the end of `node`."""
        return [t for n in self.path(node) for t in self.tokens(n)]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file; the prompts and the origin are JSON in its header."""
        header = {
            "format": FOREST_FORMAT,
            "prompts": [dataclasses.asdict(p) for p in self.prompts],
            "temperature": self.temperature,
        }
        if self.origin is not None:
            header["origin"] = dataclasses.asdict(self.origin)
        tensors = {name: getattr(self, name).contiguous() for name in FOREST_TENSORS}
        # One key only: safetensors writes several keys in no fixed order, and equal forests must
        # make equal files.
        save_file(tensors, os.fspath(path), metadata={"spo": json.dumps(header)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a file of `save`; files of earlier versions have no origin.

        Raises ValueError with the file's name if it is not a forest.
        """
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder, expected a forest file in it")
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("spo", "{}"))
                if header.get("format") != FOREST_FORMAT:
                    raise ValueError("another format")
                tensors = {name: file.get_tensor(name) for name in FOREST_TENSORS}
            prompts = tuple(
                Prompt(**p | {"prompt_ids": tuple(p["prompt_ids"])}) for p in header["prompts"]
            )
            origin = Origin(**header["origin"]) if "origin" in header else None
            return cls(**tensors, prompts=prompts, temperature=header["temperature"], origin=origin)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable forest file: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a forest file of format {FOREST_FORMAT}") from error


FOREST_TENSORS = tuple(
    f.name for f in dataclasses.fields(Forest) if f.name not in ("prompts", "temperature", "origin")
)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same type; NaN equals NaN."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and bool(((a == b) | (a != a) & (b != b)).all())


def concat(forests: Sequence[F]) -> F:
    """One forest of all trees, in order; its origin is not known if theirs differ."""
    fields = {name: [getattr(f, name) for f in forests] for name in FOREST_TENSORS}
    nodes, tokens, trees = 0, 0, 0
    for i, f in enumerate(forests):
        fields["parent"][i] = torch.where(f.parent >= 0, f.parent + nodes, f.parent)
        fields["prompt"][i] = f.prompt + trees
        fields["cu_tokens"][i] = (f.cu_tokens + tokens)[0 if i == 0 else 1 :]
        nodes, tokens, trees = (
            nodes + f.num_nodes,
            tokens + f.token_ids.numel(),
            trees + len(f.prompts),
        )
    first = forests[0]
    return type(first)(
        **{name: torch.cat(parts) for name, parts in fields.items()},
        prompts=tuple(p for f in forests for p in f.prompts),
        temperature=first.temperature,
        origin=first.origin if all(f.origin == first.origin for f in forests) else None,
    )


def select(forest: F, trees: Tensor) -> F:
    """The trees where `trees` (B,) bool is True."""
    nodes = trees[forest.prompt.long()]
    sizes = forest.cu_tokens.diff()
    tokens = nodes.repeat_interleave(sizes)
    index = nodes.cumsum(0).to(torch.int32) - 1
    parent = forest.parent[nodes]
    per_node = set(FOREST_TENSORS) - {"token_ids", "rollout_logprobs", "cu_tokens"}
    fields = {name: getattr(forest, name)[nodes] for name in per_node}
    fields["parent"] = torch.where(parent >= 0, index[parent.clamp(min=0).long()], parent)
    fields["prompt"] = (trees.cumsum(0).to(torch.int32) - 1)[forest.prompt[nodes].long()]
    return dataclasses.replace(
        forest,
        **fields,
        token_ids=forest.token_ids[tokens],
        rollout_logprobs=forest.rollout_logprobs[tokens],
        cu_tokens=torch.cat([torch.zeros(1, dtype=torch.int64), sizes[nodes].cumsum(0)]),
        prompts=tuple(p for p, keep in zip(forest.prompts, trees.tolist(), strict=True) if keep),
    )


@dataclass(frozen=True)
class Targets:
    """The targets of a critic from one rollout."""

    values: Tensor  # (T,) fp32, the critic's estimates when the credit was assigned
    returns: Tensor  # (T,) fp32


@dataclass(frozen=True)
class Credit:
    """What each token of a forest is worth."""

    tokens: Tensor  # (T,) fp32, 0 where a token does not train
    figures: dict[str, float] = field(default_factory=dict)  # to report
    targets: Targets | None = None  # of the critic
    norm: float | None = None  # divisor of a step's loss; None: as the recipe's loss says


@dataclass(frozen=True)
class Replay:
    """Trees kept between iterations; `forest.trained` marks the nodes still to train."""

    forest: Forest | None = None  # None: empty
    credit: Tensor | None = None  # (T,) fp32
    received: Tensor | None = None  # (B,) int64, iterations whose rollout each tree came from


@dataclass(frozen=True)
class Batch:
    """A packed micro-batch: every token once, in depth-first order."""

    token_ids: Tensor  # (T,) int64, the packed tokens
    position_ids: Tensor  # (T,) int64, position along the path, not in the pack
    visible_until: Tensor  # (T,) int32, key k is visible to query q iff k <= q < visible_until[k]
    hidden_index: Tensor  # (N,) int64, packed position whose hidden state predicts the row
    targets: Tensor  # (N,) int64, token ids of the rows
    old_logprobs: Tensor  # (N,) fp32
    advantages: Tensor  # (N,) fp32
    loss_mask: Tensor  # (N,) bool; the KL term may cover the other rows too
    policy_norm: float  # Z of the whole optimiser step, over all micro-batches and ranks
    kl_norm: float  # tokens that the KL term covers in the whole step
    share: float  # of the step's kept tokens, those in this batch
    ref_logprobs: Tensor | None = None  # (N,) fp32
    token_index: Tensor | None = None  # (N,) int64, index of each row's token in the forest


@dataclass(frozen=True)
class LossOutput:
    """A differentiable loss, and detached figures to report."""

    loss: Tensor  # () fp32
    metrics: dict[str, float]
