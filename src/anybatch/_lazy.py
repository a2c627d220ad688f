"""Public names that are loaded at their first use: torch takes seconds, and `anybatch --help` needs none of it."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module


def later(package: str, wings: Sequence[str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`: its public names come from its wings, all at the first use of one."""

    def load(name: str) -> object:
        module = sys.modules[package]
        if name in wings:
            return import_module(f"{package}.{name}")
        if name not in module.__all__:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        for each in wings:
            wing = import_module(f"{package}.{each}")
            vars(module).update({public: vars(wing)[public] for public in module.__all__ if public in vars(wing)})
        return vars(module)[name]

    return load, lambda: sorted({*vars(sys.modules[package]), *sys.modules[package].__all__})
