"""A warning where AutoTokenizer reads a policy otherwise than its tokenizer.json."""

import json
import shutil
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spo.config.policy import EMBEDDED, PolicyConfig
from spo.models.same_ids import sample_text
from spo.models.tokenizer import load_tokenizer


def with_type(folder, kind):
    """The embedded policy's tokenizer in a folder of another model type."""
    shutil.copytree(EMBEDDED, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return PolicyConfig(path=str(folder))


def test_a_tokenizer_that_others_replace_is_named(tmp_path):
    """Until seed_oss, the embedded policy was such a folder."""
    with pytest.warns(UserWarning) as caught:
        tokenizer = load_tokenizer(with_type(tmp_path / "policy", "qwen2"))
    (message,) = [str(x.message) for x in caught if "AutoTokenizer" in str(x.message)]
    assert str(tmp_path) in message and "tokenizer.json" in message
    assert "makes a Qwen2Tokenizer of it and gives a sample text other ids" in message
    text = "arithmetic 14 + 3\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # ours reads it as it is


def test_a_tokenizer_that_others_cannot_read_is_named(tmp_path):
    config = with_type(tmp_path / "policy", "seed_oss")
    settings = {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}, "eos_token": "<eos>"}
    (tmp_path / "policy" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="AutoTokenizer.* cannot read it .*custom code"):
        load_tokenizer(config)


def test_nothing_is_said_of_the_same_ids(tmp_path):
    """A byte-level BPE as Qwen's own, in the type whose class AutoTokenizer puts in its place."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(letters, []))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, False)]
    )
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_tokenizer(PolicyConfig(path=str(tmp_path)))
        load_tokenizer(PolicyConfig())


def test_the_sample_holds_what_tokenizers_differ_in():
    text = sample_text(load_tokenizer(PolicyConfig()))
    assert "arithmetic" in text and "14" in text and "<eos>" in text
    assert "\n\n" in text and "  " in text and "2718" in text
