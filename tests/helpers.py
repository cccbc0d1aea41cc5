"""Helpers of the tests and the benchmark: ports, processes, the tutorial's training."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpc
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import cifar

# Removed from the scripts' environment, so that the scripts set their own values.
UNSET = ["FLWR_TELEMETRY_ENABLED", "FLWR_LOG_LEVEL", "GRPC_VERBOSITY", "PYTHONUNBUFFERED"]


# Addresses, files, the README.


def free_ports(count: int) -> list[str]:
    """Return free ports."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def free_address() -> str:
    """Return HOST:PORT with a free port."""
    return f"127.0.0.1:{free_ports(1)[0]}"


def history(model: Path) -> list[dict[str, Any]]:
    """Return the history that the server wrote beside a model."""
    return json.loads(model.with_suffix(".json").read_text(encoding="utf-8"))


def readme() -> str:
    """Return the README."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, text: str) -> str:
    """Return the README's code block in that language that contains the text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    (found,) = [content for content in blocks if text in content]
    return found


def wait_for_server(address: str) -> None:
    """Block until a gRPC server answers at HOST:PORT."""
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(60)


# Processes.


class Script:
    """A running Python program that can be waited for."""

    def __init__(self, command: Iterable[object], cwd: Path | None = None, **env: str) -> None:
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
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Collect the output; in a thread."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.heard(line)
            with self.more:
                self.output += line
                self.more.notify_all()

    def heard(self, line: str) -> None:
        """Do nothing; a subclass may record when a line was printed."""

    def until(self, text: str, count: int = 1, after: str = "", timeout: float = 120) -> None:
        """Wait until the script has printed `text` `count` times (after another text, if given)."""

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
        """Kill the script, as kill -9 does."""
        self.process.kill()
        self.end()


# Models and images.


def arrays_of(made: Any) -> list[np.ndarray]:
    """Return the arrays of Parameters, or of an object that has parameters."""
    from flwr.common import parameters_to_ndarrays

    return parameters_to_ndarrays(getattr(made, "parameters", made))


def assert_equal(ours: Iterable[np.ndarray], theirs: Iterable[np.ndarray]) -> None:
    """Check that arrays are equal to the bit."""
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


class PlainNet(cifar.Net):
    """The tutorial's model, with ReLU before pooling: the same numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.reshape(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def plain_transform() -> Any:
    """Return the tutorial's transform of an image."""
    from torchvision import transforms  # type: ignore[import-untyped]

    normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return transforms.Compose([transforms.ToTensor(), normalize])


def plain_loaders(root: Path) -> tuple[DataLoader, DataLoader]:
    """Load CIFAR-10 as the tutorial does: one image at a time."""
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

    dataset = functools.partial(CIFAR10, root, transform=plain_transform())
    trainloader = DataLoader(dataset(train=True), batch_size=32, shuffle=True)
    return trainloader, DataLoader(dataset(train=False), batch_size=32)


def plain_train(
    net: nn.Module, trainloader: DataLoader, epochs: int = 1, device: torch.device | str = "cpu"
) -> list[float]:
    """Train as the tutorial does; return the loss of every step."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


@dataclasses.dataclass
class SmallCifar:
    """A directory with CIFAR-10's layout, and torchvision's attributes for it."""

    root: Path
    attributes: dict[str, Any]


# Runs a script with a small CIFAR-10 in place of the real one.
WITH_SMALL_CIFAR = """
import json, os, runpy, sys
from torchvision.datasets import CIFAR10
for name, value in json.loads(os.environ["SMALL_CIFAR"]).items():
    setattr(CIFAR10, name, value)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_small_cifar(root: Path) -> SmallCifar:
    """Make a CIFAR-10 of 500 + 100 random images: the archive, and unpacked beside it."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, value: object) -> str:
        content = pickle.dumps(value)
        (folder / name).write_bytes(content)
        return hashlib.md5(content).hexdigest()

    random = np.random.RandomState(0)
    sums = []
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        data = random.randint(256, size=(100, 3072), dtype=np.uint8)
        labels = random.permutation(np.arange(100) % 10).tolist()
        sums.append((name, write(name, {"data": data, "labels": labels})))
    meta = write("batches.meta", {"label_names": [f"class {number}" for number in range(10)]})
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, arcname=folder.name)
    attributes = {
        "url": "http://127.0.0.1:9/",  # nothing is downloaded by mistake
        "tgz_md5": hashlib.md5(archive.read_bytes()).hexdigest(),
        "train_list": sums[:5],
        "test_list": sums[5:],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": meta},
    }
    return SmallCifar(root, attributes)
