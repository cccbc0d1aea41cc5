"""Fixtures of several test files: a small CIFAR-10, and ways to run the scripts."""

import importlib
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

# Before Flower and gRPC are imported: no logs, no telemetry.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_LOG_LEVEL"] = "CRITICAL"
os.environ["GRPC_VERBOSITY"] = "NONE"

import pytest
import torch
from helpers import ROOT, WITH_SMALL_CIFAR, Script, SmallCifar, free_address, make_small_cifar
from torchvision.datasets import CIFAR10

import cifar

torch.set_num_threads(1)  # leave the other cores to the scripts


@pytest.fixture
def start(tmp_path):
    """Start scripts in an empty directory, as in start("server.py", "--rounds", 2)."""
    scripts = []

    def start_script(name, *arguments, cifar: SmallCifar | None = None, **env: str) -> Script:
        command = [ROOT / name, *arguments]
        if cifar:
            command = ["-c", WITH_SMALL_CIFAR, *command, "--data-root", cifar.root]
            env["SMALL_CIFAR"] = json.dumps(cifar.attributes)
        scripts.append(Script(command, tmp_path, **env))
        return scripts[-1]

    yield start_script
    for script in scripts:
        script.kill()


@pytest.fixture
def program(tmp_path):
    """Write a program that can import the scripts; return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "program.py"
        first = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport cifar\n"
        path.write_text(first + text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script in this process, as in call("server", "--help"); return its output.

    A path calls a changed cifar.py.
    """

    def call_script(script: str | Path, *arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        capsys.readouterr()
        ended: object = 0
        try:
            if isinstance(script, Path):
                changed = runpy.run_path(str(script))
                changed["run_main"](changed["main"])
            else:
                cifar.run_main(importlib.import_module(script).main)
        except SystemExit as stop:
            ended = stop.code
        printed = capsys.readouterr()
        seen = printed.out + printed.err
        if isinstance(ended, str):  # as Python does: print the text, exit with 1
            ended, seen = 1, f"{seen}{ended}\n"
        assert ended == code
        return seen

    return call_script


@pytest.fixture
def address() -> str:
    """Return HOST:PORT with a free port."""
    return free_address()


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory) -> SmallCifar:
    """Return a CIFAR-10 of 500 + 100 images."""
    return make_small_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture
def cifar_copy(small_cifar, tmp_path) -> SmallCifar:
    """Return a copy of the small CIFAR-10 that may be damaged."""
    shutil.copytree(small_cifar.root, tmp_path / "data")
    return SmallCifar(tmp_path / "data", dict(small_cifar.attributes))


@pytest.fixture
def use_cifar(monkeypatch):
    """Replace CIFAR-10 by a small one in this process; return its data root."""

    def use_one(small: SmallCifar) -> Path:
        for name, value in small.attributes.items():
            monkeypatch.setattr(CIFAR10, name, value)
        return small.root

    return use_one


@pytest.fixture
def small_root(small_cifar, use_cifar) -> Path:
    """Replace CIFAR-10 by the small one in this process; return its data root."""
    return use_cifar(small_cifar)
