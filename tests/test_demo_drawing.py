"""Digits drawn as people draw them, with and without serifs and bars, are read."""

import math

import numpy as np
import pytest
from conftest import SEVEN
from PIL import Image, ImageDraw

from hf_clpeft.demo.components import BRUSH
from hf_clpeft.demo.handlers import DRAWING


def arc(x, y, width, height, start, end):
    angles = np.radians(np.linspace(start, end, 24))
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


STROKES = {  # of a unit square; of each digit the ways to draw it
    0: [[arc(0.5, 0.5, 0.28, 0.42, 0, 360)]],
    1: [
        [[(0.5, 0.08), (0.5, 0.92)]],
        [[(0.35, 0.25), (0.5, 0.08), (0.5, 0.92)]],
        [[(0.35, 0.25), (0.5, 0.08), (0.5, 0.92)], [(0.33, 0.92), (0.67, 0.92)]],
    ],
    2: [[[*arc(0.5, 0.32, 0.26, 0.24, 180, 380), (0.25, 0.92), (0.78, 0.92)]]],
    3: [[arc(0.48, 0.29, 0.24, 0.21, 200, 450) + arc(0.48, 0.71, 0.27, 0.21, 270, 520)]],
    4: [
        [[(0.6, 0.08), (0.2, 0.62), (0.8, 0.62)], [(0.62, 0.35), (0.62, 0.92)]],
        [[(0.25, 0.08), (0.25, 0.5), (0.75, 0.5)], [(0.72, 0.08), (0.72, 0.92)]],
    ],
    5: [[[(0.75, 0.1), (0.3, 0.1), (0.28, 0.45), *arc(0.48, 0.66, 0.27, 0.25, 240, 500)]]],
    6: [[[(0.65, 0.08), (0.35, 0.45), *arc(0.5, 0.68, 0.24, 0.24, 190, 550)]]],
    7: [
        [[(0.22, 0.1), (0.78, 0.1), (0.42, 0.92)]],
        [[(0.22, 0.1), (0.78, 0.1), (0.42, 0.92)], [(0.35, 0.5), (0.7, 0.5)]],
    ],
    8: [[arc(0.5, 0.29, 0.2, 0.2, 90, 450), arc(0.5, 0.71, 0.25, 0.22, 270, 630)]],
    9: [
        [arc(0.5, 0.32, 0.24, 0.24, 0, 360), [(0.74, 0.32), (0.7, 0.6), (0.6, 0.92)]],
        [arc(0.5, 0.32, 0.24, 0.24, 0, 360), [(0.74, 0.32), (0.74, 0.92)]],
    ],
}


def drawn(digit, way, size, rng):
    """A digit with a steady brush and a hand that is not."""
    slant, (wide, high), angle = rng.normal(0, 0.08), rng.uniform(0.8, 1.1, 2), rng.normal(0, 0.06)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    canvas = Image.new("RGB", (280, 280), "white")
    pen = ImageDraw.Draw(canvas)
    for stroke in STROKES[digit][way % len(STROKES[digit])]:
        points = (np.array(stroke) - 0.5 + rng.normal(0, 0.006, (len(stroke), 2))) * [wide, high]
        points[:, 0] += slant * points[:, 1]
        line = [tuple(point) for point in points @ turn * size + 140]
        pen.line(line, fill="black", width=BRUSH, joint="curve")
        for x, y in line:
            pen.ellipse([x - BRUSH / 2, y - BRUSH / 2, x + BRUSH / 2, y + BRUSH / 2], fill="black")
    return canvas


@pytest.mark.parametrize("size", [130, 220])
def test_nine_of_ten_drawn_digits_are_read(handlers, size):
    rng, right = np.random.default_rng(0), 0
    for digit in range(10):
        for way in range(10):
            drawn(digit, way, size, rng).save("canvas.png")
            right += handlers.predict(handlers.scan_drawing("canvas.png"))[3]["label"] == str(digit)
    assert right >= 90


def test_drawings_are_answered_where_pictures_are_refused(handlers, letters):
    assert handlers.predict(str(letters[-1]))[3]["label"] is None
    Image.open(letters[-1]).save(DRAWING)
    assert handlers.predict(DRAWING)[3]["label"] is not None and handlers.predict(str(SEVEN))[3]["label"] == "7"
