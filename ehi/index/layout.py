"""What of an index stands under which name in the manifest of a folder."""

from ehi.index.segment import SEGMENT_ARRAYS

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
