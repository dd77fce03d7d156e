"""An index that no single machine holds: shards by document, one router.

    folders = split_index("runs/x/index", "parts", shards=4)
    with ShardedIndex.start(folders) as index:
        hits = index.search(queries, k=10, beam=8)

The router has the parameters. It routes the queries once, asks all shards for the best
documents in these leaves, and merges the answers by score and then by row. Every shard
is a Ray actor. The functions that use Ray, of the extra `ray`, import it.

The shards together answer as the whole index does, ties included: one shard holds all
copies of a document, queries visit the same leaves in every shard, and the rows of the
shards, one after the other, are in the order of the whole index. Scores differ by
rounding only, because the products have other shapes.
"""

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.index.check import check_count, check_queries
from ehi.index.folder import read_folder
from ehi.index.index import Index, open_index, save_index
from ehi.index.search.search import (
    Hits,
    chosen_setting,
    rerank_scores,
    route_queries,
    row_mask,
    search,
)
from ehi.index.search.ties import score_again
from ehi.index.search.topk import keys_of, unpack

SHARD = "shard"  # the entry of `Index.config` that says which part it is
_START_SECONDS = 300  # all shards must open within this time
_OBJECT_STORE = 100_000_000  # bytes of a new local cluster; little data passes through


def split_index(path, out_dir, shards):
    """Divides an index by document into folders with the same parameters and ids.

    Documents keep their order: shard k of S has the documents k N // S up to
    (k + 1) N // S, deleted ones not counted. Memory: that of `Index.compact`.

    Args:
        path: folder of the index, which stays unchanged.
        out_dir: where `shard-00000-of-00004` and so on are written.
        shards: how many, 1 .. N.

    Returns:
        The folders, in order: list of Path.

    Raises:
        ValueError: more shards than documents.
        FileExistsError, OSError: as of `save_index`.

    >>> import tempfile
    >>> from ehi.index import build_index
    >>> path = tempfile.mkdtemp()
    >>> save_index(build_index(np.eye(5), range(5), tree=None), f"{path}/whole")
    >>> folders = split_index(f"{path}/whole", f"{path}/parts", shards=2)
    >>> [open_index(folder).num_documents for folder in folders]
    [2, 3]
    """
    index, shards = open_index(path), check_count("shards", shards)
    out_dir = Path(out_dir).absolute()  # the folders stay right after `os.chdir`
    contents = index.contents
    live = np.arange(contents.num_rows)
    if contents.deleted is not None:
        live = live[~contents.deleted]
    if shards > len(live):
        raise ValueError(f"{shards} shards of {len(live)} documents")
    sums = [entry["sha256"] for entry in contents.folder.files.values()]
    whole = hashlib.sha256("".join(sums).encode()).hexdigest()
    folders = []
    for number in range(shards):
        start, stop = (len(live) * k // shards for k in (number, number + 1))
        others = np.concatenate([live[:start], live[stop:]])
        shard = {"number": number, "count": shards, "of": whole}
        config = (index.config or {}) | {SHARD: shard}
        parameters = dataclasses.replace(index.parameters, config=config)
        part = Index(parameters, contents.without(others))
        folder = out_dir / f"shard-{number:05d}-of-{shards:05d}"
        save_index(part, folder, tower=False)  # the router takes vectors
        folders.append(folder)
    return folders


@dataclass(eq=False, slots=True)
class ShardedHits(Hits):
    """Results of N queries from the shards that answered: see `Hits`.

    `visited` is the sum over these shards. The router counts `nodes_scored`.

    Attributes:
        answered: documents of these shards / documents of all; 1.0 is everything.
    """

    answered: float


class ShardedIndex:
    """Document shards behind one router. Made by `start`; `close` ends its actors.

    Only one thread at a time may search, and nobody may write to the folders.

    >>> import tempfile
    >>> from ehi.index import build_index
    >>> path = tempfile.mkdtemp()
    >>> save_index(build_index(np.eye(5), range(5), tree=None), f"{path}/whole")
    >>> folders = split_index(f"{path}/whole", f"{path}/parts", shards=2)
    >>> index = ShardedIndex.start(folders)
    >>> hits = index.search(np.eye(5)[3:], k=1)
    >>> type(hits).__name__, hits.ids.tolist(), hits.answered
    ('ShardedHits', [[3], [4]], 1.0)
    >>> index.close()
    """

    def __init__(self, ray, actors, sizes, owns_ray, router):
        self._ray, self._actors, self._owns_ray = ray, actors, owns_ray
        self._router = router  # one of the indexes, for its parameters
        self._num_rows, self._num_documents = np.array(sizes).T
        self._first_rows = np.cumsum(self._num_rows) - self._num_rows
        self._down = {}  # shard that did not answer -> a call that shows it is back

    @classmethod
    def start(cls, folders, *, address="local", num_cpus=2):
        """Opens every folder in an actor of its own, spread over the machines.

        Args:
            folders: of `split_index`, all parts of one index, in any order. This
                machine and those of the actors must be able to read them.
            address: of a Ray cluster, or 'local' for a new one on this machine, which
                `close` ends. If Ray is connected already, that cluster is used.
            num_cpus: of a new local cluster.

        Raises:
            ValueError: a shard is missing, given twice, or of another index.
            FileNotFoundError: no index in a folder.
            ImportError: Ray is not installed.
        """
        folders = _in_order(folders)
        router = open_index(folders[0])
        ray, owns_ray = start_ray(address, num_cpus)
        actors = []
        try:
            server = ray.remote(_Server)
            server = server.options(max_restarts=-1, scheduling_strategy="SPREAD")
            actors += [server.remote(str(folder)) for folder in folders]
            sizes = [actor.sizes.remote() for actor in actors]
            sizes = ray.get(sizes, timeout=_START_SECONDS)
        except BaseException:
            _stop(ray, actors, owns_ray)
            raise
        return cls(ray, actors, sizes, owns_ray, router)

    @property
    def num_documents(self):
        return int(self._num_documents.sum())

    def search(
        self, queries, k=10, *, beam=None, min_prob=None, rerank=None, threads=1,
        allow=None, deny=None, where=None, timeout=10.0,
    ):  # fmt: skip
        """The k best documents of all shards that answer: ShardedHits.

        An actor that died is started again. Until it is up, the others answer.

        Args:
            queries, k, beam, min_prob, rerank, threads: as of `Index.search`.
            allow, deny: ids, or masks by row of all shards.
            where: as of `Index.search`.
            timeout: seconds to wait for the shards.

        Raises:
            ValueError: as `Index.search`, or after `close`.
            TimeoutError: no shard answered.
        """
        shards = self._up(timeout)
        router = self._router
        settings = chosen_setting(
            router.parameters, router.contents, k, beam, min_prob, rerank
        )
        leaves, nodes_scored = route_queries(
            router.parameters, queries, settings["beam"], settings["min_prob"]
        )
        asked = {}
        for shard in shards:
            filters = {
                "allow": self._part_of(shard, "allow", allow),
                "deny": self._part_of(shard, "deny", deny),
                "where": where,
            }
            asked[shard] = self._actors[shard].search.remote(
                queries, leaves, k, threads=threads, **settings, **filters
            )
        answers = self._collect(asked, timeout)
        if not answers:
            num = len(self._actors)
            raise TimeoutError(f"none of {num} shards answered within {timeout} s")
        firsts = self._first_rows[list(answers)]
        there = self._num_documents[list(answers)].sum()
        hits = merge_answers(list(answers.values()), firsts, k)
        return ShardedHits(
            leaves=leaves, nodes_scored=nodes_scored,
            answered=float(there / self.num_documents), **hits,
        )  # fmt: skip

    def tune(self, *_, **__):
        """Refuses: a setting is found before an index is divided.

        Raises:
            NotImplementedError: always.

        >>> ShardedIndex.tune(None)
        Traceback (most recent call last):
        NotImplementedError: shards cannot be tuned: tune(save=True) the whole index \
        before split_index, whose shards keep the setting
        """
        raise NotImplementedError(
            "shards cannot be tuned: tune(save=True) the whole index before "
            "split_index, whose shards keep the setting"
        )

    def close(self):
        """Ends the actors, and Ray if `start` started it."""
        actors, self._actors = self._actors, []
        _stop(self._ray, actors, self._owns_ray)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _up(self, timeout):
        """Shards to ask: all except those that failed and are not back yet."""
        if not self._actors:
            raise ValueError("this ShardedIndex is closed")
        if len(self._down) == len(self._actors):
            self._ray.wait(list(self._down.values()), timeout=timeout)
        for shard, sign in list(self._down.items()):
            if self._ray.wait([sign], timeout=0)[0]:
                try:
                    self._ray.get(sign)
                    del self._down[shard]
                except self._ray.exceptions.RayActorError:
                    self._miss(shard)
        return [n for n in range(len(self._actors)) if n not in self._down]

    def _miss(self, shard):
        self._down[shard] = self._actors[shard].sizes.remote()

    def _part_of(self, shard, name, chosen):
        """A shard's part of `allow` or `deny`: all ids, or its rows of a mask."""
        if not (isinstance(chosen, np.ndarray) and chosen.dtype == bool):
            return chosen
        total = int(self._num_rows.sum())
        if chosen.shape != (total,):
            raise ValueError(
                f"{name} is a mask of shape {chosen.shape}, these shards have {total} "
                "rows (deleted documents included)"
            )
        first = self._first_rows[shard]
        return chosen[first : first + self._num_rows[shard]]

    def _collect(self, asked, timeout):
        """Shard -> answer, for the shards that answered in time; others are down."""
        calls, answers = list(asked.values()), {}
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=timeout)
        for shard, call in asked.items():
            try:
                answers[shard] = self._ray.get(call, timeout=0)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None  # the refusal of `Index.search`
            except (self._ray.exceptions.RayActorError, TimeoutError):
                self._miss(shard)
        return answers


def _in_order(folders):
    """Folders of all shards of one index, by their number."""
    found, first = {}, None
    for folder in (Path(folder).absolute() for folder in folders):
        part = (read_folder(folder).manifest["config"] or {}).get(SHARD)
        if part is None:
            raise ValueError(f"{folder} is no shard of an index: see split_index")
        number = part.pop("number")
        first = first or (part, folder)
        if part != first[0]:
            raise ValueError(f"{folder} and {first[1]} are of different indexes")
        if number in found:
            raise ValueError(f"{folder} and {found[number]} are the same shard")
        found[number] = folder
    if not found:
        raise ValueError("there are no shards to open")
    count = first[0]["count"]
    for number in range(count):
        if number not in found:
            raise ValueError(f"shard {number} of {count} is missing")
    return [found[number] for number in range(count)]


class _Server:
    """A shard in its actor."""

    def __init__(self, folder):
        self.index = open_index(folder)

    def sizes(self):
        return self.index.contents.num_rows, self.index.num_documents

    def pid(self):
        return os.getpid()

    def search(self, queries, leaves, k, **settings):
        return answer(self.index, queries, leaves, k, **settings)


def _stop(ray, actors, owns_ray):
    for actor in actors:
        ray.kill(actor)
    if owns_ray:
        ray.shutdown()


def answer(
    index, queries, leaves, k, *, rerank=0, allow=None, deny=None, where=None,
    **settings,
):  # fmt: skip
    """The results of one shard, for `merge_answers`: name -> array.

    With `rerank`, a shard returns that many candidates with both scores. Only the
    answers of all shards together show which of them are among the `rerank` best.

    Args:
        index: the Index of the shard.
        leaves: (N, b) leaves that the queries visit, of `route_queries`.
        queries, k, rerank, allow, deny, where, settings: as of `Index.search`.

    Returns:
        ids, scores, rows and visited, as in Hits, and 'rescored' (N, rerank) float32
        with `rerank`.

    Raises:
        ValueError: as `Index.search`.

    >>> from ehi.index import build_index
    >>> part = build_index(np.eye(2), ["a", "b"], tree=None)
    >>> found = answer(part, np.array([[0.5, 1]]), np.zeros((1, 1), int), k=2)
    >>> found["ids"].tolist(), found["scores"].tolist()
    ([['b', 'a']], [[1.0, 0.5]])
    """
    parameters, contents = index.parameters, index.contents
    settings["mask"] = row_mask(contents, allow, deny, where)
    # A search of no queries refuses what an index refuses, `rerank` < k included.
    search(parameters, contents, queries[:0], k, rerank=rerank, **settings)
    hits = search(parameters, contents, queries, rerank or k, leaves=leaves, **settings)
    queries, rows = check_queries(queries, index.width), hits.rows
    found = {"rows": rows, "ids": index.external_ids(rows), "visited": hits.visited}
    # Equal documents of other shards must have equal scores.
    found["scores"] = score_again(parameters, contents, queries, leaves, rows)
    if rerank:
        found["rescored"] = rerank_scores(contents, queries, rows)
    return found


def merge_answers(answers, first_rows, k):
    """The best of all shards' answers, ties by row: fields of Hits.

    Args:
        answers: of `answer`, one for each shard.
        first_rows: (shards,) where the rows of each start.
        k: results of each query.

    >>> from ehi.index import build_index
    >>> queries, leaves = np.array([[1, 2, 4, 3.0]]), np.zeros((1, 1), int)
    >>> parts = [build_index(np.eye(4)[:2], ["a", "b"], tree=None)]
    >>> parts += [build_index(np.eye(4)[2:], ["c", "d"], tree=None)]
    >>> answers = [answer(part, queries, leaves, k=3) for part in parts]
    >>> merge_answers(answers, [0, 2], k=3)["ids"].tolist()
    [['c', 'd', 'b']]
    """
    rows = [
        np.where(found["rows"] < 0, -1, found["rows"] + first)
        for found, first in zip(answers, first_rows, strict=True)
    ]
    columns = {"rows": np.concatenate(rows, axis=1)}
    for name in ("ids", "scores", "rescored"):
        if name in answers[0]:
            columns[name] = np.concatenate([a[name] for a in answers], axis=1)
    candidates = answers[0]["rows"].shape[1]
    columns = _best(columns, columns["scores"], candidates)
    if "rescored" in columns:
        columns = _best(columns, columns.pop("rescored"), k)
    return columns | {"visited": sum(found["visited"] for found in answers)}


def _best(columns, scores, k):
    """The k best columns of every array (N, c) by score, then by row."""
    rows = columns["rows"]
    keys = keys_of(scores, rows)
    order = np.argsort(keys, axis=1)[:, :k]
    best = {
        name: np.take_along_axis(values, order, axis=1)
        for name, values in columns.items()
    }
    best["scores"] = unpack(np.take_along_axis(keys, order, axis=1))[0]
    return best


def start_ray(address="local", num_cpus=2):
    """The module `ray`, connected, and whether this call connected it.

    Its usage statistics are switched off.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster at this address, or a new one does not start.

    >>> ray, connected = start_ray()  # import_ray() says if it is missing
    >>> start_ray()[1]  # connected already
    False
    >>> ray.shutdown()
    """
    ray = import_ray()
    if ray.is_initialized():
        return ray, False
    options = {"log_to_driver": False, "logging_level": "warning"}
    if address == "local":
        options |= {
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE,
        }
    else:
        ours = {name: os.environ[name] for name in os.environ if name[:4] == "EHI_"}
        options["runtime_env"] = {"env_vars": ours}
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises many types, even Exception
        raise ConnectionError(f"no Ray at {address!r}: {error}") from error
    return ray, True


def import_ray():
    """The module `ray`, or an ImportError that says how to get it.

    >>> import_ray().__name__
    'ray'
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise ImportError(
            "Ray is not installed: pip install 'ehi[ray]' installs it"
        ) from None
    return ray
