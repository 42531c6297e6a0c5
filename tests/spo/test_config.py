"""Recipes: what loads, what is refused and with which sentence."""

import dataclasses
from pathlib import Path

import pytest

from spo.config.recipe import Config, load_config, save_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load(path):
    assert load_config(path).name


def test_overrides_and_yaml_floats(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {learning_rate: 1e-5, iterations: 3}\nshape: {widths: [4, 2]}\n")
    config = load_config(recipe, ["train.iterations=7", "loss.prob_threshold=null"])
    assert config.train.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as a string
    assert config.train.iterations == 7 and config.shape.widths == (4, 2)
    assert config.loss.prob_threshold is None


def test_saved_recipe_reads_back(tmp_path):
    config = load_config(None, ["shape.widths=[3, 2]", "shape.segment_tokens=[5]", "name=x"])
    save_config(config, tmp_path / "r.yaml")
    assert load_config(tmp_path / "r.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lerning_rate=1"], ["train.lerning_rate", "learning_rate"]),
        (["colour=red"], ["unknown key colour", "policy"]),
        (["train.iterations=many"], ["train.iterations", "many"]),
        (["sampling.top_p=0.9"], ["sampling.top_p must be 1", "0.9"]),
        (["sampling.top_k=5"], ["top_k"]),
        (["sampling.temperature=0"], ["sampling.temperature"]),
        (["shape.kind=chain", "advantage.baseline=loo"], ["loo", "chain"]),
        (["loss.prob_threshold=1.5"], ["loss.prob_threshold", "1.5"]),
        (["train.prompts=0"], ["train.prompts", "0"]),
        (["train.learning_rate=.inf"], ["train.learning_rate", "inf"]),
        (["train.max_grad_norm=-1"], ["train.max_grad_norm", "-1"]),
        (["train.replay_age=0"], ["train.replay_age", "0"]),
        (["train.replay_samples=0"], ["train.replay_samples", "0"]),
        (["train.replay_nodes=-1"], ["train.replay_nodes", "-1"]),
        (["train.warmup_share=-0.5"], ["train.warmup_share", "-0.5"]),
        (["loss.clip_eps_low=-1"], ["loss.clip_eps_low", "-1"]),
        (["loss.kl_coef=-1"], ["loss.kl_coef", "-1"]),
        (["loss.log_ratio_clamp=0"], ["loss.log_ratio_clamp", "0"]),
        (["shape.interval=0"], ["shape.interval", "0"]),
        (["shape.max_steps=0"], ["shape.max_steps", "0"]),
        (["engine.name=sglang"], ["engine.name", "sglang"]),
        (["engine.max_model_len=0"], ["engine.max_model_len", "0"]),
        (["train.max_generated_tokens=-5"], ["train.max_generated_tokens", "-5"]),
        (["data.max_prompt_tokens=0"], ["data.max_prompt_tokens", "0"]),
        (["train.seed=-1"], ["train.seed", "-1"]),
        (["shape.kind=star", "shape.group_size=0"], ["shape.group_size", "0"]),
        (["shape.num_probes=-1"], ["shape.num_probes", "-1"]),
        (["train.max_skipped=-1"], ["train.max_skipped", "-1"]),
        (["train.probe_tolerance=.nan"], ["train.probe_tolerance", "nan"]),
        (["sampling.temperature=.inf"], ["sampling.temperature", "inf"]),
        (["train.seed=99999999999"], ["train.seed", "99999999999"]),
        (["sampling.stages=[[0.5,60]]"], ["sampling.stages", "60", "shape.segment_tokens"]),
        (["iterations"], ["key=value"]),
        (["name.x=3"], ["name"]),
    ],
)
def test_bad_settings_are_named(overrides, words, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: here\n")
    with pytest.raises(ValueError) as error:
        load_config(recipe, overrides)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_broken_recipes(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_config(tmp_path / "list.yaml")


def test_groups_may_be_empty_and_recipes_must_be_text(tmp_path):
    (tmp_path / "empty.yaml").write_text("name: here\ntrain:\nshape:\n")
    assert load_config(tmp_path / "empty.yaml") == Config(name="here")
    assert load_config(tmp_path / "empty.yaml", ["train.seed=3"]).train.seed == 3
    assert load_config(None, ["train=", "train.seed=3"]).train.seed == 3
    assert load_config(None, ["train=null"]) == Config()
    (tmp_path / "odd.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match=r"odd\.yaml: not UTF-8"):
        load_config(tmp_path / "odd.yaml")


def test_every_setting_has_a_docstring():
    source = (Path(__file__).parents[2] / "spo" / "config" / "recipe.py").read_text()
    for group in dataclasses.fields(Config):
        if dataclasses.is_dataclass(group.default_factory):
            for f in dataclasses.fields(group.default_factory):
                after = source.split(f"    {f.name}: ", 1)[1].split("\n", 1)[1]
                assert after.lstrip().startswith('"""'), f"{group.name}.{f.name}"
