"""What sentence-transformers says about a checkpoint, in JSON files beside its weights.

A text gets a prefix, is cut to a length, and goes through the transformer; its token
vectors are pooled, go through Dense layers, and may be scaled to length one. Both
stacks read all of that here; `Dense` is the layer of the NumPy one.
"""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODULES, TOKENIZER_CONFIG = "modules.json", "tokenizer_config.json"
PROMPTS = "config_sentence_transformers.json"
# Files with settings of sentence-transformers; older releases used the later names.
SENTENCE_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in (
        "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet",
    )
)  # fmt: skip
MOVE = "only a Transformer in the model folder itself is read: move its files up there"
PROJECTION_EPS = 1e-5  # PyTorch's default, whatever the tower's layers have
POOLINGS = ("mean", "cls", "last", "max")
_SUBFOLDER = re.compile(r"\w[\w.-]*", re.ASCII)
ACTIVATIONS = ("Identity", "Tanh", "ReLU")  # of a Dense layer, by PyTorch's names
# Side -> names of its prompt, in the order in which sentence-transformers looks.
PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}


def read_json(path, kind=dict):
    """Content of a JSON file.

    Raises:
        ValueError: it is no JSON, or not of this kind.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds no {kind.__name__}")
    return content


def read_optional(path):
    """Content of a JSON file; an empty dict if there is no such file."""
    return read_json(path) if path.is_file() else {}


@contextmanager
def open_safetensors(path):
    """A safetensors file; the package is imported here.

    Raises:
        ValueError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None


# Before the transformer


def read_prefixes(folder):
    """What a checkpoint puts before a query and before a document: two str.

    They are the prompts that `encode_query` and `encode_document` of
    sentence-transformers use. A side without one has the default prompt, if that is of
    no side, else ''. (`encode_document` 6.2 overlooks a prompt 'passage' where there is
    no 'document', and neither falls back on the default one.)

    Raises:
        ValueError: a prompt is no text, or the default one is not among them.
    """
    path = folder / PROMPTS
    raw = read_optional(path)
    prompts, default = raw.get("prompts") or {}, raw.get("default_prompt_name")
    if not isinstance(prompts, dict):
        raise ValueError(f"prompts {prompts!r} in {path} are not names and texts")
    if default is not None and default not in prompts:
        raise ValueError(
            f"default_prompt_name {default!r} in {path} is not one of {list(prompts)}"
        )
    if any(default in names for names in PROMPT_NAMES.values()):
        default = None
    found = []
    for names in PROMPT_NAMES.values():
        name = next((name for name in names if prompts.get(name) is not None), default)
        found.append(check_prefix(f"prompt {name!r} in {path}", prompts.get(name, "")))
    return tuple(found)


def check_prefix(name, prefix):
    """`prefix`, if it is a str of valid Unicode.

    Raises:
        ValueError: it is not; the message starts with `name`.
    """
    if not isinstance(prefix, str):
        raise ValueError(f"{name} is {prefix!r}; it must be a text ('' for none)")
    try:
        prefix.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: {error}") from None
    return prefix


def sentence_config(folder):
    """The settings of sentence-transformers; an empty dict if there are none."""
    for name in SENTENCE_CONFIGS:
        if (folder / name).is_file():
            return read_json(folder / name)
    return {}


def max_length(folder, max_positions):
    """Longest text that a checkpoint is meant for, in tokens, special ones included."""
    settings = sentence_config(folder), read_optional(folder / TOKENIZER_CONFIG)
    for raw, key in zip(settings, ("max_seq_length", "model_max_length"), strict=True):
        stated = raw.get(key)
        if stated:
            if type(stated) not in (int, float) or stated < 1:
                raise ValueError(f"{key} {stated!r} in {folder} is no number of tokens")
            return int(min(stated, max_positions))
    return max_positions


# After the transformer


def read_modules(folder, width, *, projected=False):
    """Pooling, Dense layers and normalisation of a checkpoint, by modules.json.

    Args:
        folder: of the checkpoint.
        width: T, of a token vector.
        projected: whether the weights have the projection of ANCE and STAR.

    Returns:
        dict: 'pooling', 'normalise' and, if there are Dense layers, 'dense': for each
        its 'path', 'width', 'bias' and 'activation'. Without modules.json the pooling
        is the mean and vectors are normalised, but of ANCE and STAR, which take the
        first token as it is.

    Raises:
        FileNotFoundError: a listed file is missing.
        ValueError: modules, pooling or layers that we do not have.
    """
    path = folder / MODULES
    if not path.is_file():
        return {"pooling": "cls" if projected else "mean", "normalise": not projected}
    modules = read_json(path, list)
    if not all(isinstance(module, dict) for module in modules):
        raise ValueError(f"{path} lists other things than modules")
    # Their packages moved between releases, the class names did not.
    classes = [str(module.get("type")).rsplit(".", 1)[-1] for module in modules]
    normalise = classes[-1:] == ["Normalize"]
    dense = classes[2 : len(classes) - normalise]
    if classes[:2] != ["Transformer", "Pooling"] or set(dense) - {"Dense"}:
        raise ValueError(
            f"modules {classes} in {path} are not supported, only Transformer, "
            "Pooling and, optionally, Dense and Normalize, in this order"
        )
    place = modules[0].get("path")
    if place not in (None, "", "."):
        raise ValueError(f"{path} puts the Transformer into {place!r}; {MOVE}")
    found = {
        "pooling": _read_pooling(_listed(folder, modules[1], "Pooling")),
        "normalise": normalise,
    }
    layers = []
    for module in modules[2 : 2 + len(dense)]:
        layer = _read_dense(_listed(folder, module, "Dense"), width)
        layers.append(layer | {"path": module["path"]})
        width = layers[-1]["width"]
    return found | ({"dense": tuple(layers)} if layers else {})


def _listed(folder, module, kind):
    """Path of the config.json of a module."""
    place, listed = module.get("path"), folder / MODULES
    # A saved tower is written to these folders, which must not lead out of its own; an
    # index carries no deeper ones.
    if not isinstance(place, str) or not _SUBFOLDER.fullmatch(place):
        raise ValueError(
            f"{listed} puts the {kind} into {place!r}, not a subfolder with a name of "
            "letters, digits, '_', '-' and '.'"
        )
    path = folder / place / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{listed} lists a {kind}, but {path} is missing")
    return path


def _read_pooling(path):
    raw, prefix = read_json(path), "pooling_mode_"
    modes = [
        key.removeprefix(prefix).removesuffix("_tokens").removesuffix("_token")
        for key, value in raw.items()
        if key.startswith(prefix) and value
    ]
    # The mean is the default of sentence-transformers, where a width is stated.
    if raw and not any(key.startswith(prefix) for key in raw):
        modes = [raw.get("pooling_mode", "mean")]
    modes = ["last" if mode == "lasttoken" else mode for mode in modes]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"pooling {modes} in {path} is not one of {POOLINGS}")
    if raw.get("include_prompt", True) is not True:
        raise ValueError(
            f"{path} leaves the prompt out of the pooling (include_prompt is "
            f"{raw['include_prompt']!r}), which is not supported"
        )
    return modes[0]


def _read_dense(path, width):
    raw = read_json(path)
    for key in ("in_features", "out_features"):
        if type(raw.get(key)) is not int or raw[key] < 1:
            raise ValueError(f"{key} {raw.get(key)!r} in {path} is no positive number")
    if raw["in_features"] != width:
        raise ValueError(
            f"the Dense layer of {path} takes vectors of width {raw['in_features']}, "
            f"but those before it have width {width}"
        )
    # Left out, it is the default of sentence-transformers.
    activation = str(raw.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    activation = activation.removesuffix("()")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation_function {activation!r} in {path} is not one of {ACTIVATIONS}"
        )
    bias = raw.get("bias", True) is not False
    return {"width": raw["out_features"], "bias": bias, "activation": activation}


def overridden(config, pooling=None, normalise=None):
    """The settings of a checkpoint with another pooling or normalisation.

    >>> overridden({"pooling": "mean", "normalise": True}, pooling="cls")
    {'pooling': 'cls', 'normalise': True}

    Args:
        config: with 'pooling' and 'normalise'.
        pooling, normalise: the others; None leaves what is there.

    Raises:
        ValueError: an unknown pooling, or a normalisation that is neither true nor
            false.
    """
    changes = {}
    if pooling is not None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is not one of {POOLINGS}")
        changes["pooling"] = pooling
    if normalise is not None:
        if not isinstance(normalise, bool):
            raise ValueError(f"normalise is {normalise!r}; it must be true or false")
        changes["normalise"] = normalise
    return config | changes


def dense_files(folder):
    """Weights of the Dense layers that modules.json lists, as paths that exist."""
    path = folder / MODULES
    modules = read_json(path, list) if path.is_file() else []
    places = [
        folder / str(module.get("path")) / WEIGHTS
        for module in modules
        if isinstance(module, dict) and str(module.get("type")).endswith(".Dense")
    ]
    return [place for place in places if place.is_file()]


@dataclass(frozen=True, eq=False)
class Projection:
    r"""NumPy forward of `ehi.model.tower.Projection`.

    .. math:: y = \mathrm{norm}(W x + b)

    Attributes:
        weight: (T, T), outputs first.
        bias: (T,).
        norm: scale and bias, (T,) each.
    """

    weight: np.ndarray
    bias: np.ndarray
    norm: tuple[np.ndarray, np.ndarray]

    def __call__(self, x):
        """Map pooled vectors x (N, T) to float32 (N, T)."""
        scale, shift = self.norm
        y = x @ self.weight.T + self.bias
        y -= y.mean(axis=1, keepdims=True)
        variance = np.mean(y * y, axis=1, keepdims=True)
        return y / np.sqrt(variance + np.float32(PROJECTION_EPS)) * scale + shift


@dataclass(frozen=True, eq=False)
class Dense:
    r"""NumPy forward of a Dense layer.

    .. math:: y = f(W x + b)

    >>> layer = Dense(np.float32([[2, 0]]), np.float32([-1]), "ReLU")
    >>> layer(np.float32([[1, 7], [0, 7]]))
    array([[1.],
           [0.]], dtype=float32)

    Attributes:
        weight: (outputs, inputs).
        bias: (outputs,); zero where the layer has none.
        activation: f, of `ACTIVATIONS`.
    """

    weight: np.ndarray
    bias: np.ndarray
    activation: str

    def __call__(self, x):
        """Map vectors x (N, inputs) to float32 (N, outputs)."""
        y = x @ self.weight.T + self.bias
        if self.activation == "Tanh":
            return np.tanh(y)
        return np.maximum(y, 0) if self.activation == "ReLU" else y


def read_dense(folder, config):
    """The Dense layers of a checkpoint, first to last; () if it has none.

    Args:
        folder: of the checkpoint.
        config: with 'width' and, if there are layers, 'dense' of `read_modules`.

    Raises:
        FileNotFoundError: the weights of a layer are missing.
        ValueError: they have other names, shapes or types than its config.json says.
    """
    layers, width = [], config["width"]
    for stated in config.get("dense", ()):
        path = Path(folder) / stated["path"] / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, the weights of the Dense layer (a pickle, "
                "pytorch_model.bin, is not read: save it as safetensors)"
            )
        shapes = {"linear.weight": (stated["width"], width)}
        if stated["bias"]:
            shapes["linear.bias"] = (stated["width"],)
        arrays = _dense_arrays(path, shapes)
        bias = arrays.get("linear.bias", np.zeros(stated["width"], np.float32))
        layers.append(Dense(arrays["linear.weight"], bias, stated["activation"]))
        width = stated["width"]
    return tuple(layers)


def _dense_arrays(path, shapes):
    """float32 tensors of a Dense layer, checked."""
    with open_safetensors(path) as file:
        names = set(file.keys())
        if names != set(shapes):
            raise ValueError(
                f"{path} holds {sorted(names)}, a Dense layer has {sorted(shapes)}"
            )
        return {
            name: checked(path, file, name, shape) for name, shape in shapes.items()
        }


FLOATS = ("F16", "BF16", "F32", "F64")


def checked(path, file, name, shape, dtype=np.float32):
    """A tensor of an open safetensors file.

    Args:
        path: of the file.
        file: what `open_safetensors` gives.
        name: of the tensor in the file.
        shape: that it must have.
        dtype: of the result; None for the type in the file, except that bfloat16,
            which NumPy lacks, becomes float32.

    Raises:
        ValueError: the tensor has another shape, or no floats.
    """
    header = file.get_slice(name)
    if tuple(header.get_shape()) != shape:
        raise ValueError(
            f"tensor {name!r} of {path} has shape {tuple(header.get_shape())}, "
            f"config.json implies {shape}"
        )
    kind = header.get_dtype()
    if kind not in FLOATS:
        raise ValueError(
            f"tensor {name!r} of {path} has type {kind}, not one of {FLOATS}"
        )
    value = _bfloat16(path, name, shape) if kind == "BF16" else file.get_tensor(name)
    return value if dtype is None else value.astype(dtype, copy=False)


def _bfloat16(path, name, shape):
    """As float32: a bfloat16 is the first half of one."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))  # checked by safe_open
        start, end = header[name]["data_offsets"]
        file.seek(8 + size + start)
        halves = np.frombuffer(file.read(end - start), "<u2")
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(shape)
