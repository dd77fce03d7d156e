"""The rows, columns and notes of tables T1-T5.

`experiments.reproduce` runs the `cells` of a table; `experiments.paper.fill` fills it
with their records.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.ablations import VARIANTS

# What the columns and marks of every table mean. Each is said here alone.
LEGEND = (
    "nDCG@10: mean ± sample standard deviation over the seeds; without ± there is one "
    "seed. R@100: mean.",
    "visit-5: budget of 5% of the documents, which a query may score on average. "
    "flat: every document is scored. 64x: codes of a 64th of the bytes of the tower's "
    "output (24 instead of 1,536). `not run` also marks budgets that a search of one "
    "leaf exceeds.",
    "kind: a separate row fits its index to a finished encoder, a joint one trains "
    "them together, an exact one is a reference, a control indexes joint embeddings "
    "by a library. ehi:paper has EHI-style losses with constants from memory, so it is "
    "not the published system.",
    "Italic: best separate row of the column; bold: best joint row; † better, ‡ worse "
    "than the best separate row with p < 0.05.",
    "These comparisons are at equal work: at the larger work of two rows, or the "
    "largest that both reach, interpolated between budgets in the logarithm of the "
    "work, if the records know it. Rows that score every document are compared as "
    "recorded.",
    "work %: documents that a query scores, and what it spends on router, rotation and "
    "look-up tables in products of the same width; 100% are all documents.",
    "bytes: codes or vectors of a document, with second copies, links and stored "
    "factors, at the budgets shown. all bytes: also leaf numbers, codebooks, rotation, "
    "centroids and router, shared by the documents of this corpus, or of one of a "
    "million (at 1M). Ids and shown texts are apart.",
    "§: takes over a tenth more bytes than its column names. ¶: in all no smaller than "
    "raw vectors, because the codebooks are as large as the corpus; such a cell is not "
    "compared.",
)
_P = (
    "p: paired randomisation test over queries, each query's value its mean over the "
    "seeds, Holm-corrected over all tests of this table; signs: of each seed."
)
_GRID = (
    *LEGEND,
    "best joint peer: the best published method for our rows, our best row for the "
    "others. Where the tests name two works, no work is common, and the records are "
    "compared as they are.",
    "visited %, p95 %, most %: documents that the queries score: mean, 95th percentile "
    "and maximum; the budget was set on other queries.",
    _P,
)
OWN = ("ehi", "joint-pq", "ehi-pq")


@dataclass(frozen=True)
class Row:
    """One row of a table: a system, a variant, and the budgets of its cells.

    Attributes:
      kind: 'exact' (searches all documents: a reference), 'separate' (the index has no
        training phase), 'joint', or 'control' (a separate index on joint embeddings).
      suffix: appended to its budgets: '-64x' for PQ leaves among rows with raw ones.
      only: its only budget, if it differs from those of the table.
      note: what an ablation changes.
    """

    system: str
    variant: str = ""
    kind: str = "joint"
    suffix: str = ""
    only: str = ""
    note: str = ""

    @property
    def own(self) -> bool:
        """Whether it is a joint system of this project, not one that was published."""
        return self.system in OWN and self.variant != "paper"

    @property
    def label(self) -> str:
        name = ":".join(part for part in (self.system, self.variant) if part)
        return f"{name} ({self.suffix[1:]})" if self.suffix else name


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper.

    Attributes:
      budgets: its columns.
      layout: 'grid' (rows by budgets), 'ablations' or 'cost'.
      across: the x axis of its figure; '' for no figure.
      works: percentages of work that a grid has, for records that know it.
      limits: all bytes of a document that a grid has, for records that know them.
      sizes: column of the first grid -> field of a record.
      sized_at: budget whose sizes they are; '': from the least to the most of a row.
      reference: cell that every row is compared with.
      datasets: data sets that have this table; empty for all.
      split: that of its records. Choices are made on dev, so that test is seen once.
      notes: lines under the table.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    budgets: tuple[str, ...]
    layout: str = "grid"
    across: str = ""
    works: tuple[float, ...] = ()
    limits: tuple[int, ...] = ()
    sizes: Mapping[str, str] = field(default_factory=dict)
    sized_at: str = ""
    reference: tuple[str, str, str] | None = None
    datasets: tuple[str, ...] = ()
    split: str = "test"
    notes: tuple[str, ...] = ()


def _rows(kind: str, *systems: str) -> tuple[Row, ...]:
    return tuple(Row(system, kind=kind) for system in systems)


_DENSE = Row("dense", kind="exact", only="flat")
_SIZES = {
    "bytes at 64x": "bytes_per_doc",
    "all bytes": "total_bytes_per_doc",
    "at 1M": "total_bytes_per_doc_1m",
}
_VISITED = tuple(f"visit-{percent}" for percent in (1, 2, 5, 10, 20, 50)) + ("flat",)
_COMPRESSED = tuple(f"flat-{times}x" for times in (32, 64, 128))
_BOTH = tuple(f"visit-{p}-{times}x" for p in (5, 10) for times in (32, 64, 128))

_T1 = PaperTable(
    "T1",
    "nDCG@10 against documents visited",
    (
        Row("dense-zero-shot", kind="exact", only="flat"),
        _DENSE,
        *_rows("separate", "faiss-ivf", "scann", "faiss-hnsw", "faiss-hnsw-sq"),
        *_rows("separate", "kmeans-tree", "linear-router"),
        Row("faiss-ivf", "on-ehi", kind="control"),
        Row("faiss-hnsw", "on-ehi", kind="control"),
        Row("jtr"),
        Row("ehi", "paper"),
        Row("ehi"),
        Row("ehi-pq", suffix="-64x"),
    ),
    _VISITED,
    across="docs_visited",
    works=(1, 2, 5, 10, 20, 50, 100),
    sizes={"bytes": "bytes_per_doc"},
    notes=(
        *_GRID,
        "Rows `on-ehi` index the embeddings of ehi: controls, neither separate nor "
        "joint. ehi-pq visits as many documents as its column says, with 64x smaller "
        "leaves than the rows it is compared with.",
    ),
)
_T2 = PaperTable(
    "T2",
    "nDCG@10 against bytes per document",
    (
        _DENSE,
        *_rows("separate", "opq", "kmeans-tree-opq"),
        Row("kmeans-tree-opq", "no-residual", kind="separate"),
        *_rows("separate", "faiss-pq", "faiss-opq", "faiss-fastscan"),
        *_rows("separate", "faiss-pca-pq", "faiss-rq", "faiss-lsq", "faiss-prq"),
        *_rows("separate", "faiss-sq", "faiss-rabitq", "binary-int8"),
        *_rows("separate", "lsh", "itq-lsh", "scann"),
        *_rows("joint", "jpq", "poeem", "repconc", "distill-vq", "joint-pq", "ehi-pq"),
        Row("ehi-pq", "no-residual"),
    ),
    _COMPRESSED,
    across="bytes_per_doc",
    limits=(50, 100, 200, 400, 800, 1535),
    sizes=_SIZES,
    sized_at="flat-64x",
    reference=("dense", "", "flat"),
    notes=(
        *_GRID,
        "loss %: 100 (1 - nDCG@10 / that of exact search with the separately trained "
        "encoder), paired by seed; p of loss: of that difference, in the same "
        "correction.",
    ),
)
_T3 = PaperTable(
    "T3",
    "nDCG@10 at budgets of documents visited and bytes",
    (
        *_rows("separate", "kmeans-tree-opq", "faiss-ivfpq", "faiss-opq-ivfpq"),
        *_rows("separate", "linear-router-opq", "faiss-ivfrabitq", "faiss-hnsw-pq"),
        *_rows("separate", "scann"),
        *_rows("joint", "distill-vq", "poeem", "ehi-pq"),
    ),
    _BOTH,
    works=(5, 10, 15, 20, 30, 50, 100),
    sizes=_SIZES,
    sized_at="visit-10-64x",
    notes=_GRID,
)
_T4 = PaperTable(
    "T4",
    "ablations of ehi-pq at visit-10-64x",
    (Row("ehi-pq", note="the default"),),
    ("visit-10-64x",),
    layout="ablations",
    reference=("ehi-pq", "", "visit-10-64x"),
    datasets=("pydocs",),
    split="dev",
    notes=("difference: to the default.", _P),
)


def _cost_rows() -> tuple[Row, ...]:
    """Return every row of T1-T3 once, at one representative budget."""
    representative = ("visit-10-64x", "flat-64x", "visit-10", "flat")
    budgets: dict[tuple[str, str, str], set[str]] = {}
    for table in (_T1, _T2, _T3):
        for row in table.rows:
            if row.kind != "control":
                key = (row.system, row.variant, row.kind)
                budgets.setdefault(key, set()).update(budgets_of(table, row).values())
    rows = [
        Row(*key, only=next(b for b in representative if b in found))
        for key, found in budgets.items()
    ]
    return tuple(
        sorted(rows, key=lambda r: ("exact", "separate", "joint").index(r.kind))
    )


def budgets_of(table: PaperTable, row: Row) -> dict[str, str]:
    """Return column -> the budget of the row in that column."""
    columns = (row.only,) if row.only else table.budgets
    return {column: column + row.suffix for column in columns}


_T5 = PaperTable(
    "T5",
    "cost",
    _cost_rows(),
    (),
    layout="cost",
    notes=(
        "train s: all training, including that of the starting point. examples/s: "
        "if the records have it.",
        "p50 ms: one query on one thread; queries/s: one batch; top 10, of embeddings.",
        "index MB: the whole index; on a corpus of 5,000 documents the codebooks "
        "dominate.",
    ),
)
TABLES = {table.name: table for table in (_T1, _T2, _T3, _T4, _T5)}


def rows_of(table: PaperTable) -> tuple[Row, ...]:
    """Return the rows of a table; T4 has a row for every ablation."""
    if table.layout != "ablations":
        return table.rows
    (default,) = table.rows
    return default, *(
        Row(default.system, name, note=variant.note)
        for name, variant in VARIANTS.items()
        if name and default.system in variant.systems
    )


def cells(table: PaperTable) -> list[tuple[str, str, str]]:
    """Return (system, variant, budget) of every cell of a table."""
    return [
        (row.system, row.variant, budget)
        for row in rows_of(table)
        for budget in budgets_of(table, row).values()
    ]
