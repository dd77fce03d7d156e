"""A folder that is updated while others read it, write it, or the disk gets full."""

import signal
import threading

import index_reference as reference
import pytest
from update_cases import BRANCHING, NUM, QUERIES, RNG, WIDTH, X, assert_same_hits, built

from ehi.index import IndexLockedError, build_index, open_index, save_index, store
from ehi.index.folder import writer_lock


def test_an_opened_index_is_a_snapshot_until_refreshed(tmp_path):
    save_index(built(range(NUM), range(NUM)), tmp_path / "index")
    writer, reader = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    before = built(range(NUM), range(NUM))
    writer.add(X[NUM : NUM + 5], range(NUM, NUM + 5))
    writer.delete([0])
    assert writer.num_documents == NUM + 4
    assert_same_hits(reader, before)
    writer.compact()  # removes files that the reader has mapped
    assert_same_hits(reader, before)
    assert reader.refresh() and not reader.refresh()
    assert_same_hits(reader, writer)
    reader.delete([1])  # writers take turns, each from what the other left
    writer.add(X[NUM + 5 : NUM + 6], [NUM + 5])
    assert writer.num_documents == NUM + 4
    reader.refresh()
    assert_same_hits(reader, writer)
    save_index(before, tmp_path / "other")
    assert not before.refresh()  # in memory
    tree = reference.make_tree("per_node", 2, BRANCHING, WIDTH, RNG)
    save_index(build_index(X, range(400), tree=tree), tmp_path / "index")
    with pytest.raises(ValueError, match="another index now"):
        reader.refresh()


def test_an_index_is_opened_while_another_writes_it(tmp_path):
    """Every opening sees one generation whole, however often the folder changes."""
    save_index(built(range(NUM), range(NUM)), tmp_path / "index")
    stop, errors, seen = threading.Event(), [], set()

    def read():
        while not stop.is_set():
            try:
                hits = open_index(tmp_path / "index").search(QUERIES, 400, beam=9)
                assert len({frozenset(row[row >= 0]) for row in hits.ids}) == 1
                seen.add(frozenset(hits.ids[0][hits.ids[0] >= 0].tolist()))
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    writer, states = open_index(tmp_path / "index"), {frozenset(range(NUM))}
    alive = set(range(NUM))
    for turn in range(15):
        new = range(NUM + 3 * turn, NUM + 3 * turn + 3)
        writer.update(X[list(new)], [turn, *new[1:]], missing="add")
        alive |= {turn, *new[1:]}
        states.add(frozenset(alive))
        writer.delete([new[2]])
        alive.discard(new[2])
        states.add(frozenset(alive))
        writer.compact()
    stop.set()
    thread.join()
    assert not errors, errors[0]
    assert seen <= states


def test_saving_into_its_own_folder_undoes_nothing_of_others(tmp_path):
    save_index(built(range(NUM), range(NUM)), tmp_path / "index")
    stale, other = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    other.add(X[:1], [77])
    other.delete([3])
    with pytest.raises(ValueError, match=r"written to since .* refresh\(\) it"):
        save_index(stale, tmp_path / "index")
    assert stale.refresh()
    for _ in range(2):  # what it wrote it sees
        save_index(stale, tmp_path / "index")
        assert len(stale.segments) == 1
    assert_same_hits(open_index(tmp_path / "index", verify=True), other)
    with pytest.raises(ValueError, match=r"was written to .* refresh\(\) first"):
        other.verify()
    assert other.refresh()
    other.verify()


def test_a_write_is_seen_whatever_another_thread_refreshes(tmp_path, monkeypatch):
    save_index(built(range(NUM), range(NUM)), tmp_path / "index")
    index, read_folder = open_index(tmp_path / "index"), store.open_folder

    def slow(path, read, mmap):
        """Reads, and comes back when another thread has added a document."""
        monkeypatch.setattr(store, "open_folder", read_folder)
        found = read_folder(path, read, mmap)
        index.add(X[:1], [77])
        return found

    monkeypatch.setattr(store, "open_folder", slow)
    index.refresh()
    assert index.num_documents == NUM + 1


def test_one_writer_at_a_time(tmp_path):
    save_index(built(range(NUM), range(NUM)), tmp_path / "index")
    index = open_index(tmp_path / "index")
    with writer_lock(tmp_path / "index"):
        for write in (
            lambda: index.add(X[:1], [99]),
            lambda: index.delete([1]),
            index.compact,
            lambda: save_index(index, tmp_path / "index"),
        ):
            with pytest.raises(IndexLockedError, match="another writer"):
                write()
        assert_same_hits(open_index(tmp_path / "index"), index)
    index.delete([1])
    assert index.num_documents == NUM - 1


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path):
    """The limit on file sizes stands for the disk: writing past it fails."""
    resource = pytest.importorskip("resource")
    save_index(built(range(NUM), range(NUM)), tmp_path / "index")
    index = open_index(tmp_path / "index")
    index.delete([3])
    files = sorted(p.name for p in (tmp_path / "index").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        for write, outcome in (
            (lambda: index.add(X[:200], range(100, 300)), "index is as it was"),
            (lambda: index.update(X[:2], [1, 2]), "index is as it was"),
            (lambda: index.delete([1]), "index is as it was"),
            (index.compact, "index is as it was"),
            (lambda: save_index(index, tmp_path / "new"), "new was not written"),
        ):
            with pytest.raises(OSError, match=f"too large; .*{outcome}"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in (tmp_path / "index").iterdir()) == files
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    assert_same_hits(open_index(tmp_path / "index", verify=True), index)
    index.add(X[:200], range(100, 300))
    assert index.num_documents == NUM - 1 + 200
