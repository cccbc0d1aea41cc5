"""Fixtures of several test files: ports, and scripts as processes."""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"  # before Flower is imported

import pytest
import torch
from helpers import ROOT, Script, free_address

torch.set_num_threads(1)  # leave the other cores to the scripts


@pytest.fixture
def address() -> str:
    return free_address()


@pytest.fixture
def start(tmp_path):
    """Start scripts in an empty folder: a changed one that is there, or else the project's."""
    scripts = []

    def start_script(name, *arguments, **env):
        path = tmp_path / name if (tmp_path / name).exists() else ROOT / name
        scripts.append(Script([path, *arguments], tmp_path, **env))
        return scripts[-1]

    yield start_script
    for script in scripts:
        script.kill()
