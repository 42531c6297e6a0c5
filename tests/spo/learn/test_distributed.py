"""Two processes train as one: gradients in fp64, runs, and checkpoints that change their mode."""

import json
import shutil

import pytest
import torch
from ranks import distance, torchrun
from safetensors.torch import load_file
from solved import chosen, settings
from test_train import MIXED
from trained import trained_weights

from spo.config.policy import EMBEDDED, PolicyConfig
from spo.config.recipe import load_recipe
from spo.learn import distributed
from spo.learn.checkpoint import choose, latest_checkpoint, load_state
from spo.learn.distributed import Ranks, join
from spo.learn.policy import load_policy
from spo.loop import train
from spo.metrics import read_metrics
from spo.records import Forest

GRADIENTS = """
import dataclasses, json, sys
import torch
from forests import RHO, load_fp64, random_forest
from spo.credit.nodes import of_tokens
from spo.learn import distributed
from spo.learn.pack import pack
from spo.config.loss import PolicyLossConfig
from spo.learn.loss import policy_loss

folder, out = sys.argv[1:]
plain, near = PolicyLossConfig(), PolicyLossConfig(kl_coef=0.5, kl_scope="all")

def loss_of(model, batch, config):
    ref = -0.1 * batch.token_index.float()
    return policy_loss(model, dataclasses.replace(batch, ref_logprobs=ref), config, 1.0)

found = {}
for mode in ("ddp", "fsdp"):
    ranks = distributed.join(mode, "cpu")
    single = load_fp64(folder, "spo_grouped")
    model = load_fp64(folder, "spo_grouped")
    if ranks.sharded:
        distributed.shard(model, None, "cpu")
    results = []
    for seed, trees, budget, config in (
        (0, 4, 25, plain), (1, 3, 10**6, plain), (2, 1, 10**6, plain), (3, 6, 40, plain),
        (4, 4, 25, near), (5, 1, 10**6, near),
    ):
        forest, advantages = random_forest(seed, trees=trees)
        options = {"prob_threshold": RHO, "tokens_per_batch": budget, "every_token": config is near}
        single.zero_grad()
        whole, stats = pack(forest, of_tokens(forest, advantages), **options)
        for batch in whole:
            loss_of(single, batch, config).loss.backward()
        model.zero_grad()
        credit = of_tokens(forest, advantages)
        mine, same = pack(forest, credit, **options, share=(ranks.rank, ranks.world))
        figures = {"loss": 0.0, "kept": 0.0, "ratio_max": 0.0}
        for i, batch in enumerate(mine):
            distributed.begin_batch(model, ranks, last=i == len(mine) - 1)
            out_ = loss_of(model, batch, config)
            (out_.loss * distributed.loss_scale(ranks)).backward()
            for key in figures:
                figures[key] += out_.metrics[key]
        distributed.add_gradients(model, ranks)
        figures = distributed.add_figures(figures, ranks)
        error = max(
            float((distributed.full(a.grad) - b.grad).norm() / (1e-3 + b.grad.norm()))
            for a, b in zip(model.parameters(), single.parameters())
        )
        norm = float(torch.cat([p.grad.flatten() for p in single.parameters()]).norm())
        counts = [len(x) for x in distributed.gather(ranks, mine)]
        assert (same.kept_tokens, same.trained_tokens) == (stats.kept_tokens, stats.trained_tokens)
        results.append([error, norm, figures["kept"], stats.kept_tokens, counts])
    found[mode] = results
if ranks.main:
    json.dump(found, open(out, "w"))
"""


@pytest.fixture(scope="module")
def gradients(tiny_model, tmp_path_factory):
    """What `GRADIENTS` finds in both modes, one after the other in the same processes."""
    folder = tmp_path_factory.mktemp("gradients")
    script = folder / "gradients.py"
    script.write_text(GRADIENTS)
    torchrun(script, tiny_model, folder / "out.json")
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_have_the_gradient_of_one(gradients, mode):
    assert len(gradients[mode]) == 6
    for error, norm, kept, expected, counts in gradients[mode]:
        assert error <= 1e-9 and norm > 0
        assert kept == expected  # figures are those of the whole step
        assert len(set(counts)) == 1 and counts[0] > 0


SMALL = [
    "engine.name=hf",
    "engine.max_num_seqs=64",
    "engine.max_model_len=96",
    "sampling.max_new_tokens=40",
    "shape.widths=[3,2]",
    "shape.segment_tokens=[8]",
    "train.prompts=3",
    "train.minibatches=2",
    "train.learning_rate=1e-4",
    "train.decay=constant",
    "train.warmup_share=0",
    "train.tokens_per_batch=120",
    "train.replay_nodes=2",
    "loss.kl_coef=0.1",
    "train.reference_every=1",
    "train.keep_best=greedy",
    "eval.every=0",
    "eval.problems=4",
]


RUNS = """
import json, os, sys
from pathlib import Path
from spo.cli import main

for out, arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
    seen = (Path(out) / "metrics.jsonl").read_text()
    (Path(out) / f"seen-by-{os.environ['RANK']}").write_text(seen)
"""


def run(folder, *runs):
    """Train by the command line on two processes, one run after the other: (out, mode, more)."""
    (folder / "recipe.yaml").write_text("name: test\n")
    (folder / "runs.py").write_text(RUNS)
    commands = []
    for out, mode, *more in runs:
        settings = [*SMALL, f"train.parallel={mode}", f"out={out}", *more]
        commands.append((str(out), ["train", str(folder / "recipe.yaml"), *settings]))
    torchrun(folder / "runs.py", json.dumps(commands))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(a sharded run that stopped after one iteration; one of two, whole weights on each rank)."""
    folder = tmp_path_factory.mktemp("begun")
    one, two = folder / "one", folder / "two"
    run(folder, (one, "fsdp", "train.iterations=1"), (two, "ddp", "train.iterations=2"))
    return one, two


@pytest.fixture(scope="module")
def resumed(begun, tmp_path_factory):
    """The stopped run as it goes on in either mode."""
    folder = tmp_path_factory.mktemp("resumed")
    for mode in ("ddp", "fsdp"):
        shutil.copytree(begun[0], folder / mode)
    run(folder, *((folder / m, m, "train.iterations=2", "--resume") for m in ("ddp", "fsdp")))
    return folder


def test_every_rank_returns_after_the_last_line(begun):
    for out in begun:
        seen = [(out / f"seen-by-{rank}").read_text() for rank in (0, 1)]
        assert seen == [(out / "metrics.jsonl").read_text()] * 2


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_a_sharded_checkpoint_resumes_in_either_mode(begun, resumed, mode):
    (one_iteration, two_iterations), out = begun, resumed / mode
    before = trained_weights(one_iteration)
    reference = load_file(latest_checkpoint(one_iteration) / "reference.safetensors")
    assert distance(reference, before) == 0
    moved = distance(before, trained_weights(two_iterations))
    assert distance(trained_weights(out), trained_weights(two_iterations)) * 50 < moved
    state, expected = (load_state(latest_checkpoint(x)) for x in (out, two_iterations))
    assert (state.prompt_cursor, state.generated_tokens) == (6, expected.generated_tokens)
    mine, theirs = (read_metrics(x / "metrics.jsonl") for x in (out, two_iterations))
    for a, b in zip([m for m in mine if m["stage"] == "train"][-1:], theirs[-2:-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["kept_share"] == b["kept_share"] and a["packed_tokens"] == b["packed_tokens"]


def test_a_sharded_run_keeps_its_best_policy_whole(begun):
    folder, newest = choose(begun[0], "best"), latest_checkpoint(begun[0])
    first, last = [m for m in read_metrics(begun[0] / "metrics.jsonl") if m["stage"] == "eval"]
    better = last["greedy"] > first["greedy"]
    assert folder.name == f"iter-{int(better):06d}"
    kept = load_file(folder / "policy" / "model.safetensors")
    expected = load_file((newest / "policy" if better else EMBEDDED) / "model.safetensors")
    assert kept.keys() == expected.keys() and distance(kept, expected) == 0


def test_a_sharded_checkpoint_trains_on_in_one_process(begun, tmp_path):
    out = tmp_path / "alone"
    shutil.copytree(begun[0], out)
    lines = train(load_recipe(None, [*SMALL, f"out={out}", "train.iterations=2"]), resume=True)
    assert [line["stage"] for line in lines] == ["train", "eval"]
    config = json.loads((latest_checkpoint(out) / "policy" / "config.json").read_text())
    assert config["architectures"] == ["SeedOssForCausalLM"]
    assert load_policy(PolicyConfig(path=str(latest_checkpoint(out) / "policy")))


def test_ranks_refill_together_and_one_may_have_nothing_to_grow(tmp_path):
    more = [*settings(tmp_path), "train.refill=100000", "data.difficulty=0.3"]
    more += ["train.prompts=3", "train.iterations=3", "train.replay_nodes=0", "loss.kl_coef=0"]
    expected = chosen(more)
    assert any(refilled % 2 for _, refilled, *_ in expected)  # so one of two ranks had less
    run(tmp_path, (tmp_path / "run", "ddp", *more, "train.reference_every=0"))
    lines = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["stage"] == "train"]
    for line, (_, refilled, _, passed, _) in zip(lines, expected, strict=True):
        assert (line["refilled"], line["drawn_less"]) == (refilled, passed)
    state = load_state(latest_checkpoint(tmp_path / "run"))
    assert state.prompt_cursor == sum(taken + passed for _, _, taken, passed, _ in expected)
    assert state.zero_variance == expected[-1][-1]
    forest = Forest.load(tmp_path / "run" / "forest-last.safetensors")
    assert sorted(p.answer for p in forest.prompts) == sorted(p.answer for p in expected[-1][0])


@pytest.mark.slow
def test_a_rank_without_survivors_adds_no_tree_and_all_ranks_skip_together(tmp_path):
    (tmp_path / "mixed.py").write_text(MIXED)
    small = ["train.prompts=2", "train.replay_nodes=0", "engine.max_model_len=80"]
    small += [f"task={tmp_path}/mixed.py:Mixed", "sampling.max_new_tokens=30"]
    run(tmp_path, (tmp_path, "ddp", "train.iterations=3", *small))
    lines = [m for m in read_metrics(tmp_path / "metrics.jsonl") if m["stage"] != "eval"]
    found = [(line["stage"], line["too_long"]) for line in lines]
    assert found == [("train", 1), ("skipped", 2), ("train", 0)]
    assert load_state(latest_checkpoint(tmp_path)).prompt_cursor == 6


def test_bad_launches_get_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="fsdp: expected several processes"):
        join("fsdp", "cpu")
    monkeypatch.setattr(distributed, "join", lambda *_: Ranks(1, 2, sharded=True))
    with pytest.raises(ValueError, match="train.prompts: expected at least one per rank, 2 in all"):
        train(load_recipe(None, [*SMALL, f"out={tmp_path}", "train.prompts=1"]))
    chain = ["shape={kind: chain, rescore: true}", f"out={tmp_path}"]
    with pytest.raises(ValueError, match="shape.rescore=true: expected train.parallel=ddp"):
        train(load_recipe(None, chain))
    assert torch.distributed.is_available() and not torch.distributed.is_initialized()
