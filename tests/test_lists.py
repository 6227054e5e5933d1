"""Folders of images: splits, lists and their cache, subsamples, classes."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool

import storage.lists
from storage.held_out import choose_held_out
from storage.lists import ListCache, check_same_classes, find_splits, list_images, scan_images
from storage.pairs import list_pairs


def test_find_splits_takes_either_name_of_the_validation_folder(tmp_path):
    (tmp_path / "train").mkdir()
    assert find_splits(tmp_path) == (tmp_path / "train", None, ())
    (tmp_path / "validation").mkdir()
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "validation", ())
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="both val/ and validation/"):
        find_splits(tmp_path)


def test_find_splits_takes_a_tree_without_splits_as_training_images(tmp_path):
    assert find_splits(tmp_path) == (tmp_path, None, ())
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)is not a folder; expected one of.*: here/"):
        find_splits(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (("images/training/1.jpg", "images/validation/2.jpg", "annotations/training/1.png"), "images/training", None),
        (
            [f"{kind}/{split}/1.png" for kind in ("images", "annotations") for split in ("training", "validation")],
            "images/training",
            "images/validation",
        ),
        (
            [f"{kind}/{split}/1.png" for kind in ("img_dir", "ann_dir") for split in ("train", "val")],
            "img_dir/train",
            "img_dir/val",
        ),
        (["train/images/1.png", "train/masks/1.png"], "train/images", None),
        (["images/train/1.png", "masks/train/1.png", "labels/train/1.png"], "images/train", None),
        (["images/1.png", "masks/1.png"], "images", None),
    ],
)
def test_find_splits_takes_the_images_of_a_folder_with_label_maps_alone(tmp_path, names, train, val):
    touch(*(tmp_path / name for name in names))
    found = find_splits(tmp_path)
    assert (found.train, found.val) == (tmp_path / train, tmp_path / val if val else None)
    held_out = f", held-out images those in {tmp_path / val}" if val else ""
    said = f"training images are those in {tmp_path / train} alone{held_out}; the label maps beside them are not used"
    assert found.notes == (said,)


def test_find_splits_finds_ade20k_from_the_folder_above(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    touch(root / "images" / "training" / "1.jpg", root / "annotations" / "training" / "1.png")
    assert find_splits(tmp_path).train == root / "images" / "training"


def test_find_splits_prefers_train_to_images_with_label_maps(tmp_path):
    touch(*(tmp_path / name for name in ("train/cat/1.jpg", "val/cat/2.jpg", "images/training/1.jpg")))
    touch(tmp_path / "annotations" / "training" / "1.png")
    assert find_splits(tmp_path)[:2] == (tmp_path / "train", tmp_path / "val")


def touch(*paths) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    "siblings", [["plane/a.jpg", "car/b.jpg"], ["plane/a.npy", "car/b.npy"], ["Training/a.jpg", "test/b.jpg"]]
)
def test_folder_named_train_is_a_split_only_among_splits(tmp_path, siblings):
    touch(tmp_path / "train" / "one.jpg", *(tmp_path / name for name in siblings), tmp_path / "meta" / "notes.txt")
    found = find_splits(tmp_path)
    if siblings[0].startswith("plane"):
        assert (found.train, found.val) == (tmp_path, None)
        assert found.notes == (f"train/ in {tmp_path} taken for classes or folders like others, not for splits",)
        assert siblings[0].endswith("npy") or list_images(found.train).classes == ("car", "plane", "train")
    else:
        assert (found.train, found.val) == (tmp_path / "train", None)
        assert found.notes == (f"not used, beside train/ in {tmp_path}: Training/, test/",)


def test_images_and_folders_beside_the_splits_are_named(tmp_path):
    names = ("train/a/1.jpg", "val/a/1.jpg", "extra/a/1.jpg", "stray.png", "readme.md")
    touch(*(tmp_path / name for name in names))
    found = find_splits(tmp_path)
    assert (found.train, found.val) == (tmp_path / "train", tmp_path / "val")
    assert found.notes == (f"not used, beside train/ in {tmp_path}: stray.png, extra/",)


@pytest.mark.parametrize("name", ["Train", "training", "TEST"])
def test_folders_that_only_look_like_splits_are_named(tmp_path, name):
    touch(tmp_path / name / "cats" / "1.jpg")
    found = find_splits(tmp_path)
    assert (found.train, found.val) == (tmp_path, None)
    assert found.notes == (f"{name}/ in {tmp_path} taken for classes or folders like others, not for splits",)


def test_what_a_scan_leaves_out_is_said_also_from_the_cache(tmp_path):
    data, cache = tmp_path / "data", ListCache(tmp_path / "lists")
    names = ("cats/1.jpg", "cats/2.heic", "cats/3.HEIC", "dogs/1.png", "dogs/notes", "dogs/x.npy", ".hidden/1.raw")
    touch(*(data / name for name in names))
    (data / "birds" / "young").mkdir(parents=True)
    (data / "cats" / "up").symlink_to(data)
    expected = (
        "files passed over: 2 of .heic, 1 of no suffix, 1 of .npy",
        "links that lead back up, not followed: cats/up",
        "folders without an image, no classes: birds",
    )
    found = list_images(data, cache)
    assert (found.classes, len(found), found.notes) == (("cats", "dogs"), 2, expected)
    *notes, age = list_images(data, cache).notes
    assert tuple(notes) == expected
    assert age.startswith("list of files made on ") and age.endswith("; --rescan_data makes it anew")


def test_two_class_folders_that_link_to_one_place_are_two_classes(tmp_path):
    touch(tmp_path / "store" / "1.jpg", tmp_path / "store" / "deep" / "2.jpg")
    (tmp_path / "data").mkdir()
    for name in ("old", "new"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store")
    files = list_images(tmp_path / "data")
    assert files.classes == ("new", "old") and len(files) == 4 and files.notes == ()


def test_arrays_are_images_where_there_are_no_others(tmp_path):
    touch(tmp_path / "a" / "1.npy", tmp_path / "b" / "2.NPY", tmp_path / "b" / ".3.npy")
    files = list_images(tmp_path)
    assert files.classes == ("a", "b") and len(files) == 2


@pytest.mark.parametrize("change", ["upwards", "absolute", "labels", "few labels", "type", "nothing"])
def test_forged_list_is_made_anew(image_folder, tmp_path, change):
    train, lists = image_folder / "train", tmp_path / "lists"
    expected = list_images(train, ListCache(lists))
    (cache,) = lists.iterdir()
    with np.load(cache) as content:
        stored = dict(content)
    stored |= {
        "upwards": {"paths": np.array([b"../val/x.jpg"] * 24)},
        "absolute": {"paths": np.array([b"/etc/passwd"] * 24)},
        "labels": {"labels": np.full(24, 2)},
        "few labels": {"labels": np.zeros(23, int)},
        "type": {"paths": np.arange(24)},
        "nothing": {"paths": np.array([], dtype="S1"), "labels": np.array([], dtype=int)},
    }[change]
    with cache.open("wb") as file:
        np.savez(file, **stored)
    found = list_images(train, ListCache(lists))
    assert found.paths.tolist() == expected.paths.tolist() and np.array_equal(found.labels, expected.labels)
    assert found.notes == ()  # not from the cache


def test_list_images_finds_classes_and_labels(image_folder):
    files = list_images(image_folder / "train")
    assert files.classes == ("cats", "dogs") and len(files) == 24
    assert [files.classes[files.labels[i]] in files.path(i) for i in range(24)] == [True] * 24


def test_list_images_takes_any_letter_case_depth_and_strange_names(tmp_path):
    names = ["a.JPEG", "deep/er/b.PnG", "deep/with space é.Tif", "deep/readme.txt", "deep/c.jpg.bak"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = list_images(tmp_path)
    assert [os.path.relpath(files.path(i), tmp_path) for i in range(len(files))] == sorted(names[:3])
    assert files.classes == () and set(files.labels) == {-1}


def test_list_images_shows_expected_and_found_when_there_is_nothing(tmp_path):
    (tmp_path / "archive.tar").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"(?s)no images below.*expected one of.*found: archive\.tar, empty/"):
        list_images(tmp_path)


def test_list_images_passes_over_hidden_files_and_folders(image_folder):
    train = image_folder / "train"
    (train / "cats" / "._000.jpg").touch()
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (train / name).mkdir()
        (train / name / "copy.jpg").touch()
    files = list_images(train)
    assert len(files) == 24 and files.classes == ("cats", "dogs")


def test_scan_images_survives_a_link_back_up(image_folder):
    (image_folder / "train" / "cats" / "loop").symlink_to(image_folder / "train")
    assert len(scan_images(image_folder / "train")[0]) == 24


def test_list_images_reads_the_cached_list_while_nothing_changed(image_folder, tmp_path, monkeypatch):
    first = list_images(image_folder / "train", ListCache(tmp_path / "lists"))
    with monkeypatch.context() as patch:
        patch.setattr(storage.lists, "scan_images", lambda root: pytest.fail("scanned although the list was cached"))
        second = list_images(image_folder / "train", ListCache(tmp_path / "lists"))
    assert second.classes == first.classes and second.fingerprint() == first.fingerprint()
    assert np.array_equal(second.labels, first.labels)


def test_list_images_scans_again_after_a_change_a_damage_or_when_asked(image_folder, tmp_path, monkeypatch):
    train, lists = image_folder / "train", tmp_path / "lists"
    first = list_images(train, ListCache(lists))
    (train / "dogs" / "new.png").touch()
    changed = list_images(train, ListCache(lists))
    assert len(changed) == 25 and changed.fingerprint() != first.fingerprint()
    (cache,) = lists.iterdir()
    for damage in (cache.read_bytes()[:200], b"", b"no list"):
        cache.write_bytes(damage)
        assert len(list_images(train, ListCache(lists))) == 25
    scans = []
    monkeypatch.setattr(storage.lists, "scan_images", lambda root: scans.append(root) or scan_images(root))
    list_images(train, ListCache(lists, rescan=True))
    assert len(scans) == 1


def test_classes_that_differ_are_refused_with_the_difference(tmp_path):
    check_same_classes(("a", "b"), ("a", "b"), tmp_path, "training")
    with pytest.raises(ValueError, match=r"1 classes in .* are not the 2 of training: it lacks b\. Every class"):
        check_same_classes(("a",), ("a", "b"), tmp_path, "training")
    with pytest.raises(ValueError, match=r"it lacks b, c, d, e, f and 2 more; it adds x"):
        check_same_classes(("a", "x"), tuple("abcdefgh"), tmp_path, "training")
    with pytest.raises(ValueError, match="images outside class folders"):
        check_same_classes((), ("a",), tmp_path, "training")


def test_thinned_list_keeps_every_class(image_folder):
    files = list_images(image_folder / "train")
    few = files.subsample(6)
    assert len(few) == 6 and np.bincount(few.labels).tolist() == [3, 3] and files.subsample(100) is files
    assert {few.path(i) for i in range(6)} <= {files.path(i) for i in range(24)}


def test_names_that_differ_in_the_bytes_of_accents_alone_are_called_so(tmp_path):
    composed, apart = ("caf\u00e9", "the"), ("cafe\u0301", "the")
    with pytest.raises(ValueError, match=r"are those of training, but caf.* spell accents in other bytes"):
        check_same_classes(apart, composed, tmp_path, "training")


# -------------------------------------------------------------------------------- images that are held out


def names_of(paths: np.ndarray, held_out: np.ndarray) -> set[bytes]:
    return set(paths[held_out].tolist())


def test_a_share_of_every_class_is_held_out():
    labels = np.repeat(np.arange(5, dtype=np.int32), [1, 2, 5, 40, 100])
    paths = np.array([f"{label}/{i}.jpg".encode() for i, label in enumerate(labels)])
    held_out = choose_held_out(paths, labels, 0.1, seed=0)
    assert np.bincount(labels[held_out], minlength=5).tolist() == [0, 1, 1, 4, 10]
    assert choose_held_out(paths, np.full(148, -1, np.int32), 0.25, seed=0).sum() == 37  # no classes
    assert names_of(paths, held_out) != names_of(paths, choose_held_out(paths, labels, 0.1, seed=1))
    order = np.random.default_rng(0).permutation(len(paths))
    again = choose_held_out(paths[order], labels[order], 0.1, seed=0)
    assert names_of(paths[order], again) == names_of(paths, held_out)


def test_image_that_is_added_moves_at_most_one_other():
    paths = np.array([f"a/{i}.jpg".encode() for i in range(60)])
    before = names_of(paths, choose_held_out(paths, np.zeros(60, np.int32), 0.2, seed=3))
    moved = set()
    for i in range(50):
        more = np.array([*paths.tolist(), f"a/new {i}.jpg".encode()])
        after = names_of(more, choose_held_out(more, np.zeros(61, np.int32), 0.2, seed=3))
        moved.add(len((before ^ after) - {more[-1]}))
    assert moved == {0, 1}


def test_split_lists_have_each_image_once_and_the_same_labels(image_folder):
    files = list_images(image_folder / "train")
    train, held_out = files.split(0.25, seed=0)
    assert (len(train), len(held_out)) == (18, 6) and train.classes == held_out.classes == files.classes
    assert sorted([*train.paths, *held_out.paths]) == sorted(files.paths)
    for part in (train, held_out):
        assert all(part.classes[part.labels[i]] in part.path(i) for i in range(len(part)))
    moved = shutil.copytree(image_folder / "train", image_folder / "elsewhere")
    assert list_images(moved).split(0.25, seed=0)[1].paths.tolist() == held_out.paths.tolist()


@pytest.mark.parametrize("packed", [False, True])
def test_split_pairs_keep_image_and_label_map_together(drawn_pairs, tmp_path, monkeypatch, packed):
    root = drawn_pairs
    if packed:
        tool = load_tool("pack_dataset")
        monkeypatch.setitem(sys.modules, "pack_dataset", tool)  # where its worker processes look for its functions
        tool.main(tool.parse_args([str(drawn_pairs), "--output", str(tmp_path / "packed")]))
        root = tmp_path / "packed"
    pairs = list_pairs(root, "training")
    parts = pairs.split(0.3, seed=0)
    assert [len(part) for part in parts] == [7, 3]
    originals = {os.path.basename(path): path for path in map(list_pairs(drawn_pairs, "training").path, range(10))}
    for part in parts:
        for i in range(len(part)):
            name = os.path.basename(os.fsdecode(part.images[i]))
            with part.image_file(i) as file:
                assert file.read() == Path(originals[name]).read_bytes()
            label = originals[name].replace("images", "annotations").replace(".jpg", ".png")
            assert part.label_file(i).read() == Path(label).read_bytes()
