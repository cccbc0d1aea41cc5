"""client.py: what goes to the server and what comes from it; without a network."""

import inspect
import re
import subprocess
import sys

import grpc
import numpy as np
import pytest
import torch
from conftest import ROOT
from flwr.common import (
    Context,
    EvaluateIns,
    FitIns,
    GetPropertiesIns,
    RecordDict,
    ndarrays_to_parameters,
)
from flwr.supercore.grpc import create_channel

import cifar
import client

PROPERTIES = {"client": "me", "data": "generated images", "partition": "all of it"}


@pytest.fixture
def made():
    """Return a client on 320 synthetic images, tested on 100."""
    trainloader, testloader = (
        cifar.make_loader(images, torch.utils.data.SequentialSampler(images), batch_size=32)
        for images in (cifar.synthesize(320, seed=1), cifar.synthesize(100, seed=2))
    )
    num_examples = {"trainset": 320, "testset": 100}
    net = cifar.Net().to(cifar.DEVICE)
    return client.CifarClient(net, trainloader, testloader, num_examples, PROPERTIES)


def test_parameters_survive_the_round_trip(made):
    parameters = [value + 1 for value in made.get_parameters({})]
    assert [value.dtype for value in parameters] == [np.float32] * 10
    made.set_parameters(parameters)
    for theirs, ours in zip(parameters, made.get_parameters({})):
        np.testing.assert_array_equal(theirs, ours)
    for theirs, ours in zip(parameters, made.model.state_dict().values()):
        np.testing.assert_array_equal(theirs, ours.cpu().numpy())


def of_another_network(parameters):
    """Return parameters of which the last but two, a bias, is shorter."""
    return [*parameters[:-3], parameters[-3][:3] + 1, *parameters[-2:]]


WRONG = re.escape("fc2.bias: expected float32(84,), got float32(3,) (different models?)")


def test_wrong_parameters_are_an_error_that_names_the_first(made, capsys):
    given = made.get_parameters({})
    for use in (
        made.set_parameters,
        lambda parameters: made.fit(parameters, {}),
        lambda parameters: made.evaluate(parameters, {}),
    ):
        with pytest.raises(cifar.UserError, match=WRONG):
            use(of_another_network(given))
    for ours, before in zip(made.get_parameters({}), given):
        np.testing.assert_array_equal(ours, before)
    assert capsys.readouterr().out == ""


def test_properties_are_what_the_client_was_made_with(made):
    assert made.get_properties({}) == PROPERTIES


def test_fit_starts_from_the_given_parameters_and_returns_the_trained(made):
    given = made.get_parameters({})
    kept = [value.copy() for value in given]
    made.set_parameters([value * 0 for value in given])
    trained, num_examples, metrics = made.fit(given, {})
    assert num_examples == 320 and metrics == PROPERTIES
    net = cifar.Net()
    net.load_state_dict(dict(zip(net.state_dict(), map(torch.tensor, kept))))
    cifar.train(net.to(cifar.DEVICE), made.trainloader, epochs=1, device=cifar.DEVICE)
    for theirs, ours, before, given_now in zip(net.state_dict().values(), trained, kept, given):
        np.testing.assert_allclose(ours, theirs.cpu().numpy(), rtol=1e-5, atol=1e-7)
        assert not np.array_equal(ours, before)
        np.testing.assert_array_equal(given_now, before)


def test_what_fit_returned_does_not_change_later(made):
    first, _, _ = made.fit(made.get_parameters({}), {})
    kept = [value.copy() for value in first]
    made.fit(first, {})
    for now, before in zip(first, kept):
        np.testing.assert_array_equal(now, before)


def test_config_reaches_the_training(made, monkeypatch):
    told = []
    monkeypatch.setattr(cifar, "train", lambda *args, **kwargs: told.append(kwargs))
    made.fit(made.get_parameters({}), {"lr": 0.25, "local_epochs": 3})
    made.fit(made.get_parameters({}), {})
    settings = [(kwargs["lr"], kwargs["epochs"]) for kwargs in told]
    assert settings == [(0.25, 3), (0.001, 1)]


def test_evaluate_tests_the_given_parameters(made, capsys):
    given = made.get_parameters({})
    expected = cifar.test(made.model, made.testloader, cifar.DEVICE)
    made.set_parameters([value * 0 for value in given])
    loss, num_examples, metrics = made.evaluate(given, {})
    assert (loss, metrics["accuracy"]) == pytest.approx(expected)
    told = {**PROPERTIES, "accuracy": metrics["accuracy"]}
    assert num_examples == 100 and metrics == told
    assert f"loss {loss:.4f}" in capsys.readouterr().out


def test_clients_without_a_seed_shuffle_differently(start, tmp_path):
    """Two fresh processes draw different orders; with the same seed, the same."""
    program = tmp_path / "order.py"
    program.write_text(
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import cifar, client\n"
        "made = client.make_client(client.make_parser().parse_args(), name='x')\n"
        "cifar.train = lambda net, loader, **how: print(next(iter(loader))[1].tolist())\n"
        "made.numpy_client.fit(made.numpy_client.get_parameters({}), {})\n",
        encoding="utf-8",
    )
    seeds = [[], [], ["--seed", 7], ["--seed", 7]]
    runs = [start(program, ROOT, "--synthetic", *seed) for seed in seeds]
    assert [run.end() for run in runs] == [0] * 4, runs[0].output
    orders = [run.output.splitlines()[-1] for run in runs]
    assert orders[0] != orders[1] and orders[2] == orders[3]


# What it holds.


@pytest.fixture
def few_images(monkeypatch, tmp_path):
    """Make CIFAR-10 and the generated images 10 images of two classes; return their folder."""

    def images(name):
        return cifar.Images(name, np.zeros((10, 32, 32, 3), np.uint8), np.arange(10) % 2)

    both = images("CIFAR-10"), images("CIFAR-10")
    monkeypatch.setattr(cifar, "read_images", lambda root, download: both)
    monkeypatch.setattr(cifar, "synthesize", lambda num_images, seed: images("generated images"))
    return tmp_path


def told(made):
    """Return what the server is told about a client's images, with its training and its tests."""
    parameters = ndarrays_to_parameters(made.numpy_client.get_parameters({}))
    trained = made.fit(FitIns(parameters, {}))
    tested = made.evaluate(EvaluateIns(parameters, {}))
    assert tested.metrics == {**trained.metrics, "accuracy": tested.metrics["accuracy"]}
    answer = made.get_properties(GetPropertiesIns({}))
    assert answer.properties == trained.metrics
    return {**trained.metrics, "images": (trained.num_examples, tested.num_examples)}


HELD = [
    ("", ["CIFAR-10", "all of it", (10, 10)]),
    ("--synthetic", ["generated images", "all of it", (10, 10)]),
    ("--num-partitions 2", ["CIFAR-10 in 2 partitions (IID)", "partition 0", (5, 5)]),
    (
        "--synthetic --num-partitions 5 --partition-id 1 --alpha 0.5",
        ["generated images in 5 partitions (alpha 0.5)", "partition 1", (3, 2)],
    ),
]


@pytest.mark.parametrize("flags, held", HELD)
def test_client_says_what_it_holds(few_images, capsys, flags, held):
    arguments = ["--data-root", str(few_images), *flags.split()]
    made = client.make_client(client.make_parser().parse_args(arguments), "myself")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Client myself"
    assert lines[1].endswith(": {} training / {} test images".format(*held[2]))
    expected = dict(zip(["data", "partition", "images"], held))
    assert told(made) == {"client": "myself", "classes": "class 0, class 1", **expected}


def test_partition_that_does_not_exist_is_an_error(few_images):
    flags = ["--data-root", str(few_images), "--partition-id", "2", "--num-partitions", "2"]
    with pytest.raises(cifar.UserError, match="--partition-id 2 is out of range"):
        client.make_client(client.make_parser().parse_args(flags), "myself")


@pytest.fixture
def from_engine(few_images, monkeypatch):
    """Return what makes clients as Flower's engine does, from a run's and a node's config."""
    monkeypatch.setattr(client, "clients", {})

    def client_of(run, **node):
        run_config = {"rounds": 3, "num-partitions": 9, "alpha": 0.5, "synthetic": True, **run}
        node_config = {"num-partitions": 2, "data-root": str(few_images), **node}
        context = Context(7, 12, node_config, RecordDict(), run_config)
        return client.client_fn(context)

    return client_of


def test_flowers_engine_gets_the_same_client_again(from_engine):
    """Which images it holds follows from both configs, and the node's own wins."""

    def client_of(part, **run):
        return from_engine(run, **{"partition-id": part})

    first, second, real = client_of(0), client_of(1), client_of(1, synthetic=False)
    assert client_of(0) is first and client_of(1) is second and first is not second
    for made, number in ((first, 0), (second, 1)):
        assert told(made)["client"] == told(made)["partition"] == f"partition {number}"
    assert told(second)["data"] == "generated images in 2 partitions (alpha 0.5)"
    assert told(real)["data"] == "CIFAR-10 in 2 partitions (alpha 0.5)"


def test_flowers_engine_names_a_node_without_a_partition(from_engine):
    assert told(from_engine({}))["client"] == "node 12"


# What Flower and gRPC are told.


def insecure_channel(target, options=None, compression=None):
    """Stand in for gRPC's, which has these arguments; return them."""
    return {"target": target, "options": options, "compression": compression}


def secure_channel(target, credentials, options=None, compression=None):
    """Stand in for gRPC's, which has these arguments; return them."""
    return {"credentials": credentials, **insecure_channel(target, options, compression)}


@pytest.fixture
def kept_alive(monkeypatch):
    """Call keep_alive() on functions that open nothing, but have gRPC's signatures."""
    for stand_in in (insecure_channel, secure_channel):
        real = inspect.signature(getattr(grpc, stand_in.__name__))
        assert list(real.parameters) == list(inspect.signature(stand_in).parameters)
        monkeypatch.setattr(grpc, stand_in.__name__, stand_in)
    client.keep_alive()


def assert_alive(opened, own):
    """Check that a channel has its own options, and those that find a dead link."""
    options = dict(opened["options"])
    assert len(options) == len(opened["options"])
    # A gRPC server takes one question every five minutes, and hangs up on who asks more often.
    asked, awaited = options.pop("grpc.keepalive_time_ms"), options.pop("grpc.keepalive_timeout_ms")
    assert 300_000 < asked and 0 < awaited and asked + awaited <= 360_000
    assert options.pop("grpc.http2.max_pings_without_data") == 0
    assert options == own


@pytest.mark.parametrize("insecure", [True, False])
def test_channels_of_flower_ask_for_signs_of_life(kept_alive, insecure):
    opened = create_channel("host:1", insecure, max_message_length=7)
    assert opened["target"] == "host:1" and ("credentials" in opened) is not insecure
    lengths = ("grpc.max_send_message_length", "grpc.max_receive_message_length")
    assert_alive(opened, dict.fromkeys(lengths, 7))


def test_channels_ask_for_signs_of_life_however_they_are_opened(kept_alive):
    own = [("own", 1)]
    for opened in (
        grpc.insecure_channel("host:1", own, "gzip"),
        grpc.insecure_channel(target="host:1", compression="gzip", options=own),
        grpc.secure_channel("host:1", "key", tuple(own), "gzip"),
        grpc.secure_channel("host:1", "key", compression="gzip", options=own),
        grpc.secure_channel(credentials="key", target="host:1", options=own, compression="gzip"),
    ):
        assert_alive(opened, {"own": 1})
        assert opened["target"] == "host:1" and opened["compression"] == "gzip"
        assert opened.get("credentials", "key") == "key"
    assert_alive(grpc.insecure_channel("host:1"), {})
    assert_alive(grpc.insecure_channel("host:1", options=None), {})
    assert own == [("own", 1)]


def test_flower_reports_nothing_to_its_maker():
    program = (
        "import os\n"
        "for name in [name for name in os.environ if name.startswith('FLWR_')]:\n"
        "    del os.environ[name]\n"
        "import client\n"
        "from flwr.supercore import telemetry\n"
        "print(telemetry.FLWR_TELEMETRY_ENABLED)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.stdout, run.returncode) == ("0\n", 0), run.stderr
