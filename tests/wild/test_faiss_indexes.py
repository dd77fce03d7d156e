"""Indexes of Faiss as deployments hold them: ids kept, or refused naming the kind.

The expected results are those of Faiss's own search (faiss-cpu 1.15). A case that
failed before its test was written has `failed` at the end of its id or of its test's
name, others have `passed`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
from wild_cases import failed, passed

faiss = pytest.importorskip("faiss")
sys.path.insert(0, str(Path(__file__).parents[1] / "index"))

from faiss_cases import NUM, PRODUCT, QUERIES, WIDTH, X, trained  # noqa: E402

from ehi.index import from_faiss, open_index, save_index  # noqa: E402

pytestmark = pytest.mark.faiss
IDS = np.random.default_rng(3).permutation(10**12 + 3 * np.arange(NUM))
UNIT = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True)


def assert_same_as_faiss(index, source, queries=QUERIES, k=15, nprobe=None):
    """The same ids in order, if neighbours are apart; the same scores."""
    if nprobe is not None:
        faiss.extract_index_ivf(source).nprobe = nprobe
    scores, ids = source.search(queries, k)
    hits = index.search(queries, k, beam=nprobe or 1)
    if source.metric_type == faiss.METRIC_L2:
        scores = (1 + 1 - scores) / 2  # |q - x|^2 = 2 - 2 q.x of unit vectors
    finite = ids >= 0
    assert ((hits.ids >= 0) == finite).all()
    np.testing.assert_allclose(hits.scores[finite], scores[finite], atol=1e-4)
    gaps = np.diff(scores, axis=1, append=-np.inf) < -1e-4
    clear = gaps & np.pad(gaps, ((0, 0), (1, 0)), constant_values=True)[:, :-1]
    clear[:, -1] = False  # the one after the last is not seen
    assert (hits.ids == ids)[clear & finite].all() and clear.mean() > 0.5


@pytest.mark.parametrize(
    "recipe",
    [
        failed("IDMap,Flat"),
        failed("IDMap2,Flat"),
        failed("IDMap,RR,Flat"),
        failed("RR,IDMap,Flat"),
        failed("IDMap,IVF12,Flat"),
        failed("IDMap2,IVF12,PQ8x8np"),
        failed("IDMap2,RR,IVF12,PQ8x4np"),
        passed("IVF12,Flat"),
    ],
)
def test_ids_are_kept(recipe):
    source = trained(recipe, IDS)
    index = from_faiss(source)
    assert sorted(index.external_ids(np.arange(NUM)).tolist()) == sorted(IDS.tolist())
    for nprobe in (3, 12) if "IVF" in recipe else (None,):
        assert_same_as_faiss(index, source, nprobe=nprobe)


@pytest.mark.parametrize("metric", [PRODUCT, faiss.METRIC_L2])
@pytest.mark.parametrize(
    "recipe",
    [
        failed("L2norm,Flat"),
        failed("L2norm,IVF12,Flat"),
        failed("RR,L2norm,Flat"),
        failed("IDMap,L2norm,Flat"),
    ],
)
def test_vectors_that_faiss_normalises_are_taken(recipe, metric):
    source = faiss.index_factory(WIDTH, recipe, metric)
    source.train(X)
    if recipe.startswith("IDMap"):
        source.add_with_ids(X, IDS)
    else:
        source.add(X)
    index = from_faiss(source)
    vectors = index.segments[0].vectors
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    nprobe = 4 if "IVF" in recipe else None
    assert_same_as_faiss(index, source, UNIT, nprobe=nprobe)
    if nprobe is None and metric == PRODUCT:  # longer queries rank alike: scores scale
        hits, scaled = index.search(UNIT, 5), index.search(7 * UNIT, 5)
        assert (hits.ids == scaled.ids).all()


@pytest.mark.parametrize(
    "recipe",
    [
        failed("IVF12,PQ8x8np"),
        failed("OPQ8,IVF12,PQ8x4np"),
        failed("L2norm,RR,IVF12,PQ8x8np"),
        failed("PQ8x8"),
        failed("IDMap2,OPQ8,PQ8x4np"),
        failed("Flat"),
        failed("IVF12,Flat"),
    ],
)
def test_l2_indexes_of_unit_vectors_are_taken(recipe):
    source = faiss.index_factory(WIDTH, recipe)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    source.train(unit)
    source.add_with_ids(unit, IDS) if recipe.startswith("IDMap") else source.add(unit)
    index = from_faiss(source)
    assert index.score == ("l2" if "PQ" in recipe else "ip")
    for nprobe in (3, 12) if "IVF" in recipe else (None,):
        assert_same_as_faiss(index, source, UNIT, nprobe=nprobe)


def test_pq_by_inner_product_is_taken_failed():
    source = trained("PQ8x8")
    assert_same_as_faiss(from_faiss(source), source)


def test_l2_of_vectors_that_do_not_have_unit_norm_is_refused_passed():
    """A zero vector stays zero behind an L2norm, and L2 ranks it before others."""
    source = faiss.index_factory(WIDTH, "L2norm,Flat", faiss.METRIC_L2)
    source.add(np.concatenate([X, 0 * X[:1]]))
    with pytest.raises(ValueError, match="IndexFlat.* ranks by L2 distance"):
        from_faiss(source)


def test_removed_documents_of_an_id_map_are_gone_failed():
    source = trained("IDMap,Flat", IDS)
    source.remove_ids(IDS[:100])
    index = from_faiss(source)
    assert index.num_documents == NUM - 100
    assert_same_as_faiss(index, source)


def test_names_are_given_by_the_ids_of_an_id_map_failed():
    source = trained("IDMap2,Flat", np.arange(NUM)[::-1].copy())
    index = from_faiss(source, [f"n{number}" for number in range(NUM)])
    hits, (_, ids) = index.search(QUERIES, 1), source.search(QUERIES, 1)
    assert hits.ids[:, 0].tolist() == [f"n{number}" for number in ids[:, 0]]


@pytest.mark.parametrize("change", ["negative", "twice"])
def test_ids_of_an_id_map_that_do_not_fit_are_refused_failed(change):
    """Faiss takes any int64 and the same id twice; an Index has neither."""
    ids = np.arange(NUM)
    ids[5] = {"negative": -7, "twice": 6}[change]
    words = {"negative": "ids start from 0.*has -7", "twice": "id 6 is twice in one"}
    with pytest.raises(ValueError, match=words[change]):
        from_faiss(trained("IDMap,Flat", ids))


def test_an_id_map_of_lists_without_some_documents_failed():
    """Faiss removes no ids from an IDMap around lists as it does from a flat one."""
    source = trained("IDMap,IVF4,Flat", IDS)
    source.id_map.resize(NUM - 9)
    with pytest.raises(ValueError, match=f"has {NUM - 9} ids, none for document"):
        from_faiss(source)


@pytest.mark.parametrize("kind", ["Array", "Hashtable"])
def test_a_direct_map_of_either_kind_changes_nothing_passed(kind):
    source = trained("IVF12,Flat")
    source.set_direct_map_type(getattr(faiss.DirectMap, kind))
    assert_same_as_faiss(from_faiss(source), source, nprobe=3)


def test_an_index_from_a_file_and_back_to_a_folder_failed(tmp_path):
    faiss.write_index(trained("IDMap2,L2norm,Flat", IDS), str(tmp_path / "x.faiss"))
    source = faiss.read_index(str(tmp_path / "x.faiss"))
    save_index(from_faiss(source), tmp_path / "index")
    assert_same_as_faiss(open_index(tmp_path / "index"), source, UNIT)


def test_lists_in_a_file_are_read_passed(tmp_path):
    source = trained("IVF12,Flat", add=False)
    lists = faiss.OnDiskInvertedLists(12, 4 * WIDTH, str(tmp_path / "lists"))
    source.replace_invlists(lists)
    source.add(X)
    assert_same_as_faiss(from_faiss(source), source, nprobe=4)


def test_a_list_with_all_documents_and_empty_lists_passed():
    source = trained("IVF12,Flat", add=False)
    source.add(np.tile(X[:1], (50, 1)))
    index = from_faiss(source)
    assert sorted(index.leaf_sizes.tolist()) == [0] * 11 + [50]
    hits = index.search(X[:1], 60, beam=12)
    assert hits.ids[0].tolist() == [*range(50), *[-1] * 10]


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("HNSW8", "IndexHNSWFlat"),
        ("IDMap,HNSW8", "IndexHNSWFlat"),
        ("IVF4,Flat,RFlat", "IndexRefineFlat"),
        ("IVF4,PQ8x4np,Refine(Flat)", "IndexRefine"),
        ("PQ8x4fs", "IndexPQFastScan"),
        ("SQ8", "IndexScalarQuantizer"),
        ("LSH", "IndexLSH"),
        ("IVF4,SQfp16", "IndexIVFScalarQuantizer"),
        ("IVF4,PQ8x4fs", "IndexIVFPQFastScan"),
    ],
)
def test_other_kinds_are_refused_by_their_name_passed(recipe, kind):
    metric = faiss.METRIC_L2 if recipe == "LSH" else PRODUCT
    source = faiss.index_factory(WIDTH, recipe, metric)
    with pytest.raises(ValueError, match=rf"^cannot take {kind}; allowed are [^\n]*$"):
        from_faiss(source)


@pytest.mark.parametrize(
    "source",
    [
        faiss.IndexBinaryFlat(16),
        faiss.IndexShards(WIDTH),
        faiss.IndexReplicas(WIDTH),
        faiss.PCAMatrix(WIDTH, WIDTH),
        None,
        "index.faiss",
    ],
    ids=lambda source: type(source).__name__,
)
def test_what_is_no_index_of_vectors_is_refused_passed(source):
    with pytest.raises(ValueError, match=f"cannot take {type(source).__name__}; all"):
        from_faiss(source)


@pytest.mark.parametrize("recipe", ["IDMap,Flat", "L2norm,Flat", "IVF4,Flat"])
def test_an_empty_index_is_refused_passed(recipe):
    with pytest.raises(ValueError, match="this Faiss index is empty"):
        from_faiss(trained(recipe, add=False))


def test_vectors_that_are_not_finite_are_refused_passed():
    source = faiss.IndexFlatIP(WIDTH)
    source.add(np.where(np.arange(NUM)[:, None] == 9, np.nan, X).astype(np.float32))
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows, first in row 9"):
        from_faiss(source)
