"""One reader of pictures: files of every kind become the pixels that a viewer shows, whoever reads them."""

import hashlib
import io
import os
import signal
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from huggingface_hub import HfApi

from hf_clpeft import HfClpeftError, StreamError, TaskStream
from hf_clpeft.backbones.pictures import READER_VERSION
from hf_clpeft.demo.pictures import open_picture
from hf_clpeft.streams import PictureError, cache_images, images, load_task, open_image


pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about broken files

WHITE, RED, BLUE, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0)
NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
RAMP = np.tile(np.arange(0, 256, 8), (16, 1))  # of 32 greys


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def values(array, kind="TIFF", dtype=None):
    return encode(PIL.Image.fromarray(np.asarray(array, dtype)), kind)


def chunk(kind, body):
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))


def png(rows, bits, colour, *chunks):
    """A PNG of rows as they are stored, with the transparency that Pillow does not write."""
    width = 8 * len(rows[0]) // bits // {0: 1, 2: 3}[colour]
    header = chunk(b"IHDR", struct.pack(">2L5B", width, len(rows), bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")


def tiff(array, order, sample=1, photometric=1):
    """A grey TIFF: sample 1 unsigned, 2 signed, 3 float; photometric 0 where white is zero."""
    array = np.asarray(array)
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    height, width = array.shape
    tags = {256: width, 257: height, 258: 8 * array.itemsize, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    tags |= {279: len(data), 339: sample}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack(order + "HHLL", tag, 4, 1, value) for tag, value in tags.items())
    magic = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return magic + struct.pack(order + "LH", 8, len(tags)) + entries + bytes(4) + data


def clear_page(mode, ink=BLACK):
    """Ink on the left, nothing on the right, where black lies under it."""
    image = PIL.Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((*ink, 255), (0, 0, 8, 16))
    return image.quantize(4) if mode == "P" else image.convert(mode)


def grey(*halves):
    return np.repeat(np.asarray(halves, np.uint8), 8)[None, :].repeat(16, axis=0)


HALF = grey(0, 255)
GREYS = {
    "16-bit PNG": (values(RAMP * 257, "PNG", np.uint16), RAMP),
    "16-bit TIFF": (values(RAMP * 257, "TIFF", np.uint16), RAMP),
    "16-bit TIFF, big-endian": (tiff((RAMP * 257).astype(np.uint16), ">"), RAMP),
    "16-bit TIFF, white is zero": (tiff((RAMP * 257).astype(np.uint16), "<", photometric=0), 255 - RAMP),
    "signed 16-bit TIFF": (tiff((RAMP * 257 // 2).astype(np.int16), ">", 2), RAMP // 2),
    "32-bit TIFF of bytes": (tiff(RAMP.astype(np.int32), ">", 2), RAMP),
    "32-bit TIFF of 16 bits": (values(RAMP * 257, "TIFF", np.int32), RAMP),
    "32-bit TIFF, all of it": (tiff(RAMP.astype(np.uint32) * 2**24, "<"), np.round(RAMP / 248 * 255)),
    "32-bit TIFF, below zero": (values(RAMP * 1000 - 10**5, "TIFF", np.int32), np.round(RAMP / 248 * 255)),
    "float TIFF to 1": (values(RAMP / 255, "TIFF", np.float32), RAMP),
    "float TIFF to 1, big-endian": (tiff((RAMP / 255).astype(np.float32), ">", 3), RAMP),
    "float TIFF a little over 1": (
        values(RAMP / 241, "TIFF", np.float32),
        np.minimum(np.round(RAMP * 255 / 241), 255),
    ),
    "dark float TIFF": (values(RAMP / 255 / 10, "TIFF", np.float32), np.round(RAMP / 10)),
    "float TIFF to 255": (values(RAMP, "TIFF", np.float32), RAMP),
    "float TIFF of other values": (values(RAMP * 99.0 - 7, "TIFF", np.float32), np.round(RAMP / 248 * 255)),
    "float TIFF with gaps": (
        values(np.where(RAMP == 8, np.nan, RAMP), "TIFF", np.float32),
        np.where(RAMP == 8, 0, RAMP),
    ),
    "float TIFF without end": (
        values(np.where(RAMP, RAMP / 255, np.inf), "TIFF", np.float32),
        np.where(RAMP, RAMP, 255),
    ),
    "8-bit TIFF, white is zero": (tiff(RAMP.astype(np.uint8), ">", photometric=0), 255 - RAMP),
    "one bit": (encode(PIL.Image.fromarray(HALF).convert("1")), HALF),
    "RGBA": (encode(clear_page("RGBA")), HALF),
    "RGBA TIFF": (encode(clear_page("RGBA"), "TIFF"), HALF),
    "LA": (encode(clear_page("LA")), HALF),
    "palette with alpha": (encode(clear_page("P")), HALF),
    "clear GIF": (encode(clear_page("P"), "GIF", transparency=clear_page("P").getpixel((15, 0))), HALF),
    "clear WebP": (encode(clear_page("RGBA"), "WEBP", lossless=True), HALF),
    "1-bit grey, clear": (png([b"\x0f\xff"] * 16, 1, 0, (b"tRNS", b"\0\0")), grey(255, 255)),
    "2-bit grey, clear": (png([b"\x55\x55\xaa\xaa"] * 16, 2, 0, (b"tRNS", b"\0\1")), grey(255, 170)),
    "4-bit grey, clear": (png([b"\x11" * 4 + b"\x77" * 4] * 16, 4, 0, (b"tRNS", b"\0\1")), grey(255, 119)),
    "8-bit grey, clear": (png([b"\x01" * 8 + b"\x77" * 8] * 16, 8, 0, (b"tRNS", b"\0\1")), grey(255, 119)),
    "16-bit grey, clear": (png([b"\1\2" * 8 + b"\1\3" * 8] * 16, 16, 0, (b"tRNS", b"\1\2")), grey(255, 1)),
    "8-bit colour, clear": (
        png([b"\x01\2\3" * 8 + b"\x77" * 24] * 16, 8, 2, (b"tRNS", b"\0\1\0\2\0\3")),
        grey(255, 119),
    ),
    "16-bit colour, clear": (png([b"\5\1" * 24 + b"\x77\0" * 24] * 16, 16, 2, (b"tRNS", b"\5\1" * 3)), grey(255, 119)),
}
COLOURS = {
    "half clear WebP": (
        encode(PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "WEBP", lossless=True),
        (255, 127, 127),
    ),
    "CMYK JPEG": (encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), RED),
    "CMYK TIFF": (encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), RED),
    "YCbCr TIFF": (encode(PIL.Image.new("YCbCr", (8, 8), (76, 85, 255)), "TIFF", compression="tiff_lzw"), RED),
    "LAB TIFF": (encode(PIL.Image.new("LAB", (8, 8), (255, 128, 128)), "TIFF"), WHITE),
    "animated GIF": (
        encode(PIL.Image.new("RGB", (8, 8), RED), "GIF", save_all=True, append_images=[NOISE.resize((8, 8))]),
        RED,
    ),
    "animated PNG": (
        encode(PIL.Image.new("RGB", (8, 8), RED), "PNG", save_all=True, append_images=[NOISE.resize((8, 8))]),
        RED,
    ),
}


def with_orientation(kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encode(NOISE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def with_segment(body, data=None):
    """A JPEG with one more note."""
    data = data or encode(NOISE, "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


def tag_of(kind, value):
    return b"II*\0" + struct.pack("<LHHHL", 8, 1, 0x0112, kind, 1) + value + bytes(4)


PLAIN = encode(NOISE)
NOTE = chunk(b"tEXt", b"Title\0ink")
DAMAGED = {
    "XMP that is no text": with_segment(b"http://ns.adobe.com/xap/1.0/\0<x \xa8\xff/>"),
    "EXIF that is none": with_segment(b"Exif\0\0ZZ*\0garbage"),
    "EXIF that ends": with_segment(b"Exif\0\0II*\0\x08\0\0\0\x05\0"),
    "EXIF of nothing": with_segment(b"Exif\0\0"),
    "a fraction of zero": with_segment(b"Exif\0\0II*\0\x08\0\0\0\1\0\x1a\1\5\0\1\0\0\0\x1a\0\0\0" + bytes(12)),
    "orientation 0": with_segment(b"Exif\0\0" + tag_of(3, struct.pack("<L", 0))),
    "orientation 9": with_orientation("JPEG", 9),
    "orientation 999": with_segment(b"Exif\0\0" + tag_of(4, struct.pack("<L", 999))),
    "orientation in letters": with_segment(b"Exif\0\0" + tag_of(2, b"six\0")),
    "orientation as a byte": with_segment(b"Exif\0\0" + tag_of(7, b"\6\0\0\0")),
    "eXIf that is none": PLAIN[:33] + chunk(b"eXIf", b"Exif\0\0\0") + PLAIN[33:],
    "eXIf with a wrong sum": PLAIN[:33] + chunk(b"eXIf", tag_of(3, b"\6\0\0\0"))[:-1] + b"?" + PLAIN[33:],
    "a text with a wrong sum": PLAIN[:33] + NOTE[:-1] + b"?" + PLAIN[33:],
    "a profile that is none": PLAIN[:33] + chunk(b"iCCP", b"sRGB\0\0garbage") + PLAIN[33:],
    "two photos, an index of garbage": with_segment(b"", encode(NOISE, "JPEG")).replace(
        b"\xff\xe1\0\x02", b"\xff\xe2\0\x20MPF\0II*\0\x08\0\0\0\1\0" + bytes(16)
    ),
}
FILES = {name: data for name, (data, _) in (GREYS | COLOURS).items()} | DAMAGED
FILES |= {f"{kind} turned": with_orientation(kind, 6) for kind in ("JPEG", "PNG", "WEBP", "TIFF")}


@pytest.mark.parametrize("data, expected", GREYS.values(), ids=GREYS)
def test_greys_and_clear_pages_are_what_a_viewer_shows(data, expected):
    found = np.asarray(open_image(data))
    assert np.array_equal(found, np.repeat(expected[:, :, None], 3, axis=2)), (found[4, :, 1], expected[4])


@pytest.mark.parametrize("data, colour", COLOURS.values(), ids=COLOURS)
def test_colours_are_what_a_viewer_shows(data, colour):
    assert np.allclose(np.asarray(open_image(data)), colour, atol=2)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_images_in_memory_may_be_of_any_mode_and_stay_as_they_are(mode):
    clear = mode in ("LA", "La", "P", "PA", "RGBA", "RGBa")
    by_way_of = {"La": "LA", "PA": "P"}.get(mode, "RGBA" if clear else "RGB")
    image = clear_page("RGBA", ink=WHITE).convert(by_way_of).convert(mode)
    image.info["note"] = "stays"
    before = image.tobytes(), image.mode
    found = open_image(image)
    assert (found.mode, found.info) == ("RGB", {}) and (image.tobytes(), image.mode) == before and image.info
    assert found.getpixel((2, 2)) == WHITE and found.getpixel((14, 2)) == (WHITE if clear else BLACK)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_turned_photo_is_upright_once(kind):
    stored = np.asarray(open_image(encode(NOISE, kind, **({"lossless": True} if kind == "WEBP" else {}))))
    turns = {2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2)}
    turns |= {6: np.rot90(stored, -1), 7: np.rot90(stored, 2).transpose(1, 0, 2), 8: np.rot90(stored)}
    for orientation, expected in {1: stored, **turns}.items():
        found = open_image(with_orientation(kind, orientation))
        assert np.array_equal(found, expected) and np.array_equal(open_image(found), expected), orientation


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_notes_do_not_spoil_good_pixels(data):
    good = encode(NOISE, "JPEG") if data.startswith(b"\xff\xd8") else PLAIN
    assert np.array_equal(open_image(data), open_image(good))


def test_training_predicting_and_the_demo_see_the_same_pixels(backbone):
    """Whether a file is cached, streamed, given as a path, bytes, a handle or an image, or uploaded."""
    rows = {"image": [{"bytes": data, "path": None} for data in FILES.values()], "label": ["a"] * len(FILES)}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("string")}))
    cached = cache_images(load_task(DatasetDict(train=data), name="all", test_size=0).train, backbone.transform)
    data.to_parquet("data/train.parquet")
    stream = TaskStream.class_incremental("data", num_tasks=1, streaming=True, test_split="train")
    streamed = cache_images(stream[0].train, backbone.transform)
    for number, (name, data) in enumerate(FILES.items()):
        expected = open_image(data)
        path = Path("picture")
        path.write_bytes(data)
        with path.open("rb") as file, PIL.Image.open(path) if name not in BROKEN else expected as image:
            for other in (path, str(path), bytearray(data), file, file, image, {"bytes": None, "path": "picture"}):
                assert np.array_equal(open_image(other), expected), (name, other)
        assert np.array_equal(open_picture(path), expected), name
        pixels = torch.from_numpy(backbone.transform.resize([expected])[0])
        for images_ in (cached, streamed):
            assert torch.equal(images_[number]["pixels"], pixels), name


BROKEN = ("eXIf with a wrong sum", "a text with a wrong sum", "two photos, an index of garbage")  # not for Pillow


@pytest.mark.parametrize("form", ["torch", "numpy", "arrow", "pandas"])
def test_the_form_in_which_a_data_set_gives_its_rows_changes_no_pixel(backbone, patterns, form):
    expected = backbone.transform.resize(patterns["train"]["image"][:3])
    data = DatasetDict({side: rows.with_format(form) for side, rows in patterns.items()})
    cached = cache_images(TaskStream.class_incremental(data, num_tasks=1)[0].train, backbone.transform)
    assert np.array_equal(cached.__getitems__([0, 1, 2])["pixels"], expected)


def test_a_transform_that_would_not_be_seen_is_refused(patterns):
    data = DatasetDict({side: rows.with_transform(lambda batch: batch) for side, rows in patterns.items()})
    with pytest.raises(StreamError, match="split 'train' has a lazy transform"):
        TaskStream.class_incremental(data, num_tasks=1)


def test_folders_of_pictures_on_the_hub_are_streamed_through_the_same_reader(backbone, hub):
    files = [DAMAGED["EXIF that is none"], FILES["LA"], FILES["16-bit PNG"], with_orientation("JPEG", 6)]
    for number, data in enumerate(files):
        path = Path("data", "train", "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    api = HfApi(token="hf_alice")
    api.create_repo("alice/pictures", repo_type="dataset")
    api.upload_folder(repo_id="alice/pictures", repo_type="dataset", folder_path="data")
    options = {"num_tasks": 1, "test_split": "train", "streaming": True}
    cached = cache_images(
        TaskStream.class_incremental("alice/pictures", **options)[0].train, backbone.transform
    ).__getitems__(range(4))
    for pixels, number in zip(cached["pixels"].numpy(), (0, 2, 1, 3), strict=True):  # class by class
        assert np.array_equal(pixels, backbone.transform.resize([files[number]])[0])


def test_pixels_change_with_the_version_of_the_reader_alone():
    exact = [name for name in GREYS if "WebP" not in name]
    digest = hashlib.sha256(b"".join(open_image(FILES[name]).tobytes() for name in exact)).hexdigest()
    assert (READER_VERSION, digest[:16]) == (2, "9dc5742b7cc1d573"), (
        "raise READER_VERSION, so that caches of other pixels are not used"
    )


def test_a_cache_of_another_version_of_the_reader_is_not_used(backbone, patterns, tmp_path, monkeypatch):
    patterns["train"].to_parquet(tmp_path / "data" / "train.parquet")
    read, opened = images.decode, []
    monkeypatch.setattr(images, "decode", lambda picture: opened.append(type(picture)) or read(picture))
    counts = []
    for version in (READER_VERSION, READER_VERSION, READER_VERSION + 1):
        monkeypatch.setattr(images, "READER_VERSION", version)
        task = TaskStream.class_incremental(str(tmp_path / "data"), num_tasks=2, test_split="train")[0]
        cache_images(task.train, backbone.transform)
        counts.append(opened.count(dict))
    assert counts == [12, 12, 24]


# What is no picture


def pipe():
    os.mkfifo("pipe")
    return "pipe"


REFUSED = {
    "nothing": (lambda: b"", "is empty"),
    "an empty file": (lambda: Path("empty.png").write_bytes(b"") or "empty.png", "empty.png is empty"),
    "a folder": (lambda: Path("folder").mkdir() or Path("folder"), "folder is a folder"),
    "a pipe": (pipe, "pipe is not a regular file"),
    "no name": (lambda: "", "^'' is a folder"),
    "a path that raises": (lambda: Stubborn(), "The picture cannot be read: no."),
    "a device": (lambda: "/dev/zero", "not a regular file"),
    "no file": (lambda: "gone.png", "gone.png cannot be opened: No such file"),
    "a long name": (lambda: "A" * 99_999, "AAAA… cannot be opened"),
    "a name with a zero": (lambda: "a\0b", "cannot be opened"),
    "a name for the terminal": (lambda: "\x1b[31m\ud800", r"'\\x1b\[31m\\ud800' cannot be opened"),
    "an address": (lambda: "https://example.org/x.png", "is a URL; download it first"),
    "an address of data": (lambda: "data:image/png;base64,iVBORw0KGgo=", "is a URL"),
    "a text": (lambda: b"nothing of the kind", "not supported by Pillow"),
    "half a PNG": (lambda: PLAIN[: len(PLAIN) // 2], "not a valid image"),
    "half a JPEG": (lambda: encode(NOISE, "JPEG")[:-200], "not a valid image: image file is truncated"),
    "PostScript": (lambda: encode(NOISE, "EPS"), "PostScript, a program, which is never run"),
    "a bomb": (
        lambda: png([bytes(20_000 // 8)], 1, 0).replace(b"\0\0N \0\0\0\1", b"\0\0N \0\0N "),
        "cannot|not a valid image",
    ),
    "a strip": (lambda: PIL.Image.new("L", (1, 3000)), "1 x 3000 pixels"),
    "no pixels": (lambda: PIL.Image.new("RGB", (0, 9)), "0 x 9 pixels"),
    "no numbers": (lambda: values(np.full((8, 8), np.nan), "TIFF", np.float32), "has no finite values"),
    "a closed image": (lambda: closed(), "not a valid image"),
    "text instead of bytes": (lambda: io.StringIO("ink"), "gives str: open it with mode 'rb'"),
    "a closed file": (lambda: closed_file(), "cannot be read: I/O operation on closed file"),
    "None": (lambda: None, "is of type NoneType, not an image; pass a PIL image, a path, bytes"),
    "a number": (lambda: 5, "is of type int"),
    "a list": (lambda: [[0, 255]], "is of type list"),
    "a row": (lambda: {"image": NOISE}, "is of type dict"),
    "a row of nothing": (lambda: {"bytes": None, "path": None}, "is of type NoneType"),
    "a row with an address": (lambda: {"bytes": None, "path": "https://example.org/x.png"}, "is a URL"),
    "not a number": (lambda: np.full((9, 9, 3), np.nan), "values from nan to nan"),
    "floats to 255": (lambda: np.full((9, 9, 3), 200.0), "values from 200 to 200: floats must be from 0 to 1"),
    "floats below 0": (lambda: torch.full((3, 9, 9), -0.5), "a tensor of torch.float32 .* values from -0.5"),
    "integers": (lambda: np.zeros((9, 9, 3), np.int64), "an array of int64 and shape .* must be uint8"),
    "flags": (lambda: np.zeros((9, 9), bool), "an array of bool"),
    "an array of no pixels": (lambda: np.zeros((0, 9, 3), np.uint8), "not an image"),
    "five channels": (lambda: np.zeros((9, 9, 5), np.uint8), "not an image: its shape must be"),
    "one dimension": (lambda: np.zeros(9, np.uint8), "not an image: its shape must be"),
    "four dimensions": (lambda: torch.zeros(2, 3, 9, 9), "not an image: its shape must be"),
    "a tensor of nothing": (lambda: torch.empty(3, 9, 9, device="meta"), "The picture cannot be read"),
    "objects": (lambda: np.array([[{}]]), "not an image"),
}


class Stubborn(os.PathLike):
    def __fspath__(self):
        raise RuntimeError("no")


def closed():
    Path("closed.png").write_bytes(PLAIN)
    with PIL.Image.open("closed.png") as image:
        return image


def closed_file():
    Path("closed.png").write_bytes(PLAIN)
    with open("closed.png", "rb") as file:
        return file


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_is_refused_in_one_line(make, reason, strict):
    thing = make()
    signal.alarm(20)  # a pipe that nobody writes to
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(PictureError, match=reason) as error:
            open_image(thing)
    signal.alarm(0)
    message = str(error.value)
    assert message.isprintable() and len(message) < 500 and message.endswith(".")
    assert isinstance(error.value, OSError) and isinstance(error.value, HfClpeftError)


ARRAYS = {
    "rows, columns, channels": lambda a: a,
    "channels first": lambda a: a.transpose(2, 0, 1),
    "floats": lambda a: a / 255,
    "small floats": lambda a: (a / 255).astype(np.float32),
    "tensor": lambda a: torch.from_numpy(a),
    "tensor, channels first": lambda a: torch.from_numpy(a).permute(2, 0, 1),
    "tensor of floats": lambda a: torch.from_numpy(a / 255).permute(2, 0, 1).requires_grad_(),
    "short floats": lambda a: torch.from_numpy(a / 255).to(torch.float64).permute(2, 0, 1),
    "read-only": lambda a: np.frombuffer(a.tobytes(), np.uint8).reshape(a.shape),
}


@pytest.mark.parametrize("change", ARRAYS.values(), ids=ARRAYS)
def test_an_array_is_the_picture_of_its_values(change):
    assert np.array_equal(open_image(change(np.asarray(NOISE).copy())), NOISE)


def test_arrays_may_be_grey_or_clear_and_small():
    grey = np.asarray(NOISE.convert("L"))
    for array in (grey, grey[:, :, None], torch.from_numpy(grey.copy())[None], (grey * np.uint16(257)).astype(">u2")):
        assert np.array_equal(open_image(array), NOISE.convert("L").convert("RGB"))
    assert open_image(np.zeros((8, 8, 4), np.uint8)).getpixel((0, 0)) == WHITE
    assert open_image(np.asarray(NOISE)[:3]).size == (32, 3) and open_image(np.zeros((3, 9, 3), np.uint8)).size == (
        9,
        3,
    )
    assert open_image(torch.zeros(3, 9, 3)).size == (3, 9)
    half = torch.full((3, 8, 8), 0.5, dtype=torch.bfloat16)
    assert open_image(half).getpixel((0, 0)) == (128, 128, 128)
