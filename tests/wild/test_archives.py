"""Zips, tars and gzip files of a data set, as other programs write them.

A case that failed before its test was written has `failed` at the end of its id or of
its test's name, others have `passed`. Comments name the source of what is expected.
"""

import gzip
import io
import stat
import tarfile
import zipfile

import pytest
from collection_files import files_of, zip_of
from wild_cases import failed, passed

pytestmark = pytest.mark.usefixtures("warnings_of_ehi")


# PKWARE's APPNOTE 4.4.17.1: names have forward slashes, no drive and no leading slash.
# Older .NET and other Windows programs write backslashes, `zip` of `./` writes dots.
@pytest.mark.parametrize(
    "rename, options",
    [
        failed(lambda n: n.replace("/", "\\"), {}, id="backslash"),
        failed(lambda n: f"./{n}", {}, id="dot"),
        failed(lambda n: f"top\\{n}".replace("/", "\\"), {}, id="top-backslash"),
        failed(lambda n: f"./top/{n}", {}, id="dot-top"),
        passed(lambda n: f"a/b/{n}", {}, id="nested"),
        passed(lambda n: n, {"compression": zipfile.ZIP_DEFLATED}, id="deflated"),
        passed(lambda n: n, {"compression": zipfile.ZIP_LZMA}, id="lzma"),
        passed(lambda n: f"caf\u00e9/{n}", {}, id="unicode"),
    ],
)  # fmt: skip
def test_zips_of_other_programs_are_read(
    beir_folder, tmp_path, opened, rename, options
):
    expected = opened()
    entries = {rename(name): data for name, data in files_of(beir_folder).items()}
    found = opened(zip_of(tmp_path / "tiny.zip", entries, **options))
    assert found.qrels == expected.qrels and set(found.qrels) == {"train", "test"}
    assert found.corpus_sha256 == expected.corpus_sha256


def test_zip64_directories_and_prepended_bytes_passed(beir_folder, tmp_path, opened):
    expected, path = opened().qrels, tmp_path / "tiny.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("qrels")
        for name, data in files_of(beir_folder).items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(data)
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())  # self-extracting
    assert opened(path).qrels == expected


def encrypted(data):
    """A zip whose entries are marked as encrypted (APPNOTE 4.4.4, bit 0)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in data.items():
            archive.writestr(name, content)
        for entry in archive.filelist:
            entry.flag_bits |= 1
    return buffer.getvalue()


def linked(data):
    """A zip whose queries.jsonl is a symbolic link, as `zip -y` writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in data.items():
            entry = zipfile.ZipInfo(name)
            if name == "queries.jsonl":
                entry.external_attr = (stat.S_IFLNK | 0o777) << 16
                content = "../queries.jsonl"
            archive.writestr(entry, content)
    return buffer.getvalue()


def with_entry(name):
    """Function: data -> a zip with another entry of that name."""

    def make(data):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for own, content in {**data, name: b"x"}.items():
                archive.writestr(zipfile.ZipInfo(own), content)
        return buffer.getvalue()

    return make


def damaged(data):
    """A zip in which one byte of a stored file was changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in data.items():
            archive.writestr(name, content)
    return buffer.getvalue().replace(b"codeword of", b"codeword if")


def tarred(data):
    """A tar.gz of the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in data.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


# `unzip` refuses names with `..`, asks for a password, and checks the CRC-32.
@pytest.mark.parametrize(
    "make, message",
    [
        failed(with_entry("../evil.tsv"), "leads out of it", id="dots"),
        failed(with_entry("..\\evil"), "leads out of it", id="dots-back"),
        failed(with_entry("/etc/evil"), "leads out of it", id="absolute"),
        failed(with_entry("C:\\evil"), "leads out of it", id="drive"),
        failed(encrypted, "'corpus.jsonl' is encrypted", id="encrypted"),
        failed(linked, "'queries.jsonl' is a link", id="link"),
        failed(damaged, "cannot be read: Bad CRC-32", id="crc"),
        passed(lambda d: with_entry("x")(d)[:-30], "neither a fo", id="cut"),
        failed(tarred, "unpack the tar archive first", id="tar"),
        passed(lambda d: gzip.compress(b"x"), "neither a folder", id="gz"),
    ],
)
def test_archives_that_cannot_be_read_are_one_sentence(
    beir_folder, tmp_path, opened, make, message
):
    path = tmp_path / "tiny.zip"
    path.write_bytes(make(files_of(beir_folder)))
    with pytest.raises(ValueError, match=message):
        opened(path)


# Mirrors of BEIR publish corpus.jsonl.gz: a reader must be told what to do.
def test_a_gzipped_corpus_is_said_failed(beir_folder, opened):
    path = beir_folder / "corpus.jsonl"
    (beir_folder / "corpus.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    with pytest.raises(ValueError, match=r"found 0; unpack corpus\.jsonl\.gz first"):
        opened()
