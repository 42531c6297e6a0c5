"""docs/losses.md: it is what the rows render, and each snippet's kernels agree with fp64."""

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "rivals"))

import losses  # noqa: E402
from rows import NAMES, REACHES, batch, emptied, error, far, ours  # noqa: E402

CODES = list(dict.fromkeys(row.code for row in losses.ROWS))
PAGE = (ROOT / "docs" / "losses.md").read_text()


def test_the_page_lists_exactly_the_rows():
    assert losses.render() == PAGE  # else: python tests/rivals/losses.py
    assert len({(row.library, row.option) for row in losses.ROWS}) == len(losses.ROWS)
    for row in losses.ROWS:
        section = PAGE.split(f"\n## {row.library}\n")[1].split("\n## ")[0]
        assert section.count(f"`{row.option}`:\n") + section.count(f"| `{row.option}` |") == 1


@pytest.mark.parametrize("code", CODES, ids=lambda c: c.splitlines()[-1])
def test_a_snippet_agrees_with_itself_in_fp64(code):
    """The kernels in fp32, the references in fp64."""
    (loss, dlogits), (want, want_grad) = (
        ours(code, batch(dtype)) for dtype in (torch.float32, torch.float64)
    )
    assert want_grad.dtype == torch.float64
    assert error(loss, want) < 1e-5 and error(dlogits, want_grad) < 1e-5


@pytest.mark.parametrize("code", CODES, ids=lambda c: c.splitlines()[-1])
def test_far_from_the_centre_too(code):
    for reach in REACHES:
        (loss, dlogits), (want, want_grad) = (
            ours(code, far(reach, dtype)) for dtype in (torch.float32, torch.float64)
        )
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-6)  # terms may cancel
        assert error(dlogits, want_grad) < 1e-4, reach


@pytest.mark.parametrize("code", CODES, ids=lambda c: c.splitlines()[-1])
def test_a_sequence_of_which_no_token_trains(code):
    names = emptied()
    loss, dlogits = ours(code, names)
    assert loss.isfinite() and dlogits.isfinite().all()
    assert (dlogits[~names["mask"]] == 0).all() and (dlogits[names["mask"]] != 0).any()


def test_snippets_are_few_lines_of_named_things():
    for code in CODES:
        assert len(code.splitlines()) <= 12
        assert all(len(line) <= 100 for line in code.splitlines())
    for name in NAMES:
        assert any(re.search(rf"\b{name}\b", code) for code in CODES), name


def test_no_two_losses_of_a_library_are_the_same_loss():
    """Numbers that tell no options apart would prove nothing."""
    for library in losses.PACKAGES:
        found = {}
        for row in losses.ROWS:
            if row.library == library:
                loss, dlogits = ours(row.code, batch(torch.float64))
                found[row.option] = torch.cat([loss[None], dlogits.flatten()])
        for (a, x), (b, y) in itertools.combinations(found.items(), 2):
            assert error(x, y) > 1e-4, (library, a, b)


def test_the_snippet_of_patch_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=53, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    ids = torch.randint(3, 53, (2, 7))
    names = {"model": model, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    want = model(ids).logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    (code,) = re.findall(r"```python\n(from [^`]*patch_transformers.*?)```", PAGE, re.DOTALL)
    exec(code, names)
    torch.testing.assert_close(names["logprobs"], want)
