"""What one architecture must pass: trainer and engine against transformers' own logits.

The trainer is asked as a recipe's default would ask it; where it refuses and names another setting,
that setting must work.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from small_models import auto_class, plain_logits, probe_ids
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import spo
from spo.config.loss import PolicyLossConfig
from spo.config.policy import PolicyConfig
from spo.engines.make import make_engine
from spo.grow.assemble import assemble
from spo.grow.shapes import Node, Tree
from spo.learn.loss import policy_loss
from spo.learn.model import row_logprobs
from spo.learn.pack import pack
from spo.learn.policy import load_policy
from spo.learn.policy_folder import save_policy
from spo.models.check import named_ids
from spo.models.load import text_config
from spo.records import SEGMENT, Batch, Forest, Prompt, Request, Sampling

NATS = 1e-4  # largest difference of a logprob
GRADIENT = 1e-3  # largest difference of a gradient, relative to its norm
TEMPERATURE = 0.8
ADVICE = re.compile(r"policy\.(packing|attention)=(\w+)")
MAX_NEW, PREFIX = 24, 5
SOURCE = str(Path(spo.__file__).parent)


@dataclass(frozen=True)
class Verdict:
    """right, refused or WRONG; why, if it is not right; and what was measured."""

    kind: str
    reason: str = ""
    logprobs: float | None = None  # largest difference, nats
    gradient: float | None = None  # largest difference, relative
    settings: str = ""  # of the recipe, with which it trains
    advice: str = ""  # the sentence that named them


class Refused(Exception):
    """A sentence with which `spo` refused a model when it was asked to load it."""


def load(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """`function(...)`. Raises Refused with the sentence if `spo` itself refuses in a ValueError."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if not last.filename.startswith(SOURCE):
            raise
        raise Refused(" ".join(str(error).split())) from error


def check_trainer(folder: Path, truth: Truth) -> Verdict:
    """Follow the advice of refusals until the policy trains, and compare what it computes."""
    settings: dict[str, str] = {}
    first = ""
    while True:
        shown = " ".join(f"policy.{k}={v}" for k, v in settings.items())
        config = PolicyConfig(path=str(folder), **settings)  # pyright: ignore
        try:
            with contextlib.redirect_stdout(None):
                policy = load(load_policy, config)
        except Refused as refusal:
            sentence = str(refusal).replace(str(folder), "the model")
            advice = {k: v for k, v in ADVICE.findall(sentence) if settings.get(k) != v}
            if not advice:
                kind = "WRONG" if settings else "refused"
                return Verdict(kind, f"advice {shown} fails: " * bool(settings) + sentence)
            settings |= advice
            first = first or sentence
            continue
        verdict = compare(policy, config, truth)
        return replace(verdict, settings=shown or "policy.packing=tree", advice=first)


def compare(policy: PreTrainedModel, config: PolicyConfig, truth: Truth) -> Verdict:
    """Logprobs and gradient of one step's batches."""
    credit = truth.credit
    batches, _ = pack(
        truth.forest, credit, prob_threshold=None, tokens_per_batch=4096, packing=config.packing
    )
    worst = noise = 0.0
    seen = 0
    for batch in batches:
        with torch.no_grad():
            found = row_logprobs(policy, batch, TEMPERATURE)
            noise = max(noise, _worst(found - row_logprobs(policy, batch, TEMPERATURE)))
        assert batch.token_index is not None
        for expected in (truth.low, truth.high):
            worst = max(worst, _worst(found - expected[batch.token_index]))
        seen += found.numel()
        policy_loss(policy, batch, LOSS, TEMPERATURE).loss.backward()
    assert seen == int((credit != 0).sum())
    gradient = truth.gradient_error(policy)
    ok = worst <= NATS and gradient <= GRADIENT
    wrong = "" if ok else f"off by {worst:.2g} nats, gradient by {gradient:.2g}"
    wrong += "" if noise <= NATS else f"; two forwards differ by {noise:.2g} nats"
    wrong += "" if ok or truth.causal else "; not causal"
    if ok and (error := checkpoint_error(policy, config, batches)) > NATS:
        ok, wrong = False, f"its checkpoint is off by {error:.2g} nats"
    return Verdict("right" if ok else "WRONG", wrong, worst, gradient)


def checkpoint_error(policy: PreTrainedModel, config: PolicyConfig, batches: list[Batch]) -> float:
    """Other weights in the policy, saved: what transformers then computes against the policy's own.

    The weights are kept beside the model's folder, for the engine.
    """
    trained = Path(config.path).with_name("trained")
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad and parameter.numel() > 1:
                noise = torch.randn(parameter.shape, generator=g)
                parameter.add_(0.05 * parameter.std() * noise)
        save_policy(trained, config, policy, policy.state_dict())
        torch.save({n: p.detach() for n, p in policy.named_parameters()}, trained / "weights.pt")
        found = [row_logprobs(policy, batch, TEMPERATURE) for batch in batches]
    expected = Truth(trained).low
    indices = [batch.token_index for batch in batches if batch.token_index is not None]
    return _worst(torch.cat(found) - expected[torch.cat(indices)])


def _worst(difference: Tensor) -> float:
    return float(difference.abs().nan_to_num(math.inf).max()) if difference.numel() else 0.0


LOSS = PolicyLossConfig(prob_threshold=1.0)


class Truth:
    """Logprobs of a forest's tokens and the gradient of its loss, from the model's own logits."""

    def __init__(self, folder: Path):
        auto = auto_class(AutoConfig.from_pretrained(folder).model_type)
        try:
            self.model = auto.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager"
            ).eval()
        except (ValueError, ImportError):  # it has no eager attention
            self.model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self.measure()

    def measure(self) -> None:
        """The logprobs and the gradient of the model as it is now."""
        self.model.zero_grad()
        forest = make_forest()
        total = forest.token_ids.numel()
        self.low, self.high = torch.full((total,), math.inf), torch.full((total,), -math.inf)
        self.credit = torch.zeros(total)
        for node in range(forest.num_nodes):
            if forest.parent[node] >= 0:
                rows = slice(*forest.cu_tokens[node : node + 2].tolist())
                self.credit[rows] = (-1.0) ** node * (1 + node % 3)
        paths = {n: forest.path(n) for n in range(forest.num_nodes)}
        inner = set(forest.parent.tolist())
        leaves = {n: path for n, path in paths.items() if n not in inner}
        with torch.no_grad():
            for path in leaves.values():
                where, logprobs = self._path(forest, path)
                self.low[where] = torch.minimum(self.low[where], logprobs)
                self.high[where] = torch.maximum(self.high[where], logprobs)
        self.causal = float((self.high - self.low)[self.credit != 0].max()) < NATS
        noise = 0.1 * torch.sin(torch.arange(total).float())
        old = torch.where(self.credit != 0, self.low + noise, torch.tensor(0.0)).clamp(max=-1e-3)
        self.forest = replace(forest, rollout_logprobs=old)
        try:
            self._backward(leaves)
        except AssertionError:  # its own code has no gradient in evaluation mode
            self.model.zero_grad()

    def _path(self, forest: Forest, path: list[int]) -> tuple[Tensor, Tensor]:
        """Places (L,) of a path's tokens in the forest, the prompt's excepted; their logprobs."""
        spans = [torch.arange(*forest.cu_tokens[n : n + 2].tolist()) for n in path]
        where, start = torch.cat(spans), len(spans[0])
        ids = forest.token_ids[where].long()
        logits = plain_logits(self.model, ids.tolist())[start - 1 : -1].float() / TEMPERATURE
        logprobs = logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
        return where[start:], logprobs

    def _backward(self, leaves: dict[int, list[int]]) -> None:
        """The gradient of -(1/Z) sum credit * exp(logprob - old), each token once."""
        done = torch.zeros_like(self.credit, dtype=torch.bool)
        norm = float((self.credit != 0).sum())
        for path in leaves.values():
            where, logprobs = self._path(self.forest, path)
            first = ~done[where]
            ratio = (logprobs - self.forest.rollout_logprobs[where]).exp()
            (-(self.credit[where] * ratio)[first].sum() / norm).backward()
            done[where] = True

    def logprobs(self, prefix: Iterable[int], token_ids: Iterable[int]) -> Tensor:
        """Of tokens behind a prefix."""
        prefix, token_ids = list(prefix), list(token_ids)
        with torch.no_grad():
            logits = plain_logits(self.model, prefix + token_ids)[len(prefix) - 1 : -1].float()
        chosen = torch.tensor(token_ids)[:, None]
        return (logits / TEMPERATURE).log_softmax(-1).gather(-1, chosen)[:, 0]

    def gradient_error(self, policy: PreTrainedModel) -> float:
        """Norm of the difference over that of the gradient, 0 if there is none to compare with.

        Weights are known by their content, since a wrapper's have other names.
        """
        found = {digest(p): p.grad for p in policy.parameters() if p.grad is not None}
        error = norm = 0.0
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                got = found.pop(digest(parameter), None)
                got = torch.zeros_like(parameter) if got is None else got
                error += float((got - parameter.grad).double().square().sum())
                norm += float(parameter.grad.double().square().sum())
        error += sum(float(g.double().square().sum()) for g in found.values())
        return (error / norm) ** 0.5 if norm else 0.0


def digest(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), hashlib.sha256(data.tobytes()).hexdigest()


def make_forest() -> Forest:
    """A tree with paths of up to 60 tokens and a short one; all nodes train but the prompts."""
    shapes = (
        ((-1, 6), (0, 21), (0, 9), (1, 17), (1, 3), (3, 12), (3, 1), (2, 5)),
        ((-1, 3), (0, 4), (0, 2)),
    )
    trees = []
    for index, nodes in enumerate(shapes):
        ids = iter(probe_ids(10 + index, sum(size for _, size in nodes)))
        (_, length), *rest = nodes
        prompt = Prompt(tuple(next(ids) for _ in range(length)), None, "arithmetic")
        trees.append(Tree(index, prompt))
        for parent, size in rest:
            segment = tuple(next(ids) for _ in range(size))
            trees[-1].nodes.append(
                Node(parent, segment, (-1.0,) * size, True, True, SEGMENT, 0, math.nan)
            )
    return assemble(trees, TEMPERATURE)


def check_engine(folder: Path, truth: Truth) -> Verdict:
    """Logprobs of samples, also past a window; the same with the weights of `checkpoint_error`."""
    options = {"dtype": torch.float32, "max_num_seqs": 8, "max_model_len": 96, "min_shared": 8}
    try:
        engine = load(make_engine, "hf", str(folder), **options)
    except Refused as refusal:
        return Verdict("refused", str(refusal).replace(str(folder), "the model"))
    worst = sampled_error(engine, truth)
    wrong = "" if worst <= NATS else f"off by {worst:.2g} nats"
    trained = folder.with_name("trained")
    if not wrong and trained.exists():
        engine.load_weights(torch.load(trained / "weights.pt").items(), 1)
        error = sampled_error(engine, Truth(trained))
        wrong = "" if error <= NATS else f"off by {error:.2g} nats after new weights"
    engine.close()
    return Verdict("WRONG" if wrong else "right", wrong, worst)


def sampled_error(engine: Any, truth: Truth) -> float:
    """Largest difference in the logprobs of samples, and of branches that continue them.

    Behind an id that stands for an image nothing is compared: the whole model, which is the truth
    here, puts something else in its place.
    """
    prefix = tuple(probe_ids(3, PREFIX))
    first = sample(engine, [Request(0, prefix, 4, MAX_NEW, Sampling(7, TEMPERATURE))])
    pairs = [(prefix, done) for done in first]
    branches = [
        Request(key, prefix + done.token_ids[: 20 + key], 2, 12, Sampling(70 * key, TEMPERATURE))
        for key, done in enumerate(first[:2])
    ]
    again = sample(engine, branches)
    pairs += [(branches[done.key].prefix_ids, done) for done in again]
    wrapper = text_config(truth.model) is not truth.model.config
    special = named_ids(truth.model) if wrapper else set()
    errors = []
    for before, done in pairs:
        if special & set(before):
            continue
        found = [i for i, token in enumerate(done.token_ids) if token in special]
        until = found[0] + 1 if found else len(done.token_ids)
        own = truth.logprobs(before, done.token_ids[:until])
        errors.append(_worst(torch.tensor(done.logprobs[:until]) - own))
    return max(errors)


def sample(engine: Any, requests: list[Request]) -> list[Any]:
    """All completions, in order. Raises RuntimeError if they do not come."""
    for request in requests:
        engine.submit(request)
    done: list[Any] = []
    for _ in range(4 * MAX_NEW):
        done += engine.poll()
        if len(done) == sum(request.n for request in requests):
            return sorted(done, key=lambda c: (c.key, c.index))
    raise RuntimeError(f"the engine finished {len(done)} samples in {4 * MAX_NEW} steps")


def judged(check: Callable[..., Verdict], *arguments: Any) -> dict[str, Any]:
    """The verdict, figures to two digits; an exception other than a refusal at load is wrong."""
    try:
        found = asdict(check(*arguments))
        return {k: float(f"{v:.1e}") if isinstance(v, float) else v for k, v in found.items()}
    except Exception as error:  # reported, never hidden: it counts as wrong
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return asdict(Verdict("WRONG", f"{type(error).__name__} at {where}: {reason}"))
