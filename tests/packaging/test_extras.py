"""`spo_kernels` runs on torch and numpy alone, and a missing extra is one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spo.extras import EXTRA_OF, missing

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# What follows finds no package of these names, as where they were never installed.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
absent, found = set(sys.argv[1].split(",")), PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in absent else found(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
"""

KERNELS = """
import torch, spo_kernels
logits = torch.zeros(2, 4, requires_grad=True)
ids, old = torch.tensor([1, 2]), torch.full((2,), 0.25).log()
out = spo_kernels.masked_ppo_loss(logits, ids, old, torch.ones(2))
out.loss.backward()
assert abs(out.loss.item() + 1) < 1e-6, out.loss
want = (torch.full((2, 4), 0.25) - torch.eye(4)[1:3]) / 2  # ratios are 1
torch.testing.assert_close(logits.grad, want)
report = spo_kernels.backends()
assert report["policy_loss"]["reference"] == "available"
assert report["policy_loss"]["triton"] == "Triton is not installed", report
assert not absent & set(sys.modules)
"""

COMMAND = """
import runpy
sys.argv = ["spo", "train", "recipe.yaml"]
runpy.run_module("spo", run_name="__main__", alter_sys=True)
"""


OPTIMISER = """
import torch, spo
from spo.learn.optimizer import make_optimizer
recipe = spo.load_recipe(None, ["train.optimizer=adamw_8bit"])
try:
    make_optimizer(torch.nn.Linear(2, 2), recipe, 1.0)
except ImportError as error:
    print(error)
"""


def without(modules, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code, ",".join(modules)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
    )


def test_kernels_need_torch_and_numpy_alone():
    result = without(EXTRA_OF, KERNELS)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["rich", "safetensors", "yaml", "pydantic"])
def test_a_missing_package_of_the_trainer_is_one_sentence(module):
    result = without([module], "import spo\n" + COMMAND)
    assert result.stderr == (
        f"spo: the trainer needs {module}, which is not installed: "
        "pip install 'spo-kernels[train]'\n"
    )
    assert result.returncode == 2 and result.stdout == ""


def test_a_tracker_that_is_not_installed_is_one_sentence_before_the_run(tmp_path):
    asked = ["grpo", "engine.name=hf", "log=mlflow", f"out={tmp_path / 'run'}"]
    result = without(["mlflow"], COMMAND.replace('"recipe.yaml"', f"*{asked}"))
    assert result.stderr.splitlines()[-1] == (
        "spo: what was asked for needs mlflow, which is not installed: "
        "pip install 'spo-kernels[trackers]'"
    )
    assert result.returncode == 2 and not (tmp_path / "run").exists()


def test_an_optimiser_without_its_package_is_one_sentence():
    result = without(["bitsandbytes"], OPTIMISER)
    assert result.stdout == (
        "what was asked for needs bitsandbytes, which is not installed: "
        "pip install 'spo-kernels[optim]'\n"
    ), result.stderr


def test_an_error_that_no_extra_explains_stays_an_error():
    result = without(["argparse"], COMMAND)
    assert "No module named 'argparse'" in result.stderr and result.returncode == 1


def test_sentences():
    error = ModuleNotFoundError("No module named 'vllm'", name="vllm")
    assert missing(error) == (
        "what was asked for needs vllm, which is not installed: pip install 'spo-kernels[vllm]'"
    )
    error = ImportError("cannot import name 'AttentionInterface'", name="transformers")
    assert missing(error) == (
        "the trainer needs transformers, and what is installed does not fit "
        "(cannot import name 'AttentionInterface'): pip install 'spo-kernels[train]'"
    )
    error = ModuleNotFoundError("No module named 'trl.trainer'", name="trl.trainer")
    assert "does not fit (No module named 'trl.trainer')" in missing(error)
    assert missing(ImportError("cannot import name 'x'", name="spo.train")) is None
    assert missing(ImportError("no name")) is None


def test_every_extra_that_a_sentence_names_exists():
    extras = PROJECT["optional-dependencies"]
    assert set(EXTRA_OF.values()) <= set(extras)
    sources = [*(ROOT / "spo").rglob("*.py"), *(ROOT / "spo_kernels").rglob("*.py")]
    named = set()
    for path in sources:
        named.update(re.findall(r"spo-kernels\[([\w-]+)\]", path.read_text()))
    assert {"math", "vllm", "flash-attn"} <= named <= set(extras)


def test_what_is_required_and_what_is_extra():
    def names(requirements):
        return {re.match(r"[\w-]+", line).group() for line in requirements}

    extras = {extra: names(lines) for extra, lines in PROJECT["optional-dependencies"].items()}
    assert names(PROJECT["dependencies"]) == {"torch", "numpy"}
    assert {"transformers", "datasets", "safetensors", "pydantic", "cloudpickle"} < extras["train"]
    for extra in ("vllm", "triton", "flash-attn", "peft", "trl", "verl"):
        assert extras[extra] == {extra}
    assert extras["optim"] == {"bitsandbytes"}
    assert "pytest-benchmark" in extras["bench"] and "mpmath" in extras["math"]
