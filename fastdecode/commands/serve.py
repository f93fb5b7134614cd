"""``fastdecode serve MODEL``: OpenAI's API over HTTP.

Under ``mpirun -n 3 fastdecode serve MODEL --transport mpi`` one rank serves, 0 unless told otherwise.  A signal to it
(its process is in the table of roles) drains; one to mpirun itself does not: Open MPI ends all ranks at once, with a
code that is not 0.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import fastdecode
from cpu_attention import parse_bytes, raise_file_limit
from fastdecode.api.config_file import add_config_flags
from fastdecode.api.model_names import default_names
from fastdecode.commands.engine_flags import add_engine_flags, engine_options, read_template, run_on_s_worker
from fastdecode.errors import ConfigError
from fastdecode.server.options import ServerOptions
from transport import limited_handler

_KEY_VARIABLE = "FASTDECODE__API_KEY"
_NEEDED = ("fastapi", "starlette", "uvicorn", "h11", "pydantic")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face model directory (config.json, *.safetensors)")
    server = parser.add_argument_group("server")
    server.add_argument(
        "--host", default=ServerOptions.host, help="the one address to listen on; ::  all of them, IPv4 and IPv6"
    )
    server.add_argument("--port", type=int, default=ServerOptions.port, help="0: a free one, which is told")
    server.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", default=None,
        help="what requests may call the model (default: its path, and the last part of it)",
    )  # fmt: skip
    server.add_argument(
        "--api-key", action="append", dest="api_keys", metavar="KEY", default=None,
        help=f"requests must show one of these; several times for several, or one in {_KEY_VARIABLE}, unseen by ps",
    )  # fmt: skip
    server.add_argument("--seed", type=int, default=0, help="what requests without a seed derive theirs from")
    server.add_argument(
        "--max-queue", type=int, default=ServerOptions.max_queue, metavar="N",
        help="sequences that may wait, beside those that run or can at once; who finds so many is answered 429",
    )  # fmt: skip
    server.add_argument(
        "--timeout", type=float, default=None, metavar="SECONDS", help="of one request, from its arrival to its end"
    )
    server.add_argument(
        "--shutdown-timeout", type=float, default=ServerOptions.shutdown_timeout_s, metavar="SECONDS",
        help="what runs has so long to end after SIGTERM, SIGINT or SIGHUP",
    )  # fmt: skip
    server.add_argument("--max-body", default="32MiB", metavar="BYTES", help="of a request")
    server.add_argument(
        "--client-timeout", type=float, default=ServerOptions.client_timeout_s, metavar="SECONDS",
        help="a client that neither sends what it began nor reads what it is sent is left after so long",
    )  # fmt: skip
    server.add_argument(
        "--chat-template", default=None, metavar="FILE", help="instead of the one that the model's tokenizer has; Jinja"
    )
    server.add_argument(
        "--trust-request-chat-template", action="store_true",
        help="requests may bring a chat template of their own, which is a program that runs here",
    )  # fmt: skip
    server.add_argument(
        "--cors-origins", nargs="+", metavar="ORIGIN", default=(),
        help="pages of these (https://a.example, or *) may ask from within a browser",
    )  # fmt: skip
    server.add_argument(
        "--root-path", default=ServerOptions.root_path, metavar="PREFIX",
        help="what a proxy puts before the paths, like /llm; requests may come with it or without",
    )  # fmt: skip
    # Waiting is bounded by --max-queue, before the engine.
    add_engine_flags(parser, without=("max_num_waiting",))
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """0: a signal ended it.  1: the engine died.  2: it could not start.

    130, 143, 129: a second signal did, or the first one before it began to load.
    """
    options = _server_options(args)
    return run_on_s_worker(args, lambda: _serve(args, options))


def _server_options(args: argparse.Namespace) -> ServerOptions:
    """Raises ConfigError."""
    try:
        max_body_bytes = parse_bytes(args.max_body)
    except ValueError as error:
        raise ConfigError(f"max_body: {error}") from error
    keys = args.api_keys
    if keys is None:
        keys = [os.environ[_KEY_VARIABLE]] if _KEY_VARIABLE in os.environ else []
    return ServerOptions(
        served_model_name=tuple(args.served_model_name or default_names(args.model)),
        host=args.host,
        port=args.port,
        api_keys=tuple(keys),
        max_queue=args.max_queue,
        timeout_s=args.timeout,
        shutdown_timeout_s=args.shutdown_timeout,
        max_body_bytes=max_body_bytes,
        client_timeout_s=args.client_timeout,
        chat_template=None if args.chat_template is None else read_template(Path(args.chat_template)),
        trust_request_chat_template=args.trust_request_chat_template,
        cors_origins=tuple(args.cors_origins),
        root_path=args.root_path.rstrip("/"),
    )


def _serve(args: argparse.Namespace, options: ServerOptions) -> int:
    """On the S-worker.  Returns what `run` does.  Raises FastDecodeError."""
    line = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, handlers=[limited_handler()])
    for name in ("uvicorn", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    raise_file_limit()
    try:
        run_server = fastdecode.run_server
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        raise ConfigError(f"the server needs {error.name}: pip install 'fastdecode[server]'") from error
    config = fastdecode.EngineConfig.from_options({"model": args.model, "seed": args.seed, **engine_options(args)})
    return int(run_server(config, options))
