"""The compiled `guard.cpp`: built once for each torch, kept in a folder of this user."""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def missing():
    """Why no guard can be built here; empty where it can."""
    if sys.platform != "linux":
        return "the pretended GPU needs Linux"
    if compiler() is None:
        return "the pretended GPU needs a C++ compiler (c++, g++ or clang++)"
    if (_torch() / "lib" / "libtorch_cuda.so").exists():
        return "the pretended GPU needs a torch without CUDA"
    return ""


def compiler():
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def guard():
    """The path of the shared library; other processes that ask at the same time get the same one."""
    folder = Path(tempfile.gettempdir()) / f"anybatch-guard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR.")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{version('torch')} {_torch()}".encode()).hexdigest()[:16]
    built = folder / f"{key}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            partial = built.with_suffix(".partial")
            _compile(partial)
            partial.rename(built)
    return built


def _torch():
    return Path(importlib.util.find_spec("torch").origin).parent


def _compile(target):
    include, lib = _torch() / "include", _torch() / "lib"
    includes = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    command = [compiler(), "-shared", "-fPIC", "-O1", "-std=c++20", *includes, str(SOURCE), f"-L{lib}"]
    command += ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
