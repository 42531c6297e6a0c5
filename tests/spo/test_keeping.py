"""What a run keeps: its newest checkpoints, and the policy with the best figure."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from sentences import one_sentence

import spo
from spo.config.evaluation import figures
from spo.config.recipe import evaluation_sets, load_recipe
from spo.learn.best import forget_from, keep_if_best
from spo.learn.checkpoint import State, choose, kept_bests
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo.metrics import scored
from spo.plan import describe
from spo.records import Replay

SMALL = {
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "shape": {"kind": "star", "group_size": 4},
    "train": {"iterations": 4, "prompts": 4, "minibatches": 1, "learning_rate": 5e-4}
    | {"checkpoint_every": 2, "keep_checkpoints": 2, "keep_best": "more/sampled"},
    "eval": {"problems": 2, "every": 1, "samples": 3, "sets": {"more": {"problems": 6}}},
    "max_new_tokens": 40,
}


def names(folders):
    return [path.name for path in sorted(folders)]


def policy(folder):
    return load_file(folder / "policy" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    return spo.train("grpo", out=tmp_path_factory.mktemp("whole"), **SMALL)


def best_of(run):
    """The first of the iterations with the highest figure."""
    evals = [line for line in run.metrics if line["stage"] == "eval"]
    return max(evals, key=lambda line: (line["more/sampled"], -line["iteration"]))


def test_the_newest_checkpoints_and_the_best_policy_are_kept(whole):
    assert names((whole.folder / "checkpoints").iterdir()) == ["iter-000002", "iter-000004"]
    best = best_of(whole)
    assert whole.best.name == f"iter-{best['iteration']:06d}"
    record = json.loads((whole.best / "evaluation.json").read_text())
    assert record == {
        "iteration": best["iteration"],
        "figure": "more/sampled",
        "mean": best["more/sampled"],
        "stderr": best["more/sampled_stderr"],
    }
    assert {path.name for path in whole.best.iterdir()} == {
        *("policy", "evaluation.json", "recipe.yaml", "versions.json")
    }
    assert choose(whole.folder, "iter-000004").name == "iter-000004"
    with one_sentence(["iter-000002 or iter-000004 or best", "found iter-000001"]):
        choose(whole.folder, "iter-000001")


def test_a_run_that_crashed_keeps_what_an_undisturbed_one_keeps(whole, tmp_path):
    class Broken:
        def on_iteration(self, line):
            if line["iteration"] == 3:  # evaluated, and the checkpoint is of iteration 2
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        spo.train("grpo", out=tmp_path, callbacks=[Broken()], **SMALL)
    run = spo.train("grpo", out=tmp_path, resume=True, **SMALL)
    assert best_of(run)["more/sampled"] == best_of(whole)["more/sampled"]
    for folder in ("checkpoints", "best"):
        mine, theirs = ((x.folder / folder).iterdir() for x in (run, whole))
        assert names(mine) == names(theirs)
    mine, theirs = policy(run.best), policy(whole.best)
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.fixture
def learner(tmp_path):
    keep = ["train.keep_best=greedy", f"out={tmp_path}"]
    return Learner(load_recipe("grpo", keep), Ranks())


def measured(learner, iteration, greedy, **more):
    """Evaluate weights that are marked with the iteration."""
    with torch.no_grad():
        next(learner.model.parameters())[0] = iteration
    keep_if_best(learner, {"greedy": greedy, "greedy_stderr": 0.1} | more, iteration)
    return names(kept_bests(learner.recipe.out_dir))


def saved(learner, iteration):
    learner.save(State(iteration=iteration, policy=learner.recipe.policy.content()), Replay())
    return names(kept_bests(learner.recipe.out_dir))


def test_ties_crashes_and_missing_figures(learner):
    out = learner.recipe.out_dir
    assert measured(learner, 0, math.nan) == []
    assert measured(learner, 1, 0.2) == ["iter-000001"]
    assert measured(learner, 2, 0.5) == ["iter-000002"]
    saved(learner, 3)
    assert measured(learner, 3, 0.5) == ["iter-000002"]
    keep_if_best(learner, {"sampled": 0.9, "sampled_stderr": 0.1}, 3)
    assert measured(learner, 4, 0.6) == ["iter-000002", "iter-000004"]
    assert measured(learner, 5, 0.7) == ["iter-000002", "iter-000005"]
    assert policy(choose(out, "best"))["model.embed_tokens.weight"][0].unique().item() == 5
    forget_from(out, 3)  # a crash: the run resumes from its checkpoint
    assert names(kept_bests(out)) == ["iter-000002"]
    assert policy(choose(out, "best"))["model.embed_tokens.weight"][0].unique().item() == 2
    assert measured(learner, 4, 0.4) == ["iter-000002"]
    assert measured(learner, 5, 0.7) == ["iter-000002", "iter-000005"]
    assert saved(learner, 5) == ["iter-000002", "iter-000005"]
    assert saved(learner, 6) == ["iter-000005"]


def test_another_figure_begins_anew(learner, tmp_path):
    measured(learner, 1, 0.9)
    other = load_recipe("grpo", ["train.keep_best=sampled", f"out={tmp_path}"])
    learner.recipe = other
    measured(learner, 2, 0.9, sampled=0.1, sampled_stderr=math.nan)
    record = json.loads((choose(tmp_path, "best") / "evaluation.json").read_text())
    assert record == {"iteration": 2, "figure": "sampled", "mean": 0.1, "stderr": None}


def test_the_figures_that_may_be_named_are_those_of_a_run(whole):
    line = whole.metrics[-1]
    assert figures(evaluation_sets(whole.recipe)) == scored(line)
    assert {"greedy", "pass_at_3", "more/majority"} <= set(scored(line))


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        (["train.keep_best=best"], "greedy, sampled, found 'best'"),
        (["train.keep_best=sampled", "eval.sampled=false"], "greedy, found 'sampled'"),
        (
            ["train.keep_best=pass_at_3", "eval.sets={a: {samples: 2}}"],
            "greedy, sampled, a/greedy, a/sampled, a/pass_at_2, a/majority, found 'pass_at_3'",
        ),
        (
            ["train.keep_best=majority", "task=rows", "data.train=x", "reward={rule: exact}"]
            + ["eval.samples=2"],
            "greedy, sampled, pass_at_2, found 'majority'",
        ),
    ],
)
def test_other_figures_are_refused_before_training(settings, known):
    with one_sentence([f"train.keep_best: expected a figure of the evaluations, {known}"]):
        load_recipe("grpo", settings)


def test_a_dry_run_says_how_large_the_checkpoints_are(whole):
    lines = describe(whole.recipe).splitlines()
    (one,) = (line.split()[0] for line in lines if line.endswith("  a checkpoint"))
    weighed = sum(path.stat().st_size for path in whole.checkpoint.rglob("*") if path.is_file())
    assert float(one) == pytest.approx(weighed / 2**20, rel=0.02)
    assert any("in all, at most: 2 checkpoints, and one being written" in line for line in lines)


def test_a_checkpoint_of_adapters_holds_them_and_a_whole_critic():
    def mib(*settings):
        lines = describe(load_recipe("ppo", ["engine.name=hf", *settings])).splitlines()
        (one,) = (line.split()[0] for line in lines if line.endswith("  a checkpoint"))
        return float(one)

    lora = "policy.lora={rank: 4}"
    adapters = mib(lora, "credit={type: values}")
    whole = mib("credit={type: values}")
    assert adapters < whole / 10
    assert mib(lora) - adapters == pytest.approx(mib() - whole, abs=0.02)  # the critic
