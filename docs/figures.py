"""Draws the figures of the explanation into docs/_static/figures: ``nox -s figures`` (needs matplotlib).

They are transparent, and what stands outside the coloured boxes is of a grey that can be read on white as on black.
Type is large, since a figure of five inches is shown at the width of a phone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrow, Rectangle

FOLDER = Path(__file__).parent / "_static" / "figures"
PREFIX, SOURCE, TARGET, FROZEN = "#f2994a", "#7db3e8", "#84cba2", "#b9bec6"
INK, GREY = "#16181d", "#7d838c"
LARGE, SMALL = 17, 14
Words = Sequence[str]


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure whose unit is a box, a third of an inch wide."""
    figure = Figure(figsize=(width / 3, height / 3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, colour: str, words: str = "", *, width: float = 1, height: float = 1.2) -> None:
    """A filled box with words in its middle."""
    axes.add_patch(Rectangle((x + 0.04, y + 0.04), width - 0.08, height - 0.08, facecolor=colour, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2, words, color=INK, size=SMALL, ha="center", va="center_baseline")


def hollow(axes: Axes, x: float, y: float, words: str = "", *, width: float = 1, height: float = 1.2) -> None:
    """An empty box: padding, or what is not seen."""
    edges = {"facecolor": "none", "edgecolor": GREY, "linewidth": 0.8}
    axes.add_patch(Rectangle((x + 0.08, y + 0.08), width - 0.16, height - 0.16, **edges))
    axes.text(x + width / 2, y + height / 2, words, color=GREY, size=SMALL, ha="center", va="center_baseline")


def row(axes: Axes, x: float, y: float, colour: str, words: Words, *, width: float = 1) -> float:
    """Boxes side by side; where they end."""
    for index, word in enumerate(words):
        box(axes, x + width * index, y, colour, word, width=width)
    return x + width * len(words)


def label(axes: Axes, x: float, y: float, words: str, *, size: int = LARGE, align: str = "left") -> None:
    """Words outside the boxes."""
    axes.text(x, y, words, color=GREY, size=size, ha=align, va="center_baseline")


def arrow(axes: Axes, x: float, y: float, dy: float) -> None:
    """Up or down."""
    shape = {"width": 0.06, "head_width": 0.4, "head_length": 0.35, "length_includes_head": True}
    axes.add_patch(FancyArrow(x, y, 0, dy, color=GREY, **shape))


def numbered(letter: str, count: int) -> list[str]:
    """The same letter with 1, 2, …"""
    return [f"${letter}_{{{index}}}$" for index in range(1, count + 1)]


def layers() -> Figure:
    """What happens: trained keys and values in front of every layer of a frozen model."""
    figure, axes = canvas(15, 10.9)
    label(axes, 3.9, 0.6, "trained", align="center")
    label(axes, 10.5, 0.6, "frozen model", align="center")
    for index, name in enumerate(("layer L", "⋮", "layer 2", "layer 1")):
        y = 1.3 + 2 * index
        if name == "⋮":
            label(axes, 3.9, y + 0.8, name, align="center")
            label(axes, 10.5, y + 0.8, name, align="center")
            continue
        box(axes, 2, y, PREFIX, "keys, values", width=3.9, height=1.6)
        box(axes, 6, y, FROZEN, name, width=9, height=1.6)
    for index in range(3):
        for y in (9.35, 7.35):
            arrow(axes, 7.5 + 3 * index, y, -0.4)
    for index, (word, colour) in enumerate((("$x_1$", SOURCE), ("$x_2$", SOURCE), ("$y_1$", TARGET))):
        box(axes, 6.3 + 3 * index, 9.5, colour, word, width=2.4, height=1.3)
    label(axes, 3.9, 10.1, "no words", size=SMALL, align="center")
    label(axes, 0.9, 5.3, "$P$ ×", align="center")
    return figure


def sequence() -> Figure:
    """[PREFIX; x; y] and [PREFIX; x; PREFIX'; y]."""
    figure, axes = canvas(15, 12.2)
    label(axes, 0, 0.6, "Decoder-only: $z$ = [PREFIX; $x$; $y$]")
    end = row(axes, 0, 1.3, PREFIX, numbered("p", 3))
    end = row(axes, end + 0.3, 1.3, SOURCE, numbered("x", 4))
    row(axes, end + 0.3, 1.3, TARGET, numbered("y", 3))
    label(axes, 0, 4.2, "Encoder-decoder:")
    label(axes, 0, 5.5, "$z$ = [PREFIX; $x$; PREFIX′; $y$]")
    places = (("encoder", "p", "x", SOURCE, 4), ("decoder", "p'", "y", TARGET, 3), ("cross", "p''", "x", SOURCE, 4))
    for index, (place, prefix, text, colour, count) in enumerate(places):
        y = 6.7 + 1.8 * index
        label(axes, 0, y + 0.6, place)
        end = row(axes, 4.3, y, PREFIX, numbered(prefix, 3), width=1.2)
        row(axes, end + 0.3, y, colour, numbered(text, count))
    return figure


def attention() -> Figure:
    """Where keys and values go in one layer."""
    figure, axes = canvas(15, 9.9)
    label(axes, 4.0, 0.6, "prefix", align="center")
    label(axes, 10, 0.6, "text", align="center")
    for name, y in (("$K$", 1.3), ("$V$", 2.8), ("$Q$", 5.4)):
        label(axes, 0.4, y + 0.6, name)
        if name != "$Q$":
            for index in range(3):
                box(axes, 2.5 + index, y, PREFIX, f"$p_{index + 1}$")
        for index in range(6):
            colour = SOURCE if index < 3 else TARGET
            box(axes, 7 + index, y, colour, f"${'x' if index < 3 else 'y'}_{index % 3 + 1}$")
        if name == "$Q$":
            label(axes, 4.0, y + 0.6, "none", align="center")
    arrow(axes, 10, 6.8, 0.9)
    box(axes, 2.5, 7.8, FROZEN, "softmax($QK^\\top/\\sqrt{d}$) $V$, of the text", width=10.5, height=1.8)
    return figure


def mask() -> Figure:
    """Who sees whom, in a full row and in one that is padded on the left."""
    figure, axes = canvas(13.5, 18)
    for top, title, pads in ((0.6, "a row of five", 0), (9.7, "a row of three, padded on the left", 2)):
        label(axes, 0, top, title)
        for column in range(3):
            label(axes, 3.5 + column, top + 1.5, f"$p_{column + 1}$", size=SMALL, align="center")
        for column in range(5):
            name = "pad" if column < pads else f"$x_{column - pads + 1}$"
            label(axes, 7.1 + 1.2 * column, top + 1.5, name, size=SMALL, align="center")
        for query in range(5):
            y = top + 2.2 + 1.2 * query
            label(axes, 2.7, y + 0.6, "pad" if query < pads else f"$x_{query - pads + 1}$", size=SMALL, align="right")
            for column in range(3):
                (hollow(axes, 3 + column, y) if query < pads else box(axes, 3 + column, y, PREFIX))
            for column in range(5):
                seen = pads <= column <= query
                place = 6.5 + 1.2 * column, y
                box(axes, *place, SOURCE, width=1.2) if seen else hollow(axes, *place, width=1.2)
    return figure


def positions() -> Figure:
    """What stands where under either policy."""
    figure, axes = canvas(11, 10.2)
    for top, policy, first in ((0.6, 'positions="shift"', 3), (6, 'positions="none"', 0)):
        label(axes, 0, top, policy)
        for y, pads in ((top + 0.9, 0), (top + 2.5, 2)):
            row(axes, 0, y, PREFIX, ["0", "1", "2"] if first else ["–"] * 3)
            for index in range(5):
                x = 3.4 + 1.5 * index
                if index < pads:
                    hollow(axes, x, y, "pad", width=1.5)
                else:
                    box(axes, x, y, SOURCE, str(first + index - pads), width=1.5)
    return figure


def flat() -> Figure:
    """The matrix of P rows, and what a column belongs to."""
    figure, axes = canvas(15, 10.7)
    for layer in range(3):
        x = 2.4 + 4.2 * layer
        label(axes, x + 2, 0.6, "…" if layer == 1 else f"layer {('1', '', 'L')[layer]}", align="center")
        if layer == 1:
            label(axes, x + 2, 4.9, "…", align="center")
            continue
        for half, name in enumerate("KV"):
            for token in range(4):
                colour = PREFIX if half == 0 else "#f7c08a"
                box(axes, x + 2 * half, 1.4 + 1.6 * token, colour, f"${name}$", width=2, height=1.6)
    for token in range(4):
        label(axes, 1.9, 2.2 + 1.6 * token, ("$p_1$", "$p_2$", "⋮", "$p_P$")[token], align="right")
    label(axes, 8.5, 8.6, "a row: $L$ × 2 × token_dim numbers", align="center", size=SMALL)
    label(axes, 8.5, 10, "token_dim = kv_heads × head_dim", align="center", size=SMALL)
    return figure


FIGURES: tuple[Callable[[], Figure], ...] = (layers, sequence, attention, mask, positions, flat)


def main() -> None:
    """Draw all of them, the same bytes each time."""
    mpl.rcParams.update({"svg.hashsalt": "prefixkit", "svg.fonttype": "path", "mathtext.fontset": "dejavusans"})
    FOLDER.mkdir(parents=True, exist_ok=True)
    for draw in FIGURES:
        draw().savefig(FOLDER / f"{draw.__name__}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
