"""Numbers that papers and their repositories print, each with its source.

Their data, encoders and hardware differ from ours, so they have a table of their own
and never stand beside our numbers. Every number was read in the source that it names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ehi.eval.significance import Comparison, ValuePair, compare_tables
from ehi.eval.tables import Table
from experiments.paper.results import SCORED, Results


@dataclass(frozen=True)
class Published:
    """One number, as its source prints it."""

    method: str
    data: str
    setting: str
    measure: str
    value: str
    source: str


_EHI = "EHI, arXiv 2310.08891"
# The two abstracts were read in these copies.
_MIRRORS = ("abstract (ar5iv, sciencecast)", "abstract (arxiv html, scholarfeed)")
_JPQ = "JPQ, github.com/jingtaozhan/JPQ"
_COLBERTER = "ColBERTer paper, table 4"
_JTR = "JTR, arXiv 2304.11943"
_DISTILL = "Distill-VQ, arXiv 2204.00185"
_POEEM = "Poeem tutorial notebook, github.com/jdcomsearch/poeem"
_REPCONC = "RepCONC, github.com/jingtaozhan/RepCONC, examples/*/README.md"
_THAKUR = "Thakur et al. 2022, arXiv 2205.11498, abstract"

_PASSAGE, _DOCUMENT = "MS MARCO passage", "MS MARCO document"
_SUBSPACES = (16, 24, 32, 48, 64, 96)
_BRUTE = "against brute force"
_DL = ("DL19 nDCG@10", "DL20 nDCG@10")

# Measured from the positions of points in JPQ's figures, one number for each M.
_JPQ_FIGURES = {
    (_PASSAGE, "MRR@10", "psg_compr.png"): {
        "JPQ": "0.273 0.305 0.317 0.332 0.338 0.341",
        "OPQ": "0.234 0.272 0.284 0.290 0.299 0.304",
        "DPQ": "0.244 0.283 0.293 0.305 0.306 0.310",
        "OPQ+ScaNN": "0.221 0.270 0.295 0.310 0.315 0.313",
    },
    (_DOCUMENT, "MRR@100", "doc_compr.png"): {
        "JPQ": "0.336 0.356 0.374 0.384 0.395 0.401",
        "OPQ": "0.277 0.308 0.331 0.340 0.351 0.361",
        "DPQ": "0.293 0.327 0.343 0.352 0.361 0.367",
        "OPQ+ScaNN": "- 0.317 0.339 0.357 0.362 0.361",
    },
}
_UNCOMPRESSED = {"ANCE": "0.338", "ADORE": "0.347", "ColBERT": "0.360", "BM25": "0.187"}

_BEIR = (
    "TREC-COVID NFCorpus NQ HotpotQA FiQA ArguAna Touché Quora DBPedia SCIDOCS FEVER "
    "Climate-FEVER SciFact"
)
_BEIR_NDCG = {
    "JPQ": ".636 .272 .449 .450 .286 .429 .200 .853 .304 .120 .636 .194 .531",
    "ANCE": ".654 .237 .446 .456 .295 .415 .284 - .281 .122 .669 .198 .507",
}

# MRR@10, DL19 and DL20 nDCG@10: first of dense search; then of OPQ, JPQ and RepCONC for
# each M.
_REPCONC_TABLES = {
    "TAS-B": (
        (None, ".344 .721 .685"),
        (64, ".312 .676 .633  .331 .706 .654  .346 .699 .677"),
        (48, ".298 .645 .630  .320 .667 .673  .344 .710 .661"),
    ),
    "SBERT": (
        (None, ".381 .707 .726"),
        (64, ".345 .693 .686  .355 .705 .707  .370 .705 .705"),
        (48, ".335 .690 .664  .351 .723 .696  .363 .709 .702"),
    ),
    "coCondenser with titles": (
        (None, ".381 .712 .680"),
        (64, ".356 .672 .642  .370 .693 .675  .373 .705 .692"),
        (48, ".348 .688 .650  .364 .678 .669  .368 .679 .676"),
    ),
    "TCT-ColBERT-v2": (
        (None, ".359 .716 .689"),
        (64, ".321 .652 .636  .341 .677 .680  .348 .694 .679"),
        (48, ".301 .605 .608  .329 .681 .663  .338 .697 .676"),
    ),
    "ANCE": (
        (None, ".331 .644 .640"),
        (48, ".282 .564 .571  .323 .640 .618  .338 .659 .641"),
    ),
}

# MRR@10 and R@100 of MS MARCO, then of NQ; AR2-G embeddings.
_DISTILL_TABLE = {
    "IVFPQ": ".2403 .7325 .2823 .7240",
    "IVFOPQ": ".3448 .8385 .5505 .8279",
    "ScaNN": ".2670 .7963 .4137 .8124",
    "Poeem": ".3448 .8487 .5588 .8445",
    "JPQ": ".3451 .8558 .5666 .8504",
    "RepCONC": ".3449 .8497 .5500 .8373",
    "MoPQ": ".3471 .8564 .5835 .8606",
    "Distill-VQ": ".3607 .8719 .6235 .8783",
}

# MRR@100, R@100 and milliseconds of passages, then of documents.
_JTR_TABLE = {
    "IVFFlat": ".311 .778 75 .349 .839 63",
    "PQ (M = 32)": ".289 .717 149 .290 .788 58",
    "IVFPQ": ".252 .653 15 .279 .695 10",
    "JPQ (M = 24)": ".306 .832 152 .347 .889 55",
    "HNSW": ".289 .732 11 .334 .783 5",
    "IMI": ".314 .697 37 .348 .788 26",
    "FLANN": ".271 .629 18 .294 .649 5",
    "Annoy": ".144 .263 132 .148 .253 57",
    "JTR": ".318 .778 30 .364 .848 18",
}

_JTR_DL = {"JPQ (M = 24)": ".611 .607 .575 .536", "JTR": ".610 .632 .590 .565"}

# Method, data, setting, measure, value, source.
_SINGLE = (
    ("EHI", "MS MARCO dev", "v1", "MRR@10", "+0.6%", f"{_EHI}v1, {_MIRRORS[0]}"),
    ("EHI", "TREC DL19", "v1", _DL[0], "+4.2%", f"{_EHI}v1, {_MIRRORS[0]}"),
    ("EHI", "MS MARCO dev", "v2", "MRR@10", "+1.45%", f"{_EHI}v2, {_MIRRORS[1]}"),
    ("EHI", "TREC DL19", "v2", _DL[0], "+8.2%", f"{_EHI}v2, {_MIRRORS[1]}"),
    ("JPQ", _PASSAGE, "M = 96", "MRR@10", "0.341", _COLBERTER),
    ("JPQ", _PASSAGE, "M = 96", _DL[0], "0.677", _COLBERTER),
    ("JPQ", _PASSAGE, "M = 96", "index", "0.8 GB", _COLBERTER),
    ("JPQ", _PASSAGE, "M = 96", "latency", "90 ms", _COLBERTER),
    ("JPQ", _PASSAGE, "M = 96", _DL[1], "0.671", f"{_JPQ}, README"),
    ("JPQ", _DOCUMENT, "M = 96", _DL[1], "0.580", f"{_JPQ}, README"),
    ("JPQ", "MS MARCO", _BRUTE, "compression", "30x", f"{_JPQ}, README"),
    ("JPQ", "MS MARCO", _BRUTE, "speed on CPU", "10x", f"{_JPQ}, README"),
    ("JPQ", "MS MARCO", _BRUTE, "speed on GPU", "2x", f"{_JPQ}, README"),
    ("JPQ+GPL", "BEIR", "gain, at most", "nDCG@10", "+11.6 points", _THAKUR),
    ("JPQ+GPL", "BEIR", "mean gain on TAS-B", "nDCG@10", "+2.0 points", _THAKUR),
    ("brute force", "synthetic", "tutorial", "precision@100", "0.9989", _POEEM),
    ("Faiss IVF8,PQ8", "synthetic", "tutorial", "precision@100", "0.9610", _POEEM),
    ("Poeem", "synthetic", "tutorial, nprobe 1", "precision@100", "0.9805", _POEEM),
    ("Poeem", "MS MARCO", "CoCondenser", "MRR@10", ".3363", f"{_DISTILL}, table 2"),
    ("Poeem", "MS MARCO", "CoCondenser", "R@100", ".8403", f"{_DISTILL}, table 2"),
    ("Poeem", "NQ", "CoCondenser", "MRR@10", ".5522", f"{_DISTILL}, table 2"),
)


# Published orders: source, better system, worse system, budget where ours are compared.
_M48 = "flat-64x"  # M = 48 of 768 floats
_ORDERS = (
    *((_JPQ, "jpq", "opq", budget) for budget in ("flat-32x", _M48, "flat-128x")),
    (f"{_REPCONC}, M = 48", "repconc", "jpq", _M48),
    (f"{_REPCONC}, M = 48", "jpq", "faiss-opq", _M48),
    *(
        (f"{_DISTILL}, table 2", "distill-vq", other, _M48)
        for other in ("jpq", "repconc", "poeem")
    ),
    *(
        (f"{_DISTILL}, table 2", "distill-vq", other, "visit-10-64x")
        for other in ("poeem", "faiss-opq-ivfpq", "faiss-ivfpq")
    ),
    (f"{_DISTILL}, table 2", "poeem", "faiss-ivfpq", "visit-10-64x"),
    (f"{_JTR}, table 2", "jtr", "faiss-ivf", "visit-10"),
    (f"{_JTR}, table 2", "jtr", "faiss-hnsw", "visit-10"),
    (_EHI, "ehi:paper", "faiss-ivf", "visit-5"),
    *(("ours", "ehi-pq", other, _M48) for other in ("jpq", "repconc", "opq")),
    *(
        ("ours", *pair, budget)
        for pair in (("joint-pq", "opq"), ("ehi-pq", "kmeans-tree-opq"))
        for budget in (_M48, "flat-128x")
    ),
)
_ALPHA = 0.05


def orders_table(found: Mapping[str, Results]) -> Table:
    """Return which published orders hold in our records.

    Args:
        found: results of each dataset, one column each.
    """
    pairs = {
        name: {order: _pair(results, order) for order in _ORDERS}
        for name, results in found.items()
    }
    tests = compare_tables(pairs)
    rows = []
    for order in _ORDERS:
        source, better, worse, budget = order
        held = [_held(found[name], order, tests[name].get(order)) for name in found]
        rows.append((f"{better} > {worse}", budget, source.split(",")[0], *held))
    return Table(
        "Published orders, checked here",
        ("order", "budget", "source", *found),
        tuple(rows),
        (
            "nDCG@10 of the better and of the worse system as published, means over "
            "the seeds that both have; yes† or no†: the difference has p < 0.05, "
            "Holm-corrected over the column. Data, encoders and measures differ from "
            "those of the sources. Rows at one budget; work is not made equal here.",
        ),
        text_columns=3 + len(found),
    )


def _place(name: str, budget: str) -> tuple[str, str, str]:
    system, _, variant = name.partition(":")
    return system, variant, budget


def _pair(results: Results, order: tuple[str, str, str, str]) -> ValuePair:
    """The values of the better and of the worse system as published."""
    _, better, worse, budget = order
    values: dict[tuple, dict[int, np.ndarray]] = {}
    for cell, found in results.per_query.items():
        place = (cell.system, cell.variant, cell.budget)
        values.setdefault(place, {})[cell.seed] = found
    ours, theirs = (values.get(_place(name, budget), {}) for name in (better, worse))
    return worse, ours, theirs


def _held(results: Results, order, test: Comparison | None) -> str:
    """'yes (0.817, 0.759)', 'no', or why it cannot be said."""
    _, better, worse, budget = order
    ours, theirs = (
        {r.seed: r for r in results.records.get(_place(name, budget), ())}
        for name in (better, worse)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return "not run"
    both = [*ours.values(), *theirs.values()]
    if len({record.recipe >= SCORED for record in both}) > 1:
        return "of two recipes"
    means = [np.mean([of[s].ndcg_at_10 for s in seeds]) for of in (ours, theirs)]
    mark = "†" if test is not None and test.p_holm < _ALPHA else ""
    word = "yes" if means[0] > means[1] else "no"
    return f"{word}{mark} ({means[0]:.3f}, {means[1]:.3f})"


def published() -> list[Published]:
    """Return every number, in the order of the sources."""
    return [
        *(Published(*line) for line in _SINGLE),
        *_jpq(),
        *_repconc(),
        *_distill_vq(),
        *_jtr(),
    ]


def published_table() -> Table:
    """Return all numbers as one table with a column of sources."""
    rows = tuple(
        (p.method, p.data, p.setting, p.measure, p.value, p.source) for p in published()
    )
    return Table(
        "Published numbers",
        ("method", "data", "setting", "measure", "value", "source"),
        rows,
        (
            "Other data, encoders and hardware than ours: not comparable with T1-T5.",
            "EHI's two versions print different gains for the same claim.",
        ),
        text_columns=6,
    )


def _each(names, values: str) -> Iterator[tuple]:
    """Yield names with the numbers of a line; '-' means that the source has none."""
    for name, value in zip(names, values.split(), strict=True):
        if value != "-":
            yield name, value


def _jpq() -> Iterator[Published]:
    for (data, measure, figure), lines in _JPQ_FIGURES.items():
        for method, values in lines.items():
            error = "0.001" if method == "JPQ" else "0.002"
            source = f"{_JPQ}, measured in its figure {figure}, ±{error}"
            for m, value in _each(_SUBSPACES, values):
                yield Published(method, data, f"M = {m}", measure, value, source)
    for method, value in _UNCOMPRESSED.items():
        source = f"{_JPQ}, figure all_psg_compr.png"
        yield Published(method, _PASSAGE, "uncompressed", "MRR@10", value, source)
    for method, values in _BEIR_NDCG.items():
        setting = "zero-shot, M = 96" if method == "JPQ" else "zero-shot, uncompressed"
        for data, value in _each(_BEIR.split(), values):
            yield Published(method, data, setting, "nDCG@10", value, f"{_JPQ}, README")


def _repconc() -> Iterator[Published]:
    for encoder, lines in _REPCONC_TABLES.items():
        for m, values in lines:
            methods = ("OPQ", "JPQ", "RepCONC") if m else ("dense",)
            setting = f"{encoder}, M = {m}" if m else f"{encoder}, uncompressed"
            cells = [(method, name) for method in methods for name in ("MRR@10", *_DL)]
            for (method, measure), value in _each(cells, values):
                yield Published(method, _PASSAGE, setting, measure, value, _REPCONC)


def _distill_vq() -> Iterator[Published]:
    measures = [(d, m) for d in ("MS MARCO", "NQ") for m in ("MRR@10", "R@100")]
    for method, values in _DISTILL_TABLE.items():
        for (data, measure), value in _each(measures, values):
            source = f"{_DISTILL}, table 2"
            yield Published(method, data, "AR2-G", measure, value, source)


def _jtr() -> Iterator[Published]:
    names = ("MRR@100", "R@100", "ms a query")
    measures = [(data, name) for data in (_PASSAGE, _DOCUMENT) for name in names]
    for method, values in _JTR_TABLE.items():
        for (data, measure), value in _each(measures, values):
            yield Published(method, data, "-", measure, value, f"{_JTR}, table 2")
    measures = [(data, name) for data in (_PASSAGE, _DOCUMENT) for name in _DL]
    for method, values in _JTR_DL.items():
        for (data, measure), value in _each(measures, values):
            yield Published(method, data, "-", measure, value, _JTR)
