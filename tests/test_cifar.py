"""Tests of cifar.py: model, data, training, and the command lines of all three scripts."""

import dataclasses
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
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import PlainNet, assert_equal, plain_loaders, plain_train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cifar

CPU = torch.device("cpu")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and symbolic links")


@pytest.fixture
def copy_root(cifar_copy, use_cifar):
    return use_cifar(cifar_copy)


# The model.


def test_model_matches_the_tutorial():
    net, plain, images = cifar.Net(), PlainNet(), torch.randn(4, 3, 32, 32)
    shapes = [tuple(value.shape) for value in net.state_dict().values()]
    assert shapes == [
        *[(6, 3, 5, 5), (6,), (16, 6, 5, 5), (16,)],
        *[(120, 400), (120,), (84, 120), (84,), (10, 84), (10,)],
    ]
    assert sum(value.numel() for value in net.parameters()) == 62_006
    plain.load_state_dict(net.state_dict())
    assert net(images).shape == (4, 10)
    torch.testing.assert_close(net(images), plain(images))
    torch.testing.assert_close(net(images.to(memory_format=torch.channels_last)), plain(images))


def test_model_that_does_not_fit_the_images_is_an_error():
    images, net = cifar.synthesize(20, seed=1), cifar.Net().to(cifar.DEVICE)
    cifar.check_model(net, images)
    gray = dataclasses.replace(images, images=images.images[..., :1])
    shape = r"^Net does not fit images of shape \(1, 32, 32\) and 10 classes: "
    with pytest.raises(cifar.UserError, match=shape):
        cifar.check_model(net, gray)
    letters = dataclasses.replace(images, classes=list("abcdefghijk"))
    with pytest.raises(cifar.UserError, match=" and 11 classes: Target 10 is out of bounds."):
        cifar.check_model(net, letters)
    mixing = torch.nn.Sequential(torch.nn.Flatten(0), torch.nn.Unflatten(0, (-1, 10)))
    with pytest.raises(cifar.UserError, match=r"^Net does not fit images of shape \(1, 50, 2\)"):
        pixels = torch.zeros(20, 50, 2, 1, dtype=torch.uint8)
        cifar.check_model(mixing, dataclasses.replace(images, images=pixels))


# The data.


def test_load_data_returns_loaders_and_counts(small_root):
    trainloader, testloader, num_examples = cifar.load_data(data_root=small_root)
    assert isinstance(trainloader, DataLoader) and isinstance(testloader, DataLoader)
    assert num_examples == {"trainset": 500, "testset": 100}
    assert len(trainloader) == 16  # 500 / 32, rounded up
    images, labels = next(iter(trainloader))
    assert images.shape == (32, 3, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (32,) and labels.dtype == torch.int64


def test_batches_match_torchvision_in_the_same_order(small_root):
    ours = cifar.load_data(data_root=small_root)[:2]
    for our_loader, their_loader in zip(ours, plain_loaders(small_root)):
        torch.manual_seed(3)
        our_images, our_labels = map(torch.cat, zip(*our_loader))
        torch.manual_seed(3)
        their_images, their_labels = map(torch.cat, zip(*their_loader))
        assert torch.equal(our_images, their_images)
        assert torch.equal(our_labels, their_labels)


def test_load_data_prints_what_it_loaded(small_root, capsys):
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
    assert counts == [int((skewed == label).sum()) for label in range(10)], "absent classes, too"


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_another_dataset_needs_only_another_read_images(monkeypatch, tmp_path, alpha):
    """Grayscale images of 28x28 pixels, in 26 classes."""
    pixels = np.random.RandomState(0).randint(256, size=(624, 28, 28, 1), dtype=np.uint8)
    names = list("abcdefghijklmnopqrstuvwxyz")
    letters = cifar.Images("letters", torch.from_numpy(pixels), torch.arange(624) % 26, names)
    data = letters.subset(np.arange(520)), letters.subset(np.arange(520, 624))
    monkeypatch.setattr(cifar, "read_images", lambda root, train, download: data[not train])
    loaders = [
        cifar.load_data(data_root=tmp_path, partition_id=i, num_partitions=3, alpha=alpha)[:2]
        for i in range(3)
    ]
    images, labels = next(iter(loaders[1][0]))
    assert images.shape == (len(labels), 1, 28, 28) and 0 < len(labels) <= 32
    assert images.min() == -1 and images.max() == 1
    for which, whole in enumerate(data):
        known = {image.numpy().tobytes(): label for image, label in zip(whole.images, whole.labels)}
        for dataset in [pair[which].dataset for pair in loaders]:
            for image, label in zip(dataset.images, dataset.labels):
                assert known.pop(image.numpy().tobytes()) == label
        assert not known, "every image is in one of the partitions"
    net = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 26))
    cifar.check_model(net, data[1])
    cifar.train(net, loaders[1][0], epochs=1, device=CPU)
    assert cifar.test(net, loaders[1][1], CPU)[1] <= 1


def test_subset_keeps_name_and_classes():
    pixels = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    dots = cifar.Images("dots", pixels, torch.tensor([2, 0, 1, 1, 0]), ["x", "y", "z"])
    some = dots.subset(np.array([4, 1]))
    assert (some.name, len(some), some.labels.tolist()) == ("dots", 2, [0, 0])
    assert some.images.flatten().tolist() == [4, 1]
    assert some.classes == ["x", "y", "z"], "absent classes, too"


def test_generated_images_need_no_home_folder():
    assert cifar.load_data(synthetic=True, data_root="~no-such-user/data")[2]["testset"] == 2_000


def test_generated_images_have_ten_classes_and_are_deterministic():
    dataset = cifar.synthesize(300, seed=1)
    assert dataset.images.shape == (300, 32, 32, 3) and dataset.images.dtype == torch.uint8
    assert dataset.labels.bincount().tolist() == [30] * 10
    assert dataset.name == "generated images" and len(dataset.classes) == 10
    assert torch.equal(dataset.images, cifar.synthesize(300, seed=1).images)
    assert not torch.equal(dataset.images, cifar.synthesize(300, seed=2).images)
    assert dataset.images[7, 5, 6].tolist() == [133, 156, 131]


@pytest.mark.parametrize("shape", [(28, 28, 1), (33, 50, 4)])
def test_generated_images_have_the_configured_shape(monkeypatch, shape):
    monkeypatch.setattr(cifar, "IMAGE_SHAPE", shape)
    trainloader, testloader, _ = cifar.load_data(synthetic=True)
    assert trainloader.dataset.images.shape == (10_000, *shape)
    assert testloader.dataset.images.shape == (2_000, *shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 10))
    cifar.train(net, trainloader, epochs=1, device=CPU)
    assert cifar.test(net, testloader, CPU)[1] > 0.3, "the classes can be told apart"


# Training and evaluation.


def test_training_matches_the_tutorial_to_rounding(small_root, capsys):
    torch.manual_seed(0)
    theirs = PlainNet()
    plain_train(theirs, plain_loaders(small_root)[0], epochs=4)
    torch.manual_seed(0)
    ours = cifar.Net()
    cifar.train(ours, cifar.load_data(data_root=small_root)[0], epochs=4, device=CPU)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert "Training 4 epoch(s) w/ 16 batches each" in capsys.readouterr().out


@pytest.mark.parametrize("batches", [100, 104])
def test_train_prints_the_mean_loss_of_100_batches_and_of_the_rest(capsys, batches):
    images, labels = torch.randn(2 * batches, 3, 32, 32), torch.randint(10, (2 * batches,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    torch.manual_seed(0)
    losses = np.reshape(plain_train(PlainNet(), loader, epochs=2), (2, batches))
    torch.manual_seed(0)
    cifar.train(cifar.Net(), loader, epochs=2, device=CPU)
    lines = [f"Training 2 epoch(s) w/ {batches} batches each"]
    for epoch in (1, 2):
        lines += [f"[{epoch},   100] loss: {losses[epoch - 1, :100].mean():.3f}"]
        if batches > 100:
            lines += [f"[{epoch},   104] loss: {losses[epoch - 1, 100:].mean():.3f}"]
    assert capsys.readouterr().out.splitlines() == lines


def test_train_uses_the_learning_rate():
    trainloader, testloader, _ = cifar.load_data(synthetic=True)
    torch.manual_seed(0)
    net = cifar.Net()
    start = cifar.get_parameters(net)
    before, _ = cifar.test(net, testloader, CPU)
    few = cifar.load_data(synthetic=True, num_partitions=50)[0]
    cifar.train(net, few, epochs=1, device=CPU, lr=0)
    assert_equal(cifar.get_parameters(net), start)
    cifar.train(net, trainloader, epochs=1, device=CPU, lr=0.01)
    loss, accuracy = cifar.test(net, testloader, CPU)
    assert before > 2.2 and loss < 1 and accuracy > 0.8


def test_test_returns_mean_loss_and_accuracy():
    """Three examples, worked out by hand: two right, one wrong; the last batch is smaller."""
    scores = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
    loader = DataLoader(TensorDataset(scores, torch.tensor([0, 0, 0])), batch_size=2)
    net = nn.Sequential(nn.Dropout(0.9))  # off during evaluation
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


# Partitions.


@pytest.mark.parametrize("alpha", [None, 0.01, 0.1, 100])
@pytest.mark.parametrize("num_partitions", [1, 3, 10])
def test_partitions_are_disjoint_complete_and_deterministic(num_partitions, alpha):
    labels = np.random.RandomState(0).randint(10, size=2_003)
    partitions = cifar.partition(labels, num_partitions, alpha)
    assert np.array_equal(np.sort(np.concatenate(partitions)), np.arange(2_003))
    assert len(partitions) == num_partitions and all(map(len, partitions))
    if alpha is None:
        assert {len(each) - 2_003 // num_partitions for each in partitions} <= {0, 1}
    assert_equal(cifar.partition(labels, num_partitions, alpha), partitions)


def test_partitions_are_the_same_on_every_machine():
    iid = cifar.partition(np.arange(100) % 10, 10)
    assert iid[3].tolist() == [5, 29, 51, 52, 56, 67, 73, 81, 97, 98]
    skewed = cifar.partition(np.arange(100) % 10, 10, alpha=1)
    assert skewed[3].tolist() == [0, 4, 14, 30, 34, 38, 44, 61, 66, 74, 81]


def test_partitions_are_drawn_from_dirichlet_class_by_class():
    """Written out as in the paper: for each class, the shares of all partitions are drawn."""
    labels = np.random.RandomState(0).permutation(np.arange(5_000) % 10)
    counts = [np.bincount(labels[each], minlength=10) for each in cifar.partition(labels, 4, 0.5)]
    random = np.random.RandomState(2019)
    random.permutation(5_000)
    shares = np.array([random.dirichlet([0.5] * 4) for _ in range(10)])
    assert np.abs(np.transpose(counts) - 500 * shares).max() <= 1


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_no_partition_is_empty(alpha):
    """With few images, most partitions would be empty: each gets one from the largest."""
    partitions = cifar.partition(np.arange(30) % 10, 30, alpha)
    assert sorted(part.tolist() for part in partitions) == [[i] for i in range(30)]


def test_only_the_partition_is_in_memory_and_test_images_are_iid(small_root):
    trainloader, testloader, _ = cifar.load_data(data_root=small_root, num_partitions=3, alpha=0.1)
    for dataset in (trainloader.dataset, testloader.dataset):
        assert dataset.images.untyped_storage().nbytes() == len(dataset) * 3072
    assert testloader.dataset.labels.bincount(minlength=10).min() > 0


OUT_OF_RANGE = "--partition-id {} is out of range: use 0 to {} with --num-partitions {}."
WRONG_PARTITIONS = {
    (3, 3): OUT_OF_RANGE.format(3, 2, 3),
    (1, 1): OUT_OF_RANGE.format(1, 0, 1),
    (0, 101): "--num-partitions 101 is too many for 100 images.",
    (0, 501): "--num-partitions 501 is too many for 500 images.",
}


@pytest.mark.parametrize("partition_id, number", WRONG_PARTITIONS)
def test_partition_without_images_is_an_error(call, small_root, partition_id, number):
    flags = ["--partition-id", partition_id, "--num-partitions", number]
    output = call("client", "--data-root", small_root, *flags, code=1)
    assert output.splitlines()[-1] == WRONG_PARTITIONS[partition_id, number]


# Models and their parameters.


@pytest.mark.parametrize("content", [b"", b"junk", "list", "other", "partial", "shape", "nan"])
def test_invalid_model_is_an_error(call, tmp_path, content):
    path = tmp_path / "model.pt"
    state = cifar.Net().state_dict()
    objects = {
        "list": ([1, 2], "not a model file"),
        "other": (nn.Linear(2, 2).state_dict(), "conv1.weight"),
        "partial": (dict(list(state.items())[:-1]), "fc3.bias"),
        "shape": ({**state, "fc1.bias": torch.zeros(7)}, "fc1.bias"),
        "nan": ({**state, "fc2.bias": torch.full((84,), np.nan)}, "NaN or infinity in fc2.bias"),
    }
    value, reason = objects.get(content, (None, "not a model file"))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(value, path)
    (line,) = call("cifar", "--evaluate", path, code=1).splitlines()
    problem = "is not usable" if content == "nan" else "is not a state_dict of cifar.Net"
    assert line.startswith(f"{path} {problem}: ") and reason in line


def test_missing_model_is_an_error(call):
    line = "Cannot read the model none.pt: No such file or directory.\n"
    assert call("cifar", "--synthetic", "--evaluate", "none.pt", code=1) == line


def test_a_model_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("evil").touch, ())

    torch.save(Evil(), tmp_path / "model.pt")
    with pytest.raises(cifar.UserError, match="not a model file"):
        cifar.load_model(tmp_path / "model.pt")
    assert not (tmp_path / "evil").exists()


def with_bias(arrays, bias):
    return [*arrays[:3], bias, *arrays[4:]]


OTHER = "conv2.bias: expected float32(16,), got {} (different models?)"
WRONG_PARAMETERS = [
    (
        lambda old: [*with_bias(old, old[3][:5])[:8], old[8][:2], old[9]],
        OTHER.format("float32(5,)"),
    ),
    (lambda old: with_bias(old, old[3].astype(float)), OTHER.format("float64(16,)")),
    (lambda old: [*old[:3], *old[:2:-1]], OTHER.format("float32(10,)")),
    (lambda old: with_bias(old, old[3] - np.float32(np.inf)), "NaN or infinity in conv2.bias"),
    (lambda old: old[:3], "conv2.bias is missing: got 3 of 10 parameters"),
    (lambda old: [*old, np.zeros(2)], "expected 10 parameters, got 11"),
]


@pytest.mark.parametrize("spoil, message", WRONG_PARAMETERS)
def test_first_parameter_that_differs_is_named_and_none_is_set(spoil, message):
    net = cifar.Net()
    before = cifar.get_parameters(net)
    with pytest.raises(cifar.UserError) as error:
        cifar.set_parameters(net, spoil([array + 1 for array in before]))
    assert str(error.value) == message
    assert_equal(cifar.get_parameters(net), before)


def test_set_parameters_restores_what_get_parameters_returned():
    ours, theirs = cifar.Net(), cifar.Net()
    arrays = cifar.get_parameters(theirs)
    cifar.set_parameters(ours, arrays)
    for array in arrays:
        array += 1  # both functions make copies
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_only_the_shared_state_is_exchanged(monkeypatch):
    """As in README.md's FedBN, where each client keeps some layers to itself."""

    def without_the_last(net):
        return {k: v for k, v in net.state_dict().items() if not k.startswith("fc3")}

    monkeypatch.setattr(cifar, "shared_state", without_the_last)
    ours, theirs = cifar.Net(), cifar.Net()
    own = ours.fc3.weight.detach().clone()
    arrays = cifar.get_parameters(theirs)
    assert len(arrays) == 8
    cifar.set_parameters(ours, arrays)
    assert torch.equal(ours.fc3.weight, own) and torch.equal(ours.fc2.weight, theirs.fc2.weight)


# Downloading.


@pytest.fixture
def web(small_cifar, monkeypatch):
    """Serve the small archive; return its URL, the requests, and an event that, cleared, stalls."""
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
    httpd.handle_error = lambda *args: None  # clients that disconnect early
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/cifar-10-python.tar.gz", requests, go_on
    go_on.set()
    httpd.shutdown()


def downloading(root):
    doing = "downloading (or waiting for another process that is downloading it)"
    return f"CIFAR-10 is not in {root}: {doing}"


def test_offline_says_what_to_do(call, small_root, tmp_path):
    root = tmp_path / "none"
    *lines, last = call("cifar", "--data-root", root, code=1).splitlines()
    assert lines == ["Centralized PyTorch training", "Load data", downloading(root)]
    problem = f"Cannot download CIFAR-10 from {cifar.DATA_URL} to {root} (<urlopen error "
    assert last.startswith(problem)
    assert last.endswith("). Put the archive there yourself, or use --synthetic.")


def test_download_url_is_torchvisions():
    assert cifar.DATA_URL == torchvision.datasets.CIFAR10.url


def test_data_root_that_is_a_file_or_below_one_is_an_error(call, small_root):
    archive = small_root / "cifar-10-python.tar.gz"
    last = call("cifar", "--data-root", archive, code=1).splitlines()[-1]
    assert last == f"--data-root {archive} is a file, not a directory."
    last = call("cifar", "--data-root", archive / "below", code=1).splitlines()[-1]
    assert last.startswith(f"Cannot download CIFAR-10 from {cifar.DATA_URL} to {archive / 'below'}")


@pytest.fixture
def reading(monkeypatch):
    """Make read_images() raise the first error, or the second when it is to download."""

    def raising(found, downloaded=None):
        def read_images(root, train, download):
            raise downloaded if download else found

        monkeypatch.setattr(cifar, "read_images", read_images)

    return raising


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionResetError, http.client.HTTPException])
def test_failed_download_is_one_line(call, reading, tmp_path, kind):
    missing = RuntimeError("not found. You can use download=True to download it")
    reading(missing, kind("ju\nnk"))
    output = call("cifar", "--data-root", tmp_path, code=1)
    where = f"from {cifar.DATA_URL} to {tmp_path} (ju nk)"
    todo = "Put the archive there yourself, or use --synthetic."
    assert output.splitlines()[-1] == f"Cannot download CIFAR-10 {where}. {todo}"


def test_unreadable_images_are_one_line(call, reading):
    reading(PermissionError(13, "Permission denied", "a file"))
    reason = "[Errno 13] Permission denied: 'a file'"
    last = call("cifar", code=1).splitlines()[-1]
    assert last == f"Cannot read CIFAR-10: {reason}. Check --data-root."


def test_bug_in_read_images_is_not_taken_for_missing_images(call, reading):
    reading(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="^a bug$"):
        call("cifar")


def test_stalled_download_ends(call, small_root, monkeypatch, tmp_path, web):
    """The timeout is shortened here; without one, this test would hang."""
    url, requests, go_on = web
    go_on.clear()
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "setdefaulttimeout", lambda s: set_timeout(s and s / 100))
        assert "timed out" in call("cifar", "--data-root", tmp_path, code=1).splitlines()[-1]
    requests.get(timeout=60)
    assert socket.getdefaulttimeout() is None, "the default is restored"


def test_archive_alone_is_enough(start, cifar_copy):
    shutil.rmtree(cifar_copy.root / "cifar-10-batches-py")
    script = start("cifar.py", "--epochs", 3, "--batch-size", 10, "--seed", 1, cifar=cifar_copy)
    assert script.end() == 0, script.output
    lines = script.output.splitlines()
    assert lines[0] == "Centralized PyTorch training"
    assert "Training 3 epoch(s) w/ 50 batches each" in lines
    assert lines[-2].startswith("Loss: ") and lines[-1].startswith("Accuracy: ")


def test_damaged_file_is_unpacked_again(call, copy_root):
    (copy_root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"half")
    call("cifar", "--epochs", 1, "--data-root", copy_root)


REQUESTS = 2  # per download: torchvision checks for redirects first


def test_damaged_archive_is_downloaded_again(call, copy_root, web, monkeypatch):
    url, requests, _ = web
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    shutil.rmtree(copy_root / "cifar-10-batches-py")
    archive = copy_root / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    output = call("cifar", "--epochs", 1, "--data-root", copy_root)
    assert requests.qsize() == REQUESTS
    assert "%" not in output, "a progress bar is for terminals"


def test_archive_is_downloaded_once_even_if_the_first_is_killed(start, cifar_copy, web):
    shutil.rmtree(cifar_copy.root)
    cifar_copy.attributes["url"], requests, go_on = web
    go_on.clear()
    first = start("cifar.py", "--epochs", 1, cifar=cifar_copy)
    requests.get(timeout=60)
    others = [start("cifar.py", "--epochs", 1, cifar=cifar_copy) for _ in range(2)]
    for script in (first, *others):
        script.until(downloading(cifar_copy.root))
    first.kill()
    go_on.set()
    assert [script.end() for script in others] == [0, 0], others[0].output + others[1].output
    assert requests.qsize() == REQUESTS, "only one of the others downloads"


# Saving and evaluating a model.


def test_model_is_saved_only_where_requested(call, small_root, tmp_path):
    arguments = ["cifar", "--epochs", 1, "--data-root", small_root, "--seed", 1]
    without = call(*arguments)
    (tmp_path / "model.json").write_text('{"name": "my own"}', encoding="utf-8")
    path = tmp_path / "model.pt"
    assert call(*arguments, "--model", path) == without
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.pt"]
    cifar.Net().load_state_dict(torch.load(path, weights_only=True))
    evaluated = call("cifar", "--data-root", small_root, "--evaluate", path)
    assert evaluated.splitlines()[-2:] == without.splitlines()[-2:]
    assert sorted(os.listdir(tmp_path)) == ["model.json", "model.pt"]


@needs_posix
def test_symbolic_link_to_a_model_is_followed(call, small_root, tmp_path):
    (tmp_path / "link.pt").symlink_to(tmp_path / "kept.pt")
    call("cifar", "--epochs", 1, "--data-root", small_root, "--model", tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and (tmp_path / "kept.pt").is_file()
    (tmp_path / "link-to.json.pt").symlink_to(tmp_path / "model.json")
    assert "argument --model: " in call("cifar", "--model", tmp_path / "link-to.json.pt", code=2)


def history_of(*data):
    return json.dumps([{"round": 1, "data": each} for each in data]).encode()


def test_model_of_a_federation_is_not_overwritten(call, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    path.with_suffix(".json").write_bytes(history_of("generated images"))
    line = f"{path} is the model of a federated run: pass a different --model.\n"
    assert call("cifar", "--synthetic", "--model", path, code=1) == line
    assert path.read_bytes() == b"weights"


GENERATED = "generated images in 2 partitions (IID)"
HISTORIES = {
    "no history": (None, []),
    "the same data": (history_of(GENERATED, "CIFAR-10 in 2 partitions (IID)"), []),
    "other data": (history_of("CIFAR-10", GENERATED), [f"{GENERATED}, not on CIFAR-10"]),
    "no data": (b'[{"round": 1}]', []),
    "no round": (b"[]", []),
    "half": (history_of("generated images")[:-5], []),
    "no list": (b'{"data": "generated images"}', []),
    "unknown data": (b'[{"round": 1, "data": null}]', ["None, not on CIFAR-10"]),
    "no number": (b'[{"data": null}]', []),
    "no text": (b"\xff\xfe\xfd", []),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_evaluation_on_other_data_is_a_warning(call, small_root, tmp_path, name):
    history, warnings = HISTORIES[name]
    path = tmp_path / "model.pt"
    torch.save(cifar.Net().state_dict(), path)
    if history is not None:
        path.with_suffix(".json").write_bytes(history)
    lines = call("cifar", "--evaluate", path, "--data-root", small_root).splitlines()
    assert lines[0] == f"Model {path}"
    start = "Warning: this model was trained on "
    assert [line for line in lines if "Warning" in line] == [start + text for text in warnings]
    assert lines[-3] == "Evaluate model"
    assert lines[-2].startswith("Loss: ") and lines[-1].startswith("Accuracy: ")


# The flags of the three scripts.

FLAGS = {
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


@pytest.mark.parametrize("script", FLAGS)
def test_help_shows_every_flag_with_its_default(call, script):
    flags = {}
    for entry in call(script, "--help").split("\n  --")[1:]:
        flag, _, text = entry.partition(" ")
        shown = re.search(r"\(default: (.*)\)", " ".join(text.split()))
        flags[flag] = shown and shown[1]
    assert flags == {k: None if v is None else str(v) for k, v in FLAGS[script].items()}


def test_help_names_the_files_as_its_text_does(call):
    text = " ".join(call("cifar", "--help").split())
    assert "--model FILE save the trained weights to FILE" in text
    assert "--evaluate MODEL evaluate MODEL instead of training" in text


MODEL = "argument --model: {} must end in .pt and be in an existing, writable directory"
WRONG_FLAGS = {
    ("cifar", "--epochs", "0"): "argument --epochs: 0 is not between 1 and",
    ("cifar", "--epochs", "x"): "argument --epochs: invalid int value: 'x'",
    ("cifar", "--epochs", "2.5"): "argument --epochs: invalid int value: '2.5'",
    ("cifar", "--lr", "x"): "argument --lr: invalid float value: 'x'",
    ("cifar", "--lr", "0"): "argument --lr: 0 is not between",
    ("cifar", "--lr", "nan"): "argument --lr: nan is not between",
    ("cifar", "--model", "model"): MODEL.format("model"),
    ("cifar", "--model", "model.json"): MODEL.format("model.json"),
    ("cifar", "--model", "folder.pt"): MODEL.format("folder.pt"),
    ("server", "--server-address", "8080"): "argument --server-address: '8080' is not HOST",
    ("server", "--rounds", "0"): "argument --rounds: 0 is not between",
    ("server", "--round-timeout", "-1"): "argument --round-timeout: -1 is not between",
    ("server", "--lr", "0"): "argument --lr: 0 is not between",
    ("server", "--model", "no/where.pt"): MODEL.format("no/where.pt"),
    ("client", "--alpha", "0"): "argument --alpha: 0 is not between",
    ("client", "--root-certificates", "no"): "--root-certificates: no: No such file or directory",
    ("client", "--lr", "1"): "unrecognized arguments: --lr 1",
}


@pytest.mark.parametrize("command", WRONG_FLAGS)
def test_wrong_flag_is_an_error_of_argparse(call, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    Path("folder.pt").mkdir()
    assert WRONG_FLAGS[command] in call(*command, code=2)


@pytest.mark.parametrize(
    "text", ["", "host", ":80", "h:0", "h:65536", "http://h:80", "x:y", "h:-1", "h:80/x"]
)
def test_invalid_address_is_an_error(call, text):
    message = f"argument --server-address: {text!r} is not HOST:PORT"
    assert message in call("client", f"--server-address={text}", code=2)


def test_addresses_are_accepted():
    for text in ("localhost:1", "[::1]:65535", "a-b.example:8080", "192.0.2.1:80"):
        assert cifar.address(text) == text


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root can write anywhere"
)
def test_model_in_a_read_only_directory_is_an_error(call, tmp_path):
    tmp_path.chmod(0o500)
    output = call("cifar", "--synthetic", "--model", tmp_path / "model.pt", code=2)
    assert "argument --model: " in output


# Output and exit codes.

AT_EXIT = "import atexit\natexit.register(print, 'cleaned up')\n"


def test_user_error_is_one_line_in_any_encoding(start, program):
    path = program(
        f"{AT_EXIT}def main():\n"
        r"    print('\u6570')" + "\n    raise cifar.UserError('Put it there.')\n"
        "cifar.run_main(main)\n"
    )
    script = start(path, PYTHONIOENCODING="ascii")
    assert script.end() == 1
    assert script.output == "\\u6570\nPut it there.\ncleaned up\n"


def test_bug_is_a_traceback(start, program):
    script = start(program(f"{AT_EXIT}cifar.run_main(lambda: open('a bug'))\n"))
    assert script.end() == 1
    assert script.output.startswith("Traceback (most recent call last):\n")
    assert "\nFileNotFoundError: " in script.output and script.output.endswith("cleaned up\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_for_the_output_is_one_line(program):
    command = [sys.executable, program("cifar.run_main(lambda: print('line'))\n")]
    with open("/dev/full", "wb") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 1
    assert ended.stderr == b"Cannot print: No space left on device.\n"


def test_output_may_be_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    cifar.run_main(lambda: print("line"))


@needs_posix
def test_output_is_line_buffered_and_ctrl_c_exits(start, program):
    forever = "cifar.run_main(lambda: (print('begun'), threading.Event().wait()))\n"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does before `script &`
    script = start(program(f"{AT_EXIT}import threading\n{forever}"))
    signal.signal(signal.SIGINT, before)
    script.until("begun\n")
    script.process.send_signal(signal.SIGINT)
    assert script.end() == 130
    assert script.output == "begun\ncleaned up\n"
