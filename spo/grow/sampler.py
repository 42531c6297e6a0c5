"""Engine, grader, decoder and shape of a recipe, connected once for every command that samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice

from spo import named
from spo.config.evaluation import TEST
from spo.config.recipe import Recipe, evaluation_sets
from spo.config.shape import Growing
from spo.engines.lanes import Lane
from spo.engines.make import engine_of
from spo.engines.protocol import Engine
from spo.grow.curriculum import Curriculum
from spo.grow.evaluate import Accuracy, accuracies
from spo.grow.rollout import Rollout, RolloutOptions
from spo.grow.shapes import Shape
from spo.grow.stats import RolloutStats
from spo.grow.stream import Stream, grow, require_fitting
from spo.models.tokenizer import exact_text, load_tokenizer, response_text, sampling_of
from spo.records import Completion, Forest, Origin, Prompt, Request
from spo.reward import reward_of
from spo.signatures import Response
from spo.tasks import prompts_of, task_of
from spo.tasks.grading import Grader

PROBE_TOKENS = 16  # maximum length of `sample_one`
EVALUATION = -1  # the iteration in the seeds of evaluations
ALL_TOO_LONG = 4096  # so many prompts that do not fit mean that none fits


class Sampler:
    """What `spo train`, `eval`, `rollout` and `compare` sample with. Close it, or use `with`.

    Args:
        engine: use this engine and leave it open; by default the recipe's is made and closed. Its
            samples in flight are dropped.
        rescore: (prefix ids, token ids) -> the trainer's logprobs, for shapes that need them.
        rank: of this process; each rank has other seeds.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        engine: Engine | None = None,
        tokenizer=None,
        rescore: Callable[[list[int], list[int]], list[float]] | None = None,
        rank: int = 0,
    ):
        self.recipe, self.rank = recipe, rank
        self.origin = origin_of(recipe)
        self.tokenizer = tokenizer or load_tokenizer(recipe.policy)
        # A prompt is read once for all its leaves, which a reward is asked about one by one.
        self._prompt_text = lru_cache(maxsize=1024)(partial(exact_text, self.tokenizer))
        self._rescore = rescore
        self._told: set[str] = set()  # what was warned of
        self._shapes: dict[int, Shape] = {}  # by their limit
        self.sampling = sampling_of(recipe, self.tokenizer)
        self.sets = evaluation_sets(recipe)
        # Sets of one task may have different settings of it, so each has a grader of its own.
        self._tasks = {_graded_as(name, one): task_of(one) for name, one in self.sets.items()}
        self._tests: dict[str, list[Prompt]] = {}
        timeout_s = 5.0 if recipe.reward is None else recipe.reward.timeout_s
        self.grader = Grader(
            self._tasks,
            reward=recipe.reward,
            timeout_s=timeout_s,
            workers=recipe.grading.workers,
        )
        self._own = engine is None
        try:
            self.engine = Lane(engine_of(recipe) if engine is None else engine)
            if engine is not None:
                self.engine.abort()  # samples of an interrupted run
        except BaseException:
            self.grader.close()
            raise

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the grader, and the engine if it was made here."""
        try:
            self.grader.close()
        finally:
            if self._own:
                self.engine.close()

    def decode(self, token_ids: list[int]) -> str:
        """The text of a response, for the grader."""
        return response_text(self.tokenizer, token_ids, self.sampling.stop_token_ids)

    def shape(self, max_new_tokens: int | None = None) -> Shape:
        """The recipe's shape with responses of at most `max_new_tokens` (default: the recipe's)."""
        limit = max_new_tokens or self.recipe.sampling.max_new_tokens
        if limit not in self._shapes:
            align = self.engine.block_size if self.recipe.engine.align_segments else 1
            growing = Growing(limit, self.tokenizer, self._rescore, align)
            self._shapes[limit] = self.recipe.shape.make(growing)
        return self._shapes[limit]

    def options(self, iteration: int) -> RolloutOptions:
        """Rollout options of an iteration of training."""
        sampling = replace(self.sampling, seed=self.recipe.train.seed + 1_000_003 * self.rank)
        options = RolloutOptions(
            sampling,
            iteration,
            self.recipe.sampling.truncated,
            origin=self.origin,
            told=self._told,
        )
        return options if self.recipe.reward is None else replace(options, read=self.response)

    def response(self, prompt: Prompt, token_ids: list[int], truncated: bool) -> Response:
        """What the reward is asked about."""
        return Response(
            prompt=self._prompt_text(prompt.prompt_ids),
            response=prompt.opening + self.decode(token_ids),
            answer=prompt.answer,
            columns=prompt.columns,
            response_ids=token_ids,
            truncated=truncated,
            has_answer=self._has_answer(prompt),
        )

    def _has_answer(self, prompt: Prompt) -> bool:
        """Whether the data have an answer. None may be one, but of a table it is a lack."""
        return prompt.answer is not None or self._has_test(prompt)

    def _has_test(self, prompt: Prompt) -> bool:
        """Whether the prompt's task says itself what is right; else evaluations ask the reward."""
        return getattr(self._tasks.get(prompt.task), "tested", True)

    def test_prompts(self, name: str = TEST) -> list[Prompt]:
        """`eval.problems` of an evaluation set's test split. Raises ValueError if it has none."""
        if name not in self._tests:
            recipe = self.sets[name]
            asked = prompts_of(recipe, "test", self.tokenizer, most=recipe.eval.problems)
            prompts = [replace(prompt, task=_graded_as(name, recipe)) for prompt in asked]
            if not prompts:
                where = "data.test" if name == TEST else f"eval.sets.{name}"
                raise ValueError(f"{where}: expected test problems, task {recipe.task} has none")
            if not self._has_test(prompts[0]):
                self._check_reward(prompts[0])
            self._tests[name] = prompts
        return self._tests[name]

    def train_prompts(self, cursor: int = 0) -> Iterator[Prompt]:
        """The training prompts from index `cursor` on."""
        prompts = prompts_of(self.recipe, "train", self.tokenizer, self.recipe.train.seed)
        return islice(self._checked(prompts), cursor, None)

    def _checked(self, prompts: Iterator[Prompt]) -> Iterator[Prompt]:
        """The same prompts; the first must have what the reward needs."""
        for index, prompt in enumerate(prompts):
            if index == 0:
                self._check_reward(prompt)
            yield prompt

    def _check_reward(self, prompt: Prompt) -> None:
        """Raise ValueError if the data have not what the reward needs."""
        if self.recipe.reward is not None:
            reward_of(self.recipe.reward).check(prompt.columns, self._has_answer(prompt))

    def grow(self, prompts: Sequence[Prompt]) -> tuple[Forest, RolloutStats]:
        """One forest of these prompts, with the seeds of a first iteration."""
        return grow(prompts, self.engine, self.shape(), self.grader, self.decode, self.options(0))

    def stream(
        self, iteration: int, cursor: int, zero_variance: Iterable[str], world: int
    ) -> tuple[Stream, Curriculum]:
        """This rank's forests from `iteration` on, and the order of the prompts of all ranks.

        Their samples stay in flight while the probe and evaluations use the engine. Raises
        ValueError if none of the first `ALL_TOO_LONG` prompts fits the engine's context.

        Args:
            cursor: index of the first prompt.
            zero_variance: see `Curriculum`.
            world: number of ranks.
        """
        train, lane = self.recipe.train, self.engine.new_lane()
        rollout = Rollout(lane, self.shape(), self.grader, self.decode, self.options(iteration))
        prompts = require_fitting(self.train_prompts(cursor), rollout, ALL_TOO_LONG)
        probability = self.recipe.data.difficulty
        order = Curriculum(prompts, probability, train.seed, cursor, zero_variance)
        share = (self.rank, world)
        return Stream(order, train.prompts, rollout, train.stream_depth, *share), order

    def accuracies(
        self,
        name: str = TEST,
        *,
        temperature: float = 0.0,  # 0 is greedy
        limits: Sequence[int] = (),  # on the response, in tokens; the recipe's by default
        samples: int = 1,  # per prompt
    ) -> list[Accuracy]:
        """The figures of an evaluation set under every limit; samples follow `eval.top_p` etc."""
        options, evals = self.options(EVALUATION), self.recipe.eval
        cut = {"top_p": evals.top_p, "top_k": evals.top_k, "min_p": evals.min_p}
        sampling = replace(options.sampling, temperature=temperature, **cut)
        prompts = self.test_prompts(name)
        task, reward = self._tasks[prompts[0].task], self.recipe.reward
        options = replace(options, sampling=sampling, read=None)
        if reward is not None and not self._has_test(prompts[0]):
            options = replace(options, read=self.response, success=reward.success)
        found = accuracies(
            prompts,
            self.engine,
            self.grader,
            self.decode,
            options,
            limits or (self.recipe.sampling.max_new_tokens,),
            samples,
            votes=hasattr(task, "answer"),
        )
        return [replace(one, set=name) for one in found]

    def sample_one(self, prefix: Sequence[int]) -> Completion:
        """One short sample of an idle engine. Raises RuntimeError if the engine fails."""
        size = min(PROBE_TOKENS, self.engine.max_model_len - len(prefix))
        self.engine.submit(Request(-1, tuple(prefix), 1, size, self.sampling))
        while not (done := self.engine.poll()):
            pass
        if done[0].error is not None:
            raise RuntimeError(f"the engine failed on the probe: {done[0].error}")
        return done[0]


def origin_of(recipe: Recipe) -> Origin:
    """What a forest file says of the recipe that it was grown with."""
    credit = {"type": os.path.basename(recipe.credit_type)}  # a file's folder is of one machine
    credit |= named.settings_of(recipe.credit, "credit")
    return Origin(recipe.name, recipe.policy.path, credit, recipe.loss.prob_threshold)


def _graded_as(name: str, recipe: Recipe) -> str:
    """`Prompt.task` of an evaluation set's prompts: the name by which the grader knows its task."""
    return recipe.task if name == TEST else f"eval.sets.{name}"
