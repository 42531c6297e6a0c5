"""`inplace_grad=True`: a use of the overwritten logits raises; it never gives a wrong gradient."""

import pytest
import torch
from kernel_cases import needs_fast

from spo_kernels import masked_ppo_loss
from spo_kernels.testing import DEVICE, FAST

pytestmark = needs_fast("policy_loss")
IDS = torch.tensor([[3, 0, 7], [1, 1, 6]], device=DEVICE)
OLD = torch.full((2, 3), -2.0, device=DEVICE)
ADVANTAGES = torch.tensor([[1.0, -1.0, 2.0], [0.5, 1.5, -2.0]], device=DEVICE)


def loss_of(logits, **options):
    return masked_ppo_loss(logits, IDS, OLD, ADVANTAGES, backend=FAST, **options).loss


def gradient(use, inplace, shift=slice(None, -1)):
    """d (loss + use) / d leaf; the loss sees all but the last of four positions."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    leaf = torch.randn(2, 4, 9, generator=generator, device=DEVICE, requires_grad=True)
    base = leaf * 1.5
    logits = base[:, shift]
    total = loss_of(logits, inplace_grad=inplace) * 2
    (total + use(logits, base)).backward()
    return leaf.grad


@pytest.mark.parametrize(
    "use",
    [
        lambda logits, base: 0,
        lambda logits, base: base[:, -1].square().sum(),  # not what the loss overwrote
        lambda logits, base: logits.detach().shape[0],
    ],
)
def test_uses_that_read_nothing_overwritten_go_on(use):
    found, want = gradient(use, True), gradient(use, False)
    assert torch.equal(found, want) and want.abs().sum() > 0


@pytest.mark.parametrize(
    "use",
    [
        lambda logits, base: logits.sum(),
        lambda logits, base: logits.square().sum(),
        lambda logits, base: logits.log_softmax(-1).exp().square().sum(),  # an entropy, say
        lambda logits, base: base.square().sum(),
        lambda logits, base: base.view(-1)[:3].exp().sum(),
        lambda logits, base: loss_of(logits),
    ],
)
def test_a_later_use_raises_in_the_backward(use):
    assert gradient(use, False).isfinite().all()
    with pytest.raises(RuntimeError, match="the logits were used after the loss"):
        gradient(use, True)


def test_two_losses_in_place():
    logits = torch.zeros(2, 3, 9, device=DEVICE, requires_grad=True) * 1
    first, second = loss_of(logits, inplace_grad=True), loss_of(logits, inplace_grad=True)
    with pytest.raises(RuntimeError, match="inplace_grad=True: "):
        (first + second).backward()


def test_a_write_or_a_second_backward_raises():
    logits = torch.randn(2, 3, 9, device=DEVICE, requires_grad=True) * 1
    loss = loss_of(logits, inplace_grad=True)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="something wrote to the logits after the loss"):
        loss.backward()
    loss = loss_of(torch.randn(2, 3, 9, device=DEVICE, requires_grad=True) * 1, inplace_grad=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


@pytest.mark.parametrize("positions", [3, 4])
def test_a_leaf_and_its_view_are_refused(positions):
    leaf = torch.zeros(2, positions, 9, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="that an op computed, found a leaf"):
        loss_of(leaf if positions == 3 else leaf[:, :3], inplace_grad=True)
    assert not leaf.any()


def test_rows_that_overlap_are_refused():
    """The gradient of one would be read as the logits of the next."""
    base = torch.randn(60, requires_grad=True)
    ids, old = torch.arange(3), torch.full((3,), -2.0)
    for rows in ((base * 1).unfold(0, 9, 2)[:3], (base * 1).as_strided((3, 9), (8, 1))):
        with pytest.raises(ValueError, match="rows that share no memory"):
            masked_ppo_loss(rows, ids, old, torch.ones(3), inplace_grad=True)
    fits = (base * 1).as_strided((3, 9), (10, 1))
    masked_ppo_loss(fits, ids, old, torch.ones(3), inplace_grad=True).loss.backward()
