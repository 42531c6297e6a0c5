"""`reward.simplified` and `grading.workers` of a recipe."""

import pytest
import yaml

from spo.config.recipe import as_tree, load_recipe, shipped_recipes
from spo.tasks import task_of


def test_it_is_the_option_of_the_task():
    recipe = load_recipe(None, ["task=math", "reward.simplified=true"])
    assert recipe.reward is None and recipe.data.options == {"simplified": True}
    assert task_of(recipe).grade(r"\boxed{12}", "12")
    assert not task_of(recipe).grade(r"\boxed{5+7}", "12")
    assert load_recipe(recipe, ["reward.simplified=false"]).data.options == {"simplified": False}
    assert load_recipe(None, ["task=math", "reward.simplified=false"]).data.options == {}
    assert load_recipe(recipe) == recipe


def test_the_recipes_of_math_have_it():
    names = [name for name, path in shipped_recipes().items() if "task: math" in path.read_text()]
    assert len(names) >= 4
    for name in names:
        assert task_of(load_recipe(shipped_recipes()[name])).simplified


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["task=math", "reward={simplified: true, rule: boxed}"], "expected no other reward"),
        (["task=math", "reward.simplified=much"], "expected true or false, found 'much'"),
        (["task=gsm8k", "reward.simplified=true"], "simplified"),
    ],
)
def test_what_cannot_be_is_one_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_recipe(None, overrides)


def test_the_rule_has_it_as_an_option():
    reward = {"rule": "boxed", "options": {"simplified": True}}
    recipe = load_recipe(None, ["task=math"], reward=reward)
    from spo.reward import reward_of
    from spo.signatures import Response

    judge = reward_of(recipe.reward)
    for text, worth in ((r"\boxed{12}", 1.0), (r"\boxed{5+7}", 0.0)):
        response = Response(
            prompt="",
            response=text,
            answer="12",
            columns={},
            response_ids=[],
            truncated=False,
            has_answer=True,
        )
        assert judge(response).reward == worth


def test_workers_are_a_setting(tmp_path):
    recipe = load_recipe(None, ["grading.workers=3"])
    assert recipe.grading.workers == 3 and load_recipe(None).grading.workers is None
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(as_tree(recipe)))
    assert load_recipe(tmp_path / "again.yaml").grading == recipe.grading
    with pytest.raises(ValueError, match="grading.workers"):
        load_recipe(None, ["grading.workers=0"])
