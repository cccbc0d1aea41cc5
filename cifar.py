"""Centralized training of a small CNN on CIFAR-10: plain PyTorch.

python3 cifar.py                               # train for 2 epochs, then evaluate
python3 cifar.py --evaluate global_model.pt    # evaluate a saved model
"""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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
        x = x.contiguous(memory_format=torch.channels_last)  # faster
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def normalize(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collate images (bytes) and labels, and normalize the whole batch to [-1, 1]."""
    images, labels = zip(*samples)
    return torch.stack(images).float().div_(255).sub_(0.5).div_(0.5), torch.stack(labels)


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
    dataset = synthesize(10_000, 1) if synthetic else read_images(data_root, train=True)
    images, labels = dataset.tensors
    indices = partition(labels, num_partitions, alpha)[partition_id]
    trainset = TensorDataset(images[indices], labels[indices])
    # Test images are always IID: every client is tested on all classes.
    dataset = synthesize(2_000, 2) if synthetic else read_images(data_root, train=False)
    images, labels = dataset.tensors
    indices = partition(labels, num_partitions)[partition_id]
    testset = TensorDataset(images[indices], labels[indices])
    sizes = f"{len(trainset)} training / {len(testset)} test images"
    print(f"Partition {partition_id} of {num_partitions}: {sizes}")
    print("Training images per class:", *trainset.tensors[1].bincount(minlength=10).tolist())
    # A last batch of one image is left out: BatchNorm, if used, cannot train on it.
    drop_last = len(trainset) > 1 and len(trainset) % batch_size == 1
    trainloader = DataLoader(
        trainset, batch_size, shuffle=True, drop_last=drop_last, collate_fn=normalize
    )
    # The size of its batches does not change what test() returns: 250 is fast.
    testloader = DataLoader(testset, batch_size=250, collate_fn=normalize)
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
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
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
                mean = running_loss / (i % 100 + 1)
                print(f"[{epoch + 1}, {i + 1:5d}] loss: {mean:.3f}", flush=True)
                running_loss = 0.0


def test(net: nn.Module, testloader: DataLoader, device: torch.device) -> tuple[float, float]:
    """Validate the network on the entire test set; return mean loss and accuracy."""
    criterion = nn.CrossEntropyLoss(reduction="sum")
    correct, total, loss = 0, 0, 0.0
    net.eval()
    with torch.no_grad():
        for images, labels in testloader:
            images, labels = images.to(device), labels.to(device)
            outputs = net(images)
            loss += criterion(outputs, labels).item()
            predicted = outputs.argmax(1)
            total += labels.numel()
            correct += int((predicted == labels).sum())
    return loss / max(total, 1), correct / max(total, 1)  # the test set may be empty


# Images and partitions


def read_images(data_root: str, train: bool) -> TensorDataset:
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
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)  # to (N, 3, 32, 32)
    return TensorDataset(images, torch.tensor(dataset.targets))


def synthesize(num_images: int, seed: int) -> TensorDataset:
    """Generate images of ten classes: a coarse pattern each, randomly shifted, and noise."""
    height, width, channels = 32, 32, 3
    # RandomState, here and below: NumPy guarantees that its numbers never change.
    coarse = np.random.RandomState(0).randint(2, size=(10, channels, 4, 4), dtype=np.uint8)
    patterns = F.interpolate(torch.from_numpy(coarse), (height, width)).numpy()
    random = np.random.RandomState(seed)
    images = random.randint(128, size=(num_images, channels, height, width), dtype=np.uint8)
    labels = torch.arange(num_images) % 10
    shifts = random.randint(-4, 5, size=(num_images, 2))
    for image, label, shift in zip(images, labels, shifts):
        # In place. At most 114, and the noise is at most 127: no overflow.
        image += 14 + 100 * np.roll(patterns[label], shift, axis=(1, 2))
    return TensorDataset(torch.from_numpy(images), labels)


def partition(labels: Tensor, num_partitions: int, alpha: float | None = None) -> list[np.ndarray]:
    """Split the indices of labels into sorted partitions, the same on every machine.

    IID, or with `alpha` non-IID: each class is split by shares from Dirichlet(alpha)
    (Li, Diao, Chen, He 2022, https://arxiv.org/abs/2102.02079).
    """
    random = np.random.RandomState(2019)
    if alpha is None:
        order = random.permutation(len(labels))
        return [np.sort(order[i::num_partitions]) for i in range(num_partitions)]
    # Drawn before the permutations, so that they do not depend on the number of images.
    shares = random.dirichlet([alpha] * num_partitions, size=int(labels.max()) + 1)
    pieces = []  # of each class, and for each partition
    for label, share in enumerate(shares):
        indices = random.permutation(np.flatnonzero(labels.numpy() == label))
        ends = share.cumsum() * len(indices)
        pieces.append(np.split(indices, ends[:-1].astype(int)))
    partitions = [np.sort(np.concatenate(each)) for each in zip(*pieces)]
    for i, indices in enumerate(partitions):
        if len(indices) == 0:  # give it one image, or it could not train
            largest = np.argmax([len(each) for each in partitions])
            partitions[i], partitions[largest] = np.split(partitions[largest], [1])
    return partitions


# A model's parameters as NumPy arrays, and saved models


def shared_state(net: nn.Module) -> dict[str, Tensor]:
    """Return the part of a state_dict that is averaged: its real and complex floats."""
    shared = {}
    for name, value in net.state_dict().items():
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            shared[name] = value
    return shared


def get_parameters(net: nn.Module) -> list[np.ndarray]:
    """Return copies of the shared state, half precision as float32."""
    parameters = []
    for value in shared_state(net).values():
        dtype = torch.promote_types(value.dtype, torch.float32)  # NumPy has no bfloat16
        parameters.append(value.to("cpu", dtype, copy=True).numpy())
    return parameters


def set_parameters(net: nn.Module, parameters: list[np.ndarray]) -> None:
    """Set the shared state; raises ValueError or RuntimeError if they do not match."""
    state = net.state_dict()  # keeps the modules' versions, unlike a new dict
    for name, array in zip(shared_state(net), parameters, strict=True):
        state[name] = torch.as_tensor(array)
    net.load_state_dict(state)


def load_model(path: Path) -> Net:
    """Return a Net with a saved state_dict."""
    net = Net()
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001  # PyTorch raises many; repr() is one line
        sys.exit(f"Cannot load {path} as a state_dict of Net: {error!r}")
    return net


def add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch-size", type=int, default=32, help="training batch size")
    add("--data-root", default=DATA_ROOT, help="folder of the images")
    add("--synthetic", action="store_true", help="use generated images (no download)")
    add("--seed", type=int, help="random seed, for repeatable runs")
    add("--threads", type=int, default=1, help="CPU threads (clients share the cores)")


def main() -> None:
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="training epochs")
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="learning rate")
    add_flags(parser)
    parser.add_argument("--model", type=Path, metavar="FILE", help="save the model")
    parser.add_argument("--evaluate", type=Path, metavar="FILE", help="only evaluate")
    args = parser.parse_args()
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
        args.model.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.cpu().state_dict(), args.model)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # Ctrl-C
        sys.exit(130)
