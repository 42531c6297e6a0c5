"""Optimisers over bf16 weights and 8-bit moments: what they move, and that they resume exactly."""

import json
import shutil

import pytest
import torch
import yaml
from ranks import torchrun
from safetensors.torch import load_file
from sentences import one_sentence

from spo.config.policy import PolicyConfig
from spo.config.recipe import load_recipe
from spo.learn.checkpoint import latest_checkpoint
from spo.learn.optimizer import MixedPrecisionAdamW, make_optimizer, state_bytes
from spo.learn.policy import load_policy
from spo.loop import train

SHORT = "policy.dtype=bfloat16"
STOCHASTIC, NONE = "train.master_weights=stochastic", "train.master_weights=none"
EIGHT_BIT = "train.optimizer=adamw_8bit"
STEPS = 100


class Weights(torch.nn.Module):
    """A matrix like a policy's, a vector like a norm's, and some of an odd number."""

    def __init__(self, dtype):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        start = {
            "matrix": torch.randn(200, 301, generator=g).t() * 0.06,  # not contiguous
            "norm": 1 + 0.1 * torch.randn(4000, generator=g),
            "odd": torch.randn(17, generator=g),
        }
        for name, tensor in start.items():
            self.register_parameter(name, torch.nn.Parameter(tensor.bfloat16().to(dtype)))


def trained(*settings, steps=STEPS):
    """Weights after steps at a rate of 1e-6 with gradients that no setting changes."""
    recipe = load_recipe(None, list(settings))
    model = Weights(getattr(torch, recipe.policy.dtype))
    optimizer = make_optimizer(model, recipe, 1e-6)
    g = torch.Generator().manual_seed(1)
    drift = {p: torch.randn(p.shape, generator=g) for p in model.parameters()}
    for _ in range(steps):
        for p in model.parameters():
            p.grad = (drift[p] + torch.randn(p.shape, generator=g)).bfloat16().to(p.dtype)
        optimizer.step()
    return model, optimizer


def masters(model, optimizer):
    """All weights in fp32, with the bits that the optimiser keeps of them."""
    found = []
    for p in model.parameters():
        master = p.detach().float().clone()
        if "low_bits" in optimizer.state[p]:
            master.view(torch.int32).add_(optimizer.state[p]["low_bits"].view(torch.int16))
        found.append(master.flatten())
    return torch.cat(found)


START = masters(Weights(torch.float32), torch.optim.SGD([torch.zeros(1)], lr=1))


@pytest.fixture(scope="module")
def exact():
    """The weights that fp32 reaches."""
    model, optimizer = trained()
    assert type(optimizer) is torch.optim.AdamW
    return masters(model, optimizer)


def test_fp32_masters_are_the_weights_of_a_run_in_fp32_bit_for_bit(exact):
    model, optimizer = trained(SHORT)
    found = masters(model, optimizer)
    assert torch.equal(found, exact)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    nearest = (exact - weights.float()).abs() <= (exact - exact.bfloat16().float()).abs()
    assert weights.dtype == torch.bfloat16 and bool(nearest.all())


def test_stochastic_rounding_moves_what_fp32_moves_in_the_mean_and_nearest_does_not(exact):
    gone = exact - START

    def share(*settings):
        return float((masters(*trained(SHORT, *settings)) - START) @ gone / (gone @ gone))

    assert share(STOCHASTIC) == pytest.approx(1, abs=0.1)  # 64217 weights
    assert share(STOCHASTIC, EIGHT_BIT) == pytest.approx(1, abs=0.1)
    assert share(NONE) < 0.3


def test_one_step_in_bf16_leaves_most_weights_where_they_were():
    moves = {
        name: float((masters(*trained(SHORT, *settings, steps=1)) != START).float().mean())
        for name, settings in {"fp32": [], "none": [NONE]}.items()
    }
    assert moves["fp32"] > 0.999 and moves["none"] < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moments_of_8_bits_move_nearly_what_fp32_moves(exact, dtype):
    found = masters(*trained(f"policy.dtype={dtype}", EIGHT_BIT))
    assert float((found - exact).norm() / (exact - START).norm()) < 0.05
    assert not torch.equal(found, exact)


@pytest.mark.parametrize(
    "settings",
    [[EIGHT_BIT], [SHORT], [SHORT, STOCHASTIC], [SHORT, EIGHT_BIT], [SHORT, EIGHT_BIT, STOCHASTIC]],
)
def test_the_state_has_the_bytes_that_are_promised(settings):
    model, optimizer = trained(*settings, steps=1)
    held = sum(x.nbytes for key, x in optimizer.state[model.matrix].items() if key != "step")
    promised = state_bytes(load_recipe(None, settings)) * model.matrix.numel()
    assert held == pytest.approx(promised, abs=2 * 4)  # a last block that is not full


def test_moments_of_8_bits_train_the_policy_as_adamw_does():
    ids = torch.randint(2, 130, (8, 48), generator=torch.Generator().manual_seed(0))
    losses = {}
    for name in ("adamw", "adamw_8bit"):
        model = load_policy(PolicyConfig())
        model.set_attn_implementation("sdpa")
        optimizer = make_optimizer(model, load_recipe(None, [f"train.optimizer={name}"]), 1e-3)
        losses[name] = []
        for _ in range(20):
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses[name].append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    first, last = losses["adamw"][0], losses["adamw"][-1]
    assert last < first - 1
    assert losses["adamw_8bit"][-1] == pytest.approx(last, abs=0.02 * (first - last))


SMALL = [
    "engine={name: hf, max_num_seqs: 32, max_model_len: 96}",
    "sampling={max_new_tokens: 24, truncated: reward}",
    "train={prompts: 2, minibatches: 2, iterations: 2, learning_rate: 1e-4}",
    "eval={every: 0, problems: 1}",
    SHORT,
]
TREE = [
    "shape={widths: [2, 2], segment_tokens: [8]}",
    "loss.kl_coef=0.1",
    "train.reference_every=1",
]
PPO = ["shape={kind: star, group_size: 4}", "credit.type=gae"]
RUNS = {
    "fp32": TREE,
    "stochastic": [*TREE, STOCHASTIC],
    "none": [*TREE, NONE],
    "8-bit fp32 critic": [*PPO, EIGHT_BIT],
    "8-bit stochastic restart": [*TREE, EIGHT_BIT, STOCHASTIC, "train.restart=true"],
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of a run in which every step has a gradient: responses of a prompt differ."""
    file = tmp_path_factory.mktemp("reward") / "mixed.py"
    file.write_text("def mixed(response_ids):\n    return sum(response_ids) % 7\n")
    return [*SMALL, f"reward={file}:mixed"]


def contents(out):
    """Name -> tensor of all that a checkpoint holds."""
    folder = latest_checkpoint(out)
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        found |= {f"{path.relative_to(folder)} {name}": x for name, x in tensors.items()}
    for path in sorted(folder.rglob("optimizer.pt")):
        saved = torch.load(path, weights_only=True)["optimizer"]["state"]
        for index, state in saved.items():
            found |= {f"{path.relative_to(folder)} {index} {key}": x for key, x in state.items()}
    return found


class Copy:
    """Copies a run's folder when it saves its first checkpoint."""

    def __init__(self, out, copy):
        self.out, self.copy = out, copy

    def on_checkpoint(self, folder):
        if not self.copy.exists():
            shutil.copytree(self.out, self.copy)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_bit_for_bit(name, small, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    settings = [*small, *RUNS[name]]
    train(load_recipe(None, [*settings, f"out={whole}"]), callbacks=[Copy(whole, part)])
    before = contents(part)
    train(load_recipe(None, [*settings, f"out={part}"]), resume=True)
    expected, found = contents(whole), contents(part)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        bits = (y.contiguous().flatten().view(torch.uint8) for y in (found[key], x))
        assert torch.equal(*bits), key
    kept = ("exp_avg", "low_bits") if "low_bits" in str(expected.keys()) else ("exp_avg",)
    for key in kept:
        assert any(not torch.equal(before[n], x) for n, x in expected.items() if n.endswith(key))


def test_a_checkpoint_of_before_master_weights_goes_on_with_them(small, tmp_path):
    settings = [*small, *TREE, f"out={tmp_path}"]
    train(load_recipe(None, [*settings, NONE, "train.iterations=1"]))
    path = latest_checkpoint(tmp_path) / "recipe.yaml"
    saved = yaml.safe_load(path.read_text())
    del saved["train"]["master_weights"], saved["train"]["optimizer"], saved["train"]["offload"]
    path.write_text(yaml.safe_dump(saved))
    lines = train(load_recipe(None, settings), resume=True)
    assert [line["stage"] for line in lines] == ["train", "eval"]
    steps = {k: float(x) for k, x in contents(tmp_path).items() if k.endswith(" step")}
    assert set(steps.values()) == {4.0}  # two iterations of two
    assert any(x.view(torch.int16).any() for k, x in contents(tmp_path).items() if "low_bits" in k)
    with one_sentence(["train.master_weights", "'fp32'", "'stochastic'"]):
        train(load_recipe(None, [*settings, STOCHASTIC, "train.iterations=3"]), resume=True)


def test_a_state_of_plain_adamw_is_read():
    model, plain = trained(SHORT, NONE, steps=3)
    optimizer = make_optimizer(model, load_recipe(None, [SHORT]), 1e-6)
    assert isinstance(optimizer, MixedPrecisionAdamW)
    optimizer.load_state_dict(plain.state_dict())
    for p in model.parameters():
        state, before = optimizer.state[p], plain.state[p]
        assert float(state["step"]) == 3 and not state["low_bits"].view(torch.int16).any()
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].dtype == torch.float32 and before[key].dtype == torch.bfloat16
            assert torch.equal(state[key], before[key].float()) and state[key].any()


SHARDED = """
import copy, json, sys
import torch
from forests import RHO
from spo.config.recipe import load_recipe
from spo.learn import distributed
from spo.learn.optimizer import make_optimizer
from spo.learn.policy import load_policy
from torch.distributed.tensor import distribute_tensor

ranks, found = distributed.join("fsdp", "cpu"), {}
for settings in json.loads(sys.argv[2]):
    recipe = load_recipe(None, ["policy.dtype=bfloat16", *settings])
    model = load_policy(recipe.policy)
    single = copy.deepcopy(model)
    optimizers = [make_optimizer(m, recipe, 1e-5) for m in (model, single)]
    g = torch.Generator().manual_seed(0)
    for step in range(4):
        if step == 2:  # with a state that is sharded, and with one that begins so
            distributed.shard(model, optimizers[0], "cpu")
            if settings:
                for optimizer in optimizers:
                    optimizer.state.clear()
        for p, q in zip(model.parameters(), single.parameters()):
            grad = torch.randn(q.shape, generator=g).bfloat16()
            q.grad = grad
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if step > 1 else grad
        for optimizer in optimizers:
            optimizer.step()
    a, b = (distributed.Whole(*pair) for pair in zip((model, single), optimizers))
    same = [torch.equal(a.weights[name], weight) for name, weight in b.weights.items()]
    for index, state in b.optimizer["state"].items():
        for key, x in state.items():
            y = a.optimizer["state"][index][key]
            same.append(torch.equal(*(z.flatten().view(torch.uint8) for z in (x, y))))
    found[" ".join(settings)] = [len(same), sum(same)]
if ranks.main:
    json.dump(found, open(sys.argv[1], "w"))
"""


def test_masters_are_sharded_with_their_weights(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    fresh = ["train.weight_decay=0.1"]
    torchrun(tmp_path / "sharded.py", tmp_path / "out.json", json.dumps([[], fresh]))
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found) == 2 and all(a == b > 100 for a, b in found.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloads from a GPU")
@pytest.mark.parametrize("settings", [[], [EIGHT_BIT]])
def test_what_is_offloaded_trains_to_the_same_bits(settings, small, tmp_path):
    outs = [tmp_path / "here", tmp_path / "offloaded"]
    common = [*small, *TREE, *settings, "policy.device=cuda"]
    for out, more in zip(outs, ([], ["train.offload=[optimizer, reference]"]), strict=True):
        train(load_recipe(None, [*common, *more, f"out={out}"]))
    a, b = map(contents, outs)
    assert a.keys() == b.keys() and all(torch.equal(x, b[key].to(x.device)) for key, x in a.items())
