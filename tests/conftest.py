"""Fixtures of several test files: ports, and scripts as processes."""

import os
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before Flower is imported

import pytest
import torch
from helpers import ROOT, Script, free_address

torch.set_num_threads(1)  # leave the other cores to the scripts


@pytest.fixture
def address() -> str:
    """Return HOST:PORT with a free port."""
    return free_address()


@pytest.fixture
def start(tmp_path):
    """Start scripts in an empty folder, as in start("server.py", "--rounds", 2).

    A script of that name in the folder, such as one with an example applied, comes first.
    """
    scripts = []

    def start_script(name: str | Path, *arguments: object, **env: str) -> Script:
        path = tmp_path / name
        path = path if path.exists() else ROOT / name
        scripts.append(Script([path, *arguments], tmp_path, **env))
        return scripts[-1]

    yield start_script
    for script in scripts:
        script.kill()
