import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tokens, phase_of

from ehi.data.rows import Counted, SomeRows
from ehi.train.batch import TrainingSet, batch_rows, make_batch, split_batch

PHASE = phase_of(source_weights={"labelled": 3.0, "documents": 0.5})


def batch_of(data, step=0, lengths=(0, 0), mined=None, own=None, **fields):
    phase = dataclasses.replace(PHASE, **fields)
    return make_batch(
        data, phase, seed=0, step=step, lengths=lengths, mined=mined, own=own
    )


def _known(data):
    pairs = set()
    for queries, documents in data.pairs.values():
        pairs |= set(zip(queries.tolist(), documents.tolist(), strict=True))
    return pairs


@pytest.mark.parametrize("pool", [20, 1000])
def test_targets_are_positives_and_other_positives_are_no_negatives(tiny, pool):
    data, _ = tiny
    known = _known(data)
    for step in range(6):
        batch = batch_of(data, step, pool=pool)
        queries, documents = batch["queries"], batch["documents"]
        assert len(documents) == len(set(documents)) == min(pool, data.num_documents)
        for n, query in enumerate(queries):
            target = batch["target"][n]
            assert (query, documents[target]) in known
            for c, document in enumerate(documents):
                other = (query, document) in known and c != target
                assert batch["where"][n, c] == (not other)


def test_a_batch_is_a_pure_function_of_seed_and_step(tiny):
    data, _ = tiny
    one = batch_of(data, 3)
    two = batch_of(data, 3)
    other = batch_of(data, 4)
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert not np.array_equal(one["queries"], other["queries"])


def test_sources_get_their_share_and_weight(tiny):
    data, _ = tiny
    batch = batch_of(data)
    assert (batch["weights"] == 3.0).sum() == 9
    assert (batch["weights"] == 0.5).sum() == 3
    assert ((batch["queries"] >= 40) == (batch["weights"] == 0.5)).all()


def test_mined_negatives_enter_the_pool(tiny):
    data, _ = tiny
    mined = np.full((data.num_queries, 3), -1, np.int32)
    mined[:, 0] = 59
    batches = [
        batch_of(data, step, pool=14, mined=mined, mined_per_query=1, refresh=1)
        for step in range(5)
    ]
    assert all(59 in batch["documents"] for batch in batches)
    drawn = np.unique(np.concatenate([batch["queries"] for batch in batches]))
    for step, batch in enumerate(batches):  # a table of the drawn rows is enough
        some = SomeRows(drawn, mined[drawn])
        other = batch_of(data, step, pool=14, mined=some, mined_per_query=1, refresh=1)
        assert np.array_equal(batch["documents"], other["documents"])


def test_counted_pairs_are_those_that_they_count(tiny):
    data, _ = tiny
    queries, documents = data.pairs["labelled"]
    first, n = 40, data.num_documents
    lists = {
        "labelled": (queries, documents),
        "documents": (first + np.arange(n), np.arange(n)),
        "synthetic": (first + n + np.arange(2 * n), np.tile(np.arange(n), 2)),
    }
    counts = lists | {
        "documents": (Counted(first, n), Counted(0, n)),
        "synthetic": (Counted(first + n, 2 * n), Counted(0, 2 * n, period=n)),
    }
    listed, counted = (
        TrainingSet(first + 3 * n + 5, n, pairs) for pairs in (lists, counts)
    )
    rows = np.random.default_rng(0).permutation(listed.num_queries)
    for mine, theirs in zip(
        counted.positives(rows), listed.positives(rows), strict=True
    ):
        assert mine.tolist() == theirs.tolist()
    assert counted.most_positives == listed.most_positives == 2
    sources = {"labelled": 0.4, "documents": 0.2, "synthetic": 0.4}
    for step in range(12):
        one, other = (
            make_batch(data, phase_of(sources=sources), seed=0, step=step)
            for data in (counted, listed)
        )
        assert all(np.array_equal(one[key], other[key]) for key in one)
    twice = {"labelled": lists["labelled"]}
    twice["documents"] = Counted(35, n), Counted(0, n)
    with pytest.raises(ValueError, match="query row 39 has pairs, but the rows from 3"):
        TrainingSet(999, n, twice)


def test_tokens_come_with_a_trained_tower(tiny):
    data, _ = tiny
    batch = batch_of(data, lengths=(6, 10))
    assert batch["queries_ids"].shape == (12, 6)
    assert batch["documents_mask"].shape == (20, 10)
    expected, _ = data.document_tokens.pad(batch["documents"], 10)
    assert np.array_equal(batch["documents_ids"], expected)


def test_of_a_batch_some_rows_are_encoded_and_the_others_are_cached(tiny):
    data = dataclasses.replace(tiny[0], query_tokens=Tokens(40, 1))  # not documents
    for step, pool in ((0, 20), (1, 20), (2, 1000)):
        options = {"step": step, "pool": pool, "lengths": (6, 10)}
        some, plain = batch_of(data, encoded=4, **options), batch_of(tiny[0], **options)
        queries, documents = some["queries"], some["documents"]
        assert set(queries) == set(plain["queries"])
        assert set(documents) == set(plain["documents"])
        for side, rows, tokens, length in (
            ("queries", queries, data.query_tokens, 6),
            ("documents", documents, data.document_tokens, 10),
        ):
            ids, mask = tokens.pad(rows[:4], length)
            assert np.array_equal(some[f"{side}_ids"], ids)
            assert np.array_equal(some[f"{side}_mask"], mask)
        # Positives of encoded queries are encoded; rows keep their target and weight.
        assert (some["target"][:4] < 4).all()
        known = _known(data)
        targets = documents[some["target"]]
        assert set(zip(queries.tolist(), targets.tolist(), strict=True)) <= known
        weight = dict(zip(plain["queries"], plain["weights"], strict=True))
        assert [weight[q] for q in queries] == some["weights"].tolist()


def test_every_source_with_tokens_has_its_share_of_the_encoded_rows(tiny):
    options = {"lengths": (6, 6), "encoded": 4}
    weights = batch_of(tiny[0], **options)["weights"]
    assert weights[:4].tolist() == [3.0, 3.0, 3.0, 0.5]
    # Queries without tokens come first in the batch; they are not encoded.
    data = dataclasses.replace(tiny[0], query_tokens=Tokens(40, 1))
    options["sources"] = {"documents": 0.25, "labelled": 0.75}
    queries = batch_of(data, **options)["queries"]
    assert (queries[:4] < 40).all() and (queries >= 40).sum() == 3


def test_processes_hold_parts_of_what_is_encoded(tiny):
    options = {"lengths": (6, 10), "encoded": 4}
    whole = batch_of(tiny[0], **options)
    halves = [
        batch_of(
            tiny[0], own=lambda n, p=p: slice(p * n // 2, (p + 1) * n // 2), **options
        )
        for p in range(2)
    ]
    for name, value in whole.items():
        joined = np.concatenate([half[name] for half in halves])
        assert np.array_equal(joined, value), name


def test_more_encoded_than_have_tokens_is_refused(tiny):
    data = dataclasses.replace(tiny[0], query_tokens=Tokens(40, 1))
    with pytest.raises(ValueError, match="encoded is 10, but of 12 queries .* 9 have"):
        batch_of(data, lengths=(6, 6), encoded=10)


@given(
    num_examples=st.integers(1, 20),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_every_epoch_is_a_permutation(num_examples, batch_size, seed):
    steps = range(2 * num_examples)
    batches = [
        batch_rows(num_examples, batch_size, seed=seed, step=step) for step in steps
    ]
    epochs = np.concatenate(batches).reshape(-1, num_examples)
    expected = np.arange(num_examples)
    assert (np.sort(epochs, axis=1) == expected).all()


def test_a_pure_function_of_seed_and_step():
    later = batch_rows(100, 8, seed=3, step=57)
    np.testing.assert_array_equal(later, batch_rows(100, 8, seed=3, step=57))
    assert later.tolist() != batch_rows(100, 8, seed=4, step=57).tolist()
    first, second = (batch_rows(100, 100, seed=3, step=step) for step in (0, 1))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("arguments", [(0, 4, 0), (4, 0, 0), (4, 4, -1)])
def test_bad_arguments_are_refused(arguments):
    num_examples, batch_size, step = arguments
    with pytest.raises(
        ValueError, match=f"got {num_examples}, {batch_size} and {step}"
    ):
        batch_rows(num_examples, batch_size, seed=0, step=step)


@given(
    batch_size=st.integers(0, 512),
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(any),
)
def test_shares_add_up_and_are_within_one(batch_size, weights):
    named = {str(number): weight for number, weight in enumerate(weights)}
    shares = split_batch(batch_size, named)
    assert sum(shares.values()) == batch_size
    for name, weight in named.items():
        assert abs(shares[name] - batch_size * weight / sum(weights)) < 1 + 1e-6


def test_shares_by_hand():
    assert split_batch(10, {"train": 2, "pseudo": 1}) == {"train": 7, "pseudo": 3}
    assert split_batch(3, {"train": 1, "pseudo": 0}) == {"train": 3, "pseudo": 0}
    for weights in ({"train": 0}, {"train": -1, "pseudo": 2}):
        with pytest.raises(ValueError, match="train"):
            split_batch(4, weights)
