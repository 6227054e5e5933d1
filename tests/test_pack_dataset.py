"""Packs: the same samples, labels and runs as from the folder; stopped, damaged and made-up packs."""

import dataclasses
import gc
import json
import os
import pickle
import random
import shlex
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, draw_images, load_tool, rows
from PIL import Image
from safetensors.torch import save_file

import finetune_classifier
import finetune_segmentation
import pretrain_mae
from dataset import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ADE20KDataset,
    ImageDataset,
    SampleKey,
    StepSampler,
    build_pretraining_transform,
    build_training_loader,
    keep_size,
)
from model import ViTMAEForPreTraining
from storage.decoding import DECODE_ERRORS, Area, read_image
from storage.lists import find_splits, list_images
from storage.packs import PACK_FILE, SHARD_MAGIC, SHARD_TABLE, SHARD_TRAILER, Pack
from storage.pairs import check_pairs, label_table, list_pairs

pack_dataset = load_tool("pack_dataset")
sys.modules["pack_dataset"] = pack_dataset  # where its worker processes look for its functions


def pack(source: Path, output: Path, *more: str) -> Path:
    arguments = [str(source), "--output", str(output), "--num_workers", "1", *more]
    pack_dataset.main(pack_dataset.parse_args(arguments))
    return output


@pytest.fixture(scope="module")
def packed(drawn_images, tmp_path_factory) -> Path:
    """The drawn images, which are small enough to stay as they are, in shards of five; not to be changed."""
    return pack(drawn_images, tmp_path_factory.mktemp("packed") / "pack", "--images_per_shard", "5")


@pytest.fixture
def train_pack(drawn_images, tmp_path) -> Path:
    """A pack of the training images in one shard, free to be changed by the test."""
    return pack(drawn_images / "train", tmp_path / "one_pack")


# -------------------------------------------------------------------------------- the same as from the folder


def test_pack_has_the_names_labels_classes_and_samples_of_its_folder(drawn_images, packed):
    for split in (0, 1):
        files, found = (list_images(find_splits(root)[split]) for root in (drawn_images, packed))
        assert found.classes == files.classes == ("cats", "dogs")
        assert np.array_equal(found.paths, files.paths) and np.array_equal(found.labels, files.labels)
        transform = build_pretraining_transform((16, 16), 0.2)
        for index in range(len(files)):
            assert found.read_image(index, 3).tobytes() == files.read_image(index, 3).tobytes()
            sample, expected = (ImageDataset(f, transform)[SampleKey(1, index)] for f in (found, files))
            assert torch.equal(sample.image, expected.image) and sample.label == expected.label


def test_pack_cannot_be_taken_for_its_folder_or_another_pack_by_a_resumed_run(drawn_images, packed, tmp_path):
    smaller = pack(drawn_images, tmp_path / "pack", "--short_side", "16")
    prints = {list_images(root / "train").fingerprint() for root in (drawn_images, packed, smaller)}
    assert len(prints) == 3


def test_any_tree_packs_without_classes(tmp_path):
    draw_images(tmp_path / "tree" / "a" / "b", 3)
    (tmp_path / "tree" / "a" / "b" / "000.jpg").rename(tmp_path / "tree" / "outside.jpg")
    files, found = list_images(tmp_path / "tree"), list_images(pack(tmp_path / "tree", tmp_path / "pack"))
    assert found.classes == () and set(found.labels) == {-1} and np.array_equal(found.paths, files.paths)


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_larger_images_get_the_short_side_and_smaller_ones_keep_theirs(tmp_path, encoding):
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("wide.png", (120, 60)), ("tall.jpg", (30, 90)), ("small.png", (20, 16))):
        coarse = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / "images" / name)
    raw = ["--raw"] if encoding == "raw" else []
    found = list_images(pack(tmp_path / "images", tmp_path / "pack", "--short_side", "24", "--quality", "95", *raw))
    for index, (name, size) in enumerate((("small.png", (20, 16)), ("tall.jpg", (24, 72)), ("wide.png", (48, 24)))):
        expected = read_image(tmp_path / "images" / name).resize(size, Image.Resampling.BICUBIC)
        image = found.read_image(index, 3)
        assert image.size == size
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
        assert difference.max() == 0 if encoding == "raw" else difference.mean() < 4
        picture = found.open_picture(index, 3)
        cut = picture.cut(Area(2, 3, 10, 9)).permute(1, 2, 0).numpy()
        assert np.array_equal(cut, np.asarray(image)[2:12, 3:12])
        assert np.array_equal(picture.decoded().pixels.permute(1, 2, 0), np.asarray(image))
        assert np.array_equal(found.open_picture(index, 1).decoded().pixels[0], np.asarray(found.read_image(index, 1)))


def test_rotation_and_transparency_are_settled_when_packing(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "images" / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "images" / "clear.png")
    found = list_images(pack(tmp_path / "images", tmp_path / "pack"))
    assert found.read_image(1, 3).size == (20, 40) and np.asarray(found.read_image(0, 3)).min() > 250


def test_packs_serve_workers_threads_and_other_processes(packed):
    files = list_images(packed / "train")
    data = ImageDataset(files, build_pretraining_transform((16, 16), 0.2), noise_size=4)
    copy = pickle.loads(pickle.dumps(files))  # as for a worker that is no fork
    assert copy.read_image(7, 3).tobytes() == files.read_image(7, 3).tobytes()
    del copy
    gc.collect()
    files.read_image(7, 3)  # its files are its own, and were not closed with the copy's
    sampler = StepSampler(24, 4)
    loader = build_training_loader(data, sampler, 2, pin_memory=False)
    for keys, batch in zip(sampler, loader, strict=True):
        assert torch.equal(batch.images, torch.stack([data[key].image for key in keys]))


def test_thinned_packs_keep_images_and_labels_together(packed):
    files = list_images(packed / "train")
    few = files.subsample(5)
    for index, place in enumerate([0, 6, 12, 17, 23]):
        assert few.paths[index] == files.paths[place] and few.labels[index] == files.labels[place]
        assert few.read_image(index, 3).tobytes() == files.read_image(place, 3).tobytes()


def test_pairs_pack_byte_for_byte(tmp_path):
    root, generator = tmp_path / "pairs", np.random.default_rng(0)
    write_pairs(root, generator)
    packed_root, table = pack(root, tmp_path / "pack", "--images_per_shard", "2"), label_table(150, True)
    for split in ("training", "validation"):
        pairs, found = list_pairs(root, split), list_pairs(packed_root, split)
        assert np.array_equal(found.images, pairs.images) and np.array_equal(found.label_maps, pairs.label_maps)
        check_pairs(found, table, 1, tmp_path / "cache", decode=True)
        check_pairs(found, table, 1, tmp_path / "cache", decode=True)
        for index in range(len(pairs)):
            assert found.image_file(index).getvalue() == Path(pairs.path(index)).read_bytes()
            assert found.label_file(index).getvalue() == Path(pairs.label_path(index)).read_bytes()
            a, b = (ADE20KDataset(p, keep_size, table)[SampleKey(0, index)] for p in (pairs, found))
            assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
    assert list_pairs(packed_root, "training").fingerprint() != list_pairs(root, "training").fingerprint()


def write_pairs(root: Path, generator: np.random.Generator, num_classes: int = 150) -> None:
    for split, count in (("training", 5), ("validation", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            labels = generator.integers(1, num_classes + 1, (6, 7), dtype=np.uint8).repeat(7, axis=0).repeat(7, axis=1)
            Image.fromarray(np.stack([labels] * 3, axis=2)).save(root / "images" / split / f"{index}.jpg")
            Image.fromarray(labels).save(root / "annotations" / split / f"{index}.png")


def losses(experiment: Path) -> list[float]:
    return [row["training_loss"] for row in rows(experiment)]


def test_pretraining_and_finetuning_on_a_pack_are_the_runs_on_its_folder(drawn_images, packed, tmp_path):
    common = shlex.split("--epochs 2 --warmup_epochs 1 --per_gpu_batch_size 8 --num_workers 0 --log_interval 1")
    sizes = shlex.split(
        "--img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 2 --encoder_num_heads 4 "
        "--decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --gradient_accumulation_steps 1"
    )
    found = {}
    for name, data in (("folder", drawn_images), ("pack", packed)):
        run = [*common, "--path_to_data", str(data), "--working_directory", str(tmp_path / name)]
        pretrain_mae.main(pretrain_mae.parse_args([*run, *sizes, "--experiment_name", "mae"]))
        start = ["--path_to_pretrained_mae_weights", str(tmp_path / "folder" / "mae" / "checkpoint_2")]
        finetune_classifier.main(finetune_classifier.parse_args([*run, *start, "--experiment_name", "classes"]))
        found[name] = losses(tmp_path / name / "mae"), losses(tmp_path / name / "classes")
    assert found["folder"] == found["pack"] and len(found["pack"][0]) == 6


def test_segmentation_on_a_pack_is_the_run_on_its_folder(tmp_path):
    write_pairs(tmp_path / "pairs", np.random.default_rng(0), num_classes=4)
    packed_root = pack(tmp_path / "pairs", tmp_path / "pack")
    start = tmp_path / "checkpoint_1"
    start.mkdir()
    config = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_depth=4, encoder_num_heads=2)
    save_file(ViTMAEForPreTraining(config).state_dict(), start / "model.safetensors")
    record = {"config": dataclasses.asdict(config), "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (start / "config.json").write_text(json.dumps(record))
    flags = shlex.split(
        "--experiment_name run --img_size 32 --num_classes 4 --channels 128 --norm group --epochs 2 "
        "--warmup_iterations 1 --per_gpu_batch_size 4 --learning_rate 1e-4 --num_workers 0 --log_interval 1"
    )
    found = []
    for name, data in (("folder", tmp_path / "pairs"), ("pack", packed_root)):
        paths = ["--path_to_data", str(data), "--working_directory", str(tmp_path / name)]
        arguments = [*flags, *paths, "--path_to_backbone_checkpoint", str(start)]
        figures = finetune_segmentation.main(finetune_segmentation.parse_args(arguments))
        found.append((losses(tmp_path / name / "run"), figures))
    assert found[0] == found[1]


# -------------------------------------------------------------------------------- stopping and going on


def test_stopped_packing_leaves_no_half_shard_and_goes_on(image_folder, packed, tmp_path, monkeypatch):
    written, write_shard = [], pack_dataset.write_shard

    def stop_in_the_third(path, items, records, bar):
        if len(written) == 2:
            records = (record for record in list(records)[:2])  # too few: as if it died in between
        written.append(path)
        return write_shard(path, items, records, bar)

    monkeypatch.setattr(pack_dataset, "write_shard", stop_in_the_third)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        pack(image_folder, tmp_path / "pack", "--images_per_shard", "5")
    monkeypatch.setattr(pack_dataset, "write_shard", write_shard)
    folder = tmp_path / "pack" / "train"
    assert sorted(path.name for path in folder.glob("*.shard")) == ["00000.shard", "00001.shard"]
    with pytest.raises(ValueError, match="was not packed to the end"):
        list_images(folder)
    with pytest.raises(FileExistsError, match="begun with other files or flags"):
        pack(image_folder, tmp_path / "pack", "--images_per_shard", "6")
    before = (folder / "00001.shard").stat().st_mtime_ns
    pack(image_folder, tmp_path / "pack", "--images_per_shard", "5")
    assert (folder / "00001.shard").stat().st_mtime_ns == before
    for path in (packed / "train").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (packed / "train").iterdir())


def test_packing_again_does_nothing_and_never_writes_over_other_files(drawn_images, tmp_path, capsys):
    folder = pack(drawn_images / "val", tmp_path / "pack")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    pack(drawn_images / "val", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "packed already" in capsys.readouterr().out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        pack(drawn_images / "val", tmp_path / "mine")


def test_packing_refuses_packs_and_places_inside_the_source(image_folder, packed, tmp_path):
    with pytest.raises(ValueError, match="is packed already"):
        pack(packed, tmp_path / "pack")
    with pytest.raises(ValueError, match="lies in the folder"):
        pack(image_folder, image_folder / "packed")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        pack(tmp_path / "nowhere", tmp_path / "pack")


def test_files_that_cannot_be_decoded_are_left_out_and_named(image_folder, tmp_path, capsys):
    bad = image_folder / "train" / "cats" / "003.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    found = list_images(pack(image_folder, tmp_path / "pack") / "train")
    assert len(found) == 23 and b"cats/003.jpg" not in found.paths.tolist()
    assert f"left out: {bad}: OSError" in capsys.readouterr().out


# -------------------------------------------------------------------------------- damaged and made-up packs


def test_verify_finds_one_changed_bit(train_pack, capsys):
    pack_dataset.main(pack_dataset.parse_args(["--verify", str(train_pack)]))
    assert "24 records in 1 shards are what was packed" in capsys.readouterr().out
    shard = train_pack / "00000.shard"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"changed since they were packed: .*00000\.shard"):
        pack_dataset.main(pack_dataset.parse_args(["--verify", str(train_pack)]))


def test_damaged_record_is_replaced_and_reported_like_a_bad_file(train_pack):
    shard = train_pack / "00000.shard"
    content = bytearray(shard.read_bytes())
    row = Pack(train_pack).table[2]
    content[row["offset"] + row["size"] // 2] ^= 255
    shard.write_bytes(content)
    data = ImageDataset(list_images(train_pack), build_pretraining_transform((16, 16), 0.2))
    (bad,) = data[SampleKey(0, 2)].bad_files
    assert bad.path == str(train_pack / "cats" / "002.jpg") and "damaged since it was packed" in bad.reason
    assert data[SampleKey(0, 3)].bad_files == []


def change_header(folder: Path, **changes: object) -> None:
    header = json.loads((folder / PACK_FILE).read_text())
    (folder / PACK_FILE).write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(version=2), "version 2"),
        (dict(kind="videos"), "kind"),
        (dict(encoding="pickle"), "encoding"),
        (dict(classes=["cats"]), "a label"),
        (dict(classes=["cats", "cats"]), "classes"),
        (dict(classes="cats"), "classes"),
        (dict(short_side="256"), "short_side"),
        (dict(shards=[]), "shards"),
        (dict(shards={}), "shards"),
        (dict(shards=[{"file": "../one_pack/00000.shard", "bytes": 1, "records": 1}]), "shards"),
        (dict(shards=[{"file": "/etc/passwd", "bytes": 1, "records": 1}]), "shards"),
        (dict(shards=[{"file": "00000.shard", "bytes": True, "records": 1}]), "shards"),
        (dict(shards=[{"file": "00000.shard", "bytes": 5, "records": 24}]), "bytes, not 5"),
        (dict(shards=[{"file": "00007.shard", "bytes": 5, "records": 24}]), "cannot be opened"),
        (dict(encoding="raw"), "an image's size"),
    ],
)
def test_header_that_no_packing_wrote_is_refused(train_pack, changes, named):
    change_header(train_pack, **changes)
    with pytest.raises(ValueError, match=named):
        list_images(train_pack)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_header_that_is_no_object_is_refused(train_pack, content):
    (train_pack / PACK_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"pack\.json"):
        list_images(train_pack)


def test_shard_that_is_a_link_is_not_followed(train_pack, tmp_path):
    (train_pack / "00000.shard").rename(tmp_path / "elsewhere")
    (train_pack / "00000.shard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot be opened"):
        list_images(train_pack)


def test_shard_that_was_cut_off_is_refused(train_pack):
    shard = train_pack / "00000.shard"
    content = shard.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:size])
        with pytest.raises(ValueError, match="is damaged"):
            list_images(train_pack)
        header = json.loads((train_pack / PACK_FILE).read_text())
        change_header(train_pack, shards=[header["shards"][0] | {"bytes": size}])
        with pytest.raises(ValueError, match="is damaged"):
            list_images(train_pack)


def make_up_shard(folder: Path, rows: list[tuple], names: list[bytes], **changes: object) -> None:
    """Write a pack of one shard of 300 zeros with a sound trailer and checksum, but any table and names."""
    folder.mkdir()
    index = np.array(rows, SHARD_TABLE).tobytes() + b"\0".join(names)
    trailer = SHARD_TRAILER.pack(len(rows), len(b"\0".join(names)), zlib.crc32(index), SHARD_MAGIC)
    (folder / "00000.shard").write_bytes(bytes(300) + index + trailer)
    shard = {"file": "00000.shard", "bytes": (folder / "00000.shard").stat().st_size, "records": len(rows)}
    header = {"version": 1, "kind": "images", "encoding": "raw", "short_side": 10, "classes": [], "shards": [shard]}
    (folder / PACK_FILE).write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    ("row", "name", "named"),
    [
        ((0, 300, 10, 10, -1, 0), b"ok.jpg", None),
        ((1, 300, 10, 10, -1, 0), b"ok.jpg", "a record's place"),
        ((2**64 - 300, 300, 10, 10, -1, 0), b"ok.jpg", "a record's place"),
        ((0, 2**64 - 1, 10, 10, -1, 0), b"ok.jpg", "a record's size"),
        ((0, 300, 2**32 - 1, 2**32 - 1, -1, 0), b"ok.jpg", "an image's size"),
        ((0, 300, 10, 11, -1, 0), b"ok.jpg", "an image's size"),
        ((0, 0, 0, 10, -1, 0), b"ok.jpg", "an image's size"),
        ((0, 300, 10, 10, 0, 0), b"ok.jpg", "a label"),
        ((0, 300, 10, 10, -2, 0), b"ok.jpg", "a label"),
        ((0, 300, 10, 10, -1, 0), b"../../etc/passwd", "its names"),
        ((0, 300, 10, 10, -1, 0), b"/etc/passwd", "its names"),
        ((0, 300, 10, 10, -1, 0), b"", "its names"),
        ((0, 300, 10, 10, -1, 0), b"a" * 2000, "its names"),
        ((0, 300, 10, 10, -1, 0), b"one.jpg\0two.jpg", "its names"),
    ],
)
def test_table_that_no_packing_wrote_is_refused(tmp_path, row, name, named):
    make_up_shard(tmp_path / "pack", [row], [name])
    if named is None:
        assert np.asarray(list_images(tmp_path / "pack").read_image(0, 3)).shape == (10, 10, 3)
    else:
        with pytest.raises(ValueError, match=named):
            list_images(tmp_path / "pack")


def test_uncompressed_bombs_are_refused_as_others_are(tmp_path, monkeypatch):
    make_up_shard(tmp_path / "pack", [(0, 300, 10, 10, -1, 0)], [b"ok.jpg"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(ValueError, match="an image's size"):
        list_images(tmp_path / "pack")


def test_changed_name_is_found_by_the_checksum(train_pack):
    shard = train_pack / "00000.shard"
    content = shard.read_bytes()
    assert content.count(b"dogs/004.jpg") == 1
    shard.write_bytes(content.replace(b"dogs/004.jpg", b"dogs/904.jpg"))
    with pytest.raises(ValueError, match="the checksum of its table"):
        list_images(train_pack)


def test_record_of_a_made_up_pack_is_as_safe_as_a_file(tmp_path):
    row = (0, 300, 0, 0, -1, zlib.crc32(bytes(300)))
    make_up_shard(tmp_path / "zeros", [row], [b"zeros.jpg"], encoding="jpeg")
    with pytest.raises(DECODE_ERRORS, match=r"cannot identify image file '.*/zeros/zeros\.jpg'"):
        list_images(tmp_path / "zeros").open_picture(0, 3)


def test_flipped_bytes_raise_the_errors_of_damaged_packs_and_nothing_else(train_pack):
    generator = random.Random(0)
    originals = {path: path.read_bytes() for path in train_pack.iterdir()}
    index_start = int(Pack(train_pack).table["offset"][-1])
    refused = 0
    for _ in range(300):
        path = generator.choice(sorted(originals))
        content = bytearray(originals[path])
        first = index_start if path.suffix == ".shard" else 0  # the table and what is near it
        for _ in range(generator.randint(1, 3)):
            content[generator.randrange(first, len(content))] = generator.randrange(256)
        path.write_bytes(content)
        try:
            files = list_images(train_pack)
        except ValueError as error:
            assert str(train_pack) in str(error)
            refused += 1
        else:
            for index in range(len(files)):
                try:
                    files.open_picture(index, 3).decoded()
                except DECODE_ERRORS:
                    refused += 1
        path.write_bytes(originals[path])
    assert refused > 200


def test_packs_are_taken_for_what_they_are(packed, tmp_path):
    write_pairs(tmp_path / "pairs", np.random.default_rng(0))
    pairs = pack(tmp_path / "pairs", tmp_path / "pack")
    with pytest.raises(ValueError, match="is a pack of pairs, here images are needed"):
        list_images(pairs / "training")
    os.rename(packed / "val", packed / "validation")
    with pytest.raises(ValueError, match="is a pack of images, here pairs are needed"):
        list_pairs(packed, "validation")
    os.rename(packed / "validation", packed / "val")


def test_packs_have_no_transparency_and_say_so(packed):
    with pytest.raises(ValueError, match="packed without transparency"):
        ImageDataset(list_images(packed / "train"), build_pretraining_transform((16, 16), 0.2), channels=4)


@pytest.mark.parametrize("flags", ["", "--verify x --quality 0", "x --output y --short_side 0"])
def test_impossible_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        pack_dataset.parse_args(shlex.split(flags))
    assert "error: " in capsys.readouterr().err
