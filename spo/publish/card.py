"""The model card of an exported policy: what it is, what it reached, how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spo import named
from spo.config.data import PROBLEM
from spo.config.evaluation import TEST
from spo.config.recipe import Recipe, as_tree, evaluation_sets
from spo.metrics import plus_minus, scored
from spo.tasks import sources_of, task_of
from spo.tasks.memory import PREFIX
from spo.tasks.sources import hub_id

HOME = "https://github.com/spo-kernels/spo-kernels"
CITATION = """@article{guo2025segment,
  title={Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large Language Models},
  author={Guo, Yiran and Xu, Lijie and Liu, Jie and Ye, Dan and Qiu, Shuang},
  journal={arXiv preprint arXiv:2505.23564},
  year={2025}
}"""  # noqa: E501
PRIVATE = {"out", "addresses"}  # settings that say something about machines alone
TEXTS = {"template", "system", "messages", "chat_options", "stop"}  # which are no paths


@dataclass(frozen=True)
class Trained:
    """What a run says about one of its policies."""

    iteration: int  # iterations that it was trained for
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl, up to that iteration
    versions: Mapping[str, str]


def model_card(recipe: Recipe, trained: Trained, auto: str, folder: str, name: str | None) -> str:
    """A README.md with the YAML front matter of the hub.

    Args:
        auto: the class of transformers that loads the policy.
        folder: in which the policy lies, for the examples.
        name: the policy's hub id if it has one, which the examples then load.
    """
    base, evals = _base(recipe), [x for x in trained.lines if x["stage"] == "eval"]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base:
        head["base_model"] = base
    if data := _data_sets(recipe):
        head["datasets"] = data
    head["tags"] = ["spo-kernels", "reinforcement-learning"]
    start = f"`{_last(recipe.policy.path)}`"
    if base:
        start = f"[{base}](https://huggingface.co/{base})"
    title = (name or recipe.name).rpartition("/")[2]
    generated = max((x["generated_tokens"] for x in trained.lines), default=0)
    made = ", ".join(f"{k} {v}" for k, v in trained.versions.items() if k != "machine")
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}",
        f"{start}, trained on the task `{_last(recipe.task)}` with [spo-kernels]({HOME}): "
        f"{trained.iteration:,} iterations, {generated:,} generated tokens, recipe "
        f"`{recipe.name}` (shape `{_last(recipe.shape_kind)}`, credit "
        f"`{_last(recipe.credit_type)}`).",
        *(_figures(recipe, evals, trained.iteration) if evals else []),
        "## Load it",
        _examples(recipe, auto, name or folder),
        "## Recipe",
        _details("All settings", f"````yaml\n{public_yaml(recipe)}````"),
        f"Made with {made}.",
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def public_yaml(recipe: Recipe) -> str:
    """The resolved recipe without what belongs to one machine.

    Of absolute paths the last part is kept. Rows and functions of a Python caller are `python:`.
    """
    return yaml.safe_dump(_public(as_tree(recipe)), sort_keys=False, allow_unicode=True)


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            _public(key): item if key in TEXTS else _public(item)
            for key, item in value.items()
            if key not in PRIVATE
        }
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(PREFIX):
        return f"{named.GIVEN}rows"
    if value.startswith(named.GIVEN):
        return value.partition("#")[0]
    return _last(value) if os.path.isabs(value) or value.startswith("~") else value


def _last(path: str) -> str:
    return os.path.basename(path.rstrip("/"))


def _base(recipe: Recipe) -> str | None:
    """The hub id of the start policy; None for a folder, except one of the hub's cache."""
    source = recipe.policy.source
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", source)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith(".")
    return source if hub and not Path(source).exists() else None


def _data_sets(recipe: Recipe) -> list[str]:
    """The hub ids of the data sets that it was trained and tested on."""
    found = list(sources_of(recipe, task_of(recipe), "train"))
    for one in evaluation_sets(recipe).values():
        found += sources_of(one, task_of(one), "test")
    return list(dict.fromkeys(filter(None, map(hub_id, found))))


def _figures(recipe: Recipe, evals: Sequence[Mapping[str, Any]], iteration: int) -> list[str]:
    """The last evaluation as a table, how it was measured, and the curve."""
    last = evals[-1]
    keys = scored(last)
    rows = []
    for key in keys:
        problems = last["/".join([*key.split("/")[:-1], "problems"])]
        rows.append([f"`{key}`", plus_minus(last[key], last[f"{key}_stderr"]), f"{problems:,}"])
    sampling, evaluation = recipe.sampling, recipe.eval
    how = f"Responses have at most {sampling.max_new_tokens:,} tokens."
    if evaluation.sampled:
        off = {"top_p": 1, "top_k": 0, "min_p": 0}
        cut = {name: getattr(evaluation, name) for name in off}
        how += f" Sampled figures: temperature {sampling.temperature:g}" + "".join(
            f", {name} {value:g}" for name, value in cut.items() if value != off[name]
        )
        counts = [
            f"{one.eval.samples} of each problem" + (f" of {name}" if name != TEST else "")
            for name, one in evaluation_sets(recipe).items()
        ]
        how += f", {', '.join(counts)}."
    late = iteration - last["iteration"]
    if late:
        how += f" Measured {late:,} iteration{'s' * (late > 1)} before these weights."
    curve = [
        [f"{x['iteration']:,}", f"{x['generated_tokens']:,}"]
        + [plus_minus(x[key], x[f"{key}_stderr"]) if key in x else "" for key in keys]
        for x in evals
    ]
    return [
        "## Figures",
        _table(["figure", "mean ± standard error", "problems"], rows),
        how,
        _details("All evaluations", _table(["iteration", "generated tokens", *keys], curve)),
    ]


def _examples(recipe: Recipe, auto: str, name: str) -> str:
    """Transformers and vLLM, from the same token ids; greedy, as the figure is."""
    data, most = recipe.data, recipe.sampling.max_new_tokens
    trusted = ", trust_remote_code=True" if recipe.policy.trust_remote_code else ""
    loaded = json.dumps(name) + trusted
    stop = f", stop={list(recipe.sampling.stop)!r}" if recipe.sampling.stop else ""
    if data.chat:
        options = dict(data.chat_options)
        if data.thinking is not None:
            options["enable_thinking"] = data.thinking
        given = "".join(f", {key}={value!r}" for key, value in options.items())
        prompt = [
            f"messages = {list(data.chat)!r}  # with the problem in place of {PROBLEM}",
            "text = tokenizer.apply_chat_template(",
            f"    messages, add_generation_prompt=True, tokenize=False{given}",
            ")",
        ]
    else:
        text = json.dumps(data.template, ensure_ascii=False)
        prompt = [f"text = {text}  # with the problem in place of {PROBLEM}"]
    code = [
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({loaded})",
        f'model = {auto}.from_pretrained({loaded}, dtype="auto")',
        *prompt,
        'ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids',
        f"output = model.generate(ids, max_new_tokens={most}, do_sample=False)",
        "print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))",
        "```",
        "",
        "In vLLM, from the same `ids`:",
        "",
        "```python",
        "from vllm import LLM, SamplingParams",
        "",
        f"llm = LLM({loaded})",
        f"sampling = SamplingParams(temperature=0, max_tokens={most}{stop})",
        '(output,) = llm.generate({"prompt_token_ids": ids[0].tolist()}, sampling)',
        "print(output.outputs[0].text)",
        "```",
    ]
    return "\n".join(code)


def _details(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
