"""server.py: what is averaged, what is refused, and what is kept; without a network."""

import io
import json
import os

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
from flwr.server.strategy import FedAvg

import cifar
import server

OK = Status(Code.OK, "")


class Client:
    """All that a strategy wants to know of a client."""

    def __init__(self, cid="0123456789abcdef"):
        self.cid = cid


def weights(seed=0):
    random = np.random.RandomState(seed)
    shapes = [value.shape for value in cifar.Net().state_dict().values()]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def update(arrays, num_examples=10, **metrics):
    return Client(), FitRes(OK, ndarrays_to_parameters(arrays), num_examples, metrics)


def evaluation(loss=1.0, num_examples=10, **metrics):
    return Client(), EvaluateRes(OK, loss, num_examples, metrics)


@pytest.fixture
def strategy(tmp_path):
    built, _ = server.make_server(tmp_path / "model.pt", seed=1)
    return built.strategy


def test_average_is_weighted_by_examples(strategy):
    first, second, third = weights(1), weights(2), weights(3)
    results = [update(first, 1), update(second, 2), update(third, 5)]
    parameters, _ = strategy.aggregate_fit(1, results, [])
    for ours, a, b, c in zip(parameters_to_ndarrays(parameters), first, second, third):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, (a + 2 * b + 5 * c) / 8, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        strategy.model["conv1.weight"], parameters_to_ndarrays(parameters)[0]
    )


def test_average_does_not_depend_on_who_answers_first(strategy):
    results = [update(weights(seed), seed + 1) for seed in range(5)]
    there, _ = strategy.aggregate_fit(1, results, [])
    back, _ = strategy.aggregate_fit(1, results[::-1], [])
    assert there.tensors == back.tensors


def with_array(value):
    arrays = weights()
    arrays[2] = value
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
    "NaN or infinity in fc3.bias": update(with_value(np.nan)),
    "NaN or infinity in fc3.bias ": update(with_value(-np.inf)),
    "conv2.weight is float32(16, 6, 5) instead of": update(with_array(weights()[2][..., 0])),
    "conv2.weight is float64(16, 6, 5, 5) instead of": update(
        with_array(weights()[2].astype(float))
    ),
    "conv2.weight is int64(16, 6, 5, 5) instead": update(with_array(np.zeros((16, 6, 5, 5), int))),
    "9 arrays instead of 10": update(weights()[:-1]),
    "11 arrays instead of 10": update(weights() + weights()[-1:]),
    "0 arrays instead of 10": update([]),
    "trained on 0 examples": update(weights(), 0),
    "trained on -5 examples": update(weights(), -5),
    "unreadable": (Client(), FitRes(OK, Parameters([b"x"] * 10, "numpy.ndarray"), 1, {})),
    "unreadable (NpzFile)": (
        Client(),
        FitRes(OK, Parameters([archive()] * 10, "numpy.ndarray"), 1, {}),
    ),
    "unreadable (": (
        Client(),
        FitRes(OK, Parameters([ndarrays_to_parameters(weights()).tensors[0][:-9]] * 10, ""), 1, {}),
    ),
}


@pytest.mark.parametrize("reason", BAD_UPDATES)
def test_bad_update_is_refused_and_the_others_are_averaged(strategy, capsys, reason):
    bad = BAD_UPDATES[reason]
    bad[1].metrics["client"] = "laptop-7"
    good = update(weights(1), 3)
    parameters, _ = strategy.aggregate_fit(1, [bad, good], [])
    for ours, theirs in zip(parameters_to_ndarrays(parameters), weights(1)):
        np.testing.assert_array_equal(ours, theirs)
    assert strategy.clients == 1
    line = f"Round 1/3: result of client 'laptop-7' refused: {reason.strip()}"
    assert line in capsys.readouterr().out


def test_without_a_good_update_the_model_stays(strategy):
    before = {name: value.copy() for name, value in strategy.model.items()}
    assert strategy.aggregate_fit(1, [update(with_value(np.nan))], [])[0] is None
    assert strategy.aggregate_fit(1, [], [RuntimeError()])[0] is None
    for name, value in before.items():
        np.testing.assert_array_equal(strategy.model[name], value)
    assert strategy.clients == 0


def test_evaluation_is_weighted_by_examples(strategy, tmp_path, capsys):
    strategy.aggregate_fit(1, [update(weights(1)), update(weights(2))], [])
    results = [evaluation(1.0, 1, accuracy=0.1), evaluation(2.0, 3, accuracy=0.5)]
    loss, metrics = strategy.aggregate_evaluate(1, results, [])
    assert (loss, metrics) == (1.75, {"accuracy": 0.4})
    (record,) = json.loads((tmp_path / "model.json").read_text())
    assert list(record) == ["round", "loss", "accuracy", "clients", "seconds"]
    assert (record["round"], record["loss"], record["accuracy"]) == (1, 1.75, 0.4)
    assert record["clients"] == 2 and record["seconds"] >= 0
    assert "Round 1/3: loss 1.7500, accuracy 0.4000, 2 clients, " in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad",
    [
        evaluation(np.nan, accuracy=0.5),
        evaluation(np.inf, accuracy=0.5),
        evaluation(accuracy=np.nan),
        evaluation(accuracy="high"),
        evaluation(accuracy=1.1),
        evaluation(1e300, accuracy=0.5),
        evaluation(),
        evaluation(0.1, 0, accuracy=0.9),
        evaluation(0.1, -3, accuracy=0.9),
    ],
)
def test_bad_evaluation_is_refused(strategy, capsys, bad):
    loss, metrics = strategy.aggregate_evaluate(1, [bad, evaluation(2.0, accuracy=0.25)], [])
    assert (loss, metrics) == (2.0, {"accuracy": 0.25})
    assert "result of client '0123456789abcdef' refused" in capsys.readouterr().out


def test_whole_accuracy_is_accepted(strategy):
    assert strategy.aggregate_evaluate(1, [evaluation(accuracy=1)], [])[1] == {"accuracy": 1}


def test_answer_with_an_error_is_named(strategy, capsys):
    answer = FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "cannot"), Parameters([], ""), 0, {})
    strategy.aggregate_fit(1, [], [(Client(), answer), RuntimeError()])
    out = capsys.readouterr().out
    assert "result of client '0123456789abcdef' refused: error, cannot" in out
    assert "Round 1/3: 1 client dropped out" in out


def test_what_a_client_says_of_itself_cannot_spoil_the_log(strategy, capsys):
    strategy.aggregate_fit(1, [update([], client="\x1b[2J\n\u2603" * 1000)], [])
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out and len(out) < 400 and out.count("\n") == 1


def test_average_that_overflows_leaves_the_model(strategy, monkeypatch, capsys):
    manager = server.PatientClientManager()
    manager.register(Client("a"))
    manager.register(Client("b"))
    finite, huge = weights(1), [value.astype(float) * 1e300 for value in weights()]
    for averages in (finite, huge):
        parameters = ndarrays_to_parameters(averages)
        monkeypatch.setattr(FedAvg, "aggregate_fit", lambda *args, given=parameters: (given, {}))
        strategy.configure_fit(1, strategy.initial_parameters, manager)
        with np.errstate(over="ignore"):
            aggregated, _ = strategy.aggregate_fit(1, [update(weights())], [])
        strategy.aggregate_evaluate(1, [evaluation(accuracy=0.5)], [])
    assert aggregated is None and "NaN or infinity in the average" in capsys.readouterr().out
    for kept, value in zip(strategy.model.values(), finite):
        np.testing.assert_array_equal(kept, value)
    assert [record["clients"] for record in strategy.history] == [1, 0]


def test_round_ends_without_a_test_if_nobody_is_left(strategy, tmp_path):
    strategy.aggregate_fit(1, [update(weights(1))], [])
    manager = server.PatientClientManager()
    assert strategy.configure_evaluate(1, Parameters([], ""), manager) == []
    model, history = server.resume(tmp_path / "model.pt")
    np.testing.assert_array_equal(model["conv1.bias"].numpy(), weights(1)[1])
    assert [(record["loss"], record["clients"]) for record in history] == [(None, 1)]


def test_round_without_any_evaluation_is_in_the_history(strategy, tmp_path):
    assert strategy.aggregate_evaluate(1, [], [RuntimeError()]) == (None, {})
    strategy.aggregate_evaluate(2, [evaluation(2.0, accuracy=0.25)], [])
    history = json.loads((tmp_path / "model.json").read_text())
    assert [(record["round"], record["loss"]) for record in history] == [(1, None), (2, 2.0)]
    assert server.row(history[0])[1:4] == ["-", "-", "0"]


def test_model_is_a_plain_state_dict_written_after_every_round(strategy, tmp_path):
    for seed in (1, 2):
        strategy.aggregate_fit(1, [update(weights(seed))], [])
        strategy.aggregate_evaluate(1, [evaluation(accuracy=0.5)], [])
        state_dict = torch.load(tmp_path / "model.pt", weights_only=True)
        cifar.Net().load_state_dict(state_dict)
        for value, expected in zip(state_dict.values(), weights(seed)):
            np.testing.assert_array_equal(value.numpy(), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pt"]


def test_first_weights_are_the_seeds(tmp_path):
    models = [
        server.make_server(tmp_path / f"{i}.pt", seed=seed)[0].strategy.model["conv1.weight"]
        for i, seed in enumerate([5, 5, 6])
    ]
    assert np.array_equal(models[0], models[1]) and not np.array_equal(models[0], models[2])


def test_config_tells_the_clients(tmp_path):
    built, _ = server.make_server(tmp_path / "model.pt", lr=0.5, local_epochs=7, min_clients=1)
    manager = SimpleClientManager()
    manager.register(Client())
    ((_, instruction),) = built.strategy.configure_fit(1, Parameters([], ""), manager)
    assert instruction.config == {"lr": 0.5, "local_epochs": 7}


# Keeping and resuming.


def run_round(path, seed=1, **arguments):
    built, left = server.make_server(path, **arguments)
    built.strategy.aggregate_fit(1, [update(weights(seed))], [])
    built.strategy.aggregate_evaluate(1, [evaluation(accuracy=0.5)], [])
    return built.strategy, left


def test_resume_goes_on_after_the_last_round(tmp_path):
    path = tmp_path / "model.pt"
    assert run_round(path, rounds=3)[1] == 3
    strategy, left = run_round(path, seed=2, rounds=3, resumed=True)
    assert left == 2
    assert [record["round"] for record in strategy.history] == [1, 2]
    built, left = server.make_server(path, rounds=2, resumed=True)
    assert left == 0
    np.testing.assert_array_equal(built.strategy.model["conv1.weight"], weights(2)[0])


def test_killed_between_model_and_history_can_resume(tmp_path):
    path = tmp_path / "model.pt"
    run_round(path)
    before = path.with_suffix(".json").read_bytes()
    run_round(path, resumed=True)
    path.with_suffix(".json").write_bytes(before)
    _, history = server.resume(path)
    assert [record["round"] for record in history] == [1, 2]
    assert server.row(history[1])[1:] == ["1.0000", "0.5000", "1", "-"]


def test_killed_before_the_first_round_can_resume(tmp_path):
    path = tmp_path / "model.pt"
    first = server.make_server(path)[0].strategy.model["fc1.weight"]
    built, left = server.make_server(path, resumed=True)
    assert left == 3
    np.testing.assert_array_equal(built.strategy.model["fc1.weight"], first)


def other_network(path):
    torch.save(torch.nn.Linear(1, 1).state_dict(), path)


def foreign_model(path):
    torch.save(cifar.Net().state_dict(), path)


def edited_history(path):
    history = json.loads(path.with_suffix(".json").read_text())
    history[0]["accuracy"] = 0.9
    path.with_suffix(".json").write_text(json.dumps(history))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "Cannot read the model .*No such file"),
        (lambda path: path.write_bytes(b"junk"), "no saved model"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "no saved model"),
        (other_network, "another network"),
        (foreign_model, "is not the history of"),
        (edited_history, "is not the history of"),
        (lambda path: path.with_suffix(".json").unlink(), "without its history"),
        (lambda path: path.with_suffix(".json").write_text("[{"), "holds no history"),
        (lambda path: path.with_suffix(".json").write_text("7"), "is not the history of"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "is not the history of"),
        (lambda path: path.with_suffix(".json").write_text("{}"), "is not the history of"),
        (lambda path: path.with_suffix(".json").write_text('[""]'), "is not the history of"),
    ],
)
def test_resume_refuses_what_is_no_pair_and_leaves_it_alone(tmp_path, damage, message):
    path = tmp_path / "model.pt"
    run_round(path)
    run_round(path, resumed=True)
    damage(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(cifar.UserError, match=message) as error:
        server.make_server(path, resumed=True)
    assert "\n" not in str(error.value)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_model_of_an_earlier_run_is_kept(tmp_path, capsys):
    path = tmp_path / "model.pt"
    for seed in (1, 2, 3):
        run_round(path, seed)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *["model-1.json", "model-1.pt", "model-2.json", "model-2.pt", "model.json", "model.pt"]
    ]
    for name, seed in {"model-1": 1, "model-2": 2, "model": 3}.items():
        model, history = server.resume(tmp_path / f"{name}.pt")
        np.testing.assert_array_equal(model["conv1.bias"].numpy(), weights(seed)[1])
        assert len(history) == 1
    assert (
        f"{path} of an earlier run is kept as {tmp_path / 'model-2.pt'}" in capsys.readouterr().out
    )


def test_model_without_a_round_is_not_worth_keeping(tmp_path):
    server.make_server(tmp_path / "model.pt")
    server.make_server(tmp_path / "model.pt")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.pt"]


@pytest.mark.parametrize("name", ["model.pt", "model.json"])
@pytest.mark.parametrize("taken", ["model-1.pt", "model-1.json"])
def test_what_is_not_ours_is_kept_too(tmp_path, name, taken):
    (tmp_path / name).write_bytes(b"thesis")
    (tmp_path / taken).write_bytes(b"draft")
    server.make_server(tmp_path / "model.pt")
    assert (tmp_path / name.replace("model", "model-2")).read_bytes() == b"thesis"
    assert (tmp_path / taken).read_bytes() == b"draft"


def test_empty_object_is_no_history(tmp_path):
    """Even beside a model that has none to speak of."""
    server.make_server(tmp_path / "model.pt")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(cifar.UserError, match="is not the history of"):
        server.make_server(tmp_path / "model.pt", resumed=True)
    server.make_server(tmp_path / "model.pt")
    assert (tmp_path / "model-1.json").read_text() == "{}"


def test_model_path_is_checked_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(cifar.UserError, match="is a folder"):
        server.make_server(tmp_path)
    with pytest.raises(cifar.UserError, match="No such file or directory"):
        server.make_server(tmp_path / "none" / "model.pt")
    with pytest.raises(cifar.UserError, match="Not a directory"):
        server.make_server(tmp_path / "file" / "model.pt")
    with pytest.raises(cifar.UserError, match="File name too long"):
        server.make_server(tmp_path / ("long" * 100))
    with pytest.raises(cifar.UserError, match="the history's name"):
        server.make_server(tmp_path / "model.json")


@pytest.mark.parametrize("when", ["write", "fsync", "replace"])
def test_full_disk_leaves_the_last_model_and_the_run_goes_on(tmp_path, monkeypatch, capsys, when):
    path = tmp_path / "model.pt"
    strategy, _ = run_round(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "fsync":
            patch.setattr(os, "fsync", full)
        elif when == "replace":
            patch.setattr(type(path), "replace", full)
        else:
            patch.setattr(type(path), "open", full)
        strategy.aggregate_evaluate(2, [evaluation(accuracy=0.5)], [])
    assert "Cannot write" in (out := capsys.readouterr().out) and "No space left" in out
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert not strategy.saved
    strategy.aggregate_evaluate(3, [evaluation(accuracy=0.5)], [])
    assert strategy.saved and len(server.resume(path)[1]) == 3


def test_reader_never_finds_half_a_model(tmp_path, monkeypatch):
    """Whatever a kill interrupts, the file under the model's own name is whole."""
    path = tmp_path / "model.pt"
    strategy, _ = run_round(path)
    seen = []

    def fsync(number):  # everything is written, nothing is renamed
        seen.append(len(server.resume(path)[1]))

    monkeypatch.setattr(os, "fsync", fsync)
    strategy.aggregate_evaluate(2, [evaluation(accuracy=0.5)], [])
    assert seen == [1, 1]
    assert len(server.resume(path)[1]) == 2


# Waiting.


def test_sampling_takes_whoever_is_left(monkeypatch):
    """Between counting and sampling a client may go; Flower's own manager then samples nobody."""
    manager = server.PatientClientManager()
    for cid in "ab":
        manager.register(Client(cid))
    assert {client.cid for client in manager.sample(3, 2)} == {"a", "b"}


def test_loopback_is_told_from_other_addresses():
    assert server.check_address("127.0.0.1:0") and server.check_address("localhost:0")
    assert not server.check_address("0.0.0.0:0")
    with pytest.raises(cifar.UserError, match="Cannot listen on 192.0.2.1:1: "):
        server.check_address("192.0.2.1:1")
