"""Rectangles, lines and words on a page, as SVG or PNG. The only file that knows Pillow."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
from typing import Any, BinaryIO, Literal

_PNG_SCALE = 2
"""Pixels per unit: sharp on a screen of high resolution, and when zoomed."""
_FONT = "Inter, 'Helvetica Neue', Arial, sans-serif"

Anchor = Literal["start", "middle", "end"]


@dataclasses.dataclass(frozen=True, slots=True)
class Rectangle:
    """Filled, without an outline."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    title: str = ""
    """Shown when the pointer rests on it (SVG only)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Straight, between two points."""

    x1: float
    y1: float
    x2: float
    y2: float
    colour: str
    width: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Words:
    """One line of text; ``y`` is its baseline."""

    x: float
    y: float
    text: str
    size: float
    colour: str = "#222222"
    anchor: Anchor = "start"
    is_bold: bool = False


class Drawing:
    """Shapes in the order in which they are painted, on white."""

    def __init__(self, width: float, height: float) -> None:
        self.width = width
        self.height = height
        self.shapes: list[Rectangle | Line | Words] = []

    def add(self, *shapes: Rectangle | Line | Words) -> None:
        """Paint on top of what is there."""
        self.shapes += shapes

    def to_svg(self) -> str:
        """The page as SVG 1.1, without scripts or outside references."""
        size = f'width="{self.width:g}" height="{self.height:g}"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {self.width:g} {self.height:g}" font-family="{_FONT}">',
            f'<rect {size} fill="#ffffff"/>',
            *(_svg_of(shape) for shape in self.shapes),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def write_png(self, stream: BinaryIO) -> None:
        """The page as PNG; needs Pillow (``has_pillow``)."""
        from PIL import Image, ImageDraw, ImageFont

        size = round(self.width * _PNG_SCALE), round(self.height * _PNG_SCALE)
        image = Image.new("RGB", size, "#ffffff")
        canvas = ImageDraw.Draw(image)
        for shape in self.shapes:
            if isinstance(shape, Words):
                font = ImageFont.load_default(shape.size * _PNG_SCALE)
                _paint_words(canvas, shape, font)
            else:
                _paint_shape(canvas, shape)
        image.save(stream, format="PNG", optimize=True)


def has_pillow() -> bool:
    """Whether PNG can be written here."""
    return importlib.util.find_spec("PIL") is not None


def _svg_of(shape: Rectangle | Line | Words) -> str:
    match shape:
        case Rectangle():
            attributes = (
                f'x="{shape.x:.2f}" y="{shape.y:.2f}" width="{shape.width:.2f}" '
                f'height="{shape.height:.2f}" fill="{shape.fill}"'
            )
            if not shape.title:
                return f"<rect {attributes}/>"
            return f"<rect {attributes}><title>{html.escape(shape.title)}</title></rect>"
        case Line():
            return (
                f'<line x1="{shape.x1:.2f}" y1="{shape.y1:.2f}" x2="{shape.x2:.2f}" '
                f'y2="{shape.y2:.2f}" stroke="{shape.colour}" stroke-width="{shape.width:g}"/>'
            )
        case Words():
            bold = ' font-weight="600"' if shape.is_bold else ""
            return (
                f'<text x="{shape.x:.2f}" y="{shape.y:.2f}" font-size="{shape.size:g}" '
                f'fill="{shape.colour}" text-anchor="{shape.anchor}"{bold}>'
                f"{html.escape(shape.text)}</text>"
            )


def _paint_shape(canvas: Any, shape: Rectangle | Line) -> None:
    if isinstance(shape, Rectangle):
        left, top = shape.x * _PNG_SCALE, shape.y * _PNG_SCALE
        right = max(left, left + shape.width * _PNG_SCALE - 1)  # Pillow includes both edges
        bottom = max(top, top + shape.height * _PNG_SCALE - 1)
        canvas.rectangle((left, top, right, bottom), fill=shape.fill)
        return
    ends = [value * _PNG_SCALE for value in (shape.x1, shape.y1, shape.x2, shape.y2)]
    canvas.line(ends, fill=shape.colour, width=max(1, round(shape.width * _PNG_SCALE)))


def _paint_words(canvas: Any, words: Words, font: Any) -> None:
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[words.anchor]
    canvas.text(
        (words.x * _PNG_SCALE, words.y * _PNG_SCALE),
        words.text,
        fill=words.colour,
        font=font,
        anchor=anchor,
        stroke_width=0.4 * _PNG_SCALE if words.is_bold else 0,
    )
