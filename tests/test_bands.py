"""Images in their own units: the values of tifffile, pypng and numpy, whole and cut, and files that are refused."""

import importlib
import io
import os
import struct
import zlib

import numpy as np
import png
import pytest
import tifffile
from PIL import Image
from test_pairs import TURN

from storage.bands import MAX_BYTES, open_values
from storage.decoding import Area, NamedBytes

H, W = 9, 14
AREA = Area(2, 3, 4, 5)


def draw_values(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    generator = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return generator.normal(100, 1000, shape).astype(dtype)
    limits, native = np.iinfo(dtype), np.dtype(dtype).newbyteorder("=")
    return generator.integers(limits.min, limits.max, shape, dtype=native, endpoint=True).astype(dtype)


def check_values(path, channels: int, expected: np.ndarray) -> None:
    """Compare (C, H, W) with what is read from the file and from memory, cut and whole."""
    expected = expected.astype(np.float32)
    for source in (path, NamedBytes(path.read_bytes(), str(path))):
        picture = open_values(source, channels)
        assert (picture.height, picture.width) == expected.shape[1:]
        cut = expected[:, AREA.top : AREA.top + AREA.height, AREA.left : AREA.left + AREA.width]
        for _ in range(2):
            assert np.array_equal(picture.cut(AREA).numpy(), cut, equal_nan=True)
            whole = picture.cut(Area(0, 0, picture.height, picture.width))
            assert np.array_equal(whole.numpy(), expected, equal_nan=True)
            picture = picture.decoded()


@pytest.mark.parametrize(
    "dtype", ["uint8", "int16", "uint16", "uint32", "int64", "float16", "float32", "float64", ">u2"]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_in_every_type_and_order(tmp_path, dtype, order):
    for shape, channels in (((H, W), 1), ((H, W, 1), 1), ((H, W, 13), 13), ((13, H, W), 13), ((H, W), 3)):
        values = draw_values(shape, dtype)
        np.save(tmp_path / "image.npy", np.asarray(values, order=order))
        bands = (
            values[None] if values.ndim == 2 else values if channels == 13 == shape[0] else values.transpose(2, 0, 1)
        )
        check_values(tmp_path / "image.npy", channels, np.broadcast_to(bands, (channels, H, W)))


def test_crop_of_a_npy_file_leaves_the_rest_of_it_unread(tmp_path):
    path = tmp_path / "image.npy"
    values = np.lib.format.open_memmap(path, "w+", np.float32, (4000, 4000, 4))
    values[2:6, 3:8] = 7
    values.flush()
    del values
    os.sync()
    before = dict(line.split(":") for line in open("/proc/self/io").read().splitlines())
    assert (open_values(path, 4).cut(AREA) == 7).all()
    after = dict(line.split(":") for line in open("/proc/self/io").read().splitlines())
    assert int(after["rchar"]) - int(before["rchar"]) < 1 << 20  # of 256 MB


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_tiff_of_many_bands(tmp_path, dtype, planar, compression):
    values = draw_values((13, H, W), dtype)
    data = values if planar == "separate" else values.transpose(1, 2, 0)
    tifffile.imwrite(
        tmp_path / "image.tif", data, planarconfig=planar, photometric="minisblack", compression=compression
    )
    assert tifffile.imread(tmp_path / "image.tif").shape == data.shape
    check_values(tmp_path / "image.tif", 13, values)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
)
def test_tiff_of_one_band(tmp_path, dtype, photometric):
    values = draw_values((H, W), dtype)
    tifffile.imwrite(tmp_path / "image.tif", values, photometric=photometric)
    assert np.array_equal(tifffile.imread(tmp_path / "image.tif"), values)
    check_values(tmp_path / "image.tif", 1, values[None])
    check_values(tmp_path / "image.tif", 3, np.broadcast_to(values, (3, H, W)))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("flag", range(1, 9))
def test_rotated_tiff(tmp_path, flag, dtype):
    values = draw_values((H, W), dtype)
    tifffile.imwrite(tmp_path / "image.tif", values, extratags=[(274, 3, 1, flag, True)])
    turned = TURN[flag](values)
    check_values(tmp_path / "image.tif", 1, turned[None])
    bands = np.stack([values, values, values, values + 1])
    tifffile.imwrite(
        tmp_path / "image.tif",
        bands,
        planarconfig="separate",
        photometric="minisblack",
        extratags=[(274, 3, 1, flag, True)],
    )
    check_values(tmp_path / "image.tif", 4, np.stack([turned] * 3 + [turned + values.dtype.type(1)]))


def test_tiff_with_a_band_beyond_the_colours_and_with_a_band_a_page(tmp_path):
    values = draw_values((H, W, 4), "uint8")
    tifffile.imwrite(tmp_path / "image.tif", values, photometric="rgb", extrasamples=["unspecified"])
    check_values(tmp_path / "image.tif", 4, values.transpose(2, 0, 1))
    pages = draw_values((5, H, W), "uint16")
    tifffile.imwrite(tmp_path / "pages.tif", pages, photometric="minisblack")
    check_values(tmp_path / "pages.tif", 5, pages)
    check_values(tmp_path / "pages.tif", 1, pages[:1])


def test_tiff_of_12_bits(tmp_path):
    values = np.arange(H * W).reshape(H, W) * 31 % 4096
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    data = packed.astype(np.uint8).tobytes()
    tags = {256: W, 257: H, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: H, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path = tmp_path / "image.tif"
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    check_values(path, 1, values[None])


@pytest.mark.parametrize(("channels", "bits"), [(1, 8), (1, 16), (3, 8), (3, 16), (4, 16)])
def test_png_of_8_and_16_bits(tmp_path, channels, bits):
    values = draw_values((H, W, channels), f"uint{bits}")
    with (tmp_path / "image.png").open("wb") as file:
        writer = png.Writer(W, H, greyscale=channels == 1, alpha=channels == 4, bitdepth=bits)
        writer.write(file, values.reshape(H, -1).tolist())
    check_values(tmp_path / "image.png", channels, values.transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flag", range(1, 9))
def test_rotated_png_of_16_bits(tmp_path, flag, channels):
    values, file = draw_values((H, W, channels), "uint16"), io.BytesIO()
    png.Writer(W, H, greyscale=channels == 1, bitdepth=16).write(file, values.reshape(H, -1).tolist())
    exif = Image.Exif()
    exif[0x0112] = flag
    content = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    data, place = file.getvalue(), 8 + 25  # behind signature and IHDR
    (tmp_path / "image.png").write_bytes(data[:place] + chunk + data[place:])
    bands = values.transpose(2, 0, 1)
    check_values(tmp_path / "image.png", channels, np.stack([TURN[flag](band) for band in bands]))


def test_photographs_are_the_values_of_their_pictures(tmp_path):
    image = Image.fromarray(draw_values((H, W, 3), "uint8"))
    image.save(tmp_path / "image.jpg")
    check_values(tmp_path / "image.jpg", 3, np.asarray(Image.open(tmp_path / "image.jpg")).transpose(2, 0, 1))


# -------------------------------------------------------------------------------- what is refused


def save_npy(path, values: np.ndarray) -> None:
    np.save(path, values, allow_pickle=True)


@pytest.mark.parametrize(
    ("values", "channels", "words"),
    [
        (np.zeros((H, W, 4)), 3, r"is of shape \(9, 14, 4\); \(H, W, 3\) or \(3, H, W\) is needed"),
        (np.zeros((H, W)), 4, "has 1 bands, --input_channels is 4"),
        (np.zeros((3, W, 3)), 3, r"may hold its 3 bands first or last"),
        (np.zeros((2, 2, 2, 2)), 2, "is of shape"),
        (np.zeros(5), 1, "is of shape"),
        (np.zeros((0, 4)), 1, "values|1 at least"),
        (np.zeros((H, W), complex), 1, "holds complex128; values are"),
        (np.array([[{}]], dtype=object), 1, "objects?|allow_pickle"),
    ],
)
def test_npy_that_is_no_image_is_refused(tmp_path, values, channels, words):
    save_npy(tmp_path / "image.npy", values)
    for source in (tmp_path / "image.npy", NamedBytes((tmp_path / "image.npy").read_bytes(), "image.npy")):
        with pytest.raises(ValueError, match=words):
            open_values(source, channels)


@pytest.mark.parametrize("change", ["cut", "longer", "header", "version"])
def test_npy_that_is_damaged_is_refused(tmp_path, change):
    file = io.BytesIO()
    np.save(file, np.zeros((H, W), np.uint16))
    data = file.getvalue()
    data = {
        "cut": data[:-1],
        "longer": data + b"\0",
        "header": data.replace(b"(9, 14)", b"(9,9**9)"),
        "version": data[:6] + b"\x09" + data[7:],
    }[change]
    (tmp_path / "image.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"values|version|malformed"):
        open_values(tmp_path / "image.npy", 1)


def test_impossible_sizes_are_refused_before_memory_is_taken(tmp_path):
    values = np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.uint8, (MAX_BYTES // 4 + 1, 1))
    del values  # sparse
    with pytest.raises(ValueError, match="values at most"):
        open_values(tmp_path / "image.npy", 1)


def test_tiff_that_pillow_would_change_asks_for_tifffile(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "bands.tif", draw_values((H, W, 4), "uint16"), photometric="minisblack")
    tifffile.imwrite(tmp_path / "grey.tif", draw_values((H, W), "uint16"))
    import_module = importlib.import_module

    def refuse(name, *args):
        if name == "tifffile":
            raise ImportError(name)
        return import_module(name, *args)

    monkeypatch.setattr("storage.bands.importlib.import_module", refuse)
    with pytest.raises(ValueError, match=r"bands\.tif has .*needs another reader: pip install tifffile"):
        open_values(tmp_path / "bands.tif", 4)
    assert open_values(tmp_path / "grey.tif", 1).height == H
