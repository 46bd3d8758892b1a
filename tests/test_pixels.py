"""Odd picture files: each kind has the pixels that plain Pillow and numpy give it, or is refused by name."""

import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import v2

from sakd_cli.config.preprocessing import Preprocessing
from sakd_cli.data import decode
from sakd_cli.data.decode import Picture, Reading, Unreadable, read
from sakd_cli.data.files import ImageSpec, load_eval_image
from sakd_cli.errors import MemoryLimitError

Pixels = NDArray[Any]
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (12, 8, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (12, 8, 4), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 96).round().reshape(12, 8).astype(np.uint16)
WHITE = (255, 255, 255)


def over(alpha: Image.Image, ground: tuple[int, ...] = WHITE) -> Image.Image:
    rgba = alpha.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*ground, 255)), rgba).convert("RGB")


def gray(values: Pixels) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def photo(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[274] = orientation
    return {"exif": exif.tobytes()}


def keyed() -> Image.Image:
    """A palette whose third colour is transparent."""
    picture = Image.fromarray(COLOUR).quantize(8)
    picture.info["transparency"] = 2
    return picture


def png(rows: Pixels, bits: int, key: tuple[int, ...], kind: int = 0) -> Callable[[Path], Any]:
    """Writes a PNG of packed rows, kind 0 grey or 2 RGB, in which the colour `key` is transparent."""
    header = struct.pack(">IIBBBBB", 8, len(rows), bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = {b"IHDR": header, b"tRNS": struct.pack(f">{len(key)}H", *key), b"IDAT": data, b"IEND": b""}
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks.items()]
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def plain(path: Path) -> Image.Image:
    with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
        return picture.convert("RGB")


def upright(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def cleared(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return over(picture)


def save(picture: Image.Image, **options: Any) -> Callable[[Path], None]:
    return lambda path: picture.save(path, **options)


def tiff_float(values: Pixels) -> Callable[[Path], None]:
    return save(Image.fromarray(values.astype(np.float32)))


def signed(path: Path) -> None:
    """16 bits with a sign, -1000 to 1000, as microscopes write them."""
    Image.fromarray(np.linspace(-1000, 1000, 96).reshape(12, 8).astype(np.int32)).save(path)


NIBBLES = COLOUR[..., 0] >> 4
RGB, RGBA = Image.fromarray(COLOUR), Image.fromarray(ALPHA)
LA = RGBA.convert("LA")
# file name: (what writes it, what it is to be read as, the settings)
READ: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Image.Image], dict[str, Any]]] = {
    "rgb.png": (save(RGB), plain, {}),
    "rgb.bmp": (save(RGB), plain, {}),
    "rgb.dib": (save(RGB, format="DIB"), plain, {}),
    "rgb.ppm": (save(RGB), plain, {}),
    "rgb.tif": (save(RGB), plain, {}),
    "lzw.tiff": (save(RGB, compression="tiff_lzw"), plain, {}),
    "photo.jpg": (save(RGB), plain, {}),
    "photo.jfif": (save(RGB, format="JPEG"), plain, {}),
    "photo.webp": (save(RGB), plain, {}),
    "photo.avif": (save(RGB), plain, {}),
    "photo.jp2": (save(RGB), plain, {}),
    "photo.j2k": (save(RGB), plain, {}),
    "cmyk.jpg": (save(RGB.convert("CMYK")), plain, {}),
    "cmyk.tif": (save(RGB.convert("CMYK")), plain, {}),
    "ycbcr.tif": (save(RGB.convert("YCbCr")), plain, {}),
    "gray.png": (save(RGB.convert("L")), plain, {}),
    "gray.pgm": (save(RGB.convert("L")), plain, {}),
    "bits.png": (save(RGB.convert("1")), plain, {}),
    "bits.pbm": (save(RGB.convert("1")), plain, {}),
    "palette.png": (save(RGB.quantize(16)), plain, {}),
    "jpeg named.png": (save(RGB, format="JPEG"), plain, {}),
    "frames.gif": (save(RGB, save_all=True, append_images=[RGB.rotate(180)]), plain, {}),
    "frames.png": (save(RGB, save_all=True, append_images=[RGB.rotate(180)]), plain, {}),
    "pages.tif": (save(RGB, save_all=True, append_images=[RGB.rotate(180)]), plain, {}),
    **{f"turned {k}.jpg": (save(RGB, **photo(k)), upright, {}) for k in range(2, 9)},
    **{f"turned 6{end}": (save(RGB, **photo(6)), upright, {}) for end in (".png", ".webp", ".tif", ".avif")},
    "as stored.jpg": (save(RGB, **photo(6)), plain, {"orientation": False}),
    "as stored.tif": (save(RGB, **photo(6)), lambda path: RGB, {"orientation": False}),
    "odd exif.jpg": (save(RGB, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), plain, {}),
    "odd orientation.jpg": (save(RGB, **photo(9)), plain, {}),
    "clear.png": (save(RGBA), lambda path: over(RGBA), {}),
    "clear on blue.png": (save(RGBA), lambda path: over(RGBA, (0, 0, 200)), {"background": (0, 0, 200)}),
    "clear.webp": (save(RGBA, lossless=True, exact=True), lambda path: over(RGBA), {}),
    "clear.tif": (save(RGBA), lambda path: over(RGBA), {}),
    "clear gray.png": (save(LA), lambda path: over(LA), {}),
    "clear palette.png": (save(keyed(), transparency=2), cleared, {}),
    "clear palette.gif": (save(keyed(), transparency=2), cleared, {}),
    "clear key.png": (save(RGB, transparency=tuple(COLOUR[0, 0].tolist())), cleared, {}),
    "clear key, 4 bits.png": (
        png(NIBBLES[:, ::2] << 4 | NIBBLES[:, 1::2], 4, (3,)),
        lambda path: gray(np.where(NIBBLES == 3, 255, NIBBLES * 17)),
        {},
    ),
    "clear key, 16 bits.png": (
        save(Image.fromarray(RAMP), transparency=int(RAMP[2, 2])),
        lambda path: gray(np.where(RAMP[2, 2] == RAMP, 200, RAMP >> 8)),
        {"background": (200, 200, 200)},
    ),
    "clear key, 16 bits each.png": (
        png((COLOUR * 256.0 + 7).astype(">u2"), 16, tuple((COLOUR[3, 3].astype(int) << 8) + 7), 2),
        lambda path: Image.fromarray(np.where((COLOUR[3, 3] == COLOUR).all(2)[..., None], 255, COLOUR).astype("u1")),
        {},
    ),
    "clear, turned.png": (
        save(RGBA, **photo(8)),
        lambda path: over(RGBA).transpose(Image.Transpose.ROTATE_90),
        {},
    ),
    "16 bits.png": (save(Image.fromarray(RAMP)), lambda path: gray(RAMP >> 8), {}),
    "16 bits.tif": (save(Image.fromarray(RAMP)), lambda path: gray(RAMP >> 8), {}),
    "16 bits.jp2": (save(Image.fromarray(RAMP)), lambda path: gray(RAMP / 65535 * 255 + 0.5), {}),
    "16 bits.pgm": (save(Image.fromarray(RAMP.astype(np.int32))), lambda path: gray(RAMP / 65535 * 255 + 0.5), {}),
    "16 bits, turned.png": (
        save(Image.fromarray(RAMP), **photo(3)),
        lambda path: gray(RAMP >> 8).transpose(Image.Transpose.ROTATE_180),
        {},
    ),
    "12 bits.png": (
        save(Image.fromarray(RAMP >> 4)),
        lambda path: gray((RAMP >> 4) / 4095 * 255 + 0.5),
        {"gray_range": (0, 4095)},
    ),
    "8 bits in 16.png": (save(Image.fromarray(RAMP >> 8)), lambda path: gray(RAMP >> 8), {"gray_range": (0, 255)}),
    "black in 16 bits.png": (save(Image.fromarray(RAMP * 0)), lambda path: gray(RAMP * 0), {}),
    "float.tif": (tiff_float(RAMP / 65535), lambda path: gray(np.float32(RAMP / 65535) * 255 + 0.5), {}),
    "float.pfm": (
        lambda path: path.write_bytes(b"Pf\n8 12\n-1.0\n" + (RAMP / 65535)[::-1].astype("<f4").tobytes()),
        lambda path: gray(np.float32(RAMP / 65535) * 255 + 0.5),
        {},
    ),
    "float to 1000.tif": (
        tiff_float(RAMP / 65.535),
        lambda path: gray(np.float32(RAMP / 65.535).astype(np.float64) * 0.255 + 0.5),
        {"gray_range": (0, 1000)},
    ),
    "signed.tif": (
        signed,
        lambda path: gray((np.linspace(-1000, 1000, 96).reshape(12, 8).astype(np.int32) + 1000) / 2000 * 255 + 0.5),
        {"gray_range": (-1000, 1000)},
    ),
}


@pytest.mark.parametrize("name", READ)
def test_an_odd_picture_is_read_as_it_is_meant(name: str, tmp_path: Path) -> None:
    write, expected, settings = READ[name]
    write(tmp_path / name)
    seen = read(str(tmp_path / name), Reading(**settings), Picture.rgb)
    assert isinstance(seen, Image.Image), seen
    wanted = expected(tmp_path / name)
    assert (seen.mode, seen.size) == ("RGB", wanted.size)
    assert np.array_equal(np.asarray(seen), np.asarray(wanted))


def postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n")


def cut(path: Path) -> None:
    RGB.save(path)
    path.write_bytes(path.read_bytes()[:-100])


def blank_webp(side: int) -> bytes:
    """A lossless WebP of one colour in 34 bytes: no transform, no cache, five codes of one symbol each."""
    bits, place = 0, 0
    for value, width in [(side - 1, 14), (side - 1, 14), (0, 1), (0, 3), (0, 1), (0, 1), (0, 1), *[(0b001, 4)] * 5]:
        bits |= value << place
        place += width
    data = b"\x2f" + bits.to_bytes(13, "little")
    return b"RIFF" + struct.pack("<I", 26) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


RANGE = "does not say what white is: --set data.gray_range="
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "postscript.png": (postscript, "is no picture of a known format"),
    "icon.png": (save(RGB, format="ICO"), "is no picture of a known format"),
    "text.png": (lambda path: path.write_text("hello"), "is no picture of a known format"),
    "nothing.png": (lambda path: path.write_bytes(b""), "is empty"),
    "cut.png": (cut, "is damaged"),
    "pipe.png": (os.mkfifo, "is no regular file"),
    "device.png": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "folder.png": (os.mkdir, "is no regular file"),
    "nowhere.png": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "12 bits.png": (save(Image.fromarray(RAMP >> 4)), "holds greys from 0 to 4095, and " + RANGE),
    "8 bits in 16.tif": (save(Image.fromarray(RAMP >> 8)), "holds greys from 0 to 255, and " + RANGE),
    "signed.tif": (signed, "holds greys from -1000 to 1000, and " + RANGE),
    "float to 255.tif": (tiff_float(RAMP / 257), "holds greys from 0 to 255, and " + RANGE),
    "not finite.tif": (tiff_float(RAMP * np.nan), "holds values that are not finite"),
    "blank.webp": (lambda path: path.write_bytes(blank_webp(16000)), "has 16000x16000 pixels, 256,000,000: more"),
    "large.png": (save(Image.new("1", (4000, 2600))), "has 4000x2600 pixels, 10,400,000: more than data.max_pixels"),
}


def test_a_webp_that_takes_more_memory_than_a_picture_should_is_refused(tmp_path: Path) -> None:
    content = blank_webp(12000) + bytes(2000)  # enough bytes for 200 million pixels of one colour
    (tmp_path / "a.webp").write_bytes(content)
    seen = read(str(tmp_path / "a.webp"), Reading(), Picture.rgb)
    assert isinstance(seen, Unreadable), "was read"
    assert "144,000,000 pixels, and WebP takes 12 bytes for each" in seen.reason


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_without_a_guess_is_refused(name: str, tmp_path: Path) -> None:
    write, reason = REFUSED[name]
    write(tmp_path / name)
    seen = read(str(tmp_path / name), Reading(max_pixels=10_000_000), Picture.rgb)
    assert isinstance(seen, Unreadable), "was read"
    assert reason in seen.reason


def test_heic_is_read_by_an_extra_and_named_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif", reason="the extra `heic` is not installed")
    heif.register_heif_opener()
    RGB.resize((64, 64)).save(tmp_path / "photo.heic", quality=90)
    seen = read(str(tmp_path / "photo.heic"), Reading(), Picture.rgb)
    assert isinstance(seen, Image.Image), seen
    assert np.array_equal(np.asarray(seen), np.asarray(plain(tmp_path / "photo.heic")))
    monkeypatch.setattr(decode, "_formats", lambda: decode.FORMATS)
    seen = read(str(tmp_path / "photo.heic"), Reading(), Picture.rgb)
    assert isinstance(seen, Unreadable)
    assert seen.reason == "is HEIC: pip install 'sakd[heic]' reads it"


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files"), OSError("out of memory error")])
def test_what_the_machine_lacks_is_no_bad_picture(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr(decode, "_regular", fail)
    with pytest.raises(MemoryLimitError, match=r"x\.png"):
        read(str(tmp_path / "x.png"), Reading(), Picture.rgb)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of memory")
def test_a_decoder_without_memory_calls_no_picture_damaged(tmp_path: Path) -> None:
    """libwebp says that it failed to read the frame."""
    Image.new("RGB", (6000, 6000), (1, 2, 3)).save(tmp_path / "large.webp", lossless=True)
    code = """
import resource, sys
from sakd_cli.data.decode import Picture, Reading, read
from sakd_cli.errors import MemoryLimitError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
try:
    print(read(sys.argv[1], Reading(), Picture.rgb))
except MemoryLimitError as error:
    print("lacks", error.message)
"""
    made = subprocess.run([sys.executable, "-c", code, tmp_path / "large.webp"], capture_output=True, text=True)
    assert made.stdout.startswith("lacks"), made.stdout + made.stderr
    assert "large.webp: memory ran out" in made.stdout


def test_a_photo_of_100_megapixels_is_within_the_limit(tmp_path: Path) -> None:
    Image.new("1", (11648, 8736)).save(tmp_path / "photo.png")
    assert 11648 * 8736 > 100e6
    with (tmp_path / "photo.png").open("rb") as file:
        assert decode._identified(file, Reading()).size == (11648, 8736)


def test_a_strip_is_cut_before_it_is_resized(tmp_path: Path) -> None:
    """As a whole it would be 256x10,240,000 pixels."""
    for size in ((1, 40000), (40000, 1)):
        values = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / "strip.png")
        seen = load_eval_image(str(tmp_path / "strip.png"), ImageSpec(Preprocessing(size=224, resize=256), 0))
        assert isinstance(seen, torch.Tensor)
        left, top = ((side - min(side, 16)) // 2 for side in size)
        middle = Image.fromarray(values).crop((left, top, left + min(size[0], 16), top + min(size[1], 16)))
        assert torch.equal(seen, v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(middle))


def test_large_pictures_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RGB.save(tmp_path / "x.png")
    monkeypatch.setattr(decode, "LARGE", 10)
    inside, most = [0], [0]

    def look(picture: Picture) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        inside[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read(str(tmp_path / "x.png"), Reading(), look), range(8)))
        assert most == [1]
        monkeypatch.setattr(decode, "LARGE", 1000)
        list(pool.map(lambda _: read(str(tmp_path / "x.png"), Reading(), look), range(8)))
        assert most[0] > 1


def test_the_decoder_of_webp_is_freed_before_the_picture_is_made(tmp_path: Path) -> None:
    RGB.save(tmp_path / "x.webp")
    with (tmp_path / "x.webp").open("rb") as file:
        picture = decode._identified(file, Reading())
        decode._without_canvases(picture)
        assert "_decoder" in picture.__dict__
        picture.load()
        assert not {"_decoder", "load_prepare"} & picture.__dict__.keys()
