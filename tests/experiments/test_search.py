import io
import json
import os

import numpy as np
import pytest

from ehi.index import build_index, open_index, save_index
from experiments import search

WIDTH = 4


@pytest.fixture
def index_path(tmp_path):
    """A saved index of 32 documents in 16 leaves that names a text encoder."""
    rng = np.random.default_rng(0)
    nodes = [rng.normal(size=(1, 16, WIDTH)).astype(np.float32)]
    built = build_index(
        rng.normal(size=(32, WIDTH)).astype(np.float32),
        [f"d{i}" for i in range(32)],
        tree={"kind": "per_node", "nodes": nodes, "scale": 1.0},
        encoder={"tower": "a/tower", "query_length": 8, "default_beam": 3},
    )
    shown = [{"title": f"f{i}", "line": f"def f{i}():"} for i in range(32)]
    save_index(built, tmp_path / "index", documents=shown)
    return tmp_path / "index"


@pytest.fixture
def run(index_path, monkeypatch, capsys):
    """run(*arguments, stdin='') -> status, stdout, stderr; the encoder is a fake"""

    def fake_encoder(index, tower=None):
        # The first words decide the direction, the number of texts the rows.
        return lambda texts: np.array(
            [[len(t), 1, -1, 0] for t in texts], dtype=np.float32
        )

    monkeypatch.setattr(search, "load_query_encoder", fake_encoder)

    def call(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = search.main([f"--index={index_path}", *arguments])
        return status, *capsys.readouterr()

    return call


def test_answers_in_words(run):
    status, out, err = run("parse", "a", "date", "--k=2")
    assert (status, err) == (0, "")
    assert out.startswith('"parse a date"') and "in 3 of 16 leaves" in out
    assert out.count(" leaf ") == 2


def test_answers_for_programs(run):
    status, out, _ = run("parse a date", "--json", "--k=4", "--beam=16")
    found = json.loads(out)
    assert status == 0
    assert found["query"] == "parse a date"
    assert found["documents_visited"] == 32
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4]


def test_repl_answers_each_line_and_ends_with_the_input(run):
    status, out, err = run("--repl", "--json", stdin="one\n\n  \nand two\n")
    assert (status, err) == (0, "")
    assert [json.loads(x)["query"] for x in out.splitlines()] == ["one", "and two"]


def test_repl_survives_a_bad_question(run, monkeypatch):
    def answer(index, encode, query, **_):
        if "bad" in query:
            raise ValueError("no such thing")
        return "fine"

    monkeypatch.setattr(search, "answer", answer)
    status, out, err = run("--repl", stdin="bad\ngood\n")
    assert (status, out, err) == (0, "fine\n", "error: no such thing\n")


def test_interrupt_ends_quietly(run, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "converse", interrupt)
    status, out, err = run("--repl")
    assert (status, out, err) == (0, "", "\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["words", "--repl"], "either a query or --repl"),
        ([], "either a query or --repl"),
        (["  "], "the query is empty"),
        (["words", "--k=0"], "0 is not a positive number"),
        (["words", "--beam=many"], "beam"),
    ],
)
def test_wrong_arguments_end_with_usage(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["words", "--beam=17"], "beam 17 is larger than the 16 leaves"),
        (["words", "--rerank=50"], "rerank"),
    ],
)
def test_settings_the_index_refuses_are_one_sentence(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_missing_index_and_other_folder_are_errors(tmp_path, capsys):
    for folder in (tmp_path / "none", tmp_path):
        assert search.main([f"--index={folder}", "words"]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and str(folder) in err


def test_default_beam_is_stored_or_an_eighth_of_the_leaves(index_path):
    index = open_index(index_path)
    assert search.default_beam(index) == 3
    rng = np.random.default_rng(0)
    nodes = [rng.normal(size=(1, 16, WIDTH)).astype(np.float32)]
    tree = {"kind": "per_node", "nodes": nodes, "scale": 1.0}
    vectors = rng.normal(size=(32, WIDTH)).astype(np.float32)
    assert search.default_beam(build_index(vectors, range(32), tree=tree)) == 2
    assert search.default_beam(build_index(vectors, range(32), tree=None)) == 1
    # A flat index keeps the identity of its config, whose tree it does not have.
    flat = build_index(vectors, range(32), tree=None, encoder={"default_beam": 9})
    assert search.default_beam(flat) == 1


def test_index_of_bare_embeddings_says_that_it_has_no_encoder():
    index = build_index(np.eye(WIDTH, dtype=np.float32), range(WIDTH), tree=None)
    with pytest.raises(ValueError, match="does not name its text encoder"):
        search.load_query_encoder(index)


def test_tower_inside_the_index_folder_comes_first(index_path):
    index = open_index(index_path)
    assert search.tower_location(index) == "a/tower"
    os.makedirs(index_path / "a" / "tower")
    assert search.tower_location(index) == index_path / "a" / "tower"


@pytest.mark.parametrize("hidden", [0, 6])
def test_numpy_head_is_the_flax_head(hidden):
    from flax import nnx

    from ehi.model.encoder import Head

    head = Head(5, 3, hidden=hidden, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("projection", "w_in", "b_in", "w_out")[: 4 if hidden else 1]:
        parameter = getattr(head, name)
        arrays[name] = rng.normal(size=parameter.shape).astype(np.float32)
        parameter[...] = arrays[name]
    x = rng.normal(size=(4, 5)).astype(np.float32)
    np.testing.assert_allclose(search.apply_head(arrays, x), head(x), atol=1e-6)


def test_no_head_only_normalises():
    found = search.apply_head({}, np.float32([[3, 4], [0, 0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], atol=1e-7)


def test_tokens_are_cut_and_padded_to_one_length():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a"])}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(
        ("[SEP]", 2), ("[CLS]", 1)
    )
    ids, mask = search.pad_tokens(tokenizer, ["a", "a a a a a a"], 5)
    assert ids.tolist() == [[1, 3, 2, 0, 0], [1, 3, 3, 3, 2]]
    assert mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
