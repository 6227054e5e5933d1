"""Images with label maps: rules of label values, pairing, checks and their memory."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import storage.pairs
from storage.lists import ListCache
from storage.pairs import (
    ADE20K_CLASS_NAMES,
    ADE20K_NUM_CLASSES,
    ADE20K_PALETTE,
    IGNORE_INDEX,
    PairCheck,
    check_pairs,
    label_table,
    list_pairs,
    read_label_map,
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
    monkeypatch.setattr(storage.pairs, "check_pair", lambda *args: calls.append(args) or PairCheck(None, True))
    check_pairs(pairs, table, 1, cache)
    assert calls == []
    check_pairs(pairs, label_table(2, True), 1, cache)  # other classes: not the same question
    assert len(calls) == 3
    os.utime(pairs.label_path(0), ns=(1, 1))
    check_pairs(pairs, table, 1, cache)
    assert len(calls) == 6
    check_pairs(pairs, table, 1, ListCache(tmp_path / "cache", rescan=True))
    assert len(calls) == 9


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
