"""Mutants of the core: one mechanical change each, in a copy of the package; the tests must notice.

    python tests/mutation/mutants.py 100

A mutant runs in a fork of this process, which has torch and pytest loaded and no anybatch: the tests that know its
file; if it survives, those of several ranks that do; last all others of one process. Results are kept by mutant, so a
stopped run goes on; at the end each test that caught one must pass without it. Left alone: all text, annotations,
decorators, warnings' arguments, `pragma: no cover`. The same seed draws the same mutants of the same source;
equivalent.md has those that no test could notice.
"""

import ast
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

# Loaded here once for all forks, the last three because tests do.
import hypothesis  # noqa: F401
import pytest
import torch.distributed.fsdp
import torch.testing._internal.common_optimizers  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]
import near

RESULTS = ROOT / "mutants.json"
BUSY, WAITING = 300, 3600  # seconds for a mutant's tests: of work, which a busy machine does not stretch, and of clock
FEW = [f"tests/test_scenarios.py::test_a_random_training_is_the_plain_loops[{seed}]" for seed in range(60)]
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node):
    """The mutants of one node: pairs of a kind and the node that takes its place."""
    match node:
        case ast.Compare() if type(node.ops[0]) in SWAPS:
            yield "comparison", twin(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
        case ast.BinOp() | ast.AugAssign() if type(node.op) in SWAPS:
            yield "arithmetic", twin(node, op=SWAPS[type(node.op)]())
        case ast.BoolOp():
            yield "and / or", twin(node, op=SWAPS[type(node.op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "not", node.operand
        case ast.If() | ast.While() | ast.IfExp():
            yield "not", twin(node, test=ast.UnaryOp(ast.Not(), node.test))
            for value in () if isinstance(node, ast.While) else (True, False):
                yield "forced", twin(node, test=ast.Constant(value))
        case ast.Constant(value=bool()):
            yield "constant", ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield "constant", ast.Constant(node.value + 1)
            if node.value not in (0, 1):
                yield "constant", ast.Constant(node.value * 2)
        case ast.Name(id="min" | "max"):
            yield "min / max", twin(node, id="max" if node.id == "min" else "min")
        case ast.Return() if node.value is not None and ast.unparse(node.value) != "None":
            yield "return", twin(node, value=ast.Constant(None))
    named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)  # a name gone is noticed anyway
    if isinstance(node, ast.Expr | ast.Raise | ast.AugAssign | ast.Assign) and not named:
        yield "deleted", ast.Pass()


def twin(node, **values):
    other = copy.copy(node)
    vars(other).update(values)
    return other


def places(node, skipped):
    """All that may be mutated below `node`: its parent, the field, the index in it, and the node itself."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if text or getattr(child, "lineno", 0) in skipped or ast.unparse(child).startswith("__all__ ="):
                continue
            yield node, name, index, child
            if not isinstance(child, ast.Raise) and not ast.unparse(child).startswith("warnings.warn("):
                yield from places(child, skipped)


def mutants():
    """Every mutant of the core: its name, its kind, its file, and a function that gives the file's new text."""
    package = ROOT / "src" / "anybatch"
    for path in sorted(path for each in near.PACKAGE for path in (package / each).glob("*.py")):
        tree, lines = ast.parse(path.read_text()), path.read_text().splitlines()
        skipped = {i for i, line in enumerate(lines, 1) if "pragma: no cover" in line}
        for parent, field, index, node in places(tree, skipped):
            for kind, new in changes(node):
                before, after = (ast.unparse(each).splitlines()[0] for each in (node, new))
                name = f"{path.relative_to(package)}:{node.lineno}:{node.col_offset} {before} -> {after}"
                yield name, kind, str(path.relative_to(package)), partial(mutated, tree, parent, field, index, new)


def mutated(tree, parent, field, index, new):
    old = getattr(parent, field)
    setattr(parent, field, new if index is None else [*old[:index], new, *old[index + 1 :]])
    text = ast.unparse(ast.fix_missing_locations(tree))
    setattr(parent, field, old)
    return text


def sample(found, count, *, seed=0):
    """As many of each kind, as far as there are."""
    kinds, r = {}, random.Random(seed)
    for each in found:
        kinds.setdefault(each[1], []).append(each)
    queues = [r.sample(kinds[kind], len(kinds[kind])) for kind in sorted(kinds)]
    dealt = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    return dealt[:count]


def stages(file):
    """The tests for a mutant of `file`, in the order in which they are asked; each only of who survived the last."""
    alone = [[path] for path in near.of_one_process(file)]
    ranks = [[path] for path in near.of_several_ranks(file)]
    rest = [[str(path.relative_to(ROOT))] for path in sorted((ROOT / "tests").glob("test_*.py"))]
    few = [FEW if each == ["tests/test_scenarios.py"] else each for each in alone]
    return [few, ranks, [each for each in rest if each not in few]]


def run(tests, file="", text=""):
    """Run `tests` in a fork, with `text` in place of a file of the package; the first that failed, or ''."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "src" / "anybatch", folder / "anybatch")
        if file:  # else the package as it is
            (folder / "anybatch" / file).write_text(text)
        child = os.fork()
        if child == 0:
            try:
                os._exit(not passes(tests, folder))
            finally:
                os._exit(2)
        end = time.monotonic() + WAITING
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            time.sleep(0.05)
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
        lines = (folder / "log").read_text(errors="replace").splitlines()
    if os.WIFSIGNALED(ended[1]):
        return "too long"
    named = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return (named or lines[-1:] or ["no output"])[0] if ended[1] else ""


def passes(tests, folder):
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CPU, (BUSY, BUSY))
    os.environ["PYTHONPATH"] = f"{folder}"
    sys.path[:0] = [f"{folder}"]
    out = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={folder}/pytest"]
    options += ["-m", "not slow", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)  # all of a file may be slow
    return all(pytest.main([*options, *test]) in fine for test in tests)


def main():
    os.chdir(ROOT)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = sample(mutants(), int(sys.argv[1]) if len(sys.argv) > 1 else 100)
    for stage in range(3):
        for name, kind, file, text in chosen:
            asked, caught = results.get(name, (0, ""))
            if asked > stage or caught:
                continue
            results[name] = (stage + 1, run(stages(file)[stage], file, text()))
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {stage} {kind:12} {name}: {results[name][1] or 'survived'}", flush=True)
    survivors = [name for name, *_ in chosen if not results[name][1]]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were caught. Survivors:", *survivors, sep="\n  ")
    caught = {results[name][1].partition(" ")[2] for name, *_ in chosen}
    if failed := run([[test] for test in sorted(caught) if test.startswith("tests/")]):
        sys.exit(f"This fails without any mutant, and so has caught none: {failed}")


if __name__ == "__main__":
    main()
