"""Mutants of the core: one mechanical change each, in a copy of the package; the tests must notice.

    python tests/mutation/mutants.py --count 100 --results tests/mutation/results.json

A mutant runs in a fork of this process, which has torch and pytest loaded and no anybatch: the tests that know its file
first, the other ones of one process only if it survived those. Results are kept by mutant, so a stopped run goes on.
Left alone: docstrings and all other text, annotations, decorators, warnings' arguments, `pragma: no cover`.
"""

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

# Loaded here once for all forks.
import pytest
import torch.distributed.fsdp  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
CORE = ("_gradients", "_scaling", "_controller", "_ema")
SEED, LIMIT = 0, 900  # seconds for the tests of one mutant
# The tests that know a wing, the fastest and nearest first; those of single files before them.
NEAR = {
    "_gradients": "scenarios gather norms accumulation lagged metric precision controller compile",
    "_scaling": "scenarios rules batch clock laws momentum schedules metric optimizers",
    "_controller": "scenarios lagged controller batch_controller accumulation metric gates record",
    "_ema": "ema ema_clock ema_changes ema_import ema_model",
}
FIRST = {
    "accumulation": "accumulation batch_controller",
    "families": "optimizers maps",
    "hyperparameters": "momentum optimizers",
    "moments": "laws",
    "weighing": "metric",
    "witness": "gather",
}
RANKS = {
    "_gradients/engine.py": "scenarios ddp fsdp",
    "_gradients/fsdp.py": "scenarios fsdp metric",
    "_gradients/join.py": "routes ddp",
    "_gradients/reduce.py": "scenarios routes ddp",
    "_gradients/gather.py": "scenarios ddp fsdp",
    "_gradients/metric.py": "metric",
    "_gradients/weighing.py": "metric",
    "_gradients/witness.py": "scenarios fsdp",
    "_controller/controller.py": "routes checkpoint",
    "_controller/step.py": "scenarios routes",
    "_scaling/families.py": "zero",
    "_scaling/hyperparameters.py": "zero",
    "_ema/tensors.py": "ema_sharded",
    "_ema/model_ema.py": "ema_sharded",
    "_ema/state.py": "ema_sharded",
}
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def changes(node):
    """The mutants of one node: pairs of a kind and the node that takes its place."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield "comparison", replaced(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield "arithmetic", replaced(node, op=SWAPS[type(node.op)]())
    if isinstance(node, ast.BoolOp):
        yield "and / or", replaced(node, op=SWAPS[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield "not", node.operand
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "not", replaced(node, test=ast.UnaryOp(ast.Not(), node.test))
        if not isinstance(node, ast.While):
            yield "forced", replaced(node, test=ast.Constant(True))
            yield "forced", replaced(node, test=ast.Constant(False))
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "constant", ast.Constant(node.value + 1)
        if node.value not in (0, 1):
            yield "constant", ast.Constant(node.value * 2)
    if isinstance(node, ast.Name) and node.id in ("min", "max"):
        yield "min / max", replaced(node, id="max" if node.id == "min" else "min")
    if isinstance(node, ast.Return) and node.value is not None and not is_none(node.value):
        yield "return", replaced(node, value=ast.Constant(None))
    named = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)  # a name gone is noticed anyway
    if isinstance(node, ast.Expr | ast.Raise | ast.AugAssign | ast.Assign) and not named:
        yield "deleted", ast.Pass()


def replaced(node, **values):
    twin = copy.copy(node)
    for name, value in values.items():
        setattr(twin, name, value)
    return twin


def is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def places(node, skipped):
    """All that may be mutated below `node`: its parent, the field, the index in it, and the node itself."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or getattr(child, "lineno", 0) in skipped:
                continue
            if isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom) or is_text(child) or is_all(child):
                continue
            yield node, name, index, child
            if not (isinstance(child, ast.Raise) or is_warning(child)):
                yield from places(child, skipped)


def is_text(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_all(node):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def is_warning(node):
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("warnings.warn(")


@dataclass(frozen=True)
class Mutant:
    """`new` in the place of a node: a field of `parent`, or an element of it."""

    name: str
    kind: str
    file: str
    tree: ast.Module
    parent: ast.AST
    field: str
    index: int | None
    new: ast.AST

    def text(self):
        old = getattr(self.parent, self.field)
        changed = self.new if self.index is None else [*old[: self.index], self.new, *old[self.index + 1 :]]
        setattr(self.parent, self.field, changed)
        text = ast.unparse(ast.fix_missing_locations(self.tree))
        setattr(self.parent, self.field, old)
        return text


def mutants():
    """Every mutant of the core."""
    for path in sorted(p for wing in CORE for p in (ROOT / "src" / "anybatch" / wing).glob("*.py")):
        file, text = str(path.relative_to(ROOT / "src" / "anybatch")), path.read_text()
        tree = ast.parse(text)
        skipped = {i for i, line in enumerate(text.splitlines(), 1) if "pragma: no cover" in line}
        for parent, field, index, node in places(tree, skipped):
            for kind, new in changes(node):
                before, after = (ast.unparse(each).splitlines()[0] for each in (node, new))
                name = f"{file}:{node.lineno}:{node.col_offset} {before} -> {after}"
                yield Mutant(name, kind, file, tree, parent, field, index, new)


def sample(found, count):
    """As many of each kind, as far as there are."""
    kinds, r = {}, random.Random(SEED)
    for each in found:
        kinds.setdefault(each.kind, []).append(each)
    queues = [r.sample(kinds[kind], len(kinds[kind])) for kind in sorted(kinds)]
    dealt = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    return dealt[:count]


def stages(file):
    """The tests for a mutant of `file`, in the order in which they are asked."""
    wing, stem = Path(file).parts[0], Path(file).stem
    near = [f"tests/test_{name}.py" for name in dict.fromkeys([*FIRST.get(stem, stem).split(), *NEAR[wing].split()])]
    near = [each for each in near if (ROOT / each).exists()]
    ranks = [f"tests/distributed/test_{name}.py" for name in RANKS.get(file, "").split()]
    rest = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_*.py"))]
    return [near, ranks, [each for each in rest if each not in near]]


def run(tests, file="", text=""):
    """Run `tests` in a fork, with `text` in place of a file of the package; the first that failed, or ''."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "src" / "anybatch", folder / "anybatch")
        if file:
            (folder / "anybatch" / file).write_text(text)
        child = os.fork()
        if child == 0:
            try:
                os._exit(passes(tests, folder) is False)
            finally:
                traceback.print_exc()
                os._exit(2)
        end = time.monotonic() + LIMIT
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.05)
        lines = (folder / "log").read_text(errors="replace").splitlines()
    if ended[1] == 0:
        return ""
    named = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return (named or lines[-1:] or ["no output"])[0]


def passes(tests, folder):
    os.setpgid(0, 0)
    os.environ |= {"PYTHONPATH": f"{folder}", "HYPOTHESIS_STORAGE_DIRECTORY": f"{folder}/examples"}
    sys.path[:0] = [f"{folder}"]
    out = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", f"--basetemp={folder}/pytest"]
    fine = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)  # all of a file may be slow
    return all(pytest.main([*options, "-m", "not slow", test]) in fine for test in tests)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "mutation" / "results.json")
    options = parser.parse_args()
    os.chdir(ROOT)
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    chosen = sample(mutants(), options.count)
    for mutant in chosen:
        if mutant.name not in results:
            start = time.monotonic()
            text = mutant.text()
            caught = next((caught for tests in stages(mutant.file) if (caught := run(tests, mutant.file, text))), "")
            results[mutant.name] = {"caught": caught, "seconds": round(time.monotonic() - start, 1)}
            options.results.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {mutant.kind:12} {mutant.name}: {caught or 'SURVIVED'}", flush=True)
    survivors = [mutant.name for mutant in chosen if not results[mutant.name]["caught"]]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutants were caught. Survivors:", *survivors, sep="\n  ")
    asked = {test for mutant in chosen for test in stages(mutant.file)[0]}
    asked |= {file for each in results.values() for file in re.findall(r"tests/\S+?\.py", each["caught"])}
    print("Failing without a mutant:", run(sorted(asked)) or "none")


if __name__ == "__main__":
    main()
