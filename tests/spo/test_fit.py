"""What `--dry-run` says of memory: recipes that fit their card, advice for those that do not."""

from typing import Any

import pytest
from sentences import one_sentence
from transformers import AutoModelForCausalLM, Qwen2Config

from spo.config.policy import PolicyConfig
from spo.config.recipe import load_recipe
from spo.fit import GIB, card_bytes, counter, fits, memory_lines
from spo.learn.trace import Pack, trace

SIZES: dict[
    str, tuple[int, ...]
] = {  # of Qwen2.5: hidden, intermediate, layers, heads, kv heads, vocabulary, tied
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "tiny": (64, 128, 3, 4, 2, 512, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
VOCABULARY = 151665  # ids of Qwen2.5's tokenizer


def qwen(size):
    numbers: dict[str, Any] = dict(zip(NAMES, SIZES[size], strict=True))
    return Qwen2Config(**numbers, max_position_embeddings=32768)


TINY = qwen("tiny")


@pytest.mark.parametrize(
    ("name", "size", "card", "weights"),
    [
        ("card-24gb-1.5b", "1.5B", 24, 1.54e9 * 2),
        ("card-80gb-7b", "7B", 80, 7.62e9 * 2),
        ("card-80gb-7b-lora", "7B", 80, 7.62e9 * 2 + 40.4e6 * 4),
        ("laptop-0.5b", "0.5B", 8, 0.494e9 * 4 + 8.8e6 * 4),
    ],
)
def test_the_recipes_fit_their_cards(name, size, card, weights):
    recipe = load_recipe(name)
    found = counter(AutoModelForCausalLM, qwen(size), VOCABULARY, card * GIB)(recipe)
    assert next(iter(found.held.values())) == pytest.approx(weights, rel=0.005)
    assert fits(found, card * GIB) and found.peak > 0.4 * card * GIB
    assert not fits(found, 0.6 * found.peak)


def lines_of(overrides, card):
    recipe = load_recipe(None, overrides)
    return memory_lines(recipe, AutoModelForCausalLM, TINY, vocabulary=None, card=card)


def bytes_of(line):
    number, unit = line.split()[:2]
    return float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]


def test_advice_goes_on_until_it_fits():
    given = ["engine={name: hf, max_num_seqs: 1}", "policy.device=cuda"]
    plain = lines_of(given, 1e12)
    assert plain[-1].startswith("fits 931 GiB")
    peak = bytes_of(plain[-2])
    assert "at the peak, in forward and backward" in plain[-2]
    lines = lines_of(given, peak / 1.5)
    at = next(i for i, line in enumerate(lines) if line.startswith("does not fit"))
    assert lines[at + 1].endswith("engine.sleep_mode=true")
    assert lines[at + 2].endswith("policy.gradient_checkpointing=true")
    assert lines[-1] == "fits with these"
    peaks = [bytes_of(line) for line in lines[at + 1 : -1]]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < peak / 1.5
    assert lines_of(given, peak / 1e3)[-1].startswith("does not fit with all of these")


def test_a_count_is_that_of_its_tensors():
    """Of a layer what is kept for the backward, and with checkpointing its input alone."""

    def backward(tokens, **policy):
        counted = trace(AutoModelForCausalLM, TINY, PolicyConfig(**policy), Pack(tokens, 128, 1))
        return counted.backward

    slope = (backward(2048) - backward(1024)) / 1024
    fewer = (
        backward(2048, gradient_checkpointing=True) - backward(1024, gradient_checkpointing=True)
    ) / 1024
    # input and output of two norms, query, key, value and output, four of the MLP
    by_hand = 4 * (4 * 64 + 2 * 64 + 2 * 32 + 4 * 128)
    assert by_hand <= (slope - fewer) / 2 < 1.2 * by_hand  # a layer is there while it is recomputed
    short = backward(2048, dtype="bfloat16") - backward(1024, dtype="bfloat16")
    assert 0.4 < short / 1024 / slope < 0.7
    assert backward(1024, device="cuda") == pytest.approx(backward(1024), rel=0.1)


def test_a_card_has_a_size():
    assert card_bytes("24") == 24 * GIB and card_bytes("RTX 4090") == 24 * GIB
    for wrong in ("x", "-1", "0", "nan"):
        with one_sentence(["--card", "expected a size in GB", wrong]):
            card_bytes(wrong)
