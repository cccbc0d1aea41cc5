"""A Flower client: trains on its own images and sends weights and metrics, never images.

python3 client.py --partition-id 0 --num-partitions 2    # the first of two partitions
"""

import os
import platform
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cifar  # before Flower, because it sets environment variables for it

# isort: split
import flwr as fl
import grpc
import torch
from flwr.common import Metrics, NDArrays
from flwr.supercore.grpc import create_channel
from torch.utils.data import DataLoader


class CifarClient(fl.client.NumPyClient):
    """Flower client implementing CIFAR-10 image classification using PyTorch."""

    def __init__(
        self,
        model: torch.nn.Module,
        trainloader: DataLoader,
        testloader: DataLoader,
        num_examples: dict[str, int],
        properties: Metrics | None = None,  # who the client is, and which data it has
    ) -> None:
        self.model = model
        self.trainloader = trainloader
        self.testloader = testloader
        self.num_examples = num_examples
        self.properties = properties or {}

    def get_properties(self, config: Metrics) -> Metrics:
        """Return the client's name and data; the server asks for them when it joins."""
        return self.properties

    def get_parameters(self, config: Metrics) -> NDArrays:
        """Return the model's parameters as a list of NumPy arrays."""
        return cifar.get_parameters(self.model)

    def set_parameters(self, parameters: NDArrays) -> None:
        """Set the model's parameters from a list of NumPy arrays; raises UserError."""
        cifar.set_parameters(self.model, parameters)

    def fit(self, parameters: NDArrays, config: Metrics) -> tuple[NDArrays, int, Metrics]:
        """Train the given parameters with the server's settings; return the new ones."""
        self.set_parameters(parameters)
        epochs = int(config.get("local_epochs", 1))
        lr = float(config.get("lr", cifar.LEARNING_RATE))
        cifar.train(self.model, self.trainloader, epochs, cifar.DEVICE, lr)
        parameters = self.get_parameters({})
        return parameters, self.num_examples["trainset"], self.properties

    def evaluate(self, parameters: NDArrays, config: Metrics) -> tuple[float, int, Metrics]:
        """Evaluate the given parameters on the local test images."""
        self.set_parameters(parameters)
        loss, accuracy = cifar.test(self.model, self.testloader, cifar.DEVICE)
        print(f"Evaluated the new global model: loss {loss:.4f}, accuracy {accuracy:.4f}")
        return loss, self.num_examples["testset"], {**self.properties, "accuracy": accuracy}


# Utilities: skip on first reading. Connection, flags, Flower's engine; main() is last.


def make_client(args: Namespace, name: str) -> CifarClient:
    """Load data and model, and return the client; raises UserError."""
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    print(f"Client {name}")
    trainloader, testloader, num_examples = cifar.load_data(
        args.batch_size,
        args.data_root,
        args.synthetic,
        args.partition_id,
        args.num_partitions,
        args.alpha,
    )
    dataset: Any = trainloader.dataset
    model = cifar.Net().to(cifar.DEVICE)
    cifar.check_model(model, dataset)
    data = dataset.name
    partition = "all images"
    if args.num_partitions > 1:
        scheme = f"alpha {args.alpha:g}" if args.alpha else "IID"
        data += f" in {args.num_partitions} partitions ({scheme})"
        partition = f"partition {args.partition_id}"
    classes = ", ".join(dataset.classes)
    properties = {"client": name, "data": data, "partition": partition, "classes": classes}
    return CifarClient(model, trainloader, testloader, num_examples, properties)


HINTS = {  # what gRPC says, and what it means
    "Connection refused": "Connection refused (is it running?)",
    "Socket closed": "it closed the connection; if it uses TLS, add --root-certificates",
    "Failed parsing HTTP/2": "it is not a Flower server (wrong port?)",
    "WRONG_VERSION_NUMBER": "it does not use TLS; remove --root-certificates",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not signed by the CA in "
    "--root-certificates, has expired, or this machine's clock is wrong",
    "Custom verification check failed": "its certificate does not name this host",
    "Failed to create security handshaker": "--root-certificates is not a certificate",
    "errors resolving": "cannot resolve host name",
    "Deadline Exceeded": "timed out",
}


def wait_for_server(args: Namespace) -> None:
    """Return once the server answers; raises UserError if it does not within --wait."""
    deadline = time.monotonic() + args.wait
    last_reason = ""
    while True:
        insecure = not args.root_certificates
        with create_channel(args.server_address, insecure, args.root_certificates) as channel:
            try:
                channel.unary_unary("/flwr.proto.FlowerService/Probe")(b"", timeout=5)
                return
            except grpc.RpcError as error:
                # There is no such method: UNIMPLEMENTED proves that a server is up.
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return
                details = error.details().rpartition("last error: ")[2]  # of several addresses
        reason = next((hint for key, hint in HINTS.items() if key in details), details)
        if time.monotonic() > deadline:
            raise cifar.UserError(
                f"No server answered at {args.server_address} within {args.wait:g} s: {reason}."
            )
        if reason != last_reason:
            print(f"Waiting for the server at {args.server_address}: {reason}")
        last_reason = reason
        time.sleep(0.5)


def keep_alive(open_channel: Callable) -> Callable:
    """Wrap a function that opens gRPC channels, so that they detect a dead connection.

    By default, a gRPC client never does. A gRPC server allows a ping every 5 minutes.
    """
    keepalive = [
        ("grpc.keepalive_time_ms", 310_000),
        ("grpc.http2.max_pings_without_data", 0),  # 0: no limit
    ]

    def opened(*args: Any, options: Any = (), **kwargs: Any) -> grpc.Channel:
        return open_channel(*args, options=[*(options or ()), *keepalive], **kwargs)

    return opened


def certificate(text: str) -> bytes:
    """Read a certificate, as an argparse type."""
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise ArgumentTypeError(f"{text}: {error.strerror}") from error


def make_parser() -> cifar.Parser:
    """Return the flags of client.py."""
    parser = cifar.Parser(description=f"Federated learning client for {cifar.DATASET}.")
    number = cifar.number
    parser.add("--server-address", cifar.address, cifar.SERVER_ADDRESS, "server address")
    parser.add("--wait", number(float, 0), 60, "how many seconds to wait for the server")
    parser.add_shared()
    parser.add("--partition-id", number(int, 0), 0, "this client's partition, counted from 0")
    parser.add("--num-partitions", number(int, 1), 1, "number of partitions")
    text = "Dirichlet concentration: smaller is more non-IID (omit for IID)"
    parser.add("--alpha", number(float, 0.01, 1e6), None, text)
    parser.add("--root-certificates", certificate, None, "CA certificate (PEM); enables TLS")
    return parser


clients: dict[str, CifarClient] = {}  # the engine calls client_fn() for every message


def client_fn(context: fl.common.Context) -> fl.client.Client:
    """Build the client for Flower's engine, from the run config and the node config."""
    import server  # lazy import: only the engine mixes the flags of both scripts

    config = {**context.run_config, **context.node_config}
    key = f"{context.node_id} {config}"
    if key not in clients:
        args = cifar.parse_config(config, server.make_parser(), make_parser())
        name = f"node {context.node_id}"
        if "partition-id" in config:
            name = f"partition {args.partition_id}"
        clients[key] = make_client(args, name)
    return clients[key].to_client()


app = fl.client.ClientApp(client_fn=client_fn)


def main() -> None:
    """Load data, start CifarClient, reconnect if the connection is lost."""
    args = make_parser().parse_args()
    # Load model and data
    client = make_client(args, f"{platform.node()}-{os.getpid()}")
    # These gRPC options cannot be set through Flower or an environment variable.
    grpc.insecure_channel = keep_alive(grpc.insecure_channel)
    grpc.secure_channel = keep_alive(grpc.secure_channel)
    # Start client
    while True:
        wait_for_server(args)
        print(f"Connected to the server at {args.server_address}")
        try:
            fl.client.start_client(
                server_address=args.server_address,
                client=client.to_client(),
                root_certificates=args.root_certificates,
            )
            break
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise cifar.UserError(
                    f"The service at {args.server_address} is not a Flower server (wrong port?)."
                ) from error
            print(
                f"Connection to the server lost ({error.details()}), "
                f"trying to reconnect for up to {args.wait:g} s"
            )
        time.sleep(0.5)  # back off: the server may be rejecting connections
    print("Run ended by the server")


if __name__ == "__main__":
    cifar.run_main(main)
