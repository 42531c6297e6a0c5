"""Chat models on both engines: what ends a sample, what is never sampled, and the logprobs."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from chat_folders import FAMILIES, chat_folder
from limits import own_logprobs
from sampling import drain, policy, weights

from spo.config.recipe import load_recipe
from spo.engines.make import make_engine
from spo.models.tokenizer import exact_text, load_tokenizer, sampling_of
from spo.records import STOP, Request

SAMPLES, LENGTH = 48, 24
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)
CASES = [
    *(pytest.param(("hf", name), id=f"hf {name}") for name in FAMILIES),
    # vLLM starts for every family. It draws the small DeepSeek from other logits on the CPU (0.32).
    *(
        pytest.param(
            ("vllm", name),
            id=f"vllm {name}",
            marks=[needs_vllm, *([] if name in ("qwen3", "llama3") else [pytest.mark.slow])],
        )
        for name in FAMILIES
        if name != "deepseek"
    ),
]


class Chat:
    """One family on one engine; its ends and the ids beyond its tokenizer are likely."""

    def __init__(self, engine, name, root):
        folder = chat_folder(root, name)
        self.recipe = load_recipe(None, [f"policy.path={folder}"])
        self.tokenizer = load_tokenizer(self.recipe.policy)
        self.sampling = replace(sampling_of(self.recipe, self.tokenizer), seed=5)
        self.model: Any = policy(folder)
        head = self.model.get_output_embeddings().weight
        likely = [
            *self.sampling.stop_token_ids,
            *range(self.sampling.vocab_size or 1 << 30, len(head)),
        ]
        with torch.no_grad():
            head[likely] = 1.5 * head[torch.arange(len(likely)) % 40 + 40]
        ids = self.tokenizer("1 + 1?", add_special_tokens=True)["input_ids"]
        self.prefix = tuple(ids)
        self.engine = make_engine(engine, str(folder), max_num_seqs=SAMPLES, max_model_len=64)
        self.engine.load_weights(weights(self.model), 1)

    def text(self, ids):
        return exact_text(self.tokenizer, ids)

    def draw(self, n=SAMPLES, before=(), whole=False, **changes):
        """Samples behind the prompt and `before`, which is part of the response unless `whole`."""
        size = None if whole else len(self.prefix)
        sampling = replace(self.sampling, **changes)
        prefix = (*self.prefix, *before)
        self.engine.submit(Request(0, prefix, n, LENGTH, sampling, prompt_size=size))
        return drain(self.engine, n)


@pytest.fixture(scope="module", params=CASES)
def chat(request, tmp_path_factory):
    engine, name = request.param
    built = Chat(engine, name, tmp_path_factory.mktemp("chat"))
    yield built
    built.engine.close()


def test_every_end_stops_and_ids_without_a_token_are_never_sampled(chat):
    stops, size = chat.sampling.stop_token_ids, chat.sampling.vocab_size
    done = chat.draw(n=1, temperature=0.0)
    seen: set[int] = set()
    for seed in range(0, 10_000, 1000):
        done += chat.draw(seed=seed)
        seen |= {s.token_ids[-1] for s in done if s.finish == STOP}
        if seen == set(stops):
            break
    assert seen == set(stops)
    for sample in done:
        ids = sample.token_ids
        assert (sample.finish == STOP) == (ids[-1] in stops)
        assert sample.finish == STOP or len(ids) == LENGTH
        assert not set(ids[:-1]) & set(stops)
        assert size is None or max(ids) < size
        expected = own_logprobs(chat.model, chat.prefix, ids, 1.0, size)
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)
    if size is not None:
        free = chat.draw(vocab_size=None)
        assert any(token >= size for sample in free for token in sample.token_ids)


def plain_text(chat, ids):
    """The text of tokens that are whole characters; None for others."""
    text = chat.text(ids)
    return text if text.isascii() and text.isprintable() and len(text) == len(ids) else None


def test_a_text_ends_a_sample_with_the_token_that_completes_it(chat):
    done = chat.draw()
    pairs = [s.token_ids[i : i + 2] for s in done for i in range(3, len(s.token_ids) - 2)]
    stop = tuple(sorted({text for pair in pairs if (text := plain_text(chat, pair))}))[:6]
    assert stop
    ended = 0
    for sample, plain in zip(chat.draw(stop=stop), done, strict=True):
        texts = [chat.text(plain.token_ids[: n + 1]) for n in range(len(plain.token_ids))]
        hits = [n + 1 for n, text in enumerate(texts) if any(s in text for s in stop)]
        size = hits[0] if hits else len(plain.token_ids)
        assert sample.token_ids == plain.token_ids[:size]
        assert sample.logprobs == pytest.approx(plain.logprobs[:size], abs=1e-4)
        assert sample.finish == (STOP if hits else plain.finish)
        ended += size < len(plain.token_ids)
    assert ended


def test_a_text_may_begin_in_an_earlier_segment(chat):
    before = next(
        s.token_ids[: n + 1]
        for s in chat.draw()
        for n in range(len(s.token_ids) - 1)
        if plain_text(chat, s.token_ids[n : n + 1])
    )
    plain = chat.draw(before=before)
    stop = next(t for s in plain if (t := plain_text(chat, (before[-1], s.token_ids[0]))))
    shorter = chat.draw(before=before, stop=(stop,))
    straddled = [s for s in shorter if chat.text((before[-1], s.token_ids[0])) == stop]
    assert straddled and all(len(s.token_ids) == 1 and s.finish == STOP for s in straddled)
    # As part of the prompt it is no part of a text.
    first = {s.index for s in straddled}
    others = [s for s in chat.draw(before=before, stop=(stop,), whole=True) if s.index in first]
    assert any(len(s.token_ids) > 1 for s in others)
