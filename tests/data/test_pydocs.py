import platform

import numpy as np
import pytest

from ehi.data import pydocs
from ehi.data.datasets import open_dataset

SOURCE = '''
class Clock:
    """A class is no document."""

    def now(self, zone=None):  # the zone
        """Return the current time
        in a zone.

        More words that are not part of the summary.
        """
        # h\u00e9re comes the time
        return self.read(zone)

    def stop(self):
        "Too short."

    async def sleep(self): "Wait for \u00e9 while, quietly."; return self.wait()

    def abstract(self):
        """Do what only a subclass knows."""
        raise NotImplementedError

def outer():
    """Return the current  TIME in a zone"""
    def inner():
        """A function inside a function is private."""
        return 1
    return inner

def copied(zone):
    """Give the time of some zone."""
    return self.read(zone)

def other_stub():
    """Do what nobody has written yet."""
    raise NotImplementedError
'''


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "pkg" / "test" / "skipped.py").write_text(SOURCE, encoding="utf-8")
    return pydocs.find_functions(tmp_path)


def test_functions_and_methods_with_a_summary(functions):
    assert [(function.name, function.summary) for function in functions] == [
        ("pkg.Clock.now", "Return the current time in a zone."),
        ("pkg.Clock.sleep", "Wait for \u00e9 while, quietly."),
        ("pkg.Clock.abstract", "Do what only a subclass knows."),
        ("pkg.outer", "Return the current TIME in a zone"),
        ("pkg.copied", "Give the time of some zone."),
        ("pkg.other_stub", "Do what nobody has written yet."),
    ]


def test_text_is_signature_and_body_without_docstring(functions):
    by_name = {function.name: function.text for function in functions}
    assert by_name["pkg.Clock.now"] == (
        "def now(self, zone=None):  # the zone\n"
        "    # h\u00e9re comes the time\n"
        "    return self.read(zone)"
    )
    assert "\u00e9" not in by_name["pkg.Clock.sleep"]
    assert "return self.wait()" in by_name["pkg.Clock.sleep"]


def test_groups_join_summaries_and_bodies_but_not_stubs(functions):
    # now and outer share a summary, now and copied a body; the two stubs are strangers.
    assert pydocs.group_functions(functions) == [0, 1, 2, 0, 0, 5]


def test_name_defined_twice_is_numbered(tmp_path):
    definition = 'def f():\n    """Say what it is."""\n    return 1\n'
    (tmp_path / "m.py").write_text(definition * 2)
    names = [function.name for function in pydocs.find_functions(tmp_path)]
    assert names == ["m.f", "m.f#2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset("pydocs", data_dir=tmp_path_factory.mktemp("pydocs"))


def test_standard_library(dataset):
    assert 4500 < len(dataset.documents) < 7500
    assert 0.9 < len(dataset.query_ids) / len(dataset.documents) < 1
    share = {s: len(q) / len(dataset.query_ids) for s, q in dataset.qrels.items()}
    assert share == pytest.approx({"train": 0.64, "dev": 0.16, "test": 0.2}, abs=0.02)
    assert dataset.source["python"] == platform.python_version()
    row = dataset.doc_ids.index("textwrap.dedent")
    assert dataset.documents[row].title == "textwrap.dedent"
    assert dataset.documents[row].text.startswith("def dedent(text):")
    query = dataset.query_ids.index("query:textwrap.dedent")
    expected = "Remove any common leading whitespace from every line in `text`."
    assert dataset.query_texts[query] == expected


def test_no_document_answers_in_two_splits(dataset):
    answers = {split: dataset.positives(split)[1] for split in dataset.qrels}
    groups = {split: dataset.groups[docs] for split, docs in answers.items()}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert len(np.intersect1d(answers[one], answers[other])) == 0
        assert len(np.intersect1d(groups[one], groups[other])) == 0
    answered = np.unique(np.concatenate(list(answers.values())))
    assert len(answered) == len(dataset.documents)


def test_every_member_of_a_group_is_relevant(dataset):
    queries, docs, _ = dataset.positives("train")
    sizes = np.bincount(dataset.groups)
    for query in np.unique(queries)[:200]:
        relevant = docs[queries == query]
        assert len(set(dataset.groups[relevant])) == 1
        assert len(relevant) == sizes[dataset.groups[relevant[0]]]


def test_no_docstring_in_a_document(dataset):
    rows = {id: row for row, id in enumerate(dataset.doc_ids)}
    summaries = zip(dataset.query_ids, dataset.query_texts, strict=True)
    for query_id, summary in list(summaries)[::20]:
        document = dataset.documents[rows[query_id.removeprefix("query:")]]
        if "=" not in summary:  # a docstring may begin by repeating the signature
            assert summary not in " ".join(document.text.split())


def test_deterministic(dataset, tmp_path):
    again = open_dataset("pydocs", data_dir=tmp_path)
    assert again.corpus_sha256 == dataset.corpus_sha256
    assert again.query_texts == dataset.query_texts
    assert again.qrels == dataset.qrels
    np.testing.assert_array_equal(again.groups, dataset.groups)


def test_fields_of_functions(dataset):
    fields = dict(zip(dataset.doc_ids, dataset.metadata(["*"]), strict=True))
    found = fields["datetime.datetime.isoformat"]
    assert (found["module"], found["package"]) == ("datetime", "datetime")
    assert found["lines"] > 5
    found = fields["email.charset.Charset.header_encode"]
    assert (found["module"], found["package"]) == ("email.charset", "email")
