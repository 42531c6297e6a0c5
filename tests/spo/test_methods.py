"""Every method's recipe trains the embedded policy; what is special about a method is checked."""

import hashlib
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from explained import unexplained
from ranks import distance, torchrun
from safetensors.torch import load_file
from trained import trained_weights

from spo.config.policy import EMBEDDED
from spo.config.recipe import load_recipe
from spo.credit.nodes import of_nodes
from spo.learn.checkpoint import State
from spo.loop import response_limit, train
from spo.records import LENGTH, Forest
from spo_kernels.testing import DEVICE

RECIPES = Path(__file__).parents[2] / "spo" / "recipes"
METHODS = sorted(path.stem for path in RECIPES.glob("*.yaml") if "demo" not in path.stem)
SMALL = [
    f"policy.device={DEVICE.type}",  # SPO_TEST_BACKEND=cuda: a GPU
    "engine.name=hf",
    "train.prompts=4",
    "train.epochs=1",
    "train.minibatches=2",
    "train.iterations=2",
    "eval.every=0",
    "eval.problems=4",
]


def config(method, out, *more):
    return load_recipe(RECIPES / f"{method}.yaml", [*SMALL, f"out={out}", *more])


def run(method, out, *more, report=lambda line: None):
    lines = train(config(method, out, *more), report=report)
    return [line for line in lines if line["stage"] == "train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(method)`: its one run here: the folder, the train lines, the forests."""
    runs = {}

    def of(method):
        if method not in runs:
            out, forests = tmp_path_factory.mktemp(method), []

            def keep(line):
                if line["stage"] == "train":
                    forests.append(Forest.load(out / "forest-last.safetensors"))

            more = [f"train.iterations={3 if method == 'grpo-staged' else 2}"]
            more += ["train.prompts=8"] if method in ("grpo-staged", "restem") else []
            lines = run(method, out, *more, report=keep)
            runs[method] = SimpleNamespace(out=out, lines=lines, forests=forests)
        return runs[method]

    return of


def digest(out, name="policy"):
    found = hashlib.sha256()
    for key, tensor in sorted(trained_weights(out, name).items()):
        found.update(key.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_trains(method, tmp_path, trained):
    lines = trained(method).lines
    assert len(lines) == (3 if method == "grpo-staged" else 2)
    for line in lines:
        assert not unexplained(line)  # in docs/metrics.md
        assert line["grad_norm"] > 0 and line["skipped_steps"] == 0
        assert line["probe_difference"] < 1e-3
        assert math.isfinite(line["loss"]) and line["mismatch_kl"] < 0.1
    masked = config(method, tmp_path).loss.prob_threshold is not None
    assert (lines[0]["kept_share"] < 1) == masked


def test_ppo_trains_its_critic(trained):
    first, second = trained("ppo").lines
    assert first["value_grad_norm"] > 0 and second["value_grad_norm"] > 0
    # values start at 0, so the first loss is half the mean square return, at most 1/2
    assert 0 < first["value_loss"] <= 0.5 and first["explained_variance"] == 0
    assert second["explained_variance"] != 0
    saved = trained_weights(trained("ppo").out, "critic")
    assert saved["score.weight"].abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_sharded_ranks_train_as_whole_ones(method, tmp_path):
    found = {}
    for mode in ("ddp", "fsdp"):
        more = [*SMALL, f"out={tmp_path / mode}", f"train.parallel={mode}"]
        torchrun("-m", "spo", "train", RECIPES / f"{method}.yaml", *more)
        found[mode] = trained_weights(tmp_path / mode)
        if method == "ppo":
            critic = trained_weights(tmp_path / mode, "critic")
            found[mode] |= {f"critic.{name}": tensor for name, tensor in critic.items()}
    start = load_file(EMBEDDED / "model.safetensors")
    moved = distance({name: found["ddp"][name] for name in start}, start)
    assert moved > 0 and distance(found["ddp"], found["fsdp"]) * 50 < moved


def test_ppo_resumes_to_the_same_weights(tmp_path, trained):
    run("ppo", tmp_path, "train.iterations=1")
    train(config("ppo", tmp_path), resume=True)
    for name in ("policy", "critic"):
        assert digest(tmp_path, name) == digest(trained("ppo").out, name)


def test_a_critic_that_is_not_finite_is_skipped(tmp_path, monkeypatch):
    import spo.learn.learner

    real = spo.learn.learner.value_loss

    def broken(*arguments):
        out = real(*arguments)
        return type(out)(out.loss * math.nan, out.metrics | {"loss": math.nan})

    monkeypatch.setattr(spo.learn.learner, "value_loss", broken)
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        run("ppo", tmp_path, "train.max_skipped=3")


def test_dpo_lowers_the_pair_loss(tmp_path):
    more = ("train.prompts=8", "train.iterations=1", "train.epochs=6", "train.learning_rate=5e-5")
    many = run("dpo", tmp_path / "many", *more)[0]
    # the first step stands where the reference does: its loss is log 2
    once = run("dpo", tmp_path / "once", *more[:2], "train.minibatches=1")[0]
    assert once["pairs"] > 0 and once["pair_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert many["pair_loss"] < math.log(2) - 0.01 and many["pair_accuracy"] > once["pair_accuracy"]


def test_restem_starts_every_round_anew(tmp_path, trained):
    # A learning rate that moves nothing leaves the start policy, whatever the last round made.
    shutil.copytree(trained("restem").out, tmp_path, dirs_exist_ok=True)
    start = load_file(EMBEDDED / "model.safetensors")
    more = ("train.prompts=8", "train.iterations=3", "train.learning_rate=1e-30")
    train(config("restem", tmp_path, *more), resume=True)
    before = trained_weights(trained("restem").out)
    after = trained_weights(tmp_path)
    assert all(torch.equal(after[name], start[name].float()) for name in after)
    assert distance(after, before) > 0


def test_restem_trains_on_right_responses_alone(tmp_path, trained):
    for forest in trained("restem").forests:
        credit = of_nodes(forest, config("restem", tmp_path).credit.assign(forest).tokens)
        assert (forest.rewards[credit > 0] == 1).all()
        kept = torch.bincount(forest.prompt[credit > 0], minlength=8)
        right = torch.bincount(forest.prompt[forest.rewards == 1], minlength=8)
        assert torch.equal(kept, right.clamp(max=4)) and right.max() > 4


STAGES = "sampling.stages=[[0.5,20],[0.75,30]]"


@pytest.mark.parametrize(
    ("iteration", "generated", "limit"),
    [(0, 0, 20), (4, 0, 20), (5, 0, 30), (7, 0, 30), (8, 0, 48), (0, 600, 30), (1, 800, 48)],
)
def test_stages_follow_the_share_of_the_run(tmp_path, iteration, generated, limit):
    long = config(
        "grpo", tmp_path, STAGES, "train.iterations=10", "train.max_generated_tokens=1000"
    )
    assert response_limit(long, State(iteration=iteration, generated_tokens=generated)) == limit


def test_a_staged_run_keeps_to_its_limits(trained):
    # the recipe's stages are [[0.3, 24], [0.6, 30]]; the iterations begin at 0, 1/3, 2/3
    longest_before = 0
    for forest, limit in zip(trained("grpo-staged").forests, (24, 30, 48), strict=True):
        responses = forest.parent >= 0
        sizes, cut = forest.cu_tokens.diff()[responses], forest.finish[responses] == LENGTH
        assert longest_before < sizes.max() <= limit
        assert (sizes[cut] == limit).all() and (limit > 30 or cut.any())
        longest_before = limit
