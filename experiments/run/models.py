"""The module of a system: what a config says, as arguments of `JointIndex`."""

from flax import nnx

from ehi.model.joint import JointIndex
from ehi.model.tree import router_class
from experiments.run.prepare import Inputs
from experiments.systems import is_trained, num_subspaces


def build_model(config, system, compression: int | None, inputs: Inputs) -> JointIndex:
    """The module of a system, freshly initialised."""
    tower_width = inputs.pretrained.config["width"]
    trains_tower = config.tower.trainable != "head" and is_trained(system)
    own_tower = trains_tower and config.tower.query_tower
    tree = _tree(config.tree, len(inputs.dataset.documents)) if system.tree else None
    codewords = config.leaves.num_codewords
    subspaces = 0
    if system.pq:
        # A document that is spilled to s leaves has s codes in the same bytes.
        subspaces = num_subspaces(
            compression * config.tree.spill, tower_width=tower_width,
            num_codewords=codewords,
        )  # fmt: skip
    return JointIndex(
        tower_width=tower_width,
        width=config.head.width or tower_width,
        head_hidden=config.head.hidden,
        query_head=config.head.query_head,
        tower=inputs.tower if trains_tower else None,
        query_tower=inputs.fresh_tower() if own_tower else None,
        tree=tree,
        num_subspaces=subspaces,
        num_codewords=codewords,
        rotation=config.leaves.rotation if system.pq else "none",
        residual=bool(config.leaves.residual and system.pq and system.tree),
        frozen_codes=config.leaves.frozen_codes,
        codeword_gradient=config.leaves.codeword_gradient,
        rngs=nnx.Rngs(config.seed),
    )


def _tree(c, num_documents: int) -> dict:
    """The `tree` argument of `JointIndex`, for a corpus that can fill its leaves."""
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
