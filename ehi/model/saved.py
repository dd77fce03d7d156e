"""A trained tower as a checkpoint folder, in the names that it was loaded from.

The folder is read by `resolve`, and by sentence-transformers and transformers too.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ehi.index.text.files import FIRST_POSITION, ROBERTAS
from ehi.model.formats import PROJECTION, parameter_sources, plain_name
from ehi.model.pretrained import NOT_COPIED, Pretrained

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
