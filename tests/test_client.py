"""client.py: what goes to the server and what comes from it; without a network."""

import inspect

import grpc
import numpy as np
import pytest
import torch

import cifar
import client


@pytest.fixture
def made():
    """Return a client on 320 synthetic images, tested on 100."""
    datasets = [
        cifar.select(cifar.synthesize(count, seed), np.arange(count))
        for count, seed in ((320, 1), (100, 2))
    ]
    trainloader, testloader = (
        torch.utils.data.DataLoader(dataset, batch_size=32, collate_fn=tuple)
        for dataset in datasets
    )
    num_examples = {"trainset": 320, "testset": 100}
    return client.CifarClient(cifar.Net(), trainloader, testloader, num_examples)


def test_parameters_survive_the_round_trip(made):
    parameters = [value + 1 for value in made.get_parameters({})]
    assert [value.dtype for value in parameters] == [np.float32] * 10
    made.set_parameters(parameters)
    for theirs, ours in zip(parameters, made.get_parameters({})):
        np.testing.assert_array_equal(theirs, ours)
    for theirs, ours in zip(parameters, made.model.state_dict().values()):
        np.testing.assert_array_equal(theirs, ours.numpy())


def test_wrong_parameters_are_an_error(made):
    with pytest.raises(RuntimeError):
        made.set_parameters(made.get_parameters({})[::-1])


def test_fit_starts_from_the_given_parameters_and_returns_the_trained(made):
    given = made.get_parameters({})
    kept = [value.copy() for value in given]
    made.set_parameters([value * 0 for value in given])
    trained, num_examples, metrics = made.fit(given, {})
    assert num_examples == 320 and metrics == {"client": client.NAME}
    net = cifar.Net()
    net.load_state_dict(dict(zip(net.state_dict(), map(torch.tensor, kept))))
    cifar.train(net, made.trainloader, epochs=1, device=torch.device("cpu"))
    for theirs, ours, before, given_now in zip(net.state_dict().values(), trained, kept, given):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-7)
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
    expected = cifar.test(made.model, made.testloader, torch.device("cpu"))
    made.set_parameters([value * 0 for value in given])
    loss, num_examples, metrics = made.evaluate(given, {})
    assert (loss, metrics["accuracy"]) == pytest.approx(expected)
    assert num_examples == 100 and metrics["client"] == client.NAME
    assert f"loss {loss:.4f}" in capsys.readouterr().out


def test_clients_without_a_seed_shuffle_differently(start, tmp_path):
    """Two fresh processes draw different orders; with the same seed, the same."""
    program = tmp_path / "order.py"
    program.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import client, torch\n"
        "if sys.argv[2] != 'none': torch.manual_seed(int(sys.argv[2]))\n"
        "loader = client.make_client(synthetic=True).trainloader\n"
        "print(next(iter(loader))[1].tolist())\n"
    )
    root = inspect.getfile(cifar).rpartition("/")[0]
    runs = [start(program, root, seed) for seed in ("none", "none", "7", "7")]
    assert [run.end() for run in runs] == [0] * 4, runs[0].output
    orders = [run.output.splitlines()[-1] for run in runs]
    assert orders[0] != orders[1] and orders[2] == orders[3]


def test_client_says_what_it_holds(capsys, small_cifar, monkeypatch):
    monkeypatch.setattr(cifar, "read_or_fetch", lambda root: two_classes())
    client.make_client.__wrapped__(partition_id=0, num_partitions=2)
    out = capsys.readouterr().out
    assert f"Client {client.NAME}, part 0 of 2: 5 images to train on (" in out
    assert "airplane 3, automobile 2, bird 0" in out and "5 to test on" in out


def two_classes():
    labelled = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10) % 2
    return labelled, labelled


def test_channels_ask_for_signs_of_life(monkeypatch):
    """What Flower opens keeps its own options, and gets the keepalive's."""
    for name in ("insecure_channel", "secure_channel"):
        monkeypatch.setattr(grpc, name, lambda *args, **kwargs: (args, kwargs))
    client.keep_alive()
    for args in (("host:1",), ("host:1", "credentials")):
        opened = grpc.secure_channel if args[1:] else grpc.insecure_channel
        given, kwargs = opened(*args, options=[("grpc.max_send_message_length", 7)])
        options = dict(kwargs["options"])
        assert given == args and options["grpc.max_send_message_length"] == 7
        # Flower's server, as server.py starts it, takes a ping every 10 s and no more.
        assert 10_000 < options["grpc.keepalive_time_ms"] <= 30_000
