"""cifar.py: the network, the data, the loops, and what its user sees when something is wrong."""

import argparse
import functools
import http.server
import re
import shutil
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cifar

CPU = torch.device("cpu")


@pytest.fixture
def small_root(small_cifar, monkeypatch):
    """Make this process take the small CIFAR-10 for the real one; return its folder."""
    for name, value in small_cifar.attributes.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
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
    image, label = ours[1].dataset[5]
    assert torch.equal(image, our_images[5]) and label == our_labels[5]


def test_training_is_the_tutorials_to_rounding(small_root, capsys):
    torch.manual_seed(0)
    theirs = cifar.Net()
    losses = article_train(theirs, article_loaders(small_root)[0], epochs=7)
    torch.manual_seed(0)
    ours = cifar.Net()
    cifar.train(ours, cifar.load_data(data_root=small_root)[0], epochs=7, device=CPU)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert "Training 7 epoch(s) w/ 16 batches each" in capsys.readouterr().out
    assert len(losses) == 7 * 16


def test_train_prints_the_mean_loss_of_100_batches(capsys):
    images, labels = torch.randn(208, 3, 32, 32), torch.randint(10, (208,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    torch.manual_seed(0)
    net = cifar.Net()
    losses = article_train(net, loader, epochs=1)
    torch.manual_seed(0)
    cifar.train(cifar.Net(), loader, epochs=1, device=CPU)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training 1 epoch(s) w/ 104 batches each"
    assert lines[1:] == [f"[1,   100] loss: {np.mean(losses[:100]):.3f}"]


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
    images, labels = cifar.synthesize(300, seed=1)
    assert images.shape == (300, 32, 32, 3) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [30] * 10
    again, _ = cifar.synthesize(300, seed=1)
    other, _ = cifar.synthesize(300, seed=2)
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    # Known numbers, so that machines that differ in this would be found out.
    assert images[7, 5, 6].tolist() == KNOWN_PIXEL


KNOWN_PIXEL = [133, 156, 131]


@pytest.mark.parametrize("alpha", [None, 0.001, 0.1, 100])
@pytest.mark.parametrize("num_partitions", [1, 3, 10])
def test_parts_are_disjoint_complete_even_and_always_the_same(num_partitions, alpha):
    labels = np.random.RandomState(0).randint(10, size=2_003)
    parts = cifar.partition(labels, num_partitions, alpha)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(2_003))
    assert {len(part) - 2_003 // num_partitions for part in parts} <= {0, 1}
    again = cifar.partition(labels, num_partitions, alpha)
    assert all(np.array_equal(part, same) for part, same in zip(parts, again))


def test_parts_are_the_same_on_every_machine():
    parts = cifar.partition(np.arange(100) % 10, 10)
    skewed = cifar.partition(np.arange(100) % 10, 10, alpha=1)
    assert (parts[3].tolist(), skewed[3].tolist()) == KNOWN_PARTS


KNOWN_PARTS = ([5, 29, 51, 52, 56, 67, 73, 81, 97, 98], [0, 1, 10, 20, 30, 40, 41, 60, 70, 90])


def test_smaller_alpha_is_more_skewed():
    labels = np.random.RandomState(0).permutation(np.arange(20_000) % 10)

    def largest_share(alpha):
        parts = cifar.partition(labels, 10, alpha)
        return np.mean([np.bincount(labels[part]).max() / len(part) for part in parts])

    shares = [largest_share(alpha) for alpha in (None, 1000, 10, 1, 0.01)]
    assert shares[0] < 0.12 and shares[1] < 0.16, "alike: each class is about a tenth"
    assert shares[1] < shares[2] < shares[3] < shares[4]
    assert shares[4] > 0.95, "one class only"


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
        assert all(dataset.images.untyped_storage().nbytes() < 170 * 3072 for dataset in datasets)
    tests = [loader.dataset.labels for _, loader in loaders]
    assert all(len(torch.unique(labels)) == 10 for labels in tests), "not skewed"


def test_a_part_keeps_image_and_label_together(small_root):
    whole = cifar.load_data(data_root=small_root)[0].dataset
    known = {image.numpy().tobytes(): label for image, label in zip(whole.images, whole.labels)}
    part = cifar.load_data(data_root=small_root, partition_id=1, num_partitions=2, alpha=1)[0]
    for image, label in zip(part.dataset.images, part.dataset.labels):
        assert known[image.numpy().tobytes()] == label


@pytest.mark.parametrize("part, parts", [(100, 101), (0, 101), (3, 3), (-1, 3), (0, 2_000_000_000)])
def test_a_part_without_images_is_an_error(small_root, part, parts):
    with pytest.raises(cifar.UserError, match=f"No images for part {part} of {parts}: "):
        cifar.load_data(data_root=small_root, partition_id=part, num_partitions=parts)


@pytest.mark.parametrize("text", ["0", "-1", "x", "nan", "2.5"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        cifar.number(int, 1)(text)
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        cifar.number(float, 3)(text)


@pytest.mark.parametrize(
    "text", ["", "8080", "host", ":80", "h:0", "h:65536", "http://h:80", "h:x"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="HOST:PORT"):
        cifar.address(text)


def test_addresses_are_accepted():
    assert [cifar.address(text) for text in ("localhost:1", "[::1]:65535")]
    for host in ("no-such-host.invalid", "a..b"):
        with pytest.raises(cifar.UserError, match=host):
            cifar.resolve(f"{host}:80")


@pytest.mark.parametrize("content", [b"", b"junk", "list", "other", "partial"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    state_dict = cifar.Net().state_dict()
    objects = {
        "list": [1, 2],
        "other": nn.Linear(2, 2).state_dict(),
        "partial": dict(list(state_dict.items())[:-1]),
    }
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(objects[content], path)
    with pytest.raises(cifar.UserError, match="model.pt"):
        cifar.load_model(path)
    torch.save(state_dict, path)
    assert cifar.load_model(path).keys() == state_dict.keys()
    with pytest.raises(cifar.UserError, match="No such file"):
        cifar.load_model(tmp_path / "none.pt")


def test_a_model_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("evil").touch, ())

    torch.save(Evil(), tmp_path / "model.pt")
    with pytest.raises(cifar.UserError, match="no saved model"):
        cifar.load_model(tmp_path / "model.pt")
    assert not (tmp_path / "evil").exists()


# The script itself, and fetching the images: as processes.


REQUESTS = 2  # of one download: torchvision looks for redirections first


@pytest.fixture
def web(small_cifar):
    """Serve the small archive; return its address, the requests so far, and a switch that stalls it."""
    requests, go_on = [], threading.Event()
    go_on.set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            go_on.wait(60)
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=small_cifar.root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *args: None  # a client that is killed, or has seen enough
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz", requests, go_on
    go_on.set()
    server.shutdown()


def test_script_trains_and_prints_loss_and_accuracy(start, small_cifar):
    script = start("cifar.py", "--epochs", 3, "--batch-size", 10, "--seed", 1, cifar=small_cifar)
    assert script.end() == 0
    lines = script.output.splitlines()
    assert lines[0] == "Centralized PyTorch training"
    assert "Training 3 epoch(s) w/ 50 batches each" in lines
    assert lines[-2].startswith("Loss: ") and lines[-1].startswith("Accuracy: ")


def test_offline_says_what_to_do(start, cifar_copy):
    shutil.rmtree(cifar_copy.root)
    script = start("cifar.py", cifar=cifar_copy)
    assert script.end() == 1
    line = script.output.splitlines()[-1]
    for part in ("CIFAR-10 is missing", str(cifar_copy.root), "Connection refused", "--synthetic"):
        assert part in line
    assert "Put cifar-10-python.tar.gz into" in line
    assert "Traceback" not in script.output


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
    assert len(requests) == REQUESTS
    assert "%" not in script.output, "a progress bar is for terminals"


def test_archive_is_fetched_once_even_if_the_first_is_killed(start, cifar_copy, web):
    shutil.rmtree(cifar_copy.root)
    cifar_copy.attributes["url"], requests, go_on = web
    go_on.clear()
    first = start("cifar.py", "--epochs", 1, cifar=cifar_copy)
    first.until("Fetching CIFAR-10")
    others = [start("cifar.py", "--epochs", 1, cifar=cifar_copy) for _ in range(2)]
    for script in others:
        script.until("Another process is fetching CIFAR-10")
    first.kill()
    go_on.set()
    assert [script.end() for script in others] == [0, 0], others[0].output + others[1].output
    assert len(requests) == 1 + REQUESTS, "the killed one's first, and those of one other"


def test_data_folder_that_cannot_be_made(start, cifar_copy):
    cifar_copy.root = cifar_copy.root / "cifar-10-python.tar.gz" / "below-a-file"
    script = start("cifar.py", cifar=cifar_copy)
    assert script.end() == 1
    assert script.output.startswith("Centralized PyTorch training\nLoad data\nCannot write to")
    assert "Traceback" not in script.output


def test_wrong_flags_are_argparses_errors(call):
    output = call("cifar", "--epochs", "0", code=2)
    assert "argument --epochs: 0 is not between 1 and" in output


def test_evaluate_needs_a_model(start):
    script = start("cifar.py", "--synthetic", "--evaluate", "none.pt")
    assert script.end() == 1
    assert script.output == "Cannot read the model none.pt: No such file or directory.\n"


def test_help_shows_every_default(call):
    expected = {
        "cifar.py": {"epochs": 2, "batch-size": 32, "lr": 0.001, "data-root": "~/data/cifar-10"}
        | {"synthetic": False, "seed": None, "threads": 1, "evaluate": None},
        "server.py": {"server-address": "127.0.0.1:8080", "rounds": 3, "min-clients": 2}
        | {"local-epochs": 1, "lr": 0.001, "round-timeout": None, "model": "global_model.pt"}
        | {"resume": False, "seed": None, "ssl-certfile": None, "ssl-keyfile": None}
        | {"ssl-ca-certfile": None},
        "client.py": {"server-address": "127.0.0.1:8080", "wait": 60, "batch-size": 32}
        | {"data-root": "~/data/cifar-10", "synthetic": False, "partition-id": 0}
        | {"num-partitions": 1, "alpha": None, "seed": None, "threads": 1}
        | {"root-certificates": None},
    }
    for name, defaults in expected.items():
        flags = {}
        for entry in call(name.removesuffix(".py"), "--help").split("\n  --")[1:]:
            flag, _, text = entry.partition(" ")
            flags[flag] = re.search(r"\(default: (.*)\)", " ".join(text.split()))[1]
        assert flags == {flag: str(default) for flag, default in defaults.items()}
