"""What each method estimates, against the exact policy gradient of a toy policy.

The policy is a table of logits over two or three tokens, responses are at most two or three tokens
long, rewards are a table. Every tree that a shape can grow is enumerated with its probability and
goes through `assign`, `pack` and `masked_ppo_loss`; so the expectations below are exact.
"""

import itertools
import math
from collections import deque
from dataclasses import dataclass

import pytest
import torch

from spo.credit.correct import Correct
from spo.credit.gae import token_credit
from spo.credit.values import Values
from spo.grow.assemble import assemble, is_leaf
from spo.grow.chain import ChainShape, cutpoint_partition, fixed_partition, step_partition
from spo.grow.shapes import Tree, TreeShape, star
from spo.grow.steps import line_ends
from spo.learn.pack import pack
from spo.records import LENGTH, STOP, Completion, Prompt
from spo_kernels import masked_ppo_loss

END = 0  # the stop token
PROMPT_ID = 7  # outside the vocabulary, never a target


class Toy:
    """A tabular softmax policy under one prompt and a reward for every response."""

    def __init__(self, vocabulary, depth, seed):
        self.depth = depth
        going = range(1, vocabulary)
        prefixes = [p for n in range(depth) for p in itertools.product(going, repeat=n)]
        self.state = {prefix: row for row, prefix in enumerate(prefixes)}
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(len(prefixes), vocabulary, generator=generator)
        responses = [ids for ids, _, _ in self.samples((), depth)]
        rewards = torch.rand(len(responses), generator=generator)
        self.rewards = dict(zip(responses, rewards.tolist(), strict=True))

    def samples(self, prefix, limit):
        """Every continuation of at most `limit` tokens: (token_ids, logprobs, finish)."""
        logprobs = self.logits[self.state[prefix]].log_softmax(-1).tolist()
        for token, logprob in enumerate(logprobs):
            if token == END or limit == 1:
                yield (token,), (logprob,), STOP if token == END else LENGTH
            else:
                for ids, rest, finish in self.samples((*prefix, token), limit - 1):
                    yield (token, *ids), (logprob, *rest), finish

    def gradient(self, logits):
        """Of the expected reward, by enumeration of the responses, fp64."""
        logits = logits.double().requires_grad_()
        logprobs = logits.log_softmax(-1)
        expected = 0.0
        for ids, reward in self.rewards.items():
            path = [logprobs[self.state[ids[:i]], token] for i, token in enumerate(ids)]
            expected = expected + reward * torch.stack(path).sum().exp()
        expected.backward()
        return logits.grad


@dataclass(frozen=True)
class Rows:
    """The loss rows of every outcome, one after the other."""

    states: torch.Tensor  # (N,) int64, row of the policy's table
    targets: torch.Tensor  # (N,) int64
    old_logprobs: torch.Tensor  # (N,)
    advantages: torch.Tensor  # (N,)
    probability: torch.Tensor  # (N,) of the row's outcome
    norm: torch.Tensor  # (N,) Z of the row's outcome


def outcomes(toy, shape):
    """Every tree that the shape can grow, with its probability: all choices at all samples."""
    waiting = [()]
    while waiting:
        choices = waiting.pop()
        tree, probability, made = Tree(0, Prompt((PROMPT_ID,), None, "toy")), 1.0, []
        growths = deque(shape.start(tree))
        while growths:
            growth = growths.popleft()
            prefix = tuple(tree.response_ids(growth.parent))
            options = list(toy.samples(prefix, growth.max_new_tokens))
            for index in range(growth.n):
                if len(made) == len(choices):
                    waiting += [(*made, other) for other in range(1, len(options))]
                    choices = (*choices, 0)
                ids, logprobs, finish = options[choices[len(made)]]
                made.append(choices[len(made)])
                probability *= math.exp(sum(logprobs))
                growths += shape.extend(
                    tree, growth, Completion(0, index, ids, logprobs, finish, 0, 0)
                )
        for index, node in enumerate(tree.nodes):
            if is_leaf(node):
                node.reward = toy.rewards[tuple(tree.response_ids(index))]
        yield assemble([tree], 1.0), probability


def collect(toy, shape, rule, threshold=None):
    """The rows that the trainer would feed to the loss, over all outcomes.

    `rule` is the recipe's, or a function of the forest that gives the credit.
    """
    parts, total = [], 0.0
    for forest, probability in outcomes(toy, shape):
        total += probability
        credit = rule(forest) if callable(rule) else rule.assign(forest).tokens
        batches, stats = pack(forest, credit, prob_threshold=threshold, tokens_per_batch=1 << 20)
        for batch in batches:
            states = []
            for place in batch.hidden_index.tolist():  # the path to the row, the prompt left out
                seen = batch.visible_until[: place + 1] > place
                states.append(toy.state[tuple(batch.token_ids[: place + 1][seen].tolist()[1:])])
            size = len(states)
            outcome = torch.tensor([probability, stats.kept_tokens]).expand(size, 2)
            data = (batch.targets, batch.old_logprobs, batch.advantages, outcome)
            parts.append((torch.tensor(states, dtype=torch.int64), *data))
    assert total == pytest.approx(1, abs=1e-5)
    states, targets, old_logprobs, advantages, outcome = map(torch.cat, zip(*parts, strict=True))
    return Rows(states, targets, old_logprobs, advantages, outcome[:, 0], outcome[:, 1])


def expected_step(toy, rows, *, logits=None, norm=1.0, threshold=None, **options):
    """Minus the expected gradient of the loss: what an optimiser climbs.

    The loss is linear in the size of an advantage, so one call sums it over the outcomes, each
    weighed by its probability. `norm` is Z: a constant, or "kept", the outcome's own count.
    """
    logits = (toy.logits if logits is None else logits).clone().requires_grad_()
    share = rows.probability / (rows.norm if norm == "kept" else norm)
    masked_ppo_loss(
        logits[rows.states],
        rows.targets,
        rows.old_logprobs,
        rows.advantages * share,
        prob_threshold=threshold,
        policy_norm=1.0,
        **options,
    ).loss.backward()
    return -logits.grad.double()


def misalignment(a, b):
    """1 - cosine: 0 if one is a positive multiple of the other."""
    return 1 - float((a * b).sum() / (a.norm() * b.norm()))


def is_multiple(step, gradient, factor=1.0):
    torch.testing.assert_close(step, factor * gradient, atol=1e-6, rtol=0)
    assert gradient.abs().max() > 0.02  # there was something to compare


def is_no_multiple(step, gradient):
    """No number, positive or negative, turns the gradient into the step."""
    assert step.abs().max() > 1e-3
    assert 5e-4 < misalignment(step, gradient) < 2 - 5e-4


WIDE = Toy(vocabulary=3, depth=2, seed=3)
DEEP = Toy(vocabulary=2, depth=3, seed=1)
LOO = Values(baseline="loo")
MEAN = Values()
GRPO = Values(scale="std")
PATH = Values(baseline="loo", node_weight="path")
MEAN_PATH = Values(node_weight="path")
MC = Values(root_value="none")


def step_of(toy, shape, rule, *, threshold=None, **options):
    return expected_step(
        toy, collect(toy, shape, rule, threshold), threshold=threshold, **options
    ), toy.gradient(toy.logits)


def chain(toy, partition, *, group_size=1, probe_prompt=True):
    return ChainShape(group_size, 1, partition, toy.depth, probe_prompt=probe_prompt)


@pytest.mark.parametrize("group", [2, 3])
def test_rloo_is_unbiased(group):
    is_multiple(*step_of(WIDE, star(group, 2), LOO, norm=group))


@pytest.mark.parametrize("group", [2, 3])
def test_a_group_mean_shrinks_by_one_share(group):
    """r - mean is (G-1)/G of RLOO: GRPO without its deviation."""
    is_multiple(*step_of(WIDE, star(group, 2), MEAN, norm=group), factor=(group - 1) / group)


@pytest.mark.parametrize(
    ("toy", "widths", "segments"),
    [(WIDE, (2, 2), (1,)), (DEEP, (2, 3), (1,)), (DEEP, (3, 2), (2,)), (DEEP, (2, 2, 2), (1, 1))],
)
def test_tree_with_path_weights_is_unbiased(toy, widths, segments):
    is_multiple(*step_of(toy, TreeShape(widths, segments, toy.depth), PATH))


def test_tree_with_the_papers_baseline_shrinks_where_widths_are_equal():
    shape = TreeShape((2, 2, 2), (1, 1), 3)
    is_multiple(*step_of(DEEP, shape, MEAN_PATH), factor=1 / 2)
    is_no_multiple(*step_of(DEEP, TreeShape((2, 3), (1,), 3), MEAN_PATH))


def test_tree_with_equal_token_weights_is_no_multiple():
    for rule in (MEAN, LOO):
        is_no_multiple(*step_of(WIDE, TreeShape((2, 2), (1,), 2), rule))


def test_an_only_child_has_no_leave_one_out_baseline():
    is_no_multiple(*step_of(WIDE, TreeShape((2, 1), (1,), 2), PATH))


def test_the_mask_makes_no_multiple():
    shape = star(2, 2)
    probabilities = WIDE.logits.softmax(-1)
    assert (probabilities < 0.5).any() and (probabilities > 0.5).any()
    is_no_multiple(*step_of(WIDE, shape, LOO, threshold=0.5))
    is_multiple(*step_of(WIDE, shape, LOO, threshold=1.0), factor=2)  # every token is below 1


def test_a_random_count_of_tokens_makes_no_multiple():
    """Z is larger where responses are long, so that what they earn counts less."""
    is_no_multiple(*step_of(WIDE, star(2, 2), LOO, norm="kept"))


def test_scaling_by_the_deviation_makes_no_multiple():
    is_no_multiple(*step_of(WIDE, star(3, 2), GRPO, norm=3))
    path = Values(scale="std", node_weight="path")
    is_no_multiple(*step_of(DEEP, TreeShape((2, 2, 2), (1, 1), 3), path))


@pytest.mark.parametrize("p", [0.5, 0.05])
def test_scaling_weighs_prompts_by_how_hard_they_are(p):
    """With rewards 0 and 1 it multiplies a prompt's gradient by E[deviation] / p (1 - p).

    Of 4 responses 1 or 3 are right with probability 4 p q (1 - 2 p q), deviation sqrt(3) / 4; 2 are
    with 6 (p q)^2, deviation 1 / 2.
    """
    toy, pq = Toy(2, 1, seed=0), p * (1 - p)
    toy.logits = torch.tensor([[1 - p, p]]).log()
    toy.rewards = {(END,): 0.0, (1,): 1.0}
    factor = 3**0.5 * (1 - 2 * pq) + 3 * pq  # 1.62 at 0.5, 1.71 at 0.05: no multiple of their sum
    is_multiple(*step_of(toy, star(4, 1), GRPO, norm=4), factor=factor)


def critic_of(toy, lam):
    """PPO's credit from a critic that knows nothing: random values of the states."""
    table = torch.randn(len(toy.state), generator=torch.Generator().manual_seed(2))

    def credit(forest):
        values = torch.zeros(forest.token_ids.numel())
        for node in forest.trained.nonzero()[:, 0].tolist():
            ids, start = forest.tokens(node), int(forest.cu_tokens[node])
            for i in range(len(ids)):
                values[start + i] = table[toy.state[tuple(ids[:i])]]
        return token_credit(forest, values, gamma=1.0, lam=lam)[0]

    return credit


def test_ppo_is_unbiased_with_any_critic_where_lambda_is_one():
    is_multiple(*step_of(WIDE, star(2, 2), critic_of(WIDE, 1.0), norm=2))
    is_no_multiple(*step_of(WIDE, star(2, 2), critic_of(WIDE, 0.5), norm=2))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_restem_weighs_prompts_by_how_hard_they_are(most):
    """The first step climbs E[reward] if every right response is kept; with `most` of the n right
    ones a prompt's gradient comes times E[min(n, most)] / E[n], so no sum of prompts is one.
    """
    toy = Toy(3, 2, seed=3)
    toy.rewards = {ids: float(ids[-1] == END) for ids in toy.rewards}
    p = sum(math.exp(sum(logprobs)) for ids, logprobs, _ in toy.samples((), 2) if toy.rewards[ids])
    ways = {n: math.comb(3, n) * p**n * (1 - p) ** (3 - n) for n in range(4)}
    factor = sum(min(n, most) * probability for n, probability in ways.items()) / (3 * p)
    rule = Correct(max_correct=most)
    is_multiple(*step_of(toy, star(3, 2), rule, norm=3), factor=factor)
    is_no_multiple(*step_of(toy, star(3, 2), rule, norm="kept"))


def test_whitening_makes_no_multiple():
    is_no_multiple(*step_of(WIDE, star(3, 2), Values(whiten="batch"), norm=3))


@pytest.mark.parametrize("group", [1, 2])
def test_chain_cut_at_fixed_lengths_is_unbiased(group):
    shape = chain(WIDE, fixed_partition(1), group_size=group)
    is_multiple(*step_of(WIDE, shape, MC, norm=group))


def test_chain_cut_at_cutpoints_is_no_multiple():
    """Whether a boundary stands before a token depends on the token: the cut looks ahead by one."""
    is_no_multiple(*step_of(WIDE, chain(WIDE, cutpoint_partition(0.5, 1)), MC))


def test_vineppo_is_unbiased_where_line_breaks_come_singly():
    """A run of breaks is one boundary: whether it ends is known one token later."""
    shape = chain(WIDE, step_partition("a\nb".__getitem__, line_ends))
    is_no_multiple(*step_of(WIDE, shape, MC))
    single = Toy(3, 2, seed=3)
    single.logits[single.state[(1,)], 1] = -30.0  # never two in a row
    is_multiple(*step_of(single, shape, MC))


@pytest.mark.parametrize("root", ["group", "none"])
def test_chain_without_prompt_probes_is_no_multiple(root):
    """The group's mean contains the response itself; `none` leaves the first segment out."""
    shape = chain(WIDE, fixed_partition(1), group_size=2, probe_prompt=False)
    is_no_multiple(*step_of(WIDE, shape, Values(root_value=root), norm=2))


SINGLE = Toy(vocabulary=3, depth=1, seed=5)  # responses of one token: every ratio is exact
START = SINGLE.logits + torch.tensor([[0.6, -0.4, 0.1]])  # where a KL term pulls back to


def test_clipping_makes_no_multiple_off_the_first_step():
    rows, first = collect(SINGLE, star(2, 1), LOO), SINGLE.gradient(SINGLE.logits)
    is_multiple(expected_step(SINGLE, rows, norm=2), first)
    better = (SINGLE.logits + 8 * first).float()  # after steps that have helped
    options = {"logits": better, "norm": 2}
    step = expected_step(SINGLE, rows, clip_eps_low=0.999, clip_eps_high=99, **options)
    is_multiple(step, SINGLE.gradient(better))
    is_no_multiple(expected_step(SINGLE, rows, **options), SINGLE.gradient(better))


def kl_gradient(estimator):
    """Expected gradient of the KL term as a loss, on the policy's own samples."""
    logits = SINGLE.logits.clone().requires_grad_()
    logprobs, start = SINGLE.logits[0].log_softmax(-1), START[0].log_softmax(-1)
    for token in range(3):
        loss = masked_ppo_loss(
            logits,
            torch.tensor([token]),
            logprobs[token, None],
            torch.zeros(1),
            prob_threshold=None,
            ref_logprobs=start[token, None],
            kl_coef=1.0,
            kl_estimator=estimator,
        ).loss
        (logprobs[token].exp() * loss).backward()
    return logits.grad.double()


def test_gradients_of_the_kl_estimators_as_losses():
    """k1 has none, k2 that of KL(policy || start), k3 that of KL(start || policy)."""
    logits = SINGLE.logits.double().requires_grad_()
    logprobs, start = logits.log_softmax(-1), START.double().log_softmax(-1)
    (policy_to_start,) = torch.autograd.grad(
        (logprobs.exp() * (logprobs - start)).sum(), logits, retain_graph=True
    )
    (start_to_policy,) = torch.autograd.grad((start.exp() * (start - logprobs)).sum(), logits)
    assert kl_gradient("k1").abs().max() < 1e-6
    is_multiple(kl_gradient("k2"), policy_to_start)
    is_multiple(kl_gradient("k3"), start_to_policy)
    is_no_multiple(kl_gradient("k3"), policy_to_start)
