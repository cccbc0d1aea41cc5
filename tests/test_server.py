"""Tests of server.py, with clients in this process: the average, what is rejected, saving."""

import json
import logging
import math
import os
import threading

import numpy as np
import pytest
import torch
from flwr import common
from flwr.common import FitRes, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.strategy import FedAvgM
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridge, GrpcBridgeClosed
from flwr.server.superlink.fleet.grpc_bidi.grpc_client_proxy import GrpcClientProxy
from helpers import history

import cifar
import server

OK = common.Status(common.Code.OK, "")
SHAPES = [array.shape for array in cifar.get_parameters(cifar.Net())]


def weights(seed=0):
    random = np.random.RandomState(seed)
    return [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]


def fit_res(arrays, num_examples=10, **metrics):
    return FitRes(OK, ndarrays_to_parameters(arrays), num_examples, metrics)


def evaluate_res(loss=1.0, num_examples=10, **metrics):
    return common.EvaluateRes(OK, loss, num_examples, metrics)


class Client:
    """A client that gives these answers, raises them, or calls them."""

    def __init__(self, update=None, evaluation=None):
        self.update = fit_res(weights()) if update is None else update
        self.evaluation = evaluate_res() if evaluation is None else evaluation
        self.configs, self.given = [], []  # what it was sent

    def fit(self, ins, timeout, group_id):
        self.configs.append(ins.config)
        self.given.append(parameters_to_ndarrays(ins.parameters))
        answer = self.update(self) if callable(self.update) else self.update
        if isinstance(answer, Exception):
            raise answer
        return answer

    def evaluate(self, ins, timeout, group_id):
        return self.evaluation


@pytest.fixture
def make(tmp_path, monkeypatch, caplog):
    """Make a server with these clients, which saves its model as tmp_path/model.pt."""
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    caplog.set_level(logging.INFO, logger="flwr")

    def make_server(*clients, resume=False, server=server, rounds=3):
        arguments = ["--model", str(tmp_path / "model.pt"), "--min-clients", "1", "--seed", "1"]
        arguments += ["--rounds", str(rounds)] + ["--resume"] * resume
        made = server.CifarServer(server.make_parser().parse_args(arguments))
        for number, client in enumerate(clients):
            client.cid = f"client-{number}"
            made.clients.register(client)
        return made

    return make_server


def arrays_in(path):
    return [value.numpy() for value in torch.load(path, weights_only=True).values()]


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_average_is_weighted_by_examples_whatever_the_order_of_the_updates(make, tmp_path):
    def run():
        updates = [fit_res(weights(seed), seed + 1) for seed in range(5)]
        make(*map(Client, updates)).fit(1, None)
        return (tmp_path / "model.pt").read_bytes()

    assert len({run() for _ in range(6)}) == 1
    average = [np.average(each, 0, range(1, 6)) for each in zip(*map(weights, range(5)))]
    assert_close(arrays_in(tmp_path / "model.pt"), average)


def with_array(array, position=2):
    arrays = weights()
    arrays[position] = array
    return fit_res(arrays)


def with_value(value):
    return with_array(np.full(SHAPES[9], value, np.float32), 9)


BAD_UPDATES = {
    "nan": (with_value(np.nan), "array 9: NaN or infinity"),
    "too large for float32": (with_array(np.full(SHAPES[2], 1e300)), "array 2: NaN or infinity"),
    "shape": (with_array(weights()[0]), "array 2: expected float32(16, 6, 5, 5), got float32(6, 3"),
    "too few": (fit_res(weights()[:-1]), "expected 10 arrays, got 9"),
    "too many": (fit_res(weights() + weights()[-1:]), "expected 10 arrays, got 11"),
    "text": (with_array(np.full(SHAPES[2], "1")), "got <U1(16, 6, 5, 5)"),
    "junk": (FitRes(OK, common.Parameters([b"junk"] * 10, ""), 10, {}), "pickled"),
    "no examples": (fit_res(weights(), 0), "0 examples"),
}


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_bad_update_is_rejected_by_name_and_the_others_are_averaged(make, caplog, tmp_path, kind):
    update, reason = BAD_UPDATES[kind]
    update.metrics["client"] = "laptop-7"
    make(Client(update), Client(fit_res(weights(1), 3))).fit(1, None)
    assert_close(arrays_in(tmp_path / "model.pt"), weights(1))
    assert "Update of client 'laptop-7' rejected: " in caplog.text and reason in caplog.text
    assert "aggregate_fit: received 1 results and 1 failures" in caplog.text
    assert history(tmp_path / "model.pt")[0]["clients"] == 1


def test_aggregate_that_breaks_a_constant_is_never_saved(make, monkeypatch, tmp_path):
    """Such as a mask of -inf, which FedAvgM subtracts from itself; integers stay, too."""
    mask = np.array([0, -np.inf, np.nan], np.float32)

    class Net(cifar.Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.from_numpy(mask))
            self.register_buffer("count", torch.tensor([2, 0, 1]))

    monkeypatch.setattr(cifar, "Net", Net)
    good, bad = fit_res([mask, *weights()]), fit_res([mask + np.nan, *weights()])
    make(Client(good), Client(bad)).fit(1, None)
    net = cifar.load_model(tmp_path / "model.pt")
    np.testing.assert_array_equal(net.mask, mask)
    assert net.count.tolist() == [2, 0, 1]
    made = make(Client(good), resume=True)
    initial = ndarrays_to_parameters(cifar.get_parameters(net))
    alone = {"min_fit_clients": 1, "min_available_clients": 1}
    made.strategy = FedAvgM(initial_parameters=initial, server_momentum=0.9, **alone)
    made.strategy.momentum_vector = [0 * array for array in cifar.get_parameters(net)]
    with pytest.raises(ValueError, match="^array 0: NaN or infinity$"):
        made.fit(2, None)
    np.testing.assert_array_equal(cifar.load_model(tmp_path / "model.pt").mask, mask)
    assert [record["clients"] for record in history(tmp_path / "model.pt")] == [1]


def test_record_of_a_round_has_every_number_that_clients_return(make, tmp_path):
    first = Client(
        fit_res(weights(), 1, loss=2.0, accuracy=0.9, round=77, note="text"),
        common.EvaluateRes(OK, -1.0, 1, {"f1": 0.25, "accuracy": 30, "clients": 99, "loss": 5.0}),
    )
    second = Client(fit_res(weights(), 3, loss=1, done=True), evaluate_res(-3, 3, accuracy=50.0))
    returned, _ = make(first, second).fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    assert record.pop("seconds") >= 0
    trained = {"fit_loss": 1.25, "fit_accuracy": 0.9, "fit_round": 77}
    tested = {"loss": -2.5, "f1": 0.25, "accuracy": 45}
    assert record == {"round": 1, "clients": 2, **trained, **tested}
    assert returned.losses_distributed == [(1, -2.5)], "Flower's own history is filled, too"
    assert returned.metrics_distributed["f1"] == [(1, 0.25)]
    assert returned.metrics_distributed_fit["loss"] == [(1, 1.25)]


def test_record_without_an_evaluation_has_no_loss(make, caplog, tmp_path):
    client = Client(fit_res(weights(), loss=2.0))
    client.evaluate = None
    make(client).fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    assert record.keys() == {"round", "clients", "seconds", "fit_loss"}
    assert "A client failed: TypeError(" in caplog.text


def test_any_value_can_be_kept_in_a_record(make, tmp_path):
    values = {"confusion": np.eye(2, dtype=int), "f1": math.nan, "raw": b"bytes"}
    made = make(Client())
    made.strategy.evaluate_metrics_aggregation_fn = lambda metrics: values
    made.fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    assert (record["confusion"], record["f1"]) == ([[1, 0], [0, 1]], None)


def test_run_ends_with_the_reason_if_a_round_would_fail_again(make, caplog, tmp_path):
    """One sends NaN, and another's config cannot be sent; or the strategy wants two of one."""

    def misconfigured(client):
        ins = common.FitIns(update.parameters, {"x": [1, 2]})
        return GrpcClientProxy("", GrpcBridge()).fit(ins, None, 1)

    make(Client(update := with_value(np.nan)), Client()).fit(1, None)
    before = (tmp_path / "model.pt").read_bytes()
    caplog.clear()
    with pytest.raises(RuntimeError, match="^Round 2 failed"):
        make(Client(update), Client(misconfigured), resume=True).fit(2, None)
    assert caplog.text.count("Update of client 'client-0' rejected: array 9: NaN") == 1
    assert caplog.text.count("A client failed: ") == 1
    assert "Accepted types: " in caplog.text or "TypeError(" in caplog.text
    assert (tmp_path / "model.pt").read_bytes() == before
    assert len(history(tmp_path / "model.pt")) == 1
    made = make(Client())
    made.strategy.min_fit_clients = 2
    with pytest.raises(RuntimeError, match="^Round 1 failed"):
        made.fit(1, None)
    assert "Sampling failed: number of available clients (1) is less than" in caplog.text


def test_strategy_may_keep_the_model(make, tmp_path):
    client = Client(fit_res(weights(1)))
    made = make(client)
    start, aggregate_fit = cifar.get_parameters(made.net), made.strategy.aggregate_fit

    def aggregate(server_round, *results):
        return (None, {}) if server_round == 1 else aggregate_fit(server_round, *results)

    made.strategy.aggregate_fit = aggregate
    made.fit(2, None)
    assert_close(arrays_in(tmp_path / "model.pt"), weights(1))
    assert_close(client.given[1], start)
    assert [record["loss"] for record in history(tmp_path / "model.pt")] == [1, 1]
    made = make(client, Client(ValueError("no")))
    made.strategy.aggregate_fit = aggregate
    with pytest.raises(RuntimeError, match="^Round 1 failed"):
        made.fit(1, None)


def test_strategy_may_send_something_else_than_the_model(make, caplog):
    """Weights and control variates: an update is compared with what its client was sent."""
    made = make(Client(lambda client: fit_res(client.given[-1])), Client())
    both = ndarrays_to_parameters(cifar.get_parameters(made.net) + weights(7))
    configure_fit, aggregate_fit = made.strategy.configure_fit, made.strategy.aggregate_fit
    made.strategy.configure_fit = lambda number, _, clients: configure_fit(number, both, clients)

    def aggregate(*results):
        arrays = parameters_to_ndarrays(aggregate_fit(*results)[0])
        return ndarrays_to_parameters(arrays[: made.keep]), {}

    made.strategy.aggregate_fit, made.keep = aggregate, len(SHAPES)
    made.fit(1, None)
    assert "Update of client 'client-1' rejected: expected 20 arrays, got 10" in caplog.text
    assert "aggregate_fit: received 1 results and 1 failures" in caplog.text
    made.strategy.initial_parameters, made.keep = both, None
    with pytest.raises(ValueError, match="longer"):  # save() is the one place to adapt
        made.fit(1, None)


def test_lost_clients_never_end_the_run(make, caplog, tmp_path):
    def leave(client):
        made.clients.unregister(client)
        return GrpcBridgeClosed()

    made = make(*[Client(leave) for _ in range(5)], Client())
    made.strategy.configure_fit = lambda server_round, parameters, clients: [
        (next(iter(clients.all().values())), common.FitIns(parameters, {}))
    ]
    made.fit(1, None)
    assert caplog.text.count("Round 1 failed, clients were lost: repeating it") == 5
    assert history(tmp_path / "model.pt")[0]["clients"] == 1


def test_resume_continues_and_a_new_run_moves_the_files_aside(make, caplog, tmp_path):
    path = tmp_path / "model.pt"
    make(Client(fit_res(weights(1)))).fit(2, None)
    made = make(Client(fit_res(weights(2))), resume=True)
    assert_close(cifar.get_parameters(made.net), weights(1))
    made.fit(3, None)
    assert [record["round"] for record in history(path)] == [1, 2, 3]
    assert_close(arrays_in(path), weights(2))
    make(Client()).fit(1, None)
    assert f"Renamed {path} of an earlier run to {path}.old" in caplog.text
    assert_close(arrays_in(tmp_path / "model.pt.old"), weights(2))
    assert len(json.loads((tmp_path / "model.json.old").read_text())) == 3
    path.with_suffix(".json").unlink()  # as is said where it is damaged
    make(Client(fit_res(weights(3))), resume=True).fit(1, None)
    assert [record["round"] for record in history(path)] == [1]


@pytest.mark.parametrize("file", ["model.pt.tmp", "model.json.tmp"])
def test_save_that_fails_is_tried_again_and_raised_in_the_last_round(make, caplog, tmp_path, file):
    def update(client):
        if len(client.given) == 2:
            (tmp_path / file).rmdir()
        return fit_res(weights(1))

    (tmp_path / file).mkdir()  # nothing can be written there
    make(Client(update)).fit(2, None)
    assert caplog.text.count(f"Cannot save {tmp_path / 'model.pt'}: [Errno ") == 1
    assert [record["round"] for record in history(tmp_path / "model.pt")] == [1, 2]
    (tmp_path / file).mkdir()
    before = [(tmp_path / name).read_bytes() for name in ("model.pt", "model.json")]
    with pytest.raises(IsADirectoryError):
        make(Client(fit_res(weights(2))), resume=True).fit(3, None)
    assert before == [(tmp_path / name).read_bytes() for name in ("model.pt", "model.json")]


def test_files_are_on_the_disk_before_they_replace_the_old_ones(make, monkeypatch, tmp_path):
    synced, moved, replace = set(), [], os.replace

    def move(old, new):
        assert os.stat(old).st_ino in synced
        moved.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.fstat(number).st_ino))
    monkeypatch.setattr(os, "replace", move)
    make(Client()).fit(1, None)
    assert moved == [tmp_path / "model.pt", tmp_path / "model.json"]


def test_all_clients_train_at_the_same_time(make, tmp_path):
    barrier = threading.Barrier(40, timeout=20)
    clients = [Client(lambda _: barrier.wait() >= 0 and fit_res(weights())) for _ in range(40)]
    make(*clients).fit(1, None)
    assert history(tmp_path / "model.pt")[0]["clients"] == 40
