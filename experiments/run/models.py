"""The module of a system: fields of a config -> arguments of `JointIndex`."""

from collections.abc import Callable

from flax import nnx

from ehi.model.joint import JointIndex
from ehi.model.pq import num_subspaces
from ehi.model.tower import Tower
from ehi.model.tree import router_class
from experiments.systems import is_trained, score_of


def build_model(
    config, system, compression: int | None, *, tower: Callable[[], Tower],
    tower_width: int, num_documents: int, code_width: int = 0,
) -> JointIndex:  # fmt: skip
    """Return the module of a system, freshly initialised.

    Args:
      config: of the system.
      system: the `System`.
      compression: of its PQ leaves, or None.
      tower: returns the pretrained tower; called only if the system trains it.
      tower_width: T.
      num_documents: of the corpus.
      code_width: width that the compression is relative to; 0: T.

    Raises:
      ValueError: the tree has more leaves than there are documents.
    """
    trained_tower = own_tower = None
    if config.tower.trainable != "head" and is_trained(system):
        trained_tower = tower()
        own_tower = nnx.clone(trained_tower) if config.tower.query_tower else None
    tree = _tree(config.tree, num_documents) if system.tree else None
    codewords = config.leaves.num_codewords
    subspaces = 0
    if system.pq:
        # A document in s leaves has s codes; together they have the same bytes.
        subspaces = num_subspaces(
            compression * config.tree.spill, tower_width=code_width or tower_width,
            num_codewords=codewords,
        )  # fmt: skip
    return JointIndex(
        tower_width=tower_width,
        width=config.head.width or tower_width,
        head_hidden=config.head.hidden,
        query_head=config.head.query_head,
        tower=trained_tower,
        query_tower=own_tower,
        tree=tree,
        num_subspaces=subspaces,
        num_codewords=codewords,
        rotation=config.leaves.rotation if system.pq else "none",
        residual=bool(config.leaves.residual and system.pq and system.tree),
        frozen_codes=config.leaves.frozen_codes,
        codeword_gradient=config.leaves.codeword_gradient,
        score=score_of(config, system),
        rngs=nnx.Rngs(config.seed),
    )


def _tree(c, num_documents: int) -> dict:
    """Return the `tree` argument of `JointIndex`."""
    router, leaves = router_class(c.kind), c.branching**c.height
    if leaves > num_documents:
        raise ValueError(
            f"tree.branching^tree.height = {leaves} leaves for {num_documents} "
            "documents; use at most as many"
        )
    return {
        "kind": c.kind,
        "height": c.height,
        "branching": c.branching,
        "hidden": c.hidden if router.takes_hidden else 0,
        "scale": c.scale,
        "query_router": c.query_router and router.queries_may_differ,
    }
