"""server.py: its rounds, what it refuses, and what it keeps; with clients in this process."""

import io
import json
import os
import socket
import stat
import threading
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

    def make_server(*clients, flags=(), path=tmp_path / "model.pt"):
        for made in servers:  # of this process; a server that has ended has freed its lock
            made.lock.release()
        arguments = ["--model", path, "--min-clients", max(1, len(clients)), "--seed", 1, *flags]
        servers.append(server.CifarServer(server.make_parser().parse_args(map(str, arguments))))
        for number, client in enumerate(clients):
            client.cid = f"{number}{client.cid}"
            servers[-1].client_manager().register(client)
        return servers[-1]

    return make_server


def history(path):
    return json.loads(path.with_suffix(".json").read_text())


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
    return [value.numpy() for value in made.net.state_dict().values()]


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
    state_dict = made.net.state_dict()
    assert state_dict["norm.num_batches_tracked"] == 11
    assert state_dict["norm.num_batches_tracked"].dtype == torch.int64
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
    "conv2.weight is float32(16, 6, 5) instead of": lambda: fit_res(
        with_array(weights()[2][..., 0])
    ),
    "conv2.weight is float64(16, 6, 5, 5) instead of": lambda: fit_res(
        with_array(weights()[2].astype(float))
    ),
    "conv2.weight is int64(16, 6, 5, 5) instead": lambda: fit_res(
        with_array(np.zeros((16, 6, 5, 5), int))
    ),
    "fc3.bias is nothing instead of float32(10,)": lambda: fit_res(weights()[:-1]),
    "nothing is float32(10,) instead of nothing": lambda: fit_res(weights() + weights()[-1:]),
    "conv1.weight is nothing instead of": lambda: fit_res([]),
    "trained on 0 examples": lambda: fit_res(weights(), 0),
    "trained on -5 examples": lambda: fit_res(weights(), -5),
    "unreadable": lambda: FitRes(OK, Parameters([b"x"] * 10, "numpy.ndarray"), 1, {}),
    "unreadable ": lambda: FitRes(OK, Parameters([archive()] * 10, "numpy.ndarray"), 1, {}),
    "unreadable  ": lambda: FitRes(
        OK, Parameters([ndarrays_to_parameters(weights()).tensors[0][:-8]] * 10, ""), 1, {}
    ),
    "error, cannot": lambda: FitRes(
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
    line = f"Round 1/3: result of client 'laptop-7' refused: {reason.strip()}"
    assert line in capsys.readouterr().out


def test_a_million_arrays_are_not_decoded(make, monkeypatch):
    decoded = []
    original = server.fl.common.parameters_to_ndarrays
    monkeypatch.setattr(
        server.fl.common,
        "parameters_to_ndarrays",
        lambda parameters: decoded.append(len(parameters.tensors)) or original(parameters),
    )
    tensors = ndarrays_to_parameters(weights()).tensors * 100_000
    flood = FitRes(OK, Parameters(tensors, "numpy.ndarray"), 1, {})
    assert make(Client(flood), Client()).run_round(None)["clients"] == 1
    assert max(decoded) <= 11


def test_client_that_drops_out_is_counted(make, capsys):
    made = make(Client(RuntimeError()), Client(), Client(test=RuntimeError()))
    record = made.run_round(None)
    assert (record["clients"], record["loss"]) == (2, 1.0)
    assert capsys.readouterr().out.count("Round 1/3: 1 of 3 clients dropped out") == 2


def test_evaluation_is_weighted_by_examples(make):
    made = make(
        Client(test=evaluate_res(1.0, 1, 0.1)), Client(test=evaluate_res(2.0, 3, accuracy=0.5))
    )
    record = made.run_round(None)
    assert (record["loss"], record["accuracy"]) == (1.75, pytest.approx(0.4))
    assert list(record) == ["round", "loss", "accuracy", "clients", "seconds", "data"]
    assert record["clients"] == 2 and record["seconds"] >= 0


@pytest.mark.parametrize(
    "bad",
    [
        evaluate_res(np.nan),
        evaluate_res(np.inf),
        evaluate_res(accuracy=np.nan),
        evaluate_res(accuracy="high"),
        evaluate_res(accuracy=1.1),
        evaluate_res(1e300),
        EvaluateRes(OK, 1.0, 10, {}),
        evaluate_res(0.1, 0, 0.9),
        evaluate_res(0.1, -3, 0.9),
    ],
)
def test_bad_evaluation_is_refused(make, capsys, bad):
    record = make(Client(test=bad), Client(test=evaluate_res(2.0, accuracy=0.25))).run_round(None)
    assert (record["loss"], record["accuracy"]) == (2.0, 0.25)
    assert "result of client '00123456789abcdef' refused: loss " in capsys.readouterr().out


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
        update = fit_res(weights(), data=evil, part=evil)
    make(Client(update, test), Client()).run_round(None)
    out = capsys.readouterr().out
    assert "title" in out, "it is shown"
    assert all(character.isprintable() or character == "\n" for character in out)
    assert not [line for line in out.splitlines() if line.startswith("Round 3/3")]
    assert max(map(len, out.splitlines())) < 2500


# What the clients hold.


def holding(data, part, client):
    return Client(fit_res(weights(), client=client, data=data, part=part))


def test_what_a_client_holds_is_said_once(make, capsys):
    made = make(
        holding("CIFAR-10 in 2 parts, alpha none", "part 0", "a"),
        holding("CIFAR-10 in 2 parts, alpha none", "part 1", "b"),
    )
    made.fit(2, None)
    out = capsys.readouterr().out
    for client, part in (("a", 0), ("b", 1)):
        line = f"client '{client}' holds part {part} of CIFAR-10 in 2 parts, alpha none"
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
        (("CIFAR-10", "all"), ("generated images", "all"), "CIFAR-10 / generated images"),
        (("X in 2 parts", "part 0"), ("X in 2 parts", "part 0"), "2 clients hold part 0 of X in 2"),
        (("X in 2 parts", "part 0"), ("X in 3 parts", "part 1"), "X in 2 parts / X in 3 parts"),
        (("X, alpha 1", "part 0"), ("X, alpha 2", "part 1"), "X, alpha 1 / X, alpha 2"),
    ],
)
def test_clients_that_do_not_fit_together_are_averaged_with_a_warning(
    make, capsys, first, second, warning
):
    made = make(holding(*first, "a"), holding(*second, "b"))
    made.fit(2, None)
    out = capsys.readouterr().out
    assert out.count("Warning: ") == 1 and warning in out
    assert [record["clients"] for record in history(made.args.model)] == [2, 2]


# Rounds of which nothing comes.


def test_round_without_a_good_update_is_tried_again_but_not_for_ever(make, capsys):
    client = Client(RuntimeError())
    made = make(client)
    before = arrays_of(made)
    with pytest.raises(cifar.UserError, match="3 rounds in a row failed: --resume goes on"):
        made.fit(3, None)
    assert [kind for kind, _ in client.asked] == ["fit"] * 3
    out = capsys.readouterr().out
    assert out.count("Round 1/3: nothing came of it: no update can be averaged") == 3
    for ours, kept in zip(arrays_of(made), before):
        np.testing.assert_array_equal(ours, kept)
    assert history(made.args.model) == []


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
    """One finite update of 1e30 makes a model whose loss is not a number, for every client."""

    def test(ins):
        largest = max(np.abs(array).max() for array in parameters_to_ndarrays(ins.parameters))
        return evaluate_res(np.nan if largest > 1e6 else 1.0)

    huge = Client(fit_res([value * 0 + np.float32(1e30) for value in weights()]), test)
    made = make(huge, Client(fit_res(weights(1)), test))
    before = arrays_of(made)
    with pytest.raises(cifar.UserError, match="no update|no client can test"):
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
    with (
        np.errstate(over="ignore"),
        pytest.raises(cifar.UserError, match="NaN or infinity in conv1"),
    ):
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
    assert server.figures(record)[1:4] == ["-", "-", "1"]
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


def test_strategy_with_momentum_can_be_resumed(make, tmp_path, monkeypatch):
    """FedAvgM begins its momentum in what it is told is the first round."""

    use_strategy(monkeypatch, server.fl.server.strategy.FedAvgM, server_momentum=0.9)
    make(Client()).fit(1, None)
    make(Client(), flags=["--resume"]).fit(3, None)
    assert [record["round"] for record in history(tmp_path / "model.pt")] == [1, 2, 3]


def test_killed_between_model_and_history_repeats_the_round(make, tmp_path):
    path = tmp_path / "model.pt"
    made = make(Client(fit_res(weights(1))))
    made.fit(1, None)
    before = path.with_suffix(".json").read_bytes()
    made.fit(2, None)
    path.with_suffix(".json").write_bytes(before)
    make(Client(), flags=["--resume"]).fit(2, None)
    assert [record["round"] for record in history(path)] == [1, 2]


def test_killed_before_the_first_round_can_resume(make):
    first = arrays_of(make(flags=["--seed", 3]))
    np.testing.assert_array_equal(arrays_of(make(flags=["--resume"]))[4], first[4])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "Cannot read the model .*No such file"),
        (lambda path: path.write_bytes(b"junk"), "no saved model"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "no saved model"),
        (lambda path: torch.save(torch.nn.Linear(1, 1).state_dict(), path), "conv1.weight"),
        (lambda path: path.with_suffix(".json").write_text("[{"), "holds no history.*alone"),
        (lambda path: path.with_suffix(".json").write_text("7"), "holds no history.*alone"),
        (lambda path: path.with_suffix(".json").write_text('[""]'), "holds no history.*alone"),
        (lambda path: path.with_suffix(".json").write_text('{"a": 1}'), "holds no history"),
        (lambda path: path.with_suffix(".json").write_bytes(b"\xff\xfe"), "holds no history"),
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
    assert f"{path.with_suffix('.json')} is missing" in capsys.readouterr().out
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
    assert f"{path} of an earlier run is kept as {tmp_path / 'model-2.pt'}" in out


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


@pytest.mark.parametrize("name", ["model.pt", "model.json"])
def test_what_is_not_ours_is_kept_too(make, tmp_path, name):
    (tmp_path / name).write_bytes(b"thesis")
    taken = tmp_path / name.replace("model", "model-1")
    taken.write_bytes(b"draft")
    make()
    assert (tmp_path / name.replace("model", "model-2")).read_bytes() == b"thesis"
    assert taken.read_bytes() == b"draft"


def test_second_server_on_the_same_model_is_refused(make, tmp_path):
    made = make(Client(fit_res(weights(1))))
    made.fit(1, None)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(cifar.UserError, match="model.pt is another server's"):
        server.CifarServer(server.make_parser().parse_args(["--model", str(made.args.model)]))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_symbolic_link_stays_one(make, tmp_path):
    (tmp_path / "runs").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "runs" / "target.pt")
    make(Client(fit_res(weights(1))), path=link).fit(1, None)
    assert link.is_symlink()
    state_dict = torch.load(tmp_path / "runs" / "target.pt")
    np.testing.assert_array_equal(state_dict["conv1.bias"].numpy(), weights(1)[1])


def test_rights_of_the_model_stay(make, tmp_path):
    made = make(Client())
    (tmp_path / "model.pt").chmod(0o600)
    made.fit(1, None)
    assert stat.S_IMODE((tmp_path / "model.pt").stat().st_mode) == 0o600


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_last_model_and_the_run_goes_on(
    make, tmp_path, monkeypatch, capsys, when
):
    client = Client(fit_res(weights(1)))
    made = make(client)
    made.fit(1, None)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(type(tmp_path), "replace" if when == "replace" else "open", full)
        made.fit(2, None)
    out = capsys.readouterr().out
    assert f"Cannot write {tmp_path / 'model.pt'}: No space left on device" in out
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    made.fit(3, None)
    assert len(history(tmp_path / "model.pt")) == 3


def test_history_that_cannot_be_written_is_named(make, tmp_path, capsys):
    made = make(Client())
    (tmp_path / "model.json").unlink()
    (tmp_path / "model.json").mkdir()
    made.fit(1, None)
    out = capsys.readouterr().out
    assert f"Cannot write {tmp_path / 'model.json'}: Is a directory. It stays as it was." in out
    assert "model.pt" not in out


def test_reader_never_finds_half_a_model(make, tmp_path, monkeypatch):
    """Whatever a kill interrupts, the file under the model's own name is whole."""
    client = Client(fit_res(weights(1)))
    made = make(client)
    made.fit(1, None)
    client.update = fit_res(weights(2))
    seen = []

    def fsync(number):  # everything is written, nothing of it is renamed
        bias = cifar.load_model(tmp_path / "model.pt").conv1.bias.detach().numpy()
        written = next(seed for seed in (1, 2) if np.array_equal(bias, weights(seed)[1]))
        seen.append((written, len(history(tmp_path / "model.pt"))))

    monkeypatch.setattr(os, "fsync", fsync)
    made.fit(2, None)
    assert seen == [(1, 1), (2, 1)]
    assert len(history(tmp_path / "model.pt")) == 2


# The goodbye.


def test_goodbye_waits_for_ten_seconds_at_the_most(make):
    made = make()
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


# Addresses.


def test_address_is_checked(capsys, monkeypatch):
    server.check_address("127.0.0.1:0", encrypted=False)
    server.check_address("localhost:0", encrypted=False)
    server.check_address("0.0.0.0:0", encrypted=True)
    assert capsys.readouterr().err == ""
    server.check_address("0.0.0.0:0", encrypted=False)
    assert "Warning: whoever reaches 0.0.0.0:0 can join" in capsys.readouterr().err
    with pytest.raises(cifar.UserError, match="Cannot listen on 192.0.2.1:1: "):
        server.check_address("192.0.2.1:1", encrypted=False)


def test_every_address_of_a_host_counts(capsys, monkeypatch):
    def getaddrinfo(*args, **kwargs):
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("127.0.0.1", 0)), (*kind, ("0.0.0.0", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    server.check_address("both:0", encrypted=False)
    assert "Warning: whoever reaches both:0" in capsys.readouterr().err


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
