"""NumPy encodes text to the same embeddings as JAX."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from text_cases import (
    FIXTURES,
    MINILM,
    QUESTIONS,
    TEXTS,
    TINY,
    copy_of,
    edit_tensors,
    jax_embeddings,
    make_index,
    random_head,
)

from ehi.index import save_index
from ehi.index.text import tower as tower_module
from ehi.index.text.encoder import (
    TowerNotFoundError,
    apply_head,
    find_folder,
    load_text_encoder,
)
from ehi.index.text.tower import Tower, gelu, read_tower


@pytest.fixture
def folder(tmp_path):
    """A copy of a tiny checkpoint that a test may change."""
    return copy_of("bert_tiny", tmp_path)


@pytest.fixture
def minilm():
    try:
        return find_folder(MINILM)
    except TowerNotFoundError as error:
        pytest.skip(str(error))


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
        found = read_tower(minilm)([ids[mask] for ids, mask in rows])
        np.testing.assert_allclose(found, reference["embeddings"], atol=2e-6)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_tower_equals_transformers(name, pooling):
    tower = read_tower(FIXTURES / name)
    changed = vars(tower) | {"pooling": pooling, "normalise": False}
    with np.load(FIXTURES / name / "reference.npz") as reference:
        rows = zip(reference["ids"], reference["mask"].astype(bool), strict=True)
        found = Tower(**changed)([ids[mask] for ids, mask in rows])
        np.testing.assert_allclose(found, reference[pooling], atol=2e-5)


def test_gelu_is_exact():
    x = np.linspace(-9, 9, 100_001, dtype=np.float32)
    expected = np.array([v * math.erfc(-v / math.sqrt(2)) / 2 for v in x.tolist()])
    error = np.abs(gelu(x.copy()) - expected)
    assert error[x < 0].max() < 1e-7
    # Positive results are rounded to float32 as well.
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
    monkeypatch.setattr(tower_module, "CHUNK_TOKENS", chunk)
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
        bad = {n for n in ours if not n.startswith(("ehi.index", "ehi.files"))}
        assert not bad, bad
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", lines, str(tmp_path / "index")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
