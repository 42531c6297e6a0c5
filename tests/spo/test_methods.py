"""Every method's recipe trains the embedded policy; what is special about a method is checked."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from ranks import distance, torchrun
from safetensors.torch import load_file

from spo.config.policy import EMBEDDED
from spo.config.recipe import load_recipe
from spo.credit.nodes import of_nodes
from spo.engines.hf import HFEngine
from spo.learn.checkpoint import State, latest_checkpoint
from spo.loop import response_limit, train
from spo.records import LENGTH, Forest

RECIPES = Path(__file__).parents[2] / "spo" / "recipes"
METHODS = sorted(path.stem for path in RECIPES.glob("*.yaml") if "demo" not in path.stem)
SMALL = [
    "engine.name=hf",
    "train.prompts=4",
    "train.epochs=1",
    "train.minibatches=2",
    "train.iterations=2",
    "eval.every=0",
    "eval.problems=4",
]


@pytest.fixture(scope="module")
def engine():
    engine = HFEngine(str(EMBEDDED), max_num_seqs=256, max_model_len=96)
    yield engine
    engine.close()


def config(method, out, *more):
    return load_recipe(RECIPES / f"{method}.yaml", [*SMALL, f"out={out}", *more])


def run(method, out, engine, *more):
    lines = train(config(method, out, *more), engine=engine)
    return [line for line in lines if line["stage"] == "train"]


def digest(out, name="policy"):
    path = latest_checkpoint(Path(out)) / name / "model.safetensors"
    found = hashlib.sha256()
    for key, tensor in sorted(load_file(path).items()):
        found.update(key.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_every_recipe_trains(method, tmp_path, engine):
    lines = run(method, tmp_path, engine, "train.prompts=8")
    assert len(lines) == 2
    for line in lines:
        assert line["grad_norm"] > 0 and line["skipped_steps"] == 0
        assert line["probe_difference"] < 1e-3
        assert math.isfinite(line["loss"]) and line["mismatch_kl"] < 0.1
    masked = config(method, tmp_path).loss.prob_threshold is not None
    assert (lines[0]["kept_share"] < 1) == masked


def test_ppo_trains_its_critic(tmp_path, engine):
    lines = run("ppo", tmp_path, engine, "train.iterations=3", "credit.critic.learning_rate=3e-4")
    assert all(line["value_grad_norm"] > 0 for line in lines)
    # values start at 0, so the first loss is half the mean square return, at most 1/2
    assert 0 < lines[0]["value_loss"] <= 0.5 and lines[0]["explained_variance"] == 0
    assert lines[-1]["explained_variance"] != 0
    saved = load_file(latest_checkpoint(tmp_path) / "critic" / "model.safetensors")
    assert saved["score.weight"].abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "dpo"])
def test_sharded_ranks_train_as_whole_ones(method, tmp_path):
    found = {}
    for mode in ("ddp", "fsdp"):
        more = [*SMALL, f"out={tmp_path / mode}", f"train.parallel={mode}"]
        torchrun("-m", "spo", "train", RECIPES / f"{method}.yaml", *more)
        checkpoint = latest_checkpoint(tmp_path / mode)
        found[mode] = load_file(checkpoint / "policy" / "model.safetensors")
        if method == "ppo":
            critic = load_file(checkpoint / "critic" / "model.safetensors")
            found[mode] |= {f"critic.{name}": tensor for name, tensor in critic.items()}
    start = load_file(EMBEDDED / "model.safetensors")
    moved = distance({name: found["ddp"][name] for name in start}, start)
    assert moved > 0 and distance(found["ddp"], found["fsdp"]) * 50 < moved


def test_ppo_resumes_to_the_same_weights(tmp_path, engine):
    run("ppo", tmp_path / "whole", engine)
    run("ppo", tmp_path / "parts", engine, "train.iterations=1")
    train(config("ppo", tmp_path / "parts"), engine=engine, resume=True)
    for name in ("policy", "critic"):
        assert digest(tmp_path / "parts", name) == digest(tmp_path / "whole", name)


def test_a_critic_that_is_not_finite_is_skipped(tmp_path, engine, monkeypatch):
    import spo.learn.learner

    real = spo.learn.learner.value_loss

    def broken(*arguments):
        out = real(*arguments)
        return type(out)(out.loss * math.nan, out.metrics | {"loss": math.nan})

    monkeypatch.setattr(spo.learn.learner, "value_loss", broken)
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        run("ppo", tmp_path, engine, "train.max_skipped=3")


def test_dpo_lowers_the_pair_loss(tmp_path, engine):
    more = ("train.prompts=8", "train.iterations=1", "train.epochs=6", "train.learning_rate=5e-5")
    few = run("dpo", tmp_path / "few", engine, *more[:2])[0]
    many = run("dpo", tmp_path / "many", engine, *more)[0]
    assert few["pairs"] > 0
    # the first step stands where the reference does: its loss is log 2
    once = run("dpo", tmp_path / "once", engine, *more[:2], "train.minibatches=1")[0]
    assert once["pair_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert many["pair_loss"] < math.log(2) - 0.01 and many["pair_accuracy"] > once["pair_accuracy"]


def test_restem_starts_every_round_anew(tmp_path, engine):
    # A learning rate that moves nothing leaves the start policy, whatever the last round made.
    run("restem", tmp_path / "a", engine)
    start = load_file(EMBEDDED / "model.safetensors")
    moved = config("restem", tmp_path / "a", "train.iterations=3", "train.learning_rate=1e-30")
    train(moved, engine=engine, resume=True)
    after = load_file(latest_checkpoint(tmp_path / "a") / "policy" / "model.safetensors")
    assert all(torch.equal(after[name], start[name].float()) for name in after)


def test_restem_trains_on_right_responses_alone(tmp_path, engine):
    run("restem", tmp_path, engine, "train.iterations=1")
    forest = Forest.load(tmp_path / "forest-last.safetensors")
    credit = of_nodes(forest, config("restem", tmp_path).credit.assign(forest).tokens)
    assert (forest.rewards[credit > 0] == 1).all()
    kept = torch.bincount(forest.prompt[credit > 0], minlength=4)
    right = torch.bincount(forest.prompt[forest.rewards == 1], minlength=4)
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


@pytest.mark.parametrize(("iterations", "limit"), [(1, 20), (2, 30), (4, 48)])
def test_a_staged_run_keeps_to_its_limits(tmp_path, engine, iterations, limit):
    stages = "sampling.stages=[[0.25,20],[0.6,30]]"  # the last iteration begins at 0, 1/2, 3/4
    run("grpo", tmp_path, engine, stages, f"train.iterations={iterations}")
    forest = Forest.load(tmp_path / "forest-last.safetensors")
    responses = forest.parent >= 0
    sizes, cut = forest.cu_tokens.diff()[responses], forest.finish[responses] == LENGTH
    assert sizes.max() <= limit and sizes.max() > {20: 0, 30: 20, 48: 30}[limit]
    assert (sizes[cut] == limit).all() and (limit > 30 or cut.any())


@pytest.mark.parametrize(
    ("method", "override", "words"),
    [
        ("grpo", "credit.beta=0.1", ["credit.beta", "credit.type=values"]),
        ("dpo", "credit.positive=-1", ["credit.positive", "-1"]),
        ("ppo", "shape={kind: tree, widths: [2], segment_tokens: []}", ["type=gae", "kind=star"]),
        ("restem", "train.replay_nodes=4", ["type=correct", "replay_nodes: expected 0"]),
        ("restem", "loss.prob_threshold=0.9", ["loss.prob_threshold", "type=correct"]),
        ("dpo", "loss.kl_coef=0.1", ["loss.kl_coef", "type=pairs"]),
        ("ppo", "credit.lam=1.5", ["credit.lam", "1.5"]),
        ("ppo", "credit.critic.value_clip=0", ["critic.value_clip", "0"]),
        ("grpo", "shape.kind=tree", ["shape.group_size", "shape.kind=tree", "widths"]),
        ("restem", "train.parallel=fsdp", ["train.restart", "ddp"]),
        ("grpo", "sampling.stages=[[0.5,64]]", ["sampling.stages", "64", "48"]),
        ("grpo", "sampling.stages=[[0.5,30],[0.4,40]]", ["sampling.stages", "rising"]),
    ],
)
def test_settings_that_do_not_belong_together_are_named(method, override, words, tmp_path):
    with pytest.raises(ValueError) as error:
        config(method, tmp_path, override)
    for word in words:
        assert word in str(error.value)
