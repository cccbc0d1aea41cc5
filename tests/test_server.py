"""Tests of server.py, with clients in this process: the average, what is rejected, saving."""

import io
import json
import logging

import numpy as np
import pytest
import torch
from flwr import common
from flwr.common import FitRes, ndarrays_to_parameters, parameters_to_ndarrays
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
    """A client that gives these answers; an exception is raised, a function is called."""

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

    def make_server(*clients, resume=False, server=server):
        arguments = ["--model", str(tmp_path / "model.pt"), "--min-clients", "1", "--seed", "1"]
        args = server.make_parser().parse_args(arguments + ["--resume"] * resume)
        made = server.CifarServer(args, in_engine=True)  # what ends the run is raised
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


def test_average_is_weighted_by_examples_and_saved(make, tmp_path):
    updates = [weights(1), weights(2), weights(3)]
    make(*[Client(fit_res(each, n)) for each, n in zip(updates, (1, 2, 5))]).fit(1, None)
    average = [(a + 2 * b + 5 * c) / 8 for a, b, c in zip(*updates)]
    assert_close(arrays_in(tmp_path / "model.pt"), average)


def test_average_does_not_depend_on_the_order_of_the_updates(make, tmp_path):
    def run():
        make(*[Client(fit_res(weights(seed), seed + 1)) for seed in range(5)]).fit(1, None)
        return (tmp_path / "model.pt").read_bytes()

    assert len({run() for _ in range(6)}) == 1


def with_array(array, position=2):
    arrays = weights()
    arrays[position] = array
    return fit_res(arrays)


def with_value(value):
    return with_array(np.full(SHAPES[9], value, np.float32), 9)


def of_bytes(content):
    return FitRes(OK, common.Parameters([content] * len(SHAPES), "numpy.ndarray"), 10, {})


archive = io.BytesIO()
np.savez(archive, a=np.zeros(1))
BAD_UPDATES = {
    "nan": (with_value(np.nan), "NaN or infinity in fc3.bias"),
    "infinity": (with_value(-np.inf), "NaN or infinity in fc3.bias"),
    "too large for float32": (with_array(np.full(SHAPES[2], 1e300)), "NaN or infinity in conv2"),
    "shape": (with_array(weights()[2][..., 0]), "size mismatch for conv2.weight"),
    "too few": (fit_res(weights()[:-1]), "expected 10 arrays, got 9"),
    "too many": (fit_res(weights() + weights()[-1:]), "expected 10 arrays, got 11"),
    "text": (with_array(np.full(SHAPES[2], "a")), "can't convert np.ndarray"),
    "empty": (of_bytes(b""), "No data left in file"),
    "junk": (of_bytes(b"junk"), "pickled"),
    "archive": (of_bytes(archive.getvalue()), "rejected"),
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


def test_constants_may_be_nan_or_infinite_and_integers_stay(make, monkeypatch, tmp_path):
    """Such as the mask of a causal model, and BatchNorm's count of batches."""

    class Net(cifar.Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, float("-inf"), float("nan")]))
            self.register_buffer("count", torch.tensor([2, 0, 1]))

    monkeypatch.setattr(cifar, "Net", Net)
    mask = np.array([0, -np.inf, np.nan], np.float32)
    good, bad = fit_res([mask, *weights()]), fit_res([mask + np.nan, *weights()])
    make(Client(good), Client(bad)).fit(1, None)
    assert history(tmp_path / "model.pt")[0]["clients"] == 1
    net = cifar.load_model(tmp_path / "model.pt")
    np.testing.assert_array_equal(net.mask, mask)
    assert net.count.tolist() == [2, 0, 1]


def test_honest_results_of_any_size_are_averaged(make, caplog, tmp_path):
    """Such as an accuracy in percent, and the negative loss of a log-likelihood."""
    first, second = evaluate_res(-3.0, 1, accuracy=30.0), evaluate_res(-1.0, 3, accuracy=50.0)
    make(Client(None, first), Client(None, second)).fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    assert (record["loss"], record["accuracy"]) == (-1.5, 45)
    assert "'accuracy': 45.0" in caplog.text


def test_record_of_a_round_has_every_number_that_clients_return(make, tmp_path):
    first = Client(
        fit_res(weights(), 1, train_loss=2.0, accuracy=0.9, round=77, note="text"),
        common.EvaluateRes(OK, 1.0, 1, {"f1": 0.25, "accuracy": 0.25, "clients": 99, "loss": 5.0}),
    )
    second = Client(fit_res(weights(), 3, train_loss=1, done=True), evaluate_res(3, 3, accuracy=1))
    returned, _ = make(first, second).fit(1, None)
    (record,) = history(tmp_path / "model.pt")
    assert record.pop("seconds") >= 0
    shown = {"train_loss": 1.25, "f1": 0.25, "accuracy": 0.8125}
    assert record == {"round": 1, "clients": 2, "loss": 2.5, **shown}
    assert returned.losses_distributed == [(1, 2.5)], "Flower's own history is filled, too"
    assert returned.metrics_distributed["f1"] == [(1, 0.25)]
    assert returned.metrics_distributed_fit["train_loss"] == [(1, 1.25)]


def test_run_ends_after_three_failures_and_says_why(make, caplog, tmp_path):
    """One client sends NaN, and Flower cannot send the other's config."""

    class Misconfigured(Client):
        def fit(self, ins, timeout, group_id):
            ins = common.FitIns(ins.parameters, {"x": [1, 2]})
            return GrpcClientProxy("", GrpcBridge()).fit(ins, timeout, group_id)

    make(Client()).fit(1, None)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(SystemExit) as ended:
        make(Client(with_value(np.nan)), Misconfigured(), resume=True).fit(2, None)
    assert ended.value.code == 1
    assert caplog.text.count("A client failed: ") == 3
    assert "Accepted types: " in caplog.text or "TypeError(" in caplog.text
    assert caplog.messages[-1] == "Round 2 failed 3 times, giving up"
    assert (tmp_path / "model.pt").read_bytes() == before
    assert len(history(tmp_path / "model.pt")) == 1


def test_strategy_that_chooses_nobody_is_a_failure(make, caplog):
    made = make(Client(), Client())
    made.strategy.min_fit_clients = 3
    with pytest.raises(SystemExit):
        made.fit(1, None)
    assert caplog.text.count("Sampling failed: number of available clients (2) is less than") == 3


def test_aggregate_with_nan_is_never_saved(make, caplog, tmp_path):
    made = make(Client())
    aggregate_fit = made.strategy.aggregate_fit
    answers = iter([with_value(np.nan).parameters, with_value(np.inf).parameters])
    made.strategy.aggregate_fit = lambda *args: (next(answers, aggregate_fit(*args)[0]), {})
    made.fit(1, None)
    assert caplog.text.count("Round 1 failed (NaN or infinity in fc3.bias)") == 2
    assert_close(arrays_in(tmp_path / "model.pt"), weights())


def test_lost_clients_never_end_the_run(make, caplog, tmp_path):
    """Five clients leave while they train, one after the other; the sixth stays."""

    def leave(client):
        made.clients.unregister(client)
        return GrpcBridgeClosed()

    made = make(*[Client(leave) for _ in range(5)], Client())
    made.strategy.configure_fit = lambda server_round, parameters, clients: [
        (next(iter(clients.all().values())), common.FitIns(parameters, {}))
    ]
    made.fit(1, None)
    assert caplog.text.count("1 of 1 clients lost") == 5
    assert history(tmp_path / "model.pt")[0]["clients"] == 1


def test_resume_continues_after_the_last_round(make, caplog, tmp_path):
    path = tmp_path / "model.pt"
    make(Client(fit_res(weights(1)))).fit(2, None)
    made = make(Client(fit_res(weights(2))), resume=True)
    assert_close(cifar.get_parameters(made.net), weights(1))
    made.fit(3, None)
    assert [record["round"] for record in history(path)] == [1, 2, 3]
    assert_close(arrays_in(path), weights(2))
    make(resume=True).fit(3, None)  # nothing to do: it does not wait for clients
    path.with_suffix(".json").unlink()  # a server that was killed in its first save
    make(Client(fit_res(weights(3))), resume=True).fit(1, None)
    assert [record["round"] for record in history(path)] == [1]


def test_new_run_keeps_the_files_of_an_earlier_one(make, caplog, tmp_path):
    make(Client(fit_res(weights(1)))).fit(2, None)
    make(Client(fit_res(weights(2)))).fit(1, None)
    assert_close(arrays_in(tmp_path / "model.pt.old"), weights(1))
    assert len(json.loads((tmp_path / "model.json.old").read_text())) == 2
    assert len(history(tmp_path / "model.pt")) == 1
    assert f"Renamed {tmp_path / 'model.pt'} of an earlier run to " in caplog.text


@pytest.mark.parametrize("file", ["model.pt.tmp", "model.json.tmp"])
def test_save_that_fails_is_tried_again_after_the_next_round(make, caplog, tmp_path, file):
    make(Client(fit_res(weights(1)))).fit(1, None)
    before = (tmp_path / "model.json").read_bytes()
    (tmp_path / file).mkdir()  # nothing can be written there
    with pytest.raises(SystemExit) as ended:
        make(Client(fit_res(weights(1))), resume=True).fit(2, None)
    assert ended.value.code == 1
    assert f"Cannot save {tmp_path / 'model.pt'}: [Errno " in caplog.text
    assert (tmp_path / "model.json").read_bytes() == before
    assert_close(arrays_in(tmp_path / "model.pt"), weights(1))

    def update(client):
        if len(made.history) == 2:
            (tmp_path / file).rmdir()
        return fit_res(weights(2))

    made = make(Client(update), resume=True)
    made.fit(3, None)
    assert [record["round"] for record in history(tmp_path / "model.pt")] == [1, 2, 3]
    assert_close(arrays_in(tmp_path / "model.pt"), weights(2))
