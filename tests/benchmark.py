"""Measure this project against the tutorial's plain pipeline, and against bare PyTorch.

    python3 tests/benchmark.py               # all rows, about half an hour
    python3 tests/benchmark.py train bare    # only these rows

What is compared takes turns; figures are medians, ratios medians over the pairs.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from helpers import PlainImages, PlainNet, Script, free_address, plain_train
from torch import nn
from torch.utils.data import DataLoader

import cifar
from cifar import DEVICE

Figures = defaultdict[str, list[float]]


def plain_loader(train: bool) -> DataLoader:
    return DataLoader(PlainImages(cifar.read_images(cifar.DATA_ROOT, train)), 32, shuffle=train)


def our_server(address: str) -> None:
    sys.argv = ["server.py", "--server-address", address]
    importlib.import_module("server").main()


def our_client(address: str) -> None:
    sys.argv = ["client.py", "--server-address", address]
    importlib.import_module("client").main()


def plain_client(address: str) -> None:
    import flwr

    from client import CifarClient

    cifar.train = lambda net, loader, *_: plain_train(net, loader, device=DEVICE)  # type: ignore
    loaders = plain_loader(train=True), plain_loader(train=False)
    sizes = {"trainset": 50_000, "testset": 10_000}
    client = CifarClient(PlainNet().to(DEVICE), *loaders, sizes)
    flwr.client.start_client(server_address=address, client=client.to_client())


def bare_pytorch() -> None:
    """Train and test three times, on floats in memory: nothing is federated."""
    torch.set_num_threads(1)
    data = []
    for train in (True, False):
        images, labels = cifar.read_images(cifar.DATA_ROOT, train).tensors
        data += [images.float().div_(255).sub_(0.5).div_(0.5).to(DEVICE), labels.to(DEVICE)]
    images, labels, test_images, test_labels = data
    net = cifar.Net().to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    for _ in range(3):
        for index in torch.randperm(len(labels), device=DEVICE).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[index]), labels[index]).backward()
            optimizer.step()
        with torch.no_grad():  # 250: the fastest, as for cifar.test()
            outputs = torch.cat([net(batch) for batch in test_images.split(250)])
        print((outputs.argmax(1) == test_labels).float().mean().item())


def start(function: Callable, *arguments: object, **env: str) -> Script:
    env = {"FLWR_TELEMETRY_ENABLED": "0", "no_grpc_proxy": "127.0.0.1", **env}
    return Script([__file__, function.__name__, *arguments], Path.cwd(), **env)


def finish(*processes: Script) -> None:
    for process in processes:
        if process.end(timeout=7200):
            sys.exit("\n".join(["A process failed:", *(each.output for each in processes)]))


@contextlib.contextmanager
def timed(times: list[float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def show(what: str, figures: Figures) -> None:
    """Print the medians, the first against each of the others, and the medians of the ratios."""
    (_, ours), *alternatives = figures.items()
    for name, theirs in alternatives:
        medians = [f"{statistics.median(each):.4g} s" for each in (ours, theirs)]
        ratio = statistics.median(b / a for a, b in zip(ours, theirs))
        line = f"{' against '.join(medians)} of {name}"
        print(f"{what:<34} {line:<60} {ratio:6.2f} times", flush=True)
        what = ""


def bench_train(repetitions: int) -> None:
    """Time an epoch of train(), of a bare loop over floats in memory, and of the pipeline."""
    trainloader, plainloader = cifar.load_data()[0], plain_loader(train=True)
    floats: Any = [(images.to(DEVICE), labels.to(DEVICE)) for images, labels in trainloader]
    times = Figures(list)
    for _ in range(repetitions):
        with timed(times["ours"]), contextlib.redirect_stdout(None):
            cifar.train(cifar.Net().to(DEVICE), trainloader, 1, DEVICE)
        with timed(times["a bare loop over floats"]):
            plain_train(PlainNet().to(DEVICE), floats, device=DEVICE)
        with timed(times["the plain pipeline"]):
            plain_train(PlainNet().to(DEVICE), plainloader, device=DEVICE)
    show("an epoch of train(), 1 thread", times)


def federate(client: Callable = our_client, **env: str) -> None:
    """Run a server and two clients, on all images each."""
    address = free_address()
    server = start(our_server, address, **env)
    if client is plain_client:  # which does not wait for the server
        server.until("gRPC server running")
    finish(start(client, address, **env), start(client, address, **env), server)


def bench_federation(repetitions: int) -> None:
    """Time whole federations of two clients and 3 rounds, as processes."""
    times = Figures(list)
    for _ in range(repetitions):
        with timed(times["ours"]):
            federate()
        with timed(times["plain, OMP_NUM_THREADS=1"]):
            federate(plain_client, OMP_NUM_THREADS="1")
        with timed(times["plain"]):  # it takes minutes
            federate(plain_client)
    show("2 clients, 3 rounds", times)


def bench_bare(repetitions: int) -> None:
    """Time whole federations, and two bare PyTorch processes side by side."""
    times = Figures(list)
    for _ in range(repetitions):
        with timed(times["bare PyTorch"]):
            finish(start(bare_pytorch), start(bare_pytorch))
        with timed(times["ours: 2 clients, 3 rounds"]):
            federate()
    show("2 bare PyTorch processes, 3 epochs", times)


ROWS = ["train", "federation", "bare"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", choices=ROWS, help="default: all")
    parser.add_argument("--repetitions", type=int, default=3, help="default: 3")
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, PyTorch {torch.__version__}, {DEVICE.type}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for row in args.rows or ROWS:
            globals()[f"bench_{row}"](args.repetitions)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in globals():
        globals()[sys.argv[1]](*sys.argv[2:])
    else:
        main()
