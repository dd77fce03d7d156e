"""Run files of other TREC tools: Anserini, pyserini, PyTerrier, ranx, trec_eval's own.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wild_cases import failed, passed

from ehi.eval.metrics import read_run, write_run
from ehi.eval.records import read_records

BOM = b"\xef\xbb\xbf"


# trec_eval reads six columns between ASCII white space (isspace of the C locale), and a
# score by atof.
@pytest.mark.parametrize(
    "content, expected",
    [
        passed(b"q Q0 d 1 0.5 tag\n", {"q": {"d": 0.5}}, id="plain"),
        passed(b"q\tQ0\td\t1\t0.5\ttag\r\n", {"q": {"d": 0.5}}, id="tabs"),
        passed(b"  q Q0  d 1 5e-1 tag", {"q": {"d": 0.5}}, id="spaces"),
        failed(BOM + b"q Q0 d 1 0.5 tag\n", {"q": {"d": 0.5}}, id="bom"),
        failed(b"\nq Q0 d 1 0.5 tag\n\n", {"q": {"d": 0.5}}, id="blank"),
        passed(b"q Q0 d 1 inf tag\n", {"q": {"d": np.inf}}, id="inf"),
        failed("q Q0 a\u00a0b 1 0.5 t\n".encode(), {"q": {"a\u00a0b": 0.5}},
               id="no-break-space"),
        failed("q Q0 a\u2028b 1 0.5 t\n".encode(), {"q": {"a\u2028b": 0.5}},
               id="line-separator"),
        passed("q Q0 \u7b2c\u4e00 1 0.5 t\n".encode(), {"q": {"\u7b2c\u4e00": 0.5}},
               id="chinese"),
        passed(b"1 Q0 2 1 0.5 t\n", {"1": {"2": 0.5}}, id="numbers"),
        passed(b'q Q0 "d" 1 0.5 t\n', {"q": {'"d"': 0.5}}, id="quotes"),
        # Ids that are addresses (ClueWeb, Common Crawl) stay as their tool wrote them.
        failed(b"q Q0 http://x/a%2Fb 1 0.5 t\n", {"q": {"http://x/a%2Fb": 0.5}},
               id="address"),
        failed(b"q Q0 a%FF 2 0.5 t\nq Q0 b%20c 1 0.6 t\n",
             {"q": {"a%FF": 0.5, "b%20c": 0.6}}, id="byte-escape"),
        passed(b"q Q0 100% 1 0.5 t\n", {"q": {"100%": 0.5}}, id="percent"),
        # What `write_run` writes is decoded.
        passed(b"q Q0 b%20c 1 0.6 t\n", {"q": {"b c": 0.6}}, id="ours"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["text", "gzip"])
def test_runs_of_other_tools_are_read(tmp_path, content, expected, pack):
    path = tmp_path / ("x.run" if pack is bytes else "x.run.gz")
    path.write_bytes(pack(content))
    assert read_run(path) == expected


# gzip(1) looks at the first bytes, not at the name.
def test_gzip_is_told_by_its_content_failed(tmp_path):
    (tmp_path / "x.run").write_bytes(gzip.compress(b"q Q0 d 1 0.5 t\n"))
    (tmp_path / "y.run.gz").write_bytes(b"q Q0 d 1 0.5 t\n")
    for name in ("x.run", "y.run.gz"):
        assert read_run(tmp_path / name) == {"q": {"d": 0.5}}


PACKED = gzip.compress(b"".join(b"q Q0 %d 1 0.5 t\n" % n for n in range(50)))


# trec_eval: "Malformed line", and "duplicate docs" for a document that is there twice;
# its order of NaN scores is not defined.
@pytest.mark.parametrize(
    "content, message",
    [
        passed(b"q Q0 d 1 0.5 t x\n", "line 1: expected", id="seven"),
        passed(b"q d 0.5\n", "line 1: expected", id="three"),
        passed(b"q Q0 d 1 0,5 t\n", "line 1: expected", id="comma"),
        failed(b"q Q0 d 1 nan t\n", "line 1: expected", id="nan"),
        failed(b"q Q0 d 1 0.5 t\nq Q0 d 2 0.4 t\n", "line 2: query 'q' has 'd' twice",
               id="twice"),
        failed(b"q Q0 d\xe9 1 0.5 t\n", "line 1: not UTF-8", id="latin-1"),
        failed("q Q0 d 1 0.5 t\n".encode("utf-16"), "line 1: ", id="utf-16"),
        failed(PACKED[:-9], "is damaged", id="cut-gzip"),
        failed(PACKED[:-8] + b"\0" * 8, "is damaged", id="crc-gzip"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_read_are_one_sentence(tmp_path, content, message):
    path = tmp_path / ("x.run.gz" if content.startswith(b"\x1f") else "x.run")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name}.*{message}"):
        read_run(path)


IDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1, max_size=8,
)  # fmt: skip
RUNS = st.dictionaries(
    IDS,
    st.dictionaries(IDS, st.floats(-100, 100, width=32), min_size=1, max_size=5),
    max_size=4,
)


# A property: a run comes back as it was written, whatever its ids are.
@settings(max_examples=200, deadline=None)
@given(run=RUNS, packed=st.booleans())
def test_any_run_is_read_as_it_was_written_passed(tmp_path_factory, run, packed):
    path = tmp_path_factory.mktemp("runs") / ("x.run.gz" if packed else "x.run")
    write_run(path, run)
    found = read_run(path)
    assert list(found) == list(run)
    for query, docs in run.items():
        assert list(found[query]) == list(docs)
        assert [np.float32(s) for s in found[query].values()] == list(docs.values())


# A property: any six-column file of ids without '%' is read as the columns say.
@settings(max_examples=100, deadline=None)
@given(
    rows=st.dictionaries(
        st.tuples(*[st.from_regex(r"[!-$&-~]{1,8}", fullmatch=True)] * 2),
        st.floats(allow_nan=False, width=32), min_size=1, max_size=6,
    ),
    gap=st.sampled_from([" ", "\t", "  ", " \t"]),
    ending=st.sampled_from(["\n", "\r\n", " \n"]),
)  # fmt: skip
def test_any_six_columns_are_read_passed(tmp_path_factory, rows, gap, ending):
    path = tmp_path_factory.mktemp("runs") / "x.run"
    lines = [
        gap.join((query, "Q0", doc, "0", repr(score), "tool")) + ending
        for (query, doc), score in rows.items()
    ]
    path.write_text("".join(lines), newline="")
    found = read_run(path)
    flat = {(query, doc): s for query, docs in found.items() for doc, s in docs.items()}
    assert flat == rows


# RFC 8259 lets a reader limit nesting; a damaged file must be one sentence.
def test_records_nested_too_deeply_are_one_sentence_failed(tmp_path):
    (tmp_path / "results.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: .*nested"):
        read_records(tmp_path / "results.jsonl")
