"""What README and docs show is run as it stands; what they name exists."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from spo import cli, load_recipe, rollout, train
from spo.config.log import TRACKERS
from spo.config.recipe import evaluation_sets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = [
    "engine={name: hf, max_num_seqs: 32, max_model_len: 96}",
    "sampling.max_new_tokens=40",
    "shape={widths: [2, 2], segment_tokens: [8]}",
    "train={iterations: 1, prompts: 8, minibatches: 1}",
    "eval={every: 0, problems: 4}",
]


def blocks(page, language=""):
    text = (ROOT / page).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for kind, code in found if kind == language]


def test_your_own_rule_and_shape(tmp_path):
    page = "docs/extend.md"
    for name, code in zip(("signs", "fork"), blocks(page, "python"), strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    for name, text in zip(("rule", "shape"), blocks(page, "yaml"), strict=True):
        (tmp_path / f"{name}.yaml").write_text(text)
        small = [s for s in SMALL if name != "shape" or not s.startswith("shape=")]
        lines = train(tmp_path / f"{name}.yaml", [*small, f"out={tmp_path / name}"]).metrics
        (trained,) = (line for line in lines if line["stage"] == "train")
        assert trained["skipped_steps"] == 0 and trained["mean_abs_advantage"] > 0


def test_your_own_reward(tmp_path):
    page = "docs/own-reward.md"
    (code,), (several, judged) = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / "close.py").write_text(code)
    (tmp_path / "judge.py").write_text("async def judge(response):\n    return len(response)\n")
    (tmp_path / "several.yaml").write_text(several)
    (tmp_path / "judged.yaml").write_text(judged)
    assert load_recipe(tmp_path / "judged.yaml").reward.process == "trainer"
    lines = train(tmp_path / "several.yaml", [*SMALL, f"out={tmp_path / 'run'}"]).metrics
    (trained,) = (line for line in lines if line["stage"] == "train")
    assert 0 < trained["reward_close"] <= 1 and 0 <= trained["reward_format"] <= 1
    assert -1 <= trained["reward_overlong"] <= 0 and trained["invalid_gradings"] == 0


def test_a_run_from_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, watched = blocks("docs/python.md", "python")
    exec(code, names := {})
    greedy, reward = map(float, capsys.readouterr().out.split()[-2:])
    assert 0 <= greedy <= 1 and 0 < reward <= 1
    exec(watched, names)
    assert "written: runs/more/checkpoints/iter-00000" in capsys.readouterr().out


def test_a_look_into_a_forest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    forest, _ = rollout("spo-tree", SMALL)
    forest.save("forest.safetensors")
    (code,) = blocks("docs/forest.md", "python")
    exec(code, names := {})
    assert names["best"] in names["siblings"] and names["best"].response in capsys.readouterr().out
    assert names["values"].shape == names["leave_one_out"].shape == (forest.num_nodes,)
    assert len(names["frame"]) == forest.num_nodes
    assert Path("tree.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_trackers_of_the_page(tmp_path):
    (text,) = blocks("docs/metrics.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").log == list(TRACKERS)


def test_the_evaluation_of_the_page(tmp_path):
    (text,) = blocks("docs/evaluation.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    own, aime, fours = evaluation_sets(load_recipe(tmp_path / "recipe.yaml")).values()
    assert (own.eval.samples, aime.eval.samples, fours.eval.samples) == (8, 32, 8)
    assert (aime.task, aime.eval.problems, fours.eval.problems) == ("aime24", 30, 200)
    assert fours.data.options == {"numbers": 4} and own.eval.top_p == 0.95


def test_what_the_page_keeps_is_a_recipe(tmp_path):
    (text,) = blocks("docs/keeping.md", "yaml")
    (tmp_path / "recipe.yaml").write_text(text)
    train = load_recipe(tmp_path / "recipe.yaml").train
    assert (train.keep_checkpoints, train.keep_best) == (3, "aime/sampled")


def test_the_readme_s_snippets_give_one_loss_and_one_gradient(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = results_of_the_readme()
    finally:
        torch.distributed.destroy_process_group()
    eager, *others = found
    assert eager[0] != 0 and eager[1].abs().max() > 1e-3 and len(others) == 3
    for loss, gradient in others:
        torch.testing.assert_close(loss, eager[0])
        torch.testing.assert_close(gradient, eager[1], rtol=1e-3, atol=1e-6)


def results_of_the_readme():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, **size, **heads, initializer_range=0.5))
    input_ids = torch.randint(64, (3, 12))
    ids = input_ids[:, 1:]
    logits = model(input_ids).logits[:, :-1]
    logprobs = logits.detach().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    given = {
        "torch": torch,
        "math": math,
        "model": model,
        "input_ids": input_ids,
        "ids": ids,
        "old_logprobs": logprobs + 0.2 * torch.randn_like(logprobs).clamp(max=0),
        "adv": torch.randn(3, 11),
        "loss_mask": torch.rand(3, 11) < 0.8,
        "temperature": 1.0,
        "eps": 0.2,
    }
    found = []
    for code in blocks("README.md", "python"):
        model.zero_grad()
        names = given | {"logits": model(input_ids).logits[:, :-1]}
        exec(code, names)
        loss = names["out"].loss if "out" in names else names["loss"]
        found.append((loss.detach(), model.lm_head.weight.grad.clone()))
    return found


def commands():
    for page in PAGES:
        lines = [line for block in blocks(page) for line in block.splitlines()]
        text = page.read_text()
        lines += re.findall(r"`((?:spo \S+|make|python|pip|pytest|torchrun) [^`\n]+)`", text)
        lines += re.findall(r"^ {4}((?:make|torchrun) .*)", text, re.MULTILINE)
        for line in lines:
            if page.name != "LOG.md" and "vllm" not in line:
                yield pytest.param(line, id=f"{page.name}: {line.split('#')[0].strip()}")


SHOWN = list(commands())
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_that_is_shown_would_run(line):
    """Recipes load with the settings shown, options are known, files and targets exist."""
    words = [
        word
        for word in shlex.split(line.replace("[train.parallel=fsdp]", ""), comments=True)
        if "…" not in word
    ]
    if "spo" in words and words[0] in ("spo", "torchrun"):
        words = words[words.index("spo") + 1 :]
        arguments, rest = cli._parser().parse_known_args(words)
        assert not [word for word in rest if word.startswith("-")]
        settings = [word for word in words if "=" in word and not word.startswith("-")]
        names = getattr(arguments, "recipes", None) or [getattr(arguments, "recipe", None)]
        for name in map(str, filter(None, names)):
            if "=" not in name and name != "recipe.yaml":
                load_recipe(name, settings)
    elif words[0] == "make":
        assert [word for word in words[1:] if "=" not in word][0] in TARGETS
    elif words[0] in ("python", "pytest"):
        target = words[words.index("-m") + 1].replace(".", "/") if "-m" in words else words[1]
        assert (ROOT / target).exists() or (ROOT / f"{target}.py").exists()
    elif words[0] == "pip":
        extras = re.findall(r"\[(.*?)\]", line.split("&&")[0])
        known = (ROOT / "pyproject.toml").read_text()
        assert all(f"\n{name} = [" in known for extra in extras for name in extra.split(","))


def test_commands_are_found():
    assert len(SHOWN) > 25 and any("spo compare" in p.values[0] for p in SHOWN)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for name in re.findall(
        r"`((?:benchmarks|csrc|docs|examples|spo|spo_kernels|tests|tools)/[^`\s]*)`", text
    ):
        pattern = re.sub(r"<\w+>|\{[\w,]+\}", "*", name)
        assert list(ROOT.glob(pattern.rstrip("/"))), name


def test_no_command_leaves_its_repository():
    """Nothing here names a path of one machine."""
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        assert not re.search(r"/(?:work|home|root|mnt)/", page.read_text()), page.name
