"""Centralized training: an ordinary PyTorch program that knows nothing of federated learning.

python3 cifar.py                              # CIFAR-10, 2 epochs, loss and accuracy
python3 cifar.py --synthetic                  # the same on generated images, without a network
python3 cifar.py --evaluate global_model.pt   # loss and accuracy of a saved model
"""

import gc
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: end at once, in the imports too
    gc.set_threshold(1_000_000)  # PyTorch is imported half a second faster

import argparse
import contextlib
import io
import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

DATA_ROOT = "~/data/cifar-10"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class UserError(Exception):
    """What went wrong and what to do about it, in one line; main() prints it and exits 1."""


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

    `images` is uint8 (N, 32, 32, 3), `labels` int64 (N,). A DataLoader over it needs
    `collate_fn=tuple`, because what it fetches is a batch already.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return float images (len(indices), 3, 32, 32) in [-1, 1] and their int64 labels."""
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

    The loaders give float images (N, 3, 32, 32) in [-1, 1] and int64 labels (N,). Raises
    UserError where the images are neither there nor to be had, or the part has none.
    """
    if synthetic:
        train_images, test_images = synthesize(10_000, seed=1), synthesize(2_000, seed=2)
    else:
        train_images, test_images = read_or_fetch(Path(os.path.expanduser(data_root)))
    train_labels, test_labels = train_images[1], test_images[1]
    if not 0 <= partition_id < num_partitions <= min(len(train_labels), len(test_labels)):
        raise UserError(
            f"No images for part {partition_id} of {num_partitions}: parts count from 0, and there "
            f"are {len(train_labels)} images to train on and {len(test_labels)} to test on."
        )
    part = partition(train_labels, num_partitions, alpha)[partition_id]
    trainset = select(train_images, part)
    testset = select(test_images, partition(test_labels, num_partitions)[partition_id])
    on_gpu = torch.cuda.is_available()
    trainloader = DataLoader(
        trainset, batch_size=batch_size, shuffle=True, collate_fn=tuple, pin_memory=on_gpu
    )
    # 250: the batch size does not change what test() returns, and here it is the fastest.
    testloader = DataLoader(testset, batch_size=250, collate_fn=tuple, pin_memory=on_gpu)
    return trainloader, testloader, {"trainset": len(trainset), "testset": len(testset)}


def train(
    net: nn.Module,
    trainloader: DataLoader,
    epochs: int,
    device: torch.device,
    lr: float = 0.001,
) -> None:
    """Train the network."""
    # Define loss and optimizer
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, fused=True)

    print(f"Training {epochs} epoch(s) w/ {len(trainloader)} batches each", flush=True)

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
            if i % 100 == 99:  # print every 100 mini-batches
                print(
                    f"[{epoch + 1}, {i + 1:5d}] loss: {running_loss.item() / 100:.3f}", flush=True
                )
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
    parser = argparse.ArgumentParser(
        description="Centralized PyTorch training on CIFAR-10.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=number(int, 1), default=2, help="passes over the images")
    add("--batch-size", type=number(int, 1), default=32, help="images a step")
    add("--lr", type=number(float, 0), default=0.001, help="learning rate")
    add_data_arguments(parser)
    add(
        "--threads",
        type=number(int, 1, 1024),
        default=torch.get_num_threads(),
        help="CPU threads; one a core is the fastest where nothing else runs (on 2 cores, 2 "
        "threads were 1.3 times as fast as 1)",
    )
    add("--evaluate", metavar="MODEL", type=Path, help="only test this model, train nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    net = Net()
    if args.evaluate:
        net.load_state_dict(load_model(args.evaluate))
    net.to(device)

    print("Centralized PyTorch training" if not args.evaluate else f"Model {args.evaluate}")
    print("Load data", flush=True)
    trainloader, testloader, _ = load_data(args.batch_size, args.data_root, args.synthetic)
    if not args.evaluate:
        print("Start training")
        train(net=net, trainloader=trainloader, epochs=args.epochs, device=device, lr=args.lr)
    print("Evaluate model")
    loss, accuracy = test(net=net, testloader=testloader, device=device)
    print("Loss: ", loss)
    print("Accuracy: ", accuracy)


# What load_data() is made of: uint8 images (N, 32, 32, 3) and their N labels.
Labelled = tuple[np.ndarray, np.ndarray]


def read_or_fetch(root: Path) -> tuple[Labelled, Labelled]:
    """Return the training and the test images below `root`, downloaded, by one process, if need be.

    Raises UserError where they are neither there nor to be had.
    """
    with contextlib.suppress(OSError):
        return read(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")  # the system frees it however its holder ends
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"Another process is fetching CIFAR-10 into {root}: waiting for it", flush=True)
            lock.acquire()
    except OSError as error:
        raise UserError(f"Cannot write to the data folder {root}: {error.strerror}.") from error
    try:
        with contextlib.suppress(OSError):
            return read(root)  # fetched by whoever had the lock
        fetch(root)
        return read(root)
    finally:
        lock.release()


def read(root: Path) -> tuple[Labelled, Labelled]:
    """Read and verify the unpacked files; raises OSError where one is missing or damaged."""
    # Importing torchvision takes a second: only for those who need it.
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]
    from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

    def read_files(files: list[tuple[str, str]]) -> Labelled:
        for i, (name, md5) in enumerate(files):
            path = root / CIFAR10.base_folder / name
            if not check_integrity(path, md5):
                raise OSError(f"{name} is missing or damaged")
            with path.open("rb") as file:
                entry = pickle.load(file, encoding="latin1")
            if i == 0:  # all files are of one length, and no image is to be in memory twice
                images = torch.empty(len(files), len(entry["labels"]), 32, 32, 3, dtype=torch.uint8)
                labels = np.empty(images.shape[:2], dtype=np.int64)
            # PyTorch reorders the images in less time than NumPy.
            planes = torch.from_numpy(entry["data"]).view(-1, 3, 32, 32)
            images[i] = planes.permute(0, 2, 3, 1)
            labels[i] = entry["labels"]
        return images.view(-1, 32, 32, 3).numpy(), labels.reshape(-1)

    return read_files(CIFAR10.train_list), read_files(CIFAR10.test_list)


def fetch(root: Path) -> None:
    """Download and unpack CIFAR-10 below `root`; an intact archive there is not downloaded again."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import (  # type: ignore[import-untyped]
        download_and_extract_archive,
    )

    print(f"Fetching CIFAR-10 into {root}", flush=True)
    # The progress bar is for a terminal; in a file it is thousands of lines.
    progress = sys.stderr if sys.stderr.isatty() else io.StringIO()
    socket.setdefaulttimeout(30)  # torchvision sets none: a stalled download would stay for ever
    try:
        with contextlib.redirect_stderr(progress):
            download_and_extract_archive(
                CIFAR10.url, str(root), filename=CIFAR10.filename, md5=CIFAR10.tgz_md5
            )
    except Exception as error:  # network, disk, archive: whatever it is, the user is told
        raise UserError(
            f"CIFAR-10 is missing or incomplete in {root / CIFAR10.base_folder}, and fetching "
            f"{CIFAR10.url} failed: {error}. Put {CIFAR10.filename} into {root}, or add "
            f"--synthetic to train on generated images."
        ) from error
    finally:
        socket.setdefaulttimeout(None)


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
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels


def partition(
    labels: np.ndarray, num_partitions: int, alpha: float | None = None
) -> list[np.ndarray]:
    """Deal the images with these labels into disjoint parts, the same on every machine.

    Returns the sorted indices of each part. The parts are alike, or with `alpha` each has its own
    mixture of the classes, drawn from Dirichlet(alpha * p) with p uniform (Hsu, Qi, Brown 2019,
    https://arxiv.org/abs/1909.06335): smaller is more skewed.
    """
    random = np.random.RandomState(2019)
    order = random.permutation(len(labels))
    if alpha is None:
        return [np.sort(order[part::num_partitions]) for part in range(num_partitions)]
    classes = [order[labels[order] == label] for label in range(len(CLASSES))]
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


def select(labelled: Labelled, indices: np.ndarray) -> Images:
    """Return a data set of the images with these sorted indices; all of them are not copied."""
    images, labels = labelled
    if len(indices) < len(labels):
        images, labels = images[indices], labels[indices]
    return Images(torch.from_numpy(images), torch.from_numpy(labels))


def load_model(path: Path) -> dict[str, Tensor]:
    """Read the state_dict of a Net; raises UserError where the file holds something else."""
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"Cannot read the model {path}: {error.strerror}.") from error
    except Exception as error:  # torch.load raises many kinds
        raise UserError(f"{path} is no saved model, or a damaged one.") from error
    expected = {name: value.shape for name, value in Net().state_dict().items()}
    if not isinstance(state_dict, dict) or expected != {
        name: getattr(value, "shape", None) for name, value in state_dict.items()
    }:
        raise UserError(f"{path} holds the weights of another network than cifar.Net.")
    return state_dict


# What the command lines of the three scripts share.


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that cifar.py and client.py have in common."""
    add = parser.add_argument
    add("--data-root", default=DATA_ROOT, help="where CIFAR-10 is, or is put")
    add("--synthetic", action="store_true", help="train on generated images, without a download")
    add("--seed", type=number(int, 0), help="make the run repeatable; without it, each run differs")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main() and end the process; a UserError is printed, with exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
    sys.stdout.flush()
    os._exit(0)  # Python would take a second to clear PyTorch away


def number(kind: type, low: float, high: float = 2**31 - 1) -> Callable[[str], Any]:
    """Return an argparse type for an int or a float from `low` to `high`, both included."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it: "invalid int value"
    return parse


def address(text: str) -> str:
    """Check HOST:PORT, for argparse."""
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:8080")
    return text


def resolve(address: str) -> list[tuple[Any, ...]]:
    """Look HOST:PORT up as socket.getaddrinfo() does; raises UserError for an unknown host."""
    host, _, port = address.rpartition(":")
    try:
        return socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UserError(f"The host {host} is not known: {error}.") from error


if __name__ == "__main__":
    run_main(main)
