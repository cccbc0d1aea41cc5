"""Tests of client.py, without a network: what it receives and what it returns."""

import inspect

import grpc
import numpy as np
import pytest
import torch
from flwr.common import (
    Context,
    EvaluateIns,
    FitIns,
    GetPropertiesIns,
    RecordDict,
    ndarrays_to_parameters,
)
from helpers import assert_equal
from torch.utils.data import BatchSampler, DataLoader

import cifar
import client

PROPERTIES = {"client": "me", "data": "generated images", "partition": "all images"}


@pytest.fixture
def made():
    """Return a client with 320 training and 100 test images."""
    trainloader, testloader = (
        DataLoader(images, sampler=BatchSampler(range(len(images)), 32, False), batch_size=None)
        for images in (cifar.synthesize(320, seed=1), cifar.synthesize(100, seed=2))
    )
    num_examples = {"trainset": 320, "testset": 100}
    net = cifar.Net().to(cifar.DEVICE)
    return client.CifarClient(net, trainloader, testloader, num_examples, PROPERTIES)


def test_error_names_the_first_wrong_parameter(made, capsys):
    given = made.get_parameters({})
    wrong = [*given[:-3], given[-3][:3] + 1, *given[-2:]]
    for use, *config in ((made.set_parameters,), (made.fit, {}), (made.evaluate, {})):
        with pytest.raises(cifar.UserError) as error:
            use(wrong, *config)
        line = "fc2.bias: expected float32(84,), got float32(3,) (different models?)"
        assert str(error.value) == line
    assert_equal(made.get_parameters({}), given)
    assert capsys.readouterr().out == ""


def test_fit_starts_from_the_given_parameters_and_returns_trained_ones(made):
    given = made.get_parameters({})
    before = [value.copy() for value in given]
    made.set_parameters([value * 0 for value in given])
    trained, num_examples, metrics = made.fit(given, {})
    assert num_examples == 320 and metrics == PROPERTIES
    assert_equal(given, before)
    net = cifar.Net().to(cifar.DEVICE)
    cifar.set_parameters(net, given)
    cifar.train(net, made.trainloader, epochs=1, device=cifar.DEVICE)
    for ours, theirs, untrained in zip(trained, cifar.get_parameters(net), given, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        assert not np.array_equal(ours, untrained)


def test_fit_returns_copies(made):
    first, _, _ = made.fit(made.get_parameters({}), {})
    before = [value.copy() for value in first]
    made.fit(first, {})
    assert_equal(first, before)


def test_config_reaches_the_training(made, capsys):
    given = made.get_parameters({})
    made.fit(given, {})
    assert "Training 1 epoch(s)" in capsys.readouterr().out
    trained, _, _ = made.fit(given, {"lr": 0.25, "local_epochs": 3})
    assert "Training 3 epoch(s)" in capsys.readouterr().out
    net = cifar.Net().to(cifar.DEVICE)
    cifar.set_parameters(net, given)
    cifar.train(net, made.trainloader, epochs=3, device=cifar.DEVICE, lr=0.25)
    for ours, theirs in zip(trained, cifar.get_parameters(net), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_evaluate_uses_the_given_parameters(made, capsys):
    given = made.get_parameters({})
    expected = cifar.test(made.model, made.testloader, cifar.DEVICE)
    made.set_parameters([value * 0 for value in given])
    loss, num_examples, metrics = made.evaluate(given, {})
    assert (loss, metrics["accuracy"]) == pytest.approx(expected)
    assert num_examples == 100 and metrics == {**PROPERTIES, "accuracy": metrics["accuracy"]}
    assert f"loss {loss:.4f}" in capsys.readouterr().out


def test_clients_without_a_seed_shuffle_differently():
    def order(*flags):
        args = client.make_parser().parse_args(["--synthetic", "--num-partitions", "9", *flags])
        made = client.make_client(args, name="x")
        return next(iter(made.trainloader))[1].tolist()

    assert order() != order()
    assert order("--seed", "7") == order("--seed", "7")


# The client's data.


@pytest.fixture
def few_images(monkeypatch, tmp_path):
    """Replace both datasets by 10 images of two classes; return a data root."""

    def images(name):
        pixels = torch.zeros(10, 32, 32, 3, dtype=torch.uint8)
        return cifar.Images(name, pixels, torch.arange(10) % 2, ["cat", "dog"])

    monkeypatch.setattr(cifar, "read_images", lambda root, train, download: images("CIFAR-10"))
    monkeypatch.setattr(cifar, "synthesize", lambda num_images, seed: images("generated images"))
    return tmp_path


def reported(made):
    """Return what a client reports to the server about its data."""
    parameters = ndarrays_to_parameters(made.numpy_client.get_parameters({}))
    trained = made.fit(FitIns(parameters, {}))
    tested = made.evaluate(EvaluateIns(parameters, {}))
    assert tested.metrics == {**trained.metrics, "accuracy": tested.metrics["accuracy"]}
    assert made.get_properties(GetPropertiesIns({})).properties == trained.metrics
    return {**trained.metrics, "images": (trained.num_examples, tested.num_examples)}


SKEWED = "--synthetic --num-partitions 5 --partition-id 1 --alpha 0.5"
DATA = {
    "": ["CIFAR-10", "all images", (10, 10)],
    "--synthetic": ["generated images", "all images", (10, 10)],
    "--num-partitions 2": ["CIFAR-10 in 2 partitions (IID)", "partition 0", (5, 5)],
    SKEWED: ["generated images in 5 partitions (alpha 0.5)", "partition 1", (3, 2)],
}


@pytest.mark.parametrize("flags", DATA)
def test_client_reports_its_data(few_images, capsys, flags):
    arguments = ["--data-root", str(few_images), *flags.split()]
    made = client.make_client(client.make_parser().parse_args(arguments), "myself").to_client()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Client myself"
    assert lines[1].endswith(": {} training / {} test images".format(*DATA[flags][2]))
    expected = dict(zip(["data", "partition", "images"], DATA[flags]))
    assert reported(made) == {"client": "myself", "classes": "cat, dog", **expected}


@pytest.fixture
def from_engine(few_images, monkeypatch):
    """Make clients as Flower's engine does, from a run config and a node config."""
    monkeypatch.setattr(client, "clients", {})

    def client_of(run, **node):
        run_config = {"rounds": 3, "num-partitions": 9, "alpha": 0.5, "synthetic": True, **run}
        node_config = {"num-partitions": 2, "data-root": str(few_images), **node}
        return client.client_fn(Context(7, 12, node_config, RecordDict(), run_config))

    return client_of


def test_engine_reuses_clients(from_engine):
    """The node config takes precedence over the run config."""

    def client_of(partition_id, **run):
        return from_engine(run, **{"partition-id": partition_id})

    first, second, real = client_of(0), client_of(1), client_of(1, synthetic=False)
    again = client_of(0), client_of(1)
    assert [made.numpy_client for made in again] == [first.numpy_client, second.numpy_client]
    for made, number in ((first, 0), (second, 1)):
        assert reported(made)["client"] == reported(made)["partition"] == f"partition {number}"
    assert reported(second)["data"] == "generated images in 2 partitions (alpha 0.5)"
    assert reported(real)["data"] == "CIFAR-10 in 2 partitions (alpha 0.5)"


def test_engine_names_a_node_without_a_partition(from_engine):
    assert reported(from_engine({}))["client"] == "node 12"


# Keep-alive: the options that gRPC gets. test_federation.py tests what they do.


def insecure_channel(target, options=None, compression=None):
    """Stand in for gRPC's function: return the arguments."""
    return {"target": target, "options": options, "compression": compression}


def secure_channel(target, credentials, options=None, compression=None):
    """Stand in for gRPC's function: return the arguments."""
    return {"credentials": credentials, **insecure_channel(target, options, compression)}


@pytest.fixture
def kept_alive(monkeypatch):
    """Wrap stand-ins for gRPC's functions as main() wraps gRPC's own."""
    for stand_in in (insecure_channel, secure_channel):
        real = inspect.signature(getattr(grpc, stand_in.__name__))
        assert list(real.parameters) == list(inspect.signature(stand_in).parameters)
        monkeypatch.setattr(grpc, stand_in.__name__, client.keep_alive(stand_in))


def assert_alive(opened, own):
    """Check that a channel has its own options, and those for keep-alive."""
    options = dict(opened["options"])
    assert len(options) == len(opened["options"])
    # gRPC servers disconnect clients that ping more than once per 5 minutes.
    assert 300_000 < options.pop("grpc.keepalive_time_ms") <= 360_000
    assert options.pop("grpc.http2.max_pings_without_data") == 0
    assert options == own


def test_every_channel_has_keep_alive(kept_alive):
    own = [("own", 1)]
    for opened in (
        grpc.insecure_channel("host:1", options=own, compression="gzip"),
        grpc.insecure_channel(target="host:1", compression="gzip", options=own),
        grpc.secure_channel("host:1", "key", options=tuple(own), compression="gzip"),
        grpc.secure_channel(credentials="key", target="host:1", options=own, compression="gzip"),
    ):
        assert_alive(opened, {"own": 1})
        assert opened["target"] == "host:1" and opened["compression"] == "gzip"
        assert opened.get("credentials", "key") == "key"
    assert_alive(grpc.insecure_channel("host:1"), {})
    assert own == [("own", 1)]
