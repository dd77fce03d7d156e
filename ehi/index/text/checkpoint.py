"""A checkpoint folder of a text tower: its files, settings and tensors.

`read_checkpoint` returns what the settings say. `open_tensors` reads the weights by the
names of our modules. The NumPy tower and `ehi.model` read folders only through this
file, so both accept the same ones.
"""

import hashlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.files import file_sha256
from ehi.index.text.architectures import (
    ARCHITECTURES,
    IGNORED,
    Options,
    head_sizes,
    module_names,
    module_parts,
    options_of,
    plain_name,
    stated,
    tensor_shapes,
)
from ehi.index.text.settings import (
    CONFIG,
    MODULES,
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
SHARDS = f"{WEIGHTS}.index.json"  # names several files of weights, of large models
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
FAST = (
    "make it once from vocab.txt, in that folder, where transformers is installed: "
    "from transformers import AutoTokenizer; "
    "AutoTokenizer.from_pretrained('.').save_pretrained('.')"
)


def missing_files(folder):
    """Names of the files that a folder lacks; `BPE_FILES` replace tokenizer.json."""
    missing = [file for file in REQUIRED_FILES if not (folder / file).is_file()]
    if WEIGHTS in missing and (folder / SHARDS).is_file():
        missing.remove(WEIGHTS)
        missing += [path.name for path in weight_files(folder) if not path.is_file()]
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
        (WEIGHTS, "pytorch_model.bin", CONVERT),
        (TOKENIZER, "vocab.txt", FAST),
    ):
        if file in missing and any(folder.glob(instead)):
            message += f": {advice}"
            break
    raise FileNotFoundError(message)


def weight_files(folder):
    """Paths of `model.safetensors`, or else of the shards that `SHARDS` lists.

    Raises:
        ValueError: the list is damaged, or names files elsewhere.
    """
    index = folder / SHARDS
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    listed = read_json(index).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) else set()
    plain = [n for n in names if isinstance(n, str) and n == Path(n).name]
    if not names or len(plain) != len(names):
        raise ValueError(f"weight_map in {index} does not name files of the folder")
    return [folder / name for name in sorted(plain)]


def weights_sha256(folder):
    """sha256 of `model.safetensors`; of several files, that of their sha256 sums.

    These are shards and the weights of Dense layers.
    """
    parts = [file_sha256(path) for path in weight_files(folder) + dense_files(folder)]
    if len(parts) == 1:
        return parts[0]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


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
        files = weight_files(folder)
        config["projection"] = any(
            "embeddingHead.weight" in tensor_names(f) for f in files
        )
    projected = config.get("projection", False)
    config |= read_modules(folder, config["width"], projected=projected)
    if options_of(config).causal and not (folder / MODULES).is_file():
        config["pooling"] = "last"  # the only token that sees all others
    return Checkpoint(folder, model_type, config)


def _read_config(path):
    """Model type, and the sizes in config.json under our names."""
    raw = read_json(path)
    model_type = raw.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type {model_type!r} in {path} is not one of "
            f"{sorted(ARCHITECTURES)}; embed texts with it elsewhere, and train on the "
            "vectors: experiments/configs/vectors.py"
        )
    architecture = ARCHITECTURES[model_type]
    first = architecture.first_position
    padding = {"pad_token_id": first - 1} if first else {}
    for key, value in (architecture.only | padding).items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"{key} {raw[key]!r} in {path} is not supported, only {value!r}"
            )
    config = {"type_vocab_size": 0}
    for ours, keys in architecture.sizes.items():
        theirs, value = stated(raw, keys)
        config[ours] = value
        if type(value) is not int or value < 1:
            raise ValueError(f"{theirs} {value!r} in {path} is not a positive number")
    config["max_positions"] -= first
    key, eps = stated(raw, architecture.eps)
    config["norm_eps"] = eps = 1e-12 if eps is None else eps
    if type(eps) not in (int, float) or not eps >= 0:
        raise ValueError(f"{key} {eps!r} in {path} is not a number >= 0")
    try:
        options = Options(**architecture.options(raw))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    if options != Options():
        config["options"] = options
    _check_heads(path, config)
    return model_type, config


def _check_heads(path, config):
    options, heads = options_of(config), config["num_heads"]
    numbers = ("kv_heads", "head_width", "window", "buckets")
    for name in numbers:
        value = getattr(options, name)
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} {value!r} in {path} is not a number >= 0")
    if not options.head_width and config["width"] % heads:
        raise ValueError(
            f"width {config['width']} in {path} is no multiple of {heads} heads"
        )
    _, kv_heads, width = head_sizes(config)
    if heads % kv_heads:
        raise ValueError(f"{heads} heads in {path} are no multiple of {kv_heads}")
    if options.rotary and width % 2:
        raise ValueError(f"rotary heads in {path} have the odd width {width}")


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
    with ExitStack() as stack:
        paths = weight_files(checkpoint.folder)
        yield Tensors(
            checkpoint,
            {path: stack.enter_context(open_safetensors(path)) for path in paths},
        )


class Tensors:
    """The weights of a checkpoint, read one module at a time by our names.

    Args:
        checkpoint: from `read_checkpoint`.
        files: path -> what `safetensors.safe_open` gives.
    """

    def __init__(self, checkpoint, files):
        self.path = checkpoint.folder / WEIGHTS
        self.files = files
        self.config = checkpoint.config
        self.first_position = ARCHITECTURES[checkpoint.model_type].first_position
        self.modules = module_names(checkpoint.model_type, checkpoint.config)
        self.stored = {}  # plain name -> (path, name)
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118
                plain = plain_name(name, checkpoint.model_type)
                if plain in self.stored:
                    raise ValueError(
                        f"{path} has both {self.stored[plain][1]!r} and {name!r}"
                    )
                if not IGNORED.fullmatch(plain):
                    self.stored[plain] = path, name
        self._check_names(checkpoint.model_type)

    def _check_names(self, model_type):
        """Every module has its tensors, and every tensor its module."""
        expected = {
            f"{name}.{part}"
            for path, names in self.modules.items()
            for name in names
            for part in module_parts(path, self.config)
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
        names = self.modules[path]
        shapes = tensor_shapes(path, self.config, len(names), self.first_position)
        arrays = [
            self.read(f"{name}.{part}", shape if part == "weight" else shape[:1], dtype)
            for name, shape in zip(names, shapes, strict=True)
        ]
        if path == ("positions",):
            return arrays[0][self.first_position :]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def read(self, plain, shape, dtype=np.float32):
        """A tensor by its plain name, as `checked` reads it."""
        path, name = self.stored[plain]
        return checked(path, self.files[path], name, shape, dtype)


def side_by_side(arrays):
    """Copy float32 arrays into one block of memory, each at the start of a cache line.

    NumPy requests large pages for blocks above 4 MB. A query reads every weight once,
    and fewer pages to look up make its products a tenth faster.
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
