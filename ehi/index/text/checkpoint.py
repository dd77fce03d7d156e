"""The files of a checkpoint folder, and the tokeniser among them.

`ehi.data` and `ehi.model` read folders through this file too: tokens of a query must
be those that the encoder was trained with.
"""

import hashlib
import json
import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ehi.index.text.tower import POOLINGS, Layer, Projection, Tower

REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# What RoBERTa had before there was a tokenizer.json: vocabulary first.
BPE_FILES = ("vocab.json", "merges.txt")
# The first token of a text has the position after that of padding, which is its id, 1.
# Rows before it are cut off the table of positions, so that towers need not know.
ROBERTAS = ("roberta", "xlm-roberta")
FIRST_POSITION = 2
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CONVERT = (
    "pytorch_model.bin there is a pickle, which can run any code and is not read; "
    "convert it once, in that folder, where torch is installed: "
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('pytorch_model.bin', weights_only=True); "
    "save_file({n: t.clone().contiguous() for n, t in tensors.items()}, "
    "'model.safetensors', {'format': 'pt'})"
)


def missing_files(folder):
    """Names of the files that a folder lacks; `BPE_FILES` stand in for one of them."""
    missing = [file for file in REQUIRED_FILES if not (folder / file).is_file()]
    if all((folder / file).is_file() for file in BPE_FILES):
        missing = [file for file in missing if file != "tokenizer.json"]
    return missing


def check_files(folder):
    """Refuses a folder that lacks a file we need.

    Raises:
        FileNotFoundError: naming the files, and how to convert weights of old.
    """
    missing = missing_files(folder)
    if missing:
        message = f"model folder {folder} lacks {', '.join(missing)}"
        if "model.safetensors" in missing and (folder / "pytorch_model.bin").is_file():
            message += f": {CONVERT}"
        raise FileNotFoundError(message)


def weights_sha256(folder):
    """sha256 of `model.safetensors`."""
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_tokenizer(folder):
    """Path that `open_tokenizer` takes: of tokenizer.json, else of vocab.json."""
    path = folder / "tokenizer.json"
    return path if path.is_file() else folder / BPE_FILES[0]


def open_tokenizer(path):
    """The `tokenizers.Tokenizer` of a file; tokenizers is imported here.

    Args:
        path: tokenizer.json; or vocab.json with merges.txt beside it, which make the
            tokeniser of RoBERTa as `transformers` does: `add_prefix_space` comes from
            a tokenizer_config.json beside them, and is false without one.

    Raises:
        ValueError: it cannot be read, or it has no token that starts or ends a text.
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
    config = path.with_name("tokenizer_config.json")
    raw = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    prefix = bool(raw.get("add_prefix_space", False))
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    absent = [token for token in ("<s>", "</s>") if ids[token] is None]
    if absent:
        raise ValueError(f"no token {' or '.join(absent)}")
    # One that the vocabulary lacks would get an id that the word table has no row for.
    tokenizer.add_special_tokens(
        [token for token in SPECIAL_TOKENS if ids[token] is not None]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=prefix
    )
    return tokenizer


# MERGED ehi_index_text_tensors: Tensors of a checkpoint's safetensors file, read one
# at a time.

# Parts of a checkpoint that an encoder has no use for: buffers, the pooler, MLM heads
# and classifiers.
IGNORED = re.compile(
    r"(.*\.)?position_ids|(pooler|cls|lm_head|classifier|vocab_\w+)\..*"
)
FLOATS = ("F16", "F32", "F64")


@contextmanager
def open_tensors(path, model_type):
    """The tensors of a file, as `Tensors`; safetensors is imported here.

    Raises:
        ValueError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            yield Tensors(path, model_type, file)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


class Tensors:
    """Tensors by plain name, each taken once, none left behind.

    Args:
        path: of the file, for messages.
        model_type: 'bert', 'distilbert', 'roberta' or 'xlm-roberta', which may prefix
            the names.
        file: what `safetensors.safe_open` gives.
    """

    def __init__(self, path, model_type, file):
        self.path = path
        self.model_type = model_type
        self.file = file
        names = {plain_name(name, model_type): name for name in file.keys()}  # noqa: SIM118
        self.stored = {
            plain: name for plain, name in names.items() if not IGNORED.fullmatch(plain)
        }

    def take(self, name, *shape, dtype=np.float32):
        """A tensor of the given shape, as `dtype`, or as it is stored if that is None.

        Raises:
            ValueError: it is missing, or of another shape, or not of floats.
        """
        if name not in self.stored:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        stored = self.stored.pop(name)
        header = self.file.get_slice(stored)
        if tuple(header.get_shape()) != shape:
            raise ValueError(
                f"tensor {name!r} of {self.path} has shape "
                f"{tuple(header.get_shape())}, config.json implies {shape}"
            )
        kind = header.get_dtype()
        if kind not in FLOATS:
            raise ValueError(
                f"tensor {name!r} of {self.path} has type {kind}, not one of {FLOATS}"
            )
        value = self.file.get_tensor(stored)
        return value if dtype is None else value.astype(dtype, copy=False)

    def check_empty(self):
        """Refuses a checkpoint with tensors that have no place in a tower."""
        if self.stored:
            raise ValueError(
                f"{self.path} does not fit a {self.model_type}: unknown tensors "
                f"{sorted(self.stored)}"
            )


def plain_name(name, model_type):
    """Name without its model prefix and with today's names of layer-norm parameters."""
    name = name.removeprefix(f"{model_type.removeprefix('xlm-')}.")
    # bert-base-uncased still carries the names of its TensorFlow checkpoint.
    name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", name)
    return re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)


# MERGED ehi_index_text_pretrained: Checkpoint folder of a BERT-family tower ->
# `ehi.index.text.tower.Tower`.
#
# The same folders, names and refusals as `ehi.model.pretrained` and
# `ehi.model.formats`,
# which this package may not import.
#

# Our names of what config.json says.
CONFIG_KEYS = {
    "bert": {
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "types": "type_vocab_size",
        "vocab": "vocab_size",
        "positions": "max_position_embeddings",
    },
    "distilbert": {
        "width": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "mlp_width": "hidden_dim",
        "vocab": "vocab_size",
        "positions": "max_position_embeddings",
    },
}
# The only values we have; a checkpoint that says nothing has these.
REQUIRED_VALUES = {
    "hidden_act": "gelu",
    "activation": "gelu",
    "position_embedding_type": "absolute",
}
# Names of a layer's modules: queries, keys, values, out, norm, MLP in, out, norm.
LAYER_NAMES = {
    "bert": (
        "encoder.layer.{}.attention.self.query",
        "encoder.layer.{}.attention.self.key",
        "encoder.layer.{}.attention.self.value",
        "encoder.layer.{}.attention.output.dense",
        "encoder.layer.{}.attention.output.LayerNorm",
        "encoder.layer.{}.intermediate.dense",
        "encoder.layer.{}.output.dense",
        "encoder.layer.{}.output.LayerNorm",
    ),
    "distilbert": (
        "transformer.layer.{}.attention.q_lin",
        "transformer.layer.{}.attention.k_lin",
        "transformer.layer.{}.attention.v_lin",
        "transformer.layer.{}.attention.out_lin",
        "transformer.layer.{}.sa_layer_norm",
        "transformer.layer.{}.ffn.lin1",
        "transformer.layer.{}.ffn.lin2",
        "transformer.layer.{}.output_layer_norm",
    ),
}
CONFIG_KEYS |= {name: CONFIG_KEYS["bert"] for name in ROBERTAS}
LAYER_NAMES |= {name: LAYER_NAMES["bert"] for name in ROBERTAS}


def read_tower(folder):
    """The tower of a checkpoint folder, weights as float32.

    Raises:
        FileNotFoundError: naming the files that the folder lacks.
        ValueError: an architecture, activation or pooling that we do not have; a file
            that cannot be read; tensors missing, unknown or of another shape or type.
    """
    check_files(folder)
    model_type, config = read_config(folder)
    with open_tensors(folder / "model.safetensors", model_type) as tensors:
        arrays = _tower_arrays(tensors, model_type, config)
    pooling, normalise = read_pooling(
        folder, projected=arrays["projection"] is not None
    )
    return Tower(
        **arrays,
        num_heads=config["num_heads"],
        norm_eps=config["norm_eps"],
        pooling=pooling,
        normalise=normalise,
    )


def read_config(folder):
    """Model type, and the sizes in config.json under the names of `CONFIG_KEYS`."""
    path = folder / "config.json"
    raw = _read_json(path)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_KEYS:
        raise ValueError(
            f"model_type {model_type!r} in {path} is not one of {sorted(CONFIG_KEYS)}"
        )
    padding = {"pad_token_id": FIRST_POSITION - 1} if model_type in ROBERTAS else {}
    for key, value in (REQUIRED_VALUES | padding).items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"{key} {raw[key]!r} in {path} is not supported, only {value!r}"
            )
    config = {}
    for ours, theirs in CONFIG_KEYS[model_type].items():
        config[ours] = value = raw.get(theirs)
        if type(value) is not int or value < 1:
            raise ValueError(f"{theirs} {value!r} in {path} is not a positive number")
    if config["width"] % config["num_heads"]:
        raise ValueError(
            f"width {config['width']} in {path} is no multiple of "
            f"{config['num_heads']} heads"
        )
    # DistilBERT has no such key.
    config["norm_eps"] = eps = raw.get("layer_norm_eps", 1e-12)
    if type(eps) not in (int, float) or not eps >= 0:
        raise ValueError(f"layer_norm_eps {eps!r} in {path} is not a number >= 0")
    return model_type, config


def read_pooling(folder, *, projected=False):
    """(pooling, normalise) by `modules.json`; without it ('mean', True).

    Without it, and with a projection, they are those of ANCE and STAR: ('cls', False).
    """
    path = folder / "modules.json"
    if not path.is_file():
        return ("cls", False) if projected else ("mean", True)
    modules = _read_json(path, list)
    # Their packages moved between releases, the class names did not.
    classes = [str(module.get("type")).rsplit(".", 1)[-1] for module in modules]
    if classes[:2] != ["Transformer", "Pooling"] or classes[2:] not in (
        [],
        ["Normalize"],
    ):
        raise ValueError(
            f"modules {classes} in {path} are not supported, only Transformer, "
            "Pooling and, optionally, Normalize"
        )
    path = folder / str(modules[1].get("path")) / "config.json"
    raw = _read_json(path) if path.is_file() else {}
    prefix, suffix = "pooling_mode_", "_tokens"
    modes = [
        key.removeprefix(prefix).removesuffix(suffix).removesuffix("_token")
        for key, value in raw.items()
        if key.startswith(prefix) and value
    ] or [raw.get("pooling_mode", "mean")]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        raise ValueError(f"pooling {modes} in {path} is not one of {POOLINGS}")
    return modes[0], "Normalize" in classes


def _tower_arrays(tensors, model_type, config):
    """The arrays of `Tower`; every tensor of the checkpoint must have its place."""
    width, hidden = config["width"], config["mlp_width"]

    def norm(name):
        return tuple(
            tensors.take(f"{name}.{part}", width)[:, None]
            for part in ("weight", "bias")
        )

    def linear(names, outputs, inputs):
        weights = [tensors.take(f"{name}.weight", outputs, inputs) for name in names]
        biases = [tensors.take(f"{name}.bias", outputs) for name in names]
        if len(names) == 3:
            # Queries are divided by the root of the head width once, here.
            root = np.float32((width // config["num_heads"]) ** -0.5)
            weights[0], biases[0] = weights[0] * root, biases[0] * root
        return np.concatenate(weights), np.concatenate(biases)[:, None]

    def layer(number):
        names = [name.format(number) for name in LAYER_NAMES[model_type]]
        qkv, out = linear(names[:3], width, width), linear(names[3:4], width, width)
        mlp_in = linear(names[5:6], hidden, width)
        mlp_out = linear(names[6:7], width, hidden)
        weights = _side_by_side([qkv[0], out[0], mlp_in[0], mlp_out[0]])
        biases = [qkv[1], out[1], mlp_in[1], mlp_out[1]]
        return Layer(*weights, *biases, norm(names[4]), norm(names[7]))

    # The word table keeps its type: only the rows of a query become float32.
    words = tensors.take(
        "embeddings.word_embeddings.weight", config["vocab"], width, dtype=None
    )
    positions = tensors.take(
        "embeddings.position_embeddings.weight", config["positions"], width
    )
    if model_type in ROBERTAS:
        positions = positions[FIRST_POSITION:]
    if "types" in config:
        name = "embeddings.token_type_embeddings.weight"
        # Every token has type 0.
        positions = positions + tensors.take(name, config["types"], width)[0]
    arrays = {
        "words": words,
        "positions": positions,
        "norm": norm("embeddings.LayerNorm"),
        "layers": tuple(layer(number) for number in range(config["num_layers"])),
        "projection": None,
    }
    if model_type in ROBERTAS and "embeddingHead.weight" in tensors.stored:
        weight, bias = linear(["embeddingHead"], width, width)
        top = tuple(part[:, 0] for part in norm("norm"))
        arrays["projection"] = Projection(weight, bias[:, 0], top)
    tensors.check_empty()
    return arrays


def _side_by_side(arrays):
    """Copies of float32 arrays in one block of memory, each from a new cache line on.

    NumPy asks for large pages for blocks above 4 MB. A query reads every weight once,
    and its products are a tenth faster where fewer pages have to be looked up.
    """
    line = 16  # float32 numbers in a cache line
    sizes = [-(-array.size // line) * line for array in arrays]
    block = np.empty(sum(sizes) + line, np.float32)
    start = -block.ctypes.data % (4 * line) // 4
    copies = []
    for array, size in zip(arrays, sizes, strict=True):
        copies.append(block[start : start + array.size].reshape(array.shape))
        copies[-1][...] = array
        start += size
    return copies


def _read_json(path, kind=dict):
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds no {kind.__name__}")
    return content
