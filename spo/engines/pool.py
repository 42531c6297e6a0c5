"""Several engines as one: a prompt's tree stays on one engine, where its prefixes are cached.

An engine whose connection is lost is not used again. Its samples in flight come back as failed
samples, which a rollout repeats with the same seeds on the other engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from spo.engines.protocol import Engine
from spo.records import LENGTH, Completion, Request


@dataclass
class Member:
    """One engine of the pool, and its samples in flight."""

    engine: Engine
    owed: dict[int, set[int]] = field(default_factory=dict)  # key -> indices
    lost: str | None = None  # the reason, if it is lost


class EnginePool:
    """Several engines as one `Engine`. Raises RuntimeError once all of them are lost.

    Args:
        engines: with the same weights; the methods of a lost one raise ConnectionError.
    """

    def __init__(self, engines: Sequence[Engine]):
        if not engines:
            raise ValueError("engines: expected at least one, found none")
        self.members = [Member(engine) for engine in engines]
        self.max_model_len = min(engine.max_model_len for engine in engines)
        self.block_size = max(engine.block_size for engine in engines)
        self.version = engines[0].version
        self._roots: dict[int, dict[tuple[int, ...], Member]] = {}  # length -> prefix -> member

    @property
    def saved_names(self) -> bool:
        return self.members[0].engine.saved_names

    @property
    def room(self) -> int:
        return sum(member.engine.room for member in self._alive())

    def submit(self, request: Request) -> None:
        while True:
            member = self._member(request.prefix_ids)
            try:
                member.engine.submit(request)
            except ConnectionError as error:
                member.lost = str(error)
                continue
            member.owed[request.key] = set(range(request.n))
            return

    def poll(self) -> list[Completion]:
        done = []
        for member in self.members:
            if not member.owed:
                continue
            try:
                if member.lost is None:
                    for sample in member.engine.poll():
                        self._settle(member, sample.key, sample.index)
                        done.append(sample)
            except ConnectionError as error:
                member.lost = str(error)
            if member.lost is not None:
                done += self._failed(member)
        return done

    def abort(self) -> None:
        for member in self.members:
            member.owed.clear()
            try:
                if member.lost is None:
                    member.engine.abort()
            except ConnectionError as error:
                member.lost = str(error)

    def sleep(self) -> None:
        for member in self._alive():
            member.engine.sleep()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        weights = list(named_tensors)
        for member in self._alive():
            try:
                member.engine.load_weights(iter(weights), version)
            except ConnectionError as error:
                member.lost = str(error)
        self._alive()
        self.version = version
        self._roots.clear()  # no prefix is cached anywhere, so trees may move

    def counters(self) -> dict[str, float]:
        """Sums over all engines, a lost one's last counts included."""
        total: dict[str, float] = {}
        for member in self.members:
            for name, value in member.engine.counters().items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        for member in self.members:
            if member.lost is None:
                member.engine.close()

    def _alive(self) -> list[Member]:
        alive = [member for member in self.members if member.lost is None]
        if not alive:
            reasons = "; ".join(str(member.lost) for member in self.members)
            raise RuntimeError(f"every engine of the pool is lost: {reasons}")
        return alive

    def _member(self, prefix: tuple[int, ...]) -> Member:
        """The engine with the longest cached start of `prefix`, else the least busy one."""
        for length in sorted(self._roots, reverse=True):
            if length <= len(prefix):
                member = self._roots[length].get(prefix[:length])
                if member is not None and member.lost is None:
                    return member
        member = max(self._alive(), key=lambda member: member.engine.room)
        self._roots.setdefault(len(prefix), {})[prefix] = member
        return member

    @staticmethod
    def _settle(member: Member, key: int, index: int) -> None:
        member.owed[key].remove(index)
        if not member.owed[key]:
            del member.owed[key]

    def _failed(self, member: Member) -> list[Completion]:
        """The samples in flight of a lost engine, as failed samples."""
        owed, member.owed = member.owed, {}
        return [
            Completion(key, index, (), (), LENGTH, self.version, self.version, error=member.lost)
            for key, indices in owed.items()
            for index in sorted(indices)
        ]
