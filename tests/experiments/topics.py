"""A config that trains every system on the corpus of topics in seconds."""

from pathlib import Path

from ehi.train.recipes import RECIPES
from experiments.configs import own

FIXTURES = Path(__file__).parent.parent / "fixtures"
PHASES = tuple(RECIPES)


def tiny(folder, **changes):
    """The config of `own.py` with a tiny tower and short phases, and the changes."""
    c = shrink(own.get_config())
    c.dataset = str(folder)
    c.budgets = ("flat", "flat-8x", "visit-50", "visit-50-8x")
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def shrink(c):
    """Any config with a tiny tower and short phases."""
    c.tower.name = str(FIXTURES / "minilm_tiny")
    c.tower.query_length = c.tower.document_length = 16
    c.head.hidden = 8
    c.tree.hidden = 8
    c.tree.branching = 8
    c.leaves.num_codewords = 16
    for phase in (c[name] for name in PHASES):
        phase.steps, phase.batch_size, phase.pool = 6, 16, 64
        phase.log_every, phase.checkpoint_every = 2, 4
    return c
