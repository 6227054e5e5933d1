"""Images in their own units: the values of tifffile, pypng and numpy, whole and cut, and files that are refused."""

import importlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import png
import pytest
import tifffile
import torch
from PIL import Image
from test_pairs import TURN

from storage.bands import MAX_BYTES, describe_pages, open_values, value_percentiles
from storage.decoding import Area, NamedBytes, read_image
from storage.lists import list_images
from storage.values import build_values

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
            assert np.array_equal(picture.cut(AREA).float().numpy(), cut, equal_nan=True)
            whole = picture.cut(Area(0, 0, picture.height, picture.width))
            assert np.array_equal(whole.float().numpy(), expected, equal_nan=True)
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
    before = resident_bytes()
    picture = open_values(path, 4)
    assert (picture.cut(AREA) == 7).all()
    assert resident_bytes() - before < 16 << 20  # of 256 MB
    del picture


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
    assert (open_values(tmp_path / "image.tif", 1, rotate=False).whole()[0].numpy() == values).all()
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
    data, bands = file.getvalue(), values.transpose(2, 0, 1)
    for place in (8 + 25, len(data) - 12):  # behind signature and IHDR; before IEND
        (tmp_path / "image.png").write_bytes(data[:place] + chunk + data[place:])
        check_values(tmp_path / "image.png", channels, np.stack([TURN[flag](band) for band in bands]))
        stored = open_values(tmp_path / "image.png", channels, rotate=False).whole()
        assert (stored.numpy() == bands).all()


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
        (np.zeros((8, W)), 8, "has 1 bands, --input_channels is 8"),
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


@pytest.mark.parametrize(
    "name", ["tiff_4band/nir_ex0.tif", "tiff_values/f300.tif", "tiff_values/fnan.tif", "tiff_values/s16.tif"]
)
def test_cases_of_values_from_practice(cases, name):
    stored = np.atleast_3d(tifffile.imread(cases / name)).transpose(2, 0, 1)
    check_values(cases / name, len(stored), stored)
    with pytest.raises(ValueError, match="--value_range"):  # no 8-bit picture, and not a black one
        read_image(cases / name, len(stored))


def test_files_of_several_pages_are_said_to_be_read_as_their_first(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((3, 5, 6), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "one.tif", np.zeros((5, 6), np.uint8))
    frames = [Image.new("L", (4, 4), level) for level in (0, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert describe_pages(list_images(tmp_path)) == "2 of 3 files looked at have several, of which the first is read"
    (tmp_path / "stack.tif").unlink()
    (tmp_path / "moving.gif").unlink()
    assert describe_pages(list_images(tmp_path)) == ""


def test_values_that_32_bits_would_make_equal_stay_apart(tmp_path):
    np.save(tmp_path / "far.npy", 4_500_000 + 0.05 * np.arange(16.0).reshape(4, 4))
    np.save(tmp_path / "large.npy", np.array([[16_777_216, 16_777_217]], np.int32))
    mapped = build_values("own", (4_500_000.0,), (0.25,))(open_values(tmp_path / "far.npy", 1).whole())
    assert mapped.dtype == torch.float32 and np.abs(mapped.flatten().numpy() - 0.2 * np.arange(16)).max() < 1e-6
    mapped = build_values((16_777_216.0, 16_777_218.0), (0.0,), (1.0,))(open_values(tmp_path / "large.npy", 1).whole())
    assert mapped.flatten().tolist() == [0, 0.5]


def test_what_a_geotiff_calls_no_data_is_none(tmp_path):
    values = draw_values((H, W), "int16")
    values[:3] = -9999
    for bands in (1, 4):
        stored = np.repeat(values[None], bands, axis=0)
        options = dict(photometric="minisblack", planarconfig="separate" if bands > 1 else None)
        tifffile.imwrite(
            tmp_path / "dem.tif", stored if bands > 1 else values, extratags=[(42113, 2, 0, "-9999", True)], **options
        )
        assert open_values(tmp_path / "dem.tif", bands).no_data == -9999
        check_values(tmp_path / "dem.tif", bands, np.where(stored == -9999, np.nan, stored))


def test_rows_written_as_pages_are_named_also_where_a_range_is_looked_for(tmp_path):
    tifffile.imwrite(tmp_path / "tile.tif", np.zeros((H, W, 13), "uint16"))  # which tifffile takes for H pages
    words = rf"none of 1 images looked at can be read; .*tile.tif has {H} pages of shape \({W}, 13\); 13 pages or bands"
    with pytest.raises(ValueError, match=words):
        value_percentiles(list_images(tmp_path), 13)


def test_masks_and_smaller_copies_in_a_tiff_are_no_bands(tmp_path):
    values = draw_values((H, W), "uint16")
    with tifffile.TiffWriter(tmp_path / "masked.tif") as tiff:
        tiff.write(values, photometric="minisblack")
        tiff.write(np.full((H, W), True), photometric="mask", subfiletype=4)
    check_values(tmp_path / "masked.tif", 1, values[None])
    with pytest.raises(ValueError, match="has 1 bands, --input_channels is 2"):
        open_values(tmp_path / "masked.tif", 2)
    with tifffile.TiffWriter(tmp_path / "overviews.tif") as tiff:
        tiff.write(values, photometric="minisblack")
        for step in (2, 4):
            tiff.write(values[::step, ::step], photometric="minisblack", subfiletype=1)
    check_values(tmp_path / "overviews.tif", 3, np.repeat(values[None], 3, axis=0))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg"])
@pytest.mark.parametrize("mode", ["RGB", "YCbCr", "LAB", "CMYK", "RGBA", "P", "1"])
def test_colours_of_8_bits_are_those_of_the_picture(tmp_path, mode, compression):
    if compression == "jpeg" and mode not in ("RGB", "YCbCr"):
        return
    picture = Image.fromarray(draw_values((16, 16, 3), "uint8"))
    source = picture.convert(mode) if mode != "LAB" else Image.frombytes("LAB", (16, 16), picture.tobytes())
    source.save(tmp_path / "image.tif", compression=compression)
    expected = np.asarray(read_image(tmp_path / "image.tif", 3)).transpose(2, 0, 1)
    assert (open_values(tmp_path / "image.tif", 3).whole().numpy() == expected).all()


def test_samples_that_are_no_real_numbers_and_pages_of_several_sizes_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "radar.tif", np.ones((5, 6), np.complex64))
    with pytest.raises(ValueError, match=r"radar\.tif: tifffile cannot read it \(samples of complex64\)"):
        open_values(tmp_path / "radar.tif", 1)
    with tifffile.TiffWriter(tmp_path / "mixed.tif") as tiff:
        for size in (5, 6):
            tiff.write(np.zeros((size, size), np.uint16), photometric="minisblack")
    with pytest.raises(ValueError, match="pages of several sizes"):
        open_values(tmp_path / "mixed.tif", 2)


def test_reader_that_a_compression_lacks_makes_a_bad_file(tmp_path, monkeypatch):
    tifffile.imwrite(
        tmp_path / "bands.tif", draw_values((4, H, W), "uint16"), photometric="minisblack", planarconfig="separate"
    )

    def fail(page):
        raise ModuleNotFoundError("No module named 'compression'")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", fail)
    with pytest.raises(ValueError, match=r"bands\.tif: tifffile cannot read it .*pip install imagecodecs"):
        open_values(tmp_path / "bands.tif", 4)


def test_npy_in_memory_is_as_long_as_its_header_says(tmp_path):
    np.save(tmp_path / "image.npy", np.zeros((3, 4), np.uint8))
    data = (tmp_path / "image.npy").read_bytes() + b"\0"
    with pytest.raises(ValueError, match="more bytes of values"):
        open_values(NamedBytes(data, "image.npy"), 1)
