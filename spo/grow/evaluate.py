"""Pass@1, Pass@k and majority vote, through the same engine and grader as training."""

from __future__ import annotations

import dataclasses
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb

import torch

from spo.config.evaluation import TEST, pass_ks
from spo.engines.protocol import Engine
from spo.grow.rollout import RolloutOptions
from spo.grow.shapes import star
from spo.grow.stream import grow
from spo.metrics import mean_stderr
from spo.records import STOP, Forest, Prompt, Sampling
from spo.reward import is_right
from spo.tasks.grading import Grader


@dataclass(frozen=True)
class Accuracy:
    """Pass@1 with responses of at most `max_new_tokens`."""

    max_new_tokens: int
    pass_at_1: float  # mean over problems of the share of right samples
    stderr: float  # of that mean
    problems: int  # with at least one graded sample
    samples: int  # per problem
    temperature: float  # 0 is greedy
    truncated: float  # share of the responses that the limit cut
    mean_tokens: float  # of a response, cut ones included
    too_long: int = 0  # problems left out, as a response may not fit the context
    pass_at: dict[int, float] = field(default_factory=dict)  # k -> Pass@k, of several samples
    pass_at_stderr: dict[int, float] = field(default_factory=dict)
    majority: float | None = None  # see `majority`; None without samples or answers to vote with
    majority_stderr: float | None = None
    set: str = TEST  # name of the evaluation set
    truncation: dict[str, float] = field(default_factory=dict)  # top_p, top_k, min_p, if they cut

    def figures(self, kind: str) -> dict[str, float]:
        """The keys of a metrics line for these figures, each with its standard error."""
        found = {kind: self.pass_at_1, f"{kind}_stderr": self.stderr}
        for k in list(self.pass_at)[1:]:
            found |= {f"pass_at_{k}": self.pass_at[k]}
            found |= {f"pass_at_{k}_stderr": self.pass_at_stderr[k]}
        if self.majority is not None and self.majority_stderr is not None:
            found |= {"majority": self.majority, "majority_stderr": self.majority_stderr}
        return found


def accuracies(
    prompts: Sequence[Prompt],
    engine: Engine,
    grader: Grader,
    decode: Callable[[list[int]], str],
    options: RolloutOptions,
    limits: Sequence[int],
    samples: int = 1,
    votes: bool = False,
) -> list[Accuracy]:
    """Pass@1 under every limit on the response, from one rollout with the largest limit.

    Of several samples also Pass@k, for k = 1, 2, 4, … and `samples`, and with `votes` the majority
    vote, which needs the task's method `answer`.

    A response does not depend on the limit until it reaches it, so shorter limits need no extra
    rollout. A truncated response counts as wrong. A failed grading is left out, never a zero, and
    so is a problem whose prompt does not fit the context with the largest limit.
    """
    options = dataclasses.replace(options, truncated="zero")
    forest, stats = grow(prompts, engine, star(samples, max(limits)), grader, decode, options)
    _warn_if_none_can_be_right(stats.judged, options)
    responses = forest.parent >= 0
    sizes, rewards = forest.cu_tokens.diff()[responses], forest.rewards[responses]
    stopped, trees = forest.finish[responses] == STOP, forest.prompt[responses].tolist()
    votes, sampling = votes and samples > 1, options.sampling
    off = Sampling(0)
    truncation = {
        name: getattr(sampling, name)
        for name in ("top_p", "top_k", "min_p")
        if sampling.truncates and getattr(sampling, name) != getattr(off, name)
    }
    answers = _answers(forest, grader, decode) if votes else [None] * len(trees)
    results = []
    for limit in limits:
        whole = stopped & (sizes <= limit)
        graded: dict[int, list[tuple[str | None, float]]] = defaultdict(list)
        scores = torch.where(whole, rewards, 0.0).tolist()
        for tree, score, said, ended in zip(trees, scores, answers, whole.tolist(), strict=True):
            if score == score:
                graded[tree].append((said if ended else None, score))
        each = [[score for _, score in one] for one in graded.values()]
        mean, stderr = mean_stderr(sum(s) / len(s) for s in each)
        cut, tokens = (~whole).double().mean(), sizes.clamp(max=limit).double().mean()
        found = Accuracy(
            limit, mean, stderr, len(each), samples, sampling.temperature, float(cut),
            float(tokens), stats.too_long, truncation=truncation,
        )  # fmt: skip
        if samples > 1:
            found = _of_several(found, each)
        if votes:
            won, error = mean_stderr(map(majority, graded.values()))
            found = dataclasses.replace(found, majority=won, majority_stderr=error)
        results.append(found)
    return results


def _warn_if_none_can_be_right(rewards: Sequence[float], options: RolloutOptions) -> None:
    """Warn, at the first evaluation of a run, if rewards differ from 0 and none is large enough."""
    name = "reward.success"
    if options.success is None or not rewards or not options.is_news(name):
        return
    if any(rewards) and not is_right(max(rewards), options.success):
        warnings.warn(
            f"{name}: no response of the first evaluation counts as right, as the largest of "
            f"{len(rewards)} rewards is {max(rewards):g}, expected {options.success:g} or more; "
            "set it to the reward of a right response",
            stacklevel=2,
        )


def pass_at(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from `right` of n >= k.

    Chen et al. 2021 (arXiv 2107.03374): 1 - C(n - right, k) / C(n, k).
    """
    return 1 - comb(n - right, k) / comb(n, k)


def majority(samples: Sequence[tuple[str | None, float]]) -> float:
    """Score of the most frequent answer (self-consistency, Wang et al. 2022).

    Samples are (answer, score) pairs; those without an answer do not vote, and if none does the
    score is 0. Answers with equally many votes share the win, so that no order matters, and so do
    samples with one answer and different scores.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, score in samples:
        if answer is not None:
            votes[answer].append(score)
    most = max(map(len, votes.values()), default=0)
    winners = [sum(scores) / most for scores in votes.values() if len(scores) == most]
    return sum(winners) / len(winners) if winners else 0.0


def _of_several(found: Accuracy, each: Sequence[Sequence[float]]) -> Accuracy:
    """With Pass@k; problems with fewer than k graded samples are left out of it."""
    for k in pass_ks(found.samples):
        shares = [pass_at(len(s), s.count(1.0), k) for s in each if len(s) >= k]
        if shares:
            found.pass_at[k], found.pass_at_stderr[k] = mean_stderr(shares)
    return found


def _answers(
    forest: Forest, grader: Grader, decode: Callable[[list[int]], str]
) -> list[str | None]:
    """The answer of each response that ended; None for others and where the task finds none."""
    responses = (forest.parent >= 0).nonzero()[:, 0].tolist()
    ended = [node for node in responses if forest.finish[node] == STOP]
    asked = []
    for node in ended:
        prompt = forest.prompts[int(forest.prompt[node])]
        asked.append((prompt.task, prompt.opening + decode(forest.tokens(node))))
    found = dict(zip(ended, grader.answers(asked), strict=True))
    return [found.get(node) for node in responses]
