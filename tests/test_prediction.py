"""What `predict` takes, what it refuses, and that it says so in words."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_clpeft import ConfigError, ContinualModel, HfClpeftError
from hf_clpeft.backbones.bundled import DIGITS_MODEL, bundled_folder
from hf_clpeft.prediction import best_device
from hf_clpeft.streams import PictureError


EXAMPLES = sorted((bundled_folder(DIGITS_MODEL) / "examples").glob("*.png"))[:3]
PIXELS = [np.asarray(Image.open(path).convert("RGB")) for path in EXAMPLES]


@pytest.fixture(scope="module")
def digits():
    return ContinualModel.from_pretrained(DIGITS_MODEL)


SEVERAL = {
    "list of paths": lambda: EXAMPLES,
    "tuple of strings": lambda: tuple(map(str, EXAMPLES)),
    "array of strings": lambda: np.array(list(map(str, EXAMPLES))),
    "array of objects": lambda: np.array([*map(str, EXAMPLES[:2]), EXAMPLES[2]], dtype=object),
    "generator of images": lambda: (Image.open(path) for path in EXAMPLES),
    "map": lambda: map(str, EXAMPLES),
    "iterator": lambda: iter(EXAMPLES),
    "values of a mapping": lambda: dict(enumerate(EXAMPLES)).values(),
    "bytes": lambda: [path.read_bytes() for path in EXAMPLES],
    "views of bytes": lambda: [memoryview(path.read_bytes()) for path in EXAMPLES],
    "files": lambda: [io.BytesIO(path.read_bytes()) for path in EXAMPLES],
    "arrays": lambda: PIXELS,
    "one array": lambda: np.stack(PIXELS),
    "one array of floats": lambda: np.stack(PIXELS) / 255,
    "tensors": lambda: [torch.from_numpy(pixels.copy()) for pixels in PIXELS],
    "one tensor": lambda: torch.from_numpy(np.stack(PIXELS)).permute(0, 3, 1, 2),
    "grey ones": lambda: [pixels[:, :, 0] for pixels in PIXELS],
    "rows of a data set": lambda: [{"bytes": path.read_bytes(), "path": None} for path in EXAMPLES],
    "a mixture": lambda: [EXAMPLES[0], Image.open(EXAMPLES[1]), PIXELS[2]],
}


@pytest.mark.parametrize("make", SEVERAL.values(), ids=SEVERAL)
def test_pictures_in_any_form_are_answered_alike(digits, make):
    assert digits.predict(make(), batch_size=2) == digits.predict(EXAMPLES, batch_size=2)


def test_one_picture_in_any_form_is_one_answer(digits):
    expected = digits.predict(EXAMPLES[:1])
    path, pixels = EXAMPLES[0], PIXELS[0]
    with path.open("rb") as file:
        tensors = torch.from_numpy(pixels.copy()), torch.from_numpy(pixels / 255).permute(2, 0, 1)
        for one in (path, str(path), path.read_bytes(), file, Image.open(path), pixels, pixels[:, :, 0], *tensors):
            assert digits.predict(one) == expected
    assert digits.predict([]) == digits.predict(iter(())) == []


def test_of_an_iterable_no_more_than_a_batch_is_taken_at_a_time(digits, monkeypatch):
    taken, resized, resize = [], [], type(digits.backbone.transform).resize

    def pictures():
        for number in range(10):
            taken.append(number)
            yield EXAMPLES[number % 3]

    def watched(transform, images):
        resized.append(len(taken))
        return resize(transform, images)

    monkeypatch.setattr(type(digits.backbone.transform), "resize", watched)
    assert len(digits.predict(pictures(), batch_size=4)) == 10 and resized == [4, 8, 10]


NO_PICTURES = {
    "None": (None, "images is of type NoneType; give a PIL image, a path, bytes"),
    "a number": (5, "images is of type int"),
    "a set": ({"a.png"}, "images is of type set"),
    "an empty mapping": ({}, "of type dict"),
    "nothing in a list": ([None], r"images\[0\] is of type NoneType"),
    "a row": ([EXAMPLES[0], {"image": None}], r"images\[1\] is of type dict"),
    "lists of numbers": ([[[0, 255]]], r"images\[0\] is of type list"),
    "not a number": ([np.full((9, 9, 3), np.nan)], r"images\[0\], an array of float64 .* from nan to nan"),
    "an address": ("https://example.org/x.png", "x.png is a URL; download it"),
    "addresses": (["hf://datasets/a/b/x.png"], "is a URL"),
    "a missing file": (["gone.png"], "gone.png cannot be opened: No such file"),
    "an array of nothing": (np.array(5), "The picture, an array of int64"),
    "an object": (object(), "images is of type object"),
}


@pytest.mark.parametrize("images, reason", NO_PICTURES.values(), ids=NO_PICTURES)
def test_what_is_no_picture_is_refused_by_its_place(digits, images, reason):
    with pytest.raises(PictureError, match=reason) as error:
        digits.predict(images)
    assert isinstance(error.value, OSError) and isinstance(error.value, HfClpeftError) and "\n" not in str(error.value)


def test_neither_a_pipe_nor_a_bomb_holds_a_model_up(digits, monkeypatch):
    os.mkfifo("pipe")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)
    Image.new("1", (100, 100)).save("bomb.png")
    Path("half.png").write_bytes(EXAMPLES[0].read_bytes()[:150])
    for name in ("pipe", "bomb.png", "half.png", "."):
        with pytest.raises(PictureError, match=f"^{name} "):
            digits.predict([EXAMPLES[0], name])


@pytest.mark.parametrize(
    "options",
    [{name: value} for name in ("batch_size", "top_k") for value in (0, -2, 1.5, "2", None, True, [1], float("nan"))]
    + [{"reject_rate": value} for value in (0, 1.1, -0.1, float("nan"), float("inf"), "0.1", True, [0.1], 1j)]
    + [{"expert": value} for value in (0, "", "task-999", ["task-000"], {}, b"task-000", True, float("nan"))],
    ids=str,
)
def test_options_of_any_type_are_refused_in_words_before_a_picture_is_read(digits, options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"^{name}=.* (must be a|is not one of task-000)") as error:
        digits.predict(["gone.png"], **options)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_are_numbers(digits):
    options = {"batch_size": np.int64(2), "top_k": np.int32(3), "reject_rate": np.float32(0.05)}
    assert digits.predict(EXAMPLES, batch_size=-1) == digits.predict(EXAMPLES, batch_size=10)  # all at once
    assert digits.predict(EXAMPLES, **options) == digits.predict(EXAMPLES, batch_size=2, top_k=3, reject_rate=0.05)


def test_the_command_and_the_demo_use_the_accelerator_that_is_there(monkeypatch):
    from hf_clpeft.cli.predict import predict
    from hf_clpeft.demo.models import Models

    for built, available, expected in (("cuda", False, "cpu"), ("mps", True, "mps"), ("cuda", True, "cuda")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda built=built: torch.device(built))
        monkeypatch.setattr(torch.accelerator, "is_available", lambda available=available: available)
        assert best_device() == torch.device(expected)
    moved = []
    monkeypatch.setattr(ContinualModel, "to", lambda model, device: moved.append(device) or model)
    predict(DIGITS_MODEL, EXAMPLES[:1])
    Models(DIGITS_MODEL)
    assert moved == [torch.device("cuda")] * 2
