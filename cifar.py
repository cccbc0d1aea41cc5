"""Centralized training: an ordinary PyTorch program that knows nothing of federated learning.

python3 cifar.py --evaluate global_model.pt   # only test a saved model
"""

import argparse
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

DATASET = "CIFAR-10"
DATA_ROOT = "~/data/cifar-10"
DATA_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
Labelled = tuple[np.ndarray, np.ndarray]  # uint8 images (N, height, width, channels), N labels


class Net(nn.Module):
    """A small CNN for 32x32 images: (N, 3, 32, 32) floats to (N, 10) class scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        # ReLU after pooling gives the same numbers as before it, on a quarter of the pixels.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Images(Dataset):
    """Images that stay bytes in memory and become normalized floats a whole batch at a time.

    `part` are the indices of those to take. What a DataLoader fetches is a batch: `collate_fn=tuple`.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, part: np.ndarray) -> None:
        if len(part) < len(labels):  # all of them are not copied
            images, labels = images[part], labels[part]
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return floats (len(indices), channels, height, width) in [-1, 1], and int64 labels."""
        index = torch.tensor(indices)
        images = self.images.index_select(0, index).permute(0, 3, 1, 2)  # channels_last: fast pools
        return images.float().div_(255).sub_(0.5).div_(0.5), self.labels[index]


def load_data(
    batch_size: int = 32,
    data_root: str | Path = DATA_ROOT,
    synthetic: bool = False,
    partition_id: int = 0,
    num_partitions: int = 1,
    alpha: float | None = None,
) -> tuple[DataLoader, DataLoader, dict[str, int]]:
    """Load one client's part of CIFAR-10, by default all of it (training and test set).

    Batches are float images (N, 3, 32, 32) in [-1, 1] and int64 labels (N,). May raise UserError.
    """
    if not 0 <= partition_id < num_partitions:
        raise UserError(f"There is no part {partition_id} of {num_partitions}: they count from 0.")
    if synthetic:
        data, images, test_images = "generated images", synthesize(10_000, 1), synthesize(2_000, 2)
    else:
        data, (images, test_images) = DATASET, find_images(data_root)
    trainset = Images(*images, partition(images[1], num_partitions, alpha)[partition_id])
    testset = Images(*test_images, partition(test_images[1], num_partitions)[partition_id])
    part = f"Part {partition_id} of {num_partitions} of {data}"
    print(f"{part}: {len(trainset)} images to train on, {len(testset)} to test on")
    print("To train on, by class:", *np.bincount(trainset.labels, minlength=images[1].max() + 1))
    on_gpu = torch.cuda.is_available()
    trainloader = DataLoader(
        trainset, batch_size=batch_size, shuffle=True, collate_fn=tuple, pin_memory=on_gpu
    )
    # 250: the batch size does not change what test() returns, and here it is the fastest.
    testloader = DataLoader(testset, batch_size=250, collate_fn=tuple, pin_memory=on_gpu)
    return trainloader, testloader, {"trainset": len(trainset), "testset": len(testset)}


def train(
    net: nn.Module, trainloader: DataLoader, epochs: int, device: torch.device, lr: float = 0.001
) -> None:
    """Train the network."""
    # Define loss and optimizer
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, fused=True)
    print(f"Training {epochs} epoch(s) w/ {len(trainloader)} batches each")
    # Train the network
    net.train()
    for epoch in range(epochs):  # loop over the dataset multiple times
        running_loss = torch.zeros((), device=device)
        for i, (images, labels) in enumerate(trainloader):
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            # zero the parameter gradients
            optimizer.zero_grad()
            # forward + backward + optimize
            outputs = net(images)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            # print statistics
            running_loss += loss.detach()  # not .item(), for which a GPU would have to stop
            if i % 100 == 99 or i + 1 == len(trainloader):  # every 100 mini-batches, and the last
                print(f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss.item() / (i % 100 + 1):.3f}")
                running_loss.zero_()


def test(net: nn.Module, testloader: DataLoader, device: torch.device) -> tuple[float, float]:
    """Validate the network on the entire test set: mean loss an example, and accuracy."""
    criterion = nn.CrossEntropyLoss(reduction="sum")
    correct = 0
    total = 0
    loss = 0.0
    net.eval()
    with torch.no_grad():
        for images, labels in testloader:
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            outputs = net(images)
            loss += criterion(outputs, labels).item()
            predicted = outputs.argmax(1)
            total += labels.size(0)
            correct += int((predicted == labels).sum())
    return loss / total, correct / total


def main() -> None:
    """Train on one machine what the clients train together, or evaluate a saved model."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = f"Centralized PyTorch training on {DATASET}."
    parser.add_argument("--epochs", type=number(int, 1), default=2, help="passes over the images")
    parser.add_argument("--lr", type=number(float, 1e-9), default=0.001, help="learning rate")
    add_shared_arguments(parser)
    parser.add_argument("--model", metavar="FILE", type=model_path, help="keep the weights there")
    parser.add_argument("--evaluate", metavar="MODEL", type=Path, help="only test this model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    net = (load_model(args.evaluate) if args.evaluate else Net()).to(device)
    print(f"Model {args.evaluate}" if args.evaluate else "Centralized PyTorch training")
    print("Load data")
    trainloader, testloader, _ = load_data(args.batch_size, args.data_root, args.synthetic)
    if args.evaluate:
        data = "generated images" if args.synthetic else DATASET
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            trained_on = json.loads(args.evaluate.with_suffix(".json").read_bytes())[-1]["data"]
            if data not in trained_on:
                print(f"Warning: this model was trained on {trained_on!r}, not on {data}")
    else:
        print("Start training")
        train(net=net, trainloader=trainloader, epochs=args.epochs, device=device, lr=args.lr)
    print("Evaluate model")
    loss, accuracy = test(net=net, testloader=testloader, device=device)
    print("Loss: ", loss)
    print("Accuracy: ", accuracy)
    if args.model:
        torch.save(net.cpu().state_dict(), buffer := io.BytesIO())
        args.model.write_bytes(buffer.getvalue())


# A first reading may skip the rest: where the images come from, files, flags, and the end.


class UserError(Exception):
    """What went wrong and what to do about it, in one line; run_main() prints it and exits 1."""


def read_images(root: Path, download: bool) -> tuple[Labelled, Labelled]:
    """Return the training and the test images below `root`; raises RuntimeError without them.

    Nothing else knows the data set: sizes, channels and classes follow from what this returns.
    """
    from torchvision.datasets import CIFAR10  # a second that the server can do without

    def read(dataset: CIFAR10) -> Labelled:
        return np.ascontiguousarray(dataset.data), np.array(dataset.targets)

    return read(CIFAR10(root, download=download)), read(CIFAR10(root, False, download=download))


def find_images(data_root: str | Path) -> tuple[Labelled, Labelled]:
    """Return read_images(), downloaded first, by one process, if need be; raises UserError."""
    try:
        root = Path(data_root).expanduser()
        with contextlib.suppress(RuntimeError):  # what torchvision raises for a missing file
            return read_images(root, download=False)
        print(f"{DATASET} is not in {root}: fetching it, or waiting for the process that does")
        socket.setdefaulttimeout(30)  # torchvision sets none: a stalled download would never end
        progress = sys.stderr if sys.stderr.isatty() else io.StringIO()  # a bar is not for a file
        with FileLock(root / ".lock"), contextlib.redirect_stderr(progress):
            return read_images(root, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"{DATASET} is missing or incomplete in {data_root}, and fetching {DATA_URL} failed "
            f"({' '.join(str(error).split())}). Put {Path(DATA_URL).name} there, or add --synthetic."
        ) from error


def synthesize(num_images: int, seed: int) -> Labelled:
    """Generate images that a CNN can learn: a class is a coarse pattern, shifted and under noise."""
    # RandomState, here and below, because NumPy promises that its numbers never change.
    patterns = np.random.RandomState(0).randint(2, size=(10, 3, 4, 4), dtype=np.uint8)
    patterns = 14 + 100 * patterns.repeat(8, axis=2).repeat(8, axis=3)
    random = np.random.RandomState(seed)
    images = random.randint(128, size=(num_images, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(num_images) % 10
    for image, label, shift in zip(images, labels, random.randint(-4, 5, size=(num_images, 2))):
        image += np.roll(patterns[label], shift, axis=(1, 2))
    return images.transpose(0, 2, 3, 1), labels


def partition(
    labels: np.ndarray, num_partitions: int, alpha: float | None = None
) -> list[np.ndarray]:
    """Deal the images with these labels into disjoint parts, the same on every machine.

    Returns sorted indices. With `alpha`, each part's mixture of the classes is drawn from Dirichlet
    (alpha * p), p uniform (Hsu, Qi, Brown 2019, https://arxiv.org/abs/1909.06335).
    """
    if not 0 < num_partitions <= len(labels) or not (alpha is None or 0.001 <= alpha <= 1e6):
        how = f"into {num_partitions} parts with alpha {alpha} (which is 0.001 to 1000000)"
        raise UserError(f"{len(labels)} images cannot be dealt {how}.")
    random = np.random.RandomState(2019)
    order = random.permutation(len(labels))
    if alpha is None:
        return [np.sort(order[part::num_partitions]) for part in range(num_partitions)]
    classes = [order[labels[order] == label] for label in range(labels.max() + 1)]
    parts = []
    for part in range(num_partitions):
        size = (len(labels) + part) // num_partitions
        # A draw from the Dirichlet distribution, as logarithms: for a small alpha it underflows.
        a = alpha / len(classes)
        log_share = np.log(random.gamma(a + 1, size=len(classes)))
        log_share += np.log(random.uniform(size=len(classes))) / a
        left = np.array([len(indices) for indices in classes])
        counts = np.zeros(len(classes), dtype=int)
        while missing := size - counts.sum():
            log_share[counts == left] = -np.inf  # a class that is used up drops out
            share = np.exp(log_share - log_share.max())
            counts = np.minimum(counts + random.multinomial(missing, share / share.sum()), left)
        parts.append(np.sort(np.concatenate([c[:n] for c, n in zip(classes, counts)])))
        classes = [c[n:] for c, n in zip(classes, counts)]
    return parts


def load_model(path: Path) -> Net:
    """Return the network with the weights in a file; raises UserError."""
    net = Net()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise UserError(f"Cannot read the model {path}: {error.strerror}.") from error
    except Exception as error:
        reason = str(error).partition("for Net:\n\t")[2].partition("\n")[0] or "no saved model"
        raise UserError(f"{path} has no weights for cifar.Net: {reason}") from error
    return net


def check_parameters(net: nn.Module, arrays: Sequence[np.ndarray]) -> None:
    """Raise UserError, which names the first that differs, unless the arrays fit the network."""
    kinds = (
        [f"{value.dtype}{tuple(value.shape)}".removeprefix("torch.") for value in values]
        for values in (net.state_dict().values(), arrays)
    )
    for name, ours, theirs in zip_longest(net.state_dict(), *kinds, fillvalue="nothing"):
        if ours != theirs:
            raise UserError(f"{name} is {theirs} instead of {ours}, as of another network")


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that cifar.py and client.py have in common."""
    threads = torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1
    add = parser.add_argument
    add("--batch-size", type=number(int, 1), default=32, help="images a step")
    add("--data-root", default=DATA_ROOT, help=f"where {DATASET} is, or is put")
    add("--synthetic", action="store_true", help="train on generated images, without a download")
    add("--seed", type=number(int, 0), help="make the run repeatable; without it, each run differs")
    add("--threads", type=number(int, 1, 1024), default=threads, help="CPU threads (see README.md)")


def parse_config(parser: argparse.ArgumentParser, config: Mapping[str, Any]) -> argparse.Namespace:
    """Parse a config of Flower's deployment engine as flags; those of other scripts are ignored."""
    flags = [f"--{k}" if v is True else f"--{k}={v}" for k, v in config.items() if v is not False]
    parser.allow_abbrev = False
    return parser.parse_known_args(flags)[0]


def number(kind: type, low: float, high: float = 2**31 - 1) -> Callable[[str], Any]:
    """Return an argparse type for an int or a float from `low` to `high`, both included."""

    def number(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def model_path(text: str) -> Path:
    """Check, for argparse, that a model can be kept there; a symbolic link is followed."""
    path = Path(text).resolve() if Path(text).is_symlink() else Path(text)
    if path.suffix != ".pt" or path.is_dir() or not os.access(f"{path.parent}/.", os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text} is no file ending in .pt where one can be written"
        )
    return path


def address(text: str) -> str:
    """Check HOST:PORT, for argparse, and write a host like 127.1 out."""
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:8080")
    with contextlib.suppress(OSError):
        host = socket.inet_ntoa(socket.inet_aton(host))
    return f"{host}:{port}"


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main() and end the process: exit 0, or 1 after a line or a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    code: Any = 1
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):  # None where it is closed
            sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
        main()
        code = 0
    except SystemExit as stop:  # argparse's, with a number, or Flower's
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        else:
            code = stop.code or 0
    except (UserError, OSError) as error:  # OSError: a full disk, or nobody reads what is printed
        print(error, file=sys.stderr)
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)  # Python's own end waits for gRPC's threads, and takes a second longer


if __name__ == "__main__":
    run_main(main)
