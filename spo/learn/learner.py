"""The models of a run, policy, reference and critic, with their optimisers and steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from spo.config.recipe import Recipe
from spo.credit.nodes import check_credit, of_tokens
from spo.engines.protocol import Engine
from spo.learn import checkpoint, distributed, lora
from spo.learn.critic import explained_variance, load_critic, row_values, value_loss
from spo.learn.distributed import Ranks
from spo.learn.figures import SUMS, summarize
from spo.learn.loss import LOSSES
from spo.learn.model import row_logprobs, score, to_device
from spo.learn.offload import on_device, park
from spo.learn.optimizer import make_optimizer
from spo.learn.pack import PackStats, pack, unpack
from spo.learn.policy import load_policy
from spo.learn.policy_folder import as_stored
from spo.learn.schedule import rate, share_done
from spo.models.load import saved_weights
from spo.records import Batch, Credit, Forest, LossOutput, Replay, Targets


class Learner:
    """The models of a run and the optimiser steps on them; the credit rule's `Models`."""

    def __init__(self, recipe: Recipe, ranks: Ranks, saved: Path | None = None):
        """Load the checkpoint `saved`, or the recipe's start policy."""
        self.recipe, self.ranks, policy, critic = recipe, ranks, recipe.policy, recipe.credit.critic
        if policy.dropout:
            torch.manual_seed(recipe.train.seed * 1_000_003 + ranks.rank)
        whole = saved if policy.lora is None else None
        self.model = self._load(str(whole / "policy") if whole else None)
        if policy.lora is not None:
            lora.attach(self.model, policy, recipe.train.seed)
            if saved:
                lora.load_adapter(saved / "policy", self.model)
        elif saved:
            checkpoint.load_weights(saved, self.model)
        self.optimizer = make_optimizer(self.model, recipe, recipe.train.learning_rate)
        self.models = {"policy": self.model}
        self.refreshed = False  # whether the reference is no longer the start policy
        self.optimizers = {"policy": self.optimizer}
        if policy.lora is not None and (recipe.loss.kl_coef or recipe.credit.reference):
            self.models["reference"] = self.model
        elif recipe.loss.kl_coef or recipe.credit.reference:
            self.models["reference"] = self._load().eval().requires_grad_(False)
            if saved:
                file = checkpoint.REFERENCE
                self.refreshed = checkpoint.load_weights(saved, self.models["reference"], file)
            if "reference" in recipe.train.offload:
                park(self.models["reference"])
        if critic is not None:
            start = str(saved / "critic") if saved else None
            model = load_critic(policy, start, limit=recipe.engine.max_model_len)
            optimizer = make_optimizer(model, recipe, critic.learning_rate)
            self.models["critic"], self.optimizers["critic"] = model, optimizer

    def restore(self, saved: Path) -> Replay:
        """Restore a checkpoint's optimisers and random state; returns its replay buffer."""
        if "critic" in self.optimizers:
            checkpoint.load_optimizer(saved / "critic" / "optimizer.pt", self.optimizers["critic"])
        return checkpoint.load_training(saved, self.optimizer)

    def shard(self) -> None:
        """Shard the models over the ranks, if the recipe says so."""
        if not self.ranks.sharded:
            return
        for name, model in self.models.items():
            distributed.shard(model, self.optimizers.get(name), self.recipe.policy.device)

    def weights(self, engine: Engine, *, stored: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The policy's tensors, whole, by the names that the engine takes.

        Args:
            stored: with the bits that a checkpoint's policy folder holds of them.
        """
        named = (
            (name, distributed.full(parameter.detach()))
            for name, parameter in self.model.named_parameters()
        )
        if self.recipe.policy.lora is not None:
            named = lora.merged(self.model)
        elif stored:
            named = as_stored(self.recipe.policy, named, self.model.base_model_prefix)
        return saved_weights(self.model, named) if engine.saved_names else named

    def restart(self) -> None:
        """Go back to the start policy and a fresh optimiser, in place."""
        if self.recipe.policy.lora is not None:
            lora.reset(self.model)
        else:
            self.model.load_state_dict(self._load().state_dict())
        self.optimizer.state.clear()

    def refresh_reference(self, iterations: int) -> None:
        """Make the policy the reference, if that is due after so many iterations."""
        every = self.recipe.train.reference_every
        if every and iterations % every == 0:
            distributed.copy_weights(self.model, self.models["reference"])
            self.refreshed = True

    def _load(self, path: str | None = None) -> PreTrainedModel:
        """The start policy, or the one in a checkpoint's folder."""
        return load_policy(self.recipe.policy, path, limit=self.recipe.engine.max_model_len)

    def score(
        self,
        names: Sequence[str],
        forest: Forest,
        tokens: Tensor,
        trees: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """See `spo.config.credit.Models`. Raises ValueError for a model that the run lacks."""
        for name in names:
            if name not in self.models:
                raise ValueError(
                    f"credit.type={self.recipe.credit_type} uses the {name}, found only "
                    f"{', '.join(self.models)}: its `reference` or `critic` says what it needs"
                )
        packs, _ = self._pack(forest, tokens, trees, masked=False)
        temperature = self.recipe.sampling.temperature

        found = []
        for name in names:
            with self._as(name) as model:
                if name == "critic":
                    rows = partial(row_values, model)
                else:
                    rows = partial(row_logprobs, model, temperature=temperature)
                found.append(self._score(forest, packs, rows))
        return found

    def train(
        self, forest: Forest, credit: Credit, state: checkpoint.State, generated: int
    ) -> dict[str, float]:
        """Run the optimiser steps on one forest; returns their mean figures.

        Args:
            generated: tokens of the iteration, which `state` does not count yet.
        """
        train = self.recipe.train
        start = share_done(train, state.iteration, state.generated_tokens)
        end = share_done(train, state.iteration + 1, state.generated_tokens + generated)
        if train.restart:
            self.restart()
        generator = torch.Generator().manual_seed(train.seed * 1_000_003 + state.iteration)
        steps: list[dict[str, float]] = []
        splits: list[Tensor] = []  # the trees of every step
        for _ in range(train.epochs):
            order = torch.randperm(len(forest.prompts), generator=generator)
            splits += order.tensor_split(min(train.minibatches, len(order)))
        share = (end - start) / len(splits)
        for i, trees in enumerate(splits):
            share_of_peak = rate(train, start + i * share, start + (i + 1) * share)
            steps.append(self.step(forest, credit, trees.tolist(), state, share_of_peak))
        figures = summarize(steps) | {"skipped_steps": state.skipped_steps}
        if credit.targets is not None:
            trained = of_tokens(forest, forest.trained)
            figures["explained_variance"] = explained_variance(
                credit.targets.values[trained], credit.targets.returns[trained]
            )
        return figures

    def step(
        self,
        forest: Forest,
        credit: Credit,
        trees: Sequence[int],
        state: checkpoint.State,
        rate: float,  # share of the peak rates
    ) -> dict[str, float]:
        """One optimiser step on `trees`: of the policy, then of the critic if there is one."""
        recipe, rule = self.recipe, self.recipe.credit
        now = rule.before_step(forest, credit, trees, self)
        extra = {}
        if now is not credit:
            check_credit(forest, now)
            extra = now.figures
        packs, stats = self._pack(forest, now.tokens, trees)
        norm = now.norm
        if recipe.loss.policy_norm == "constant":
            norm = float(len(trees) * recipe.sampling.max_new_tokens)
        if norm is not None:
            packs = [dataclasses.replace(packed, policy_norm=norm) for packed in packs]
        if recipe.loss.kl_coef:
            packs = self._with_reference(packs)
        figures = self._update(
            self.model, self.optimizer, packs, self._policy_loss, rate * recipe.train.learning_rate
        )
        sound, bad = figures.pop("sound"), packs
        if credit.targets is not None and rule.critic is not None:
            targets = credit.targets
            trained = of_tokens(forest, forest.trained).float()
            values, _ = self._pack(forest, trained, trees, masked=False)
            of_critic = self._update(
                self.models["critic"],
                self.optimizers["critic"],
                values,
                partial(self._value_loss, targets, rule.critic.value_clip),
                rate * rule.critic.learning_rate,
            )
            extra = extra | {
                "value_loss": of_critic["loss"],
                "value_grad_norm": of_critic["grad_norm"],
            }
            if sound and not of_critic["sound"]:
                sound, bad = False, values
        if sound:
            state.skipped_in_row = 0
        else:
            self._skip(bad, state)
        state.optimizer_steps += 1
        return figures | dataclasses.asdict(stats) | extra

    def save(self, state: checkpoint.State, buffer: Replay) -> Path | None:
        """Rank 0 writes a checkpoint and returns its folder; others help to gather the weights."""
        if not (self.ranks.main or self.ranks.sharded):
            return None
        parts = {
            name: distributed.Whole(model, self.optimizers.get(name))
            for name, model in self.models.items()
            if name in self.optimizers or self.refreshed
        }
        if not self.ranks.main:
            return None
        return checkpoint.save_checkpoint(
            self.recipe.out_dir,
            self.recipe,
            parts["policy"],
            state=state,
            replay=buffer,
            critic=parts.get("critic"),
            reference=parts.get("reference"),
        )

    def _policy_loss(self, packed: Batch) -> LossOutput:
        loss, temperature = self.recipe.loss, self.recipe.sampling.temperature
        return LOSSES[type(loss)](self.model, packed, loss, temperature)

    def _with_reference(self, packs: list[Batch]) -> list[Batch]:
        """The batches of a step, on the device, with the reference's logprobs."""
        device, temperature = self.recipe.policy.device, self.recipe.sampling.temperature
        with self._as("reference") as model, self._autocast():
            return [score(model, to_device(packed, device), temperature) for packed in packs]

    @contextmanager
    def _as(self, name: str) -> Iterator[PreTrainedModel]:
        """One of the models; a policy with adapters is also the reference, without them."""
        model, device = self.models[name], self.recipe.policy.device
        shared = name == "reference" and model is self.model
        with lora.without_adapter(model) if shared else on_device(model, device):
            yield model

    def _value_loss(self, targets: Targets, value_clip: float, packed: Batch) -> LossOutput:
        assert packed.token_index is not None  # every pack has it
        where = packed.token_index.cpu()
        old, returns = (x[where].to(packed.targets.device) for x in vars(targets).values())
        return value_loss(self.models["critic"], packed, old, returns, value_clip)

    def _pack(
        self,
        forest: Forest,
        credit: Tensor,  # (T,)
        trees: Sequence[int] | None = None,
        masked: bool = True,
    ) -> tuple[list[Batch], PackStats]:
        """This rank's batches of one step; without the mask every token of nodes with credit."""
        loss = self.recipe.loss
        return pack(
            forest,
            credit,
            prob_threshold=loss.prob_threshold if masked else None,
            tokens_per_batch=self.recipe.train.tokens_per_batch,
            trees=trees,
            every_token=masked and loss.kl_coef > 0 and loss.kl_scope == "all",
            packing=self.recipe.policy.packing,
            share=(self.ranks.rank, self.ranks.world),
        )

    @torch.no_grad()
    def _score(self, forest: Forest, packs: list[Batch], rows: Callable[[Batch], Tensor]) -> Tensor:
        """(T,) fp32, the scores of the rows at their tokens, from all ranks."""
        with self._autocast():
            figures = [rows(to_device(packed, self.recipe.policy.device)) for packed in packs]
        return torch.stack(distributed.gather(self.ranks, unpack(forest, packs, figures))).sum(0)

    def _update(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        packs: list[Batch],
        loss_of: Callable[[Batch], LossOutput],
        learning_rate: float,
    ) -> dict:
        """Gradient, clipping, update. `sound` is False if the loss or gradient was not finite."""
        figures = dict.fromkeys(SUMS, 0.0) | {"ratio_max": 1.0}
        for i, packed in enumerate(packs):
            distributed.begin_batch(model, self.ranks, last=i == len(packs) - 1)
            with self._autocast():
                out = loss_of(to_device(packed, self.recipe.policy.device))
            (out.loss * distributed.loss_scale(self.ranks)).backward()
            for key, value in out.metrics.items():
                figures[key] = (
                    max(figures[key], value) if key == "ratio_max" else figures[key] + value
                )
        distributed.add_gradients(model, self.ranks)
        figures = distributed.add_figures(figures, self.ranks)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.recipe.train.max_grad_norm)
        figures |= {"grad_norm": float(distributed.full(norm)), "lr": learning_rate}
        figures["sound"] = math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"])
        if figures["sound"] and packs:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return figures

    def _skip(self, packs: list[Batch], state: checkpoint.State) -> None:
        """Count a step that is not finite and save its batches; stop after too many in a row."""
        state.skipped_steps += 1
        state.skipped_in_row += 1
        folder = self.recipe.out_dir / "skipped"
        folder.mkdir(exist_ok=True)
        name = f"step-{state.optimizer_steps:06d}-{self.ranks.rank}"
        for i, packed in enumerate(packs):
            tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
            save_file(tensors, folder / f"{name}-{i}.safetensors")
        if state.skipped_in_row >= self.recipe.train.max_skipped:
            raise RuntimeError(
                f"{state.skipped_in_row} steps in a row had a loss or gradient that is not finite, "
                f"expected fewer than train.max_skipped; their batches are in {folder}"
            )

    def _autocast(self):
        policy = self.recipe.policy
        device = torch.device(policy.device).type
        return torch.autocast(device, torch.bfloat16) if policy.autocast else nullcontext()
