"""A trained checkpoint in other programs' hands: from text, the Pass@1 that the run printed."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spo.config.recipe import load_recipe
from spo.learn.checkpoint import latest_checkpoint
from spo.loop import train
from spo.tasks import get_task

PROBLEMS, RESPONSE = 100, 48  # of the recipe's test split; tokens, as in the recipe
VLLM = """
import json, sys
from vllm import LLM, SamplingParams

folder, prompts, length, found = sys.argv[1:]
llm = LLM(folder, dtype="float32", enforce_eager=True, max_num_seqs=64)
sampling = SamplingParams(temperature=0, max_tokens=int(length))
outputs = llm.generate(json.loads(prompts), sampling)
json.dump([output.outputs[0].text for output in outputs], open(found, "w"))
"""


def problems():
    return list(islice(get_task("arithmetic").problems("test", 0), PROBLEMS))


def pass_at_1(texts):
    grade = get_task("arithmetic").grade
    return sum(grade(t, p.answer) for t, p in zip(texts, problems(), strict=True)) / PROBLEMS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The policy's folder after a few steps of the demo, and the last line that the run printed.

    Each step moves the weights by less than bf16 holds of most of them.
    """
    out = tmp_path_factory.mktemp("demo")
    settings = ["train.iterations=3", "train.prompts=8", "eval.every=0", "eval.sampled=false"]
    settings += ["engine.name=hf", f"eval.problems={PROBLEMS}", f"out={out}"]
    lines = train(load_recipe("demo-tree", settings))
    return str(latest_checkpoint(out) / "policy"), lines[-1]


def test_transformers_reaches_the_printed_pass_at_1(trained):
    folder, line = trained
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer([p.text for p in problems()], padding=True, return_tensors="pt")
    size = inputs["input_ids"].shape[1]
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    output = model.generate(**ids, max_new_tokens=RESPONSE, do_sample=False)
    texts = tokenizer.batch_decode(output[:, size:], skip_special_tokens=True)
    assert pass_at_1(texts) == pytest.approx(line["greedy"]) and 0.1 < line["greedy"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.timeout(600)
def test_vllm_reaches_the_printed_pass_at_1(trained, tmp_path):
    folder, line = trained
    prompts, found = json.dumps([p.text for p in problems()]), tmp_path / "texts.json"
    command = [sys.executable, "-c", VLLM, folder, prompts, str(RESPONSE), str(found)]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pass_at_1(json.loads(found.read_text())) == pytest.approx(line["greedy"])
