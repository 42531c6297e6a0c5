"""Generalised advantage estimation over packed sequences, for PPO with a critic.

Nothing here is differentiable: advantages and returns are constants of the two losses, so results
never carry a gradient, whatever the inputs carry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels.arguments import FLOATS, INTEGERS, check_offsets, check_vector
from spo_kernels.dispatch import choose, launch
from spo_kernels.library import define


def gae_ref(
    rewards: Tensor,  # (T,) fp32 | fp64
    values: Tensor,  # (T,) dtype of rewards
    cu_seqlens: Tensor,  # (B+1,) int64
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap_values: Tensor | None = None,  # (B,) dtype of rewards
) -> tuple[Tensor, Tensor]:  # advantages (T,), returns (T,)
    """`gae` in PyTorch, in fp64: from the last token back, all sequences at once."""
    check_offsets("cu_seqlens", cu_seqlens, rewards.numel())
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    next_value = torch.zeros(lengths.shape, dtype=torch.float64, device=rewards.device)
    if bootstrap_values is not None:
        next_value += bootstrap_values
    advantage = torch.zeros_like(next_value)
    exact_rewards, exact_values = rewards.double(), values.double()
    advantages = torch.empty_like(exact_rewards)
    for step in reversed(range(int(lengths.max()) if lengths.numel() else 0)):
        active = (lengths > step).nonzero().squeeze(1)
        tokens = starts[active] + step
        value = exact_values[tokens]
        delta = exact_rewards[tokens] + gamma * next_value[active] - value
        advantage[active] = delta + gamma * lam * advantage[active]
        advantages[tokens] = advantage[active]
        next_value[active] = value
    return advantages.to(rewards.dtype), (advantages + exact_values).to(rewards.dtype)


@define(
    "gae(Tensor rewards, Tensor values, Tensor cu_seqlens, Tensor? bootstrap_values, float gamma, "
    "float lam, str backend) -> (Tensor advantages, Tensor returns)"
)
def _gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    bootstrap_values: Tensor | None,
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = {"gamma": gamma, "lam": lam, "bootstrap_values": bootstrap_values}
    if backend == "reference":
        return gae_ref(rewards, values, cu_seqlens, **options)
    rewards, values, cu_seqlens = rewards.contiguous(), values.contiguous(), cu_seqlens.contiguous()
    if bootstrap_values is not None:
        bootstrap_values = bootstrap_values.contiguous()
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    ok = launch(
        "gae",
        backend,
        "GaeArgs",
        tokens=rewards.numel(),
        seqs=cu_seqlens.numel() - 1,
        rewards=rewards,
        values=values,
        cu_seqlens=cu_seqlens,
        bootstrap_values=bootstrap_values,
        gamma=gamma,
        lam=lam,
        advantages=advantages,
        returns=returns,
    )
    if not ok:  # malformed: the reference raises the error
        return gae_ref(rewards, values, cu_seqlens, **options)
    return advantages, returns


@_gae.register_fake
def _(rewards, values, cu_seqlens, bootstrap_values, gamma, lam, backend):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def gae(
    rewards: Tensor,  # (T,) fp32 | fp64, of every token
    values: Tensor,  # (T,) dtype of rewards, of the state before every token
    cu_seqlens: Tensor,  # (B+1,) int32 | int64, token offsets of the sequences
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    bootstrap_values: Tensor | None = None,  # (B,) dtype of rewards, V after the last token
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # advantages (T,), returns (T,), dtype of rewards
    """Generalised advantage estimates (arXiv 1506.02438) and the critic's targets.

    Within every sequence, with V after the last token 0 or its entry of `bootstrap_values`:

        delta[t] = rewards[t] + gamma * V[t+1] - V[t]
        advantages[t] = delta[t] + gamma * lam * advantages[t+1]
        returns[t] = advantages[t] + V[t]

    Recursions run in fp64 and are rounded once. An empty sequence ignores its bootstrap value.

    Raises TypeError for wrong dtypes; ValueError if sizes do not agree, if `cu_seqlens` decreases
    or does not run from 0 to T, or if gamma or lam is not in [0, 1].
    """
    check_vector("rewards", rewards, FLOATS)
    check_vector("values", values, (rewards.dtype,), like=rewards, size=rewards.numel())
    check_vector("cu_seqlens", cu_seqlens, INTEGERS, like=rewards, at_least=1)
    if bootstrap_values is not None:
        num_seqs = cu_seqlens.numel() - 1
        dtypes = (rewards.dtype,)
        check_vector("bootstrap_values", bootstrap_values, dtypes, like=rewards, size=num_seqs)
        bootstrap_values = bootstrap_values.detach()
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], found {factor}")
    backend = choose("gae", rewards, backend)
    rewards, values, cu_seqlens = rewards.detach(), values.detach(), cu_seqlens.long()
    return torch.ops.spo_kernels.gae(
        rewards, values, cu_seqlens, bootstrap_values, gamma, lam, backend
    )
