"""A Flower client: trains on its own images and sends weights and metrics, never images.

python3 client.py --partition-id 0 --num-partitions 2    # the first of two partitions
"""

import os
import platform
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

# Flower and gRPC read these when they are imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # or workers of a DataLoader crash
# Never a proxy for this machine. If no_grpc_proxy is set, gRPC does not read no_proxy.
no_proxy = "127.0.0.1,localhost,::1," + os.environ.get("no_proxy", "")
os.environ.setdefault("no_grpc_proxy", no_proxy)

import flwr as fl
import grpc
import torch
from flwr.common import Config, Metrics, NDArrays
from flwr.common.logger import FLOWER_LOGGER
from torch import nn
from torch.utils.data import DataLoader

import cifar

FLOWER_LOGGER.addFilter(lambda record: not str(record.msg).startswith("DEPRECATED FEATURE"))


class CifarClient(fl.client.NumPyClient):
    """Flower client implementing CIFAR-10 image classification using PyTorch."""

    def __init__(
        self, model: nn.Module, trainloader: DataLoader, testloader: DataLoader, num_examples: dict
    ) -> None:
        self.model = model
        self.trainloader = trainloader
        self.testloader = testloader
        self.num_examples = num_examples
        self.name = f"{platform.node()}-{os.getpid()}"  # for the server's log

    def get_parameters(self, config: Config) -> NDArrays:
        return cifar.get_parameters(self.model)

    def set_parameters(self, parameters: NDArrays) -> None:
        cifar.set_parameters(self.model, parameters)

    def fit(self, parameters: NDArrays, config: Config) -> tuple[NDArrays, int, Metrics]:
        """Train the given parameters with the server's settings; return the new ones."""
        self.set_parameters(parameters)
        epochs = int(config.get("local_epochs", 1))
        lr = float(config.get("lr", cifar.LEARNING_RATE))
        cifar.train(self.model, self.trainloader, epochs, cifar.DEVICE, lr)
        return self.get_parameters({}), self.num_examples["trainset"], {"client": self.name}

    def evaluate(self, parameters: NDArrays, config: Config) -> tuple[float, int, Metrics]:
        """Evaluate the given parameters on the local test images."""
        self.set_parameters(parameters)
        loss, accuracy = cifar.test(self.model, self.testloader, cifar.DEVICE)
        print(f"Evaluated the global model: loss {loss:.4f}, accuracy {accuracy:.4f}")
        return loss, self.num_examples["testset"], {"accuracy": accuracy}


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--server-address", default="127.0.0.1:8080", help="HOST:PORT of the server")
    add("--wait", type=float, default=60, help="seconds to wait for the server")
    cifar.add_flags(parser)
    add("--partition-id", type=int, default=0, help="this client's partition, from 0")
    add("--num-partitions", type=int, default=1, help="number of partitions")
    add("--alpha", type=float, help="Dirichlet concentration: smaller is more non-IID")
    add("--root-certificates", help="CA certificate (PEM), for a server with TLS")
    return parser


def make_client(args: Namespace) -> CifarClient:
    """Load model and data."""
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = cifar.Net().to(cifar.DEVICE)
    data = args.data_root, args.synthetic, args.partition_id, args.num_partitions, args.alpha
    return CifarClient(model, *cifar.load_data(args.batch_size, *data))


def wait_for_server(args: Namespace, certificates: bytes | None) -> None:
    """Wait for the server, which start_client() does not, despite its max_wait_time."""
    print(f"Waiting up to {args.wait:g} s for the server at {args.server_address}")
    options = [("grpc.max_reconnect_backoff_ms", 1000)]
    if certificates is None:
        channel = grpc.insecure_channel(args.server_address, options)
    else:
        credentials = grpc.ssl_channel_credentials(certificates)
        channel = grpc.secure_channel(args.server_address, credentials, options)
    with channel:
        try:
            grpc.channel_ready_future(channel).result(args.wait)
        except grpc.FutureTimeoutError:
            sys.exit(
                f"No server at {args.server_address} within {args.wait:g} s. Is it running, at "
                "this address, with TLS exactly if --root-certificates is given? "
                "Is a proxy set (http_proxy)?"
            )


def main() -> None:
    """Load data, start CifarClient; reconnect if the connection is lost."""
    parser = make_parser()
    args = parser.parse_args()
    if not 0 <= args.partition_id < args.num_partitions:
        parser.error(f"--partition-id must be from 0 to {args.num_partitions - 1}")
    path = args.root_certificates
    try:
        certificates = Path(path).read_bytes() if path else None
    except OSError as error:
        parser.error(f"--root-certificates: {error}")
    # Load model and data
    client = make_client(args)
    print(f"Client {client.name}")
    # Start client
    while True:
        wait_for_server(args, certificates)
        try:
            fl.client.start_client(
                server_address=args.server_address,
                client=client.to_client(),
                root_certificates=certificates,
            )
            return
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                sys.exit(f"The gRPC server at {args.server_address} is not server.py.")
            print(f"Connection lost: {error.details()}")
        time.sleep(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # Ctrl-C
        sys.exit(130)
