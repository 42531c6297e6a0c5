"""Which training prompts are drawn: those that taught nothing the last time less often."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from spo.records import Forest, Prompt


def varies(forest: Forest) -> Tensor:  # (B,) bool
    """Trees in which two rewards differ; a comparison of responses finds nothing in the others."""
    graded = forest.rewards.isfinite()
    trees, rewards = forest.prompt[graded].long(), forest.rewards[graded]
    lowest = torch.full((len(forest.prompts),), torch.inf)
    highest = -lowest
    lowest.scatter_reduce_(0, trees, rewards, "amin")
    highest.scatter_reduce_(0, trees, rewards, "amax")
    return highest > lowest


class Curriculum:
    """The training prompts in their order; those of zero variance are drawn with a probability.

    In the last tree of such a prompt no two rewards differ. Which of them are drawn follows
    from `seed` and their index in the order, so that all ranks and a resumed run agree.

    Attributes:
        zero_variance: keys of these prompts, see `key_of`.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],
        probability: float | None,  # None draws every prompt
        seed: int,
        cursor: int = 0,  # index of the first of `prompts` in the order
        zero_variance: Iterable[str] = (),
    ):
        self.probability, self.seed = probability, seed
        self.zero_variance = set(zero_variance)
        self._prompts = enumerate(prompts, cursor)
        self._passed_over = 0

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        for index, prompt in self._prompts:
            if self.probability is None or key_of(prompt) not in self.zero_variance:
                return prompt
            # A string seeds Random alike on every platform and Python version.
            if random.Random(f"difficulty {self.seed} {index}").random() < self.probability:
                return prompt
            self._passed_over += 1
        raise StopIteration

    def update(self, grown: Forest) -> dict[str, int]:
        """Note which of these trees vary.

        Returns the figure `drawn_less`: prompts passed over since the last call. Nothing if every
        prompt is drawn.
        """
        if self.probability is None:
            return {}
        for prompt, varied in zip(grown.prompts, varies(grown).tolist(), strict=True):
            note = self.zero_variance.discard if varied else self.zero_variance.add
            note(key_of(prompt))
        passed_over, self._passed_over = self._passed_over, 0
        return {"drawn_less": passed_over}


def key_of(prompt: Prompt) -> str:
    """A hash of the prompt's token ids, 16 hexadecimal digits."""
    return blake2b(np.array(prompt.prompt_ids, np.int64).tobytes(), digest_size=8).hexdigest()
