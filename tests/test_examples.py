"""Tests of tests/examples: each diff is applied to a clean copy, and run."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed
from helpers import ROOT, free_port, history
from PIL import Image
from test_server import Client, arrays_in, assert_close, evaluate_res, fit_res, make, weights

assert make  # the fixture that makes a server with clients in this process
matplotlib.use("Agg")
EXAMPLES = ROOT / "tests" / "examples"
SCRIPTS = ["cifar.py", "client.py", "server.py"]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
        return load(tmp_path / f"{script}.py")

    return apply_one


@pytest.fixture
def run(apply, make, monkeypatch, tmp_path):
    """Run an example for two rounds, and one after --resume; return the saved state_dict."""

    def run_scripts(name, *clients):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "cifar", apply(name))
        client, server = apply(name, "client"), apply(name, "server")
        proxies = []
        for each in clients:
            if isinstance(each, list):  # flags of the example's own client
                own = client.make_client(client.make_parser().parse_args(each)).to_client()
                each = Client()
                each.fit = lambda ins, own=own, **options: own.fit(ins)
                each.evaluate = lambda ins, own=own, **options: own.evaluate(ins)
            proxies.append(each)
        make(*proxies, server=server).fit(2, None)
        make(*proxies, server=server, resume=True).fit(3, None)
        return torch.load("model.pt", weights_only=True)

    return run_scripts


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
    steps = np.concatenate([np.abs(a - b).flatten() for a, b in zip(*client.given[:2])])
    assert 0.01 < np.median(steps) <= 0.02
    assert np.percentile(steps, 5) > 0.9 * np.median(steps)


def test_differential_privacy(apply, make, caplog, tmp_path):
    def leave(client):
        made.clients.unregister(client)
        return GrpcBridgeClosed()

    client = Client(fit_res([100 * array for array in weights(1)]))
    module = apply("differential_privacy", "server")
    made = make(client, Client(leave), server=module)
    made.fit(2, None)
    start, again, first = client.given
    assert_close(start, again)
    distance = np.sqrt(sum(np.square(a - b).sum() for a, b in zip(first, start)))
    assert 1.2 < distance < 1.7, "clipped to 1; noise of 0.005 for each of 62,006 weights is 1.2"
    assert caplog.text.count("Round 1 failed, clients were lost") == 1
    make(client, Client(), server=module, resume=True).fit(3, None)
    assert [record["clients"] for record in history(tmp_path / "model.pt")] == [1, 1, 2]


def test_evaluate_fn(run, caplog):
    run("evaluate_fn", Client())
    assert "initial parameters (loss, other metrics): 2.30" in caplog.text
    assert re.search(r"fit progress: \(1, .*\{'accuracy': ", caplog.text)


def test_early_stopping(apply, make, caplog, tmp_path):
    module = apply("early_stopping", "server")
    accuracies = [None, 0.1, 0.3, 0.2, None, 0.3, 0.25, 0.1]
    results = iter([evaluate_res(**({"accuracy": each} if each else {})) for each in accuracies])
    client = Client(lambda client: fit_res(weights(len(made.history) + 1)))
    client.evaluate = lambda *args, **kwargs: next(results)
    for done in (7, 8):
        made = make(client, server=module, resume=done == 8, rounds=10)
        made.fit(10, None)
        best = f"{tmp_path / 'model_best.pt'} is the best model, of round 3"
        assert f"Stopped early after round {done}: {best}" in caplog.text
        assert len(history(tmp_path / "model.pt")) == done
        assert_close(arrays_in(tmp_path / "model_best.pt"), weights(3))


FEW = ["--synthetic", "--num-partitions", "100"]


def test_batchnorm(run):
    state = run("batchnorm", FEW)
    assert state["norm1.running_mean"].any() and state["norm2.running_mean"].any()
    assert state["norm1.num_batches_tracked"] == 0


def test_fedbn(run, tmp_path):
    state = run("fedbn", FEW)
    (own,) = [path for path in tmp_path.glob("*.pt") if path.name != "model.pt"]
    own_state = torch.load(own, weights_only=True)
    assert own_state["norm1.running_mean"].any() and not state["norm1.running_mean"].any()
    assert torch.equal(own_state["fc3.weight"], state["fc3.weight"])


def test_fedprox(run, apply):
    run("fedprox", FEW)
    module = apply("fedprox")

    def distance(mu):
        torch.manual_seed(1)
        net, trainloader = module.Net(), module.load_data(synthetic=True, num_partitions=9)[0]
        before = net.fc1.weight.detach().clone()
        module.train(net, trainloader, 2, torch.device("cpu"), 0.02, mu)
        return (net.fc1.weight - before).norm().item()

    assert distance(1.0) < 0.8 * distance(0.0)


def test_augmentation(run, apply):
    run("augmentation", FEW)
    trainloader, testloader, _ = apply("augmentation").load_data(synthetic=True, num_partitions=100)
    image, label = trainloader.dataset[0]
    framed = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)))
    crops = np.stack([framed[:, y : y + 32, x : x + 32] for x in range(9) for y in range(9)])
    plain, flipped = [{each.tobytes() for each in array} for array in (crops, crops[..., ::-1])]
    drawn, _ = trainloader.collate_fn([(image, label)] * 50)
    found = {each.numpy().tobytes() for each in ((drawn + 1) / 2 * 255).round().byte()}
    assert found <= plain | flipped and min(len(found & plain), len(found & flipped)) > 8
    assert torch.equal(next(iter(testloader))[0], next(iter(testloader))[0])


def draw(monkeypatch, name, *arguments):
    plt.close("all")
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name))
    return plt.gcf().axes


def test_plot(monkeypatch, tmp_path):
    records = [{"round": 1, "accuracy": 0.1}, {"round": 2}, {"round": 3, "accuracy": None}]
    records.append({"round": 4, "accuracy": 0.3})
    (tmp_path / "global_model.json").write_text(json.dumps(records))
    monkeypatch.chdir(tmp_path)
    (axes,) = draw(monkeypatch, "plot.py")
    assert axes.lines[0].get_xydata().tolist() == [[1, 0.1], [4, 0.3]]
    assert (tmp_path / "accuracy.png").exists()


def test_mnist(run, monkeypatch, tmp_path):
    assert run("mnist", FEW)["conv1.weight"].shape == (6, 1, 5, 5)
    (tmp_path / "model.pt").rename(tmp_path / "global_model.pt")
    axes = draw(monkeypatch, "predict.py", "--synthetic")
    assert [each.get_title()[0] for each in axes] == list("0123456789")
    assert (tmp_path / "predictions.png").exists()


def make_pictures(folder, *classes):
    for i, each in enumerate(classes):
        (folder / each).mkdir(parents=True)
        for number, mode in enumerate(["RGB", "L", "P", "RGBA", "LA"] * 2):
            picture = Image.linear_gradient("L").resize((40 + number, 30 + i)).convert(mode)
            picture.save(folder / each / f"{number}.png")


def test_folders(run, monkeypatch, capsys, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        make_pictures(folder, "circle", "square", "triangle")
    few = ["--data-root", str(two), "--partition-id", "7", "--num-partitions", "8"]
    state = run("folders", ["--data-root", str(one)], few)
    assert state["fc3.weight"].shape == (3, 84)
    output = capsys.readouterr().out
    assert output.count("Found 3 classes: circle, square, triangle\n") == 2
    assert "24 training / 6 test images\nTraining images per class: 8 8 8\n" in output
    assert "3 training / 0 test images\n" in output
    axes = draw(monkeypatch, "predict.py", "model.pt", "--data-root", one)
    titles = [each.get_title().split("\n")[0] for each in axes]
    assert titles == ["circle", "circle", "square", "square", "triangle", "triangle"]


def test_folders_with_something_wrong_are_named(apply, tmp_path):
    def stops(folder, reason):
        with pytest.raises(SystemExit, match=reason):
            module.read_images(folder, train=True)

    module = apply("folders")
    make_pictures(tmp_path / "images", "circle", "square", "triangle")
    path = tmp_path / "images" / "square" / "2.png"
    Image.new("I;16", (64, 64), 30_000).save(path)
    stops(tmp_path / "images", f"^Cannot read {path}: .*8 bits")
    path.write_bytes((path.parent / "3.png").read_bytes()[:60])
    stops(tmp_path / "images", f"^Cannot read {path}: ")
    make_pictures(tmp_path / "nested", "train", "val")
    stops(tmp_path / "nested", "2 classes: train, val.* fc3")
    stops(tmp_path / "no-such-folder", "no-such-folder")


def test_app(tmp_path, capsys):
    app = load(EXAMPLES / "app.py")
    project = tomllib.loads((EXAMPLES / "pyproject.toml").read_text())
    listed = project["tool"]["flwr"]["app"]["config"]
    parsers = [app.server.make_parser(), app.client.make_parser()]
    flags = {name.replace("_", "-") for each in parsers for name in vars(each.parse_args([]))}
    unlisted = "server-address wait root-certificates ssl-certfile ssl-keyfile ssl-ca-certfile"
    assert flags ^ listed.keys() == {*unlisted.split(), "partition-id", "num-partitions"}

    def serve(**config):
        config = {**listed, "model": str(tmp_path / "new" / "model.pt"), **config}
        return app.server_fn(SimpleNamespace(run_config=config))

    made = serve(rounds=5)
    assert (made.config.num_rounds, made.config.round_timeout) == (5, None)
    for reason, config in {
        "must end in .pt": {"model": "x.txt"},
        "must exceed the 0": {"rounds": 0},
        "--lr: invalid float": {"lr": "fast"},
        "Cannot load no.pt": {"model": "no.pt", "resume": True},
    }.items():
        with pytest.raises(Exception, match=reason):  # no SystemExit, which the engine hides
            serve(**config)
    node = {"partition-id": 0, "num-partitions": 2}
    for _ in range(2):  # messages
        assert app.client_fn(SimpleNamespace(run_config=listed, node_config=node))
    assert capsys.readouterr().out.count("Partition 0 of 2: 5000 training / 1000") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="paths of the commands")
def test_engine(start, tmp_path):
    """A SuperLink, two SuperNodes and `flwr run`, as in the README, on free ports."""
    copied = [*SCRIPTS, ".gitignore"]  # `flwr run` leaves out what .gitignore names
    for path in (*map(ROOT.joinpath, copied), EXAMPLES / "app.py", EXAMPLES / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    link, *ports = free_port(), free_port(), free_port()
    config = (EXAMPLES / "config.toml").read_text().replace("8000", link)
    (tmp_path / "config.toml").write_text(config)
    folder = Path(sys.executable).parent
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "FLWR_HOME": str(tmp_path)}
    start(folder / "flower-superlink", "--insecure", "--port", link, **env).until("running on http")
    for number, port in enumerate(ports):
        node = ["--superlink", f"127.0.0.1:{link}", "--port", port, "--node-config"]
        partition = f"partition-id={number} num-partitions=2"
        supernode = start(folder / "flower-supernode", "--insecure", *node, partition, **env)
        supernode.until("SuperNode ID")
    override = ["--run-config", "rounds=1 seed=1 lr=0.02"]
    run = start(folder / "flwr", "run", ".", "local", "--stream", *override, **env)
    run.until("Run finished 1 round(s)")
    (record,) = history(tmp_path / "global_model.pt")
    assert record["clients"] == 2 and record["accuracy"] >= 0
