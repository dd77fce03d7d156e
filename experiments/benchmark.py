"""Speed of the parts, beside the libraries that others use for them.

    python -m experiments.benchmark encode --dataset=pydocs --num-texts=300
    python -m experiments.benchmark train --batch=32
    python -m experiments.benchmark step-search --documents=1000000 --bytes=96
    python -m experiments.benchmark search --peers=faiss,scann,usearch --json=FILE
    python -m experiments.benchmark text --words=12
    python -m experiments.benchmark serve --index=runs/pydocs/index
    python -m experiments.benchmark build --n=10000000
    python -m experiments.benchmark memory --n=1000000 --dim=384
    python -m experiments.benchmark plan --constants=FILE.json

Each command is a module, `experiments.benchmarks.<name>`, whose docstring defines what
is measured. The commands print JSON, which --json=FILE also writes to a file. Most also
print a table of it on the error stream.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from ehi.files import atomic_write
from ehi.progress import log_to_stderr
from experiments.command import exit_code

OWN_FILES = ("search", "plan")  # these write their own files
COMMANDS = {
    "encode": "encoding a corpus",
    "train": "the train step whose tower trains",
    "search": "searching an index",
    "text": "searching in words, one question at a time",
    "serve": "the service under load, while another process writes too",
    "step-search": "the search of the code table inside a step",
    "build": "building an index from shards",
    "memory": "memory of a whole run on vectors in files, beside the formula",
    "plan": "the cost of 1M to 1B documents, from the JSON files of the other commands",
}


def main():
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for name, words in COMMANDS.items():
        command = commands.add_parser(name, help=words)
        if name in sys.argv[1:2]:  # others may import what is not installed
            _add_arguments(name, command)
            if name not in OWN_FILES:
                command.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    log_to_stderr()
    result = args.run(args)
    if isinstance(result, str):  # Markdown
        print(result)
        return
    text = json.dumps(result, indent=2)
    print(text)
    if sys.argv[1] not in OWN_FILES and args.json is not None:
        atomic_write(args.json, f"{text}\n".encode())
    if hasattr(args, "table"):
        print(args.table(result), file=sys.stderr)


def _add_arguments(name: str, command) -> None:
    """Add the options of one benchmark, which its module defines."""
    part = name.replace("-", "_")
    module = importlib.import_module(f"experiments.benchmarks.{part}")
    module.add_arguments(command)
    if name != "search":  # its module sets `run`
        command.set_defaults(run=getattr(module, f"benchmark_{part}"))
    if hasattr(module, "table"):
        command.set_defaults(table=module.table)


def command() -> None:
    """Run `main` and end the process with its exit code."""
    sys.exit(exit_code(main))


if __name__ == "__main__":
    command()
