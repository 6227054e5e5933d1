"""Bytes to pixels: hand-made files, and the same pixels from every decoder."""

import io
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps
from test_dataset import build_dataset, read_manifest

import dataset
import storage.lists
from dataset import SampleKey, StepSampler, build_training_loader
from storage import decoding
from storage.decoding import (
    DECODE_ERRORS,
    MAX_FILE_BYTES,
    Area,
    JPEGPicture,
    NamedBytes,
    describe_decoder,
    open_picture,
    read_image,
)


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
def test_read_image_opens_every_named_format(tmp_path, suffix):
    path = save(Image.new("RGB", (6, 4), (200, 200, 200)), tmp_path / f"image.{suffix}")
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.asarray(image).astype(int) - 200).max() <= 2


def test_read_image_turns_a_rotated_photograph_upright(tmp_path):
    stored = Image.new("RGB", (40, 20), "black")
    stored.paste("white", (0, 0, 20, 20))  # left half white; turned a quarter clockwise it is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.asarray(read_image(save(stored, tmp_path / "turned.jpg", exif=exif)))
    assert image.shape == (40, 20, 3)
    assert image[:15].min() > 240 and image[-15:].max() < 15


def test_read_image_scales_16_bit_grey(tmp_path):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(values), tmp_path / "deep.png")
    assert np.asarray(read_image(path))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_read_image_scales_float_grey(tmp_path):
    path = save(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), tmp_path / "float.tiff")
    assert np.asarray(read_image(path, channels=1))[0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.float32([[0, 51, 200]]), "values 0 to 200 have no known black and white: give --value_range LOW HIGH"),
        (np.float32([[0, 0.5, np.nan]]), "values 0 to 0.5 and 1 that are not finite"),
        (np.float32([[np.nan, np.inf]]), "no finite values and 2 that are not finite"),
        (np.int16([[-1000, 3000]]), "values -1000 to 3000 have no known"),
        (np.int32([[0, 255]]), "values 0 to 255 have no known"),
        (np.int8([[-1, -128, 5]]), "signed samples have no known black and white"),
    ],
)
def test_values_without_a_known_black_and_white_are_refused(tmp_path, values, words):
    tifffile.imwrite(tmp_path / "image.tif", values)
    with pytest.raises(ValueError, match=words):
        read_image(tmp_path / "image.tif", channels=1)


def test_16_bit_grey_with_white_as_0_is_seen_as_in_8_bits(tmp_path):
    grey = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    tifffile.imwrite(tmp_path / "8.tif", 255 - grey, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "16.tif", (255 - grey.astype(np.uint16)) * 257, photometric="miniswhite")
    for name in ("8.tif", "16.tif"):
        assert (np.asarray(read_image(tmp_path / name, channels=1)) == grey).all()


def test_read_image_lays_transparent_pixels_on_white(tmp_path):
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 0))
    path = save(rgba, tmp_path / "clear.png")
    assert np.asarray(read_image(path))[0].tolist() == [[255, 0, 0], [255, 255, 255]]
    assert np.asarray(read_image(path, channels=4))[0, 1].tolist() == [0, 0, 0, 0]
    palette = save(rgba.convert("P"), tmp_path / "palette.png", transparency=rgba.convert("P").getpixel((1, 0)))
    assert np.asarray(read_image(palette))[0, 1].tolist() == [255, 255, 255]


def test_read_image_shows_cmyk_in_its_colours(tmp_path):
    path = save(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), tmp_path / "cyan.jpg")
    red, green, blue = np.asarray(read_image(path))[4, 4]
    assert red < 60 and green > 120 and blue > 120


def test_read_image_gives_the_asked_number_of_channels(tmp_path):
    path = save(Image.new("RGB", (5, 5), "red"), tmp_path / "red.png")
    assert [np.asarray(read_image(path, channels=c)).shape for c in (1, 3, 4)] == [(5, 5), (5, 5, 3), (5, 5, 4)]


def test_read_image_refuses_decompression_bombs_before_decoding(tmp_path, monkeypatch):
    path = save(Image.new("L", (100, 100)), tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)  # Pillow alone only warns up to twice its limit
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(Image.DecompressionBombError, match="100 x 100"):
        read_image(path)


def test_read_image_refuses_formats_that_are_not_pictures_of_ours(tmp_path):
    path = tmp_path / "program.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DECODE_ERRORS):
        read_image(path)


def test_every_awkward_file_decodes_or_is_refused_as_its_manifest_says(photographs):
    manifest = read_manifest(photographs)
    assert len(manifest) >= 40
    wrong = []
    for name, row in manifest.items():
        try:
            image = read_image(photographs / "bad_images" / name)
        except DECODE_ERRORS:
            decoded = "no"
        else:
            decoded = "yes"
            width, height = (int(side) for side in row["size"].split("x"))
            turned = row["exif_orientation"] in {"5", "6", "7", "8"}
            assert image.size == ((height, width) if turned else (width, height)), name
        if decoded != row["decodable"]:
            wrong.append(name)
    assert not wrong


@pytest.fixture(params=["nvimgcodec", "torchcodec", "Pillow"])
def decoder(request, monkeypatch):
    """What decodes training crops, where it is installed."""
    if request.param == "nvimgcodec" and decoding.load_nvimgcodec() is None:
        pytest.skip("nvimgcodec is not installed")
    if request.param == "torchcodec" and decoding.decode_jpeg is None:
        pytest.skip("torchcodec is not installed")
    if request.param != "nvimgcodec":
        monkeypatch.setattr(decoding, "load_nvimgcodec", lambda: None)
    if request.param == "Pillow":
        monkeypatch.setattr(decoding, "decode_jpeg", None)
    return request.param


def encode(image: Image.Image, image_format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def draw_picture(mode: str = "RGB", size: tuple[int, int] = (90, 70)) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 15, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def pixels_of(picture, area) -> np.ndarray:
    pixels = picture.cut(area).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


AREAS = [Area(0, 0, 70, 90), Area(0, 0, 1, 1), Area(13, 21, 40, 33), Area(69, 0, 1, 90), Area(31, 47, 39, 43)]


PLAIN_JPEGS = {
    "4:2:0": dict(subsampling="4:2:0"),
    "4:2:2": dict(subsampling="4:2:2"),
    "4:4:4": dict(subsampling="4:4:4", quality=30),
    "progressive": dict(progressive=True),
    "restarts": dict(restart_marker_blocks=3),
    "RGB": dict(keep_rgb=True),
}


@pytest.mark.parametrize("name", PLAIN_JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_decoder_gives_pillows_pixels_bit_for_bit(decoder, name, mode, channels):
    options = {key: value for key, value in PLAIN_JPEGS[name].items() if mode == "RGB" or key != "keep_rgb"}
    data = encode(draw_picture(mode), **options)
    whole = np.asarray(read_image(io.BytesIO(data), channels))
    for area in AREAS:
        encoded = open_picture(NamedBytes(data, "x"), channels)
        for picture in (encoded, encoded.decoded()):
            expected = whole[area.top : area.top + area.height, area.left : area.left + area.width]
            assert np.array_equal(pixels_of(picture, area), expected), area


def test_every_decoder_takes_and_refuses_the_same_awkward_files(decoder, photographs):
    for path in sorted((photographs / "bad_images").iterdir()):
        try:
            expected = np.asarray(read_image(path))
        except DECODE_ERRORS as error:
            with pytest.raises(type(error)) as refusal:
                open_picture(NamedBytes(path.read_bytes(), str(path))).decoded()
            assert str(refusal.value) == str(error)
        else:
            picture = open_picture(NamedBytes(path.read_bytes(), str(path)))
            height, width = expected.shape[:2]
            area = Area(height // 3, width // 4, height - height // 3, width // 2 + 1)
            cut = expected[area.top :, area.left : area.left + area.width]
            assert np.array_equal(pixels_of(picture, area), cut[:, : area.width]), path.name


@pytest.mark.parametrize("name", ["rotated", "CMYK", "palette", "16-bit", "transparent", "disguised"])
def test_what_decoders_might_see_differently_is_left_to_pillow(name, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "rotated": encode(draw_picture(), exif=exif),
        "CMYK": encode(draw_picture("CMYK")),
        "palette": encode(draw_picture("P"), "PNG"),
        "16-bit": encode(Image.fromarray(np.full((70, 90), 30_000, dtype=np.uint16)), "PNG"),
        "transparent": encode(draw_picture("RGBA"), "PNG"),
        "disguised": encode(draw_picture(), "WEBP"),
    }[name]
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *_, **__: pytest.fail("torchcodec was asked"))
    picture = open_picture(NamedBytes(data, "name.jpg"))
    assert np.array_equal(picture.decoded().pixels.permute(1, 2, 0), read_image(io.BytesIO(data)))


def test_orientations_that_only_torchcodec_would_read_are_left_to_pillow(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        encode(draw_picture(), exif=exif).replace(b"Exif\0\0", b"Exit\0\0"),
        encode(draw_picture(), xmp=b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'),
    ):
        expected = np.asarray(read_image(io.BytesIO(data)))
        assert np.array_equal(open_picture(NamedBytes(data, "x")).decoded().pixels.permute(1, 2, 0), expected)


def test_plain_jpegs_are_not_decoded_by_pillow(decoder, monkeypatch):
    if decoder == "Pillow":
        pytest.skip("it is Pillow's turn")
    data = encode(draw_picture())
    monkeypatch.setattr(decoding, "read_image", lambda *_: pytest.fail("Pillow was asked"))
    picture = open_picture(NamedBytes(data, "x"))
    assert isinstance(picture, JPEGPicture)
    if decoder == "nvimgcodec":
        monkeypatch.setattr(decoding, "decode_jpeg", lambda *_, **__: pytest.fail("torchcodec was asked"))
        picture.cut(Area(5, 5, 20, 20))
    else:
        picture.decoded()


@pytest.mark.parametrize("damage", ["cut off", "cut off and closed by an end", "a marker in between"])
def test_damage_below_the_crop_counts_as_in_pillow(decoder, damage):
    data = encode(draw_picture(size=(200, 400)), quality=95)
    place = len(data) * 3 // 4
    data = {
        "cut off": data[:place],
        "cut off and closed by an end": data[:place] + b"\xff\xd9",
        "a marker in between": data[:place] + b"\xff\xc7\x00\x04" + data[place:],
    }[damage]
    area = Area(3, 5, 60, 70)
    try:
        expected = np.asarray(read_image(io.BytesIO(data)))[3:63, 5:75]
    except DECODE_ERRORS:
        with pytest.raises(DECODE_ERRORS):
            open_picture(NamedBytes(data, "x")).cut(area)
    else:
        assert damage == "cut off and closed by an end"
        assert np.array_equal(pixels_of(open_picture(NamedBytes(data, "x")), area), expected)


def test_bombs_are_refused_before_any_decoder_sees_them(decoder, monkeypatch):
    data = encode(draw_picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6_299)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(Image.DecompressionBombError, match="90 x 70"):
        open_picture(NamedBytes(data, "x"))


def test_errors_name_the_file_and_not_a_place_in_memory():
    with pytest.raises(OSError, match=r"^cannot identify image file 'folder/name\.jpg'$"):
        open_picture(NamedBytes(b"<html>404</html>", "folder/name.jpg"))


def test_samples_and_replacements_are_the_same_with_every_decoder(decoder, image_folder, monkeypatch):
    bad = image_folder / "train" / "cats" / "003.jpg"
    bad.write_bytes(bad.read_bytes()[:-20])  # the header is sound: the failure comes after a crop may have been drawn
    data = build_dataset(image_folder)
    samples = [data[SampleKey(epoch, index)] for epoch in range(3) for index in range(24)]
    assert sum(len(sample.bad_files) for sample in samples) >= 3
    monkeypatch.setattr(decoding, "decode_jpeg", None)
    monkeypatch.setattr(decoding, "load_nvimgcodec", lambda: None)
    for sample in samples:
        expected = data[sample.key]
        assert torch.equal(sample.image, expected.image) and sample.bad_files == expected.bad_files


def test_pillow_takes_over_where_a_decoder_gives_another_size(monkeypatch):
    data = encode(draw_picture())
    monkeypatch.setattr(decoding, "decode_jpeg", lambda *_, **__: torch.zeros(3, 90, 70, dtype=torch.uint8))
    picture = open_picture(NamedBytes(data, "x")).decoded()
    assert np.array_equal(picture.pixels.permute(1, 2, 0), read_image(io.BytesIO(data)))


def test_decoder_works_in_forked_workers_after_it_was_used(decoder, image_folder):
    data, sampler = build_dataset(image_folder), StepSampler(24, 4)
    expected = [torch.stack([data[key].image for key in keys]) for keys in sampler]
    loader = build_training_loader(data, sampler, 2, pin_memory=False)
    assert all(torch.equal(batch.images, images) for batch, images in zip(loader, expected, strict=True))


def test_without_torchcodec_pillow_decodes():
    program = (
        "import sys; sys.modules['torchcodec'] = None; from storage import decoding; print(decoding.describe_decoder())"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dataset.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "Pillow (faster with: pip install torchcodec)" in done.stdout


def test_decoder_is_named_as_it_is(decoder):
    assert describe_decoder().startswith({"nvimgcodec": "nvimgcodec (only the crop), "}.get(decoder, decoder))


def test_crops_of_one_decoded_image_are_those_of_each_key_alone(decoder, image_folder, monkeypatch):
    sampler = StepSampler(24, 8, crops_per_image=4)
    data, alone = build_dataset(image_folder, keep_decoded=True), build_dataset(image_folder)
    opened = []
    monkeypatch.setattr(storage.lists, "open_picture", lambda *args: opened.append(args) or open_picture(*args))
    samples = [data[key] for keys in sampler for key in keys]
    assert len(opened) == len(samples) // 4
    assert all(torch.equal(sample.image, alone[sample.key].image) for sample in samples)
    assert len({sample.image.numpy().tobytes() for sample in samples}) == len(samples)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3)])
@pytest.mark.parametrize("flag", range(1, 9))
def test_rotated_tiff_has_its_rows_in_order(tmp_path, flag, shape, compression):
    stored, path = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape), tmp_path / "image.tif"
    tifffile.imwrite(path, stored, extratags=[(274, 3, 1, flag, True)], compression=compression)
    channels = shape[2] if len(shape) == 3 else 1
    assert (np.asarray(read_image(path, channels, rotate=False)) == stored).all()
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = flag
    seen = ImageOps.exif_transpose(image)
    assert (np.asarray(read_image(path, channels)) == np.asarray(seen)).all()


def test_sparse_file_of_impossible_size_is_refused_unread(tmp_path):
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(OSError, match=r"sparse\.jpg has 1,073,741,825 bytes; an image file has at most"):
        read_image(path)


def test_12_bit_grey_is_seen_in_all_its_brightness(tmp_path):
    values = np.array([[0, 1000, 2048, 4095]])
    data = bytes([0 >> 4, 0 << 4 | 1000 >> 8, 1000 & 255, 2048 >> 4, (2048 & 15) << 4 | 4095 >> 8, 4095 & 255])
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    (tmp_path / "image.tif").write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    expected = (values * 255 / 4095).round()
    assert (np.asarray(read_image(tmp_path / "image.tif", channels=1)) == expected).all()
