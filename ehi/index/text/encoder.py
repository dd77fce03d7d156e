"""The head that queries pass after the tower, from the arrays an index keeps of it."""

import os
from pathlib import Path

import numpy as np

from ehi.index.text.checkpoint import (
    check_files,
    find_tokenizer,
    missing_files,
    open_tokenizer,
    read_tower,
    weights_sha256,
)
from ehi.index.text.tower import gelu, unit_rows

NAMES = ("projection", "w_in", "b_in", "w_out")  # the first alone, or all


def apply_head(head, x):
    r"""NumPy forward of `ehi.model.tower.Head`.

    .. math:: y = \mathrm{unit}(x P + \mathrm{gelu}(x W_{in} + b_{in}) W_{out})

    Args:
        head: 'projection' (T, D) and, where there is a residual part, 'w_in' (T, F),
            'b_in' (F,), 'w_out' (F, D); empty for no head.
        x: (N, T) tower outputs.

    Returns:
        (N, D) float32 unit rows.
    """
    y = x @ head["projection"] if "projection" in head else x
    if "w_in" in head:
        y = y + gelu(x @ head["w_in"] + head["b_in"]) @ head["w_out"]
    return unit_rows(y)


def check_head(head, tower_width, width):
    """Head arrays as float32 in memory, if they lead from T to the index's D.

    Raises:
        ValueError: an unknown or missing array, or one of another shape.
    """
    arrays = {
        name: np.array(array, np.float32, order="C")
        for name, array in (head or {}).items()
    }
    if set(arrays) not in (set(), set(NAMES[:1]), set(NAMES)):
        raise ValueError(
            f"the query head of the index has arrays {sorted(arrays)}, not "
            f"{NAMES[0]!r} alone or {NAMES}"
        )
    hidden = arrays["b_in"].size if "b_in" in arrays else 0
    expected = {
        "projection": (tower_width, width),
        "w_in": (tower_width, hidden),
        "b_in": (hidden,),
        "w_out": (hidden, width),
    }
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise ValueError(
                f"{name} of the query head has shape {array.shape}, a tower of width "
                f"{tower_width} and an index of width {width} need {expected[name]}"
            )
    if not arrays and tower_width != width:
        raise ValueError(
            f"the tower has width {tower_width}, the index {width}, and no query head "
            "lies between"
        )
    return arrays


# MERGED ehi_index_text_encoder: Text in: the tokeniser, tower and head that an index
# was built with, in NumPy.
#
#     encode = load_text_encoder(index)
#     hits = index.search(encode(["how do I parse an ISO date"]), k=10, beam=8)
#
# Searching by text needs no JAX. In a checkout of this repository:
#
#     pip install numpy threadpoolctl tokenizers safetensors
#     pip install --no-deps .
#
# Embeddings are those of `ehi.model.tower` within 1e-5. A tower that the index does
# not carry is looked up in `EHI_CACHE` and in the cache of the Hugging Face hub;
# nothing
# is downloaded here.
#

# Weights of towers that an index may name without a sha256 of its own.
KNOWN_SHA256 = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
}


class TowerNotFoundError(FileNotFoundError):
    """The tower has a hub id and its files are in neither cache.

    Attributes:
        name: the hub id.
    """

    def __init__(self, name, folder):
        super().__init__(
            f"the tower {name} is neither in {folder} nor in the cache of the hub: "
            f"fetch it with `hf download {name} --include '*.json' "
            "--include merges.txt --include model.safetensors`, or give the folder it "
            "is in"
        )
        self.name = name


class TextEncoder:
    """Texts -> unit embeddings of one index; safe to call from several threads.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; its truncation and padding are set here.
        tower: a `Tower`.
        head: arrays as in `apply_head`.
        length: tokens of a text that are read, special ones included.
    """

    def __init__(self, tokenizer, tower, head, length):
        tokenizer.no_padding()
        tokenizer.enable_truncation(length)
        self.tokenizer = tokenizer
        self.tower = tower
        self.head = head
        self.length = length

    def __call__(self, texts, *, threads=1):
        """Embed N texts.

        Args:
            texts: sequence of str, or one str, which counts as a sequence of one.
            threads: Python threads over parts of a batch.

        Returns:
            float32 array (N, D), unit rows.

        Raises:
            ValueError: something is not a str, or not valid Unicode; threads below 1.
        """
        features = self.tower(self.tokenise(texts), threads=threads)  # (N, T)
        return apply_head(self.head, features)

    def tokenise(self, texts):
        """Token ids of each text, cut to `length` and not padded: N lists."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        for number, text in enumerate(texts):
            check_text(number, text)
        if len(texts) == 1:  # spares a single query the thread pool
            return [self.tokenizer.encode(texts[0]).ids]
        return [item.ids for item in self.tokenizer.encode_batch_fast(texts)]


def load_text_encoder(index, *, tower=None, cache_dir=None):
    """The text encoder that an index names.

    Args:
        index: the Index. Its `encoder` names the tower (a hub id,
            or a folder, which may lie relative to that of the index) and the query
            length; `query_head` holds the head.
        tower: hub id or folder to use instead of the named one.
        cache_dir: where hub towers are kept; default `EHI_CACHE`, else ~/.cache/ehi.

    Returns:
        TextEncoder.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it; for a hub id
            that is in neither cache, TowerNotFoundError, naming the command.
        ValueError: the index does not name its encoder, the tower found has other
            weights than the one it was built with, or its files do not fit.
    """
    identity = index.encoder or {}
    if "tower" not in identity or "query_length" not in identity:
        raise ValueError(
            "this index does not name its text encoder (it was built from embeddings): "
            "it can be searched by embeddings only"
        )
    name = tower or tower_location(index)
    folder = find_folder(name, cache_dir)
    check_files(folder)
    check_sha256(name, folder, identity.get("tower_sha256"))
    network = read_tower(folder)
    tokenizer = open_tokenizer(find_tokenizer(folder))
    length = check_length(identity["query_length"], tokenizer, network)
    head = check_head(index.query_head, network.width, index.width)
    return TextEncoder(tokenizer, network, head, length)


def tower_location(index):
    """The tower's folder as seen from that of the index if it is there, else its name.

    Raises:
        ValueError: the name is no text.
    """
    name = index.encoder["tower"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"the index names its tower {name!r}, which is no name")
    if index.folder is not None and (index.folder.path / name).is_dir():
        return index.folder.path / name
    return name


def find_folder(name, cache_dir=None):
    """Folder of a tower: the path itself, else our cache, else that of the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    name = str(name)
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no model folder {name!r}")
    cache_dir = cache_dir or os.environ.get("EHI_CACHE") or Path.home() / ".cache/ehi"
    folder = Path(cache_dir) / "models" / name.replace("/", "--")
    if folder.is_dir():
        return folder
    # It comes with tokenizers, and takes a while to import.
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        raise TowerNotFoundError(name, folder) from None
    if missing_files(found):
        raise TowerNotFoundError(name, folder)
    return found


def check_sha256(name, folder, expected):
    """Refuses weights other than those the index, or else `KNOWN_SHA256`, states."""
    source = "the index was built with"
    if expected is None:
        expected, source = KNOWN_SHA256.get(str(name)), "expected are"
    if expected is None:
        return
    found = weights_sha256(folder)
    if found != expected:
        raise ValueError(
            f"the tower {name} has weights {found[:12]} ({folder}/model.safetensors), "
            f"{source} {str(expected)[:12]}"
        )


def check_length(length, tokenizer, tower):
    """`length`, if it leaves room for a token and the tower has so many positions."""
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    most = len(tower.positions)
    if type(length) is not int or not special < length <= most:
        raise ValueError(
            f"the index gives queries {length!r} tokens, allowed are {special + 1}.."
            f"{most}: {special} are special, the tower has {most} positions"
        )
    return length


def check_text(number, text):
    """Refuses what the tokeniser cannot read, naming its place.

    Raises:
        ValueError: not a str, or with half a surrogate pair.
    """
    if not isinstance(text, str):
        raise ValueError(f"text {number} is of type {type(text).__name__}, not str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text {number} is not valid Unicode: {error}") from None
