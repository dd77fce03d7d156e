"""The head that queries pass after the tower, from the arrays an index keeps of it."""

import numpy as np

from ehi.index.text.gelu import gelu
from ehi.index.text.transformer import unit_rows

NAMES = ("projection", "w_in", "b_in", "w_out")  # the first alone, or all


def apply_head(head, x):
    r"""NumPy forward of `ehi.model.encoder.Head`.

    .. math:: y = \mathrm{unit}(x P + \mathrm{gelu}(x W_{in} + b_{in}) W_{out})

    Args:
        head: 'projection' (T, D) and, where there is a residual part, 'w_in' (T, F),
            'b_in' (F,), 'w_out' (F, D); empty for no head.
        x: (N, T) tower outputs.

    Returns:
        (N, D) float32 unit rows.
    """
    y = x @ head["projection"] if "projection" in head else x
    if "w_in" in head:
        y = y + gelu(x @ head["w_in"] + head["b_in"]) @ head["w_out"]
    return unit_rows(y)


def check_head(head, tower_width, width):
    """Head arrays as float32 in memory, if they lead from T to the index's D.

    Raises:
        ValueError: an unknown or missing array, or one of another shape.
    """
    arrays = {
        name: np.array(array, np.float32, order="C")
        for name, array in (head or {}).items()
    }
    if set(arrays) not in (set(), set(NAMES[:1]), set(NAMES)):
        raise ValueError(
            f"the query head of the index has arrays {sorted(arrays)}, not "
            f"{NAMES[0]!r} alone or {NAMES}"
        )
    hidden = arrays["b_in"].size if "b_in" in arrays else 0
    expected = {
        "projection": (tower_width, width),
        "w_in": (tower_width, hidden),
        "b_in": (hidden,),
        "w_out": (hidden, width),
    }
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise ValueError(
                f"{name} of the query head has shape {array.shape}, a tower of width "
                f"{tower_width} and an index of width {width} need {expected[name]}"
            )
    if not arrays and tower_width != width:
        raise ValueError(
            f"the tower has width {tower_width}, the index {width}, and no query head "
            "lies between"
        )
    return arrays
