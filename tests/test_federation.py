"""End-to-end tests: the scripts as processes, which fail, hang or are stopped."""

import contextlib
import functools
import http.server
import os
import platform
import queue
import re
import signal
import socket
import subprocess
import sys
import threading

import flwr
import grpc
import pytest
from flwr.common import Code, EvaluateRes, FitRes, GetPropertiesRes, Status, serde
from flwr.proto.transport_pb2 import ClientMessage
from flwr.proto.transport_pb2_grpc import FlowerServiceStub
from helpers import ROOT, free_address, history

import cifar

FOREVER = ["--local-epochs", 10**6]
LONG = ["--local-epochs", 20]  # a round takes about a second
OK = Status(Code.OK, "")
needs_posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no signals")


@pytest.fixture
def start_server(start, address):
    return lambda *arguments: start("server.py", "--server-address", address, *arguments)


@pytest.fixture
def start_client(start, address, small_cifar):
    """Start a client on the small CIFAR-10."""
    flags = ["--server-address", address]
    return lambda *arguments: start("client.py", *flags, *arguments, cifar=small_cifar)


class Learner(flwr.client.NumPyClient):
    """Adds one to every weight."""

    def fit(self, parameters, config):
        return [value + 1 for value in parameters], 1, {"client": "learner"}

    def evaluate(self, parameters, config):
        return 1.0, 1, {"accuracy": 0.5, "client": "learner"}


@pytest.fixture
def join(address):
    """Run a client in a thread of this process; the server must be running."""
    threads = []

    def run(client: flwr.client.Client) -> None:
        with contextlib.suppress(grpc.RpcError):  # the server has ended
            flwr.client.start_client(server_address=address, client=client)

    def join_one(client: flwr.client.NumPyClient) -> None:
        threads.append(threading.Thread(target=run, args=(client.to_client(),), daemon=True))
        threads[-1].start()

    yield join_one
    for thread in threads:
        thread.join(30)


def assert_done(server, *clients):
    assert server.end() == 0, server.output
    for client in clients:
        assert client.end() == 0, client.output
    for script in (server, *clients):
        assert "Traceback" not in script.output
        assert "DEPRECATED" not in script.output


def name_of(client) -> str:
    """Return the name of a client that runs as a process."""
    return f"{platform.node()}-{client.process.pid}"


# Without failures.


def test_federation_learns(start, start_server, address, tmp_path, call):
    """The README's commands on generated images, with the clients started first."""
    arguments = ["client.py", "--server-address", address, "--synthetic"]
    clients = [start(*arguments, "--seed", seed) for seed in (1, 2)]
    for client in clients:
        client.until(f"Waiting for the server at {address}: ")
    server = start_server("--seed", 1)
    assert_done(server, *clients)
    records = history(tmp_path / "global_model.pt")
    assert [record["round"] for record in records] == [1, 2, 3]
    assert [record["clients"] for record in records] == [2, 2, 2]
    accuracies = [record["accuracy"] for record in records]
    assert accuracies[0] < 0.8 < accuracies[2]
    assert records[2]["loss"] < records[0]["loss"]
    for record in records:
        line = f"Round {record['round']}/3: loss {record['loss']:.4f}, "
        assert f"{line}accuracy {record['accuracy']:.4f}, clients 2, " in server.output
        row = rf"^ +{record['round']} +{record['loss']:.4f} "
        assert re.search(row, server.output, re.MULTILINE)
    assert server.output.endswith(f"Model: {tmp_path / 'global_model.pt'}\n")
    assert "[1,   300] loss: " in clients[0].output
    output = call("cifar", "--synthetic", "--evaluate", tmp_path / "global_model.pt")
    accuracy = float(output.rpartition("Accuracy: ")[2])
    assert accuracy == pytest.approx(accuracies[2], abs=1e-9)


def test_seeds_make_a_run_repeatable(start, small_cifar, tmp_path):
    """Two runs at the same time, whose clients join in different orders."""
    scripts = []
    runs = [(free_address(), "a.pt", (1, 2)), (free_address(), "b.pt", (2, 1))]
    for address, model, _ in runs:
        flags = ["--server-address", address, "--model", model]
        scripts.append(start("server.py", *flags, "--seed", 5, "--rounds", 1))
    for i in (0, 1):  # the second starts when the first has joined
        clients = []
        for address, _, seeds in runs:
            flags = ["--server-address", address, "--seed", seeds[i]]
            clients.append(start("client.py", *flags, cifar=small_cifar))
        for client in clients:
            client.until("Connected to the server")
        scripts += clients
    assert_done(*scripts)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


# Runs a script, and prints each HTTP request that it sends, and when it exits.
WATCHED = """
import atexit, runpy
sys.addaudithook(lambda event, args: event == "urllib.Request" and print("request to", args[0]))
atexit.register(print, "the end")
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_exit_hooks_run_and_no_telemetry_is_sent(start, address, program):
    path = program(WATCHED)
    flags = ["--server-address", address]
    scripts = [
        start(path, ROOT / "server.py", *flags, "--min-clients", 1, "--rounds", 1),
        start(path, ROOT / "client.py", *flags, "--synthetic", "--num-partitions", 100),
    ]
    assert_done(*scripts)
    for script, last in zip(scripts, ["Model: ", "Run ended by the server"]):
        *_, before, end = script.output.splitlines()
        assert before.startswith(last) and end == "the end"
        assert "request to" not in script.output


# Clients that fail.


@pytest.fixture
def call_client(call, monkeypatch):
    """Call client.py in this process, as `call` does; undo afterwards that it wraps gRPC."""
    for name in ("insecure_channel", "secure_channel"):
        monkeypatch.setattr(grpc, name, getattr(grpc, name))
    return functools.partial(call, "client")


def test_client_stops_waiting_for_the_server(call_client, address, small_root):
    flags = ["--data-root", small_root, "--wait", 1]
    *_, waiting, last = call_client("--server-address", address, *flags, code=1).splitlines()
    assert waiting.startswith(f"Waiting for the server at {address}: ")
    assert last.startswith(f"No server answered at {address} within 1 s: ")
    if sys.platform == "linux":
        assert last.endswith(": Connection refused (is it running?).")


def test_client_at_the_port_of_another_program(call_client):
    handler = http.server.BaseHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{other.server_port}"
        output = call_client("--synthetic", "--wait", 0, "--server-address", address, code=1)
        other.shutdown()
    reason = "it is not a Flower server (wrong port?)."
    assert output.splitlines()[-1] == f"No server answered at {address} within 0 s: {reason}"


def test_client_is_killed_during_a_round(start_server, start_client, join, tmp_path):
    server = start_server(*FOREVER, "--round-timeout", 600)
    client = start_client()
    client.until("Connected to the server")
    join(Learner())
    client.until("Training 1000000 epoch(s)")
    client.kill()
    lost = f"Round 1/3: client {name_of(client)!r} lost: disconnected\n"
    server.until(lost)
    server.until("Waiting for clients: 1 of 2 connected", after=lost)
    join(Learner())
    assert_done(server)
    assert [record["clients"] for record in history(tmp_path / "global_model.pt")] == [1, 2, 2]


BROKEN = """
import client
def train(*args, **kwargs): raise ValueError('no such loss')
cifar.train = train
cifar.run_main(client.main)
"""


def test_client_raises_an_exception_during_training(start, start_server, join, address, program):
    server = start_server("--rounds", 1)
    client = start(program(BROKEN), "--synthetic", "--server-address", address)
    client.until("Connected to the server")
    join(Learner())
    assert client.end() == 1
    assert client.output.splitlines()[-1] == "ValueError: no such loss"
    assert client.output.count("Traceback") == 1 and "program.py" in client.output
    assert_done(server)
    assert f"Round 1/1: client {name_of(client)!r} lost: disconnected\n" in server.output


# A client whose training ends when the test says so, by closing a connection.
HANGING = """
import os, socket, client
def train(*args, **kwargs): socket.create_connection(("127.0.0.1", os.environ["PORT"])).recv(1)
cifar.train = train
cifar.run_main(client.main)
"""


def test_client_hangs(start, start_server, join, address, program, tmp_path):
    server = start_server("--round-timeout", 5, "--min-clients", 1, "--rounds", 2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        client = start(program(HANGING), "--synthetic", "--server-address", address, PORT=port)
        listener.settimeout(120)
        training, _ = listener.accept()
        with training:
            join(Learner())
            assert_done(server)
    client.until("Connection to the server lost (")  # and it would rejoin
    lost = f"Round 1/2: client {name_of(client)!r} lost: timed out after 5 s\n"
    failed = "Round 1/2: failed (no usable updates), global model unchanged, trying again\n"
    assert lost + failed in server.output
    assert "attempt" not in server.output and "disconnected" not in server.output
    assert [record["clients"] for record in history(tmp_path / "global_model.pt")] == [1, 1]


def test_server_is_killed_during_a_round(start_server, start_client, tmp_path):
    path = tmp_path / "global_model.pt"
    server = start_server(*LONG, "--rounds", 2)
    clients = [start_client(), start_client()]
    server.until("Round 2/2: training on 2 of 2 clients")
    server.kill()
    for client in clients:
        client.until(
            "), trying to reconnect for up to 60 s\n", after="Connection to the server lost ("
        )
        client.until("Waiting for the server")
    before = history(path)
    assert [record["round"] for record in before] == [1]
    server = start_server(*LONG, "--rounds", 2, "--resume")
    assert_done(server, *clients)
    assert [record["round"] for record in history(path)] == [1, 2]
    assert history(path)[0] == before[0]
    assert "Round 2/2" in server.output and "Round 1/2" not in server.output


# Invalid messages.


def test_server_survives_invalid_messages(start_server, join, address):
    """Bytes that are not gRPC, a client that never answers, and one with wrong answers."""
    server = start_server("--min-clients", 2, "--rounds", 1)
    server.until("Waiting for clients: 0 of 2")
    host, port = address.split(":")
    for junk in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 40, b""):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(junk)
    answer = ClientMessage(evaluate_res=ClientMessage.EvaluateRes(loss=7))
    with grpc.insecure_channel(address) as channel:
        stub = FlowerServiceStub(channel)
        silent = stub.Join(iter(queue.Queue().get, None))
        assert next(silent).WhichOneof("msg") == "get_properties_ins"
        wrong = stub.Join(iter([answer, answer]))
        assert next(wrong).WhichOneof("msg") == "get_properties_ins"
        server.until("Waiting for clients: 1 of 2")
        join(Learner())
        assert next(wrong).WhichOneof("msg") == "fit_ins"
        server.until("training on 2 of 2 clients")
        server.until("rejected: 0 examples")
        server.until("lost: disconnected")
        assert_done(server)


def test_disconnecting_clients_has_a_time_limit(start_server, address: str, tmp_path) -> None:
    """A client answers every message but the last, which disconnects it."""
    server = start_server("--min-clients", 1, "--rounds", 1)
    server.until("Waiting for clients: 0")
    with grpc.insecure_channel(address) as channel:
        answers: queue.Queue = queue.Queue()
        messages = FlowerServiceStub(channel).Join(iter(answers.get, None))
        assert next(messages).WhichOneof("msg") == "get_properties_ins"
        properties = serde.get_properties_res_to_proto(GetPropertiesRes(OK, {"client": "mute"}))
        answers.put(ClientMessage(get_properties_res=properties))
        given = serde.fit_ins_from_proto(next(messages).fit_ins).parameters
        trained = serde.fit_res_to_proto(FitRes(OK, given, 1, {}))
        answers.put(ClientMessage(fit_res=trained))
        assert next(messages).WhichOneof("msg") == "evaluate_ins"
        tested = serde.evaluate_res_to_proto(EvaluateRes(OK, 1.0, 1, {"accuracy": 0.5}))
        answers.put(ClientMessage(evaluate_res=tested))
        assert next(messages).WhichOneof("msg") == "reconnect_ins"
        assert_done(server)
    assert server.output.endswith(f"Model: {tmp_path / 'global_model.pt'}\n")


# Long training, and dead connections.

# Runs a script with gRPC's keep-alive intervals divided by 100, including the server's minimum
# between two pings (5 minutes by default). A client's training takes 7 s, as if it were 700.
ACCELERATED = """
import os, runpy, time
import grpc
ALLOWED = ("grpc.http2.min_ping_interval_without_data_ms", 300_000)
def accelerated(make, *more):
    def accelerate(options):
        return [(name, value // 100 if name.endswith("_ms") else value) for name, value in options]
    return lambda *args, options=(), **kwargs: make(
        *args, options=accelerate([*more, *options]), **kwargs)
grpc.server = accelerated(grpc.server, ALLOWED)
grpc.insecure_channel = accelerated(grpc.insecure_channel, *PINGS)
train = cifar.train
def long(*args, **kwargs):
    time.sleep(7)
    train(*args, **kwargs)
if "--batch-size" in sys.argv:
    cifar.train = long
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""
FEW = ["--synthetic", "--num-partitions", 100]


def test_long_training_is_not_interrupted(start, address, program, tmp_path):
    """One client trains for long, and another waits for it: neither is disconnected."""
    path = program(f"PINGS = []{ACCELERATED}")
    flags = ["--server-address", address]
    server = start(path, ROOT / "server.py", *flags, "--rounds", 1)
    clients = [
        start(path, ROOT / "client.py", *flags, *FEW, "--batch-size", 10),
        start(path, ROOT / "client.py", *flags, *FEW, "--partition-id", 1),
    ]
    assert_done(server, *clients)
    assert "lost: " not in server.output
    assert "lost" not in clients[0].output + clients[1].output
    (record,) = history(tmp_path / "global_model.pt")
    assert record["clients"] == 2 and record["seconds"] >= 7


class Link:
    """A proxy for the server that can drop all traffic without closing a connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.partition(":")
        self.server = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.dead = False
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.server)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.carry, args=pair, daemon=True).start()

    def carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the other direction has ended
            while data := one.recv(2**16):
                if not self.dead:
                    other.sendall(data)
            if not self.dead:
                other.shutdown(socket.SHUT_WR)


def test_client_detects_a_dead_connection(start, start_server, address, program):
    server = start_server()
    server.until("Waiting for clients: 0 of 2")
    link = Link(address)
    with link.listener:
        # gRPC's default time limit for the answer to a ping
        path = program(f"PINGS = [('grpc.http2.ping_timeout_ms', 60_000)]{ACCELERATED}")
        client = start(path, ROOT / "client.py", "--server-address", link.address, *FEW)
        server.until("Waiting for clients: 1 of 2")
        link.dead = True
        client.until(
            "), trying to reconnect for up to 60 s\n", after="Connection to the server lost ("
        )


# How the scripts end.


@needs_posix
def test_server_exits_if_its_output_is_closed(address, join, tmp_path):
    """As in `python3 server.py | head`: it must not keep running."""
    command = [sys.executable, ROOT / "server.py", "--server-address", address]
    with subprocess.Popen(
        [*command, "--min-clients", "1", "--rounds", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=tmp_path,
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith("Listening on")
        assert process.stdout.readline().startswith("Waiting for clients: 0")  # it listens now
        join(Learner())
        while "training on 1 of 1 clients" not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        assert process.wait(120) == 1
        assert process.stderr.read() == "Cannot print: Broken pipe.\n"


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


def test_error_in_a_strategy_ends_the_server(start, join, address, program, tmp_path):
    server = start(program(FAULTY), "--server-address", address)
    server.until("Waiting for clients: 0 of 2")
    join(Learner())
    join(Learner())
    assert server.end() == 1
    assert "Round 1/3: training on 2 of 2 clients" in server.output
    assert server.output.count("Traceback") == 1
    assert server.output.endswith("\nZeroDivisionError: division by zero\n")
    assert history(tmp_path / "global_model.pt") == []
    cifar.load_model(tmp_path / "global_model.pt")


@pytest.fixture
def busy(join):
    """Return a function that starts a client, which trains until the test ends."""
    over = threading.Event()

    class Busy(Learner):
        def fit(self, parameters, config):
            over.wait(60)
            return super().fit(parameters, config)

    yield lambda: join(Busy())
    over.set()


@needs_posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_server_is_stopped(start_server, busy, name, tmp_path):
    server = start_server("--min-clients", 1)
    server.until("Waiting for clients: 0 of 1")
    busy()
    server.until("training on 1 of 1 clients")
    server.process.send_signal(getattr(signal, name))
    assert server.end() == 1
    assert "Traceback" not in server.output
    saved = f"Model saved to {tmp_path / 'global_model.pt'}"
    stopped = f"Stopped after 0 of 3 rounds. {saved}. Restart with --resume to continue."
    assert server.output.endswith(f"\n{stopped}\n")
    assert history(tmp_path / "global_model.pt") == []
    cifar.load_model(tmp_path / "global_model.pt")


@needs_posix
def test_round_continues_without_stopped_clients(start_server, start_client, join):
    server = start_server(*FOREVER, "--rounds", 1, "--min-clients", 3)
    clients = [start_client(), start_client()]
    for client in clients:
        client.until("Connected to the server")
    join(Learner())
    for client, (number, code) in zip(clients, [(signal.SIGINT, 130), (signal.SIGTERM, -15)]):
        client.until("Training 1000000 epoch(s)")
        client.process.send_signal(number)
        assert client.end() == code
        assert "Traceback" not in client.output
    assert_done(server)
    for client in clients:
        assert f"Round 1/1: client {name_of(client)!r} lost: disconnected\n" in server.output


def test_port_in_use_is_one_line(start, tmp_path):
    (tmp_path / "global_model.pt").write_bytes(b"of an earlier run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = start("server.py", "--server-address", address)
        assert server.end() == 1
    assert server.output == f"Port in server address {address} is already in use.\n"
    assert (tmp_path / "global_model.pt").read_bytes() == b"of an earlier run"
