"""Imports that take seconds: the names of a package are imported when first asked for, as most modules bring torch."""

import gc
import importlib
from collections.abc import Callable, Mapping


def import_lazily(package: str, names: Mapping[str, str]) -> Callable[[str], object]:
    """Give the `__getattr__` of a package for names by their modules, separated by spaces."""
    homes = {name: module for module, names in names.items() for name in names.split()}

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return find


def begin_imports() -> None:
    """Look for no garbage until `end_imports`: modules are none, and to look takes a fifth of the time of a start."""
    gc.disable()


def end_imports() -> None:
    """Look for garbage again, but no more among what was imported."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
