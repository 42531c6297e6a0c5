"""Recipes: what loads, what is refused and with which sentence."""

import dataclasses
import inspect
from pathlib import Path

import pytest
from sentences import one_sentence

from spo import named
from spo.config.critic import CriticConfig
from spo.config.loss import LOSSES
from spo.config.recipe import SHIPPED, Recipe, load_recipe, save_recipe, shipped_recipes

RECIPES = sorted((Path(__file__).parents[3] / "spo" / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load(path):
    assert load_recipe(path).name


def test_overrides_and_yaml_floats(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "train: {learning_rate: 1e-5, iterations: 3}\n"
        "shape: {widths: [4, 2], segment_tokens: [8]}\n"
    )
    config = load_recipe(recipe, ["train.iterations=7", "loss.prob_threshold=null"])
    assert config.train.learning_rate == 1e-5  # YAML 1.1 reads 1e-5 as a string
    assert config.train.iterations == 7 and config.shape.widths == (4, 2)
    assert config.loss.prob_threshold is None


def test_saved_recipe_reads_back(tmp_path):
    config = load_recipe(None, ["shape.widths=[3, 2]", "shape.segment_tokens=[5]", "name=x"])
    save_recipe(config, tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lerning_rate=1"], ["train.lerning_rate", "learning_rate"]),
        (["colour=red"], ["unknown key colour", "policy"]),
        (
            ["log=wandv"],
            ["log: expected names of tensorboard", "did you mean wandb?"],
        ),
        (["log={wandb: true}"], ["log: expected a list of tensorboard", "True"]),
        (["train.iterations=many"], ["train.iterations", "many"]),
        (["sampling.top_p=0.9"], ["sampling.top_p: expected 1", "0.9"]),
        (["sampling.top_k=5"], ["sampling.top_k: expected 0", "biases", "eval.top_k"]),
        (["sampling.min_p=0.1"], ["sampling.min_p: expected 0", "0.1", "eval.min_p"]),
        (["sampling.temperature=0"], ["sampling.temperature"]),
        (["shape.kind=chain", "credit.baseline=loo"], ["loo", "chain"]),
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
        (["shape.kind=chain", "shape.interval=0"], ["shape.interval", "0"]),
        (["shape.kind=chain", "shape.max_steps=0"], ["shape.max_steps", "0"]),
        (["engine.name=sglang"], ["engine.name", "sglang"]),
        (["engine={name: hf, options: {quantization: fp8}}"], ["engine.options", "found hf"]),
        (
            ["engine={addresses: ['http://a:1'], options: {x: 1}}"],
            ["engine.options", "engine.addresses", "flags"],
        ),
        (["engine.options.dtype=half"], ["engine.options.dtype", "engine.dtype sets it"]),
        (["engine.options.block_size=64"], ["engine.options.block_size", "rely on it"]),
        (["engine.max_model_len=0"], ["engine.max_model_len", "0"]),
        (["train.max_generated_tokens=-5"], ["train.max_generated_tokens", "-5"]),
        (["data.max_prompt_tokens=0"], ["data.max_prompt_tokens", "0"]),
        (["train.seed=-1"], ["train.seed", "-1"]),
        (["shape.kind=star", "shape.group_size=0"], ["shape.group_size", "0"]),
        (["shape.kind=chain", "shape.num_probes=-1"], ["shape.num_probes", "-1"]),
        (["train.max_skipped=-1"], ["train.max_skipped", "-1"]),
        (["train.probe_tolerance=.nan"], ["train.probe_tolerance", "nan"]),
        (["sampling.temperature=.inf"], ["sampling.temperature", "inf"]),
        (["train.seed=99999999999"], ["train.seed", "99999999999"]),
        (["sampling.stages=[[0.5,60]]"], ["sampling.stages", "60", "shape.segment_tokens"]),
        # A rule fixes its loss, a shape its settings; a recipe can name no others.
        (["credit.type=pairs", "shape.kind=star", "loss.kl_coef=0.1"], ["loss.kl_coef", "pairs"]),
        (["credit.type=correct", "shape.kind=star", "loss.prob_threshold=0.9"], ["correct"]),
        (["credit.beta=0.2"], ["credit.beta", "baseline"]),
        (["credit.type=gae", "shape.kind=star", "credit.baseline=loo"], ["baseline", "gamma"]),
        (
            ["credit.type=gae", "shape.kind=star", "credit.critic.rate=1"],
            ["critic.rate", "value_clip"],
        ),
        (["shape.kind=star", "shape.widths=[2]"], ["shape.widths", "group_size"]),
        (["loss.kind=dpo"], ["loss.kind", "clip_eps_low"]),
        (["credit.type=gae"], ["gae", "shape.kind=star"]),
        (["credit.type=pairs", "shape.kind=chain"], ["pairs", "shape.kind=star"]),
        (["credit.type=correct", "shape.kind=star", "train.replay_nodes=4"], ["replay_nodes", "4"]),
        (["train.replay_nodes=4", "loss.kl_coef=1", "loss.kl_scope=all"], ["kl_scope", "4"]),
        (["shape.kind=star", "shape.group_size=1"], ["several responses", "values"]),
        (["shape={widths: [1,1], segment_tokens: [9]}"], ["several responses", "values"]),
        (["shape={kind: star, group_size: 1}", "credit.type=pairs"], ["several", "pairs"]),
        (["train.decay=polynomial"], ["train.decay", "cosine_with_min_lr", "polynomial"]),
        (["train.decay=cosine", "train.min_lr_rate=0.1"], ["train.min_lr_rate", "0.1", "cosine"]),
        (["train.decay=cosine_with_min_lr"], ["train.min_lr_rate", "above 0"]),
        (["train.optimizer=sgd"], ["train.optimizer", "adamw_8bit", "sgd"]),
        (["train.master_weights=none"], ["train.master_weights: expected fp32", "none"]),
        (["train.optimizer=adamw_8bit", "train.parallel=fsdp"], ["train.optimizer", "ddp"]),
        (["train.offload=[optimizer]", "train.parallel=fsdp"], ["train.offload", "ddp"]),
        (["train.offload=[optimizer]"], ["train.offload", "policy.device=cpu", "optimizer"]),
        (["train.offload=[critic]"], ["train.offload", "reference", "critic"]),
        (
            ["train.offload=[reference]", "policy.device=cuda"],
            ["train.offload", "loss.kl_coef is 0", "reference"],
        ),
        (["train.reference_every=3"], ["train.reference_every", "loss.kl_coef", "3"]),
        (["shape={kind: chain, rescore: true}", "train.stream_depth=2"], ["stream_depth", "2"]),
        (["shape.kind=chain", "credit.scale=std"], ["credit.scale=std", "siblings"]),
        (["shape.widths=[6,6]"], ["one length per level"]),
        (["sampling.max_new_tokens=60"], ["segment_tokens", "60"]),
        (["shape.kind=comb"], ["shape.kind", "star, tree, chain", "'comb'"]),
        (["credit.type=pairs", "shape.kind=star", "credit.positive=-1"], ["credit.positive", "-1"]),
        (["credit.type=gae", "shape.kind=star", "credit.lam=1.5"], ["credit.lam", "1.5"]),
        (
            ["credit.type=gae", "shape.kind=star", "credit.critic.value_clip=0"],
            ["critic.value_clip", "0"],
        ),
        (["train.restart=true", "train.parallel=fsdp"], ["train.restart", "ddp"]),
        (["shape.kind=star", "sampling.stages=[[0.5,999]]"], ["sampling.stages", "999", "64"]),
        (["sampling.stages=[[0.5,30],[0.4,40]]"], ["sampling.stages", "rising"]),
        (["shape=3"], ["shape", "group"]),
        (["name=3"], ["name", "3"]),
        (["iterations"], ["key=value"]),
        (["name.x=3"], ["name"]),
    ],
)
def test_bad_settings_are_named(overrides, words, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: here\n")
    with one_sentence(words):
        load_recipe(recipe, overrides)


def test_missing_and_broken_recipes(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="expected a mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_groups_may_be_empty_and_recipes_must_be_text(tmp_path):
    (tmp_path / "empty.yaml").write_text("name: here\ntrain:\nshape:\n")
    assert load_recipe(tmp_path / "empty.yaml") == Recipe(name="here")
    assert load_recipe(tmp_path / "empty.yaml", ["train.seed=3"]).train.seed == 3
    assert load_recipe(None, ["train=", "train.seed=3"]).train.seed == 3
    assert load_recipe(None, ["train=null"]) == Recipe()
    (tmp_path / "odd.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match=r"odd\.yaml: not UTF-8"):
        load_recipe(tmp_path / "odd.yaml")


def settings_of(kind):
    """Dataclasses of settings: the groups of a recipe, and what its unions choose from."""
    groups = [type(getattr(kind(), f.name)) for f in dataclasses.fields(kind)]
    own = [
        named.find(key, name) for key in ("shape.kind", "credit.type") for name in named.OWN[key]
    ]
    return {
        g for g in [*groups, *LOSSES.values(), CriticConfig, *own] if dataclasses.is_dataclass(g)
    }


def test_every_setting_has_a_docstring():
    kinds = settings_of(Recipe)
    assert len(kinds) >= 16
    for kind in kinds:
        source = inspect.getsource(kind)
        for f in dataclasses.fields(kind):
            after = source.split(f"    {f.name}: ", 1)[1].split("\n", 1)[1]
            assert after.lstrip().startswith('"""'), f"{kind.__name__}.{f.name}"


def test_off_is_a_word_where_words_are_expected():
    assert load_recipe(None, ["credit.whiten=off"]).credit.whiten == "off"  # YAML reads False
    with pytest.raises(ValueError, match="credit.whiten.*found True"):
        load_recipe(None, ["credit.whiten=on"])
    assert load_recipe(None, ["eval.sampled=off"]).eval.sampled is False


def test_a_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("spo-tree") == load_recipe(SHIPPED / "spo-tree.yaml")
    assert load_recipe("gsm8k-spo-chain").task == "gsm8k"
    with pytest.raises(ValueError, match="spo-tre: .*no such file.* ships .*spo-tree"):
        load_recipe("spo-tre")
    (tmp_path / "spo-tree").write_text("name: mine\n")
    assert load_recipe("spo-tree").name == "mine"  # a file of that name comes first


def test_a_loaded_union_is_saved_with_its_names(tmp_path):
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        save_recipe(recipe, tmp_path / "saved.yaml")
        assert load_recipe(tmp_path / "saved.yaml") == recipe, name
