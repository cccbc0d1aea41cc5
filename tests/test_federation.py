"""The three scripts as processes over gRPC, and whatever happens to one of them."""

import importlib
import json
import os
import platform
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import flwr
import grpc
import numpy as np
import pytest
import torch
from conftest import ROOT
from flwr.common import Code, EvaluateRes, FitRes, GetPropertiesRes, Parameters, Status, serde
from flwr.proto.transport_pb2 import ClientMessage
from flwr.proto.transport_pb2_grpc import (
    FlowerServiceStub,
)

import cifar

LONG = ["--local-epochs", "40"]  # a round on the small CIFAR-10 that takes a second or two


@pytest.fixture
def start_server(start, address):
    return lambda *arguments: start("server.py", "--server-address", address, *arguments)


@pytest.fixture
def start_client(start, address, small_cifar):
    """Start a client on the small CIFAR-10."""

    def start_one(*arguments: object, **env: str):
        server = ["--server-address", address]
        return start("client.py", *server, *arguments, cifar=small_cifar, **env)

    return start_one


@pytest.fixture
def program(tmp_path):
    """Write a program that may import the scripts; return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "program.py"
        first = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport cifar\n"
        path.write_text(first + text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def join(address):
    """Join as a client within this process, once the server is there."""
    threads = []

    def join_one(client: flwr.client.Client) -> threading.Thread:
        thread = threading.Thread(
            target=flwr.client.start_client,
            kwargs={"server_address": address, "client": client},
            daemon=True,
        )
        thread.start()
        threads.append(thread)
        return thread

    yield join_one
    for thread in threads:
        thread.join(30)


def history(tmp_path: Path) -> list[dict]:
    return json.loads((tmp_path / "global_model.json").read_text(encoding="utf-8"))


def assert_done(server, *clients, codes=0):
    assert server.end() == 0, server.output
    for client in clients:
        assert client.end() == codes, client.output
    for script in (server, *clients):
        assert "Traceback" not in script.output
        assert "DEPRECATED" not in script.output


def name_of(client) -> str:
    """Return what the process of a client calls itself."""
    return f"{platform.node()}-{client.process.pid}"


def test_federation_learns(start, start_server, address, tmp_path):
    """The three scripts, as the README starts them, on images that can be learned."""
    server = start_server("--seed", 1)
    arguments = ["client.py", "--server-address", address, "--synthetic"]
    clients = [start(*arguments, "--seed", seed) for seed in (1, 2)]
    assert_done(server, *clients)
    records = history(tmp_path)
    assert [record["round"] for record in records] == [1, 2, 3]
    assert [record["clients"] for record in records] == [2, 2, 2]
    accuracies = [record["accuracy"] for record in records]
    assert accuracies[0] < 0.8 < accuracies[2]
    assert records[2]["loss"] < records[0]["loss"]
    for record in records:
        line = f"Round {record['round']}/3: loss {record['loss']:.4f}, "
        assert f"{line}accuracy {record['accuracy']:.4f}, clients 2, " in server.output
        assert re.search(
            rf"^ +{record['round']} +{record['loss']:.4f} ", server.output, re.MULTILINE
        )
    assert server.output.endswith(f"Model: {tmp_path / 'global_model.pt'}\n")
    assert "[1,   300] loss: " in clients[0].output
    evaluation = start("cifar.py", "--synthetic", "--evaluate", "global_model.pt")
    assert evaluation.end() == 0
    accuracy = float(evaluation.output.rpartition("Accuracy: ")[2])
    assert accuracy == pytest.approx(accuracies[2], abs=1e-9)


def test_average_of_parts_is_the_accuracy_on_all_test_images(
    start, start_server, start_client, small_cifar, tmp_path
):
    server = start_server("--min-clients", 3, "--rounds", 1, "--lr", 0.05)
    parts = ["--num-partitions", 3, "--alpha", 0.1]
    clients = [start_client("--partition-id", part, *parts) for part in range(3)]
    assert_done(server, *clients)
    evaluation = start("cifar.py", "--evaluate", "global_model.pt", cifar=small_cifar)
    assert evaluation.end() == 0
    (record,) = history(tmp_path)
    loss, accuracy = map(float, re.findall(r"(?:Loss|Accuracy): +([\d.]+)", evaluation.output))
    assert record["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert record["loss"] == pytest.approx(loss, rel=1e-5)


def test_seeds_make_a_run_repeatable(start_server, start_client, tmp_path):
    models = []
    for run, seeds in enumerate([(1, 2), (2, 1)]):
        server = start_server("--seed", 5, "--model", f"{run}.pt", "--rounds", 2)
        clients = []
        for seed in seeds:  # in this order: the second starts when the first has joined
            clients.append(start_client("--seed", seed))
            clients[-1].until("Connected to the server")
        assert_done(server, *clients)
        models.append((tmp_path / f"{run}.pt").read_bytes())
    assert models[0] == models[1]


def test_clients_wait_for_the_server(start_server, start_client):
    clients = [start_client(), start_client()]
    for client in clients:
        client.until("Waiting for the server at")
        assert "Connection refused" in client.output
    assert_done(start_server(), *clients)


def test_client_gives_up_waiting(start_client, address):
    client = start_client("--wait", 1)
    assert client.end() == 1
    last = client.output.splitlines()[-1]
    assert last.startswith(f"No server at {address} for 1 s: ") and "Connection refused" in last
    assert "Traceback" not in client.output


def test_server_says_for_how_many_it_waits(start_server, start_client):
    server = start_server("--rounds", 1)
    server.until("Waiting for clients: 0 of 2 connected")
    first = start_client()
    server.until("Waiting for clients: 1 of 2 connected")
    first.kill()
    server.until("Waiting for clients: 0 of 2 connected", count=2)
    assert_done(server, start_client(), start_client())


def test_client_dies_in_a_round(start_server, start_client, tmp_path):
    server = start_server(*LONG)
    clients = [start_client(), start_client()]
    clients[0].until("Training 40 epoch(s)")
    clients[0].kill()
    lost = f"Round 1/3: client {name_of(clients[0])!r} lost: disconnected\n"
    server.until(lost)
    server.until("Waiting for clients: 1 of 2 connected", after=lost)
    newcomer = start_client()
    assert_done(server, clients[1], newcomer)
    assert [record["clients"] for record in history(tmp_path)] == [1, 2, 2]


def test_server_dies_in_a_round(start_server, start_client, tmp_path):
    server = start_server(*LONG)
    clients = [start_client(), start_client()]
    server.until("Round 2/3: training on 2 of 2 clients")
    server.kill()
    for client in clients:
        client.until("), reconnecting for up to 60 s\n", after="Connection to the server lost (")
        client.until("Waiting for the server")
    before = history(tmp_path)
    assert [record["round"] for record in before] == [1]
    server = start_server(*LONG, "--resume")
    assert_done(server, *clients)
    assert [record["round"] for record in history(tmp_path)] == [1, 2, 3]
    assert history(tmp_path)[0] == before[0]
    assert "Round 2/3" in server.output and "Round 1/3" not in server.output


def test_resume_has_nothing_to_do(start_server, start_client, tmp_path):
    server = start_server("--rounds", 1, "--min-clients", 1)
    assert_done(server, start_client())
    model = (tmp_path / "global_model.pt").read_bytes()
    server = start_server("--rounds", 1, "--resume")
    assert server.end() == 0
    assert server.output.startswith("All 1 rounds are done: raise --rounds to continue.\n")
    assert "Listening" not in server.output and "    1 " in server.output
    assert (tmp_path / "global_model.pt").read_bytes() == model


def test_client_hangs(start_server, start_client, tmp_path):
    server = start_server(*LONG, "--round-timeout", 12, "--min-clients", 1, "--rounds", 2)
    server.until("Waiting for clients: 0 of 1")
    hanging = start_client()
    hanging.until("Training 40 epoch(s)")
    hanging.process.send_signal(signal.SIGSTOP)
    other = start_client()
    assert_done(server, other)
    lost = f"Round 1/2: client {name_of(hanging)!r} lost: timed out after 12 s\n"
    failed = "Round 1/2: failed (no usable updates), global model unchanged, trying again\n"
    assert lost + failed in server.output
    assert "attempt" not in server.output and "disconnected" not in server.output
    assert [record["clients"] for record in history(tmp_path)] == [1, 1]
    hanging.process.send_signal(signal.SIGCONT)
    hanging.until("Connection to the server lost (")  # and it would rejoin


# Clients that send what they should not.


class Learner(flwr.client.NumPyClient):
    """Adds one to every weight."""

    def fit(self, parameters, config):
        return [value + 1 for value in parameters], 1, {"client": type(self).__name__}

    def evaluate(self, parameters, config):
        return 1.0, 1, {"accuracy": 0.5, "client": type(self).__name__}


class SendsNaN(Learner):
    def fit(self, parameters, config):
        return [value * np.nan for value in parameters], 1, {"client": "SendsNaN"}

    def evaluate(self, parameters, config):
        return float("nan"), 1, {"accuracy": 0.5, "client": "SendsNaN"}


class SendsOtherShapes(Learner):
    def fit(self, parameters, config):
        return [value[:1] for value in parameters], 1, {"client": "SendsOtherShapes"}


class SendsJunk(flwr.client.Client):
    def fit(self, ins):
        junk = Parameters([b"\x93NUMPY junk", b""], "numpy.ndarray")
        return FitRes(Status(Code.OK, ""), junk, 1, {"client": "SendsJunk"})

    def evaluate(self, ins):
        return EvaluateRes(Status(Code.OK, ""), 1.0, 0, {"client": "SendsJunk"})


def test_bad_results_are_rejected(start_server, join, tmp_path):
    server = start_server("--min-clients", 4, "--rounds", 2, "--seed", 1)
    server.until("Waiting for clients: 0 of 4")
    first = torch.load(tmp_path / "global_model.pt")
    for client in (Learner(), SendsNaN(), SendsOtherShapes()):
        join(client.to_client())
    join(SendsJunk())
    assert_done(server)
    shapes = "conv1.weight: expected float32(6, 3, 5, 5), got float32(1, 3, 5, 5)"
    for rejected in (
        "update from client 'SendsNaN' rejected: NaN or infinity in conv1.weight",
        "evaluation from client 'SendsNaN' rejected: loss nan, accuracy 0.5",
        f"update from client 'SendsOtherShapes' rejected: {shapes} (different models?)",
        "update from client 'SendsJunk' rejected: unreadable parameters",
        "evaluation from client 'SendsJunk' rejected: 0 examples",
    ):
        assert server.output.count(rejected + "\n") == 2, server.output
    assert server.output.count("' rejected: ") == 10
    last = torch.load(tmp_path / "global_model.pt")
    for name, value in first.items():
        torch.testing.assert_close(last[name], value + 2)
    assert [record["clients"] for record in history(tmp_path)] == [1, 1]


def test_server_takes_anything_at_its_port(start_server, join, address):
    """Bytes that are no gRPC, a client that ends its stream, answers to other questions."""
    server = start_server("--min-clients", 2, "--rounds", 1)
    server.until("Waiting for clients: 0 of 2")
    host, port = address.split(":")
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 40, b""):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(junk)
    answer = ClientMessage(evaluate_res=ClientMessage.EvaluateRes(loss=7))
    with grpc.insecure_channel(address) as channel:
        stub = FlowerServiceStub(channel)
        silent = stub.Join(iter([]))
        assert next(silent).WhichOneof("msg") == "get_properties_ins"
        wrong = stub.Join(iter([answer, answer]))
        assert next(wrong).WhichOneof("msg") == "get_properties_ins"
        server.until("Waiting for clients: 1 of 2")
        join(Learner().to_client())
        assert next(wrong).WhichOneof("msg") == "fit_ins"
        server.until("training on 2 of 2 clients")
        server.until("rejected: 0 examples")
        server.until("lost: disconnected")
    assert_done(server)


def test_client_fails_in_its_own_training(start, start_server, start_client, address, program):
    broken = program(
        "import client\n"
        "def train(*args, **kwargs): raise ValueError('no such loss')\n"
        "cifar.train = train\n"
        "cifar.run_main(client.main)\n"
    )
    server = start_server("--rounds", 1)
    other = start_client()
    failing = start(broken, "--synthetic", "--server-address", address)
    assert failing.end() == 1
    assert failing.output.splitlines()[-1] == "ValueError: no such loss"
    assert failing.output.count("Traceback") == 1 and "program.py" in failing.output
    assert_done(server, other)
    assert f"Round 1/1: client {name_of(failing)!r} lost: disconnected\n" in server.output


# Work and waiting of any length.

# Runs a script as `python script.py ...` does, but with every interval at which gRPC asks for, or
# allows to be asked for, a sign of life a hundredth of what it is: that of the server's allowance
# is gRPC's own, 5 minutes. And a client's training takes 7 s, as if it were 700.
HURRIED = """
import os, runpy, sys, time
import grpc
ALLOWED = ("grpc.http2.min_ping_interval_without_data_ms", 300_000)
def hurried(make, *more):
    def hurry(options):
        return [(name, value // 100 if name.endswith("_ms") else value) for name, value in options]
    return lambda *args, options=(), **kwargs: make(
        *args, options=hurry([*more, *options]), **kwargs)
grpc.server = hurried(grpc.server, ALLOWED)
grpc.insecure_channel = hurried(grpc.insecure_channel)
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import cifar
train = cifar.train
def long(*args, **kwargs):
    time.sleep(7)
    train(*args, **kwargs)
if "--batch-size" in sys.argv:
    cifar.train = long
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_client_may_train_for_longer_than_any_patience(start, address, tmp_path):
    """One is at work for long, another waits for it that long; nobody is cut off."""

    (tmp_path / "hurried.py").write_text(HURRIED, encoding="utf-8")

    def hurried(script, *arguments):
        path = ROOT / script
        return start(tmp_path / "hurried.py", path, "--server-address", address, *arguments)

    server = hurried("server.py", "--rounds", 1)
    part = ["--synthetic", "--num-partitions", 100, "--partition-id"]
    clients = [
        hurried("client.py", *part, 0, "--batch-size", 10),
        hurried("client.py", *part, 1),
    ]
    assert_done(server, *clients)
    assert "lost: " not in server.output
    assert "lost" not in clients[0].output + clients[1].output
    assert [record["clients"] for record in history(tmp_path)] == [2]
    assert history(tmp_path)[0]["seconds"] >= 7


def test_server_ends_if_no_update_is_any_good(start_server, address, tmp_path):
    server = start_server("--min-clients", 1)
    server.until("Waiting for clients: 0")
    flwr.client.start_client(server_address=address, client=SendsNaN().to_client())
    assert server.end() == 1
    failed = "Round 1/3: failed (no usable updates), global model unchanged, attempt"
    attempts = [line for line in server.output.splitlines() if line.startswith(failed)]
    assert attempts == [f"{failed} {number} of 3" for number in (1, 2, 3)]
    last = server.output.splitlines()[-1]
    assert last == "Giving up after 3 failed attempts. Restart with --resume to continue."
    assert "Traceback" not in server.output
    assert history(tmp_path) == []


def test_goodbye_is_not_waited_for_for_ever(start_server, address, tmp_path):
    """A client answers everything but Flower's last message."""
    server = start_server("--min-clients", 1, "--rounds", 1)
    server.until("Waiting for clients: 0")
    answers: queue.Queue = queue.Queue()
    with grpc.insecure_channel(address) as channel:
        for message in FlowerServiceStub(channel).Join(iter(answers.get, None)):
            if message.WhichOneof("msg") == "get_properties_ins":
                get_properties_res = GetPropertiesRes(Status(Code.OK, ""), {"client": "mute"})
                proto = serde.get_properties_res_to_proto(get_properties_res)
                answers.put(ClientMessage(get_properties_res=proto))
            elif message.WhichOneof("msg") == "fit_ins":
                given = serde.fit_ins_from_proto(message.fit_ins).parameters
                fit_res = FitRes(Status(Code.OK, ""), given, 1, {})
                answers.put(ClientMessage(fit_res=serde.fit_res_to_proto(fit_res)))
            elif message.WhichOneof("msg") == "evaluate_ins":
                evaluate_res = EvaluateRes(Status(Code.OK, ""), 1.0, 1, {"accuracy": 0.5})
                proto = serde.evaluate_res_to_proto(evaluate_res)
                answers.put(ClientMessage(evaluate_res=proto))
            else:
                break
        assert_done(server)
    assert server.output.endswith(f"Model: {tmp_path / 'global_model.pt'}\n")


def test_server_ends_if_nobody_reads_what_it_prints(start_server, start_client, address, tmp_path):
    """As in `python3 server.py | head -1`: it must not stay, nor hold its port."""
    script = ROOT / "server.py"
    with subprocess.Popen(
        [sys.executable, script, "--server-address", address, "--min-clients", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith("Listening on")
        process.stdout.close()
        client = start_client("--wait", 1)
        assert process.wait(60) == 1
        assert process.stderr.read() == "Cannot print: Broken pipe.\n"
    assert client.end() == 1
    assert f"No server at {address} for 1 s: " in client.output


# Programs that use the scripts.

PRIVATE = """
import server
from flwr.server.strategy import DifferentialPrivacyServerSideFixedClipping
make_strategy = server.make_strategy
server.make_strategy = lambda parameters, config: DifferentialPrivacyServerSideFixedClipping(
    make_strategy(parameters, config), noise_multiplier=0, clipping_norm=1, num_sampled_clients=2)
cifar.run_main(server.main)
"""


def test_strategy_that_aggregates_only_complete_rounds(
    start, start_client, address, program, tmp_path
):
    """Flower's differential privacy aggregates nothing if a client was lost."""
    server = start(program(PRIVATE), "--server-address", address, "--rounds", 2, *LONG)
    clients = [start_client(), start_client()]
    for client in clients:
        client.until("Training 40 epoch(s)")
    clients[0].kill()
    lost = f"Round 1/2: client {name_of(clients[0])!r} lost: disconnected\n"
    server.until(lost)
    server.until(
        "Round 1/2: failed (the strategy returned no parameters), global model unchanged, "
        "trying again\n",
        after=lost,
    )
    assert_done(server, clients[1], start_client())
    assert "strategy DifferentialPrivacyServerSideFixedClipping" in server.output
    assert [record["clients"] for record in history(tmp_path)] == [2, 2]
    assert "attempt" not in server.output


ENDS = """
import atexit, runpy
atexit.register(print, "the end")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_exit_hooks_run(start, address, program):
    path = program(ENDS)
    scripts = [
        start(path, ROOT / name, "--server-address", address, *arguments)
        for name, *arguments in (
            ["server.py", "--min-clients", 1, "--rounds", 1],
            ["client.py", "--synthetic", "--num-partitions", 100],
        )
    ]
    assert_done(*scripts)
    for script, last in zip(scripts, ["Model: ", "Run ended by the server"]):
        *_, before, end = script.output.splitlines()
        assert before.startswith(last) and end == "the end"


FAULTY = """
import server
make_strategy = server.make_strategy
def make_faulty(parameters, config):
    strategy = make_strategy(parameters, config)
    strategy.evaluate_fn = lambda server_round, parameters, config: (1 / (1 - server_round), {})
    return strategy
server.make_strategy = make_faulty
cifar.run_main(server.main)
"""


def test_error_in_a_strategy_ends_the_server(start, start_client, address, program, tmp_path):
    server = start(program(FAULTY), "--server-address", address)
    clients = [start_client("--wait", 0), start_client("--wait", 0)]
    server.until("Round 1/3: training on 2 of 2 clients")
    assert server.end(timeout=20) == 1
    assert server.output.count("Traceback") == 1
    assert server.output.endswith("\nZeroDivisionError: division by zero\n")
    assert history(tmp_path) == []
    cifar.load_model(tmp_path / "global_model.pt")
    for client in clients:
        client.end(timeout=20)
        assert "Traceback" not in client.output


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_server_is_stopped(start_server, start_client, number, tmp_path):
    server = start_server("--local-epochs", 400, "--min-clients", 1)
    start_client().until("Training 400 epoch(s)")
    server.process.send_signal(number)
    assert server.end(timeout=5) == 1
    assert "Traceback" not in server.output
    stopped = "Stopped after 0 of 3 rounds. Model saved to global_model.pt. "
    assert server.output.endswith(f"\n{stopped}Restart with --resume to continue.\n")
    assert history(tmp_path) == []
    cifar.load_model(tmp_path / "global_model.pt")


def test_clients_are_stopped_and_the_other_goes_on(start_server, start_client):
    server = start_server(*LONG, "--rounds", 1, "--min-clients", 3)
    clients = [start_client(), start_client(), start_client()]
    ends = [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
    for client, (number, code) in zip(clients, ends):
        client.until("Training 40 epoch(s)")
        client.process.send_signal(number)
        assert client.end(timeout=5) == code
        assert "Traceback" not in client.output
    assert_done(server, clients[2])
    for client in clients[:2]:
        assert f"Round 1/1: client {name_of(client)!r} lost: disconnected\n" in server.output


# What is wrong from the start.


@pytest.fixture
def in_use():
    """Return an address at which somebody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_taken_port_is_told_in_one_line(start, in_use):
    server = start("server.py", "--server-address", in_use)
    assert server.end() == 1
    first, last = server.output.splitlines()
    assert first == f"Listening on {in_use}, TLS off, strategy FedAvg"
    assert last == f"Port in server address {in_use} is already in use."


TLS_FLAGS = ["--ssl-certfile", "--ssl-keyfile", "--ssl-ca-certfile"]


@pytest.mark.parametrize("missing", TLS_FLAGS)
def test_missing_tls_file_is_named_with_its_flag(call, monkeypatch, tmp_path, address, missing):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").touch()
    files = [part for flag in TLS_FLAGS for part in (flag, "no" if flag == missing else "junk")]
    said = f"Path argument `{missing}` does not point to a file."
    call("server", "--server-address", address, *files, code=said)
    assert os.listdir(tmp_path) == ["junk"]


TLS = [part for flag in TLS_FLAGS for part in (flag, "junk")]
WRONG_STARTS = {
    ("server", "--resume"): "Cannot read the model global_model.pt",
    ("server", *TLS): "Invalid TLS certificate or key in --ssl-ca-certfile: ",
}


@pytest.mark.parametrize("command", WRONG_STARTS)
def test_wrong_start_is_an_error_for_the_user(monkeypatch, tmp_path, address, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_text("junk")
    module, *arguments = command
    if "--server-address" not in arguments:
        arguments += ["--server-address", address]
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
    with pytest.raises(cifar.UserError, match=re.escape(WRONG_STARTS[command])) as error:
        importlib.import_module(module).main()
    assert "\n" not in str(error.value)
    assert set(os.listdir(tmp_path)) <= {"junk", "global_model.lock"}


WRONG_FLAGS = {
    ("server", "--server-address", "8080"): "argument --server-address: '8080' is not HOST",
    ("server", "--rounds", "0"): "argument --rounds: 0 is not between",
    ("server", "--round-timeout", "-1"): "argument --round-timeout: -1 is not between",
    ("server", "--lr", "0"): "argument --lr: 0 is not between",
    ("server", "--model", "/"): "argument --model: / must end in .pt",
    ("server", "--model", "lr0.1"): "argument --model: lr0.1 must end in .pt",
    ("server", "--model", "no/where.pt"): "be in an existing, writable directory",
    ("client", "--server-address", "x:y"): "argument --server-address: 'x:y' is not HOST",
    ("client", "--alpha", "0"): "argument --alpha: 0 is not between",
    ("client", "--root-certificates", "no"): "--root-certificates: no: No such file or directory",
    ("client", "--lr", "1"): "unrecognized arguments: --lr 1",
}


@pytest.mark.parametrize("command", WRONG_FLAGS)
def test_wrong_flags_are_argparses_errors(call, command):
    assert WRONG_FLAGS[command] in call(*command, code=2)
