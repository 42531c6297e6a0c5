"""Exported policies: what others load, what the card says, and the upload."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as hub_constants
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sentences import one_sentence
from transformers import AutoModelForCausalLM

import spo
from spo.cli import main
from spo.config.recipe import load_recipe
from spo.publish.card import Trained, model_card
from spo.publish.folder import export

SMALL = {
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "shape": {"kind": "star", "group_size": 4},
    "train": {"iterations": 2, "prompts": 8, "minibatches": 1, "learning_rate": 5e-4}
    | {"keep_best": "greedy"},
    "eval": {"problems": 6, "every": 1, "samples": 2, "top_p": 0.95},
    "sampling": {"max_new_tokens": 40, "stop_token_ids": [137]},
}
PROMPT = "arithmetic 3 + 4\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = spo.train("grpo", out=tmp_path_factory.mktemp("run"), **SMALL)
    assert any(line["grad_norm"] > 0 for line in run.metrics if line["stage"] == "train")
    return run


@pytest.fixture(scope="module")
def exported(run):
    return run.export()


def tensors(folder):
    return load_file(folder / "model.safetensors")


def greedy(run):
    """The trained model's own greedy response, from token ids."""
    ids = run.tokenizer(PROMPT, return_tensors="pt").input_ids
    output = run.model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=[1, 137])
    return run.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_card_s_example_gives_the_trained_policys_text(run, exported, monkeypatch, capsys):
    assert exported == run.folder / "export"
    monkeypatch.chdir(exported.parent)
    code, _ = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    exec(code.replace('"{problem}"', repr(PROMPT)), {})
    said = capsys.readouterr().out.rstrip("\n")
    assert said == greedy(run).rstrip("\n") and said.strip()


def test_an_export_holds_the_policy_and_a_card(run, exported):
    theirs = {path.name for path in (run.checkpoint / "policy").iterdir()}
    assert {path.name for path in exported.iterdir()} == theirs | {"README.md"}
    stored = tensors(run.checkpoint / "policy")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in tensors(exported).items())
    settings = json.loads((exported / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [1, 137] and settings["pad_token_id"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_have_the_type_that_is_asked_for(run, tmp_path, dtype):
    folder = run.export(tmp_path / "out", dtype=dtype)
    exact, found = load_file(run.checkpoint / "weights.safetensors"), tensors(folder)
    assert found.keys() == tensors(run.checkpoint / "policy").keys() == exact.keys()
    for name, tensor in found.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_the_best_policy_is_exported_with_its_own_figures(run, tmp_path, capsys):
    output = tmp_path / "best"
    assert main(["export", str(run.folder), "--checkpoint", "best", "-o", str(output)]) == 0
    assert f"folder: {output}" in capsys.readouterr().out
    kept, stored = tensors(output), tensors(run.best / "policy")
    assert all(torch.equal(kept[name], tensor) for name, tensor in stored.items())
    record = json.loads((run.best / "evaluation.json").read_text())
    card = (output / "README.md").read_text()
    assert f"{record['iteration']} iterations" in card
    assert f"| `greedy` | {record['mean']:.3f} ± {record['stderr']:.3f} | 6 |" in card


def test_a_checkpoint_alone_is_exported_too(run, tmp_path):
    assert main(["export", str(run.checkpoint), "-o", str(tmp_path / "one")]) == 0
    assert tensors(tmp_path / "one").keys() == tensors(run.checkpoint / "policy").keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected an empty or a new folder, found one that is not empty"),
        (["-o", "{tmp}/file"], "expected an empty or a new folder, found a file"),
        (["--dtype", "int8", "-o", "{tmp}/x"], "dtype: expected stored, bfloat16, float32"),
        (["--checkpoint", "iter-9", "-o", "{tmp}/x"], "expected iter-000002 or best"),
        (["--private", "-o", "{tmp}/x"], "--private: expected --push-to-hub OWNER/NAME"),
        (["--push-to-hub", "model"], "push_to_hub: expected OWNER/NAME, found model"),
        (["--push-to-hub", "a/b/c"], "push_to_hub: expected OWNER/NAME, found a/b/c"),
        (["--push-to-hub", "me/model"], "found offline mode; unset HF_HUB_OFFLINE"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(run, exported, tmp_path, capsys, words, said):
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in run.folder.rglob("*"))
    words = [word.replace("{tmp}", str(tmp_path)) for word in words]
    assert main(["export", str(run.folder), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in run.folder.rglob("*")) == before


def test_a_checkpoint_needs_a_folder_to_go_to(run):
    with one_sentence(["output: expected a folder for the export of", run.checkpoint.name]):
        export(run.checkpoint)


def head_and_recipe(card):
    head = yaml.safe_load(card.split("---\n")[1])
    return head, yaml.safe_load(card.split("````yaml\n")[1].split("````")[0])


def test_the_card_of_a_run(run, exported):
    card = (exported / "README.md").read_text()
    head, recipe = head_and_recipe(card)
    assert head["library_name"] == "transformers" and "base_model" not in head
    assert "spo-kernels" in head["tags"] and "datasets" not in head
    assert load_recipe(None, **recipe, out=str(run.folder)) == run.recipe
    last = run.metrics[-1]
    for key in ("greedy", "sampled", "pass_at_2", "majority"):
        assert f"| `{key}` | {last[key]:.3f} ± {last[f'{key}_stderr']:.3f} | 6 |" in card
    for line in (line for line in run.metrics if line["stage"] == "eval"):
        curve = f"| {line['iteration']} | {line['generated_tokens']:,} | {line['greedy']:.3f} "
        assert curve in card
    assert "temperature 1, top_p 0.95, 2 of each problem." in card
    assert f"2 iterations, {last['generated_tokens']:,} generated tokens" in card
    assert "2505.23564" in card and f"torch {torch.__version__}" in card


def test_a_card_says_nothing_about_a_machine(tmp_path):
    (tmp_path / "mine.py").write_text("def close(response, answer):\n    return 1.0\n")
    for name in ("train", "other"):
        (tmp_path / f"{name}.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    rows = [{"problem": "1 + 2", "answer": "3"}]
    recipe = load_recipe(
        None,
        task="rows",
        reward=f"{tmp_path}/mine.py:close",
        data={
            "train": {f"{tmp_path}/train.jsonl": 0.5, f"{tmp_path}/other.jsonl#train": 0.5},
            "test": spo.api.data_of(rows)["train"],
            "system": "/no_think Reason.",
            "thinking": False,
        },
        policy={"path": f"{tmp_path}/models--me--base/snapshots/0a1b"},
        engine={"name": "vllm", "addresses": ["http://inside:8000"]},
        sampling={"stop": ["END"]},
        eval={"sets": {"g": {"task": "gsm8k"}}},
        out=f"{tmp_path}/run",
    )
    trained = Trained(3, [], {"python": "3.12", "machine": "x86_64"})
    card = model_card(recipe, trained, "AutoModelForCausalLM", "out", "me/model")
    head, settings = head_and_recipe(card)
    assert head["base_model"] == "me/base" and head["datasets"] == ["openai/gsm8k"]
    assert settings["data"]["train"] == {"train.jsonl": 0.5, "other.jsonl#train": 0.5}
    assert settings["data"]["test"] == "python:rows"
    assert settings["reward"]["terms"][0]["function"] == "mine.py:close"
    assert settings["data"]["system"] == "/no_think Reason."
    assert "'/no_think Reason.'" in card and "enable_thinking=False" in card
    assert "stop=['END']" in card and 'from_pretrained("me/model"' in card
    for word in (str(tmp_path), "memory:", "inside:8000", "x86_64"):
        assert word not in card, word


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the hub that an upload asks, on this machine."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        address = f"http://localhost:{self.server.server_port}/me/model"
        answer = {}
        if self.path == self.server.refused:
            self.send_response(403)
        else:
            self.send_response(200)
        if self.path == "/api/repos/create":
            answer = {"url": address}
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            answer = {"files": [{"path": file["path"]} | mode for file in files]}
        elif self.path.endswith("/commit/main"):
            answer = {"commitUrl": f"{address}/commit/1", "commitOid": "1", "success": True}
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("localhost", 0), Hub) as server:
        server.asked, server.refused = [], None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://localhost:{server.server_port}"
        monkeypatch.setattr(hub_constants, "ENDPOINT", address)
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
        server.shutdown()


def test_an_export_is_uploaded(run, hub, capsys):
    assert main(["export", str(run.folder), "--push-to-hub", "me/model", "--private"]) == 0
    assert f"pushed: {hub_constants.ENDPOINT}/me/model" in capsys.readouterr().out
    assert all(token == "Bearer hf_secret" for _, token, _ in hub.asked)
    bodies = {path: body for path, _, body in hub.asked}
    created = json.loads(bodies["/api/repos/create"])
    assert (created["organization"], created["name"]) == ("me", "model")
    assert created.get("visibility") == "private" or created.get("private") is True
    lines = bodies["/api/models/me/model/commit/main"].splitlines()
    sent = [json.loads(line)["value"] for line in lines[1:]]
    stored = {path.name for path in (run.checkpoint / "policy").iterdir()}
    assert {file["path"] for file in sent} == stored | {"README.md"}


def test_a_refusal_and_a_missing_token_are_sentences(run, hub, monkeypatch):
    hub.refused = "/api/repos/create"
    with pytest.raises(RuntimeError, match="push to .*/me/model failed: ") as error:
        run.push_to_hub("me/model")
    assert "403" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", "/nowhere")
    with one_sentence(["expected a token of the hub", "hf auth login"]):
        run.push_to_hub("me/model")
