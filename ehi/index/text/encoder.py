"""Text in: the tokeniser, tower and head that an index was built with, in NumPy.

    encode = load_text_encoder(index)
    hits = index.search(encode(["how do I parse an ISO date"]), k=10, beam=8)

Searching by text needs no JAX: `ehi.index.check.INSTALL` is all that it needs.
Embeddings are those of `ehi.model.tower` within 1e-5. A tower that the index does not
carry is looked up in `EHI_CACHE` and in the cache of the Hugging Face hub; nothing is
downloaded here.
"""

from pathlib import Path

import numpy as np

from ehi.files import cache_folder
from ehi.index.check import check_installed
from ehi.index.text.checkpoint import (
    BPE_FILES,
    TOKENIZER,
    check_files,
    missing_files,
    weights_sha256,
)
from ehi.index.text.settings import (
    CONFIG,
    TOKENIZER_CONFIG,
    check_prefix,
    read_optional,
    sentence_config,
)
from ehi.index.text.tower import gelu, read_tower, unit_rows

# Weights of our published numbers, and of an index that states no sha256.
KNOWN_SHA256 = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
}
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
HEAD_ARRAYS = ("projection", "w_in", "b_in", "w_out")  # the first alone, or all


# Text -> tokens


class TextTokenizer:
    """Texts -> token ids, the same as transformers makes for a checkpoint.

    `ehi.data` uses this class too, because a query must have the tokens that the
    encoder was trained with.

    >>> tokenizer = TextTokenizer("tests/fixtures/bert_tiny/tokenizer.json")
    >>> tokenizer.cut_to(4)
    >>> tokenizer(["a b c", ""])
    [[2, 4, 5, 3], [2, 3]]

    Args:
        path: tokenizer.json, or vocab.json with merges.txt beside it (RoBERTa). Files
            beside it give `do_lower_case` (sentence_bert_config.json),
            `truncation_side` (tokenizer_config.json) and `vocab_size`, the rows of the
            word table (config.json).
        prefix: put before every text; '' for none.

    Attributes:
        library: the `tokenizers.Tokenizer`.
        special: special tokens of a text.

    Raises:
        ValueError: a file cannot be read, or no token starts or ends a text.
    """

    def __init__(self, path, prefix=""):
        self.path, self.prefix = Path(path), prefix
        self.library = open_tokenizer(self.path)
        self.special = self.library.num_special_tokens_to_add(is_pair=False)
        folder = self.path.parent
        self.lower_case = bool(sentence_config(folder).get("do_lower_case"))
        rows = read_optional(folder / CONFIG).get("vocab_size")
        self.rows = rows if type(rows) is int else None
        # As in transformers, tokenizer_config.json overrides tokenizer.json.
        self.own_side = (self.library.truncation or {}).get("direction", "right")
        config = read_optional(folder / TOKENIZER_CONFIG)
        self.side = config.get("truncation_side") or self.own_side
        if self.side not in ("left", "right"):
            raise ValueError(
                f"truncation_side {self.side!r} in {folder / TOKENIZER_CONFIG} is not "
                "'left' or 'right'"
            )
        self.library.no_padding()

    def cut_to(self, length):
        """Let texts have `length` tokens at most, special ones included."""
        self.library.enable_truncation(length, direction=self.side)

    def __call__(self, texts):
        """Token ids of each text, not padded: N lists.

        Raises:
            ValueError: a token has no row in the word table.
        """
        if self.prefix:  # stripped as by sentence-transformers
            texts = [(self.prefix + text).strip() for text in texts]
        if self.lower_case:
            texts = [text.lower() for text in texts]
        if len(texts) == 1:  # spares a single query the thread pool
            rows = [self.library.encode(texts[0]).ids]
        else:
            rows = [item.ids for item in self.library.encode_batch_fast(texts)]
        if self.rows is not None:
            largest = max((max(row, default=0) for row in rows), default=0)
            if largest >= self.rows:
                raise ValueError(
                    f"token id {largest} ({self.library.id_to_token(largest)!r}) is "
                    f"outside the word table of {self.rows} rows: {self.path.name} is "
                    f"not that of the tower in {self.path.parent}"
                )
        return rows

    def content(self):
        """Bytes that identify tokeniser and prefix: others make other tokens."""
        several = self.path.name == BPE_FILES[0]
        content = self.library.to_str().encode() if several else self.path.read_bytes()
        if self.lower_case:
            content += b"lower case"
        if self.side != self.own_side:
            content += self.side.encode()
        if self.prefix:
            content += b"prefix " + self.prefix.encode()
        return content


def find_tokenizer(folder):
    """Path of tokenizer.json, or of vocab.json if there is no tokenizer.json."""
    path = folder / TOKENIZER
    return path if path.is_file() else folder / BPE_FILES[0]


def open_tokenizer(path):
    """The `tokenizers.Tokenizer` of a file; tokenizers is imported here.

    Args:
        path: tokenizer.json; or vocab.json with merges.txt beside it, which make the
            tokeniser of RoBERTa as `transformers` does: `add_prefix_space` comes from
            a tokenizer_config.json beside them, and is false without one.

    Raises:
        ValueError: it cannot be read, or no token starts or ends a text.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    try:
        if path.name == BPE_FILES[0]:
            return _byte_level_bpe(path)
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{path} cannot be read: {error}") from None


def _byte_level_bpe(path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    merges = path.with_name(BPE_FILES[1])
    config = read_optional(path.with_name(TOKENIZER_CONFIG))
    prefix = bool(config.get("add_prefix_space", False))
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    absent = [token for token in ("<s>", "</s>") if ids[token] is None]
    if absent:
        raise ValueError(f"no token {' or '.join(absent)}")
    # The library would give a token that the vocabulary lacks an id beyond the table.
    tokenizer.add_special_tokens(
        [token for token in SPECIAL_TOKENS if ids[token] is not None]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=prefix
    )
    return tokenizer


def check_text(number, text):
    """Refuse what the tokeniser cannot read; the message says which text it is.

    Raises:
        ValueError: not a str, or with half a surrogate pair.
    """
    if not isinstance(text, str):
        raise ValueError(f"text {number} is of type {type(text).__name__}, not str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text {number} is not valid Unicode: {error}") from None


# Tower outputs -> embeddings


def apply_head(head, x):
    r"""NumPy forward of `ehi.model.tower.Head`.

    .. math:: y = \mathrm{unit}(x P + \mathrm{gelu}(x W_{in} + b_{in}) W_{out})

    >>> apply_head({"projection": np.eye(3, 2)}, np.array([[3, 4, 5]]))
    array([[0.6, 0.8]])

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
    if set(arrays) not in (set(), set(HEAD_ARRAYS[:1]), set(HEAD_ARRAYS)):
        raise ValueError(
            f"the query head of the index has arrays {sorted(arrays)}, not "
            f"{HEAD_ARRAYS[0]!r} alone or {HEAD_ARRAYS}"
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


# All of it, for one index


class TextEncoder:
    """Texts -> unit embeddings of one index; safe to call from several threads.

    Args:
        tokenizer: `TextTokenizer`, whose texts this cuts to `length`.
        tower: a `Tower`.
        head: arrays as in `apply_head`.
        length: number of tokens of a text that are read, special ones included.
    """

    def __init__(self, tokenizer, tower, head, length):
        tokenizer.cut_to(length)
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
        return self.tokenizer(texts)


def load_text_encoder(index, *, tower=None, cache_dir=None):
    """The text encoder that an index names.

    >>> from ehi.index import build_index
    >>> encoder = {"tower": "tests/fixtures/bert_tiny", "query_length": 12}
    >>> index = build_index(np.eye(32), range(32), tree=None, encoder=encoder)
    >>> load_text_encoder(index)(["a b c", "hello"]).shape
    (2, 32)

    Args:
        index: the Index. Its folder may carry the tower, else its `encoder` names it (a
            hub id or a folder, which may be relative to that of the index). `encoder`
            also has the query length and, where they are not '' and those of the
            tower's files, 'query_prefix', 'pooling' and 'normalise'; `query_head` holds
            the head.
        tower: hub id or folder to use instead.
        cache_dir: where hub towers are kept; default `EHI_CACHE`, else ~/.cache/ehi.

    Returns:
        TextEncoder.

    Raises:
        ImportError: tokenizers or safetensors is not installed.
        FileNotFoundError: no such folder, or a file is missing in it; for a hub id
            that is in neither cache, TowerNotFoundError, naming the command.
        ValueError: the index does not name its encoder, the tower found has other
            weights than that of the index, or its files do not fit.
    """
    check_installed("a search by text", "tokenizers", "safetensors")
    folder = find_tower(index, tower, cache_dir)
    identity = index.encoder
    network = read_tower(
        folder, pooling=identity.get("pooling"), normalise=identity.get("normalise")
    )
    prefix = check_prefix("the index's query_prefix", identity.get("query_prefix", ""))
    tokenizer = TextTokenizer(find_tokenizer(folder), prefix)
    length = check_length(identity["query_length"], tokenizer, network)
    head = check_head(index.query_head, network.width, index.width)
    return TextEncoder(tokenizer, network, head, length)


# The folder of the tower


def find_tower(index, tower=None, cache_dir=None):
    """The folder of the tower of an index, checked: see `load_text_encoder`."""
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
    return folder


class TowerNotFoundError(FileNotFoundError):
    """The tower has a hub id and its files are in neither cache.

    Attributes:
        name: the hub id.
    """

    def __init__(self, name, folder):
        super().__init__(
            f"the tower {name} is neither in {folder} nor in the cache of the hub: "
            f"fetch it with `hf download {name} --include '*.json' "
            "--include merges.txt --include 'model*.safetensors'`, or give the folder "
            "it is in"
        )
        self.name = name


def tower_location(index):
    """The folder in that of the index, or relative to it, if it exists, else the name.

    Raises:
        ValueError: the name is no text.
    """
    name = index.encoder["tower"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"the index names its tower {name!r}, which is no name")
    if index.folder is None:
        return name
    beside = index.folder.path / name  # where it was before an index carried it
    return index.folder.tower or (beside if beside.is_dir() else name)


def find_folder(name, cache_dir=None):
    """Folder of a tower: the path itself, else in our cache, else in that of the hub.

    Raises:
        FileNotFoundError: no such folder; of a hub id TowerNotFoundError.
    """
    path = local_folder(name)
    if path is not None:
        return path
    folder = model_folder(str(name), cache_dir)
    if folder.is_dir():
        return folder
    found = hub_cache_folder(str(name))
    if found is None:
        raise TowerNotFoundError(name, folder)
    return found


def local_folder(name):
    """The folder that a name is the path of, or None for a hub id.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    name = str(name)
    if name.count("/") > 1 or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no model folder {name!r}")
    return None


def model_folder(name, cache_dir=None):
    """Folder of our cache for the files of a hub id."""
    return cache_folder(cache_dir) / "models" / name.replace("/", "--")


def hub_cache_folder(name):
    """Complete snapshot of a hub id in the hub's own cache, or None."""
    # Imported here because it takes a while. It is a dependency of tokenizers.
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None
    return None if missing_files(folder) else folder


def check_sha256(name, folder, expected):
    """Refuse other weights than the index states, or else `KNOWN_SHA256`."""
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
    """`length` if it leaves room for a token and does not exceed the positions."""
    special, most = tokenizer.special, len(tower.positions)
    if type(length) is not int or not special < length <= most:
        raise ValueError(
            f"the index gives queries {length!r} tokens, allowed are {special + 1}.."
            f"{most}: {special} are special, the tower has {most} positions"
        )
    return length
