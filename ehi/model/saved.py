"""A trained tower as a checkpoint folder, in the names that it was loaded from.

The folder is read by `resolve`, and by sentence-transformers and transformers too.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ehi.model.formats import parameter_sources
from ehi.model.pretrained import FLOAT16_RECORD, Pretrained


def checkpoint_tensors(
    params: Mapping[str, np.ndarray], model_type: str, num_layers: int
) -> dict[str, np.ndarray]:
    """The inverse of `tower_parameters`.

    Args:
        params: 'layers/0/qkv/kernel' -> array.
        model_type: 'bert' or 'distilbert'.
        num_layers: of the tower.

    Returns:
        checkpoint name -> float32 array.
    """
    tensors = {}
    for path, names in parameter_sources(model_type, num_layers).items():
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

    The folder appears whole or not at all; one that is there is replaced.

    Args:
        pretrained: what the tower was loaded from.
        params: of the tower, 'layers/0/qkv/kernel' -> array.
        folder: where to write.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        fresh = Path(scratch) / "model"
        skip = shutil.ignore_patterns("*.safetensors", FLOAT16_RECORD, ".*")
        shutil.copytree(pretrained.folder, fresh, ignore=skip)
        tensors = checkpoint_tensors(
            params, pretrained.model_type, pretrained.config["num_layers"]
        )
        save_file(tensors, fresh / "model.safetensors")
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(fresh, folder)
