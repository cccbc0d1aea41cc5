"""A Flower server: aggregates the clients' updates with FedAvg, and never sees an image.

python3 server.py                         # a new run of 3 rounds
python3 server.py --rounds 10 --resume    # continue it to round 10
"""

import hashlib
import io
import json
import random
import ssl
import threading
import time
from argparse import Namespace
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tokenize import TokenError
from typing import Any

import cifar  # before Flower, because it sets environment variables for it
from cifar import UserError

# isort: split
import flwr as fl
import numpy as np
import torch
from cryptography import x509
from filelock import FileLock, Timeout
from flwr.common import Metrics, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.args import try_obtain_server_certificates
from flwr.server import ClientManager, History, ServerConfig, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import Strategy
from flwr.server.strategy.aggregate import weighted_loss_avg
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed as Disconnected
from flwr.server.superlink.fleet.grpc_bidi.grpc_client_proxy import GrpcClientProxy


def make_strategy(parameters: Parameters, config: Metrics) -> Strategy:
    """Return the strategy that aggregates the updates: any of Flower's, or your own."""
    return fl.server.strategy.FedAvg(
        min_fit_clients=1,  # run_round() waits for --min-clients; then all take part
        min_evaluate_clients=1,
        min_available_clients=1,
        initial_parameters=parameters,
        on_fit_config_fn=lambda server_round: config,
        evaluate_metrics_aggregation_fn=average_accuracy,
    )


class CifarServer(fl.server.Server):
    """Flower server that logs its rounds, checks results, and saves the model."""

    def __init__(self, args: Namespace, client_manager: ClientManager) -> None:
        super().__init__(client_manager=client_manager)
        self.max_workers = 1000  # threads, one per client; Flower's default is 32
        self.args = args
        self.round = 0
        self.timeout: float | None = None  # seconds
        self.logged: set[str] = set()
        self.lock = FileLock(args.model.with_suffix(".lock"))  # held until the end
        try:
            self.lock.acquire(timeout=0)
        except Timeout as error:
            hint = "stop it or pass a different --model."
            raise UserError(f"{args.model} is in use by another server; {hint}") from error
        if args.seed is not None:
            torch.manual_seed(args.seed)
        net, self.history = open_run(args.model, args.resume)
        self.parameters = ndarrays_to_parameters(cifar.get_parameters(net))
        self.expected = cifar.shared_state(net.to("meta"))  # only names, dtypes and shapes
        self.start_strategy()

    def start_strategy(self) -> None:
        """Make the strategy, which starts from the global model."""
        config: Metrics = {"lr": self.args.lr, "local_epochs": self.args.local_epochs}
        self.strategy = make_strategy(self.parameters, config)

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the remaining rounds; raises UserError after three failed attempts in a row."""
        start = time.monotonic()
        self.timeout = timeout
        failed = 0
        if not (self.args.resume or self.history):
            rename_earlier_run(self.args.model)
            self.save()
        initial = self.strategy.initialize_parameters(self.client_manager())
        if not self.history:
            self.parameters = self.check_aggregate(initial or self.parameters)
            if metrics := self.evaluate_centralized(self.parameters):
                print(f"Initial model: centralized {json.dumps(metrics, default=to_plain)}")
        while len(self.history) < num_rounds:
            try:
                record = self.run_round()
            except Disconnected as error:
                reason = str(error) or "a client is gone"
                self.log(f"failed ({reason}), global model unchanged, trying again")
                time.sleep(1)  # s; a strategy may choose lost clients again and again
                continue
            except UserError as error:
                failed += 1
                self.log(f"failed ({error}), global model unchanged, attempt {failed} of 3")
                if failed == 3:
                    hint = "Restart with --resume to continue."
                    raise UserError(f"Giving up after 3 failed attempts. {hint}") from error
                self.start_strategy()  # its state may include a bad aggregate
                self.strategy.initialize_parameters(self.client_manager())
                continue
            failed = 0
            self.log_results(record)
            self.history.append(record)
            try:
                self.save()
            except UserError as error:
                if self.round == num_rounds:
                    raise
                self.log(f"{error} Trying again after the next round.")
        self.print_history()
        return History(), time.monotonic() - start  # empty: Flower would print the rounds again

    def run_round(self) -> dict:
        """Run one round and return its record.

        Raises Disconnected if it fails only because clients were lost, else UserError.
        """
        self.round = len(self.history) + 1
        clients = self.client_manager()

        # Wait for enough clients.
        connected = -1
        while (available := clients.num_available()) < self.args.min_clients:
            if available != connected:
                print(f"Waiting for clients: {available} of {self.args.min_clients} connected")
            connected = available
            clients.wait_for(connected + 1, timeout=1)  # s; then count again, as clients may leave
        start = time.monotonic()

        # Choose the clients that train, and what to send them: parameters and settings.
        to_train = self.strategy.configure_fit(self.round, self.parameters, clients)
        if not to_train:
            reason = "it asks for more than --min-clients"
            raise UserError(f"the strategy chose none of {available} clients: {reason}")
        self.log(f"training on {len(to_train)} of {available} clients")

        # Train, each client on its own images. Updates that cannot be aggregated, or
        # would swamp the others, are rejected: they are among the failures.
        weights = map(np.abs, parameters_to_ndarrays(self.parameters))
        self.limit = 1000 * max(array.max(initial=1) for array in weights)
        updates, failures = self.collect("fit", to_train)
        data = self.compare_data([client for client, _ in updates])

        # Aggregate. FedAvg: w = sum of n_k / n * w_k over the clients k, where client k
        # has n_k of all n images and sent the weights w_k. Updates arrive in any order,
        # and a sum of floats depends on it: sort them, to make a run repeatable.
        updates.sort(key=lambda update: update[1].parameters.tensors)
        num_updates = len(updates)
        aggregate, fit_metrics = self.strategy.aggregate_fit(self.round, updates, failures)
        if not aggregate:
            reason = "the strategy returned no parameters" if updates else "no usable updates"
            only_lost = {type(each) for each in failures} == {Disconnected}
            raise Disconnected(reason) if only_lost else UserError(reason)
        del updates, failures  # free the memory: they hold a model per client
        aggregate = self.check_aggregate(aggregate)

        # Evaluate the aggregate: on the server if the strategy does, and on the clients.
        centralized = self.evaluate_centralized(aggregate)
        to_evaluate = self.strategy.configure_evaluate(self.round, aggregate, clients) or []
        results, failures = self.collect("evaluate", to_evaluate)
        if sum(not isinstance(each, Disconnected) for each in failures) > len(results):
            raise UserError("most clients cannot evaluate the aggregate")
        loss = None
        metrics: Metrics = {}
        if to_evaluate:
            loss, metrics = self.strategy.aggregate_evaluate(self.round, results, failures)

        # From now on, the aggregate is the global model.
        self.parameters = aggregate
        return {
            "round": self.round,
            "loss": loss,
            "accuracy": metrics.get("accuracy"),
            "clients": num_updates,
            "seconds": round(time.monotonic() - start, 3),
            "data": data,
            "metrics": metrics,
            "fit_metrics": fit_metrics,
            "centralized": centralized,
            "strategy": type(self.strategy).__name__,
            "config": to_train[0][1].config,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"flwr": fl.__version__, "torch": torch.__version__},
        }

    def evaluate_centralized(self, parameters: Parameters) -> Metrics:
        """Return loss and metrics of the strategy's own evaluation, if it has one."""
        evaluation = self.strategy.evaluate(self.round, parameters)
        return {"loss": evaluation[0], **evaluation[1]} if evaluation else {}

    def collect(self, task: str, instructions: list) -> tuple[list, list]:
        """Send clients their instructions to "fit" or "evaluate"; return results and failures.

        Results are (client, result) pairs. A failure is such a pair, if the result was
        rejected, or else the exception of a client that was lost. Raises UserError for any
        other exception.
        """
        usable = []
        failures: list = []
        start = time.monotonic()
        with ThreadPoolExecutor(self.max_workers) as executor:
            asked = {
                executor.submit(getattr(client, task), ins, self.timeout, self.round): client
                for client, ins in instructions
            }
            for future in as_completed(asked):
                client = asked[future]
                error = future.exception()
                # In Flower's engine, a client that fails or is too late is a ValueError.
                if isinstance(error, Disconnected | ValueError):
                    failures.append(error)
                    reason = str(error) or "disconnected"
                    if self.timeout and time.monotonic() - start >= self.timeout:
                        reason = f"timed out after {self.timeout:g} s"
                    self.log(f"{name_of(client)} lost: {reason}")
                    if isinstance(error, Disconnected):
                        self.client_manager().unregister(client)  # if Flower has not done so yet
                    continue
                if error:
                    raise UserError(f"{type(error).__name__}: {error}") from error
                result = future.result()
                client.properties.update(result.metrics)  # ask() is never called in the engine
                try:
                    self.check_result(result)
                    usable.append((client, result))
                except UserError as error:
                    failures.append((client, result))
                    kind = "update" if task == "fit" else "evaluation"
                    self.log(f"{kind} from {name_of(client)} rejected: {error}")
        return usable, failures

    def check_result(self, result: fl.common.FitRes | fl.common.EvaluateRes) -> None:
        """Raise UserError if a client's result cannot be aggregated."""
        if result.status.code != fl.common.Code.OK:
            raise UserError(f"{result.status.code.name}, {result.status.message}")
        if not 0 < result.num_examples <= 10**9:
            raise UserError(f"{result.num_examples} examples")
        if isinstance(result, fl.common.EvaluateRes):
            accuracy: Any = result.metrics.get("accuracy", 0)
            number = type(accuracy) in (int, float)  # not bool, which is an int too
            if not (number and 0 <= accuracy <= 1 and 0 <= result.loss < 1e30):
                raise UserError(f"loss {result.loss:g}, accuracy {accuracy!r}")
            return
        # One array more than expected is enough to reject it.
        files = map(io.BytesIO, result.parameters.tensors[: len(self.expected) + 1])
        try:
            arrays = [np.lib.format.read_array(file, allow_pickle=False) for file in files]
        except UNREADABLE as error:
            raise UserError("unreadable parameters") from error
        cifar.check_parameters(self.expected, arrays, self.limit)

    def check_aggregate(self, aggregate: Parameters) -> Parameters:
        """Return the aggregate, cast to the model's dtypes; raises UserError if it does not fit."""
        arrays = parameters_to_ndarrays(aggregate)
        for i, (array, own) in enumerate(zip(arrays, self.expected.values())):
            arrays[i] = torch.from_numpy(array).to(own.dtype).numpy()
        cifar.check_parameters(self.expected, arrays)
        return ndarrays_to_parameters(arrays)

    def compare_data(self, clients: list[ClientProxy]) -> str:
        """Log each client's data, warn if they do not match; return them for the history."""
        partitions = [property_of(client, "partition") for client in clients]
        for client, partition in zip(clients, partitions):
            line = f"{name_of(client)}: {property_of(client, 'data')}, {partition}"
            self.log(line, once=True)
        for partition, count in Counter(partitions).items():
            if count > 1 and partition.startswith("partition"):
                self.log(f"Warning: {count} clients use {partition}", once=True)
        classes = sorted({property_of(each, "classes") for each in clients})
        data = sorted({property_of(each, "data") for each in clients})
        for key, values in (("classes", classes), ("data", data)):
            if len(values) > 1:
                self.log(f"Warning: the clients' {key} differ: {' / '.join(values)}", once=True)
        return " / ".join(data)[:100]

    def log_results(self, record: dict) -> None:
        """Log the results of a round."""
        self.log(
            f"loss {column(record, 'loss')}, accuracy {column(record, 'accuracy')}, "
            f"clients {record['clients']}, {column(record, 'seconds', '.1f')} s"
        )
        for key in ("metrics", "fit_metrics", "centralized"):
            if record[key] and record[key] != {"accuracy": record["accuracy"]}:
                self.log(f"{key} {json.dumps(record[key], default=to_plain)}")

    def print_history(self) -> None:
        """Print a table of the rounds, and where the model is."""
        print("\nround    loss  accuracy  clients  seconds")
        for record in self.history:
            print(
                f"{record['round']:>5} {column(record, 'loss'):>7}  "
                f"{column(record, 'accuracy'):>8}  {column(record, 'clients', 'd'):>7}  "
                f"{column(record, 'seconds', '.1f'):>7}"
            )
        print(f"Model: {self.args.model}")

    def log(self, message: str, once: bool = False) -> None:
        """Print a line about the round (with `once`, not again); escape unprintable characters."""
        if once:
            if message in self.logged:
                return
            self.logged.add(message)
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:300])
        print(f"Round {self.round}/{self.args.rounds}: {text}")

    def save(self) -> None:
        """Save model and history; raises UserError."""
        net = cifar.Net()
        cifar.set_parameters(net, parameters_to_ndarrays(self.parameters))
        model = cifar.to_bytes(net)
        if self.history:
            self.history[-1]["model"] = hashlib.sha256(model).hexdigest()
        text = json.dumps(self.history, indent=2, default=to_plain) + "\n"
        path = self.args.model
        cifar.write_files({path.with_suffix(".json"): text.encode(), path: model})


# Utilities: skip on first reading. Clients, files, command line; main() is at the end.


# What NumPy raises for bytes that are not an array, depending on what is wrong with them.
UNREADABLE = (
    ArithmeticError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
)


class Clients(SimpleClientManager):
    """Flower's client manager, safe while clients leave; clients register once they answer."""

    def all(self) -> dict[str, ClientProxy]:
        """Return a copy of the clients, as they may join or leave while it is used."""
        return dict(self.clients)

    def sample(self, num_clients: int, min_num_clients: Any = None, criterion: Any = None) -> list:
        """Return random clients, or none if there are too few: it never waits for more."""
        clients = [each for each in self.all().values() if not criterion or criterion.select(each)]
        enough = len(self) >= (min_num_clients or 0) and len(clients) >= num_clients
        return random.sample(clients, num_clients) if enough else []

    def register(self, client: ClientProxy) -> bool:
        """Register a client; over gRPC, once it answers: it may have left already."""
        if not isinstance(client, GrpcClientProxy):
            return super().register(client)
        threading.Thread(target=self.ask, args=(client,), daemon=True).start()
        return True

    def ask(self, client: ClientProxy) -> None:
        """Ask a client for its properties, then register it."""
        with suppress(Disconnected):
            answer = client.get_properties(fl.common.GetPropertiesIns({}), None, None)
            client.properties = answer.properties
            super().register(client)

    def unregister(self, client: ClientProxy) -> None:
        """Unregister a client; Flower may be doing so in another thread at the same time."""
        self.clients.pop(client.cid, None)


class StandaloneServer(CifarServer):
    """CifarServer for start_server(), which stops gRPC only if fit() returns."""

    error: BaseException | None = None  # for main() to raise

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the rounds; keep the exception that ends them."""
        tls = "on" if self.args.ssl_certfile else "off"
        strategy = type(self.strategy).__name__
        try:
            print(f"Listening on {self.args.server_address}, TLS {tls}, strategy {strategy}")
            return super().fit(num_rounds, timeout)
        except BaseException as error:  # noqa: BLE001
            self.error = error
        return History(), 0.0

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Disconnect the clients; one may never answer, so wait at most 10 s."""
        super().disconnect_all_clients(timeout=10)


def average_accuracy(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Average the clients' accuracies, weighted by their numbers of test images."""
    known = [(n, float(each["accuracy"])) for n, each in metrics if "accuracy" in each]
    return {"accuracy": weighted_loss_avg(known)} if known else {}


def property_of(client: ClientProxy, key: str) -> str:
    """Return a property that the client sent, truncated to 1,000 characters."""
    return str(client.properties.get(key, "unknown"))[:1000]


def name_of(client: ClientProxy) -> str:
    """Return the client's name for the log, or Flower's id if it has sent none."""
    return f"client '{client.properties.get('client', client.cid)!s:.100}'"


def to_plain(value: Any) -> Any:
    """Return values of NumPy and PyTorch as numbers or lists, and others as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def column(record: dict, key: str, form: str = ".4f") -> str:
    """Return a value of a record as text, "-" if it is missing."""
    value = record.get(key)
    return "-" if value is None else format(value, form)


def open_run(path: Path, resume: bool) -> tuple[cifar.Net, list[dict]]:
    """Return the model and history to resume, or new ones; raises UserError."""
    history_path = path.with_suffix(".json")
    history = cifar.read_history(path)
    if history is None and history_path.exists():
        hint = "Restore it, move it away, or pass a different --model."
        raise UserError(f"{history_path} is not a valid history file. {hint}")
    if not resume:
        return cifar.Net(), []
    net = cifar.load_model(path)
    if history is None:
        print(f"{history_path} is missing: resuming from the model alone, at round 1")
        return net, []
    model = hashlib.sha256(path.read_bytes()).hexdigest()
    rounds = [each["round"] for each in history if each.get("model", model) == model]
    if rounds:
        del history[rounds[-1] :]  # rounds after the model's are run again
    elif history:
        print(f"Warning: {path} is not the model of any round in {history_path}")
    return net, history


def rename_earlier_run(path: Path) -> None:
    """Rename model and history of an earlier run, unless it finished no round."""
    if cifar.read_history(path) == []:
        return
    old = [file for file in (path.with_suffix(".json"), path) if file.exists()]
    number = 1
    while any(file.with_stem(f"{path.stem}-{number}").exists() for file in old):
        number += 1
    for file in old:
        renamed = file.rename(file.with_stem(f"{path.stem}-{number}"))
        print(f"Renamed {file} (earlier run) to {renamed}")


def read_certificates(args: Namespace) -> tuple[bytes, bytes, bytes] | None:
    """Return the TLS certificates for start_server(), if any; raises UserError."""
    if not (args.ssl_certfile or args.ssl_keyfile or args.ssl_ca_certfile):
        return None
    flags = "--ssl-certfile, --ssl-keyfile or --ssl-ca-certfile"
    try:
        certificates = try_obtain_server_certificates(args)
        flags = "--ssl-ca-certfile"
        tls = ssl.create_default_context(cafile=args.ssl_ca_certfile)
        flags = "--ssl-certfile or --ssl-keyfile"
        # With a password, an encrypted key is an error instead of a prompt.
        tls.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password="")
    except OSError as error:  # also ssl.SSLError
        raise UserError(f"Invalid TLS certificate or key in {flags}: {error}.") from error
    own = x509.load_pem_x509_certificate(args.ssl_certfile.read_bytes())
    if not own.not_valid_before_utc <= datetime.now(UTC) <= own.not_valid_after_utc:
        print(
            "Warning: clients will reject --ssl-certfile: it is only valid "
            f"from {own.not_valid_before_utc:%Y-%m-%d} to {own.not_valid_after_utc:%Y-%m-%d}"
        )
    return certificates


def make_parser() -> cifar.Parser:
    """Return the flags of server.py."""
    parser = cifar.Parser(description="Federated learning server.")
    add = parser.add
    number = cifar.number
    add("--server-address", cifar.address, cifar.SERVER_ADDRESS, "address to listen on")
    add("--rounds", number(int, 1), 3, "total rounds, including those before --resume")
    add("--min-clients", number(int, 1), 2, "clients required before a round starts")
    add("--local-epochs", number(int, 1), 1, "local epochs per round")
    add("--lr", number(float, 1e-9), cifar.LEARNING_RATE, "learning rate of the clients")
    text = "drop clients that take longer than this, in seconds"
    add("--round-timeout", number(float, 0.1), None, text)
    add("--model", cifar.model_path, "global_model.pt", "model file, with the history beside it")
    text = "resume from --model and its history"
    parser.add_argument("--resume", action="store_true", help=text)
    add("--seed", number(int, 0), None, "random seed for the initial weights")
    add("--ssl-certfile", Path, None, "TLS: the server's certificate (PEM)")
    add("--ssl-keyfile", Path, None, "TLS: the server's private key (PEM)")
    add("--ssl-ca-certfile", Path, None, "TLS: the CA certificate (PEM)")
    return parser


def server_fn(context: fl.common.Context) -> fl.server.ServerAppComponents:
    """Build the server for Flower's engine, from the run config."""
    import client  # lazy import: only the engine mixes the flags of both scripts

    args = cifar.parse_config(context.run_config, client.make_parser(), make_parser())
    config = ServerConfig(args.rounds, args.round_timeout)
    return fl.server.ServerAppComponents(server=CifarServer(args, Clients()), config=config)


app = fl.server.ServerApp(server_fn=server_fn)


def main() -> None:
    """Start the server and run the remaining rounds."""
    args = make_parser().parse_args()
    certificates = read_certificates(args)
    local = args.server_address.startswith(("127.", "localhost:", "[::1]:"))
    if not certificates and not local:
        print(
            f"Warning: no TLS on {args.server_address}: anyone who can reach it can join, read "
            'and modify the model. See "Several machines" in README.md.'
        )
    server = StandaloneServer(args, Clients())
    if len(server.history) >= args.rounds:
        print(f"All {args.rounds} rounds are done: raise --rounds to continue.")
        server.print_history()
        return
    fl.server.start_server(
        server_address=args.server_address,
        server=server,
        config=ServerConfig(args.rounds, args.round_timeout),
        certificates=certificates,
    )
    if isinstance(server.error, SystemExit):  # Flower raises it on Ctrl-C and SIGTERM
        saved = f"Model saved to {args.model}. Restart with --resume to continue."
        raise UserError(f"Stopped after {len(server.history)} of {args.rounds} rounds. {saved}")
    if server.error:
        raise server.error


if __name__ == "__main__":
    cifar.run_main(main)
