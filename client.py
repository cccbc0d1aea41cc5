"""One client of the federation: trains on its own images, and sends only weights to the server.

python3 client.py                                        # all of CIFAR-10
python3 client.py --partition-id 0 --num-partitions 2    # its own half
python3 client.py --help                                 # every setting
"""

import gc
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: end at once, in the imports too
    gc.set_threshold(50_000)  # imports faster by half a second; more would cost memory

import argparse
import functools
import logging
import os
import platform
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

# Flower reads these as it is imported: it reports nothing to its maker, and leaves the talking to
# the lines printed here. A setting of the user's own wins.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import flwr as fl
import grpc  # type: ignore[import-untyped]
import numpy as np
import torch
from flwr.client import Client, ClientApp
from flwr.common import Context, Scalar
from torch.utils.data import DataLoader

import cifar

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
NAME = f"{platform.node()}-{os.getpid()}"  # how the server's log calls this client


class CifarClient(fl.client.NumPyClient):
    """Flower client implementing CIFAR-10 image classification using PyTorch."""

    def __init__(
        self,
        model: torch.nn.Module,
        trainloader: DataLoader,
        testloader: DataLoader,
        num_examples: dict[str, int],
    ) -> None:
        self.model = model
        self.trainloader = trainloader
        self.testloader = testloader
        self.num_examples = num_examples

    def get_parameters(self, config: dict[str, Scalar]) -> list[np.ndarray]:
        """Return the model's parameters as NumPy arrays, copied: training on leaves them alone."""
        return [val.cpu().numpy().copy() for val in self.model.state_dict().values()]

    def set_parameters(self, parameters: list[np.ndarray]) -> None:
        """Set the model's parameters from NumPy arrays, in the order of get_parameters()."""
        params_dict = zip(self.model.state_dict().keys(), parameters)
        state_dict = OrderedDict({k: torch.tensor(v) for k, v in params_dict})
        self.model.load_state_dict(state_dict, strict=True)

    def fit(
        self, parameters: list[np.ndarray], config: dict[str, Scalar]
    ) -> tuple[list[np.ndarray], int, dict[str, Scalar]]:
        """Train the given parameters as the server's config says; return the trained ones."""
        self.set_parameters(parameters)
        cifar.train(
            self.model,
            self.trainloader,
            epochs=int(config.get("local_epochs", 1)),
            device=DEVICE,
            lr=float(config.get("lr", 0.001)),
        )
        return self.get_parameters(config={}), self.num_examples["trainset"], {"client": NAME}

    def evaluate(
        self, parameters: list[np.ndarray], config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        """Test the given parameters on the local test images."""
        self.set_parameters(parameters)
        loss, accuracy = cifar.test(self.model, self.testloader, device=DEVICE)
        print(f"Tested the new global model: loss {loss:.4f}, accuracy {accuracy:.4f}", flush=True)
        return loss, self.num_examples["testset"], {"accuracy": accuracy, "client": NAME}


@functools.cache  # the deployment engine asks for a client with every message
def make_client(
    batch_size: int = 32,
    data_root: str = cifar.DATA_ROOT,
    synthetic: bool = False,
    partition_id: int = 0,
    num_partitions: int = 1,
    alpha: float | None = None,
) -> CifarClient:
    """Load model and data, and say what this client holds; raises UserError without data."""
    model = cifar.Net().to(DEVICE)
    trainloader, testloader, num_examples = cifar.load_data(
        batch_size, data_root, synthetic, partition_id, num_partitions, alpha
    )
    counts = torch.bincount(trainloader.dataset.labels, minlength=len(cifar.CLASSES))  # type: ignore[attr-defined]
    held = ", ".join(f"{name} {count}" for name, count in zip(cifar.CLASSES, counts.tolist()))
    print(
        f"Client {NAME}, part {partition_id} of {num_partitions}: {num_examples['trainset']} images "
        f"to train on ({held}), {num_examples['testset']} to test on",
        flush=True,
    )
    return CifarClient(model, trainloader, testloader, num_examples)


def main() -> None:
    """Load data, start CifarClient."""
    parser = argparse.ArgumentParser(
        description="One client of a federation on CIFAR-10.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    number = cifar.number
    add = parser.add_argument
    add("--server-address", type=cifar.address, default="127.0.0.1:8080", help="the server's")
    add(
        "--wait",
        metavar="SECONDS",
        type=number(float, 0),
        default=60,
        help="how long to wait for a server that is not there, or has gone",
    )
    add("--batch-size", type=number(int, 1), default=32, help="images a step")
    cifar.add_data_arguments(parser)
    add(
        "--partition-id", type=number(int, 0), default=0, help="which part of the images is its own"
    )
    add("--num-partitions", type=number(int, 1), default=1, help="parts the images are dealt into")
    add(
        "--alpha",
        type=number(float, 0.001, 1e6),
        help="skew the parts' classes, smaller is more (see README.md); without it they are alike",
    )
    add(
        "--threads",
        type=number(int, 1, 1024),
        default=torch.get_num_threads() if "OMP_NUM_THREADS" in os.environ else 1,
        help="CPU threads; clients that share a machine are fastest with one each",
    )
    add("--root-certificates", type=Path, help="TLS: the authority to trust (PEM)")
    args = parser.parse_args()
    if args.partition_id >= args.num_partitions:
        parser.error(f"--partition-id must be below --num-partitions ({args.num_partitions})")
    torch.set_num_threads(args.threads)
    if args.seed is not None:
        torch.manual_seed(args.seed)

    root_certificates = None
    if args.root_certificates:
        try:
            ssl.create_default_context(cafile=args.root_certificates)
            root_certificates = args.root_certificates.read_bytes()
        except OSError as error:
            raise cifar.UserError(f"No TLS with {args.root_certificates}: {error}.") from error
    cifar.resolve(args.server_address)

    # Load model and data
    client = make_client(
        args.batch_size,
        args.data_root,
        args.synthetic,
        args.partition_id,
        args.num_partitions,
        args.alpha,
    )
    # Start client
    keep_alive()
    run(client, args.server_address, args.wait, root_certificates)


# Finding the server, and staying with it.


def run(client: CifarClient, address: str, wait: float, root_certificates: bytes | None) -> None:
    """Take part until the server has run all its rounds, rejoining if it goes and comes back.

    Raises UserError where it stays away for `wait` seconds, or where training fails.
    """
    # start_client() is what this shape of federation needs; that it is deprecated is for us to
    # know (see README.md). And an exception of the client's own is told below, in one line.
    logger = logging.getLogger("flwr")
    if os.environ["FLWR_LOG_LEVEL"] != "DEBUG":
        logger.addFilter(
            lambda record: (
                record.exc_info is None
                and "start_client() is deprecated" not in record.getMessage()
            )
        )
    while True:
        wait_for_server(address, wait, root_certificates)
        print(f"Connected to the server at {address}", flush=True)
        try:
            fl.client.start_client(
                server_address=address,
                client=client.to_client(),
                root_certificates=root_certificates,
            )
            print("The server has ended the run")
            return
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise cifar.UserError(f"What answers at {address} is not server.py.") from error
            print(f"Lost the server: {error.details()}", flush=True)
            time.sleep(1)  # one that turns everybody away is not to be asked without a pause
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise cifar.UserError(
                f"This client failed with {type(error).__name__}: {reason} "
                "(FLWR_LOG_LEVEL=DEBUG shows where)"
            ) from error


HINTS = {  # what gRPC says, in many words, and what it means
    "Connection refused": "Connection refused; is it running?",
    "Socket closed": "it closed the connection; if it uses TLS, add --root-certificates",
    "WRONG_VERSION_NUMBER": "it does not use TLS, leave --root-certificates out",
    "CERTIFICATE_VERIFY_FAILED": "its certificate has expired, or is not from the authority in --root-certificates",
    "Deadline Exceeded": "no answer",
}


def wait_for_server(address: str, seconds: float, root_certificates: bytes | None) -> None:
    """Return as soon as a server answers; raises UserError, with the reason, where none does."""
    options = [("grpc.initial_reconnect_backoff_ms", 500), ("grpc.max_reconnect_backoff_ms", 1000)]
    if root_certificates is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        credentials = grpc.ssl_channel_credentials(root_certificates)
        channel = grpc.secure_channel(address, credentials, options=options)
    deadline = time.monotonic() + seconds
    said = ""
    with channel:
        # No server has this method, so that one is there as soon as it says so.
        probe = channel.unary_unary("/flwr.proto.FlowerService/Probe")
        while True:
            try:
                probe(b"", timeout=min(5, max(0.1, deadline - time.monotonic())))
                return
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    return
                details = error.details().rpartition("last error: ")[2]
                reason = next((HINTS[key] for key in HINTS if key in details), details)
            if time.monotonic() > deadline:
                raise cifar.UserError(f"No server at {address} for {seconds:g} s: {reason}.")
            if reason != said:
                print(f"Waiting for the server at {address}: {reason}", flush=True)
                said = reason
            time.sleep(0.5)


def keep_alive() -> None:
    """Let the channels that Flower opens ask the server for a sign of life.

    Without it, a client whose connection ended without a word to it, as behind a link that fails
    for half a minute, would wait for ever.
    """
    more = [
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 60_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]

    def with_more(open_channel: Callable[..., grpc.Channel]) -> Callable[..., grpc.Channel]:
        return lambda *args, options=(): open_channel(*args, options=[*options, *more])

    grpc.insecure_channel = with_more(grpc.insecure_channel)
    grpc.secure_channel = with_more(grpc.secure_channel)


# Flower's deployment engine.


def client_fn(context: Context) -> Client:
    """Build the same client for Flower's deployment engine, from the run and the node config."""
    run, node = context.run_config, context.node_config
    torch.set_num_threads(int(node.get("threads", 1)))
    return make_client(
        batch_size=int(run.get("batch-size", 32)),
        data_root=str(node.get("data-root", cifar.DATA_ROOT)),
        synthetic=bool(run.get("synthetic", False)),
        partition_id=int(node.get("partition-id", 0)),
        num_partitions=int(node.get("num-partitions", 1)),
        alpha=float(run["alpha"]) if "alpha" in run else None,
    ).to_client()


app = ClientApp(client_fn=client_fn)


if __name__ == "__main__":
    cifar.run_main(main)
