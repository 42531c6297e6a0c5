"""Tasks, shapes, rules and rewards by name: the package's own, `module:Name`, or `file.py:Name`.

Each name stands for a dataclass: its fields are the settings that a recipe gives, its methods do
the work. The package's own classes are loaded in the same way as those from outside.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

OWN: dict[str, dict[str, str]] = {
    "task": {
        "aime24": "spo.tasks.aime24:Aime24",
        "arithmetic": "spo.tasks.arithmetic:Arithmetic",
        "countdown": "spo.tasks.countdown:Countdown",
        "gsm8k": "spo.tasks.gsm8k:Gsm8k",
        "knights_knaves": "spo.tasks.knights_knaves:KnightsKnaves",
        "math": "spo.tasks.math:Math",
        "point24": "spo.tasks.point24:Point24",
        "rows": "spo.tasks.rows:Rows",
    },
    "reward.rule": {
        "boxed": "spo.tasks.rules:Boxed",
        "number": "spo.tasks.rules:Number",
        "answer": "spo.tasks.rules:Answer",
        "exact": "spo.tasks.rules:Exact",
        "format": "spo.tasks.rules:Format",
        "overlong": "spo.tasks.rules:Overlong",
    },
    "shape.kind": {
        "star": "spo.grow.shapes:StarConfig",
        "tree": "spo.grow.shapes:TreeConfig",
        "chain": "spo.grow.chain:ChainConfig",
    },
    "credit.type": {
        "values": "spo.credit.values:Values",
        "gae": "spo.credit.gae:Gae",
        "correct": "spo.credit.correct:Correct",
        "pairs": "spo.credit.pairs:Pairs",
    },
}
"""Key of the recipe -> short name -> module and class."""

METHODS = {
    "task": ("problems", "grade"),
    "shape.kind": ("make", "cost"),
    "credit.type": ("assign",),
    "reward.rule": (),
}
"""Methods that a class must have; docs/own-task.md and docs/extend.md describe them."""

BASES = {"shape.kind": "spo.config.shape:ShapeConfig", "credit.type": "spo.config.credit:Rule"}
"""Classes that it must inherit."""

GIVEN = "python:"  # begins the name of what was given in Python

_given: dict[str, Any] = {}
_names: dict[tuple[str, type], str] = {}  # (key, class from outside) -> where it was found

T = TypeVar("T")


def find(key: str, name: str, folder: Path | None = None) -> type[Any]:
    """The dataclass that `name` stands for under the recipe's `key` (one of `OWN`).

    A relative file is searched in `folder` (that of the recipe), then in the current one. Raises
    ValueError with one sentence if there is no such class, if it cannot be imported, or if it lacks
    a method.
    """
    kind, full = _found(key, name, folder)
    if not isinstance(kind, type):
        where, _, attribute = full.rpartition(":")
        raise ValueError(f"{key}: {where} has no class {attribute}")
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"{key}: expected {name} to be a dataclass, whose fields are its settings")
    base = object
    if key in BASES:
        home, _, called = BASES[key].partition(":")
        base = getattr(importlib.import_module(home), called)
        if not issubclass(kind, base):
            raise ValueError(f"{key}: expected {name} to inherit {called} of {home}")
    for method in METHODS[key]:
        written = getattr(kind, method, None)
        if not callable(written) or written is getattr(base, method, None):
            raise ValueError(f"{key}: {name} has no method {method}")
    if name not in OWN[key]:
        _names[key, kind] = full
    return kind


def function(key: str, name: str, folder: Path | None = None) -> tuple[Callable[..., Any], str]:
    """The function that `name` stands for, and its name that is valid from any folder.

    Raises ValueError with one sentence if there is none.
    """
    if name.startswith(GIVEN):
        if name not in _given:
            raise ValueError(
                f"{key}: {name.removeprefix(GIVEN)} was given in Python, and a recipe cannot bring "
                "it back: give the same one again"
            )
        return _given[name], name
    found, where = _found(key, name, folder)
    if not callable(found):
        raise ValueError(f"{key}: expected {name} to be a function, found {found!r:.80}")
    return found, where


def keep(thing: Any, fingerprint: str, unread: Sequence[str] = ()) -> str:
    """A name, for a recipe, of something that lives in this process alone.

    Args:
        fingerprint: of its content; a resumed run asks for the same.
        unread: types of what it holds that the fingerprint leaves out. With these a warning says
            that it takes the name of another.
    """
    own = thing.func if isinstance(thing, functools.partial) else thing
    called = getattr(own, "__qualname__", type(own).__qualname__)
    name = f"{GIVEN}{called.rpartition('.')[2]}#{fingerprint}"
    known = _given.get(name, thing)
    if unread and known is not thing and known != thing:
        warnings.warn(
            f"{name.removeprefix(GIVEN)} replaces an earlier one, also in recipes that name that: "
            f"they differ at most in what is not compared ({', '.join(unread)})",
            stacklevel=2,
        )
    _given[name] = thing
    return name


def is_here(name: str | None) -> bool:
    """Whether a name is none of what was given in Python, in another process."""
    return name is None or not name.startswith(GIVEN) or name in _given


def restore(name: str, thing: Any) -> None:
    """Keep what another process had kept under `name`."""
    _given[name] = thing


def _found(key: str, name: str, folder: Path | None) -> tuple[Any, str]:
    """What a module or file calls `name`, and its full name, `module:Name` or `/file.py:Name`."""
    own = OWN.get(key, {}).get(name)
    where, separator, attribute = (own or name).rpartition(":")
    if not separator or not where or not attribute.isidentifier():
        known = "".join(f"{short}, " for short in OWN.get(key, ()))
        raise ValueError(f"{key}: expected {known}module:Name or ./file.py:Name, found {name!r}")
    if own:
        module = importlib.import_module(where)
    else:
        path = _path_of(key, where, folder) if where.lower().endswith(".py") else None
        try:
            module = _from_file(path) if path else _from_module(where)
        except (Exception, SystemExit) as error:  # whatever the user's own code raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{key}: {where} cannot be imported ({reason})") from error
        where = str(path or where)
    if not hasattr(module, attribute):
        what = "class" if key in OWN else "function"
        raise ValueError(f"{key}: {where} has no {what} {attribute}")
    return getattr(module, attribute), f"{where}:{attribute}"


def name_of(key: str, kind: type) -> str:
    """The name of a class in a recipe, valid from any folder: the inverse of `find`."""
    if (key, kind) in _names:
        return _names[key, kind]
    module = kind.__module__
    full = f"{module}:{kind.__qualname__}"
    for short, own in OWN[key].items():
        if own == full:
            return short
    if module == "__main__":  # a script that makes its own recipe
        file = getattr(sys.modules[module], "__file__", None)
        return f"{Path(file).resolve()}:{kind.__qualname__}" if file else full
    return full


def importable(key: str, kind: type) -> str:
    """The name of a class that a Python caller gives, by which other processes find it too.

    Raises ValueError for a class of the running program itself, or of a function.
    """
    if kind.__module__ == "__main__" or "." in kind.__qualname__:
        raise ValueError(
            f"{key}: expected a class that the grading worker can import, found "
            f"{kind.__qualname__} of {kind.__module__}; move it to a file of its own, and name it "
            f"there: ./file.py:{kind.__name__}"
        )
    return name_of(key, kind)


def build(kind: type[T], settings: Mapping[str, Any], where: str, chosen: str = "") -> T:
    """`kind(**settings)`, checked by its annotations. Raises ValueError that names the setting.

    `chosen` names in errors the setting that chose the class, such as `shape.kind=tree`.
    """
    from pydantic import ValidationError
    from pydantic.errors import PydanticUserError

    known = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ValueError(
                f"recipe: unknown key {where}.{key}; known here"
                f"{f' ({chosen})' if chosen else ''}: {', '.join(known) or 'none'}"
                f"{f'; {where}={{...}} replaces the whole group' if chosen else ''}"
            )
    hints = _hints(kind)
    values = {k: _strict(v, hints.get(k, Any), f"{where}.{k}") for k, v in settings.items()}
    try:
        return _checker(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(_sentence(error, where)) from error
    except (PydanticUserError, NameError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: its settings' types cannot be checked ({reason})") from error
    except Exception as error:  # a class from outside may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{where}: {kind.__name__} cannot be made ({reason})") from error


def settings_of(instance: Any, where: str) -> dict[str, Any]:
    """The fields of a dataclass as plain values for YAML, which `build` reads back.

    Raises ValueError if they cannot be written.
    """
    from pydantic_core import PydanticSerializationError

    try:
        settings = _checker(type(instance)).dump_python(instance, mode="json")
    except (PydanticSerializationError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: its settings cannot be saved ({reason})") from error
    return {f.name: settings[f.name] for f in dataclasses.fields(instance) if f.init}


@functools.lru_cache(maxsize=128)
def _checker(kind: type) -> Any:
    """pydantic's checker of a dataclass, which takes a millisecond to make."""
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # `build` says which
        return {}


def _strict(value: Any, hint: Any, where: str) -> Any:
    """Check what pydantic would accept: unknown keys of inner dataclasses, booleans as numbers.

    It also turns YAML's booleans for `off` and `on` back into words if the setting takes words.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        fits = [h for h in inner if isinstance(value, Mapping) and dataclasses.is_dataclass(h)]
        rest = [h for h in inner if h is not type(None)]
        if bool in rest or not (fits or len(rest) == 1):
            return value
        return _strict(value, (fits or rest)[0], where)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, where)  # type: ignore[arg-type]
    if isinstance(value, bool):
        if hint in (int, float):
            raise ValueError(f"recipe: {where}: expected a number, found {value}")
        words = [w for w in (("on", "yes") if value else ("off", "no")) if w in inner]
        return words[0] if origin is Literal and words else value
    if origin in (list, tuple) and isinstance(value, list | tuple):
        alike = origin is list or Ellipsis in inner or len(inner) != len(value)
        of_each = [inner[0]] * len(value) if alike else inner
        pairs = enumerate(zip(value, of_each, strict=True))
        return [_strict(v, h, f"{where}.{i}") for i, (v, h) in pairs]
    if origin is dict and isinstance(value, Mapping):
        return {k: _strict(v, inner[1], f"{where}.{k}") for k, v in value.items()}
    return value


def _sentence(error: Any, where: str) -> str:
    """The first of pydantic's errors, as one sentence that names the setting."""
    first = error.errors()[0]
    setting = ".".join([where, *(str(part) for part in first["loc"])])
    if first["type"] == "value_error":  # raised by a class of this package or from outside
        said = str(first["ctx"]["error"])
        return said if said.startswith(f"{where}.") else f"{setting}: {said}"
    if first["type"] == "unexpected_keyword_argument":
        return f"recipe: unknown key {setting}"
    said = first["msg"].replace("a valid tuple", "a list")
    return f"recipe: {setting}: {said}, found {first['input']!r:.80}"


_FILE = "spo_file_"  # modules of files: name + digest of the path


def _path_of(key: str, name: str, folder: Path | None) -> Path:
    """The file that a recipe in `folder` means by `name`."""
    given = Path(os.path.expanduser(name))
    tried = [given] if given.is_absolute() else [f / given for f in (folder, Path.cwd()) if f]
    for path in tried:
        if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
            return path.resolve()
    raise ValueError(f"{key}: there is no file {' or '.join(map(str, tried))}"[:500])


def _from_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the command `spo` does not search there
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    """The module of a file, loaded once however its path is written."""
    name = _FILE + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for what it imports from its own folder
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
