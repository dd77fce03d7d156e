"""Tensors of a checkpoint's safetensors file, read one at a time."""

import re
from contextlib import contextmanager

import numpy as np

# Parts of a checkpoint that an encoder has no use for: buffers, the pooler, MLM heads
# and classifiers.
IGNORED = re.compile(
    r"(.*\.)?position_ids|(pooler|cls|lm_head|classifier|vocab_\w+)\..*"
)
FLOATS = ("F16", "F32", "F64")


@contextmanager
def open_tensors(path, model_type):
    """The tensors of a file, as `Tensors`; safetensors is imported here.

    Raises:
        ValueError: the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            yield Tensors(path, model_type, file)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


class Tensors:
    """Tensors by plain name, each taken once, none left behind.

    Args:
        path: of the file, for messages.
        model_type: 'bert', 'distilbert', 'roberta' or 'xlm-roberta', which may prefix
            the names.
        file: what `safetensors.safe_open` gives.
    """

    def __init__(self, path, model_type, file):
        self.path = path
        self.model_type = model_type
        self.file = file
        names = {plain_name(name, model_type): name for name in file.keys()}  # noqa: SIM118
        self.stored = {
            plain: name for plain, name in names.items() if not IGNORED.fullmatch(plain)
        }

    def take(self, name, *shape, dtype=np.float32):
        """A tensor of the given shape, as `dtype`, or as it is stored if that is None.

        Raises:
            ValueError: it is missing, or of another shape, or not of floats.
        """
        if name not in self.stored:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        stored = self.stored.pop(name)
        header = self.file.get_slice(stored)
        if tuple(header.get_shape()) != shape:
            raise ValueError(
                f"tensor {name!r} of {self.path} has shape "
                f"{tuple(header.get_shape())}, config.json implies {shape}"
            )
        kind = header.get_dtype()
        if kind not in FLOATS:
            raise ValueError(
                f"tensor {name!r} of {self.path} has type {kind}, not one of {FLOATS}"
            )
        value = self.file.get_tensor(stored)
        return value if dtype is None else value.astype(dtype, copy=False)

    def check_empty(self):
        """Refuses a checkpoint with tensors that have no place in a tower."""
        if self.stored:
            raise ValueError(
                f"{self.path} does not fit a {self.model_type}: unknown tensors "
                f"{sorted(self.stored)}"
            )


def plain_name(name, model_type):
    """Name without its model prefix and with today's names of layer-norm parameters."""
    name = name.removeprefix(f"{model_type.removeprefix('xlm-')}.")
    # bert-base-uncased still carries the names of its TensorFlow checkpoint.
    name = re.sub(r"\.LayerNorm\.gamma$", ".LayerNorm.weight", name)
    return re.sub(r"\.LayerNorm\.beta$", ".LayerNorm.bias", name)
