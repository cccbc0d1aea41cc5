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

# Flower and gRPC read these when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # or a DataLoader's workers crash

import flwr as fl
import torch
from flwr.common import Metrics, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.args import try_obtain_server_certificates
from flwr.common.logger import FLOWER_LOGGER, log
from flwr.server import History, ServerConfig
from flwr.server.server import fit_clients
from flwr.server.strategy import Strategy
from flwr.server.strategy.aggregate import weighted_loss_avg

import cifar

FLOWER_LOGGER.addFilter(lambda record: not str(record.msg).startswith("DEPRECATED FEATURE"))


def make_strategy(parameters: Parameters, config: Metrics) -> Strategy:
    """Return the strategy that aggregates the updates: any of Flower's, or your own."""
    return fl.server.strategy.FedAvg(
        min_fit_clients=1,  # fit_round() waits for --min-clients; then all take part
        min_evaluate_clients=1,
        min_available_clients=1,
        initial_parameters=parameters,
        on_fit_config_fn=lambda server_round: config,
        fit_metrics_aggregation_fn=average,
        evaluate_metrics_aggregation_fn=average,
    )


def average(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """Average each number that clients return, weighted by their numbers of examples."""
    numbers: dict[str, list] = {}
    for num_examples, each in metrics:
        for name, value in each.items():
            if type(value) in (int, float):  # no text, and no bool
                numbers.setdefault(name, []).append((num_examples, value))
    return {name: weighted_loss_avg(known) for name, known in numbers.items()}


class Clients(fl.server.SimpleClientManager):
    """Flower's client manager, which also says whom it waits for."""

    def wait_for(self, num_clients: int, timeout: int = 86400) -> bool:
        """Wait for the clients, however long it takes."""
        while (connected := len(self)) < num_clients:
            log(INFO, "Waiting for clients: %s of %s connected", connected, num_clients)
            super().wait_for(connected + 1, timeout)
        return True


class CifarServer(fl.server.Server):
    """Flower's server, which rejects bad updates, repeats failed rounds, and saves."""

    def __init__(self, args: Namespace, in_engine: bool = False) -> None:
        self.args = args
        self.in_engine = in_engine
        self.error: BaseException | None = None  # what ended fit() early
        self.is_saved = True
        self.history: list[dict] = []  # a record for each round
        self.history_path = args.model.with_suffix(".json")
        if args.seed is not None:
            torch.manual_seed(args.seed)
        self.net = cifar.load_model(args.model) if args.resume else cifar.Net()
        if args.resume and self.history_path.exists():
            self.history = json.loads(self.history_path.read_text())
        self.rounds_before = len(self.history)
        self.finite = {name: value.isfinite() for name, value in self.net.state_dict().items()}
        parameters = ndarrays_to_parameters(cifar.get_parameters(self.net))
        strategy = make_strategy(parameters, {"lr": args.lr, "local_epochs": args.local_epochs})
        self.clients = Clients()
        super().__init__(client_manager=self.clients, strategy=strategy)
        self.set_max_workers(1000)  # a thread for each client

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        """Run the rounds; keep what ends them early, for main() to raise."""
        try:
            for path in (self.args.model, self.history_path):
                if path.exists() and not self.args.resume:
                    log(INFO, "Renamed %s of an earlier run to %s.old", path, path)
                    path.replace(f"{path}.old")
            history, seconds = super().fit(num_rounds, timeout)
            if not self.is_saved:
                sys.exit(1)
            return history, seconds
        except BaseException as error:  # start_server() ends properly only if fit() returns
            if self.in_engine:
                raise
            self.error = error
            FLOWER_LOGGER.setLevel(WARNING)  # no summary of a run that is not finished
            return History(), 0.0

    def is_done(self, server_round: int) -> bool:
        """Return whether there is nothing to do in a round: it was before --resume."""
        return server_round <= self.rounds_before

    def fit_round(self, server_round: int, timeout: float | None) -> tuple | None:
        """Train on the clients, aggregate, save; repeat it if it fails, up to three times."""
        if self.is_done(server_round):
            return None
        attempts = 0
        while attempts < 3:
            self.clients.wait_for(self.args.min_clients)
            start = time.monotonic()

            # Choose the clients that train, and send them parameters and settings.
            chosen = self.strategy.configure_fit(server_round, self.parameters, self.clients)
            sampled = f"{len(chosen)} clients (out of {len(self.clients)})"
            log(INFO, "configure_fit: strategy sampled %s", sampled)

            # Train, each client on its own images.
            results, failures = fit_clients(chosen, self.max_workers, timeout, server_round)
            lost = sum(client.cid not in self.clients.all() for client, _ in chosen)
            if lost:
                log(WARNING, "%s of %s clients lost", lost, len(chosen))
            log_failures(failures)
            for client, result in list(results):
                if reason := self.why_unusable(result.parameters, result.num_examples):
                    name = result.metrics.get("client", client.cid)
                    log(WARNING, "Update of client %r rejected: %s", name, reason)
                    results.remove((client, result))
                    failures.append((client, result))
            received = f"{len(results)} results and {len(failures)} failures"
            log(INFO, "aggregate_fit: received %s", received)

            # Aggregate. FedAvg: w = sum of n_k / n * w_k over the clients k, where client k has
            # n_k of all n images and sent the weights w_k. The updates arrived in any order,
            # on which a sum of floats depends: sort them, to make a run repeatable.
            results.sort(key=lambda result: result[1].parameters.tensors)
            parameters, metrics = self.strategy.aggregate_fit(server_round, results, failures)
            reason = self.why_unusable(parameters) if parameters else "no aggregate"
            if parameters and not reason:
                self.parameters = parameters
                seconds = round(time.monotonic() - start, 3)
                own = {"round": server_round, "clients": len(results), "seconds": seconds}
                self.history.append({**own, "loss": None, **metrics, **own})
                self.save()
                return parameters, metrics, ([], [])

            # A lost client is no reason to give up.
            attempts += lost == 0
            log(WARNING, "Round %s failed (%s)", server_round, reason)
            time.sleep(1)
        log(ERROR, "Round %s failed 3 times, giving up", server_round)
        sys.exit(1)

    def why_unusable(self, parameters: Parameters, num_examples: int = 1) -> str:
        """Load parameters into the network; return why they spoil the model, or ""."""
        if num_examples <= 0:
            return f"{num_examples} examples"
        try:
            cifar.set_parameters(self.net, parameters_to_ndarrays(parameters))
        except Exception as error:  # noqa: BLE001  # a client can send anything at all
            return str(error) or repr(error)
        for name, value in cifar.shared_state(self.net).items():
            if (self.finite[name] & ~value.isfinite()).any():
                return f"NaN or infinity in {name}"
        return ""

    def evaluate_round(self, server_round: int, timeout: float | None) -> tuple | None:
        """Evaluate the model on the clients, and complete the round's record."""
        if self.is_done(server_round):
            return None
        record = self.history[-1]
        evaluation = super().evaluate_round(server_round, timeout)
        if evaluation:
            loss, metrics, (_, failures) = evaluation
            log_failures(failures)
            own = {name: record[name] for name in ("round", "clients", "seconds")}
            record.update({**metrics, **own, "loss": loss})
            self.save()
        log(INFO, "%s", record)
        return evaluation

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Disconnect the clients; one may never answer, so wait at most 10 s."""
        super().disconnect_all_clients(timeout=10)

    def save(self) -> None:
        """Save model, then history: each beside the old file, then moved over it."""
        model = io.BytesIO()  # not a file, for which torch.save() would not say "disk full"
        torch.save(self.net.state_dict(), model)
        history = json.dumps(self.history, indent=2, default=float).encode()
        self.is_saved = False
        try:
            for path, content in (self.args.model, model.getvalue()), (self.history_path, history):
                Path(f"{path}.tmp").write_bytes(content)
                os.replace(f"{path}.tmp", path)
            self.is_saved = True
        except OSError as error:
            log(ERROR, "Cannot save %s: %s", self.args.model, error)


def log_failures(failures: list) -> None:
    """Log why clients failed, which Flower only counts."""
    for failure in failures:
        reason = failure if isinstance(failure, BaseException) else failure[1].status
        log(WARNING, "A client failed: %r", reason)


def make_parser() -> ArgumentParser:
    """Return the flags of server.py."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--server-address", default="127.0.0.1:8080", help="address to listen on")
    add("--rounds", type=int, default=3, help="rounds, with those before --resume")
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


def server_fn(context: fl.common.Context) -> fl.server.ServerAppComponents:
    """Return the server for the engine; the run config holds flags under their names."""
    parser = make_parser()
    flags = {k.replace("-", "_"): v for k, v in context.run_config.items() if v is not False}
    parser.set_defaults(**flags)
    args = parser.parse_args([])
    config = ServerConfig(args.rounds, args.round_timeout)
    return fl.server.ServerAppComponents(server=CifarServer(args, in_engine=True), config=config)


app = fl.server.ServerApp(server_fn=server_fn)


def main() -> None:
    """Start Flower's server for a run of federated learning."""
    parser = make_parser()
    args = parser.parse_args()
    if args.model.suffix != ".pt":
        parser.error("--model must end in .pt")
    args.model.parent.mkdir(parents=True, exist_ok=True)
    certificates = None
    if args.ssl_certfile or args.ssl_keyfile or args.ssl_ca_certfile:
        certificates = try_obtain_server_certificates(args)
    elif not args.server_address.startswith(("127.", "localhost:", "[::1]:")):
        log(WARNING, "No TLS: anyone who reaches the port can join, read and change the model")
    server = CifarServer(args)
    fl.server.start_server(
        server_address=args.server_address,
        server=server,
        config=ServerConfig(args.rounds, args.round_timeout),
        certificates=certificates,
    )
    if server.error:
        raise server.error


if __name__ == "__main__":
    main()
