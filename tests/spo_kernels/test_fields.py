"""The list of the policy loss's arguments in csrc/ops.h and the one in Python are the same."""

import pytest
import torch

from spo_kernels import dispatch
from spo_kernels.tokens import TYPES

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
    assert native - OF_THE_KERNEL == set(TYPES)
    assert native >= OF_THE_KERNEL


@pytest.mark.skipif(dispatch._C is None, reason="the native extension is not built")
def test_native_types_take_the_python_types():
    """A tensor travels as an address, a number as itself; neither is cut to an integer."""
    args = dispatch.native().PolicyLossArgs()
    for name, kind in TYPES.items():
        values = {"Tensor": 1 << 40, "Tensor?": 1 << 40, "float": 0.375, "int": 3, "bool": True}
        value = values[kind]
        setattr(args, name, value)
        assert getattr(args, name) == value, name
    with pytest.raises(TypeError):
        args.kl_estimator = 0.5


def test_schemas_hold_the_list():
    for op in ("policy_loss", "linear_policy_loss", "policy_loss_inplace"):
        schema = getattr(torch.ops.spo_kernels, op).default._schema
        found = {a.name: str(a.type) for a in schema.arguments[-len(TYPES) :]}
        kinds = {"Tensor?": "Optional[Tensor]"}
        assert found == {k: kinds.get(t, t) for k, t in TYPES.items()}
