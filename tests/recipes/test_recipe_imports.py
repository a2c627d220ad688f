"""Recipes and benchmarks import by whole names, change no search path, and stand in no circle; by syntax trees."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["recipes", "benchmarks"]


def trees(root, package):
    """Every module of a package by its whole name."""
    files = {path: path.relative_to(root).with_suffix("").parts for path in (root / package).rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): ast.parse(path.read_text()) for path, parts in files.items()}


def imports(tree):
    """All that a module imports, in its functions too: of `from a import b` both `a` and `a.b`, one may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def graph(root, package):
    """Of every module, the modules of its package that it imports."""
    found = trees(root, package)
    return {name: set(imports(tree)) & found.keys() for name, tree in found.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(package):
    found = graph(ROOT, package)
    assert any(found.values())
    TopologicalSorter(found).prepare()  # a CycleError names the circle


def test_a_circle_is_found_though_a_function_closes_it(tmp_path):
    (tmp_path / "some" / "room").mkdir(parents=True)
    (tmp_path / "some" / "one.py").write_text("def f():\n    from some.room import two\n")
    (tmp_path / "some" / "room" / "two.py").write_text("from some.one import f\n")
    with pytest.raises(CycleError, match=r"some\.room\.two"):
        TopologicalSorter(graph(tmp_path, "some")).prepare()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_imported_by_its_bare_name(package):
    found = trees(ROOT, package)
    bare = {name.rpartition(".")[2] for name in found} - {package}
    for name, tree in found.items():
        assert not bare & {imported.split(".")[0] for imported in imports(tree)}, name


@pytest.mark.parametrize("folder", [*PACKAGES, "tests/recipes"])
def test_nobody_changes_the_search_path(folder):
    for path in (ROOT / folder).rglob("*.py"):
        named = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert "sys.path" not in named, path
