"""cifar.py: the network, the data, the loops, and what its user sees when something is wrong."""

import argparse
import contextlib
import functools
import http.client
import http.server
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, UNSET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cifar
import server

CPU = torch.device("cpu")
ALPHAS = [None, 0.01, 0.1, 100]


@pytest.fixture
def small_root(small_cifar, monkeypatch):
    """Make this process take the small CIFAR-10 for the real one; return its folder."""
    for name, value in small_cifar.attributes.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    return small_cifar.root


def article_loaders(root):
    """Load the images as the tutorial does: decoded and normalized one at a time."""
    transforms = torchvision.transforms
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
    )
    CIFAR10 = functools.partial(torchvision.datasets.CIFAR10, root, transform=transform)
    trainloader = DataLoader(CIFAR10(train=True), batch_size=32, shuffle=True)
    return trainloader, DataLoader(CIFAR10(train=False), batch_size=32, shuffle=False)


def article_train(net, trainloader, epochs):
    """Train as the tutorial does; return the loss of every step."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    losses = []
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = criterion(net(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_network_has_the_tutorials_shapes():
    net = cifar.Net()
    shapes = [tuple(value.shape) for value in net.state_dict().values()]
    assert shapes == [
        *[(6, 3, 5, 5), (6,), (16, 6, 5, 5), (16,)],
        *[(120, 400), (120,), (84, 120), (84,), (10, 84), (10,)],
    ]
    assert sum(value.numel() for value in net.parameters()) == 62_006
    assert net(torch.zeros(7, 3, 32, 32)).shape == (7, 10)


def test_network_gives_what_the_tutorials_layers_give():
    net, images = cifar.Net(), torch.randn(4, 3, 32, 32)
    x = F.max_pool2d(F.relu(net.conv1(images)), 2)
    x = F.max_pool2d(F.relu(net.conv2(x)), 2).reshape(-1, 400)
    expected = net.fc3(F.relu(net.fc2(F.relu(net.fc1(x)))))
    torch.testing.assert_close(net(images), expected)
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), expected)


def test_load_data_returns_loaders_and_counts(small_root):
    trainloader, testloader, num_examples = cifar.load_data(data_root=small_root)
    assert isinstance(trainloader, DataLoader) and isinstance(testloader, DataLoader)
    assert num_examples == {"trainset": 500, "testset": 100}
    assert len(trainloader) == 16  # 500 / 32, rounded up
    images, labels = next(iter(trainloader))
    assert images.shape == (32, 3, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (32,) and labels.dtype == torch.int64
    assert trainloader.dataset.images.dtype == torch.uint8


def test_batches_are_torchvisions_own_in_the_same_order(small_root):
    ours = cifar.load_data(data_root=small_root)[:2]
    for our_loader, their_loader in zip(ours, article_loaders(small_root)):
        torch.manual_seed(3)
        our_images, our_labels = map(torch.cat, zip(*our_loader))
        torch.manual_seed(3)
        their_images, their_labels = map(torch.cat, zip(*their_loader))
        assert torch.equal(our_images, their_images)
        assert torch.equal(our_labels, their_labels)


def test_load_data_says_what_it_holds(small_root, capsys):
    cifar.load_data(data_root=small_root)
    assert capsys.readouterr().out == (
        "CIFAR-10, partition 0 of 1: 500 training / 100 test images\n"
        "Training images per class: 50 50 50 50 50 50 50 50 50 50\n"
    )
    cifar.load_data(synthetic=True, partition_id=1, num_partitions=3)
    line = "generated images, partition 1 of 3: 3333 training / 667 test images\n"
    assert capsys.readouterr().out.startswith(line)
    skewed = cifar.load_data(data_root=small_root, num_partitions=3, alpha=0.1)[0].dataset.labels
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"CIFAR-10, partition 0 of 3: {len(skewed)} training / 34 test images"
    counts = [int(count) for count in second.rpartition(": ")[2].split()]
    assert counts == [int((skewed == label).sum()) for label in range(len(counts))]
    assert len(counts) == 10, "the classes that this partition lacks too"
    assert max(counts) > 2 * len(skewed) / 10, "skewed"


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_other_images_need_only_another_read_images(monkeypatch, tmp_path, alpha):
    """Letters in place of photos: 28x28 pixels of grey, and 26 classes."""
    pixels = np.random.RandomState(0).randint(256, size=(624, 28, 28, 1), dtype=np.uint8)
    letters = cifar.Images("letters", pixels, np.arange(624) % 26)
    data = letters.subset(np.arange(520)), letters.subset(np.arange(520, 624))
    monkeypatch.setattr(cifar, "read_images", lambda root, download: data)
    loaders = [
        cifar.load_data(data_root=tmp_path, partition_id=i, num_partitions=3, alpha=alpha)[:2]
        for i in range(3)
    ]
    images, labels = next(iter(loaders[1][0]))
    assert images.shape == (len(labels), 1, 28, 28) and 0 < len(labels) <= 32
    assert images.min() == -1 and images.max() == 1
    for which, whole in enumerate(data):
        parts = [pair[which].dataset for pair in loaders]
        known = {image.numpy().tobytes(): label for image, label in zip(whole.images, whole.labels)}
        for part in parts:
            for image, label in zip(part.images, part.labels):
                assert known.pop(image.numpy().tobytes()) == label
        assert not known, "every image is in one of the parts"
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 26))
    cifar.check_network(net, data[1])
    cifar.train(net, loaders[1][0], epochs=1, device=CPU)
    assert cifar.test(net, loaders[1][1], CPU)[1] <= 1


def test_training_is_the_tutorials_to_rounding(small_root, capsys):
    torch.manual_seed(0)
    theirs = cifar.Net()
    article_train(theirs, article_loaders(small_root)[0], epochs=7)
    torch.manual_seed(0)
    ours = cifar.Net()
    cifar.train(ours, cifar.load_data(data_root=small_root)[0], epochs=7, device=CPU)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert "Training 7 epoch(s) w/ 16 batches each" in capsys.readouterr().out


@pytest.mark.parametrize("batches", [100, 104])
def test_train_prints_the_mean_loss_of_100_batches_and_of_the_last(capsys, batches):
    images, labels = torch.randn(2 * batches, 3, 32, 32), torch.randint(10, (2 * batches,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    torch.manual_seed(0)
    losses = np.reshape(article_train(cifar.Net(), loader, epochs=2), (2, batches))
    torch.manual_seed(0)
    cifar.train(cifar.Net(), loader, epochs=2, device=CPU)
    lines = [f"Training 2 epoch(s) w/ {batches} batches each"]
    for epoch in (1, 2):
        lines += [f"[{epoch},   100] loss: {losses[epoch - 1, :100].mean():.3f}"]
        if batches > 100:
            lines += [f"[{epoch},   104] loss: {losses[epoch - 1, 100:].mean():.3f}"]
    assert capsys.readouterr().out.splitlines() == lines


def test_train_lowers_the_loss_as_fast_as_it_is_told(capsys):
    trainloader, testloader, _ = cifar.load_data(synthetic=True)
    torch.manual_seed(0)
    net = cifar.Net()
    before, _ = cifar.test(net, testloader, CPU)
    still = {name: value.clone() for name, value in net.state_dict().items()}
    cifar.train(net, trainloader, epochs=1, device=CPU, lr=0)
    assert all(torch.equal(value, still[name]) for name, value in net.state_dict().items())
    cifar.train(net, trainloader, epochs=1, device=CPU, lr=0.01)
    loss, accuracy = cifar.test(net, testloader, CPU)
    assert before > 2.2 and loss < 1 and accuracy > 0.8


def test_test_returns_mean_loss_and_accuracy():
    """Three examples, worked out by hand: two right, one wrong; the last batch is smaller."""
    scores = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
    labels = torch.tensor([0, 0, 0])
    loader = DataLoader(TensorDataset(scores, labels), batch_size=2)
    net = nn.Sequential(nn.Dropout(0.9))  # testing must switch it off, training on again
    loss, accuracy = cifar.test(net, loader, CPU)
    by_hand = [np.log(1 + np.exp(-2)), np.log(2), np.log(1 + np.exp(2))]
    assert loss == pytest.approx(np.mean(by_hand), rel=1e-6)
    assert accuracy == 2 / 3


def test_training_uses_dropout():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 10), nn.Dropout(1.0))
    before = net[1].weight.clone()
    loader = DataLoader(TensorDataset(torch.ones(2, 4), torch.tensor([1, 2])))
    net.eval()
    cifar.train(net, loader, epochs=1, device=CPU)
    assert torch.equal(net[1].weight, before), "all outputs are dropped, so nothing is learned"


def test_synthetic_images_are_ten_classes_and_always_the_same():
    dataset = cifar.synthesize(300, seed=1)
    images = dataset.images
    assert images.shape == (300, 32, 32, 3) and images.dtype == torch.uint8
    assert dataset.labels.bincount().tolist() == [30] * 10
    assert dataset.name == "generated images" and len(dataset.classes) == 10
    assert torch.equal(images, cifar.synthesize(300, seed=1).images)
    assert not torch.equal(images, cifar.synthesize(300, seed=2).images)
    # Known numbers, so that machines that differ in this would be found out.
    assert images[7, 5, 6].tolist() == KNOWN_PIXEL


KNOWN_PIXEL = [133, 156, 131]


@pytest.mark.parametrize("shape", [(28, 28, 1), (33, 50, 4)])
def test_synthetic_images_have_the_shape_at_the_top(monkeypatch, shape):
    monkeypatch.setattr(cifar, "IMAGE_SHAPE", shape)
    trainloader, testloader, _ = cifar.load_data(synthetic=True)
    assert trainloader.dataset.images.shape == (10_000, *shape)
    assert testloader.dataset.images.shape == (2_000, *shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 10))
    cifar.train(net, trainloader, epochs=1, device=CPU)
    assert cifar.test(net, testloader, CPU)[1] > 0.3, "the classes can be told apart"


def test_images_are_named_and_so_are_their_classes():
    pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    unnamed = cifar.Images("dots", pixels, [2, 0, 1, 1, 0])
    assert unnamed.classes == ["class 0", "class 1", "class 2"]
    named = cifar.Images("dots", pixels, [2, 0, 1, 1, 0], ["x", "y", "z", "unseen"])
    some = named.subset(np.array([4, 0]))
    assert (some.name, len(some), some.labels.tolist()) == ("dots", 2, [0, 2])
    assert some.images.flatten().tolist() == [4, 0]
    assert some.classes == ["x", "y", "z", "unseen"]


def test_a_small_part_knows_all_classes():
    whole = cifar.Images("dots", np.zeros((3, 1, 1, 1), np.uint8), [0, 1, 2])
    assert len(whole.subset(np.array([0])).classes) == 3


def test_network_that_does_not_fit_the_images_is_refused():
    images = cifar.synthesize(20, seed=1)
    cifar.check_network(cifar.Net().to(cifar.DEVICE), images)
    grey = cifar.Images("grey", images.images[..., :1], images.labels)
    with pytest.raises(cifar.UserError, match=r"^Net does not fit images of shape \(1, 32, 32\): "):
        cifar.check_network(cifar.Net().to(cifar.DEVICE), grey)
    letters = cifar.Images("letters", images.images, torch.arange(20) + 6)
    message = "^Net has 10 outputs, but there are 26 classes.$"
    with pytest.raises(cifar.UserError, match=message):
        cifar.check_network(cifar.Net().to(cifar.DEVICE), letters)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("num_partitions", [1, 3, 10])
def test_parts_are_disjoint_complete_and_always_the_same(num_partitions, alpha):
    labels = np.random.RandomState(0).randint(10, size=2_003)
    parts = cifar.partition(labels, num_partitions, alpha)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(2_003))
    assert len(parts) == num_partitions and all(len(part) for part in parts)
    if alpha is None:
        assert {len(part) - 2_003 // num_partitions for part in parts} <= {0, 1}
    again = cifar.partition(labels, num_partitions, alpha)
    assert all(np.array_equal(part, same) for part, same in zip(parts, again))


def test_parts_are_the_same_on_every_machine():
    parts = cifar.partition(np.arange(100) % 10, 10)
    skewed = cifar.partition(np.arange(100) % 10, 10, alpha=1)
    assert (parts[3].tolist(), skewed[3].tolist()) == KNOWN_PARTS


KNOWN_PARTS = ([5, 29, 51, 52, 56, 67, 73, 81, 97, 98], [0, 4, 14, 30, 34, 38, 44, 61, 66, 74, 81])


def test_parts_are_drawn_from_dirichlet_class_by_class():
    """Written out as in the paper: of each class, in a fixed order, a share drawn for each part."""
    labels = np.random.RandomState(0).permutation(np.arange(5_000) % 10)
    counts = [np.bincount(labels[part], minlength=10) for part in cifar.partition(labels, 4, 0.5)]
    random = np.random.RandomState(2019)
    random.permutation(5_000)
    shares = np.array([random.dirichlet([0.5] * 4) for _ in range(10)])
    assert np.abs(np.transpose(counts) - 500 * shares).max() <= 1


def test_no_part_is_empty():
    """Of few images, most parts would get none: each has one from the largest then."""
    labels = np.arange(30) % 10
    for alpha in (0.1, 1.0):
        parts = cifar.partition(labels, 30, alpha)
        assert [len(part) for part in parts] == [1] * 30
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(30))


def test_smaller_alpha_is_more_skewed():
    labels = np.random.RandomState(0).permutation(np.arange(20_000) % 10)

    def largest_share(alpha):
        parts = cifar.partition(labels, 10, alpha)
        counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
        return (counts.max(axis=0) / 2_000).mean()

    shares = [largest_share(alpha) for alpha in (None, 1000, 10, 1, 0.01)]
    assert shares[0] < 0.12 and shares[1] < 0.16, "alike: each class is about a tenth"
    assert shares[1] < shares[2] < shares[3] < shares[4]
    assert shares[4] > 0.8, "most of a class is in one part"


def test_a_client_keeps_only_its_own_part(small_root):
    loaders = [
        cifar.load_data(data_root=small_root, partition_id=i, num_partitions=3, alpha=0.1)[:2]
        for i in range(3)
    ]
    for which, total in enumerate([500, 100]):
        datasets = [pair[which].dataset for pair in loaders]
        parts = torch.cat([dataset.images for dataset in datasets]).flatten(1)
        assert sum(len(dataset) for dataset in datasets) == total
        assert len(torch.unique(parts, dim=0)) == total
        for dataset in datasets:
            assert dataset.images.untyped_storage().nbytes() == len(dataset) * 3072
    tests = [loader.dataset.labels for _, loader in loaders]
    assert all(len(torch.unique(labels)) == 10 for labels in tests), "not skewed"


def test_a_part_keeps_image_and_label_together(small_root):
    whole = cifar.load_data(data_root=small_root)[0].dataset
    known = {image.numpy().tobytes(): label for image, label in zip(whole.images, whole.labels)}
    part = cifar.load_data(data_root=small_root, partition_id=1, num_partitions=2, alpha=1)[0]
    for image, label in zip(part.dataset.images, part.dataset.labels):
        assert known[image.numpy().tobytes()] == label


OUT_OF_RANGE = "--partition-id {} is out of range: use 0 to {} with --num-partitions {}."
NO_PARTS = {
    (3, 3): OUT_OF_RANGE.format(3, 2, 3),
    (-1, 3): OUT_OF_RANGE.format(-1, 2, 3),
    (1, 1): OUT_OF_RANGE.format(1, 0, 1),
    (100, 101): "--num-partitions 101 is too many for 100 images.",
    (0, 101): "--num-partitions 101 is too many for 100 images.",
    (0, 501): "--num-partitions 501 is too many for 500 images.",
}


@pytest.mark.parametrize("part, parts", NO_PARTS)
def test_a_part_without_images_is_an_error(small_root, part, parts):
    with pytest.raises(cifar.UserError) as error:
        cifar.load_data(data_root=small_root, partition_id=part, num_partitions=parts)
    assert str(error.value) == NO_PARTS[part, parts]


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "2.5"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        cifar.number(int, 1)(text)
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        cifar.number(float, 3)(text)


@pytest.mark.parametrize(
    "text", ["", "8080", "host", ":80", "h:0", "h:65536", "http://h:80", "h:x", "h:-1", "h:80/x"]
)
def test_what_is_no_address_is_refused(call, text):
    assert "argument --server-address: " in call("client", f"--server-address={text}", code=2)


def test_addresses_are_accepted():
    for text in ("localhost:1", "[::1]:65535", "a-b.example:8080", "192.0.2.1:80"):
        assert cifar.address(text) == text


@pytest.mark.parametrize("content", [b"", b"junk", "list", "other", "partial", "shape"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    state_dict = cifar.Net().state_dict()
    objects = {
        "list": ([1, 2], "not a model file"),
        "other": (nn.Linear(2, 2).state_dict(), "conv1.weight"),
        "partial": (dict(list(state_dict.items())[:-1]), "fc3.bias"),
        "shape": ({**state_dict, "fc1.bias": torch.zeros(7)}, "fc1.bias"),
    }
    if isinstance(content, bytes):
        path.write_bytes(content)
        reason = "not a model file"
    else:
        value, reason = objects[content]
        torch.save(value, path)
    message = f"^{re.escape(str(path))} is not a state_dict of cifar.Net: .*{reason}"
    with pytest.raises(cifar.UserError, match=message) as error:
        cifar.load_model(path)
    assert "\n" not in str(error.value)


def test_saved_model_is_loaded(tmp_path):
    net = cifar.Net()
    torch.save(net.state_dict(), tmp_path / "model.pt")
    loaded = cifar.load_model(tmp_path / "model.pt")
    assert isinstance(loaded, cifar.Net)
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(
        cifar.UserError, match="Cannot read the model .*none.pt: No such file or directory.$"
    ):
        cifar.load_model(tmp_path / "none.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_saved_model_with_nan_is_refused(tmp_path, value):
    net = cifar.Net()
    with torch.no_grad():
        net.fc2.bias[3] = value
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        cifar.UserError, match="model.pt is not usable: NaN or infinity in fc2.bias$"
    ):
        cifar.load_model(tmp_path / "model.pt")


def named(net):
    return dict(zip(net.state_dict(), cifar.get_parameters(net), strict=True))


def test_parameters_that_fit_pass():
    cifar.check_parameters(named(cifar.Net()), cifar.get_parameters(cifar.Net()))
    normalized = nn.BatchNorm2d(3)  # counts its batches in an integer
    normalized.num_batches_tracked += 1000
    cifar.check_parameters(named(normalized), cifar.get_parameters(normalized), limit=10)


WRONG_PARAMETERS = {
    "shape": (
        lambda arrays: [*arrays[:3], arrays[3][:5], *arrays[4:8], arrays[8][:2], arrays[9]],
        "conv2.bias: expected float32(16,), got float32(5,) (different models?)",
    ),
    "kind": (
        lambda arrays: [*arrays[:3], arrays[3].astype(float), *arrays[4:]],
        "conv2.bias: expected float32(16,), got float64(16,) (different models?)",
    ),
    "order": (
        lambda arrays: [*arrays[:3], *arrays[:2:-1]],
        "conv2.bias: expected float32(16,), got float32(10,) (different models?)",
    ),
    "few": (lambda arrays: arrays[:3], "conv2.bias is missing: got 3 of 10 parameters"),
    "many": (
        lambda arrays: [*arrays, np.zeros(2)],
        "expected 10 parameters, got 11",
    ),
    "infinite": (
        lambda arrays: [*arrays[:3], arrays[3] - np.float32(np.inf), *arrays[4:]],
        "NaN or infinity in conv2.bias",
    ),
    "large": (
        lambda arrays: [*arrays[:3], arrays[3] * 0 - np.float32(2e6), *arrays[4:]],
        "conv2.bias: 2e+06 is implausible (limit 1e+06)",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_PARAMETERS)
def test_first_parameter_that_differs_is_named(wrong):
    spoil, message = WRONG_PARAMETERS[wrong]
    arrays = spoil(cifar.get_parameters(cifar.Net()))
    with pytest.raises(cifar.UserError) as error:
        cifar.check_parameters(named(cifar.Net()), arrays, limit=1e6)
    assert str(error.value) == message


def test_parameters_that_are_set_are_those_that_are_got():
    ours, theirs = cifar.Net(), cifar.Net()
    arrays = cifar.get_parameters(theirs)
    cifar.set_parameters(ours, arrays)
    for array in arrays:
        array += 1  # a copy was taken of them, and they were copies
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_parameters_that_do_not_fit_change_nothing():
    net = cifar.Net()
    before = cifar.get_parameters(net)
    with pytest.raises(cifar.UserError, match="^fc3.bias is missing: got 9 of 10 parameters$"):
        cifar.set_parameters(net, [array + 1 for array in before[:-1]])
    for array, same in zip(cifar.get_parameters(net), before, strict=True):
        assert np.array_equal(array, same)


def test_only_the_shared_state_is_exchanged(monkeypatch):
    """As README.md has it for a layer that each client keeps to itself."""

    def without_the_last(net):
        return {k: v for k, v in net.state_dict().items() if not k.startswith("fc3")}

    monkeypatch.setattr(cifar, "shared_state", without_the_last)
    ours, theirs = cifar.Net(), cifar.Net()
    own = ours.fc3.weight.detach().clone()
    arrays = cifar.get_parameters(theirs)
    assert len(arrays) == 8
    cifar.set_parameters(ours, arrays)
    assert torch.equal(ours.fc3.weight, own) and torch.equal(ours.fc2.weight, theirs.fc2.weight)


def test_files_are_replaced_all_or_none(tmp_path):
    first, second = tmp_path / "a.pt", tmp_path / "a.json"
    cifar.write_files({first: b"1", second: b"2"})
    cifar.write_files({first: b"3", second: b"4"})
    assert (first.read_bytes(), second.read_bytes()) == (b"3", b"4")
    missing = tmp_path / "none" / "a.pt"
    with pytest.raises(cifar.UserError) as error:
        cifar.write_files({first: b"5", missing: b"6"})
    reason = "No such file or directory. The previous file is unchanged."
    assert str(error.value) == f"Cannot write {missing}: {reason}"
    assert (first.read_bytes(), second.read_bytes()) == (b"3", b"4")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.pt"], "nothing is left beside them"


HISTORIES = {
    '[{"round": 1}, {"round": 2}]': [{"round": 1}, {"round": 2}],
    "[]": [],
    '{"round": 1}': None,
    '[{"data": "x"}]': None,
    "[1]": None,
    "7": None,
    "{half": None,
}


@pytest.mark.parametrize("text", HISTORIES)
def test_history_is_read_from_beside_the_model(tmp_path, text):
    assert cifar.read_history(tmp_path / "model.pt") is None
    (tmp_path / "model.json").write_text(text, encoding="utf-8")
    assert cifar.read_history(tmp_path / "model.pt") == HISTORIES[text]


def flags_parser():
    parser = argparse.ArgumentParser()
    cifar.add_shared_arguments(parser)
    return parser


def test_config_of_flowers_engine_is_read_as_flags():
    config = {"batch-size": 8, "synthetic": True, "data-root": "a folder", "rounds": 7}
    config |= {"min-clients": 2, "resume": True}
    args = cifar.parse_config(flags_parser(), config, server.make_parser())
    assert (args.batch_size, args.synthetic, args.data_root) == (8, True, "a folder")
    assert not hasattr(args, "rounds") and not hasattr(args, "resume")
    config = {"synthetic": False, "resume": False}
    defaults = cifar.parse_config(flags_parser(), config, server.make_parser())
    assert defaults == flags_parser().parse_args([])


def test_bad_value_in_a_config_is_argparses_error(capsys):
    with pytest.raises(SystemExit) as stop:
        cifar.parse_config(flags_parser(), {"batch-size": 0}, server.make_parser())
    assert stop.value.code == 2
    assert "argument --batch-size: 0 is not between 1 and" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, nearest",
    [("batchsize", "batch-size"), ("batch", "batch-size"), ("min-client", "min-clients")],
)
def test_unknown_key_in_a_config_is_an_error_with_the_nearest_name(capsys, key, nearest):
    with pytest.raises(SystemExit) as stop:
        cifar.parse_config(flags_parser(), {"seed": 1, key: 8}, server.make_parser())
    assert stop.value.code == 2
    message = f"error: unknown key {key!r} in the config (did you mean {nearest!r}?)\n"
    assert capsys.readouterr().err.endswith(message)


def test_a_model_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("evil").touch, ())

    torch.save(Evil(), tmp_path / "model.pt")
    with pytest.raises(cifar.UserError, match="not a model file"):
        cifar.load_model(tmp_path / "model.pt")
    assert not (tmp_path / "evil").exists()


# The script itself, and fetching the images: as processes.


REQUESTS = 2  # of one download: torchvision looks for redirections first


@pytest.fixture
def web(small_cifar):
    """Serve the small archive; return its address, the requests so far, and a switch that stalls it."""
    requests, go_on = queue.SimpleQueue(), threading.Event()
    go_on.set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.put(self.path)
            go_on.wait(60)
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=small_cifar.root)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    httpd.handle_error = lambda *args: None  # a client that is killed, or has seen enough
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/cifar-10-python.tar.gz", requests, go_on
    go_on.set()
    httpd.shutdown()


def test_script_trains_and_prints_loss_and_accuracy(start, small_cifar):
    script = start("cifar.py", "--epochs", 3, "--batch-size", 10, "--seed", 1, cifar=small_cifar)
    assert script.end() == 0
    lines = script.output.splitlines()
    assert lines[0] == "Centralized PyTorch training"
    assert "Training 3 epoch(s) w/ 50 batches each" in lines
    assert lines[-2].startswith("Loss: ") and lines[-1].startswith("Accuracy: ")


def not_there(cifar):
    doing = "downloading (or waiting for another process to do so)"
    return f"CIFAR-10 is not in {cifar.root}: {doing}\n"


def test_offline_says_what_to_do(start, cifar_copy):
    shutil.rmtree(cifar_copy.root)
    script = start("cifar.py", cifar=cifar_copy)
    assert script.end() == 1
    *lines, last = script.output.splitlines(keepends=True)
    assert lines == ["Centralized PyTorch training\n", "Load data\n", not_there(cifar_copy)]
    assert last.startswith(
        f"Cannot download CIFAR-10 from {cifar.DATA_URL} to {cifar_copy.root} (<urlopen error "
    )
    assert "Connection refused" in last
    assert last.endswith("). Put cifar-10-python.tar.gz there, or use --synthetic.\n")


def test_address_named_is_the_one_that_is_fetched():
    assert cifar.DATA_URL == torchvision.datasets.CIFAR10.url


MISSING = RuntimeError("not found. You can use download=True to download it")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("ju\nnk"), ConnectionResetError("ju\nnk"), http.client.HTTPException("ju\nnk")],
)
def test_whatever_stops_the_download_is_one_line(monkeypatch, tmp_path, error):
    def read_images(root, download):
        raise error if download else MISSING

    monkeypatch.setattr(cifar, "read_images", read_images)
    with pytest.raises(cifar.UserError) as raised:
        cifar.find_images(tmp_path)
    assert str(raised.value) == (
        f"Cannot download CIFAR-10 from {cifar.DATA_URL} to {tmp_path} (ju nk). "
        "Put cifar-10-python.tar.gz there, or use --synthetic."
    )


@pytest.mark.parametrize("fails", [False, True])
def test_download_has_a_timeout_of_its_own(monkeypatch, tmp_path, fails):
    """Nothing else of the process gets it: gRPC's connections, for one."""
    timeouts = []

    def read_images(root, download):
        timeouts.append(socket.getdefaulttimeout())
        if fails or not download:
            raise MISSING
        return "training set", "test set"

    monkeypatch.setattr(cifar, "read_images", read_images)
    before = socket.getdefaulttimeout()
    with contextlib.suppress(cifar.UserError):
        assert cifar.find_images(tmp_path) == ("training set", "test set")
    assert timeouts == [before, 30]
    assert socket.getdefaulttimeout() == before


def test_defect_in_read_images_is_not_taken_for_missing_images(monkeypatch, tmp_path):
    def read_images(root, download):
        assert not download
        raise RuntimeError("a defect")

    monkeypatch.setattr(cifar, "read_images", read_images)
    with pytest.raises(RuntimeError, match="^a defect$"):
        cifar.find_images(tmp_path)


def test_images_that_cannot_be_read_are_one_line(monkeypatch, tmp_path):
    def read_images(root, download):
        assert not download
        raise PermissionError(13, "Permission denied", "a file")

    monkeypatch.setattr(cifar, "read_images", read_images)
    with pytest.raises(cifar.UserError) as error:
        cifar.find_images(tmp_path)
    reason = "[Errno 13] Permission denied: 'a file'"
    assert str(error.value) == f"Cannot read CIFAR-10: {reason}. Check --data-root."


def test_stalled_download_ends(small_root, monkeypatch, tmp_path, web):
    """What the script waits for at most is made shorter here; were it for ever, this would fail."""
    url, requests, go_on = web
    go_on.clear()
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    monkeypatch.setattr(
        socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds and seconds / 100)
    )
    with pytest.raises(cifar.UserError, match=r"\(.*timed out.*\)"):
        cifar.find_images(tmp_path)
    requests.get(timeout=60)


def test_archive_alone_is_enough(start, cifar_copy):
    shutil.rmtree(cifar_copy.root / "cifar-10-batches-py")
    script = start("cifar.py", "--epochs", 1, cifar=cifar_copy)
    assert script.end() == 0, script.output


def test_damaged_file_is_unpacked_again(start, cifar_copy):
    (cifar_copy.root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    script = start("cifar.py", "--epochs", 1, cifar=cifar_copy)
    assert script.end() == 0, script.output


def test_damaged_archive_is_fetched_again(start, cifar_copy, web):
    cifar_copy.attributes["url"], requests, _ = web
    shutil.rmtree(cifar_copy.root / "cifar-10-batches-py")
    archive = cifar_copy.root / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    script = start("cifar.py", "--epochs", 1, cifar=cifar_copy)
    assert script.end() == 0, script.output
    assert requests.qsize() == REQUESTS
    assert "%" not in script.output, "a progress bar is for terminals"


def test_archive_is_fetched_once_even_if_the_first_is_killed(start, cifar_copy, web):
    shutil.rmtree(cifar_copy.root)
    cifar_copy.attributes["url"], requests, go_on = web
    go_on.clear()
    first = start("cifar.py", "--epochs", 1, cifar=cifar_copy)
    requests.get(timeout=60)
    others = [start("cifar.py", "--epochs", 1, cifar=cifar_copy) for _ in range(2)]
    for script in (first, *others):
        script.until(not_there(cifar_copy))
    first.kill()
    go_on.set()
    assert [script.end() for script in others] == [0, 0], others[0].output + others[1].output
    assert requests.qsize() == REQUESTS, "those of one of the others"


def test_data_folder_that_cannot_be_made(start, cifar_copy):
    cifar_copy.root = cifar_copy.root / "cifar-10-python.tar.gz" / "below-a-file"
    script = start("cifar.py", cifar=cifar_copy)
    assert script.end() == 1
    lines = script.output.splitlines()
    assert lines[:2] == ["Centralized PyTorch training", "Load data"]
    assert "Traceback" not in script.output
    assert f"CIFAR-10 from {cifar.DATA_URL} to {cifar_copy.root} (" in lines[-1]
    assert lines[-1].endswith("or use --synthetic.")


def test_data_folder_that_is_a_file(start, cifar_copy):
    cifar_copy.root = cifar_copy.root / "cifar-10-python.tar.gz"
    script = start("cifar.py", cifar=cifar_copy)
    assert script.end() == 1
    last = f"--data-root {cifar_copy.root} is a file, not a directory."
    assert script.output.splitlines() == ["Centralized PyTorch training", "Load data", last]


def test_wrong_flags_are_argparses_errors(call):
    output = call("cifar", "--epochs", "0", code=2)
    assert "argument --epochs: 0 is not between 1 and" in output
    output = call("cifar", "--lr", "0", code=2)
    assert "argument --lr: 0 is not between" in output


def test_evaluate_needs_a_model(start):
    script = start("cifar.py", "--synthetic", "--evaluate", "none.pt")
    assert script.end() == 1
    *_, last = script.output.splitlines()
    assert last == "Cannot read the model none.pt: No such file or directory."
    assert "Traceback" not in script.output and "Load data" not in script.output


def test_model_is_kept_where_the_user_says_and_nowhere_else(
    call, small_root, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = ["cifar", "--epochs", 1, "--data-root", small_root, "--seed", 1]
    without = call(*arguments)
    assert os.listdir(tmp_path) == []
    assert call(*arguments, "--model", "kept.pt") == without
    assert os.listdir(tmp_path) == ["kept.pt"]
    state_dict = torch.load("kept.pt", weights_only=True)
    cifar.Net().load_state_dict(state_dict)
    evaluated = call("cifar", "--data-root", small_root, "--evaluate", "kept.pt")
    assert evaluated.splitlines()[-2:] == without.splitlines()[-2:]
    assert os.listdir(tmp_path) == ["kept.pt"]


@pytest.mark.parametrize("name", ["model", "model.json", "folder.pt", "none/model.pt"])
def test_model_that_could_not_be_kept_is_refused_at_the_start(call, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("folder.pt").mkdir()
    output = call("cifar", "--synthetic", "--model", name, code=2)
    assert f"argument --model: {name} must end in .pt and be in an existing, writable" in output


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_model_in_a_folder_of_others_is_refused_at_the_start(call, tmp_path):
    tmp_path.chmod(0o500)
    output = call("cifar", "--synthetic", "--model", tmp_path / "model.pt", code=2)
    assert "argument --model: " in output


def test_link_to_a_model_is_followed(call, small_root, tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "kept.pt")
    call("cifar", "--epochs", 1, "--data-root", small_root, "--model", tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and (tmp_path / "kept.pt").is_file()
    (tmp_path / "link-to.json.pt").symlink_to(tmp_path / "model.json")
    assert "argument --model: " in call("cifar", "--model", tmp_path / "link-to.json.pt", code=2)


def test_model_of_a_federation_is_not_overwritten(start, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weights")
    (tmp_path / "model.json").write_bytes(of_rounds("generated images"))
    script = start("cifar.py", "--synthetic", "--model", "model.pt")
    assert script.end() == 1
    assert script.output == (
        "model.pt is a federation's model, with its history: pass a different --model.\n"
    )
    assert (tmp_path / "model.pt").read_bytes() == b"weights"


def test_model_beside_other_json_is_written(call, small_root, tmp_path):
    (tmp_path / "model.json").write_text('{"name": "my own"}', encoding="utf-8")
    call("cifar", "--epochs", 1, "--data-root", small_root, "--model", tmp_path / "model.pt")
    cifar.load_model(tmp_path / "model.pt")


def evaluate(call, tmp_path, history, *arguments):
    """Evaluate a model beside which this history is; return the lines before the result."""
    torch.save(cifar.Net().state_dict(), tmp_path / "model.pt")
    if history is not None:
        (tmp_path / "model.json").write_bytes(history)
    lines = call("cifar", "--evaluate", tmp_path / "model.pt", *arguments).splitlines()
    assert lines[-3] == "Evaluate model"
    assert lines[-2].startswith("Loss: ") and lines[-1].startswith("Accuracy: ")
    return lines[:-3]


def of_rounds(*data):
    return json.dumps([{"round": 1, "data": each} for each in data]).encode()


@pytest.mark.parametrize(
    "history, trained_on",
    [
        (of_rounds("generated images"), "generated images"),
        (
            of_rounds("CIFAR-10", "generated images in 2 parts, alpha none"),
            "generated images in 2 parts, alpha none",
        ),
    ],
)
def test_model_of_other_images_is_evaluated_with_a_warning(
    call, small_root, tmp_path, history, trained_on
):
    lines = evaluate(call, tmp_path, history, "--data-root", small_root)
    warning = f"Warning: this model was trained on {trained_on!r}, not on CIFAR-10"
    assert [line for line in lines if "Warning" in line] == [warning]


def test_warning_names_generated_images_too(call, tmp_path):
    lines = evaluate(call, tmp_path, of_rounds("CIFAR-10"), "--synthetic")
    warning = "Warning: this model was trained on 'CIFAR-10', not on generated images"
    assert [line for line in lines if "Warning" in line] == [warning]


NO_WARNING = {
    "no history": None,
    "the same": of_rounds("generated images", "CIFAR-10"),
    "the same in parts": of_rounds("CIFAR-10 in 2 parts, alpha 0.5"),
    "both": of_rounds("CIFAR-10 / generated images"),
    "nothing": b"",
    "half": of_rounds("generated images")[:-5],
    "no rounds": b"[]",
    "no list": b'{"data": "generated images"}',
    "a number": b"7",
    "no data": b'[{"round": 1}]',
    "unknown data": b'[{"data": null}]',
    "no text": b"\xff\xfe\xfd",
}


@pytest.mark.parametrize("history", NO_WARNING)
def test_no_warning_without_a_reason(call, small_root, tmp_path, history):
    lines = evaluate(call, tmp_path, NO_WARNING[history], "--data-root", small_root)
    assert not [line for line in lines if "Warning" in line]


def test_one_thread_unless_the_user_sets_another_number(start):
    for env, threads in (({}, 1), ({"OMP_NUM_THREADS": "2"}, min(2, os.cpu_count() or 1))):
        script = start("cifar.py", "--help", COLUMNS="200", **env)
        assert script.end() == 0
        assert re.search(rf"--threads .*\(default: {threads}\)\n", script.output), script.output


def test_help_shows_every_default(call):
    expected = {
        "cifar": {"epochs": 2, "batch-size": 32, "lr": 0.001, "data-root": "~/data/cifar-10"}
        | {"synthetic": None, "seed": None, "threads": 1, "model": None, "evaluate": None},
        "server": {"server-address": "127.0.0.1:8080", "rounds": 3, "min-clients": 2}
        | {"local-epochs": 1, "lr": 0.001, "round-timeout": None, "model": "global_model.pt"}
        | {"resume": None, "seed": None, "ssl-certfile": None, "ssl-keyfile": None}
        | {"ssl-ca-certfile": None},
        "client": {"server-address": "127.0.0.1:8080", "wait": 60, "batch-size": 32}
        | {"data-root": "~/data/cifar-10", "synthetic": None, "partition-id": 0}
        | {"num-partitions": 1, "alpha": None, "seed": None, "threads": 1}
        | {"root-certificates": None},
    }
    for name, defaults in expected.items():
        flags = {}
        for entry in call(name, "--help").split("\n  --")[1:]:
            flag, _, text = entry.partition(" ")
            shown = re.search(r"\(default: (.*)\)", " ".join(text.split()))
            flags[flag] = shown and shown[1]
        assert flags == {k: None if v is None else str(v) for k, v in defaults.items()}


# How a script ends.


@pytest.fixture
def run_main(tmp_path):
    """Run lines of Python as the scripts run their main(); return the exit code and what it printed."""

    def run(lines, *, stdout=subprocess.PIPE, shell='exec "$@"', **env):
        body = textwrap.indent(textwrap.dedent(lines), "    ")
        (tmp_path / "program.py").write_text(
            f"import sys, threading\nsys.path.insert(0, {str(ROOT)!r})\nimport cifar\n"
            f"def main():\n{body}\ncifar.run_main(main)\n",
            encoding="utf-8",
        )
        process = subprocess.run(
            ["bash", "-c", shell, "bash", sys.executable, tmp_path / "program.py"],
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
            check=False,
            env={k: v for k, v in os.environ.items() if k not in UNSET} | env,
        )
        return process.returncode, process.stdout, process.stderr

    return run


AT_EXIT = "import atexit\natexit.register(print, 'cleaned up')\nprint('begun')\n"
CLEAN = "begun\ncleaned up\n"


def test_script_ends_like_any_other(run_main):
    assert run_main(AT_EXIT) == (0, CLEAN, "")


def test_error_for_the_user_is_one_line(run_main):
    ended = run_main(AT_EXIT + "raise cifar.UserError('Put it there.')")
    assert ended == (1, CLEAN, "Put it there.\n")


@pytest.mark.parametrize("error", ["ValueError('a defect')", "FileNotFoundError('a defect')"])
def test_defect_is_a_traceback(run_main, error):
    code, out, err = run_main(AT_EXIT + f"raise {error}")
    assert (code, out) == (1, CLEAN)
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith(f"\n{error.partition('(')[0]}: a defect\n")


def test_exit_code_is_argparses_or_flowers(run_main):
    assert run_main(AT_EXIT + "sys.exit(3)") == (3, CLEAN, "")
    assert run_main(AT_EXIT + "sys.exit('Port in use.')") == (1, CLEAN, "Port in use.\n")


def test_nobody_reads_what_is_printed(run_main):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        ended = run_main("while True:\n    print('line')", stdout=pipe)
    assert ended == (1, None, "Cannot print: Broken pipe.\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_disk_where_the_output_goes_is_full(run_main):
    with open("/dev/full", "wb") as full:
        ended = run_main("print('line')", stdout=full)
    assert ended == (1, None, "Cannot print: No space left on device.\n")


def test_output_may_be_closed(run_main):
    assert run_main("print('line')", shell='exec "$@" >&-') == (0, "", "")


def test_terminal_without_the_letters_gets_them_escaped(run_main):
    lines = r"print('\u6570\u636e')"
    assert run_main(lines, PYTHONIOENCODING="ascii") == (0, "\\u6570\\u636e\n", "")


def test_lines_arrive_at_once_and_interrupt_ends_it(start, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys, threading\nsys.path.insert(0, {str(ROOT)!r})\nimport cifar\n"
        "import atexit\natexit.register(print, 'cleaned up')\n"
        "cifar.run_main(lambda: (print('begun'), threading.Event().wait()))\n",
        encoding="utf-8",
    )
    script = start(program)
    script.until("begun\n")
    script.process.send_signal(signal.SIGINT)
    assert script.end() == 130
    assert script.output == CLEAN
