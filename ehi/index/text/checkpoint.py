"""A checkpoint folder of the BERT family: its files, settings and tensors.

`read_checkpoint` returns what the settings say. `open_tensors` reads the weights by the
names of our modules. The NumPy tower and `ehi.model` read folders only through this
file, so both accept the same ones.

MiniLM is a BERT, XLM-R a RoBERTa; ANCE and STAR are a RoBERTa with a projection on top.
"""

import hashlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ehi.files import file_sha256
from ehi.index.text.settings import (
    CONFIG,
    MOVE,
    WEIGHTS,
    checked,
    dense_files,
    open_safetensors,
    read_json,
    read_modules,
)

# Files

TOKENIZER = "tokenizer.json"
REQUIRED_FILES = (CONFIG, WEIGHTS, TOKENIZER)
# The tokeniser of a RoBERTa that has no tokenizer.json: vocabulary, then merges.
BPE_FILES = ("vocab.json", "merges.txt")
# Advice for a required file that is missing while another file is there instead.
CONVERT = (
    "pytorch_model.bin there is a pickle, which can run any code and is not read; "
    "convert it once, in that folder, where torch is installed: "
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('pytorch_model.bin', weights_only=True); "
    "save_file({n: t.clone().contiguous() for n, t in tensors.items()}, "
    "'model.safetensors', {'format': 'pt'})"
)
JOIN = (
    "model.safetensors.index.json there says that several files hold the weights; join "
    "them once, in that folder, where torch is installed: "
    "import glob; from safetensors.torch import load_file, save_file; "
    "tensors = {n: t for f in glob.glob('model-*.safetensors') "
    "for n, t in load_file(f).items()}; "
    "save_file(tensors, 'model.safetensors', {'format': 'pt'})"
)
FAST = (
    "make it once from vocab.txt, in that folder, where transformers is installed: "
    "from transformers import AutoTokenizer; "
    "AutoTokenizer.from_pretrained('.').save_pretrained('.')"
)


def missing_files(folder):
    """Names of the files that a folder lacks; `BPE_FILES` replace tokenizer.json."""
    missing = [file for file in REQUIRED_FILES if not (folder / file).is_file()]
    if all((folder / file).is_file() for file in BPE_FILES):
        missing = [file for file in missing if file != TOKENIZER]
    return missing


def check_files(folder):
    """Refuse a folder that lacks a file we need.

    Raises:
        FileNotFoundError: names the files, and says how to make them from others.
    """
    missing = missing_files(folder)
    if not missing:
        return
    message = f"model folder {folder} lacks {', '.join(missing)}"
    for file, instead, advice in (
        (CONFIG, "0_*/config.json", MOVE),
        (WEIGHTS, f"{WEIGHTS}.index.json", JOIN),
        (WEIGHTS, "pytorch_model.bin", CONVERT),
        (TOKENIZER, "vocab.txt", FAST),
    ):
        if file in missing and any(folder.glob(instead)):
            message += f": {advice}"
            break
    raise FileNotFoundError(message)


def weights_sha256(folder):
    """sha256 of `model.safetensors`; with Dense layers, that of it and of theirs."""
    dense = dense_files(folder)
    if not dense:
        return file_sha256(folder / WEIGHTS)
    parts = [file_sha256(path) for path in (folder / WEIGHTS, *dense)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


# Architectures


@dataclass(frozen=True)
class Architecture:
    """The names that one `model_type` gives to its sizes and tensors.

    Attributes:
        prefix: of tensor names; a checkpoint may have it or not.
        sizes: our name of a size -> its key in config.json.
        modules: our name of a module -> its names in the checkpoint, whose tensors are
            stacked along the outputs.
        layers: start of the names in a layer; the number of the layer follows.
        layer: as `modules`, for each layer.
        eps: key of the number that layer norms add to the variance; None for 1e-12.
        first_position: of a text's first token. Rows before it are cut off the table of
            positions, so that towers need not know.
        projection: modules on top that a checkpoint may have, as in `modules`.
    """

    prefix: str
    sizes: dict
    modules: dict
    layers: str
    layer: dict
    eps: str | None = None
    first_position: int = 0
    projection: dict | None = None


_EMBEDDINGS = {
    "words": ("embeddings.word_embeddings",),
    "positions": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
}
_BERT = Architecture(
    prefix="bert.",
    sizes={
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "type_vocab_size": "type_vocab_size",
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
    },
    modules=_EMBEDDINGS | {"types": ("embeddings.token_type_embeddings",)},
    layers="encoder.layer",
    layer={
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "out": ("attention.output.dense",),
        "attention_norm": ("attention.output.LayerNorm",),
        "mlp_in": ("intermediate.dense",),
        "mlp_out": ("output.dense",),
        "mlp_norm": ("output.LayerNorm",),
    },
    eps="layer_norm_eps",
)
_DISTILBERT = Architecture(
    prefix="distilbert.",
    sizes={
        "width": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "mlp_width": "hidden_dim",
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
    },
    modules=_EMBEDDINGS,
    layers="transformer.layer",
    layer={
        "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "out": ("attention.out_lin",),
        "attention_norm": ("sa_layer_norm",),
        "mlp_in": ("ffn.lin1",),
        "mlp_out": ("ffn.lin2",),
        "mlp_norm": ("output_layer_norm",),
    },
)
_ROBERTA = replace(
    _BERT,
    prefix="roberta.",
    # Padding has position 1, as its token has id 1. No token has position 0.
    first_position=2,
    # Names in the code of ANCE, STAR and JPQ.
    projection={"linear": ("embeddingHead",), "norm": ("norm",)},
)
ARCHITECTURES = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
# The only values we compute; a checkpoint that says nothing has these.
SUPPORTED = {
    "hidden_act": "gelu",
    "activation": "gelu",
    "position_embedding_type": "absolute",
}
# Parts of a checkpoint that an encoder does not use: buffers, the pooler, and heads for
# other tasks.
IGNORED = re.compile(
    r"(.*\.)?(position_ids|token_type_ids)"
    r"|(pooler|cls|lm_head|(pre_)?classifier|qa_outputs|vocab_\w+)\..*"
)


def plain_name(name, model_type):
    """Name without its model prefix and with today's names of layer-norm parameters."""
    name = name.removeprefix(ARCHITECTURES[model_type].prefix)
    # bert-base-uncased still carries the names of its TensorFlow checkpoint.
    name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", name)
    return re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)


def module_names(model_type, num_layers, *, projection=False):
    """Path of a module of ours, like ('layers', 0, 'qkv') -> its plain names."""
    architecture = ARCHITECTURES[model_type]
    modules = {(key,): names for key, names in architecture.modules.items()}
    for number in range(num_layers):
        for key, names in architecture.layer.items():
            start = f"{architecture.layers}.{number}"
            modules["layers", number, key] = tuple(f"{start}.{name}" for name in names)
    if projection:
        for key, names in architecture.projection.items():
            modules["projection", key] = names
    return modules


def module_parts(path):
    """The tensors of a module: 'weight', and 'bias' unless it is a table of vectors."""
    tables = ("words", "positions", "types")
    return ("weight",) if path[-1] in tables else ("weight", "bias")


# Content of the files


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder, all checked.

    Attributes:
        folder: where the files lie.
        model_type: key of `ARCHITECTURES`.
        config: sizes, pooling, Dense layers and normalisation: the arguments of
            `ehi.model.tower.Tower` but for dtype and rngs.
    """

    folder: Path
    model_type: str
    config: dict


def read_checkpoint(folder):
    """The `Checkpoint` of a folder; reads only the names of the weights.

    Raises:
        FileNotFoundError: names the files that the folder lacks.
        ValueError: an architecture, activation or pooling that we do not have, or a
            file that cannot be read.
    """
    check_files(folder)
    model_type, config = _read_config(folder / CONFIG)
    if ARCHITECTURES[model_type].projection:
        config["projection"] = "embeddingHead.weight" in tensor_names(folder / WEIGHTS)
    projected = config.get("projection", False)
    config |= read_modules(folder, config["width"], projected=projected)
    return Checkpoint(folder, model_type, config)


def _read_config(path):
    """Model type, and the sizes in config.json under our names."""
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type {model_type!r} in {path} is not one of {sorted(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[model_type]
    first = architecture.first_position
    padding = {"pad_token_id": first - 1} if first else {}
    for key, value in (SUPPORTED | padding).items():
        if raw.get(key, value) != value:
            stated = f"{key} {raw[key]!r} in {path}"
            raise ValueError(f"{stated} is not supported, only {value!r}")
    config = {"type_vocab_size": 0}
    for ours, theirs in architecture.sizes.items():
        config[ours] = value = raw.get(theirs)
        if type(value) is not int or value < 1:
            raise ValueError(f"{theirs} {value!r} in {path} is not a positive number")
    if config["width"] % config["num_heads"]:
        raise ValueError(
            f"width {config['width']} in {path} is no multiple of "
            f"{config['num_heads']} heads"
        )
    config["max_positions"] -= first
    config["norm_eps"] = eps = raw.get(architecture.eps, 1e-12)
    if type(eps) not in (int, float) or not eps >= 0:
        raise ValueError(f"{architecture.eps} {eps!r} in {path} is not a number >= 0")
    return model_type, config


# Tensors


def tensor_names(path):
    """Names of the tensors of a safetensors file; ValueError if it is damaged."""
    with open_safetensors(path) as file:
        return set(file.keys())


@contextmanager
def open_tensors(checkpoint):
    """The weights of a `Checkpoint`, as `Tensors`; safetensors is imported here.

    Raises:
        ValueError: the file cannot be read, or lacks tensors of the architecture, or
            has others; both are listed.
    """
    with open_safetensors(checkpoint.folder / WEIGHTS) as file:
        yield Tensors(checkpoint, file)


class Tensors:
    """The weights of a checkpoint, read one module at a time by our names.

    Args:
        checkpoint: from `read_checkpoint`.
        file: what `safetensors.safe_open` gives.
    """

    def __init__(self, checkpoint, file):
        self.path = checkpoint.folder / WEIGHTS
        self.file = file
        self.config = checkpoint.config
        self.first_position = ARCHITECTURES[checkpoint.model_type].first_position
        self.modules = module_names(
            checkpoint.model_type,
            checkpoint.config["num_layers"],
            projection=checkpoint.config.get("projection", False),
        )
        self.stored = {}
        for name in file.keys():  # noqa: SIM118
            plain = plain_name(name, checkpoint.model_type)
            if plain in self.stored:
                raise ValueError(
                    f"{self.path} has both {self.stored[plain]!r} and {name!r}"
                )
            if not IGNORED.fullmatch(plain):
                self.stored[plain] = name
        self._check_names(checkpoint.model_type)

    def _check_names(self, model_type):
        """Every module has its tensors, and every tensor its module."""
        expected = {
            f"{name}.{part}"
            for path, names in self.modules.items()
            for name in names
            for part in module_parts(path)
        }
        missing = sorted(expected - set(self.stored))
        unknown = sorted(set(self.stored) - expected)
        if missing or unknown:
            raise ValueError(
                f"{self.path} does not fit a {model_type} of "
                f"{self.config['num_layers']} layers: missing tensors {missing}, "
                f"unknown tensors {unknown}"
            )

    def take(self, path, part, dtype=np.float32):
        """The weight or the bias of a module.

        Args:
            path: key of `module_names`.
            part: one of its `module_parts`.
            dtype: of the result; None for the type in the file, except that bfloat16,
                which NumPy lacks, becomes float32.

        Returns:
            array (outputs, inputs), (rows, T) or (outputs,); several tensors are
            stacked, and the table of positions starts at a text's first token.

        Raises:
            ValueError: a tensor has another shape than config.json says, or no floats.
        """
        shape = self._shape(path)
        shape = shape if part == "weight" else shape[:1]
        arrays = [
            self._read(f"{name}.{part}", shape, dtype) for name in self.modules[path]
        ]
        if path == ("positions",):
            return arrays[0][self.first_position :]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def _shape(self, path):
        """Shape of one weight of a module."""
        config, kind = self.config, path[-1]
        width, hidden = config["width"], config["mlp_width"]
        if kind.endswith("norm"):
            return (width,)
        rows = {
            "words": config["vocab_size"],
            "positions": config["max_positions"] + self.first_position,
            "types": config["type_vocab_size"],
            "mlp_in": hidden,
        }
        return rows.get(kind, width), hidden if kind == "mlp_out" else width

    def _read(self, plain, shape, dtype):
        return checked(self.path, self.file, self.stored[plain], shape, dtype)
