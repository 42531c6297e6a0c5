"""Chains: responses cut into segments, with probes from each boundary: SPO-chain and VinePPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch

from spo.config.ranges import Count, PositiveInt, Probability
from spo.config.shape import Cost, Growing, ShapeConfig
from spo.grow.shapes import Growth, Node, Shape, Tree, sampled
from spo.grow.steps import line_ends, sentence_ends
from spo.models.tokenizer import exact_text
from spo.records import SEGMENT, Completion
from spo_kernels import cutpoint_segments

Partition = Callable[[np.ndarray, np.ndarray], list[int]]
"""(token_ids (L,), logprobs (L,)) -> segment starts, ascending; the first is 0."""


def cutpoint_partition(prob_threshold: float, interval: int) -> Partition:
    """A boundary before every `interval`-th token whose probability is below the threshold."""

    def partition(token_ids: np.ndarray, logprobs: np.ndarray) -> list[int]:
        packed = torch.from_numpy(logprobs.astype(np.float32))
        cu_seqlens = torch.tensor([0, len(token_ids)])
        return cutpoint_segments(packed, cu_seqlens, prob_threshold, interval)[0][:-1].tolist()

    return partition


def fixed_partition(segment_tokens: int) -> Partition:
    """A boundary every `segment_tokens` tokens."""
    if segment_tokens < 1:
        raise ValueError(f"shape.segment_tokens: expected 1 or more, found {segment_tokens}")
    return lambda token_ids, logprobs: list(range(0, len(token_ids), segment_tokens))


def step_partition(
    text_of: Callable[[int], str],  # a token's own part of the text
    ends: Callable[[str], list[int]],  # where steps of a text end
    max_steps: int = 25,
) -> Partition:
    """A boundary before the first token after each end of a step, for at most `max_steps` steps.

    Tokens after the last allowed boundary belong to the last step.
    """

    def partition(token_ids: np.ndarray, logprobs: np.ndarray) -> list[int]:
        pieces = [text_of(token) for token in token_ids.tolist()]
        starts = np.cumsum([0, *map(len, pieces)])[:-1]
        inner = np.unique(np.searchsorted(starts, ends("".join(pieces)))).tolist()
        return [0, *(start for start in inner if 0 < start < len(pieces))][:max_steps]

    return partition


@dataclass(frozen=True)
class ChainShape:
    """`group_size` trajectories per prompt, each cut into segments by `partition`.

    `num_probes` completions from every inner boundary estimate its value, and from the prompt too
    if `probe_prompt`. Trajectories that share a segment token for token share its node and probes.
    `rescore(prefix_ids, token_ids)` gives the trainer's logprobs in place of the sampler's.
    """

    group_size: int
    num_probes: int
    partition: Partition
    max_new_tokens: int
    probe_prompt: bool = False
    rescore: Callable[[list[int], list[int]], list[float]] | None = None
    max_level: int = 1

    def __post_init__(self):
        if self.group_size < 1 or self.num_probes < 1:
            raise ValueError(
                "shape.group_size and shape.num_probes: expected positive numbers, "
                f"found {self.group_size} and {self.num_probes}"
            )

    def start(self, tree: Tree) -> list[Growth]:
        trunk = Growth(0, self.group_size, self.max_new_tokens, ())
        probes = Growth(0, self.num_probes, self.max_new_tokens, (0,), 1, probe=True)
        return [trunk, probes] if self.probe_prompt else [trunk]

    def extend(self, tree: Tree, growth: Growth, sample: Completion) -> list[Growth]:
        if growth.probe:
            tree.add(sampled(growth.parent, sample, sample.finish, trained=False, in_value=True))
            return []
        token_ids = np.array(sample.token_ids)
        logprobs = self._logprobs(tree, token_ids, sample)
        starts = self.partition(token_ids, logprobs)
        growths: list[Growth] = []
        parent = 0
        for start, end in zip(starts, [*starts[1:], len(token_ids)], strict=True):
            last = end == len(token_ids)
            piece = sample.token_ids[start:end]
            finish = sample.finish if last else SEGMENT
            node = _shared(tree, parent, piece, finish)
            if node is not None:
                tree.nodes[node].weight += 1
            else:
                node = tree.add(
                    Node(
                        parent,
                        piece,
                        logprobs[start:end].tolist(),
                        trained=True,
                        in_value=False,
                        finish=finish,
                        born=sample.first_version,
                        index=sample.index,
                    )
                )
                if not last:
                    rest = self.max_new_tokens - end
                    path = (1, *sample.token_ids[:end])  # equal prefixes are one node, one seed
                    growths.append(Growth(node, self.num_probes, rest, path, 1, probe=True))
            parent = node
        return growths

    def _logprobs(self, tree: Tree, token_ids: np.ndarray, sample: Completion) -> np.ndarray:
        """Logprobs of the trajectory.

        Where it repeats an earlier trajectory, the earlier logprobs are taken, so that equal
        prefixes are cut at equal boundaries.
        """
        if self.rescore is not None:
            values = self.rescore(list(tree.prompt.prompt_ids), list(sample.token_ids))
            logprobs = np.array(values)
        else:
            logprobs = np.array(sample.logprobs)
        best, source = 0, None
        for earlier_ids, earlier_logprobs in tree.trajectories:
            size = min(len(earlier_ids), len(token_ids))
            same = earlier_ids[:size] == token_ids[:size]
            shared = size if same.all() else int(same.argmin())
            if shared > best:
                best, source = shared, earlier_logprobs
        if source is not None:
            logprobs[:best] = source[:best]
        tree.trajectories.append((token_ids, logprobs))
        return logprobs


def _shared(tree: Tree, parent: int, token_ids: Sequence[int], finish: int) -> int | None:
    """The trained node under `parent` with exactly these tokens, if there is one."""
    for index, node in enumerate(tree.nodes):
        if node.parent == parent and node.trained and node.finish == finish:
            if tuple(node.token_ids) == tuple(token_ids):
                return index
    return None


def text_of(tokenizer) -> Callable[[int], str]:
    """The text that a token adds; some tokenizers drop the space before a first word."""

    @cache
    def text_of(token: int) -> str:
        return exact_text(tokenizer, [token, token])[len(exact_text(tokenizer, [token])) :]

    return text_of


@dataclass(frozen=True)
class ChainConfig(ShapeConfig):
    """Responses cut into segments, with probes from each boundary: SPO-chain and VinePPO."""

    siblings: ClassVar[bool] = False  # probes are counted, trajectories are trained

    group_size: Count = 8
    """Responses per prompt."""
    num_probes: Count = 9
    """Probes per boundary: completions that estimate its value."""
    probe_prompt: bool = False
    """Estimate the prompt's value by probes too; otherwise `credit.root_value` gives it."""
    partition: Literal["cutpoint", "fixed", "steps", "sentences"] = "cutpoint"
    """Where to cut. cutpoint: before every `interval`-th low-probability token. fixed: every
    `segment_tokens` tokens. steps: after line breaks (VinePPO). sentences: after line breaks and
    after sentences outside LaTeX math (VinePPO on MATH)."""
    prob_threshold: Probability = 0.9
    """cutpoint: a token is a cutpoint if its sampling probability is below this."""
    interval: PositiveInt = 5
    """cutpoint: cutpoints per segment."""
    segment_tokens: PositiveInt = 30
    """fixed: length of the segments."""
    max_steps: PositiveInt = 25
    """steps, sentences: maximum number of segments per response."""
    rescore: bool = False
    """Take the probabilities from the trainer's forward pass instead of the sampler."""

    @property
    def rescores(self) -> bool:
        return self.rescore

    def make(self, growing: Growing) -> Shape:
        if self.partition == "cutpoint":
            partition = cutpoint_partition(self.prob_threshold, self.interval)
        elif self.partition == "fixed":
            partition = fixed_partition(self.segment_tokens)
        else:
            ends = line_ends if self.partition == "steps" else sentence_ends
            partition = step_partition(text_of(growing.tokenizer), ends, self.max_steps)
        return ChainShape(
            self.group_size,
            self.num_probes,
            partition,
            growing.max_new_tokens,
            probe_prompt=self.probe_prompt,
            rescore=growing.rescore if self.rescore else None,
        )

    def cost(self, max_new_tokens: int) -> Cost:
        """Cost if every token were a boundary that the partition may take."""
        starts = self.boundaries(max_new_tokens)
        probes = self.group_size * len(starts) * self.num_probes
        lengths = self.group_size * sum(max_new_tokens - start for start in starts)
        if self.probe_prompt:
            probes += self.num_probes
            lengths += max_new_tokens
        return Cost(
            self.group_size * max_new_tokens, self.group_size + probes, lengths * self.num_probes
        )

    def boundaries(self, max_new_tokens: int) -> range:
        """The probed boundaries of a full-length response that is cut as often as possible."""
        if self.partition == "fixed":
            return range(self.segment_tokens, max_new_tokens, self.segment_tokens)
        if self.partition in ("steps", "sentences"):
            return range(1, min(self.max_steps, max_new_tokens))
        return range(1, max_new_tokens, self.interval)
