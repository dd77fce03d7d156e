"""An Index to a folder and back.

Every array is one .npy file that can be memory-mapped, never a pickle. The rest, small
and plain, is in manifest.json.
"""

import numpy as np

from ehi.index.check import check_codebooks, check_count, check_tree
from ehi.index.documents import Documents, StringIds
from ehi.index.folder import IndexCorruptError, read_folder, write_folder
from ehi.index.index import PLAIN_ARRAYS, Index
from ehi.index.route import tree_shape

__all__ = ["IndexCorruptError", "open_index", "save_index"]


def save_index(index, path, documents=None):
    """Writes an index folder; over an existing one, old or new survives a crash.

    Args:
        index: the Index.
        path: the folder, made if needed.
        documents: JSON values to show, one for each row in order, or None to keep
            those the index already has.

    Raises:
        ValueError: not as many documents as the index holds.
        FileExistsError: `path` is there and is not an index.
    """
    documents = index.documents if documents is None else documents
    lines = {}
    if documents is not None:
        lines["documents"] = list(documents)
        if len(lines["documents"]) != index.num_documents:
            raise ValueError(
                f"{len(lines['documents'])} documents to show for an index of "
                f"{index.num_documents}"
            )
    header = {
        "num_documents": index.num_documents,
        "width": index.width,
        "spill": index.spill,
        "tree": _tree_header(index.tree),
        "query_tree": _tree_header(index.query_tree),
        "encoder": index.encoder,
        "config": index.config,
    }
    write_folder(path, header, index.named_arrays(), lines)


def open_index(path, *, mmap=True, verify=False):
    """Opens an index folder.

    The manifest, shapes, dtypes and file sizes are always checked.

    Args:
        path: the folder.
        mmap: map the files into memory and read them as needed, else load them.
        verify: also check the sha256 sum of every file, as Index.verify does.

    Returns:
        Index.

    Raises:
        FileNotFoundError: no index there.
        IndexCorruptError: a file is missing, truncated, altered or does not fit.
    """
    folder = read_folder(path)
    if verify:
        folder.check_sums()
    try:
        index = _read(folder, mmap)
        _check_fit(index, folder.manifest["num_documents"])
    except IndexCorruptError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IndexCorruptError(
            f"the files of {path} do not fit together: {error}"
        ) from None
    if verify:
        index.check_addresses()
    return index


def _read(folder, mmap):
    manifest = folder.manifest
    arrays = {
        name: folder.array(name, mmap)
        for name, entry in folder.files.items()
        if "shape" in entry
    }
    plain = {name: arrays.pop(name, None) for name in PLAIN_ARRAYS}
    ids = arrays.pop("ids", None)
    if ids is None:
        ids = StringIds(arrays.pop("id_offsets"), arrays.pop("id_text"))
    trees = {
        name: check_tree(_take_tree(name, manifest[name], arrays), manifest["width"])
        for name in ("tree", "query_tree")
    }
    documents = None
    if "documents" in folder.files:
        documents = Documents(folder.text("documents", mmap))
    head = {name.removeprefix("query_head."): arrays.pop(name) for name in list(arrays)}
    return Index(
        width=manifest["width"],
        spill=manifest["spill"],
        ids=ids,
        encoder=manifest["encoder"],
        config=manifest["config"],
        query_head=head or None,
        documents=documents,
        folder=folder,
        **trees,
        **plain,
    )


def _tree_header(tree):
    """What of a tree is not an array, and how many arrays each of its lists has."""
    if tree is None:
        return None
    lists = {key: len(value) for key, value in tree.items() if isinstance(value, list)}
    plain = {key: tree[key] for key in ("kind", "scale") if key in tree}
    return {**plain, "lists": lists}


def _take_tree(name, header, arrays):
    """Moves the arrays of a tree out of `arrays` and into a tree dict."""
    if header is None:
        return None
    tree = {key: header[key] for key in ("kind", "scale") if key in header}
    for key, height in header["lists"].items():
        if not 1 <= height <= len(arrays):
            raise ValueError(f"{name}.{key} has {height} levels")
        tree[key] = [arrays.pop(f"{name}.{key}.{h}") for h in range(height)]
    for key in ("w_in", "w_out"):
        if f"{name}.{key}" in arrays:
            tree[key] = arrays.pop(f"{name}.{key}")
    return tree


def _check_fit(index, num_documents):
    """Refuses arrays whose shapes, dtypes or offsets do not fit each other."""
    width = check_count("width", index.width)
    check_count("spill", index.spill)
    copies, leaves = len(index.leaf_rows), index.num_leaves
    if isinstance(index.ids, StringIds):
        _expect("id_offsets", index.ids.offsets, (num_documents + 1,), "int64")
        _expect("id_text", index.ids.text, (index.ids.offsets[-1],), "uint8")
    else:
        _expect("ids", index.ids, (num_documents,), "int64")
    _expect("leaf_rows", index.leaf_rows, (copies,), "uint32")
    _expect("leaf_offsets", index.leaf_offsets, (leaves + 1,), "int64")
    offsets = index.leaf_offsets
    if offsets[0] or offsets[-1] != copies or (np.diff(offsets) < 0).any():
        raise ValueError(f"leaf_offsets do not ascend from 0 to {copies}")
    for name in ("tree", "query_tree"):
        tree = getattr(index, name)
        if name == "tree" or tree is not None:
            height, branching = tree_shape(tree)
            if branching**height != leaves:
                raise ValueError(
                    f"a {name} of {branching}^{height} for {leaves} leaves"
                )
    if (index.vectors is None) == (index.codes is None):
        raise ValueError("leaves hold either vectors or codes")
    if index.codes is None:
        _expect("vectors", index.vectors, (copies, width), "float32", "float16")
    else:
        _check_codes(index, copies)
    if index.rerank_vectors is not None:
        _expect(
            "rerank_vectors", index.rerank_vectors, (num_documents, width), "float16"
        )


def _check_codes(index, copies):
    codebooks = check_codebooks(index.codebooks, index.width)
    num_subspaces, num_codewords, _ = codebooks.shape
    code_bytes = num_subspaces if num_codewords == 256 else num_subspaces // 2
    _expect("codes", index.codes, (copies, code_bytes), "uint8")
    _expect("codebooks", index.codebooks, codebooks.shape, "float32")
    if index.assign_codebooks is not None:
        _expect("assign_codebooks", index.assign_codebooks, codebooks.shape, "float32")
    square = (index.width, index.width)
    if index.rotation is not None:
        _expect("rotation", index.rotation, square, "float32")
    if index.leaf_centroids is not None:
        shape = (index.num_leaves, index.width)
        _expect("leaf_centroids", index.leaf_centroids, shape, "float32")


def _expect(name, array, shape, *dtypes):
    if array.shape != shape or array.dtype.name not in dtypes:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, expected {dtypes[0]} {shape}"
        )
