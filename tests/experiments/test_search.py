import io
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ehi.index import build_index, open_index, save_index
from ehi.index.text import TowerNotFoundError
from experiments import search

FIXTURES = Path(__file__).parents[1] / "fixtures"
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
        # The length of a text decides the direction of its embedding.
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
        (["words", "--recall=1", "--beam=2"], "--recall finds --beam"),
        (["words", "--save"], "give --recall"),
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
        (["words", "--min-prob=2"], "min_prob must be a number between 0 and 1"),
        (["words", "--recall=95"], "recall must be above 0 and at most 1, got 95.0"),
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


def test_default_search_is_stored_or_an_eighth_of_the_leaves(index_path):
    default = search.default_search(open_index(index_path))
    assert default == {"beam": 3, "min_prob": 0.0, "rerank": 0}
    rng = np.random.default_rng(0)
    nodes = [rng.normal(size=(1, 16, WIDTH)).astype(np.float32)]
    tree = {"kind": "per_node", "nodes": nodes, "scale": 1.0}
    vectors = rng.normal(size=(32, WIDTH)).astype(np.float32)

    def default(tree, **options):
        return search.default_search(
            build_index(vectors, range(32), tree=tree, **options)
        )

    plain = {"min_prob": 0.0, "rerank": 0}
    assert default(tree) == {"beam": 2, **plain}
    assert default(None) == {"beam": 1, **plain}
    # A flat index may store the default beam of a config with a tree.
    assert default(None, encoder={"default_beam": 9})["beam"] == 1
    stored = {"default_beam": 16, "default_min_prob": 0.25}
    stored = default(tree, encoder=stored)
    assert stored == {"beam": 16, "min_prob": 0.25, "rerank": 0}


def test_beam_and_probability_of_the_command_line_come_first(index_path):
    index = open_index(index_path)

    def chosen(*arguments):
        arguments = [f"--index={index_path}", *arguments, "words"]
        return search.chosen_search(index, search.parse_arguments(arguments))

    assert chosen() == search.default_search(index)
    plain = {"min_prob": 0.0, "rerank": 0}
    assert chosen("--rerank=9") == search.default_search(index) | {"rerank": 9}
    assert chosen("--beam=5") == {**plain, "beam": 5}
    assert chosen("--min-prob=0.5") == {**plain, "beam": 16, "min_prob": 0.5}
    both = chosen("--min-prob=0.5", "--beam=2")
    assert both == {**plain, "beam": 2, "min_prob": 0.5}


def test_recall_finds_the_setting_and_stores_it(run, index_path):
    """The index belongs to no run, so its documents stand in for queries."""
    status, out, err = run("--recall=0.9", "--k=3", "--save")
    assert (status, err) == (0, "")
    assert out.startswith("tuned on 32 documents in place of queries, which may need")
    stored = open_index(index_path).setting
    assert f"beam={stored['beam']}, min_prob={stored['min_prob']:.4g}" in out
    _, answered, _ = run("words", "--json")
    status, again, err = run("words", "--json", "--recall=0.9", "--k=5")
    assert status == 0 and "recall@5" in err
    assert len(json.loads(answered)["hits"]) == len(json.loads(again)["hits"]) == 5


def test_recall_is_tuned_on_the_dev_queries_of_the_run(run, index_path, monkeypatch):
    from ehi.data import datasets

    qrels = {"dev": {"a": {}, "b": {}}, "test": {"c": {}}}
    data = types.SimpleNamespace(
        name="own", query_ids=list("abc"), query_texts=["one", "three", "fifteen"],
        qrels=qrels,
    )  # fmt: skip
    monkeypatch.setattr(datasets, "open_dataset", lambda name: {"own": data}[name])
    (index_path.parent / "config.json").write_text('{"dataset": "own"}')
    index = open_index(index_path)
    found = search.run_queries(index, index_path)
    assert found == ("dev queries of own", ["one", "three"])
    _, out, _ = run("--recall=1")
    assert out.startswith("tuned on 2 dev queries of own\n")
    del qrels["dev"]
    found = search.run_queries(index, index_path)
    assert found == ("queries of own without judgements", ["one", "three"])
    (index_path.parent / "config.json").write_text("{}")
    _, out, err = run("--recall=1")
    assert "cannot be read" in err and out.startswith("tuned on 32 documents")


@pytest.mark.parametrize("head", [None, {"projection": 2 * np.eye(WIDTH)}])
def test_recall_is_tuned_on_the_vectors_of_the_run(run, tmp_path, monkeypatch, head):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    x, q = rng.normal(size=(300, WIDTH)), rng.normal(size=(40, WIDTH))
    (tmp_path / "data").mkdir()
    for name, given in (("documents", x), ("queries", q)):
        np.save(tmp_path / f"data/{name}.npy", given.astype(np.float32))
    config = {"dataset": str(tmp_path / "data"), "vectors": {"metric": "cosine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    tree = {"kind": "per_node", "nodes": [x[None, :16]], "scale": 1.0}
    encoder = {"vectors": "cosine", "run": "ehi"}
    built = build_index(x, range(300), tree=tree, encoder=encoder, query_head=head)
    save_index(built, tmp_path / "index")  # over that of the fixture
    source, queries = search.run_queries(built, tmp_path / "index")
    assert source == "dev queries of data" and 0 < len(queries) < 40
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    nearest = np.abs(queries[:, None] - q).sum(axis=2).min(axis=1)
    assert nearest.max() < 1e-5  # a head returns unit vectors
    status, out, err = run("--recall=0.9", "--save")
    assert (status, err) == (0, "") and "dev queries of data" in out
    assert open_index(tmp_path / "index").setting is not None


@pytest.mark.parametrize("leaf", ["pq", "raw"])
def test_documents_stand_in_for_queries(leaf):
    """Codes that lose nothing decode to the documents themselves."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.standard_normal((2, 2)))[0].astype(np.float32)
    centroids = rng.standard_normal((4, 2)).astype(np.float32)
    words = rng.standard_normal((1, 256, 2)).astype(np.float32)
    x = centroids[:, None] + words[0, :20] @ turn.T  # (4, 20, 2)
    leaves = np.repeat(np.arange(4), 20)[:, None]
    tree = {"kind": "per_node", "nodes": [centroids[None]], "scale": 1.0}
    codes = {"codebooks": words, "rotation": turn, "leaf_centroids": centroids}
    built = build_index(
        x.reshape(80, 2), range(80), tree=tree, leaves=leaves,
        **(codes if leaf == "pq" else {}),
    )  # fmt: skip
    found = search.document_vectors(built)
    np.testing.assert_allclose(found, x.reshape(80, 2), atol=1e-5)


def test_tower_that_is_not_here_is_fetched(index_path, tmp_path, monkeypatch):
    from ehi.model import pretrained

    asked = []

    def resolve(name):
        asked.append(name)
        return types.SimpleNamespace(folder=FIXTURES / "bert_tiny")

    monkeypatch.setenv("EHI_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "resolve", resolve)
    vectors = np.eye(32, dtype=np.float32)
    identity = {"tower": "no/such-tower", "query_length": 8}
    index = build_index(vectors, range(32), tree=None, encoder=identity)
    assert search.load_query_encoder(index)(["a b c"]).shape == (1, 32)
    # A tower that is here is not fetched.
    search.load_query_encoder(index, tower=FIXTURES / "bert_tiny")
    assert asked == ["no/such-tower"]


def test_without_jax_a_tower_that_is_not_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("EHI_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ehi.model.pretrained", None)  # as if none there
    identity = {"tower": "no/such-tower", "query_length": 8}
    index = build_index(np.eye(32), range(32), tree=None, encoder=identity)
    with pytest.raises(TowerNotFoundError, match="hf download no/such-tower"):
        search.load_query_encoder(index)


def test_answering_loads_no_jax(tmp_path):
    vectors = np.eye(32, dtype=np.float32)
    identity = {"tower": str(FIXTURES / "bert_tiny"), "query_length": 8}
    index = build_index(vectors, range(32), tree=None, encoder=identity)
    save_index(index, tmp_path / "index")
    code = """
        import sys
        from experiments import search
        assert search.main([f"--index={sys.argv[1]}", "a b c"]) == 0
        bad = {"jax", "flax", "ml_collections", "scipy"} & sys.modules.keys()
        assert not bad, bad
    """
    lines = "\n".join(line.strip() for line in code.splitlines())
    command = [sys.executable, "-c", lines, str(tmp_path / "index")]
    root = FIXTURES.parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('"a b c"')
