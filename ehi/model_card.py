"""The README.md that a published index has: what it is, written from its manifest."""

import json

from ehi.index.parameters import tree_shape

INSTALL = """\
python -m pip install numpy threadpoolctl tokenizers safetensors fsspec huggingface_hub
python -m pip install --no-deps ."""
TAGS = ("dense-retrieval", "vector-search", "learned-index")


def model_card(index, address, *, licence=None, description=""):
    """The card of an index, as markdown that the Hugging Face hub reads.

    Args:
        index: the Index, opened from a folder.
        address: where it is published.
        licence: a name such as 'apache-2.0'; None: the card says that none is stated.
        description: markdown, put first.

    >>> import tempfile, numpy as np
    >>> from ehi.index import build_index, open_index, save_index
    >>> path = f"{tempfile.mkdtemp()}/index"
    >>> save_index(build_index(np.eye(3), [7, 8, 9], tree=None), path)
    >>> card = model_card(open_index(path), "hf://me/three", licence="mit")
    >>> print(card.partition("- dense")[0])
    ---
    license: "mit"
    library_name: ehi
    tags:
    <BLANKLINE>
    >>> "| documents | 3 |" in card, "ehi.pull" in card
    (True, True)
    """
    name = address.rstrip("/").rpartition("/")[2]
    parts = [
        _front_matter(licence),
        f"# {name}",
        description.strip(),
        f"An index of {index.num_documents:,} documents, made by `ehi`: a folder of "
        "NumPy arrays, which NumPy alone searches.",
        _table(_facts(index) + [("licence", licence or "none is stated")]),
        "## Search",
        "In a checkout of `ehi`, and without JAX:",
        _code("bash", INSTALL),
        _code("python", _search(index, address, name)),
        "## Where it comes from",
        "What trained the index wrote this into its manifest:",
        _code("json", json.dumps(_identity(index), indent=1)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(licence):
    # JSON strings are YAML as well, whatever they hold.
    lines = ["---", f"license: {json.dumps(licence)}" if licence else ""]
    lines += ["library_name: ehi", "tags:", *(f"- {tag}" for tag in TAGS), "---"]
    return "\n".join(line for line in lines if line)


def _facts(index):
    """(what, value) of each row of the table."""
    drift, setting = index.drift(), index.setting
    height, branching = tree_shape(index.tree)
    leaves = f"{index.num_leaves:,}"
    if height > 1:
        leaves += f", a tree of {height} levels with {branching} children a node"
    facts = [
        ("documents", f"{index.num_documents:,}"),
        ("leaves", leaves),
        ("leaves of a document", f"{index.spill}" if index.spill > 1 else None),
        ("width of an embedding", f"{index.width}"),
        ("a document is stored as", _stored(index)),
        ("bytes of a document", f"{index.bytes_per_doc:,.4g}"),
        ("bytes of the folder", f"{index.index_bytes:,}"),
        ("version of the format", f"{index.folder.manifest['version']}"),
        ("texts are embedded by", _tower(index)),
        ("a search visits", _setting(index, setting)),
        ("recall of that search", _recall(index.contents.setting)),
        ("documents added since the build", f"{drift.documents_added:,}"),
        ("distortion of the codes", _digits(drift.distortion_built)),
        ("distortion of added documents", _digits(drift.distortion_added)),
    ]
    return [(what, value) for what, value in facts if value is not None]


def _stored(index):
    if index.codebooks is None:
        return f"vectors of {index.segments[0].vectors.dtype}"
    subspaces, words, _ = index.codebooks.shape
    bits = words.bit_length() - 1
    return (
        f"{subspaces} codes of {bits} bits, {32 * index.width / subspaces / bits:.3g} "
        f"times smaller than float32, scored by {index.score}"
    )


def _tower(index):
    name = (index.encoder or {}).get("tower")
    if not isinstance(name, str):
        return None
    carried = index.folder.manifest.get("tower")
    if carried is None:
        return f"{name}, which is not in this folder"
    total = sum(entry["bytes"] for entry in carried["files"].values())
    return f"{name}, which this folder carries: {total:,} bytes more"


def _setting(index, setting):
    if setting is None or index.num_leaves == 1:
        return None
    text = f"at most {setting['beam']} of {index.num_leaves} leaves"
    if setting["min_prob"]:
        text += f", those of a probability of at least {setting['min_prob']:.3g}"
    return text


def _recall(setting):
    """What `Index.tune` measured, if it did."""
    known = setting or {}
    if not isinstance(known.get("recall"), float):
        return None
    visited = known.get("visited")
    share = (
        "" if visited is None else f", {100 * visited:.3g}% of the documents visited"
    )
    return f"{known['recall']:.3g} of an exact search{share}"


def _digits(value):
    return None if value is None else f"{value:.3g}"


def _search(index, address, name):
    encoder = index.encoder or {}
    if "vectors" in encoder:  # made by ehi.fit: it takes vectors as they were given
        lines = [
            "import ehi",
            "",
            f"index = ehi.load(ehi.pull({address!r}, {name!r}))",
            "print(index.search(vectors, k=5).ids)  # floats, a row for each query",
        ]
    else:
        ask = 'search_text("a question"' if "tower" in encoder else "search(vectors"
        lines = [
            "import ehi",
            "from ehi.index import open_index",
            "",
            f"index = open_index(ehi.pull({address!r}, {name!r}))",
            f"print(index.{ask}, k=5).ids)",
        ]
    return "\n".join(lines)


def _identity(index):
    """The manifest's encoder and config, without long lists of numbers."""

    def short(value):
        if isinstance(value, dict):
            return {key: short(part) for key, part in value.items()}
        if isinstance(value, list) and len(value) > 20:
            return f"{len(value)} values"
        return value

    return {"encoder": short(index.encoder), "config": short(index.config)}


def _table(rows):
    lines = ["| what | value |", "| :-- | :-- |"]
    return "\n".join(lines + [f"| {what} | {value} |" for what, value in rows])


def _code(language, text):
    return f"```{language}\n{text}\n```"
