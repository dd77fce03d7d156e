"""The files of a checkpoint folder, and the tokeniser among them.

`ehi.data` and `ehi.model` read folders through this file too: tokens of a query must
be those that the encoder was trained with.
"""

import hashlib
import json
from pathlib import Path

REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")
# What RoBERTa had before there was a tokenizer.json: vocabulary first.
BPE_FILES = ("vocab.json", "merges.txt")
# The first token of a text has the position after that of padding, which is its id, 1.
# Rows before it are cut off the table of positions, so that towers need not know.
ROBERTAS = ("roberta", "xlm-roberta")
FIRST_POSITION = 2
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
CONVERT = (
    "pytorch_model.bin there is a pickle, which can run any code and is not read; "
    "convert it once, in that folder, where torch is installed: "
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('pytorch_model.bin', weights_only=True); "
    "save_file({n: t.clone().contiguous() for n, t in tensors.items()}, "
    "'model.safetensors', {'format': 'pt'})"
)


def missing_files(folder):
    """Names of the files that a folder lacks; `BPE_FILES` stand in for one of them."""
    missing = [file for file in REQUIRED_FILES if not (folder / file).is_file()]
    if all((folder / file).is_file() for file in BPE_FILES):
        missing = [file for file in missing if file != "tokenizer.json"]
    return missing


def check_files(folder):
    """Refuses a folder that lacks a file we need.

    Raises:
        FileNotFoundError: naming the files, and how to convert weights of old.
    """
    missing = missing_files(folder)
    if missing:
        message = f"model folder {folder} lacks {', '.join(missing)}"
        if "model.safetensors" in missing and (folder / "pytorch_model.bin").is_file():
            message += f": {CONVERT}"
        raise FileNotFoundError(message)


def weights_sha256(folder):
    """sha256 of `model.safetensors`."""
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_tokenizer(folder):
    """Path that `open_tokenizer` takes: of tokenizer.json, else of vocab.json."""
    path = folder / "tokenizer.json"
    return path if path.is_file() else folder / BPE_FILES[0]


def open_tokenizer(path):
    """The `tokenizers.Tokenizer` of a file; tokenizers is imported here.

    Args:
        path: tokenizer.json; or vocab.json with merges.txt beside it, which make the
            tokeniser of RoBERTa as `transformers` does: `add_prefix_space` comes from
            a tokenizer_config.json beside them, and is false without one.

    Raises:
        ValueError: it cannot be read, or it has no token that starts or ends a text.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    try:
        if path.name == BPE_FILES[0]:
            return _byte_level_bpe(path)
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"{path} cannot be read: {error}") from None


def _byte_level_bpe(path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    merges = path.with_name(BPE_FILES[1])
    config = path.with_name("tokenizer_config.json")
    raw = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    prefix = bool(raw.get("add_prefix_space", False))
    tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    absent = [token for token in ("<s>", "</s>") if ids[token] is None]
    if absent:
        raise ValueError(f"no token {' or '.join(absent)}")
    # One that the vocabulary lacks would get an id that the word table has no row for.
    tokenizer.add_special_tokens(
        [token for token in SPECIAL_TOKENS if ids[token] is not None]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=prefix
    )
    return tokenizer
