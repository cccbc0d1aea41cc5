"""Centralized training of a small CNN on CIFAR-10: plain PyTorch.

python3 cifar.py                               # train for 2 epochs, then evaluate
python3 cifar.py --evaluate global_model.pt    # evaluate a saved model
"""

import signal
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

DATA_ROOT = "~/data/cifar-10"
LEARNING_RATE = 0.001
DEVICE = torch.device("cpu")
if torch.accelerator.is_available():  # such as "cuda", or "mps" on a Mac
    DEVICE = torch.accelerator.current_accelerator() or DEVICE


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
        # ReLU after pooling: the same as before it, on a quarter of the pixels.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Images(Dataset):
    """Images kept as bytes, and converted to normalized floats one batch at a time.

    Indexed by a list, it returns a batch: much faster than collating single images.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images  # uint8 (N, height, width, channels)
        self.labels = labels  # int64 (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return float images (N, channels, height, width) in [-1, 1] and labels (N,)."""
        index = torch.tensor(indices)
        images = self.images.index_select(0, index)
        images = images.permute(0, 3, 1, 2)  # channels_last in memory: pooling is faster
        return images.float().div_(255).sub_(0.5).div_(0.5), self.labels[index]


def load_data(
    batch_size: int = 32,
    data_root: str = DATA_ROOT,
    synthetic: bool = False,
    partition_id: int = 0,
    num_partitions: int = 1,
    alpha: float | None = None,
) -> tuple[DataLoader, DataLoader, dict[str, int]]:
    """Load CIFAR-10 (training and test set), or one of its partitions.

    Batches are float images (N, 3, 32, 32) in [-1, 1] and int64 labels (N,).
    """
    # One set after the other, since each takes twice its memory while it is read.
    trainset = synthesize(10_000, 1) if synthetic else read_images(data_root, train=True)
    trainset = select(trainset, partition(trainset.labels, num_partitions, alpha)[partition_id])
    testset = synthesize(2_000, 2) if synthetic else read_images(data_root, train=False)
    # Test images are always IID: the clients' average is the accuracy on all of them.
    testset = select(testset, partition(testset.labels, num_partitions)[partition_id])
    sizes = f"{len(trainset)} training / {len(testset)} test images"
    print(f"Partition {partition_id} of {num_partitions}: {sizes}")
    counts = trainset.labels.bincount(minlength=int(testset.labels.max()) + 1)
    print("Training images per class:", *counts.tolist())
    # batch_size=None: the dataset gets a sampler's list of indices, and returns a batch.
    # A last batch of one image is left out, since BatchNorm cannot train on it.
    drop_last = len(trainset) % batch_size == 1 < len(trainset)
    batches = BatchSampler(RandomSampler(trainset), batch_size, drop_last)
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


# Images and partitions


def read_images(data_root: str, train: bool) -> Images:
    """Read CIFAR-10's training or test set, and download it if it is missing."""
    from torchvision.datasets import CIFAR10  # takes a second to import

    root = Path(data_root).expanduser()
    try:
        dataset = CIFAR10(root, train)
    except RuntimeError:  # missing or damaged
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):  # two clients at once: one download
                dataset = CIFAR10(root, train, download=True)
        except (OSError, RuntimeError) as error:
            hint = f"put cifar-10-python.tar.gz into {root}, or use --synthetic"
            sys.exit(f"Cannot download CIFAR-10 ({error}): {hint}")
    return Images(torch.from_numpy(dataset.data), torch.tensor(dataset.targets))


def synthesize(num_images: int, seed: int) -> Images:
    """Generate images of ten classes: a coarse pattern for each, shifted, with noise."""
    height, width, channels = 32, 32, 3
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
    return Images(torch.from_numpy(images).permute(0, 2, 3, 1), labels)


def partition(labels: Tensor, num_partitions: int, alpha: float | None = None) -> list[np.ndarray]:
    """Split the indices of labels into disjoint partitions, the same on every machine.

    IID, or with `alpha` non-IID: for each class, the partitions' shares are drawn from
    Dirichlet(alpha) (Li, Diao, Chen, He 2022, https://arxiv.org/abs/2102.02079).
    """
    random = np.random.RandomState(2019)
    order = random.permutation(len(labels))
    # The partition of each image, by its position in the shuffled order.
    owners = order.argsort() % num_partitions
    if alpha is not None:
        shuffled = labels.numpy()[order]
        for label in np.unique(shuffled):
            indices = order[shuffled == label]
            ends = random.dirichlet([alpha] * num_partitions).cumsum() * len(indices)
            # Image k of n goes to the first share that ends at k or later.
            owners[indices] = ends[:-1].searchsorted(np.arange(len(indices)) + 1)
        for i in range(num_partitions):
            if i not in owners:  # nobody can train without images: take one
                largest = np.bincount(owners).argmax()
                owners[np.argmax(owners == largest)] = i
    return [np.flatnonzero(owners == i) for i in range(num_partitions)]


def select(images: Images, indices: np.ndarray) -> Images:
    """Return only these images; the others' memory can be freed."""
    index = torch.from_numpy(indices)
    return Images(images.images.index_select(0, index), images.labels[index])


# A model's parameters as NumPy arrays, and saved models


def shared_state(net: nn.Module) -> dict[str, Tensor]:
    """Return the floats of a state_dict, since an average of integers means nothing."""
    return {name: each for name, each in net.state_dict().items() if each.is_floating_point()}


def get_parameters(net: nn.Module) -> list[np.ndarray]:
    """Return copies of the shared state as float32, in the order of the state_dict."""
    return [value.float().cpu().numpy().copy() for value in shared_state(net).values()]


def set_parameters(net: nn.Module, parameters: list[np.ndarray]) -> None:
    """Set the shared state; raises ValueError or RuntimeError if they do not fit."""
    names = list(shared_state(net))
    if len(parameters) != len(names):
        raise ValueError(f"expected {len(names)} arrays, got {len(parameters)}")
    tensors = map(torch.as_tensor, parameters)
    net.load_state_dict({**net.state_dict(), **dict(zip(names, tensors))}, strict=True)


def load_model(path: Path) -> Net:
    """Load a saved state_dict."""
    net = Net()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError) as error:
        sys.exit(f"Cannot load {path}: {error}")
    return net


def add_flags(parser: ArgumentParser) -> None:
    """Add the flags of every script that trains."""
    add = parser.add_argument
    add("--batch-size", type=int, default=32, help="training batch size")
    add("--data-root", default=DATA_ROOT, help="folder of the images")
    add("--synthetic", action="store_true", help="use generated images (no download)")
    add("--seed", type=int, help="random seed, for repeatable runs")
    add("--threads", type=int, default=1, help="PyTorch's threads on the CPU")


def main() -> None:
    """Train on all of the data in one place, or evaluate a saved model."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: at once, without a traceback
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="training epochs")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate")
    add_flags(parser)
    parser.add_argument("--model", type=Path, metavar="FILE", help="save the model")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="only evaluate")
    args = parser.parse_args()
    if args.model and args.model.suffix != ".pt":
        parser.error("--model must end in .pt")
    if args.model:
        args.model.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    net = load_model(args.evaluate) if args.evaluate else Net()
    net.to(DEVICE)
    print("Centralized PyTorch training")
    print("Load data")
    trainloader, testloader, _ = load_data(args.batch_size, args.data_root, args.synthetic)
    if not args.evaluate:
        print("Start training")
        train(net, trainloader, args.epochs, DEVICE, args.lr)
    print("Evaluate model")
    loss, accuracy = test(net, testloader, DEVICE)
    print("Loss: ", loss)
    print("Accuracy: ", accuracy)
    if args.model:
        torch.save(net.cpu().state_dict(), args.model)


if __name__ == "__main__":
    main()
