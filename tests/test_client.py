"""client.py: what goes to the server and what comes from it; without a network."""

import re
import subprocess
import sys
import types
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from conftest import ROOT
from flwr.common import EvaluateIns, FitIns, ndarrays_to_parameters
from flwr.supercore.grpc import create_channel
from grpc._cython import cygrpc

import cifar
import client

HOLDS = {"data": "generated images", "part": "all"}


@pytest.fixture
def made():
    """Return a client on 320 synthetic images, tested on 100."""
    datasets = [
        cifar.Images(*cifar.synthesize(count, seed), np.arange(count))
        for count, seed in ((320, 1), (100, 2))
    ]
    trainloader, testloader = (
        torch.utils.data.DataLoader(dataset, batch_size=32, collate_fn=tuple)
        for dataset in datasets
    )
    num_examples = {"trainset": 320, "testset": 100}
    net = cifar.Net().to(client.DEVICE)
    return client.CifarClient(net, trainloader, testloader, num_examples, HOLDS)


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


WRONG = re.escape("fc2.bias is float32(3,) instead of float32(84,)")


def test_wrong_parameters_are_an_error_that_names_the_first(made):
    given = made.get_parameters({})
    for use in (made.set_parameters, lambda parameters: made.evaluate(parameters, {})):
        with pytest.raises(cifar.UserError, match=WRONG):
            use(of_another_network(given))
    for ours, before in zip(made.get_parameters({}), given):
        np.testing.assert_array_equal(ours, before)


def test_wrong_parameters_are_not_trained_but_answered(made, capsys):
    """The answer, this client's own weights, is what the server refuses by the client's name."""
    before = made.get_parameters({})
    answer, num_examples, metrics = made.fit(of_another_network(before), {})
    for ours, theirs in zip(before, answer, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert num_examples == 320 and metrics == {"client": client.NAME, **HOLDS}
    printed = capsys.readouterr()
    assert re.match(WRONG, printed.err) and printed.err.count("\n") == 1
    assert "Training" not in printed.out


def test_fit_starts_from_the_given_parameters_and_returns_the_trained(made):
    given = made.get_parameters({})
    kept = [value.copy() for value in given]
    made.set_parameters([value * 0 for value in given])
    trained, num_examples, metrics = made.fit(given, {})
    assert num_examples == 320 and metrics == {"client": client.NAME, **HOLDS}
    net = cifar.Net()
    net.load_state_dict(dict(zip(net.state_dict(), map(torch.tensor, kept))))
    cifar.train(net.to(client.DEVICE), made.trainloader, epochs=1, device=client.DEVICE)
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
    expected = cifar.test(made.model, made.testloader, client.DEVICE)
    made.set_parameters([value * 0 for value in given])
    loss, num_examples, metrics = made.evaluate(given, {})
    assert (loss, metrics["accuracy"]) == pytest.approx(expected)
    told = {"client": client.NAME, **HOLDS, "accuracy": metrics["accuracy"]}
    assert num_examples == 100 and metrics == told
    assert f"loss {loss:.4f}" in capsys.readouterr().out


def test_clients_without_a_seed_shuffle_differently(start, tmp_path):
    """Two fresh processes draw different orders; with the same seed, the same."""
    program = tmp_path / "order.py"
    program.write_text(
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "import cifar, client\n"
        "made = client.make_client(client.make_parser().parse_args())\n"
        "cifar.train = lambda net, loader, **how: print(next(iter(loader))[1].tolist())\n"
        "made.numpy_client.fit(made.numpy_client.get_parameters({}), {})\n"
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
    labelled = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10) % 2
    monkeypatch.setattr(cifar, "read_images", lambda root, download: (labelled, labelled))
    monkeypatch.setattr(cifar, "synthesize", lambda num_images, seed: labelled)
    return tmp_path


def told(made):
    """Return what the server is told about a client's images, with its training and its tests."""
    parameters = ndarrays_to_parameters(made.numpy_client.get_parameters({}))
    trained = made.fit(FitIns(parameters, {}))
    tested = made.evaluate(EvaluateIns(parameters, {}))
    assert tested.metrics == {**trained.metrics, "accuracy": tested.metrics["accuracy"]}
    assert trained.num_examples == tested.num_examples
    assert trained.metrics["client"] == client.NAME
    held = {name: value for name, value in trained.metrics.items() if name != "client"}
    return {**held, "images": trained.num_examples}


HELD = [
    ("", ["CIFAR-10", "all", 10]),
    ("--synthetic", ["generated images", "all", 10]),
    ("--num-partitions 2", ["CIFAR-10 in 2 parts, alpha none", "part 0", 5]),
    (
        "--synthetic --num-partitions 5 --partition-id 1 --alpha 0.5",
        ["generated images in 5 parts, alpha 0.5", "part 1", 2],
    ),
]


@pytest.mark.parametrize("flags, held", HELD)
def test_client_says_what_it_holds(few_images, capsys, flags, held):
    arguments = ["--data-root", str(few_images), *flags.split()]
    made = client.make_client(client.make_parser().parse_args(arguments))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"Client {client.NAME}"
    assert f": {held[2]} images to train on, {held[2]} to test on" in lines[1]
    assert told(made) == dict(zip(["data", "part", "images"], held))


def test_part_that_does_not_exist_is_an_error(few_images):
    flags = ["--data-root", str(few_images), "--partition-id", "2", "--num-partitions", "2"]
    with pytest.raises(cifar.UserError, match="no part 2 of 2"):
        client.make_client(client.make_parser().parse_args(flags))


def test_flowers_engine_gets_the_same_client_again(few_images, monkeypatch):
    """Which images it holds follows from both configs, and the node's own wins."""
    monkeypatch.setattr(client, "clients", {})

    def client_of(part, **run):
        run_config = {"rounds": 3, "num-partitions": 9, "alpha": 0.5, "synthetic": True, **run}
        node_config = {"partition-id": part, "num-partitions": 2, "data-root": str(few_images)}
        return client.client_fn(
            types.SimpleNamespace(run_config=run_config, node_config=node_config)
        )

    first, second, real = client_of(0), client_of(1), client_of(1, synthetic=False)
    assert client_of(0) is first and client_of(1) is second and first is not second
    assert [told(made)["part"] for made in (first, second)] == ["part 0", "part 1"]
    assert told(second)["data"] == "generated images in 2 parts, alpha 0.5"
    assert told(real)["data"] == "CIFAR-10 in 2 parts, alpha 0.5"


# What Flower and gRPC are told.


def test_channels_ask_for_signs_of_life(monkeypatch):
    """What Flower opens keeps its own options, and gets the keepalive's."""
    for name in ("insecure_channel", "secure_channel"):
        monkeypatch.setattr(grpc, name, lambda *args, options: (args, options))
    client.keep_alive()
    for insecure in (True, False):
        args, pairs = create_channel("host:1", insecure, max_message_length=7)
        options = dict(pairs)
        assert args[0] == "host:1" and len(args) == (1 if insecure else 2)
        assert options["grpc.max_send_message_length"] == 7
        # A gRPC server takes one question every five minutes, and hangs up on who asks more often.
        asked, awaited = options["grpc.keepalive_time_ms"], options["grpc.keepalive_timeout_ms"]
        assert 300_000 < asked and 0 < awaited and asked + awaited <= 360_000
        assert options["grpc.http2.max_pings_without_data"] == 0


def test_grpc_knows_the_options():
    """It takes any name without a word, so what it does not know would do nothing."""
    names = re.findall(r'"(grpc\.[a-z0-9_.]+)"', (ROOT / "client.py").read_text())
    assert "grpc.keepalive_time_ms" in names
    library = Path(cygrpc.__file__).read_bytes()
    assert [name for name in names if name.encode() + b"\0" not in library] == []


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
