"""Experiments: each command is `python -m experiments.NAME`."""

import sys


def _end_at_interrupt(kind, error, traceback) -> None:
    """Report Ctrl-C in one sentence, and any other error as Python does."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as `command.INTERRUPTED`
    sys.__excepthook__(kind, error, traceback)


# A command handles Ctrl-C itself, but only once its imports, which take seconds, are
# done. Python says "-m" here only while it looks for the command that it will run.
if sys.argv[:1] == ["-m"] and any(
    word.removeprefix("-m").startswith("experiments.") for word in sys.orig_argv[1:]
):
    sys.excepthook = _end_at_interrupt
