"""What we write, read by another version of transformers: ids, text, logits, Pass@1."""

import json
import os
import random
import subprocess
import sysconfig
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo.tasks import arithmetic, countdown, get_task, knights_knaves

if not os.environ["SPO_RIVALS"].startswith("transformers"):
    pytest.skip("an environment of another library", allow_module_level=True)

ROOT = Path(__file__).parents[2]
POLICIES = [ROOT / "spo/assets/policy", ROOT / "benchmarks/policies/long-arithmetic"]
PROBLEMS, RESPONSE = 100, 48
WRITE = """
import json, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from test_policy_folder import learner_of, logits, saved, write

from spo.config.recipe import load_recipe
from spo.learn.checkpoint import latest_checkpoint
from spo.loop import train

out, *policies = map(Path, sys.argv[1:])
(out / "start").mkdir()
rope = saved(learner_of(write(out / "start"), out / "rope")) / "policy"
settings = ["train.iterations=2", "train.prompts=4", "eval.every=0", "engine.name=hf"]
line = train(load_recipe("demo-tree", [*settings, "eval.problems=100", f"out={out / 'demo'}"]))[-1]
folders = [*policies, rope, latest_checkpoint(out / "demo") / "policy"]
found = {str(i): logits(x, dtype=torch.float32) for i, x in enumerate(folders)}
save_file(found, out / "logits.safetensors")
(out / "written.json").write_text(json.dumps([list(map(str, folders)), line["greedy"]]))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folders that the Python of `make setup` wrote, its logits of each, its Pass@1 of the last."""
    out = tmp_path_factory.mktemp("written")
    shared = Path(sysconfig.get_path("purelib")) / "shared.pth"
    python = Path(shared.read_text().splitlines()[0]).parents[2] / "bin" / "python"
    paths = [ROOT, ROOT / "tests" / "spo", ROOT / "tests" / "spo" / "learn"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [python, "-c", WRITE, out, *POLICIES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    folders, greedy = json.loads((out / "written.json").read_text())
    return folders, load_file(out / "logits.safetensors"), greedy


def test_this_is_another_version():
    assert transformers.__version__.startswith(os.environ["SPO_RIVALS"].partition("-")[2])


@pytest.mark.parametrize("index", [0, 1, 3])
def test_ids_and_text_are_ours(written, index):
    folder = written[0][index]
    theirs, ours = (
        AutoTokenizer.from_pretrained(folder),
        Tokenizer.from_file(f"{folder}/tokenizer.json"),
    )
    rng = random.Random(0)
    for task in (arithmetic, countdown, knights_knaves):
        for problem in islice(get_task(task.NAME).problems("test", 0), 100):
            text = problem.text + task.solution(problem, rng)
            ids = ours.encode(text).ids
            assert theirs(text)["input_ids"] == ids and theirs.decode(ids) == text


def test_logits_are_ours(written):
    folders, logits, _ = written
    for i, folder in enumerate(folders):
        kind = "dtype" if transformers.__version__ > "5" else "torch_dtype"
        model = AutoModelForCausalLM.from_pretrained(folder, **{kind: torch.float32}).eval()
        with torch.no_grad():
            found = model(torch.arange(2, 42)[None]).logits
        torch.testing.assert_close(found, logits[str(i)], atol=1e-5, rtol=0)


def test_the_printed_pass_at_1_is_reached_from_text(written):
    folders, _, greedy = written
    task = get_task("arithmetic")
    problems = list(islice(task.problems("test", 0), PROBLEMS))
    tokenizer = AutoTokenizer.from_pretrained(folders[-1], padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folders[-1]).float()
    inputs = tokenizer([p.text for p in problems], padding=True, return_tensors="pt")
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**ids, max_new_tokens=RESPONSE, do_sample=False)
    texts = tokenizer.batch_decode(output[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [task.grade(t, p.answer) for t, p in zip(texts, problems, strict=True)]
    assert sum(right) / PROBLEMS == pytest.approx(greedy) and greedy > 0.1
