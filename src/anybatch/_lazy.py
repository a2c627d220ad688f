"""Public names that are loaded at their first use: torch takes seconds, and `anybatch --help` does not need it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def later(
    package: str, parts: Sequence[str], *, removed: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`; the first use of a public name loads all of them from `parts`.

    A name that was removed is an error that states what returns its objects now.
    """

    def load(name: str) -> object:
        module = sys.modules[package]
        if name in parts:
            return import_module(f"{package}.{name}")
        if name in removed:
            raise AttributeError(f"{package}.{name} is no public name any more: {removed[name]} returns such objects.")
        if name not in module.__all__:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        for each in parts:
            part = vars(import_module(f"{package}.{each}"))
            vars(module).update({public: part[public] for public in module.__all__ if public in part})
        return vars(module)[name]

    return load, lambda: sorted({*vars(sys.modules[package]), *sys.modules[package].__all__})
