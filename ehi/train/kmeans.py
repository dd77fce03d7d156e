"""k-means: of rows, and down a tree.

A fit is a function of the rows and a key, and uses all rows that it is given: of a
large corpus `ehi.train.starts.fit_starts` passes a sample.
"""

import functools

import jax
import jax.numpy as jnp

from ehi.model.pq import nearest
from ehi.progress import Progress

# Rows whose distances to all centroids are in memory at once.
_CHUNK = 16384


def kmeans(
    x: jax.Array,
    num_clusters: int,
    *,
    iterations: int = 25,
    spherical: bool = False,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Lloyd's k-means from random rows.

    It minimises ``sum_n |x_n - c_a(n)|^2``. Spherical k-means has unit centroids, so it
    maximises ``sum_n <x_n, c_a(n)>`` (Dhillon and Modha 2001). No iteration makes the
    objective worse: an empty cluster moves to the row farthest from its centroid.

    Args:
      x: rows (N, D), finite.
      num_clusters: K, at most N.
      iterations: number of times that means and assignments are computed.
      spherical: keep the centroids on the unit sphere.
      key: of the random start.

    Returns:
      centroids (K, D), and the nearest one of each row (N,) int32.

    Raises:
      ValueError: there are fewer rows than clusters, or a row is not finite.
    """
    x = check_rows(x, num_clusters, "clusters")
    root = jnp.zeros(len(x), jnp.int32)
    start = jnp.zeros((1, num_clusters, x.shape[1]))
    label = f"k-means of {len(x):,} rows"
    with Progress(label, iterations, "iterations", bar=False) as progress:
        centroids, chosen = _split_groups(
            x, root, start, iterations, key, spherical, progress
        )
    return centroids[0], chosen


def kmeans_tree(
    x: jax.Array, *, height: int, branching: int, iterations: int = 25, key: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Hierarchical spherical k-means: the rows of every node are split in B.

    All nodes of a level are fitted at once, by one k-means in which a row chooses among
    the children of its own node only. So a level needs one compilation.

    Args:
      x: embeddings (N, D), finite; only their directions matter.
      height: H.
      branching: B; the tree has B^H leaves, at most N.
      iterations: of each level.
      key: of the random starts.

    Returns:
      for each level the unit vectors of its children (B^(h-1), B, D), which
      ``Router.start_from`` takes; and the leaf of each row (N,) int32, found by taking
      the best child at each level. A child without rows lies near its node.

    Raises:
      ValueError: there are more leaves than rows, or a row is not finite.
    """
    x = _unit(check_rows(x, branching**height, "leaves"))
    nodes, parents, levels = jnp.zeros(len(x), jnp.int32), _unit(x.mean(0))[None], []
    total = height * iterations
    with Progress("k-means tree", total, "iterations", bar=False) as progress:
        for h in range(height):
            seed_key, noise_key = jax.random.split(jax.random.fold_in(key, h))
            shape = (branching**h, branching, x.shape[1])
            # A node may have fewer rows than children: noise tells the others apart.
            noise = 0.1 * _unit(jax.random.normal(noise_key, shape))
            start = _unit(parents[:, None] + noise)  # (B^h, B, D)
            children, nodes = _split_groups(
                x, nodes, start, iterations, seed_key, True, progress
            )
            levels.append(children)
            parents = children.reshape(-1, x.shape[1])  # (B^(h+1), D)
    return levels, nodes


def _split_groups(x, groups, start, iterations, key, spherical, progress):
    """k-means in all of G groups of rows at once, from random rows of each group.

    Args: x (N, D), groups (N,), start (G, B, D) for groups with fewer than B rows.
    Returns: centroids (G, B, D), and for each row the best one of its group (N,), as a
      number among all G B centroids.
    """
    found = _start(x, groups, start, key)
    for _ in range(iterations):
        found = _refine(x, groups, *found, spherical=spherical)
        jax.block_until_ready(found)  # an iteration counts when it is computed
        progress.update()
    return jax.block_until_ready(found)


@jax.jit
def _start(x, groups, start, key):
    """Random rows of each group as centroids (G, B, D), and the choices (N,)."""
    random = jax.random.uniform(key, (len(x),))
    everywhere = jnp.ones(start.shape[:2], bool)
    start = _move_to_rows(start, everywhere, x, groups, random)
    return start, choose(x, groups, start)


def refine(x, groups, centroids, chosen, *, spherical=False):
    """One iteration of k-means: new centroids (G, B, D) and choices (N,)."""
    flat = centroids.reshape(-1, x.shape[1])  # (G B, D)
    counts = jnp.zeros(len(flat)).at[chosen].add(1.0)
    sums = jnp.zeros_like(flat).at[chosen].add(x)
    means = _unit(sums) if spherical else sums / jnp.maximum(counts, 1.0)[:, None]
    means = jnp.where(counts[:, None] > 0, means, flat)
    empty = counts.reshape(centroids.shape[:2]) == 0  # (G, B)

    def fill(centroids):
        distances = jnp.sum((x - centroids.reshape(flat.shape)[chosen]) ** 2, -1)
        return _move_to_rows(centroids, empty, x, groups, distances)

    means = means.reshape(centroids.shape)
    # Rarely needed after the first iterations; its sort costs as much as all the rest.
    centroids = jax.lax.cond(empty.any(), fill, lambda same: same, means)
    return centroids, choose(x, groups, centroids)


_refine = functools.partial(jax.jit, static_argnames="spherical")(refine)


def _move_to_rows(centroids, which, x, groups, priority):
    """Centroids (G, B, D), those in ``which`` (G, B) moved onto rows of their group.

    The first centroid of a group goes to the group's row of highest priority (N,), the
    second to the next one. When a group has no more rows, a centroid stays.
    """
    order = jnp.lexsort((-priority, groups))  # by group, then by priority
    sizes = jnp.zeros(len(centroids), jnp.int32).at[groups].add(1)
    rank = jnp.cumsum(which, 1) - 1  # (G, B)
    place = (jnp.cumsum(sizes) - sizes)[:, None] + rank
    rows = x[order[jnp.minimum(place, len(x) - 1)]]  # (G, B, D)
    return jnp.where((which & (rank < sizes[:, None]))[:, :, None], rows, centroids)


def choose(x, groups, centroids):
    """The nearest centroid of its group for each row (N,), by chunks of rows."""
    num_groups, branching, width = centroids.shape
    words = centroids.reshape(-1, width)  # (G B, D)
    owner = jnp.arange(len(words))[:, None] // branching

    def of_chunk(chunk):
        rows, group = chunk
        return nearest(words, rows.T, None if num_groups == 1 else owner == group)

    n = len(x)
    if n <= _CHUNK:
        return of_chunk((x, groups))
    x, groups = (
        jnp.pad(a, [(0, -n % _CHUNK)] + [(0, 0)] * (a.ndim - 1)) for a in (x, groups)
    )
    chunks = x.reshape(-1, _CHUNK, width), groups.reshape(-1, _CHUNK)
    return jax.lax.map(of_chunk, chunks).reshape(-1)[:n]


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def check_rows(x, least: int, what: str) -> jax.Array:
    """The rows in float32, if there are at least `least` and all are finite."""
    x = jnp.asarray(x, jnp.float32)
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{least} {what} need as many rows (N, D), got {x.shape}")
    if not jnp.isfinite(x).all():
        bad = int(jnp.argmin(jnp.isfinite(x).all(-1)))
        raise ValueError(f"row {bad} of {len(x)} has a value that is not finite")
    return x
