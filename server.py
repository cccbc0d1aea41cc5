"""A Flower server: aggregates the clients' updates with FedAvg, and never sees an image.

python3 server.py --rounds 10 --resume    # without --resume: a new run
"""

import argparse
import hashlib
import io
import json
import ssl
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tokenize import TokenError
from typing import Any

import cifar  # before Flower, because it sets environment variables for it

# isort: split
import flwr as fl
import numpy as np
import torch
from cryptography import x509
from filelock import FileLock, Timeout
from flwr.common import Code, EvaluateRes, FitRes, GetPropertiesIns, Metrics, Parameters
from flwr.common.args import try_obtain_server_certificates
from flwr.server import ClientManager, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.server import evaluate_clients, fit_clients
from flwr.server.strategy.aggregate import weighted_loss_avg
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed
from numpy.lib.format import read_array


def make_strategy(parameters: Parameters, config: Metrics) -> fl.server.strategy.Strategy:
    """Return the strategy that aggregates the clients' updates: any of Flower's, or your own."""
    return fl.server.strategy.FedAvg(
        min_fit_clients=1,  # run_round() waits for --min-clients, then all of them take part
        min_evaluate_clients=1,
        min_available_clients=1,
        initial_parameters=parameters,
        on_fit_config_fn=lambda server_round: config,
        evaluate_metrics_aggregation_fn=average_accuracy,
    )


class CifarServer(fl.server.Server):
    """Flower server that logs its rounds, checks what it receives, and saves the model."""

    def __init__(self, args: argparse.Namespace, client_manager: ClientManager) -> None:
        super().__init__(client_manager=client_manager)
        self.set_max_workers(1000)  # Flower would talk to only a few clients per core at a time
        self.args = args
        self.logged: set[str] = set()  # by log_once()
        self.lock = FileLock(args.model.with_suffix(".lock"))  # released when the process ends
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            todo = "stop it or pass a different --model"
            raise cifar.UserError(f"{args.model} is in use by another server; {todo}.") from error
        if args.seed is not None:
            torch.manual_seed(args.seed)
        net, self.history = open_run(args.model, args.resume)
        arrays = cifar.get_parameters(net)
        self.parameters = fl.common.ndarrays_to_parameters(arrays)
        # Names, types and shapes only: memory that is never written to is not used.
        self.expected = dict(zip(cifar.shared_state(net), map(np.empty_like, arrays), strict=True))
        self.start_strategy()
        if not args.resume:
            self.save([])

    def start_strategy(self) -> None:
        """Make the strategy, which starts from the global model."""
        config: Metrics = {"lr": self.args.lr, "local_epochs": self.args.local_epochs}
        self.strategy = make_strategy(self.parameters, config)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[fl.server.History, float]:
        """Run the remaining rounds; raises UserError after three consecutive failed rounds."""
        start = time.monotonic()
        failed = 0
        initial = self.strategy.initialize_parameters(self.client_manager())
        if not self.history:
            self.parameters = self.check_aggregate(initial or self.parameters)
            if centralized := self.evaluate_centralized(0, self.parameters):
                print(f"Initial model: centralized {json.dumps(centralized)}")
        while len(self.history) < num_rounds:
            try:
                record = self.run_round(timeout)
            except ClientsLost as error:
                self.log(f"failed ({error}), global model unchanged, trying again")
                continue
            except cifar.UserError as error:
                failed += 1
                self.log(f"failed ({error}), global model unchanged, attempt {failed} of 3")
                if failed < 3:
                    continue
                message = "Giving up after 3 failed attempts. Restart with --resume to continue."
                raise cifar.UserError(message) from error
            failed = 0
            self.log_results(record)
            try:
                self.save([*self.history, record])
            except cifar.UserError as error:
                if record["round"] == num_rounds:
                    raise
                self.log(f"{error} Trying again after the next round.")
            self.history.append(record)
        print_history(self.history, self.args.model)
        return fl.server.History(), time.monotonic() - start

    def run_round(self, timeout: float | None) -> dict[str, Any]:
        """Run one round and return its record; raises UserError if there is no new model."""
        server_round = len(self.history) + 1
        self.limit = self.weight_limit()

        # Wait for enough clients.
        clients = wait_for_clients(self.client_manager(), self.args.min_clients)
        start = time.monotonic()

        # Tell them what to train: the global model's parameters, and how.
        to_train = self.strategy.configure_fit(server_round, self.parameters, clients)
        if not to_train:
            reason = "it asks for more than --min-clients"
            raise cifar.UserError(f"the strategy chose none of {len(clients)} clients: {reason}")
        self.log(f"training on {len(to_train)} of {len(clients)} clients")

        # Train, each client on its own images.
        results, failures = fit_clients(to_train, self.max_workers, timeout, server_round)

        # Reject updates that cannot be aggregated.
        updates, failures = self.check_results(to_train, results, failures, start, timeout)
        data = self.compare_data(updates)

        # Aggregate. FedAvg: w = sum of n_k / n * w_k over the clients k, with weights w_k from n_k
        # of all n images. Sorted, because a sum of floats depends on the order of its terms.
        updates.sort(key=lambda update: update[1].parameters.tensors)
        num_updates = len(updates)
        aggregate, fit_metrics = self.strategy.aggregate_fit(server_round, updates, failures)
        if not aggregate:
            reason = "the strategy returned no parameters" if updates else "no usable updates"
            only_lost = failures and all(isinstance(each, GrpcBridgeClosed) for each in failures)
            raise ClientsLost(reason) if only_lost else cifar.UserError(reason)
        del results, updates, failures  # free the memory: they hold a model per client

        # Evaluate the aggregate: at the server, if the strategy does, and on the clients' images.
        try:
            parameters = self.check_aggregate(aggregate)
            centralized = self.evaluate_centralized(server_round, parameters)
            loss, metrics = self.evaluate(server_round, parameters, timeout)
        except cifar.UserError:
            self.start_strategy()  # anew: its momentum, say, may hold a part of the aggregate
            self.strategy.initialize_parameters(self.client_manager())
            raise

        # From now on, the aggregate is the global model.
        self.parameters = parameters
        return {
            "round": server_round,
            "loss": loss,
            "accuracy": metrics.get("accuracy"),
            "clients": num_updates,
            "seconds": round(time.monotonic() - start, 3),
            "data": data,
            "metrics": to_numbers(metrics),
            "fit_metrics": to_numbers(fit_metrics),
            "centralized": centralized,
            "strategy": type(self.strategy).__name__,
            "config": to_numbers(to_train[0][1].config),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"flwr": fl.__version__, "torch": str(torch.__version__)},
        }

    def weight_limit(self) -> float:
        """Return 1,000 times the global model's largest weight (at least 1)."""
        arrays = fl.common.parameters_to_ndarrays(self.parameters)
        return 1000 * max(1, *map(cifar.largest, arrays))

    def evaluate_centralized(self, server_round: int, parameters: Parameters) -> Metrics:
        """Return loss and metrics of the strategy's own evaluation, if it has one."""
        evaluation = self.strategy.evaluate(server_round, parameters)
        return to_numbers({"loss": evaluation[0], **evaluation[1]}) if evaluation else {}

    def evaluate(
        self, server_round: int, parameters: Parameters, timeout: float | None
    ) -> tuple[float | None, Metrics]:
        """Return loss and metrics of the clients' evaluations; raises UserError."""
        clients = Snapshot(self.client_manager())
        start = time.monotonic()
        to_evaluate = self.strategy.configure_evaluate(server_round, parameters, clients)
        if not to_evaluate:
            return None, {}
        results, failures = evaluate_clients(to_evaluate, self.max_workers, timeout, server_round)
        evaluations, failures = self.check_results(to_evaluate, results, failures, start, timeout)
        if sum(isinstance(each, tuple) for each in failures) > len(evaluations):
            raise cifar.UserError("most clients cannot evaluate the aggregate")
        evaluations.sort(key=lambda evaluation: (evaluation[1].loss, evaluation[1].num_examples))
        return self.strategy.aggregate_evaluate(server_round, evaluations, failures)

    def check_results(
        self,
        asked: list,
        results: list,
        failures: list,
        start: float,
        timeout: float | None,
    ) -> tuple[list, list]:
        """Return the usable (client, result) pairs, and all failures with the rejected pairs.

        Logs rejected results and lost clients; raises UserError for an unexpected exception.
        """
        usable = []
        rejected = []
        lost = {client.cid: client for client, _ in asked}
        for client, result in results + [each for each in failures if isinstance(each, tuple)]:
            lost.pop(client.cid, None)
            client.properties = result.metrics or client.properties
            try:
                self.check_result(result)
                usable.append((client, result))
            except cifar.UserError as error:
                kind = "update" if isinstance(result, FitRes) else "evaluation"
                self.log(f"{kind} from client {name_of(client)!r} rejected: {error}")
                rejected.append((client, result))
        errors = [each for each in failures if isinstance(each, Exception)]
        for failure in errors:
            if not isinstance(failure, GrpcBridgeClosed):
                raise cifar.UserError(f"{type(failure).__name__}: {failure}") from failure
        for client in lost.values():
            late = timeout and getattr(client, "disconnected", start) - start >= timeout
            reason = f"timed out after {timeout:g} s" if late else "disconnected"
            self.log(f"client {name_of(client)!r} lost: {reason}")
        return usable, errors + rejected

    def check_result(self, result: FitRes | EvaluateRes) -> None:
        """Raise UserError if a client's result cannot be aggregated."""
        if result.status.code != Code.OK:
            raise cifar.UserError(f"{result.status.code.name}, {result.status.message}")
        if not 0 < result.num_examples <= 10**9:
            raise cifar.UserError(f"{result.num_examples} examples")
        if isinstance(result, EvaluateRes):
            accuracy: Any = result.metrics.get("accuracy", 0)
            valid = isinstance(accuracy, int | float) and not isinstance(accuracy, bool)
            if not (valid and 0 <= accuracy <= 1 and 0 <= result.loss < 1e30):
                raise cifar.UserError(f"loss {result.loss:g}, accuracy {accuracy!r}")
            return
        arrays = decode(result.parameters.tensors[: len(self.expected) + 1])
        cifar.check_parameters(self.expected, arrays, self.limit)
        if any(array.dtype.kind != "f" for array in arrays):
            # Strategies average in place, where 0.5 as an integer is 0.
            floats = [array if array.dtype.kind == "f" else array.astype(float) for array in arrays]
            result.parameters = fl.common.ndarrays_to_parameters(floats)

    def check_aggregate(self, aggregate: Parameters) -> Parameters:
        """Return the aggregate in the network's own types; raises UserError if it does not fit."""
        arrays = fl.common.parameters_to_ndarrays(aggregate)
        with np.errstate(all="ignore"):  # check_parameters() finds what becomes an infinity
            for i, own in enumerate(list(self.expected.values())[: len(arrays)]):
                rounded = arrays[i] if own.dtype.kind == "f" else arrays[i].round()
                arrays[i] = rounded.astype(own.dtype, copy=False)
        cifar.check_parameters(self.expected, arrays)
        return fl.common.ndarrays_to_parameters(arrays)

    def compare_data(self, updates: list[tuple[ClientProxy, FitRes]]) -> str:
        """Log each client's data, warn if they do not match, and return what they are."""
        keys = ("data", "partition", "classes")
        told = [[str(res.metrics.get(key, "unknown"))[:1000] for key in keys] for _, res in updates]
        for (client, _), (data, partition, _) in zip(updates, told, strict=True):
            self.log_once(f"client {name_of(client)!r}: {data}, {partition}")
        for key, column in zip(keys, zip(*told)):
            if key != "partition" and len(set(column)) > 1:
                different = " / ".join(sorted(set(column)))
                self.log_once(f"Warning: the clients' {key} differ: {different}")
        for (data, partition, _), count in Counter(map(tuple, told)).items():
            if count > 1 and partition.startswith("partition"):
                self.log_once(f"Warning: {count} clients use {partition} of {data}")
        return " / ".join(sorted({data for data, _, _ in told}))[:100]

    def log_results(self, record: dict[str, Any]) -> None:
        """Log the results of a round."""
        self.log("loss {1}, accuracy {2}, clients {3}, {4} s".format(*table_row(record)))
        for key in ("metrics", "fit_metrics", "centralized"):
            if record[key] and list(record[key]) != ["accuracy"]:
                self.log(f"{key} {json.dumps(record[key])}")

    def log_once(self, message: str) -> None:
        """Log what is true in every round only once."""
        if message not in self.logged:
            self.logged.add(message)
            self.log(message)

    def log(self, message: str) -> None:
        """Print a line about the round; escaped, because clients may have sent a part of it."""
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:300])
        print(f"Round {len(self.history) + 1}/{self.args.rounds}: {text}")

    def save(self, history: list[dict[str, Any]]) -> None:
        """Save model and history; raises UserError."""
        net = cifar.Net()
        cifar.set_parameters(net, fl.common.parameters_to_ndarrays(self.parameters))
        model = cifar.to_bytes(net)
        if history:
            history[-1]["model"] = hashlib.sha256(model).hexdigest()
        text = json.dumps(history, indent=2) + "\n"
        path = self.args.model
        cifar.write_files({path.with_suffix(".json"): text.encode(), path: model})


# Utilities: skip on first reading. Clients, files, command line; main() is at the end.


class ClientsLost(cifar.UserError):
    """A round failed only because connections were lost: it does not count as an attempt."""


class Snapshot(SimpleClientManager):
    """The clients connected now. Nobody can join, so sample() does not wait for more."""

    def __init__(self, client_manager: ClientManager) -> None:
        super().__init__()
        self.clients = dict(client_manager.all())

    def sample(
        self, num_clients: int, min_num_clients: int | None = None, criterion: Any = None
    ) -> list[ClientProxy]:
        """Return random clients, or none if there are fewer than asked for."""
        enough = len(self) >= (min_num_clients or num_clients)
        return super().sample(num_clients, 0, criterion) if enough else []


class ConnectedClients(SimpleClientManager):
    """A client manager that lists a client once it has answered.

    Flower's own keeps one for ever that disconnects while it joins.
    """

    def register(self, client: ClientProxy) -> bool:
        """List the client once it has answered."""
        threading.Thread(target=self.ask, args=(client,), daemon=True).start()
        return True

    def ask(self, client: ClientProxy) -> None:
        """Ask the client for its properties, and list it unless it disconnects."""
        with suppress(GrpcBridgeClosed):
            answer = client.get_properties(GetPropertiesIns({}), timeout=None, group_id=None)
            client.properties = answer.properties
            super().register(client)
            if hasattr(client, "disconnected"):
                super().unregister(client)

    def unregister(self, client: ClientProxy) -> None:
        """Remove the client, and note when it disconnected."""
        client.disconnected = time.monotonic()  # type: ignore[attr-defined]
        super().unregister(client)


class StandaloneServer(CifarServer):
    """CifarServer for start_server(), which stops its gRPC server only if fit() returns."""

    error: BaseException | None = None

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[fl.server.History, float]:
        """Run the rounds; keep the exception that ends them for main() to raise."""
        try:
            return super().fit(num_rounds, timeout)
        except BaseException as error:  # noqa: BLE001
            self.error = error
            return fl.server.History(), 0.0

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Disconnect the clients; one may never answer, so wait at most 10 s."""
        super().disconnect_all_clients(timeout=10)


def wait_for_clients(client_manager: ClientManager, min_clients: int) -> Snapshot:
    """Block until `min_clients` are connected; return a snapshot of the client manager."""
    connected = -1
    while True:
        clients = Snapshot(client_manager)
        if len(clients) >= min_clients:
            return clients
        if len(clients) != connected:
            connected = len(clients)
            print(f"Waiting for clients: {connected} of {min_clients} connected")
        client_manager.wait_for(connected + 1, timeout=1)  # not longer: clients also leave


def decode(tensors: list[bytes]) -> list[np.ndarray]:
    """Return the arrays in a client's result; raises UserError."""
    try:
        return [read_array(io.BytesIO(tensor), allow_pickle=False) for tensor in tensors]
    except (ValueError, TypeError, OverflowError, MemoryError, TokenError) as error:
        raise cifar.UserError("unreadable parameters") from error


def average_accuracy(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Average the clients' accuracies, weighted by their numbers of test images."""
    known = [(n, float(each["accuracy"])) for n, each in metrics if "accuracy" in each]
    return {"accuracy": weighted_loss_avg(known)} if known else {}


def name_of(client: ClientProxy) -> str:
    """Return what a client calls itself, or else Flower's id."""
    return str(client.properties.get("client", client.cid))[:100]


def to_numbers(metrics: Metrics) -> Metrics:
    """Return the metrics as JSON takes them: NumPy scalars as numbers, bytes as hex digits."""
    numbers = {k: v.item() if isinstance(v, np.generic) else v for k, v in metrics.items()}
    return {k: v.hex() if isinstance(v, bytes) else v for k, v in numbers.items()}


def table_row(record: dict[str, Any]) -> list[str]:
    """Return the columns of print_history() for a round; - for what is unknown."""
    formats = {
        "round": "d",
        "loss": ".4f",
        "accuracy": ".4f",
        "clients": "d",
        "seconds": ".1f",
    }
    return [
        "-" if record.get(key) is None else format(record[key], form)
        for key, form in formats.items()
    ]


def print_history(history: list[dict[str, Any]], path: Path) -> None:
    """Print a table of the rounds, and where the model is."""
    print("\nround    loss  accuracy  clients  seconds")
    for record in history:
        print("{:>5} {:>7}  {:>8}  {:>7}  {:>7}".format(*table_row(record)))
    print(f"Model: {path.resolve()}")


def open_run(path: Path, resume: bool) -> tuple[cifar.Net, list[dict[str, Any]]]:
    """Return model and history to resume, or new ones after renaming the old; raises UserError."""
    history_path = path.with_suffix(".json")
    history = cifar.read_history(path)
    if history is None and history_path.exists():
        todo = "Restore it, move it away, or pass a different --model."
        raise cifar.UserError(f"{history_path} is not a valid history file. {todo}")
    if resume:
        net = cifar.load_model(path)
        if history is None:
            print(f"{history_path} is missing: resuming from the model alone, at round 1")
        model = hashlib.sha256(path.read_bytes()).hexdigest()
        rounds = [
            record["round"] for record in history or [] if record.get("model", model) == model
        ]
        if history and not rounds:
            print(f"Warning: {path} is not the model of a round in {history_path}, but another one")
        return net, (history or [])[: rounds[-1] if rounds else None]
    old = [file for file in (history_path, path) if file.exists()]
    if history == [] and len(old) == 2:
        old = []  # of a run that ended before its first round
    number = 1
    while any(file.with_stem(f"{path.stem}-{number}").exists() for file in old):
        number += 1
    for file in old:
        renamed = file.rename(file.with_stem(f"{path.stem}-{number}"))
        print(f"Renamed {file} (earlier run) to {renamed}")
    return cifar.Net(), []


def read_certificates(args: argparse.Namespace) -> tuple[bytes, bytes, bytes] | None:
    """Return the TLS certificates for start_server(), if any; raises UserError."""
    if not (args.ssl_certfile or args.ssl_keyfile or args.ssl_ca_certfile):
        return None
    certificates = try_obtain_server_certificates(args)
    flags = "--ssl-ca-certfile"
    try:
        tls = ssl.create_default_context(cafile=args.ssl_ca_certfile)
        flags = "--ssl-certfile or --ssl-keyfile"
        tls.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password="")
    except ssl.SSLError as error:
        raise cifar.UserError(f"Invalid TLS certificate or key in {flags}: {error}.") from error
    certificate = x509.load_pem_x509_certificate(args.ssl_certfile.read_bytes())
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= datetime.now(UTC) <= last:
        dates = f"from {first:%Y-%m-%d} to {last:%Y-%m-%d}"
        print(
            f"Warning: clients reject --ssl-certfile: it is valid {dates}",
            file=sys.stderr,
        )
    return certificates


def make_parser() -> argparse.ArgumentParser:
    """Return the flags of server.py."""
    parser = argparse.ArgumentParser(description="The server of a federation: runs its rounds.")
    add = parser.add_argument
    add(
        "--server-address",
        type=cifar.address,
        default="127.0.0.1:8080",
        help="address to listen on (default: %(default)s)",
    )
    add(
        "--rounds",
        type=cifar.number(int, 1),
        default=3,
        help="total rounds, including those before --resume (default: %(default)s)",
    )
    add(
        "--min-clients",
        type=cifar.number(int, 1),
        default=2,
        help="clients required before a round starts (default: %(default)s)",
    )
    add(
        "--local-epochs",
        type=cifar.number(int, 1),
        default=1,
        help="local epochs per round (default: %(default)s)",
    )
    add(
        "--lr",
        type=cifar.number(float, 1e-9),
        default=cifar.LEARNING_RATE,
        help="learning rate of the clients (default: %(default)s)",
    )
    add(
        "--round-timeout",
        metavar="SECONDS",
        type=cifar.number(float, 0.1),
        help="drop clients that take longer than this",
    )
    add(
        "--model",
        type=cifar.model_path,
        default="global_model.pt",
        help="model file, with the history beside it (default: %(default)s)",
    )
    add("--resume", action="store_true", help="resume from --model and its history")
    add("--seed", type=cifar.number(int, 0), help="random seed for the initial weights")
    add("--ssl-certfile", type=Path, help="TLS: the server's certificate (PEM)")
    add("--ssl-keyfile", type=Path, help="TLS: the server's private key (PEM)")
    add("--ssl-ca-certfile", type=Path, help="TLS: the CA certificate (PEM)")
    return parser


def server_fn(context: fl.common.Context) -> fl.server.ServerAppComponents:
    """Build the same server for Flower's deployment engine, from the run config."""
    import client  # lazy import: only the engine mixes the flags of both scripts

    args = cifar.parse_config(make_parser(), context.run_config, client.make_parser())
    config = fl.server.ServerConfig(args.rounds, args.round_timeout)
    server = CifarServer(args, SimpleClientManager())
    return fl.server.ServerAppComponents(server=server, config=config)


app = fl.server.ServerApp(server_fn=server_fn)


def main() -> None:
    """Start the server, and run the rounds that are left."""
    args = make_parser().parse_args()
    certificates = read_certificates(args)
    if not certificates and not args.server_address.startswith(("127.", "localhost:", "[::1]:")):
        danger = "anyone who can reach it can join, read and modify the model"
        where = 'See "Several machines" in README.md.'
        print(
            f"Warning: no TLS on {args.server_address}: {danger}. {where}",
            file=sys.stderr,
        )
    server = StandaloneServer(args, ConnectedClients())
    if len(server.history) >= args.rounds:
        print(f"All {args.rounds} rounds are done: raise --rounds to continue.")
        print_history(server.history, args.model)
        return
    tls = "on" if certificates else "off"
    strategy = type(server.strategy).__name__
    print(f"Listening on {args.server_address}, TLS {tls}, strategy {strategy}")
    fl.server.start_server(
        server_address=args.server_address,
        server=server,
        config=fl.server.ServerConfig(args.rounds, args.round_timeout),
        certificates=certificates,
    )
    if isinstance(server.error, SystemExit):  # Flower's answer to Ctrl-C and SIGTERM
        done = f"Stopped after {len(server.history)} of {args.rounds} rounds."
        todo = "Restart with --resume to continue."
        raise cifar.UserError(f"{done} Model saved to {args.model}. {todo}")
    if server.error:
        raise server.error


if __name__ == "__main__":
    cifar.run_main(main)
