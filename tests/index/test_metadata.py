"""Metadata of documents, and searches that filter by them."""

import json
import operator
import shutil

import numpy as np
import pytest
from update_cases import QUERIES, TREE, X, built

from ehi.index import (
    IndexCorruptError,
    Shard,
    build_folder,
    build_index,
    open_index,
    save_index,
)
from ehi.index.columns import Metadata
from ehi.index.sharded import answer, merge_answers, split_index
from ehi.index.where import compile_condition

LANGS = ["en", "de", "", "日本語", "en-GB"]
RNG = np.random.default_rng(5)


def small(num, metadata=None):
    return build_index(X[:num], range(num), tree=None, metadata=metadata)


def record(row):
    """Metadata of a document; each field is missing in some."""
    drawn = np.random.default_rng(row)
    about = {
        "lang": LANGS[drawn.integers(5)],
        "year": int(drawn.integers(2015, 2025)),
        "score": round(float(drawn.normal()), 2),
        "open": bool(drawn.integers(2)),
        "ns": 2**62 + int(drawn.integers(3)),
    }
    return {name: value for name, value in about.items() if drawn.integers(5)}


RECORDS = [record(row) for row in range(400)]
CONDITIONS = {
    "lang == 'en' and year >= 2020": lambda r: (
        r.get("lang") == "en" and r.get("year", 0) >= 2020
    ),
    "lang != 'en'": lambda r: "lang" in r and r["lang"] != "en",
    "not lang == 'en'": lambda r: "lang" in r and r["lang"] != "en",
    "lang is None or not open": lambda r: "lang" not in r or r.get("open") is False,
    "2017 <= year < 2020": lambda r: 2017 <= r.get("year", 0) < 2020,
    "2018 < year": lambda r: r.get("year", 0) > 2018,
    "2020 > year": lambda r: r.get("year", 9999) < 2020,
    "lang in ('en', 'fr', '日本語')": lambda r: r.get("lang") in ("en", "日本語"),
    "year not in (2019, 2020.0, 1e99)": lambda r: (
        "year" in r and r["year"] not in (2019, 2020)
    ),
    "score > -0.5 and score <= 0.25": lambda r: -0.5 < r.get("score", 9) <= 0.25,
    f"ns == {2**62 + 1}": lambda r: r.get("ns") == 2**62 + 1,  # floats round it
    "open == True or (open is not None and year == 2018)": lambda r: bool(
        r.get("open") or ("open" in r and r.get("year") == 2018)
    ),
    # Unknown and false is false, so `not` finds it; unknown and true stays unknown.
    "not (lang == 'en' and year > 2019)": lambda r: (
        r.get("lang", "en") != "en" or r.get("year", 2020) <= 2019
    ),
    "field['lang'] < 'en'": lambda r: "lang" in r and r["lang"] < "en",
    "'en' <= lang": lambda r: "lang" in r and r["lang"] >= "en",
}


@pytest.fixture(scope="module")
def updated():
    """An index of several segments with deleted documents, and its live rows."""
    index = built(range(40), range(40), metadata=RECORDS[:40])
    index.add(X[40:60], range(40, 60), metadata=RECORDS[40:60])
    index.delete([3, 41])
    index.update(X[5:7], [5, 60], metadata=[RECORDS[5], RECORDS[60]], missing="add")
    return index


def expected(meets, ids):
    return {id for id in ids if meets(RECORDS[id])}


def found(index, condition):
    return set(index.external_ids(np.flatnonzero(index.where(condition))).tolist())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_finds_what_python_says(updated, condition, tmp_path):
    ids = set(range(61)) - {3, 41}
    wanted = expected(CONDITIONS[condition], ids)
    assert 0 < len(wanted) < len(ids)
    assert found(updated, condition) == wanted
    save_index(updated, tmp_path / "index")
    saved = open_index(tmp_path / "index", verify=True)
    assert found(saved, condition) == wanted
    for queries in (QUERIES, QUERIES[:1]):
        hits = saved.search(queries, len(ids), beam=9, where=condition)
        for row in hits.ids:
            assert set(row[row >= 0].tolist()) == wanted
        same = saved.search(queries, 5, beam=9, allow=saved.where(condition))
        assert (same.ids == hits.ids[:, :5]).all()


def test_filters_are_joined_with_allow_and_deny(updated):
    hits = updated.search(
        QUERIES, 61, beam=9, where="year >= 2020", allow=range(30), deny=range(10)
    )
    wanted = expected(lambda r: r.get("year", 0) >= 2020, range(10, 30))
    assert set(hits.ids[hits.ids >= 0].tolist()) == wanted


def test_updates_and_copies_keep_metadata(tmp_path):
    names = [f"d{row}" for row in range(40)]
    index = built(range(40), names, metadata=RECORDS[:40])
    save_index(index, tmp_path / "index")
    index = open_index(tmp_path / "index")
    index.add(X[40:42], ["d40", "d41"], metadata=[None, RECORDS[41]])
    index.delete(["d0"])
    assert index.metadata(40) == {} and index.metadata(41) == RECORDS[41]
    reader = open_index(tmp_path / "index", verify=True)
    index.compact()
    reader.refresh()
    for one in (index, reader, open_index(tmp_path / "index", verify=True)):
        assert len(one.segments) == 1 and one.num_documents == 41
        assert [one.metadata(row) for row in range(40)] == [*RECORDS[1:40], {}]
    parts = split_index(tmp_path / "index", tmp_path / "parts", shards=3)
    counts = [int(open_index(part).where("open").sum()) for part in parts]
    assert sum(counts) == index.where("open").sum() > 0
    whole = index.search(QUERIES, 9, beam=9, where="open")
    leaves = np.tile(np.arange(9), (len(QUERIES), 1))
    answers = [answer(open_index(part), QUERIES, leaves, 9, where="open")
               for part in parts]  # fmt: skip
    firsts = np.cumsum([0, *(open_index(part).num_documents for part in parts[:-1])])
    assert (merge_answers(answers, firsts, 9)["ids"] == whole.ids).all()
    index.delete(index.external_ids(np.arange(41)).tolist())
    index.compact()
    assert index.where("open").shape == (0,) and set(index.fields) == set(RECORDS[1])
    index.add(X[:1], ["again"], metadata=[{"open": True}])
    assert index.where("open").tolist() == [True]


def test_whole_numbers_and_others_meet_in_a_compact():
    index = small(2, [{"n": 2**60}, {}])
    index.add(X[2:3], [2], metadata=[{"n": 0.5}])
    index.compact()
    assert [index.metadata(row) for row in range(3)] == [{"n": 2.0**60}, {}, {"n": 0.5}]
    assert index.where("n is None").tolist() == [False, True, False]
    assert index.where("n < 1").tolist() == [False, False, True]


def test_texts_of_deleted_documents_do_not_stay():
    index = small(2, [{"who": "secret"}, {"who": "b"}])
    index.delete([0])
    index.compact()
    assert b"secret" not in index.segments[0].metadata.columns["who"].distinct.text


def test_metadata_may_be_given_when_an_index_is_saved(tmp_path):
    index = small(3)
    save_index(index, tmp_path / "index", metadata=[{"a": 1}, {}, {"a": 2}])
    assert found(open_index(tmp_path / "index"), "a > 0") == {0, 2}
    with pytest.raises(ValueError, match="2 metadata for 3 documents"):
        save_index(index, tmp_path / "other", metadata=[{}, {}])


def test_folders_without_metadata_keep_their_version(tmp_path):
    for name, metadata in (("without", None), ("with", [{"a": 1}] * 3)):
        save_index(small(3, metadata), tmp_path / name)
    versions = {
        name: json.loads((tmp_path / name / "manifest.json").read_bytes())["version"]
        for name in ("without", "with")
    }
    assert versions == {"without": 3, "with": 4}


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("langg == 'en'", "no field 'langg'; known are lang .text., ns .number."),
        ("year == '2020'", "character 9, before \"'2020'\": year is a number"),
        ("year == True", "year is a number, and True is a bool"),
        ("lang == 'en' adn year > 3", "at character 14, before 'adn year > 3'"),
        ("year = 2020", "at character 6"),
        ("(year == 2020", "never closed"),
        ("", "at its end"),
        ("year", "year is a number, so compare it with one"),
        ("__import__('os').system('ls')", "before .__import__.*allowed are"),
        ("lang.upper() == 'EN'", "before .lang.upper.*allowed are"),
        ("lang.__class__ == 'EN'", "before .lang.__class__.*allowed are"),
        ("[x for x in lang]", "allowed are"),
        ("year == 2019 + 1", "before '2019 . 1': a value is"),
        ("lang == None", "write .lang is None."),
        ("year == ns", "with a value, not a field"),
        ("1 == 2", "no field is compared"),
        ("year is 3", "compares a field with None only"),
        ("'e' in lang", "needs a field, and values in parentheses"),
        ("not " * 20_000 + "open", "too deeply|at most"),
        ("(" * 90_000, "character 201|too deeply"),
        ("not not not (open or " * 150 + "open" + ")" * 150, "too deeply"),
        ("(lang\r== 5)", "lang is a text, and 5 is a number"),
        ("lang == '\ud800'", "not valid Unicode"),
        (r"lang == '\ud800'", "at character 9.*: this text is not valid Unicode"),
        (r"lang in ('en', '\udc80')", "at character 16.*not valid Unicode"),
        ("year == 2020 and", "at its end"),
        (b"open", "a filter is a text"),
    ],
)
def test_conditions_that_cannot_be_used_are_refused(updated, condition, said):
    with pytest.raises(ValueError, match=said):
        updated.search(QUERIES, where=condition)


def test_numbers_that_no_float_can_hold():
    index, huge = small(3, [{"a": 0.5}, {"a": 2}, {}]), "9" * 400
    assert found(index, f"a < {huge}") == found(index, f"a > -{huge}") == {0, 1}
    assert found(index, f"a in ({huge}, 2)") == {1}


def test_whole_floats_are_compared_exactly():
    index = small(3, [{"a": 2**53}, {"a": 2**53 + 1}, {"a": -(2**53) - 1}])
    assert found(index, f"a == {2**53}.0") == found(index, "a in (9007199254740992.0,)")
    assert found(index, f"a == {2**53}.0") == {0}
    assert found(index, f"a > {2**53}.0") == {1}
    assert found(index, f"a < -{2**53}.0") == {2}


def test_the_smallest_number_is_no_missing_one():
    kept = Metadata.of([{"a": -(2**63)}, {}, {"a": 0.5}])
    assert [kept[row] for row in range(3)] == [{"a": -(2.0**63)}, {}, {"a": 0.5}]


def test_an_index_without_metadata_says_so():
    index = small(3)
    with pytest.raises(ValueError, match="needs metadata, and this index was built wi"):
        index.search(QUERIES, where="year > 3")
    with pytest.raises(ValueError, match="built without metadata"):
        index.metadata(0)
    with pytest.raises(ValueError, match="stores no metadata, got some"):
        index.add(X[:1], [9], metadata=[{}])


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ([{"a": 1}], "1 metadata for 2 documents"),
        ({"a": 1}, "one dict for each document"),
        ([{"a": 1}, 5], "metadata of document 1 must be a dict, got 5"),
        ([{"a": 1}, {"a": "x"}], "'a' of document 1 is 'x', a text; it is a number"),
        ([{"a": True}, {"a": 1}], "'a' of document 1 is 1, a number; it is a bool"),
        ([{}, {"a": [1]}], "'a' of document 1 must be a text, a number, or true"),
        ([{"a": np.arange(2)}, {}], "'a' of document 0 must be a text, a number"),
        ([{"a": 10**400}, {}], "too large a number"),
        ([{"a": "\ud800"}, {}], "not valid Unicode"),
        ([{1: 2}, {}], "a field of metadata is named by a text, got 1"),
    ],
)
def test_metadata_that_cannot_be_stored_are_refused(metadata, said):
    with pytest.raises(ValueError, match=said):
        small(2, metadata)


def test_added_metadata_must_fit_the_fields():
    index = small(2, [{"a": 1, "b": "x"}, {}])
    for metadata, said in (
        (None, "stores metadata .'a', 'b'., got none"),
        ([{"c": 1}], "no metadata 'c'; it has 'a', 'b'"),
        ([{"a": "x"}], "'a' of document 0 is 'x'"),
    ):
        with pytest.raises(ValueError, match=said):
            index.add(X[2:3], [2], metadata=metadata)
    assert index.num_documents == 2


def test_numpy_values_and_missing_ones_are_read():
    about = [{"n": np.int64(3), "s": np.str_("x"), "t": np.bool_(True)},
             {"n": np.nan, "s": None}]  # fmt: skip
    kept = Metadata.of(about)
    assert [kept[0], kept[1]] == [{"n": 3, "s": "x", "t": True}, {}]


@pytest.mark.parametrize("name", ["values", "offsets", "text"])
def test_altered_metadata_are_found(tmp_path, name):
    folder = tmp_path / "index"
    save_index(small(9, [{"lang": "a"}, {}] * 4 + [{}]),
               folder)  # fmt: skip
    file = folder / f"metadata.0.{name}.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IndexCorruptError, match=f"metadata.0.{name}"):
        open_index(folder, verify=True)
    shutil.copy(file, tmp_path / "shorter")
    file.write_bytes(whole[:-1])
    with pytest.raises(IndexCorruptError, match=f"metadata.0.{name}"):
        open_index(folder)


def test_comparisons_of_random_texts_are_those_of_python():
    letters = np.array(list("abé日 "))
    texts = ["".join(RNG.choice(letters, RNG.integers(3))) for _ in range(60)]
    kept = Metadata.of([{"t": text} for text in texts])
    signs = {"==": operator.eq, "!=": operator.ne, "<": operator.lt,
             "<=": operator.le, ">": operator.gt, ">=": operator.ge}  # fmt: skip
    for sign, compare in signs.items():
        for text in ("", "a", "é", "b日", "zz", texts[7]):
            meets = compile_condition(f"t {sign} {text!r}", kept.fields)
            assert meets(kept).tolist() == [compare(each, text) for each in texts]


def test_shards_give_the_index_of_one_build(tmp_path):
    whole = build_index(X[:40], range(40), tree=TREE, metadata=RECORDS[:40])
    save_index(whole, tmp_path / "whole")
    shards = [
        Shard(X[:15], range(15), metadata=RECORDS[:15]),
        Shard(X[15:40], range(15, 40), metadata=lambda: iter(RECORDS[15:40])),
    ]
    build_folder(tmp_path / "parts", shards, tree=TREE)
    one, other = (open_index(tmp_path / name) for name in ("whole", "parts"))
    assert one.folder.manifest == other.folder.manifest
    for shard, said in (
        (Shard(X[:2], range(2), metadata=[{}]), "1 metadata for 2 ids"),
        (Shard(X[:2], range(2), metadata=lambda: [{}]), "1 metadata for 2 ids"),
        (Shard(X[:2], range(2), metadata=[{}, {"a": []}]), "shard 0: .*of document 1"),
    ):
        with pytest.raises(ValueError, match=said):
            build_folder(tmp_path / "other", [shard], tree=None)
    with pytest.raises(ValueError, match="first shard has some metadata, unlike"):
        build_folder(tmp_path / "other", [shards[0], Shard(X[15:], range(15, 400))],
                     tree=None)  # fmt: skip
