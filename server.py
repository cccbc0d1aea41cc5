"""The federation's server: averages what the clients learned, and never sees an image.

python3 server.py --rounds 10 --resume    # without --resume: a new run
"""

import argparse
import contextlib
import copy
import functools
import io
import ipaddress
import json
import os
import shutil
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Flower reads these at its import: no reports to its maker, no words but those printed here.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_LOG_LEVEL", "CRITICAL")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import flwr as fl
import numpy as np
import torch
from filelock import FileLock, Timeout
from flwr.common import EvaluateRes, FitRes, Metrics, Parameters
from flwr.common.args import try_obtain_server_certificates
from flwr.server import SimpleClientManager
from flwr.server.server import evaluate_clients, fit_clients
from flwr.server.strategy.aggregate import weighted_loss_avg
from grpc import _server

import cifar


def make_strategy(parameters: Parameters, config: Metrics) -> fl.server.strategy.Strategy:
    """Return how the clients' models become one: any strategy of Flower's, or a wrapper of it."""
    return fl.server.strategy.FedAvg(
        min_fit_clients=1,  # run_round() waits for enough clients, and whoever is there takes part
        min_evaluate_clients=1,
        min_available_clients=1,
        initial_parameters=parameters,
        on_fit_config_fn=lambda server_round: config,
        evaluate_metrics_aggregation_fn=average_accuracy,
    )


class CifarServer(fl.server.Server):
    """Flower server that says what happens in its rounds, and keeps the model after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.lock = FileLock(args.model.with_suffix(".lock"))  # freed however this process ends
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise cifar.UserError(f"{args.model} is another server's: choose another.") from error
        if args.seed is not None:
            torch.manual_seed(args.seed)
        self.net, self.history = open_model(args.model, args.resume)
        self.resumed = len(self.history)
        config: Metrics = {"lr": args.lr, "local_epochs": args.local_epochs}
        strategy = make_strategy(to_parameters(self.net), config)
        super().__init__(client_manager=SimpleClientManager(), strategy=strategy)
        self.set_max_workers(1000)  # Flower would talk to only a few clients a core at a time
        self.say_once = functools.cache(self.say)  # for what is true in every round

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[fl.server.History, float]:
        """Run the rounds that are left; raises UserError where three in a row come to nothing."""
        start, failed = time.monotonic(), 0
        while len(self.history) < num_rounds:
            try:
                record, failed = self.run_round(timeout), 0
            except cifar.UserError as error:
                failed += 1
                self.say(f"nothing came of it: {error}. The model stays as it was.")
                if failed == 3:
                    raise cifar.UserError("3 rounds in a row failed: --resume goes on") from error
                continue
            try:
                save(self.args.model, self.net, [*self.history, record])
            except cifar.UserError as error:
                self.say(f"{error} It stays as it was.")
            self.say("loss {1}, accuracy {2}, clients {3}, {4} s".format(*figures(record)))
            self.history.append(record)
        return fl.server.History(), time.monotonic() - start

    def run_round(self, timeout: float | None) -> dict[str, Any]:
        """Run one round of federated learning, return its record; UserError: it came to nothing."""
        server_round = len(self.history) + 1 - self.resumed  # a strategy begins with 1

        # Wait for enough clients; whoever is there takes part.
        clients = wait_for_clients(self.client_manager(), self.args.min_clients)
        start = time.monotonic()

        # Tell them what to train: the global model's parameters, and how.
        to_train = self.strategy.configure_fit(server_round, to_parameters(self.net), clients)
        self.say(f"training on {len(to_train)} of {len(clients)} clients")

        # Train, each client on its own images.
        results, failures = fit_clients(to_train, self.max_workers, timeout, server_round)

        # Refuse what cannot be averaged.
        updates = accept(results, failures, lambda update: check_update(update, self.net), self.say)
        data = compare_data(updates, self.say_once)
        if not updates:
            raise cifar.UserError("no update can be averaged")

        # Average: w = sum of n_k / n * w_k over the clients k, with weights w_k from n_k of all n
        # images. Sorted: a sum of floats depends on its order, but must not on who is first.
        updates.sort(key=lambda update: update[1].parameters.tensors)
        strategy = copy.deepcopy(self.strategy)  # for the case that the round comes to nothing
        average, _ = strategy.aggregate_fit(server_round, updates, [])
        net = to_net(average)

        # Test the average, each client on its own test images; if all have left, nobody does.
        parameters, clients = to_parameters(net), wait_for_clients(self.client_manager(), 0)
        to_test = strategy.configure_evaluate(server_round, parameters, clients) if clients else []
        tested, untested = evaluate_clients(to_test, self.max_workers, timeout, server_round)
        tests = accept(tested, untested, check_test, self.say)
        if to_test and not tests:
            raise cifar.UserError("no client can test the average")
        tests.sort(key=lambda test: (test[1].loss, test[1].num_examples))
        loss, metrics = strategy.aggregate_evaluate(server_round, tests, [])

        # From now on, the average is the global model.
        self.net, self.strategy, seconds = net, strategy, round(time.monotonic() - start, 3)
        record = {"round": len(self.history) + 1, "loss": loss, "accuracy": metrics.get("accuracy")}
        return {**record, "clients": len(updates), "seconds": seconds, "data": data}

    def say(self, message: str) -> None:
        """Print what happens in the round, so that nothing a client sent controls the terminal."""
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:300])
        print(f"Round {len(self.history) + 1}/{self.args.rounds}: {text}")

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Say goodbye; ten seconds are enough, since a client may never answer."""
        super().disconnect_all_clients(timeout=10)


def main() -> None:
    """Run the rounds, and show them."""
    args = make_parser().parse_args()
    certificates = None
    if args.ssl_certfile or args.ssl_keyfile or args.ssl_ca_certfile:
        certificates = try_obtain_server_certificates(args)
        try:
            tls = ssl.create_default_context(cafile=args.ssl_ca_certfile)
            tls.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password="")
        except ssl.SSLError as error:
            raise cifar.UserError(f"The --ssl files are not what TLS needs: {error}.") from error
    check_address(args.server_address, encrypted=bool(certificates))
    server = CifarServer(args)
    if len(server.history) < args.rounds:
        print(f"Listening on {args.server_address}, TLS {'on' if certificates else 'off'}")
        hear_of_clients_that_left()
        with contextlib.suppress(SystemExit):  # Flower's answer to SIGINT and SIGTERM
            fl.server.start_server(
                server_address=args.server_address,
                server=server,
                config=fl.server.ServerConfig(args.rounds, args.round_timeout),
                certificates=certificates,
            )
        if len(server.history) < args.rounds:
            done = f"Stopped after {len(server.history)} of {args.rounds} rounds."
            raise cifar.UserError(f"{done} {args.model} is kept: --resume goes on with it.")
        save(args.model, server.net, server.history)  # in case that it could not be written
    print("\nround    loss  accuracy  clients  seconds")
    for record in server.history:
        print("{:>5} {:>7}  {:>8}  {:>7}  {:>7}".format(*figures(record)))
    print(f"Model: {args.model.resolve()}")


# A first reading may skip the rest: what a round consists of, files, flags, Flower's engine.


def average_accuracy(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Average the clients' accuracies, weighted by their numbers of test images."""
    return {"accuracy": weighted_loss_avg([(n, float(m["accuracy"])) for n, m in metrics])}


def to_parameters(net: cifar.Net) -> Parameters:
    """Return the network's parameters as Flower sends them, in the order of its state_dict."""
    return fl.common.ndarrays_to_parameters([v.numpy() for v in net.state_dict().values()])


def to_net(parameters: Parameters | None) -> cifar.Net:
    """Return a network with these parameters in its own types; raises UserError for a NaN."""
    net = cifar.Net()
    arrays = fl.common.parameters_to_ndarrays(parameters) if parameters else [np.array(np.nan)]
    for (name, value), array in zip(net.state_dict().items(), map(torch.from_numpy, arrays)):
        value.copy_(array if value.is_floating_point() else array.round())
        if not (array.isfinite().all() and value.isfinite().all()):
            raise cifar.UserError(f"NaN or infinity in {name}")
    return net


def wait_for_clients(manager: fl.server.ClientManager, min_clients: int) -> SimpleClientManager:
    """Return, once they are enough, all who are connected, in a manager where nobody leaves."""
    said = -1
    while True:
        clients = SimpleClientManager()
        clients.clients = dict(manager.all())
        if len(clients) >= min_clients:
            return clients
        if len(clients) != said:
            said = len(clients)
            print(f"Waiting for clients: {said} of {min_clients} connected")
        manager.wait_for(said + 1, timeout=1)  # not for longer, since clients also leave


def accept(results: list, failures: list, check: Callable[[Any], None], say: Callable) -> list:
    """Return the (client, result) pairs that pass; name the others, and count who gave none."""
    accepted = []
    answers = [failure for failure in failures if isinstance(failure, tuple)]
    for client, result in [*results, *answers]:
        try:
            if result.status.code is not fl.common.Code.OK:
                raise cifar.UserError(f"error, {result.status.message}")
            check(result)
            accepted.append((client, result))
        except Exception as error:  # noqa: BLE001, NumPy raises many kinds for bytes of no array
            reason = error if isinstance(error, cifar.UserError) else "unreadable"
            say(f"result of client {result.metrics.get('client', client.cid)!r} refused: {reason}")
    if lost := len(failures) - len(answers):
        say(f"{lost} of {len(results) + len(failures)} clients dropped out")
    return accepted


def check_update(update: FitRes, net: cifar.Net) -> None:
    """Raise an exception if the update cannot be averaged."""
    if update.num_examples < 1:
        raise cifar.UserError(f"trained on {update.num_examples} examples")
    update.parameters.tensors = update.parameters.tensors[: len(net.state_dict()) + 1]  # no million
    arrays = fl.common.parameters_to_ndarrays(update.parameters)
    cifar.check_parameters(net, arrays)
    for name, array in zip(net.state_dict(), arrays):
        if not np.isfinite(array).all():
            raise cifar.UserError(f"NaN or infinity in {name}")
    # Flower multiplies in place, and so would make 0 of an integer, like BatchNorm's count.
    floats = [array if array.dtype.kind == "f" else array.astype(float) for array in arrays]
    update.parameters = fl.common.ndarrays_to_parameters(floats)


def check_test(test: EvaluateRes) -> None:
    """Raise UserError if the test result cannot be averaged."""
    loss, accuracy, num_examples = test.loss, test.metrics.get("accuracy"), test.num_examples
    accurate = isinstance(accuracy, float | int) and 0 <= accuracy <= 1
    if not (accurate and abs(loss) < 1e30 and num_examples > 0):
        raise cifar.UserError(f"loss {loss}, accuracy {accuracy!r} on {num_examples} examples")


def compare_data(updates: list, say_once: Callable[[str], None]) -> str:
    """Say what each client holds, and what does not fit together; return the kinds of data."""
    held = []
    for client, update in updates:
        facts = {"client": client.cid, "data": "unknown data", "part": "all", **update.metrics}
        say_once("client {client!r} holds {part} of {data}".format(**facts))
        held.append((str(facts["data"]), str(facts["part"])))
    kinds = sorted({data for data, _ in held})
    if len(kinds) > 1:
        say_once(f"Warning: the clients' data do not fit together: {' / '.join(kinds)}")
    for (data, part), holders in Counter(held).items():
        if holders > 1 and part != "all":
            say_once(f"Warning: {holders} clients hold {part} of {data}")
    return " / ".join(kinds)


def open_model(path: Path, resumed: bool) -> tuple[cifar.Net, list[dict[str, Any]]]:
    """Return the kept model and history, or new ones and rename the old; may raise UserError."""
    history_path = path.with_suffix(".json")
    if resumed:
        net, history = cifar.load_model(path), []
        try:
            history = [each for each in json.loads(history_path.read_bytes()) if figures(each)]
        except FileNotFoundError:
            print(f"{history_path} is missing: going on with the model alone, from round 1")
        except (OSError, ValueError, LookupError, TypeError) as error:
            advice = "Put the right one there, or move it away to go on with the model alone."
            raise cifar.UserError(f"{history_path} holds no history. {advice}") from error
        return net, history
    old = [file for file in (history_path, path) if file.exists()]
    if len(old) == 2 and history_path.is_file() and history_path.read_bytes() == b"[]\n":
        old = []  # of a run that ended before its first round
    number = 1
    while any(file.with_stem(f"{path.stem}-{number}").exists() for file in old):
        number += 1
    for file in old:
        kept = file.rename(file.with_stem(f"{path.stem}-{number}"))
        print(f"{file} of an earlier run is kept as {kept}")
    net = cifar.Net()
    save(path, net, [])
    return net, []


def save(path: Path, net: cifar.Net, history: list[dict[str, Any]]) -> None:
    """Write the model, then the history beside it, each whole or not at all; raises UserError."""
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    text = json.dumps(history, indent=2) + "\n"
    for file, content in ((path, buffer.getvalue()), (path.with_suffix(".json"), text.encode())):
        temporary = file.with_name(f"{file.name}.tmp")
        try:
            with temporary.open("wb") as opened:
                if file.exists():
                    shutil.copymode(file, temporary)
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            temporary.replace(file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cifar.UserError(f"Cannot write {file}: {error.strerror}.") from error


def check_address(address: str, encrypted: bool) -> None:
    """Raise UserError unless the server can listen there; warn if others can reach it."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        for family, _, _, _, host_and_port in found:
            socket.create_server(host_and_port, family=family).close()
    except (OSError, UnicodeError) as error:
        raise cifar.UserError(f"Cannot listen on {address}: {error}. Choose another.") from error
    hosts = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not encrypted and not all(host.is_loopback for host in hosts):
        danger = "can join, read the model and change it: see 'More than one machine' in README.md"
        print(f"Warning: whoever reaches {address} {danger}", file=sys.stderr)


def hear_of_clients_that_left() -> None:
    """Tell Flower of the end of a call also where it ended before Flower asked to be told."""
    add_callback = _server._Context.add_callback
    _server._Context.add_callback = lambda self, call: add_callback(self, call) or call()


def figures(record: dict[str, Any]) -> list[str]:
    """Return a round's figures as text; - for one that is not known."""
    formats = {"round": "d", "loss": ".4f", "accuracy": ".4f", "clients": "d", "seconds": ".1f"}
    return ["-" if record[key] is None else format(record[key], formats[key]) for key in formats]


def make_parser() -> argparse.ArgumentParser:
    """Return the flags of server.py."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = "FedAvg server: run a number of rounds with the clients that connect."
    number, add = cifar.number, parser.add_argument
    add(
        "--server-address",
        type=cifar.address,
        default="127.0.0.1:8080",
        help="HOST:PORT to listen at",
    )
    add("--rounds", type=number(int, 1), default=3, help="rounds in all, resumed ones included")
    add("--min-clients", type=number(int, 1), default=2, help="clients a round waits for")
    add("--local-epochs", type=number(int, 1), default=1, help="a client's epochs in a round")
    add("--lr", type=number(float, 1e-9), default=0.001, help="the clients' learning rate")
    add("--round-timeout", metavar="SECONDS", type=number(float, 0.1), help="patience with clients")
    add("--model", type=cifar.model_path, default="global_model.pt", help="where the model is kept")
    add("--resume", action="store_true", help="go on with the model, after its last round")
    add("--seed", type=number(int, 0), help="the first weights; without it, each run differs")
    add("--ssl-certfile", type=Path, help="TLS: the server's certificate (PEM)")
    add("--ssl-keyfile", type=Path, help="TLS: the server's private key (PEM)")
    add("--ssl-ca-certfile", type=Path, help="TLS: the certificate of the authority (PEM)")
    return parser


def server_fn(context: fl.common.Context) -> fl.server.ServerAppComponents:
    """Build the same server for Flower's deployment engine, from the run config."""
    args = cifar.parse_config(make_parser(), context.run_config)
    config = fl.server.ServerConfig(args.rounds, args.round_timeout)
    return fl.server.ServerAppComponents(server=CifarServer(args), config=config)


app = fl.server.ServerApp(server_fn=server_fn)


if __name__ == "__main__":
    cifar.run_main(main)
