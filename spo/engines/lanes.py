"""Several users of one engine: each receives only its own samples.

The probe after a weight update and the evaluation use the engine while prompts of the next
iteration are in flight.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import count

from torch import Tensor

from spo.engines.protocol import Engine
from spo.records import Completion, Request


class Lane:
    """An engine as one of its users sees it. `new_lane` makes another lane of the same engine."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._owners: dict[int, tuple[Lane, int, int]] = {}  # key -> lane, its key, samples left
        self._keys = count()
        self._inbox: list[Completion] = []

    def new_lane(self) -> Lane:
        """Another lane of the same engine."""
        other = Lane(self.engine)
        other._owners, other._keys = self._owners, self._keys
        return other

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    @property
    def block_size(self) -> int:
        return self.engine.block_size

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def saved_names(self) -> bool:
        return self.engine.saved_names

    @property
    def room(self) -> int:
        return self.engine.room

    def submit(self, request: Request) -> None:
        key = next(self._keys)
        self.engine.submit(replace(request, key=key))
        self._owners[key] = (self, request.key, request.n)

    def poll(self) -> list[Completion]:
        """Samples that another lane's steps have finished; if there are none, one engine step."""
        if not self._inbox:
            for completion in self.engine.poll():
                lane, key, left = self._owners.pop(completion.key)
                if left > 1:
                    self._owners[completion.key] = (lane, key, left - 1)
                lane._inbox.append(replace(completion, key=key))
        done, self._inbox = self._inbox, []
        return done

    def abort(self) -> None:
        """Drop the samples of all lanes."""
        self.engine.abort()
        self._owners.clear()
        self._inbox.clear()

    def sleep(self) -> None:
        self.engine.sleep()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.load_weights(named_tensors, version)

    def counters(self) -> dict[str, float]:
        return self.engine.counters()

    def close(self) -> None:
        self.engine.close()
