"""Tests of whole federations: server.py and client.py as processes, and what may go wrong."""

import importlib
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import flwr as fl
import grpc
import pytest
import torch
from flwr.proto.transport_pb2 import ClientMessage
from flwr.proto.transport_pb2_grpc import FlowerServiceStub
from helpers import ROOT, history, linux

import cifar
import client

FEW = ["--synthetic", "--num-partitions", 100]


class Learner(fl.client.NumPyClient):
    """A client that learns nothing; when it is asked to train or evaluate, these are called."""

    def __init__(self, train=lambda: None, evaluate=lambda: None):
        self.when_asked = train, evaluate

    def fit(self, parameters, config):
        self.when_asked[0]()
        return parameters, 1, {}

    def evaluate(self, parameters, config):
        self.when_asked[1]()
        return 1.0, 1, {}


@pytest.fixture
def serve(start, address):

    def start_server(*arguments, name="server.py", waiting="Waiting for clients: 0 of"):
        server = start(name, "--server-address", address, *arguments)
        server.until(waiting)
        return server

    return start_server


@pytest.fixture
def join(start, address):
    """Start client.py with few images, or start a Learner in this process."""

    def start_client(*arguments, name="client.py", learner=None, **env):
        if learner is None:
            return start(name, "--server-address", address, *FEW, *arguments, **env)
        keywords = {"server_address": address, "client": learner.to_client()}
        threading.Thread(target=fl.client.start_client, kwargs=keywords, daemon=True).start()

    return start_client


def test_federation_learns(start, address, tmp_path):
    common = ["--server-address", address, "--seed", 1]
    halves = [["--synthetic", "--num-partitions", 2, "--partition-id", i] for i in (0, 1)]
    clients = [start("client.py", *common, *half) for half in halves]
    clients[0].until("Waiting up to 60 s for the server")
    path = tmp_path / "new" / "model.pt"
    server = start("server.py", *common, "--lr", 0.02, "--rounds", 2, "--model", path)
    assert server.end() == 0, server.output
    assert [client.end() for client in clients] == [0, 0], clients[0].output
    _, record = history(path)
    lines = ["configure_fit: strategy sampled 2 clients (out of 2)", f"{record}\n"]
    lines += ["aggregate_evaluate: received 2 results", f"round 2: {record['loss']}"]
    assert [line for line in lines if line not in server.output] == []
    for text in ("DEPRECATED", "WARN"):
        assert text not in server.output + clients[0].output
    testloader = cifar.load_data(synthetic=True)[1]
    loss, accuracy = cifar.test(cifar.load_model(path), testloader, torch.device("cpu"))
    assert accuracy == pytest.approx(record["accuracy"], abs=1e-9) and accuracy > 0.8
    assert loss == pytest.approx(record["loss"], rel=1e-5)


def test_client_with_the_same_seed_sends_the_same_bytes():
    def update(*seed):
        made = client.make_client(client.make_parser().parse_args([*map(str, FEW), *seed]))
        parameters = [0 * array + 0.1 for array in made.get_parameters({})]
        return b"".join(array.tobytes() for array in made.fit(parameters, {})[0])

    assert update("--seed", "7") == update("--seed", "7") != update()


WORKERS = f"""
import functools, sys
sys.path[0] = {str(ROOT)!r}
import cifar, client
cifar.DataLoader = functools.partial(cifar.DataLoader, num_workers=2)
client.main()
"""


def test_data_loaders_may_have_workers(serve, join, tmp_path):
    (tmp_path / "program.py").write_text(WORKERS)
    server = serve("--rounds", 2, "--min-clients", 1)
    client = join(name="program.py")
    assert server.end() == 0, server.output
    assert client.end() == 0, client.output
    assert [record["clients"] for record in history(tmp_path / "global_model.pt")] == [1, 1]


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_client_is_ended_while_it_trains(serve, join, tmp_path, number):
    server = serve("--local-epochs", 1_000_000, "--rounds", 2)
    client = join()
    join(learner=Learner())
    client.until("Training 1000000 epoch(s)")
    client.process.send_signal(number)
    assert client.end() == {signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    assert "Traceback" not in client.output
    server.until("A client failed: GrpcBridgeClosed()")
    server.until("aggregate_fit: received 1 results and 1 failures")
    server.until("Waiting for clients: 1 of 2 connected", 2)
    join(learner=Learner())
    assert server.end() == 0, server.output
    assert [record["clients"] for record in history(tmp_path / "global_model.pt")] == [1, 2]


def test_round_ends_without_clients_that_hang_or_fail(serve, join, address, tmp_path):
    """While one trains, and another evaluates in the last round; on all addresses."""
    there = ["--server-address", address.replace("127.0.0.1", "0.0.0.0")]
    server = serve("--round-timeout", 2, "--rounds", 1, "--min-clients", 3, *there)
    over = threading.Event()
    for learner in (Learner(over.wait), Learner(evaluate=None), Learner()):
        join(learner=learner)
    assert server.end() == 0, server.output
    over.set()
    assert "No TLS: others on the network can read and change what is sent" in server.output
    assert server.output.count("A client failed: GrpcBridgeClosed()") == 2
    (record,) = history(tmp_path / "global_model.pt")
    assert record["clients"] == 2 and record["loss"] == 1


def test_client_that_never_says_goodbye_does_not_keep_the_server(serve, join, address):
    server = serve("--rounds", 1, "--min-clients", 1)
    with grpc.insecure_channel(address) as channel:
        answers: queue.Queue = queue.Queue()
        messages = FlowerServiceStub(channel).Join(iter(answers.get, None))
        parameters = next(messages).fit_ins.parameters
        answers.put(ClientMessage(fit_res={"parameters": parameters, "num_examples": 1}))
        assert next(messages).WhichOneof("msg") == "evaluate_ins"
        answers.put(ClientMessage(evaluate_res={"loss": 1, "num_examples": 1}))
        assert next(messages).WhichOneof("msg") == "reconnect_ins"
        assert server.end() == 0, server.output


@linux
@pytest.mark.parametrize("stop", ["waits 2", "train 15", "evaluate 2", "evaluate 9"])
def test_server_that_is_stopped_resumes_where_it_was(serve, join, tmp_path, stop):
    state, number = stop.split()
    server = serve()
    client = join()
    client.until("Waiting up to 60 s for the server")
    turns = threading.Semaphore(1)  # for one round
    if state == "waits":
        join(learner=Learner(evaluate=None))
        server.until("Waiting for clients: 1 of 2 connected", 2)
    else:
        join(learner=Learner(**{state: turns.acquire}))
        client.until("Sent reply", {"train": 3, "evaluate": 4}[state])
    server.process.send_signal(int(number))
    assert server.end(timeout=6) == {"9": -9}.get(number, 0)
    assert "Traceback" not in server.output
    client.until("Connection lost: ")
    (before,) = history(tmp_path / "global_model.pt")
    server = serve("--resume", waiting="[ROUND 2]")
    join(learner=Learner())
    assert server.end() == 0, server.output
    assert client.end() == 0 and "DEPRECATED" not in client.output, client.output
    after = history(tmp_path / "global_model.pt")
    assert [record["round"] for record in after] == [1, 2, 3] and after[0] == before
    assert all("loss" in record for record in after)


RAISING = f"""
import atexit, sys
sys.path[0] = {str(ROOT)!r}
import server
atexit.register(print, "cleaned up")
server.average = lambda metrics: 1 / 0
server.main()
"""


def test_exception_in_a_strategy_ends_the_server_and_releases_the_clients(serve, join, tmp_path):
    (tmp_path / "program.py").write_text(RAISING)
    server = serve("--min-clients", 1, name="program.py")
    client = join()
    assert server.end() == 1
    assert server.output.endswith("ZeroDivisionError: division by zero\ncleaned up\n")
    assert server.output.count("Traceback") == 1 and "[SUMMARY]" not in server.output
    assert client.end() == 0


def test_port_that_is_taken_is_one_line_and_no_file_is_touched(start, address, tmp_path):
    (tmp_path / "global_model.pt").write_bytes(b"of an earlier run")
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        server = start("server.py", "--server-address", address)
        assert server.end() == 1
    assert server.output.endswith(f"\nPort in server address {address} is already in use.\n")
    assert (tmp_path / "global_model.pt").read_bytes() == b"of an earlier run"
    assert len(list(tmp_path.iterdir())) == 1


@linux
def test_no_proxy_for_this_machine(serve, join, address, monkeypatch):
    """127.0.0.2 stands for another machine."""
    monkeypatch.delenv("no_grpc_proxy")  # which client.py sets when it is imported
    proxy = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "example.org"}
    server = serve("--rounds", 1, "--server-address", address.replace("127.0.0.1", "0.0.0.0"))
    other = ["--server-address", address.replace("127.0.0.1", "127.0.0.2")]
    proxied = join(*other, "--wait", 2, **proxy)
    clients = [join(**proxy), join(*other, **{**proxy, "no_proxy": "127.0.0.2"})]
    assert proxied.end() == 1 and proxied.output.endswith("Is a proxy set (http_proxy)?\n")
    assert f"No server at {other[1]} within 2 s." in proxied.output
    assert [client.end() for client in clients] == [0, 0], clients[1].output
    assert server.end() == 0, server.output


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_tls_with_the_commands_of_the_readme(serve, join, tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```bash\n(\(mkdir.*?)^```", readme, re.MULTILINE | re.DOTALL)
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-ec", commands], env=env, check=True)
    folder = tmp_path / "federation-tls"
    files = {"certfile": "server.pem", "keyfile": "server.key", "ca-certfile": "ca.pem"}
    flags = [f"--ssl-{flag}={folder / file}" for flag, file in files.items()]
    server = serve(*flags, "--rounds", 1, "--min-clients", 1)
    assert "SSL is enabled" in server.output
    plain = join("--wait", 2)
    assert plain.end() == 1 and "exactly if --root-certificates is given?" in plain.output
    good = join("--root-certificates", folder / "ca.pem")
    assert good.end() == 0, good.output
    assert server.end() == 0, server.output


@pytest.mark.parametrize(
    "script, arguments, code, text",
    [
        ("server", ["--model", "model.json"], 2, "--model must end in .pt"),
        ("server", ["--resume"], 1, "Cannot load global_model.pt as a state_dict of Net: "),
        ("server", ["--resume", "--model", "done.pt"], 2, "--rounds must be more than 3"),
        ("server", ["--resume", "--model", "bad.pt"], 1, "Cannot load bad.json: Expecting value"),
        ("server", ["--ssl-keyfile", "key"], 1, "You need to provide valid file paths to"),
        ("client", ["--partition-id", "3", "--num-partitions", "3"], 2, "must be from 0 to 2"),
        ("client", ["--root-certificates", "no"], 2, "No such file or directory: 'no'"),
    ],
)
def test_wrong_flag_is_one_line(monkeypatch, capsys, tmp_path, script, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    for name, records in (("done", json.dumps([{"round": n} for n in (1, 2, 3)])), ("bad", "")):
        torch.save(cifar.Net().state_dict(), f"{name}.pt")
        Path(f"{name}.json").write_text(records)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    says = ended.value.code  # Python exits with 1 for a text
    assert text in capsys.readouterr().err + str(says)
    assert (1 if isinstance(says, str) else says) == code


@pytest.mark.parametrize("setting", [{}, {"FLWR_TELEMETRY_ENABLED": "1"}])
@pytest.mark.parametrize("script", ["server", "client"])
def test_telemetry_is_off_unless_a_user_turns_it_on(script, setting):
    name = "FLWR_TELEMETRY_ENABLED"  # a variable, and a constant of Flower's
    env = {key: value for key, value in os.environ.items() if key != name} | setting
    program = (
        f"import sys, {script}; print({{vars(m).get('{name}') for m in sys.modules.values()}})"
    )
    output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=env, text=True)
    assert eval(output) == {None, setting.get(name, "0")}
