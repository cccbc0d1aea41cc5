"""Tests of tests/examples: each diff is applied to a clean copy, and run."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed
from helpers import ROOT, free_ports, history
from PIL import Image
from test_server import Client, arrays_in, assert_close, evaluate_res, fit_res, make, weights

import cifar

assert make  # the fixture that makes a server with clients in this process
EXAMPLES = ROOT / "tests" / "examples"
SCRIPTS = ["cifar.py", "client.py", "server.py"]


@pytest.fixture
def apply(tmp_path):
    """Copy the scripts, and apply an example; return one of them as a module."""

    def apply_one(name, script="cifar"):
        diff = EXAMPLES / f"{name}.diff"
        for each in SCRIPTS:
            shutil.copy(ROOT / each, tmp_path)
        for options in ([], ["-R"], []):
            subprocess.run(["git", "apply", *options, diff], cwd=tmp_path, check=True)
            now = [(tmp_path / each).read_bytes() for each in SCRIPTS]
            assert (now == [(ROOT / each).read_bytes() for each in SCRIPTS]) == (options == ["-R"])
        spec = importlib.util.spec_from_file_location(script, tmp_path / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return apply_one


@pytest.fixture
def run(apply, make):
    """Run the server of an example with these clients."""

    def run_server(name, *clients):
        module = apply(name, "server")
        make(*clients, server=module).fit(2, None)
        make(*clients, server=module, resume=True).fit(3, None)

    return run_server


def test_sampling(run, caplog):
    run("sampling", Client(), Client(), Client(), Client())
    assert caplog.text.count("configure_fit: strategy sampled 2 clients (out of 4)") == 3
    assert caplog.text.count("configure_evaluate: strategy sampled 4 clients (out of 4)") == 3


def test_schedule(run):
    client = Client()
    run("schedule", client)
    rates = [config["lr"] for config in client.configs]
    assert rates == pytest.approx([0.001, 0.0009, 0.00081])


def test_fedavgm(run):
    """The second step is 0.9 times the first, beyond what the clients send."""
    client = Client(fit_res(weights(1)))
    run("fedavgm", client)
    start, _, second = client.given
    assert_close(second, [b - 0.9 * (a - b) for a, b in zip(start, weights(1))])


def test_fedadam(run):
    """The first step of Adam is equally long for every weight."""
    client = Client(fit_res(weights(1)))
    run("fedadam", client)
    steps = [np.abs(a - b).flatten() for a, b in zip(*client.given[:2])]
    assert 0.01 < np.median(np.concatenate(steps)) <= 0.02
    assert np.percentile(np.concatenate(steps), 5) > 0.9 * np.median(np.concatenate(steps))


def test_differential_privacy(run, caplog, tmp_path):
    """Updates are clipped and noise is added; a round that lost a client is repeated."""

    def leave_once(client):
        client.update = fit_res(weights(2))
        return GrpcBridgeClosed()

    client = Client(fit_res([100 * array for array in weights(1)]))
    run("differential_privacy", client, Client(leave_once))
    start, again, first = client.given[:3]
    assert_close(start, again)
    distance = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(first, start)))
    assert 1.2 < distance < 1.7, "clipped to 1; noise of 0.005 for each of 62,006 weights is 1.2"
    assert "Round 1 failed (no aggregate)" in caplog.text
    assert [record["clients"] for record in history(tmp_path / "model.pt")] == [2, 2, 2]


def test_evaluate_fn(run, caplog):
    run("evaluate_fn", Client())
    assert "initial parameters (loss, other metrics): 2.30" in caplog.text
    assert re.search(r"fit progress: \(1, .*\{'accuracy': ", caplog.text)


def test_early_stopping(apply, make, tmp_path):
    """The best accuracy is that of round 2; after --resume, no client is needed."""
    module = apply("early_stopping", "server")
    accuracies = iter([0.1, 0.3, 0.2, 0.3, 0.25])
    client = Client(lambda client: fit_res(weights(len(made.history) + 1)))
    client.evaluate = lambda *args, **kwargs: evaluate_res(accuracy=next(accuracies))
    made = make(client, server=module)
    made.fit(10, None)
    assert len(history(tmp_path / "model.pt")) == 5
    assert_close(arrays_in(tmp_path / "model_best.pt"), weights(2))
    make(server=module, resume=True).fit(20, None)
    assert len(history(tmp_path / "model.pt")) == 5


@pytest.fixture
def federate(apply, monkeypatch, tmp_path):
    """Run an example for two rounds, with these clients; return the saved state_dict."""

    def run_scripts(name, *clients):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "cifar", apply(name))
        client, server = apply(name, "client"), apply(name, "server")
        args = server.make_parser().parse_args(["--min-clients", str(len(clients))])
        made = server.CifarServer(args, in_engine=True)
        for cid, arguments in enumerate(clients):
            own = client.make_client(client.make_parser().parse_args(arguments)).to_client()
            proxy = Client()
            proxy.cid = str(cid)
            proxy.fit = lambda ins, own=own, **options: own.fit(ins)
            proxy.evaluate = lambda ins, own=own, **options: own.evaluate(ins)
            made.clients.register(proxy)
        made.fit(2, None)
        assert [record["clients"] for record in made.history] == [len(clients)] * 2
        return torch.load("global_model.pt", weights_only=True)

    return run_scripts


FEW = ["--synthetic", "--num-partitions", "100"]


def test_batchnorm(federate):
    state = federate("batchnorm", FEW)
    assert state["norm1.running_mean"].any() and state["norm2.running_mean"].any()
    assert state["norm1.num_batches_tracked"] == 0


def test_fedbn(federate, tmp_path):
    state = federate("fedbn", FEW)
    (own,) = [path for path in tmp_path.glob("*.pt") if path.name != "global_model.pt"]
    own_state = torch.load(own, weights_only=True)
    assert own_state["norm1.running_mean"].any() and not state["norm1.running_mean"].any()
    assert torch.equal(own_state["fc3.weight"], state["fc3.weight"])


def test_fedprox(federate, apply):
    """Its gradient is mu times the distance from the global weights."""
    federate("fedprox", FEW)
    module = apply("fedprox", "cifar")

    def distance(mu):
        torch.manual_seed(1)
        net, trainloader = module.Net(), module.load_data(synthetic=True, num_partitions=9)[0]
        before = net.fc1.weight.detach().clone()
        module.train(net, trainloader, 2, torch.device("cpu"), 0.02, mu)
        return (net.fc1.weight - before).norm().item()

    assert distance(1.0) < 0.8 * distance(0.0)


def test_augmentation(federate, apply):
    federate("augmentation", FEW)
    module = apply("augmentation", "cifar")
    trainloader, testloader, _ = module.load_data(synthetic=True, num_partitions=100)
    trainset, testset = trainloader.dataset, testloader.dataset
    framed = np.pad(trainset.images[0].numpy(), ((4, 4), (4, 4), (0, 0)))
    crops = [framed[y : y + 32, x : x + 32] for x in range(9) for y in range(9)]
    known = {each.tobytes() for crop in crops for each in (crop, np.fliplr(crop))}
    drawn, _ = trainset[[0] * 50]
    pixels = ((drawn + 1) / 2 * 255).round().byte().permute(0, 2, 3, 1).numpy()
    found = {each.tobytes() for each in pixels}
    assert found <= known and len(found) > 20
    assert torch.equal(testset[[0]][0], testset[[0]][0])


def test_mnist(federate):
    assert federate("mnist", FEW)["conv1.weight"].shape == (6, 1, 5, 5)


def test_folders(federate, tmp_path):
    """Each client has a folder of its own; every fifth image is a test image."""
    for machine in ("one", "two"):
        for i, name in enumerate(("circle", "square", "triangle")):
            folder = tmp_path / machine / name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (40 + number, 30), (80 * i, 0, 0)).save(folder / f"{number}.png")
    state = federate("folders", *(["--data-root", str(tmp_path / each)] for each in ("one", "two")))
    assert state["fc3.weight"].shape == (3, 84)


def test_pictures(start, tmp_path):
    torch.save(cifar.Net().state_dict(), tmp_path / "global_model.pt")
    records = [{"round": 1, "accuracy": 0.1}, {"round": 2, "accuracy": 0.3}]
    (tmp_path / "global_model.json").write_text(json.dumps(records))
    for name, picture in (("plot.py", "accuracy.png"), ("predict.py", "predictions.png")):
        script = start(EXAMPLES / name, "--synthetic", MPLBACKEND="Agg")
        assert script.end() == 0, script.output
        with Image.open(tmp_path / picture) as image:
            assert len(image.convert("RGB").getcolors(1_000_000)) > 20


@pytest.mark.skipif(sys.platform != "linux", reason="paths of the commands")
def test_engine(start, tmp_path):
    """A SuperLink, two SuperNodes and `flwr run`, as in the README, on free ports."""
    for path in (*(ROOT / each for each in [*SCRIPTS, ".gitignore"]), EXAMPLES / "pyproject.toml"):
        shutil.copy(path, tmp_path)  # `flwr run` leaves out what .gitignore names
    link, *ports = free_ports(3)
    config = (EXAMPLES / "config.toml").read_text().replace("8000", link)
    (tmp_path / "config.toml").write_text(config)
    folder = Path(sys.executable).parent
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "FLWR_HOME": str(tmp_path)}
    scripts = [start(folder / "flower-superlink", "--insecure", "--port", link, **env)]
    scripts[0].until("running on http")
    for number, port in enumerate(ports):
        node = ["--superlink", f"127.0.0.1:{link}", "--port", port, "--node-config"]
        partition = f"partition-id={number} num-partitions=2"
        scripts.append(start(folder / "flower-supernode", "--insecure", *node, partition, **env))
        scripts[-1].until("SuperNode ID")
    run = start(folder / "flwr", "run", ".", "local", "--stream", "--run-config", "rounds=1", **env)
    run.until("Run finished 1 round(s)")
    (record,) = history(tmp_path / "global_model.pt")
    assert record["clients"] == 2 and record["accuracy"] >= 0
