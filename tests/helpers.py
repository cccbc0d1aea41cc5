"""Helpers of the tests and the benchmark: scripts as processes, the tutorial's training."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms  # type: ignore[import-untyped]

import cifar

linux = pytest.mark.skipif(sys.platform != "linux", reason="signals and 127.0.0.2")


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def history(model: Path) -> list[dict[str, Any]]:
    return json.loads(model.with_suffix(".json").read_text(encoding="utf-8"))


class Script:
    """A running Python program whose output can be waited for."""

    def __init__(self, command: Iterable[object], cwd: Path, **env: str) -> None:
        self.output = ""
        self.ended = False
        self.more = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            cwd=cwd,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Collect the output, without colors; in a thread."""
        assert self.process.stdout
        for line in self.process.stdout:
            with self.more:
                self.output += re.sub(r"\x1b\[\d+m", "", line)
                self.more.notify_all()
        with self.more:
            self.ended = True
            self.more.notify_all()

    def until(self, text: str, count: int = 1, timeout: float = 120) -> None:
        """Wait until the script has printed a text, `count` times."""
        with self.more:
            self.more.wait_for(lambda: self.output.count(text) >= count or self.ended, timeout)
        assert self.output.count(text) >= count, f"no {text!r} in:\n{self.output}"

    def end(self, timeout: float = 120) -> int:
        """Wait until the script ends; return its exit code."""
        code = self.process.wait(timeout)
        self.reader.join(timeout)
        return code

    def kill(self) -> None:
        self.process.kill()
        self.end()


class PlainNet(cifar.Net):
    """The tutorial's model, as printed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class PlainImages(torch.utils.data.Dataset):
    """Images that are decoded and normalized one by one, as the tutorial's are."""

    def __init__(self, dataset: TensorDataset) -> None:
        images, labels = dataset.tensors
        self.images = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
        self.labels = labels.tolist()
        normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        steps = [transforms.ToPILImage(), transforms.ToTensor(), normalize]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


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
