"""The training loop, one call per stage: prompts, grow, credit, keep, pack, loss, step, sync."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from spo.callbacks import Log, Report, check_callbacks
from spo.config.evaluation import TEST
from spo.config.recipe import Recipe
from spo.credit import replay
from spo.credit.nodes import check_credit
from spo.engines.make import require_device
from spo.engines.protocol import Engine
from spo.grow.curriculum import Curriculum
from spo.grow.refill import join, refill
from spo.grow.sampler import Sampler
from spo.grow.stats import RolloutStats
from spo.grow.stream import Stream
from spo.learn import checkpoint, distributed
from spo.learn.agreement import check_engine, compare_logprobs, sync
from spo.learn.best import forget_from, keep_if_best
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo.learn.model import sequence_logprobs
from spo.learn.schedule import share_done
from spo.metrics import MetricsWriter
from spo.models.tokenizer import load_tokenizer
from spo.records import Credit, Forest, Replay
from spo.trackers.tracker import opened, require_installed


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    engine: Engine | None = None,
    report: Report = lambda line: None,
    callbacks: Sequence[Any] = (),
) -> list[dict]:
    """Run a recipe; returns the metrics lines written in this call.

    Under torchrun every rank calls this; rank 0 evaluates and writes the files.

    Args:
        resume: continue from the newest checkpoint in `recipe.out_dir`.
        engine: use this engine; its samples in flight are dropped, and it stays open. By default an
            engine is made and closed.
        report: called with every metrics line.
        callbacks: objects with any of `on_iteration(line)`, `on_evaluation(line)` and
            `on_checkpoint(folder)`, called on rank 0. After a False the run saves a checkpoint and
            ends: after its iteration, or at once after an evaluation.

    Raises ValueError for settings that cannot work, RuntimeError if training cannot go on.
    """
    check_callbacks(callbacks)
    require_installed(recipe)
    settings, out = recipe.train, recipe.out_dir
    saved = checkpoint.find(recipe, resume)
    ranks = distributed.join(settings.parallel, recipe.policy.device)
    _check_ranks(recipe, ranks)
    require_device(recipe.policy.device)
    tokenizer = load_tokenizer(recipe.policy)
    learner = Learner(recipe, ranks, saved)
    state, buffer = checkpoint.State(policy=recipe.policy.content()), Replay()
    if saved:
        state, buffer = checkpoint.load_state(saved), learner.restore(saved)
    learner.shard()
    out.mkdir(parents=True, exist_ok=True)

    def rescore(prefix: list[int], token_ids: list[int]) -> list[float]:
        return sequence_logprobs(learner.model, prefix, token_ids, recipe.sampling.temperature)

    with (
        _writer(recipe, state, ranks) as writer,
        Sampler(
            recipe, engine=engine, tokenizer=tokenizer, rescore=rescore, rank=ranks.rank
        ) as sampler,
        opened(recipe, ranks.main, saved is not None, state.iteration) as trackers,
    ):
        log = Log(writer, state, report, [*trackers, *callbacks])
        tests = sampler.test_prompts()
        begin = (state.iteration, state.prompt_cursor, state.zero_variance)
        stream, order = sampler.stream(*begin, ranks.world)
        sampler.engine.load_weights(learner.weights(sampler.engine), state.version)
        check_engine(learner, sampler)
        compare_logprobs(learner, sampler, tests[0])
        empty = 0  # iterations in a row from which nothing survived
        stopped, newest = False, state.iteration if saved else -1  # of the checkpoint
        while not (stopped or _finished(recipe, state)):
            every = recipe.eval.every
            if state.iteration == 0 or (every and state.iteration % every == 0):
                _test(learner, sampler, log, state)
                if any(distributed.gather(ranks, log.stopped)):
                    if newest < state.iteration:
                        log.tell("on_checkpoint", learner.save(state, buffer))
                    break
            start = time.perf_counter()
            stream.rollout.shape = sampler.shape(response_limit(recipe, state))
            forest, costs, figures = _grow(recipe, stream, order, ranks)
            grown = time.perf_counter()
            generated = sum(cost.generated_tokens for cost in costs)
            if state.iteration == 0:
                _warn_if_none_stopped(costs, sampler)
            line = {"stage": "skipped"}
            empty = 0 if forest.prompts else empty + 1
            if forest.prompts:
                sampler.engine.sleep()
                credit = recipe.credit.assign(forest, learner)
                check_credit(forest, credit)
                if state.iteration == 0:
                    _warn_if_nothing_trains(forest, credit)
                _save_forest(recipe, forest, state, ranks)
                chosen, kept, buffer = replay.merge(
                    forest,
                    credit,
                    buffer,
                    iteration=state.iteration,
                    nodes_per_prompt=settings.replay_nodes,
                    max_age=settings.replay_age,
                    seed=settings.seed * 1_000_003 + state.iteration,
                    max_nodes=settings.replay_samples,
                )
                line = {"stage": "train"} | kept.figures
                line |= learner.train(chosen, kept, state, generated)
                trained = time.perf_counter()
                state.version += 1
                line["probe_difference"] = sync(learner, sampler, tests[0], state.version)
                line |= {"time_train": trained - grown, "time_sync": time.perf_counter() - trained}
            line |= _costs(generated, costs, grown - start) | figures
            line |= _reward_parts(recipe, costs)
            line["replay_trees"] = len(buffer.forest.prompts) if buffer.forest is not None else 0
            state.generated_tokens += generated
            state.prompt_cursor += sum(c.prompts for c in costs) + figures.get("drawn_less", 0)
            state.zero_variance = sorted(order.zero_variance)
            line["time_iteration"] = time.perf_counter() - start
            state.seconds += line["time_iteration"]
            log.write(line)
            _check_skipped(recipe, line, empty)
            state.iteration += 1
            learner.refresh_reference(state.iteration)
            due = state.iteration % settings.checkpoint_every == 0 or _finished(recipe, state)
            if any(distributed.gather(ranks, log.stopped)) or due:
                log.tell("on_checkpoint", learner.save(state, buffer))
                newest = state.iteration
            stopped = any(distributed.gather(ranks, log.stopped))
        else:
            sampler.engine.abort()  # samples of later iterations
            final = learner.weights(sampler.engine, stored=True)  # as others will load it
            sampler.engine.load_weights(final, state.version)
            _test(learner, sampler, log, state)
    return log.lines


def evaluate(sampler: Sampler, ranks: Ranks) -> dict:
    """Greedy and sampled figures of every evaluation set, as a metrics line.

    Keys of the recipe's own set are plain (`greedy`), those of others begin with their names.
    """
    if not ranks.main:
        return {}
    line: dict = {"stage": "eval"}
    for name, recipe in sampler.sets.items():
        kinds = {"greedy": (0.0, 1)}
        if recipe.eval.sampled:
            kinds["sampled"] = (recipe.sampling.temperature, recipe.eval.samples)
        found: dict[str, float] = {}
        for kind, (temperature, samples) in kinds.items():
            (one,) = sampler.accuracies(name, temperature=temperature, samples=samples)
            found |= one.figures(kind)
            found |= {"problems": one.problems, "too_long": one.too_long}
        line |= found if name == TEST else {f"{name}/{key}": v for key, v in found.items()}
    return line


def _test(learner: Learner, sampler: Sampler, log: Log, state: checkpoint.State) -> None:
    """Evaluate the policy as it is now, keep it if it is the best one, and write the line."""
    line = evaluate(sampler, learner.ranks)
    keep_if_best(learner, line, state.iteration)
    log.write(line)


def response_limit(recipe: Recipe, state: checkpoint.State) -> int:
    """Maximum length of a response now: that of the first stage that is not over yet."""
    done = share_done(recipe.train, state.iteration, state.generated_tokens)
    limits = [tokens for share, tokens in recipe.sampling.stages if done < share]
    return limits[0] if limits else recipe.sampling.max_new_tokens


def _check_skipped(recipe: Recipe, line: dict, empty: int) -> None:
    """Raise RuntimeError if nothing survived from `empty` iterations in a row, too many."""
    if empty and empty >= recipe.train.max_skipped:
        raise RuntimeError(
            f"no response of the last {empty} iterations has a reward, expected fewer such "
            f"iterations than train.max_skipped; of the last one's prompts "
            f"{line['dropped_prompts']} were dropped and {line['too_long']} did not fit"
        )


def _warn_if_none_stopped(costs: Sequence[RolloutStats], sampler: Sampler) -> None:
    """Warn if every response was cut by the limit: the policy may end its turns otherwise."""
    cut = sum(cost.truncated for cost in costs)
    if not cut or any(cost.gradings for cost in costs):  # what ends is graded
        return
    sampling = sampler.sampling
    tokens = sampler.tokenizer.convert_ids_to_tokens(sampling.stop_token_ids)
    waited = [f"{i} {name!r}" for i, name in zip(sampling.stop_token_ids, tokens, strict=True)]
    warnings.warn(
        f"all {cut} responses of the first iteration were cut at the limit "
        f"of tokens; they end with one of {', '.join([*waited, *map(repr, sampling.stop)])}: "
        "raise sampling.max_new_tokens, or name another end in sampling.stop_token_ids or "
        "sampling.stop",
        stacklevel=2,
    )


def _warn_if_nothing_trains(forest: Forest, credit: Credit) -> None:
    """Warn if no token of the first iteration has credit: the task may be out of reach."""
    if bool(credit.tokens.any()):
        return
    rewards = forest.rewards[forest.rewards.isfinite()]
    alike = "no response differs in its reward from the others of its prompt"
    if bool((rewards == rewards[0]).all()):
        alike = f"all {rewards.numel()} responses have the reward {float(rewards[0]):g}"
    warnings.warn(f"the first iteration trains nothing: {alike}", stacklevel=2)


def _check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Raise ValueError if the recipe cannot run on these ranks."""
    if recipe.train.prompts < ranks.world:
        raise ValueError(
            f"train.prompts: expected at least one per rank, {ranks.world} in all, found "
            f"{recipe.train.prompts}"
        )
    if ranks.sharded and recipe.shape.rescores:
        raise ValueError("shape.rescore=true: expected train.parallel=ddp, found fsdp")


def _writer(
    recipe: Recipe, state: checkpoint.State, ranks: Ranks
) -> AbstractContextManager[MetricsWriter | None]:
    """The metrics file on rank 0, nothing on the others. What is after `state` is dropped."""
    if not ranks.main:
        return nullcontext()
    forget_from(recipe.out_dir, state.iteration)
    return MetricsWriter(recipe.out_dir / "metrics.jsonl", resume_at=state.iteration)


def _grow(
    recipe: Recipe, stream: Stream, order: Curriculum, ranks: Ranks
) -> tuple[Forest, list[RolloutStats], dict[str, int]]:
    """The forest of all ranks, each of which grows its share, the costs on each, and figures.

    A rank without survivors adds no tree.
    """
    gather, settings = partial(distributed.gather, ranks), recipe.train
    first = join(gather(next(stream, None)))
    if first is None:
        raise ValueError(f"data.train: no training prompts of task {recipe.task} are left")
    forest, (grown, costs), figures = refill(
        first, lambda count: join(gather(stream.more(count))), settings.prompts, settings.refill
    )
    return forest, costs, figures | order.update(grown)


def _save_forest(recipe: Recipe, forest: Forest, state: checkpoint.State, ranks: Ranks) -> None:
    """Save the forest beside the metrics: the first one of a run, and always the last."""
    if not ranks.main:
        return
    if state.iteration == 0:
        forest.save(recipe.out_dir / "forest-first.safetensors")
    forest.save(recipe.out_dir / "forest-last.safetensors")


def _costs(generated: int, costs: Sequence[RolloutStats], seconds: float) -> dict[str, float]:
    """Cost of a rollout, over all ranks."""
    return {
        "time_rollout": seconds,
        "tokens_per_s": generated / seconds,
        "trees_per_s": sum(cost.trees for cost in costs) / seconds,
        "dropped_prompts": sum(cost.dropped_prompts for cost in costs),
        "too_long": sum(cost.too_long for cost in costs),
        "retried": sum(cost.retried for cost in costs),
        "truncated": sum(cost.truncated for cost in costs),
        "invalid_gradings": sum(cost.invalid_gradings for cost in costs),
        "max_age": max(cost.max_age for cost in costs),
        "mean_age": sum(cost.mean_age for cost in costs) / len(costs),
    }


def _reward_parts(recipe: Recipe, costs: Sequence[RolloutStats]) -> dict[str, float]:
    """The mean of what each term of the recipe's reward says, without its weight."""
    terms = () if recipe.reward is None else recipe.reward.terms
    names, found = [term.name for term in terms], {}
    for index, term in enumerate(terms):
        total, count = (
            sum(x) for x in zip(*(c.parts.get(index, (0, 0)) for c in costs), strict=True)
        )
        if count:
            clear = names.count(term.name) == 1 and term.name not in ("mean", "std")
            name = term.name if clear else f"{term.name}_{index}"
            found[f"reward_{name}"] = total / count
    return found


def _finished(recipe: Recipe, state: checkpoint.State) -> bool:
    limit = recipe.train.max_generated_tokens
    return state.iteration >= recipe.train.iterations or (
        limit is not None and state.generated_tokens >= limit
    )
