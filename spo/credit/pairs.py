"""Pairs of a right and a wrong response to one prompt: DPO and DPO-Positive.

The loss of a pair reads the sums of both responses' logprobs, which may be in different packs or on
different ranks. So a step first scores its responses without a graph. Minus the derivative of the
loss by each sum is then the credit of that response, and the gradient of

    -sum_t credit_t * logprob_t

is the gradient of the pair loss. No pack needs to hold both responses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from spo.config.credit import Models, Rule
from spo.config.ranges import NotNegative, Positive
from spo.config.shape import ShapeConfig
from spo.credit.nodes import figures, of_nodes, of_tokens, rank_in_group, responses
from spo.credit.values import Values
from spo.records import Credit, Forest


@dataclass(frozen=True)
class Pairs(Rule):
    """1 on right and -1 on wrong responses, the same number of each under a prompt.

    The first responses in the order of sampling are taken, and each is in at most one pair. Before
    a step these marks become derivatives of the pair loss; its reference is the start policy.
    """

    loss: ClassVar[str] = "likelihood"
    reference: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    beta: Positive = 0.1
    """DPO's beta: a larger one keeps the policy closer to the reference."""
    positive: NotNegative = 0.0
    """Weight of DPO-Positive's penalty; 0 is DPO."""

    def check(self, shape: ShapeConfig) -> None:
        shape.require_whole_responses("credit.type=pairs")

    def assign(self, forest: Forest, models: Models | None = None) -> Credit:
        marks = torch.zeros(forest.num_nodes)
        answers = responses(forest)
        counts = [torch.bincount(forest.prompt[a], minlength=len(forest.prompts)) for a in answers]
        pairs = torch.minimum(*counts)
        for nodes, mark in zip(answers, (1.0, -1.0), strict=True):
            trees = forest.prompt[nodes]
            marks[nodes[rank_in_group(trees) < pairs[trees.long()]]] = mark
        reported = figures(forest, Values().values(forest), marks[forest.trained])
        return Credit(of_tokens(forest, marks), reported)

    def before_step(
        self, forest: Forest, credit: Credit, trees: Sequence[int], models: Models
    ) -> Credit:
        chosen = torch.zeros(len(forest.prompts), dtype=torch.bool)
        chosen[list(trees)] = True
        marks = torch.where(chosen[forest.prompt.long()], of_nodes(forest, credit.tokens), 0.0)
        pairs = pair_nodes(forest, marks)
        tokens = of_tokens(forest, marks)
        if not len(pairs):
            return dataclasses.replace(credit, tokens=tokens, figures={})
        logprobs = models.score(("policy", "reference"), forest, tokens, trees)
        weights, reported = pair_credit(
            forest, pairs, *logprobs, beta=self.beta, positive=self.positive
        )
        # A mean over pairs, not over tokens.
        return Credit(of_tokens(forest, weights), reported, norm=reported["pairs"])


def pair_nodes(forest: Forest, marks: Tensor) -> Tensor:
    """(P, 2) int64, nodes (right, wrong) with a positive and a negative mark, in sampling order.

    Raises ValueError if a prompt has unequal numbers of them.
    """
    right, wrong = (torch.nonzero(mark)[:, 0] for mark in (marks > 0, marks < 0))
    if not torch.equal(forest.prompt[right], forest.prompt[wrong]):
        raise ValueError(
            "pairs: expected as many right as wrong responses to each prompt, found unequal numbers"
        )
    return torch.stack([right, wrong], dim=1)


def node_sums(forest: Forest, token_logprobs: Tensor) -> Tensor:
    """(S,) fp64, the sum of (T,) logprobs over the tokens of every node."""
    running = torch.cat([torch.zeros(1, dtype=torch.float64), token_logprobs.double().cumsum(0)])
    return running[forest.cu_tokens].diff()


def pair_loss(
    log_ratios: Tensor,  # (P, 2), log pi - log pi_ref of the right and of the wrong response
    *,
    beta: float,
    positive: float = 0.0,
) -> Tensor:  # (P,)
    """DPO: -log sigmoid(beta (d_right - d_wrong - positive * max(0, -d_right))).

    `positive` > 0 is DPO-Positive: a penalty if the right response becomes less likely than under
    the reference.
    """
    right, wrong = log_ratios.unbind(1)
    return -logsigmoid(beta * (right - wrong - positive * (-right).clamp(min=0)))


def pair_credit(
    forest: Forest,
    pairs: Tensor,  # (P, 2) int64 nodes
    token_logprobs: Tensor,  # (T,) fp32 of the policy, read only on the pairs' tokens
    ref_token_logprobs: Tensor,  # (T,) fp32 of the reference
    *,
    beta: float,
    positive: float,
) -> tuple[Tensor, dict[str, float]]:  # (S,) fp32, -d(sum of pair losses) / d(summed logprobs)
    """Credit of every node in a pair, 0 elsewhere, and the figures of the pairs."""
    difference = token_logprobs - ref_token_logprobs
    ratios = node_sums(forest, difference)[pairs].requires_grad_()
    losses = pair_loss(ratios, beta=beta, positive=positive)
    (gradient,) = torch.autograd.grad(losses.sum(), ratios)
    credit = torch.zeros(forest.num_nodes)
    credit[pairs] = -gradient.float()
    right, wrong = ratios.detach().unbind(1)
    figures = {
        "pairs": float(len(pairs)),
        "pair_loss": float(losses.detach().mean()),
        "pair_accuracy": float((right > wrong).double().mean()),
        "pair_margin": float(beta * (right - wrong).mean()),
    }
    return credit, figures
