"""Tests of server.py, with clients in this process: rounds, saving, strategies."""

import contextlib
import errno
import functools
import hashlib
import io
import os
import re
import sys
import threading
import types
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.server import strategy as strategies
from flwr.server.client_proxy import ClientProxy
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed
from flwr.server.superlink.fleet.grpc_bidi.grpc_client_proxy import GrpcClientProxy
from helpers import arrays_of, assert_equal, history

import cifar
import client
import server

OK = Status(Code.OK, "")


def weights(seed=0):
    random = np.random.RandomState(seed)
    shapes = [value.shape for value in cifar.Net().state_dict().values()]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


class Client(ClientProxy):
    """A client that answers fit() with `update`, and evaluate() with `test`.

    An exception is raised instead; a function is called with the instructions.
    """

    def __init__(self, update=None, test=None, cid="client"):
        ClientProxy.__init__(self, cid)
        self.update = fit_res(weights()) if update is None else update
        self.test = evaluate_res() if test is None else test
        self.fits, self.tests = [], []

    def answer(self, ins, answer):
        if isinstance(answer, Exception):
            raise answer
        return answer(ins) if callable(answer) else answer

    def fit(self, ins, timeout, group_id):
        self.fits.append(ins)
        return self.answer(ins, self.update)

    def evaluate(self, ins, timeout, group_id):
        self.tests.append(ins)
        return self.answer(ins, self.test)

    def get_properties(self, ins, timeout, group_id):
        raise NotImplementedError

    get_parameters = reconnect = get_properties


class Rejoining(server.Clients):
    """Clients that join again as soon as they are lost."""

    def unregister(self, client):
        super().unregister(client)
        self.register(client)


def each_time(*answers):
    """Return a function that gives one of these answers after the other; exceptions are raised."""
    left = iter(answers)

    def answer(ins):
        given = next(left)
        if isinstance(given, Exception):
            raise given
        return given

    return answer


def fit_res(arrays, num_examples=10, **metrics):
    return FitRes(OK, ndarrays_to_parameters(arrays), num_examples, metrics)


def evaluate_res(loss=1.0, num_examples=10, accuracy=0.5, **metrics):
    return EvaluateRes(OK, loss, num_examples, {"accuracy": accuracy, **metrics})


@pytest.fixture
def make(tmp_path):
    """Make a server that saves its model in an empty folder, with these clients connected."""
    servers = []

    def make_server(*clients, flags=(), path=tmp_path / "model.pt", manager=Rejoining):
        for made in servers:  # a server that exits releases its lock
            made.lock.release()
        arguments = ["--model", path, "--min-clients", max(1, len(clients)), "--seed", 1, *flags]
        args = server.make_parser().parse_args(list(map(str, arguments)))
        servers.append(server.CifarServer(args, manager()))
        for number, each in enumerate(clients):
            each.cid = f"client-{number}"
            servers[-1].client_manager().register(each)
        return servers[-1]

    yield make_server
    for made in servers:
        made.lock.release()


@pytest.fixture
def use_strategy(monkeypatch):
    """Replace make_strategy() by one that makes this strategy."""

    def use_one(kind, **settings):
        for what in ("fit", "evaluate", "available"):
            settings[f"min_{what}_clients"] = 1
        settings["evaluate_metrics_aggregation_fn"] = server.average_accuracy
        make = functools.partial(kind, **settings)
        monkeypatch.setattr(
            server, "make_strategy", lambda start, _: make(initial_parameters=start)
        )

    return use_one


def bias_in(path):
    """Return the first bias of a saved model, which tells models apart."""
    return torch.load(path, weights_only=True)["conv1.bias"].numpy()


def files_in(folder):
    """Return the contents of the files, without the lock."""
    files = [path for path in folder.iterdir() if path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in files}


# The round.


def test_average_is_weighted_by_examples(make):
    first, second, third = weights(1), weights(2), weights(3)
    made = make(*map(Client, [fit_res(first, 1), fit_res(second, 2), fit_res(third, 5)]))
    made.run_round()
    for ours, a, b, c in zip(arrays_of(made), first, second, third):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, (a + 2 * b + 5 * c) / 8, rtol=1e-5, atol=1e-6)


def test_average_does_not_depend_on_the_order_of_updates(make):
    """They arrive in any order, as on a network."""

    def run():
        made = make(*[Client(fit_res(weights(seed), seed + 1)) for seed in range(5)])
        made.run_round()
        return b"".join(array.tobytes() for array in arrays_of(made))

    assert len({run() for _ in range(6)}) == 1


def test_integers_are_not_averaged(make, monkeypatch, tmp_path):
    """Such as BatchNorm's count of batches, an index, or a mask."""

    class Net(cifar.Net):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)
            self.register_buffer("index", torch.tensor([2, 0, 1]))
            self.register_buffer("mask", torch.tensor([True, False]))

    monkeypatch.setattr(cifar, "Net", Net)

    def trained(batches):
        net = Net()
        net.norm.num_batches_tracked += batches
        torch.nn.init.constant_(net.norm.weight, batches / 100)
        return cifar.get_parameters(net)

    made = make(Client(fit_res(trained(3000), 50_000)), Client(fit_res(trained(6000), 25_000)))
    made.fit(1, None)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert state["norm.weight"].tolist() == [40] * 3
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    assert state["index"].tolist() == [2, 0, 1]
    assert state["mask"].tolist() == [True, False]


def test_accuracy_is_that_on_all_test_images(make, call, small_root, tmp_path):
    """Three clients with a partition each, and cifar.py with all of them."""
    parts = ["--data-root", str(small_root), "--num-partitions", "3", "--alpha", "0.1"]
    clients = []
    for i in "012":
        args = client.make_parser().parse_args([*parts, "--partition-id", i])
        whole = client.make_client(args, name=i).to_client()
        clients.append(Client(whole.fit, whole.evaluate))
    make(*clients, flags=["--lr", 0.05]).fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    output = call("cifar", "--data-root", small_root, "--evaluate", tmp_path / "model.pt")
    *_, loss, accuracy = output.splitlines()
    assert float(accuracy.split()[1]) == pytest.approx(record["accuracy"], abs=1e-9)
    assert float(loss.split()[1]) == pytest.approx(record["loss"], rel=1e-5)


def with_array(value, position=2):
    arrays = weights()
    arrays[position] = value
    return fit_res(arrays)


def with_value(value, num_examples=10):
    arrays = weights()
    arrays[9].flat[0] = value
    return fit_res(arrays, num_examples)


def archive():
    content = io.BytesIO()
    np.savez(content, a=np.zeros(1))
    return content.getvalue()


def with_header(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


def tensors(*contents):
    return FitRes(OK, Parameters(list(contents), "numpy.ndarray"), 1, {})


TENSORS = ndarrays_to_parameters(weights()).tensors
CANNOT = FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "cannot"), Parameters([], ""), 0, {})
EXPECTED = "conv2.weight: expected float32(16, 6, 5, 5), got "
BAD_UPDATES = [
    (lambda: with_value(np.nan), "NaN or infinity in fc3.bias"),
    (lambda: with_value(-np.inf), "NaN or infinity in fc3.bias"),
    (lambda: with_array(weights()[2][..., 0]), f"{EXPECTED}float32(16, 6, 5) "),
    (lambda: with_array(weights()[2].astype(float)), f"{EXPECTED}float64(16, 6, 5, 5)"),
    (lambda: with_array(np.zeros((16, 6, 5, 5), int)), f"{EXPECTED}int64(16, 6, 5, 5)"),
    (lambda: fit_res(weights()[:-1]), "fc3.bias is missing: got 9 of 10 parameters"),
    (lambda: fit_res([]), "conv1.weight is missing: got 0 of 10 parameters"),
    (lambda: fit_res(weights() + weights()[-1:]), "expected 10 parameters, got 11"),
    (lambda: tensors(*TENSORS * 100), "expected 10 parameters, got 11"),  # not all are decoded
    (lambda: with_value(1001), "fc3.bias: 1001 is implausible (limit 1000)"),
    (lambda: with_value(-1001), "fc3.bias: 1001 is implausible (limit 1000)"),
    (lambda: fit_res(weights(), 0), "0 examples"),
    (lambda: fit_res(weights(), -5), "-5 examples"),
    (lambda: fit_res(weights(), 10**9 + 1), "1000000001 examples"),
    (lambda: tensors(b"x" * 10), "unreadable parameters"),
    (lambda: tensors(b"\x93NUMPY junk", b""), "unreadable parameters"),
    *[
        (lambda header=header: tensors(with_header(header)), "unreadable parameters")
        for header in (b"(", b"  1\n 2\n", b"{'descr': (), 'fortran_order': False, 'shape': ()}")
    ],
    (lambda: tensors(*[archive()] * 10), "unreadable parameters"),
    (lambda: tensors(*[TENSORS[0][:-8]] * 10), "unreadable parameters"),
    (lambda: CANNOT, "FIT_NOT_IMPLEMENTED, cannot"),
]


@pytest.mark.parametrize("bad, reason", BAD_UPDATES)
def test_bad_update_is_rejected_and_the_others_are_averaged(make, capsys, bad, reason):
    update = bad()
    update.metrics = {"client": "laptop-7"}
    made = make(Client(update), Client(fit_res(weights(1), 3)))
    assert made.run_round()["clients"] == 1
    assert_equal(arrays_of(made), weights(1))
    line = f"Round 1/3: update from client 'laptop-7' rejected: {reason}"
    assert line in capsys.readouterr().out


def test_largest_plausible_update_and_count_are_accepted(make):
    clients = [Client(with_value(-1000, 10**9))]
    made = make(*clients)
    assert made.run_round()["clients"] == 1
    made.parameters = with_value(-2000).parameters  # the limit grows with the model
    clients[0].update = with_value(1_999_000)
    assert made.run_round()["clients"] == 1


BAD_EVALUATIONS = [
    (evaluate_res(np.nan), "loss nan, accuracy 0.5"),
    (evaluate_res(np.inf), "loss inf, accuracy 0.5"),
    (evaluate_res(-0.1), "loss -0.1, accuracy 0.5"),
    (evaluate_res(1e300), "loss 1e+300, accuracy 0.5"),
    (evaluate_res(accuracy=np.nan), "loss 1, accuracy nan"),
    (evaluate_res(accuracy="high"), "loss 1, accuracy 'high'"),
    (evaluate_res(accuracy=1.1), "loss 1, accuracy 1.1"),
    (evaluate_res(accuracy=True), "loss 1, accuracy True"),
    (evaluate_res(0.1, 0, 0.9), "0 examples"),
    (evaluate_res(0.1, -3, 0.9), "-3 examples"),
    (evaluate_res(0.1, 10**9 + 1, 0.9), "1000000001 examples"),
]


@pytest.mark.parametrize("bad, reason", BAD_EVALUATIONS)
def test_bad_evaluation_is_rejected(make, capsys, bad, reason):
    record = make(Client(test=bad), Client(test=evaluate_res(2.0, accuracy=0.25))).run_round()
    assert (record["loss"], record["accuracy"]) == (2.0, 0.25)
    line = f"evaluation from client 'client-0' rejected: {reason}\n"
    assert line in capsys.readouterr().out


def test_record_of_a_round(make):
    first, second = evaluate_res(1.0, 1, 0.1), evaluate_res(2.0, 3, 0.5)
    clients = [Client(test=first), Client(test=second)]
    record = make(*clients, flags=["--lr", 0.5, "--local-epochs", 7]).run_round()
    assert (record["loss"], record["accuracy"]) == (1.75, pytest.approx(0.4))
    assert list(record) == [
        *["round", "loss", "accuracy", "clients", "seconds", "data", "metrics", "fit_metrics"],
        *["centralized", "strategy", "config", "date", "versions"],
    ]
    assert record["metrics"] == {"accuracy": pytest.approx(0.4)}
    assert (record["fit_metrics"], record["centralized"]) == ({}, {})
    assert record["strategy"] == "FedAvg"
    assert record["config"] == clients[1].fits[0].config == {"lr": 0.5, "local_epochs": 7}
    assert record["versions"] == {"flwr": server.fl.__version__, "torch": torch.__version__}
    assert record["date"].startswith("20") and record["date"].endswith("+00:00")
    assert record["clients"] == 2 and record["seconds"] >= 0


def test_evaluation_without_accuracy_is_averaged(make, capsys, tmp_path):
    blind = EvaluateRes(OK, 1.0, 10, {})
    whole = evaluate_res(2.0, 10, accuracy=1)  # not 1.0
    record = make(Client(test=blind), Client(test=whole)).run_round()
    assert (record["loss"], record["accuracy"]) == (1.5, 1)
    make(Client(test=blind)).fit(1, None)
    assert history(tmp_path / "model.pt")[0]["accuracy"] is None
    assert "Round 1/3: loss 1.0000, accuracy -, clients 1, " in capsys.readouterr().out


def test_rounds_of_a_hundred_clients_run_at_once(make):
    """Each client waits until all have been asked: with fewer threads, this would hang."""
    barrier = threading.Barrier(100)

    def update(ins):
        barrier.wait(60)
        return fit_res(weights(1))

    assert make(*[Client(update) for _ in range(100)]).run_round()["clients"] == 100


@pytest.mark.parametrize("where", ["client", "message", "accuracy", "data"])
def test_text_from_clients_is_escaped(make, capsys, where):
    evil = "\x1b]0;title\x07\nRound 3/3: loss 0.0001\r\u202e\u2603\ud800" * 100
    update, test = fit_res(weights(), client="x"), evaluate_res()
    if where == "client":
        update = fit_res([], client=evil)
    elif where == "message":
        update = FitRes(Status(Code.FIT_NOT_IMPLEMENTED, evil), Parameters([], ""), 0, {})
    elif where == "accuracy":
        test = evaluate_res(accuracy=evil)
    else:
        update = fit_res(weights(), data=evil, partition=evil, classes=evil)
    record = make(Client(update, test), Client()).run_round()
    assert len(record["data"]) <= 100
    out = capsys.readouterr().out
    assert "title" in out, "it is shown"
    assert all(character.isprintable() or character == "\n" for character in out)
    assert not [line for line in out.splitlines() if line.startswith("Round 3/3")]
    assert max(map(len, out.splitlines())) < 2500


def test_printable_text_from_clients_is_not_changed(make, capsys):
    name = "a'b\"c\\d 中文"
    make(Client(fit_res([], client=name)), Client()).run_round()
    assert f"update from client '{name}' rejected" in capsys.readouterr().out


def test_long_names_are_cut(make, capsys):
    """The reason is shown even after a very long name."""
    make(Client(fit_res([], client="x" * 1000)), Client()).run_round()
    line = f"update from client '{'x' * 100}' rejected: conv1.weight is missing"
    assert line in capsys.readouterr().out


# The clients' data.


def with_data(data, partition, client="a", classes="a b"):
    update = fit_res(weights(), client=client, data=data, partition=partition, classes=classes)
    return Client(update)


def test_data_of_a_client_is_logged_once(make, capsys, tmp_path):
    data = "CIFAR-10 in 2 partitions (IID)"
    make(with_data(data, "partition 0", "a"), with_data(data, "partition 1", "b")).fit(2, None)
    out = capsys.readouterr().out
    for name, part in (("a", 0), ("b", 1)):
        assert out.count(f"client '{name}': {data}, partition {part}\n") == 1
    assert "Warning" not in out
    assert history(tmp_path / "model.pt")[1]["data"] == data
    made = make(with_data("CIFAR-10", "all images", "a"), with_data("CIFAR-10", "all images", "b"))
    assert made.run_round()["data"] == "CIFAR-10"
    assert "Warning" not in capsys.readouterr().out, "both have everything"


@pytest.mark.parametrize(
    "first, second, warning",
    [
        (("X", "all"), ("Y", "all"), "the clients' data differ: X / Y"),
        (("X", "partition 0"), ("X", "partition 0"), "2 clients use partition 0"),
        (("X, 2 parts", "partition 0"), ("X, 3 parts", "partition 1"), "X, 2 parts / X, 3 parts"),
        (("X", "all", "a", "cat dog"), ("X", "all", "b", "dog cat"), "classes differ: cat dog / d"),
    ],
)
def test_data_that_do_not_match_are_a_warning(make, capsys, tmp_path, first, second, warning):
    make(with_data(*first), with_data(*second)).fit(2, None)
    out = capsys.readouterr().out
    assert out.count("Warning: ") == 1 and warning in out
    assert [record["clients"] for record in history(tmp_path / "model.pt")] == [2, 2]


# Lost clients and failed rounds.


def test_lost_client_is_named(make, capsys):
    made = make(Client(GrpcBridgeClosed()), Client(), Client(test=GrpcBridgeClosed()))
    record = made.run_round()
    assert (record["clients"], record["loss"]) == (2, 1.0)
    out = capsys.readouterr().out
    for number in (0, 2):
        assert out.count(f"Round 1/3: client 'client-{number}' lost: disconnected\n") == 1
    assert out.count(" lost: ") == 2


def test_client_keeps_the_name_that_it_joined_with(make, capsys):
    lost = Client(fit_res(weights(), norm=0.5), test=GrpcBridgeClosed())
    lost.properties = {"client": "laptop-7"}
    make(lost, Client()).run_round()
    assert "client 'laptop-7' lost: disconnected\n" in capsys.readouterr().out


def test_server_gives_up_after_three_failed_attempts(make, capsys, tmp_path):
    failing = Client(TypeError("no such key"))
    made = make(failing)
    made.fit(0, None)
    before = files_in(tmp_path)
    with pytest.raises(cifar.UserError) as error:
        made.fit(3, None)
    todo = "Restart with --resume to continue."
    assert str(error.value) == f"Giving up after 3 failed attempts. {todo}"
    assert (len(failing.fits), len(failing.tests)) == (3, 0)
    out = capsys.readouterr().out
    for attempt in (1, 2, 3):
        reason = "failed (TypeError: no such key), global model unchanged"
        assert out.count(f"Round 1/3: {reason}, attempt {attempt} of 3\n") == 1
    assert files_in(tmp_path) == before and history(tmp_path / "model.pt") == []


def test_only_consecutive_failed_attempts_are_counted(make, tmp_path):
    error, update = ValueError(), fit_res(weights())
    make(Client(each_time(error, error, update, error, error, update, update))).fit(3, None)
    assert [record["round"] for record in history(tmp_path / "model.pt")] == [1, 2, 3]


def test_lost_clients_do_not_count_as_a_failed_attempt(make, capsys, tmp_path):
    make(Client(each_time(*[GrpcBridgeClosed()] * 5, fit_res(weights())))).fit(1, None)
    out = capsys.readouterr().out
    line = "failed (no usable updates), global model unchanged, trying again\n"
    assert out.count(line) == 5 and "attempt" not in out
    assert len(history(tmp_path / "model.pt")) == 1


def test_server_pauses_before_it_asks_a_client_again_that_left(
    make, use_strategy, monkeypatch, capsys
):
    """Such a strategy must not print thousands of lines a second."""

    class FirstClients(strategies.FedAvg):
        chosen = None

        def configure_fit(self, *args):
            self.chosen = self.chosen or super().configure_fit(*args)
            if pauses == [1]:
                raise GrpcBridgeClosed  # as from a client that it asks for something itself
            return self.chosen

    pauses = []
    monkeypatch.setattr(server.time, "sleep", pauses.append)
    use_strategy(FirstClients)
    make(Client(each_time(GrpcBridgeClosed(), fit_res(weights())))).fit(1, None)
    assert pauses == [1, 1]
    failed = "failed (a client is gone), global model unchanged, trying again\n"
    assert capsys.readouterr().out.count(failed) == 1


def test_client_that_fails_in_flowers_engine_does_not_end_the_round(make, capsys, tmp_path):
    reason = "Message contains an Error (reason: Node Unavailable)."
    failing = Client(each_time(ValueError(reason), fit_res(weights())), ValueError(reason))
    made = make(failing, Client(), Client(), manager=server.Clients)
    made.fit(2, None)
    assert [record["clients"] for record in history(tmp_path / "model.pt")] == [2, 3]
    out = capsys.readouterr().out
    assert out.count(f"client 'client-0' lost: {reason}\n") == 3
    assert "failed (" not in out
    late = Client(ValueError("Message Unavailable - it may have expired due to its TTL."))
    make(late, Client(), manager=server.Clients).fit(1, timeout=1e-9)
    assert "client 'client-0' lost: timed out after 1e-09 s\n" in capsys.readouterr().out


def test_rejected_update_beside_a_lost_client_is_a_failed_attempt(make, capsys):
    made = make(Client(fit_res([])), Client(GrpcBridgeClosed()))
    with pytest.raises(cifar.UserError, match="Giving up"):
        made.fit(1, None)
    assert "failed (no usable updates), global model unchanged, att" in capsys.readouterr().out


def test_average_that_most_clients_cannot_evaluate_is_discarded(make, capsys):
    """One plausible update of 900 makes a model whose loss is not a number, for every client."""

    def test(ins):
        largest = max(np.abs(array).max() for array in arrays_of(ins))
        return evaluate_res(np.nan if largest > 100 else 1.0)

    huge = fit_res([value * 0 + np.float32(900) for value in weights()])
    made = make(Client(each_time(huge, fit_res(weights(1))), test), Client(None, test))
    made.fit(1, None)
    reason = "failed (most clients cannot evaluate the aggregate), global model unchanged"
    assert f"Round 1/3: {reason}, attempt 1 of 3\n" in capsys.readouterr().out
    first, second = weights(1)[1], weights(0)[1]
    np.testing.assert_allclose(arrays_of(made)[1], (first + second) / 2, rtol=1e-5, atol=1e-6)


def test_model_that_the_clients_fail_to_evaluate_is_discarded(make):
    with pytest.raises(cifar.UserError, match="most clients cannot evaluate the aggregate"):
        error = ValueError("no such layer")
        make(Client(test=error), Client(test=error), Client()).run_round()


def test_model_is_saved_without_an_evaluation_if_no_client_is_left(make, capsys, tmp_path):
    def update(ins):
        made.client_manager().clients.clear()
        return fit_res(weights(1))

    made = make(Client(update))
    made.fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    assert (record["loss"], record["accuracy"], record["clients"]) == (None, None, 1)
    assert "Round 1/3: loss -, accuracy -, clients 1, " in capsys.readouterr().out
    np.testing.assert_array_equal(bias_in(tmp_path / "model.pt"), weights(1)[1])


def test_bug_in_the_server_is_not_a_failed_round(make, monkeypatch, capsys):
    made = make(Client())
    made.fit(1, None)
    monkeypatch.setattr(cifar, "check_parameters", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        made.fit(2, None)
    assert "attempt" not in capsys.readouterr().out


# Saving and resuming.


def test_model_is_a_plain_state_dict_saved_after_every_round(make, tmp_path):
    trained = Client()
    made = make(trained)
    for seed in (1, 2):
        trained.update = fit_res(weights(seed))
        made.fit(seed, None)
        state = torch.load(tmp_path / "model.pt", weights_only=True)
        cifar.Net().load_state_dict(state)
        assert_equal([value.numpy() for value in state.values()], weights(seed))
        assert len(history(tmp_path / "model.pt")) == seed
    assert sorted(files_in(tmp_path)) == ["model.json", "model.pt"]


def test_initial_weights_depend_on_the_seed_and_can_be_resumed(make, tmp_path):
    made = make(flags=["--seed", 3])
    made.fit(0, None)
    first = arrays_of(made)
    assert_equal(arrays_of(make(flags=["--resume"])), first)
    assert_equal(arrays_of(make(flags=["--seed", 3], path=tmp_path / "same.pt")), first)
    other = arrays_of(make(flags=["--seed", 4], path=tmp_path / "other.pt"))
    assert not np.array_equal(other[0], first[0])


def test_resume_continues_after_the_last_round(make, tmp_path, call):
    path = tmp_path / "model.pt"
    make(Client(fit_res(weights(1)))).fit(1, None)
    made = make(Client(fit_res(weights(2))), flags=["--resume"])
    assert_equal(arrays_of(made), weights(1))
    made.fit(2, None)
    assert [record["round"] for record in history(path)] == [1, 2]
    np.testing.assert_array_equal(bias_in(path), weights(2)[1])
    made.lock.release()
    before = files_in(tmp_path)
    lines = call("server", "--rounds", 2, "--resume", "--model", path).splitlines()
    assert lines[0] == "All 2 rounds are done: raise --rounds to continue."
    assert [line.split()[0] for line in lines[2:]] == ["round", "1", "2", "Model:"]
    assert files_in(tmp_path) == before


@contextlib.contextmanager
def raising(error, folder, step):
    """Raise the error at the step-th time that a file in the folder is written or renamed."""
    steps = iter(range(1, 1000))
    active = True

    def hook(event, args):
        if not active or event not in ("open", "os.rename"):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if str(args[0]).startswith(str(folder)) and next(steps) == step:
            raise error

    sys.addaudithook(hook)
    yield
    active = False  # hooks cannot be removed


class Killed(BaseException):
    """Stands in for kill -9."""


def test_run_killed_while_saving_can_be_resumed(make, tmp_path, capsys):
    """At every step: both files are complete, and the round is repeated."""
    for step in range(1, 100):
        path = tmp_path / str(step) / "model.pt"
        path.parent.mkdir()
        made = make(Client(each_time(fit_res(weights(1)), fit_res(weights(2)))), path=path)
        made.fit(1, None)
        (first,) = history(path)
        with raising(Killed(), path.parent, step), contextlib.suppress(Killed):
            made.fit(2, None)
            break
        np.testing.assert_array_equal(bias_in(path), weights(1)[1])
        made = make(Client(fit_res(weights(3))), path=path, flags=["--resume"])
        assert_equal(arrays_of(made), weights(1))
        made.fit(2, None)
        assert [record["round"] for record in history(path)] == [1, 2]
        assert history(path)[0] == first
        assert history(path)[1]["model"] == hashlib.sha256(path.read_bytes()).hexdigest()
        np.testing.assert_array_equal(bias_in(path), weights(3)[1])
    assert 1 < step < 99
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "step, number, hint",
    [(1, errno.ENOSPC, ""), (2, errno.EMFILE, " (see ulimit -n)"), (3, errno.ENOSPC, "")],
)
def test_failed_save_leaves_the_last_model_and_is_tried_again(
    make, tmp_path, capsys, step, number, hint
):
    seen = []

    def update(ins):
        seen.append(files_in(tmp_path))
        return fit_res(weights(len(seen)))

    made = make(Client(update))
    made.fit(1, None)
    with raising(OSError(number, os.strerror(number)), tmp_path, step):
        made.fit(3, None)
    reason = f"{os.strerror(number)}{hint}. The previous file is unchanged."
    out = capsys.readouterr().out
    assert out.count(f": {reason} Trying again after the next round.\n") == 1
    assert f"Round 2/3: Cannot write {tmp_path / 'model'}." in out
    assert seen[2] == seen[1]
    assert len(history(tmp_path / "model.pt")) == 3
    np.testing.assert_array_equal(bias_in(tmp_path / "model.pt"), weights(3)[1])


def test_last_round_that_cannot_be_saved_is_an_error(make, tmp_path):
    """Files are limited to 100 kB, less than half of the model."""
    resource = pytest.importorskip("resource")  # not on Windows
    made = make(Client())
    before = files_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(cifar.UserError) as error:
            made.fit(1, None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reason = f"{os.strerror(errno.EFBIG)}. The previous file is unchanged."
    assert str(error.value) == f"Cannot write {tmp_path / 'model.pt'}: {reason}"
    assert files_in(tmp_path) == before


def test_another_model_beside_the_history_is_resumed_with_a_warning(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    make(Client(fit_res(weights(1)))).fit(2, None)
    net = cifar.Net()
    torch.save(net.state_dict(), path)
    made = make(Client(), flags=["--resume"])
    assert f"Warning: {path} is not the model of any round in" in capsys.readouterr().out
    assert_equal(arrays_of(made), cifar.get_parameters(net))
    made.fit(3, None)
    assert len(history(path)) == 3


def test_model_without_its_history_is_resumed(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    make(Client(fit_res(weights(1)))).fit(2, None)
    path.with_suffix(".json").unlink()
    made = make(flags=["--resume"])
    line = f"{path.with_suffix('.json')} is missing: resuming from the model alone, at round 1\n"
    assert line in capsys.readouterr().out
    assert_equal(arrays_of(made), weights(1))
    make().fit(0, None)  # and a new run, before that one has had a round, does not lose it
    np.testing.assert_array_equal(bias_in(tmp_path / "model-1.pt"), weights(1)[1])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.pt", None, "Cannot read the model {}: No such file or directory."),
        ("model.pt", b"junk", "{} is not a state_dict of cifar.Net: not a model file"),
        *[
            ("model.json", content, "{} is not a valid history file. Restore it, move it away, ")
            for content in (
                b"[{",
                b"7",
                b'[""]',
                b'{"a": 1}',
                b'[{"round": "x"}]',
                b"\xff\xfe",
                b"thesis",
            )
        ],
    ],
)
def test_damaged_file_is_an_error_and_not_changed(make, tmp_path, name, content, message):
    path = tmp_path / name
    make(Client()).fit(1, None)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    before = files_in(tmp_path)
    for flags in (["--resume"], []) if name == "model.json" else (["--resume"],):
        with pytest.raises(cifar.UserError) as error:
            make(flags=flags)
        assert str(error.value).startswith(message.format(path))
        assert "\n" not in str(error.value)
        assert files_in(tmp_path) == before


def test_model_of_an_earlier_run_is_renamed(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    for seed in (1, 2, 3):
        make(Client(fit_res(weights(seed)))).fit(1, None)
    make().fit(0, None)
    make().fit(0, None)  # the one before has had no round: nothing is lost
    out = capsys.readouterr().out
    names = [f"model{number}.{end}" for number in ("-1", "-2", "-3", "") for end in ("json", "pt")]
    assert sorted(files_in(tmp_path)) == sorted(names)
    for seed in (1, 2, 3):
        renamed = tmp_path / f"model-{seed}.pt"
        np.testing.assert_array_equal(bias_in(renamed), weights(seed)[1])
        assert len(history(renamed)) == 1
        assert f"Renamed {path} (earlier run) to {renamed}\n" in out


def test_model_and_history_get_the_same_number_even_if_killed_between(make, tmp_path):
    make(Client(fit_res(weights(1)))).fit(1, None)
    (tmp_path / "model.json").rename(tmp_path / "model-1.json")
    make().fit(0, None)
    np.testing.assert_array_equal(bias_in(tmp_path / "model-1.pt"), weights(1)[1])
    assert not (tmp_path / "model-2.pt").exists()


def test_files_of_other_programs_are_renamed_too(make, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"thesis")
    (tmp_path / "model-1.pt").write_bytes(b"draft")
    make().fit(0, None)
    assert (tmp_path / "model-2.pt").read_bytes() == b"thesis"
    assert (tmp_path / "model-1.pt").read_bytes() == b"draft"


def test_second_server_on_the_same_model_is_an_error(make, tmp_path, call):
    make(Client(fit_res(weights(1)))).fit(1, None)
    before = files_in(tmp_path)
    path = tmp_path / "model.pt"
    line = f"{path} is in use by another server; stop it or pass a different --model.\n"
    assert call("server", "--resume", "--rounds", 1, "--model", path, code=1) == line
    assert files_in(tmp_path) == before


# Starting.


@pytest.fixture
def finished(make, tmp_path, call):
    """Call the server with these flags on a run that has no rounds left; return what it prints."""
    made = make(Client())
    made.fit(1, None)
    made.lock.release()
    resume = ["--resume", "--rounds", 1, "--model", tmp_path / "model.pt"]
    return lambda *flags, code=0: call("server", *resume, *flags, code=code)


@pytest.mark.parametrize("host, warned", [("localhost", 0), ("[::1]", 0), ("0.0.0.0", 1)])
def test_open_address_without_tls_is_a_warning(finished, host, warned):
    line = f"Warning: no TLS on {host}:1: anyone who can reach it can join, read and modify the "
    assert finished("--server-address", f"{host}:1").count(line) == warned


TLS_FLAGS = ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"]


def make_certificate(folder, days):
    """Write a certificate that is valid for so many days from yesterday on, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "me")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    yesterday = datetime.now(UTC) - timedelta(days=1)
    builder = builder.not_valid_before(yesterday).not_valid_after(yesterday + timedelta(days))
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    (folder / "me.pem").write_bytes(certificate.public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "me.key").write_bytes(key.private_bytes(pem, *plain))


def test_tls_files_are_checked(finished, monkeypatch, tmp_path):
    make_certificate(tmp_path, days=2)
    (tmp_path / "junk").touch()

    def called(*names, code=0):
        files = [part for flag, n in zip(TLS_FLAGS, names) for part in (flag, tmp_path / n)]
        return finished("--server-address", "0.0.0.0:1", *files, code=code)

    assert called("me.pem", "me.key", "me.pem").startswith("All 1 rounds are done")
    for i, flag in enumerate(TLS_FLAGS):
        line = called(*["junk"] * i, "none", *["junk"] * (2 - i), code=1)
        assert line == f"Path argument `{flag}` does not point to a file.\n"
    invalid = "Invalid TLS certificate or key in "
    assert called("me.pem", "me.key", "junk", code=1).startswith(f"{invalid}--ssl-ca-certfile: ")
    line = called("me.pem", "junk", "me.pem", code=1)
    assert line.startswith(f"{invalid}--ssl-certfile or --ssl-keyfile: ")
    with monkeypatch.context() as patch:  # as for a key that only another user may read
        patch.setattr(server, "try_obtain_server_certificates", lambda args: tmp_path.read_bytes())
        line = called("me.pem", "me.key", "me.pem", code=1)
    assert line.startswith(f"{invalid}--ssl-certfile, --ssl-keyfile or --ssl-ca-certfile: ")
    make_certificate(tmp_path, days=0.5)
    line = "Warning: clients will reject --ssl-certfile: it is only valid from "
    assert line in called("me.pem", "me.key", "me.pem")


def server_fn(**config):
    """Make the server as Flower's engine does."""
    return server.server_fn(types.SimpleNamespace(run_config=config))


def test_engine_gets_the_same_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"rounds": 5, "lr": 0.5, "resume": False, "batch-size": 8, "synthetic": True}
    components = server_fn(**flags)
    assert (components.config.num_rounds, components.config.round_timeout) == (5, None)
    assert components.server.args.lr == 0.5
    components.server.lock.release()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("rounds", 0, "argument --rounds: 0 is not between"),
        ("rounds", "two", "argument --rounds: invalid int value: 'two'"),
        ("resume", 1, "argument --resume: ignored explicit argument '1'"),
        ("batchsize", 8, "unknown key 'batchsize' in the config (did you mean 'batch-size'?)"),
        ("batch", 8, "unknown key 'batch' in the config (did you mean 'batch-size'?)"),
        ("min-client", 8, "unknown key 'min-client' in the config (did you mean 'min-clients'?)"),
    ],
)
def test_wrong_config_of_the_engine_is_an_error_that_it_shows(key, value, message):
    """Of what exits instead, as argparse does, the engine shows nothing."""
    with pytest.raises(cifar.UserError, match=f"^{re.escape(message)}"):
        server_fn(**{"seed": 1, key: value})


# Strategies: Flower's, and your own.


class Recording(strategies.FedAvg):
    """Records its arguments."""

    def aggregate_fit(self, server_round, results, failures):
        self.fit = (server_round, len(results), failures)
        return super().aggregate_fit(server_round, results, failures)

    def aggregate_evaluate(self, server_round, results, failures):
        self.evaluated = (server_round, len(results), failures)
        return super().aggregate_evaluate(server_round, results, failures)


def test_strategy_sees_lost_clients_and_rejected_results(make, use_strategy):
    use_strategy(Recording)
    bad, lost = evaluate_res(-1.0), GrpcBridgeClosed()
    made = make(Client(), Client(fit_res([]), bad), Client(lost, lost), Client(CANNOT))
    assert made.run_round()["clients"] == 1
    *counts, failures = made.strategy.fit
    failures.remove(lost)
    assert counts == [1, 1]
    assert sorted(each.cid for each, _ in failures) == ["client-1", "client-3"]
    *counts, failures = made.strategy.evaluated
    failures.remove(lost)
    ((rejecting, result),) = failures
    assert counts == [1, 2]
    assert (rejecting.cid, result) == ("client-1", bad)


def test_strategy_that_accepts_no_failures_fails_the_round(make, use_strategy, capsys, tmp_path):
    """Rounds with lost clients are retried without limit; those with rejected updates are not."""
    use_strategy(strategies.FedAvg, accept_failures=False)
    update = each_time(*[GrpcBridgeClosed()] * 4, fit_res(weights()), *[fit_res([])] * 3)
    made = make(Client(), Client(update))
    made.fit(1, None)
    failed = "failed (the strategy returned no parameters), global model unchanged"
    assert capsys.readouterr().out.count(f"Round 1/3: {failed}, trying again\n") == 4
    with pytest.raises(cifar.UserError, match="Giving up"):
        made.fit(2, None)
    assert f"Round 2/3: {failed}, attempt 3 of 3\n" in capsys.readouterr().out


def test_strategy_evaluates_the_initial_model_and_each_round(make, use_strategy, capsys, tmp_path):
    calls = []

    def evaluate_fn(server_round, arrays, config):
        calls.append((server_round, float(arrays[1][0])))
        return np.float32(0.5), {"f1": np.float64(server_round / 4)}

    use_strategy(strategies.FedAvg, evaluate_fn=evaluate_fn)
    made = make(Client(fit_res(weights(1))))
    first = float(arrays_of(made)[1][0])
    made.fit(2, None)
    trained = float(weights(1)[1][0])
    assert calls == [(0, first), (1, trained), (2, trained)]
    out = capsys.readouterr().out
    assert 'Initial model: centralized {"loss": 0.5, "f1": 0.0}\n' in out
    assert 'Round 2/3: centralized {"loss": 0.5, "f1": 0.5}\n' in out
    centralized = [record["centralized"] for record in history(tmp_path / "model.pt")]
    assert centralized == [{"loss": 0.5, "f1": 0.25}, {"loss": 0.5, "f1": 0.5}]
    calls.clear()
    make(Client(fit_res(weights(1))), flags=["--resume"]).fit(3, None)
    assert calls == [(3, trained)]


def test_strategy_initializes_parameters_once_clients_can_join(make, use_strategy):
    class Asking(strategies.FedAvg):
        def initialize_parameters(self, client_manager):
            self.available = client_manager.num_available()
            return ndarrays_to_parameters(weights(7))

    use_strategy(Asking)
    made = make(Client(each_time(fit_res([]), fit_res([]), fit_res([]))))
    with pytest.raises(cifar.UserError, match="Giving up"):
        made.fit(1, None)
    assert made.strategy.available == 1
    assert_equal(arrays_of(made), weights(7))


def test_metrics_of_the_strategy_are_printed_and_saved(make, use_strategy, capsys, tmp_path):
    def metrics_fn(metrics):
        norms = np.array([each["norm"] for _, each in metrics])
        total = np.float32(sum(n * each["norm"] for n, each in metrics))
        return {"norm": total, "norms": np.sort(norms)}

    use_strategy(strategies.FedAvg, fit_metrics_aggregation_fn=metrics_fn)
    clients = [Client(fit_res(weights(), n, norm=norm)) for n, norm in ((10, 0.5), (1, 0.25))]
    make(*clients).fit(1, None)
    assert history(tmp_path / "model.pt")[0]["fit_metrics"] == {"norm": 5.25, "norms": [0.25, 0.5]}
    line = 'Round 1/3: fit_metrics {"norm": 5.25, "norms": [0.25, 0.5]}\n'
    assert line in capsys.readouterr().out


def test_scalars_of_numpy_and_pytorch_are_numbers(
    make, use_strategy, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(server, "average_accuracy", lambda metrics: {"accuracy": np.float32(0.5)})
    training = {"accuracy": torch.tensor(0.75)}
    use_strategy(strategies.FedAvg, fit_metrics_aggregation_fn=lambda metrics: training)
    make(Client()).fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    assert (record["accuracy"], record["fit_metrics"]) == (0.5, {"accuracy": 0.75})
    shown = [line for line in capsys.readouterr().out.splitlines() if "metrics" in line]
    assert shown == ['Round 1/3: fit_metrics {"accuracy": 0.75}']


def test_strategy_gets_the_printed_round_number(make, use_strategy, capsys, tmp_path):
    rounds = []

    def config(server_round):
        rounds.append(server_round)
        return {"lr": 0.5}

    use_strategy(strategies.FedAvg, on_fit_config_fn=config)
    make(Client()).fit(1, None)
    capsys.readouterr()
    make(Client(), flags=["--resume"]).fit(3, None)
    assert rounds == [1, 2, 3]
    training = [line for line in capsys.readouterr().out.splitlines() if "training on" in line]
    assert [line[:9] for line in training] == ["Round 2/3", "Round 3/3"]
    assert history(tmp_path / "model.pt")[2]["config"] == {"lr": 0.5}


def test_strategy_forgets_a_failed_round(make, use_strategy):
    """FedAdam's state would carry the discarded aggregate into the next round."""
    use_strategy(strategies.FedAdam, eta=0.1)

    def run(*rounds):
        updates = [fit_res(weights(seed)) for seed, _ in rounds]
        made = make(Client(each_time(*updates), each_time(*[test for _, test in rounds])))
        made.fit(1, None)
        return arrays_of(made)

    good, bad = (1, evaluate_res()), (5, evaluate_res(np.nan))
    assert_equal(run(bad, good), run(good))


def test_strategy_keeps_its_state_if_clients_are_lost(make, use_strategy):
    use_strategy(strategies.FedAdam, eta=0.1)

    def run(*updates):
        made = make(Client(each_time(*updates)))
        made.fit(2, None)
        return arrays_of(made)

    first, second = fit_res(weights(1)), fit_res(weights(2))
    assert_equal(run(first, GrpcBridgeClosed(), second), run(first, second))


def test_strategy_may_hold_clients_and_locks(make, use_strategy):
    class Holding(strategies.FedAvg):
        lock, clients = threading.Lock(), []

        def aggregate_fit(self, server_round, results, failures):
            self.clients += [each for each, _ in results]
            return super().aggregate_fit(server_round, results, failures)

    use_strategy(Holding)
    trained = Client()
    made = make(trained)
    made.fit(2, None)
    assert made.strategy.clients == [trained, trained]


BAD_AGGREGATES = [
    (lambda: None, "the strategy returned no parameters"),
    (lambda: weights()[:8], "fc3.weight is missing: got 8 of 10 parameters"),
    (lambda: [array.astype(float) * 1e300 for array in weights()], "NaN or infinity in conv1.w"),
    (lambda: [array * np.nan for array in weights()], "NaN or infinity in conv1.weight"),
]


@pytest.mark.parametrize("aggregate, reason", BAD_AGGREGATES)
def test_bad_aggregate_fails_the_round(make, use_strategy, capsys, tmp_path, aggregate, reason):
    class Wrong(strategies.FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            arrays = aggregate()
            return arrays and ndarrays_to_parameters(arrays), {}

    use_strategy(Wrong)
    made = make(Client())
    made.fit(0, None)
    before = files_in(tmp_path)
    with pytest.raises(cifar.UserError, match="Giving up"):
        made.fit(1, None)
    out = capsys.readouterr().out
    assert f"failed ({reason}" in out and "global model unchanged, attempt 1 of 3" in out
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("settings, count", [({}, 1), ({"min_available_clients": 3}, 2)])
def test_strategy_that_asks_for_more_clients_fails_the_round(make, monkeypatch, settings, count):
    """Flower's own client manager would wait a day for them."""
    monkeypatch.setattr(server, "make_strategy", lambda *args: strategies.FedAvg(**settings))
    made = make(*[Client() for _ in range(count)])
    with pytest.raises(cifar.UserError, match=f"the strategy chose none of {count} clients"):
        made.run_round()


def test_fraction_of_the_clients_is_trained(make, use_strategy, capsys):
    use_strategy(strategies.FedAvg, fraction_fit=0.5)
    clients = [Client() for _ in range(4)]
    assert make(*clients).run_round()["clients"] == 2
    assert sorted(len(each.fits) for each in clients) == [0, 0, 1, 1]
    assert [len(each.tests) for each in clients] == [1, 1, 1, 1]
    assert "Round 1/3: training on 2 of 4 clients\n" in capsys.readouterr().out


def test_strategy_may_have_nobody_evaluate(make, use_strategy):
    class NoEvaluation(strategies.FedAvg):
        def configure_evaluate(self, *args):
            return None  # Flower takes it for an empty list

    use_strategy(NoEvaluation)
    only = Client()
    record = make(only).run_round()
    assert (record["clients"], record["loss"], record["accuracy"]) == (1, None, None)
    assert only.tests == []


def fed_avg_m(**settings):
    strategy = strategies.FedAvgM(server_momentum=0.5, **settings)
    strategy.momentum_vector = [np.zeros_like(array) for array in weights()]  # for --resume
    return strategy


def q_fed_avg(**settings):
    return strategies.QFedAvg(evaluate_fn=lambda server_round, *args: (1.0, {}), **settings)


def with_privacy(kind, **privacy):
    def make_strategy(**settings):
        return kind(strategies.FedAvg(**settings), 0.1, num_sampled_clients=3, **privacy)

    return make_strategy


class Halving(strategies.FedAvg):
    """A custom strategy."""

    def aggregate_fit(self, server_round, results, failures):
        aggregate, metrics = super().aggregate_fit(server_round, results, failures)
        return ndarrays_to_parameters([array / 2 for array in arrays_of(aggregate)]), metrics


STRATEGIES = {
    "FedAvg": strategies.FedAvg,
    "FedAvgM": fed_avg_m,
    "FedAdam": strategies.FedAdam,
    "FedYogi": strategies.FedYogi,
    "FedMedian": strategies.FedMedian,
    "FedTrimmedAvg": strategies.FedTrimmedAvg,
    "Krum": lambda **settings: strategies.Krum(num_malicious_clients=0, **settings),
    "QFedAvg": q_fed_avg,
    "FedProx": lambda **settings: strategies.FedProx(proximal_mu=0.1, **settings),
    "DifferentialPrivacyServerSideFixedClipping": with_privacy(
        strategies.DifferentialPrivacyServerSideFixedClipping, clipping_norm=1.0
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": with_privacy(
        strategies.DifferentialPrivacyServerSideAdaptiveClipping
    ),
    "Halving": Halving,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_runs_and_its_aggregate_is_evaluated_and_saved(make, tmp_path, use_strategy, name):
    use_strategy(STRATEGIES[name])
    clients = [Client(fit_res(weights(seed))) for seed in (1, 2, 3)]
    made = make(*clients)
    initial = arrays_of(made)
    made.fit(1, None)
    middle = arrays_of(made)
    assert not np.array_equal(middle[0], initial[0])
    made = make(*clients, flags=["--resume"])
    made.fit(2, None)
    assert [record["strategy"] for record in history(tmp_path / "model.pt")] == [name] * 2
    saved = cifar.get_parameters(cifar.load_model(tmp_path / "model.pt"))
    assert_equal(arrays_of(made), saved)
    for each in clients:
        _, second_fit = each.fits
        first_test, second_test = each.tests
        assert_equal(arrays_of(second_fit), middle)
        assert_equal(arrays_of(first_test), middle)
        assert_equal(arrays_of(second_test), saved)
    if name == "Halving":
        mean = np.mean([weights(seed)[1] for seed in (1, 2, 3)], axis=0)
        np.testing.assert_allclose(saved[1], mean / 2, rtol=1e-5)


def test_private_strategy_waits_for_a_complete_round(make, use_strategy, capsys, tmp_path):
    """Flower's differential privacy returns no parameters if a client was lost."""
    use_strategy(STRATEGIES["DifferentialPrivacyServerSideFixedClipping"])
    good = fit_res(weights())
    lost = Client(each_time(GrpcBridgeClosed(), good, GrpcBridgeClosed(), good))
    make(lost, Client(), Client()).fit(2, None)
    assert [record["clients"] for record in history(tmp_path / "model.pt")] == [3, 3]
    failed = "failed (the strategy returned no parameters), global model unchanged, trying again"
    out = capsys.readouterr().out
    assert out.count(failed) == 2 and "attempt" not in out


# Joining clients.


class Answering(Client, GrpcClientProxy):
    """A client that answers get_properties() once `ready` is set."""

    def __init__(self, answer=None):
        super().__init__()
        self.reply, self.ready, self.asked = answer, threading.Event(), threading.Event()

    def get_properties(self, ins, timeout, group_id):
        self.asked.set()
        assert self.ready.wait(60)
        if self.reply:
            raise self.reply
        return types.SimpleNamespace(properties={"client": "laptop-7"})


def joined(manager, joining):
    """Register the client; return who is listed before and after it has answered."""
    others = set(threading.enumerate())
    assert manager.register(joining)
    assert joining.asked.wait(60)
    before = dict(manager.all())
    joining.ready.set()
    for thread in set(threading.enumerate()) - others:
        thread.join(60)
    return before, dict(manager.all())


def test_client_is_listed_once_it_has_answered():
    joining = Answering()
    before, after = joined(server.Clients(), joining)
    assert (before, after) == ({}, {joining.cid: joining})
    assert joining.properties == {"client": "laptop-7"}


def test_client_that_left_while_it_joined_is_not_listed():
    assert joined(server.Clients(), Answering(GrpcBridgeClosed())) == ({}, {})


def test_clients_may_leave_while_others_are_chosen():
    class Leaving:
        def select(self, client):
            manager.unregister(known["0"])
            return True

    manager = server.Clients()
    known = {cid: Client(cid=cid) for cid in "012"}
    for each in known.values():
        manager.register(each)
    assert sorted(each.cid for each in manager.sample(3, 1, Leaving())) == sorted(known)
    for cid in manager.all():  # as Flower does to disconnect them
        manager.unregister(known[cid])
    assert manager.all() == {}


def test_lost_client_is_no_longer_listed(make):
    """Flower does not always notice that a client has left."""
    made = make(Client(GrpcBridgeClosed()), Client(), manager=server.Clients)
    made.run_round()
    assert list(made.client_manager().all()) == ["client-1"]
