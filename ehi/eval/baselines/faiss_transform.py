"""Transforms of vectors before Faiss codes them: rotations, principal axes, bits.

Documents are centred where that helps their codes. Queries are not, if the score is the
inner product: q . x = q . mean + q . (x - mean), and q . mean is the same for all.
"""

from typing import Any, NamedTuple

import numpy as np

from ehi.eval.baselines.options import RABITQ_FACTORS

# Each round has one iteration of k-means. Four take up to 3 times as long and end at
# the same distortion (1 and 4: 0.190 and 0.191 on pydocs at 24 bytes, 0.107 and 0.108
# on SciFact at 48). Codebooks that are fitted afresh to the rotation end at 0.198.
_OPQ_ROUNDS = 50
_BITS = 8  # bits of a code, and dimensions of a subspace of sign bits


class Transformed(NamedTuple):
    """Documents that are ready to be coded.

    Attributes:
        rows: (N, D') float32.
        of_queries: the transform of queries, or None.
        codebooks: (M K S,) start or, of `patterns`, value of the codebooks, or None.
        patterns: whether the codebooks are sign patterns, which need no training.
    """

    rows: np.ndarray
    of_queries: Any = None
    codebooks: np.ndarray | None = None
    patterns: bool = False


def transformed(faiss, name, documents, code_bytes, seed, options) -> Transformed:
    """Documents as the index called `name` codes them, and the transform of queries.

    Raises:
        ValueError: there are fewer documents than principal axes.
    """
    if "opq" in name or options.get("rotation") == "opq":
        subspaces, bits = code_bytes, 8
        if name == "faiss-fastscan":
            subspaces, bits = 2 * code_bytes, 4
        return _opq(faiss, documents, subspaces, bits, seed, options)
    if name in ("lsh", "itq-lsh"):
        return _sign_bits(faiss, name, documents, code_bytes, seed, options)
    if name == "binary-int8":
        return _bits_and_numbers(faiss, documents, code_bytes, seed, options)
    if name in ("faiss-rabitq", "faiss-ivfrabitq"):
        kept = min(_BITS * (code_bytes - RABITQ_FACTORS), documents.shape[1])
        kept -= kept % _BITS
        if options["reduce"] == "random":
            matrix = _random_rotation(faiss, documents.shape[1], kept, seed)
            return _by_matrix(faiss, documents, matrix, None)
        return _reduced(faiss, documents, kept, seed, options)
    if name == "faiss-pca-pq":
        blocks = round(options["kept"] * documents.shape[1] / code_bytes)
        return _reduced(faiss, documents, max(1, blocks) * code_bytes, seed, options)
    if name == "faiss-sq":
        kept = min(documents.shape[1], code_bytes * _BITS // options["bits"])
        return _reduced(faiss, documents, kept, None, options)
    return Transformed(documents)


def _opq(faiss, documents, subspaces, bits, seed, options) -> Transformed:
    width = documents.shape[1]
    transform = faiss.OPQMatrix(width, subspaces, width)
    transform.niter, transform.niter_pq = _OPQ_ROUNDS, 1
    transform.max_train_points = len(documents)
    # Without a start Faiss draws its first rotation from a fixed seed.
    if options.get("start") == "pca":
        start = _balanced_axes(documents, subspaces)
    else:
        random = np.random.default_rng(seed).standard_normal((width, width))
        start = np.linalg.qr(random)[0].astype(np.float32)
    faiss.copy_array_to_vector(start.ravel(), transform.A)
    quantiser = faiss.ProductQuantizer(width, subspaces, bits)
    quantiser.cp.seed = seed
    quantiser.cp.max_points_per_centroid = len(documents)
    quantiser.cp.min_points_per_centroid = 1
    transform.pq = quantiser
    transform.train(documents)
    transform.pq = None  # Python frees the quantiser when this function returns
    codebooks = faiss.vector_to_array(quantiser.centroids)
    return Transformed(transform.apply(documents), transform, codebooks)


def _balanced_axes(documents, subspaces) -> np.ndarray:
    """Principal axes (D, D), dealt so that subspaces have like products of variance.

    It is the parametric solution of OPQ (Ge et al. 2013, section 3.2).
    """
    variances, axes = np.linalg.eigh(np.cov(documents, rowvar=False))
    room = np.full(subspaces, documents.shape[1] // subspaces)
    product, dealt = np.zeros(subspaces), [[] for _ in range(subspaces)]
    for axis in np.argsort(-variances, kind="stable"):
        best = np.where(room > 0, product, np.inf).argmin()
        dealt[best].append(axis)
        product[best] += np.log(max(variances[axis], 1e-12))
        room[best] -= 1
    return np.ascontiguousarray(axes[:, np.concatenate(dealt)].T, np.float32)


def _principal(faiss, documents, kept) -> np.ndarray:
    """The first principal axes (kept, D), largest variance first."""
    if len(documents) < kept:
        raise ValueError(
            f"{len(documents)} documents are fewer than {kept} principal axes"
        )
    transform = faiss.PCAMatrix(documents.shape[1], kept)
    transform.max_points_per_d = 10**6
    transform.train(documents)
    return faiss.vector_to_array(transform.A).reshape(kept, documents.shape[1])


def _random_rotation(faiss, width, kept, seed) -> np.ndarray:
    """Orthonormal rows or columns (kept, D)."""
    transform = faiss.RandomRotationMatrix(width, kept)
    transform.init(seed)
    return faiss.vector_to_array(transform.A).reshape(kept, width)


def _by_matrix(faiss, documents, matrix, mean, *, centred_queries=False) -> Transformed:
    """Documents minus a mean, or None, times a matrix (D', D); queries likewise."""
    matrix = np.ascontiguousarray(matrix, np.float32)
    shifted = documents if mean is None else documents - mean
    rows = np.ascontiguousarray(shifted @ matrix.T, np.float32)
    bias = centred_queries and mean is not None
    linear = faiss.LinearTransform(matrix.shape[1], len(matrix), bool(bias))
    faiss.copy_array_to_vector(matrix.ravel(), linear.A)
    if bias:
        shift = (-matrix @ mean).astype(np.float32)
        faiss.copy_array_to_vector(shift, linear.b)
    linear.is_trained = True
    return Transformed(rows, linear)


def _reduced(faiss, documents, kept, seed, options) -> Transformed:
    """The first principal axes of documents minus their mean, rotated with a seed."""
    matrix = _principal(faiss, documents, kept)
    if seed is not None:
        # Now all dimensions have about the same variance.
        matrix = _random_rotation(faiss, kept, kept, seed) @ matrix
    return _by_matrix(
        faiss, documents, matrix, documents.mean(axis=0),
        centred_queries=options["metric"] == "l2",
    )  # fmt: skip


def _sign_bits(faiss, name, documents, code_bytes, seed, options) -> Transformed:
    """Rows whose signs are the bits, with patterns if queries keep their values."""
    width, bits = documents.shape[1], _BITS * code_bytes
    mean = documents.mean(axis=0)
    if name == "lsh":
        # Thresholds at the documents' medians lost recall on pydocs and SciFact at
        # every size when queries were bits as well, because queries lie elsewhere.
        matrix = _random_rotation(faiss, width, bits, seed)
        mean = mean if options["centred"] else None
    elif len(documents) < bits:
        raise ValueError(f"{len(documents)} documents are fewer than {bits} bits")
    elif options["rotation"] == "itq":
        transform = faiss.ITQTransform(width, bits, bits < width)
        transform.itq.seed = seed
        transform.train(documents)
        linear = transform.pca_then_itq
        matrix = faiss.vector_to_array(linear.A).reshape(bits, width)
    else:
        matrix = _random_rotation(faiss, bits, bits, seed)
        matrix = matrix @ _principal(faiss, documents, bits)
    if options["query"] == "bits":
        return _by_matrix(faiss, documents, matrix, mean, centred_queries=True)
    made = _by_matrix(faiss, documents, matrix, mean)
    codebooks = _sign_codebooks(np.abs(made.rows).mean(axis=0))
    return made._replace(codebooks=codebooks.ravel(), patterns=True)


def _sign_codebooks(sizes: np.ndarray) -> np.ndarray:
    """Codewords (M, 256, 8): every pattern of signs of 8 dimensions of some size."""
    signs = 2 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) - 1.0
    return (signs * sizes.reshape(-1, 1, _BITS)).astype(np.float32)


def _bits_and_numbers(faiss, documents, code_bytes, seed, options) -> Transformed:
    """Bytes for the leading principal axes, and sign bits for those that follow.

    Every byte is one subspace of 8 dimensions. A number has one of them to itself, with
    256 levels; the others are empty.
    """
    width = documents.shape[1]
    numbers = min(max(1, round(options["share"] * code_bytes)), code_bytes)
    bits = min(_BITS * (code_bytes - numbers), max(0, width - numbers))
    axes = _principal(faiss, documents, numbers + bits)
    if options["rotation"] == "random" and bits:
        axes[numbers:] = _random_rotation(faiss, bits, bits, seed) @ axes[numbers:]
    matrix = np.zeros((_BITS * code_bytes, width), np.float32)
    matrix[: _BITS * numbers : _BITS] = axes[:numbers]
    matrix[_BITS * numbers :][:bits] = axes[numbers:]
    made = _by_matrix(faiss, documents, matrix, documents.mean(axis=0))
    codebooks = _sign_codebooks(np.abs(made.rows).mean(axis=0))  # (M, 256, 8)
    codebooks[:numbers] = 0
    for number in range(numbers):
        values = made.rows[:, _BITS * number]
        codebooks[number, :, 0] = np.linspace(values.min(), values.max(), 256)
    return made._replace(codebooks=codebooks.ravel(), patterns=True)
