"""Names of a package that are imported when first asked for, as most modules bring torch, which takes seconds."""

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
