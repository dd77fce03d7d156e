"""How far documents and leaves have moved since an index was built."""

import json

import index_reference as reference
import numpy as np
import pytest

from ehi.index import Shard, build_folder, build_index, open_index, save_index

WIDTH, NUM, LEAVES = 8, 400, 8
RNG = np.random.default_rng(7)


def near(centres, num):
    """Unit vectors around some of the centres."""
    x = centres[RNG.integers(len(centres), size=num)]
    x = x + 0.1 * RNG.standard_normal((num, WIDTH))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


CENTRES = RNG.standard_normal((LEAVES, WIDTH))
CENTRES /= np.linalg.norm(CENTRES, axis=1, keepdims=True)
X, SAME = near(CENTRES, NUM), near(CENTRES, NUM)
OTHER = near(RNG.standard_normal((3, WIDTH)), NUM)
TREE = {"kind": "per_node", "scale": 8.0, "nodes": [CENTRES[None].astype(np.float32)]}
ROTATION = reference.make_rotation(WIDTH, RNG)
PARTS = (X @ ROTATION).reshape(NUM, 4, 2)
CODES = {
    "rotation": ROTATION,
    # Sixteen documents are the codewords of each sub-space.
    "codebooks": np.ascontiguousarray(PARTS[:16].transpose(1, 0, 2)),
}
KINDS = {
    "codes": CODES,
    "spilled": {**CODES, "spill": 2, "score": "cosine"},
    "residual": {
        "codebooks": RNG.standard_normal((4, 16, 2)).astype(np.float32) / 10,
        "leaf_centroids": CENTRES.astype(np.float32),
        "score": "corrected",
    },
    "assigned": {**CODES, "assign_codebooks": CODES["codebooks"] / 2},
}


def make(kind="codes"):
    return build_index(X, range(NUM), tree=TREE, **KINDS[kind])


def expected_distortion(index, x, rows, leaves):
    """Mean |x - x^|^2 of documents, by the nearest codewords in float64."""
    books = (
        index.codebooks if index.assign_codebooks is None else index.assign_codebooks
    )
    turn = np.eye(WIDTH) if index.rotation is None else index.rotation
    total = 0.0
    for row, leaf in zip(rows, leaves, strict=True):
        vector = x[row].astype(np.float64)
        if index.leaf_centroids is not None:
            vector = vector - index.leaf_centroids[leaf]
        parts = (vector @ turn).reshape(len(books), 1, -1)
        total += ((parts - books) ** 2).sum(axis=2).min(axis=1).sum()
    return total / len(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distortion_is_that_of_the_codes(kind):
    index = make(kind)
    segment = index.segments[0]
    leaves = np.repeat(np.arange(LEAVES), np.diff(segment.leaf_offsets))
    expected = expected_distortion(index, X, segment.leaf_rows, leaves)
    assert index.drift().distortion_built == pytest.approx(expected, rel=1e-3)
    assert index.drift().distortion_added is None
    index.add(SAME[:50], range(NUM, NUM + 50))
    index.add(OTHER[:20], range(NUM + 50, NUM + 70))
    total = 0.0
    for part, x in zip(index.segments[1:], (SAME, OTHER), strict=True):
        leaves = np.repeat(np.arange(LEAVES), np.diff(part.leaf_offsets))
        total += len(part) * expected_distortion(index, x, part.leaf_rows, leaves)
    assert index.drift().distortion_added == pytest.approx(total / 70, rel=1e-3)


def test_another_distribution_raises_distortion_and_imbalance_the_same_does_not():
    for added, factor in ((SAME, 1.1), (OTHER, None)):
        index = make()
        before = index.drift(SAME[:50], beam=2)
        assert before.visited_built == before.visited_now
        assert before.imbalance_built == before.imbalance_now == index.leaf_load_cv
        index.add(added, range(NUM, 2 * NUM))
        after = index.drift(SAME[:50], beam=2)
        if factor:
            assert after.distortion_added < factor * after.distortion_built
            assert after.imbalance_now < 1.3 * after.imbalance_built
        else:
            assert after.distortion_added > 1.5 * after.distortion_built
            assert after.imbalance_now > 1.5 * after.imbalance_built
        assert (after.documents_built, after.documents_added) == (NUM, NUM)


def test_visited_shares_are_those_of_a_search():
    index = make()
    queries = OTHER[:30]
    share = index.search(queries, beam=2).visited.mean() / NUM
    assert index.drift(queries, beam=2).visited_built == pytest.approx(share)
    index.add(OTHER, range(NUM, 2 * NUM))
    index.delete(range(NUM // 2))
    found = index.drift(queries, beam=2)
    now = index.search(queries, beam=2).visited.mean() / index.num_documents
    assert found.visited_built == pytest.approx(share)
    assert found.visited_now == pytest.approx(now) and now > share
    some = index.drift(queries, beam=LEAVES, min_prob=0.2)
    now = index.search(queries, beam=LEAVES, min_prob=0.2).visited.mean()
    assert some.visited_now == pytest.approx(now / index.num_documents)
    tuned = index.tune(SAME[:50], 0.9, save=True)
    found = index.drift(queries)  # at the stored setting
    assert found.visited_tuned == tuned.visited_mean / index.num_documents
    now = index.search(queries).visited.mean() / index.num_documents
    assert found.visited_now == pytest.approx(now)
    assert "when tuned" in str(found)
    assert "visited" not in str(index.drift())


@pytest.mark.parametrize("kind", ["codes", "residual"])
def test_what_was_built_survives_updates_compaction_and_copies(tmp_path, kind):
    index = make(kind)
    save_index(index, tmp_path / "index")
    shards = [Shard(X[:150], range(150)), Shard(X[150:], range(150, NUM))]
    build_folder(tmp_path / "streamed", shards, tree=TREE, **KINDS[kind])
    streamed = open_index(tmp_path / "streamed")
    assert (
        streamed.drift(SAME)
        == index.drift(SAME)
        == (open_index(tmp_path / "index").drift(SAME))
    )
    stored = open_index(tmp_path / "index")
    for one in (index, stored):
        one.add(OTHER, range(NUM, 2 * NUM))
        one.delete(range(100))
        expected = one.drift(SAME)
        assert expected.documents_now == 2 * NUM - 100
        one.compact()
        assert one.drift(SAME) == expected
        one.add(SAME[:7], range(2 * NUM, 2 * NUM + 7))
        one.compact()
        again = one.drift(SAME)
        assert again.documents_added == NUM + 7
        assert again.imbalance_built == expected.imbalance_built
    assert open_index(tmp_path / "index", verify=True).drift(SAME) == index.drift(SAME)
    stored.delete([150])
    save_index(stored, tmp_path / "copy")
    assert open_index(tmp_path / "copy").drift(SAME) == stored.drift(SAME)
    reader = open_index(tmp_path / "copy")
    assert not reader.refresh()


def test_raw_leaves_and_flat_indexes():
    raw = build_index(X, range(NUM), tree=TREE)
    raw.add(OTHER, range(NUM, 2 * NUM))
    assert raw.drift().distortion_built is raw.drift().distortion_added is None
    assert "distortion" not in str(raw.drift())
    flat = build_index(X, range(NUM), tree=None)
    flat.delete(range(NUM))
    assert flat.drift(X).visited_now == 0 and flat.drift().documents_now == 0


def test_a_folder_without_a_history_says_what_its_first_segment_does(tmp_path):
    index = make()
    save_index(index, tmp_path / "index")
    file = tmp_path / "index" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["history"]
    file.write_text(json.dumps(manifest))
    old = open_index(tmp_path / "index")
    assert old.drift(SAME).visited_built == index.drift(SAME).visited_built
    assert old.drift().distortion_built is None
    for one in (old, index):
        one.add(OTHER, range(NUM, 2 * NUM))
        one.compact()
    new, old = index.drift(SAME), old.drift(SAME)
    assert "unknown built" in str(old)
    assert old.distortion_added == new.distortion_added
    assert old.imbalance_built == new.imbalance_built


@pytest.mark.parametrize(
    "change",
    [{"documents": -1}, {"documents": None}, {"added": 1.5}, {"distortion": -1},
     {"added_distortion": "a"}],
)  # fmt: skip
def test_a_damaged_history_is_refused(tmp_path, change):
    save_index(make(), tmp_path / "index")
    file = tmp_path / "index" / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["history"] |= change
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="do not fit together"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": X[:0]}, "there are no queries"),
        ({"queries": X[:, :3]}, r"shape \(N, 8\)"),
        ({"queries": X * np.inf}, "NaN or infinity"),
        ({"queries": X, "beam": 9}, "beam 9 is larger than the 8 leaves"),
        ({"queries": X, "beam": 2, "min_prob": 2}, "min_prob must be a number"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().drift(**arguments)
