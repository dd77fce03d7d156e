"""Encoding with shards that fail, odd folders and odd texts.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import errno
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shard_cases import NUM, SHARDS, TESTS, Documents, bytes_of, lengths, make_job, read
from wild_cases import failed, passed

from ehi.data.tokens import tokenise
from ehi.encode.encode import encode
from ehi.encode.shards import attempt_shard, encode_shards, unfinished_shards


def fails_on(*rows):
    """A stand-in for an encoder that cannot read some documents."""
    broken = {Documents().texts[row] for row in rows}

    def encode_texts(texts):
        if broken & set(texts):
            raise RuntimeError("no such word")
        return lengths(texts)

    return encode_texts


# Shards that fail


# The local loop promises it: a shard that fails is reported, the others go on.
@pytest.mark.parametrize(
    ("rows", "failing"),
    [
        failed([0], [0], id="the first"),
        passed([NUM - 1], [SHARDS - 1], id="the last"),
        failed([0, 6, 12, 18], [0, 1, 2, 3], id="all"),
    ],
)
def test_shards_that_fail_into_a_new_folder(tmp_path, rows, failing):
    job = make_job(tmp_path / "new" / "out", fails_on(*rows))
    failed = encode_shards(job, unfinished_shards(job), retries=0)
    assert failed == dict.fromkeys(failing, "RuntimeError: no such word")
    assert unfinished_shards(job) == failing
    for number in failing:
        text = job.failure(number).read_text().splitlines()
        assert text[0] == "RuntimeError: no such word"
        assert text[2:] == [job.ids[row] for row in job.rows(number)]


# A worker of Ray, too, reports into a folder that nobody has made.
def test_a_first_failure_is_written_by_a_worker_failed(tmp_path):
    job = make_job(tmp_path / "new", fails_on(0))
    assert attempt_shard(job, 0, retries=0) == "RuntimeError: no such word"
    assert job.failure(0).exists()


# The file has the error in its first line and ids from the third one on.
def test_an_error_of_several_lines_stays_in_one_failed(tmp_path):
    def encode_texts(texts):
        raise RuntimeError("out of memory:\n  allocator\n\n  3 GB\n")

    job = make_job(tmp_path, encode_texts)
    encode_shards(job, [1], retries=0)
    said, empty, *names = job.failure(1).read_text().splitlines()
    assert said == "RuntimeError: out of memory: allocator 3 GB" and not empty
    assert names == [job.ids[row] for row in job.rows(1)]


# Ids are text of any language; a lone surrogate comes from an escape in JSON (RFC 8259
# section 8.2) and cannot be encoded.
@pytest.mark.parametrize(
    ("name", "written"),
    [
        passed("dök/漢", "dök/漢"),
        failed("a\ud800", r"a\ud800", id="surrogate"),
    ],
)
def test_ids_in_the_file_of_a_failure(tmp_path, name, written):
    job = make_job(tmp_path, fails_on(0), ids=[name] * NUM)
    assert encode_shards(job, [0], retries=0)
    assert job.failure(0).read_text("utf-8").splitlines()[-1] == written


_IN_AN_ASCII_LOCALE = """
import sys
from shard_cases import NUM, make_job
from ehi.encode.shards import encode_shards

def encode(texts):
    raise RuntimeError("n\\u00f6")

assert encode_shards(make_job(sys.argv[1], encode, ids=["\\u6f22"] * NUM), [0], 0)
"""


# Files of ours are UTF-8 whatever the locale says (PEP 686 makes it Python's default).
def test_a_failure_is_written_in_utf8_in_an_ascii_locale_failed(tmp_path):
    environment = os.environ | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS))),
    }  # fmt: skip
    command = [sys.executable, "-c", _IN_AN_ASCII_LOCALE, str(tmp_path)]
    subprocess.run(command, env=environment, check=True)
    (failure,) = tmp_path.glob("*.failed.txt")
    assert failure.read_text("utf-8").startswith("RuntimeError: nö\n\n漢\n")


# Otherwise `build_folder` refuses such a shard, long after it was encoded.
@pytest.mark.parametrize("change", [-1, 1])
def test_an_encoder_that_makes_other_rows_than_texts_failed(tmp_path, change):
    def encode_texts(texts):
        made = lengths(texts)
        rows = np.arange(len(texts) + change) % len(texts)
        return made | {"leaves": made["leaves"][rows]}

    job = make_job(tmp_path, encode_texts)
    num = len(job.rows(0))
    failed = encode_shards(job, [0], retries=0)
    assert failed == {0: f"ValueError: {num + change} leaves for {num} documents"}


# Ctrl-C ends the loop (Python's own rule: it is no Exception) and leaves no folder.
def test_ctrl_c_is_not_taken_for_a_failed_shard_passed(tmp_path):
    def encode_texts(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_shards(make_job(tmp_path, encode_texts), range(SHARDS))
    assert not list(tmp_path.iterdir())


# How many shards


# K shards of N documents need 1 <= K <= N, since no shard is empty.
@pytest.mark.parametrize(
    ("num", "num_shards", "message"),
    [
        passed(3, 4, "shards=4: allowed are 1 to 3"),
        passed(3, 0, "shards=0: allowed are 1 to 3"),
        failed(0, 1, "the corpus has no documents"),
        failed(0, 0, "the corpus has no documents"),
    ],
)
def test_shards_that_cannot_be(tmp_path, num, num_shards, message):
    some = {"documents": Documents(NUM)[:num], "ids": list(range(num))}
    with pytest.raises(ValueError, match=message):
        make_job(tmp_path, lengths, num_shards=num_shards, **some)


def test_ids_of_another_number_of_documents_are_refused_failed(tmp_path):
    with pytest.raises(ValueError, match="22 ids for 23 documents"):
        make_job(tmp_path, lengths, ids=range(NUM - 1))


@pytest.mark.parametrize(
    ("num", "num_shards"),
    [passed(1, 1), passed(5, 5)],
)
def test_one_document_in_a_shard(tmp_path, num, num_shards):
    documents = Documents(NUM)[:num]
    job = make_job(
        tmp_path, lengths, documents=documents, ids=range(num), num_shards=num_shards
    )
    assert encode_shards(job, unfinished_shards(job)) == {}
    found = [read(job, n, "embeddings")[0, 0] for n in range(num_shards)]
    assert found == [len(document.content) for document in documents]


def test_nothing_to_do_makes_no_folder_passed(tmp_path):
    assert encode_shards(make_job(tmp_path / "out", lengths), []) == {}
    assert not (tmp_path / "out").exists()


# The folder


def encode_all(folder):
    """Encode all shards into a folder with the stand-in; return the job."""
    job = make_job(folder, lengths)
    assert encode_shards(job, unfinished_shards(job)) == {}
    assert unfinished_shards(job) == []
    return job


def never(texts):
    raise AssertionError("a text was encoded in vain")


# `mkdir -p` says so too, and before any work: EEXIST, ENOTDIR.
@pytest.mark.parametrize("name", [failed("file"), failed("file/out")])
def test_a_file_where_the_folder_should_be(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    job = make_job(tmp_path / name, never)
    with pytest.raises(OSError, match="it, or a folder it is in, is a file"):
        encode_shards(job, range(SHARDS))
    assert (tmp_path / "file").read_text() == "kept"


# Nothing can be written: known before the work, not after it. (Permissions do not bind
# the root user, so the system's answer is made up.)
@pytest.mark.parametrize(
    "number",
    [
        failed(errno.EACCES, id="EACCES"),
        failed(errno.EROFS, id="EROFS"),
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, number):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=f"no shards .* folder: {os.strerror(number)}"):
        encode_shards(make_job(tmp_path, never), range(SHARDS))


# A link stands for its target (POSIX path resolution), also where that is not there.
@pytest.mark.parametrize("target", [passed("there"), failed("new")])
def test_a_link_to_a_folder(tmp_path, target):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    encode_all(tmp_path / "link")
    assert len(list((tmp_path / target).glob("shard-*"))) == SHARDS
    assert (tmp_path / "link").is_symlink()


# As for an opened index: a relative path keeps the meaning it was given with.
def test_a_relative_folder_stays_where_it_was_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = make_job("out", lengths)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert encode_shards(job, unfinished_shards(job)) == {}
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(list((tmp_path / "out").glob("shard-*"))) == SHARDS


# A shell does not expand `~` behind `--out=`. Expected as of Python's `expanduser`, and
# as of a shell for a user that is not known: the name is taken as it is.
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        failed("~/out", "home/out"),
        failed("~", "home"),
        passed("~no-such-user/out", "here/~no-such-user/out"),
        passed("a~/out", "here/a~/out"),
    ],
)
def test_a_home_folder(tmp_path, monkeypatch, given, meant):
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    encode_all(given)
    assert len(list((tmp_path / meant).glob("shard-*"))) == SHARDS


# Names are taken as they are: no pattern, no escape.
@pytest.mark.parametrize(
    "name",
    [passed(name) for name in ("a b", "out[1]*", "50%", "漢字", "-out", "x" * 200)],
)
def test_names_of_folders(tmp_path, name):
    encode_all(tmp_path / name)
    whole = encode_all(tmp_path / "plain")
    assert bytes_of(tmp_path / name) == bytes_of(whole.folder)


# What file managers, file systems and people leave in a folder is not ours.
def test_other_files_in_the_folder_are_left_alone_passed(tmp_path):
    for name in (".DS_Store", "shard-notes.txt", "README", ".shard-list"):
        (tmp_path / name).write_text("kept")
    (tmp_path / "lost+found").mkdir()
    encode_all(tmp_path)
    for name in (".DS_Store", "shard-notes.txt", "README", ".shard-list"):
        assert (tmp_path / name).read_text() == "kept"


# The umask decides (POSIX `mkdir`), so that a group can share the folder.
@pytest.mark.parametrize(
    ("umask", "mode"),
    [
        passed(0o022, 0o755, id="022"),
        failed(0o002, 0o775, id="002"),
        failed(0o077, 0o700, id="077"),
    ],
)
def test_the_umask_decides_who_can_read_a_shard(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        job = make_job(tmp_path, fails_on(0))
        assert list(encode_shards(job, range(SHARDS), retries=0)) == [0]
    finally:
        os.umask(before)
    assert job.path(2).stat().st_mode & 0o777 == mode
    files = [job.failure(0), *job.path(2).iterdir()]
    assert {file.stat().st_mode & 0o777 for file in files} == {mode & 0o666}


# The folder of a job is absolute, so what is sent to another process means the same.
def test_a_job_that_is_changed_keeps_its_folder_passed(tmp_path):
    job = make_job(tmp_path / "out", lengths)
    assert replace(job, encode=never).folder == job.folder == Path(tmp_path / "out")


# Texts


class Texts:
    """Token ids of a few texts: 2 and 3 stand for the special tokens around them."""

    def __init__(self, *texts):
        self.rows = [[2, *text, 3] for text in texts]
        self.lengths = np.array([len(row) for row in self.rows])

    def __len__(self):
        return len(self.rows)

    def pad(self, rows, length):
        ids = np.zeros((len(rows), length), np.int32)
        for row, text in enumerate(rows):
            ids[row, : len(self.rows[text])] = self.rows[text]
        return ids, np.arange(length) < self.lengths[rows][:, None]


def sums(params, ids, mask):
    """Sum and number of the tokens of a text; of each of 32 texts of a packed row."""
    if mask.dtype == bool:
        return np.stack([(ids * mask).sum(1), mask.sum(1)], 1).astype(np.float32)
    number = np.asarray(mask)[:, None] == np.arange(1, 33)[:, None]  # (N, G, L)
    both = (np.asarray(ids)[:, None] * number).sum(2), number.sum(2)
    return np.stack(both, 2).astype(np.float32)


# sentence-transformers and BEIR encode "" as its special tokens alone.
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    "texts",
    [
        passed([()], id="one empty text"),
        passed([(), (), ()], id="only empty texts"),
        passed([(7,) * 500, (), (9,)], id="one long text"),
        passed([(9,)], id="one text"),
        passed([()] * 100, id="more than a row holds"),
    ],
)
def test_empty_and_few_texts(pack, texts):
    found = encode(sums, None, Texts(*texts), pack=pack)
    expected = [(5 + sum(text), 2 + len(text)) for text in texts]
    np.testing.assert_array_equal(found, expected)


# BERT's `_clean_text` drops control characters and takes all white space for a space.
@pytest.mark.parametrize(
    ("text", "like"),
    [
        passed(" \n\t\r", "", id="white space"),
        passed("\u00a0\u3000", "", id="white space of Unicode"),
        passed("\x00\x7f\ufffd", "", id="control characters"),
        passed("a\x00 b", "a b", id="a NUL"),
        passed("A  B\r\nc", "a b c", id="line ends of DOS"),
        passed("e\u0301", "e", id="combining accent"),
    ],
)
def test_odd_characters_are_encoded_as_plain_ones(tmp_path, text, like):
    fixture = TESTS / "fixtures/minilm_tiny/tokenizer.json"
    bert = {
        "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
        "strip_accents": None, "lowercase": True,
    }  # fmt: skip
    tokenizer = json.loads(fixture.read_text()) | {"normalizer": bert}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    tokens = tokenise(
        [text, like], tokenizer_file=tmp_path / "tokenizer.json", max_length=16,
        cache_dir=None, name="texts",
    )  # fmt: skip
    one, other = encode(sums, None, tokens)
    np.testing.assert_array_equal(one, other)
