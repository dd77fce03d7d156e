"""The service answers as the index does, and refuses in one sentence what it can't."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_cases import (
    LEAVES,
    NUM,
    QUERIES,
    VECTORS,
    WIDTH,
    assert_answers,
    client_of,
    make_folder,
    unit,
)

from ehi.index import build_index, open_index, save_index
from ehi.serve.limits import Limits
from ehi.serve.schema import openapi

VECTOR = QUERIES[0].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve") / "index")


@pytest.fixture(scope="module")
def client(folder):
    with client_of(folder) as client:
        yield client


def ask(client, **body):
    return client.post("/search", json=body)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"beam": 4},
        {"beam": LEAVES, "min_prob": 0.05},
        {"beam": 3, "rerank": 20},
        {"beam": LEAVES, "allow": ["d1", "d2", "nobody"]},
        {"beam": 5, "deny": ["d3"]},
        {"beam": LEAVES, "k": 100},
    ],
)
def test_answers_are_those_of_a_direct_search(client, folder, settings):
    index = open_index(folder)
    for queries, field in ((QUERIES, "vectors"), (QUERIES[:1], "vector")):
        body = queries.tolist() if field == "vectors" else queries[0].tolist()
        answer = ask(client, **{field: body}, **settings)
        assert answer.status_code == 200, answer.text
        assert_answers(answer.json()["results"], index.search(queries, **settings))
    texts = ["a b c", "hello", "q r s"]
    answer = ask(client, texts=texts, **settings).json()
    assert_answers(answer["results"], index.search_text(texts, **settings))
    assert answer["documents"] == NUM and answer["generation"] == 1


def test_fewer_candidates_than_results_become_as_many(client):
    settings = {"vector": VECTOR, "k": 5, "beam": LEAVES, "documents": False}
    few, many = (ask(client, **settings, rerank=n).json() for n in (3, 5))
    assert few == many
    assert ask(client, **settings, rerank=0).json() == ask(client, **settings).json()


def test_documents_and_paths(client, folder):
    index = open_index(folder)
    plain = ask(client, text="a b", documents=False).json()["results"][0]
    assert set(plain) == {"hits", "visited"}
    assert set(plain["hits"][0]) == {"rank", "id", "score"}
    result = ask(client, text="a b", beam=4, paths=True).json()["results"][0]
    hits = index.search_text("a b", beam=4)
    leaves = [leaf["leaf"] for leaf in result["leaves"]]
    assert leaves == hits.leaves[0].tolist()
    for hit, row in zip(result["hits"], hits.rows[0].tolist(), strict=True):
        assert hit["document"] == index.document(row)
        assert row in index.contents.rows_in_leaf(hit["leaf"])
        assert tuple(hit["path"]) == index.leaf_path(hit["leaf"])


def test_a_leaf_shows_its_documents(client, folder):
    index = open_index(folder)
    for leaf in range(LEAVES):
        rows = index.contents.rows_in_leaf(leaf)
        found = client.get(f"/leaves/{leaf}?limit=3").json()
        assert found["size"] == len(rows) and tuple(found["path"]) == index.leaf_path(
            leaf
        )
        ids = [member["id"] for member in found["members"]]
        assert ids == index.external_ids(rows[:3]).tolist()


def test_questions_that_arrive_together_share_a_search(folder):
    """Each of 40 clients gets its own answer, whatever it shares a search with."""
    index = open_index(folder)
    queries, rng = unit(40, WIDTH, seed=5), np.random.default_rng(0)
    settings = [{"k": int(k), "beam": int(b)} for k, b in rng.integers(1, 4, (40, 2))]
    settings[7] = {"k": 3, "beam": 1, "allow": ["d1"]}
    limits = Limits(batch_seconds=0.05, batch_queries=16)
    with client_of(folder, limits=limits) as client, ThreadPoolExecutor(40) as pool:
        answers = list(
            pool.map(
                lambda i: ask(client, vector=queries[i].tolist(), **settings[i]).json(),
                range(40),
            )
        )
        metrics = client.get("/metrics").text
    for i, answer in enumerate(answers):
        assert_answers(
            answer["results"], index.search(queries[i : i + 1], **settings[i])
        )
    values = dict(
        line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#"
    )
    assert float(values["ehi_batch_queries_sum"]) == 40
    assert float(values["ehi_batch_queries_count"]) < 40
    assert float(values['ehi_requests_total{path="/search",status="200"}']) == 40
    assert float(values["ehi_waiting_requests"]) == 0


WRONG = [  # body, status, words of the sentence
    ({"vector": VECTOR[:-1]}, 422, "vector needs 32 numbers, the width of this index"),
    ({"vectors": [VECTOR, VECTOR + [1.0]]}, 422, "vectors[1] needs 32 numbers"),
    ({"vectors": []}, 422, "vectors: expected array of length >= 1"),
    ({"vectors": [VECTOR] * 65}, 422, "vectors: expected array of length <= 64"),
    ({"vector": [1e300] + VECTOR[1:]}, 422, "vector"),
    ({"vector": [None] + VECTOR[1:]}, 422, "vector"),
    ({}, 422, "give one of text, texts, vector, vectors; got none"),
    ({"text": "a", "vector": VECTOR}, 422, "got text and vector"),
    ({"text": ""}, 422, "text: expected str of length >= 1"),
    ({"text": "a" * 10_001}, 422, "text: expected str of length <= 10000"),
    ({"text": None}, 422, "text: expected str, got null"),
    ({"text": "a", "k": 0}, 422, "k: expected number >= 1"),
    ({"text": "a", "k": 1001}, 422, "k: expected number <= 1000"),
    ({"text": "a", "k": 1.5}, 422, "k: expected whole number"),
    ({"text": "a", "k": True}, 422, "k: expected number, got bool"),
    ({"text": "a", "beam": LEAVES + 1}, 422, "beam: expected number <= 9"),
    ({"text": "a", "min_prob": 1.5}, 422, "min_prob: expected number <= 1"),
    ({"text": "a", "rerank": 10_001}, 422, "rerank: expected number <= 10000"),
    ({"text": "a", "allow": [3]}, 422, "allow[0]: expected str, got int"),
    ({"text": "a", "lang": "en"}, 422, "lang is no field of a search: there are text"),
    ([1], 422, "expected object, got array"),
    (json.loads("[" * 500 + "]" * 500), 422, "expected object, got array"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status", "words"), WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(client, body, status, words):
    answer = client.post("/search", json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and "\n" not in answer.json()["error"]
    assert words.lower() in answer.json()["error"].lower()
    assert ask(client, text="a").status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"NaN", b'{"text"'],
)
def test_what_is_not_json_is_refused(client, body):
    kind = {"content-type": "application/json; charset=utf-8"}
    answer = client.post("/search", content=body, headers=kind)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_paths_methods_kinds_and_sizes(client):
    assert client.get("/nothing").status_code == 404
    assert client.get("/nothing").json() == {
        "error": "there is no /nothing: see /openapi.json"
    }
    wrong = client.get("/search")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json() == {"error": "/search does not answer GET"}
    assert client.post("/search", content=b"{}").status_code == 415
    large = client.post(
        "/search", content=b" " * 2**21, headers={"content-type": "application/json"}
    )
    assert large.status_code == 413
    assert large.json() == {"error": "a body has at most 1,048,576 bytes"}
    for leaf in ("9", "-1", "x", "9" * 5000, "%C2%B2"):
        assert client.get(f"/leaves/{leaf}").status_code == 404
    for limit in ("0", "x", "1001", "-1", ""):
        assert client.get(f"/leaves/1?limit={limit}").status_code == 422


def test_an_index_of_vectors_refuses_text(tmp_path):
    folder = make_folder(tmp_path / "index", words=False, strings=False)
    with client_of(folder) as client:
        answer = ask(client, text="a b")
        assert answer.status_code == 409
        assert "does not name its text encoder" in answer.json()["error"]
        assert client.get("/health").json()["text"] is False
        found = ask(client, vector=VECTOR, beam=9.0, allow=[7.0]).json()["results"][0][
            "hits"
        ]
        assert [hit["id"] for hit in found] == [7]


def test_filters_over_metadata(tmp_path, client):
    about = [{"lang": "de" if i % 3 else "en", "year": i} for i in range(NUM)]
    folder = make_folder(tmp_path / "index", metadata=about)
    index, where = open_index(folder), "lang == 'en' and year < 30"
    with client_of(folder) as filtered:
        assert filtered.get("/health").json()["fields"] == index.fields
        settings = {"where": where, "beam": LEAVES, "allow": ["d0", "d1", "d3", "d33"]}
        answer = ask(filtered, vectors=QUERIES.tolist(), **settings).json()
        assert_answers(answer["results"], index.search(QUERIES, **settings))
        hits = answer["results"][0]["hits"]
        assert sorted(hit["id"] for hit in hits) == ["d0", "d3"]
        assert all(hit["metadata"] == about[int(hit["id"][1:])] for hit in hits)
        for wrong in (
            "lang ==",
            "nobody == 1",
            "lang == 1",
            "(" * 5000,
            "__import__('os')",
        ):
            answer = ask(filtered, text="a", where=wrong)
            assert (answer.status_code, list(answer.json())) == (422, ["error"])
    answer = ask(client, text="a", where=where)  # an index without metadata
    assert "where is no field of a search" in answer.json()["error"]


def test_a_token_is_asked_for(folder):
    with client_of(folder, token="sesame") as client:
        for given in ("", "Bearer", "Bearer sesam", "Basic sesame", "Bearer sesameé"):
            headers = {"authorization": given.encode()} if given else {}
            answer = client.post("/search", json={"text": "a"}, headers=headers)
            assert answer.status_code == 401, given
            assert answer.headers["www-authenticate"] == "Bearer"
            assert list(answer.json()) == ["error"]
        assert client.get("/metrics").status_code == 401
        assert client.get("/leaves/0").status_code == 401
        for path in ("/", "/health", "/openapi.json"):
            assert client.get(path).status_code == 200
        client.headers["authorization"] = "Bearer sesame"
        assert ask(client, text="a").status_code == 200
        assert client.get("/metrics").status_code == 200
        client.headers["authorization"] = "bearer sesame"  # in any case, says RFC 9110
        assert client.get("/metrics").status_code == 200


def test_other_names_of_this_machine_are_not_answered(client):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        answer = client.get("/health", headers={"host": host})
        assert (answer.status_code, list(answer.json())) == (421, ["error"])
    names = ("localhost", "localhost:8000", "127.0.0.1:80", "[::1]", "[::1]:8000")
    for host in (*names, "127.0.0.2:8000"):
        assert client.get("/health", headers={"host": host}).status_code == 200


def test_too_many_at_once_are_told_to_come_back(folder):
    limits = Limits(batch_seconds=0.2, waiting=2)
    with client_of(folder, limits=limits) as client, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: ask(client, text="a"), range(6)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [200, 200, 503, 503, 503, 503]
        refused = next(a for a in answers if a.status_code == 503)
        assert refused.headers["retry-after"] == "1" and list(refused.json()) == [
            "error"
        ]
        assert ask(client, text="a").status_code == 200


def wait_for(client, generation):
    for _ in range(500):
        health = client.get("/health").json()
        if health["generation"] == generation:
            return health
        time.sleep(0.01)
    raise AssertionError(f"generation {generation} was not seen: {health}")


def test_what_others_write_is_taken_over(tmp_path):
    folder = make_folder(tmp_path / "index")
    with client_of(folder) as client:
        writer = open_index(folder)
        before = client.reader.state
        new = [{"title": "new", "line": ""}]
        writer.add(QUERIES[:1], ["new"], documents=new)
        assert wait_for(client, 2)["documents"] == NUM + 1
        best = ask(client, vector=VECTOR, beam=LEAVES).json()["results"][0]["hits"][0]
        assert (best["id"], best["document"]) == ("new", new[0])
        writer.delete(["new", "d0"])
        writer.compact()
        assert wait_for(client, 4)["documents"] == NUM - 1
        answer = ask(client, vectors=QUERIES.tolist(), beam=LEAVES).json()
        assert_answers(answer["results"], writer.search(QUERIES, beam=LEAVES))
        # A search that began with the first state ends with it.
        assert before.index.search(VECTORS[:1], k=1, beam=LEAVES).ids[0][0] == "d0"
        assert before.index.document(0)["title"] == "t0"


def test_another_index_in_its_place_is_opened(tmp_path):
    folder = make_folder(tmp_path / "index")
    with client_of(folder) as client:
        narrow = build_index(np.eye(4, dtype=np.float32), range(4), tree=None)
        save_index(narrow, folder, documents=list("abcd"))
        assert wait_for(client, 2)["width"] == 4
        hits = ask(client, vector=[0, 1, 0, 0], k=1).json()["results"][0]["hits"]
        assert hits == [{"rank": 1, "id": 1, "score": 1.0, "document": "b"}]
        assert "4 numbers" in ask(client, vector=VECTOR).json()["error"]


@pytest.mark.parametrize(
    "damaged", [lambda text: "{", lambda text: text.replace("width", "w")]
)
def test_a_folder_that_breaks_is_served_on(tmp_path, damaged):
    folder = make_folder(tmp_path / "index")
    with client_of(folder) as client:
        manifest = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_text(damaged(manifest.decode()))
        for _ in range(500):
            if client.get("/health").json()["status"] == "stale":
                break
            time.sleep(0.01)
        assert client.get("/health").json()["status"] == "stale"
        assert "ehi_index_stale 1.0" in client.get("/metrics").text
        assert ask(client, text="a").status_code == 200
        (folder / "manifest.json").write_bytes(manifest)
        for _ in range(500):
            if client.get("/health").json()["status"] == "ok":
                break
            time.sleep(0.01)
        assert client.get("/health").json()["status"] == "ok"


def test_openapi_says_what_is_validated(client):
    described = client.get("/openapi.json").json()
    state = client.reader.state
    assert described == json.loads(
        json.dumps(openapi(state.decoder.type, LEAVES, 1000, False))
    )
    assert described["openapi"].startswith("3.1")
    fields = described["components"]["schemas"]["SearchRequest"]["properties"]
    assert fields["vector"]["minItems"] == fields["vector"]["maxItems"] == WIDTH
    assert fields["beam"]["maximum"] == LEAVES and fields["k"]["maximum"] == 1000
    assert set(described["paths"]) == {
        "/search", "/leaves/{leaf}", "/health", "/metrics"
    }  # fmt: skip


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "http:" not in answer.text and "https:" not in answer.text
    for way_in in (
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
    ):
        assert way_in not in answer.text
