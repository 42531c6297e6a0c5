"""Every row of docs/losses.md: the loss and its gradient are those of the other library."""

from importlib import metadata

import pytest
import torch
from losses import PACKAGES, ROWS
from rows import ours, theirs

ERROR = 1e-5  # of the largest magnitude; both sides compute in fp32


def error(got, want):
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def is_installed(package, version):
    try:
        return metadata.version(package).startswith(version)
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r.library}: {r.option}")
def test_loss_and_gradient_are_theirs(row):
    package = PACKAGES[row.library]
    if package and not is_installed(package, row.library.split()[-1]):
        pytest.skip(f"{row.library} is not installed here")
    (loss, dlogits), (want, want_grad) = ours(row), theirs(row)
    assert want.abs() > 1e-3 and float(want_grad.abs().max()) > 1e-3
    assert error(loss, want) < ERROR
    assert error(dlogits, want_grad) < ERROR
