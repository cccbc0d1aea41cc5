"""Centralized training of a small CNN on CIFAR-10: plain PyTorch, nothing federated yet.

python3 cifar.py                               # train for 2 epochs, then evaluate
python3 cifar.py --evaluate global_model.pt    # evaluate a saved model
"""

import difflib
import errno
import io
import json
import logging
import os
import signal
import socket
import struct
import sys
from argparse import ArgumentError, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

DATASET = "CIFAR-10"
DATA_ROOT = "~/data/cifar-10"
DATA_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
IMAGE_SHAPE = (32, 32, 3)  # height, width, channels
LEARNING_RATE = 0.001
SERVER_ADDRESS = "127.0.0.1:8080"
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


class Net(nn.Module):
    """A small CNN: float images (N, 3, 32, 32) to class scores (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU after pooling: the same result as before pooling, on a quarter of the pixels.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


@dataclass
class Images(Dataset):
    """Images kept as bytes, and converted to normalized floats one batch at a time.

    Indexed by a list, it returns a batch: much faster than collating single images.
    """

    name: str
    images: Tensor  # uint8 (N, height, width, channels)
    labels: Tensor  # int64 (N,)
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return float images (N, channels, height, width) in [-1, 1], and int64 labels (N,)."""
        index = torch.tensor(indices)
        images = self.images.index_select(0, index)
        images = images.permute(0, 3, 1, 2)  # channels_last in memory: pooling is faster
        return images.float().div_(255).sub_(0.5).div_(0.5), self.labels[index]

    def subset(self, indices: np.ndarray) -> "Images":
        """Return a dataset of only these images."""
        images = self.images.index_select(0, torch.from_numpy(indices))
        return replace(self, images=images, labels=self.labels[indices])


def load_data(
    batch_size: int = 32,
    data_root: str | Path = DATA_ROOT,
    synthetic: bool = False,
    partition_id: int = 0,
    num_partitions: int = 1,
    alpha: float | None = None,
) -> tuple[DataLoader, DataLoader, dict[str, int]]:
    """Load CIFAR-10 (training and test set), or one client's partition of it.

    Batches are float images (N, 3, 32, 32) in [-1, 1] and int64 labels (N,).
    Raises UserError.
    """
    if not 0 <= partition_id < num_partitions:
        raise UserError(
            f"--partition-id {partition_id} is out of range: "
            f"use 0 to {num_partitions - 1} with --num-partitions {num_partitions}."
        )
    root = Path(data_root)
    trainset = synthesize(10_000, seed=1) if synthetic else find_images(root, train=True)
    partitions = partition(trainset.labels.numpy(), num_partitions, alpha)
    trainset = trainset.subset(partitions[partition_id])
    testset = synthesize(2_000, seed=2) if synthetic else find_images(root, train=False)
    # Test images are always IID: the clients' average is the accuracy on all of them.
    partitions = partition(testset.labels.numpy(), num_partitions)
    testset = testset.subset(partitions[partition_id])
    print(
        f"{trainset.name}, partition {partition_id} of {num_partitions}: "
        f"{len(trainset)} training / {len(testset)} test images"
    )
    counts = trainset.labels.bincount(minlength=len(trainset.classes))
    print("Training images per class:", *counts.tolist())
    # batch_size=None: the dataset gets a sampler's list of indices, and returns a batch.
    batches = BatchSampler(RandomSampler(trainset), batch_size, drop_last=False)
    trainloader = DataLoader(trainset, sampler=batches, batch_size=None)
    # Batches of 250 were the fastest; their size does not change what test() returns.
    batches = BatchSampler(range(len(testset)), 250, drop_last=False)
    testloader = DataLoader(testset, sampler=batches, batch_size=None)
    return trainloader, testloader, {"trainset": len(trainset), "testset": len(testset)}


def train(
    net: nn.Module,
    trainloader: DataLoader,
    epochs: int,
    device: torch.device,
    lr: float = LEARNING_RATE,
) -> None:
    """Train the network."""
    # Define loss and optimizer
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, fused=True)
    print(f"Training {epochs} epoch(s) w/ {len(trainloader)} batches each")
    # Train the network
    net.train()
    for epoch in range(epochs):  # loop over the dataset multiple times
        running_loss = 0.0
        for i, (images, labels) in enumerate(trainloader):
            images, labels = images.to(device), labels.to(device)
            # zero the parameter gradients
            optimizer.zero_grad()
            # forward + backward + optimize
            outputs = net(images)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            # print statistics
            running_loss += loss.item()
            if i % 100 == 99 or i + 1 == len(trainloader):  # every 100 mini-batches
                print(f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss / (i % 100 + 1):.3f}")
                running_loss = 0.0


def test(net: nn.Module, testloader: DataLoader, device: torch.device) -> tuple[float, float]:
    """Validate the network on the entire test set; return mean loss and accuracy."""
    criterion = nn.CrossEntropyLoss(reduction="sum")
    correct = 0
    total = 0
    loss = 0.0
    net.eval()
    with torch.no_grad():
        for images, labels in testloader:
            images, labels = images.to(device), labels.to(device)
            outputs = net(images)
            loss += criterion(outputs, labels).item()
            predicted = outputs.argmax(1)
            total += labels.size(0)
            correct += int((predicted == labels).sum())
    return loss / total, correct / total


# Utilities: skip on first reading. Data, models, command line; main() is at the end.


# Flower and gRPC read these when imported: client.py and server.py import cifar first.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
# Hide Flower's deprecation box, and what the scripts report in their own words.
HIDDEN = ("DEPRECATED FEATURE", "Client raised", "No fit_metrics_aggregation_fn")
logging.getLogger("flwr").addFilter(lambda record: not str(record.msg).startswith(HIDDEN))


class UserError(Exception):
    """An expected error: one line that says what is wrong and what to do."""


def read_images(root: Path, train: bool, download: bool) -> Images:
    """Return the training or the test set.

    The only dataset-specific code besides Net and the constants at the top. Raises
    RuntimeError, as torchvision does, if the dataset is missing and not downloaded.
    """
    from torchvision.datasets import CIFAR10  # lazy import: saves the server a second

    dataset = CIFAR10(root, train=train, download=download)
    images = torch.from_numpy(dataset.data)
    return Images(DATASET, images, torch.tensor(dataset.targets), dataset.classes)


def find_images(root: Path, train: bool) -> Images:
    """Read the training or the test set, downloading both if missing; raises UserError."""
    root = root.expanduser()
    if root.is_file():
        raise UserError(f"--data-root {root} is a file, not a directory.")
    try:
        return read_images(root, train, download=False)
    except OSError as error:
        raise UserError(f"Cannot read {DATASET}: {error}. Check --data-root.") from error
    except RuntimeError as error:
        if "download=True" not in str(error):  # how torchvision says that it is missing
            raise
    print(
        f"{DATASET} is not in {root}: "
        "downloading (or waiting for another process that is downloading it)"
    )
    progress = sys.stderr if sys.stderr.isatty() else io.StringIO()  # no bar in a file
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none: a stalled download never ends
    try:
        with FileLock(root / ".lock"), redirect_stderr(progress):
            return read_images(root, train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Cannot download {DATASET} from {DATA_URL} to {root} ({reason}). "
            "Put the archive there yourself, or use --synthetic."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def synthesize(num_images: int, seed: int) -> Images:
    """Generate images of ten classes; a class is a coarse pattern, shifted, with noise."""
    height, width, channels = IMAGE_SHAPE
    # RandomState, here and below: NumPy guarantees that its numbers never change.
    coarse = np.random.RandomState(0).randint(2, size=(10, channels, 4, 4), dtype=np.uint8)
    patterns = F.interpolate(torch.from_numpy(coarse), (height, width)).numpy()
    random = np.random.RandomState(seed)
    images = random.randint(128, size=(num_images, channels, height, width), dtype=np.uint8)
    labels = torch.arange(num_images) % 10
    shifts = random.randint(-4, 5, size=(num_images, 2))
    for image, label, shift in zip(images, labels, shifts):
        # At most 114, and the noise at most 127: no overflow.
        image += 14 + 100 * np.roll(patterns[label], shift, axis=(1, 2))
    pixels = torch.from_numpy(images).permute(0, 2, 3, 1)
    classes = [f"class {i}" for i in range(10)]
    return Images("generated images", pixels, labels, classes)


def partition(
    labels: np.ndarray, num_partitions: int, alpha: float | None = None
) -> list[np.ndarray]:
    """Split the indices of labels into disjoint partitions, the same on every machine.

    IID, or with `alpha` non-IID: for each class, the partitions' shares are drawn from
    Dirichlet(alpha) (Li, Diao, Chen, He 2022, https://arxiv.org/abs/2102.02079).
    """
    if num_partitions > len(labels):
        raise UserError(f"--num-partitions {num_partitions} is too many for {len(labels)} images.")
    random = np.random.RandomState(2019)
    order = random.permutation(len(labels))
    # The partition of each image, by its position in the shuffled order.
    owners = order.argsort() % num_partitions
    if alpha:
        for label in np.unique(labels):
            indices = order[labels[order] == label]
            ends = random.dirichlet([alpha] * num_partitions).cumsum() * len(indices)
            # Image k of n goes to the first share that ends at k or later.
            owners[indices] = ends[:-1].searchsorted(np.arange(len(indices)) + 1)
        for i in range(num_partitions):
            if i not in owners:  # a client cannot train without images: take one
                richest = np.bincount(owners).argmax()
                owners[np.argmax(owners == richest)] = i
    return [np.flatnonzero(owners == i) for i in range(num_partitions)]


def check_model(net: nn.Module, dataset: Any) -> None:
    """Raise UserError if the model does not fit the images and their classes."""
    images, _ = dataset[[0]]
    last_class = torch.tensor([len(dataset.classes) - 1])
    try:
        F.cross_entropy(net.eval()(images.to(DEVICE)).cpu(), last_class)
    except (RuntimeError, IndexError, ValueError) as error:
        shape = f"{tuple(images.shape[1:])} and {len(dataset.classes)} classes"
        raise UserError(f"Net does not fit images of shape {shape}: {error}") from error


def shared_state(net: nn.Module) -> dict[str, Tensor]:
    """Return what clients and server exchange of a model, by name."""
    state = net.state_dict()
    # No integers, such as BatchNorm's count of batches: their average means nothing.
    return {name: value for name, value in state.items() if value.is_floating_point()}


def get_parameters(net: nn.Module) -> list[np.ndarray]:
    """Return copies of the shared parameters, in the order of the state_dict."""
    return [value.cpu().numpy().copy() for value in shared_state(net).values()]


def set_parameters(net: nn.Module, arrays: list[np.ndarray]) -> None:
    """Set the shared parameters; raises UserError if the arrays do not fit."""
    state = shared_state(net)
    check_parameters(state, arrays)
    for value, array in zip(state.values(), arrays):  # the model's own tensors, not copies
        value.copy_(torch.from_numpy(array))


def check_parameters(
    expected: dict[str, Tensor], arrays: list[np.ndarray], limit: float = np.inf
) -> None:
    """Raise UserError unless the arrays fit `expected`, are finite and within `limit`."""
    for i, (name, value) in enumerate(expected.items()):
        if i == len(arrays):
            raise UserError(f"{name} is missing: got {i} of {len(expected)} parameters")
        array = arrays[i]
        wanted = f"{value.dtype}{tuple(value.shape)}".removeprefix("torch.")
        got = f"{array.dtype}{array.shape}"
        if got != wanted:
            raise UserError(f"{name}: expected {wanted}, got {got} (different models?)")
        weight = np.abs(array).max(initial=0)
        if not np.isfinite(weight):
            raise UserError(f"NaN or infinity in {name}")
        if weight > limit:
            raise UserError(f"{name}: {weight:g} is implausible (limit {limit:g})")
    if len(arrays) > len(expected):
        raise UserError(f"expected {len(expected)} parameters, got {len(arrays)}")


def load_model(path: Path) -> Net:
    """Load a saved model; raises UserError."""
    net = Net()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        check_parameters(shared_state(net), get_parameters(net))  # none is NaN
    except UserError as error:
        raise UserError(f"{path} is not usable: {error}") from error
    except OSError as error:
        raise UserError(f"Cannot read the model {path}: {error.strerror}.") from error
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        EOFError,
        UnpicklingError,
        struct.error,
    ) as error:
        first_line = str(error).partition("for Net:\n\t")[2].partition("\n")[0]
        reason = first_line or "not a model file"
        raise UserError(f"{path} is not a state_dict of cifar.Net: {reason}") from error
    return net


def to_bytes(net: nn.Module) -> bytes:
    """Return the model's state_dict, on the CPU, as torch.save() writes it."""
    buffer = io.BytesIO()
    torch.save(net.cpu().state_dict(), buffer)
    return buffer.getvalue()


def write_files(contents: dict[Path, bytes]) -> None:
    """Replace all of these files, or none if one cannot be written; raises UserError."""
    try:
        for path, content in contents.items():
            with Path(f"{path}.tmp").open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            Path(f"{path}.tmp").replace(path)
    except OSError as error:
        for each in contents:
            with suppress(OSError):  # a partly written file would keep a full disk full
                Path(f"{each}.tmp").unlink()
        hint = " (see ulimit -n)" if error.errno == errno.EMFILE else ""
        raise UserError(
            f"Cannot write {path}: {error.strerror}{hint}. The previous file is unchanged."
        ) from error


def read_history(path: Path) -> list[dict] | None:
    """Return the history that server.py wrote beside a model, if there is a valid one."""
    try:
        history = json.loads(path.with_suffix(".json").read_bytes())
        valid = isinstance(history, list) and all(type(each["round"]) is int for each in history)
        return history if valid else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


class Parser(ArgumentParser):
    """An ArgumentParser whose --help shows the defaults, where there are any."""

    def add(
        self, name: str, kind: Any, default: Any, text: str, metavar: str | None = None
    ) -> None:
        """Add a flag that takes a value."""
        text += "" if default is None else " (default: %(default)s)"
        self.add_argument(name, type=kind, default=default, help=text, metavar=metavar)

    def add_shared(self) -> None:
        """Add the flags that cifar.py and client.py have in common."""
        self.add("--batch-size", number(int, 1), 32, "training batch size")
        self.add("--data-root", str, DATA_ROOT, "dataset directory, downloaded if missing")
        text = "use generated images (no download)"
        self.add_argument("--synthetic", action="store_true", help=text)
        self.add("--seed", number(int, 0), None, "random seed, for repeatable runs")
        self.add("--threads", number(int, 1, 1024), 1, "PyTorch CPU threads")


def parse_config(config: dict[str, Any], *parsers: ArgumentParser) -> Namespace:
    """Parse a config of Flower's engine as flags of these parsers; raises UserError.

    The engine shows an exception, but not what argparse prints before it exits.
    """
    parser = ArgumentParser(
        parents=parsers, conflict_handler="resolve", add_help=False, exit_on_error=False
    )
    known = [name.replace("_", "-") for name in vars(parser.parse_args([]))]
    arguments = []
    for key, value in config.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise UserError(f"unknown key {key!r} in the config (did you mean {nearest!r}?)")
        if value is not False:
            arguments.append(f"--{key}" if value is True else f"--{key}={value}")
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(str(error)) from error


def number(kind: type, low: float, high: float = 2**31 - 1) -> Callable:
    """Return an argparse type for an int or a float from `low` to `high`, inclusive."""

    def convert(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    convert.__name__ = kind.__name__  # argparse shows it: "invalid int value"
    return convert


def address(text: str) -> str:
    """Check HOST:PORT, as an argparse type."""
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ArgumentTypeError(f"{text!r} is not HOST:PORT, as in {SERVER_ADDRESS}")
    return text


def model_path(text: str) -> Path:
    """Check, as an argparse type, that a model can be saved there; follow links."""
    path = Path(text).resolve()
    if path.suffix != ".pt" or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArgumentTypeError(f"{text} must end in .pt and be in an existing, writable directory")
    return path


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(): an expected error is one line on stderr and exit code 1."""
    # Shells make background processes ignore Ctrl-C, as in `client.py & server.py`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a program that Ctrl-C ended
    except UserError as error:
        sys.exit(str(error))
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Nobody reads the output (`server.py | head`), or its disk is full. Python flushes
        # it again at exit: see "Note on SIGPIPE" in its documentation of signal.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"Cannot print: {error.strerror}.")


def main() -> None:
    """Train on all of the data in one place, or evaluate a saved model."""
    parser = Parser(description=f"Centralized PyTorch training on {DATASET}.")
    parser.add("--epochs", number(int, 1), 2, "training epochs")
    parser.add("--lr", number(float, 1e-9), LEARNING_RATE, "learning rate")
    parser.add_shared()
    parser.add("--model", model_path, None, "save the trained weights to FILE", "FILE")
    parser.add("--evaluate", Path, None, "evaluate MODEL instead of training", "MODEL")
    args = parser.parse_args()
    if args.model and read_history(args.model) is not None:
        raise UserError(f"{args.model} is the model of a federated run: pass a different --model.")
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.evaluate:
        net = load_model(args.evaluate)
        print(f"Model {args.evaluate}")
    else:
        print("Centralized PyTorch training")
        net = Net()
    net.to(DEVICE)
    print("Load data")
    trainloader, testloader, _ = load_data(args.batch_size, args.data_root, args.synthetic)
    dataset: Any = testloader.dataset
    check_model(net, dataset)
    if not args.evaluate:
        print("Start training")
        train(net, trainloader, args.epochs, DEVICE, args.lr)
    elif history := read_history(args.evaluate):
        data = str(history[-1].get("data", dataset.name))
        if dataset.name not in data:
            print(f"Warning: this model was trained on {data}, not on {dataset.name}")
    print("Evaluate model")
    loss, accuracy = test(net, testloader, DEVICE)
    print("Loss: ", loss)
    print("Accuracy: ", accuracy)
    if args.model:
        write_files({args.model: to_bytes(net)})


if __name__ == "__main__":
    run_main(main)
