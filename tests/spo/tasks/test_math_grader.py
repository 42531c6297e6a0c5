"""The grader of MATH: equal answers in every dress, wrong ones that look right, hostile ones."""

import builtins

import pytest

from spo.tasks import math
from spo.tasks.grading import Grader

# (the data set's answer, responses that must count)
RIGHT = [
    (r"2\sqrt{3}i", [r"2i\sqrt{3}", r"2i \sqrt 3"]),
    (r"1+2\sqrt{3}i", [r"1+2i\sqrt{3}"]),
    (r"2\pi i", [r"2i\pi"]),
    (
        r"\frac{1}{2}",
        [r"\cos 60^\circ", r"\sin(30^{\circ})", r"\frac 1 2", r"\dfrac 12"]
        + [r"\frac12", r"\dfrac{1}{2}", r"\tfrac{1}{2}", "1/2", "0.5", ".5", r"\frac{2}{4}"],
    ),
    (r"-\frac{1}{2}", ["-1/2", r"\frac{-1}{2}", r"\frac{1}{-2}", "-0.50", "\u22120.5"]),
    (r"11\frac{1}{2}", [r"\frac{23}{2}", "11.5"]),
    (r"0.\overline{3}", [r"\frac{1}{3}", r"0.\overline{33}"]),
    ("[2,5)", ["[2, 5)", r"\left[2,5\right)", r"x \in [2,5)", r"2 \le x < 5"]),
    (r"(-\infty,2)\cup(3,\infty)", [r"\left(3, \infty\right) \cup \left(-\infty, 2\right)"]),
    (r"(-\infty, 2]", [r"x\le2", r"x \leq 2", "(-\u221e, 2]"]),
    (r"\{1,2\}", [r"\{2,1\}", "1, 2", r"\left\{ 1, 2 \right\}"]),
    (
        "1,-2",
        ["-2, 1", r"x=1, x=-2", r"x = -2 \text{ or } x = 1", r"1 \text{ and } -2", r"1\quad -2"],
    ),
    (r"3\pm\sqrt{2}", [r"3+\sqrt{2},3-\sqrt{2}", r"3 \pm \sqrt 2"]),
    (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)", r"(3, 0.5\pi)", r"3, \frac{\pi}{2}"]),
    (r"50\%", ["50", r"50 \%", "0.5", "50%", r"50\text{ percent}"]),
    ("12.5", [r"12.5\%", "12.50"]),
    (r"5\text{ cm}", ["5", "5 cm", r"5\,\mathrm{cm}", r"5 \text{ cm}", r"\text{5 cm}"]),
    (
        "5",
        [
            r"5\text{ cm}^2",
            r"5\,\mathrm{m}^{2}",
            r"5\text{ units$^2$}",
            "5 apples",
            r"5\ \text{ft}",
            "5 people",
            "5 cm^2",
            "5 m/s",
            "5 miles per hour",
            r"\textcolor{red}{5}",
        ],
    ),
    (
        r"\$18.90",
        ["18.9", "18.90", r"\$ 18.90", r"18.90\text{ dollars}", "$18.90", "18.90 dollars"],
    ),
    (r"5 \text{ million}", ["5,000,000", r"5\text{ million}", r"5 \cdot 10^6"]),
    (r"90^\circ", ["90", r"90^{\circ}", "90\u00b0", r"90\text{ degrees}", "90 degrees"]),
    ("10,000", ["10000", r"10,\!000", "10{,}000", r"10\,000", "10 000", "10^4"]),
    (
        r"\text{Evelyn}",
        ["Evelyn", r"\textbf{Evelyn}", "evelyn", r"\text{ Evelyn. }", r"\mbox{Evelyn}"],
    ),
    (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\textbf{(C)}", r"\mathrm{C}"]),
    ("2516_8", ["2516_{8}", "2516", r"2516_{\,8}"]),
    ("x^2+2x+1", ["(x+1)^2", "1 + 2x + x^{2}", "f(x)=x^2+2x+1"]),
    ("y=2x+3", ["y = 3 + 2x", "2x+3", "y - 2x = 3"]),
    ("6+9i", ["9i+6", r"6+9\mathrm{i}"]),
    (r"2\sqrt{2}", [r"\sqrt{8}", r"2\sqrt2", r"\frac{4}{\sqrt{2}}", r"\sqrt[2]{8}"]),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        [
            r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
            r"\begin{pmatrix} 1 & 2 \\ \frac{6}{2} & 4 \end{pmatrix}",
        ],
    ),
    (
        "5",
        [
            "x=5",
            "5.",
            "$5$",
            r"\(5\)",
            "{5}",
            "+5",
            "5.0",
            r"\displaystyle 5",
            "2+3=5",
            "x = 2+3 = 5",
        ],
    ),
    ("204", ["m+n=204", r"\boxed{204}", r"\mathbf{204}", r"AB = 204", r"\log_2 2^{204}"]),
    (r"\emptyset", [r"\varnothing", r"\{\}"]),
    ("60", [r"5\text{ dozen}", "5 dozen"]),
    ("3,3", ["3, 3", "x=3,3"]),
    (r"\text{AB}", ["AB", r"\text{AB}"]),
    ("1,000,000", ["1000000", "10^6", r"1\text{ million}", r"1\,000\,000"]),
    (r"\$1,\!000,\!000", ["1000000", r"1 \text{ million dollars}"]),
    ("222,222", ["222222"]),
    (r"12.5\%", ["0.125", r"\frac{1}{8}", "12.5"]),
    (r"\frac{5}{8}", [r"62.5\%", "0.625"]),
    ("(1,3),(3,1),(1,1)", ["(1,1);(1,3);(3,1)", "(1,1), (1,3), (3,1)"]),
    ("1,1,-2", [r"1, 1 \text{ and } -2", "-2,1,1"]),
    ("-1, 2, 3", [r"-1, 2, \text{ and } 3", "-1, 2, and 3"]),
    (r"\text{A}, \text{B}", ["A, B", r"A \text{ and } B"]),
    (r"(\text{A}, 2)", ["(A,2)"]),
    (r"\text{Alice} \text{ and } \text{Bob}", ["Alice and Bob", r"\text{Alice and Bob}"]),
    (r"3 \text{ cm}, 4 \text{ cm}", ["3, 4"]),
    ("120", ["5!", r"\binom{10}{3}"]),
    ("2^{2004}", ["2^{2004}", "4^{1002}"]),
]

# (the data set's answer, responses that must not count)
WRONG = [
    (r"2\sqrt{3}i", [r"2\sqrt{3}", r"3i\sqrt{3}", r"2j\sqrt{3}"]),
    (r"\frac{1}{2}", [r"\frac13", "0.33", "2", "-0.5", r"\frac{1}{2}x", r"\frac{1}{2}, 1", ""]),
    (r"\frac{1}{3}", ["0.33", "0.333", "0.333333", "0.3333333", "0.3333333333333"]),
    (r"\pi", ["3.14", "3.1415927", "3.14159265358"]),
    (r"\sqrt{2}", ["1.4142136"]),
    (r"\text{AB}", [r"\text{BA}", "BA", "A"]),
    ("3,3", ["3", "3,3,3"]),
    ("1,1,2", ["1,2,2", "2,2,1", "1,2"]),
    ("1,2", ["1,1,2"]),
    ("5", ["5 fifths", "5 tens", "5 root two", "5 choose two", "5 base six", "5 perhaps seven"]),
    (r"\text{A}, \text{B}", [r"\text{A}, \text{C}", r"\text{A}"]),
    (r"(\text{A}, 2)", [r"(\text{C}, 2)"]),
    (r"\text{Alice} \text{ and } \text{Bob}", [r"\text{Alice} \text{ and } \text{Carl}"]),
    (r"x \text{ is odd}", [r"x \text{ is even}"]),
    (r"10 \text{ a.m.}", [r"10 \text{ p.m.}"]),
    (
        "5",
        [
            r"5\text{ dozen}",
            "5 dozen",
            "5 pi",
            "5 squared",
            "5 theta",
            "5 maybe 6",
            "5 people or 6",
        ],
    ),
    ("[2,5)", ["(2,5)", "[2,5]", r"\{2,5\}", "2", "[2,5", "[5,2)"]),
    ("(1,2)", ["(2,1)", "[1,2]", r"\{1,2\}", "2,1", "(1,2,3)", "1"]),
    (r"\{1,2\}", ["1", r"\{1,2,3\}", "12", "(1,2)"]),
    ("1,2", ["1", "2", "1,2,3", r"1 \text{ or } 3"]),
    ("5", ["5 or 6", r"5 \text{ or } 6", "5, 6", "5;6", "6=5", "5=6", "x=5=6", r"\sqrt{2}=5"]),
    (
        "5",
        [r"5\text{ or maybe 6}", r"\text{5 or 6}", "5x", "x", r"5\text{ million}", "five", "5 6"],
    ),
    ("5", [r"5\text{ (or 6)}", r"5 \text{ not } 6", "55", "-5", r"5\%5", "13_4", "5^2", r"\infty"]),
    ("15", ["1,5", "1 5", "1.5"]),
    ("3", ["1 2", "1+1", "3i"]),
    ("12", ["1 2", "1,2", r"1\quad 2"]),
    ("25", [r"5\text{ cm}^2", r"5\,\mathrm{cm}^2"]),
    ("2", [r"2+3\mathrm{i}", "2i"]),
    (r"50\%", [r"5\%", "0.05", r"0.5\%", "5000"]),
    ("2516_8", ["2516_9", "2517_8", "1358"]),
    (r"\text{odd}", ["even", "ddo", r"\text{odd and even}", "o d d 1"]),
    ("even", ["odd", "neve", "1"]),
    ("C", ["D", "(C) 12", "5C", "C, D"]),
    ("y=2x+3", ["y=2x", "y=3x+2", "2x"]),
    ("6+9i", ["6-9i", "15", "9+6i"]),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", [r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}", "(1,2)"]),
    (r"\infty", [r"-\infty", "0"]),
    ("2^{2004}", ["2^{2005}", "2^{2004}-1", "2004^2"]),
]

HOSTILE = [
    "9**9**9**9",
    "10^{10^{10}}",
    "9^{9^{9^9}}",
    "(10^9)!",
    "9!!!!!!!",
    r"\binom{10^9}{10^8}",
    r"\sum_{i=1}^{10^9} i^2",
    r"\int_0^1 e^{-x^2}\sin(x^3) dx",
    r"2^{100000000}-2^{99999999}",
    "(x+y+z)^{100}",
    "x^" * 200 + "2",
    "(" * 15 + "1" + ")" * 15,
    "[" * 1_000_000,
    "{" * 500_000 + "}" * 500_000,
    "9" * 100_000,
    "a_" * 200,
    "5=" * 200 + "6",
    "__import__('os').system('touch pwned')",
    "open('pwned','w').write('x')",
    "\x00" * 100,
    "\ud800",
    "\u0665",
    r"\frac{5}{0}",
    r"\text{" * 50,
    "\\" * 501,
    r"\begin{pmatrix}" + "1&" * 100,
]


def pairs(table: list) -> list:
    return [(answer, given) for answer, texts in table for given in texts]


@pytest.fixture(scope="module", autouse=True)
def prepared():
    math.Math().prepare()


@pytest.mark.parametrize(("answer", "given"), pairs(RIGHT))
def test_equal_answers(answer, given):
    assert math.Math().grade(f"So it is $\\boxed{{{given}}}$.", answer)


@pytest.mark.parametrize(("answer", "given"), pairs(WRONG))
def test_wrong_answers(answer, given):
    assert not math.Math().grade(f"So it is $\\boxed{{{given}}}$.", answer)


@pytest.mark.parametrize("answer", [answer for answer, _ in RIGHT])
def test_every_answer_equals_itself(answer):
    assert math.Math().grade(f"\\boxed{{{answer}}}", answer)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>Is it \\boxed{6}?</think> No, \\boxed{5}", True),
        ("<think>\\boxed{5}</think> It is 5.", False),
        ("<think>\\boxed{5}", False),
        ("thinking \\boxed{5}</think> It is \\boxed{6}", False),
        ("first \\boxed{6}, then \\boxed{5}", True),
        ("first \\boxed{5}, then \\boxed{6}", False),
        ("first \\boxed{5}, then \\boxed{6", True),
        ("Therefore, the final answer is: $\\boxed{5}$. I hope it is correct", True),
        ("\\boxed{\\boxed{5}}", True),
        ("The answer is 5", False),
        ("\\boxed{5.0} or \\boxed{5} or \\boxed{10/2}", True),
        ("\\boxed{5.0} or \\boxed{6}, alternatively \\boxed{5}", False),
        ("\\boxed{}", False),
        ("", False),
    ],
)
def test_the_last_box_after_the_thinking_counts(text, right):
    assert math.Math().grade(text, "5") is right


def test_hostile_answers_are_wrong_in_time_and_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = [(answer, given) for given in HOSTILE for answer in ("5", r"\frac{x+1}{2}")]
    with Grader() as grader:  # the deadline of a real run
        for key, (answer, given) in enumerate(cases):
            grader.submit(key, "math", f"\\boxed{{{given}}}", answer)
        graded = []
        while grader.pending:
            graded += grader.poll(1.0)
    late = [(cases[g.key][1][:40], g) for g in graded if g.reward != 0.0]
    assert len(graded) == len(cases) and not late
    assert list(tmp_path.iterdir()) == []


def test_no_answer_reaches_eval(monkeypatch):
    seen = []
    for name in ("eval", "exec", "compile"):
        monkeypatch.setattr(builtins, name, lambda code, *a: seen.append(code))
    for given in ("__import__('os').getcwd()", "5 + x.real", "print(6)", "lambda: 7", "8.5x"):
        math.equal.__wrapped__(given, "9x")
    assert not seen


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(math.importlib.util, "find_spec", lambda name: None)
    for call in (math.Math().prepare, lambda: math.Math().problems("train", 0)):
        with pytest.raises((ImportError, ValueError), match=r"pip install 'spo-kernels\[math\]'"):
            call()
