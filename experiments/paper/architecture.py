"""The figure of the README: how text becomes codes in leaves, and a query's path.

The picture is an SVG file without any library. It brings its own white card, so that it
reads the same on a light and on a dark page.
"""

from pathlib import Path
from xml.sax.saxutils import escape

from ehi.files import atomic_write

WIDTH, HEIGHT = 1240, 500
INK, GREY, PALE, BLUE, ORANGE = "#1f2933", "#616e7c", "#cbd2d9", "#0072b2", "#d55e00"
# Colours of codewords: Okabe and Ito's palette, lightened.
CODEWORDS = ("#7fb8d8", "#e9ae7f", "#7fceb9", "#e5bbd3", "#f2cf7f", "#a3acb5")

DOCUMENT_Y, QUERY_Y = 175, 335  # the two lanes
NODES = (145, 255, 365)  # y of the nodes below the root
LEAVES = tuple(y + shift for y in NODES for shift in (-27, 27))
OWN_LEAF, VISITED = 1, (1, 2)  # leaf of the document; leaves of the query
CODES, SUBSPACES = 5, 4  # drawn in each leaf


def draw(path: Path) -> None:
    """Write the figure as an SVG file."""
    atomic_write(path, svg().encode())


def svg() -> str:
    """The figure as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        "font-family=\"Inter, Helvetica, Arial, 'DejaVu Sans', sans-serif\">",
        "<title>Text, tower, head, tree and PQ leaves, and the path of a query</title>",
        _box(1, 1, WIDTH - 2, HEIGHT - 2, "#ffffff", PALE, radius=16),
        *_headers(),
        *_texts(),
        *_encoder(),
        *_tree(),
        *_leaves(),
        *_answers(),
        *_footer(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _headers() -> list[str]:
    """Name and one line on each stage, above it."""
    stages = (
        (112, "text", "documents and queries"),
        (320, "tower", "transformer"),
        (466, "head", "projection"),
        (712, "tree", "soft routing"),
        (938, "PQ leaves", "32 to 128 times smaller"),
        (1148, "answers", "top k"),
    )
    parts = []
    for x, name, words in stages:
        parts += [
            _text(x, 46, name, size=20, colour=INK, weight=600),
            _text(x, 68, words),
        ]
    return parts


def _texts() -> list[str]:
    parts = []
    for shift in (16, 8, 0):
        x, y = 30 + shift, DOCUMENT_Y - 48 - shift
        parts.append(_box(x, y, 150, 84, "#f2f8fc", BLUE, radius=7))
    for i, width in enumerate((118, 96, 110)):
        y = DOCUMENT_Y - 28 + 18 * i
        parts.append(_box(46, y, width, 7, "#a9cbe2", radius=3.5))
    parts += [
        _box(30, QUERY_Y - 30, 166, 60, "#fdf3ec", ORANGE, radius=7),
        _text(113, QUERY_Y - 5, "“how do I parse", size=15, colour=INK),
        _text(113, QUERY_Y + 16, "an ISO date”", size=15, colour=INK),
    ]
    return parts


def _encoder() -> list[str]:
    """Tower and head, which documents and queries share, and their embeddings."""
    parts = [
        _arrow(206, DOCUMENT_Y, 254, DOCUMENT_Y, BLUE),
        _arrow(206, QUERY_Y, 254, QUERY_Y, ORANGE, dashed=True),
        _box(262, 105, 116, 300, "#f5f7fa", "#9aa5b1", radius=10),
    ]
    for i in range(5):
        parts.append(_box(277 + 18.5 * i, 122, 12, 266, "#c3ccd6", radius=4))
    corners = "430,112 502,150 502,360 430,398"
    parts += [
        _arrow(382, DOCUMENT_Y, 424, DOCUMENT_Y, BLUE),
        _arrow(382, QUERY_Y, 424, QUERY_Y, ORANGE, dashed=True),
        f'<polygon points="{corners}" fill="#f5f7fa" stroke="#9aa5b1" '
        'stroke-width="1.5" stroke-linejoin="round"/>',
    ]
    for y, colour, dashed in ((DOCUMENT_Y, BLUE, False), (QUERY_Y, ORANGE, True)):
        parts.append(_arrow(507, y, 541, y, colour, dashed=dashed))
        for i, strength in enumerate((0.9, 0.35, 0.6, 0.2, 0.75, 0.45)):
            top = y - 36 + 12 * i
            parts.append(_box(549, top, 13, 11, colour, opacity=strength, radius=2))
    return parts


def _tree() -> list[str]:
    """Root, nodes and the edges to the leaves; probable edges are thick."""
    root = (640, 255)
    parts = []
    for i, y in enumerate(NODES):
        parts.append(_edge(*root, 722, y))
        parts += [_edge(722, y, 806, LEAVES[2 * i + j]) for j in range(2)]
    for leaf in VISITED:
        node = NODES[leaf // 2]
        parts.append(_edge(*root, 722, node, ORANGE, 3, shift=3, dashed=True))
        parts.append(_edge(722, node, 806, LEAVES[leaf], ORANGE, 3, 3, dashed=True))
    node = NODES[OWN_LEAF // 2]
    parts += [
        _edge(*root, 722, node, BLUE, 3, shift=-3),
        _edge(722, node, 806, LEAVES[OWN_LEAF], BLUE, 3, shift=-3),
        _edge(568, DOCUMENT_Y, *root, BLUE, 3, shift=-3),
        _edge(568, QUERY_Y, *root, ORANGE, 3, shift=3, dashed=True),
    ]
    for x, y in (root, *((722, y) for y in NODES)):
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="10" fill="#ffffff" stroke="{INK}" '
            'stroke-width="2"/>'
        )
    return parts


def _leaves() -> list[str]:
    """Each leaf with the codes of its documents, a square for each subspace."""
    parts = []
    for leaf, y in enumerate(LEAVES):
        seen = leaf in VISITED
        fill, edge = ("#fdf3ec", ORANGE) if seen else ("#f5f7fa", "#9aa5b1")
        parts.append(_box(812, y - 22, 252, 44, fill, edge, 2 if seen else 1.2, 9))
        for code in range(CODES):
            x = 826 + 47 * code
            for part in range(SUBSPACES):
                word = (7 * leaf + 5 * code * code + 3 * part + code * part) % 6
                left, top = x + 17 * (part % 2), y - 15 + 16 * (part // 2)
                parts.append(_box(left, top, 14, 13, CODEWORDS[word], radius=2.5))
            if leaf == OWN_LEAF and code == 1:
                parts.append(_box(x - 5, y - 20, 41, 38, "none", BLUE, 2.5, 6))
    return parts


def _answers() -> list[str]:
    parts = []
    for leaf in VISITED:
        parts.append(_edge(1070, LEAVES[leaf], 1096, 200, ORANGE, 3, dashed=True))
    for rank, width in enumerate((76, 62, 68), start=1):
        y = 148 + 36 * rank - 26
        parts += [
            _box(1100, y, 112, 28, "#fdf3ec", ORANGE, radius=6),
            _text(1114, y + 19, str(rank), size=14, colour=ORANGE, weight=600),
            _box(1126, y + 11, width, 7, "#f0bf9c", radius=3.5),
        ]
    return parts


def _footer() -> list[str]:
    """Which parts are trained together, what NumPy does, and the two colours."""
    return [
        f'<path d="M262 424 v10 H1064 v-10" fill="none" stroke="{GREY}" '
        'stroke-width="1.5"/>',
        _text(
            663, 458, "trained together by one loss in one jitted JAX step, then saved "
            "as NumPy arrays and searched without JAX", colour=INK, size=15,
        ),
        f'<path d="M282 481 h34" stroke="{BLUE}" stroke-width="3"/>',
        _text(324, 486, "a document goes to its most probable leaf", anchor="start"),
        f'<path d="M692 481 h34" stroke="{ORANGE}" stroke-width="3" '
        'stroke-dasharray="7 4"/>',
        _text(734, 486, "a query visits the probable leaves only", anchor="start"),
    ]  # fmt: skip


def _text(
    x: float, y: float, words: str, *, size: int = 14, colour: str = GREY,
    weight: int = 400, anchor: str = "middle",
) -> str:  # fmt: skip
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" '
        f'fill="{colour}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def _box(
    x: float, y: float, width: float, height: float, fill: str, edge: str = "none",
    line: float = 1.5, radius: float = 4, *, opacity: float = 1,
) -> str:  # fmt: skip
    faint = "" if opacity == 1 else f' fill-opacity="{opacity}"'
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" '
        f'fill="{fill}"{faint} stroke="{edge}" stroke-width="{line}"/>'
    )


def _arrow(
    x: float, y: float, to_x: float, to_y: float, colour: str, *, dashed: bool = False
) -> str:
    dash = ' stroke-dasharray="7 4"' if dashed else ""
    return (
        f'<path d="M{x} {y} L{to_x - 7} {to_y}" stroke="{colour}" stroke-width="3"'
        f'{dash}/><path d="M{to_x} {to_y} l-10 -6 v12 z" fill="{colour}"/>'
    )


def _edge(
    x: float, y: float, to_x: float, to_y: float, colour: str = PALE,
    width: float = 1.8, shift: float = 0, *, dashed: bool = False,
) -> str:  # fmt: skip
    """A curve that leaves and arrives horizontally."""
    y, to_y, half = y + shift, to_y + shift, (x + to_x) / 2
    dash = ' stroke-dasharray="7 4"' if dashed else ""
    return (
        f'<path d="M{x} {y} C{half} {y} {half} {to_y} {to_x} {to_y}" fill="none" '
        f'stroke="{colour}" stroke-width="{width}"{dash}/>'
    )
