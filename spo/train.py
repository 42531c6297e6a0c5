"""The training loop, one call per stage: prompts, grow, credit, keep, pack, loss, step, sync."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from safetensors.torch import save_file

from spo import advantages, batch, checkpoint, replay
from spo.config import Config, LossConfig
from spo.engines import Engine, make_engine
from spo.evaluate import pass_at_1
from spo.loss import policy_loss
from spo.metrics import MetricsWriter
from spo.model import (
    load_policy,
    load_tokenizer,
    model_folder,
    score,
    sequence_logprobs,
    to_device,
)
from spo.records import Batch, Completion, Forest, Prompt, Replay, Request
from spo.rollout import RolloutOptions, grow
from spo.shapes import make_shape
from spo.tasks import get_task
from spo.tasks import prompts as task_prompts
from spo.tasks.grading import Grader

Report = Callable[[dict], None]


def train(
    config: Config,
    *,
    resume: bool = False,
    engine: Engine | None = None,
    report: Report = lambda line: None,
) -> list[dict]:
    """Run a recipe; returns the metrics lines written in this call.

    Args:
        resume: continue from the newest checkpoint in `config.out_dir`.
        engine: use this engine (it is left open); by default one is made and closed.
        report: called with every metrics line.

    Raises ValueError for settings that cannot work, RuntimeError if training cannot go on.
    """
    out = config.out_dir
    found = checkpoint.latest_checkpoint(out)
    if found and not resume:
        raise ValueError(f"out: {out} already holds a run; add --resume or choose another folder")
    if resume and not found and (out / "checkpoints").exists():
        raise ValueError(f"out: {out} holds no complete checkpoint to resume from")
    get_task(config.task)
    tokenizer = load_tokenizer(config.policy)
    model = load_policy(config.policy, str(found / "policy") if found else None)
    reference = None
    if config.loss.kl_coef:
        reference = load_policy(config.policy).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.train.learning_rate,
        weight_decay=config.train.weight_decay,
        betas=(0.9, 0.95),
    )
    state, buffer = checkpoint.State(), Replay()
    if found:
        state = checkpoint.load_state(found)
        buffer = checkpoint.load_training(found, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    own = engine is None
    engine = engine or engine_of(config)
    lines: list[dict] = []
    with (
        MetricsWriter(out / "metrics.jsonl", resume_at=state.iteration) as writer,
        Grader() as grader,
    ):
        run = _Run(config, tokenizer, model, reference, optimizer, engine, grader)

        def write(line: dict) -> None:
            head = {
                "iteration": state.iteration,
                "seconds": state.seconds,
                "generated_tokens": state.generated_tokens,
            }
            lines.append(head | line)
            writer.write(lines[-1])
            report(lines[-1])

        try:
            run.sync(state.version)
            stream = islice(run.train_prompts(), state.prompt_cursor, None)
            while not _finished(config, state):
                every = config.eval.every
                if state.iteration == 0 or (every and state.iteration % every == 0):
                    write(run.evaluate())
                buffer = _iteration(config, run, state, buffer, stream, write)
                if state.iteration % config.train.checkpoint_every == 0 or _finished(config, state):
                    checkpoint.save_checkpoint(
                        out, config, model, tokenizer, optimizer, state, buffer
                    )
            write(run.evaluate())
        finally:
            if own:
                engine.close()
    return lines


def engine_of(config: Config) -> Engine:
    """The recipe's engine on the recipe's start policy."""
    return make_engine(
        config.engine.name,
        model_folder(config.policy.path),
        dtype=getattr(torch, config.engine.dtype),
        device=config.policy.device,
        max_num_seqs=config.engine.max_num_seqs,
        max_model_len=config.engine.max_model_len,
    )


def _finished(config: Config, state: checkpoint.State) -> bool:
    limit = config.train.max_generated_tokens
    return state.iteration >= config.train.iterations or (
        limit is not None and state.generated_tokens >= limit
    )


def _iteration(
    config: Config,
    run: _Run,
    state: checkpoint.State,
    buffer: Replay,
    stream: Iterator[Prompt],
    write: Report,
) -> Replay:
    """One rollout and the optimiser steps on it; `state` moves on by one iteration."""
    start = time.perf_counter()
    prompts = list(islice(stream, config.train.prompts))
    if not prompts:
        raise ValueError(f"task: {config.task} has no training prompts left")
    forest, cost = run.grow(prompts, state.iteration)
    grown = time.perf_counter()
    values, credit = advantages.assign(forest, config.advantage)
    line = {"stage": "train"} | advantages.summarize(forest, values, credit)
    if state.iteration == 0:
        forest.save(config.out_dir / "forest-first.safetensors")
    forest.save(config.out_dir / "forest-last.safetensors")
    generated = forest.num_generated
    chosen, credit, buffer = replay.merge(
        forest,
        credit,
        buffer,
        version=state.version,
        nodes_per_prompt=config.train.replay_nodes,
        max_age=config.train.replay_age,
        seed=config.train.seed * 1_000_003 + state.iteration,
    )
    line |= run.train(chosen, credit, state)
    trained = time.perf_counter()
    state.version += 1
    line["probe_difference"] = run.sync(state.version)
    synced = time.perf_counter()
    line |= {
        "time_rollout": grown - start,
        "time_train": trained - grown,
        "time_sync": synced - trained,
        "tokens_per_s": generated / (grown - start),
        "trees_per_s": cost.trees / (grown - start),
        "dropped_prompts": cost.dropped_prompts,
        "retried": cost.retried,
        "truncated": cost.truncated,
        "invalid_gradings": cost.invalid_gradings,
        "replay_trees": len(buffer.forest.prompts) if buffer.forest is not None else 0,
    }
    state.generated_tokens += generated
    state.prompt_cursor += len(prompts)
    state.seconds += synced - start
    write(line)
    state.iteration += 1
    return buffer


class _Run:
    """The parts of a run, wired together."""

    def __init__(self, config, tokenizer, model, reference, optimizer, engine, grader):
        self.config, self.tokenizer = config, tokenizer
        self.model, self.reference, self.optimizer = model, reference, optimizer
        self.engine, self.grader = engine, grader
        self.stop_token_ids = (tokenizer.eos_token_id,)
        temperature = config.sampling.temperature
        self.shape = make_shape(
            config.shape,
            config.advantage,
            config.sampling.max_new_tokens,
            tokenizer,
            rescore=lambda prefix, ids: sequence_logprobs(model, prefix, ids, temperature),
        )
        self.test_prompts = list(
            islice(task_prompts(config.task, "test", 0, tokenizer), config.eval.problems)
        )

    def train_prompts(self) -> Iterator[Prompt]:
        return task_prompts(self.config.task, "train", self.config.train.seed, self.tokenizer)

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def options(self, iteration: int, temperature: float) -> RolloutOptions:
        return RolloutOptions(
            stop_token_ids=self.stop_token_ids,
            temperature=temperature,
            seed=self.config.train.seed,
            iteration=iteration,
            truncated=self.config.sampling.truncated,
        )

    def grow(self, prompts: list[Prompt], iteration: int):
        options = self.options(iteration, self.config.sampling.temperature)
        return grow(prompts, self.engine, self.shape, self.grader, self.decode, options)

    def evaluate(self) -> dict:
        """Greedy and sampled Pass@1 on the test split, as a metrics line."""
        line = {"stage": "eval", "problems": len(self.test_prompts)}
        kinds = {"greedy": 0.0}
        if self.config.eval.sampled:
            kinds["sampled"] = self.config.sampling.temperature
        for kind, temperature in kinds.items():
            line[kind], line[f"{kind}_stderr"] = pass_at_1(
                self.test_prompts,
                self.engine,
                self.grader,
                self.decode,
                self.options(-1, temperature),
                self.config.sampling.max_new_tokens,
            )
        return line

    def train(self, forest: Forest, credit: torch.Tensor, state: checkpoint.State) -> dict:
        """The optimiser steps on one forest; returns their mean figures."""
        config = self.config.train
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.iteration)
        steps = []
        for _ in range(config.epochs):
            order = torch.randperm(len(forest.prompts), generator=generator)
            for trees in order.tensor_split(min(config.minibatches, len(order))):
                steps.append(self.step(forest, credit, trees.tolist(), state))
        total = {key: sum(s[key] for s in steps) for key in steps[0]}
        kept = max(total["kept"], 1.0)
        return {
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

    def step(
        self, forest: Forest, credit: torch.Tensor, trees: list[int], state: checkpoint.State
    ) -> dict:
        """One optimiser step on some trees: pack, loss, gradient, clip, guard, update."""
        loss, train = self.config.loss, self.config.train
        temperature = self.config.sampling.temperature
        packs, stats = batch.pack(
            forest,
            credit,
            prob_threshold=loss.prob_threshold,
            tokens_per_batch=train.tokens_per_batch,
            trees=trees,
            every_token=reads_masked_tokens(loss),
        )
        figures = dict.fromkeys(("loss", "kl", "kept", "clipfrac", "entropy", "mismatch_kl"), 0.0)
        figures |= {"ratio_max": 1.0, "grad_norm": 0.0, **dataclasses.asdict(stats)}
        figures["lr"] = self.learning_rate(state.optimizer_steps)
        for packed in packs:
            packed = to_device(packed, self.config.policy.device)
            with self.autocast():
                if self.reference is not None:
                    packed = score(self.reference, packed, temperature)
                out = policy_loss(self.model, packed, loss, temperature)
            out.loss.backward()
            for key, value in out.metrics.items():
                figures[key] = (
                    max(figures[key], value) if key == "ratio_max" else figures[key] + value
                )
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.max_grad_norm)
        figures["grad_norm"] = float(norm)
        if math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]):
            for group in self.optimizer.param_groups:
                group["lr"] = figures["lr"]
            if packs:
                self.optimizer.step()
            state.skipped_in_row = 0
        else:
            self.skip(packs, state)
        self.optimizer.zero_grad(set_to_none=True)
        state.optimizer_steps += 1
        return figures

    def skip(self, packs: list[Batch], state: checkpoint.State) -> None:
        """Count a step that is not finite and dump its batches; stop after too many in a row."""
        state.skipped_steps += 1
        state.skipped_in_row += 1
        folder = self.config.out_dir / "skipped"
        folder.mkdir(exist_ok=True)
        for i, packed in enumerate(packs):
            tensors = {k: v for k, v in vars(packed).items() if isinstance(v, torch.Tensor)}
            save_file(tensors, folder / f"step-{state.optimizer_steps:06d}-{i}.safetensors")
        if state.skipped_in_row >= self.config.train.max_skipped:
            raise RuntimeError(
                f"{state.skipped_in_row} steps in a row had a loss or gradient that is not finite; "
                f"their batches are in {folder}"
            )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to 0 or constant."""
        train = self.config.train
        total = train.iterations * train.epochs * train.minibatches
        warmup = round(total * train.warmup_share)
        if step < warmup:
            return train.learning_rate * (step + 1) / warmup
        if train.decay == "constant":
            return train.learning_rate
        return train.learning_rate * max(total - step, 0) / max(total - warmup, 1)

    def autocast(self):
        policy = self.config.policy
        device = torch.device(policy.device).type
        return torch.autocast(device, torch.bfloat16) if policy.autocast else nullcontext()

    def sync(self, version: int) -> float:
        """Give the engine the trained weights, then compare both sides' logprobs of one sample.

        Returns the largest difference. Raises RuntimeError if it is above `train.probe_tolerance`:
        then the engine runs other weights than the trainer.
        """
        named = ((name, p.detach()) for name, p in self.model.named_parameters())
        self.engine.load_weights(named, version)
        temperature = self.config.sampling.temperature
        prefix = list(self.test_prompts[0].prompt_ids)
        sample = sample_one(self.engine, prefix, self.stop_token_ids, temperature)
        trainer = sequence_logprobs(self.model, prefix, list(sample.token_ids), temperature)
        worst = max(abs(a - b) for a, b in zip(trainer, sample.logprobs, strict=True))
        if not worst <= self.config.train.probe_tolerance:
            raise RuntimeError(
                f"weight version {version}: trainer and engine differ by {worst:.3g} in a logprob, "
                f"more than train.probe_tolerance={self.config.train.probe_tolerance:g}"
            )
        return worst


def sample_one(
    engine: Engine, prefix: list[int], stop_token_ids: tuple[int, ...], temperature: float
) -> Completion:
    """One short sample of an idle engine. Raises RuntimeError if the engine fails."""
    room = min(16, engine.max_model_len - len(prefix))
    engine.submit(Request(-1, tuple(prefix), 1, room, stop_token_ids, 0, temperature))
    while not (done := engine.poll()):
        pass
    if done[0].error is not None:
        raise RuntimeError(f"the engine failed on the probe: {done[0].error}")
    return done[0]


def reads_masked_tokens(loss: LossConfig) -> bool:
    """Whether tokens outside the mask contribute to the loss (a KL term over all tokens)."""
    return loss.kl_coef > 0 and loss.kl_scope == "all"
