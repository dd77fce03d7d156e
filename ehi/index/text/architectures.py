"""The known architectures of text towers: one table that both stacks read.

An `Architecture` says which names a `model_type` gives to sizes and tensors, `Options`
how its layers compute. `ehi.model.tower` and `ehi.index.text.tower` have one forward
pass each, which follows the options.

MiniLM is a BERT, XLM-R a RoBERTa; ANCE and STAR are a RoBERTa with a projection on top.
A = attention heads, K = heads of keys and values, F = width of a head.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

MLPS = ("gelu", "geglu", "swiglu")


@dataclass(frozen=True)
class Options:
    r"""How the layers of a tower compute; by default those of a BERT.

    Attributes:
        pre_norm: norms stand before attention and MLP, and after the last layer; else
            after attention and MLP.
        embedding_norm: whether the vectors of tokens are normed.
        first_norm: whether the first layer of a `pre_norm` tower has a norm before its
            attention.
        rms: norms divide by the root of the mean square and have no bias.
        norm_bias, attention_bias, mlp_bias: whether norms and linear layers have one.
        mlp: 'gelu', or gated: f(x W) (x V) with f = gelu ('geglu') or silu ('swiglu').
        rotary: base of rotary positions; 0 for a table of positions.
        local_rotary: the same in local layers.
        local: numbers of the layers whose tokens see `window` tokens on either side.
        window: see `local`.
        buckets: rows of a table of relative positions, added to all logits; 0 for none.
        causal: tokens see no later ones.
        kv_heads: K; 0 for A. Each serves A / K heads of queries.
        head_width: F; 0 for T / A.
        head_norm: norms of each head's query and key, before they are rotated.

    Source: Vaswani et al. 2017, arXiv:1706.03762; Su et al. 2021, arXiv:2104.09864
    (rotary positions); Shazeer 2020, arXiv:2002.05202 (gated MLPs); Ainslie et al.
    2023, arXiv:2305.13245 (grouped heads).
    """

    pre_norm: bool = False
    embedding_norm: bool = True
    first_norm: bool = True
    rms: bool = False
    norm_bias: bool = True
    attention_bias: bool = True
    mlp_bias: bool = True
    mlp: str = "gelu"
    rotary: float = 0
    local_rotary: float = 0
    local: tuple[int, ...] = ()
    window: int = 0
    buckets: int = 0
    causal: bool = False
    kv_heads: int = 0
    head_width: int = 0
    head_norm: bool = False


@dataclass(frozen=True)
class Architecture:
    """The names that one `model_type` gives to its sizes and tensors.

    Attributes:
        prefix: of tensor names; a checkpoint may have it or not.
        sizes: our name of a size -> its key in config.json, or several for one of them.
        modules: our name of a module -> its names in the checkpoint, whose tensors are
            stacked along the outputs. A gated MLP has the half that f takes first.
        layers: start of the names in a layer; the number of the layer follows.
        layer: as `modules`, for each layer.
        only: key of config.json -> the only value that we compute. A checkpoint that
            says nothing has it.
        eps: key of the number that norms add to the variance; None for 1e-12.
        first_position: of a text's first token. Rows before it are cut off the table of
            positions, so that towers need not know.
        projection: modules on top that a checkpoint may have, as in `modules`.
        options: content of config.json -> fields of `Options`.
    """

    prefix: str
    sizes: dict
    modules: dict
    layers: str
    layer: dict
    only: dict
    eps: str | tuple | None = None
    first_position: int = 0
    projection: dict | None = None
    options: Callable[[dict], dict] = field(default=lambda raw: {})


_SIZES = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_EMBEDDINGS = {
    "words": ("embeddings.word_embeddings",),
    "positions": ("embeddings.position_embeddings",),
    "norm": ("embeddings.LayerNorm",),
}
_TYPES = {"types": ("embeddings.token_type_embeddings",)}
_GELU = {"hidden_act": "gelu", "activation": "gelu"}
_ABSOLUTE = {"position_embedding_type": "absolute"}

_BERT = Architecture(
    prefix="bert.",
    sizes=_SIZES | {"type_vocab_size": "type_vocab_size"},
    modules=_EMBEDDINGS | _TYPES,
    layers="encoder.layer",
    layer={
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "out": ("attention.output.dense",),
        "attention_norm": ("attention.output.LayerNorm",),
        "mlp_in": ("intermediate.dense",),
        "mlp_out": ("output.dense",),
        "mlp_norm": ("output.LayerNorm",),
    },
    only=_GELU | _ABSOLUTE,
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
    only=_GELU | _ABSOLUTE,
)
_ROBERTA = replace(
    _BERT,
    prefix="roberta.",
    # Padding has position 1, as its token has id 1. No token has position 0.
    first_position=2,
    # Names in the code of ANCE, STAR and JPQ.
    projection={"linear": ("embeddingHead",), "norm": ("norm",)},
)
_MPNET = replace(
    _BERT,
    prefix="mpnet.",
    sizes=_SIZES,
    modules=_EMBEDDINGS | {"relative": ("encoder.relative_attention_bias",)},
    layer=_BERT.layer
    | {
        "qkv": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "out": ("attention.attn.o",),
        "attention_norm": ("attention.LayerNorm",),
    },
    first_position=2,
    options=lambda raw: {"buckets": raw.get("relative_attention_num_buckets", 32)},
)


def _modernbert_options(raw):
    kinds = raw.get("layer_types")
    if kinds is None:
        every = raw.get("global_attn_every_n_layers", 3)
        kinds = [i % every for i in range(raw["num_hidden_layers"])]
        local = tuple(i for i, kind in enumerate(kinds) if kind)
    else:
        local = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    rotary = _rotary_base(raw, "global_rope_theta", 160_000, "full_attention")
    return {
        "pre_norm": True,
        "first_norm": False,
        "norm_bias": bool(raw.get("norm_bias", False)),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "mlp": "geglu",
        "rotary": rotary,
        "local_rotary": _rotary_base(
            raw, "local_rope_theta", 10_000, "sliding_attention"
        ),
        "local": local,
        "window": raw.get("local_attention", 128) // 2,
    }


def _rotary_base(raw, key, default, kind=None):
    """Base of rotary positions, in the places where releases of transformers put it."""
    stated = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    stated = stated.get(kind, stated)
    if stated.get("rope_type", stated.get("type", "default")) != "default":
        raise ValueError(f"scaled rotary positions {stated} are not supported")
    base = stated.get("rope_theta", raw.get(key))
    return float(default if base is None else base)


_MODERNBERT = Architecture(
    prefix="model.",
    sizes=_SIZES,
    modules={
        "words": ("embeddings.tok_embeddings",),
        "norm": ("embeddings.norm",),
        "final_norm": ("final_norm",),
    },
    layers="layers",
    layer={
        "qkv": ("attn.Wqkv",),
        "out": ("attn.Wo",),
        "attention_norm": ("attn_norm",),
        "mlp_in": ("mlp.Wi",),
        "mlp_out": ("mlp.Wo",),
        "mlp_norm": ("mlp_norm",),
    },
    only={"hidden_activation": "gelu"},
    eps="norm_eps",
    options=_modernbert_options,
)
_NOMIC = Architecture(
    prefix="bert.",
    # As on the hub, and as transformers writes them.
    sizes={
        "width": ("n_embd", "hidden_size"),
        "num_layers": ("n_layer", "num_hidden_layers"),
        "num_heads": ("n_head", "num_attention_heads"),
        "mlp_width": ("n_inner", "intermediate_size"),
        "type_vocab_size": "type_vocab_size",
        "vocab_size": "vocab_size",
        "max_positions": ("n_positions", "max_position_embeddings"),
    },
    modules={"words": _EMBEDDINGS["words"], "norm": ("emb_ln",)} | _TYPES,
    layers="encoder.layers",
    layer={
        "qkv": ("attn.Wqkv",),
        "out": ("attn.out_proj",),
        "attention_norm": ("norm1",),
        # fc2(fc11(x) silu(fc12(x)))
        "mlp_in": ("mlp.fc12", "mlp.fc11"),
        "mlp_out": ("mlp.fc2",),
        "mlp_norm": ("norm2",),
    },
    only={
        "activation_function": "swiglu",
        "hidden_act": "silu",
        "prenorm": False,
        "parallel_block": False,
        "use_rms_norm": False,
        "causal": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    },
    eps=("layer_norm_epsilon", "layer_norm_eps"),
    options=lambda raw: {
        "mlp": "swiglu",
        "mlp_bias": False,
        "attention_bias": bool(raw.get("qkv_proj_bias", False)),
        "rotary": _rotary_base(raw, "rotary_emb_base", 10_000),
    },
)
_QWEN3 = Architecture(
    prefix="model.",
    sizes=_SIZES,
    modules={"words": ("embed_tokens",), "final_norm": ("norm",)},
    layers="layers",
    layer={
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "query_norm": ("self_attn.q_norm",),
        "key_norm": ("self_attn.k_norm",),
        "out": ("self_attn.o_proj",),
        "attention_norm": ("input_layernorm",),
        "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp_out": ("mlp.down_proj",),
        "mlp_norm": ("post_attention_layernorm",),
    },
    only={"hidden_act": "silu", "use_sliding_window": False},
    eps="rms_norm_eps",
    options=lambda raw: {
        "pre_norm": True,
        "embedding_norm": False,
        "rms": True,
        "norm_bias": False,
        "attention_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": False,
        "mlp": "swiglu",
        "rotary": _rotary_base(raw, "rope_theta", 10_000),
        "causal": True,
        "kv_heads": raw.get("num_key_value_heads", 0),
        "head_width": raw.get("head_dim", 128),
        "head_norm": True,
    },
)
ARCHITECTURES = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
    "mpnet": _MPNET,
    "nomic_bert": _NOMIC,
    "qwen3": _QWEN3,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
}
# Parts of a checkpoint that an encoder does not use: buffers, the pooler, and heads for
# other tasks.
IGNORED = re.compile(
    r"(.*\.)?(position_ids|token_type_ids|inv_freq)"
    r"|(pooler|cls|lm_head|head|decoder|(pre_)?classifier|qa_outputs|vocab_\w+)\..*"
)


def plain_name(name, model_type):
    """Name without its model prefix and with today's names of layer-norm parameters."""
    name = name.removeprefix(ARCHITECTURES[model_type].prefix)
    # bert-base-uncased still carries the names of its TensorFlow checkpoint.
    name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", name)
    return re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)


def stated(raw, keys):
    """The first of the keys that config.json has, and its value; or the last, None."""
    keys = (keys,) if isinstance(keys, str) or keys is None else keys
    found = next((key for key in keys if raw.get(key) is not None), keys[-1])
    return found, raw.get(found)


def options_of(config):
    """The `Options` of the arguments of a `Tower`."""
    return config.get("options", Options())


def module_names(model_type, config):
    """Path of a module of ours, like ('layers', 0, 'qkv') -> its plain names."""
    architecture, options = ARCHITECTURES[model_type], options_of(config)
    modules = {(key,): names for key, names in architecture.modules.items()}
    for number in range(config["num_layers"]):
        for key, names in architecture.layer.items():
            start = f"{architecture.layers}.{number}"
            modules["layers", number, key] = tuple(f"{start}.{name}" for name in names)
    if not options.first_norm:
        del modules["layers", 0, "attention_norm"]
    if config.get("projection"):
        for key, names in architecture.projection.items():
            modules["projection", key] = names
    return modules


def module_parts(path, config):
    """The tensors of a module: 'weight', and 'bias' unless it has none."""
    options, kind = options_of(config), path[-1]
    if path[0] == "projection":
        has_bias = True
    elif kind in ("words", "positions", "types", "relative"):
        has_bias = False
    elif kind.endswith("norm"):
        has_bias = options.norm_bias
    else:
        mlp = kind.startswith("mlp")
        has_bias = options.mlp_bias if mlp else options.attention_bias
    return ("weight", "bias") if has_bias else ("weight",)


def tensor_shapes(path, config, count, first_position=0):
    """Shapes of the weights that make a module.

    Args:
        path: of the module.
        config: arguments of a `Tower`.
        count: number of tensors that are stacked along the outputs.
        first_position: of the architecture.
    """
    options, kind = options_of(config), path[-1]
    width, hidden = config["width"], config["mlp_width"]
    heads, kv_heads, head = head_sizes(config)
    if kind in ("query_norm", "key_norm"):
        return [(head,)]
    if kind.endswith("norm"):
        return [(width,)]
    if kind == "relative":
        return [(options.buckets, heads)]
    outputs = {
        "words": (config["vocab_size"],),
        "positions": (config["max_positions"] + first_position,),
        "types": (config.get("type_vocab_size", 0),),
        "qkv": (heads * head, kv_heads * head, kv_heads * head),
        "mlp_in": (hidden,) if options.mlp == "gelu" else (hidden, hidden),
    }.get(kind, (width,))
    inputs = {"out": heads * head, "mlp_out": hidden}.get(kind, width)
    if count == 1:
        outputs = (sum(outputs),)
    return [(rows, inputs) for rows in outputs]


def head_sizes(config):
    """(A, K, F) of the arguments of a `Tower`."""
    options, heads = options_of(config), config["num_heads"]
    head = options.head_width or config["width"] // heads
    return heads, options.kv_heads or heads, head


def hidden_keys(ahead, options, local):
    """Which keys a query does not see, by how many tokens they are ahead of it.

    Args:
        ahead: array of ints, of either stack.
        options: of the tower.
        local: whether it is for a local layer.
    """
    later = (ahead > 0) & options.causal
    return later | (abs(ahead) > options.window) if local else later


def rotary_frequencies(base, head_width):
    r"""Angles of rotary positions for each token, (F / 2,) float32.

    .. math:: \theta_i = base^{-2 i / F}
    """
    powers = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return np.float32(1) / np.float32(base) ** powers


def relative_buckets(length, buckets):
    """Rows of MPNet's table of relative positions: [query, key] -> row, (L, L) int32.

    Half of the rows are for later keys. Half of each half are for one distance, the
    others for distances that grow by a factor, up to 128 tokens.

    Source: Raffel et al. 2020, arXiv:1910.10683; Song et al. 2020, arXiv:2004.09297.
    """
    columns, half = np.arange(length, dtype=np.int32), buckets // 2
    ahead = columns[None, :] - columns[:, None]
    distance, exact = np.abs(ahead), half // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    growth = ratio / np.float32(math.log(128 / exact)) * np.float32(half - exact)
    far = np.minimum(exact + growth.astype(np.int32), half - 1)
    row = np.where(distance < exact, distance, far)
    return (row + np.where(ahead > 0, half, 0)).astype(np.int32)
