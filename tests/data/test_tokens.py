import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ehi.data import tokens
from ehi.data.tokens import tokenise

TEXTS = ["a b c", "", "c", "a b c a b c a b c", "b"]
CLS, SEP, A, B, C = 101, 102, 1, 2, 3


@pytest.fixture
def tokenizer_file(tmp_path):
    vocabulary = {"[UNK]": 0, "a": A, "b": B, "c": C, "[CLS]": CLS, "[SEP]": SEP}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    # As in published files: settings of its own, which must not matter.
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(3)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def make(tokenizer_file, tmp_path):
    def make(texts=TEXTS, max_length=8, cache_dir=tmp_path / "cache"):
        return tokenise(
            texts,
            tokenizer_file=tokenizer_file,
            max_length=max_length,
            cache_dir=cache_dir,
            name="texts",
        )

    return make


def test_truncation_keeps_separator(make):
    array = make()
    assert array.lengths.tolist() == [5, 2, 3, 8, 3]
    ids, mask = array.pad(np.arange(5), 8)
    assert ids.dtype == np.int32
    assert ids[0].tolist() == [CLS, A, B, C, SEP, 0, 0, 0]
    assert ids[1].tolist() == [CLS, SEP, 0, 0, 0, 0, 0, 0]
    assert ids[3].tolist() == [CLS, A, B, C, A, B, C, SEP]
    assert mask.sum(axis=1).tolist() == [5, 2, 3, 8, 3]


def test_padding_to_less_keeps_separator(make):
    ids, mask = make().pad(np.array([3, 1, 3, 0]), 4)
    assert ids.tolist() == [[CLS, A, B, SEP], [CLS, SEP, 0, 0]] + [[CLS, A, B, SEP]] * 2
    assert mask.sum(axis=1).tolist() == [4, 2, 4, 4]


def test_chunks_do_not_show(make, monkeypatch, tmp_path):
    whole = make()
    monkeypatch.setattr(tokens, "CHUNK_TEXTS", 2)
    chunked = make(cache_dir=tmp_path / "chunked")
    np.testing.assert_array_equal(chunked.ids, whole.ids)
    np.testing.assert_array_equal(chunked.offsets, whole.offsets)


def test_kept_tokens_are_memory_mapped_and_reused(make, monkeypatch):
    in_memory = make(cache_dir=None)
    first = make()
    monkeypatch.setattr(tokens, "_encoded", lambda *args: None)
    again = make()
    assert isinstance(again.ids, np.memmap)
    assert again.key == first.key == in_memory.key
    for array in (again, in_memory):
        np.testing.assert_array_equal(array.ids, first.ids)
        np.testing.assert_array_equal(array.offsets, first.offsets)


def test_key_depends_on_texts_and_length(make):
    keys = {make(texts).key for texts in (["a", "b"], ["a b"], ["ab", ""], ["b", "a"])}
    assert len(keys | {make(["a", "b"], max_length=9).key}) == 5


@pytest.mark.parametrize("cache", [True, False])
def test_no_texts(make, tmp_path, cache):
    array = make([], cache_dir=tmp_path if cache else None)
    assert len(array) == 0
    assert array.pad(np.zeros(0, np.int64), 4)[0].shape == (0, 4)


def test_no_room_for_text_is_refused(make):
    with pytest.raises(ValueError, match="greater than 2.* got 2"):
        make(max_length=2)
