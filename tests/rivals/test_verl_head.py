"""verl's FusedLinearForPPO with and without `patch_verl_head`, in verl's own environment."""

import pytest
import torch

from spo_kernels.integrations import patch_verl_head

torch_functional = pytest.importorskip("verl.utils.experimental.torch_functional")

N, V, D = 23, 101, 24


def run(shape, dtype=torch.float32, backend="torch", temperature=0.7):
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = draw(*shape, D).requires_grad_(), (draw(V, D) / 3).requires_grad_()
    ids = torch.randint(V, shape, generator=generator, dtype=torch.int32)
    head = torch_functional.FusedLinearForPPO(chunk_size=7, impl_backend=backend)
    logprobs, entropy = head(hidden, weight, ids, temperature=temperature)
    coefficients = torch.randn(2, *shape, generator=generator)
    (coefficients[0] * logprobs + coefficients[1] * entropy).sum().backward()
    return logprobs, entropy, hidden.grad, weight.grad


@pytest.mark.parametrize("shape", [(N,), (3, 7)])
@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_logprobs_entropies_and_gradients_are_verls(shape, backend):
    want = run(shape)
    with patch_verl_head():
        got = run(shape, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_bf16_has_verls_dtypes_and_smaller_errors():
    exact = run((N,), torch.float64)
    theirs = run((N,), torch.bfloat16)
    with patch_verl_head():
        ours = run((N,), torch.bfloat16)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]

    def error(x):
        return float((x[0].double() - exact[0]).abs().max())

    assert error(ours) < error(theirs)


def test_applied_twice_it_is_refused():
    with patch_verl_head(), pytest.raises(RuntimeError, match="patch_verl_head: already applied"):
        patch_verl_head()


def test_undo():
    before = torch_functional.FusedLinearForPPO.forward
    undo = patch_verl_head()
    assert torch_functional.FusedLinearForPPO.forward is not before
    undo()
    assert torch_functional.FusedLinearForPPO.forward is before
