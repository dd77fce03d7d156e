"""Text in without JAX: the same embeddings, and refusals that name the file."""

import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ehi.index import build_index, open_index, save_index
from ehi.index.text import transformer
from ehi.index.text.encoder import (
    KNOWN_SHA256,
    TowerNotFoundError,
    find_folder,
    load_text_encoder,
)
from ehi.index.text.files import find_tokenizer, open_tokenizer, weights_sha256
from ehi.index.text.gelu import gelu
from ehi.index.text.head import apply_head
from ehi.index.text.pretrained import load_tower

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = ["bert_tiny", "distilbert_tiny", "minilm_tiny", "roberta_tiny", "star_tiny"]
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
# The vocabulary of the tiny towers is letters and punctuation.
TEXTS = ["a b c", "", "hello, world!", "z", " ".join("abcdefghijk" * 9), "q r s", "a b"]
QUESTIONS = [
    "How do I parse an ISO 8601 date string into a datetime object?",
    "Aspirin lowers the risk of colorectal cancer",
    "naïve café, 東京 and a 🦜 walk into a bar",
    "",
    "split a path into root and extension " * 12,
]


def make_index(tower, *, query_length=12, head=None, width=32, **identity):
    vectors = np.random.default_rng(0).normal(size=(20, width)).astype(np.float32)
    encoder = {"tower": str(tower), "query_length": query_length} | identity
    return build_index(vectors, range(20), tree=None, encoder=encoder, query_head=head)


def random_head(in_width, out_width, hidden):
    rng = np.random.default_rng(1)
    shapes = {
        "projection": (in_width, out_width),
        "w_in": (in_width, hidden),
        "b_in": (hidden,),
        "w_out": (hidden, out_width),
    }
    return {
        name: rng.normal(size=shape).astype(np.float32) / 4
        for name, shape in shapes.items()
    }


def jax_embeddings(folder, texts, length, head=None):
    """What training computes: padded tokens, `TextEncoder` and `Head`."""
    jax = pytest.importorskip("jax")
    from flax import nnx

    from ehi.model import pretrained
    from ehi.model.head import Head
    from ehi.model.transformer import unit_rows

    tokenizer = open_tokenizer(find_tokenizer(folder))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    encodings = tokenizer.encode_batch(texts)
    ids = np.array([encoding.ids for encoding in encodings])
    mask = np.array([encoding.attention_mask for encoding in encodings], bool)
    tower = pretrained.load_tower(pretrained.resolve(folder))
    x = jax.jit(lambda tower, ids, mask: tower(ids, mask))(tower, ids, mask)
    if head is None:
        return np.asarray(unit_rows(x))  # whether or not the tower does
    module = Head(*head["projection"].shape, hidden=len(head["b_in"]), rngs=nnx.Rngs(0))
    for name, value in head.items():
        getattr(module, name)[...] = value
    return np.asarray(module(x))


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(FIXTURES / "bert_tiny", tmp_path / "bert_tiny"))


@pytest.fixture
def minilm():
    try:
        return find_folder(MINILM)
    except TowerNotFoundError as error:
        pytest.skip(str(error))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors")


# The same numbers


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("hidden", [0, 24])
def test_embeddings_are_those_of_jax(name, hidden):
    head = random_head(32, 16, hidden) if hidden else None
    index = make_index(FIXTURES / name, head=head, width=16 if hidden else 32)
    found = load_text_encoder(index)(TEXTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    expected = jax_embeddings(FIXTURES / name, TEXTS, 12, head)
    np.testing.assert_allclose(found, expected, atol=3e-6)


def test_minilm_embeddings_are_those_of_jax_and_of_sentence_transformers(minilm):
    head = random_head(384, 96, 64)
    encode = load_text_encoder(make_index(MINILM, query_length=64, width=384))
    with_head = load_text_encoder(
        make_index(MINILM, query_length=64, head=head, width=96)
    )
    expected = jax_embeddings(minilm, QUESTIONS, 64)
    np.testing.assert_allclose(encode(QUESTIONS), expected, atol=2e-6)
    expected = jax_embeddings(minilm, QUESTIONS, 64, head)
    np.testing.assert_allclose(with_head(QUESTIONS), expected, atol=5e-6)
    with np.load(FIXTURES / "minilm_l6.npz") as reference:
        rows = zip(reference["ids"], reference["mask"], strict=True)
        found = load_tower(minilm)([ids[mask] for ids, mask in rows])
        np.testing.assert_allclose(found, reference["embeddings"], atol=2e-6)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_tower_equals_transformers(name, pooling):
    tower = load_tower(FIXTURES / name)
    changed = vars(tower) | {"pooling": pooling, "normalise": False}
    with np.load(FIXTURES / name / "reference.npz") as reference:
        rows = zip(reference["ids"], reference["mask"].astype(bool), strict=True)
        found = transformer.Tower(**changed)([ids[mask] for ids, mask in rows])
        np.testing.assert_allclose(found, reference[pooling], atol=2e-5)


def test_gelu_is_exact():
    x = np.linspace(-9, 9, 100_001, dtype=np.float32)
    expected = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()])
    error = np.abs(gelu(x.copy()) - expected)
    assert error[x < 0].max() < 1e-7
    # A positive number is rounded to float32 on top.
    assert (error <= 1e-7 + 6e-8 * np.abs(x)).all()
    extremes = np.float32([-1e30, -100, 0, 100, 1e30])
    np.testing.assert_allclose(gelu(extremes.copy()), [0, 0, 0, 100, 1e30], atol=1e-7)


@pytest.mark.parametrize("hidden", [0, 6])
def test_head_is_the_flax_head(hidden):
    pytest.importorskip("jax")
    from flax import nnx

    from ehi.model.head import Head

    head = Head(5, 3, hidden=hidden, rngs=nnx.Rngs(0))
    arrays = random_head(5, 3, 6)
    arrays = arrays if hidden else {"projection": arrays["projection"]}
    for name, value in arrays.items():
        getattr(head, name)[...] = value
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_allclose(apply_head(arrays, x), head(x), atol=1e-6)


def test_no_head_only_normalises():
    found = apply_head({}, np.float32([[3, 4], [0, 0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], atol=1e-7)


@pytest.mark.parametrize("name", ["bert_tiny", "minilm_tiny"])  # mean, cls
@pytest.mark.parametrize("chunk", [1, 20, 512])
def test_batches_equal_singles(name, chunk, monkeypatch):
    monkeypatch.setattr(transformer, "CHUNK_TOKENS", chunk)
    encode = load_text_encoder(make_index(FIXTURES / name))
    rng = np.random.default_rng(0)
    texts = TEXTS + [" ".join(rng.choice(list("abcxyz"), size=n)) for n in range(30)]
    singles = np.concatenate([encode([text]) for text in texts])
    np.testing.assert_allclose(encode(texts), singles, atol=1e-6)
    np.testing.assert_array_equal(encode(texts, threads=3), encode(texts))


def test_threads_share_an_encoder():
    encode = load_text_encoder(make_index(FIXTURES / "bert_tiny"))
    expected = encode(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(encode, [TEXTS] * 32):
            np.testing.assert_array_equal(found, expected)


def test_float16_weights_and_other_spellings(folder):
    expected = load_text_encoder(make_index(FIXTURES / "bert_tiny"))(TEXTS)

    def respell(name):
        name = name.removeprefix("bert.").replace("Norm.weight", "Norm.gamma")
        return name.replace("Norm.bias", "Norm.beta")

    edit_tensors(folder, lambda tensors: {respell(k): v for k, v in tensors.items()})
    found = load_text_encoder(make_index(folder))(TEXTS)
    np.testing.assert_array_equal(found, expected)
    edit_tensors(
        folder, lambda tensors: {k: v.astype("f2") for k, v in tensors.items()}
    )
    found = load_text_encoder(make_index(folder))(TEXTS)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    np.testing.assert_allclose(found, jax_embeddings(folder, TEXTS, 12), atol=3e-6)


# Texts


def test_long_texts_are_cut_to_the_query_length():
    encode = load_text_encoder(make_index(FIXTURES / "bert_tiny", query_length=5))
    assert [len(ids) for ids in encode.tokenise(["a", "a b c d e f", ""])] == [3, 5, 2]
    found = encode(["a b c", "a b c d e f", "a b c " * 10_000])
    np.testing.assert_allclose(found, found[:1].repeat(3, 0), atol=1e-6)


def test_one_str_is_one_text_and_none_are_none():
    encode = load_text_encoder(make_index(FIXTURES / "bert_tiny"))
    np.testing.assert_array_equal(encode("a b"), encode(["a b"]))
    np.testing.assert_array_equal(encode(np.array(["a b"])), encode(["a b"]))
    assert encode([]).shape == (0, 32)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 5], "text 1 is of type int, not str"),
        ([None], "text 0 is of type NoneType"),
        ([b"a"], "text 0 is of type bytes"),
        ([["a", "b"]], "text 0 is of type list"),
        (["a", "b\ud800"], "text 1 is not valid Unicode"),
    ],
)
def test_other_input_is_refused(texts, message):
    encode = load_text_encoder(make_index(FIXTURES / "bert_tiny"))
    with pytest.raises(ValueError, match=message):
        encode(texts)
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        encode(["a"], threads=0)


# Where the tower is


def test_tower_named_relative_to_the_index_moves_with_it(folder, tmp_path):
    index = make_index("../bert_tiny", tower_sha256=weights_sha256(folder))
    save_index(index, tmp_path / "index")
    expected = load_text_encoder(tmp_path / "index")(TEXTS)
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "index").rename(moved / "index")
    folder.rename(moved / "bert_tiny")
    found = load_text_encoder(open_index(moved / "index"))(TEXTS)
    np.testing.assert_array_equal(found, expected)


def test_tower_inside_the_index_folder_comes_first(folder, tmp_path):
    save_index(make_index("bert_tiny"), tmp_path / "index")
    with pytest.raises(TowerNotFoundError):
        load_text_encoder(tmp_path / "index", cache_dir=tmp_path / "none")
    shutil.copytree(folder, tmp_path / "index" / "bert_tiny")
    load_text_encoder(tmp_path / "index", cache_dir=tmp_path / "none")


def test_hub_ids_are_looked_up_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path))
    index = make_index("owner/tiny")
    with pytest.raises(TowerNotFoundError, match=r"hf download owner/tiny") as missing:
        load_text_encoder(index)
    assert missing.value.name == "owner/tiny"
    cached = tmp_path / "models" / "owner--tiny"
    assert str(cached) in str(missing.value)
    shutil.copytree(FIXTURES / "bert_tiny", cached)
    found = load_text_encoder(index)(TEXTS)
    # And a tower given by hand replaces the named one.
    given = load_text_encoder(make_index("no/such"), tower=FIXTURES / "bert_tiny")
    np.testing.assert_array_equal(found, given(TEXTS))


def test_hub_ids_are_looked_up_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("c0ffee")
    shutil.copytree(FIXTURES / "bert_tiny", model / "snapshots" / "c0ffee")
    load_text_encoder(make_index("owner/tiny"))
    # Half a snapshot, as left by another program, is none.
    (model / "snapshots" / "c0ffee" / "model.safetensors").unlink()
    with pytest.raises(TowerNotFoundError):
        load_text_encoder(make_index("owner/tiny"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c"])
def test_missing_folders_are_no_hub_ids(name):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_text_encoder(make_index(name))


def test_index_of_bare_embeddings_says_that_it_has_no_encoder():
    index = build_index(np.eye(4, dtype=np.float32), range(4), tree=None)
    with pytest.raises(ValueError, match="does not name its text encoder"):
        load_text_encoder(index)


# Files


def test_other_weights_are_refused(folder, tmp_path):
    sha256 = weights_sha256(folder)
    load_text_encoder(make_index(folder, tower_sha256=sha256))
    with pytest.raises(ValueError, match="bert_tiny.*built with 000000000000"):
        load_text_encoder(make_index(folder, tower_sha256="0" * 64))
    # An index that states no sha256 is still held to those we know.
    cached = tmp_path / "models" / MINILM.replace("/", "--")
    shutil.copytree(folder, cached)
    with pytest.raises(ValueError, match=f"expected are {KNOWN_SHA256[MINILM][:12]}"):
        load_text_encoder(make_index(MINILM), cache_dir=tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_damaged_files_are_named(folder, file):
    path = folder / file
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"[]", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=file):
            load_text_encoder(make_index(folder))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder} lacks {file}"):
        load_text_encoder(make_index(folder))


def test_pickled_weights_are_not_read_but_the_way_out_is_named(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin .* is a pickle"):
        load_text_encoder(make_index(folder))


@pytest.mark.parametrize("damage", [b"", b"\xff" * 9, b"#version: 0.2\nno such\n"])
def test_damaged_merges_are_named(tmp_path, damage):
    folder = Path(shutil.copytree(FIXTURES / "star_tiny", tmp_path / "star_tiny"))
    whole = (folder / "merges.txt").read_bytes()
    (folder / "merges.txt").write_bytes(damage or whole[: len(whole) // 2] + b" ")
    with pytest.raises(ValueError, match="vocab.json cannot be read"):
        load_text_encoder(make_index(folder))
    (folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="lacks tokenizer.json"):
        load_text_encoder(make_index(folder))


def test_half_a_projection_is_refused(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "star_tiny", tmp_path / "star_tiny"))
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != "norm.bias"})
    with pytest.raises(ValueError, match="has no tensor 'norm.bias'"):
        load_tower(folder)
    edit_json(folder / "config.json", model_type="bert")
    with pytest.raises(ValueError, match="has no tensor|unknown tensors"):
        load_tower(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, r"'t5' .* not one of \['bert', 'distilbert', 'roberta'"),
        ({"model_type": "roberta", "pad_token_id": 0}, "pad_token_id 0 .* only 1"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' .* only 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute'"),
        ({"hidden_size": None}, "hidden_size None in .*config.json"),
        ({"num_attention_heads": 5}, "width 32 .* no multiple of 5 heads"),
        ({"layer_norm_eps": "x"}, "layer_norm_eps 'x' in .*config.json"),
        ({"vocab_size": 99}, r"word_embeddings.*\(100, 32\).*implies \(99, 32\)"),
        ({"num_hidden_layers": 3}, r"safetensors has no tensor .*layer\.2\."),
        ({"num_hidden_layers": 1}, r"unknown tensors .*layer\.1\."),
    ],
)
def test_other_configurations_are_refused(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_text_encoder(make_index(folder))


def test_other_modules_and_poolings_are_refused(tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "minilm_tiny", tmp_path / "m"))
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "max"}')
    with pytest.raises(ValueError, match=r"\['max'\].*1_Pooling/config.json"):
        load_tower(folder)
    (folder / "modules.json").write_text('[{"type": "x.Transformer"}]')
    with pytest.raises(ValueError, match=r"\['Transformer'\].*modules.json"):
        load_tower(folder)


def test_tensors_of_other_types_are_refused(folder):
    edit_tensors(
        folder,
        lambda tensors: {k: v.astype(np.int32) for k, v in tensors.items()},
    )
    with pytest.raises(ValueError, match="model.safetensors has type I32"):
        load_tower(folder)


def test_tokeniser_of_another_tower_is_refused(folder):
    words = load_file(folder / "model.safetensors")[
        "bert.embeddings.word_embeddings.weight"
    ]
    edit_tensors(
        folder,
        lambda t: t | {"bert.embeddings.word_embeddings.weight": words[:4].copy()},
    )
    edit_json(folder / "config.json", vocab_size=4)
    encode = load_text_encoder(make_index(folder))
    with pytest.raises(ValueError, match="word table of 4 rows: tokenizer.json"):
        encode(["a b c"])


@pytest.mark.parametrize("length", [0, 2, -1, 41, 10**12, "8", 8.0, None, True])
def test_query_lengths_out_of_range_are_refused(length):
    with pytest.raises(ValueError, match=r"allowed are 3\.\.40"):
        load_text_encoder(make_index(FIXTURES / "bert_tiny", query_length=length))


def test_heads_that_do_not_fit_are_refused():
    tower, head = FIXTURES / "bert_tiny", random_head(32, 16, 8)
    for spoiled, message in (
        (head | {"projection": head["projection"][:9]}, r"projection.*\(9, 16\).*"),
        (head | {"b_in": head["b_in"][:7]}, r"w_in.*\(32, 8\)"),
        (head | {"other": head["b_in"]}, "arrays .*'other'"),
        ({"w_in": head["w_in"]}, r"arrays \['w_in'\]"),
        (None, "the tower has width 32, the index 16"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text_encoder(make_index(tower, head=spoiled, width=16))


def test_known_weights_are_those_of_the_model():
    pytest.importorskip("jax")
    from ehi.model import pretrained

    assert pretrained.KNOWN_SHA256 == KNOWN_SHA256


def test_text_search_loads_no_jax(tmp_path):
    save_index(make_index(FIXTURES / "bert_tiny"), tmp_path / "index")
    code = """
        import sys
        from ehi.index import open_index
        heavy = {"tokenizers", "safetensors", "huggingface_hub"} & sys.modules.keys()
        assert not heavy, heavy
        from ehi.index.text import load_text_encoder
        index = open_index(sys.argv[1])
        hits = index.search(load_text_encoder(index)(["a b c"]), 3)
        assert hits.ids.shape == (1, 3)
        assert (index.search_text("a b c", 3).ids == hits.ids).all()
        loaded = {name.split(".")[0] for name in sys.modules}
        bad = loaded & {"jax", "jaxlib", "flax", "ml_collections", "scipy", "optax"}
        assert not bad, bad
        ours = {n for n in sys.modules if n.startswith("ehi.")}
        assert all(n.startswith("ehi.index") for n in ours), ours
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", lines, str(tmp_path / "index")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
