"""Problems, worked solutions and graders of the embedded tasks."""

import itertools
import json
import random
import subprocess
import sys
from fractions import Fraction
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import one_sentence

from spo.named import OWN
from spo.tasks import Problem, arithmetic, countdown, get_task, knights_knaves, point24, prompts
from spo.tasks.answers import boxed_answers, exact_number, last_boxed
from spo.tasks.problem import TEST_SIZE, answer_span, stream

NAMES = ["arithmetic", "countdown", "knights_knaves"]  # those with endless problems and solutions


MODULES = {"arithmetic": arithmetic, "countdown": countdown, "knights_knaves": knights_knaves}


def take(task: str, split: str, seed: int, count: int, **options) -> list[Problem]:
    return list(islice(get_task(task, options).problems(split, seed), count))


def grade(task: str, text: str, answer: object) -> bool:
    return get_task(task).grade(text, answer)


def answered(text: str) -> str:
    return f"<answer> {text} </answer>"


# Streams


@pytest.mark.parametrize("task", NAMES)
def test_a_stream_follows_from_its_seed(task):
    assert take(task, "train", 3, 200) == take(task, "train", 3, 200)
    assert take(task, "train", 3, 200) != take(task, "train", 4, 200)


def test_a_split_without_problems_is_one_sentence():
    def drawn(split):
        return next(stream("few", split, 0, lambda rng: Problem("only", 1), lambda p: p.text))

    assert drawn("train").text == "only"
    with one_sentence(["few: expected more distinct problems", "none for test"]):
        drawn("test")


@pytest.mark.parametrize("task", NAMES)
def test_problems_are_distinct_and_answers_are_json(task):
    problems = take(task, "train", 0, 3000)
    assert len({p.text for p in problems}) == 3000
    assert all(json.loads(json.dumps(p.answer)) == p.answer for p in problems)


@pytest.mark.parametrize("task", NAMES)
def test_the_test_split_is_fixed_and_apart_from_every_training_stream(task):
    test = take(task, "test", 0, 2000)
    assert len({p.text for p in test}) == TEST_SIZE == 1000
    assert take(task, "test", 99, 20) == test[:20]
    for seed in range(3):
        assert not {p.text for p in test}.intersection(
            p.text for p in take(task, "train", seed, 4000)
        )


def test_reordered_numbers_are_no_new_countdown_problem():
    def key(problem):
        return (*sorted(problem.answer["numbers"]), problem.answer["target"])

    test = {key(p) for p in take("countdown", "test", 0, TEST_SIZE)}
    train = [key(p) for p in take("countdown", "train", 0, 4000)]
    assert len(test) == TEST_SIZE and len(set(train)) == 4000
    assert not test.intersection(train)


def test_streams_do_not_depend_on_the_hash_seed_of_the_process():
    script = (
        "from itertools import islice; from spo.tasks import get_task\n"
        f"for t in map(get_task, {[*NAMES, 'point24']}):\n"
        "    print([p.text for s in ('train', 'test') for p in islice(t.problems(s, 5), 20)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p or "." for p in sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_used_up_space_starts_again_in_training_and_ends_in_testing():
    def draw(rng):
        return Problem(str(rng.randrange(40)), 0)

    test = list(stream("tiny", "test", 0, draw, lambda p: p.text))
    train = [p.text for p in islice(stream("tiny", "train", 0, draw, lambda p: p.text), 100)]
    size = 40 - len(test)
    assert 0 < len(test) < 40 and len(set(train[:size])) == size
    assert {p.text for p in test}.isdisjoint(train)


def test_an_unknown_split_task_or_size_is_refused():
    for task in ("arithmetic", "gsm8k"):
        with pytest.raises(ValueError, match='split: expected "train" or "test", found \'dev\''):
            get_task(task).problems("dev", 0)
    known = "aime24, arithmetic, countdown, gsm8k, knights_knaves, math, point24, .* found 'chess'"
    with pytest.raises(ValueError, match=known):
        get_task("chess")
    with pytest.raises(ValueError, match=known):
        prompts("chess", "train", 0, None)
    for task, options, words in (
        ("countdown", {"numbers": 5}, "data.options.numbers: .* less than or equal to 4, found 5"),
        ("countdown", {"numbers": 1}, "data.options.numbers: .* greater .* to 2, found 1"),
        ("arithmetic", {"operations": 0}, "data.options.operations.*: .* greater .* 1, found 0"),
        ("knights_knaves", {"people": 1}, "data.options.people: .* greater .* to 2, found 1"),
        ("knights_knaves", {"people": 9}, "data.options.people: .* less .* to 8, found 9"),
        ("point24", {"numbers": 4}, "unknown key data.options.numbers; known here: none"),
    ):
        with pytest.raises(ValueError, match=words):
            get_task(task, options)


def test_importing_the_tasks_imports_nothing_heavy():
    tasks = " ".join(f"import {place.partition(':')[0]};" for place in OWN["task"].values())
    heavy = {"torch", "datasets", "pyarrow", "pandas", "pydantic", "huggingface_hub"}
    script = f"import sys, spo.tasks.grading; {tasks} sys.exit(str({heavy} & {{*sys.modules}}))"
    env = {"PYTHONPATH": ":".join(p or "." for p in sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert ran.stderr == "set()\n"


# Solutions


def rate(task: str, problems: list[Problem], **habits: float) -> float:
    rng = random.Random(0)
    texts = [MODULES[task].solution(p, rng, **habits) for p in problems]
    return sum(grade(task, t, p.answer) for t, p in zip(texts, problems, strict=True)) / len(texts)


@pytest.mark.parametrize(
    "task, options, habits",
    [
        ("arithmetic", {}, {"merge": 0.0}),
        ("arithmetic", {}, {"merge": 1.0}),
        ("arithmetic", {"operations": 10}, {"merge": 0.0}),
        ("arithmetic", {"operations": 10}, {"merge": 0.5, "most": 10}),
        ("countdown", {}, {"give_up": 0.0}),
        ("countdown", {"numbers": 2}, {"wrong": 0.0}),
        ("countdown", {"numbers": 4}, {"give_up": 0.0}),
        ("knights_knaves", {}, {"give_up": 0.0}),
        ("knights_knaves", {"people": 2}, {"wrong": 0.0}),
        ("knights_knaves", {"people": 8}, {"give_up": 0.0}),
    ],
)
def test_solutions_without_the_bad_habit_are_right(task, options, habits):
    assert rate(task, take(task, "train", 0, 60, **options), **habits) == 1.0


@pytest.mark.parametrize("task", ["countdown", "knights_knaves"])
def test_giving_up_at_once_after_wrong_attempts_only_fails(task):
    assert rate(task, take(task, "train", 0, 200), wrong=1.0, give_up=1.0) == 0.0


def test_arithmetic_solution_worked_by_hand():
    problem = Problem("arithmetic 15 - 9 + 6 * 7\n", 4)
    assert arithmetic.solution(problem, random.Random(0), merge=0.0) == (
        "15 - 9 = 6\n6 + 6 = 12\n12 * 7 = 4\n<answer> 4 </answer>"
    )
    assert arithmetic.solution(problem, random.Random(0), merge=1.0) == (
        "15 - 9 + 6 = 12\n12 * 7 = 4\n<answer> 4 </answer>"
    )
    longer = Problem("arithmetic 15 - 9 + 6 * 7 + 2\n", 6)
    assert arithmetic.solution(longer, random.Random(0), merge=1.0) == (
        "15 - 9 + 6 = 12\n12 * 7 = 4\n4 + 2 = 6\n<answer> 6 </answer>"  # never a second merge
    )
    assert arithmetic.solution(longer, random.Random(0), merge=1.0, most=2) == (
        "15 - 9 + 6 = 12\n12 * 7 + 2 = 6\n<answer> 6 </answer>"
    )


@pytest.mark.parametrize("options, most", [({}, 6), ({"operations": 9}, 9)])
def test_arithmetic_answers_are_the_chains(options, most):
    fewest = options.get("operations", 4)
    for problem in take("arithmetic", "train", 0, 300, **options):
        _, first, *rest = problem.text.split()
        value = int(first)
        for operator, operand in zip(rest[::2], rest[1::2], strict=True):
            value = {"+": value.__add__, "-": value.__sub__, "*": value.__mul__}[operator](
                int(operand)
            )
        # Reducing modulo 20 once at the end is the same, all operations being in the ring.
        assert value % 20 == problem.answer
        assert fewest <= len(rest) // 2 <= most


def test_attempts_of_a_countdown_solution_are_true_equations():
    rng = random.Random(0)
    for problem in take("countdown", "train", 0, 200):
        *steps, last = countdown.solution(problem, rng).split("\n")
        assert len(steps) <= 2 * countdown.ATTEMPTS
        for step in steps:
            left, right = step.removesuffix(" no").split(" = ")
            assert countdown.evaluate(left.split()) == int(right)
        final = int(steps[-1].split(" = ")[1])
        assert countdown.evaluate(answer_span(last).split()) == final
        assert (final == problem.answer["target"]) == grade("countdown", last, problem.answer)


@pytest.mark.parametrize("numbers", [3, 4])
def test_plans_find_what_an_independent_search_finds(numbers):
    """All orders, all operators and every way to bracket, evaluated as fractions."""

    def combine(values):
        if len(values) == 1:
            yield values[0]
        for cut in range(1, len(values)):
            for a, b in itertools.product(combine(values[:cut]), combine(values[cut:])):
                whole = [a + b, a * b, a - b, *([a / b] if b else [])]
                yield from (v for v in whole if v.denominator == 1 and 0 <= v <= 100)

    rng = random.Random(numbers)
    for _ in range(3):
        given_numbers = tuple(sorted((rng.randint(1, 20) for _ in range(numbers)), reverse=True))
        expected = set()
        for order in set(itertools.permutations(map(Fraction, given_numbers))):
            expected.update(map(int, combine(order)))
        assert {plan[-1][3] for plan in countdown.plans(given_numbers)} == expected


def test_knights_and_knaves_by_hand():
    # Bob's claim is true of a knight and false of a knave only if Ann is what he says.
    problem = Problem(
        "knights_knaves Ann says Ann is knave and Bob is knight . Bob says Ann is knave .\n", None
    )
    statements = knights_knaves._parse(problem.text)
    assert statements == [("and", ((0, False), (1, True))), ("", ((0, False),))]
    # Ann a knight would be a knave; so she lies, hence Bob, right about her, would make her right.
    assert knights_knaves.solve(statements) == []
    # "Ann is knave or Bob is knave" makes Ann a knight (a knave would speak true) and Bob a knave.
    assert knights_knaves.solve([("or", ((0, False), (1, False))), ("", ((0, False),))]) == [
        (True, False)
    ]


@pytest.mark.parametrize("people", [2, 3, 5, 8])
def test_exactly_one_assignment_fits_every_puzzle(people):
    for problem in take("knights_knaves", "train", 1, 10, people=people):
        assert problem.answer["people"] == list(knights_knaves.PEOPLE[:people])
        fitting = []
        for roles in itertools.product("NV", repeat=people):
            role = dict(zip(problem.answer["people"], roles, strict=True))
            says = problem.text.split(" ", 1)[1].strip().split(" .")[:-1]
            for sentence in says:
                speaker, _, claim = sentence.strip().split(" ", 2)
                truths = [
                    role[name] == ("N" if what == "knight" else "V")
                    for name, _, what in (
                        atom.split() for part in claim.split(" and ") for atom in part.split(" or ")
                    )
                ]
                truth = any(truths) if " or " in claim else all(truths)
                if truth != (role[speaker] == "N"):
                    break
            else:
                fitting.append([name for name, what in role.items() if what == "N"])
        assert fitting == [problem.answer["knights"]]


# Graders


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<answer> 7 </answer>", True),
        ("<answer>7</answer> and more", True),
        ("<answer> 3 </answer>\n<answer> 07 </answer>", True),
        ("<answer> 7 </answer> <answer> 8 </answer>", False),
        ("7", False),
        ("<answer> 7", False),
        ("<answer> -7 </answer>", False),
        ("<answer> 7 7 </answer>", False),
        ("<answer> 7.0 </answer>", False),
        ("<answer> \u0667 </answer>", False),
    ],
)
def test_arithmetic_grades(text, expected):
    assert grade("arithmetic", text, 7) is expected


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("( 12 - 7 ) * 3", True),
        ("(12-7)*3", True),
        ("3*((12)-7)", True),
        ("12 - 7 * 3", False),  # precedence: -9
        ("3 * 12 - 7", False),  # 29
        ("( 12 - 7 ) * 3 = 15", True),
        ("15 = ( 12 - 7 ) * 3", True),
        (r"(12 - 7) \times 3", True),
        (r"\boxed{(12 - 7) \cdot 3}", True),
        ("( 12 - 7 ) * 3 = 16", False),
        ("( 12 - 7 ) * 3 = 15 = 15", False),
        ("15 = 15", False),
        ("12 + 3", False),  # a number is missing
        ("( 12 - 7 ) * 3 * 1", False),  # one too many
        ("( 12 - 7 ) * 03", False),  # not as given
        ("1 2 - 7 * 3", False),
        ("15", False),
        ("3 * - ( 7 - 12 )", True),
        ("- ( 7 - 12 ) * 3", True),
        ("( 12 - 7 ) * 3 -", False),
        ("( 12 - 7 ) 3", False),
        ("( 12 - 7 ) ** 3", False),
        ("", False),
    ],
)
def test_countdown_grades(expression, expected):
    answer = {"numbers": [7, 3, 12], "target": 15}
    assert grade("countdown", answered(expression), answer) is expected


def test_countdown_is_exact():
    third = {"numbers": [1, 3, 3, 1], "target": 1}
    assert grade("countdown", answered("1 / 3 * 3 * 1"), third)
    assert grade(
        "countdown", answered("8 / ( 3 - 8 / 3 )"), {"numbers": [8, 3, 8, 3], "target": 24}
    )
    assert not grade("countdown", answered("3 / ( 1 - 1 )"), {"numbers": [1, 1, 3], "target": 3})


@st.composite
def expression_tree(draw, depth=4):
    """An expression as text and its value as Fraction, None where it divides by zero."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(0, 30))
        return str(number), Fraction(number)
    left, a = draw(expression_tree(depth=depth - 1))
    right, b = draw(expression_tree(depth=depth - 1))
    operator = draw(st.sampled_from("+-*/"))
    if a is None or b is None or (operator == "/" and b == 0):
        value = None
    else:
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator]
    return f"( {left} {operator} {right} )", value


@settings(max_examples=150, deadline=None)
@given(expression_tree())
def test_evaluate_agrees_with_the_tree_that_was_written_down(pair):
    text, value = pair
    assert countdown.evaluate(text.split()) == value


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 30))))
def test_evaluate_knows_precedence_without_brackets(first, rest):
    total, term, sign = Fraction(0), Fraction(first), 1
    for operator, number in rest:  # sums of products, by hand
        if operator in "+-":
            total, term, sign = total + sign * term, Fraction(number), 1 if operator == "+" else -1
        else:
            term = term * number if operator == "*" else term / number
    tokens = [str(first), *(t for operator, number in rest for t in (operator, str(number)))]
    assert countdown.evaluate(tokens) == total + sign * term


@pytest.mark.parametrize(
    "text", ["", "(", ")", "1 +", "+ 1", "1 1", "( )", "1 ( 2 )", "( 1", "1 )"]
)
def test_malformed_expressions_have_no_value(text):
    assert countdown.evaluate(text.split()) is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Ann Cat", True),
        ("Cat, Ann", True),
        ("Ann and Cat", True),
        ("ann AND cat", True),
        ("Ann is a knight, Bob is a knave and Cat is a knight.", True),
        ("Bob: knave; Ann: knight; Cat: knight", True),
        ("Knights: Ann, Cat; Knaves: Bob", True),
        ("Knights are Ann and Cat, knave is Bob", True),
        ("Knights: Ann, Bob; Knaves: Cat", False),
        ("Knights: Ann, Cat, Bob; Knaves: Bob", False),
        ("Knights: Ann, Cat", False),  # Bob's role is missing
        ("nobody", False),
        ("Ann Cat nobody", False),
        ("Ann? Cat?", False),
        ("Ann", False),
        ("Ann Bob Cat", False),
        ("Ann Ann Cat", False),
        ("Ann is a knight, Cat is a knight", False),  # Bob's role is missing
        ("Ann is a knight, Bob is a knight, Cat is a knight", False),
        ("Ann is a knight, Ann is a knave, Cat is a knight", False),
        ("none", False),
        ("", False),
    ],
)
def test_knights_and_knaves_grades(text, expected):
    answer = {"people": ["Ann", "Bob", "Cat"], "knights": ["Ann", "Cat"]}
    assert grade("knights_knaves", answered(text), answer) is expected


def test_nobody_is_a_knight():
    answer = {"people": ["Ann", "Bob"], "knights": []}
    for text in ("none", "Nobody.", "Knights: none; Knaves: Ann, Bob"):
        assert grade("knights_knaves", answered(text), answer)
    assert grade("knights_knaves", answered("Ann is a knave, Bob is a knave"), answer)
    assert not grade("knights_knaves", answered(""), answer)
    assert not grade("knights_knaves", answered("Ann"), answer)


def test_names_have_accents():
    answer = {"people": ["Zo\u00eb", "Jos\u00e9"], "knights": ["Zo\u00eb"]}
    for text in ("Zo\u00eb", "zoe\u0308", "Zo\u00eb is a knight, Jos\u00e9 is a knave"):
        assert grade("knights_knaves", answered(text), answer)
    for text in ("Zoe", "Zo", "Jos\u00e9"):
        assert not grade("knights_knaves", answered(text), answer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["numbers", "target", "people", "knights", "x"]), inner, max_size=4
        )
    ),
)
FRAGMENTS = st.lists(
    st.sampled_from(
        ["<answer>", "</answer>", " ", "1", "20", "(", ")", "+", "/", "0", "Ann", "knight", "\x00"]
        + ["\\boxed{", "}", "{", "\\frac", "####", "$", ",", ".", "</think>", "<think>"]
    )
    | st.text(max_size=4),
    max_size=20,
)


@pytest.mark.parametrize("task", [*NAMES, "aime24", "gsm8k", "point24"])
@settings(max_examples=300, deadline=None)
@given(FRAGMENTS, JSON)
def test_graders_are_total(task, fragments, answer):
    for text in ("".join(fragments), answered("".join(fragments))):
        assert grade(task, text, answer) in (True, False)


@pytest.mark.parametrize("task", NAMES)
def test_an_answer_grades_only_its_own_problem(task):
    """Right solutions of other problems are wrong, but for answers that happen to agree."""
    problems = take(task, "test", 0, 40)
    good = {"arithmetic": {"merge": 0.0}}.get(task, {"wrong": 0.0})
    texts = [MODULES[task].solution(p, random.Random(0), **good) for p in problems]
    for (i, p), (j, text) in itertools.product(enumerate(problems), enumerate(texts)):
        same = json.dumps(p.answer) == json.dumps(problems[j].answer)
        if i == j or not same:
            assert grade(task, text, p.answer) is (i == j)


# Answers of the paper's data sets


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed{ \\boxed{ 5 } }", "5"),
        ("\\boxed{\\frac{\\boxed{1}}{2}}", "\\frac{\\boxed{1}}{2}"),
        ("} { \\boxed{\\{1, 2\\}} {", "\\{1, 2\\}"),
        ("\\fbox{x}", "x"),
        ("$\\boxed 7$", "7"),
        ("\\boxed{}", ""),
        ("boxed{3} \\box{4}", None),
        ("\\boxed{5} \\verb|\\boxed{6}|", "5"),
        ("\\boxed{5}\n% \\boxed{6}", "5"),
        ("So it is 5. % \\boxed{6}", None),
        ("It is 50% of \\boxed{6}", "6"),
        ("It is 50 % of $\\boxed{6}$", "6"),
        ("\\begin{verbatim}\n\\boxed{5}\n\\end{verbatim}", None),
        ("\\boxed{5} \\begin{verbatim}\\boxed{6}\\end{verbatim}", "5"),
        ("\\boxed{5} \\begin{comment} \\boxed{6} \\end{comment}", "5"),
        ("\\boxed{5}\n\\begin{lstlisting}\n\\boxed{6}\n\\end{lstlisting}", "5"),
        ("\\boxed{5} \\lstinline|\\boxed{6}|", "5"),
        ("\\boxed{5} <!-- \\boxed{6}\n-->", "5"),
        ("<!-- \\boxed{5} --> \\boxed{6}", "6"),
        ("\\boxed{5} \\iffalse \\boxed{6} \\fi", "5"),
        ("\\boxed{5} \\phantom{so \\boxed{6} {}}", "5"),
        ("\\boxed{\\phantom{0}6}", "\\phantom{0}6"),
        ("\\boxed{5}, as in `\\boxed{answer}`", "5"),
        ("\\boxed{5}\n```\n\\boxed{6}\n```", "5"),
        ("It is `\\boxed{6}`.", "6"),
        ("\\boxed{5} % \\boxed{6}", "5"),
        ("\\boxed{5}% \\boxed{6}", "5"),
        ("$\\boxed{5}$ % or so $\\boxed{6}$", "6"),
        ("\\boxed{5} is it % or so \\boxed{6}", "5"),
        ("the % change is \\boxed{5}", "5"),
        ("It was \\boxed{4}.\nDiscount % is \\boxed{5}", "5"),
        ("It is 50 % \\boxed{6}", "6"),
        ("\\boxed{5 % or 6\n}", "5"),
        ("\\boxed{50 %\n}", "50 %"),
        ("\\boxed{50}\\% \\boxed{6}", "6"),
    ],
)
def test_the_last_balanced_box(text, box):
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"$\boxed{1}$ and $\boxed{-2}$.", "1, -2"),
        (r"x = \boxed{1} or x = \boxed{2}", "1, 2"),
        (r"\boxed{(1, 2)}, \boxed{(2, 1)}, \text{ and } \boxed{(0, \frac{1}{2})}", None),
        (r"\boxed{5}, so it is \boxed{6}", "6"),
        (r"\boxed{5}. $\boxed{5}$", "5"),
        (r"\boxed{5}, \boxed{5}", "5"),
        (r"{5}, \boxed{6}", "6"),
        (r"\boxed{\boxed{7}}", "7"),
        ("nothing", None),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        *[
            (left + between + r"\boxed{5}", "4, 5")
            for left in (r"\boxed{4}", r"\boxed { 4 }", r"$\fbox{4}$", r"\boxed{5} or \boxed{4}")
            for between in (
                " or maybe ",
                " OR ",
                "/",
                "; ",
                " and/or ",
                ". Or ",
                ", alternatively, ",
            )
        ],
        (r"\boxed{4} \text{ or it could be } \boxed{5}", "4, 5"),
        (r"\[\boxed{4}\] or \(\boxed{5}\)", "4, 5"),
        (r"\boxed 4 or \boxed 5", "4, 5"),
        (r"\boxed{4} or \boxed{5} or \boxed{5}", "4, 5"),
        (r"\boxed{4}. \boxed{5}", "5"),
        (r"\boxed{4}\,\boxed{5}", "5"),
        (" or ".join(rf"\boxed{{{n}}}" for n in range(30)), ", ".join(map(str, range(30)))),
    ],
)
def test_boxes_that_belong_together(text, answer):
    if answer is None and "boxed" in text:
        answer = r"(1, 2), (2, 1), (0, \frac{1}{2})"
    assert ", ".join(boxed_answers(text)) == (answer or "")


def test_numbers_are_exact():
    same = {
        "72": ["72", "72.", "072", "72.0", "$72", "\\$72", "$72$", "+72", "144/2", "**72**", "72%"],
        "-1234.5": [
            "-1,234.50",
            "-$1234.5",
            "$-1234.5",
            "\u22121234.5",
            "-1{,}234.5",
            "-1\\,234.5",
        ],
    }
    for number, texts in same.items():
        assert {exact_number(text) for text in texts} == {Fraction(number)}
    none = ["", "-", "7 2", "7,2", "1,23", "2**3", "7%2", "1e3", "0x1", "1/0", "1.2.3", "nan", "7a"]
    assert {exact_number(text) for text in [*none, "\u0667", "\u00b2", "9" * 500]} == {None}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("48 + 24 = 72\n#### 72", True),
        ("#### 71\nNo.\n#### 72", True),
        ("####72 \nAnd so on", True),
        ("<think>#### 5</think>\n#### $72.00", True),
        ("#### 72\n#### 71", False),
        ("#### 72</think> I am not sure", False),
        ("<think>#### 72", False),
        ("72", False),
        ("####", False),
        ("#### 72 dollars", True),
        (r"#### \boxed{72}", True),
        (r"#### $\boxed{72}$", True),
        ("#### 72 miles per hour", True),
        ("#### \u20ac72", True),
        ("#### x = 72", True),
        (r"#### \boxed{71} 72", False),
        ("#### 72 thousandths", False),
        ("#### 72 million", False),
        ("#### 70 + 2", False),
        ("#### 72 or 73", False),
        ("#### 7 2", False),
        ("#### 720", False),
        ("#### -72", False),
        ("#### 144/2", False),
        ("#### seventy-two", False),
        ("#### 72...", False),
        ("#### not: 72", False),
        ("#### half: 72", False),
        ("#### |x| = 72", False),
        ("#### \u0667\u0662", False),
    ],
)
def test_gsm8k(text, right):
    assert grade("gsm8k", text, "72") is grade("gsm8k", text, 72) is right
    assert grade("gsm8k", "#### 12000", "12,000") and not grade("gsm8k", "#### 12000", "12")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Thus $\\boxed{73}$", True),
        ("<think>\\boxed{1}</think> \\boxed{073}", True),
        ("\\boxed{\\textbf{73}}", True),
        ("\\boxed{73} or rather \\boxed{74}", False),
        ("\\boxed{74} or maybe \\boxed{73}", False),
        ("\\boxed{n = 73} or \\boxed{73}", True),
        ("<think> \\boxed{73}", False),
        ("\\boxed{73.5}", False),
        ("\\boxed{146/2}", False),
        ("\\boxed{73, 74}", False),
        ("\\boxed{}", False),
        ("73", False),
    ],
)
def test_aime24(text, right):
    assert grade("aime24", text, 73) is grade("aime24", text, "073") is right


def test_point24_problems_are_solvable_and_few_enough_to_end():
    test = list(get_task("point24").problems("test", 0))
    train = list(islice(get_task("point24").problems("train", 0), 1200))
    texts = {p.text for p in test}
    assert 200 < len(texts) == len(test) < 500 and texts.isdisjoint(p.text for p in train)
    assert point24.solvable(tuple(map(Fraction, (1, 5, 5, 5))))
    assert not point24.solvable(tuple(map(Fraction, (1, 1, 1, 1))))
    assert all(p.answer["numbers"] == list(map(int, p.text.split())) for p in test)


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("5 * (5 - 1 / 5)", True),
        ("5 \\times (5 - \\frac{1}{5}) = 24", True),
        ("5 \u00d7 (5 \u2212 1 \u00f7 5)", True),
        ("5 \\cdot \\left(5 - \\dfrac{1}{5}\\right)", True),
        ("24", False),
        ("-5 * (1 / 5 - 5)", True),
        ("5 * 5 - 1 = 24", False),
        ("5 * 5 - 1 ** 5", False),
        ("5 * 5 - \\frac{5}{5}", False),
        ("5 * (5 - 1 / 5) = 24 = 25", False),
        ("\\frac{" * 100, False),
        ("__import__('os')", False),
    ],
)
def test_point24(expression, right):
    answer = {"numbers": [5, 5, 5, 1], "target": 24}
    assert (
        grade("point24", f"<think>\\boxed{{24}}</think>$\\boxed{{{expression}}}$", answer) is right
    )
    assert grade("point24", answered(expression), answer) is right


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (r"(10-4)\,\times\,(13-9)", True),
        (r"24 = (10-4)\cdot(13-9)", True),
        ("$(10-4)*(13-9)$", True),
        ("(10-4)\u00b7(13-9) = 24", True),
        (r"(10-4)\ast(13-9)", True),
        ("24 = 24", False),
        ("24", False),
        ("25 = (10-4)*(13-9)", False),
        ("(10-4)*(13-9)*1", False),
    ],
)
def test_point24_reads_latex(given, right):
    answer = {"numbers": [10, 4, 13, 9], "target": 24}
    assert grade("point24", rf"\boxed{{{given}}}", answer) == right


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("x = 73", True),
        ("m+n=73", True),
        (r"73^\circ", True),
        (r"73\%", False),
        (r"73\text{ percent}", False),
        ("73...", False),
        ("-x=73", False),
        ("x^2=73", False),
        ("74 = 73", False),
        ("73 = 74", False),
        ("73/1", False),
        ("x", False),
    ],
)
def test_aime24_reads_equations(given, right):
    assert grade("aime24", rf"\boxed{{{given}}}", "73") == right


def test_an_answer_inside_unclosed_thinking_is_none():
    for text, right in (
        ("<think> <answer> 5 </answer>", False),
        ("<think> <answer> 5 </answer> </think>", False),
        ("<think> 6 </think> <answer> 5 </answer>", True),
        ("<answer> 5 </answer>", True),
    ):
        assert grade("arithmetic", text, 5) == right, text
