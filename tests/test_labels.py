"""Label maps: the classes of values and colours, what files hold, and what is refused."""

import csv
import struct

import cv2
import numpy as np
import png
import pytest
import tifffile
from PIL import Image

from storage.decoding import read_image
from storage.labels import (
    ADE20K_CLASS_NAMES,
    ADE20K_PALETTE,
    IGNORE_INDEX,
    class_names_of,
    label_table,
    parse_label_values,
    raw_labels,
    read_label_map,
    read_raw_labels,
)
from storage.sizes import ADE20K_NUM_CLASSES


def test_label_rule_on_every_value():
    ade = label_table(ADE20K_NUM_CLASSES, True)
    assert ade[0] == IGNORE_INDEX and ade[255] == IGNORE_INDEX
    assert [ade[raw] for raw in range(1, 151)] == list(range(150)) and set(ade[151:255]) == {-1}
    plain = label_table(19, False)
    assert [plain[raw] for raw in range(19)] == list(range(19)) and plain[255] == IGNORE_INDEX and plain[19] == -1
    assert label_table(1, False)[0] == 0 and label_table(254, True)[254] == 253
    for num_classes, ignore_zero in ((0, True), (255, True), (256, False)):
        with pytest.raises(ValueError, match="num_classes must lie between 1 and"):
            label_table(num_classes, ignore_zero)


def test_class_names_and_colours_are_ade20ks(photographs):
    with (photographs / "meta" / "ade20k_objectInfo150.txt").open() as file:
        names = [line.rstrip("\n").split("\t")[-1].split(",")[0].strip() for line in list(file)[1:]]
    with (photographs / "meta" / "ade20k_palette150.csv").open() as file:
        colours = [[int(row[channel]) for channel in "rgb"] for row in csv.DictReader(file)]
    assert list(ADE20K_CLASS_NAMES) == names and ADE20K_PALETTE.tolist() == colours
    assert (ADE20K_CLASS_NAMES[0], ADE20K_CLASS_NAMES[149], len(names)) == ("wall", "flag", ADE20K_NUM_CLASSES)


def test_palette_label_maps_are_read_as_numbers_not_as_colours(tmp_path):
    labels = np.array([[0, 1], [150, 255]], dtype=np.uint8)
    image = Image.fromarray(labels, "P")
    image.putpalette([value for index in range(256) for value in (255 - index, 0, index)])
    image.save(tmp_path / "palette.png")
    assert read_label_map(tmp_path / "palette.png", label_table(150, True)).tolist() == [[255, 0], [149, 255]]


# -------------------------------------------------------------------------------- raw samples


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_png_below_8_bits_is_read_as_its_samples(tmp_path, bits):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % min(2**bits, 100)
    with (tmp_path / "labels.png").open("wb") as file:
        png.Writer(8, 6, greyscale=True, bitdepth=bits).write(file, labels.tolist())
    assert (read_raw_labels(tmp_path / "labels.png") == labels).all()


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("bits", [1, 8])
def test_tiff_is_read_as_its_samples_also_where_white_is_0(tmp_path, bits, photometric):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % min(2**bits, 100)
    path = tmp_path / "labels.tif"
    tifffile.imwrite(path, labels.astype(bool) if bits == 1 else labels, photometric=photometric)
    assert (tifffile.imread(path) == labels).all()
    assert (read_raw_labels(path) == labels).all()


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [2, 4])
def test_tiff_below_8_bits_is_read_as_its_samples(tmp_path, bits, photometric):
    per_byte, labels = 8 // bits, np.arange(48).reshape(6, 8) % 2**bits
    shifts = np.arange(per_byte)[::-1] * bits
    data = (labels.reshape(6, -1, per_byte) << shifts).sum(axis=2).astype(np.uint8).tobytes()
    tags = {256: 8, 257: 6, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 6, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path = tmp_path / "labels.tif"
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert (read_raw_labels(path) == labels).all()


@pytest.mark.parametrize("suffix", ["bmp", "gif", "png", "tif"])
def test_palettes_and_one_bit_maps_are_read_as_numbers(tmp_path, suffix):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % 3
    image = Image.fromarray(labels, "P")
    image.putpalette([9, 200, 40, 255, 255, 255, 0, 0, 0])
    image.save(tmp_path / f"palette.{suffix}")
    assert (read_raw_labels(tmp_path / f"palette.{suffix}") == labels).all()
    if suffix != "gif":
        Image.fromarray(labels == 1).save(tmp_path / f"one_bit.{suffix}")
        assert (read_raw_labels(tmp_path / f"one_bit.{suffix}") == (labels == 1)).all()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("RGB", r"is of mode RGB; .* give --label_values '#000000=NAME,...'; found: #000000 on 48 pixels$"),
        ("LA", "is of mode LA; a label map has one channel of class numbers, of 8 or 16 bits"),
        ("F", "has floating-point samples; a label map has one channel"),
    ],
)
def test_maps_of_more_than_one_channel_or_of_floats_are_refused(tmp_path, mode, words):
    suffix = "tif" if mode == "F" else "png"
    Image.new(mode, (8, 6)).save(tmp_path / f"labels.{suffix}")
    with pytest.raises(ValueError, match=rf"labels\.{suffix} {words}"):
        read_raw_labels(tmp_path / f"labels.{suffix}")


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_label_map_of_a_format_that_changes_colours_is_refused_also_under_another_name(tmp_path, suffix):
    Image.new("L", (8, 6)).save(tmp_path / f"map.{suffix}")
    (tmp_path / f"map.{suffix}").rename(tmp_path / "map.png")
    for colours in (False, True):
        with pytest.raises(
            ValueError, match=r"map\.png is a (JPEG|WEBP), whose compression changes values and colours"
        ):
            read_raw_labels(tmp_path / "map.png", colours=colours)


# -------------------------------------------------------------------------------- values that people have


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_values_of_16_bits_become_classes(tmp_path, suffix):
    raw = np.array([[0, 1000], [65535, 255]], dtype=np.uint16)
    Image.fromarray(raw).save(tmp_path / f"map.{suffix}")
    table = label_table(2, False, parse_label_values("0=ignore,1000=road,65535=sky,255=road"))
    assert read_label_map(tmp_path / f"map.{suffix}", table).tolist() == [[255, 0], [1, 0]]
    with pytest.raises(ValueError, match="has the label values 1000, 65535, which are no classes here"):
        read_label_map(tmp_path / f"map.{suffix}", label_table(2, False))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_become_classes(tmp_path, mode, suffix):
    classes = np.random.default_rng(0).integers(0, 3, (6, 8))
    palette = np.array([[255, 0, 127], [0, 0, 0], [1, 2, 3]], dtype=np.uint8)
    if mode == "P":
        image = Image.fromarray(classes.astype(np.uint8), "P")
        image.putpalette(palette.tobytes())
    else:
        image = Image.fromarray(palette[classes]).convert(mode)
    if mode == "RGBA":
        image.putalpha(0)  # transparent pixels have their colour still
    image.save(tmp_path / f"map.{suffix}")
    table = label_table(3, False, parse_label_values("#FF007F=cat,#000000=dog,#010203=cow"))
    assert (read_label_map(tmp_path / f"map.{suffix}", table) == classes).all()
    with pytest.raises(ValueError, match="has the label values #010203, which are no classes here"):
        read_label_map(tmp_path / f"map.{suffix}", label_table(2, False, parse_label_values("#ff007f=a,#000000=b")))


def test_colours_of_16_bits_are_refused(tmp_path):
    with (tmp_path / "map.png").open("wb") as file:
        png.Writer(8, 6, greyscale=False, bitdepth=16).write(file, np.zeros((6, 24), dtype=int).tolist())
    with pytest.raises(ValueError, match="colours of label maps have 8 bits a channel"):
        read_raw_labels(tmp_path / "map.png", colours=True)


def test_label_values_come_from_the_command_line_or_a_file(tmp_path):
    expected = {"0": "background", "255": "cell, living", "7": "ignore"}
    file = tmp_path / "values=mine.tsv"
    file.write_text("0\tbackground\n\n 255 \tcell, living\r\n07\tignore\n", encoding="utf-8-sig")
    assert parse_label_values(str(file)) == expected and class_names_of(expected) == ["background", "cell, living"]
    assert parse_label_values("0=background, 255 = a=b") == {"0": "background", "255": "a=b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0=a,b", "has 'b', which is no VALUE=NAME; --label_values takes VALUE=NAME,VALUE=NAME"),
        ("0=a,-1=b", "has '-1=b', which is no VALUE=NAME"),
        ("0=a,65536=b", "has '65536=b', which is no"),
        ("0=a,#ff00=b", "has '#ff00=b', which is no"),
        ("0=a,1=", "has '1=', which is no"),
        ("0=a,00=b", "has 0 twice, as a and as b; keep one"),
        ("0=a,#ff0000=b", "mixes numbers and colours"),
        ("0=ignore,1=cell", "names 1 classes .*; 2 to 255 are possible"),
        ("nowhere.tsv", r"nowhere\.tsv cannot be read \(No such file or directory\); --label_values takes"),
    ],
)
def test_label_values_that_cannot_be_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_label_values(text)


def test_raw_labels_are_those_of_the_training():
    classes = np.array([[0, 1], [1, 0]])
    assert raw_labels(classes, {"ignore_zero": True}).tolist() == [[1, 2], [2, 1]]
    for text in ("0=a,255=b", "7=ignore,0=a,1000=b,2=b", "#ff0000=a,#0102ff=b"):
        given = parse_label_values(text)
        written = raw_labels(classes, {"ignore_zero": False, "label_values": given})
        table = label_table(2, False, given)
        if written.ndim == 3:
            assert written.dtype == np.uint8
            written = written.astype(int) @ [1 << 16, 1 << 8, 1]
        assert (table[written] == classes).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_bmp_label_map_of_two_colours_that_pillow_misreads_is_refused(tmp_path, bits):
    labels = np.random.default_rng(0).integers(0, 2, (13, 16), dtype=np.uint8)
    rows = labels[::-1] if bits == 8 else (labels[::-1, ::2] << 4 | labels[::-1, 1::2]).astype(np.uint8)
    pixels, palette = rows.tobytes(), bytes(4) + b"\xff\xff\xff\0"
    info = struct.pack("<IiiHHIIiiII", 40, 16, 13, 1, bits, 0, len(pixels), 0, 0, 2, 2)
    place = 14 + len(info) + len(palette)
    head = struct.pack("<2sIHHI", b"BM", place + len(pixels), 0, 0, place)
    (tmp_path / "labels.bmp").write_bytes(head + info + palette + pixels)
    assert (cv2.imread(str(tmp_path / "labels.bmp"), cv2.IMREAD_GRAYSCALE) == labels * 255).all()
    with pytest.raises(ValueError, match=rf"labels\.bmp.* is a BMP of {bits} bits with two colours: save it as PNG"):
        read_raw_labels(tmp_path / "labels.bmp")
    with pytest.raises(ValueError, match="with two colours"):
        read_image(tmp_path / "labels.bmp")


def test_tiff_label_map_that_is_lossy_or_signed_is_refused(tmp_path):
    Image.new("L", (16, 16), 3).save(tmp_path / "lossy.tif", compression="jpeg")
    tifffile.imwrite(tmp_path / "signed.tif", np.full((6, 8), -1, np.int8))
    for name, words in (
        ("lossy", "is compressed as .*, which makes up class numbers"),
        ("signed", "has signed samples"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.tif {words}"):
            read_raw_labels(tmp_path / f"{name}.tif")
