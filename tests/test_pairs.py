"""Images with label maps: rules of label values, pairing, checks and their memory."""

import os
from pathlib import Path

import numpy as np
import png
import pytest
import tifffile
from PIL import Image

import storage.pairs
from storage.labels import (
    count_classes,
    describe_labels,
    label_table,
    parse_label_values,
    read_raw_labels,
    refuse_one_class,
)
from storage.lists import ListCache
from storage.pair_folders import PairLayout
from storage.pairs import PairCheck, PairSurvey, check_pairs, choose_ignore_zero, list_pairs, survey_pairs


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
    with pytest.raises(FileNotFoundError, match=r"images/validation and .*validation are not there; expected"):
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
    write_pair(pairs_root, "training", "colour", np.ones((6, 8), dtype=np.uint8))
    Image.new("RGB", (8, 6)).save(folder / "colour.png")
    write_pair(pairs_root, "training", "lossy", np.ones((6, 8), dtype=np.uint8))
    Image.new("L", (8, 6)).save(folder / "lossy.png", format="JPEG")
    with pytest.raises(ValueError, match="label maps or images that cannot be used") as error:
        check_pairs(list_pairs(pairs_root, "training"), table, 2)
    lines = sorted(str(error.value).splitlines()[1:])
    assert len(lines) == 3
    for line, words in zip(
        lines,
        ("colour.png is of mode RGB", "lossy.png is a JPEG, whose compression changes", "wrong_size.png: 8 x 6 pixels"),
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
    assert calls == [] and remembered == found and found.pixels == {0: 48, 1: 48, 2: 48}
    with pytest.raises(ValueError, match="values that are no classes here"):
        check_pairs(pairs, label_table(1, True), 1, cache)  # other classes, asked of what is remembered
    assert calls == []
    survey_pairs(pairs, 1, cache, colours=True)  # not the same question
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
        check_pairs(pairs, table, 1, held_out=True)


def test_data_without_a_labelled_pixel_is_refused(tmp_path):
    labels = np.zeros((6, 8), dtype=np.uint8)
    labels[0, 0] = 255
    write_pair(tmp_path, "validation", "one", labels)
    with pytest.raises(ValueError, match=r"(?s)not one pixel has a label.* --label_values '0=NAME,255=NAME'"):
        check_pairs(list_pairs(tmp_path, "validation"), label_table(150, True), 1)


# -------------------------------------------------------------------------------- what labels hold


def survey_training(root: Path, table: np.ndarray) -> PairSurvey:
    return check_pairs(list_pairs(root, "training"), table, 1)


def test_labels_are_counted_by_raw_value_and_described(pairs_root):
    table = label_table(4, True)
    found = survey_training(pairs_root, table)
    assert found.pixels == {0: 48, 1: 48, 2: 48} and found.note == ""
    assert count_classes(found.pixels, table, 4).tolist() == [48, 48, 0, 0]
    text = describe_labels(found.pixels, table, ["car", "road", "tree", "sky"])
    assert text == "2 of 4 classes occur: car 50.0%, road 50.0%; never: tree, sky; 33.3% of the pixels are ignored"
    refuse_one_class(found.pixels, table, 4, "folder")


@pytest.mark.parametrize(
    ("values", "ignore_zero", "advice"),
    [
        ((0, 255), False, r"0 on 75\.0%, 255 on 25\.0% .*; 255 is ignored\. .* give --label_values 0=NAME,255=NAME$"),
        ((0, 1), True, r"; 0 is ignored\. If all are classes, give --label_values 0=NAME,1=NAME$"),
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
        grey = pairs.open_picture(index, 1).whole()[0].numpy()
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
        image = found.pairs.open_picture(index, 1)
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
    with pytest.raises(ValueError, match=r"only one of --num_classes 2 .*255 is ignored\. .* give --label_values"):
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


def test_values_that_are_no_classes_are_counted_and_the_way_out_is_named(pairs_root, tmp_path):
    stray = np.zeros((6, 8), dtype=np.uint8)
    stray[0, :3] = 7
    write_pair(pairs_root, "training", "stray", stray)
    pairs, cache = list_pairs(pairs_root, "training"), ListCache(tmp_path / "cache")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match="are no classes here") as error:
            check_pairs(pairs, label_table(1, True), 1, cache)
        lines = str(error.value).splitlines()
        assert lines[0].endswith(
            "annotations/training have values that are no classes here; allowed are 0 to 1, 255. Found:"
        )
        assert lines[1:3] == [
            "  2 on 48 pixels (25.00%), such as in scene_2.png",
            "  7 on 3 pixels (1.56%), such as in stray.png",
        ]
        assert "--label_values VALUE=NAME,..." in lines[3] and lines[3].endswith("'...,2=ignore,7=ignore'")
    table = label_table(2, False, parse_label_values("0=sky,1=sea,2=ignore,7=ignore"))
    found = check_pairs(pairs, table, 1, cache)
    assert count_classes(found.pixels, table, 2).tolist() == [93, 48]


@pytest.mark.parametrize(
    ("values", "num_classes", "ignored", "words"),
    [
        ((0, 1), 2, False, "0 covers 41.0% of the pixels and is a class, because no value reaches 2; --ignore_zero"),
        ((0, 3, 255), 4, False, "0 covers 41.0% of the pixels and is a class"),
        (
            (0, 2),
            2,
            True,
            "0 covers 41.0% of the pixels and is ignored, because values reach 2: 1 to 2 are the classes",
        ),
        ((1, 2), 2, True, "0 does not occur and is ignored, because values reach 2"),
        ((1, 2), 3, False, "0 does not occur and is a class, because no value reaches 3"),
    ],
)
def test_values_that_occur_decide_whether_0_is_ignored(values, num_classes, ignored, words):
    pixels = dict(zip(values, (41, 50, 9) if len(values) == 3 else (41, 59), strict=True))
    found, reason = choose_ignore_zero(PairSurvey(None, pixels, {}, ""), num_classes)
    assert found is ignored and reason.startswith(words)


def test_values_beyond_the_classes_are_refused_with_the_way_out(pairs_root):
    write_pair(pairs_root, "training", "stray", np.full((6, 8), 9, dtype=np.uint8))
    survey = survey_pairs(list_pairs(pairs_root, "training"), 1)
    with pytest.raises(ValueError, match="do not fit --num_classes 2, whose classes are 0 to 1, or 1 to 2") as error:
        choose_ignore_zero(survey, 2)
    assert "  9 on 48 pixels (25.00%), such as in stray.png" in str(error.value).splitlines()


# -------------------------------------------------------------------------------- layouts


def write_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6)).save(root / name)


@pytest.mark.parametrize(
    ("image", "label", "layout"),
    [
        ("img_dir/train/{}.jpg", "ann_dir/train/{}.png", {}),
        ("images/train/{}.jpg", "masks/train/{}.png", {}),
        ("train/images/{}.png", "train/masks/{}.png", {}),
        ("train/images/{}.png", "train/labels/{}_m.png", dict(label_suffix="_m")),
        ("images/{}.jpg", "masks/{}_mask.png", dict(label_suffix="_mask")),
        ("train/{}_img.png", "train/{}_mask.png", dict(image_suffix="_img", label_suffix="_mask")),
        ("train/{}.jpg", "train/{}_mask.png", dict(label_suffix="_mask")),
        ("train/{}.jpg", "train/{}.png", dict(label_suffix=".png")),
        ("{}_img.png", "{}_mask.png", dict(image_suffix="_img", label_suffix="_mask")),
        ("x/{}.png", "y/{}.png", dict(image_folder="x", label_folder="y")),
        ("a/train/x/{}.png", "a/train/y/{}.png", dict(image_folder="a/{split}/x", label_folder="a/{split}/y")),
        (
            "leftImg8bit/train/ulm/{}_leftImg8bit.png",
            "gtFine/train/ulm/{}_gtFine_labelIds.png",
            dict(image_folder="leftImg8bit", label_folder="gtFine")
            | dict(image_suffix="_leftImg8bit", label_suffix="_gtFine_labelIds"),
        ),
    ],
)
def test_layouts_that_people_have_are_paired(tmp_path, image, label, layout):
    for stem in ("one", "two"):
        write_files(tmp_path, image.format(stem), label.format(stem))
    pairs = list_pairs(tmp_path, "training", PairLayout(**layout))
    found = [[os.path.relpath(path(i), tmp_path) for i in range(2)] for path in (pairs.path, pairs.label_path)]
    assert found == [[name.format(stem) for stem in ("one", "two")] for name in (image, label)]
    assert len(pairs) == 2 and pairs.notes == ()
    with pytest.raises(FileNotFoundError, match="not there; expected"):
        list_pairs(tmp_path, "validation", PairLayout(**layout))
    for name in (image, label) if "train" in image else ():
        write_files(tmp_path, name.replace("train", "val").format("three"))
        if name == label:
            assert len(list_pairs(tmp_path, "validation", PairLayout(**layout))) == 1


def test_both_sides_without_a_partner_are_named_and_what_a_suffix_leaves_out(tmp_path):
    write_files(tmp_path, "images/train/a_img.png", "images/train/b_img.png", "masks/train/a_mask.png")
    write_files(tmp_path, "masks/train/c_mask.png", "masks/train/a_colour.png")
    with pytest.raises(FileNotFoundError) as error:
        list_pairs(tmp_path, "training")
    said = str(error.value)
    assert "training: no label map for a_img.png, b_img.png; no image for a_colour.png, a_mask.png, c_mask.png;" in said
    assert "; 0 pairs found; expected" in said and "--label_suffix _mask" in said
    layout = PairLayout(image_suffix="_img", label_suffix="_mask")
    with pytest.raises(
        FileNotFoundError, match=r"no label map for b_img\.png; no image for c_mask\.png; 1 pairs found"
    ):
        list_pairs(tmp_path, "training", layout)
    (tmp_path / "images/train/b_img.png").unlink()
    (tmp_path / "masks/train/c_mask.png").unlink()
    pairs = list_pairs(tmp_path, "training", layout)
    assert pairs.notes == ("1 files do not end in _mask: a_colour.png",)
    assert pairs.describe() == f"1 pairs in {tmp_path}/images/train, label maps in {tmp_path}/masks/train"


def test_folders_that_may_be_meant_in_two_ways_are_refused_until_said(tmp_path):
    write_files(tmp_path, *(f"{kind}/train/a.png" for kind in ("images", "masks", "labels")))
    with pytest.raises(ValueError, match="images/train with masks/train and images/train with labels/train; say which"):
        list_pairs(tmp_path, "training")
    pairs = list_pairs(tmp_path, "training", PairLayout("images", "masks"))
    assert pairs.label_path(0).endswith("masks/train/a.png")
    with pytest.raises(ValueError, match=r"both lie in .*images/train: give --label_suffix"):
        list_pairs(tmp_path, "training", PairLayout("images", "images", "_x", "_x"))
