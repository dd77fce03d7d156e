"""Checkpoint formats: configuration files and tensor names of the BERT family.

MiniLM is a BERT; DistilBERT has names of its own and no token types; RoBERTa and XLM-R
have BERT's names and count positions from 2. ANCE and STAR are a RoBERTa with a
projection on top.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from ehi.index.text.checkpoint import FIRST_POSITION, ROBERTAS

# Parts of a checkpoint that an encoder has no use for: buffers, the pooler, MLM heads
# and classifiers.
IGNORED = re.compile(
    r"(.*\.)?position_ids|(pooler|cls|lm_head|classifier|vocab_\w+)\..*"
)

# Tower module -> checkpoint modules; several are concatenated along the outputs.
BERT_EMBEDDINGS = {
    "words": ("embeddings.word_embeddings",),
    "positions": ("embeddings.position_embeddings",),
    "types": ("embeddings.token_type_embeddings",),
    "norm": ("embeddings.LayerNorm",),
}
DISTILBERT_EMBEDDINGS = {
    key: names for key, names in BERT_EMBEDDINGS.items() if key != "types"
}
BERT_LAYER = {
    "qkv": (
        "encoder.layer.{}.attention.self.query",
        "encoder.layer.{}.attention.self.key",
        "encoder.layer.{}.attention.self.value",
    ),
    "out": ("encoder.layer.{}.attention.output.dense",),
    "attention_norm": ("encoder.layer.{}.attention.output.LayerNorm",),
    "mlp_in": ("encoder.layer.{}.intermediate.dense",),
    "mlp_out": ("encoder.layer.{}.output.dense",),
    "mlp_norm": ("encoder.layer.{}.output.LayerNorm",),
}
DISTILBERT_LAYER = {
    "qkv": (
        "transformer.layer.{}.attention.q_lin",
        "transformer.layer.{}.attention.k_lin",
        "transformer.layer.{}.attention.v_lin",
    ),
    "out": ("transformer.layer.{}.attention.out_lin",),
    "attention_norm": ("transformer.layer.{}.sa_layer_norm",),
    "mlp_in": ("transformer.layer.{}.ffn.lin1",),
    "mlp_out": ("transformer.layer.{}.ffn.lin2",),
    "mlp_norm": ("transformer.layer.{}.output_layer_norm",),
}
MODULES = {
    "bert": (BERT_EMBEDDINGS, BERT_LAYER),
    "distilbert": (DISTILBERT_EMBEDDINGS, DISTILBERT_LAYER),
    "roberta": (BERT_EMBEDDINGS, BERT_LAYER),
    "xlm-roberta": (BERT_EMBEDDINGS, BERT_LAYER),
}
# Names that the code of ANCE, STAR and JPQ gives to what is on top of its RoBERTa.
PROJECTION = {"linear": ("embeddingHead",), "norm": ("norm",)}


def tower_parameters(
    tensors: dict[str, np.ndarray],
    model_type: str,
    num_layers: int,
    *,
    projection: bool = False,
) -> dict[tuple, np.ndarray]:
    """Rename and reshape the tensors of a checkpoint into tower parameters.

    Args:
        tensors: name -> array, as read from `model.safetensors`; names may carry the
            prefix `bert.`, `distilbert.` or `roberta.`.
        model_type: 'bert' (also MiniLM), 'distilbert', 'roberta' or 'xlm-roberta'.
        num_layers: layers of the checkpoint.
        projection: it has the projection of ANCE and STAR.

    Returns:
        dict of path -> float32 array, the path as in the nnx state of `Tower`,
        e.g. ('layers', 0, 'qkv', 'kernel').

    Raises:
        ValueError: tensors are missing or unknown; both lists are in the message.
    """
    tensors = {plain_name(name, model_type): value for name, value in tensors.items()}
    tensors = {n: value for n, value in tensors.items() if not IGNORED.fullmatch(n)}
    sources = parameter_sources(model_type, num_layers, projection=projection)
    expected = {name for names in sources.values() for name in names}
    missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unknown:
        raise ValueError(
            f"checkpoint does not fit a {model_type} of {num_layers} layers: "
            f"missing tensors {missing}, unknown tensors {unknown}"
        )
    parameters = {}
    for path, names in sources.items():
        value = np.concatenate([tensors[n].astype(np.float32) for n in names])
        # PyTorch keeps weights as (outputs, inputs).
        parameters[path] = value.T if path[-1] == "kernel" else value
    if model_type in ROBERTAS:
        path = "positions", "embedding"
        parameters[path] = parameters[path][FIRST_POSITION:]
    return parameters


def plain_name(name: str, model_type: str) -> str:
    """Name without its model prefix and with today's names of layer-norm parameters."""
    name = name.removeprefix(f"{model_type.removeprefix('xlm-')}.")
    # bert-base-uncased still carries the names of its TensorFlow checkpoint.
    name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", name)
    return re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)


def parameter_sources(
    model_type: str, num_layers: int, *, projection: bool = False
) -> dict[tuple, tuple[str, ...]]:
    """Map from a tower parameter's path to the checkpoint tensors it is made of."""
    embeddings, layer = MODULES[model_type]
    modules = {(key,): names for key, names in embeddings.items()}
    for i in range(num_layers):
        for key, names in layer.items():
            modules["layers", i, key] = tuple(name.format(i) for name in names)
    if projection:
        modules |= {("projection", key): names for key, names in PROJECTION.items()}
    sources = {}
    for path, names in modules.items():
        kind = path[-1]
        if kind in ("words", "positions", "types"):
            parts = {"embedding": "weight"}
        elif kind.endswith("norm"):
            parts = {"scale": "weight", "bias": "bias"}
        else:
            parts = {"kernel": "weight", "bias": "bias"}
        for ours, theirs in parts.items():
            sources[*path, ours] = tuple(f"{name}.{theirs}" for name in names)
    return sources


def tower_config(folder: Path) -> tuple[str, dict]:
    """Model type and `Tower` arguments of the checkpoint in `folder`.

    Raises:
        ValueError: an architecture, activation or pooling that we do not have.
    """
    raw = read_json(folder / "config.json")
    model_type = raw.get("model_type")
    if model_type in ("bert", *ROBERTAS):
        config = {
            "width": raw["hidden_size"],
            "num_layers": raw["num_hidden_layers"],
            "num_heads": raw["num_attention_heads"],
            "mlp_width": raw["intermediate_size"],
            "type_vocab_size": raw["type_vocab_size"],
            "norm_eps": raw.get("layer_norm_eps", 1e-12),
        }
    elif model_type == "distilbert":
        config = {
            "width": raw["dim"],
            "num_layers": raw["n_layers"],
            "num_heads": raw["n_heads"],
            "mlp_width": raw["hidden_dim"],
            "type_vocab_size": 0,
        }
    else:
        raise ValueError(
            f"model_type {model_type!r} in {folder} is not one of {sorted(MODULES)}"
        )
    expected = {
        "hidden_act": "gelu",
        "activation": "gelu",
        "position_embedding_type": "absolute",
    }
    if model_type in ROBERTAS:
        expected["pad_token_id"] = FIRST_POSITION - 1
    for key, value in expected.items():
        if raw.get(key, value) != value:
            raise ValueError(
                f"{key} {raw[key]!r} in {folder} is not supported, only {value!r}"
            )
    config["vocab_size"] = raw["vocab_size"]
    config["max_positions"] = raw["max_position_embeddings"]
    if model_type in ROBERTAS:
        config["max_positions"] -= FIRST_POSITION
        config["projection"] = "embeddingHead.weight" in tensor_names(
            folder / "model.safetensors"
        )
    projected = config.get("projection", False)
    config["pooling"], config["normalise"] = pooling_config(folder, projected=projected)
    return model_type, config


def pooling_config(folder: Path, *, projected: bool = False) -> tuple[str, bool]:
    """(pooling, normalise) by `modules.json`; without it ('mean', True).

    Without it, and with a projection, they are those of ANCE and STAR: ('cls', False).
    """
    modules = read_json(folder / "modules.json")
    if not modules:
        return ("cls", False) if projected else ("mean", True)
    # Their packages moved between releases, the class names did not.
    classes = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if classes[:2] != ["Transformer", "Pooling"] or classes[2:] not in (
        [],
        ["Normalize"],
    ):
        raise ValueError(
            f"modules {classes} in {folder} are not supported, only Transformer, "
            "Pooling and, optionally, Normalize"
        )
    raw = read_json(folder / modules[1]["path"] / "config.json")
    prefix, suffix = "pooling_mode_", "_tokens"
    modes = [
        key.removeprefix(prefix).removesuffix(suffix).removesuffix("_token")
        for key, value in raw.items()
        if key.startswith(prefix) and value
    ] or [raw.get("pooling_mode", "mean")]
    if modes not in (["mean"], ["cls"]):
        raise ValueError(f"pooling {modes} in {folder} is not one of 'mean', 'cls'")
    return modes[0], "Normalize" in classes


def max_length(folder: Path, max_positions: int) -> int:
    """Longest text in tokens, [CLS] and [SEP] counted."""
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        stated = read_json(folder / file).get(key)
        if stated:
            return int(min(stated, max_positions))
    return max_positions


def read_json(path: Path):
    """Content of a JSON file; an empty dict if there is no such file."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}") from None


def tensor_names(path: Path) -> set[str]:
    """Names of the arrays of a safetensors file; ValueError if it is damaged."""
    try:
        with safe_open(path, "np") as file:
            return set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a safetensors file.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None
