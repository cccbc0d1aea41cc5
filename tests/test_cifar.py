"""Tests of cifar.py: the tutorial's numbers, images, partitions, saved models, its flags."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torchvision  # type: ignore[import-untyped]
from helpers import ROOT, PlainImages, PlainNet, linux, plain_train
from torch import nn
from torch.utils import data
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import mnasnet0_5  # type: ignore[import-untyped]

import cifar

CPU = torch.device("cpu")


@pytest.fixture
def few_images(monkeypatch):
    """Read 500 and 100 generated images in place of CIFAR-10."""
    sizes = {True: 500, False: 100}
    monkeypatch.setattr(cifar, "read_images", lambda _, train: cifar.synthesize(sizes[train], 3))


def test_training_matches_the_tutorial_to_rounding(few_images, capsys):
    """With our Net, and with the tutorial's as printed, in place of it."""
    trainloader, testloader, num_examples = cifar.load_data(batch_size=4)
    assert num_examples == {"trainset": 500, "testset": 100}
    assert torch.equal(next(iter(testloader))[0][7], PlainImages(testloader.dataset)[7][0])
    torch.manual_seed(0)
    theirs = PlainNet()
    assert sum(value.numel() for value in theirs.parameters()) == 62_006
    losses = plain_train(theirs, DataLoader(PlainImages(trainloader.dataset), 4, True))
    for net in (cifar.Net, PlainNet):
        capsys.readouterr()
        torch.manual_seed(0)
        ours = net()
        cifar.train(ours, trainloader, epochs=1, device=CPU)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=3e-5)
    assert capsys.readouterr().out.splitlines() == [
        "Training 1 epoch(s) w/ 125 batches each",
        f"[1,   100] loss: {np.mean(losses[:100]):.3f}",
        f"[1,   125] loss: {np.mean(losses[100:]):.3f}",
    ]


def test_data_set_works_as_pytorchs_documentation_shows(few_images):
    trainset = cifar.load_data()[0].dataset
    assert trainset[3][0].shape == (3, 32, 32)
    first, second = data.random_split(trainset, [100, 400])
    sampler = data.WeightedRandomSampler(torch.ones(500), 70)
    for dataset, size, options in (
        (first, 100, {"shuffle": True}),
        (data.ConcatDataset([second, first]), 500, {}),
        (trainset, 70, {"sampler": sampler, "num_workers": 1}),
    ):
        loader = DataLoader(dataset, 32, collate_fn=cifar.normalize, **options)
        images, labels = map(torch.cat, zip(*loader))
        assert images.shape == (size, 3, 32, 32) and labels.shape == (size,)
        assert -1 <= images.min() < images.max() <= 1


def test_test_returns_the_mean_loss_and_the_accuracy():
    """Three examples, worked out by hand: two right, one wrong; the last batch is smaller."""
    scores = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 3.0]])
    loader = DataLoader(TensorDataset(scores, torch.tensor([0, 0, 0])), batch_size=2)
    net = nn.Sequential(nn.Dropout(0.9)).train()  # off during evaluation
    loss, accuracy = cifar.test(net, loader, CPU)
    by_hand = [np.log(1 + np.exp(-2)), np.log(2), np.log(1 + np.exp(2))]
    assert loss == pytest.approx(np.mean(by_hand), rel=1e-6)
    assert accuracy == 2 / 3
    # The same as the four pixels of two images
    scores = torch.stack([scores[:2].T, scores[1:].T])
    loader = DataLoader(TensorDataset(scores, torch.zeros(2, 2, dtype=torch.int64)))
    loss, accuracy = cifar.test(net, loader, CPU)
    assert loss == pytest.approx((by_hand[0] + 2 * by_hand[1] + by_hand[2]) / 4, rel=1e-6)
    assert accuracy == 3 / 4


def test_generated_images_and_partitions_are_the_same_on_every_machine():
    trainset = cifar.synthesize(100, seed=1)
    images, labels = trainset.tensors
    assert images.shape == (100, 3, 32, 32) and images.dtype == torch.uint8
    assert images[7, :, 5, 6].tolist() == [133, 156, 131]
    assert labels.equal(torch.arange(100) % 10)
    partitions = cifar.partition(labels, 10)
    assert partitions[3].tolist() == [5, 29, 51, 52, 56, 67, 73, 81, 97, 98]
    skewed = cifar.partition(labels, 10, alpha=1)[3].tolist()
    assert skewed == [3, 9, 14, 21, 22, 24, 36, 37, 39, 40, 41, 58, 89, 92, 93, 94]


@pytest.mark.parametrize("alpha", [None, 0.01, 0.1, 100])
@pytest.mark.parametrize("num_partitions", [1, 3, 30])
def test_partitions_are_disjoint_and_complete_and_none_is_empty(num_partitions, alpha):
    labels = torch.from_numpy(np.random.RandomState(0).randint(10, size=203))
    partitions = cifar.partition(labels, num_partitions, alpha)
    assert sorted(np.concatenate(partitions)) == list(range(203))
    assert len(partitions) == num_partitions and all(map(len, partitions))
    if alpha is None:
        assert {len(each) - 203 // num_partitions for each in partitions} <= {0, 1}


def test_partitions_are_drawn_from_dirichlet_class_by_class():
    labels = torch.from_numpy(np.random.RandomState(0).permutation(np.arange(5_000) % 10))
    partitions = cifar.partition(labels, 4, 0.5)
    counts = [np.bincount(labels[each], minlength=10) for each in partitions]
    random = np.random.RandomState(2019)
    shares = np.array([random.dirichlet([0.5] * 4) for _ in range(10)])
    assert np.abs(np.transpose(counts) - 500 * shares).max() <= 1
    # Test labels, in any order, are split in the same shares.
    tests = torch.from_numpy(np.random.RandomState(1).permutation(np.arange(1_000) % 10))
    for indices, count in zip(cifar.partition(tests, 4, 0.5), counts):
        assert np.abs(np.bincount(tests[indices], minlength=10) - count / 5).max() <= 1.2


def test_load_data_says_what_a_partition_holds(few_images, capsys):
    """Only the partition stays in memory; test images are IID."""
    loaded = cifar.load_data(partition_id=1, num_partitions=3, alpha=0.1)
    (images, labels), (_, test_labels) = [loader.dataset.tensors for loader in loaded[:2]]
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"Partition 1 of 3: {len(images)} training / 33 test images"
    counts = [int(count) for count in second.partition(":")[2].split()]
    assert counts == labels.bincount(minlength=10).tolist() and 0 in counts
    assert test_labels.bincount(minlength=10).min() > 0
    assert images.untyped_storage().nbytes() == len(images) * 3072


def test_client_without_test_images_trains(monkeypatch):
    sizes = {True: 36, False: 8}
    monkeypatch.setattr(cifar, "read_images", lambda _, train: cifar.synthesize(sizes[train], 3))
    trainloader, testloader, num_examples = cifar.load_data(partition_id=9, num_partitions=10)
    assert num_examples == {"trainset": 3, "testset": 0}
    cifar.train(cifar.Net(), trainloader, epochs=1, device=CPU)
    assert cifar.test(cifar.Net(), testloader, CPU) == (0, 0)


@pytest.mark.parametrize("num_images, batches", [(833, 26), (834, 27), (1, 1)])
def test_batch_norm_never_sees_a_batch_of_one_image(monkeypatch, num_images, batches):
    images = cifar.synthesize(num_images, seed=1)
    monkeypatch.setattr(cifar, "read_images", lambda data_root, train: images)
    trainloader, _, _ = cifar.load_data()
    assert len(list(trainloader)) == batches
    if num_images > 1:
        net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3072), nn.Linear(3072, 10))
        cifar.train(net, trainloader, epochs=1, device=CPU)


def test_two_clients_on_an_empty_folder_download_once(monkeypatch, tmp_path):
    downloads = []

    class CIFAR10:
        def __init__(self, root, train, download=False):
            if not (root / "archive").exists():
                if not download:
                    raise RuntimeError("Dataset not found or corrupted.")
                downloads.append(root)
                threading.Event().wait(0.5)  # it takes a while
                (root / "archive").touch()
            images, labels = cifar.synthesize(50, 3).tensors
            self.data, self.targets = images.permute(0, 2, 3, 1).numpy(), labels.tolist()

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    with ThreadPoolExecutor(2) as pool:
        roots = [str(tmp_path / "new" / "data")] * 2
        assert [len(dataset) for dataset in pool.map(cifar.read_images, roots, [1, 0])] == [50, 50]
    assert len(downloads) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "complex64"])
def test_parameters_travel_in_a_type_that_numpy_has(dtype):
    """Also one without dimensions; an integer, BatchNorm's count of batches, does not travel."""
    net, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    for value, each in ((0.25, net), (0.5, other)):
        each.scale = nn.Parameter(torch.tensor(value).to(getattr(torch, dtype)))
    net.num_batches_tracked += 7
    parameters = cifar.get_parameters(net)
    sent = "float32" if dtype.endswith("float16") else dtype
    assert {str(array.dtype) for array in parameters} == {"float32", sent}
    nn.init.zeros_(net.weight)  # what was returned is a copy
    cifar.set_parameters(other, parameters)
    assert other.scale.equal(net.scale) and other.num_batches_tracked == 0
    assert other.weight.all()


class Stateful(nn.Linear):
    """A module with extra state, and a buffer that grows, as those of quantization do."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("grows", torch.zeros(0))

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


@pytest.mark.parametrize("make", [Stateful, mnasnet0_5])
def test_modules_with_a_state_of_their_own_travel(make):
    net, other = make(), make()
    cifar.set_parameters(other, cifar.get_parameters(net))
    for name, value in cifar.shared_state(net).items():
        assert value.equal(other.state_dict()[name])
        value.resize_(3)


def test_cifar_saves_a_model_and_evaluates_it(start):
    trained = start("cifar.py", "--synthetic", "--epochs", 1, "--model", "new/model.pt")
    assert trained.end() == 0 and "Start training" in trained.output, trained.output
    evaluated = start("cifar.py", "--synthetic", "--evaluate", "new/model.pt")
    assert evaluated.end() == 0 and "Start training" not in evaluated.output, evaluated.output
    results = [each.output.partition("Evaluate model")[2] for each in (trained, evaluated)]
    assert results[0] == results[1] and "Accuracy: " in results[0]


@linux
def test_losses_show_at_once_and_ctrl_c_ends_it(start):
    training = start("cifar.py", "--synthetic", "--epochs", 1_000_000, PYTHONUNBUFFERED="")
    training.until("[1,   100] loss: ")
    training.process.send_signal(signal.SIGINT)
    assert training.end() == 130 and "Traceback" not in training.output


def test_expected_errors_are_one_line(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save(cifar.Net(), tmp_path / "whole.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "web.pt").write_text("<!DOCTYPE html>")
    for name in ("other.pt", "whole.pt", "empty.pt", "web.pt", "none.pt"):
        with pytest.raises(
            SystemExit, match=rf"\ACannot load .*{name} as a state_dict of Net: .+\Z"
        ):
            cifar.load_model(tmp_path / name)
    with pytest.raises(SystemExit, match=r"^Cannot download CIFAR-10 \(.*--synthetic$"):
        cifar.read_images(str(ROOT / "README.md"), train=True)
