"""The public functions have types: a user's script passes pyright, and a wrong one does not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

RIGHT = """
import torch
from torch import Tensor

import spo_kernels
from spo_kernels import (
    PolicyLoss,
    TokenExtras,
    backends,
    cutpoint_segments,
    empty_cache,
    gae,
    linear_masked_ppo_loss,
    linear_token_logprobs,
    masked_ppo_loss,
    policy_mask,
    segment_advantages,
    token_logprobs,
    tree_advantages,
    tree_stats,
    tree_values,
)

logits, ids = torch.randn(4, 9, requires_grad=True), torch.arange(4)
hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3)
logprobs: Tensor = token_logprobs(logits, ids)
logprobs, entropy = token_logprobs(logits, ids, entropy=True, temperature=0.7)
logprobs = token_logprobs(logits, ids, logit_scale=0.5, logit_softcap=30)
logprobs = linear_token_logprobs(hidden, weight, ids, backend="reference")
logprobs, entropy = linear_token_logprobs(hidden, weight, ids, entropy=True, logit_softcap=None)
logprobs, extras = linear_token_logprobs(hidden, weight, ids, extras=["top_ids"], top_k=2)
logprobs, entropy, more = linear_token_logprobs(
    hidden, weight, ids, entropy=True, extras=("is_top1", "mean_logits"), batch_invariant=True
)
records: list[TokenExtras] = [extras, more]
old, mask = logprobs.detach(), policy_mask(logprobs, ids > 0, 0.9)
loss: PolicyLoss = masked_ppo_loss(
    logits, ids, old, entropy, loss_mask=mask, temperature=torch.ones(4), ref_logprobs=old,
    clip_eps_high=0.3, kl_coef=0.1, kl_estimator="k1", policy_norm=4, kl_norm=torch.tensor(4.0),
)
loss = linear_masked_ppo_loss(
    hidden, weight, ids, old, entropy, hidden_index=ids, prob_threshold=None, max_active=4,
    logits_dtype=torch.bfloat16, batch_invariant=True,
)
loss.loss.backward()
shown: Tensor = loss.kl + loss.policy_loss if loss.entropy is None else loss.entropy
cu_segments, cu_seq_segments = cutpoint_segments(old, torch.tensor([0, 4]), 0.9, 2)
advantages: Tensor = segment_advantages(torch.ones(len(cu_segments)), cu_segments, cu_seq_segments)
parent, in_value = torch.tensor([-1, 0], dtype=torch.int32), torch.ones(2, dtype=torch.bool)
values: Tensor = tree_values(parent, torch.tensor([float("nan"), 1.0]), in_value)
counts, variances = tree_stats(parent, values, in_value)
advantages = tree_advantages(parent, values, in_value, baseline="loo", scale="std", eps=1e-6)
advantages, returns = gae(old, old, torch.tensor([0, 4]), gamma=0.9, bootstrap_values=None)
empty_cache()
reason: str = backends()["policy_loss"]["cuda"] + spo_kernels.__version__
"""

WRONG = """
import torch
from torch import Tensor

from spo_kernels import gae, linear_masked_ppo_loss, masked_ppo_loss, token_logprobs, tree_values
from spo_kernels import linear_token_logprobs

x = torch.zeros(4)
masked_ppo_loss(x, x, x, x, clip_eps_high="0.2")
linear_masked_ppo_loss(x, x, x, x, x, clip_eps_hihg=0.2)
only: Tensor = token_logprobs(x, x, entropy=True)
first, second = gae(x, x, x, lam=None)
tree_values(x, x)
alone: Tensor = linear_token_logprobs(x, x, x, extras=["is_top1"])
"""


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What pyright says: lines by file."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed")
    folder = tmp_path_factory.mktemp("types")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    package = os.path.relpath(ROOT / "spo_kernels", folder)
    settings = {"include": ["right.py", "wrong.py", package], "extraPaths": [str(ROOT)]}
    settings |= {"pythonVersion": "3.10", "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "-p", str(folder), "--outputjson"]
    done = subprocess.run(
        [*command, "--pythonpath", sys.executable], capture_output=True, text=True, timeout=280
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    files = len(list((ROOT / "spo_kernels").rglob("*.py"))) + 2
    assert report["summary"]["filesAnalyzed"] == files
    found = {}
    for entry in report["generalDiagnostics"]:
        if entry["severity"] == "error":
            line = (entry["range"]["start"]["line"], entry["message"])
            found.setdefault(Path(entry["file"]).name, []).append(line)
    return found


def test_a_users_script_and_the_package_are_clean(complaints):
    assert {name: lines for name, lines in complaints.items() if name != "wrong.py"} == {}


def test_every_wrong_call_is_seen(complaints):
    first = WRONG.splitlines().index("x = torch.zeros(4)") + 1
    assert {line for line, _ in complaints["wrong.py"]} == set(range(first, first + 6))


def test_a_users_script_runs():
    subprocess.run([sys.executable, "-c", RIGHT], check=True, timeout=120, cwd=ROOT)
