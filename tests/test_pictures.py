"""Uploaded pictures and archives: usual kinds are read as everywhere, everything hostile is refused at once."""

import gc
import io
import stat
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from hf_clpeft.demo import pictures
from hf_clpeft.demo.pictures import LARGEST_FILE, MOST_FILES, VisitorError, open_picture, read_uploads
from hf_clpeft.streams import open_image


pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, about broken files

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
NOISE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def forged_png(width, height, data=b""):
    """A PNG whose header claims a size, whatever pixels it has."""
    chunks = [
        (b"IHDR", struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(body)) + kind + body + struct.pack(">L", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def archive_of(members, path="all.zip", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


PNG = encode(NOISE, "PNG")


# Pictures of every kind


def frames(kind, **options):
    return encode(
        PIL.Image.new("RGB", (8, 8), RED),
        kind,
        save_all=True,
        append_images=[PIL.Image.new("RGB", (8, 8), BLUE)],
        **options,
    )


def palette(**options):
    image = PIL.Image.new("P", (8, 8), 0)
    image.putpalette([*BLUE, *RED])
    return encode(image, **options)


KINDS = {
    "grey": (encode(PIL.Image.new("L", (8, 8), 99), "PNG"), (99, 99, 99)),
    "one bit": (encode(PIL.Image.new("1", (8, 8), 1), "PNG"), WHITE),
    "CMYK": (encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), RED),
    "palette": (palette(kind="PNG"), BLUE),
    "clear palette": (palette(kind="PNG", transparency=0), WHITE),
    "clear GIF": (palette(kind="GIF", transparency=0), WHITE),
    "clear RGBA": (encode(PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"), WHITE),
    "clear grey": (encode(PIL.Image.new("LA", (8, 8), (0, 0)), "PNG"), WHITE),
    "clear colour": (encode(PIL.Image.new("RGB", (8, 8), RED), "PNG", transparency=RED), WHITE),
    "half clear": (encode(PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 128)), "WEBP", lossless=True), (255, 127, 127)),
    "animated GIF": (frames("GIF"), RED),
    "animated PNG": (frames("PNG"), RED),
    "animated WebP": (frames("WEBP", lossless=True), RED),
    "two photos": (frames("MPO"), RED),
    "BMP": (encode(PIL.Image.new("RGB", (8, 8), RED), "BMP"), RED),
    "archive behind it": (encode(PIL.Image.new("RGB", (8, 8), RED), "PNG") + b"PK\5\6" + bytes(18), RED),
}


@pytest.mark.parametrize("data, colour", KINDS.values(), ids=KINDS)
def test_colours_are_what_a_browser_shows(data, colour, tmp_path):
    (tmp_path / "picture").write_bytes(data)
    [(name, image)] = read_uploads([tmp_path / "picture"])
    assert name == "picture" and image.mode == "RGB" and np.allclose(np.asarray(image), colour, atol=2)


def test_a_big_picture_keeps_the_pixels_that_training_would_see():
    noise = NOISE.resize((2400, 1800), PIL.Image.Resampling.NEAREST)
    for data in (encode(noise, "JPEG"), encode(noise, "PNG", compress_level=1)):
        assert np.array_equal(open_picture(data), open_image(data))


# What is no picture


REFUSED = {
    "empty": (b"", "is empty"),
    "noise": (np.random.default_rng(0).bytes(999), "no picture that can be read here"),
    "SVG": (
        b'<?xml version="1.0"?>\n<!-- ink -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
        "is an SVG drawing; save",
    ),
    "PDF": (b"%PDF-1.7\n", "is a PDF document; save"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), "is a HEIC picture or a video; save"),
    "AVIF": (b"\0\0\0\x18ftypavif" + bytes(99), "is an AVIF picture; save"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read here"),
    "ICO": (encode(NOISE, "ICO"), "no picture that can be read here"),  # a kind that Pillow would read
    "archive": (b"PK\3\4" + bytes(99), "no picture that can be read here"),
    "1 x 1": (encode(PIL.Image.new("RGB", (1, 1)), "PNG"), "has 1 x 1 pixels; choose"),
    "strip": (encode(PIL.Image.new("1", (4, 9000)), "PNG"), "too elongated"),
    "long strip": (forged_png(4, 12_000_000), "too elongated"),
    "longest strip": (forged_png(1, 40_000_000), "1 x 40000000 pixels; choose"),
    "51 megapixels": (forged_png(8500, 6000), "more than 50,000,000 pixels"),
    "100 megapixels": (forged_png(10_000, 10_000), "more than 50,000,000 pixels"),  # Pillow warns
    "400 megapixels": (forged_png(20_000, 20_000), "more than 50,000,000 pixels"),  # Pillow refuses
    "all pixels": (forged_png(2**31 - 1, 2**31 - 1), "more than 50,000,000 pixels"),
    "no pixels": (forged_png(0, 9), "no picture that can be read here|has 0 x 9"),
    "too few pixels": (forged_png(7000, 7000, bytes(99)), "damaged, incomplete"),
    "too many bytes": (PNG + bytes(LARGEST_FILE), "more than 20 MB"),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("data, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_says_why(data, reason, strict):
    Path("ink").write_bytes(data)
    with warnings.catch_warnings():
        if strict:
            warnings.simplefilter("error")  # as where Pillow's warnings are errors
        with pytest.raises(VisitorError, match=f"^ink .*{reason}") as error:
            open_picture("ink")
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    for side in (7_072, 10_000, 20_000):
        with pytest.raises(VisitorError, match="more than 50,000,000 pixels"):
            open_picture(forged_png(side, side))


def test_a_jpeg_of_countless_scans_is_refused():
    data = encode(PIL.Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    start = time.perf_counter()
    with pytest.raises(VisitorError, match="unusual JPEG"):
        open_picture(data[:-2] + 100_000 * scan + data[-2:])  # else decoded for ten minutes
    assert time.perf_counter() - start < 5
    assert open_picture(data[:-2] + scan + data[-2:]).size == (3000, 3000)


TRUNCATED = {
    "PNG": PNG,
    "JPEG": encode(NOISE, "JPEG"),
    "progressive": encode(NOISE, "JPEG", progressive=True),
    "big JPEG": encode(NOISE.resize((4400, 4400)), "JPEG"),
    "GIF": encode(NOISE, "GIF"),
    "WEBP": encode(NOISE, "WEBP"),
    "TIFF": encode(NOISE, "TIFF"),
    "TIFF LZW": encode(NOISE, "TIFF", compression="tiff_lzw"),
    "BMP": encode(NOISE, "BMP"),
}


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
@pytest.mark.parametrize("data", TRUNCATED.values(), ids=TRUNCATED)
def test_a_truncated_picture_is_refused_and_not_half_grey(data, share):
    with pytest.raises(VisitorError, match="damaged, incomplete|no picture"):
        open_picture(data[: int(len(data) * share)])


def test_a_file_that_did_not_arrive_says_so(tmp_path):
    [(_, missing), (_, folder)] = read_uploads([tmp_path / "gone.png", tmp_path])
    assert str(missing) == "gone.png was not uploaded; try again." and isinstance(folder, VisitorError)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([TRUNCATED[kind] for kind in TRUNCATED if kind != "big JPEG"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.booleans(),
)
def test_any_damage_gives_a_picture_or_a_picture_error(data, changes, near_the_start):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * (min(len(data), 100) if near_the_start else len(data)))] = value
    try:
        image = open_picture(bytes(damaged))
    except VisitorError:
        return
    assert image.mode == "RGB"


# Archives


def test_an_archive_gives_its_pictures_with_their_folders():
    members = {
        "./cats/tom.png": PNG,
        "dogs\\rex.jpg": encode(NOISE, "JPEG"),
        "dogs/": b"",
        "dogs/notes.txt": b"a dog",
        "dogs/more.zip": b"PK\3\4" + bytes(99),
        "__MACOSX/cats/._tom.png": b"junk",
        "cats/.DS_Store": b"junk",
        "cats/Thumbs.db": b"junk",
        "..ink.png": PNG,  # hidden, and not outside
    }
    Path("single.png").write_bytes(PNG)
    results = dict(read_uploads(["single.png", archive_of(members)]))
    assert list(results) == ["single.png", "cats/tom.png", "dogs/rex.jpg", "dogs/notes.txt", "dogs/more.zip"]
    errors = [name for name, result in results.items() if isinstance(result, VisitorError)]
    assert errors == ["dogs/notes.txt", "dogs/more.zip"]
    assert sorted(path.name for path in Path().iterdir()) == ["all.zip", "single.png"]  # nothing was unpacked


def test_pictures_are_decoded_one_at_a_time(monkeypatch):
    opened = []
    monkeypatch.setattr(pictures, "open_picture", lambda data, name: opened.append(name))
    results = read_uploads([archive_of({"a.png": PNG, "b.png": PNG})])
    assert opened == []
    next(results)
    assert opened == ["a.png"]


def test_errors_do_not_keep_files_in_memory():
    Path("noise").write_bytes(bytes(10 * 2**20))
    tracemalloc.start()
    results = list(read_uploads(["noise", "noise", archive_of({"noise": bytes(10 * 2**20)})]))
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(results) == 3 and kept < 5 * 2**20


OUTSIDE = [
    "../ink.png",
    "a/../../ink.png",
    "/ink.png",
    "a\\..\\..\\ink.png",
    "\\ink.png",
    "C:\\ink.png",
    "c:ink.png",
    "a/..",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_archive_that_reaches_outside_is_refused_at_the_call(name):
    with pytest.raises(VisitorError, match="path outside of the archive"):
        read_uploads([archive_of({"good.png": PNG, name: PNG})])


def test_a_link_in_an_archive_leads_nowhere():
    Path("secret.png").write_bytes(PNG)
    link = zipfile.ZipInfo("link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    [(name, result)] = read_uploads([archive_of({link: str(Path("secret.png").resolve())})])
    assert name == "link.png" and "no picture" in str(result)


def patched(path, *changes):
    """Changes bytes of the entries of an archive: (offset in local header, offset in directory, new bytes)."""
    data = bytearray(Path(path).read_bytes())
    for local, central, value in changes:
        for mark, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
            start = data.index(mark) + offset
            data[start : start + len(value)] = value
    Path(path).write_bytes(data)
    return path


def sizes_patched(path, size):
    return patched(path, (22, 24, struct.pack("<L", size)))


def huge():
    """200 MB on disk, of which nothing is written."""
    with open(archive_of({"a.png": PNG}), "ab") as file:
        file.truncate(200 * 2**20 + 1)
    return file.name


BAD_ARCHIVES = {
    "a huge file": (huge, "all.zip has more than 200 MB"),
    "many small bombs": (lambda: archive_of({f"{n}.png": bytes(LARGEST_FILE) for n in range(11)}), "more than 200 MB"),
    "locked": (lambda: patched(archive_of({"a.png": PNG}), (6, 8, b"\1")), "locked with a password"),
    "bzip2": (lambda: archive_of({"a.png": PNG}, method=zipfile.ZIP_BZIP2), "unusual compression"),  # unbounded size
    "LZMA": (lambda: archive_of({"a.png": PNG}, method=zipfile.ZIP_LZMA), "unusual compression"),
    "nothing": (lambda: archive_of({}), "has no pictures"),
    "only junk": (lambda: archive_of({"__MACOSX/a.png": PNG, "b/": b""}), "has no pictures"),
    "too many": (lambda: archive_of({f"{n}.png": b"" for n in range(MOST_FILES)}), "more than 500 pictures"),
}


@pytest.mark.parametrize("make, reason", BAD_ARCHIVES.values(), ids=BAD_ARCHIVES)
def test_a_hostile_archive_is_refused_at_the_call(make, reason):
    Path("first.png").write_bytes(PNG)
    path = make()
    start = time.perf_counter()
    with pytest.raises(VisitorError, match=reason):
        read_uploads(["first.png", path])
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("cut", [10, 300, -30, -1])
def test_a_damaged_archive_is_refused_at_the_call(cut):
    path = Path(archive_of({"a.png": PNG}))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(VisitorError, match="all.zip is damaged or incomplete"):
        read_uploads([path])


@pytest.mark.parametrize("size", [LARGEST_FILE + 1, 2**32 - 2])
def test_one_file_that_is_too_large_is_left_out_unread(size):
    path = sizes_patched(archive_of({"large.png": PNG}), size)
    ((name, problem),) = read_uploads([path])
    assert name == "large.png" and "large.png has more than 20 MB, so it was left out" in str(problem)
    archive_of({"bomb.png": bytes(60 * 2**20), "good.png": PNG})
    (_, problem), (_, image) = read_uploads(["all.zip"])
    assert "bomb.png has more than 20 MB" in str(problem) and image.size == NOISE.size


def test_a_directory_that_is_no_text_is_a_damaged_archive():
    path = archive_of({"é.png": PNG})
    Path(path).write_bytes(Path(path).read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(VisitorError, match="damaged or incomplete"):
        read_uploads([path])


def test_an_archive_that_lies_about_a_size_is_not_unpacked_beyond_it():
    """The bomb says that it has 1,000 bytes. Only it is refused, at no cost; what follows is read."""
    members = {"bomb.png": bytes(100 * 2**20), "good.png": PNG}
    path = sizes_patched(archive_of(members), 1000)
    members.clear()
    tracemalloc.start()
    results = dict(read_uploads([path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "bomb.png is damaged in its archive" in str(results["bomb.png"]) and peak < 5 * 2**20
    assert results["good.png"].size == NOISE.size


def test_a_damaged_member_leaves_the_others_readable():
    path = Path(archive_of({"a.png": PNG, "b.png": PNG}))
    data = bytearray(path.read_bytes())
    data[200:300] = bytes(100)
    path.write_bytes(data)
    results = dict(read_uploads([path]))
    assert "damaged" in str(results["a.png"]) and results["b.png"].size == NOISE.size


def test_single_files_count_as_well():
    Path("a.png").write_bytes(PNG)
    with pytest.raises(VisitorError, match="more than 500 pictures"):
        read_uploads(["a.png"] * (MOST_FILES + 1))
    assert next(read_uploads(["a.png"] * MOST_FILES))[1].size == NOISE.size
