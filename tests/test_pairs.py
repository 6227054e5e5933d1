"""Images with label maps: rules of label values, pairing, checks and their memory."""

import csv
import os
import struct
from pathlib import Path

import cv2
import numpy as np
import png
import pytest
import tifffile
from PIL import Image

import storage.pairs
from storage.decoding import read_image
from storage.lists import ListCache
from storage.pairs import (
    ADE20K_CLASS_NAMES,
    ADE20K_NUM_CLASSES,
    ADE20K_PALETTE,
    IGNORE_INDEX,
    PairCheck,
    PairSurvey,
    check_pairs,
    count_classes,
    describe_labels,
    label_table,
    list_pairs,
    read_label_map,
    read_raw_labels,
    refuse_one_class,
)


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


def write_pair(root: Path, split: str, stem: str, labels: np.ndarray, size: tuple[int, int] | None = None) -> None:
    for kind in ("images", "annotations"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size or labels.shape[::-1]).save(root / "images" / split / f"{stem}.jpg")
    Image.fromarray(labels).save(root / "annotations" / split / f"{stem}.png")


@pytest.fixture
def pairs_root(tmp_path) -> Path:
    root = tmp_path / "ADEChallengeData2016"
    for index in range(3):
        write_pair(root, "training", f"scene_{index}", np.full((6, 8), index, dtype=np.uint8))
    return root


def test_pairs_are_found_by_name_also_from_the_folder_above(pairs_root):
    for root in (pairs_root, pairs_root.parent):
        pairs = list_pairs(root, "training")
        assert [os.path.basename(pairs.path(i)) for i in range(3)] == [f"scene_{i}.jpg" for i in range(3)]
        assert [os.path.basename(pairs.label_path(i)) for i in range(3)] == [f"scene_{i}.png" for i in range(3)]
    check_pairs(pairs, label_table(150, True), 2)
    with pytest.raises(FileNotFoundError, match=r"images/validation is not there; expected"):
        list_pairs(pairs_root, "validation")


@pytest.mark.parametrize(
    ("kind", "what"), [("images", "no image for scene_1.png"), ("annotations", "no label map for")]
)
def test_files_without_a_partner_are_named(pairs_root, kind, what):
    next((pairs_root / kind / "training").glob("scene_1.*")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"training: {what}.*expected"):
        list_pairs(pairs_root, "training")


def test_label_maps_that_cannot_be_used_are_all_named(pairs_root):
    table, folder = label_table(150, True), pairs_root / "annotations" / "training"
    write_pair(pairs_root, "training", "wrong_size", np.ones((6, 8), dtype=np.uint8), size=(9, 6))
    write_pair(pairs_root, "training", "wrong_value", np.full((6, 8), 151, dtype=np.uint8))
    write_pair(pairs_root, "training", "colour", np.ones((6, 8), dtype=np.uint8))
    Image.new("RGB", (8, 6)).save(folder / "colour.png")
    write_pair(pairs_root, "training", "lossy", np.ones((6, 8), dtype=np.uint8))
    Image.new("L", (8, 6)).save(folder / "lossy.png", format="JPEG")
    with pytest.raises(ValueError, match="label maps or images that cannot be used") as error:
        check_pairs(list_pairs(pairs_root, "training"), table, 2)
    lines = sorted(str(error.value).splitlines()[1:])
    assert len(lines) == 4
    for line, words in zip(
        lines,
        ("colour.png is of mode RGB", "lossy.png: cannot identify", "wrong_size.png: 8 x 6 pixels", "values 151"),
        strict=True,
    ):
        assert words in line


def test_checked_pairs_are_remembered_until_a_file_changes(pairs_root, tmp_path, monkeypatch):
    pairs, table = list_pairs(pairs_root, "training"), label_table(150, True)
    cache = ListCache(tmp_path / "cache")
    check_pairs(pairs, table, 1, cache)
    calls = []
    found = check_pairs(pairs, table, 1)
    check = PairCheck(None, found.pixels)
    monkeypatch.setattr(storage.pairs, "check_pair", lambda *args: calls.append(args) or check)
    remembered = check_pairs(pairs, table, 1, cache)
    assert calls == [] and remembered.pixels.tolist() == found.pixels.tolist() == [48, 48, 48] + [0] * 253
    check_pairs(pairs, label_table(2, True), 1, cache)  # other classes: not the same question
    assert len(calls) == 3
    os.utime(pairs.label_path(0), ns=(1, 1))
    check_pairs(pairs, table, 1, cache)
    assert len(calls) == 6
    check_pairs(pairs, table, 1, ListCache(tmp_path / "cache", rescan=True))
    assert len(calls) == 9
    for mark in (tmp_path / "cache").glob("checked-*"):
        mark.write_bytes(mark.read_bytes()[:-9])
    check_pairs(pairs, table, 1, cache)  # damaged: looked at again
    assert len(calls) == 12


def test_transposed_label_map_is_refused(pairs_root):
    write_pair(pairs_root, "training", "turned", np.ones((6, 8), dtype=np.uint8), size=(6, 8))
    with pytest.raises(ValueError, match=r"turned\.png: 8 x 6 pixels, but its image has 6 x 8"):
        check_pairs(list_pairs(pairs_root, "training"), label_table(150, True), 1)


def test_image_that_cannot_be_decoded_is_named_where_it_cannot_be_replaced(pairs_root):
    write_pair(pairs_root, "training", "broken", np.ones((6, 8), dtype=np.uint8))
    (pairs_root / "images" / "training" / "broken.jpg").write_text("<html>404</html>")
    pairs, table = list_pairs(pairs_root, "training"), label_table(150, True)
    check_pairs(pairs, table, 1)
    with pytest.raises(ValueError, match=r"broken\.jpg: UnidentifiedImageError"):
        check_pairs(pairs, table, 1, decode=True)


def test_data_without_a_labelled_pixel_is_refused(tmp_path):
    write_pair(tmp_path, "validation", "one", np.zeros((6, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="not one pixel has a label"):
        check_pairs(list_pairs(tmp_path, "validation"), label_table(150, True), 1)


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


@pytest.mark.parametrize("mode", ["RGB", "LA", "I;16", "F"])
def test_maps_of_more_than_one_byte_a_pixel_are_refused(tmp_path, mode):
    suffix = "tif" if mode == "F" else "png"
    Image.new(mode, (8, 6)).save(tmp_path / f"labels.{suffix}")
    with pytest.raises(ValueError, match=r"labels\.\w+ is of mode .*one 8-bit channel"):
        read_raw_labels(tmp_path / f"labels.{suffix}")


# -------------------------------------------------------------------------------- what labels hold


def survey_training(root: Path, table: np.ndarray) -> PairSurvey:
    return check_pairs(list_pairs(root, "training"), table, 1)


def test_labels_are_counted_by_raw_value_and_described(pairs_root):
    table = label_table(4, True)
    found = survey_training(pairs_root, table)
    assert found.pixels[:3].tolist() == [48, 48, 48] and found.pixels.sum() == 144 and found.note == ""
    assert count_classes(found.pixels, table, 4).tolist() == [48, 48, 0, 0]
    text = describe_labels(found.pixels, table, ["car", "road", "tree", "sky"])
    assert text == "2 of 4 classes occur: car 50.0%, road 50.0%; never: tree, sky; 33.3% of the pixels are ignored"
    refuse_one_class(found.pixels, table, 4, "folder")


@pytest.mark.parametrize(
    ("values", "ignore_zero", "advice"),
    [
        ((0, 255), False, r"0 on 75\.0%, 255 on 25\.0% of the pixels; 255 is ignored\. If 255 is a class, write"),
        ((0, 1), True, r"0 is ignored\. If 0 is a class, give --no-ignore_zero"),
        ((0, 0), False, r"Raw label values: 0 on 100\.0% of the pixels$"),
    ],
)
def test_labels_of_a_single_class_are_refused_with_the_way_out(tmp_path, values, ignore_zero, advice):
    labels = np.full((6, 8), values[0], dtype=np.uint8)
    labels[:3, :4] = values[1]
    write_pair(tmp_path, "training", "one", labels)
    table = label_table(2, ignore_zero)
    with pytest.raises(ValueError, match=r"only one of --num_classes 2 occurs in .*" + advice):
        refuse_one_class(survey_training(tmp_path, table).pixels, table, 2, str(tmp_path))


# -------------------------------------------------------------------------------- rotation flags

TURN = {  # what a viewer does at each flag, in numpy
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x[::-1].swapaxes(0, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x[:, ::-1].swapaxes(0, 1),
}


def write_flagged_pair(root: Path, stem: str, suffix: str, flag: int, turned: bool, shape: tuple = (6, 8)) -> None:
    """Write a picture with a flag beside a label map whose value is a tenth of each grey value it lies on."""
    grey = 10 * (1 + np.arange(shape[0] * shape[1], dtype=np.uint8).reshape(shape) % 20)
    write_pair(root, "training", stem, np.ascontiguousarray(TURN[flag](grey) if turned else grey) // 10)
    path = root / "images" / "training" / f"{stem}.jpg"
    path.unlink()
    exif = Image.Exif()
    exif[0x0112] = flag
    if suffix == "tif":
        tifffile.imwrite(path.with_suffix(".tif"), grey, extratags=[(274, 3, 1, flag, True)])
    else:
        Image.fromarray(grey).save(path.with_suffix(f".{suffix}"), exif=exif)


def labels_lie_on_their_pixels(pairs) -> bool:
    lying = []
    for index in range(len(pairs)):
        grey = np.asarray(pairs.read_image(index, 1))
        lying.append((grey // 10 == read_raw_labels(pairs.label_path(index))).all())
    return all(lying) and len(lying) > 0


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("turned", [True, False])
def test_one_rule_for_all_rotation_flags_of_a_split(tmp_path, suffix, turned):
    for flag in range(1, 9):
        write_flagged_pair(tmp_path, f"wide_{flag}", suffix, flag, turned)
        write_flagged_pair(tmp_path, f"square_{flag}", suffix, flag, turned, (7, 7))
    found = survey_training(tmp_path, label_table(21, False))
    how = "turned by them, as a person" if turned else "not turned by them, as the labels"
    assert found.pairs.rotate is turned and labels_lie_on_their_pixels(found.pairs)
    assert f"14 of 16 images have a rotation flag: all are {how}" in found.note
    assert "the shapes of 4 pairs tell" in found.note


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_flags_that_no_shape_tells_follow_what_is_said_and_are_named(tmp_path, suffix):
    for flag in (2, 3, 4):
        write_flagged_pair(tmp_path, f"wide_{flag}", suffix, flag, False)
    pairs, table = list_pairs(tmp_path, "training"), label_table(21, False)
    for rotate in (True, False):
        found = check_pairs(pairs, table, 1, ListCache(tmp_path / "cache"), rotate=rotate)
        assert found.pairs.rotate is rotate and "no pair tells by its shape" in found.note
    assert labels_lie_on_their_pixels(found.pairs)


def test_pairs_that_follow_two_rules_are_refused(tmp_path):
    write_flagged_pair(tmp_path, "a", "png", 6, True)
    write_flagged_pair(tmp_path, "b", "tif", 8, False)
    with pytest.raises(
        ValueError, match=r"no one rule .*: 1 have .*turns it \(.*a\.png\), 1 as it is stored \(.*b\.png"
    ):
        survey_training(tmp_path, label_table(21, False))


@pytest.mark.parametrize(
    "case", ["exif_pairs/jpg_3_stored_rect", "exif_pairs/jpg_6_stored_rect", "tiff_orientation/data/tif_6_stored_rect"]
)
def test_cases_of_rotation_from_practice(cases, case):
    pairs = list_pairs(cases / case, "training")
    found = check_pairs(pairs, label_table(150, False), 1, rotate=False)
    assert not found.pairs.rotate and "rotation flag" in found.note
    for index in range(len(pairs)):
        image = found.pairs.read_image(index, 1)
        assert (image.height, image.width) == read_raw_labels(pairs.label_path(index)).shape


def test_image_and_label_map_whose_accents_have_other_bytes_are_a_pair(tmp_path):
    write_pair(tmp_path, "training", "caf\u00e9", np.ones((6, 8), dtype=np.uint8))
    folder = tmp_path / "annotations" / "training"
    (folder / "caf\u00e9.png").rename(folder / "cafe\u0301.png")
    pairs = list_pairs(tmp_path, "training")
    assert len(pairs) == 1 and os.path.exists(pairs.path(0)) and os.path.exists(pairs.label_path(0))


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_pairs_of_images_in_their_own_units_are_checked_by_their_shapes(tmp_path, suffix):
    bands = np.arange(5 * 6 * 8, dtype=np.uint16).reshape(5, 6, 8)
    for stem, shape in (("right", (6, 8)), ("wrong", (8, 6))):
        write_pair(tmp_path, "training", stem, np.ones(shape, dtype=np.uint8))
        path = tmp_path / "images" / "training" / f"{stem}.jpg"
        path.unlink()
        if suffix == "npy":
            np.save(path.with_suffix(".npy"), bands)
        else:
            tifffile.imwrite(path.with_suffix(".tif"), bands, planarconfig="separate", photometric="minisblack")
    with pytest.raises(ValueError, match=r"wrong\.png: 6 x 8 pixels, but its image has 8 x 6$"):
        check_pairs(list_pairs(tmp_path, "training"), label_table(3, True), 1, channels=5, own_units=True)
    (tmp_path / "annotations" / "training" / "wrong.png").unlink()
    (tmp_path / "images" / "training" / f"wrong.{suffix}").unlink()
    found = check_pairs(list_pairs(tmp_path, "training"), label_table(3, True), 1, channels=5, own_units=True)
    assert (found.pairs.open_values(0, 5).decoded().values == bands).all()


def test_cases_of_label_values_from_practice(cases):
    pairs, table = list_pairs(cases / "mask_0_255" / "data", "training"), label_table(2, False)
    with pytest.raises(ValueError, match=r"only one of --num_classes 2 occurs.*255 is ignored\. If 255 is a class"):
        refuse_one_class(check_pairs(pairs, table, 1).pixels, table, 2, "folder")
    pairs = list_pairs(cases / "mask_4bit" / "data", "training")
    for index in range(len(pairs)):
        raw = np.array([list(row) for row in png.Reader(pairs.label_path(index)).read()[2]])
        assert set(np.unique(raw)) == {1, 3} and (read_raw_labels(pairs.label_path(index)) == raw).all()


def test_rotated_bands_lie_as_they_are_stored_where_the_split_says_so(tmp_path):
    for flag in range(1, 9):
        write_flagged_pair(tmp_path, f"wide_{flag}", "tif" if flag % 2 else "png", flag, False)
    found = check_pairs(list_pairs(tmp_path, "training"), label_table(21, False), 1, channels=1, own_units=True).pairs
    assert not found.rotate
    for index in range(len(found)):
        values = found.open_values(index, 1).whole()[0].numpy()
        assert (values // 10 == read_raw_labels(found.label_path(index))).all()


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
