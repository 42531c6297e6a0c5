"""Folders that hold no model to train: each is refused in a sentence that says what it holds."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling import tiny_policy
from sentences import one_sentence
from transformers.utils import logging

from spo.cli import main
from spo.config.policy import PolicyConfig
from spo.engines.hf import HFEngine
from spo.learn.policy import load_policy
from spo.models.tokenizer import load_tokenizer
from spo.plan import parameters


def empty(folder):
    pass


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def odd_adapter(folder):
    (folder / "adapter_config.json").write_text("[]")


def checkpoint(folder):
    tiny_policy(folder / "policy", "llama")


def run(folder):
    (folder / "checkpoints").mkdir()


def both(folder):
    tiny_policy(folder, "llama")
    adapter(folder)


FOLDERS = {
    run: "is a run, its models lie in",
    both: "an adapter (adapter_config.json) beside one, and it would not be used",
    empty: "holds no config.json",
    adapter: "holds an adapter of some/base, no whole model: merge it with peft's",
    odd_adapter: "holds an adapter of another model",
    checkpoint: "is a checkpoint, its model lies in",
}


@pytest.mark.parametrize("make", FOLDERS)
@pytest.mark.parametrize("load", [load_policy, load_tokenizer, parameters])
def test_a_folder_without_a_model_is_named_for_what_it_holds(tmp_path, make, load):
    make(tmp_path)
    with one_sentence(["policy.path: ", str(tmp_path), FOLDERS[make]]):
        load(PolicyConfig(path=str(tmp_path)))


@pytest.mark.parametrize("load", [load_policy, load_tokenizer, parameters])
def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path, load):
    for path in ("./none", "~/none", "a/b/c", str(tmp_path / "none")):
        with one_sentence([f"policy.path: there is no folder {path}"]):
            load(PolicyConfig(path=path))
    for path in ("a b/none", "none"):
        with one_sentence([f"{path} is no folder here, and as a hub id it cannot be loaded"]):
            load_policy(PolicyConfig(path=path))
    with one_sentence(["expected a folder or a hub id, found ''"]):
        load(PolicyConfig(path=""))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with one_sentence(["expected a folder or a hub id", "is a file"]):
        load(PolicyConfig(path=str(file)))


def test_weights_in_another_format_are_named(tmp_path):
    folder = tiny_policy(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with one_sentence([f"expected weights as *.safetensors in {folder}, found none"]):
        load_policy(PolicyConfig(path=folder))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with one_sentence(["found only pytorch_model.bin"]):
        load_policy(PolicyConfig(path=folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    folder = tiny_policy(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with one_sentence(["1 of", "NaN or infinity", "such as model.layers.1.mlp.up_proj.weight"]):
        load_policy(PolicyConfig(path=folder, dtype=dtype))


def test_weights_that_the_model_has_no_place_for_are_named_once(tmp_path, caplog):
    folder = tiny_policy(tmp_path, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_policy(PolicyConfig(path=folder))
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    logging.set_verbosity_warning()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        load_policy(PolicyConfig(path=folder))
        HFEngine(folder)  # a run has both
    (text,) = (str(one.message) for one in said)
    assert "1 weights of" in text and "q_proj.bias" in text and "are not used" in text
    assert "LOAD REPORT" not in caplog.text and logging.get_verbosity() == logging.WARNING


def test_a_weight_of_another_shape_is_named(tmp_path):
    folder = tiny_policy(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(63)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with one_sentence(["model.norm.weight", "the shape (64,)", "found (63,)"]):
        load_policy(PolicyConfig(path=folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_without_scales_are_named(tmp_path, dtype):
    folder = tiny_policy(tmp_path, "llama")
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with one_sentence(["a quantization_config", f"as {name} is quantised"]):
        load_policy(PolicyConfig(path=folder))


def test_damaged_tokenizer_files_are_one_sentence(tmp_path):
    folder = tiny_policy(tmp_path, "llama")
    for text in ("{}", "", "[]", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with one_sentence([f"policy.path: {folder}"]):
            load_tokenizer(PolicyConfig(path=folder))


def test_a_damaged_configuration_is_one_sentence(tmp_path):
    folder = tiny_policy(tmp_path, "llama")
    settings = json.loads((tmp_path / "config.json").read_text())
    for text in ("{}", "", "[]", json.dumps(settings | {"model_type": "no_such_type"})):
        (tmp_path / "config.json").write_text(text)
        with one_sentence([f"policy.path: {folder}"]):
            load_policy(PolicyConfig(path=folder))


def test_the_command_line_prints_warnings_without_their_source(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    main(["train", "spo-tree", "policy.path=./none", "--dry-run"])
    assert capsys.readouterr().err == "spo: policy.path: there is no folder ./none\n"
    here = warnings.formatwarning("two\nlines", UserWarning, main.__code__.co_filename, 1)
    assert here == "spo: warning: two lines\n"
    assert "test_model_files" in warnings.formatwarning("text", UserWarning, __file__, 1)
