"""One client of the federation: trains on its own images, and sends only weights to the server.

python3 client.py --partition-id 0 --num-partitions 2    # with its own half
"""

import argparse
import functools
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Flower reads these at its import: no reports to its maker, no words but those printed here.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_LOG_LEVEL", "CRITICAL")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import flwr as fl
import grpc
import torch
from flwr.common import Metrics, NDArrays
from flwr.supercore.grpc import create_channel
from torch.utils.data import DataLoader

import cifar

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
NAME = f"{platform.node()}-{os.getpid()}"  # how the server calls this client


class CifarClient(fl.client.NumPyClient):
    """Flower client implementing CIFAR-10 image classification using PyTorch."""

    def __init__(
        self,
        model: torch.nn.Module,
        trainloader: DataLoader,
        testloader: DataLoader,
        num_examples: dict[str, int],
        holds: Metrics | None = None,  # which images, so that the server can compare the clients
    ) -> None:
        self.model = model
        self.trainloader = trainloader
        self.testloader = testloader
        self.num_examples = num_examples
        self.metrics: Metrics = {"client": NAME, **(holds or {})}

    def get_parameters(self, config: Metrics) -> NDArrays:
        """Return the model's parameters as NumPy arrays, copied: training on leaves them alone."""
        return [val.cpu().numpy().copy() for val in self.model.state_dict().values()]

    def set_parameters(self, parameters: NDArrays) -> None:
        """Set the model's parameters from NumPy arrays, in the order of get_parameters()."""
        cifar.check_parameters(self.model, parameters)
        params_dict = zip(self.model.state_dict().keys(), parameters)
        state_dict = {k: torch.tensor(v) for k, v in params_dict}
        self.model.load_state_dict(state_dict, strict=True)

    def fit(self, parameters: NDArrays, config: Metrics) -> tuple[NDArrays, int, Metrics]:
        """Train the given parameters as the server's config says; return the trained ones."""
        epochs, lr = int(config.get("local_epochs", 1)), float(config.get("lr", 0.001))
        try:
            self.set_parameters(parameters)
            cifar.train(self.model, self.trainloader, epochs=epochs, device=DEVICE, lr=lr)
        except cifar.UserError as error:
            print(error, file=sys.stderr)  # The server refuses what it gets, for the same reason.
        return self.get_parameters(config={}), self.num_examples["trainset"], self.metrics

    def evaluate(self, parameters: NDArrays, config: Metrics) -> tuple[float, int, Metrics]:
        """Test the given parameters on the local test images."""
        self.set_parameters(parameters)
        loss, accuracy = cifar.test(self.model, self.testloader, device=DEVICE)
        print(f"Tested the new global model: loss {loss:.4f}, accuracy {accuracy:.4f}")
        return loss, self.num_examples["testset"], {**self.metrics, "accuracy": accuracy}


def main() -> None:
    """Load data, start CifarClient."""
    args = make_parser().parse_args()
    address, tls = (
        args.server_address,
        args.root_certificates and args.root_certificates.read_bytes(),
    )

    if "FLWR_HOME" not in os.environ and os.path.expanduser("~") == "~":
        raise cifar.UserError("This user has no home folder, which Flower needs: set HOME.")
    # Load model and data
    client = make_client(args)
    # Start client
    keep_alive()
    while True:
        wait_for_server(address, args.wait, tls)
        print(f"Connected to the server at {address}")
        try:
            fl.client.start_client(server_address=address, client=client, root_certificates=tls)
            break
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise cifar.UserError(f"What answers at {address} is not server.py.") from error
            print(f"Lost the server: {error.details()}")
            time.sleep(1)  # one that turns everybody away is not to be asked without a pause
    print("The server has ended the run")


# A first reading may skip the rest: flags, finding the server, Flower's deployment engine.


def make_parser() -> argparse.ArgumentParser:
    """Return the flags of client.py."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = f"One client of a federation on {cifar.DATASET}."
    number, add = cifar.number, parser.add_argument
    add("--server-address", type=cifar.address, default="127.0.0.1:8080", help="its HOST:PORT")
    add("--wait", metavar="SECONDS", type=number(float, 0), default=60, help="for an absent server")
    cifar.add_shared_arguments(parser)
    add("--partition-id", type=number(int, 0), default=0, help="which part of the images it holds")
    add("--num-partitions", type=number(int, 1), default=1, help="parts the images are dealt into")
    add("--alpha", type=number(float, 0.001, 1e6), help="skew the classes; smaller is more")
    add("--root-certificates", type=Path, help="TLS: the authority to trust (PEM)")
    return parser


def make_client(args: argparse.Namespace) -> fl.client.Client:
    """Load model and data; raises UserError without data."""
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    print(f"Client {NAME}")
    part = (args.partition_id, args.num_partitions, args.alpha)
    loaders_and_counts = cifar.load_data(args.batch_size, args.data_root, args.synthetic, *part)
    data = "generated images" if args.synthetic else cifar.DATASET
    if args.num_partitions > 1:
        data += f" in {args.num_partitions} parts, alpha {args.alpha or 'none'}"
    held: Metrics = {"data": data, "part": f"part {part[0]}" if args.num_partitions > 1 else "all"}
    return CifarClient(cifar.Net().to(DEVICE), *loaders_and_counts, held).to_client()


HINTS = {  # what gRPC says, in many words, and what it means
    "Connection refused": "Connection refused (is it running?)",
    "Socket closed": "it closed the connection; if it uses TLS, add --root-certificates",
    "WRONG_VERSION_NUMBER": "it does not use TLS, leave --root-certificates out",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not from the authority in --root-certificates",
    "Custom verification check failed": "its certificate does not name this host",
    "Failed to create security handshaker": "--root-certificates holds no certificate",
    "errors resolving": "the host is not known",
    "Deadline Exceeded": "no answer",
}


def wait_for_server(address: str, seconds: float, root_certificates: bytes | None) -> None:
    """Return as soon as a server answers; raises UserError, with the reason, where none does."""
    deadline, say_once = time.monotonic() + seconds, functools.cache(print)
    while True:
        try:
            with create_channel(address, not root_certificates, root_certificates) as channel:
                # No server has this method, so that one is there as soon as it says so.
                probe = channel.unary_unary("/flwr.proto.FlowerService/Probe")
                probe(b"", timeout=min(5, max(0.1, deadline - time.monotonic())))
                return
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return
            details = error.details().rpartition("last error: ")[2]
        reason = next((HINTS[key] for key in HINTS if key in details), details)
        if time.monotonic() > deadline:
            raise cifar.UserError(f"No server at {address} for {seconds:g} s: {reason}.")
        say_once(f"Waiting for the server at {address}: {reason}")
        time.sleep(0.5)


def keep_alive() -> None:
    """Have Flower's channels notice a dead link, with pings no closer than a server's 5 minutes."""
    times = [("grpc.keepalive_time_ms", 310_000), ("grpc.keepalive_timeout_ms", 30_000)]
    more = [*times, ("grpc.http2.max_pings_without_data", 0)]  # 0: as many as it takes

    def kept(open_channel: Callable[..., grpc.Channel]) -> Callable[..., grpc.Channel]:
        return lambda *args, options=(): open_channel(*args, options=[*options, *more])

    grpc.insecure_channel = kept(grpc.insecure_channel)
    grpc.secure_channel = kept(grpc.secure_channel)


clients: dict[str, fl.client.Client] = {}  # the engine asks for one with every message


def client_fn(context: fl.common.Context) -> fl.client.Client:
    """Build the same client for Flower's deployment engine, from the run and the node config."""
    config = {**context.run_config, **context.node_config}
    if str(config) not in clients:
        clients[str(config)] = make_client(cifar.parse_config(make_parser(), config))
    return clients[str(config)]


app = fl.client.ClientApp(client_fn=client_fn)


if __name__ == "__main__":
    cifar.run_main(main)
