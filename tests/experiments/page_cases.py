"""A small finished run, made by hand, whose ids and texts try to be HTML."""

import json

import numpy as np

from ehi.eval.metrics import evaluate, write_run
from ehi.eval.records import write_records
from ehi.index import build_index, save_index

HOSTILE = "d0</script><script>alert(1)</script><b>&amp;"
LEAVES, DOCUMENTS, QUERIES = 4, 24, 12
SYSTEMS = ("kmeans-tree", "ehi")
BUDGETS = ("visit-2", "visit-10")
WORDS = ("socket", "parser", "matrix", "window")


def write_workdir(folder, make_record, *, seed=0, dataset="pydocs", gain=0.0):
    """Write a workdir of two systems at two budgets; return its records."""
    rng = np.random.default_rng(seed)
    doc_ids = [HOSTILE, *(f"d{n}" for n in range(1, DOCUMENTS))]
    names = [f"q{n:02}" for n in range(QUERIES)]
    vectors = np.repeat(np.eye(LEAVES, 8), DOCUMENTS // LEAVES, axis=0)
    vectors = vectors + 0.05 * rng.standard_normal(vectors.shape)
    tree = {"kind": "per_node", "scale": 5.0, "nodes": [np.eye(LEAVES, 8)[None]]}
    documents = [
        {
            "id": doc_id,
            "title": f"<i>{WORDS[n % 4]}</i> {n}",
            "line": f"open\u2028{doc_id}",
        }
        for n, doc_id in enumerate(doc_ids)
    ]
    for system in SYSTEMS:
        index = build_index(vectors, doc_ids, tree=tree, encoder={"run": system})
        save_index(index, folder / "indexes" / system, documents=documents)
    qrels = {name: {doc_ids[2 * n]: 1} for n, name in enumerate(names)}
    records, visits = [], {}
    for shift, system in enumerate(SYSTEMS):
        for wide, budget in enumerate(BUDGETS):
            run = {
                name: {
                    doc_ids[2 * n if (n + shift) % (3 - wide) else n]: 2.0,
                    doc_ids[(2 * n + 1) % DOCUMENTS]: 1.0,
                }
                for n, name in enumerate(names)
            }
            values = evaluate(run, qrels)
            record = make_record(
                system=system, budget=budget, seed=seed, dataset=dataset,
                ndcg_at_10=float(values["ndcg@10"].mean()) + gain,
                docs_visited=(2, 10)[wide] / 100, work=(4, 13)[wide] / 100,
            )  # fmt: skip
            records.append(record)
            stem = record.cell.stem
            write_run(folder / "trec" / f"{stem}.run.gz", run)
            np.save(folder / "trec" / f"{stem}.npy", values)
            leaves = [[n % LEAVES, (n + 1) % LEAVES][: 1 + wide] for n in range(12)]
            visited = [6 * len(row) for row in leaves]
            visits[stem] = {"leaves": leaves, "documents": visited}
    write_records(folder / "results.jsonl", records)
    queries = [
        [name, f"how do I <u>{WORDS[n % 4]}</u> number {n}", qrels[name]]
        for n, name in enumerate(names)
    ]
    asked = {"split": "test", "scored": 12, "queries": queries, "visits": visits}
    (folder / "questions.json").write_text(json.dumps(asked))
    curves = {system: [[0.02, 0.4], [0.1, 0.5], [1.0, 0.6]] for system in SYSTEMS}
    (folder / "curves.json").write_text(json.dumps(curves))
    logged = [
        {"run": "ehi", "phase": "joint", "step": step, "loss": 1 / step}
        for step in (1, 2, 3)
    ]
    lines = [json.dumps(row) for row in logged] + ['{"run": "torn']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return records
