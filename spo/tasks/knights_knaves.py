"""Knights and knaves: knights' statements are true, knaves' are false; who is a knight?

The worked solutions guess everybody's role, check statement by statement, and sometimes give up
at the first contradiction.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Annotated, TypeGuard

from annotated_types import Ge, Le

from spo.tasks.problem import Problem, answer_span, column, problem_stream, stream, tag
from spo.tasks.reading import read_problems
from spo.tasks.sources import Source, title

NAME = "knights_knaves"
PEOPLE = ("Ann", "Bob", "Cat", "Dan", "Eve", "Fay", "Gus", "Hal")
ROLES = ("knave", "knight")  # index 1 (True) tells the truth
ATTEMPTS = 3  # maximum number of guesses in a worked solution
WRONG, GIVE_UP = 0.5, 0.4  # probability that a guess is wrong; that a wrong one is the last
VOCABULARY = (NAME, *PEOPLE, *ROLES, "says", "is", "and", "or", ".", "true", "false", "yes", "no")
VOCABULARY += ("none",)

_MAX_LENGTH = 1000  # characters of an answer
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_GROUP = re.compile(r"\b(knights?|knaves?)\s*(?::|are|is)\s*")
_ROLE = {"knight": True, "knights": True, "knave": False, "knaves": False}
_FILLERS = frozenset(("is", "are", "a", "an", "and", "the"))
_NOBODY = frozenset(("none", "nobody"))

Atom = tuple[int, bool]  # person, is a knight
Statement = tuple[str, tuple[Atom, ...]]  # "", "and" or "or"; one or two atoms


@dataclass(frozen=True)
class KnightsKnaves:
    """Problems with `people` people; each has exactly one solution."""

    people: Annotated[int, Ge(2), Le(len(PEOPLE))] = 3

    def problems(
        self, split: str, seed: int, source: Source | str | None = None
    ) -> Iterator[Problem]:
        """Distinct problems; see `stream` for the splits.

        With a `source` they are its rows `quiz`, `names`, `solution` (who is a knight) with that
        number of people; see `read_problems`.
        """
        count = self.people
        if source is None:
            return stream(NAME, split, seed, lambda rng: _draw(rng, count), lambda p: p.text)
        read = read_problems(NAME, split, source, _problem)
        chosen = [problem for problem in read if len(problem.answer["people"]) == count]
        if not chosen:
            raise ValueError(f"{title(source)}: no {split} problem has {count} people")
        return problem_stream(NAME, split, seed, chosen)

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last answer span names exactly the knights, or gives everybody's role.

        Accepts "Ann and Bob", "none", "nobody", "Ann is a knight, Bob is a knave" and "Knights:
        Ann; Knaves: Bob", in any case and order.
        """
        if not isinstance(answer, dict):
            return False
        people, knights = answer.get("people"), answer.get("knights")
        span = answer_span(text)
        if not _names(people) or not _names(knights) or span is None or len(span) > _MAX_LENGTH:
            return False
        roles = _roles(span, [_folded(name) for name in people])
        return roles is not None and roles == {_folded(name): name in knights for name in people}

    def answer(self, text: str) -> str | None:
        """The knights that the last answer span names or gives that role, sorted; or none."""
        span = answer_span(text)
        if span is None or len(span) > _MAX_LENGTH:
            return None
        roles = _stated(span)
        return None if roles is None else " ".join(sorted(k for k, r in roles if r)) or "none"


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _stated(span: str) -> list[tuple[str, bool]] | None:
    """The roles that a text gives, one by one; of a bare list of names the knights.

    None if it is empty or asks. Raises nothing: words without a role get none.
    """
    span = _folded(span)
    if "?" in span or "\uff1f" in span:  # asked, not said
        return None
    if groups := list(_GROUP.finditer(span)):
        if not span[: groups[0].start()].strip(" ,;.") and len(_WORD.findall(span)) > 1:
            ends = [*(m.start() for m in groups[1:]), len(span)]
            return [
                (word, _ROLE[match[1]])
                for match, end in zip(groups, ends, strict=True)
                for word in _WORD.findall(span[match.end() : end])
                if word not in _FILLERS | _NOBODY
            ]
    words = [w for w in _WORD.findall(span) if w not in _FILLERS]
    if not words:
        return None
    if any(w in _ROLE for w in words):
        pairs = list(zip(words[::2], words[1::2], strict=False))
        if len(words) % 2 or any(role not in _ROLE or name in _ROLE for name, role in pairs):
            pairs = [(n, r) for n, r in zip(words, words[1:], strict=False) if r in _ROLE]
            return [(name, _ROLE[role]) for name, role in pairs] + [("", False)]
        return [(name, _ROLE[role]) for name, role in pairs]
    return [(word, True) for word in words if word not in _NOBODY]


def _roles(span: str, people: list[str]) -> dict[str, bool] | None:
    """Everybody's role; None if the text gives too few, too many, or to somebody else."""
    stated = _stated(span)
    if stated is None:
        return None
    roles, spoken = dict(stated), _folded(span)
    if len(roles) != len(stated) or not roles.keys() <= set(people):
        return None
    if any(word in _ROLE for word in _WORD.findall(spoken)):
        return roles if len(roles) == len(people) else None
    if not roles:  # nobody, and nothing else
        only = [w for w in _WORD.findall(spoken) if w not in _FILLERS]
        return dict.fromkeys(people, False) if len(only) == 1 else None
    if any(word in _NOBODY for word in _WORD.findall(spoken)):
        return None
    return {name: name in roles for name in people}


def _problem(row: dict, where: str) -> Problem:
    names, roles = column(row, where, "names"), column(row, where, "answer", "solution")
    if not _names(names) or not isinstance(roles, list) or len(names) != len(roles):
        raise ValueError(
            f"{where}: expected lists of equal length in names and solution, "
            f"found {names!r:.80} and {roles!r:.80}"
        )
    knights = [name for name, knight in zip(names, roles, strict=True) if knight]
    return Problem(
        str(column(row, where, "problem", "quiz")), {"people": names, "knights": knights}
    )


def _draw(rng: random.Random, count: int) -> Problem:
    while True:
        statements = [_statement(rng, speaker, count) for speaker in range(count)]
        found = solve(statements)
        if len(found) == 1:
            said = [f"{name} says {_say(s)} ." for name, s in zip(PEOPLE, statements, strict=False)]
            knights = [name for name, knight in zip(PEOPLE, found[0], strict=False) if knight]
            answer = {"people": list(PEOPLE[:count]), "knights": knights}
            return Problem(f"{NAME} {' '.join(said)}\n", answer)


def _statement(rng: random.Random, speaker: int, count: int) -> Statement:
    joint = rng.choice(("", "and", "or"))
    if not joint:  # about oneself alone it would be empty or a paradox
        return joint, ((rng.choice([p for p in range(count) if p != speaker]), rng.random() < 0.5),)
    pair = rng.sample(range(count), 2)
    return joint, tuple((person, rng.random() < 0.5) for person in pair)


def _say(statement: Statement) -> str:
    joint, atoms = statement
    return f" {joint} ".join(f"{PEOPLE[person]} is {ROLES[knight]}" for person, knight in atoms)


def solve(statements: list[Statement]) -> list[tuple[bool, ...]]:
    """Every assignment of roles (True is a knight) that agrees with all statements."""
    return [
        roles
        for roles in product((True, False), repeat=len(statements))
        if all(_holds(s, roles) == role for s, role in zip(statements, roles, strict=True))
    ]


def _holds(statement: Statement, roles: tuple[bool, ...]) -> bool:
    joint, atoms = statement
    truths = [roles[person] == knight for person, knight in atoms]
    return any(truths) if joint == "or" else all(truths)


def _parse(text: str) -> list[Statement]:
    """The statements of a problem's text, in the order of the speakers."""
    statements = []
    for sentence in text.removeprefix(NAME).strip().rstrip(" .").split(" . "):
        words = sentence.split()[2:]  # X is R [joint Y is S]
        named = zip(words[::4], words[2::4], strict=True)
        atoms = tuple((PEOPLE.index(name), role == ROLES[1]) for name, role in named)
        statements.append((words[3] if len(atoms) > 1 else "", atoms))
    return statements


def solution(
    problem: Problem, rng: random.Random, wrong: float = WRONG, give_up: float = GIVE_UP
) -> str:
    """Guesses and checks; the last guess is the answer, wrong if the solution gives up there."""
    statements = _parse(problem.text)
    (right,) = solve(statements)
    lines, tried, roles = [], {right}, right
    for attempt in range(ATTEMPTS):
        roles = right
        if attempt < ATTEMPTS - 1 and rng.random() < wrong:
            while roles in tried:
                roles = tuple(rng.random() < 0.5 for _ in statements)
            tried.add(roles)
        lines += _check(statements, roles)
        if roles == right or rng.random() < give_up:
            break
    knights = [name for name, knight in zip(PEOPLE, roles, strict=False) if knight]
    return "\n".join([*lines, tag(" ".join(knights) or "none")])


def _check(statements: list[Statement], roles: tuple[bool, ...]) -> Iterator[str]:
    """The guess, then a line per speaker up to the first contradiction."""
    yield " ".join(f"{p} {ROLES[knight]}" for p, knight in zip(PEOPLE, roles, strict=False))
    for name, statement, role in zip(PEOPLE, statements, roles, strict=False):
        truths = [("false", "true")[roles[p] == knight] for p, knight in statement[1]]
        words = f" {statement[0]} ".join(truths)
        agrees = _holds(statement, roles) == role
        yield f"{name} {ROLES[role]} says {words} {'yes' if agrees else 'no'}"
        if not agrees:
            return


def _names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
