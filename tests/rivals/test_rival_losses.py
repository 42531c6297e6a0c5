"""Every row of docs/losses.md: the loss and its gradient are those of the other library."""

import inspect
import math
import re
from importlib import metadata

import pytest
import torch
from losses import PACKAGES, ROWS
from rows import REACHES, Row, batch, emptied, error, far, ours, theirs, token_error
from rows_others import PRIME

ERROR = 1e-5  # both sides compute in fp32
LIGER = "Liger 0.8.5"  # computes in fp32 whatever it is given
# Tokens of `far` where nothing of the library's gradient is left but rounding: the parts of k3 and
# of the ratio, each e^reach, cancel to `reach`.
CANCELLED = {(LIGER, "beta=0.1, use_bias_correction_kl=True"): (3, 5)}
# Whose `sequences` count those only that train a token.
COUNT_TRAINED = ("verl 0.9.1", "OpenRLHF 0.11.2")
NAN_OF_EMPTY = (  # divide by the length of an empty sequence
    "LigerFusedLinearSimPOLoss, compute_nll_loss=False",
    "LigerFusedLinearORPOLoss, compute_nll_loss=False",
)
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.library}: {r.option}")


def is_installed(package, version):
    try:
        return metadata.version(package).startswith(version)
    except metadata.PackageNotFoundError:
        return False


def need(row: Row) -> None:
    package = PACKAGES[row.library]
    if package and not is_installed(package, row.library.split()[-1]):
        pytest.skip(f"{row.library} is not installed here")


@every_row
def test_loss_and_gradient_are_theirs(row):
    need(row)
    names = batch()
    (loss, dlogits), (want, want_grad) = ours(row.code, names), theirs(row, names)
    assert want.abs() > 1e-3 and float(want_grad.abs().max()) > 1e-3
    assert error(loss, want) < ERROR
    assert error(dlogits, want_grad) < ERROR


@every_row
def test_beyond_the_bounds_too(row):
    """Where log-ratios and reference differences reach the bounds of either side, by token."""
    need(row)
    single = row.library == LIGER
    for reach in REACHES:
        names = far(reach, torch.float32 if single else torch.float64)
        (loss, dlogits), (want, want_grad) = ours(row.code, names), theirs(row, names)
        assert torch.isfinite(want) and torch.isfinite(want_grad).all()
        left_out = CANCELLED.get((row.library, row.option), ())
        kept = [j for j in range(dlogits.shape[1]) if j not in left_out]
        assert error(loss, want) < (1e-4 if single else ERROR), reach
        assert token_error(dlogits[:, kept], want_grad[:, kept]) < 10 * ERROR, reach


@every_row
def test_with_a_sequence_of_which_no_token_trains(row):
    need(row)
    names = emptied()
    if row.library in COUNT_TRAINED:
        names["sequences"] = 3
    (loss, dlogits), (want, want_grad) = ours(row.code, names), theirs(row, names)
    if row.option in NAN_OF_EMPTY:
        assert want.isnan() and loss.isfinite()
    else:
        assert error(loss, want) < ERROR and error(dlogits, want_grad) < ERROR


def named_in(function):
    """The loss types that a function tells apart."""
    text = inspect.getsource(function)
    lines = re.findall(r"loss_type (?:==|in) ([^:]*?)(?::| or )", text, re.DOTALL)
    return {name for line in lines for name in re.findall(r'"(\w+)"', line)}


@pytest.mark.parametrize("library", ["TRL 1.16", "Liger 0.8.5", "verl 0.9.1"])
def test_every_loss_of_the_library_has_a_row(library):
    if not is_installed(PACKAGES[library], library.split()[-1]):
        pytest.skip(f"{library} is not installed here")
    if library.startswith("TRL"):
        from trl import DPOTrainer, GRPOTrainer

        names = named_in(GRPOTrainer._compute_loss) | named_in(DPOTrainer._compute_loss)
        assert len(names) == 8 + 15
    elif library.startswith("Liger"):
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

        names = named_in(LigerFusedLinearGRPOFunction.ppo_loss_fn)
    else:
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

        names = set(POLICY_LOSS_REGISTRY)
    assert {"cispo", "sapo"} < names and len(names) >= 8
    options = " ".join(row.option for row in ROWS if row.library == library)
    assert {name for name in names if f'"{name}"' not in options} == set()


def test_prime_rl_by_hand():
    """Two tokens, sampled with probability 1/2; now 1/2 (ratio 1) and 3/4 (ratio 1.5: too far).

    A = 2 and tau = 0.1: ((-1 * 2) + 0.1 * (0 + ln 1.5)) / 2. The gradient of a logprob with respect
    to its own logit is 1 - p.
    """
    names = dict(
        logits=torch.tensor([[[0.0, 0.0], [math.log(3), 0.0]]]),
        ids=torch.zeros(1, 2, dtype=torch.int64),
        sampled=torch.full((1, 2), 0.5).log(),
        advantages=torch.tensor([[2.0]]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        tokens=2,
    )
    (row,) = (row for row in ROWS if row.library == "prime-rl")
    for loss, dlogits in (ours(PRIME, names), theirs(row, names)):
        assert float(loss) == pytest.approx(-1 + 0.05 * math.log(1.5), abs=1e-6)
        want = torch.tensor([[[-0.95 * 0.5, 0.95 * 0.5], [0.05 * 0.25, -0.05 * 0.25]]])
        torch.testing.assert_close(dlogits, want)
