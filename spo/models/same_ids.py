"""Whether others read the policy's text as its tokenizer.json does."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

SAMPLE = "One line of text,  with two spaces, 3.14 and 2718.\n\n\tAnother: (x + y) * 10 = 'é'?"
OWN = 256  # tokens of the vocabulary in the sample, evenly spread


def warn_of_other_ids(source: str, trust_remote_code: bool) -> None:
    """Warn if AutoTokenizer gives a sample text other ids than the source's tokenizer.json.

    Args:
        source: folder or hub id.
    """
    problem = _problem(source, trust_remote_code)
    if problem:
        warnings.warn(
            f"policy.path: {source} is read by its tokenizer.json as it is; AutoTokenizer, which "
            f"other programs use, {problem}",
            stacklevel=3,
        )


def sample_text(tokenizer: Any) -> str:
    """Words, digits, spaces, line breaks, and tokens of the vocabulary, special ones among them."""
    ids = sorted(tokenizer.get_vocab().values())
    own = [tokenizer.decode([token]) for token in ids[:: max(len(ids) // OWN, 1)]]
    return "\n".join([SAMPLE, " ".join(own), "".join(own), "".join(tokenizer.all_special_tokens)])


@cache
def _problem(source: str, trust_remote_code: bool) -> str:
    """What AutoTokenizer does with a source; "" if it gives the same ids."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    text = sample_text(tokenizer)
    try:
        auto = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        ids = auto(text, verbose=False)["input_ids"]
    except Exception as error:  # of any class's code; the policy trains without it
        return f"cannot read it ({' '.join(str(error).split())[:200]})"
    if ids == tokenizer(text, verbose=False)["input_ids"]:
        return ""
    return f"makes a {type(auto).__name__} of it and gives a sample text other ids"
