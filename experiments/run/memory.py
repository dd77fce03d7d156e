"""Host memory, disk, and the starts of a run, by a formula: see `plan_memory`.

Nothing in the host's memory grows with the documents but what the formula says:

    ids            200 N                       ids of the documents: Python strings, and
                                               a dictionary of them while pairs are made
    pairs          600 L + 350 S + 16 (S + N)  L labelled pairs, S pseudo-queries with
                   + 4 A N                     their texts and tokens, the order of an
                                               epoch, and the draws of A synthetic
                                               queries each
    starts         12 R D                      R sampled vectors: as read, as fitted,
                                               and what a fit computes of them
    tables         their bytes                 if they are not larger than
                                               `device_table_gib`: made, then copied
    batches        8 (Q + C) row               else: two batches of Q queries and C
                                               documents with their rows of all tables
    exhaustive     8 SEARCHED D                mining from a teacher, one part at a time
    an index       16 IN_MEMORY / 4            of a small corpus; a large one is built
                   or 2^29                     from files, one block at a time
    the program    PROGRAM                     Python, jax, compiled steps

The peak is the program, ids and pairs, and the largest of the others. On a CPU the
device is the host, so what `--dry_run` says of the device is added. Pages of files that
are mapped (RssFile) are not counted: the system drops them when it needs room.
"""

import math
from dataclasses import dataclass

from ehi.model.params import split_model
from ehi.train.negatives import SEARCHED
from ehi.train.starts import sample_sizes
from experiments.run.dry_run import (
    abstract_model,
    abstract_tables,
    data_sizes,
    output_width,
    runs_of,
    tower_shape,
)
from experiments.run.train import IN_MEMORY, rows_travel, run_name
from experiments.systems import (
    config_of,
    fit_to_corpus,
    get_system,
    phase_of,
    phases_of,
)

PROGRAM = 900 * 2**20
ID, LABELLED, PSEUDO = 200, 600, 350  # bytes of an id, a pair, a pseudo-query
FIT_COPIES = 3  # of the sampled vectors


@dataclass(frozen=True)
class Plan:
    """What a run needs beside its devices, in bytes.

    Attributes:
      host: part -> bytes; all of them are there at once but for 'largest stage'.
      stages: part of 'largest stage' -> bytes.
      disk: kind of file -> bytes.
      starts: run -> bytes on the device while k-means and OPQ fit its start.
    """

    host: dict[str, int]
    stages: dict[str, int]
    disk: dict[str, int]
    starts: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of the host at the peak."""
        return sum(self.host.values())


def plan_memory(config) -> Plan:
    """Return the host memory, the disk and the starts of all runs of a config.

    Args:
      config: an experiment, as of `dry_run`.
    """
    sizes, shape = data_sizes(config), tower_shape(config)
    config = fit_to_corpus(config, sizes.documents)
    documents, synthetic = sizes.documents, config.pseudo.synthetic
    pseudo = documents * config.pseudo.per_document
    stages = {"index": _index(documents, config.head.width or output_width(shape))}
    disk, starts = _disk(config, sizes, shape), {}
    for name, compression in runs_of(config):
        resolved, system = config_of(config, name), get_system(name)
        if system.library:
            continue
        run = run_name(name, compression)
        model = abstract_model(resolved, system, compression, sizes, shape)
        _, params = split_model(model)
        if system.parent is not None and (system.tree or system.pq):
            starts[run] = _start(resolved, model, params, documents)
        for phase_name in phases_of(resolved, system):
            phase = phase_of(resolved, phase_name, documents)
            if phase.steps:
                stages |= _step(resolved, phase, params, sizes, f"{run} {phase_name}")
    stages["starts"] = max(starts.values(), default=0)
    host = {
        "program": PROGRAM,
        "ids": ID * documents,
        "pairs": LABELLED * sizes.train_queries
        + PSEUDO * pseudo
        + 16 * (pseudo + documents)
        + 4 * synthetic * documents,
        "largest stage": max(stages.values()),
    }
    return Plan(host, stages, disk, starts)


def _index(documents: int, width: int) -> int:
    values = 4 * documents * width
    return 4 * values if values <= IN_MEMORY else 2**29


def _start(config, model, params, documents: int) -> int:
    """Return the bytes of the sampled vectors and of what a fit makes of them."""
    for_tree, for_codes = sample_sizes(model, config.fit_sample)
    fits_tree = model.router is not None and config.tree.start != "random"
    rows = min(documents, for_tree if fits_tree else for_codes)
    return FIT_COPIES * 4 * rows * params["head/projection"].shape[1]


def _step(config, phase, params, sizes, label: str) -> dict[str, int]:
    """Return the bytes of the tables or the batches of a phase, and of its mining."""
    tables = abstract_tables(config, phase, params, sizes)
    rows = phase.batch_size + min(phase.pool, sizes.documents)
    found = {}
    if rows_travel(config, tables):
        row = sum(
            math.prod(table.shape[1:]) * table.dtype.itemsize
            for name, table in tables.items()
            if name != "codes"
        )
        found[f"{label}, batches"] = 2 * rows * row
    else:
        found[f"{label}, tables"] = sum(
            math.prod(table.shape) * table.dtype.itemsize for table in tables.values()
        )
    if phase.mining_interval:
        width = params["head/projection"].shape[1]
        sources = {"labelled": sizes.train_queries}
        sources["pseudo"] = sizes.documents * config.pseudo.per_document
        sources["documents"] = sizes.documents
        sources["synthetic"] = sizes.documents * config.pseudo.synthetic
        drawn = sum(size for name, size in sources.items() if phase.sources.get(name))
        drawn = min(drawn, phase.steps * phase.batch_size)
        kept = 4 * phase.mined_kept * drawn
        found[f"{label}, mining"] = 8 * min(SEARCHED, sizes.documents) * width + kept
    return found


def _disk(config, sizes, shape) -> dict[str, int]:
    """Return the bytes of the files of a run: most are kept for the next one."""
    item, documents = 2 if config.half_on_disk else 4, sizes.documents
    texts = sizes.train_queries + documents * config.pseudo.per_document
    width, tower = config.head.width or output_width(shape), output_width(shape)
    encoders, towers, codes, index, mining = 0, 1, 0, 0, 0
    for name, compression in runs_of(config):
        resolved, system = config_of(config, name), get_system(name)
        if system.library:
            continue
        trains = [phase_of(resolved, p, documents) for p in phases_of(resolved, system)]
        trains = [phase for phase in trains if phase.steps]
        moves = any(p.rates.get("head") or p.rates.get("tower") for p in trains)
        encoders += moves or system.parent is None
        towers += any(p.rates.get("tower") for p in trains)
        size = 4 * width if compression is None else 4 * tower // compression
        codes += any(p.needs_codes for p in trains) and size
        index += size + 4
        if any(p.mining_interval and p.negatives == "leaves" for p in trains):
            mining = item * (tower + width) + size
    found = {
        "tower outputs": towers * item * tower * (documents + texts),
        "embeddings": encoders * item * width * documents,
        "code tables": codes * documents,
        "indexes": index * documents,
        "mining, while it lasts": mining * documents,
    }
    if "vectors" in config:  # they were given
        found["tower outputs"] = 0
    return found
