"""What a dry run counts, against numbers worked by hand, and what it says of sources."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from sentences import one_sentence

from spo.config.data import PROBLEM, DataConfig
from spo.config.policy import EMBEDDED, PolicyConfig
from spo.config.recipe import Recipe, load_recipe
from spo.config.shape import Cost
from spo.plan import cost_of_iteration, describe, parameters
from spo.tasks import FIRST_ROWS

PAPER = sorted((Path(__file__).parents[2] / "spo" / "recipes" / "paper").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "sampled", "probed", "graded"),
    [
        (["shape.kind=star", "shape.group_size=8"], 2 * 8 * 100, 0, 16),
        (
            ["shape.widths=[3,2]", "shape.segment_tokens=[30]"],
            2 * (3 * 30 + 6 * 70),
            0,
            2 * 6,
        ),
        (  # probes start after 40 and 80 tokens, 60 and 20 before the end
            ["shape.kind=chain", "shape.partition=fixed", "shape.segment_tokens=40"],
            2 * 8 * 100,
            2 * 8 * 9 * (60 + 20),
            2 * 8 * (1 + 9 * 2),
        ),
        (  # before cutpoints 1, 51 at the earliest; and the prompt
            ["shape.kind=chain", "shape.interval=50", "shape.probe_prompt=true"],
            2 * 8 * 100,
            2 * 8 * 9 * (99 + 49) + 2 * 9 * 100,
            2 * 8 * (1 + 9 * 2) + 2 * 9,
        ),
        (  # three steps have two boundaries inside
            ["shape.kind=chain", "shape.partition=steps", "shape.max_steps=3"],
            2 * 8 * 100,
            2 * 8 * 9 * (99 + 98),
            2 * 8 * (1 + 9 * 2),
        ),
    ],
)
def test_tokens_of_an_iteration(overrides, sampled, probed, graded):
    config = load_recipe(None, ["train.prompts=2", "sampling.max_new_tokens=100", *overrides])
    assert cost_of_iteration(config) == Cost(sampled, graded, probed)


def test_no_partition_cuts_more_often_than_is_counted():
    import numpy as np

    from spo.grow.chain import cutpoint_partition, fixed_partition, step_partition
    from spo.grow.steps import line_ends

    ids, unsure = np.ones(20, int), np.full(20, -2.0)
    makers = {
        "cutpoint": cutpoint_partition(0.9, 3),
        "fixed": fixed_partition(6),
        "steps": step_partition("a\n".__mul__, line_ends, 5),
    }
    for name, partition in makers.items():
        config = load_recipe(
            None,
            [
                "shape.kind=chain",
                f"shape.partition={name}",
                "shape.interval=3",
                "shape.segment_tokens=6",
                "shape.max_steps=5",
                "sampling.max_new_tokens=20",
            ],
        )
        assert len(partition(ids, unsure)) - 1 <= len(config.shape.boundaries(20))


def test_weights_are_counted_without_loading_them(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    real = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_model).parameters())
    policy = PolicyConfig(path=str(shutil.copytree(tiny_model, tmp_path / "policy")))
    assert parameters(policy) == real
    assert parameters(PolicyConfig(path="nobody/nothing")) is None
    config = load_recipe(None, ["loss.kl_coef=1e-4", "engine.dtype=bfloat16"])
    with one_sentence(["policy.path"]):  # without a tokenizer
        describe(dataclasses.replace(config, policy=policy))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EMBEDDED / name, tmp_path / "policy" / name)
    text = describe(dataclasses.replace(config, policy=policy))
    assert f"{real:,} weights" in text
    assert f"{real * 4 / 2**20:9.2f} MiB  weights, float32" in text  # and the reference's
    assert f"{real * 4 / 2**20:9.2f} MiB  reference" in text
    assert f"{real * 8 / 2**20:9.2f} MiB  optimiser" in text  # two moments
    gae = ["credit.type=gae", "shape.kind=star", "policy.dtype=bfloat16", "policy.device=cuda"]
    gae += ["loss.kl_coef=1e-4"]
    for more, reference, state in (  # bf16: twice weights and state, for the critic
        ([], 2, 10),
        (["train.optimizer=adamw_8bit"], 2, 4 + 2 / 64),
        (["train.master_weights=stochastic"], 2, 4),
        (["train.offload=[optimizer,reference]"], 0, 0),
    ):
        config = load_recipe(None, [*gae, *more])
        config = dataclasses.replace(
            config, policy=dataclasses.replace(config.policy, path=policy.path)
        )
        text = describe(config)
        critic = f"{real * (2 + state) / 2**20:9.2f} MiB  critic and its optimiser"
        assert critic in text and ("MiB  optimiser" in text) == (state > 0)
        assert ("MiB  reference" in text) == (reference > 0)


def test_sources_are_told_apart(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    config = Recipe(
        task="gsm8k",
        policy=PolicyConfig(path="nobody/nothing"),
        data=DataConfig(test=str(tmp_path)),
    )
    lines = describe(config).splitlines()
    assert "  policy  nobody/nothing: would be downloaded" in lines
    assert "  train   openai/gsm8k/main: would be downloaded" in lines
    assert f"  test    {tmp_path}: local" in lines
    assert any("unknown until the policy's config.json is here" in line for line in lines)
    assert "  train   generated" in describe(Recipe()).splitlines()
    for missing in (
        dataclasses.replace(config, policy=PolicyConfig(path="./nothing")),
        dataclasses.replace(config, data=DataConfig(test="./none.jsonl")),
    ):
        with pytest.raises(ValueError, match="there is no folder|no such file"):
            describe(missing)


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_paper_recipes_describe_themselves(path):
    config = load_recipe(path)
    assert config.name == path.stem and config.data.template.count(PROBLEM) == 1
    assert config.sampling.temperature == 0.6 and config.train.learning_rate == 1e-6
    room = (config.data.max_prompt_tokens or 0) + config.sampling.max_new_tokens
    assert room <= config.engine.max_model_len
    assert f"{config.policy.path}: would be downloaded" in describe(config)


def test_the_paper_s_tree_by_hand():
    (path,) = (p for p in PAPER if p.stem == "gsm8k-spo-tree")
    cost = cost_of_iteration(load_recipe(path))
    assert cost.sampled == 16 * (6 * 30 + 36 * 30 + 216 * 964)
    assert cost.graded == 16 * 216
    text = describe(load_recipe(path))
    assert "512 nodes trained" in text  # its samples per iteration
    evaluated = 1319 * 2 * 1024  # greedy and sampled
    assert f"and 101 evaluations of at most {evaluated:,} tokens" in text
    with pytest.raises(ValueError, match="one length per level"):
        load_recipe(path, ["shape.widths=[6,6]"])


def test_what_training_would_refuse_is_refused(tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "policy")
    config = dataclasses.replace(Recipe(), policy=PolicyConfig(path=str(tmp_path / "policy")))
    describe(config)
    chat = dataclasses.replace(config, data=DataConfig(system="Think."))
    with one_sentence(["expected a tokenizer with a chat template"]):
        describe(chat)
    (tmp_path / "policy" / "model.safetensors").unlink()
    with one_sentence(["expected weights as *.safetensors"]):
        describe(config)


def test_one_step_is_no_steps():
    assert "  1 optimiser step\n" in describe(load_recipe(None, ["train.minibatches=1"]))


def test_the_first_rows_of_data_that_are_here_are_read(tmp_path):
    path = tmp_path / "mine.jsonl"
    asked = ["task=rows", "reward={rule: number}", f"data.train={path}", "data.test=same"]
    path.write_text('{"question": "q", "answer": 1}\n')
    assert f"  train   {path}: local" in describe(load_recipe(None, asked)).splitlines()
    with one_sentence([str(path), "data.columns.problem: expected one of the columns question"]):
        describe(load_recipe(None, [*asked, "data.columns={problem: text}"]))
    with one_sentence([f"data.test: expected a test split in data set {path}"]):
        describe(load_recipe(None, asked[:-1]))
    path.write_text("\n")
    with one_sentence([f"data set {path}: its train files hold no rows"]):
        describe(load_recipe(None, asked))
    others = tmp_path / "others.jsonl"
    others.write_text('{"text": "q"}\n')
    with one_sentence([f"{others}: expected a column problem or question"]):
        describe(load_recipe(None, [*asked[:2], f"eval.sets.o.data={{test: {others}}}"]))


def test_a_dry_run_reads_no_more_than_the_first_rows_unless_these_say_nothing(tmp_path):
    path = tmp_path / "mine.jsonl"
    asked = ["task=rows", "reward={rule: number}", f"data.train={path}", "data.test_share=0.1"]
    empty, row = '{"question": "q", "answer": ""}\n', '{"question": "q", "answer": 1}\n'
    path.write_text(row * FIRST_ROWS + "{damaged")
    describe(load_recipe(None, asked))
    path.write_text(empty * FIRST_ROWS + row)
    with pytest.warns(UserWarning, match=f"of {FIRST_ROWS + 1} train rows"):
        describe(load_recipe(None, asked))
    path.write_text(empty * FIRST_ROWS + "{damaged")
    with one_sentence([f"line {FIRST_ROWS + 1}: Expecting property name"]):
        describe(load_recipe(None, asked))
