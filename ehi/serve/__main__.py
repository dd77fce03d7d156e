"""Answer searches of an index over HTTP.

    python -m ehi.serve --index=runs/pydocs/index
    curl --json '{"text": "how do I parse an ISO date"}' http://127.0.0.1:8000/search

With a token (`EHI_TOKEN`, or --token, which other users of the machine can see), each
search has to send it. SIGTERM and Ctrl-C let requests that have begun end.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ehi.serve.limits import Limits, is_local

NEEDED = ("starlette", "uvicorn", "httptools", "msgspec", "prometheus_client")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = parse_arguments(argv)
    try:
        return _run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it: 128 + SIGINT


def _run(args):
    try:
        from ehi.serve.app import make_app
        from ehi.serve.connection import listen, serve
        from ehi.serve.reader import Reader
    except ModuleNotFoundError as error:
        missing = error.name.partition(".")[0]
        if missing not in NEEDED:
            raise
        packages = " ".join(NEEDED).replace("_", "-")
        raise ImportError(
            f"the service needs {missing}: python -m pip install {packages}"
        ) from None
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    local = is_local(args.host)
    if not (local or args.token or args.insecure):
        raise ValueError(
            f"--host={args.host} lets other machines ask: set EHI_TOKEN to a secret "
            "that they have to send, or give --insecure to let everybody ask"
        )
    limits = Limits(
        queries=args.max_queries,
        k=args.max_k,
        body_bytes=args.max_body,
        body_seconds=args.timeout,
        waiting=args.max_waiting,
        connections=args.max_connections,
        batch_queries=args.batch,
        batch_seconds=args.batch_delay / 1e3,
    )
    reader = Reader(args.index, limits, args.threads)
    app = make_app(
        reader, limits, token=args.token, local_only=local and not args.token,
        refresh_seconds=args.refresh,
    )  # fmt: skip
    listening = listen(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    state, port = reader.state, listening.getsockname()[1]
    if state.encoder is None:
        print(f"no text can be asked: {state.why_not}", file=sys.stderr)
    print(
        f"{state.index.num_documents:,} documents at http://{host}:{port}/", flush=True
    )
    serve(app, listening, limits, args.drain)
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake ends the program with a usage message."""
    parser = argparse.ArgumentParser(
        prog="python -m ehi.serve",
        description="Answer searches of an index over HTTP.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--index", required=True, type=_path, help="folder of the index")
    add("--host", default="127.0.0.1", help="address to listen at")
    add("--port", type=_whole, default=8000, help="0 takes a free one")
    add("--token", help="secret that requests have to send, better given as EHI_TOKEN")
    add("--insecure", action="store_true", help="let other machines ask without one")
    add("--threads", type=_positive, default=1, help="threads of a search")
    add("--batch", type=_positive, default=64, help="most queries of a search")
    add("--batch-delay", type=_number, default=2.0,
        help="milliseconds that a query waits for others")  # fmt: skip
    add("--refresh", type=_number, default=1.0,
        help="seconds between two looks for what other processes wrote")  # fmt: skip
    add("--timeout", type=_number, default=10.0, help="seconds to send a request")
    add("--drain", type=_number, default=30.0, help="seconds to end after SIGTERM")
    add("--max-k", type=_positive, default=1000, help="results of a query")
    add("--max-queries", type=_positive, default=64, help="queries of a request")
    add("--max-body", type=_positive, default=2**20, help="bytes of a request")
    add("--max-waiting", type=_positive, default=256, help="requests at once")
    add("--max-connections", type=_positive, default=500, help="open connections")
    args = parser.parse_args(argv)
    if args.token is None:
        args.token = os.environ.get("EHI_TOKEN") or None
    elif not args.token:
        parser.error("--token is empty")
    return args


def _path(text):
    return Path(os.path.expanduser(text))


def _whole(text):
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{value} is no port")
    return value


def _positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _number(text):
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{value} is not a time")
    return value


if __name__ == "__main__":
    sys.exit(main())
