"""What is trained and how: policy, reference and critic, their optimisers and their steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from spo.config.recipe import Config
from spo.credit import pairs as preference
from spo.credit.values import whiten
from spo.learn import checkpoint, distributed
from spo.learn import pack as batch
from spo.learn.critic import (
    Targets,
    explained_variance,
    load_critic,
    row_values,
    token_credit,
    value_loss,
)
from spo.learn.distributed import Ranks
from spo.learn.loss import LOSSES
from spo.learn.model import load_policy, row_logprobs, score, to_device
from spo.records import Batch, Forest, LossOutput

SUMS = ("loss", "kl", "kept", "clipfrac", "entropy", "mismatch_kl")  # over the batches of a step
OPTIONAL = (
    "value_loss",
    "value_grad_norm",
    "pairs",
    "pair_loss",
    "pair_accuracy",
    "pair_margin",
)


class Learner:
    """The models of a run and the optimiser steps on them."""

    def __init__(self, config: Config, ranks: Ranks, found: Path | None = None):
        """From the checkpoint `found`, or from the recipe's start policy."""
        policy = config.policy
        self.config, self.ranks = config, ranks
        self.model = load_policy(policy, str(found / "policy") if found else None)
        self.optimizer = _adamw(self.model, config, config.train.learning_rate)
        self.reference = self.critic = self.critic_optimizer = None
        if config.loss.kl_coef or config.loss.kind == "dpo":
            self.reference = load_policy(policy).eval().requires_grad_(False)
        if config.advantage.estimator == "gae":
            self.critic = load_critic(policy, str(found / "critic") if found else None)
            self.critic_optimizer = _adamw(self.critic, config, config.critic.learning_rate)

    def restore(self, found: Path):
        """The optimisers' and the random state of a checkpoint; returns its replay buffer."""
        if self.critic_optimizer is not None:
            checkpoint.load_optimizer(found / "critic" / "optimizer.pt", self.critic_optimizer)
        return checkpoint.load_training(found, self.optimizer)

    def shard(self) -> None:
        """Spread the models over the ranks, if the recipe says so."""
        if not self.ranks.sharded:
            return
        pairs = (
            (self.model, self.optimizer),
            (self.reference, None),
            (self.critic, self.critic_optimizer),
        )
        for model, optimizer in pairs:
            if model is not None:
                distributed.shard(model, optimizer, self.config.policy.device)

    def restart(self) -> None:
        """The start policy and a fresh optimiser, in place."""
        self.model.load_state_dict(load_policy(self.config.policy).state_dict())
        self.optimizer.state.clear()

    def judge(self, forest: Forest) -> tuple[Tensor, Targets]:
        """The critic's credit of every token, and what the critic is to learn from it."""
        rule = self.config.advantage
        packs, _ = self._pack(forest, forest.trained.float(), masked=False)
        values = self._score(forest, packs, lambda packed: row_values(self.critic, packed))
        advantages, returns = token_credit(forest, values, gamma=rule.gamma, lam=rule.lam)
        if rule.whiten == "batch":
            trained = forest.trained.repeat_interleave(forest.cu_tokens.diff())
            advantages = whiten(advantages, trained)
        return advantages, Targets(values, returns)

    def train(
        self, forest: Forest, credit: Tensor, targets: Targets | None, state: checkpoint.State
    ) -> dict:
        """The optimiser steps on one forest; returns their mean figures."""
        config = self.config.train
        if config.restart:
            self.restart()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.iteration)
        steps = []
        for _ in range(config.epochs):
            order = torch.randperm(len(forest.prompts), generator=generator)
            for trees in order.tensor_split(min(config.minibatches, len(order))):
                steps.append(self.step(forest, credit, targets, trees.tolist(), state))
        total = {key: sum(s[key] for s in steps) for key in steps[0] if key not in OPTIONAL}
        kept = max(total["kept"], 1.0)
        figures = {
            "loss": total["loss"] / len(steps),
            "kl": total["kl"] / len(steps),
            "clipfrac": total["clipfrac"] / kept,
            "entropy": total["entropy"] / kept,
            "mismatch_kl": total["mismatch_kl"] / kept,
            "ratio_max": max(s["ratio_max"] for s in steps),
            "kept_share": total["kept_tokens"] / max(total["trained_tokens"], 1),
            "packed_tokens": total["packed_tokens"],
            "grad_norm": total["grad_norm"] / len(steps),
            "lr": steps[-1]["lr"],
            "skipped_steps": state.skipped_steps,
        }
        for key in OPTIONAL:
            found = [s[key] for s in steps if key in s]
            if found:
                figures[key] = sum(found) / len(found)
        if targets is not None:
            trained = forest.trained.repeat_interleave(forest.cu_tokens.diff())
            figures["explained_variance"] = explained_variance(
                targets.values[trained], targets.returns[trained]
            )
        return figures

    def step(
        self,
        forest: Forest,
        credit: Tensor,
        targets: Targets | None,
        trees: list[int],
        state: checkpoint.State,
    ) -> dict:
        """One optimiser step on some trees: of the policy, then of the critic if there is one."""
        config, more = self.config, {}
        if config.loss.kind == "dpo":
            credit, more = self._weigh_pairs(forest, credit, trees)
        packs, stats = self._pack(forest, credit, trees)
        norm = more.get("pairs")  # a mean over pairs, not over tokens
        if config.loss.policy_norm == "constant":
            norm = float(len(trees) * config.sampling.max_new_tokens)
        if norm is not None:
            packs = [dataclasses.replace(packed, policy_norm=norm) for packed in packs]
        rate = self.rate(state.optimizer_steps)
        figures = self._update(
            self.model, self.optimizer, packs, self._policy_loss, rate * config.train.learning_rate
        )
        sound, bad = figures.pop("sound"), packs
        if targets is not None:
            values, _ = self._pack(forest, forest.trained.float(), trees, masked=False)
            of_critic = self._update(
                self.critic,
                self.critic_optimizer,
                values,
                lambda packed: self._value_loss(packed, targets),
                rate * config.critic.learning_rate,
            )
            more |= {"value_loss": of_critic["loss"], "value_grad_norm": of_critic["grad_norm"]}
            if sound and not of_critic["sound"]:
                sound, bad = False, values
        if sound:
            state.skipped_in_row = 0
        else:
            self._skip(bad, state)
        state.optimizer_steps += 1
        return figures | dataclasses.asdict(stats) | more

    def rate(self, step: int) -> float:
        """Share of the peak rate: linear warm-up, then linear decay to 0 or constant."""
        train = self.config.train
        steps = train.epochs * min(train.minibatches, train.prompts)
        total = train.iterations * steps
        warmup = round(total * train.warmup_share)
        if step < warmup:
            return (step + 1) / warmup
        if train.decay == "constant":
            return 1.0
        return max(total - step, 0) / max(total - warmup, 1)

    def save(self, tokenizer, state: checkpoint.State, buffer) -> None:
        """A checkpoint by rank 0; the other ranks help to gather sharded weights."""
        parts = {"policy": (self.model, self.optimizer)}
        if self.critic is not None:
            parts["critic"] = (self.critic, self.critic_optimizer)
        if self.ranks.sharded:
            parts = {name: (distributed.Whole(*part),) * 2 for name, part in parts.items()}
        if self.ranks.main:
            checkpoint.save_checkpoint(
                self.config.out_dir,
                self.config,
                *parts["policy"],
                tokenizer=tokenizer,
                state=state,
                replay=buffer,
                critic=parts.get("critic"),
            )

    def _policy_loss(self, packed: Batch) -> LossOutput:
        loss, temperature = self.config.loss, self.config.sampling.temperature
        if loss.kl_coef:
            packed = score(self.reference, packed, temperature)
        return LOSSES[loss.kind](self.model, packed, loss, temperature)

    def _value_loss(self, packed: Batch, targets: Targets) -> LossOutput:
        where = packed.token_index.cpu()
        old, returns = (x[where].to(packed.targets.device) for x in vars(targets).values())
        return value_loss(self.critic, packed, old, returns, self.config.critic.value_clip)

    def _weigh_pairs(
        self, forest: Forest, marks: Tensor, trees: list[int]
    ) -> tuple[Tensor, dict[str, float]]:
        """Credit of the pairs in some trees under the policy as it is now."""
        chosen = torch.zeros(len(forest.prompts), dtype=torch.bool)
        chosen[trees] = True
        marks = torch.where(chosen[forest.prompt.long()], marks, 0.0)
        pairs = preference.pair_nodes(forest, marks)
        if not len(pairs):
            return marks, {}
        packs, _ = self._pack(forest, marks, trees)
        temperature = self.config.sampling.temperature
        logprobs = [
            self._score(forest, packs, lambda packed, m=model: row_logprobs(m, packed, temperature))
            for model in (self.model, self.reference)
        ]
        loss = self.config.loss
        return preference.pair_credit(
            forest, pairs, *logprobs, beta=loss.beta, positive=loss.dpo_positive
        )

    def _pack(
        self, forest: Forest, credit: Tensor, trees: list[int] | None = None, masked: bool = True
    ) -> tuple[list[Batch], batch.PackStats]:
        """This rank's batches of one step; without the mask every trained token has its row."""
        loss = self.config.loss
        return batch.pack(
            forest,
            credit,
            prob_threshold=loss.prob_threshold if masked else None,
            tokens_per_batch=self.config.train.tokens_per_batch,
            trees=trees,
            every_token=loss.kl_coef > 0 and loss.kl_scope == "all",
            packing=self.config.policy.packing,
            share=(self.ranks.rank, self.ranks.world),
        )

    @torch.no_grad()
    def _score(self, forest: Forest, packs: list[Batch], rows: Callable[[Batch], Tensor]) -> Tensor:
        """(T,) fp32, a figure of every row at its token, from all ranks."""
        with self._autocast():
            found = [rows(to_device(packed, self.config.policy.device)) for packed in packs]
        return sum(distributed.gather(self.ranks, batch.unpack(forest, packs, found)))

    def _update(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        packs: list[Batch],
        loss_of: Callable[[Batch], LossOutput],
        learning_rate: float,
    ) -> dict:
        """Gradient of the packs, clip, guard, update. `sound` is False where it was not finite."""
        figures = dict.fromkeys(SUMS, 0.0) | {"ratio_max": 1.0}
        for i, packed in enumerate(packs):
            distributed.begin_batch(model, self.ranks, last=i == len(packs) - 1)
            with self._autocast():
                out = loss_of(to_device(packed, self.config.policy.device))
            (out.loss * distributed.loss_scale(self.ranks)).backward()
            for key, value in out.metrics.items():
                figures[key] = (
                    max(figures[key], value) if key == "ratio_max" else figures[key] + value
                )
        distributed.add_gradients(model, self.ranks)
        figures = distributed.add_figures(figures, self.ranks)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.train.max_grad_norm)
        figures |= {"grad_norm": float(distributed.full(norm)), "lr": learning_rate}
        figures["sound"] = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        if figures["sound"] and packs:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return figures

    def _skip(self, packs: list[Batch], state: checkpoint.State) -> None:
        """Count a step that is not finite and dump its batches; stop after too many in a row."""
        state.skipped_steps += 1
        state.skipped_in_row += 1
        folder = self.config.out_dir / "skipped"
        folder.mkdir(exist_ok=True)
        name = f"step-{state.optimizer_steps:06d}-{self.ranks.rank}"
        for i, packed in enumerate(packs):
            tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
            save_file(tensors, folder / f"{name}-{i}.safetensors")
        if state.skipped_in_row >= self.config.train.max_skipped:
            raise RuntimeError(
                f"{state.skipped_in_row} steps in a row had a loss or gradient that is not finite; "
                f"their batches are in {folder}"
            )

    def _autocast(self):
        policy = self.config.policy
        device = torch.device(policy.device).type
        return torch.autocast(device, torch.bfloat16) if policy.autocast else nullcontext()


def _adamw(model: torch.nn.Module, config: Config, learning_rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        weight_decay=config.train.weight_decay,
        betas=(0.9, 0.95),
    )
