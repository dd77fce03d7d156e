"""Jointly learned retrieval indexes: encoder, tree and PQ leaves under one loss.

The flow is the list of folders::

    config        experiments/configs, experiments/systems.py
      -> data     ehi/data       text in, token arrays out                  (no jax)
      -> model    ehi/model      tower, head, tree, rotation, PQ leaves
      -> encode   ehi/encode     corpus -> embeddings, leaves, codes
      -> train    ehi/train      losses, objective, one jitted step, the loop
      -> index    ehi/index      a folder of NumPy arrays, and its search   (NumPy only)
      -> eval     ehi/eval       metrics, records, significance
      -> tables   experiments/tables.py

Beside it stand `ehi/serve` (the index over HTTP), `ehi/parallel` (devices, processes)
and `ehi/files.py` (atomic writes and the cache folder).

The alphabet of shapes, used in every trailing comment:

    N batch, or number of rows     L tokens of a text        V vocabulary
    D width of an embedding        T width of the tower      C candidate documents
    H height of the tree           B branching factor        P = B^H leaves
    M subspaces                    K codewords (16 or 256)   S = D / M
    k results                      b beam width              s leaves per document
"""

__version__ = "0.2.0"


def __getattr__(name: str):
    """`ehi.fit`, `load`, `push`, `pull`, imported when used: `fit` imports jax."""
    if name == "fit":
        try:
            from ehi.api import fit
        except ModuleNotFoundError as error:
            from ehi.index.check import INSTALL

            raise ImportError(
                f"ehi.fit trains, and {error.name} is not installed: in a checkout of "
                "ehi run `python -m pip install .`; the line for search alone, "
                f"`{INSTALL}`, leaves it out"
            ) from error
        return fit
    if name == "load":
        from ehi.vector_index import load

        return load
    if name in ("push", "pull"):
        from ehi import publish

        return getattr(publish, name)
    raise AttributeError(f"module 'ehi' has no attribute {name!r}")
