"""What docs/extend.md shows is run as it stands."""

import re
from pathlib import Path

from spo import load_recipe, train
from spo.tasks import task_of

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


def test_your_own_task_rule_and_shape(tmp_path):
    for name, code in zip(("doubles", "signs", "fork"), blocks("python"), strict=True):
        (tmp_path / f"{name}.py").write_text(code)
    for name, text in zip(("task", "rule", "shape"), blocks("yaml"), strict=True):
        (tmp_path / f"{name}.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "task.yaml")
    assert recipe.task == f"{tmp_path / 'doubles.py'}:Doubles"
    problems = list(task_of(recipe).problems("test", 0))
    assert len(problems) == 20 and {p.answer for p in problems} <= {2, 4, 6, 8, 10}
    assert task_of(recipe).grade("<answer> 4 </answer>", 4) and not task_of(recipe).grade("4", 4)
    for name in ("task", "rule", "shape"):
        small = [s for s in SMALL if name != "shape" or not s.startswith("shape=")]
        lines = train(tmp_path / f"{name}.yaml", [*small, f"out={tmp_path / name}"])
        (trained,) = (line for line in lines if line["stage"] == "train")
        assert trained["skipped_steps"] == 0
        assert trained["mean_abs_advantage"] > 0 or name == "task"  # too easy, or too hard
