"""Kinds of answers, each with what equals it and what does not: see docs/graders.md."""

import pytest

from spo.tasks.algebra.same import equal

# (the answer of the data, answers that must count)
RIGHT = [
    ("a=4,-8,-10", ["-10,-8,4"]),
    (r"m\ge\sqrt2", [r"m\in[\sqrt2,\infty)"]),
    (r"(-\infty,-1)\cup(2,\infty)", [r"x<-1 \text{ or } x>2"]),
    (r"x<-1 \text{ or } x>2", [r"(-\infty,-1)\cup(2,\infty)"]),
    (
        r"\frac{1\pm\sqrt{17}}{4}",
        [
            r"\frac{1+\sqrt{17}}{4},\frac{1-\sqrt{17}}{4}",
            r"x=\frac{1-\sqrt{17}}{4}\text{ or }x=\frac{1+\sqrt{17}}{4}",
        ],
    ),
    (r"\frac{1+\sqrt{17}}{4},\frac{1-\sqrt{17}}{4}", [r"\frac{1\pm\sqrt{17}}{4}"]),
    ("(5,8),(8,5)", [r"(x,y)=(5,8) \text{ and } (8,5)"]),
    (r"(x,y)=(5,8) \text{ and } (8,5)", ["(8,5), (5,8)"]),
    ("(1,2)", [r"\langle 1,2\rangle"]),
    (r"\langle 1,2\rangle", ["(1,2)"]),
    ("4343_6", ["x = 4343_6"]),
    ("x = 4343_6", ["4343"]),
    ("5", ["5=x", r"5\,\frac{\text{m}}{\text{s}}", "5", "5\u200b", "= 5"]),
    (r"11\frac{5}{6}", ["11 5/6"]),
    (r"\frac{71}{6}", ["11 5/6"]),
    (r"\sqrt[3]{2}", [r"\sqrt[3]2"]),
    (r"\frac12", [r"\nicefrac{1}{2}", "\xbd"]),
    (r"\frac{\pi}{2}", ["pi/2"]),
    (r"\sqrt{3}", ["sqrt(3)"]),
    ("3.54e-07", [r"3.54\times10^{-7}"]),
    (r"3.54\times10^{-7}", ["3.54e-07"]),
    (r"50\%", ["50 percent"]),
    ("50 percent", ["50"]),
    (r"5\text{ percent}", [r"5\%"]),
    (r"50\text{ per cent}", ["50"]),
    (r"5\text{ cm}", ["5"]),
    (r"5\text{ m/s}", [r"5\,\frac{\text{m}}{\text{s}}"]),
    (r"5\,\frac{\text{m}}{\text{s}}", ["5"]),
    ("1250", ["\u20ac1,250"]),
    ("\u20ac1,250", ["1250"]),
    ("x^2", ["x\xb2"]),
    ("12", ["12"]),
    ("1,2", ["1\uff0c2", "1\u30012"]),
    ("1,250", ["\xa31250"]),
    ("5.5", ["5\xbd"]),
    (r"\text{(B)}", ["B. 12", "B", r"\textbf{(B)}\ 12", "(B) 12"]),
    (r"\text{B}", ["(B)"]),
    ("3:30 p.m.", [r"3\!:\!30\text{ PM}"]),
    ("10:00", ["10:00 a.m."]),
    ("May 5", ["5 May", r"\text{May 5th}"]),
    ("16:30", ["4:30 PM"]),
    (r"(1,\infty)", [r"\{x \mid x>1\}"]),
    (r"\{x | x>1\}", ["x>1"]),
    (r"\{x \in \mathbb{R} : 1<x<3\}", ["(1,3)"]),
    (r"\mathbb{R}\setminus\{2\}", [r"x\ne2"]),
    (r"x\ne 2", [r"(-\infty,2)\cup(2,\infty)"]),
    ("2+3i", ["3i+2"]),
    (r"e^{i\pi/3}", [r"\frac12+\frac{\sqrt3}{2}i"]),
    ("x^2-1", ["(x-1)(x+1)"]),
    (r"\frac{1}{x+1}+1", [r"\frac{x+2}{x+1}"]),
    ("n(n+1)/2", [r"\frac{n^2+n}{2}"]),
    (r"2\sqrt{x}", [r"\sqrt{4x}"]),
    (r"\log_2 8", ["3"]),
    ("100", [r"100\text{ square feet}"]),
    (r"3\text{ hours}", [r"180\text{ minutes}"]),
    ("x=1,y=2", ["(1,2)", "y=2, x=1"]),
    (r"\sqrt2", [r"\sqrt2\approx 1.41"]),
    ("2.83", [r"\approx 2.83", r"2\sqrt2\approx 2.83"]),
    ("y=2x+3", ["f(x)=2x+3"]),
    ("x^2+y^2=4", ["4=x^2+y^2"]),
    ("2x+y=3", ["y=3-2x"]),
    (r"|x|\le 3", [r"|x|\leq3"]),
    ("(2,3)", ["(2;3)"]),
    (r"\{1,2\}", ["{1,2}"]),
    ("[2,3]", ["x\u2208[2,3]"]),
    ("1/2", ["0.5"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{bmatrix}1\\2\end{bmatrix}"]),
    (r"\binom{5}{2}", ["10"]),
    (r"120^\circ", ["120\xb0"]),
    ("-3<x<5", ["(-3,5)"]),
    ("(-3,5)", ["-3<x<5"]),
    ("x>3", ["3<x"]),
    (r"\pm 3", ["3,-3"]),
    ("3,-3", [r"x=\pm3"]),
    (r"\text{no solution}", ["no solution"]),
    (r"1 \frac{1}{2}", ["1.5"]),
    ("2^{10}", ["1024"]),
    ("1,024", ["1024"]),
    (r"\$32,\!348", ["32348"]),
    (r"36\text{ dollars}", [r"\$36"]),
    ("5!", ["120"]),
    (r"\lfloor 3.7\rfloor", ["3"]),
    (r"x \in \{1,2\}", ["1,2"]),
    (r"7\text{ cm}", ["7cm"]),
    ("7", ["7cm"]),
    ("60 mph", [r"60\text{ miles per hour}"]),
    ("60", [r"60 \frac{\text{miles}}{\text{hour}}"]),
    (r"\frac{3}{4}", ["3:4"]),
    ("2:3", ["4:6"]),
    ("y=-x", ["y = -x"]),
    (r"3\sqrt{2}-1", [r"-1+3\sqrt2"]),
    (r"1.5 \times 10^{3}", ["1500"]),
    (r"0.\overline{12}", [r"\frac{4}{33}"]),
    (r"12\pi\text{ cm}^2", [r"12\pi"]),
    (r"12\pi", ["12\u03c0"]),
    (r"\text{Monday}", ["Monday"]),
    (r"-\infty<x<\infty", [r"\mathbb{R}"]),
    (r"(2, 5) \cup (5, 7)", [r"2<x<7, x\ne5"]),
    ("x=2", ["2"]),
    ("2", ["x=2", r"\sqrt[3]{8}"]),
    (r"\frac{\sqrt{3}}{3}", [r"\frac{1}{\sqrt{3}}"]),
    ("0", [r"\sqrt2\sqrt3-\sqrt6"]),
    (r"\cos^2 x+\sin^2 x", ["1"]),
    (r"\tan 60^\circ", [r"\sqrt3"]),
]

RIGHT += [
    ("|AB|=1", ["1", "|AB| = 1.0"]),
    (r"\frac{NO}{BO}=\frac{1}{\sqrt{6}}", [r"\frac{1}{\sqrt{6}}"]),
    ("S_1:S_2=7:32", ["7:32", "14:64"]),
    (r"\frac{\sqrt{3}}{3} \approx 0.577", [r"\frac{\sqrt{3}}{3}", r"x=\frac{1}{\sqrt{3}}"]),
    ("2^6 3^5 5^4", [r"2^6 \cdot 3^5 \cdot 5^4"]),
    ("p=5,q=2;p=7,q=2", ["(5,2),(7,2)"]),
    ("x = -5, p = 14/3", ["p = 14/3, x = -5"]),
    ("0<f(x)<1", ["(0,1)"]),
    (r"2\operatorname{cis}(30^\circ)", [r"2\text{cis}(30^\circ)", r"\sqrt3+i"]),
    ("f^{-1}(x)=x-1", ["x-1", "y=x-1"]),
    ("2x", ["f^{-1}(x)=2x", r"\frac{dy}{dx}=2x", "f'(x)=2x"]),
    (r"90\text{ minutes}", ["1 hour 30 minutes", r"1\text{ hour }30\text{ minutes}", "1.5 hours"]),
    (r"\text{all real numbers}", [r"\mathbb{R}", r"(-\infty,\infty)", r"x\in\mathbb{R}"]),
    (r"\text{A and C}", ["A, C", "C and A"]),
    ("3/5", ["3 to 5", "3:5"]),
    ("noon", ["12:00 p.m.", "12 noon"]),
    ("-1", [r"e^{i\pi}"]),
    (r"\log_2 x", [r"\ln(x)/\ln(2)"]),
    (r"2\sin x\cos x", [r"\sin(2x)"]),
    ("y-3=2(x-1)", ["y=2x+1"]),
    (r"\frac{x^2}{9}+\frac{y^2}{4}=1", ["4x^2+9y^2=36"]),
    ("9.8 m/s^2", [r"9.8\,\text{m/s}^2"]),
]

RIGHT += [
    ("x=1 or x=2", ["x=1 and x=2"]),
    ("x<1 or x>2", ["x<1, x>2"]),
    ("(1,3)", ["x>1 and x<3"]),
    (r"\emptyset", ["x>2 and x<1"]),
    ("(1,2)", ["(x,y)=(1,2)"]),
    ("(y,x)=(2,1)", ["(y,x)=(2,1)", "(2,1)", "2,1", "x=1,y=2"]),
    ("|x-5|", ["|5-x|", r"\sqrt{(x-5)^2}"]),
    (r"\max(x,y)", [r"\frac{x+y+|x-y|}{2}"]),
    (r"\lfloor x\rfloor+1", [r"\lfloor x+1\rfloor"]),
    ("e^{2|x|}", ["(e^{|x|})^2"]),
    (r"2^{1002}\sqrt2", [r"\sqrt{2^{2005}}"]),
    ("2^{2004}x", ["4^{1002}x"]),
    (r"2\cdot10^{-34}\sqrt2", [r"10^{-34}\sqrt8"]),
    (r"\frac12", [r"1\over2", r"x={1\over 2}"]),
    (r"\frac{x+1}{x-1}", [r"{x+1\over x-1}"]),
    (r"\frac{\sqrt2}{2}", [r"\sqrt{1\over2}"]),
    (r"\binom{n}{k}", [r"{n\choose k}"]),
    ("10", [r"{5\choose 2}"]),
    ("2", [r"2\frac03"]),
    (r"\ln a+\ln b", [r"\ln(ab)"]),
    (r"\log_2(xy)", [r"\log_2 x+\log_2 y"]),
    (r"\ln a-\ln b", [r"\ln\frac ab"]),
    ("(1,2)", ["]1,2["]),
    ("(1,2]", ["]1,2]", r"x\in]1,2]"]),
    ("x<1 or x>=2", [r"]-\infty,1[\cup[2,\infty["]),
    (r"(-\infty,2]", ["(-oo,2]"]),
    (r"\mathbb{R}\setminus\{0\}", [r"\mathbb R-\{0\}", r"x\in(-\infty,\infty)-\{0\}"]),
    (r"\sqrt[3]{2},\sqrt[3]{5}", [r"\sqrt[3]{5},\sqrt[3]{2}"]),
    (r"\tanh 10", [r"\frac{e^{10}-e^{-10}}{e^{10}+e^{-10}}"]),
]

# (the answer of the data, answers that must not count)
WRONG = [
    (r"x \in [-2,7]", [r"x \in [-3,7]", "|x|=-1"]),
    ("n=2,3,4", ["n=1,2,3", "|x|=-1"]),
    ("(x,y)=(1,2)", ["(x,y)=(1,3)", "|x|=-1"]),
    (r"x=\pm 3", [r"x=\pm 4", "|x|=-1"]),
    (r"S=\{1,2\}", [r"S=\{1,3\}", "|x|=-1"]),
    (
        r"A=\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        ["|x|=-1", r"A=\begin{pmatrix}1&2\\3&5\end{pmatrix}"],
    ),
    (r"\frac{1}{2^{99}}", [r"\frac{1}{3^{50}}"]),
    ("x=1,y=2", ["(2,1)", "2,1"]),
    ("0.25", [r"0.25\%"]),
    (
        "5",
        [
            r"500\%",
            r"5\text{ thousandths}",
            r"5\text{ squared}",
            "5'",
            "5_2",
            r"5\approx 6",
            r"x=5\approx 6",
        ],
    ),
    (r"5\text{ m}", [r"5\text{ cm}"]),
    ("A", ["a"]),
    (r"\text{A}", ["a"]),
    (r"\sqrt2", [r"\sqrt2\approx 3"]),
    ("2^{100}", ["2^{100}+1"]),
    (r"\frac{1}{10^{50}}", ["0"]),
    (r"e^{\pi\sqrt{163}}", ["262537412640768744"]),
    ("x<3", ["x>3", r"x\le3"]),
    ("x=5", ["y=5"]),
    (r"50\text{ dollars}", [r"50\text{ cents}"]),
    (r"\text{(B)}", ["C. 12", r"(B) \text{ or } (C)"]),
    ("4:30", ["5:30"]),
    (r"m\ge\sqrt2", [r"m\in(\sqrt2,\infty)"]),
    ("1:2", ["2:1"]),
    ("3 hours", ["3 minutes"]),
    ("10 a.m.", ["10 p.m."]),
    ("x^2", ["x^3"]),
    ("|x|", ["x"]),
    (r"\sqrt{x^2}", ["x"]),
    ("(1,2)", ["(1,2,2)"]),
    ("1,2,2", ["1,1,2"]),
    (r"5\text{ cm}^2", [r"5\text{ cm}"]),
]

WRONG += [
    ("|AB|=1", ["2", "AB=2"]),
    (r"\frac{\sqrt{3}}{3} \approx 0.577", ["0.577", "0.578"]),
    ("a+3z=0", ["0"]),
    (r"\frac{2}{3}", [r"\frac-{2}{3}", r"\frac{2}-{3}"]),
    ("4", ["2^-{2}", "2^{-2}", "2^-2"]),
    (r"90\text{ minutes}", ["1 hour 3 minutes", "1 hour 30 seconds", "1 hour 30 cm", "1 hour 30"]),
    (r"\text{all real numbers}", [r"\text{no real numbers}", r"\text{all positive real numbers}"]),
    (r"\text{A and C}", ["A", "A, B", "a, c"]),
    ("noon", ["12:00 a.m.", "midnight"]),
    ("5", ["5 or more", "at least 5", "not 5", "about 5", "7 choose 2"]),
    ("0", [r"\emptyset", r"\text{no solution}"]),
    ("12:00", ["1:00"]),
    ("x=11", ["x=5+5+1=7=11"]),
    ("6", ["10-4 n", "x^2-10=6"]),
    ("(5,2),(7,2)", ["p=5,q=2;p=7,q=3"]),
    ("5", [r"5\text{ or }6", "5 dlars"]),
]

WRONG += [
    (
        r"\sqrt2",
        [
            r"\sqrt{2+10^{-70}}",
            "1.4142135623730950488016887242096980785696718753769480731766797379907324784621070388503"
            "87534327641573",
        ],
    ),
    ("x", [r"\frac{10^{70}+1}{10^{70}}x"]),
    (r"(0,\sqrt2)", [r"(0,\sqrt{2+10^{-70}})"]),
    ("1", [r"\tanh 80", r"\cos(10^{-70})", r"\cosh(10^{-100})", r"(1+e^{-200})^{\sqrt2}"]),
    ("10^{-100}", [r"\sin(10^{-100})"]),
    (r"10^{-100}-\frac{10^{-300}}{6}", [r"\sin(10^{-100})"]),
    ("1+10^{-100}", ["e^{10^{-100}}"]),
    (r"\frac{\pi}{2}-10^{-100}", [r"\arctan(10^{100})"]),
    (r"\frac{|x|}{x}", [r"\tanh(100x)"]),
    ("5-x", ["|x-5|"]),
    ("y=5-x", ["y=|x-5|"]),
    ("y+x=5", ["y-|x-5|=0", "y+|x|=5"]),
    ("3-x", ["|x-3|"]),
    ("10-x", [r"\sqrt{(x-10)^2}", "((x-10)^2)^{1/2}"]),
    ("-1", [r"\frac{|x-5|}{x-5}"]),
    ("1", [r"\frac{|x-5||x-6|}{(x-5)(x-6)}"]),
    ("0", [r"\lfloor x/5\rfloor"]),
    ("100", [r"\max(x,100)"]),
    (r"\lceil x\rceil-1", [r"\lfloor x\rfloor"]),
    ("x-1/1000", ["|x-1/1000|"]),
    ("(1,2)", ["(y,x)=(1,2)"]),
    ("1,2", ["(y,x)=(1,2)"]),
    ("(y,x)=(1,2)", ["2,1", "(2,1)", "(x,y)=(1,2)"]),
    ("x<1 or x>2", [r"x>2 \text{ and } x<1"]),
    ("5", [r"\text{}"]),
    ("1", [r"2{1\over2}"]),
    ("0", [r"2\frac03", r"1-\{1\}"]),
    (r"\frac16", [r"1\over2\over3"]),
    ("[1,2)", ["]1,2]", "]1,2["]),
    (r"\ln|x|", [r"\ln x"]),
    (r"\ln a+\ln b", [r"\ln(a+b)", r"\ln a\ln b"]),
]

# Units: signs keep their case, a known unit decides whatever follows, some words change the value.
_CHANGES = "gross|lakh|googol|permille|pairs|k|M|below|lost|ish|never|is wrong|debt".split("|")
RIGHT += [
    (
        "5",
        [r"5\text{ widgets}", r"8-3\text{ apples left}", r"5\text{ ordered pairs}", r"5\text{ ms}"],
    ),
    (r"5\text{ widgets}", ["5", r"5\text{ widgets}", "5 units"]),
    ("5 students", ["5 people"]),
    ("5000 Hz", ["5 kHz", r"5\text{ kilohertz}", "0.005 MHz"]),
    (r"5\text{ cents}", ["5 pennies", r"0.05\text{ dollars each}"]),
    ("$5$ cans", ["5 cans"]),
    (r"5\text{ pairs}", ["5", r"5.0\text{ pairs}"]),
]
WRONG += [
    ("5", [rf"5\text{{ {word}}}" for word in _CHANGES] + ["5 quadrillion", "5 gross"]),
    (r"5\text{ m}", [r"5\text{ nm}", r"5\text{ cm each}", r"5\text{ Mm}"]),
    (r"5\text{ mm}", [r"5\text{ Mm}"]),
    (r"5\text{ mW}", [r"5\text{ MW}", r"5\text{ W}"]),
    ("5 s", [r"5\text{ ms}"]),
    ("5 kg", ["5 tons"]),
    ("5 bytes", ["5 kilobytes"]),
    ("5 mph", ["5 knots"]),
    (r"5\text{ inches}", ["5 feet long", r"5\text{ feet long}", r"5\text{ apples}"]),
    ("5 ml", ["5 liters of water"]),
    ("5 minutes", ["5 hours later"]),
    ("5 dollars", ["5 pennies", "5 cents each"]),
    (r"5\text{ widgets}", [r"5\text{ gadgets}"]),
]

RIGHT += [("Monday, May 5", ["May 5"]), ("10:00", ["10 p.m."]), ("$f(x)$", ["f(x)"])]
WRONG += [
    ("0.333", ["0.333...", r"0.333\dots"]),
    ("3.14159", ["3.14159\u2026"]),
    ("1,2,3", ["1,2,3,...", "1,2,3. . ."]),
    ("1:12", ["13:12"]),
    ("13:12", ["1:12"]),
    ("Monday, May 5", ["Friday, May 5"]),
    ("12", ["1$2", r"1\(2", "1$$2"]),
]

# Names and labels leave the value alone.
RIGHT += [
    ("5", ["AB=5", "ab+bc+ca=5", "x-y=5", "f(2)=5", "P(2)=5", "Total: 5", r"\text{Area of }=5"]),
    ("a/b=5", ["5"]),
    (r"\text{Jo} = \frac12", [r"\text{Jo}=0.5", "0.5"]),
    (r"\text{Jo: }5", ["5.0"]),
    (r"\angle ABC", [r"\angle CBA"]),
    ("50", [r"m\angle ABC=50", r"\text{x}=50"]),
]
WRONG += [
    (
        "5",
        [r"\text{not the answer}=5", r"\text{wrong}=5", r"\text{half of it: }5", r"\text{not: }5"]
        + [r"\text{minus}: 5", "-x=5", "|x|=5", r"x\cdot 2=5", "x2=5", r"\ln x=5", "-f(x)=5"]
        + ["x^2=5", "x^{-1}=5", "a/b=5", "x^y=5", "x+x=5", "x-x=5", "xx=5", "x!=5", "5=-x"],
    ),
    ("y=5", [r"\frac{dy}{dx}=5", "f'(x)=5"]),
    (r"\angle ABC", [r"\angle ACB"]),
    (r"\angle ABC=50", [r"\angle ACB=50"]),
]

# Words are no formulas: signs that touch letters are algebra, and items keep their order.
RIGHT += [
    ("-acb", ["-abc"]),
    (r"\text{St. Louis}", ["St. Louis", "st louis"]),
    ("odd", ["Odd"]),
    (r"\text{Yes}", ["YES"]),
    ("Ann and Bob", ["Bob and Ann"]),
    ("(Bob, Ann)", ["(Bob,Ann)"]),
    ("A, C", ["(A), (C)", r"\text{\text{A, C}}", "A and C"]),
    ("No. They can't be.", [r"\text{No. They can't be.}"]),
]
WRONG += [
    ("abc-d", ["abcd"]),
    ("xyz-x", ["xyzx"]),
    ("xyzx", [r"\text{xyz-x}"]),
    ("(-abc)", ["abc"]),
    ("abc", ["-abc", "xyz'", "abc'", "ABC", "a.bc", r"\text{-abc}"]),
    ("(pqr)(stu)", ["(pqr)-(stu)"]),
    ("f(abc)", ["fabc"]),
    ("(xyz, abc)", ["(abc, xyz)"]),
    ("(Bob, Ann)", ["(Ann, Bob)"]),
    (r"(\text{Bob}, \text{Ann})", [r"(\text{Ann}, \text{Bob})"]),
    ("A, B, C", ["C, A, B"]),
]

# (the answer, one that says it, one that only computes it)
SIMPLIFIED = [
    ("12", "12.0", r"\frac{10!+11!+12!}{10!+11!}"),
    ("12", "x=12", "5+7"),
    ("12", "24/2", "5+7=12=5+7"),
    (r"11\sqrt{2}", r"\sqrt{242}", r"\sqrt{121}\sqrt{2}+0"),
    (r"\frac{1}{2}", "0.5", r"\sin 30^\circ"),
    ("(x+1)^2", "(1+x)^2", "x^2+2x+1"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", r"\sqrt{\sqrt[3]{\sqrt{\frac{1}{729}}}}"),
    ("(1,2)", "(1,2)", "(3-2,1+1)"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", r"\cos 45^\circ"),
    (r"\frac{\pi}{6}", r"\pi/6", r"\arcsin \frac{1}{2}"),
    ("50\\%", "0.5", "0.25+0.25"),
    ("2+3i", "3i+2", "(1+i)(2.5+0.5i)"),
]


def pairs(table: list) -> list:
    return [(answer, given) for answer, texts in table for given in texts]


@pytest.mark.parametrize(("answer", "given"), pairs(RIGHT))
def test_what_equals_an_answer(answer, given):
    assert equal(given, answer)


@pytest.mark.parametrize(("answer", "given"), pairs(WRONG))
def test_what_does_not(answer, given):
    assert not equal(given, answer)


@pytest.mark.parametrize("answer", [answer for answer, _ in (*RIGHT, *WRONG)])
def test_an_answer_equals_itself(answer):
    assert equal(answer, answer, simplified=True)


@pytest.mark.parametrize(("answer", "short", "echo"), SIMPLIFIED)
def test_an_answer_that_must_be_worked_out(answer, short, echo):
    assert equal(short, answer, simplified=True)
    assert equal(echo, answer) and not equal(echo, answer, simplified=True)


@pytest.mark.parametrize("text", ["", " ", "{}", r"\text{}", r"\mathrm{ }", r"\text{\textbf{}}"])
def test_what_shows_nothing_is_no_answer(text):
    assert not equal(text, text) and not equal(text, "5")
