import index_reference as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_cases import all_arrays

from ehi.index import build_index
from ehi.index.build import encode_pq
from ehi.index.search.codes import byte_codebooks, decode, pack_codes

WIDTH = 4
RNG = np.random.default_rng(5)
X = RNG.standard_normal((20, WIDTH)).astype(np.float32)
TREE = reference.make_tree("per_node", 2, 3, WIDTH, RNG)
CODEBOOKS = RNG.standard_normal((2, 16, 2)).astype(np.float32)
NAN_ROW = X.copy()
NAN_ROW[3, 1] = np.nan


def test_leaves_hold_every_document_in_its_top_leaves_once():
    index = build_index(X, range(20), tree=TREE, spill=2)
    stored = [
        (int(index.segments[0].leaf_rows[copy]), leaf)
        for leaf in range(9)
        for copy in range(*index.segments[0].leaf_offsets[leaf : leaf + 2])
    ]
    top = [np.argsort(-reference.leaf_log_probs(x, TREE))[:2].tolist() for x in X]
    expected = [(row, leaf) for row, leaves in enumerate(top) for leaf in leaves]
    assert sorted(stored) == sorted(expected)
    assert (index.segments[0].vectors == X[index.segments[0].leaf_rows]).all()


@pytest.mark.parametrize("codebooks", [None, CODEBOOKS])
@pytest.mark.parametrize(("tree", "spill"), [(TREE, 3), (TREE, 1), (None, 1)])
def test_progress_counts_leaves_and_codes_of_every_document(tree, spill, codebooks):
    done, many = [], RNG.standard_normal((5000, WIDTH)).astype(np.float32)
    options = {"tree": tree, "spill": spill, "codebooks": codebooks}
    index = build_index(many, range(5000), progress=done.append, **options)
    assert sum(done) == 2 * 5000
    silent = all_arrays(build_index(many, range(5000), **options))
    for name, found in all_arrays(index).items():
        assert (found == silent[name]).all()
    if codebooks is not None:
        assert len(done) >= 1 + 5000 * spill // 2048


@pytest.mark.parametrize("codebooks", [None, CODEBOOKS])
def test_given_leaves_hold_the_documents_and_added_ones_follow_the_tree(codebooks):
    """JTR moves documents to leaves that the tree would not choose."""
    leaves = np.array([RNG.permutation(9)[:2] for _ in range(20)], np.int32)
    options = {"tree": TREE, "codebooks": codebooks, "spill": 2}
    index = build_index(X, range(20), leaves=leaves, **options)
    (segment,) = index.segments
    for leaf in range(9):
        rows = segment.leaf_rows[slice(*segment.leaf_offsets[leaf : leaf + 2])]
        assert rows.tolist() == np.flatnonzero((leaves == leaf).any(axis=1)).tolist()
    whole = index.search(X, 20, beam=9)
    assert (whole.visited == 2 * 20).all() and (np.sort(whole.ids) == range(20)).all()
    hits = index.search(X, 20, beam=3)  # a beam of 3 keeps all nodes of level 1
    for x, ids in zip(X, hits.ids, strict=True):  # a query finds what its leaves hold
        seen = np.argsort(-reference.leaf_log_probs(x, TREE), kind="stable")[:3]
        there = np.flatnonzero(np.isin(leaves, seen).any(axis=1))
        assert sorted(ids[ids >= 0].tolist()) == there.tolist()
    more = build_index(X, range(20), leaves=leaves, **options)
    more.add(X[:3], [100, 101, 102])
    tops = [np.argsort(-reference.leaf_log_probs(x, TREE))[:2] for x in X[:3]]
    added = more.segments[1]
    for leaf in range(9):
        rows = added.leaf_rows[slice(*added.leaf_offsets[leaf : leaf + 2])].tolist()
        assert rows == [row for row, top in enumerate(tops) if leaf in top]
    more.compact()
    assert more.search(X[:1], 1, beam=9).ids.tolist() in ([[0]], [[100]])


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (np.zeros((20, 1), int), r"shape \(20, 2\), got int64 of shape \(20, 1\)"),
        (np.zeros((20, 2)), "whole numbers .* got float64"),
        ([[0, 1]] * 19 + [[0, 9]], "leaves has 9 in row 19; allowed: 0 to 8"),
        ([[0, -1]] * 20, "leaves has -1 in row 0"),
        ([[0, 1]] * 5 + [[4, 4]] + [[0, 1]] * 14, "one leaf twice in row 5"),
    ],
)
def test_leaves_that_do_not_fit_are_refused(leaves, message):
    with pytest.raises(ValueError, match=message):
        build_index(X, range(20), tree=TREE, spill=2, leaves=leaves)


def test_sizes_and_loads_count_what_is_stored():
    index = build_index(X, range(20), tree=TREE, spill=2)
    assert index.bytes_per_doc == 2 * 4 * WIDTH
    assert index.index_bytes == sum(a.nbytes for a in all_arrays(index).values())
    sizes = np.bincount(
        [leaf for leaf in range(9) for _ in range(index.leaf_sizes[leaf])]
    )
    assert index.leaf_load_max == sizes.max() and sizes.sum() == 40
    assert index.leaf_load_cv == pytest.approx(index.leaf_sizes.std() / (40 / 9))

    half = build_index(X, range(20), tree=TREE, leaf_dtype="float16")
    assert half.bytes_per_doc == 2 * WIDTH
    codes = build_index(X, range(20), tree=TREE, codebooks=CODEBOOKS)
    assert codes.bytes_per_doc == 1  # two sub-spaces of four bits
    both = build_index(
        X, range(20), tree=TREE, codebooks=CODEBOOKS, spill=2, rerank_vectors=True
    )
    assert both.bytes_per_doc == 2 * 1 + 2 * WIDTH


def test_leaf_paths_are_mixed_radix_numbers():
    index = build_index(X, range(20), tree=TREE)
    paths = [index.leaf_path(leaf) for leaf in range(9)]
    assert paths == [(a, b) for a in range(3) for b in range(3)]
    assert build_index(X, range(20), tree=None).leaf_path(0) == ()
    with pytest.raises(ValueError, match="leaf 9 is outside the 9 leaves"):
        index.leaf_path(9)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([(1, 256), (3, 256), (2, 16), (6, 16)]), st.integers(0, 99))
def test_codes_are_the_nearest_codewords_and_decode_to_them(shape, seed):
    rng = np.random.default_rng(seed)
    codebooks = rng.standard_normal((*shape, 3)).astype(np.float32)
    x = rng.standard_normal((5, shape[0] * 3)).astype(np.float32)
    codes = encode_pq(x, codebooks)
    parts = x.reshape(5, shape[0], 1, 3)
    nearest = ((parts - codebooks) ** 2).sum(axis=3).argmin(axis=2)
    assert (codes == nearest).all()

    stored, of_bytes = pack_codes(codes, shape[1]), byte_codebooks(codebooks)
    assert stored.shape[1] * (256 // shape[1] if shape[1] == 16 else 1) >= shape[0]
    words = np.take_along_axis(codebooks[None], codes[:, :, None, None], axis=2)
    known = decode(stored, of_bytes)
    assert (known == words[:, :, 0].reshape(x.shape)).all()


def test_four_bit_codes_take_half_the_bytes():
    codes = np.array([[1, 2, 15, 0]])
    assert pack_codes(codes, 16).tolist() == [[1 + 2 * 16, 15]]
    assert pack_codes(codes, 256).tolist() == codes.tolist()


def test_string_and_integer_ids_come_back():
    queries = X[:3]
    strings = build_index(X, [f"dök/{i}" for i in range(20)], tree=None)
    assert strings.search(queries, 1).ids[:, 0].tolist() != [None] * 3
    for query in range(3):
        hits = strings.search(queries[query : query + 1], 25)
        assert hits.ids.dtype == object and hits.ids[0, 20:].tolist() == [None] * 5
        assert hits.ids[0, :20].tolist() == [f"dök/{row}" for row in hits.rows[0, :20]]
    numbers = build_index(X, np.arange(20) * 10**12, tree=None).search(queries, 25)
    assert numbers.ids.dtype == np.int64 and (numbers.ids[:, 20:] == -1).all()
    assert (numbers.ids[:, :20] == numbers.rows[:, :20] * 10**12).all()


BAD = {
    "an empty corpus": {"embeddings": X[:0], "doc_ids": []},
    "embeddings must be floats": {"embeddings": np.ones((20, WIDTH), int)},
    r"NaN or infinity in 1 rows, first in row 3": {"embeddings": NAN_ROW},
    "embeddings hold a value too large for float16": {
        "embeddings": X * 1e6,
        "leaf_dtype": "float16",
    },
    "19 doc_ids for 20 embeddings": {"doc_ids": range(19)},
    "doc_ids repeat: 5 is there twice": {"doc_ids": [*range(19), 5]},
    "all strings or all integers .* got 'a' among 20": {"doc_ids": [*range(19), "a"]},
    "integers from 0 .* got -1 among": {"doc_ids": range(-1, 19)},
    "got True among 20": {"doc_ids": [True, *range(2, 21)]},
    "integer ids are from 0 to 2.63 - 1, got 9223372036854775808": {
        "doc_ids": np.arange(20, dtype=np.uint64) + np.uint64(2**63)
    },
    "integers .* got 1180591620717411303424 among": {"doc_ids": [*range(19), 2**70]},
    "several in a row, .* got 'abcdefghijklmnopqrst'": {
        "doc_ids": "abcdefghijklmnopqrst"
    },
    "a tree of 9 leaves is too large for 8 documents": {
        "embeddings": X[:8],
        "doc_ids": range(8),
    },
    "spill 10 is larger than the 9 leaves": {"spill": 10},
    "spill must be at least 1": {"spill": 0},
    "leaf_dtype must be one of .*'float32', 'float16'.*, got 'int8'": {
        "leaf_dtype": "int8"
    },
    "rotation needs codebooks": {"rotation": np.eye(WIDTH)},
    "rotation is not orthogonal": {
        "rotation": np.eye(WIDTH) * 1.01,
        "codebooks": CODEBOOKS,
    },
    r"rotation must be floats of shape \(4, 4\)": {
        "rotation": np.eye(3),
        "codebooks": CODEBOOKS,
    },
    "D must be divisible by M": {"codebooks": np.ones((3, 16, 1))},
    "K = 16 or 256, got 8": {"codebooks": np.ones((2, 8, 2))},
    "M = 1 must be even": {"codebooks": np.ones((1, 16, 4))},
    r"leaf_centroids must be floats of shape \(9, 4\)": {
        "leaf_centroids": np.ones((8, 4)),
        "codebooks": CODEBOOKS,
    },
    "tree kind must be 'per_node' or 'per_level', got 'forest'": {
        "tree": {"kind": "forest"}
    },
    "a per_node tree holds": {"tree": {"kind": "per_node", "nodes": TREE["nodes"]}},
    r"tree nodes\[1\] must be floats of shape \(3, 3, 4\)": {
        "tree": TREE | {"nodes": [TREE["nodes"][0], TREE["nodes"][0]]}
    },
    "query_tree and tree must have the same height and branching": {
        "query_tree": TREE | {"nodes": TREE["nodes"][:1]}
    },
    "encoder must be plain JSON": {"encoder": {"weights": X}},
    "encoder must be a dict .* got 'minilm'": {"encoder": "minilm"},
    "codebooks hold NaN": {"codebooks": np.full((2, 16, 2), np.nan)},
    "tree.nodes.0 hold NaN": {
        "tree": TREE | {"nodes": [TREE["nodes"][0] * np.nan, TREE["nodes"][1]]}
    },
    "query_head names must be plain words": {"query_head": {"../x": X}},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_builds_are_refused(words):
    arguments = {"embeddings": X, "doc_ids": range(20), "tree": TREE} | BAD[words]
    with pytest.raises(ValueError, match=words):
        build_index(**arguments)
