"""Stands in for the native extension: its launches run the PTX that nvcc made of csrc/cuda.

`Device.install` puts it where `spo_kernels.dispatch` looks for the CPU's kernels, so that the
public functions run through it. Shapes are those of the launchers in csrc/cuda; the argument
structs are those of csrc/ops.h, whose size must be that of the PTX's parameters.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np
import torch
from ptx_machine import WARP, Machine
from ptx_memory import Global
from ptx_source import Arguments, code_of, code_of_type, fields_of, ptx_of
from torch import Tensor

from spo_kernels import dispatch

DTYPES = ("float", "BFloat16", "Float16")  # by `Dtype` of csrc/ops.h
HELD_BYTES = 656  # sizeof(HeldRowMemory)
STREAMED_BYTES = 416  # sizeof(StreamedRowMemory)
GRANULE, WARP_SUMS = 16, 32 * 8
# What earlier phases of the policy loss have written.
SHARED_BY_PHASES = ("uses", "scales", "counts", "index", "states", "sources", "logprobs", "entropy")
WRITTEN = {"prepare": (), "rows": (*SHARED_BY_PHASES, "stats")}
WRITTEN["finish"] = (*WRITTEN["rows"], "dlogits")


def row_threads(granules: int, per_thread: int, most: int) -> int:
    """As in csrc/cuda/row.cuh."""
    threads = -(-granules // per_thread)
    return min(max(-(-threads // WARP) * WARP, WARP), most)


def assign(args: Arguments, fields: dict[str, Any]) -> torch.device:
    """That of `dispatch`, but a tensor stays one."""
    args.given |= fields
    return torch.device("cpu")


class Device:
    """Memory, and one method for each launcher. Outputs hold nothing that may be read."""

    def __init__(self, arch: int = 90):
        self.arch = arch
        self.orders: dict[str, str] = {}  # by source; "together" elsewhere
        self.texts: dict[str, str] = {}  # PTX in place of a source's
        self.cluster: int | None = 1  # of a held row; None: rows are streamed
        self.ran: list[str] = []
        self.readable: tuple[str, ...] = ()  # outputs that may be read before they are written

    def install(self, monkeypatch: Any) -> Device:
        monkeypatch.setattr(dispatch, "_C", self)
        monkeypatch.setattr(dispatch, "assign", assign)
        monkeypatch.setattr(dispatch, "_reasons", {})  # the extension may not be built
        return self

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Args"):
            return functools.partial(Arguments, name)
        raise AttributeError(name)

    @staticmethod
    def has_bf16_products() -> bool:
        """Of the CPU: the products of a head are PyTorch's then."""
        return False

    # Memory: a copy of each storage while a launcher runs.

    def begin(self, args: Arguments, written: tuple[str, ...] = (), extra: int = 0) -> None:
        """`written`: outputs that may be read already; `extra`: bytes of a workspace."""
        tensors = {name: v for name, v in args.given.items() if isinstance(v, Tensor)}
        self.storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors.values()
        }
        kinds = {name: kind for name, kind, _, _ in fields_of(args.struct)[0]}
        inputs = {
            tensor.untyped_storage().data_ptr()
            for name, tensor in tensors.items()
            if kinds[name].startswith("const") or name in (*written, *self.readable)
        }
        self.memory = Global(sum(s.nbytes() + 1024 for s in self.storages.values()) + extra + 8192)
        self.places = {}
        for pointer, storage in self.storages.items():
            self.places[pointer] = self.memory.allocate(storage.nbytes())
            if pointer in inputs:
                self.memory.put(self.places[pointer], _bytes(storage))

    def end(self) -> None:
        for pointer, storage in self.storages.items():
            begin = self.places[pointer]
            _bytes(storage)[:] = self.memory.bytes[begin : begin + storage.nbytes()]

    def address(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return self.places[storage] + tensor.data_ptr() - storage

    def packed(self, args: Arguments) -> bytes:
        """The struct as the launcher would pass it."""
        rows, size = fields_of(args.struct)
        data = bytearray(size)
        for name, kind, offset, initial in rows:
            code = code_of_type(kind)
            value = args.given.get(name)
            value = initial if value is None else value
            value = self.address(value) if isinstance(value, Tensor) else value
            struct.pack_into(code, data, offset, *(value if isinstance(value, tuple) else [value]))
        return bytes(data)

    def run(self, source: str, name: str, params: bytes, blocks: int, threads: int, **shape: int):
        self.ran.append(name)
        kernel, code = code_of(self.texts.get(source) or ptx_of(source, self.arch), name)
        if blocks:
            data, order = np.frombuffer(params, np.uint8), self.orders.get(source, "together")
            machine = Machine(
                kernel, self.memory, blocks, threads, params=data, order=order, **shape
            )
            machine.run(*code)

    # The launchers.

    def policy_prepare_cpu(self, args: Arguments) -> None:
        self._policy(args, "prepare")

    def policy_loss_cpu(self, args: Arguments) -> None:
        self._policy(args, "rows")

    def policy_finish_cpu(self, args: Arguments) -> None:
        self._policy(args, "finish")

    def policy_step_cpu(self, args: Arguments) -> None:
        self._policy(args, "prepare", "rows", "finish")

    def _policy(self, args: Arguments, *phases: str) -> None:
        self.begin(args, WRITTEN[phases[0]])
        params, one = self.packed(args), {"shared_bytes": WARP_SUMS}
        for phase in phases:
            if phase == "rows":
                self._policy_rows(args, params)
            else:
                self.run("policy_prepare", f"{phase}_tokens", params, 1, 1024, **one)
        self.end()

    def _policy_rows(self, args: Arguments, params: bytes) -> None:
        kind, to = row_types(args, args.dlogits)
        capped = args.logit_softcap < float("inf")
        bytes_ = args.vocab * (4 if kind == "float" else 2)
        if self.cluster and args.dlogits is not None and args.entropy_coef == 0 and not capped:
            granules = -(-(bytes_ // GRANULE) // self.cluster)
            self.run(
                "policy_loss", f"policy_loss_held<{kind}, {to}>", params, args.rows * self.cluster,
                row_threads(granules, 2, 512), cluster=self.cluster,
                shared_bytes=HELD_BYTES + granules * GRANULE,
            )  # fmt: skip
            return
        most = 512 if args.dlogits is None else 768 if capped else 1024
        name = f"policy_loss_streamed{'_capped' if capped else ''}<{kind}, {to}>"
        threads = row_threads(bytes_ // GRANULE, 4, most)
        self.run("policy_loss", name, params, args.rows, threads, shared_bytes=STREAMED_BYTES)

    def logprobs_cpu(self, args: Arguments) -> None:
        self._logprobs(args, "forward")

    def logprobs_backward_cpu(self, args: Arguments) -> None:
        self._logprobs(args, "backward")

    def _logprobs(self, args: Arguments, phase: str) -> None:
        saved = ("logprobs", "entropy", "row_max", "row_logsum")
        self.begin(args, saved if phase == "backward" else ())
        kind, to = row_types(args, phase == "backward" or None)
        types = f"{kind}, {to}" if phase == "backward" else kind
        name = f"logprobs_{phase}{'_capped' if args.tanh_scale else ''}<{types}>"
        granules = args.vocab * (4 if kind == "float" else 2) // GRANULE
        shape = args.rows, row_threads(granules, 4, 512)
        self.run("logprobs", name, self.packed(args), *shape, shared_bytes=32 * 12)
        self.end()

    def scale_cpu(self, args: Arguments) -> None:
        self.begin(args, ("grad",))
        piece = 4096 * (4 if args.dtype == 0 else 8)
        blocks = min(args.rows * -(-args.vocab // piece), 132 * 8)
        self.run("scale", f"scale_rows<{DTYPES[args.dtype]}>", self.packed(args), blocks, 512)
        self.end()

    # Those that check their input; the last parameter is where the result is, -1 for bad input.

    def per_item(self, source: str, name: str, items: int, params: bytes) -> None:
        blocks = -(-items // 256)
        self.run(source, name, params + struct.pack("q", self.result), blocks, 256)

    def per_sequence(self, name: str, blocks: int, params: bytes) -> None:
        params += struct.pack("q", self.result)
        self.run("segments", name, params, blocks, 512, shared_bytes=WARP_SUMS)

    def begin_checked(self, args: Arguments, extra: int) -> None:
        self.begin(args, (), extra + 4096)
        self.result = self.room(16, zeroed=True)

    def end_checked(self) -> int:
        self.end()
        return int(self.memory.bytes[self.result :][:8].view(np.int64)[0])

    def room(self, size: int, zeroed: bool = False) -> int:
        begin = self.memory.allocate(size)
        if zeroed:
            self.memory.put(begin, np.zeros(size, np.uint8))
        return begin

    def segments_cpu(self, args: Arguments) -> int:
        self.begin_checked(args, 0)
        self._check_offsets(args.cu_seqlens, args.seqs, args.tokens)
        params = self.packed(args)
        found = params + struct.pack("q", self.result + 8)
        self.per_sequence("count_segments", args.seqs, found)
        self.per_sequence("offset_segments", 1, found)
        self.per_sequence("write_segments", args.seqs, params)
        return self.end_checked()

    def segment_advantages_cpu(self, args: Arguments) -> bool:
        self.begin_checked(args, 0)
        self._check_offsets(args.cu_segments, args.segments, args.tokens)
        self._check_offsets(args.cu_seq_segments, args.seqs, args.segments)
        self.per_item("segments", "advance_tokens", args.tokens, self.packed(args))
        return self.end_checked() == 0

    def _check_offsets(self, offsets: Tensor, count: int, total: int) -> None:
        params = struct.pack("3q", self.address(offsets), count, total)
        self.per_item("segments", "check_each_offset", count + 1, params)

    def _list_children(self, args: Arguments, all_counted: bool) -> bytes:
        """The child lists, as the kernels take them; CUDA's sort is numpy's here."""
        n = args.nodes
        keys, items = self.room(4 * n), self.room(4 * n)
        begin, end = self.room(4 * n, zeroed=True), self.room(4 * n, zeroed=True)
        addresses = self.address(args.parent), self.address(args.in_value)
        params = struct.pack("3q?2q", *addresses, n, all_counted, keys, items)
        self.per_item("tree", "make_keys", n, params)
        unsorted = self.memory.load(keys + 4 * np.arange(n), np.dtype(np.uint32))
        order = np.argsort(unsorted, kind="stable")
        self.memory.put(keys, unsorted[order].view(np.uint8))
        self.memory.put(items, order.astype(np.int32).view(np.uint8))
        self.per_item("tree", "find_children", n, struct.pack("4q", keys, n, begin, end))
        return struct.pack("3q", items, begin, end)

    def tree_cpu(self, args: Arguments) -> bool:
        n = args.nodes
        self.begin_checked(args, 64 * n)
        children = self._list_children(args, False)
        arrived, exact = self.room(4 * n, zeroed=True), self.room(8 * n)
        params = self.packed(args) + children + struct.pack("2q", arrived, exact)
        self.per_item("tree", "climb", n, params)
        params = struct.pack("3q", exact, n, self.address(args.values))
        self.per_item("tree", "round_values", n, params)
        return self.end_checked() == 0

    def tree_stats_cpu(self, args: Arguments) -> bool:
        self.begin_checked(args, 64 * args.nodes)
        children = self._list_children(args, False)
        self.per_item("tree", "write_stats", args.nodes, self.packed(args) + children)
        return self.end_checked() == 0

    def tree_advantages_cpu(self, args: Arguments) -> bool:
        n, values = args.nodes, args.values
        self.begin_checked(args, 64 * n)
        sums, variances = self.room(8 * n), self.room(8 * n)
        children = bytes(24)
        if args.leave_one_out or args.scale_by_std:
            children = self._list_children(args, args.leave_one_out)
            params = struct.pack("2q", self.address(values), n) + children
            self.per_item("tree", "sum_children", n, params + struct.pack("2q", sums, variances))
        else:
            params = struct.pack("2q", self.address(args.parent), n)
            self.per_item("tree", "check_parents", n, params)
        params = self.packed(args) + children + struct.pack("2q", sums, variances)
        self.per_item("tree", "advance_nodes", n, params)
        return self.end_checked() == 0


def row_types(args: Arguments, writes: Any) -> tuple[str, str]:
    kind = DTYPES[args.dtype]
    narrows = writes is not None and kind == "float" and args.dlogits_dtype
    return kind, DTYPES[args.dlogits_dtype] if narrows else kind


def _bytes(storage: Any) -> np.ndarray:
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()
