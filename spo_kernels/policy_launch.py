"""One call of the policy loss's kernels: its buffers, its phases, and the record of its results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_kernels import dispatch
from spo_kernels import rows as _rows
from spo_kernels.objective import FIGURES, PolicyLoss
from spo_kernels.tokens import Tokens


class Launch:
    """The buffers of one call and the arguments of its kernels (`PolicyLossArgs` in csrc/ops.h)."""

    def __init__(
        self,
        backend: str,
        like: Tensor,  # logits or hidden states
        vocab: int,
        tokens: Tokens,  # N tokens
        entropy: bool,
        strict: bool,  # bad tokens are an error, not NaN
        **fields: Any,
    ):
        n, self.backend, self.tokens = tokens.token_ids.shape[0], backend, tokens
        empty, device = torch.empty, like.device
        self.loss = empty((), device=device)
        self.figures = empty(NUM_FIGURES, device=device)
        self.counts = empty(NUM_COUNTS, dtype=torch.int64, device=device)
        self.logprobs = empty(n, device=device)
        self.entropy = empty(n if entropy else 0, device=device)
        heat, mask = tokens.temperature, tokens.loss_mask
        self.fields = fields | vars(tokens)
        self.fields |= {
            "tokens": n,
            "vocab": vocab,
            "id_bytes": tokens.token_ids.element_size(),
            "mask_bytes": 1 if mask is None else mask.element_size(),
            "temperature_stride": int(heat is not None and heat.shape[0] > 1),
            "policy_norm_is_integer": _is_integer(tokens.policy_norm),
            "kl_norm_is_integer": _is_integer(tokens.kl_norm),
            "strict": strict,
            "uses": empty(n, dtype=torch.uint8, device=device),
            "scales": empty(4, device=device),
            "stats": empty((n, 8), device=device),
            "counts": self.counts,
            "loss": self.loss,
            "figures": self.figures,
            "logprobs": self.logprobs,
            "entropy": self.entropy if entropy else None,
        }
        if backend != "triton":
            self.args = dispatch.native().PolicyLossArgs()
            self.device = dispatch.assign(self.args, self.fields)

    def run(self, phase: str, **fields: Any) -> None:
        """`policy_prepare`, `policy_finish`, or of `over_rows`."""
        if self.backend == "triton":
            return dispatch.run_triton("policy_" + phase, self.fields | fields)
        dispatch.assign(self.args, fields)
        dispatch.run_native("policy_" + phase, self.backend, self.args, self.device)

    def over_rows(
        self,
        phase: str,  # "loss", or "step" for all three phases
        logits: Tensor,  # (..., V)
        dlogits: Tensor | None,  # (..., V) of the logits' dtype or half as wide, may be the logits
        **fields: Any,
    ) -> None:
        """The row kernel, which fills dlogits."""
        rows = logits.numel() // max(logits.shape[-1], 1)
        fields |= {"dlogits": None} if dlogits is None else _rows.gradient_rows(dlogits, logits)
        logits, layout = _rows.strided_rows(logits)
        dtype = _rows.DTYPES.index(logits.dtype)
        self.run(phase, rows=rows, logits=logits, logits_layout=layout, dtype=dtype, **fields)

    def raise_if_bad(self, vocab: int, counts: Tensor | None = None) -> None:
        """ValueError for a bad token or norm. `counts`: a copy that has arrived."""
        if (self.counts if counts is None else counts)[3].item():
            self.tokens.check(vocab)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.loss, self.figures, self.counts, self.logprobs, self.entropy


def _is_integer(norm: Tensor | None) -> bool:
    return norm is not None and norm.dtype == torch.int64


NUM_FIGURES, NUM_COUNTS = 10, 7  # see csrc/ops.h
OUTPUTS = "Tensor loss, Tensor figures, Tensor counts, Tensor logprobs, Tensor entropy"


def fake_outputs(like: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """As `Launch.outputs`, for torch.compile."""
    n = ids.shape[0]
    shapes = ((), (NUM_FIGURES,), (NUM_COUNTS,), (n,), (n if entropy else 0,))
    dtypes = (torch.float32, torch.float32, torch.int64, torch.float32, torch.float32)
    return tuple(like.new_empty(s, dtype=t) for s, t in zip(shapes, dtypes, strict=True))


def record(
    loss: Tensor,  # ()
    figures: Tensor,  # (NUM_FIGURES,)
    counts: Tensor,  # (NUM_COUNTS,) int64
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    shape: tuple[int, ...],
    overflows: bool = False,  # the rows have a capacity
) -> PolicyLoss:
    """Assemble what the public functions return from what the kernels left."""
    return PolicyLoss(
        loss=loss,
        logprobs=logprobs.reshape(shape),
        entropy=None if entropy is None else entropy.reshape(shape),
        num_kept=counts[0],
        num_nan=counts[5],
        overflow=counts[4:5].view(torch.bool)[0] if overflows else None,
        **dict(zip(FIGURES, figures.unbind(), strict=False)),
    )
