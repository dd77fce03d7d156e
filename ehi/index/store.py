"""What of an index stands under which name in the manifest of a folder."""

import threading
from pathlib import Path

import numpy as np

from ehi.index.check import check_codebooks, check_count, check_tree
from ehi.index.commit import replace_files, write_folder
from ehi.index.compact import merged_arrays, merged_text
from ehi.index.contents import SEGMENT_ARRAYS, Contents, Documents, Segment, StringIds
from ehi.index.folder import IndexCorruptError, open_folder
from ehi.index.index import PARAMETER_ARRAYS, Index
from ehi.index.search.routing import tree_shape

# Files of one segment, after its prefix.
OF_SEGMENT = (*SEGMENT_ARRAYS, "ids", "id_offsets", "id_text", "documents")


def manifest_header(index, segments):
    """The entries of a manifest beside its files, of an index with these segments."""
    return {
        "width": index.width,
        "spill": index.spill,
        "segments": [
            {"prefix": prefix, "num_documents": num} for prefix, num in segments
        ],
        "tree": _tree_header(index.tree),
        "query_tree": _tree_header(index.query_tree),
        "encoder": index.encoder,
        "config": index.config,
    }


def is_content(name):
    """Whether a file is of the documents, not of the parameters."""
    return name in (*OF_SEGMENT, "deleted") or name.startswith("segments.")


def parameters_of(manifest):
    """What no update changes."""
    header = {key: manifest[key] for key in ("width", "spill", "tree", "query_tree")}
    sums = {
        name: entry["sha256"]
        for name, entry in manifest["files"].items()
        if not is_content(name)
    }
    return header, sums


def _tree_header(tree):
    """What of a tree is not an array, and how many arrays each of its lists has."""
    if tree is None:
        return None
    lists = {key: len(value) for key, value in tree.items() if isinstance(value, list)}
    plain = {key: tree[key] for key in ("kind", "scale") if key in tree}
    return {**plain, "lists": lists}


def take_tree(name, header, arrays):
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


# MERGED ehi_index_fit: Refuses arrays of a folder whose shapes, dtypes or offsets do
# not fit each other.


def check_fit(index):
    """Checks the parameters of an Index, its documents apart.

    Raises:
        ValueError: naming the array.
    """
    if index.query_tree is not None:
        shapes = tree_shape(index.tree), tree_shape(index.query_tree)
        if shapes[0] != shapes[1]:
            raise ValueError(f"tree and query_tree have the shapes {shapes}")
    if index.spill > index.num_leaves:
        raise ValueError(f"spill {index.spill} of {index.num_leaves} leaves")
    names = ("assign_codebooks", "rotation", "leaf_centroids")
    if index.codebooks is None:
        for name in names:
            if getattr(index, name) is not None:
                raise ValueError(f"{name} without codebooks")
        return
    codebooks = check_codebooks(index.codebooks, index.width)
    square = (index.width, index.width)
    leaves = (index.num_leaves, index.width)
    _expect("codebooks", index.codebooks, codebooks.shape, "float32")
    for name, shape in zip(names, (codebooks.shape, square, leaves), strict=True):
        if getattr(index, name) is not None:
            _expect(name, getattr(index, name), shape, "float32")


def check_segment(index, segment, num, first):
    """Checks the arrays of a segment of `num` documents.

    Args:
        index: the Index whose parameters it has to fit.
        segment: the Segment.
        num: its documents, as the manifest says.
        first: the first segment, which all have to be like, or None.

    Raises:
        ValueError: naming the array.
    """
    if isinstance(segment.ids, StringIds):
        offsets = segment.ids.offsets
        _expect("id_offsets", offsets, (num + 1,), "int64")
        if offsets[0]:
            raise ValueError(f"id_offsets start at {offsets[0]}, not 0")
        _expect("id_text", segment.ids.text, (offsets[-1],), "uint8")
    else:
        _expect("ids", segment.ids, (num,), "int64")
    copies, offsets = num * index.spill, segment.leaf_offsets
    _expect("leaf_rows", segment.leaf_rows, (copies,), "uint32")
    _expect("leaf_offsets", offsets, (index.num_leaves + 1,), "int64")
    descend = (offsets[1:] < offsets[:-1]).any()  # a difference may overflow
    if offsets[0] or offsets[-1] != copies or descend:
        raise ValueError(f"leaf_offsets do not ascend from 0 to {copies}")
    if (segment.vectors is None) == (segment.codes is None):
        raise ValueError("leaves hold either vectors or codes")
    if (segment.codes is None) != (index.codebooks is None):
        raise ValueError("codes need codebooks, and vectors have none")
    if segment.codes is None:
        shape = (copies, index.width)
        _expect("vectors", segment.vectors, shape, "float32", "float16")
    else:
        num_subspaces, num_codewords, _ = index.codebooks.shape
        code_bytes = num_subspaces if num_codewords == 256 else num_subspaces // 2
        _expect("codes", segment.codes, (copies, code_bytes), "uint8")
    if segment.rerank_vectors is not None:
        shape = (num, index.width)
        _expect("rerank_vectors", segment.rerank_vectors, shape, "float16")
    if first is not None and _kind(segment) != _kind(first):
        raise ValueError(f"segments differ: {_kind(first)} and {_kind(segment)}")


def _kind(segment):
    """What all segments of an index have in common."""
    return {
        "string ids": isinstance(segment.ids, StringIds),
        "vectors": None if segment.vectors is None else segment.vectors.dtype.name,
        "rerank_vectors": segment.rerank_vectors is not None,
        "documents": segment.documents is not None,
    }


def _expect(name, array, shape, *dtypes):
    if array.shape != shape or array.dtype.name not in dtypes:
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}, expected {dtypes[0]} {shape}"
        )


# MERGED ehi_index_store: An Index to a folder and back.
#
# Every array is one .npy file that can be memory-mapped, never a pickle. The rest,
# small
# and plain, is in manifest.json. Documents added later stand in `segments/`, numbered
# by
# the generation of the manifest that brought them; deleted ones are bits, by row.
#

__all__ = ["IndexCorruptError", "open_index", "save_index"]

_SWAPPING = threading.Lock()


def save_index(index, path, documents=None):
    """Writes an index folder; over an existing one, old or new survives a crash.

    Segments are merged and deleted documents left out, as `Index.compact` does.

    Args:
        index: the Index, which stays where it is, in memory or in its own folder.
        path: the folder, made if needed. Where it is the index's own, the index sees
            what was written.
        documents: JSON values to show, one for each document in order of their rows, or
            None to keep those the index already has.

    Raises:
        ValueError: not as many documents as the index holds; into its own folder, to
            which somebody else wrote since it was opened or refreshed.
        FileExistsError: `path` is there and is not an index.
        IndexLockedError: somebody else writes to it.
        OSError: it cannot be written; what was there is as it was.
    """
    contents = index.contents
    texts = _texts(contents)
    if documents is not None:
        documents = list(documents)
        if len(documents) != contents.num_documents:
            raise ValueError(
                f"{len(documents)} documents to show for an index of "
                f"{contents.num_documents}"
            )
        texts = {"documents": [Documents.of(documents).text]}
    arrays = {**index.parameter_arrays(), **merged_arrays(contents)}
    header = manifest_header(index, [("", contents.num_documents)])
    own = contents.folder
    if own is not None and not (Path(path).exists() and own.path.samefile(path)):
        own = None
    write_folder(path, header, arrays, texts, replaces=own)
    if own is not None:
        refresh(index)


def open_index(path, *, mmap=True, verify=False):
    """Opens an index folder.

    The manifest, shapes, dtypes and file sizes are always checked.

    Args:
        path: the folder.
        mmap: map the files into memory and read them as needed, else load them.
        verify: also check the sha256 sum of every file, as Index.verify does.

    Returns:
        Index, a snapshot: what others write later is seen after `Index.refresh`.

    Raises:
        FileNotFoundError: no index there.
        IndexCorruptError: a file is missing, truncated, altered or does not fit.
    """

    def read(folder):
        if verify:
            folder.check_sums()
        index = _consistent(folder, lambda: _read(folder, mmap))
        if verify:
            index.check_addresses()
        return index

    return open_folder(path, read)


def refresh(index):
    """Reads what others wrote since: see `Index.refresh`."""
    old = index.contents
    if old.folder is None:
        return False

    def read(folder):
        if folder.manifest == old.folder.manifest:
            return old
        if parameters_of(folder.manifest) != parameters_of(old.folder.manifest):
            raise ValueError(
                f"{folder.path} holds another index now, with other parameters: open it"
            )
        return _consistent(folder, lambda: _read_contents(folder, index, old))

    new = open_folder(old.folder.path, read)
    swap(index, new)
    return new is not old


def swap(index, contents):
    """Makes an index see other contents, unless it sees newer ones already.

    Two threads may read the folder, and come back in the other order.
    """
    with _SWAPPING:
        there, new = index.contents.folder, contents.folder
        if there and new.manifest["generation"] < there.manifest["generation"]:
            return
        index.contents = contents


def write_update(index, contents):
    """Stores new contents that share all but a last segment with those in the folder.

    The caller holds the writer's lock, and `contents.folder` is the newest.

    Returns:
        The Contents as read back.
    """
    folder = contents.folder
    segments = list(folder.manifest["segments"])
    arrays, texts = {}, {}
    if len(contents.segments) > len(segments):
        prefix = f"segments.{folder.manifest['generation'] + 1}."
        last = contents.segments[-1]
        segments.append({"prefix": prefix, "num_documents": len(last)})
        arrays = {prefix + name: array for name, array in last.arrays().items()}
        if last.documents is not None:
            texts = {f"{prefix}documents": [last.documents.text]}
    if contents.deleted is not None:
        arrays["deleted"] = np.packbits(contents.deleted)
    header = manifest_header(
        index, [(s["prefix"], s["num_documents"]) for s in segments]
    )
    keep = [name for name in folder.files if name != "deleted"]
    replace_files(folder, header, arrays, texts, keep)
    return open_folder(folder.path, lambda new: _read_contents(new, index, contents))


def write_compacted(index, contents):
    """Stores contents as one segment; the caller holds the writer's lock.

    Returns:
        The Contents as read back.
    """
    folder = contents.folder
    keep = [name for name in folder.files if not is_content(name)]
    header = manifest_header(index, [("", contents.num_documents)])
    replace_files(folder, header, merged_arrays(contents), _texts(contents), keep)
    return open_folder(folder.path, lambda new: _read_contents(new, index, contents))


def _texts(contents):
    text = merged_text(contents)
    return {} if text is None else {"documents": text}


def _consistent(folder, read):
    """`read()`, any misfit found on the way named as corruption."""
    try:
        return read()
    except IndexCorruptError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise IndexCorruptError(
            f"the files of {folder.path} do not fit together: {error!r}"
        ) from None


def _read(folder, mmap):
    manifest = folder.manifest
    arrays = {
        name: folder.array(name, mmap)
        for name, entry in folder.files.items()
        if "shape" in entry and not is_content(name)
    }
    plain = {name: arrays.pop(name, None) for name in PARAMETER_ARRAYS}
    width = check_count("width", manifest["width"])
    trees = {
        name: check_tree(take_tree(name, manifest[name], arrays), width)
        for name in ("tree", "query_tree")
    }
    head = {name.removeprefix("query_head."): arrays.pop(name) for name in list(arrays)}
    index = Index(
        width=width,
        spill=check_count("spill", manifest["spill"]),
        encoder=manifest["encoder"],
        config=manifest["config"],
        query_head=head or None,
        mmap=mmap,
        **trees,
        **plain,
    )
    check_fit(index)
    index.contents = _read_contents(folder, index, None)
    return index


def _read_contents(folder, index, old):
    """The documents in a folder; segments that `old` has already are taken from it."""
    known = {}
    if old is not None:
        known = {segment.source: segment for segment in old.segments if segment.source}
    segments, first_row = [], 0
    for entry in folder.manifest["segments"]:
        prefix = entry["prefix"]
        num = check_count("num_documents", entry["num_documents"], least=0)
        names = [prefix + name for name in OF_SEGMENT]
        files = [folder.files[name] for name in names if name in folder.files]
        source = tuple(file["sha256"] for file in files)
        segment = known.get(source)
        if segment is None or segment.first_row != first_row:
            segment = _read_segment(folder, prefix, first_row, source, index.mmap)
            check_segment(index, segment, num, segments[0] if segments else None)
        segments.append(segment)
        first_row += num
    deleted = None
    if "deleted" in folder.files:
        bits = folder.array("deleted", mmap=True)
        if bits.dtype != np.uint8 or bits.shape != (-(-first_row // 8),):
            raise ValueError(f"deleted is {bits.dtype} {bits.shape}")
        deleted = np.unpackbits(bits, count=first_row).view(bool)
    if not segments:
        raise ValueError("there is no segment")
    return Contents(tuple(segments), deleted, folder)


def _read_segment(folder, prefix, first_row, source, mmap):
    arrays = {
        name: folder.array(prefix + name, mmap)
        for name in OF_SEGMENT
        if name != "documents" and prefix + name in folder.files
    }
    ids = arrays.pop("ids", None)
    if ids is None:
        ids = StringIds(arrays.pop("id_offsets"), arrays.pop("id_text"))
    documents = None
    if f"{prefix}documents" in folder.files:
        documents = Documents(folder.text(f"{prefix}documents", mmap))
    return Segment(
        ids=ids, documents=documents, first_row=first_row, source=source, **arrays
    )
