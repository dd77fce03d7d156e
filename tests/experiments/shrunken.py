"""Shrinks any config, so that its dry run takes seconds."""

import re

from topics import PHASES

SIZES = {
    "vocab_size": 50, "width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 32,
    "max_positions": 32,
}  # fmt: skip
TOWER = SIZES | {"type_vocab_size": 2}


def shrunk(c):
    """Return the config with a tiny tower and corpus, small batches and long codes."""
    c.sizes = {"documents": 500, "train_queries": 300}
    if "vectors" in c:
        c.sizes["width"] = SIZES["width"]
    c.tower.shape = dict(c.tower.shape) | SIZES if c.tower.shape else TOWER
    c.tower.dtype = "float32"  # compiles faster on a CPU
    c.tower.query_length, c.tower.document_length = 8, 12
    c.head.width = min(c.head.width, SIZES["width"])
    c.head.hidden, c.tree.hidden = min(c.head.hidden, 8), min(c.tree.hidden, 8)
    c.tree.branching = min(c.tree.branching, 8)
    c.leaves.num_codewords = 16
    for phase in (c[name] for name in PHASES):
        phase.batch_size, phase.pool, phase.chunk = 8, 16, 4
        phase.buffer, phase.encoded = min(phase.buffer, 32), min(phase.encoded, 4)
    # One compression for all: the output of the tiny tower has only 64 bytes.
    budgets = [re.sub(r"\d+x$", "8x", budget) for budget in c.budgets]
    c.budgets = tuple(dict.fromkeys(budgets))
    return c
