"""Stop texts against the whole decoded response, with tokenizers of both families."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spo.engines.stops import UNFINISHED, StopTexts


def byte_level():
    """Every byte a token, some merged over spaces and line ends, and a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("â", "Ĥ"),
        ("<", "/"),
        ("e", "r"),
        ("Ġ", "a"),
        ("a", "Ċ"),
        ("Ċ", "Ċ"),
        (".", "Ċ"),
    ]
    vocabulary = alphabet + ["".join(pair) for pair in merges]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def byte_fallback():
    """Words that hold their leading space, and a token for every byte, as SentencePiece has."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", "a", "b", "er", "▁a", "▁b", "▁er", "</", ">", "▁</", "ab", "."]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(words)}, [], byte_fallback=True))
    inner.normalizer = normalizers.Prepend("▁")
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


STOPS = [
    (".\n",),
    ("\n\n",),
    ("€",),
    (" a",),
    ("er",),
    ("</a", "b."),
    (" ",),
    ("a<end>",),
    ("r ",),
]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_a_sample_ends_where_its_text_first_holds_a_stop(make):
    tokenizer = make()

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    stops, draw = StopTexts(decode), random.Random(0)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    likely = [i for i, t in enumerate(names) if set(decode([i])) <= set("ab er</.\n€<end>")]
    likely = [i for i in likely if names[i][:3] != "<0x" or names[i] == "<0x0A>"]
    euro = [i for i in tokenizer.encode("€") if decode([i]).strip()]  # several, none a character
    assert len(euro) > 1 and UNFINISHED in decode(euro[:1])
    found = dict.fromkeys(STOPS, 0)
    for _ in range(2500):
        stop = draw.choice(STOPS)
        ids = [draw.choice(likely) for _ in range(12)]
        if draw.random() < 0.2:
            ids[5:7] = euro
        split = draw.randrange(6)  # the tokens before it were sampled by earlier segments
        if any(s in decode(ids[:split]) for s in stop):
            continue
        for end in range(split + 1, len(ids) + 1):
            expected = any(s in decode(ids[:end]) for s in stop)
            assert stops.completed(stop, ids[split:end], ids[:split]) == expected, (stop, ids, end)
            if expected:
                found[stop] += 1
                break
    assert min(found.values()) > 3, found
