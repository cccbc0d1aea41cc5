"""server.py: its rounds, what it refuses, and what it keeps; with clients in this process."""

import hashlib
import io
import json
import os
import threading
import time
import types

import numpy as np
import pytest
import torch
from flwr.common import (
    Code,
    EvaluateRes,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed

import cifar
import server

OK = Status(Code.OK, "")


def weights(seed=0):
    random = np.random.RandomState(seed)
    shapes = [value.shape for value in cifar.Net().state_dict().values()]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


class Client(ClientProxy):
    """A client that answers each fit() with `update`, each evaluate() with `test`."""

    def __init__(self, update=None, test=None, cid="0123456789abcdef"):
        super().__init__(cid)
        self.update, self.test = update or fit_res(weights()), test or evaluate_res()
        self.asked = []

    def answer(self, kind, ins, answer):
        self.asked.append((kind, ins))
        if isinstance(answer, Exception):
            raise answer
        return answer(ins) if callable(answer) else answer

    def fit(self, ins, timeout, group_id):
        return self.answer("fit", ins, self.update)

    def evaluate(self, ins, timeout, group_id):
        return self.answer("evaluate", ins, self.test)

    def get_properties(self, ins, timeout, group_id):
        raise NotImplementedError

    get_parameters = reconnect = get_properties


def fit_res(arrays, num_examples=10, **metrics):
    return FitRes(OK, ndarrays_to_parameters(arrays), num_examples, metrics)


def evaluate_res(loss=1.0, num_examples=10, accuracy=0.5, **metrics):
    return EvaluateRes(OK, loss, num_examples, {"accuracy": accuracy, **metrics})


@pytest.fixture
def make(tmp_path):
    """Make a server that keeps its model in an empty folder, with these clients connected."""
    servers = []

    def make_server(*clients, flags=(), path=tmp_path / "model.pt", kind=server.CifarServer):
        for made in servers:  # of this process; a server that has ended has freed its lock
            made.lock.release()
        arguments = ["--model", path, "--min-clients", max(1, len(clients)), "--seed", 1, *flags]
        args = server.make_parser().parse_args(list(map(str, arguments)))
        servers.append(kind(args, SimpleClientManager()))
        for number, client in enumerate(clients):
            client.cid = f"{number}{client.cid}"
            servers[-1].client_manager().register(client)
        return servers[-1]

    return make_server


def history(path):
    return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def use_strategy(monkeypatch, kind, **settings):
    """Have the server make this strategy of Flower's, as make_strategy() makes its own."""

    def make_strategy(parameters, config):
        return kind(
            min_fit_clients=1,
            min_evaluate_clients=1,
            min_available_clients=1,
            initial_parameters=parameters,
            evaluate_metrics_aggregation_fn=server.average_accuracy,
            **settings,
        )

    monkeypatch.setattr(server, "make_strategy", make_strategy)


def arrays_of(made):
    return parameters_to_ndarrays(made.parameters)


# The round.


def test_average_is_weighted_by_examples(make):
    first, second, third = weights(1), weights(2), weights(3)
    given = [fit_res(first, 1), fit_res(second, 2), fit_res(third, 5)]
    made = make(*map(Client, given))
    made.run_round(None)
    for ours, a, b, c in zip(arrays_of(made), first, second, third):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, (a + 2 * b + 5 * c) / 8, rtol=1e-5, atol=1e-6)


def test_clients_train_the_global_model_and_test_the_average(make):
    clients = [Client(fit_res(weights(1))), Client(fit_res(weights(1)))]
    made = make(*clients, flags=["--lr", 0.5, "--local-epochs", 7])
    before = arrays_of(made)
    made.run_round(None)
    for client in clients:
        (fit, fit_ins), (evaluate, evaluate_ins) = client.asked
        assert (fit, evaluate) == ("fit", "evaluate")
        assert fit_ins.config == {"lr": 0.5, "local_epochs": 7}
        for sent, ours in zip(parameters_to_ndarrays(fit_ins.parameters), before):
            np.testing.assert_array_equal(sent, ours)
        for sent, ours in zip(parameters_to_ndarrays(evaluate_ins.parameters), weights(1)):
            np.testing.assert_allclose(sent, ours, rtol=1e-6)


def test_average_does_not_depend_on_who_answers_first(make, monkeypatch):
    def run(order):
        given = [fit_res(weights(seed), seed + 1) for seed in range(5)]
        made = make(*map(Client, given))
        fit_clients = server.fit_clients
        with monkeypatch.context() as patch:
            patch.setattr(
                server, "fit_clients", lambda *args: (sorted(fit_clients(*args)[0], key=order), [])
            )
            made.run_round(None)
        return arrays_of(made)

    there = run(lambda result: result[1].num_examples)
    back = run(lambda result: -result[1].num_examples)
    for one, other in zip(there, back):
        np.testing.assert_array_equal(one, other)


def test_integers_are_averaged_in_their_own_type(make, monkeypatch):
    """BatchNorm counts its batches; an index must come out as what it is; so must truth."""

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
        return [value.numpy() for value in net.state_dict().values()]

    made = make(Client(fit_res(trained(10), 50_000)), Client(fit_res(trained(13), 25_000)))
    made.run_round(None)
    state_dict = dict(zip(Net().state_dict(), arrays_of(made)))
    assert state_dict["norm.num_batches_tracked"] == 11
    assert state_dict["norm.num_batches_tracked"].dtype == np.int64
    assert state_dict["index"].tolist() == [2, 0, 1]
    assert state_dict["mask"].tolist() == [True, False]


def with_array(value, position=2):
    arrays = weights()
    arrays[position] = value
    return arrays


def with_value(value):
    arrays = weights()
    arrays[9].flat[0] = value
    return arrays


def archive():
    content = io.BytesIO()
    np.savez(content, a=np.zeros(1))
    return content.getvalue()


BAD_UPDATES = {
    "NaN or infinity in fc3.bias": lambda: fit_res(with_value(np.nan)),
    "NaN or infinity in fc3.bias ": lambda: fit_res(with_value(-np.inf)),
    "conv2.weight: expected float32(16, 6, 5, 5), got float32(16, 6, 5) ": lambda: fit_res(
        with_array(weights()[2][..., 0])
    ),
    "conv2.weight: expected float32(16, 6, 5, 5), got float64(16, 6, 5, 5)": lambda: fit_res(
        with_array(weights()[2].astype(float))
    ),
    "conv2.weight: expected float32(16, 6, 5, 5), got int64(16, 6, 5, 5)": lambda: fit_res(
        with_array(np.zeros((16, 6, 5, 5), int))
    ),
    "fc3.bias is missing: got 9 of 10 parameters": lambda: fit_res(weights()[:-1]),
    "expected 10 parameters, got 11": lambda: fit_res(weights() + weights()[-1:]),
    "conv1.weight is missing: got 0 of 10 parameters": lambda: fit_res([]),
    "fc3.bias: 1001 is implausible (limit 1000)": lambda: fit_res(with_value(-1001)),
    "0 examples": lambda: fit_res(weights(), 0),
    "-5 examples": lambda: fit_res(weights(), -5),
    "1000000001 examples": lambda: fit_res(weights(), 10**9 + 1),
    "unreadable parameters": lambda: FitRes(OK, Parameters([b"x"] * 10, "numpy.ndarray"), 1, {}),
    "unreadable parameters ": lambda: FitRes(
        OK, Parameters([archive()] * 10, "numpy.ndarray"), 1, {}
    ),
    "unreadable parameters  ": lambda: FitRes(
        OK, Parameters([ndarrays_to_parameters(weights()).tensors[0][:-8]] * 10, ""), 1, {}
    ),
    "FIT_NOT_IMPLEMENTED, cannot": lambda: FitRes(
        Status(Code.FIT_NOT_IMPLEMENTED, "cannot"), Parameters([], ""), 0, {}
    ),
}


@pytest.mark.parametrize("reason", BAD_UPDATES)
def test_bad_update_is_refused_and_the_others_are_averaged(make, capsys, reason):
    bad = BAD_UPDATES[reason]()
    bad.metrics["client"] = "laptop-7"
    made = make(Client(bad), Client(fit_res(weights(1), 3)))
    assert made.run_round(None)["clients"] == 1
    for ours, theirs in zip(arrays_of(made), weights(1)):
        np.testing.assert_array_equal(ours, theirs)
    line = f"Round 1/3: update from client 'laptop-7' rejected: {reason.strip()}"
    assert line in capsys.readouterr().out


def test_a_million_arrays_are_not_decoded(make, monkeypatch):
    decoded = []
    original = server.read_array
    monkeypatch.setattr(
        server, "read_array", lambda *args, **kwargs: decoded.append(1) or original(*args, **kwargs)
    )
    tensors = ndarrays_to_parameters(weights()).tensors * 100_000
    flood = FitRes(OK, Parameters(tensors, "numpy.ndarray"), 1, {})
    assert make(Client(flood), Client()).run_round(None)["clients"] == 1
    assert len(decoded) == 11 + 10


def test_largest_plausible_update_and_count_are_accepted(make):
    made = make(Client(fit_res(with_value(-1000), 10**9)))
    assert made.run_round(None)["clients"] == 1
    made.parameters = ndarrays_to_parameters(with_value(-2000))  # the limit grows with the model
    next(iter(made.client_manager().all().values())).update = fit_res(with_value(1_999_000))
    assert made.run_round(None)["clients"] == 1


def test_client_that_drops_out_is_named(make, capsys):
    made = make(Client(GrpcBridgeClosed()), Client(), Client(test=GrpcBridgeClosed()))
    record = made.run_round(None)
    assert (record["clients"], record["loss"]) == (2, 1.0)
    out = capsys.readouterr().out
    for number in (0, 2):
        line = f"Round 1/3: client '{number}0123456789abcdef' lost: disconnected\n"
        assert out.count(line) == 1
    assert out.count(" lost: ") == 2


@pytest.mark.parametrize("seconds, reason", [(9, "disconnected"), (11, "timed out after 10 s")])
def test_client_that_timed_out_is_named(make, capsys, seconds, reason):
    def update(ins):
        late.disconnected = time.monotonic() + seconds  # in place of the time that this takes
        raise GrpcBridgeClosed

    late = Client(update)
    assert make(late, Client()).run_round(10)["clients"] == 1
    assert f"client '00123456789abcdef' lost: {reason}\n" in capsys.readouterr().out


def test_evaluation_is_weighted_by_examples(make):
    made = make(
        Client(test=evaluate_res(1.0, 1, 0.1)), Client(test=evaluate_res(2.0, 3, accuracy=0.5))
    )
    record = made.run_round(None)
    assert (record["loss"], record["accuracy"]) == (1.75, pytest.approx(0.4))
    assert list(record) == [
        *["round", "loss", "accuracy", "clients", "seconds", "data", "metrics", "fit_metrics"],
        *["centralized", "strategy", "config", "date", "versions"],
    ]
    assert record["metrics"] == {"accuracy": pytest.approx(0.4)}
    assert (record["fit_metrics"], record["centralized"]) == ({}, {})
    assert record["strategy"] == "FedAvg"
    assert record["config"] == {"lr": cifar.LEARNING_RATE, "local_epochs": 1}
    assert record["versions"] == {"flwr": server.fl.__version__, "torch": torch.__version__}
    assert record["date"].startswith("20") and record["date"].endswith("+00:00")
    assert record["clients"] == 2 and record["seconds"] >= 0


@pytest.mark.parametrize(
    "bad, reason",
    [
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
    ],
)
def test_bad_evaluation_is_rejected(make, capsys, bad, reason):
    record = make(Client(test=bad), Client(test=evaluate_res(2.0, accuracy=0.25))).run_round(None)
    assert (record["loss"], record["accuracy"]) == (2.0, 0.25)
    line = f"evaluation from client '00123456789abcdef' rejected: {reason}\n"
    assert line in capsys.readouterr().out


def test_evaluation_without_accuracy_is_averaged(make, capsys):
    blind = EvaluateRes(OK, 1.0, 10, {})
    record = make(Client(test=blind), Client(test=evaluate_res(2.0, 10, 0.25))).run_round(None)
    assert (record["loss"], record["accuracy"]) == (1.5, 0.25)
    made = make(Client(test=blind))
    made.fit(1, None)
    assert history(made.args.model)[0]["accuracy"] is None
    assert "Round 1/3: loss 1.0000, accuracy -, clients 1, " in capsys.readouterr().out


def test_whole_accuracy_is_accepted(make):
    assert make(Client(test=evaluate_res(accuracy=1))).run_round(None)["accuracy"] == 1


@pytest.mark.parametrize("where", ["client", "message", "accuracy", "data"])
def test_nothing_that_a_client_sends_controls_the_terminal(make, capsys, where):
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
    record = make(Client(update, test), Client()).run_round(None)
    assert len(record["data"]) <= 100
    out = capsys.readouterr().out
    assert "title" in out, "it is shown"
    assert all(character.isprintable() or character == "\n" for character in out)
    assert not [line for line in out.splitlines() if line.startswith("Round 3/3")]
    assert max(map(len, out.splitlines())) < 2500


# What the clients hold.


def holding(data, part, client, classes="a b"):
    update = fit_res(weights(), client=client, data=data, partition=part, classes=classes)
    return Client(update)


def test_what_a_client_holds_is_said_once(make, capsys):
    made = make(
        holding("CIFAR-10 in 2 parts, alpha none", "partition 0", "a"),
        holding("CIFAR-10 in 2 parts, alpha none", "partition 1", "b"),
    )
    made.fit(2, None)
    out = capsys.readouterr().out
    for client, part in (("a", 0), ("b", 1)):
        line = f"client '{client}': CIFAR-10 in 2 parts, alpha none, partition {part}\n"
        assert out.count(line) == 1
    assert "Warning" not in out
    assert history(made.args.model)[1]["data"] == "CIFAR-10 in 2 parts, alpha none"


def test_clients_that_all_hold_everything_are_no_reason_to_warn(make, capsys):
    made = make(holding("CIFAR-10", "all", "a"), holding("CIFAR-10", "all", "b"))
    assert made.run_round(None)["data"] == "CIFAR-10"
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "first, second, warning",
    [
        (("X", "all"), ("Y", "all"), "the clients' data differ: X / Y"),
        (("X", "partition 0"), ("X", "partition 0"), "2 clients use partition 0 of X"),
        (("X, 2 parts", "partition 0"), ("X, 3 parts", "partition 1"), "X, 2 parts / X, 3 parts"),
        (("X", "all", "a", "cat dog"), ("X", "all", "b", "dog cat"), "classes differ: cat dog / d"),
    ],
)
def test_clients_that_do_not_fit_together_are_averaged_with_a_warning(
    make, capsys, first, second, warning
):
    made = make(*[holding(*each, *"ab"[len(each) - 2 : 1]) for each in (first, second)])
    made.fit(2, None)
    out = capsys.readouterr().out
    assert out.count("Warning: ") == 1 and warning in out
    assert [record["clients"] for record in history(made.args.model)] == [2, 2]


# Rounds of which nothing comes.


def test_failed_round_is_tried_again_but_not_for_ever(make, capsys):
    client = Client(TypeError("no such key"))
    made = make(client)
    before = arrays_of(made)
    with pytest.raises(cifar.UserError) as error:
        made.fit(3, None)
    todo = "Restart with --resume to continue."
    assert str(error.value) == f"Giving up after 3 failed attempts. {todo}"
    assert [kind for kind, _ in client.asked] == ["fit"] * 3
    out = capsys.readouterr().out
    for attempt in (1, 2, 3):
        reason = "failed (TypeError: no such key), global model unchanged"
        assert out.count(f"Round 1/3: {reason}, attempt {attempt} of 3\n") == 1
    for ours, kept in zip(arrays_of(made), before):
        np.testing.assert_array_equal(ours, kept)
    assert history(made.args.model) == []


def test_lost_clients_are_no_failed_attempt(make, capsys):
    answers = iter([GrpcBridgeClosed()] * 5)

    def update(ins):
        if error := next(answers, None):
            raise error
        return fit_res(weights(1))

    made = make(Client(update))
    made.fit(1, None)
    out = capsys.readouterr().out
    line = "failed (no usable updates), global model unchanged, trying again\n"
    assert out.count(line) == 5 and "attempt" not in out
    assert len(history(made.args.model)) == 1


def test_rejected_update_beside_a_lost_client_is_a_failed_attempt(make):
    with pytest.raises(cifar.UserError, match="^no usable updates$") as error:
        make(Client(fit_res([])), Client(GrpcBridgeClosed())).run_round(None)
    assert type(error.value) is cifar.UserError


def test_rounds_that_came_to_nothing_are_counted_only_in_a_row(make):
    answers = iter([ValueError(), ValueError(), 1, ValueError(), ValueError(), 2, 3])

    def update(ins):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return fit_res(weights(answer))

    made = make(Client(update))
    made.fit(3, None)
    assert [record["round"] for record in history(made.args.model)] == [1, 2, 3]


def test_average_that_nobody_can_test_is_not_kept(make, capsys):
    """One plausible update of 900 makes a model whose loss is not a number, for every client."""

    def test(ins):
        largest = max(np.abs(array).max() for array in parameters_to_ndarrays(ins.parameters))
        return evaluate_res(np.nan if largest > 100 else 1.0)

    huge = Client(fit_res([value * 0 + np.float32(900) for value in weights()]), test)
    made = make(huge, Client(fit_res(weights(1)), test))
    before = arrays_of(made)
    with pytest.raises(cifar.UserError, match="most clients cannot evaluate the aggregate"):
        made.run_round(None)
    for ours, kept in zip(arrays_of(made), before):
        np.testing.assert_array_equal(ours, kept)
    made.client_manager().unregister(huge)
    made.args.min_clients = 1
    made.fit(1, None)
    for ours, theirs in zip(arrays_of(made), weights(1)):
        np.testing.assert_array_equal(ours, theirs)


def test_strategy_forgets_the_round_of_which_nothing_came(make, monkeypatch):
    """FedAdam keeps a state of its own, which would carry a lost average into the next round."""

    use_strategy(monkeypatch, server.fl.server.strategy.FedAdam, eta=0.1)

    def run(*rounds):
        client = Client()
        made = make(client)
        for seed, loss in rounds:
            client.update, client.test = fit_res(weights(seed)), evaluate_res(loss)
            if np.isnan(loss):
                with pytest.raises(cifar.UserError):
                    made.run_round(None)
            else:
                made.run_round(None)
        return arrays_of(made)

    for ours, kept in zip(run((5, np.nan), (1, 1.0)), run((1, 1.0))):
        np.testing.assert_array_equal(ours, kept)


@pytest.mark.parametrize("value", [1e300, np.nan])
def test_average_that_is_not_finite_leaves_the_model(make, monkeypatch, value):
    made = make(Client())
    before = arrays_of(made)
    huge = ndarrays_to_parameters([array.astype(float) * value for array in weights()])
    monkeypatch.setattr(type(made.strategy), "aggregate_fit", lambda *args: (huge, {}))
    with pytest.raises(cifar.UserError, match="NaN or infinity in conv1"):
        made.run_round(None)
    for ours, kept in zip(arrays_of(made), before):
        np.testing.assert_array_equal(ours, kept)


def test_average_is_kept_untested_if_nobody_is_left(make):
    made = make(Client(fit_res(weights(1))))
    manager = made.client_manager()
    client = next(iter(manager.all().values()))
    client.update = lambda ins: manager.unregister(client) or fit_res(weights(1))
    made.fit(1, None)
    (record,) = history(made.args.model)
    assert (record["loss"], record["accuracy"], record["clients"]) == (None, None, 1)
    assert server.table_row(record)[1:4] == ["-", "-", "1"]
    np.testing.assert_array_equal(arrays_of(made)[1], weights(1)[1])


# Waiting.


def test_waiting_ends_when_there_are_enough(capsys):
    manager = SimpleClientManager()
    joining = iter([Client(cid="a"), Client(cid="b"), None])

    def wait_for(num_clients, timeout):
        """Let a client join, in place of the time that this takes."""
        client = next(joining)
        manager.register(client)

    manager.wait_for = wait_for
    assert set(server.wait_for_clients(manager, 2).all()) == {"a", "b"}
    assert next(joining) is None
    waiting = [f"Waiting for clients: {count} of 2 connected" for count in (0, 1)]
    assert capsys.readouterr().out.splitlines() == waiting


def test_clients_of_a_round_stay_though_one_leaves():
    """Flower's own sampling would fail, or wait for a day, if one left in the middle of it."""
    manager = SimpleClientManager()
    for cid in "ab":
        manager.register(Client(cid=cid))
    clients = server.wait_for_clients(manager, 2)
    manager.unregister(Client(cid="a"))
    assert {client.cid for client in clients.sample(2)} == {"a", "b"}


# Keeping and resuming.


def test_model_is_a_plain_state_dict_written_after_every_round(make, tmp_path):
    client = Client()
    made = make(client)
    for seed in (1, 2):
        client.update = fit_res(weights(seed))
        made.fit(seed, None)
        state_dict = torch.load(tmp_path / "model.pt", weights_only=True)
        cifar.Net().load_state_dict(state_dict)
        for value, expected in zip(state_dict.values(), weights(seed)):
            np.testing.assert_array_equal(value.numpy(), expected)
        assert len(history(tmp_path / "model.pt")) == seed
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["model.json", "model.lock", "model.pt"]


def test_first_weights_are_the_seeds(make, tmp_path):
    models = [
        arrays_of(make(flags=["--seed", seed], path=tmp_path / f"{i}.pt"))[0]
        for i, seed in enumerate([5, 5, 6])
    ]
    assert np.array_equal(models[0], models[1]) and not np.array_equal(models[0], models[2])


def test_resume_goes_on_after_the_last_round(make, tmp_path):
    make(Client(fit_res(weights(1)))).fit(1, None)
    made = make(Client(fit_res(weights(2))), flags=["--resume"])
    np.testing.assert_array_equal(arrays_of(made)[0], weights(1)[0])
    made.fit(2, None)
    assert [record["round"] for record in history(tmp_path / "model.pt")] == [1, 2]
    np.testing.assert_array_equal(arrays_of(made)[0], weights(2)[0])


def test_killed_between_history_and_model_repeats_the_round(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    client = Client(fit_res(weights(1)))
    made = make(client)
    made.fit(1, None)
    before = path.read_bytes()
    client.update = fit_res(weights(2))
    made.fit(2, None)
    path.write_bytes(before)
    made = make(Client(fit_res(weights(3))), flags=["--resume"])
    assert [record["round"] for record in made.history] == [1]
    made.fit(2, None)
    first, second = history(path)
    assert (first["round"], second["round"]) == (1, 2)
    assert first["model"] == hashlib.sha256(before).hexdigest()
    assert second["model"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "Warning" not in capsys.readouterr().out


def test_another_model_beside_the_history_is_resumed_with_a_warning(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    make(Client(fit_res(weights(1)))).fit(2, None)
    net = cifar.Net()
    path.write_bytes(cifar.to_bytes(net))
    made = make(flags=["--resume"])
    assert f"Warning: {path} is not the model of a round in" in capsys.readouterr().out
    assert len(made.history) == 2
    np.testing.assert_array_equal(arrays_of(made)[0], cifar.get_parameters(net)[0])


def test_killed_before_the_first_round_can_resume(make):
    first = arrays_of(make(flags=["--seed", 3]))
    np.testing.assert_array_equal(arrays_of(make(flags=["--resume"]))[4], first[4])


def save_nan(path):
    net = cifar.Net()
    net.fc3.bias.data[0] = np.nan
    path.write_bytes(cifar.to_bytes(net))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "Cannot read the model .*No such file"),
        (
            lambda path: path.write_bytes(b"junk"),
            "is not a state_dict of cifar.Net: not a model file",
        ),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-100]),
            "is not a state_dict of cifar.Net: not a model file",
        ),
        (lambda path: save_nan(path), "is not usable: NaN or infinity in fc3.bias"),
        (lambda path: torch.save(torch.nn.Linear(1, 1).state_dict(), path), "conv1.weight"),
        (
            lambda path: path.with_suffix(".json").write_bytes(b"[{"),
            "model.json is not a valid history file",
        ),
        (
            lambda path: path.with_suffix(".json").write_bytes(b"7"),
            "model.json is not a valid history file",
        ),
        (
            lambda path: path.with_suffix(".json").write_bytes(b'[""]'),
            "model.json is not a valid history file",
        ),
        (
            lambda path: path.with_suffix(".json").write_bytes(b'{"a": 1}'),
            "model.json is not a valid history file",
        ),
        (
            lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe"),
            "model.json is not a valid history file",
        ),
    ],
)
def test_resume_refuses_what_is_damaged_and_leaves_it_alone(make, tmp_path, damage, message):
    path = tmp_path / "model.pt"
    make(Client()).fit(1, None)
    damage(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(cifar.UserError, match=message) as error:
        make(flags=["--resume"])
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_resume_goes_on_with_the_model_alone(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    make(Client(fit_res(weights(1)))).fit(2, None)
    path.with_suffix(".json").unlink()
    made = make(flags=["--resume"])
    assert (
        f"{path.with_suffix('.json')} is missing: resuming from the model alone"
        in capsys.readouterr().out
    )
    np.testing.assert_array_equal(arrays_of(made)[0], weights(1)[0])
    assert made.history == []
    make()  # and a new run, before that one has had a round, does not lose it
    kept = torch.load(tmp_path / "model-1.pt")
    np.testing.assert_array_equal(kept["conv1.bias"].numpy(), weights(1)[1])


def test_model_of_an_earlier_run_is_kept(make, tmp_path, capsys):
    path = tmp_path / "model.pt"
    for seed in (1, 2, 3):
        make(Client(fit_res(weights(seed)))).fit(1, None)
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".lock") == [
        *["model-1.json", "model-1.pt", "model-2.json", "model-2.pt", "model.json", "model.pt"]
    ]
    for name, seed in {"model-1": 1, "model-2": 2, "model": 3}.items():
        state_dict = torch.load(tmp_path / f"{name}.pt")
        np.testing.assert_array_equal(state_dict["conv1.bias"].numpy(), weights(seed)[1])
        assert len(history(tmp_path / f"{name}.pt")) == 1
    out = capsys.readouterr().out
    assert f"Renamed {path} (earlier run) to {tmp_path / 'model-2.pt'}" in out


def test_pair_keeps_one_number_though_killed_between(make, tmp_path):
    make(Client(fit_res(weights(1)))).fit(1, None)
    (tmp_path / "model.json").rename(tmp_path / "model-1.json")
    make()
    state_dict = torch.load(tmp_path / "model-1.pt")
    np.testing.assert_array_equal(state_dict["conv1.bias"].numpy(), weights(1)[1])
    assert not (tmp_path / "model-2.pt").exists()


def test_model_without_a_round_is_not_worth_keeping(make, tmp_path):
    make()
    make()
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["model.json", "model.lock", "model.pt"]


def test_model_that_is_not_ours_is_kept_too(make, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"thesis")
    (tmp_path / "model-1.pt").write_bytes(b"draft")
    make()
    assert (tmp_path / "model-2.pt").read_bytes() == b"thesis"
    assert (tmp_path / "model-1.pt").read_bytes() == b"draft"


def test_foreign_json_is_refused_and_left_alone(make, tmp_path):
    (tmp_path / "model.json").write_bytes(b"thesis")
    with pytest.raises(cifar.UserError, match="model.json is not a valid history file"):
        make()
    assert (tmp_path / "model.json").read_bytes() == b"thesis"


def test_second_server_on_the_same_model_is_refused(make, tmp_path):
    made = make(Client(fit_res(weights(1))))
    made.fit(1, None)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(cifar.UserError, match="model.pt is in use by another server"):
        server.CifarServer(made.args, SimpleClientManager())
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_symbolic_link_stays_one(make, tmp_path):
    (tmp_path / "runs").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "runs" / "target.pt")
    make(Client(fit_res(weights(1))), path=link).fit(1, None)
    assert link.is_symlink()
    state_dict = torch.load(tmp_path / "runs" / "target.pt")
    np.testing.assert_array_equal(state_dict["conv1.bias"].numpy(), weights(1)[1])


def files_in(folder):
    return {
        path: None if path.is_dir() else path.read_bytes()
        for path in folder.iterdir()
        if path.suffix != ".lock"
    }


@pytest.mark.parametrize("when", ["write", "replace", "model.pt.tmp", "model.json"])
def test_failed_save_leaves_the_last_model_and_is_tried_again(
    make, tmp_path, monkeypatch, capsys, when
):
    seen = []

    def update(ins):
        seen.append(files_in(tmp_path))
        if len(seen) == 3:  # the second round is over: from now on, saving works
            patch.undo()
            if when.startswith("model"):
                (tmp_path / when).rmdir()
        return fit_res(weights(len(seen)))

    original = type(tmp_path).open

    def full(path, *args, **kwargs):
        if when == "write" and args != ("wb",):
            return original(path, *args, **kwargs)
        raise OSError(28, "No space left on device")

    made = make(Client(update))
    made.fit(1, None)
    if when == "model.json":
        (tmp_path / when).unlink()
    if when.startswith("model"):
        (tmp_path / when).mkdir()
    with monkeypatch.context() as patch:
        if not when.startswith("model"):
            patch.setattr(type(tmp_path), "open" if when == "write" else "replace", full)
        before = files_in(tmp_path)
        made.fit(3, None)
    out = capsys.readouterr().out
    name = "model.pt" if when == "model.pt.tmp" else "model.json"
    reason = "Is a directory" if when.startswith("model") else "No space left on device"
    line = f"Cannot write {tmp_path / name}: {reason}. The previous file is unchanged."
    assert out.count(f"Round 2/3: {line} Trying again after the next round.\n") == 1
    assert seen[2] == before
    assert len(history(tmp_path / "model.pt")) == 3
    bias = torch.load(tmp_path / "model.pt")["conv1.bias"].numpy()
    np.testing.assert_array_equal(bias, weights(3)[1])


def test_last_round_that_cannot_be_saved_is_an_error(make, tmp_path):
    made = make(Client())
    (tmp_path / "model.pt.tmp").mkdir()
    with pytest.raises(cifar.UserError, match="Cannot write .*model.pt: Is a directory"):
        made.fit(1, None)


def test_reader_never_finds_half_a_model(make, tmp_path, monkeypatch):
    """Whatever a kill interrupts, the files under their own names are whole."""
    client = Client(fit_res(weights(1)))
    made = make(client)
    made.fit(1, None)
    client.update = fit_res(weights(2))
    seen = []

    def look(what):
        bias = cifar.load_model(tmp_path / "model.pt").conv1.bias.detach().numpy()
        written = next(seed for seed in (1, 2) if np.array_equal(bias, weights(seed)[1]))
        seen.append((what, written, len(history(tmp_path / "model.pt"))))

    replace = type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda number: look("flush"))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda path, to: look("replace") or replace(path, to)
    )
    made.fit(2, None)
    look("end")
    flushed = [("flush", 1, 1), ("flush", 1, 1)]
    assert seen == [*flushed, ("replace", 1, 1), ("replace", 1, 2), ("end", 2, 2)]


# The goodbye.


def test_goodbye_waits_for_ten_seconds_at_the_most(make):
    made = make(kind=server.StandaloneServer)
    given = []
    client = Client()
    client.reconnect = lambda ins, timeout, group_id: given.append(timeout)
    made.client_manager().register(client)
    made.disconnect_all_clients(timeout=None)
    assert given == [10]


def test_rounds_of_a_hundred_clients_run_at_once(make):
    """Each waits until all of them have been asked, which is never if some have to wait."""
    barrier = threading.Barrier(100)

    def update(ins):
        barrier.wait(60)
        return fit_res(weights(1))

    assert make(*[Client(update) for _ in range(100)]).run_round(None)["clients"] == 100


# The command line.


@pytest.mark.parametrize(
    "address, warned",
    [("127.0.0.1:1", False), ("localhost:1", False), ("[::1]:1", False), ("0.0.0.0:1", True)],
)
def test_open_address_without_tls_is_warned_about(
    call, tmp_path, monkeypatch, capsys, address, warned
):
    given = []
    monkeypatch.setattr(server.fl.server, "start_server", lambda **kwargs: given.append(kwargs))
    out = call("server", "--server-address", address, "--model", tmp_path / "model.pt")
    assert (f"Warning: no TLS on {address}: anyone who can reach it can join" in out) is warned
    assert given[0]["server_address"] == address
    given[0]["server"].lock.release()


def test_engine_gets_the_same_server_and_the_same_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    context = types.SimpleNamespace(
        run_config={"rounds": 5, "lr": 0.5, "resume": False, "batch-size": 8, "synthetic": True}
    )
    components = server.server_fn(context)
    assert (components.config.num_rounds, components.config.round_timeout) == (5, None)
    assert components.server.args.lr == 0.5
    components.server.lock.release()
    context.run_config = {"rounds": 0}
    with pytest.raises(SystemExit):
        server.server_fn(context)
    assert "argument --rounds: 0 is not between" in capsys.readouterr().err


# Strategies: Flower's, and your own.

strategies = server.fl.server.strategy


def recording(calls):
    """Return a FedAvg that notes what it is given: (name, round, results, failures)."""

    class Recording(strategies.FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            calls.append(("fit", server_round, len(results), failures))
            return super().aggregate_fit(server_round, results, failures)

        def aggregate_evaluate(self, server_round, results, failures):
            calls.append(("evaluate", server_round, len(results), failures))
            return super().aggregate_evaluate(server_round, results, failures)

    return Recording


def test_strategy_sees_lost_clients_and_rejected_results(make, monkeypatch):
    calls = []
    use_strategy(monkeypatch, recording(calls))
    unable = FitRes(Status(Code.FIT_NOT_IMPLEMENTED, ""), Parameters([], ""), 0, {})
    bad, lost = evaluate_res(-1.0), GrpcBridgeClosed()
    made = make(Client(), Client(fit_res([]), bad), Client(lost, lost), Client(unable))
    assert made.run_round(None)["clients"] == 1
    fit_failures, evaluate_failures = (call[3] for call in calls)
    assert [call[:3] for call in calls] == [("fit", 1, 1), ("evaluate", 1, 2)]
    assert fit_failures[0] is lost
    rejected = sorted(
        (client.cid[0], len(res.parameters.tensors)) for client, res in fit_failures[1:]
    )
    assert rejected == [("1", 0), ("3", 0)]
    assert evaluate_failures[0] is lost
    assert [(client.cid[0], res) for client, res in evaluate_failures[1:]] == [("1", bad)]


@pytest.mark.parametrize("bad", [fit_res([]), GrpcBridgeClosed()])
def test_strategy_that_accepts_no_failures_fails_the_round(make, monkeypatch, bad):
    use_strategy(monkeypatch, strategies.FedAvg, accept_failures=False)
    made = make(Client(), Client(bad))
    with pytest.raises(cifar.UserError, match="the strategy returned no parameters") as error:
        made.run_round(None)
    assert isinstance(error.value, server.ClientsLost) is isinstance(bad, Exception)


def test_strategy_evaluates_the_initial_model_and_each_round(make, monkeypatch, capsys):
    calls = []

    def evaluate_fn(server_round, arrays, config):
        calls.append((server_round, float(arrays[1][0])))
        return np.float32(0.5), {"f1": np.float64(server_round / 4)}

    use_strategy(monkeypatch, strategies.FedAvg, evaluate_fn=evaluate_fn)
    made = make(Client(fit_res(weights(1))))
    first = float(arrays_of(made)[1][0])
    made.fit(2, None)
    trained = float(weights(1)[1][0])
    assert calls == [(0, first), (1, trained), (2, trained)]
    out = capsys.readouterr().out
    assert 'Initial model: centralized {"loss": 0.5, "f1": 0.0}\n' in out
    assert 'Round 2/3: centralized {"loss": 0.5, "f1": 0.5}\n' in out
    centralized = [record["centralized"] for record in history(made.args.model)]
    assert centralized == [{"loss": 0.5, "f1": 0.25}, {"loss": 0.5, "f1": 0.5}]
    calls.clear()
    make(Client(fit_res(weights(1))), flags=["--resume"]).fit(3, None)
    assert calls == [(3, trained)]


def test_metrics_of_the_strategy_are_shown_and_saved(make, monkeypatch, capsys):
    def metrics_fn(metrics):
        return {"norm": np.float32(sum(n * each["norm"] for n, each in metrics))}

    use_strategy(monkeypatch, strategies.FedAvg, fit_metrics_aggregation_fn=metrics_fn)
    made = make(Client(fit_res(weights(), 10, norm=0.5)), Client(fit_res(weights(), 1, norm=0.25)))
    made.fit(1, None)
    assert history(made.args.model)[0]["fit_metrics"] == {"norm": 5.25}
    assert 'Round 1/3: fit_metrics {"norm": 5.25}\n' in capsys.readouterr().out


def test_strategy_is_told_the_round_that_is_printed(make, monkeypatch, capsys):
    told = []
    settings = {"on_fit_config_fn": lambda server_round: told.append(server_round) or {"lr": 0.5}}
    use_strategy(monkeypatch, strategies.FedAvg, **settings)
    make(Client()).fit(1, None)
    capsys.readouterr()
    made = make(Client(), flags=["--resume"])
    made.fit(3, None)
    assert told == [1, 2, 3]
    out = capsys.readouterr().out
    assert [line[:9] for line in out.splitlines() if "training on" in line] == [
        "Round 2/3",
        "Round 3/3",
    ]
    assert history(made.args.model)[2]["config"] == {"lr": 0.5}


def test_strategy_may_hold_clients_and_locks(make, monkeypatch):
    class Holding(strategies.FedAvg):
        lock, clients = threading.Lock(), {}

        def aggregate_fit(self, server_round, results, failures):
            self.mine = threading.Lock()
            with self.lock:
                self.clients[server_round] = [client for client, _ in results]
            return super().aggregate_fit(server_round, results, failures)

    use_strategy(monkeypatch, Holding)
    client = Client()
    made = make(client)
    made.fit(2, None)
    assert made.strategy.clients == {1: [client], 2: [client]}


@pytest.mark.parametrize(
    "aggregate, reason",
    [
        (
            lambda: ndarrays_to_parameters(weights()[:8]),
            "fc3.weight is missing: got 8 of 10 parameters",
        ),
        (lambda: None, "the strategy returned no parameters"),
    ],
)
def test_aggregate_that_is_no_model_fails_the_round(make, monkeypatch, capsys, aggregate, reason):
    class Wrong(strategies.FedAvg):
        def aggregate_fit(self, server_round, results, failures):
            return aggregate(), {}

    use_strategy(monkeypatch, Wrong)
    with pytest.raises(cifar.UserError, match="Giving up"):
        make(Client()).fit(1, None)
    line = f"failed ({reason}), global model unchanged, attempt 1 of 3"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"min_available_clients": 3}])
def test_strategy_that_waits_for_more_clients_fails_the_round(make, monkeypatch, settings):
    monkeypatch.setattr(
        server, "make_strategy", lambda parameters, config: strategies.FedAvg(**settings)
    )
    clients = [Client()] * (1 if not settings else 2)
    made = make(*[Client() for _ in clients])
    with pytest.raises(cifar.UserError, match=f"the strategy chose none of {len(clients)} clients"):
        made.run_round(None)


def test_fraction_of_the_clients_is_trained(make, monkeypatch, capsys):
    use_strategy(monkeypatch, strategies.FedAvg, fraction_fit=0.5)
    clients = [Client() for _ in range(4)]
    assert make(*clients).run_round(None)["clients"] == 2
    asked = sorted([kind for kind, _ in client.asked] for client in clients)
    assert asked == [["evaluate"]] * 2 + [["fit", "evaluate"]] * 2
    assert "Round 1/3: training on 2 of 4 clients\n" in capsys.readouterr().out


def test_bug_in_a_check_of_the_servers_own_is_no_failed_round(make, monkeypatch, capsys):
    made = make(Client())
    monkeypatch.setattr(cifar, "check_parameters", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        made.fit(1, None)
    made.history = [{"round": 1}]  # resumed: the initial model is not checked, updates are
    with pytest.raises(ZeroDivisionError):
        made.fit(2, None)
    assert "attempt" not in capsys.readouterr().out


def fed_avg_m(**settings):
    strategy = strategies.FedAvgM(server_momentum=0.5, **settings)
    strategy.momentum_vector = [np.zeros_like(array) for array in weights()]  # for --resume
    return strategy


def q_fed_avg(**settings):
    return strategies.QFedAvg(
        evaluate_fn=lambda server_round, arrays, config: (1.0, {}), **settings
    )


def with_privacy(kind, **privacy):
    def make_strategy(**settings):
        return kind(strategies.FedAvg(**settings), 0.1, num_sampled_clients=3, **privacy)

    return make_strategy


class Halving(strategies.FedAvg):
    """Somebody's own strategy."""

    def aggregate_fit(self, server_round, results, failures):
        aggregate, metrics = super().aggregate_fit(server_round, results, failures)
        arrays = [array / 2 for array in parameters_to_ndarrays(aggregate)]
        return ndarrays_to_parameters(arrays), metrics


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
def test_strategy_runs_and_its_aggregate_is_tested_and_saved(make, tmp_path, monkeypatch, name):
    use_strategy(monkeypatch, STRATEGIES[name])
    clients = [Client(fit_res(weights(seed))) for seed in (1, 2, 3)]
    made = make(*clients)
    initial = arrays_of(made)
    made.fit(1, None)
    middle = arrays_of(made)
    made = make(*clients, flags=["--resume"])
    made.fit(2, None)
    assert [record["strategy"] for record in history(tmp_path / "model.pt")] == [name] * 2
    saved = cifar.get_parameters(cifar.load_model(tmp_path / "model.pt"))
    assert not np.array_equal(middle[0], initial[0])
    for client in clients:
        fits = [ins for kind, ins in client.asked if kind == "fit"]
        tests = [ins for kind, ins in client.asked if kind == "evaluate"]
        assert (len(fits), len(tests)) == (2, 2)
        for sent, expected in ((fits[1], middle), (tests[0], middle), (tests[1], saved)):
            for one, other in zip(parameters_to_ndarrays(sent.parameters), expected, strict=True):
                np.testing.assert_array_equal(one, other)
    for ours, kept in zip(arrays_of(made), saved, strict=True):
        np.testing.assert_array_equal(ours, kept)
    if name == "Halving":
        mean = np.mean([weights(seed)[1] for seed in (1, 2, 3)], axis=0)
        np.testing.assert_allclose(saved[1], mean / 2, rtol=1e-5)


# Client managers, and the server of start_server().


def test_snapshot_samples_at_once_or_not_at_all():
    manager = SimpleClientManager()
    for cid in "abc":
        manager.register(Client(cid=cid))
    snapshot = server.Snapshot(manager)
    manager.register(Client(cid="d"))
    assert {client.cid for client in snapshot.sample(3)} == set("abc")
    assert len(snapshot.sample(2, 3)) == 2
    assert snapshot.sample(4) == []
    assert snapshot.sample(1, 4) == []


class Answering(Client):
    """A client that answers get_properties() with `answer`, once `ready` is set."""

    def __init__(self, answer=None):
        super().__init__()
        self.reply, self.ready, self.asking = answer, threading.Event(), threading.Event()

    def get_properties(self, ins, timeout, group_id):
        self.asking.set()
        assert self.ready.wait(60)
        if self.reply:
            raise self.reply
        return types.SimpleNamespace(properties={"client": "laptop-7"})


def joined(manager, client, meanwhile=lambda: None):
    """Register the client; return who is listed before and after it has answered."""
    others = set(threading.enumerate())
    assert manager.register(client)
    (thread,) = set(threading.enumerate()) - others
    assert client.asking.wait(60)
    before = dict(manager.all())
    meanwhile()
    client.ready.set()
    thread.join(60)
    assert not thread.is_alive()
    return before, dict(manager.all())


def test_client_is_listed_once_it_has_answered():
    client = Answering()
    before, after = joined(server.ConnectedClients(), client)
    assert (before, after) == ({}, {client.cid: client})
    assert server.name_of(client) == "laptop-7"


@pytest.mark.parametrize("answer", [None, GrpcBridgeClosed()])
def test_client_that_left_while_it_joined_is_not_listed(answer):
    manager, client = server.ConnectedClients(), Answering(answer)
    assert joined(manager, client, lambda: manager.unregister(client)) == ({}, {})


def test_standalone_server_keeps_the_exception_for_main(make, monkeypatch, tmp_path, call):
    made = make(Client(), kind=server.StandaloneServer)
    error = SystemExit(0)
    monkeypatch.setattr(server.CifarServer, "run_round", lambda *args: (_ for _ in ()).throw(error))
    made.fit(3, None)
    assert made.error is error
    made.lock.release()

    def start_server(**kwargs):
        kwargs["server"].client_manager().wait_for = lambda *args: None
        kwargs["server"].fit(3, None)

    monkeypatch.setattr(server.fl.server, "start_server", start_server)
    with pytest.raises(cifar.UserError, match="Stopped after 0 of 3 rounds. Model saved to"):
        call("server", "--model", tmp_path / "model.pt")
