"""Types, names and tokens of checkpoints as they are found.

Unless a test is about one of them, it runs both stacks: `ehi.index.text` (numpy) and
`ehi.model` (jax). A case that failed in one of them before its test was written has
`failed` at the end of its id or of its test's name, others have `passed`. Comments name
the source of what is expected: safetensors (the format), transformers (4.x and 5.x), or
sentence-transformers (its modules Transformer and Pooling).
"""

import json

import numpy as np
import pytest
from checkpoint_cases import (
    FIXTURES,
    LENGTH,
    TEXTS,
    both_stacks,
    by_numpy,
    copy_of,
    edit_json,
    edit_tensors,
    edit_tokenizer,
    flat_parameters,
)
from safetensors.numpy import load_file, save_file
from wild_cases import failed, passed

from ehi.data.tokens import tokenise
from ehi.index import build_index
from ehi.index.text.encoder import TextTokenizer, load_text_encoder
from ehi.model.pretrained import load_tower, resolve, save_tower


@pytest.fixture
def copy(tmp_path):
    """Function: name of a tiny checkpoint -> a copy that a test may change."""

    def make(name="bert_tiny", to="copy"):
        return copy_of(name, tmp_path / to)

    return make


def bfloat16(array):
    """An array cut to what bfloat16 can hold, as float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return (bits & 0xFFFF0000).view(np.float32)


def write_tensors(path, tensors, kind="F32", *, spaces=0, metadata=None):
    """A safetensors file, written by the letter of the format."""
    header = {} if metadata is None else {"__metadata__": metadata}
    content, start = [], 0
    for name, array in tensors.items():
        if kind == "BF16":
            data = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = array.tobytes()
        header[name] = {
            "dtype": kind, "shape": list(array.shape),
            "data_offsets": [start, start + len(data)],
        }  # fmt: skip
        start += len(data)
        content.append(data)
    text = json.dumps(header).encode() + b" " * spaces
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *content]))


# Types of numbers


# Both read it with the values that are stored (transformers: from_pretrained with
# dtype=float32 widens them; safetensors: BF16, F16 and F64 are types of the format).
@both_stacks
@pytest.mark.parametrize(
    "kind",
    [
        failed("BF16"),  # NumPy refused it
        passed("F16"),
        passed("F64"),
    ],
)
@pytest.mark.parametrize("name", ["bert_tiny", "star_tiny"])
def test_weights_of_other_float_types_are_read(copy, vectors, name, kind):
    stored, plain = copy(name, "stored"), copy(name, "plain")
    tensors = load_file(plain / "model.safetensors")
    if kind == "BF16":
        tensors = {n: bfloat16(value) for n, value in tensors.items()}
        write_tensors(stored / "model.safetensors", tensors, kind)
    else:
        dtype = {"F16": np.float16, "F64": np.float64}[kind]
        tensors = {n: value.astype(dtype) for n, value in tensors.items()}
        save_file(tensors, stored / "model.safetensors")
    edit_tensors(plain, lambda _: {n: v.astype("f4") for n, v in tensors.items()})
    np.testing.assert_array_equal(vectors(stored, TEXTS), vectors(plain, TEXTS))


# A trained tower is saved in float32, whatever it started from.
def test_a_bfloat16_tower_is_saved_with_the_values_it_had_passed(copy, tmp_path):
    folder = copy("star_tiny")
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: bfloat16(value) for n, value in tensors.items()}
    write_tensors(folder / "model.safetensors", tensors, "BF16")
    found = resolve(folder)
    save_tower(found, flat_parameters(load_tower(found)), tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    assert all(np.array_equal(saved[name], tensors[name]) for name in saved)


# safetensors: "The header data MAY be trailing padded with whitespace (0x20)"; the
# metadata are optional and map strings to strings.
@both_stacks
@pytest.mark.parametrize("kind", [passed("F32"), failed("BF16")])
@pytest.mark.parametrize(
    "options", [{}, {"spaces": 7}, {"metadata": {"format": "pt"}}], ids=str
)
def test_headers_as_the_format_allows_them(copy, vectors, kind, options):
    folder, plain = copy(to="odd"), copy(to="plain")
    tensors = load_file(plain / "model.safetensors")
    tensors = {n: bfloat16(value) for n, value in tensors.items()}
    edit_tensors(plain, lambda _: tensors)
    write_tensors(folder / "model.safetensors", tensors, kind, **options)
    np.testing.assert_array_equal(vectors(folder, TEXTS), vectors(plain, TEXTS))


# Integers and eight-bit floats need a scale that the file does not hold.
@both_stacks
@pytest.mark.parametrize("kind", [failed("I8"), failed("F8_E4M3")])
def test_weights_of_no_float_type_are_refused(copy, vectors, kind):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    bytes_of = {n: value.astype(np.int8) for n, value in tensors.items()}
    write_tensors(folder / "model.safetensors", bytes_of, kind)
    with pytest.raises(ValueError, match=f"has type {kind}, not one of .*'BF16'"):
        vectors(folder, TEXTS)


# Names of tensors


# transformers: heads for other tasks and buffers are no part of the base model.
@both_stacks
@pytest.mark.parametrize(
    ("name", "more"),
    [
        passed("bert_tiny", ["classifier.weight", "bert.pooler.dense.bias"]),
        passed("bert_tiny", ["cls.seq_relationship.weight"]),
        failed("bert_tiny", ["qa_outputs.weight", "qa_outputs.bias"]),
        passed("bert_tiny", ["bert.embeddings.position_ids"]),
        failed("bert_tiny", ["bert.embeddings.token_type_ids"]),
        failed("distilbert_tiny", ["pre_classifier.weight"]),
        passed("roberta_tiny", ["classifier.out_proj.weight"]),
    ],
)
def test_heads_of_other_tasks_are_ignored(copy, vectors, name, more):
    folder = copy(name)
    head = {key: np.zeros((1, 3), np.float32) for key in more}
    edit_tensors(folder, lambda tensors: tensors | head)
    expected = vectors(FIXTURES / name, TEXTS)
    np.testing.assert_array_equal(vectors(folder, TEXTS), expected)


# transformers loads the pooler only if it is there, and the encoder has no use for it.
@both_stacks
def test_a_missing_pooler_is_no_loss_passed(copy, vectors):
    folder = copy("minilm_tiny")
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if "pooler" not in k})
    expected = vectors(FIXTURES / "minilm_tiny", TEXTS)
    np.testing.assert_array_equal(vectors(folder, TEXTS), expected)


# transformers takes the prefix of the model type and none; with another it would start
# the encoder from random numbers, and warn.
@both_stacks
@pytest.mark.parametrize(
    "prefix",
    [passed("model."), passed("0.auto_model.")],
)
def test_other_prefixes_are_refused_with_both_lists(copy, vectors, prefix):
    folder = copy()
    edit_tensors(folder, lambda t: {prefix + k[5:]: v for k, v in t.items()})
    with pytest.raises(ValueError, match="missing tensors .*unknown tensors") as error:
        vectors(folder, TEXTS)
    assert f"'{prefix}embeddings.word_embeddings.weight'" in str(error.value)


# Nothing says which of the two holds.
@both_stacks
def test_a_tensor_under_two_names_is_refused_failed(copy, vectors):
    name = "embeddings.word_embeddings.weight"
    folder = copy()
    edit_tensors(folder, lambda t: t | {name: t[f"bert.{name}"] + 1})
    with pytest.raises(ValueError, match=f"has both .*{name}"):
        vectors(folder, TEXTS)


# Tokens


def with_token(folder, id):
    """An added token 'new' with this id, as `add_tokens` of transformers writes it."""
    token = {
        "id": id, "content": "new", "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": False,
    }  # fmt: skip
    edit_tokenizer(folder, lambda raw: raw["added_tokens"].append(token))


# transformers: an added token needs model.resize_token_embeddings; until then its text
# raises an IndexError in the embedding. Texts without it are not affected.
@both_stacks
def test_an_added_token_outside_the_table_is_named_failed(copy, vectors):
    folder = copy()
    # The library numbers added tokens from the end of its vocabulary.
    edit_json(folder / "config.json", vocab_size=30)
    cut = "bert.embeddings.word_embeddings.weight"
    edit_tensors(folder, lambda t: t | {cut: t[cut][:30].copy()})
    expected = vectors(folder, TEXTS)
    with_token(folder, 30)
    np.testing.assert_array_equal(vectors(folder, TEXTS), expected)
    with pytest.raises(ValueError, match=r"token id 30 \('new'\) .* table of 30 rows"):
        vectors(folder, [*TEXTS, "a new text"])


# sentence-transformers (Transformer.tokenize): str.lower of the text before tokenising.
@both_stacks
@pytest.mark.parametrize(
    ("kind", "settings", "lower"),
    [
        failed("bert", {"do_lower_case": True}, True),
        passed("bert", {"do_lower_case": False}, False),
        passed("bert", {"max_seq_length": 9}, False),
        # Its older releases wrote the settings under the name of the architecture.
        failed("roberta", {"do_lower_case": True}, True),
    ],
)
def test_lower_case_of_sentence_transformers(copy, vectors, kind, settings, lower):
    folder = copy()
    before = vectors(folder, ["A b C", "a b c"])
    edit_json(folder / f"sentence_{kind}_config.json", **settings)
    found = vectors(folder, ["A b C", "a b c"])
    np.testing.assert_array_equal(found[1], before[1])
    np.testing.assert_array_equal(found[0], before[1] if lower else before[0])


@pytest.mark.parametrize(
    ("file", "settings", "other"),
    [
        failed("sentence_bert_config.json", {"do_lower_case": True}, True),
        passed("sentence_bert_config.json", {"do_lower_case": False}, False),
        failed("tokenizer_config.json", {"truncation_side": "left"}, True),
        passed("tokenizer_config.json", {"truncation_side": "right"}, False),
    ],
)
def test_other_tokens_have_token_arrays_of_their_own(copy, file, settings, other):
    folder = copy()

    def key():
        return tokenise(
            ["A"], tokenizer_file=folder / "tokenizer.json", max_length=8,
            cache_dir=None, name="texts",
        ).key  # fmt: skip

    first = key()
    edit_json(folder / file, **settings)
    assert (key() != first) == other


# The text encoder of an index, which is what users ask.
def test_lower_case_reaches_the_queries_of_an_index_failed(copy):
    folder = copy()
    edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    identity = {"tower": str(folder), "query_length": LENGTH}
    index = build_index(
        np.eye(32, dtype=np.float32), range(32), tree=None, encoder=identity
    )
    encode = load_text_encoder(index)
    np.testing.assert_array_equal(encode(["A b C"]), encode(["a b c"]))


# transformers (PreTrainedTokenizerFast): the side in tokenizer_config.json, else the
# direction of the truncation in tokenizer.json; lengths and padding are its caller's.
@pytest.mark.parametrize(
    ("truncation", "side", "expected"),
    [
        passed(None, None, "abcd"),
        passed("Right", None, "abcd"),
        failed("Left", None, "cdef"),
        failed(None, "left", "cdef"),
        passed("Left", "right", "abcd"),
        passed("Right", "right", "abcd"),
    ],
)
def test_the_side_that_a_long_text_loses(copy, truncation, side, expected):
    folder = copy()

    def change(raw):
        if truncation:
            raw["truncation"] = {
                "direction": truncation, "max_length": 3, "strategy": "LongestFirst",
                "stride": 1,
            }  # fmt: skip
        raw["padding"] = {
            "strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
        }  # fmt: skip

    edit_tokenizer(folder, change)
    if side:
        edit_json(folder / "tokenizer_config.json", truncation_side=side)
    tokenizer = TextTokenizer(folder / "tokenizer.json")
    tokenizer.cut_to(6)
    (row,) = tokenizer(["a b c d e f"])
    first = ord("a") - 4
    assert row == [2, *(ord(letter) - first for letter in expected), 3]


# Without a post-processor the library adds no special tokens. A text without tokens is
# zero (sentence-transformers: Pooling divides by at least 1e-9).
@both_stacks
@pytest.mark.parametrize(
    ("name", "pooling"),
    [passed("bert_tiny", "mean"), failed("minilm_tiny", "cls")],
)
def test_a_tokeniser_without_special_tokens(copy, vectors, name, pooling):
    folder = copy(name)
    edit_tokenizer(folder, lambda raw: raw.update(post_processor=None))
    tokenizer = TextTokenizer(folder / "tokenizer.json")
    assert (tokenizer.special, tokenizer(["a b"])) == (0, [[4, 5]])
    found = vectors(folder, ["a b c", ""])
    assert np.abs(found[0]).max() > 0 and not found[1].any()
    np.testing.assert_allclose(found, by_numpy(folder, ["a b c", ""]), atol=3e-6)


# sentence-transformers: min(positions, model_max_length) if max_seq_length is not set;
# transformers writes 1e30 for tokenisers without a limit.
@pytest.mark.parametrize(
    ("sentence", "tokenizer", "expected"),
    [
        passed({"max_seq_length": 24}, {}, 24),
        passed({"max_seq_length": None}, {"model_max_length": 30}, 30),
        passed({"max_seq_length": 512}, {}, 40),
        passed({}, {"model_max_length": int(1e30)}, 40),
        passed({}, {"model_max_length": 20.0}, 20),
        failed({"max_seq_length": "24"}, {}, "'24'"),  # a TypeError
        failed({}, {"model_max_length": -1}, "-1"),
    ],
)
def test_longest_text_of_a_checkpoint(copy, sentence, tokenizer, expected):
    folder = copy()
    edit_json(folder / "sentence_bert_config.json", **sentence)
    edit_json(folder / "tokenizer_config.json", **tokenizer)
    if isinstance(expected, int):
        assert resolve(folder).max_length == expected
        return
    with pytest.raises(ValueError, match=f"{expected} in .* is no number of tokens"):
        resolve(folder)


# A tower has no vectors for later positions: it trained, and could not be asked.
@pytest.mark.parametrize("field", ["query_length", "document_length"])
@pytest.mark.parametrize(
    ("name", "length", "refused"),
    [
        failed("bert_tiny", 41, True),
        passed("bert_tiny", 40, False),
        # Two of the 42 positions are no token's.
        failed("roberta_tiny", 41, True),
    ],
)
def test_lengths_beyond_the_positions(beir_folder, name, length, field, refused):
    from experiments.configs import own
    from experiments.run.prepare import load_inputs

    config = own.get_config()
    config.dataset, config.tower.name = str(beir_folder), str(FIXTURES / name)
    config.tower.query_length = config.tower.document_length = 16
    config.tower[field] = length
    if refused:
        message = f"tower.{field} is {length}; must be at most 40, .* of {name}"
        with pytest.raises(ValueError, match=message):
            load_inputs(config)
    else:
        assert len(load_inputs(config).query_tokens)
