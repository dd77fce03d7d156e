"""Parameters and documents of an index to a folder and back.

Each array is one .npy file that can be memory-mapped, never a pickle. `manifest.json`
holds the small and plain rest. Documents added later are in `segments/`, numbered by
the generation of the manifest that brought them. Deleted documents are bits, by row.
"""

from pathlib import Path

import numpy as np

from ehi.index.check import IndexCorruptError, check_choice, check_count
from ehi.index.columns import KINDS, Metadata, StoredDocuments, StringIds
from ehi.index.commit import TowerFiles, replace_files, write_folder
from ehi.index.contents import SEGMENT_ARRAYS, Contents, Segment
from ehi.index.folder import TOWER, open_folder
from ehi.index.parameters import (
    PARAMETER_ARRAYS,
    Parameters,
    check_fit,
    check_tree,
    expect,
)
from ehi.index.search.search import check_setting

# Files of one segment, after its prefix.
_OF_SEGMENT = (*SEGMENT_ARRAYS, "ids", "id_offsets", "id_text", "documents")
_HISTORY = ("documents", "distortion", "added", "added_distortion")
_BUILT_SIZES = "built_leaf_sizes"
METADATA = "metadata"  # entry of a manifest, and start of the names of its files


def write_index(path, parameters, contents, arrays, texts, *, fields=None, tower=None):
    """Writes an index folder: see `save_index`.

    Args:
        path: the folder.
        parameters, contents: of the index.
        arrays, texts: the contents as one segment, of `ehi.index.updates`.
        fields: field -> kind of its metadata, or None.
        tower: TowerFiles that the folder carries; None for those that the folder of the
            contents has, False for none.

    Returns:
        Whether it is the folder that the contents came from.
    """
    arrays = {**parameters.arrays(), **arrays, **_built_arrays(contents)}
    header = manifest_header(
        parameters, [("", contents.num_documents)], contents.setting, contents.history,
        fields,
    )  # fmt: skip
    own = contents.folder
    if tower is None and own is not None and own.tower is not None:
        tower = TowerFiles(own.tower, link=True)
    if own is not None and not (Path(path).exists() and own.path.samefile(path)):
        own = None
    write_folder(path, header, arrays, texts, replaces=own, tower=tower or None)
    return own is not None


def read_index(path, mmap, verify):
    """The Parameters and the Contents in a folder: see `open_index`."""

    def read(folder):
        if verify:
            folder.check_sums()
        parameters, contents = _consistent(folder, lambda: _read(folder))
        if verify:
            contents.check_addresses()
        return parameters, contents

    return open_folder(path, read, mmap)


def read_newer(parameters, contents):
    """The Contents that are in their folder now: the same object if nothing changed.

    Raises:
        ValueError: the folder holds an index of other parameters now.
        IndexCorruptError: as `open_index`.
    """
    old = contents.folder

    def read(folder):
        if folder.manifest == old.manifest:
            return contents
        if _parameter_entries(folder.manifest) != _parameter_entries(old.manifest):
            raise ValueError(
                f"{folder.path} holds another index now, with other parameters: open it"
            )
        return _consistent(folder, lambda: _read_contents(folder, parameters, contents))

    return open_folder(old.path, read, old.mmap)


def write_update(parameters, contents):
    """Stores contents whose segments, except the last, are in the folder already.

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
        parameters,
        [(s["prefix"], s["num_documents"]) for s in segments],
        contents.setting,
        contents.history,
        contents.fields,
    ) | _tower_of(folder)
    keep = [name for name in folder.files if name != "deleted"]
    replace_files(folder, header, arrays, texts, keep)
    return _read_back(parameters, contents)


def write_compacted(parameters, contents, arrays, texts):
    """Stores contents as one segment; the caller holds the writer's lock.

    Args:
        parameters, contents, arrays, texts: as of `write_index`.

    Returns:
        The Contents as read back.
    """
    folder = contents.folder
    keep = [name for name in folder.files if not _is_content(name)]
    header = manifest_header(
        parameters, [("", contents.num_documents)], contents.setting, contents.history,
        contents.fields,
    ) | _tower_of(folder)  # fmt: skip
    arrays = {**arrays, **_built_arrays(contents)}
    replace_files(folder, header, arrays, texts, keep)
    return _read_back(parameters, contents)


def _tower_of(folder):
    """The entry of a header that keeps the tower of a folder."""
    entry = folder.manifest.get(TOWER)
    return {} if entry is None else {TOWER: entry}


def manifest_header(parameters, segments, setting=None, history=None, fields=None):
    """The entries of a manifest beside its files.

    Args:
        parameters: the Parameters.
        segments: (prefix of the file names, number of documents) of each segment.
        setting, history, fields: as of Contents.
    """
    known = {} if setting is None else {"search": setting}
    if history is not None:
        known["history"] = {name: history[name] for name in _HISTORY}
    if fields is not None:
        known[METADATA] = [{"field": field, "kind": fields[field]} for field in fields]
    return {
        "width": parameters.width,
        "spill": parameters.spill,
        "score": parameters.score,
        "segments": [
            {"prefix": prefix, "num_documents": num} for prefix, num in segments
        ],
        "tree": _tree_header(parameters.tree),
        "query_tree": _tree_header(parameters.query_tree),
        "encoder": parameters.encoder,
        "config": parameters.config,
        **known,
    }


def _is_content(name):
    """Whether a file holds documents, not parameters."""
    of_all = (*_OF_SEGMENT, "deleted", _BUILT_SIZES)
    return name in of_all or name.startswith(("segments.", f"{METADATA}."))


def _parameter_entries(manifest):
    """The entries of a manifest that no update changes."""
    header = {key: manifest[key] for key in ("width", "spill", "tree", "query_tree")}
    header["score"] = _score(manifest)
    sums = {
        name: entry["sha256"]
        for name, entry in manifest["files"].items()
        if not _is_content(name)
    }
    return header, sums


def _score(manifest):
    """The score of an index; an old manifest does not say that it is 'ip'."""
    return "ip" if manifest["version"] == 2 else manifest["score"]


def _tree_header(tree):
    """The entries of a tree that are no arrays, and the length of each of its lists."""
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


def _read_back(parameters, contents):
    folder = contents.folder
    return open_folder(
        folder.path, lambda new: _read_contents(new, parameters, contents), folder.mmap
    )


def _consistent(folder, read):
    """`read()`; whatever does not fit on the way is reported as corruption."""
    try:
        return read()
    except IndexCorruptError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise IndexCorruptError(
            f"the files of {folder.path} do not fit together: {error!r}"
        ) from None


def _read(folder):
    manifest = folder.manifest
    arrays = {
        name: folder.array(name)
        for name, entry in folder.files.items()
        if "shape" in entry and not _is_content(name)
    }
    plain = {name: arrays.pop(name, None) for name in PARAMETER_ARRAYS}
    width = check_count("width", manifest["width"])
    trees = {
        name: check_tree(_take_tree(name, manifest[name], arrays), width)
        for name in ("tree", "query_tree")
    }
    head = {name.removeprefix("query_head."): arrays.pop(name) for name in list(arrays)}
    parameters = Parameters(
        width=width,
        spill=check_count("spill", manifest["spill"]),
        score=_score(manifest),
        encoder=manifest["encoder"],
        config=manifest["config"],
        query_head=head or None,
        **trees,
        **plain,
    )
    check_fit(parameters)
    return parameters, _read_contents(folder, parameters, None)


def _read_contents(folder, parameters, old):
    """The documents in a folder; segments that `old` has already are taken from it."""
    known = {}
    if old is not None:
        known = {segment.source: segment for segment in old.segments if segment.source}
    fields = _read_fields(folder.manifest.get(METADATA))
    segments, first_row = [], 0
    for entry in folder.manifest["segments"]:
        prefix = entry["prefix"]
        num = check_count("num_documents", entry["num_documents"], least=0)
        names = [prefix + name for name in _OF_SEGMENT]
        names += _metadata_names(folder, prefix)
        files = [folder.files[name] for name in names if name in folder.files]
        source = tuple(file["sha256"] for file in files)
        segment = known.get(source)
        if segment is None or segment.first_row != first_row:
            segment = _read_segment(folder, prefix, first_row, source, fields, num)
            _check_segment(parameters, segment, num)
        segments.append(segment)
        if _kind(segment) != _kind(segments[0]):
            kinds = _kind(segments[0]), _kind(segment)
            raise ValueError(f"segments differ: {kinds[1]} and {kinds[0]}")
        first_row += num
    deleted = None
    if "deleted" in folder.files:
        bits = folder.array("deleted", mmap=True)
        if bits.dtype != np.uint8 or bits.shape != (-(-first_row // 8),):
            raise ValueError(f"deleted is {bits.dtype} {bits.shape}")
        deleted = np.unpackbits(bits, count=first_row).view(bool)
    if not segments:
        raise ValueError("there is no segment")
    setting = check_setting(parameters, folder.manifest.get("search"))
    history = _read_history(folder, parameters)
    return Contents(tuple(segments), deleted, folder, setting, history)


def _read_fields(stored):
    """field -> kind of the metadata in a manifest, or None.

    Raises:
        ValueError: a kind is unknown, or a field is no text or is there twice.
    """
    if stored is None:
        return None
    fields = {}
    for entry in stored:
        field = entry["field"]
        if not isinstance(field, str) or field in fields:
            raise ValueError(f"{METADATA} lists the field {field!r}")
        fields[field] = check_choice(METADATA, entry["kind"], KINDS)
    return fields


def _metadata_names(folder, prefix):
    """Names of the files of a segment's metadata."""
    start = f"{prefix}{METADATA}."
    return [name for name in folder.files if name.startswith(start)]


def _read_history(folder, parameters):
    """The history in a manifest, with the leaf sizes of the build if they are stored.

    Raises:
        ValueError: an entry is missing or of another kind.
    """
    stored = folder.manifest.get("history")
    if stored is None:
        return None
    history = {name: stored[name] for name in _HISTORY}
    for name, value in history.items():
        if name in ("documents", "added"):
            check_count(name, value, least=0)
        elif value is not None and not 0 <= value < np.inf:
            raise ValueError(f"{name} must be a number from 0 on, got {value!r}")
    if _BUILT_SIZES in folder.files:
        sizes = folder.array(_BUILT_SIZES, mmap=False)
        expect(_BUILT_SIZES, sizes, (parameters.num_leaves,), "int64")
        history["leaf_sizes"] = sizes
    return history


def _built_arrays(contents):
    """The leaf sizes of the build, once its segment was merged: name -> array."""
    sizes = (contents.history or {}).get("leaf_sizes")
    return {} if sizes is None else {_BUILT_SIZES: sizes}


def _read_segment(folder, prefix, first_row, source, fields, num):
    arrays = {
        name: folder.array(prefix + name)
        for name in _OF_SEGMENT
        if name != "documents" and prefix + name in folder.files
    }
    ids = arrays.pop("ids", None)
    if ids is None:
        ids = StringIds(arrays.pop("id_offsets"), arrays.pop("id_text"))
    documents = None
    if f"{prefix}documents" in folder.files:
        documents = StoredDocuments(folder.text(f"{prefix}documents"))
    metadata = None
    if fields is not None:
        names = _metadata_names(folder, prefix)
        stored = {name.removeprefix(prefix): folder.array(name) for name in names}
        metadata = Metadata.from_arrays(fields, stored, num)
    return Segment(
        ids=ids, documents=documents, metadata=metadata, first_row=first_row,
        source=source, **arrays,
    )  # fmt: skip


def _check_segment(parameters, segment, num):
    """Checks that the arrays of a segment of `num` documents fit the parameters.

    Raises:
        ValueError: naming the array.
    """
    if isinstance(segment.ids, StringIds):
        offsets = segment.ids.offsets
        expect("id_offsets", offsets, (num + 1,), "int64")
        if offsets[0]:
            raise ValueError(f"id_offsets start at {offsets[0]}, not 0")
        expect("id_text", segment.ids.text, (offsets[-1],), "uint8")
    else:
        expect("ids", segment.ids, (num,), "int64")
    copies, offsets = num * parameters.spill, segment.leaf_offsets
    expect("leaf_rows", segment.leaf_rows, (copies,), "uint32")
    expect("leaf_offsets", offsets, (parameters.num_leaves + 1,), "int64")
    descend = (offsets[1:] < offsets[:-1]).any()  # a difference may overflow
    if offsets[0] or offsets[-1] != copies or descend:
        raise ValueError(f"leaf_offsets do not ascend from 0 to {copies}")
    if (segment.vectors is None) == (segment.codes is None):
        raise ValueError("leaves hold either vectors or codes")
    if (segment.codes is None) != (parameters.codebooks is None):
        raise ValueError("codes need codebooks, and vectors have none")
    if segment.codes is None:
        shape = (copies, parameters.width)
        expect("vectors", segment.vectors, shape, "float32", "float16")
    else:
        expect("codes", segment.codes, (copies, parameters.code_bytes), "uint8")
    if (segment.factors is None) == parameters.has_factors:
        has = "no factors" if segment.factors is None else "factors"
        raise ValueError(f"score {parameters.score!r} with {has}")
    if segment.factors is not None:
        expect("factors", segment.factors, (copies,), "uint8")
    if segment.rerank_vectors is not None:
        shape = (num, parameters.width)
        expect("rerank_vectors", segment.rerank_vectors, shape, "float16")


def _kind(segment):
    """The properties that all segments of an index share."""
    return {
        "string ids": isinstance(segment.ids, StringIds),
        "vectors": None if segment.vectors is None else segment.vectors.dtype.name,
        "rerank_vectors": segment.rerank_vectors is not None,
        "documents": segment.documents is not None,
    }
