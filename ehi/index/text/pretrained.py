"""Checkpoint folder of a BERT-family tower -> `ehi.index.text.transformer.Tower`.

The same folders, names and refusals as `ehi.model.pretrained` and `ehi.model.formats`,
which this package may not import.
"""

import json

import numpy as np

from ehi.index.text.files import FIRST_POSITION, ROBERTAS, check_files
from ehi.index.text.projection import Projection
from ehi.index.text.tensors import open_tensors
from ehi.index.text.transformer import POOLINGS, Layer, Tower

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


def load_tower(folder):
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
