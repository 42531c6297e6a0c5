"""Tasks, shapes and credit rules by name: the package's own, `module:Name`, or `file.py:Name`.

What a name stands for is a dataclass: its fields are the settings that a recipe gives, its methods
do the work. The package's own come through the same door as those from outside of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

OWN: dict[str, dict[str, str]] = {
    "task": {
        "aime24": "spo.tasks.aime24:Aime24",
        "arithmetic": "spo.tasks.arithmetic:Arithmetic",
        "countdown": "spo.tasks.countdown:Countdown",
        "gsm8k": "spo.tasks.gsm8k:Gsm8k",
        "knights_knaves": "spo.tasks.knights_knaves:KnightsKnaves",
        "math": "spo.tasks.math:Math",
        "point24": "spo.tasks.point24:Point24",
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
"""Key of the recipe -> short name -> where it is."""

METHODS = {"task": ("problems", "grade")}
"""What a class must be able to do."""

BASES = {"shape.kind": "spo.config.shape:ShapeConfig", "credit.type": "spo.config.credit:Rule"}
"""What it must inherit."""

T = TypeVar("T")


def find(key: str, name: str, folder: Path | None = None) -> type[Any]:
    """The dataclass that `name` stands for under the recipe's `key` (one of `OWN`).

    A relative file is looked for in `folder` (that of the recipe), then in the current one. Raises
    ValueError with one sentence if there is none, it cannot be imported, or it lacks a method.
    """
    own = OWN[key].get(name)
    place, separator, attribute = (own or name).rpartition(":")
    if not separator or not place or not attribute.isidentifier():
        raise ValueError(
            f"{key}: expected {', '.join(OWN[key])}, module:Name or ./file.py:Name, found {name!r}"
        )
    if own:
        module = importlib.import_module(place)
    else:
        path = _path_of(key, place, folder) if place.endswith(".py") else None
        try:
            module = _from_file(path) if path else _from_module(place)
        except Exception as error:  # whatever the user's own code raises while it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{key}: {place} cannot be imported ({reason})") from error
    kind = getattr(module, attribute, None)
    if not isinstance(kind, type):
        raise ValueError(f"{key}: {place} has no class {attribute}")
    if not dataclasses.is_dataclass(kind):
        raise ValueError(f"{key}: {name} must be a dataclass, whose fields are its settings")
    if missing := [m for m in METHODS.get(key, ()) if not callable(getattr(kind, m, None))]:
        raise ValueError(f"{key}: {name} has no method {' and no method '.join(missing)}")
    if base := BASES.get(key):
        place, _, attribute = base.partition(":")
        if not issubclass(kind, getattr(importlib.import_module(place), attribute)):
            raise ValueError(f"{key}: {name} must inherit {attribute} of {place}")
    return kind


def name_of(key: str, kind: type) -> str:
    """What a recipe calls a class, from any folder: the inverse of `find`."""
    module = kind.__module__
    place = f"{module}:{kind.__qualname__}"
    for short, own in OWN[key].items():
        if own == place:
            return short
    if module.startswith(_FILE) or module == "__main__":
        file = getattr(sys.modules[module], "__file__", None)
        return f"{file}:{kind.__qualname__}" if file else place
    return place


def build(kind: type[T], settings: Mapping[str, Any], where: str, chosen: str = "") -> T:
    """`kind(**settings)`, checked by its annotations. Raises ValueError that names the setting.

    `chosen` says in errors what chose the kind, such as `shape.kind=tree`.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    known = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ValueError(
                f"recipe: unknown key {where}.{key}; known here"
                f"{f' ({chosen})' if chosen else ''}: {', '.join(known) or 'none'}"
                f"{f'; {where}={{...}} replaces the whole group' if chosen else ''}"
            )
    values = dict(settings)
    for key, hint in _hints(kind).items():
        value = values.get(key)
        if isinstance(value, bool):
            values[key] = _as_word(value, hint)
        for inner in (hint, *get_args(hint)):
            if isinstance(value, Mapping) and dataclasses.is_dataclass(inner):
                values[key] = build(inner, value, f"{where}.{key}")  # pydantic passes unknown keys
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ValueError(_sentence(error, where)) from error
    except (PydanticUserError, NameError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: its settings' types cannot be checked ({reason})") from error


def _hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # `build` says which
        return {}


def _as_word(value: bool, hint: Any) -> bool | str:
    """`off` and `on`, which YAML reads as booleans, where the setting is one of some words."""
    words = get_args(hint) if get_origin(hint) is Literal else ()
    found = [word for word in (("on", "yes") if value else ("off", "no")) if word in words]
    return found[0] if found else value


def _sentence(error: Any, where: str) -> str:
    """The first of pydantic's errors, as one sentence that names the setting."""
    first = error.errors()[0]
    place = ".".join([where, *(str(part) for part in first["loc"])])
    if first["type"] == "value_error":  # a check of our own, or of a class from outside
        said = str(first["ctx"]["error"])
        return said if said.startswith(f"{where}.") else f"{place}: {said}"
    if first["type"] == "unexpected_keyword_argument":
        return f"recipe: unknown key {place}"
    return f"recipe: {place}: {first['msg']}, found {first['input']!r}"


_FILE = "spo_file_"  # modules of files: name + digest of the path


def _path_of(key: str, place: str, folder: Path | None) -> Path:
    """The file that a recipe of `folder` means by `place`."""
    given = Path(place).expanduser()
    tried = [given] if given.is_absolute() else [f / given for f in (folder, Path.cwd()) if f]
    for path in tried:
        if path.is_file():
            return path.resolve()
    raise ValueError(f"{key}: there is no file {' or '.join(map(str, tried))}")


def _from_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # the command `spo` does not look there
    return importlib.import_module(name)


def _from_file(path: Path) -> ModuleType:
    """The module of a file, loaded once however it is spelled."""
    name = _FILE + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
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
