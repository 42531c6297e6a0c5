"""The head where the rows of its weight (V, D) lie in several processes: each has some columns of
the logits, and all have the same hidden states and tokens.

Largest logit, sum and chosen logit of a token are reduced over the processes; then each process
forms the gradient of its columns. Gradients of hidden states are summed over the processes, those
of the weight stay where its rows are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spo_kernels import dispatch, gradients, head, objective, rows
from spo_kernels import logprobs as _logprobs
from spo_kernels.objective import PolicyLoss
from spo_kernels.tokens import prepare

# Options of the public functions that are about the head, not about the objective.
OF_HEAD = {
    *("hidden", "weight", "bias", "hidden_index", "entropy", "max_active", "logits_dtype"),
    *("memory_budget", "backend", "batch_invariant"),
}


@dataclass(frozen=True)
class Share:
    """The rows of the weight in this process. All have as many; the last ones may have fewer."""

    group: dist.ProcessGroup
    vocab: int  # of all processes
    size: int  # of this one

    @property
    def count(self) -> int:
        """Of processes."""
        return dist.get_world_size(self.group)

    @property
    def begin(self) -> int:
        """The id of the first row."""
        step = -(-self.vocab // self.count)
        return min(dist.get_rank(self.group) * step, self.vocab)

    def sum(self, x: Tensor) -> Tensor:
        """Over the processes, in place."""
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x


@dataclass(frozen=True)
class Rows:
    """The n rows of a projection, and how it runs."""

    share: Share
    states: Tensor  # (n,) int64, rows of the flat hidden states
    repeated: bool  # a state may stand there more than once
    own: Tensor  # (n,) bool: the token's logit is a column of this process
    ids: Tensor  # (n,) int64, that column; 0 where it is another's
    temperature: Tensor  # (n,) or (1,)
    entropy: bool
    keep: bool  # logits for the backward, if they fit the budget in one chunk
    backend: str
    logits_dtype: torch.dtype
    memory_budget: int | None
    scale: float = 1.0
    softcap: float | None = None

    def take(self, part: slice) -> dict[str, Tensor]:
        """The arrays of some rows."""
        heat = self.temperature if self.temperature.numel() == 1 else self.temperature[part]
        return {"own": self.own[part], "ids": self.ids[part], "heat": heat}

    def parts(self) -> list[slice]:
        """Chunks, the same in all processes: each has reductions of its own."""
        n, vocab = self.states.numel(), -(-self.share.vocab // self.share.count)
        needed = n * vocab * self.logits_dtype.itemsize
        room = head.budget(self.memory_budget, self.states.device, needed)
        if self.memory_budget is None and needed > head.MEMORY_BUDGET and self.states.is_cuda:
            room = -int(self.share.max(torch.tensor(-room, device=self.states.device)))
        return list(head.chunks(n, vocab, self.logits_dtype, room))


class _Logprobs(torch.autograd.Function):
    """Logprobs (n,) and entropies (n,), or (0,), of the rows."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows_):
        parts, needs = rows_.parts(), any(ctx.needs_input_grad[:3])
        flat, operand = head.flatten(hidden), head.operand_of(hidden, weight)
        found, logits = [], None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in parts:
                logits = _project(flat[rows_.states[part]], operand, bias, rows_)
                found.append(_reduced(rows_, logits, **rows_.take(part)))
        empty = [flat.new_empty(0, dtype=rows.math_dtype(hidden))] * 4
        sums = [torch.cat(x) for x in zip(*found, strict=True)] if found else empty
        ctx.kept = logits if rows_.keep and needs and len(parts) == 1 else None
        ctx.rows, ctx.parts = rows_, parts
        ctx.save_for_backward(hidden, weight, bias, *sums)
        ctx.set_materialize_grads(False)
        return sums[0], sums[1]

    @staticmethod
    def backward(ctx, *grad_outputs):
        rows_, (hidden, weight, bias, *sums) = ctx.rows, ctx.saved_tensors
        given = _logprobs.row_grads(sums[0], *grad_outputs)
        gradients.refuse_second_order(given[0])
        flat, operand = head.flatten(hidden), head.operand_of(hidden, weight)
        needs = list(ctx.needs_input_grad[:3])
        grads = head.HeadGradients(hidden, weight, operand, bias, needs)
        kept, ctx.kept = ctx.kept, None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in ctx.parts:
                x = flat[rows_.states[part]]
                logits = _project(x, operand, bias, rows_) if kept is None else kept
                values = [s if s is None or s.numel() == 0 else s[part] for s in (*sums, *given)]
                if rows_.share.size:
                    dlogits = _gradient(rows_, logits, x, operand, values, **rows_.take(part))
                    grads.add(dlogits, x, only=len(ctx.parts) == 1)
                elif needs[0]:
                    grads.dx.append(torch.zeros_like(x))
                if needs[0]:
                    wide = torch.promote_types(grads.dx[-1].dtype, torch.float32)
                    grads.dx[-1] = rows_.share.sum(grads.dx[-1].to(wide))
            formed = grads.finish(hidden, rows_.states, shared=rows_.repeated)
        leaves = zip(formed, (hidden, weight, bias), needs, strict=True)
        return *(x.to(leaf.dtype) if need else None for x, leaf, need in leaves), None


def _project(x: Tensor, operand: Tensor, bias: Tensor | None, rows_: Rows) -> Tensor:
    """This process's columns of the logits of x (n, D)."""
    if rows_.share.size == 0:
        return x.new_empty((x.shape[0], 0), dtype=rows_.logits_dtype)
    logits = head.project(x, operand, bias, rows_.logits_dtype)
    if rows_.scale != 1:
        logits.mul_(rows_.scale)
    if rows_.softcap is not None:
        logits.div_(rows_.softcap).tanh_().mul_(rows_.softcap)
    return logits


def _reduced(
    rows_: Rows, logits: Tensor, own: Tensor, ids: Tensor, heat: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprob, entropy or (0,), largest logit, and log of the sum of exp((logit - largest) / T),
    over all columns: (n,) each.

    Only differences from the largest logit are added up, so an offset of the logits costs nothing.
    """
    logprob, entropy, top, logsum = _own_sums(rows_, logits, ids, heat)
    largest = rows_.share.max(top.clone())
    part = torch.where(top == -torch.inf, -torch.inf, (top - largest) / heat + logsum)
    chosen = torch.where(top == -torch.inf, -torch.inf, logprob + part)
    summands = [part.exp(), torch.where(own, chosen, 0)]
    if rows_.entropy:
        summands.append(torch.where(part == -torch.inf, 0, part.exp() * (part - entropy)))
    total, chosen, *weighted = rows_.share.sum(torch.stack(summands)).unbind()
    logsum = total.log()
    entropy = logsum - weighted[0] / total if rows_.entropy else logsum.new_empty(0)
    return chosen - logsum, entropy, largest, logsum


def _own_sums(rows_: Rows, logits: Tensor, ids: Tensor, heat: Tensor) -> tuple[Tensor, ...]:
    """What the kernel finds in the columns of this process alone."""
    if logits.shape[1] == 0:
        nothing = logits.new_full(ids.shape, -torch.inf, dtype=heat.dtype)
        return nothing, torch.zeros_like(nothing), nothing, nothing
    if rows_.backend != "reference":
        sums = _logprobs.new_results(logits, ids, rows_.entropy)
        fields = dict(zip(_logprobs.NAMES, sums, strict=True))
        _logprobs.run_rows("logprobs", rows_.backend, logits, ids, temperature=heat, **fields)
        return sums
    top = logits.amax(1)
    logprob, entropy = rows.logprobs_of(logits, ids, heat, rows_.entropy)
    logsum = torch.logsumexp((logits - top[:, None]) / heat[:, None], 1)
    return logprob, top.new_empty(0) if entropy is None else entropy, top, logsum


def _gradient(
    rows_: Rows,
    logits: Tensor,  # (n, V of this process); may be overwritten
    x: Tensor,
    operand: Tensor,
    values: list[Any],  # logprob, entropy, largest, logsum, and the gradients of the first two
    own: Tensor,
    ids: Tensor,
    heat: Tensor,
) -> Tensor:
    """g (1[j = token] - p_j) - h p_j (log p_j + H), as `logprobs_backward` of csrc/ops.h."""
    *sums, g, h = values
    bound = rows_.softcap
    slope = None if bound is None else 1 - (logits.to(g.dtype) / bound).square()
    if rows_.backend == "reference":
        dlogits = _weighted(logits, sums, g, h, heat)
        dlogits[torch.arange(len(g), device=g.device), ids] += torch.where(own, g / heat, 0)
    else:
        # The kernel takes a column for the token's. Where the token is another's, it was column 0.
        first = logits[:, :1].to(g.dtype, copy=True)
        dlogits = head.gradient_buffer(logits, x, operand, rows_.backend)
        fields: dict[str, Any] = dict(zip(_logprobs.NAMES, sums, strict=True))
        fields |= {"temperature": heat, "grad_logprobs": g, "grad_entropy": h, "dlogits": dlogits}
        _logprobs.run_rows("logprobs_backward", rows_.backend, logits, ids, **fields)
        plain = _weighted(first, sums, g, h, heat)[:, 0].to(dlogits.dtype)
        dlogits[:, 0] = torch.where(own, dlogits[:, 0], plain)
    if slope is not None:
        dlogits.mul_(slope)
    return dlogits.mul_(rows_.scale) if rows_.scale != 1 else dlogits


def _weighted(
    logits: Tensor, sums: list[Tensor], g: Tensor, h: Tensor | None, heat: Tensor
) -> Tensor:
    """-p_j (g + h (log p_j + H)) / T of some columns."""
    _, entropy, largest, logsum = (x.unsqueeze(-1) for x in sums)
    heat = heat.unsqueeze(-1)
    log_p = (logits - largest) / heat - logsum
    p = log_p.exp()
    out = g.unsqueeze(-1) * p
    if h is not None:
        out = out + h.unsqueeze(-1) * torch.where(p == 0, 0, p * (log_p + entropy))
    return -out / heat


def _logprobs_of(
    share: Share,
    given: dict[str, Any],
    index: Tensor,  # (n,) int64, the tokens to project
    ids: Tensor,  # (N,)
    heat: Tensor,  # (N,) or (1,)
    keep: bool,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """Logprobs of the selected tokens, 0 elsewhere."""
    hidden, dtype = given["hidden"], given["logits_dtype"]
    chosen = dispatch.choose("logprobs", hidden, given["backend"])
    if chosen == "reference":
        head.check_reference(hidden, dtype, False)
        dtype = rows.math_dtype(hidden)
    columns = ids[index].long() - share.begin
    own = (columns >= 0) & (columns < share.size)
    logprobs, entropy = _Logprobs.apply(
        hidden,
        given["weight"],
        given["bias"],
        Rows(
            share=share,
            states=head.select_states(hidden, given["hidden_index"], index),
            repeated=given["hidden_index"] is not None,
            own=own,
            ids=torch.where(own, columns, 0),
            temperature=heat if heat.shape[0] == 1 else heat[index],
            entropy=given["entropy"],
            keep=keep,
            backend=chosen,
            logits_dtype=dtype,
            memory_budget=given["memory_budget"],
            scale=given["logit_scale"],
            softcap=given["logit_softcap"],
        ),
    )
    whole = logprobs.new_zeros(ids.shape)
    spread = whole.index_put((index,), entropy) if given["entropy"] else None
    return whole.index_put((index,), logprobs), spread


def linear_token_logprobs(share: Share, given: dict[str, Any]) -> Any:
    """`spo_kernels.linear_token_logprobs` with `given`, where the weight is this process's."""
    hidden, shape = _checked(given)
    rows.check_scaling(given["logit_scale"], given["logit_softcap"])
    tokens = given["token_ids"], given["loss_mask"], given["temperature"]
    ids, mask, heat = _logprobs.prepare("hidden", hidden, shape, *tokens)
    rows.check_rows(ids, heat, mask, share.vocab)
    index = mask.nonzero().squeeze(1)
    logprobs, entropy = _logprobs_of(share, given, index, ids, heat, keep=False)
    return _logprobs.shaped(logprobs, entropy, shape)


def linear_masked_ppo_loss(share: Share, given: dict[str, Any]) -> PolicyLoss:
    """`spo_kernels.linear_masked_ppo_loss`, with the objective in PyTorch."""
    hidden, shape = _checked(given)
    tokens = prepare(hidden, shape, **{k: x for k, x in given.items() if k not in OF_HEAD})
    given = given | {"entropy": tokens.wants_entropy(given["entropy"])}
    tokens.check(share.vocab)
    runs, room = tokens.runs(), given["max_active"]
    index = runs.nonzero().squeeze(1)
    if room is not None and index.numel() > room:
        raise ValueError(
            f"max_active: expected at most {room} rows to project, found {index.numel()}"
        )
    heat = tokens.temperatures()
    logprobs, row_entropy = _logprobs_of(share, given, index, tokens.token_ids, heat, keep=True)
    return objective.evaluate(logprobs, row_entropy, tokens, runs, shape)


def _checked(given: dict[str, Any]) -> tuple[Tensor, tuple[int, ...]]:
    """The hidden states and the tokens' shape; ValueError for what only a whole head can do."""
    tensors = given["hidden"], given["weight"], given["bias"], given["hidden_index"]
    shape = head.check_head(*tensors)
    head.check_options(*tensors, given["logits_dtype"])
    for name in ("batch_invariant", "extras"):
        if given.get(name):
            raise ValueError(
                f"{name}: expected none of it with a weight that is sharded over the vocabulary, "
                f"found {given[name]}; weight.full_tensor() takes it"
            )
    return given["hidden"], shape


FUNCTIONS: dict[str, Callable[[Share, dict[str, Any]], Any]] = {
    "linear_masked_ppo_loss": linear_masked_ppo_loss,
    "linear_token_logprobs": linear_token_logprobs,
}
"""By the name of the public function."""
