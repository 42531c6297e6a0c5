"""Several evaluation sets in a run, what each is drawn from, and how their samples are drawn."""

import json

import pytest
from sentences import one_sentence

import spo
from spo.config.policy import EMBEDDED, PolicyConfig
from spo.config.recipe import evaluation_sets, load_recipe, save_recipe
from spo.engines.hf import HFEngine
from spo.grow.sampler import Sampler
from spo.metrics import read_metrics, scored
from spo.models.tokenizer import load_tokenizer
from spo.plan import describe
from spo.tasks import prompts, prompts_of

SMALL = [
    "engine={name: hf, max_num_seqs: 64, max_model_len: 128}",
    "sampling.max_new_tokens=40",
    "shape={widths: [2, 2], segment_tokens: [8]}",
    "train={iterations: 1, prompts: 2, minibatches: 1}",
]
LONGER = "{data: {options: {operations: 7}}, problems: 3}"
SETS = f"{{longer: {LONGER}, other: {{task: countdown, samples: 2}}}}"
OWN = """
from dataclasses import dataclass
from spo.tasks import Problem

@dataclass(frozen=True)
class Any:
    right: bool = True

    def problems(self, split, seed):
        yield from [Problem("arithmetic 3 + 4 - 2 + 5 * 3\\n", 0)] * 4

    def grade(self, text, answer):
        return self.right
"""


class Recording(HFEngine):
    """Remembers the requests."""

    def submit(self, request):
        vars(self).setdefault("asked", []).append(request)
        super().submit(request)


@pytest.fixture(scope="module")
def engine():
    built = Recording(str(EMBEDDED), max_num_seqs=64, max_model_len=128)
    yield built
    built.close()


def test_every_set_has_figures_in_metrics_results_and_report(engine, tmp_path, capsys):
    evals = f"eval={{every: 0, problems: 4, samples: 3, top_p: 0.9, sets: {SETS}}}"
    engine.asked = []
    lines = spo.train("spo-tree", [*SMALL, evals, f"out={tmp_path}"], engine=engine).metrics
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    pairs = [f"pass_at_{k}" for k in (2, 3)]
    assert scored(first) == [
        *("greedy", "sampled", *pairs, "majority"),
        *(f"longer/{key}" for key in ("greedy", "sampled", *pairs, "majority")),
        *(f"other/{key}" for key in ("greedy", "sampled", "pass_at_2", "majority")),
    ]
    assert [first[f"{at}problems"] for at in ("", "longer/", "other/")] == [4, 3, 4]
    # Of all requests only those of evaluations with samples truncate.
    cut = [r for r in engine.asked if r.sampling.truncates]
    assert {r.n for r in cut} == {3, 2} and {r.sampling.top_p for r in cut} == {0.9}
    assert all(r.max_new_tokens == 40 and r.prompt_size == len(r.prefix_ids) for r in cut)
    assert len(cut) == 2 * (4 + 3 + 4)
    rows = spo.evaluate("spo-tree", [*SMALL, evals], checkpoint=tmp_path, engine=engine)
    kinds = [(row.set, row.samples, row.truncation) for row in rows]
    drawn = {"top_p": 0.9}
    assert kinds == [
        *(("test", 1, {}), ("test", 3, drawn), ("longer", 1, {}), ("longer", 3, drawn)),
        *(("other", 1, {}), ("other", 2, drawn)),
    ]
    last = lines[-1]
    assert [row.pass_at_1 for row in rows[::2]] == [
        last["greedy"],
        last["longer/greedy"],
        last["other/greedy"],
    ]
    assert rows[3].majority == last["longer/majority"]
    from spo.cli import show
    from spo.report.pages import write_run_page

    page = write_run_page(tmp_path).read_text()
    assert page.count('<th scope="row">') == 3 and "spo-tree, longer</th>" in page
    show("run", last)
    assert "longer/majority" in capsys.readouterr().out


def test_sets_of_one_task_are_graded_by_their_own_settings(engine, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "r.yaml").write_text(
        "task: ./own.py:Any\neval: {problems: 4, samples: 2, sets: {never: "
        "{task: ./own.py:Any, data: {options: {right: false}}}}}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml", SMALL)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    always, _, never, _ = spo.evaluate(recipe, engine=engine)
    assert always.pass_at_1 > 0 == never.pass_at_1
    sampled = spo.evaluate(recipe, engine=engine)[1]
    assert sampled.pass_at and sampled.majority is None  # its task finds no answers


def test_what_a_set_keeps_of_the_recipe(tmp_path):
    chat = "data={train: a, test: b, max_prompt_tokens: 9, system: Hi.}"
    sets = "eval.sets={again: {data: {test: c}}, other: {task: aime24, problems: 7}}"
    own, again, other = evaluation_sets(load_recipe(None, ["task=gsm8k", chat, sets])).values()
    assert (own.data.test, again.data.test, other.data.test) == ("b", "c", None)
    assert (again.data.train, other.data.train, other.data.max_prompt_tokens) == ("a", None, None)
    assert {one.data.system for one in (own, again, other)} == {"Hi."}
    assert (again.task, other.task) == ("gsm8k", "aime24")
    assert (again.eval.problems, other.eval.problems) == (200, 7)


def test_a_dry_run_counts_and_names_the_sets():
    text = describe(load_recipe("spo-tree", [*SMALL, f"eval={{problems: 4, sets: {SETS}}}"]))
    tokens = 40 * (4 * 2 + 3 * 2 + 4 * 3)
    assert f"evaluations of at most {tokens:,} tokens" in text
    assert "longer  generated" in text and "other   generated" in text


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ("{a/b: {}}", ["eval.sets", "'a/b'"]),
        ("{test: {}}", ["eval.sets", "'test'"]),
        ("{x: {task: nothing}}", ["eval.sets.x", "nothing"]),
        ("{x: {data: {tests: y}}}", ["eval.sets.x.data.tests", "template"]),
        ("{x: {data: {options: {operations: 0}}}}", ["eval.sets.x.data.options.operations"]),
        ("{x: {problem: 3}}", ["eval.sets.x.problem", "samples"]),
        ("{x: 3}", ["eval.sets.x"]),
    ],
)
def test_bad_sets_are_named(sets, words):
    with one_sentence(words):
        load_recipe("spo-tree", [f"eval.sets={sets}"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("eval={sampled: false, samples: 4}", ["eval.samples", "eval.sampled=false"]),
        ("eval={sampled: false, top_k: 4}", ["eval.top_k", "eval.sampled=false"]),
        ("eval={sampled: false, sets: {x: {samples: 4}}}", ["eval.samples"]),
        ("eval.top_p=0", ["eval.top_p", "0"]),
        ("eval.min_p=1.5", ["eval.min_p", "1.5"]),
    ],
)
def test_settings_of_evaluations_that_contradict_each_other(setting, words):
    with one_sentence(words):
        load_recipe("spo-tree", [setting])


def test_a_set_without_problems_is_named(engine):
    recipe = load_recipe(
        "spo-tree", [*SMALL, "eval.sets={x: {task: gsm8k, data: {test: nowhere}}}"]
    )
    with Sampler(recipe, engine=engine) as sampler, one_sentence(["nowhere"]):
        sampler.test_prompts("x")


def test_a_subset_of_a_file_is_drawn_the_same_in_all_runs(tmp_path):
    rows = [{"question": f"arithmetic {i} + 2", "answer": f"#### {i}"} for i in range(20)]
    path = tmp_path / "sorted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(PolicyConfig())
    base = ["task=gsm8k", f"data.test={path}"]

    def drawn(most, *more):
        found = prompts_of(load_recipe(None, [*base, *more]), "test", tokenizer, most=most)
        return [int(prompt.answer) for prompt in found]

    eight = drawn(8)
    assert len(eight) == 8 and eight == sorted(eight) and eight != list(range(8))
    assert set(drawn(5)) < set(eight) and eight == drawn(8, "train.seed=5")
    assert drawn(20) == drawn(50) == list(range(20))
    assert max(eight) > 12  # not the head of the file


def test_a_generated_test_split_begins_as_it_did():
    tokenizer = load_tokenizer(PolicyConfig())
    found = list(prompts_of(load_recipe("spo-tree"), "test", tokenizer, most=6))
    stream = prompts("arithmetic", "test", 0, tokenizer)
    assert found == [next(stream) for _ in range(6)]
