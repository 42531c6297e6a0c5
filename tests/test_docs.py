"""What docs/extend.md shows is run as it stands."""

import re
from pathlib import Path

from spo import load_recipe, train

PAGE = Path(__file__).parents[1] / "docs" / "extend.md"
SMALL = [
    "engine={name: hf, max_num_seqs: 32, max_model_len: 96}",
    "sampling.max_new_tokens=40",
    "shape={widths: [2, 2], segment_tokens: [8]}",
    "train={iterations: 1, prompts: 8, minibatches: 1}",
    "eval={every: 0, problems: 4}",
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_your_own_task_and_rule(tmp_path):
    task, rule = blocks("python")
    (tmp_path / "doubles.py").write_text(task)
    (tmp_path / "signs.py").write_text(rule)
    of_task, of_rule = blocks("yaml")
    (tmp_path / "task.yaml").write_text(of_task)
    (tmp_path / "rule.yaml").write_text(of_rule)
    recipe = load_recipe(tmp_path / "task.yaml")
    assert recipe.task == f"{tmp_path / 'doubles.py'}:Doubles"
    from spo.tasks import task_of

    problems = list(task_of(recipe).problems("test", 0))
    assert [p.answer for p in problems] == [2, 4, 6, 8, 10]
    assert task_of(recipe).grade(" 4 ", 4) and not task_of(recipe).grade("5", 4)
    lines = train(tmp_path / "rule.yaml", [*SMALL, f"out={tmp_path / 'run'}"])
    (trained,) = (line for line in lines if line["stage"] == "train")
    assert trained["mean_abs_advantage"] > 0 and trained["skipped_steps"] == 0
