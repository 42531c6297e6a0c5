"""The embedded policy: its files, its tokenizer, how good it is, and how it is re-created."""

import json
import random
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import spo
from spo.config.policy import PolicyConfig
from spo.models.tokenizer import load_tokenizer
from spo.tasks import countdown, get_task, prompts

POLICY = Path(spo.__file__).parent / "assets" / "policy"
ROOT = Path(__file__).parents[2]
POLICIES = {"embedded": POLICY, "long": ROOT / "benchmarks" / "policies" / "long-arithmetic"}
sys.path.append(str(ROOT / "tools"))
import warmup  # noqa: E402

EMBEDDED = ["arithmetic", "countdown", "knights_knaves"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PolicyConfig())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()


def test_files_are_small_and_weights_are_bf16(model):
    assert sum(file.stat().st_size for file in POLICY.iterdir()) < 8e6
    stored = AutoModelForCausalLM.from_pretrained(POLICY, dtype="auto")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert stored.lm_head.weight is stored.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) < 2.5e6


def test_special_tokens(tokenizer, model):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("\n")["input_ids"] == tokenizer("Ann\n")["input_ids"][1:]
    assert tokenizer.decode([0, 1], skip_special_tokens=True) == ""


def test_a_line_is_the_tokens_one_would_count(tokenizer):
    words = tokenizer.convert_ids_to_tokens(tokenizer("15 - 9 = 6\n<answer> 6 </answer>").input_ids)
    assert words == ["15", "-", "9", "=", "6", "\n", "<answer>", "6", "</answer>"]


@pytest.mark.parametrize("task", EMBEDDED)
def test_every_text_survives_the_tokenizer(tokenizer, task):
    rng, solve = random.Random(0), warmup.IMITATED[task].solution
    for split in ("train", "test"):
        for problem in islice(get_task(task).problems(split, 1), 300):
            solution = solve(problem, rng)
            pieces = [tokenizer(t)["input_ids"] for t in (problem.text, solution)]
            assert tokenizer.unk_token_id not in pieces[0] + pieces[1]
            assert [tokenizer.decode(ids) for ids in pieces] == [problem.text, solution]
            # Cut anywhere into prompt and response, as training does, it is still the same text.
            assert tokenizer.decode(pieces[0] + pieces[1]) == problem.text + solution
            assert tokenizer(problem.text + solution)["input_ids"] == pieces[0] + pieces[1]


def texts():
    """Prompts, solutions and both together, of every task that the policies know."""
    rng = random.Random(0)
    for task in EMBEDDED:
        for problem in islice(get_task(task).problems("test", 0), 100):
            solution = warmup.IMITATED[task].solution(problem, rng)
            yield from (problem.text, solution, problem.text + solution)


@pytest.mark.parametrize("reader", ["transformers", "vllm"])
@pytest.mark.parametrize("name", POLICIES)
def test_others_read_our_ids_and_our_text(name, reader):
    folder = str(POLICIES[name])
    if reader == "vllm":
        theirs = pytest.importorskip("vllm.tokenizers").get_tokenizer(folder)
    else:
        theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(f"{folder}/tokenizer.json")
    for text in texts():
        ids = ours.encode(text).ids
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", POLICIES)
def test_the_model_is_qwen2_under_another_name(name):
    """The results in docs/paper.md were measured with this class and these weights."""
    model = AutoModelForCausalLM.from_pretrained(POLICIES[name], dtype=torch.float32).eval()
    kept = model.config.to_dict()
    for key in ("model_type", "architectures"):
        kept.pop(key)
    qwen = Qwen2ForCausalLM(Qwen2Config(**kept)).eval()
    qwen.load_state_dict(model.state_dict())
    token_ids = torch.randint(138, (4, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((model(token_ids).logits - qwen(token_ids).logits).abs().max()) < 1e-6


@pytest.mark.parametrize("task", EMBEDDED)
def test_the_first_token_tells_the_task(tokenizer, task):
    firsts = {p.prompt_ids[0] for p in islice(prompts(task, "train", 0, tokenizer), 50)}
    assert firsts == {tokenizer.convert_tokens_to_ids(task)}


def test_arithmetic_is_as_short_as_the_demo_expects(tokenizer):
    rng, lengths = random.Random(0), []
    for problem in islice(get_task("arithmetic").problems("train", 0), 500):
        assert len(tokenizer(problem.text)["input_ids"]) in (11, 13, 15)
        lengths.append(
            len(tokenizer(warmup.IMITATED["arithmetic"].solution(problem, rng))["input_ids"]) + 1
        )
    assert 24 <= sum(lengths) / 500 <= 33 and max(lengths) <= 40


def test_prompts_carry_ids_answer_and_task(tokenizer):
    got = list(islice(prompts("countdown", "test", 0, tokenizer, numbers=4), 3))
    expected = list(islice(get_task("countdown", {"numbers": 4}).problems("test", 0), 3))
    assert [tokenizer.decode(p.prompt_ids) for p in got] == [p.text for p in expected]
    assert [p.answer for p in got] == [p.answer for p in expected]
    assert {p.task for p in got} == {"countdown"}


def test_a_text_outside_the_vocabulary_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(countdown, "LARGEST", 1000)
    with pytest.raises(ValueError, match="vocabulary does not cover the countdown problem"):
        list(islice(prompts("countdown", "train", 0, tokenizer), 20))


@pytest.mark.parametrize("task", ["arithmetic", "countdown"])
def test_the_policy_is_neither_hopeless_nor_done(tokenizer, model, task):
    """30 to 60 % of the test problems by greedy decoding, give or take two standard errors."""
    rate = warmup.pass_at_1(model, tokenizer, task, count=250)
    assert 0.24 < rate < 0.66


# Re-creating it


def test_the_shipped_tokenizer_and_model_are_what_the_code_builds(tokenizer, model, tmp_path):
    built = warmup.build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    warmup.save_tokenizer(built, tmp_path)
    warmup.build_model(built).to(torch.bfloat16).save_pretrained(tmp_path)
    for path in POLICY.glob("*.json"):
        ours, shipped = (json.loads((x / path.name).read_text()) for x in (tmp_path, POLICY))
        for content in (ours, shipped):
            content.pop("transformers_version", None)
        assert ours == shipped
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
    assert shapes == {n: p.shape for n, p in model.state_dict().items() if n != "lm_head.weight"}


def test_batches_mark_solutions_only(tokenizer):
    token_ids, is_solution = next(warmup.batches(tokenizer, 0, 16))
    assert token_ids.shape == is_solution.shape and token_ids.shape[0] == 16
    for ids, mask in zip(token_ids, is_solution, strict=True):
        prompt_length = int(mask.int().argmax())
        end = prompt_length + int(mask.sum())
        assert mask[prompt_length:end].all() and not mask[end:].any()
        assert ids[end - 1] == tokenizer.eos_token_id and (ids[end:] == 0).all()
        text = tokenizer.decode(ids[:prompt_length])
        assert text.endswith("\n") and text.split()[0] in EMBEDDED and "\n" not in text[:-1]
        assert tokenizer.decode(ids[prompt_length : end - 1]).endswith("</answer>")


def test_a_plan_says_what_is_imitated(tokenizer):
    """Ten operations, and any line may take two of them."""
    plan = warmup.PLANS["long-arithmetic"]
    token_ids, is_solution = next(warmup.batches(tokenizer, 0, 16, plan))
    merged = []
    for ids, mask in zip(token_ids, is_solution, strict=True):
        prompt = tokenizer.decode(ids[: int(mask.int().argmax())]).split()
        assert len(prompt) == 2 + 2 * 10
        lines = tokenizer.decode(ids[mask]).split("\n")[:-1]
        merged.append(sum(line.split().index("=") == 5 for line in lines))
        assert len(lines) + merged[-1] == 10
    assert max(merged) > 2


def test_the_warm_up_is_deterministic_and_learns(tokenizer, capsys):
    def run(seed):
        model = warmup.warm_up(tokenizer, steps=6, batch_size=8, lr=2e-3, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert "step 6/6 loss" in capsys.readouterr().out


def test_the_loss_does_not_see_the_padding(tokenizer):
    """A row's logits are the same alone and padded among longer ones."""
    torch.manual_seed(0)
    model = warmup.build_model(tokenizer).eval()
    token_ids, is_solution = next(warmup.batches(tokenizer, 3, 16))
    row = int(is_solution.sum(1).argmin())
    length = int(is_solution[row].nonzero().max()) + 1
    with torch.no_grad():
        together = model(input_ids=token_ids).logits[row, :length]
        alone = model(input_ids=token_ids[row : row + 1, :length]).logits[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
