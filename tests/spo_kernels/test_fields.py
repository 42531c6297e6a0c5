"""The list of the policy loss's arguments in csrc/ops.h and the one in Python are the same."""

import types

import pytest
import torch
from kernel_cases import tokens_from

from spo_kernels import dispatch, objective

# What the row kernel is told beyond the tokens: the logits, where results go, how to run.
OF_THE_KERNEL = {
    *("tokens", "rows", "vocab", "dtype", "logits", "logits_layout", "temperature_stride"),
    *("dlogits", "dlogits_layout", "dlogits_dtype", "dlogits_zeroed", "id_bytes", "mask_bytes"),
    *("policy_norm_is_integer", "kl_norm_is_integer", "strict", "scaled", "uses", "scales"),
    *("counts", "index", "states", "sources", "capacity"),
    *("hidden_index", "num_states", "loss", "figures"),
    *("logprobs", "entropy", "stats", "num_threads", "stream"),
}


@pytest.mark.skipif(dispatch._C is None, reason="the native extension is not built")
def test_native_list_is_the_python_list():
    native = {name for name in dir(dispatch.native().PolicyLossArgs) if name[0] != "_"}
    assert native - OF_THE_KERNEL == set(objective.TYPES)
    assert native >= OF_THE_KERNEL


@pytest.mark.skipif(dispatch._C is None, reason="the native extension is not built")
def test_native_types_take_the_python_types():
    """A tensor travels as an address, a number as itself; neither is cut to an integer."""
    args = dispatch.native().PolicyLossArgs()
    for name, kind in objective.TYPES.items():
        value = {"Tensor": 1 << 40, "Tensor?": 1 << 40, "float": 0.375, "int": 3}[kind]
        setattr(args, name, value)
        assert getattr(args, name) == value, name
    with pytest.raises(TypeError):
        args.kl_estimator = 0.5


def test_schemas_hold_the_list():
    for op in ("policy_loss", "linear_policy_loss", "policy_loss_inplace"):
        schema = getattr(torch.ops.spo_kernels, op).default._schema
        found = {a.name: str(a.type) for a in schema.arguments[-len(objective.TYPES) :]}
        kinds = {"Tensor?": "Optional[Tensor]"}
        assert found == {k: kinds.get(t, t) for k, t in objective.TYPES.items()}


def test_tokens_are_taken():
    """Per-token tensors follow the index; one temperature for all and the norms do not."""
    two = torch.tensor([1.0, 2.0])
    ids, mask = torch.tensor([5, 6]), torch.tensor([True, False])
    inputs = types.SimpleNamespace(token_ids=ids, old_logprobs=two, advantages=two)
    for heat in (torch.ones(1), two):
        norm = torch.tensor([3.0])
        tokens = tokens_from(inputs, temperature=heat, loss_mask=mask, policy_norm=norm)
        last = tokens.take(torch.tensor([1, 1, 1]))
        assert last.token_ids.tolist() == [6, 6, 6] and last.advantages.tolist() == [2, 2, 2]
        assert last.loss_mask.tolist() == [False] * 3 and last.ref_logprobs is None
        assert last.temperature.tolist() == ([1] if heat is not two else [2, 2, 2])
        assert last.policy_norm is norm and last.arguments()[12:] == tokens.arguments()[12:]
