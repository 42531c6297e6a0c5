"""What may be replaced, how it comes back, and that importing the integrations imports nothing."""

import subprocess
import sys
from importlib import metadata

import pytest

from spo_kernels.integrations import patch as patches
from spo_kernels.integrations import patch_trl_head, patch_verl_head
from spo_kernels.integrations.patch import Patch, check_parameters, import_known


class Parent:
    held = "parent"

    def method(self, first, second):
        return first, second


class Child(Parent):
    own = "child"


def test_undo_restores_what_the_owner_held_itself_and_nothing_else():
    with Patch() as patch:
        patch.replace(Child, "own", 1)
        patch.replace(Child, "own", 2)
        patch.replace(Child, "held", 3)
        assert (Child.own, Child.held) == (2, 3)
    assert (Child.own, Child.held) == ("child", "parent")
    assert "held" not in vars(Child)


def test_a_block_that_fails_restores_too():
    with pytest.raises(KeyError), Patch() as patch:
        patch.replace(Child, "own", 1)
        raise KeyError
    assert Child.own == "child"


def test_other_parameters_are_refused():
    check_parameters("patch_x", Parent.method, "self first second")
    with pytest.raises(RuntimeError) as error:
        check_parameters("patch_x", Parent.method, "self second")
    assert str(error.value) == (
        "patch_x: expected Parent.method(self, second), found (self, first, second): "
        "it is not the function that this patch replaces"
    )


def test_other_releases_and_missing_packages_are_refused(monkeypatch):
    version = metadata.version("torch")
    assert import_known("patch_x", "torch", version[:2] + version[2:].split(".")[0], "torch.nn")
    with pytest.raises(RuntimeError, match=rf"^patch_x: expected torch 1.2, found {version[:4]}"):
        import_known("patch_x", "torch", "1.2", "torch.nn")

    def version_of(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(patches.metadata, "version", version_of)
    with pytest.raises(ModuleNotFoundError, match="pip install 'trl==1.16.*'") as error:
        patch_trl_head()
    assert error.value.name == "trl" and str(error.value).startswith("patch_trl_head: expected")
    with pytest.raises(ModuleNotFoundError, match="patch_verl_head: expected verl 0.9, found none"):
        patch_verl_head()
    monkeypatch.setattr(patches.metadata, "version", lambda name: "1.17.0")
    with pytest.raises(RuntimeError, match="expected trl 1.16, found 1.17.0: pip install"):
        patch_trl_head()


@pytest.mark.parametrize("threshold", [0, -0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold):
    with pytest.raises(ValueError, match=r"prob_threshold: expected a number in \(0, 1\], found"):
        patch_trl_head(prob_threshold=threshold)


IMPORTS = """
import sys
import spo_kernels.integrations
print(*(name for name in ("trl", "verl", "transformers") if name in sys.modules))
"""


def test_importing_the_integrations_imports_no_trainer():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == []
