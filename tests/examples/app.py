"""A ServerApp and a ClientApp for Flower's engine and simulation.

cp tests/examples/app.py tests/examples/pyproject.toml .    # beside the scripts
flwr run . local --stream --run-config "lr=0.02 rounds=5"

The scripts' flags come from the run config, a client's also from its node config.
"""

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import flwr as fl
from flwr.common import Context

import client
import server


@contextmanager
def visible_errors() -> Iterator[None]:
    """Turn what ends a script into an exception: the engine shows no SystemExit."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(error) from None


def parse(parser: ArgumentParser, config: Mapping) -> Namespace:
    """Return a script's flags: True is the bare flag, False and an empty text are left out."""
    given = {k.replace("-", "_"): v for k, v in config.items() if v is not False and v != ""}
    parser.set_defaults(**given)
    parser.exit_on_error = False  # a wrong value raises
    return parser.parse_args([])


@visible_errors()
def server_fn(context: Context) -> fl.server.ServerAppComponents:
    """Return the server, with the checks that server.py makes."""
    args = parse(server.make_parser(), context.run_config)
    if args.model.suffix != ".pt":
        raise ValueError("model must end in .pt")
    made = server.CifarServer(args)
    if args.rounds <= made.rounds_done:
        raise ValueError(f"rounds must exceed the {made.rounds_done} that are done")
    args.model.parent.mkdir(parents=True, exist_ok=True)
    config = fl.server.ServerConfig(args.rounds, args.round_timeout)
    return fl.server.ServerAppComponents(server=made, config=config)


@functools.cache  # the engine asks for the client at every message
def make_client(config: frozenset) -> client.CifarClient:
    return client.make_client(parse(client.make_parser(), dict(config)))


@visible_errors()
def client_fn(context: Context) -> fl.client.Client:
    config = {**context.run_config, **context.node_config}
    return make_client(frozenset(config.items())).to_client()


server_app = fl.server.ServerApp(server_fn=server_fn)
client_app = fl.client.ClientApp(client_fn=client_fn)
