"""What the README tells its reader to do works as written: TLS, Flower's engine, the examples."""

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

import numpy as np
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
    section = README.partition("## Every flag\n")[2].partition("\n## ")[0]
    (row,) = [line for line in section.splitlines() if line.startswith(f"| {script}.py | ")]
    shared = section.partition("\n| script")[0] if script != "server" else ""
    assert flags - {"--help"} - set(re.findall("--[a-z][a-z-]+", row + shared)) == set()
    assert set(re.findall("`(--[a-z][a-z-]+)", row)) - flags == set()


def test_chinese_section_gives_the_same_commands():
    english, _, chinese = README.partition("\n## 中文\n")
    fences = re.compile(r"^```(?:bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    known = {
        line.removeprefix("$ ") for text in fences.findall(english) for line in text.split("\n")
    }
    commands = [line for text in fences.findall(chinese) for line in text.splitlines()]
    assert len(commands) >= 8 and set(commands) <= known
    assert len(chinese.splitlines()) <= 40
    assert "(#中文)" in "".join(english.splitlines(keepends=True)[:10])


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
    server.until("Waiting for clients: 0 of 1")
    assert "TLS on" in server.output and "Warning" not in server.output
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=other"]
        + ["-keyout", tls / "other.key", "-out", tls / "other.pem"],
        check=True,
    )
    arguments = ["client.py", "--server-address", address, "--wait", 2]
    plain = start(*arguments, cifar=small_cifar)
    named = [
        "client.py",
        "--server-address",
        address.replace("127.0.0.1", "127.0.0.2"),
        *arguments[3:],
    ]
    elsewhere = start(*named, "--root-certificates", tls / "ca.pem", cifar=small_cifar)
    other = start(*arguments, "--root-certificates", tls / "other.pem", cifar=small_cifar)
    for client, reason in (
        (plain, "if it uses TLS, add --root-certificates"),
        (other, "its certificate is not signed by the CA in --root-certificates, has expired, or "),
        (elsewhere, "its certificate does not name this host"),
    ):
        assert client.end() == 1
        assert reason in client.output.splitlines()[-1]
        assert "Connected" not in client.output
    good = start(*arguments, "--root-certificates", tls / "ca.pem", cifar=small_cifar)
    assert good.end() == 0, good.output
    assert server.end() == 0, server.output


def test_client_with_tls_is_told_that_the_server_has_none(start, address, small_cifar, tls):
    headings = re.findall("^## (.*)", README, re.MULTILINE)
    host = address.replace("127.0.0.1", "0.0.0.0")
    server = start("server.py", "--server-address", host)
    server.until("Waiting for clients: 0 of 2")
    assert f"Warning: no TLS on {host}: anyone who can reach it can join" in server.output
    assert re.search('See "(.*)" in README.md', server.output)[1] in headings  # type: ignore[index]
    arguments = ["--server-address", address, "--wait", 1, "--root-certificates", tls / "ca.pem"]
    client = start("client.py", *arguments, cifar=small_cifar)
    assert client.end() == 1
    assert "it does not use TLS; remove --root-certificates" in client.output


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
        start_until(f"{run} --run-config rounds=1", "Run finished 1 round(s)")
    finally:
        watchdog.cancel()
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(30)
    history = json.loads((app / "global_model.json").read_text())
    assert [(record["round"], record["clients"]) for record in history] == [(1, 2)]
    assert (app / "global_model.pt").exists()


# The examples.


def apply(folder: Path, *texts: str) -> None:
    """Copy the scripts into the folder, and apply the README's diffs with these texts."""
    for name in ("cifar.py", "client.py", "server.py"):
        shutil.copy(ROOT / name, folder)
    for text in texts:
        (folder / "example.diff").write_text(block("diff", text))
        subprocess.run(["git", "apply", "example.diff"], cwd=folder, check=True)


@pytest.fixture
def federate(tmp_path, address, start):
    """Run a federation of the scripts in the folder; return its history and a client's output."""

    def run(rounds: int, client: list, *server: object) -> tuple[list[dict], str]:
        arguments = ["--server-address", address]
        serving = start(
            tmp_path / "server.py", *arguments, "--rounds", rounds, "--seed", 1, *server
        )
        clients = [
            start(tmp_path / "client.py", *arguments, "--seed", seed, *client) for seed in (1, 2)
        ]
        assert serving.end() == 0, serving.output
        assert [each.end() for each in clients] == [0, 0], clients[0].output
        assert "rejected" not in serving.output
        records = json.loads((tmp_path / "global_model.json").read_text())
        assert [record["clients"] for record in records] == [2] * rounds
        return records, clients[0].output

    return run


def evaluated(start, tmp_path, *arguments) -> float:
    """Return the accuracy that cifar.py finds for the model that was kept."""
    script = start(tmp_path / "cifar.py", *arguments, "--evaluate", "global_model.pt")
    assert script.end() == 0, script.output
    assert "Warning" not in script.output
    return float(script.output.rpartition("Accuracy: ")[2])


@pytest.mark.parametrize(
    "rounds, examples",
    [
        (2, ["FedAvgM"]),
        (1, ["FedAdam"]),
        (1, ["DifferentialPrivacy"]),
        (2, ["BatchNorm2d", "FedProx"]),
    ],
)
def test_model_that_is_kept_is_the_one_that_was_tested(start, tmp_path, federate, rounds, examples):
    apply(tmp_path, *examples)
    records, _ = federate(rounds, ["--synthetic"])
    accuracy = evaluated(start, tmp_path, "--synthetic")
    assert records[-1]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    state_dict = torch.load(tmp_path / "global_model.pt")
    counts = [value for name, value in state_dict.items() if name.endswith("num_batches_tracked")]
    assert len(counts) == (2 if "BatchNorm2d" in examples else 0)
    for count in counts:
        assert count.dtype == torch.int64 and count == rounds * 313
    if "FedAdam" in examples:
        # Adam's first step is equally long for every weight, which FedAvg's never is.
        torch.manual_seed(1)
        steps = (state_dict["fc3.bias"] - cifar.Net().state_dict()["fc3.bias"]).abs()
        torch.testing.assert_close(steps, steps.mean().expand(10), rtol=0.01, atol=0)
        assert 0.01 < steps.mean() <= 0.02


def test_proximal_term_holds_the_weights_back(tmp_path, start):
    """Its gradient is mu times the distance from the global weights."""
    apply(tmp_path, "FedProx")
    program = tmp_path / "distance.py"
    program.write_text(
        "import cifar, torch\n"
        "def distance(mu):\n"
        "    torch.manual_seed(1)\n"
        "    net, loader = cifar.Net(), cifar.load_data(synthetic=True, num_partitions=9)[0]\n"
        "    first = net.fc1.weight.detach().clone()\n"
        "    cifar.train(net, loader, 3, torch.device('cpu'), 0.02, proximal_mu=mu)\n"
        "    return (net.fc1.weight - first).norm().item()\n"
        "print('distances', distance(0.0), distance(1.0))\n"
    )
    script = start(program)
    assert script.end() == 0, script.output
    free, held = map(float, script.output.split("distances")[1].split())
    assert held < 0.8 * free


def test_other_data_set_of_other_size_and_color(tmp_path, federate, start):
    """Grey images of 28x28 in MNIST's format: a bright bar, whose place is the class."""
    folder = tmp_path / "data" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for name, count in (("train", 2_000), ("t10k", 500)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = random.randint(100, size=(count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels):
            image[2 * label + 4 : 2 * label + 7] += 150
        head = [0x803, count, 28, 28]
        content = b"".join(number.to_bytes(4, "big") for number in head) + images.tobytes()
        (folder / f"{name}-images-idx3-ubyte").write_bytes(content)
        content = b"".join(number.to_bytes(4, "big") for number in (0x801, count))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(content + labels.tobytes())
    training = ["--lr", 0.05, "--local-epochs", 2]
    data = ["--data-root", tmp_path / "data"]
    apply(tmp_path, "MNIST")
    records, output = federate(2, data, *training)
    assert records[-1]["accuracy"] > 0.5 and records[-1]["data"] == "MNIST"
    assert "MNIST, partition 0 of 1: 2000 training / 500 test images" in output
    assert evaluated(start, tmp_path, *data) == pytest.approx(records[-1]["accuracy"], abs=1e-9)
    assert torch.load(tmp_path / "global_model.pt")["conv1.weight"].shape == (6, 1, 5, 5)


def test_both_sides_name_what_differs_between_their_networks(tmp_path, address, start, small_cifar):
    apply(tmp_path, "BatchNorm2d")
    server = start("server.py", "--server-address", address, "--rounds", 1)
    good = start("client.py", "--server-address", address, "--synthetic")
    other = start(tmp_path / "client.py", "--server-address", address, "--synthetic")
    assert (server.end(), good.end(), other.end()) == (0, 0, 1), other.output
    name = re.search(r"Client (.*)", other.output)[1]  # type: ignore[index]
    assert f"client '{name}' lost: disconnected" in server.output
    line = "norm1.weight: expected float32(6,), got float32(16, 6, 5, 5) (different models?)"
    assert other.output.splitlines()[-1] == line
    assert "Traceback" not in other.output + server.output
