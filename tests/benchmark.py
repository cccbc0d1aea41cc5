"""Measure this project against the plain pipeline: how fast, how large, how many clients.

    python3 tests/benchmark.py                     # all rows but the curves, 15 to 30 minutes
    python3 tests/benchmark.py batch train test    # only these rows
    python3 tests/benchmark.py curves              # the README's accuracies and picture, hours

The plain pipeline decodes and normalizes one image at a time, as torchvision's own examples do,
and uses PyTorch's default number of threads. Both are run in turn; figures are medians.
Without CIFAR-10 on this machine, as many generated images of the same size are used.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers
import numpy as np
import torch
from helpers import ROOT, PlainNet, Script, free_address, wait_for_server
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

import cifar

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
Times = dict[str, list[float]]


# The two pipelines.


class PlainImages(Dataset):
    """Images that are decoded and normalized one by one."""

    def __init__(self, images: cifar.Images) -> None:
        self.images = np.ascontiguousarray(images.images.numpy())
        self.labels = images.labels.tolist()
        self.transform = helpers.plain_transform()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


@functools.cache
def is_cifar_here() -> bool:
    """Return whether CIFAR-10 is on this machine, complete."""
    with contextlib.suppress(RuntimeError):  # files are missing or damaged
        for train in (True, False):
            cifar.read_images(Path(cifar.DATA_ROOT).expanduser(), train, download=False)
        return True
    return False


def generate(root: object, train: bool) -> cifar.Images:
    """Return generated images, as many as CIFAR-10 has."""
    return cifar.synthesize(50_000, 1) if train else cifar.synthesize(10_000, 2)


if not is_cifar_here():
    cifar.find_images = generate


def our_loaders() -> tuple[DataLoader, DataLoader]:
    """Return this project's loaders of training and test images."""
    with contextlib.redirect_stdout(None):
        return cifar.load_data()[:2]


def plain_loaders() -> tuple[DataLoader, DataLoader]:
    """Return the plain pipeline's loaders."""
    if is_cifar_here():
        return helpers.plain_loaders(Path(cifar.DATA_ROOT).expanduser())
    trainset, testset = (PlainImages(generate(None, train)) for train in (True, False))
    return DataLoader(trainset, 32, shuffle=True), DataLoader(testset, 32)


def plain_train(net: nn.Module, trainloader: DataLoader) -> None:
    """Run one epoch of plain optimizer steps."""
    print(f"Training 1 epoch(s) w/ {len(trainloader)} batches each", flush=True)
    assert np.isfinite(helpers.plain_train(net, trainloader, device=DEVICE)).all()


# Functions that run as processes: python3 tests/benchmark.py NAME ARGUMENTS.


def plain_server(address: str, rounds: str) -> None:
    """Run Flower's own server with its defaults."""
    import flwr

    config = flwr.server.ServerConfig(num_rounds=int(rounds))
    flwr.server.start_server(server_address=address, config=config)


def plain_client(address: str) -> None:
    """Run a client with the plain pipeline."""
    import flwr

    net = PlainNet().to(DEVICE)
    trainloader, testloader = plain_loaders()

    class PlainClient(flwr.client.NumPyClient):
        def get_parameters(self, config):
            return [value.cpu().numpy() for value in net.state_dict().values()]

        def set_parameters(self, parameters):
            tensors = map(torch.tensor, parameters)
            net.load_state_dict(dict(zip(net.state_dict(), tensors)))

        def fit(self, parameters, config):
            self.set_parameters(parameters)
            plain_train(net, trainloader)
            return self.get_parameters({}), len(trainloader.dataset), {}

        def evaluate(self, parameters, config):
            self.set_parameters(parameters)
            criterion, loss, correct = nn.CrossEntropyLoss(), 0.0, 0
            with torch.no_grad():
                for images, labels in testloader:
                    outputs = net(images.to(DEVICE))
                    loss += criterion(outputs, labels.to(DEVICE)).item()
                    correct += (outputs.argmax(1).cpu() == labels).sum().item()
            return loss, len(testloader.dataset), {"accuracy": correct / len(testloader.dataset)}

    flwr.client.start_client(server_address=address, client=PlainClient().to_client())


def our_client(address: str) -> None:
    """Run client.py, and print when each phase begins and ends."""
    import client

    class TimedClient(client.CifarClient):
        def fit(self, parameters, config):
            print(f"phase {time.time()}")
            result = super().fit(parameters, config)
            print(f"end {time.time()}")
            return result

        def evaluate(self, parameters, config):
            print(f"phase {time.time()}")
            result = super().evaluate(parameters, config)
            print(f"end {time.time()}")
            return result

    client.CifarClient = TimedClient  # type: ignore[misc]
    sys.argv = ["client.py", "--server-address", address]
    cifar.run_main(client.main)


def light_clients(address: str, count: str) -> None:
    """Run many clients that learn nothing, each with its own connection."""
    import flwr

    class LightClient(flwr.client.NumPyClient):
        def fit(self, parameters, config):
            return parameters, 1, {}

        def evaluate(self, parameters, config):
            return 1.0, 1, {"accuracy": 0.5}

    wait_for_server(address)
    threads = [
        threading.Thread(
            target=flwr.client.start_client,
            kwargs={"server_address": address, "client": LightClient().to_client()},
        )
        for _ in range(int(count))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class LargeNet(nn.Module):
    """A model of 50 million weights, or 200 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7071, 7071)


def our_large_server(address: str, model: str) -> None:
    """Run server.py with the large model."""
    import server

    cifar.Net = LargeNet  # type: ignore[assignment, misc]
    sys.argv = ["server.py", "--server-address", address, "--rounds", "2", "--model", model]
    cifar.run_main(server.main)


def plain_large_server(address: str) -> None:
    """Run Flower's own server and FedAvg with the large model."""
    import flwr

    parameters = flwr.common.ndarrays_to_parameters(cifar.get_parameters(LargeNet()))
    flwr.server.start_server(
        server_address=address,
        config=flwr.server.ServerConfig(num_rounds=2),
        strategy=flwr.server.strategy.FedAvg(initial_parameters=parameters),
    )


def peak_memory(process: int) -> float:
    """Return the peak memory of a process so far, in MiB (Linux only).

    Unlike getrusage(), it does not count the memory of the parent process.
    """
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) / 1024
    return 0


# Starting and timing.


class Process(Script):
    """A process whose lines are recorded with the time, and its peak memory."""

    def __init__(self, *command: object, **env: str) -> None:
        self.times: list[tuple[float, str]] = []
        self.memory = 0.0
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_LOG_LEVEL": "ERROR"}
        super().__init__(command, None, **{**quiet, **env})

    def heard(self, line: str) -> None:
        """Record the time, and the peak memory."""
        self.times.append((time.time(), line))
        self.memory = max(self.memory, peak_memory(self.process.pid))

    def wait(self) -> str:
        """Wait until it exits; return its output."""
        if code := self.end(timeout=86_400):
            sys.exit(f"{self.process.args!r} ended with {code}:\n{self.output}")
        return self.output

    def when(self, text: str) -> float:
        """Return when it first printed a line that contains `text`."""
        return next(moment for moment, line in self.times if text in line)


def own(name: str, *arguments: object, **env: str) -> Process:
    """Start one of the functions above as a process."""
    return Process(__file__, name, *arguments, **env)


@contextlib.contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    """Append the duration, in seconds, to the times of that name."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    yield
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    times.setdefault(name, []).append(time.perf_counter() - start)


def show(
    what: str, times: Times, ours: str, theirs: str, unit: str = "s", scale: float = 1
) -> None:
    """Print a row: the medians of both, and the median of their ratios."""
    mine, other = (statistics.median(times[name]) * scale for name in (ours, theirs))
    ratio = statistics.median(b / a for a, b in zip(times[ours], times[theirs]))
    digits = ".3f" if mine < 10 else ".1f" if mine < 100 else ".0f"
    line = f"{mine:{digits}} {unit} against {other:{digits}} {unit} of {theirs}"
    print(f"{what:<36} {line:<62} {ratio:6.2f} times", flush=True)


# The rows.


def bench_batch(repetitions: int) -> None:
    """Time the delivery of batches."""
    loaders = {"ours": our_loaders()[0], "the plain pipeline": plain_loaders()[0]}
    times: Times = {}
    for _ in range(repetitions):
        for name, loader in loaders.items():
            batches = iter(loader)
            for _ in range(10):
                next(batches)
            with timed(times, name):
                for _ in range(300):
                    next(batches)
    show("delivering a batch of 32", times, "ours", "the plain pipeline", "ms", 1000 / 300)


def bench_train(repetitions: int) -> None:
    """Time an epoch of train(), of a bare loop over floats in memory, and of the plain pipeline."""
    trainloader, plainloader = our_loaders()[0], plain_loaders()[0]
    floats = [(images.contiguous().to(DEVICE), y.to(DEVICE)) for images, y in trainloader]
    times: Times = {}
    for repetition in range(repetitions + 1):
        net, plain_net = cifar.Net().to(DEVICE), PlainNet().to(DEVICE)
        state = {name: value.clone() for name, value in net.state_dict().items()}
        record: Times = times if repetition else {}  # the first is to warm up
        with contextlib.redirect_stdout(None):
            with timed(record, "ours"):
                cifar.train(net, trainloader, 1, DEVICE)
            plain_net.load_state_dict(state)
            with timed(record, "a bare loop over floats"):
                plain_train(plain_net, floats)  # type: ignore[arg-type]
            plain_net.load_state_dict(state)
            with timed(record, "the plain pipeline"):
                plain_train(plain_net, plainloader)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "1 thread"
    show(f"an epoch of train(), {where}", times, "ours", "a bare loop over floats")
    show("", times, "ours", "the plain pipeline")


def bench_test(repetitions: int) -> None:
    """Time test() against bare forward passes in large batches."""
    testloader = our_loaders()[1]
    floats = torch.cat([images for images, _ in testloader]).contiguous().to(DEVICE)
    net, times = cifar.Net().to(DEVICE), Times()
    for _ in range(3 * repetitions):
        with timed(times, "ours"):
            cifar.test(net, testloader, DEVICE)
        for size in (500, 1000, 10_000):
            with timed(times, f"a forward pass by {size}"), torch.no_grad():
                for batch in floats.split(size):
                    net(batch)
    others = [name for name in times if name != "ours"]
    fastest = min(others, key=lambda name: statistics.median(times[name]))
    show("testing 10,000 images, 1 thread", times, "ours", fastest)


def bench_alone(repetitions: int) -> None:
    """Time cifar.py as a process: alone, beside a busy process, with more threads, and plain."""
    if not is_cifar_here():
        return
    times: Times = {}
    threads = str(os.cpu_count())
    for _ in range(repetitions):
        for busy in ("", " beside a busy process"):
            with contextlib.ExitStack() as stack:
                if busy:
                    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    stack.callback(process.kill)
                with timed(times, f"ours{busy}"):
                    Process(ROOT / "cifar.py").wait()
                with timed(times, f"{threads} threads{busy}"):
                    Process(ROOT / "cifar.py", "--threads", threads).wait()
        with timed(times, "plain"):
            own("plain_alone").wait()
    show("python3 cifar.py, 2 epochs", times, "ours", "plain")
    show("", times, "ours", f"{threads} threads")
    beside = " beside a busy process"
    show(f"the same{beside}", times, f"ours{beside}", f"{threads} threads{beside}")


def plain_alone() -> None:
    """Train and evaluate with the plain pipeline, as cifar.py does."""
    net = PlainNet().to(DEVICE)
    trainloader, testloader = plain_loaders()
    plain_train(net, trainloader)
    plain_train(net, trainloader)
    with torch.no_grad():
        for images, _ in testloader:
            net(images.to(DEVICE))


def bench_federation(repetitions: int) -> None:
    """Time a federation of two clients, 3 rounds, from the first batch to the server's end."""

    def federate(server: Callable[[str], Process], function: str, **env: str) -> list[Process]:
        address = free_address()
        processes = [server(address)]
        if function == "plain_client":  # it does not wait for the server
            wait_for_server(address)
        processes += [own(function, address, **env) for _ in range(2)]
        processes[0].wait()
        ended = time.time()
        for process in processes[1:]:
            process.wait()
        start = min(client.when("Training 1 epoch") for client in processes[1:])
        times.setdefault(name, []).append(ended - start)
        sizes.setdefault(name, []).append(max(client.memory for client in processes[1:]))
        return processes

    times: Times = {}
    sizes: Times = {}  # MiB
    gaps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repetitions):
            name = "ours"
            _, *clients = federate(
                lambda address: Process(
                    *(ROOT / "server.py", "--server-address", address),
                    *("--model", Path(folder) / "model.pt"),
                ),
                "our_client",
            )
            gaps += idle(clients)
            for name, env in (
                ("plain, OMP_NUM_THREADS=1", {"OMP_NUM_THREADS": "1"}),
                ("plain", {}),  # it takes minutes
            ):
                federate(lambda address: own("plain_server", address, 3), "plain_client", **env)
    show("2 clients, 3 rounds", times, "ours", "plain, OMP_NUM_THREADS=1")
    show("", times, "ours", "plain")
    show("peak memory of a client", sizes, "ours", "plain, OMP_NUM_THREADS=1", "MiB")
    gap = statistics.median(gaps)
    print(
        f"{'neither training nor evaluating':<36} {gap:.3f} s a round (longest {max(gaps):.3f} s)"
    )


def idle(clients: list[Process]) -> list[float]:
    """Return, for each round, the seconds in which no client trains or evaluates."""
    phases, ends = (
        [
            [float(text) for text in re.findall(f"^{word} (.+)", client.output, re.MULTILINE)]
            for client in clients
        ]
        for word in ("phase", "end")
    )
    last_ends, first_starts = map(max, zip(*ends)), map(min, zip(*phases))
    next(first_starts)
    between = [start - end for end, start in zip(last_ends, first_starts)]
    return [sum(between[i : i + 2]) for i in range(0, len(between), 2)]


def bench_clients(repetitions: int) -> None:
    """Time rounds with many clients that learn nothing, on one server."""
    for count in (10, 50, 100):
        with tempfile.TemporaryDirectory() as folder:
            address = free_address()
            server = Process(
                *(ROOT / "server.py", "--server-address", address, "--min-clients", count),
                *("--rounds", 5, "--model", Path(folder) / "model.pt"),
            )
            own("light_clients", address, count).wait()
            output = server.wait()
            history = json.loads((Path(folder) / "model.json").read_text())
        seconds = [record["seconds"] for record in history]
        failures = len(re.findall(r"^Round \d+/\d+: client '.*' lost: ", output, re.MULTILINE))
        answered = output.count(f", clients {count}, ")
        print(
            f"{f'{count} clients that learn nothing':<36} {statistics.median(seconds):.3f} s a "
            f"round, server's peak memory {server.memory:.0f} MiB, {failures} failures, "
            f"{answered} of 5 rounds with all",
            flush=True,
        )


def bench_memory(repetitions: int) -> None:
    """Compare the peak memory of two servers: a model of 200 MB, 2 clients, 2 rounds."""
    sizes: Times = {}  # GB
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repetitions):
            for name, function, arguments in (
                ("ours", "our_large_server", [Path(folder) / "model.pt"]),
                ("Flower's own", "plain_large_server", []),
            ):
                address = free_address()
                # Its memory is read whenever it prints a line.
                server = own(function, address, *arguments, FLWR_LOG_LEVEL="INFO")
                own("light_clients", address, 2).wait()
                server.wait()
                sizes.setdefault(name, []).append(server.memory * 2**20 / 1e9)
    show("server's memory, model of 200 MB", sizes, "ours", "Flower's own", "GB")


ROUNDS = 50
CURVES = {  # for the README: what it is, number of clients, flags of the clients
    "one": ("1 client, all images (centralized)", 1, []),
    "all2": ("2 clients, all images each", 2, []),
    "iid2": ("2 clients, IID partitions", 2, ["--num-partitions", 2]),
    "iid5": ("5 clients, IID partitions", 5, ["--num-partitions", 5]),
    "iid10": ("10 clients, IID partitions", 10, ["--num-partitions", 10]),
    "alpha10": ("10 clients, --alpha 0.1", 10, ["--num-partitions", 10, "--alpha", 0.1]),
}


def draw_curves(repetitions: int) -> None:
    """Draw the README's picture and print its table: medians over the seeds.

    Histories are read from the directory "histories"; missing ones are created by running them.
    """
    folder = Path("histories")
    folder.mkdir(exist_ok=True)
    curves = {}
    for name, (label, clients, flags) in CURVES.items():
        runs = [
            run_or_read(folder / f"{name}-{seed}.pt", seed, clients, flags)
            for seed in range(1, repetitions + 1)
        ]
        curves[label] = [statistics.median(accuracies) for accuracies in zip(*runs)]
    rounds = [1, 2, 3, 5, 10, 20, 30, 40, 50]
    print(f"| accuracy after round | {' | '.join(map(str, rounds))} |")
    print("|---" * (len(rounds) + 1) + "|")
    for label, curve in curves.items():
        print(f"| {label} | {' | '.join(f'{curve[i - 1]:.3f}' for i in rounds)} |")
    light = ["#0072b2", "#d55e00", "#009e73", "#aa4499", "#555555", "#b8860b"]
    dark = ["#6cb6ff", "#ff9a57", "#3ddbb0", "#f2a0d0", "#c9d1d9", "#f2d14b"]
    draw(curves, "accuracy.svg", "default", light)
    draw(curves, "accuracy-dark.svg", "dark_background", dark)


def run_or_read(model: Path, seed: int, clients: int, flags: list) -> list[float]:
    """Return the accuracy after each round of a federation; run it first if needed."""
    history = model.with_suffix(".json")
    if not history.exists() or len(json.loads(history.read_bytes())) < ROUNDS:
        address = free_address()
        server: list[object] = [ROOT / "server.py", "--server-address", address]
        server += ["--rounds", ROUNDS, "--min-clients", clients, "--seed", seed]
        processes = [Process(*server, "--model", model)]
        for i in range(clients):
            client = [ROOT / "client.py", "--server-address", address, "--seed", 100 * seed + i]
            partition = ["--partition-id", i] if flags else []
            processes.append(Process(*client, *flags, *partition))
        for process in processes:
            process.wait()
    return [record["accuracy"] for record in json.loads(history.read_bytes())]


def draw(curves: dict[str, list[float]], name: str, style: str, colors: list[str]) -> None:
    """Draw accuracy over rounds as an SVG for GitHub's light or dark background."""
    import matplotlib.pyplot as plt

    # Text stays text, and the file is the same each time.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "curves", "font.size": 12}
    lines = ["--", "-", "-", "-", "-", "-."]
    with plt.style.context([style, settings]):
        figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
        for (label, curve), color, line in zip(curves.items(), colors, lines, strict=True):
            rounds = range(1, len(curve) + 1)
            axes.plot(rounds, curve, line, color=color, label=label, linewidth=2.5)
        axes.set(xlabel="round", ylabel="accuracy on 10,000 test images")
        axes.set(xlim=(0, ROUNDS), ylim=(0, 0.7))
        axes.grid(alpha=0.15)
        axes.legend(loc="lower right", frameon=False)
        path = ROOT / ".github" / name
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


ROWS = {
    "batch": bench_batch,
    "train": bench_train,
    "test": bench_test,
    "alone": bench_alone,
    "federation": bench_federation,
    "clients": bench_clients,
    "memory": bench_memory,
    "curves": draw_curves,
}


def main() -> None:
    """Print the requested rows."""
    parser = argparse.ArgumentParser(description="Measure this project against the plain pipeline.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--repetitions", type=cifar.number(int, 1), default=3, help="default: 3")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}")
    images = "CIFAR-10" if is_cifar_here() else "generated images of CIFAR-10's size"
    print(f"{os.cpu_count()} cores, {images}, PyTorch {torch.__version__}, {DEVICE.type}")
    torch.set_num_threads(1)
    for row in args.rows or list(ROWS)[:-1]:
        ROWS[row](args.repetitions)


if __name__ == "__main__":
    functions: list[Callable[..., None]] = [plain_server, plain_client, our_client]
    functions += [light_clients, plain_alone, our_large_server, plain_large_server]
    chosen = {function.__name__: function for function in functions}
    if sys.argv[1:] and sys.argv[1] in chosen:
        chosen[sys.argv[1]](*sys.argv[2:])
    else:
        main()
