"""An index that answers texts and shows documents, for the tests of the adapters."""

import numpy as np

from ehi.index import build_index, save_index

TEXTS = [
    "a b c",
    "hello",
    "the tree keeps its leaves",
    "a code takes a byte",
    "c b a c b a",
]
METADATA = [
    {"lang": "en", "year": 2020, "ok": True},
    {"lang": "de", "year": 2021, "ok": False},
    {"year": 2022},
    {"lang": "en", "year": 2019},
    {},
]
IDS = [f"d{i}" for i in range(len(TEXTS))]


def text_index(path, columns=False):
    """Writes a flat index of `TEXTS` whose encoder is the tiny BERT of the fixtures.

    Args:
        path: the folder.
        columns: keep `METADATA` as columns of the index; else in the records.
    """
    encoder = {"tower": "tests/fixtures/bert_tiny", "query_length": 12}
    probe = build_index(np.eye(32), range(32), tree=None, encoder=encoder)
    x = probe.text_encoder(TEXTS)
    about = METADATA if columns else None
    index = build_index(x, IDS, tree=None, encoder=encoder, metadata=about)
    if columns:
        kept = [{"text": text} for text in TEXTS]
    else:
        both = zip(TEXTS, METADATA, strict=True)
        kept = [{"text": text, "metadata": about} for text, about in both]
    save_index(index, path, documents=kept)
    return str(path)
