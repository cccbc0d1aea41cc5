"""What the tests share: a small CIFAR-10, free addresses, and scripts that run as processes."""

import dataclasses
import hashlib
import importlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_LOG_LEVEL"] = "CRITICAL"
os.environ["GRPC_VERBOSITY"] = "NONE"
# What a user has not set either: the scripts' own settings are seen.
UNSET = ["FLWR_LOG_LEVEL", "GRPC_VERBOSITY", "OMP_NUM_THREADS", "PYTHONUNBUFFERED"]
torch.set_num_threads(1)  # the scripts that run beside have need of the other cores

# Runs a script as `python script.py ...` does, but with a small CIFAR-10 in place of the real one.
SMALL = """
import json, os, runpy, sys
from torchvision.datasets import CIFAR10
for name, value in json.loads(os.environ["SMALL_CIFAR"]).items():
    setattr(CIFAR10, name, value)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclasses.dataclass
class SmallCifar:
    """A folder in CIFAR-10's layout, and what torchvision must know to take it for CIFAR-10."""

    root: Path
    attributes: dict[str, Any]


class Script:
    """A running script: what it prints can be waited for, and it ends with its test."""

    def __init__(self, command: list[object], cwd: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            cwd=cwd,
            env={k: v for k, v in os.environ.items() if k not in UNSET} | env,
        )
        self.output = ""
        self.more = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self.more:
                self.output += line
                self.more.notify_all()

    def until(self, text: str, count: int = 1, after: str = "", timeout: float = 120) -> None:
        """Wait until the script has printed `text`, `count` times; after a first text if given."""

        def seen() -> bool:
            start = self.output.find(after)
            return start >= 0 and self.output.count(text, start) >= count

        ended = False
        while not seen() and not ended:
            ended = not self.reader.is_alive()
            with self.more:
                timeout -= 0 if self.more.wait_for(seen, 0.5) else 0.5
            assert timeout > 0, f"no {text!r} in:\n{self.output}"
        assert seen(), f"no {text!r} in:\n{self.output}"

    def end(self, timeout: float = 120) -> int:
        """Wait until the script ends; return its exit code."""
        code = self.process.wait(timeout)
        self.reader.join(timeout)
        return code

    def kill(self) -> None:
        """End the script as kill -9 does."""
        self.process.kill()
        self.end()


@pytest.fixture
def start(tmp_path):
    """Start scripts of the project in an empty folder: start("server.py", "--rounds", 2)."""
    scripts = []

    def start_script(
        name: str, *arguments: object, cifar: SmallCifar | None = None, **env: str
    ) -> Script:
        command: list[object] = [ROOT / name, *arguments]
        if cifar:
            command = ["-c", SMALL, *command, "--data-root", cifar.root]
            env["SMALL_CIFAR"] = json.dumps(cifar.attributes)
        scripts.append(Script(command, tmp_path, env))
        return scripts[-1]

    yield start_script
    for script in scripts:
        script.kill()


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script's main() in this process: call("server", "--help"); return what it printed."""

    def call_main(module: str, *arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, arguments)])
        ended: object = 0
        try:
            importlib.import_module(module).main()
        except SystemExit as stop:
            ended = stop.code
        assert ended == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    return call_main


@pytest.fixture
def address() -> str:
    """Return HOST:PORT with a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="session")
def small_cifar(tmp_path_factory) -> SmallCifar:
    """Make a CIFAR-10 of 500 + 100 random images: the archive, and unpacked beside it."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.RandomState(0)
    sums = []
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        entry = {
            "data": random.randint(256, size=(100, 3072), dtype=np.uint8),
            "labels": random.permutation(np.arange(100) % 10).tolist(),
        }
        sums.append((name, write_pickle(folder / name, entry)))
    names = {"label_names": [f"class {number}" for number in range(10)]}
    meta = write_pickle(folder / "batches.meta", names)
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, arcname=folder.name)
    attributes = {
        "url": "http://127.0.0.1:9/",  # the port "discard": nothing is fetched by mistake
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "train_list": sums[:5],
        "test_list": sums[5:],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": meta},
    }
    return SmallCifar(root, attributes)


def write_pickle(path: Path, value: object) -> str:
    """Write the value to a file; return the file's MD5 sum."""
    content = pickle.dumps(value)
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def cifar_copy(small_cifar, tmp_path) -> SmallCifar:
    """Return a copy of the small CIFAR-10, to be damaged."""
    shutil.copytree(small_cifar.root, tmp_path / "data")
    return SmallCifar(tmp_path / "data", dict(small_cifar.attributes))
