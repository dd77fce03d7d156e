"""One small corpus in every layout that `open_dataset` reads."""

import gzip
import json

TRIPLES = [("q1", "d1", "d3"), ("q1", "d1", "d4"), ("q1", "d2", "d3"),
           ("q3", "d3", "d6")]  # fmt: skip


def rows_of(folder, name):
    """The objects of a .jsonl file of a BEIR folder."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").open()]


def qrels_of(folder):
    """Split -> query, document and grade of each judgement of a BEIR folder."""
    return {
        path.stem: [line.split("\t") for line in path.read_text().splitlines()[1:]]
        for path in sorted((folder / "qrels").glob("*.tsv"))
    }


def write_table(path, rows):
    """Write rows between tabs; a name `*.gz` packs them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_msmarco(beir, folder, *, packed=False):
    """MS MARCO's tables; titles get a column of their own if any document has one."""
    end = ".tsv.gz" if packed else ".tsv"
    corpus = [(d["_id"], d["title"], d["text"]) for d in rows_of(beir, "corpus")]
    if not any(title for _, title, _ in corpus):
        corpus = [(id, text) for id, _, text in corpus]
    write_table(folder / f"collection{end}", corpus)
    texts = {q["_id"]: q["text"] for q in rows_of(beir, "queries")}
    for split, judged in qrels_of(beir).items():
        asked = dict.fromkeys(query for query, _, _ in judged)
        queries = [(id, texts[id]) for id in asked]
        write_table(folder / f"queries.{split}{end}", queries)
        trec = [(query, 0, document, grade) for query, document, grade in judged]
        write_table(folder / f"qrels.{split}{end}", trec)
    return folder


def as_parquet(beir, folder, shards=2):
    """The tables that the Hugging Face hub has, with `qrels/<split>-*.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(name, split, rows, shards=1):
        (folder / name).mkdir(parents=True, exist_ok=True)
        size = -(-len(rows) // shards)
        for number in range(shards):
            part = pa.Table.from_pylist(rows[number * size : (number + 1) * size])
            file = f"{split}-{number:05}-of-{shards:05}.parquet"
            pq.write_table(part, folder / name / file)

    write("corpus", "corpus", rows_of(beir, "corpus"), shards)
    write("queries", "queries", rows_of(beir, "queries"))
    for split, judged in qrels_of(beir).items():
        write("qrels", split, [
            {"query-id": q, "corpus-id": d, "score": int(g)} for q, d, g in judged
        ])  # fmt: skip
    return folder


def as_saved(beir, folder):
    """What `save_to_disk` of the library `datasets` writes."""
    import datasets

    corpus = datasets.Dataset.from_list(rows_of(beir, "corpus"))
    corpus.save_to_disk(folder / "corpus", num_shards=2)
    queries = datasets.Dataset.from_list(rows_of(beir, "queries"))
    datasets.DatasetDict({"queries": queries}).save_to_disk(folder / "queries")
    splits = {
        split: datasets.Dataset.from_list([
            {"query-id": q, "corpus-id": d, "score": int(g)} for q, d, g in judged
        ])
        for split, judged in qrels_of(beir).items()
    }  # fmt: skip
    datasets.DatasetDict(splits).save_to_disk(folder / "qrels")
    return folder


def as_ir_datasets(beir, name):
    """Register the data set and its splits; return the name for `open_dataset`."""
    import ir_datasets
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.datasets.beir import BeirTitleDoc
    from ir_datasets.formats import BaseDocPairs, BaseDocs, BaseQrels, BaseQueries
    from ir_datasets.formats.base import GenericDocPair, GenericQrel, GenericQuery

    class Docs(BaseDocs):
        def docs_iter(self):
            for d in rows_of(beir, "corpus"):
                yield BeirTitleDoc(d["_id"], d["text"], d["title"])

        def docs_count(self):
            return len(rows_of(beir, "corpus"))

    class Queries(BaseQueries):
        def queries_iter(self):
            for q in rows_of(beir, "queries"):
                yield GenericQuery(q["_id"], q["text"])

    class Qrels(BaseQrels):
        def __init__(self, judged):
            self.judged = judged

        def qrels_iter(self):
            for query, document, grade in self.judged:
                yield GenericQrel(query, document, int(grade))

    class Pairs(BaseDocPairs):
        def docpairs_iter(self):
            yield from (GenericDocPair(*triple) for triple in TRIPLES)

    known, documents, ids = ir_datasets.registry._registered, Docs(), []
    known[name] = Dataset(documents, Queries())
    for split, judged in qrels_of(beir).items():
        ids.append(f"{name}/{split}")
        pairs = [Pairs()] if split == "train" else []
        known[ids[-1]] = Dataset(documents, Queries(), Qrels(judged), *pairs)
    return "ir_datasets:" + "+".join(ids)


# Layout -> function: BEIR folder, new folder -> what `open_dataset` gets.
MAKE = {
    "msmarco": as_msmarco,
    "packed": lambda beir, folder: as_msmarco(beir, folder, packed=True),
    "parquet": as_parquet,
    "saved": as_saved,
    "ir_datasets": lambda beir, folder: as_ir_datasets(beir, folder.name),
}
NEEDS = {"parquet": "pyarrow", "saved": "datasets", "ir_datasets": "ir_datasets"}
