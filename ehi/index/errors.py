"""Errors of an index that callers may want to tell from a wrong argument."""


class IndexCorruptError(ValueError):
    """A file of an index is missing, truncated, altered or does not fit the others."""


class IndexLockedError(RuntimeError):
    """Another process, or another thread, is writing to the index."""
