"""The federation's server: averages what the clients learned, and never sees an image.

python3 server.py                          # 3 rounds with 2 clients on this machine
python3 server.py --rounds 10 --resume     # go on where a run ended or was stopped
python3 server.py --help                   # every setting
"""

import gc
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: end at once, in the imports too
    gc.set_threshold(50_000)  # imports faster by half a second; more would cost memory

import argparse
import contextlib
import io
import ipaddress
import json
import logging
import os
import random
import socket
import ssl
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Flower reads these as it is imported: it reports nothing to its maker, and leaves the talking to
# the lines printed here. A setting of the user's own wins.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")

import flwr as fl
import grpc  # type: ignore[import-untyped]
import numpy as np
import torch
from flwr.common import (
    Code,
    Context,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import Server, ServerApp, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server.client_manager import ClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.criterion import Criterion

import cifar

History = list[dict[str, Any]]  # one dict a round: round, loss, accuracy, clients, seconds


class CifarStrategy(fl.server.strategy.FedAvg):
    """FedAvg that says what happens, refuses bad results, and keeps the model after every round.

    `model` is the state_dict to start from, `history` the rounds behind it, `path` where both are
    kept, `rounds` how many there are to be in all, `fit_config` what each fit() is told.
    """

    def __init__(
        self,
        model: dict[str, torch.Tensor],
        history: History,
        path: Path,
        rounds: int,
        min_clients: int,
        fit_config: dict[str, Scalar],
    ) -> None:
        self.model = {name: value.numpy() for name, value in model.items()}
        self.history, self.path, self.rounds = history, path, rounds
        self.clients, self.started, self.saved = 0, 0.0, True
        super().__init__(
            min_fit_clients=min_clients,
            min_available_clients=min_clients,
            min_evaluate_clients=1,
            initial_parameters=ndarrays_to_parameters(list(self.model.values())),
            on_fit_config_fn=lambda _: fit_config,
            fit_metrics_aggregation_fn=lambda _: {},
            evaluate_metrics_aggregation_fn=average_accuracy,
        )

    def log(self, message: str) -> None:
        """Say what happens in the round that is running."""
        print(f"Round {len(self.history) + 1}/{self.rounds}: {message}", flush=True)

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Wait for enough clients, then start a round with all of them."""
        client_manager.wait_for(self.min_available_clients, timeout=0)
        instructions = super().configure_fit(server_round, parameters, client_manager)
        self.clients, self.started = 0, time.monotonic()
        self.log(f"training on {plural(len(instructions))}")
        return instructions

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[Any],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Average the updates that fit the model; where there is none, the model stays."""
        accepted = self.accept(results, failures, lambda update: bad_update(update, self.model))
        # A sum of floats depends on their order, but must not on who answers first; likewise below.
        accepted.sort(key=lambda result: result[1].parameters.tensors)
        parameters, metrics = super().aggregate_fit(server_round, accepted, [])
        if parameters is not None:
            # FedAdam and its like give float64, and can overflow.
            averages = [
                new.astype(old.dtype)
                for new, old in zip(parameters_to_ndarrays(parameters), self.model.values())
            ]
            if not all(np.isfinite(average).all() for average in averages):
                self.log("NaN or infinity in the average, the model stays as it was")
                return None, metrics
            self.model = dict(zip(self.model, averages))
            parameters = ndarrays_to_parameters(averages)
        self.clients = len(accepted)
        return parameters, metrics

    def configure_evaluate(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, EvaluateIns]]:
        """Test on whoever is there; with nobody, the round ends here, so that its model is kept."""
        if client_manager.num_available() == 0:
            self.aggregate_evaluate(server_round, [], [])
            return []
        return super().configure_evaluate(server_round, parameters, client_manager)

    def num_evaluation_clients(self, num_available_clients: int) -> tuple[int, int]:
        """Return how many clients test, and how many are enough: unlike for training, one."""
        return super().num_evaluation_clients(num_available_clients)[0], 1

    def aggregate_evaluate(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, EvaluateRes]],
        failures: list[Any],
    ) -> tuple[float | None, dict[str, Scalar]]:
        """Average loss and accuracy over all clients' test images; keep model and history."""
        accepted = self.accept(results, failures, bad_evaluation)
        accepted.sort(key=lambda result: (result[1].loss, result[1].num_examples))
        loss, metrics = super().aggregate_evaluate(server_round, accepted, [])
        record = {
            "round": len(self.history) + 1,
            "loss": loss,
            "accuracy": metrics.get("accuracy"),
            "clients": self.clients,
            "seconds": round(time.monotonic() - self.started, 3),
        }
        try:
            save(self.path, self.model, [*self.history, record])
            self.saved = True
        except OSError as error:
            print(f"Cannot write {self.path}: {error.strerror}. It stays as it was.", flush=True)
            self.saved = False
        _, loss_text, accuracy_text, _, seconds = row(record)
        self.log(f"loss {loss_text}, accuracy {accuracy_text}, {plural(self.clients)}, {seconds} s")
        self.history.append(record)
        return loss, metrics

    def accept(
        self,
        results: list[tuple[ClientProxy, Any]],
        failures: list[Any],
        problem: Callable[[Any], str],
    ) -> list[tuple[ClientProxy, Any]]:
        """Return the results without a problem; name the others, and count who gave none."""
        accepted = []
        answers = [failure for failure in failures if isinstance(failure, tuple)]
        for client, result in [*results, *answers]:
            failed = result.status.code is not Code.OK
            if reason := f"error, {result.status.message}" if failed else problem(result):
                name = str(result.metrics.get("client", client.cid))[:60]
                line = f"result of client {name!r} refused: {reason}"
                self.log(line.encode("ascii", "backslashreplace").decode()[:300])
            else:
                accepted.append((client, result))
        if lost := len(failures) - len(answers):
            self.log(f"{plural(lost)} dropped out")
        return accepted


def make_server(
    path: Path,
    resumed: bool = False,
    rounds: int = 3,
    min_clients: int = 2,
    local_epochs: int = 1,
    lr: float = 0.001,
    seed: int | None = None,
) -> tuple[Server, int]:
    """Return the server, and how many rounds it has to run; keeps the first weights in `path`.

    Raises UserError where the model cannot be read or written.
    """
    if path.suffix == ".json":
        raise cifar.UserError(f"{path} would be the history's name: end the model's in .pt.")
    if seed is not None:
        torch.manual_seed(seed)
    try:
        if path.is_dir():
            raise cifar.UserError(f"{path} is a folder: give the model a file name.")
        if resumed:
            model, history = resume(path)
        else:
            model, history = cifar.Net().state_dict(), []
            move_aside(path)
        strategy = CifarStrategy(
            model, history, path, rounds, min_clients, {"lr": lr, "local_epochs": local_epochs}
        )
        save(path, strategy.model, history)
    except OSError as error:
        raise cifar.UserError(f"Cannot write the model to {path}: {error.strerror}.") from error
    server = Server(client_manager=PatientClientManager(), strategy=strategy)
    server.set_max_workers(1000)  # Flower would talk to only a few clients a core at a time
    return server, max(0, rounds - len(history))


def main() -> None:
    """Run the rounds, and show them."""
    parser = argparse.ArgumentParser(
        description="FedAvg server: run a number of rounds with the clients that connect.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    number = cifar.number
    add = parser.add_argument
    add("--server-address", type=cifar.address, default="127.0.0.1:8080", help="where to listen")
    add("--rounds", type=number(int, 1), default=3, help="rounds in all, resumed ones included")
    add("--min-clients", type=number(int, 1), default=2, help="clients a round waits for")
    add("--local-epochs", type=number(int, 1), default=1, help="a client's epochs in a round")
    add("--lr", type=number(float, 0), default=0.001, help="the clients' learning rate")
    add(
        "--round-timeout",
        metavar="SECONDS",
        type=number(float, 0.1),
        help="training, or testing, in a round goes on without clients that take longer; "
        "without it, it waits for a client that hangs",
    )
    add("--model", type=Path, default="global_model.pt", help="where the model is kept")
    add("--resume", action="store_true", help="go on with the model, after its last round")
    add("--seed", type=number(int, 0), help="the first weights; without it, each run differs")
    add("--ssl-certfile", type=Path, help="TLS: the server's certificate (PEM)")
    add("--ssl-keyfile", type=Path, help="TLS: the server's private key (PEM)")
    add("--ssl-ca-certfile", type=Path, help="TLS: the certificate of the authority (PEM)")
    args = parser.parse_args()
    tls = [args.ssl_ca_certfile, args.ssl_certfile, args.ssl_keyfile]
    if any(tls) and not all(tls):
        parser.error("--ssl-certfile, --ssl-keyfile and --ssl-ca-certfile go together")

    certificates = read_certificates(*tls) if all(tls) else None
    if not check_address(args.server_address) and not certificates:
        print(
            f"Warning: whoever reaches {args.server_address} can join, read the model and change "
            "it, and nothing is encrypted. See 'More than one machine' in README.md.",
            file=sys.stderr,
        )
    server, rounds = make_server(
        args.model,
        args.resume,
        args.rounds,
        args.min_clients,
        args.local_epochs,
        args.lr,
        args.seed,
    )
    strategy = server.strategy
    assert isinstance(strategy, CifarStrategy)
    if rounds:
        print(f"Listening on {args.server_address}, TLS {'on' if certificates else 'off'}")
        # start_server() is what this shape of federation needs; that it is deprecated is for us
        # to know (see README.md), not for every user at every start.
        logging.getLogger("flwr").addFilter(
            lambda record: "start_server() is deprecated" not in record.getMessage()
        )
        mend_grpc()
        try:
            fl.server.start_server(
                server_address=args.server_address,
                server=server,
                config=ServerConfig(num_rounds=rounds, round_timeout=args.round_timeout),
                certificates=certificates,
            )
        except SystemExit as stop:  # Flower's answer to SIGINT and SIGTERM
            raise cifar.UserError(
                stop.code
                or f"Stopped after {len(strategy.history)} of {args.rounds} rounds. "
                f"{args.model} is kept: --resume goes on with it."
            ) from stop

    print("\nround    loss  accuracy  clients  seconds")
    for record in strategy.history:
        print("{:>5} {:>7}  {:>8}  {:>7}  {:>7}".format(*row(record)))
    if not strategy.saved:
        raise cifar.UserError(f"The last model could not be written to {args.model}.")
    print(f"Model: {args.model.resolve()}")


# Waiting for clients, and judging what they send.


class PatientClientManager(SimpleClientManager):
    """Waits for clients as long as it takes, and says for how many."""

    def wait_for(self, num_clients: int, timeout: int = 0) -> bool:
        """Return once `num_clients` are connected, whatever the timeout."""
        with self._cv:
            while (connected := len(self.clients)) < num_clients:
                print(f"Waiting for {plural(num_clients)}: {connected} connected", flush=True)
                self._cv.wait_for(lambda: len(self.clients) != connected)
        return True

    def sample(
        self,
        num_clients: int,
        min_num_clients: int | None = None,
        criterion: Criterion | None = None,
    ) -> list[ClientProxy]:
        """Wait, then return up to `num_clients`; Flower's own returns none if one just left."""
        clients: list[ClientProxy] = []
        while len(clients) < (min_num_clients or num_clients):
            self.wait_for(min_num_clients or num_clients)
            clients = list(self.all().values())
        return random.sample(clients, min(num_clients, len(clients)))

    def all(self) -> dict[str, ClientProxy]:
        """Return the connected clients, copied: they come and go at any time."""
        return dict(self.clients)


class EndedCalls(grpc.ServerInterceptor):
    """Sees to it that Flower is told of the end of a call that ended before it asked to be told.

    gRPC returns False then. Flower does not look, and would keep a client that left in the instant
    in which it joined, and wait for it in every round.
    """

    def intercept_service(
        self, continuation: Callable[..., Any], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a call, here of Flower's Join."""
        handler = continuation(handler_call_details)
        if not handler or not handler.stream_stream:
            return handler

        def join(messages: Any, context: grpc.ServicerContext) -> Any:
            add = context.add_callback
            context.add_callback = lambda callback: add(callback) or callback()
            return handler.stream_stream(messages, context)

        return grpc.stream_stream_rpc_method_handler(
            join, handler.request_deserializer, handler.response_serializer
        )


def mend_grpc() -> None:
    """Have the server that Flower makes notice who leaves, and allow client.py's signs of life."""
    create = grpc.server
    # gRPC would turn away a client that asks for one more often than every 5 minutes.
    option = ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000)

    def server(*args: Any, options: Any, interceptors: Any = None, **kwargs: Any) -> grpc.Server:
        interceptors = [EndedCalls(), *(interceptors or ())]
        return create(*args, options=[*options, option], interceptors=interceptors, **kwargs)

    grpc.server = server


def bad_update(update: FitRes, model: dict[str, np.ndarray]) -> str:
    """Say why a client's update cannot be averaged into the model; an empty string if it can."""
    if update.num_examples < 1:
        return f"trained on {update.num_examples} examples"
    try:
        arrays = parameters_to_ndarrays(update.parameters)
    except Exception as error:  # noqa: BLE001, NumPy raises many kinds for bytes of no array
        return f"unreadable ({type(error).__name__})"
    if len(arrays) != len(model):
        return f"{len(arrays)} arrays instead of {len(model)}"
    for (name, ours), theirs in zip(model.items(), arrays):
        if not isinstance(theirs, np.ndarray):  # np.load() opens archives too
            return f"unreadable ({type(theirs).__name__})"
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return f"{name} is {theirs.dtype}{theirs.shape} instead of {ours.dtype}{ours.shape}"
        if not np.isfinite(theirs).all():
            return f"NaN or infinity in {name}"
    return ""


def bad_evaluation(evaluation: EvaluateRes) -> str:
    """Say why a client's test result cannot be averaged; an empty string if it can."""
    loss, accuracy = evaluation.loss, evaluation.metrics.get("accuracy")
    if evaluation.num_examples < 1:
        return f"tested on {evaluation.num_examples} examples"
    if not abs(loss) < 1e30 or not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1:
        return f"loss {loss}, accuracy {accuracy!r}"
    return ""


def average_accuracy(metrics: list[tuple[int, dict[str, Scalar]]]) -> dict[str, Scalar]:
    """Average the clients' accuracies, weighted by their numbers of test images."""
    total = sum(num_examples for num_examples, _ in metrics)
    return {"accuracy": sum(n * float(values["accuracy"]) for n, values in metrics) / total}


# Keeping the model, and going on with it.


def save(path: Path, model: dict[str, np.ndarray], history: History) -> None:
    """Write the state_dict to `path` and the history beside it, so that nobody finds half a file.

    Raises OSError; the files that were there are then as they were.
    """
    state_dict = OrderedDict((name, torch.from_numpy(value)) for name, value in model.items())
    # The model carries its history, where PyTorch keeps a state_dict's version: a server that is
    # killed between the two files can resume, and a history of another model is found out.
    kept = {"": {"history": without_seconds(history)}}
    state_dict._metadata = kept  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    files = {
        path: buffer.getvalue(),
        path.with_suffix(".json"): json.dumps(history, indent=2).encode() + b"\n",
    }
    temporary = {final: final.with_name(final.name + ".tmp") for final in files}
    try:
        for final, content in files.items():
            with temporary[final].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for final in files:
            temporary[final].replace(final)
    except OSError:
        for each in temporary.values():
            with contextlib.suppress(OSError):
                each.unlink()
        raise


def without_seconds(history: History) -> History:
    """Return what the model's file says of the rounds: the same for every run with the same seeds."""
    return [{**record, "seconds": None} for record in history]


def resume(path: Path) -> tuple[dict[str, torch.Tensor], History]:
    """Read what save() wrote; raises UserError where model and history are not a pair."""
    model = cifar.load_model(path)
    history_path = path.with_suffix(".json")
    try:
        history = json.loads(history_path.read_bytes())
    except OSError as error:
        raise cifar.UserError(
            f"Cannot resume {path} without its history {history_path}: {error.strerror}."
        ) from error
    except ValueError as error:
        raise cifar.UserError(f"{history_path} holds no history, or a damaged one.") from error
    kept = getattr(model, "_metadata", {}).get("", {}).get("history")
    known = None
    if isinstance(history, list) and all(isinstance(record, dict) for record in history):
        known = without_seconds(history)
    # The model is renamed first, so it may know of one round more.
    if not isinstance(kept, list) or known not in (kept, kept[:-1]):
        raise cifar.UserError(f"{history_path} is not the history of {path}.")
    return model, history + kept[len(history) :]


def move_aside(path: Path) -> None:
    """Rename the model of an earlier run, and its history, so that the new one loses neither."""
    pair = [path.with_suffix(".json"), path]
    if not any(file.exists() for file in pair):
        return
    with contextlib.suppress(cifar.UserError):
        if not resume(path)[1]:
            return  # a run that ended before its first round: there is nothing to keep
    number = 1
    while any(file.with_stem(f"{path.stem}-{number}").exists() for file in pair):
        number += 1
    for file in pair:
        with contextlib.suppress(FileNotFoundError):
            file.rename(file.with_stem(f"{path.stem}-{number}"))
    old = path.with_stem(f"{path.stem}-{number}")
    print(f"{path} of an earlier run is kept as {old} (--resume would have gone on with it)")


# Checking and showing.


def check_address(address: str) -> bool:
    """Raise UserError unless the server can listen there; return whether it is this machine's."""
    family, kind, protocol, _, host_and_port = cifar.resolve(address)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(host_and_port)
        except OSError as error:
            raise cifar.UserError(
                f"Cannot listen on {address}: {error.strerror}. "
                "Choose another address with --server-address."
            ) from error
    return ipaddress.ip_address(host_and_port[0].partition("%")[0]).is_loopback


def read_certificates(ca: Path, certificate: Path, key: Path) -> tuple[bytes, bytes, bytes]:
    """Return the three files' contents; raises UserError unless they are what TLS needs."""
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
        context.load_cert_chain(certificate, key, password="")
        return ca.read_bytes(), certificate.read_bytes(), key.read_bytes()
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(map(str, (ca, certificate, key)))
        raise cifar.UserError(f"No TLS with {files}: {error}.") from error


def plural(clients: int) -> str:
    """Return the number with its noun."""
    return f"{clients} client" if clients == 1 else f"{clients} clients"


def row(record: dict[str, Any]) -> list[str]:
    """Return a round's figures as text; - for one that is not known."""
    formats = {"round": "d", "loss": ".4f", "accuracy": ".4f", "clients": "d", "seconds": ".1f"}
    return ["-" if record[key] is None else format(record[key], formats[key]) for key in formats]


# Flower's deployment engine.


def server_fn(context: Context) -> ServerAppComponents:
    """Build the same server for Flower's deployment engine, from the run config."""
    run = context.run_config
    server, rounds = make_server(
        path=Path(str(run.get("model", "global_model.pt"))),
        resumed=bool(run.get("resume", False)),
        rounds=int(run.get("rounds", 3)),
        min_clients=int(run.get("min-clients", 2)),
        local_epochs=int(run.get("local-epochs", 1)),
        lr=float(run.get("lr", 0.001)),
        seed=int(run["seed"]) if "seed" in run else None,
    )
    timeout = float(run["round-timeout"]) if "round-timeout" in run else None
    config = ServerConfig(num_rounds=rounds, round_timeout=timeout)
    return ServerAppComponents(server=server, config=config)


app = ServerApp(server_fn=server_fn)


if __name__ == "__main__":
    cifar.run_main(main)
