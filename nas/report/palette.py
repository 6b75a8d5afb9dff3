"""The colours of every picture, chosen once.

Owns names for colours and which colour a layer has; what is drawn with them is the other modules'. The hues are Paul Tol's
"bright" scheme, which stays apart for the usual kinds of colour blindness; nothing is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterable

INK, MUTED, FAINT, PAPER = "#1f2933", "#5f6c7b", "#d9dee4", "#ffffff"
OWNED = "#b4bfcb"
"""A part that its layer keeps to itself."""

BLUE, RED, GREEN, YELLOW, CYAN, PURPLE = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377"
LAYERS = (BLUE, RED, GREEN, YELLOW, PURPLE, CYAN)
"""The colours of layers that lend something, in turn."""

FONT = "'DejaVu Sans', Verdana, sans-serif"


def layer_colours(lenders: Iterable[int]) -> dict[int, str]:
    """A colour for each layer that lends something; neighbours in the list differ, and labels tell the rest."""
    return {layer: LAYERS[n % len(LAYERS)] for n, layer in enumerate(sorted(lenders))}


def tint(colour: str, strength: float) -> str:
    """A colour mixed with white; 1 is the colour, 0 is white."""
    return "#" + "".join(f"{round(255 + (channel - 255) * strength):02x}" for channel in _rgb(colour))


def ink_on(colour: str) -> str:
    """Dark or white, whichever of the two is read more easily on a colour (WCAG 2's relative luminance)."""
    red, green, blue = ((c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in _rgb(colour))
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.22 else PAPER


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
