"""Imports point strictly down between the packages of docs/architecture.md, and in no circle inside of one."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import anybatch

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "anybatch"
CORE = {"_branch", "_check", "_gradients", "_scaling", "_record", "_ema", "_maps", "_controller", "_forecast"}


def levels():
    """The table in docs/architecture.md: the name of a package, or of a module beside them, to its level."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = {}
    for level, names in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE):
        found.update(dict.fromkeys(re.findall(r"[\w.]+", names), int(level)))
    return found


def files():
    """Every module by its dotted path: `cli`, `_record.writer`; a package's `__init__` by the package's name."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


def imports(path):
    """`(module, names)` of everything imported anywhere in a file, TYPE_CHECKING blocks and functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module, tuple(alias.name for alias in node.names)


def ours(path):
    """The imports of the package itself: `("_record", ("RunRecord",))`, or `("", ...)` for the package as a whole."""
    for module, names in imports(path):
        if module == "anybatch" or module.startswith("anybatch."):
            yield module.removeprefix("anybatch").lstrip("."), names


def package_of(name):
    return name.split(".")[0]


def test_every_package_is_in_the_table():
    assert set(levels()) == {package_of(name) for name in files()}


def test_imports_point_strictly_down_between_packages():
    table = levels()
    for name, path in files().items():
        own = package_of(name)
        for target, _ in ours(path):
            other = package_of(target) if target else "__init__"
            if other != own:
                assert table[other] < table[own], f"{name} (level {table[own]}) imports {other} ({table[other]})"
                assert target in ("", other), f"{name} imports {target}: other packages import from the package itself"


def test_no_package_has_a_circle_inside():
    graph = {
        name: {target for target, _ in ours(path) if package_of(target) == package_of(name)}
        for name, path in files().items()
    }
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle of imports: {' -> '.join(error.args[1])}") from None
    assert set(files()) <= set(order)


def test_a_package_exports_what_other_packages_use_and_nothing_else():
    used = {}
    for folder in (SOURCE, ROOT / "recipes", ROOT / "benchmarks", ROOT / "examples"):
        for path in folder.rglob("*.py"):
            inside = package_of(".".join(path.relative_to(SOURCE).parts)) if folder == SOURCE else ""
            for target, names in ours(path):
                if target and target != inside:
                    used.setdefault(target, set()).update(names)
    for name, path in files().items():
        if path.name == "__init__.py" and name != "__init__":
            exported = {each for _, names in ours(path) for each in names}
            assert exported == used.get(name, set()), f"{name}: {exported ^ used.get(name, set())}"
            assert set(_all(path)) == exported


def test_the_core_depends_on_torch_and_the_standard_library_alone():
    for name, path in files().items():
        if package_of(name) in CORE | {"__init__", "_errors", "_version", "sinks"} and name != "_record.progress":
            roots = {module.split(".")[0] for module, _ in imports(path)} - {"anybatch", "torch"}
            assert roots <= set(sys.stdlib_module_names), f"{name} imports {roots}"


def test_the_first_public_name_loads_the_core_alone():
    """In a fresh interpreter: no page, no demo, no command, and nothing beside torch's own needs."""
    code = (
        "import sys, torch; before = set(sys.modules); import anybatch; anybatch.attach;"
        "print(*sorted({name for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    packages = {name.split(".")[1] for name in loaded if name.startswith("anybatch.")}
    assert CORE <= packages <= CORE | {"_errors", "_html", "_lazy", "_numbers", "_version"}
    third = {name.split(".")[0] for name in loaded} - {"anybatch", "torch"} - set(sys.stdlib_module_names)
    assert not third, f"import anybatch loads {third}"


def test_exported_names_are_sorted_and_complete():
    path = files()["__init__"]
    tree = ast.parse(path.read_text())
    imported = {each for module, names in ours(path) if module != "_lazy" for each in names}
    assert list(anybatch.__all__) == sorted(anybatch.__all__)
    assert set(anybatch.__all__) == imported
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
    assert sum(isinstance(node, ast.If) for node in ast.walk(tree)) == 1  # names are loaded at their first use


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["plan", "--help"], ["forecast", "--help"]])
def test_help_does_not_wait_for_torch(words):
    pytest.importorskip("typer")
    code = (
        f"import sys; sys.argv = {['anybatch', *words]!r}\n"
        "from anybatch import cli\n"
        "try: cli.main()\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "[]"
    assert len(found.splitlines()) > 1


def test_public_names_are_there_before_they_are_loaded():
    code = (
        "import anybatch, sys\n"
        "assert 'torch' not in sys.modules and set(anybatch.__all__) <= set(dir(anybatch))\n"
        "assert not hasattr(anybatch, 'attache') and 'torch' not in sys.modules\n"
        "from anybatch import sinks, gain\n"
        "names = {}\n"
        "exec('from anybatch import *', names)\n"
        "assert set(anybatch.__all__) <= set(names) and names['gain'] is gain and callable(anybatch.forecast)\n"
        "assert anybatch._record.__name__ == 'anybatch._record'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _all(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []
