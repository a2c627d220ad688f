"""What the package must not contain, read from its source, and what of it may be loaded."""

import ast
from pathlib import Path

import oracle
import pytest
import torch

import anybatch

SOURCES = sorted(Path(anybatch.__file__).parent.rglob("*.py"))
FORBIDDEN = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "code", "ctypes"),
    *("socket", "ssl", "http", "urllib", "requests", "httpx", "ftplib", "smtplib", "asyncio", "webbrowser"),
}
STARTS = {"_record/provenance.py"}  # git, for the commit


def offences(tree, *, starts):
    """What a file does that it must not, by line."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        roots = {name.split(".")[0] for name in names}
        if roots & FORBIDDEN or ("subprocess" in roots and not starts):
            yield node.lineno, f"imports {', '.join(roots)}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield node.lineno, f"calls {called}"
        safe = called == "torch.load" and any(ast.unparse(each) == "weights_only=True" for each in node.keywords)
        if called in ("torch.load", "torch.hub.load", "torch.hub.load_state_dict_from_url") and not safe:
            yield node.lineno, f"calls {called}"
        if any(keyword.arg == "shell" for keyword in node.keywords):
            yield node.lineno, f"calls {called} with a shell"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_no_pickle_no_eval_and_no_network(path):
    starts = str(path.relative_to(Path(anybatch.__file__).parent)) in STARTS
    assert list(offences(ast.parse(path.read_text()), starts=starts)) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "eval('1')",
        "import subprocess",
        "run(x, shell=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_what_is_forbidden_is_found(line):
    assert list(offences(ast.parse(line), starts=False))


def test_states_load_with_weights_only(tmp_path):
    model = oracle.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = anybatch.attach(optimizer, model=model, total=10, scale="count")
    ema = anybatch.ModelEMA(model, 0.9, clock=controller.clock)
    saved = {"controller": controller.state_dict(), "ema": ema.state_dict()}
    torch.save(saved, tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    controller.load_state_dict(found["controller"])
    ema.load_state_dict(found["ema"])
    assert found["controller"] == saved["controller"]
