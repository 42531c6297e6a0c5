"""Replacements of attributes that can be taken back, and the check of what is replaced."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any


class Patch:
    """Replaced attributes. Call it, or leave its `with` block, to put the old ones back."""

    def __init__(self) -> None:
        self._owners: list[tuple[Any, str, dict[str, Any]]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, and remember what the owner itself held there, if anything."""
        held = {name: vars(owner)[name]} if name in vars(owner) else {}
        self._owners.append((owner, name, held))
        setattr(owner, name, value)

    def __call__(self) -> None:
        while self._owners:
            owner, name, held = self._owners.pop()
            setattr(owner, name, held[name]) if held else delattr(owner, name)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self()


def check_once(caller: str, applied: bool) -> None:
    """Raise RuntimeError if what is to be replaced has been replaced already."""
    if applied:
        raise RuntimeError(f"{caller}: already applied; call the Patch to undo it first")


def import_known(caller: str, package: str, version: str, module: str) -> ModuleType:
    """Import `module` of a release `version`.* of a package.

    Raises ModuleNotFoundError where the package is not installed, RuntimeError for other releases.
    """
    install = f"pip install '{package}=={version}.*'"
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        message = f"{caller}: expected {package} {version}, found none: {install}"
        raise ModuleNotFoundError(message, name=package) from None
    if not found.startswith(version + "."):
        raise RuntimeError(f"{caller}: expected {package} {version}, found {found}: {install}")
    return importlib.import_module(module)


def check_parameters(caller: str, function: Callable[..., Any], expected: str) -> None:
    """Raise RuntimeError unless the function has these parameters: names with spaces between."""
    found = list(inspect.signature(function).parameters)
    if found != expected.split():
        raise RuntimeError(
            f"{caller}: expected {function.__qualname__}({', '.join(expected.split())}), "
            f"found ({', '.join(found)}): it is not the function that this patch replaces"
        )
