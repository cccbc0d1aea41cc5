"""The README's commands and examples work as written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, block, free_ports, history, readme
from PIL import Image

import cifar

README = readme()
SCRIPTS = ("cifar.py", "client.py", "server.py")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="bash, signals and 127.0.0.2")


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
    assert len(chinese.splitlines()) <= 60
    assert "(#中文)" in "".join(english.splitlines(keepends=True)[:10])


# Pictures.


def test_python_snippets_draw_a_history_and_predictions(tmp_path, start):
    shutil.copy(ROOT / "cifar.py", tmp_path)
    (tmp_path / "global_model.pt").write_bytes(cifar.to_bytes(cifar.Net()))
    records = [{"round": 1, "accuracy": 0.1}, {"round": 2, "accuracy": 0.3}]
    (tmp_path / "global_model.json").write_text(json.dumps(records), encoding="utf-8")
    program = tmp_path / "program.py"
    for picture in ("accuracy.png", "predictions.png"):
        text = block("python", picture).replace("synthetic=False", "synthetic=True")
        program.write_text(text, encoding="utf-8")
        script = start(program, MPLBACKEND="Agg")
        assert script.end() == 0, script.output
        with Image.open(tmp_path / picture) as image:
            colors = image.convert("RGB").getcolors(1_000_000)
        assert len(colors or []) > 20


# TLS.


@pytest.fixture
def tls(tmp_path):
    """Run the README's openssl commands in an empty home; return the folder they make."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    env = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(["bash", "-ec", block("bash", "openssl")], env=env, check=True)
    return tmp_path / "federation-tls"


@on_linux
def test_tls_admits_clients_that_trust_the_ca_and_tells_the_others_why(
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
    elsewhere = start(
        *["client.py", "--server-address", address.replace("127.0.0.1", "127.0.0.2"), "--wait", 2],
        *["--root-certificates", tls / "ca.pem"],
        cifar=small_cifar,
    )
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


@on_linux
def test_client_with_tls_reports_that_the_server_has_none(start, address, small_cifar, tls):
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


# Flower's engine.


@on_linux
def test_engine_runs_the_same_server_and_clients(tmp_path):
    """Create the README's files and run its commands, on free ports."""
    app, home = tmp_path / "app", tmp_path / "home"
    app.mkdir()
    home.mkdir()
    for name in SCRIPTS:
        shutil.copy(ROOT / name, app)
    ports = dict(zip(["8000", "9094", "9095"], free_ports(3)))

    def with_ports(text: str) -> str:
        return re.sub("8000|9094|9095", lambda match: ports[match[0]], text)

    project = block("toml", "[tool.flwr.app.components]")
    (app / "pyproject.toml").write_text(project, encoding="utf-8")
    config = with_ports(block("toml", "[superlink.local]"))
    (home / "config.toml").write_text(config, encoding="utf-8")
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
        """Start a command, and wait until it prints the text."""
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=app,
            env=env,
            encoding="utf-8",
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
    records = history(app / "global_model.pt")
    assert [(record["round"], record["clients"]) for record in records] == [(1, 2)]
    assert (app / "global_model.pt").exists()


# The examples.


# The diffs of the section "Customize", by the names of their examples.
EXAMPLES = {
    name: re.search("^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
    for name, text in re.findall(
        "^<details><summary><b>(.*?)</b>(.*?)^</details>",
        README.partition("\n## Customize\n")[2].partition("\n## ")[0],
        re.MULTILINE | re.DOTALL,
    )
}


def apply(folder: Path, *examples: str) -> None:
    """Copy the scripts into the folder, and apply the README's diffs with these names."""
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder)
    for example in examples:
        (folder / "example.diff").write_text(EXAMPLES[example], encoding="utf-8", newline="\n")
        subprocess.run(["git", "apply", "example.diff"], cwd=folder, check=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_stands_alone_is_formatted_and_can_be_undone(tmp_path, name):
    apply(tmp_path, name)
    shutil.copy(ROOT / ".ruff.toml", tmp_path)
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=tmp_path, check=True)
    files = set(re.findall(r"^\+\+\+ b/(.*)", EXAMPLES[name], re.MULTILINE))
    originals = {script: (ROOT / script).read_bytes() for script in SCRIPTS}
    for script, original in originals.items():
        assert ((tmp_path / script).read_bytes() != original) == (script in files)
    subprocess.run(["git", "apply", "-R", "example.diff"], cwd=tmp_path, check=True)
    assert {script: (tmp_path / script).read_bytes() for script in SCRIPTS} == originals


def test_incomplete_example_is_a_corrupt_patch(tmp_path):
    """An empty line at the end would get lost in copying; without the last newline, git complains."""
    assert len(EXAMPLES) >= 13 and not any(text.endswith("\n\n") for text in EXAMPLES.values())
    apply(tmp_path)
    (tmp_path / "example.diff").write_bytes(EXAMPLES["MNIST"].rstrip("\n").encode())
    command = ["git", "apply", "example.diff"]
    with pytest.raises(subprocess.CalledProcessError) as error:
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8")
    assert "corrupt patch" in error.value.stderr


def synthetic(count: int, num_partitions: int) -> list[list]:
    """Return the arguments of clients with the first of these partitions of generated images."""
    arguments = ["--synthetic", "--num-partitions", num_partitions, "--partition-id"]
    return [[*arguments, partition_id] for partition_id in range(count)]


@pytest.fixture
def federate(tmp_path, address, start):
    """Run the scripts in the folder, one client for each list of arguments.

    Returns the history, and what the server and each client printed.
    """

    def run(
        rounds: int, clients: list[list], *server: object, trained: int = 2
    ) -> tuple[list[dict], str, list[str]]:
        arguments = ["--server-address", address, "--seed"]
        number = ["--rounds", rounds, "--min-clients", len(clients)]
        serving = start(tmp_path / "server.py", *arguments, 1, *number, *server)
        running = [
            start(tmp_path / "client.py", *arguments, seed, *client)
            for seed, client in enumerate(clients, 1)
        ]
        assert serving.end() == 0, serving.output
        assert [each.end() for each in running] == [0] * len(clients), running[0].output
        assert "rejected" not in serving.output
        records = history(tmp_path / "global_model.pt")
        assert [record["clients"] for record in records] == [trained] * rounds
        return records, serving.output, [each.output for each in running]

    return run


@pytest.fixture
def evaluated(tmp_path, call):
    """Return the accuracy that the folder's cifar.py finds for a saved model."""

    def evaluate(*arguments: object, model: str = "global_model.pt") -> float:
        output = call(tmp_path / "cifar.py", *arguments, "--evaluate", tmp_path / model)
        assert "Warning" not in output
        return float(output.rpartition("Accuracy: ")[2])

    return evaluate


@pytest.mark.parametrize(
    "rounds, examples",
    [
        (2, ["FedAvgM"]),
        (1, ["FedAdam"]),
        (1, ["Differential privacy"]),
        (2, ["Batch normalization", "FedProx"]),
        (1, ["Group normalization", "Evaluation at the server"]),
    ],
)
def test_saved_model_is_the_one_that_was_evaluated(tmp_path, federate, evaluated, rounds, examples):
    apply(tmp_path, *examples)
    records, server, _ = federate(rounds, synthetic(2, 2))
    last = records[-1]
    accuracy = evaluated("--synthetic")
    assert last["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    state_dict = torch.load(tmp_path / "global_model.pt")
    counts = [value for name, value in state_dict.items() if name.endswith("num_batches_tracked")]
    assert len(counts) == (2 if "Batch normalization" in examples else 0)
    for count in counts:
        assert count.dtype == torch.int64 and count == 0  # not exchanged
    if examples[-1].startswith("Fed"):
        assert last["strategy"] == examples[-1]
    if "FedProx" in examples:
        assert last["config"]["proximal_mu"] == 0.1
    if "FedAdam" in examples:
        # Adam's first step is equally long for every weight, which FedAvg's never is.
        torch.manual_seed(1)
        steps = (state_dict["fc3.bias"] - cifar.Net().state_dict()["fc3.bias"]).abs()
        torch.testing.assert_close(steps, steps.mean().expand(10), rtol=0.01, atol=0)
        assert 0.01 < steps.mean() <= 0.02
    if "Group normalization" in examples:
        assert state_dict["norm2.weight"].shape == (16,)
    if "Evaluation at the server" in examples:
        # The two clients' test images are all of the server's.
        assert last["centralized"] == {
            "loss": pytest.approx(last["loss"], rel=1e-5),
            "accuracy": pytest.approx(accuracy, abs=1e-9),
        }
        assert 'Initial model: centralized {"loss": 2.30' in server
        assert f"Round 1/1: centralized {json.dumps(last['centralized'])}" in server
    else:
        assert last["centralized"] == {}


def test_proximal_term_keeps_the_weights_close(tmp_path, start):
    """Its gradient is mu times the distance from the global weights."""
    apply(tmp_path, "FedProx")
    program = tmp_path / "distance.py"
    program.write_text(
        "import cifar, torch\n"
        "torch.set_num_threads(1)\n"
        "def distance(mu):\n"
        "    torch.manual_seed(1)\n"
        "    net, loader = cifar.Net(), cifar.load_data(synthetic=True, num_partitions=9)[0]\n"
        "    first = net.fc1.weight.detach().clone()\n"
        "    cifar.train(net, loader, 3, torch.device('cpu'), 0.02, proximal_mu=mu)\n"
        "    return (net.fc1.weight - first).norm().item()\n"
        "print('distances', distance(0.0), distance(1.0))\n",
        encoding="utf-8",
    )
    script = start(program)
    assert script.end() == 0, script.output
    free, held = map(float, script.output.split("distances")[1].split())
    assert held < 0.8 * free


def test_dataset_of_another_size_and_color(tmp_path, federate, evaluated, call):
    """Grayscale images in MNIST's format: a bright bar, whose position is the class."""
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
    records, _, (output, _) = federate(2, [data, data], *training)
    assert records[-1]["accuracy"] > 0.5 and records[-1]["data"] == "MNIST"
    assert "MNIST, partition 0 of 1: 2000 training / 500 test images" in output
    assert evaluated(*data) == pytest.approx(records[-1]["accuracy"], abs=1e-9)
    assert torch.load(tmp_path / "global_model.pt")["conv1.weight"].shape == (6, 1, 5, 5)
    output = call(tmp_path / "cifar.py", "--synthetic", "--epochs", 1, "--lr", 0.02)
    assert float(output.rpartition("Accuracy: ")[2]) > 0.5


def draw(folder: Path, seed: int) -> None:
    """Make 60 images of any size in three subfolders: the position of a dark bar is the class."""
    random = np.random.RandomState(seed)
    for place, name in enumerate(("left", "middle", "right")):
        (folder / name).mkdir(parents=True)
        for number in range(20):
            width, height = random.randint(50, 200, size=2)
            image = random.randint(130, 256, size=(height, width, 3), dtype=np.uint8)
            image[:, (4 * place + 1) * width // 12 : (4 * place + 3) * width // 12] -= 120
            picture = Image.fromarray(image).convert("L" if number % 2 else "RGB")
            picture.save(folder / name / f"{number}.{'png' if number % 3 else 'jpg'}")


def test_folders_of_images_that_differ_between_machines(tmp_path, federate, evaluated, call):
    apply(tmp_path, "Folders of images")
    machines = [tmp_path / "laptop", tmp_path / "desktop"]
    for seed, machine in enumerate(machines):
        draw(machine, seed)
    clients = [["--data-root", machine] for machine in machines]
    records, _, outputs = federate(2, clients, "--local-epochs", 15, "--lr", 0.02)
    assert records[-1]["accuracy"] > 0.6 and records[-1]["data"] == "my images"
    for output in outputs:
        assert "my images, partition 0 of 1: 48 training / 12 test images" in output
        assert "Training images per class: 16 16 16\n" in output
    accuracy = evaluated(*clients[0])
    assert outputs[0].rpartition(", accuracy ")[2].startswith(f"{accuracy:.4f}\n")
    (tmp_path / "desktop" / "left" / "0.jpg").write_bytes(b"no image")
    for folder in ("missing", "desktop"):
        output = call(tmp_path / "cifar.py", "--data-root", tmp_path / folder, code=1)
        line = output.splitlines()[-1]
        assert line.startswith("Cannot read my images: ") and folder in line
        assert line.endswith(" Check --data-root.")


def test_sampling_and_a_schedule_that_continues_after_resume(tmp_path, federate):
    apply(tmp_path, "Client sampling", "Learning-rate schedule")
    records, server, outputs = federate(2, synthetic(2, 10), trained=1)
    assert "Round 2/2: training on 1 of 2 clients\n" in server
    assert sum(output.count("Training 1 epoch(s)") for output in outputs) == 2
    assert [output.count("Evaluated the new global model") for output in outputs] == [2, 2]
    resumed, _, _ = federate(3, synthetic(1, 10), "--resume", trained=1)
    assert resumed[:2] == records
    rates = [record["config"]["lr"] for record in resumed]
    assert rates == pytest.approx([0.001, 0.0009, 0.00081])


def test_training_loss_and_fedbn(tmp_path, federate, evaluated, start):
    apply(tmp_path, "Training loss", "FedBN")
    records, server, outputs = federate(1, [["--synthetic"], ["--synthetic"]])
    means = []
    for output in outputs:
        printed = re.findall(r"\[1, +(\d+)\] loss: (.*)", output)
        sizes = np.diff([0, *(int(step) for step, _ in printed)])
        means.append(np.average([float(loss) for _, loss in printed], weights=sizes))
    assert records[0]["fit_metrics"] == {"train_loss": pytest.approx(np.mean(means), abs=0.0006)}
    assert f"Round 1/1: fit_metrics {json.dumps(records[0]['fit_metrics'])}" in server

    names = [re.search("Client (.*)", output)[1] for output in outputs]  # type: ignore[index]
    first, second = (torch.load(tmp_path / f"{name}.pt") for name in names)
    for name, value in torch.load(tmp_path / "global_model.pt").items():
        if name.startswith("norm"):
            kind = name.rpartition(".")[2]
            assert torch.all(value == (1 if kind in ("weight", "running_var") else 0))
            assert (kind == "num_batches_tracked") == torch.equal(first[name], second[name])
        else:
            assert torch.equal(first[name], value) and torch.equal(second[name], value)
    assert first["norm1.num_batches_tracked"] == 313
    accuracy = evaluated("--synthetic", model=f"{names[0]}.pt")
    assert outputs[0].rpartition(", accuracy ")[2].startswith(f"{accuracy:.4f}\n")
    server = start(tmp_path / "server.py", "--resume", "--rounds", 1)
    assert server.end() == 0 and "All 1 rounds are done" in server.output


def test_both_sides_name_the_difference_between_their_models(tmp_path, address, start, small_cifar):
    apply(tmp_path, "Batch normalization")
    server = start("server.py", "--server-address", address, "--rounds", 1)
    good = start("client.py", "--server-address", address, "--synthetic")
    other = start(tmp_path / "client.py", "--server-address", address, "--synthetic")
    assert (server.end(), good.end(), other.end()) == (0, 0, 1), other.output
    name = re.search(r"Client (.*)", other.output)[1]  # type: ignore[index]
    assert f"client '{name}' lost: disconnected" in server.output
    line = "norm1.weight: expected float32(6,), got float32(16, 6, 5, 5) (different models?)"
    assert other.output.splitlines()[-1] == line
    assert "Traceback" not in other.output + server.output
