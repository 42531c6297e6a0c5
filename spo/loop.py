"""The training loop, one call per stage: prompts, grow, credit, keep, pack, loss, step, sync."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, islice

import torch

from spo.config.recipe import Config
from spo.credit import replay
from spo.credit import values as advantages
from spo.engines.lanes import Lane
from spo.engines.make import make_engine
from spo.engines.protocol import Engine
from spo.grow.evaluate import pass_at_1
from spo.grow.shapes import make_shape
from spo.grow.stream import Rollout, RolloutOptions, RolloutStats, Stream
from spo.learn import checkpoint, distributed
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo.learn.model import load_tokenizer, model_folder, require_device, sequence_logprobs
from spo.metrics import MetricsWriter
from spo.records import Completion, Forest, Prompt, Replay, Request
from spo.tasks import get_task, prompts_of
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

    Under torchrun every rank calls this; rank 0 evaluates and writes the files.

    Args:
        resume: continue from the newest checkpoint in `config.out_dir`.
        engine: use this engine (it is left open, what it has in flight is dropped); by default one
            is made and closed.
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
    if found:
        checkpoint.check_resumed(found, config)
    ranks = distributed.join(config.train.parallel, config.policy.device)
    if config.train.prompts < ranks.world:
        raise ValueError(f"train.prompts: expected at least one per rank, {ranks.world} in all")
    if ranks.sharded and config.shape.rescore:
        raise ValueError("shape.rescore=true works with train.parallel=ddp, not with fsdp")
    require_device(config.policy.device)
    tokenizer = load_tokenizer(config.policy)
    learner = Learner(config, ranks, found)
    state, buffer = checkpoint.State(), Replay()
    if found:
        state, buffer = checkpoint.load_state(found), learner.restore(found)
    learner.shard()
    out.mkdir(parents=True, exist_ok=True)
    own = engine is None
    engine = engine or engine_of(config)
    engine.abort()  # what an interrupted run has left in it
    lines: list[dict] = []
    with (
        _writer(config, state, ranks) as writer,
        Grader() as grader,
    ):
        run = _Run(config, ranks, tokenizer, learner, engine, grader, state)

        def write(line: dict) -> None:
            if not ranks.main:
                return
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
            while not _finished(config, state):
                every = config.eval.every
                if state.iteration == 0 or (every and state.iteration % every == 0):
                    write(run.evaluate())
                buffer = _iteration(config, run, state, buffer, write)
                if state.iteration % config.train.checkpoint_every == 0 or _finished(config, state):
                    learner.save(tokenizer, state, buffer)
            run.engine.abort()  # what was streamed ahead
            write(run.evaluate())
        finally:
            if own:
                engine.close()
    return lines


def _writer(config: Config, state: checkpoint.State, ranks: Ranks):
    """The metrics file on rank 0."""
    if not ranks.main:
        return nullcontext()
    return MetricsWriter(config.out_dir / "metrics.jsonl", resume_at=state.iteration)


def engine_of(config: Config) -> Engine:
    """The recipe's engine on the recipe's start policy."""
    require_device(config.policy.device)
    engine = config.engine
    card = {"memory_fraction": engine.memory_fraction, "sleep_mode": engine.sleep_mode}
    return make_engine(
        engine.name,
        model_folder(config.policy.path),
        addresses=engine.addresses,
        dtype=getattr(torch, engine.dtype),
        device=config.policy.device,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=engine.max_model_len,
        **(card if engine.name == "vllm" else {}),
    )


def _finished(config: Config, state: checkpoint.State) -> bool:
    limit = config.train.max_generated_tokens
    return state.iteration >= config.train.iterations or (
        limit is not None and state.generated_tokens >= limit
    )


def response_limit(config: Config, state: checkpoint.State) -> int:
    """Longest response now: that of the first stage whose share of the run is not done yet."""
    train = config.train
    done = state.iteration / train.iterations
    if train.max_generated_tokens is not None:
        done = max(done, state.generated_tokens / train.max_generated_tokens)
    limits = [tokens for share, tokens in config.sampling.stages if done < share]
    return limits[0] if limits else config.sampling.max_new_tokens


def _iteration(
    config: Config,
    run: _Run,
    state: checkpoint.State,
    buffer: Replay,
    write: Report,
) -> Replay:
    """One rollout and the optimiser steps on it; `state` moves on by one iteration."""
    start = time.perf_counter()
    forest, costs = run.grow(state)
    grown = time.perf_counter()
    run.engine.sleep()
    values, credit = advantages.assign(forest, config.advantage)
    targets = None
    if config.advantage.estimator == "gae":
        credit, targets = run.learner.judge(forest)
    line = {"stage": "train"} | advantages.summarize(forest, values, credit)
    if run.ranks.main:
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
        max_nodes=config.train.replay_samples,
    )
    line |= run.learner.train(chosen, credit, targets, state)
    trained = time.perf_counter()
    state.version += 1
    line["probe_difference"] = run.sync(state.version)
    synced = time.perf_counter()
    line |= {
        "time_rollout": grown - start,
        "time_train": trained - grown,
        "time_sync": synced - trained,
        "tokens_per_s": generated / (grown - start),
        "trees_per_s": sum(cost.trees for cost in costs) / (grown - start),
        "dropped_prompts": sum(cost.dropped_prompts for cost in costs),
        "retried": sum(cost.retried for cost in costs),
        "truncated": sum(cost.truncated for cost in costs),
        "invalid_gradings": sum(cost.invalid_gradings for cost in costs),
        "max_age": max(cost.max_age for cost in costs),
        "mean_age": sum(cost.mean_age for cost in costs) / len(costs),
        "replay_trees": len(buffer.forest.prompts) if buffer.forest is not None else 0,
    }
    state.generated_tokens += generated
    state.prompt_cursor += sum(cost.trees + cost.dropped_prompts for cost in costs)
    state.seconds += synced - start
    write(line)
    state.iteration += 1
    return buffer


class _Run:
    """The parts of a run, wired together."""

    def __init__(self, config, ranks, tokenizer, learner, engine, grader, state):
        self.config, self.ranks, self.tokenizer = config, ranks, tokenizer
        self.learner, self.model = learner, learner.model
        self.engine, self.grader = Lane(engine), grader
        self.stop_token_ids = (tokenizer.eos_token_id,)
        temperature = config.sampling.temperature
        self.shape = make_shape(
            config.shape,
            config.advantage,
            config.sampling.max_new_tokens,
            tokenizer,
            rescore=lambda prefix, ids: sequence_logprobs(learner.model, prefix, ids, temperature),
            align=engine.block_size if config.engine.align_segments else 1,
        )
        self.test_prompts = list(
            islice(prompts_of(config, "test", tokenizer), config.eval.problems)
        )
        self.rollout = Rollout(
            self.engine.beside(),  # runs on while the probe and an evaluation use the engine
            self.shape,
            grader,
            self.decode,
            self.options(state.iteration, temperature),
        )
        share = range(ranks.rank, config.train.prompts, ranks.world)
        prompts = self._prompts(state.prompt_cursor)
        first = list(islice(prompts, 1))  # data that cannot be read are found out before anything
        self.stream = Stream(
            chain(first, prompts), len(share), self.rollout, config.train.stream_depth
        )

    def _prompts(self, cursor: int) -> Iterator[Prompt]:
        """This rank's share of each iteration's prompts, from the `cursor`-th prompt on."""
        config, ranks = self.config, self.ranks
        found = prompts_of(config, "train", self.tokenizer, config.train.seed)
        found = islice(found, cursor, None)
        while prompts := list(islice(found, config.train.prompts)):
            yield from prompts[ranks.rank :: ranks.world]

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def options(self, iteration: int, temperature: float) -> RolloutOptions:
        return RolloutOptions(
            stop_token_ids=self.stop_token_ids,
            temperature=temperature,
            seed=self.config.train.seed + 1_000_003 * self.ranks.rank,
            iteration=iteration,
            truncated=self.config.sampling.truncated,
        )

    def grow(self, state: checkpoint.State) -> tuple[Forest, list[RolloutStats]]:
        """The forest of all ranks, each of which grows its share, and what it cost each."""
        limit = response_limit(self.config, state)
        self.rollout.shape = dataclasses.replace(self.shape, max_new_tokens=limit)
        grown = distributed.gather(self.ranks, next(self.stream, None))
        if None in grown:
            raise ValueError(f"task: {self.config.task} has no training prompts left")
        forests, costs = zip(*grown, strict=True)
        return replay.concat(forests), list(costs)

    def evaluate(self) -> dict:
        """Greedy and sampled Pass@1 on the test split, as a metrics line."""
        if not self.ranks.main:
            return {}
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

    def sync(self, version: int) -> float:
        """Give the engine the trained weights, then compare both sides' logprobs of one sample.

        Returns the largest difference. Raises RuntimeError if it is above `train.probe_tolerance`:
        then the engine runs other weights than the trainer.
        """
        named = ((name, distributed.full(p.detach())) for name, p in self.model.named_parameters())
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
