"""Imports point strictly down: the level table of docs/architecture.md, held over the syntax trees."""

import ast
import re
import sys
from pathlib import Path

import anybatch

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "anybatch"


def levels():
    """The table in docs/architecture.md: module name to level."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = {}
    for level, names in re.findall(r"^ {4}(\d+)\s+(.+)$", text, re.MULTILINE):
        found.update(dict.fromkeys(re.findall(r"[\w.]+", names), int(level)))
    return found


def modules():
    return {path.stem: ast.parse(path.read_text()) for path in SOURCE.glob("*.py")}


def imports(tree):
    """Full names of everything imported anywhere in a module, TYPE_CHECKING blocks and functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_every_module_stands_in_the_table():
    assert set(levels()) == set(modules())


def test_imports_point_strictly_down():
    table = levels()
    for name, tree in modules().items():
        for imported in imports(tree):
            if imported == "anybatch":
                assert table[name] > table["__init__"], f"{name} imports the package that is made of it"
            elif imported.startswith("anybatch."):
                target = imported.split(".")[1]
                assert table[target] < table[name], f"{name} (level {table[name]}) imports {target} ({table[target]})"


def test_the_core_depends_on_torch_and_the_standard_library_alone():
    table = levels()
    for name, tree in modules().items():
        if table[name] <= table["__init__"] and name not in ("_report", "_progress"):
            roots = {imported.split(".")[0] for imported in imports(tree)} - {"anybatch", "torch"}
            assert roots <= set(sys.stdlib_module_names), f"{name} imports {roots}"


def test_exported_names_are_sorted_and_complete():
    tree = modules()["__init__"]
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert list(anybatch.__all__) == sorted(anybatch.__all__)
    assert set(anybatch.__all__) == imported
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If) for node in ast.walk(tree))
