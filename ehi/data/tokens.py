"""Tokenise texts once, and keep their token ids as memory-mapped arrays."""

import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ehi.files import new_folder
from ehi.index.text.encoder import TextTokenizer
from ehi.progress import Progress

CHUNK_TEXTS = 1024
IDS, OFFSETS = "ids.npy", "offsets.npy"


@dataclass(frozen=True)
class TokenArray:
    """Token ids of many texts, one after the other.

    Args:
        ids: (all tokens,) token ids of all texts in turn.
        offsets: (texts + 1,) int64; text i has the tokens offsets[i] to offsets[i + 1].
        key: sha256 of texts, tokeniser, prefix and maximal length, the key of caches.
    """

    ids: np.ndarray
    offsets: np.ndarray
    key: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each text (texts,)."""
        return np.diff(self.offsets)

    def pad(self, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (N, L) int32, padded with 0, and their mask (N, L) bool.

        Only the mask tells what is padding: 0 means [PAD] to BERT, but <s> to RoBERTa.
        A text longer than `length` is cut, but keeps its last token: the encoder was
        trained to see [SEP] or </s>.

        Args:
            rows: (N,) rows of the texts.
            length: L.
        """
        rows = np.asarray(rows)
        starts, ends = self.offsets[rows], self.offsets[rows + 1]  # (N,)
        lengths = np.minimum(ends - starts, length)
        columns = np.arange(length)
        mask = columns < lengths[:, None]  # (N, L)
        places = starts[:, None] + columns
        places = np.where(columns == lengths[:, None] - 1, ends[:, None] - 1, places)
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = self.ids[places[mask]]
        return ids, mask


def tokenise(
    texts: Sequence[str],
    *,
    tokenizer_file: str | os.PathLike,
    max_length: int,
    cache_dir: str | os.PathLike | None,
    name: str,
    prefix: str = "",
) -> TokenArray:
    """Tokenise `texts`, or read their tokens from `cache_dir` if they are there.

    Args:
        texts: read twice, first to compute their key.
        tokenizer_file: tokenizer.json of the encoder, or vocab.json (see
            `TextTokenizer`).
        max_length: most tokens of a text, including [CLS] and [SEP].
        cache_dir: folder of token arrays; None keeps them in memory only.
        name: name of the texts, for the progress bar and the folder.
        prefix: put before every text; its tokens count.

    Raises:
        ValueError: `max_length` leaves no room for text, or the file cannot be read.
    """
    tokenizer = TextTokenizer(tokenizer_file, prefix)
    if max_length <= tokenizer.special:
        raise ValueError(
            f"max_length must be greater than {tokenizer.special}, the number of "
            f"special tokens, got {max_length}"
        )
    tokenizer.cut_to(max_length)
    key = _key(texts, tokenizer.content(), max_length)
    dtype = np.uint16 if tokenizer.library.get_vocab_size() <= 1 << 16 else np.int32
    chunks = _encoded(tokenizer, texts, name, dtype)
    if cache_dir is None:
        ids, lengths = zip(*chunks, strict=True) if len(texts) else ((), ())
        empty = np.zeros(0, dtype)
        return TokenArray(np.concatenate([empty, *ids]), _offsets(lengths), key)
    folder = Path(cache_dir) / f"{name}-{key[:16]}"
    if not folder.exists():
        _write(chunks, dtype, folder)
    ids = np.load(folder / IDS, mmap_mode="r")
    return TokenArray(ids, np.load(folder / OFFSETS), key)


def tokenizer_sha256(file: str | os.PathLike, prefix: str = "") -> str:
    """Hash of tokenizer.json, or of the tokeniser made from others, and of a prefix."""
    return hashlib.sha256(TextTokenizer(file, prefix).content()).hexdigest()


def _key(texts: Iterable[str], tokenizer: bytes, max_length: int) -> str:
    digest = hashlib.sha256(tokenizer + str(max_length).encode())
    for text in texts:
        # A hash of hashes, because ['ab', 'c'] and ['a', 'bc'] are different texts.
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def _encoded(tokenizer: TextTokenizer, texts: Sequence[str], name: str, dtype):
    """Yield token ids and lengths, one chunk of texts at a time."""
    remaining = iter(texts)
    with Progress(f"tokenise {name}", len(texts), "texts") as progress:
        while chunk := list(itertools.islice(remaining, CHUNK_TEXTS)):
            encoded = tokenizer(chunk)
            flat = np.fromiter(itertools.chain.from_iterable(encoded), dtype)
            yield flat, [len(ids) for ids in encoded]
            progress.update(len(chunk))


def _offsets(lengths: Iterable[list[int]]) -> np.ndarray:
    flat = np.fromiter(itertools.chain.from_iterable(lengths), np.int64)
    return np.concatenate([[0], np.cumsum(flat)]).astype(np.int64)


def _write(chunks, dtype, folder: Path) -> None:
    """Write both arrays; stream ids chunk by chunk."""
    lengths, count = [], 0
    with new_folder(folder, exists="keep") as made:
        with (made / IDS).open("wb") as file:
            _write_header(file, dtype, 0)
            for ids, chunk_lengths in chunks:
                file.write(ids.tobytes())
                lengths.append(chunk_lengths)
                count += len(ids)
            file.seek(0)
            _write_header(file, dtype, count)
        np.save(made / OFFSETS, _offsets(lengths))


def _write_header(file, dtype, count: int) -> None:
    # NumPy pads the header, so the final count fits into the same room.
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": (count,),
    }
    np.lib.format.write_array_header_1_0(file, header)
