"""One verdict on an image: clean, readable with damage, unreadable; depth, bands and orientation by
stated rules."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from fastssl_pipelines.sources import decoding
from fastssl_pipelines.sources.decoding import (
    Decoding,
    UnreadableError,
    count_frames,
    decode,
    decode_checked,
    parse_bands,
)
from fastssl_pipelines.sources.depth import to_uint8
from fastssl_pipelines.sources.exif import TURNS, exif_orientation, upright
from fastssl_pipelines.sources.jpeg import jpeg_damage

Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def odd(data: Path) -> Path:
    return data / "odd-inputs"


def read(path: Path) -> Bytes:
    return np.fromfile(path, np.uint8)


def encoded(pixels: NDArray[Any], kind: str, **options: Any) -> Bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return np.frombuffer(file.getvalue(), np.uint8)


def noise(height: int = 48, width: int = 64) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_bits_of_pillow(data: Path) -> None:
    for path in sorted((data / "imagenet-samples").iterdir())[::8]:
        pixels, damage = decode_checked(read(path))
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
        assert not damage


def test_damage_is_named_and_the_pixels_are_kept(odd: Path) -> None:
    path = odd / "three-extraneous-bytes-before-EOI.jpg"
    pixels, damage = decode_checked(read(path))
    assert "extraneous bytes before marker 0xd9" in damage == jpeg_damage(read(path))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(path)))


def restarts_lost(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xd0")
    return jpeg[:at] + jpeg[at + 2 :]


def zeros_in_the_scan(jpeg: bytes) -> bytes:
    at = 2 * len(jpeg) // 3
    return jpeg[:at] + bytes(200) + jpeg[at + 200 :]


@pytest.mark.parametrize("damaged", [restarts_lost, zeros_in_the_scan])
def test_damage_that_pillow_drops(damaged: Any) -> None:
    jpeg = encoded(noise(), "JPEG", restart_marker_rows=1).tobytes()
    data = np.frombuffer(damaged(jpeg), np.uint8)
    assert not decode_checked(np.frombuffer(jpeg, np.uint8)).damage
    for shrink in (1, 2):
        assert "Corrupt JPEG data" in decode_checked(data, shrink=shrink).damage


def test_metadata_is_no_damage(data: Path) -> None:
    assert not decode_checked(read(data / "jpeg-odd" / "icc-after-SOF.jpg")).damage


def test_an_exception_without_text_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "_decode_any", exhausted)
    with pytest.raises(UnreadableError, match=r"^MemoryError$"):
        decode(encoded(noise(), "PNG"))


def test_the_limit_of_pixels(odd: Path) -> None:
    data = encoded(noise(30, 40), "PNG")
    assert decode(data, Decoding(max_pixels=1200)).shape == (30, 40, 3)
    with pytest.raises(UnreadableError, match="40 x 30 pixels: more than --max-pixels 1199"):
        decode(data, Decoding(max_pixels=1199))
    with pytest.raises(UnreadableError, match="13000 x 13000 pixels: more than"):
        decode(read(odd / "169-megapixels.png"), Decoding(max_pixels=10**8))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("png-gray-16-bits-12-bit-data-X-ray-CT-0-4095.png", "uint16 values from 0 to 4095"),
        ("tiff-int16-signed-1000-3000.tif", "int16 values from -1000 to 3000"),
        ("tiff-int32-0-255.tif", "int32 values from 0 to 255"),
        ("tiff-13-bands-uint16-EuroSAT.tif", "13 bands: choose three with --bands"),
    ],
)
def test_what_is_ambiguous_is_refused(name: str, text: str, odd: Path) -> None:
    with pytest.raises(UnreadableError, match=text):
        decode(read(odd / name))


def test_depth(odd: Path) -> None:
    path = odd / "png-gray-16-bits-12-bit-data-X-ray-CT-0-4095.png"
    values = np.asarray(Image.open(path)).astype(np.float64)
    expected = np.rint(values * 255 / 4095)
    for depth in ("data", "0:4095"):
        pixels = decode(read(path), Decoding(depth=depth))
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))
    assert decode(read(path), Decoding(depth="type")).max() == 4095 >> 8
    signed = decode(read(odd / "tiff-int16-signed-1000-3000.tif"), Decoding(depth="-1000:3000"))
    assert signed.min() == 0 and signed.max() == 255
    assert decode(read(odd / "tiff-float32-0-1.tif")).max() == 255
    whole = decode(read(odd / "tiff-int32-0-255.tif"), Decoding(depth="0:255"))
    np.testing.assert_array_equal(
        whole[..., 0], np.asarray(Image.open(odd / "tiff-int32-0-255.tif"))
    )


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int16", "int32", "float32", "float64"])
def test_depth_by_type(dtype: str) -> None:
    if np.issubdtype(np.dtype(dtype), np.floating):
        values = np.array([[0.0, 0.25, 1.0]], dtype)
    else:
        info = np.iinfo(dtype)
        values = np.array([[info.min, info.min + (info.max - info.min + 1) // 4, info.max]], dtype)
    np.testing.assert_array_equal(to_uint8(values, "type"), [[0, 64, 255]])


def test_mistakes_of_depth_and_bands() -> None:
    for depth in ("12", "5:5", "9:1", "a:b", "nan:1"):
        with pytest.raises(ValueError, match="choose type, data or LOW:HIGH"):
            Decoding(depth=depth)
    for bands in ("1,2", "0,1,2", "a,b,c"):
        with pytest.raises(ValueError, match="give three numbers from 1"):
            parse_bands(bands)
    assert parse_bands("4,3,2") == (4, 3, 2) and parse_bands("") is None
    with pytest.raises(UnreadableError, match="NaN or infinity"):
        to_uint8(np.array([[0.5, np.nan]]), "type")


def test_bands(odd: Path, tmp_path: Path) -> None:
    path = odd / "tiff-13-bands-uint16-EuroSAT.tif"
    values = tifffile.imread(path)[..., [3, 2, 1]].astype(np.float64)
    pixels = decode(read(path), Decoding(bands=(4, 3, 2), depth="data"))
    expected = np.rint((values - values.min()) * 255 / (values.max() - values.min()))
    np.testing.assert_array_equal(pixels, expected)
    with pytest.raises(UnreadableError, match="13 bands, and --bands asks for 14"):
        decode(read(path), Decoding(bands=(14, 1, 2), depth="data"))
    planar = np.moveaxis(noise(), -1, 0)
    tifffile.imwrite(
        tmp_path / "planar.tif", np.concatenate([planar, planar]), planarconfig="separate"
    )
    np.testing.assert_array_equal(
        decode(read(tmp_path / "planar.tif"), Decoding(bands=(4, 5, 6))), noise()
    )


def test_the_first_frame() -> None:
    frames = [Image.fromarray(noise() // 2 + 100 * k) for k in range(2)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    data = np.frombuffer(file.getvalue(), np.uint8)
    np.testing.assert_array_equal(decode(data), np.asarray(frames[0]))
    assert count_frames(data) == 2 and count_frames(encoded(noise(), "JPEG")) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), "JPEG", exif=exif.tobytes())
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data.tobytes()))))
    np.testing.assert_array_equal(upright(decode(data), orientation), expected)
    np.testing.assert_array_equal(decode(data, Decoding(oriented=True)), expected)
    small = decode(data, Decoding(oriented=True), shrink=2)
    np.testing.assert_array_equal(small, upright(decode(data, shrink=2), orientation))
    assert exif_orientation(data) == orientation and (orientation in TURNS) == (orientation > 1)


@pytest.mark.parametrize("kind", ["byte", "doubled-exif-header", "long-big-endian"])
def test_orientations_of_every_type(kind: str, odd: Path) -> None:
    data = read(odd / f"orientation-{kind}.jpg")
    assert exif_orientation(data) == 6
    turned = decode(data, Decoding(oriented=True))
    np.testing.assert_array_equal(turned, upright(decode(data), 6))
    assert turned.shape == (320, 240, 3)
