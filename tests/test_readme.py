"""What the README tells its reader to do works as written: TLS, Flower's engine, the example."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import cifar

README = (ROOT / "README.md").read_text()


def block(language: str, text: str) -> str:
    """Return the README's code block in that language that holds the text."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (found,) = [content for content in blocks if text in content]
    return found


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [str(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.parametrize("script", ["cifar", "server", "client"])
def test_every_flag_is_in_the_readme(call, script):
    flags = set(re.findall(r"--[a-z][a-z-]+", call(script, "--help").partition("options:")[2]))
    table = README[README.index(f"| {script}.py | default") :].partition("\n\n")[0]
    rows = {flag for row in table.splitlines() for flag in re.findall("--[a-z][a-z-]+", row[:70])}
    assert flags - {"--help"} == rows


# TLS.


@pytest.fixture
def tls(tmp_path):
    """Run the README's openssl commands in an empty home; return the folder they make."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    env = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(["bash", "-ec", block("bash", "openssl")], env=env, check=True)
    return tmp_path / "federation-tls"


def test_tls_lets_in_who_trusts_the_authority_and_tells_the_others_why(
    start, address, small_cifar, tls, tmp_path
):
    command = block("bash", "--ssl-certfile").replace("~/federation-tls", str(tls)).split()
    command[command.index("0.0.0.0:8080")] = address.replace("127.0.0.1", "0.0.0.0")
    server = start(*command[1:], "--min-clients", 1, "--rounds", 1)
    server.until("Waiting for 1 client")
    assert "TLS on" in server.output and "Warning" not in server.output
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=other"]
        + ["-keyout", tls / "other.key", "-out", tls / "other.pem"],
        check=True,
    )
    arguments = ["client.py", "--server-address", address, "--wait", 2]
    plain = start(*arguments, cifar=small_cifar)
    other = start(*arguments, "--root-certificates", tls / "other.pem", cifar=small_cifar)
    for client, reason in (
        (plain, "if it uses TLS, add --root-certificates"),
        (other, "is not from the authority in --root-certificates"),
    ):
        assert client.end() == 1
        assert reason in client.output.splitlines()[-1]
        assert "Connected" not in client.output
    good = start(*arguments, "--root-certificates", tls / "ca.pem", cifar=small_cifar)
    assert good.end() == 0, good.output
    assert server.end() == 0, server.output


def test_client_with_tls_is_told_that_the_server_has_none(start, address, small_cifar, tls):
    server = start("server.py", "--server-address", address.replace("127.0.0.1", "0.0.0.0"))
    server.until("Waiting for 2 clients")
    assert "Warning: whoever reaches 0.0.0.0" in server.output
    arguments = ["--server-address", address, "--wait", 1, "--root-certificates", tls / "ca.pem"]
    client = start("client.py", *arguments, cifar=small_cifar)
    assert client.end() == 1
    assert "it does not use TLS, leave --root-certificates out" in client.output


# Flower's engine, and the example.


def test_flowers_engine_runs_the_same_server_and_clients(tmp_path):
    """Make the folder and run the commands that the README shows, on ports that are free."""
    app, home = tmp_path / "app", tmp_path / "home"
    app.mkdir()
    home.mkdir()
    for name in ("cifar.py", "client.py", "server.py"):
        shutil.copy(ROOT / name, app)
    ports = dict(zip(["8000", "9094", "9095"], free_ports(3)))

    def with_ports(text: str) -> str:
        return re.sub("8000|9094|9095", lambda match: ports[match[0]], text)

    (app / "pyproject.toml").write_text(block("toml", "[tool.flwr.app.components]"))
    (home / "config.toml").write_text(with_ports(block("toml", "[superlink.local]")))
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOG_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
    }
    superlink, *supernodes, run = with_ports(block("bash", "flower-superlink")).splitlines()
    started = []

    def start_until(command: str, text: str) -> None:
        """Start a command of the README, and wait until it has printed the text."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=app,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout
        seen = ""
        for line in process.stdout:
            seen += line
            if text in line:
                break
        assert text in seen, seen
        threading.Thread(target=process.stdout.read, daemon=True).start()

    watchdog = threading.Timer(
        240, lambda: [os.killpg(each.pid, signal.SIGKILL) for each in started]
    )
    watchdog.start()
    try:
        start_until(superlink, "running on http")
        for supernode in supernodes:
            start_until(supernode, "SuperNode ID")
        start_until(run, "Run finished 3 round(s)")
    finally:
        watchdog.cancel()
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(30)
    history = json.loads((app / "global_model.json").read_text())
    assert [(record["round"], record["clients"]) for record in history] == [(1, 2), (2, 2), (3, 2)]
    assert (app / "global_model.pt").exists()


def test_example_runs_as_written(tmp_path, start, address, small_cifar):
    for name in ("cifar.py", "client.py", "server.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fedadam.diff").write_text(block("diff", "FedAdam"))
    subprocess.run(["git", "apply", "fedadam.diff"], cwd=tmp_path, check=True)
    arguments = ["--server-address", address, "--min-clients", 1, "--rounds", 1, "--seed", 1]
    server = start(tmp_path / "server.py", *arguments)
    client = start("client.py", "--server-address", address, cifar=small_cifar)
    assert (server.end(), client.end()) == (0, 0), server.output
    assert "refused" not in server.output
    torch.manual_seed(1)
    first = cifar.Net().state_dict()["fc3.bias"]
    last = cifar.load_model(tmp_path / "global_model.pt")["fc3.bias"]
    # Adam's first step is equally long for every weight, which FedAvg's never is.
    steps = (last - first).abs()
    torch.testing.assert_close(steps, steps.mean().expand(10), rtol=0.01, atol=0)
    assert 0.01 < steps.mean() <= 0.02
