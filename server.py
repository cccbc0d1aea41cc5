"""A Flower server: averages the clients' updates with FedAvg, and never sees an image.

python3 server.py                         # a new run of 3 rounds
python3 server.py --rounds 10 --resume    # continue it to round 10
"""

import io
import json
import os
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from logging import ERROR, INFO, WARNING
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it when it is imported

import flwr as fl
import numpy as np
import torch
from flwr.common import Config, Metrics, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.args import try_obtain_server_certificates
from flwr.common.logger import FLOWER_LOGGER, log
from flwr.server import History, ServerConfig
from flwr.server.server import fit_clients
from flwr.server.strategy import Strategy
from flwr.server.strategy.aggregate import weighted_loss_avg

import cifar

FLOWER_LOGGER.addFilter(lambda record: not str(record.msg).startswith("DEPRECATED FEATURE"))


def make_strategy(parameters: Parameters, config: Config) -> Strategy:
    """Return the strategy that aggregates the updates: any of Flower's, or your own."""
    return fl.server.strategy.FedAvg(
        min_fit_clients=1,  # all that are connected; fit_round() waits for --min-clients
        min_evaluate_clients=1,
        min_available_clients=1,
        initial_parameters=parameters,
        on_fit_config_fn=lambda server_round: config,
        fit_metrics_aggregation_fn=average,
        evaluate_metrics_aggregation_fn=average,
    )


def average(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Average each number that clients return, weighted by number of examples."""
    numbers: dict[str, list] = {}
    for num_examples, each in metrics:
        for name, value in each.items():
            if type(value) in (int, float):  # no text, and no bool
                numbers.setdefault(name, []).append((num_examples, value))
    return {name: weighted_loss_avg(known) for name, known in numbers.items()}


class Clients(fl.server.SimpleClientManager):
    """Flower's client manager, which also says that it waits, and never gives up."""

    def wait_for(self, num_clients: int, timeout: int = 86400) -> bool:
        while (connected := len(self)) < num_clients:
            log(INFO, f"Waiting for clients: {connected} of {num_clients} connected")
            super().wait_for(connected + 1, timeout)
        return True


class CifarServer(fl.server.Server):
    """Flower's server, which also rejects bad updates, repeats failed rounds, and saves.

    For each round, Flower's fit() calls fit_round() and evaluate_round(). Between the two, it
    keeps the new global model as self.parameters, and calls strategy.evaluate().
    """

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.history_path = args.model.with_suffix(".json")
        if args.seed is not None:
            torch.manual_seed(args.seed)
        self.net = cifar.load_model(args.model) if args.resume else cifar.Net()
        self.history = load_history(self.history_path) if args.resume else []
        self.rounds_done = len(self.history)  # before --resume
        parameters = ndarrays_to_parameters(cifar.get_parameters(self.net))
        strategy = make_strategy(parameters, {"lr": args.lr, "local_epochs": args.local_epochs})
        self.clients = Clients()
        super().__init__(client_manager=self.clients, strategy=strategy)
        self.set_max_workers(1000)  # a thread for each client; Flower's default is a few

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Move an earlier run's files aside (the port is ours by now); run the rounds."""
        try:
            for path in self.args.model, self.history_path:
                if path.exists() and not self.args.resume:
                    log(INFO, f"Renamed {path} of an earlier run to {path}.old")
                    path.replace(f"{path}.old")
            return super().fit(num_rounds, timeout)
        except Exception:  # connected clients would keep the process alive
            self.disconnect_all_clients(timeout)
            raise

    def fit_round(self, server_round: int, timeout: float | None) -> tuple | None:
        """Train on the clients and aggregate; try again if lost clients made it fail."""
        if server_round <= self.rounds_done:
            return None  # skip it: Flower always counts from 1
        while True:
            self.clients.wait_for(self.args.min_clients)
            start = time.monotonic()
            # Choose the clients that train, and the parameters and settings for each.
            chosen = self.strategy.configure_fit(server_round, self.parameters, self.clients)
            sampled = f"{len(chosen)} clients (out of {len(self.clients)})"
            log(INFO, f"configure_fit: strategy sampled {sampled}")
            # Train, each client on its own images, as Flower's fit_round() does.
            updates, failures = fit_clients(chosen, self.max_workers, timeout, server_round)
            for failure in failures:  # which Flower only counts
                log(WARNING, f"A client failed: {failure!r}")
            # Reject what would spoil the average.
            results = []
            sent = dict(chosen)
            for client, update in updates:
                try:
                    self.check(update.parameters, sent[client].parameters, update.num_examples)
                    results.append((client, update))
                except Exception as error:  # noqa: BLE001  # a client can send anything
                    name = update.metrics.get("client", client.cid)
                    log(WARNING, f"Update of client {name!r} rejected: {error}")
                    failures.append((client, update))
            received = f"{len(results)} results and {len(failures)} failures"
            log(INFO, f"aggregate_fit: received {received}")
            # Sort by content: clients answer in any order, and a sum of floats depends on it.
            results.sort(key=lambda result: result[1].parameters.tensors)
            # Aggregate. FedAvg: w = sum of n_k / n * w_k over the clients k, where client k
            # has n_k of all n images and sent the weights w_k.
            parameters, metrics = self.strategy.aggregate_fit(server_round, results, failures)
            if parameters:
                self.check(parameters, self.parameters)  # or the run ends
                break
            if results and not failures:
                break  # None is the strategy's decision: the model stays
            # It failed. Repeat it if clients were lost; otherwise it would fail again.
            time.sleep(1)  # Flower takes a moment to unregister a lost client
            if all(client.cid in self.clients.all() for client, _ in chosen):
                raise RuntimeError(f"Round {server_round} failed, and no client was lost")
            log(WARNING, f"Round {server_round} failed, clients were lost: repeating it")
        seconds = round(time.monotonic() - start, 3)
        record: dict = {"round": server_round, "clients": len(results), "seconds": seconds}
        record.update({f"fit_{name}": value for name, value in metrics.items()})
        self.history.append(record)
        return parameters, metrics, ([], [])  # without the updates, to free their memory

    def check(self, parameters: Parameters, sent: Parameters, num_examples: int = 1) -> None:
        """Raise ValueError for no examples, a changed shape, a new NaN or infinity."""
        if num_examples <= 0:
            raise ValueError(f"{num_examples} examples")
        arrays, sent_arrays = parameters_to_ndarrays(parameters), parameters_to_ndarrays(sent)
        if len(arrays) != len(sent_arrays):
            raise ValueError(f"expected {len(sent_arrays)} arrays, got {len(arrays)}")
        for i, (array, old) in enumerate(zip(arrays, sent_arrays)):
            if array.shape != old.shape or not np.can_cast(array.dtype, old.dtype, "same_kind"):
                got = f"{array.dtype}{array.shape}"
                raise ValueError(f"array {i}: expected {old.dtype}{old.shape}, got {got}")
            array = array.astype(old.dtype)  # a float64 may be too large for it
            not_finite = ~np.isfinite(array)
            if not np.array_equal(array[not_finite], old[not_finite], equal_nan=True):
                raise ValueError(f"array {i}: NaN or infinity")

    def evaluate_round(self, server_round: int, timeout: float | None) -> tuple | None:
        """Evaluate on the clients; then the round is complete, and is saved."""
        if server_round <= self.rounds_done:
            return None
        record = self.history[-1]  # of fit_round()
        evaluation = super().evaluate_round(server_round, timeout)
        if evaluation:
            loss, metrics, (_, failures) = evaluation
            for failure in failures:
                log(WARNING, f"A client failed: {failure!r}")
            if loss is not None:
                record["loss"] = loss
            for name, value in metrics.items():
                record.setdefault(name, value)
        log(INFO, record)
        self.save()
        return evaluation

    def save(self) -> None:
        """Save model and history: to temporary files, then moved over the old ones.

        If that fails, the next round tries again. In the last round, it raises OSError.
        """
        cifar.set_parameters(self.net, parameters_to_ndarrays(self.parameters))
        model = io.BytesIO()  # torch.save() to a file would not say "disk full"
        torch.save(self.net.state_dict(), model)
        contents = {self.args.model: model.getvalue(), self.history_path: to_json(self.history)}
        try:
            for path, content in contents.items():
                with open(f"{path}.tmp", "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())  # or a power failure may leave an empty file
            for path in contents:
                os.replace(f"{path}.tmp", path)
            log(INFO, f"Saved {self.args.model} and {self.history_path}")
        except OSError as error:
            log(ERROR, f"Cannot save {self.args.model}: {error}")
            if self.history[-1]["round"] == self.args.rounds:
                raise

    def disconnect_all_clients(self, timeout: float | None) -> None:
        super().disconnect_all_clients(timeout=10)  # a client may never answer


def to_json(records: list[dict]) -> bytes:
    """Return records as JSON: arrays become lists, NaN null, and other types text."""
    text = json.dumps(
        records, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)
    )
    records = json.loads(text, parse_constant=lambda name: None)  # NaN and infinity
    return json.dumps(records, indent=2).encode()


def load_history(path: Path) -> list[dict]:
    """Load the history: a list of records, one for each round; none if there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        sys.exit(f"Cannot load {path}: {error}. Delete it to count the rounds from 1 again.")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--server-address", default="127.0.0.1:8080", help="HOST:PORT to listen on")
    add("--rounds", type=int, default=3, help="all rounds, with those before --resume")
    add("--min-clients", type=int, default=2, help="clients that a round waits for")
    add("--local-epochs", type=int, default=1, help="epochs on a client in a round")
    add("--lr", type=float, default=cifar.LEARNING_RATE, help="the clients' learning rate")
    add("--round-timeout", type=float, help="seconds until a slow client is dropped")
    add("--model", type=Path, default="global_model.pt", help="the model to save")
    add("--resume", action="store_true", help="continue the run of --model")
    add("--seed", type=int, help="random seed for the initial weights")
    add("--ssl-certfile", help="TLS: the server's certificate (PEM)")
    add("--ssl-keyfile", help="TLS: the server's private key (PEM)")
    add("--ssl-ca-certfile", help="TLS: the CA certificate (PEM)")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.model.suffix != ".pt":
        parser.error("--model must end in .pt")
    server = CifarServer(args)
    if args.rounds <= server.rounds_done:
        parser.error(f"--rounds must be more than {server.rounds_done}, which are done")
    args.model.parent.mkdir(parents=True, exist_ok=True)
    has_tls = args.ssl_certfile or args.ssl_keyfile or args.ssl_ca_certfile
    # Flower reads the three files, and exits if one is missing.
    certificates = try_obtain_server_certificates(args) if has_tls else None
    if not has_tls and not args.server_address.startswith(("127.", "localhost:", "[::1]:")):
        log(WARNING, "No TLS: others on the network can read and change what is sent")
    config = ServerConfig(args.rounds, args.round_timeout)
    fl.server.start_server(
        server_address=args.server_address, server=server, config=config, certificates=certificates
    )


if __name__ == "__main__":
    main()  # start_server() handles Ctrl-C
