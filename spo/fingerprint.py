"""Fingerprints of functions that a Python caller gives: a resumed run asks for the same ones."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

FIXED = (str, int, float, tuple, type(None))  # types of values that a function cannot change


def fingerprint(function: Callable[..., Any], place: int = 0) -> str:
    """Of a function's text and of the values that it was made with, the same in every process.

    Args:
        place: in a list, where equal functions may hold what has no fingerprint, such as models.
    """
    return hashlib.sha256(f"{_content(function)}{place or ''}".encode()).hexdigest()[:12]


def _content(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _content(function.func) + _values([*function.args, *function.keywords.items()])
    if not inspect.isroutine(function):  # an object that can be called
        function = type(function).__call__
    cells = getattr(function, "__closure__", None) or ()
    made_with = [*(getattr(function, "__defaults__", None) or ())]
    made_with += [cell.cell_contents for cell in cells]
    return _text(function) + _values(made_with)


def _text(function: Callable[..., Any]) -> str:
    """A function's source; where it has none of its own, as a lambda, what it was compiled to."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return str(getattr(function, "__qualname__", type(function)))
    if code.co_name != "<lambda>":
        try:
            return inspect.getsource(function)
        except OSError:  # it was typed, or run by exec
            pass
    return _compiled(code)


def _compiled(code: CodeType) -> str:
    constants = [
        _compiled(value)
        if isinstance(value, CodeType)
        else sorted(map(repr, value))  # the order of a set is of one process
        if isinstance(value, frozenset)
        else repr(value)
        for value in code.co_consts
    ]
    return f"{code.co_code!r} {code.co_names} {constants}"


def _values(values: Iterable[Any]) -> str:
    fixed = [value for value in values if isinstance(value, FIXED)]
    return json.dumps(fixed, default=lambda value: None, skipkeys=True) if fixed else ""
