"""vocab.json and merges.txt make the same tokeniser as tokenizer.json of RoBERTa."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ehi.data.tokens import tokenise
from ehi.index.text.encoder import find_tokenizer, open_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
REFERENCE = json.loads((FIXTURES / "star_tiny" / "tokens.json").read_text("utf-8"))
TEXTS = REFERENCE["texts"]


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FIXTURES / "star_tiny", tmp_path / "star_tiny"))


def ids(folder, texts=TEXTS):
    tokenizer = open_tokenizer(find_tokenizer(folder))
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("prefix", [False, True, None])
def test_tokens_are_those_of_transformers(folder, prefix):
    if prefix is not None:
        config = {"add_prefix_space": prefix}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    expected = REFERENCE["add_prefix_space"]["true" if prefix else "false"]
    assert ids(folder) == expected
    assert expected[0][0] == 0 and expected[0][-1] == 2


def test_tokens_are_those_of_tokenizer_json(folder):
    more = ["".join(map(chr, range(start, start + 64))) for start in range(0, 4096, 64)]
    texts = [*TEXTS, *more, "hello<mask>", "x" * 999]
    assert ids(folder, texts) == ids(FIXTURES / "roberta_tiny", texts)
    found, same = (
        open_tokenizer(find_tokenizer(path))
        for path in (folder, FIXTURES / "roberta_tiny")
    )
    assert found.get_vocab() == same.get_vocab()
    assert found.decode(found.encode("hello world").ids) == "hello world"


def test_tokenizer_json_comes_first(folder):
    shutil.copy(FIXTURES / "bert_tiny" / "tokenizer.json", folder)
    assert ids(folder) == ids(FIXTURES / "bert_tiny")


def test_special_tokens_that_the_vocabulary_lacks_get_no_id(folder):
    vocab = json.loads((folder / "vocab.json").read_text())
    del vocab["<mask>"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    assert open_tokenizer(folder / "vocab.json").get_vocab_size() == 99
    del vocab["</s>"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match="vocab.json cannot be read: no token </s>"):
        open_tokenizer(folder / "vocab.json")


def test_token_arrays_are_keyed_by_all_that_makes_the_tokeniser(folder):
    def tokens():
        file = find_tokenizer(folder)
        return tokenise(
            TEXTS, tokenizer_file=file, max_length=12, cache_dir=None, name="texts"
        )

    first = tokens()
    assert tokens().key == first.key
    padded, mask = first.pad(np.arange(len(TEXTS)), 12)
    for row, kept, text in zip(padded, mask, ids(folder), strict=True):
        # <s> and padding have id 0; the mask tells them apart.
        assert row[kept][0] == 0 and row[kept][-1] == 2
        assert kept.sum() == min(len(text), 12)
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    second = tokens()
    merges = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(merges[:-1]) + "\n")
    assert len({first.key, second.key, tokens().key}) == 3
