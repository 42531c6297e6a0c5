"""Fingerprints of functions that a Python caller gives: a resumed run asks for the same ones."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

PLAIN = (str, bytes, bool, int, float, complex, type(None))
FIXED = (*PLAIN, tuple, FunctionType)  # of globals only these: others may be caches
MOST = 10_000  # values that are read of a function
DEEP = 50  # values inside of each other
SMALL = 64  # numbers in an array that is read


def fingerprint(function: Callable[..., Any], place: int = 0) -> str:
    """Of a function's text and of the values that it holds, the same in every process.

    It reads defaults, closures, attributes of objects, and the globals that the function names if
    they are plain values or functions of its own module.

    Args:
        place: in a list, where equal functions may hold what has no fingerprint, such as models.
    """
    text = _Reader(function).text(function)
    return hashlib.sha256(f"{text}{place or ''}".encode(errors="surrogatepass")).hexdigest()[:12]


def unread(function: Callable[..., Any]) -> list[str]:
    """Types of what it holds without a fingerprint, such as models: only their names count."""
    reader = _Reader(function)
    reader.text(function)
    return sorted(reader.unread)


class _Reader:
    """Writes values as text without addresses, or orders that differ between processes."""

    def __init__(self, function: Callable[..., Any]):
        self._home = _module(function)
        self._left = MOST
        self._open: set[int] = set()  # ids of what holds the present value
        self.unread: set[str] = set()

    def text(self, value: Any) -> str:
        """A value as text, with the name of its type."""
        self._left -= 1
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind in PLAIN:
            return f"{name} {value!r}"
        if id(value) in self._open:
            return f"{name} again"
        if len(self._open) >= DEEP:
            self.unread.add("values too deep")
            return name
        self._open.add(id(value))
        inside = self._inside(value)
        self._open.discard(id(value))
        if inside is None:
            self.unread.add(kind.__name__)
        return f"{name} {inside}"

    def _inside(self, value: Any) -> str | None:
        """What a value holds, or None if there is no telling."""
        kind = type(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return self._each([value.__self__, value.__func__])
        if isinstance(value, functools.partial):
            return self._each([value.func, value.args, value.keywords])
        if isinstance(value, type):
            return f"{value.__module__}.{value.__qualname__} {self._class(value)}"
        if isinstance(value, list | tuple):
            return self._each(value)
        if isinstance(value, dict):
            return self._each(value.items())
        if isinstance(value, set | frozenset):
            plain = all(type(item) in PLAIN for item in value)
            return str(sorted(map(repr, value))) if plain else None
        if isinstance(value, enum.Enum):
            return value.name
        if isinstance(value, PurePath):
            return str(value)
        if isinstance(value, re.Pattern):
            return f"{value.pattern!r} {value.flags}"
        if hasattr(kind, "dtype") and hasattr(kind, "shape"):
            return self._array(value)
        if "__wrapped__" in getattr(value, "__dict__", ()):  # of functools.cache
            return self.text(value.__wrapped__)
        if inspect.isroutine(value) or inspect.ismodule(value):
            return f"{getattr(value, '__module__', '')}.{value.__name__}"
        if dataclasses.is_dataclass(value):
            fields = [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
            return self._class(kind) + self._each(fields)
        if kind.__module__ == self._home and hasattr(value, "__dict__"):
            return self._class(kind) + self._each(sorted(vars(value).items()))
        return None

    def _each(self, values: Iterable[Any]) -> str:
        found = [self.text(value) for value in islice(values, max(self._left, 0))]
        if self._left <= 0:
            self.unread.add("many values")
        return f"[{', '.join(found)}]"

    def _array(self, value: Any) -> str:
        """Of a numpy array or a tensor the type and shape, and the numbers if they are few."""
        text = f"{value.dtype} {tuple(value.shape)}"
        if math.prod(value.shape) <= SMALL:
            with contextlib.suppress(Exception):  # such as a tensor without data
                return f"{text} {value.tolist()!r}"
        self.unread.add(type(value).__name__)
        return text

    def _function(self, function: FunctionType) -> str:
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
        held = [function.__defaults__, function.__kwdefaults__, cells]
        own = {key: item for key, item in vars(function).items() if key != "__wrapped__"}
        names = function.__globals__.keys() & set(_names(function.__code__))
        used = {
            key: item
            for key in sorted(names)
            if isinstance(item := function.__globals__[key], FIXED)
            and not (key.startswith("__") or _is_elsewhere(item, self._home))
        }
        return _source(function.__code__) + self._each([*held, own, used])

    def _class(self, kind: type) -> str:
        """The functions and plain values of a class of the function's own module."""
        found = []
        for one in kind.__mro__:
            for key, item in sorted(vars(one).items() if one.__module__ == self._home else ()):
                item = getattr(item, "__func__", getattr(item, "fget", item))
                plain = type(item) in PLAIN and not key.startswith("__")
                if plain or isinstance(item, FunctionType):
                    found.append((key, item))
        return self._each(found)


def _module(function: Any) -> str | None:
    """The module in which a function, or the class of an object that can be called, is written."""
    if isinstance(function, functools.partial):
        return _module(function.func)
    if inspect.isroutine(function) or isinstance(function, type):
        return function.__module__
    return type(function).__module__


def _is_elsewhere(value: Any, home: str | None) -> bool:
    return isinstance(value, FunctionType) and value.__module__ != home


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a function that is still being made
        return False
    return True


def _names(code: CodeType) -> Iterator[str]:
    """Names of globals, among others, that a function and those inside it use."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _names(value)


def _source(code: CodeType) -> str:
    """A function's source; where it has none of its own, as a lambda, what it was compiled to."""
    if code.co_name != "<lambda>":
        try:
            return inspect.getsource(code)
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
