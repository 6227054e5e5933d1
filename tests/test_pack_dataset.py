"""Packing: what is stored, stopping and going on, and runs that are the same as on the folder."""

import dataclasses
import json
import multiprocessing
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import TINY, as_picture, draw_images, load_tool, rows
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
    ResizeCenterCrop,
    SampleKey,
    build_values,
    keep_size,
)
from model import ViTMAEForPreTraining
from storage.decoding import Area, read_image
from storage.labels import label_table
from storage.lists import ListCache, list_images
from storage.pairs import check_pairs, list_pairs

pack_dataset = load_tool("pack_dataset")
sys.modules["pack_dataset"] = pack_dataset  # where its worker processes look for its functions


def pack(source: Path, output: Path, *more: str) -> Path:
    arguments = [str(source), "--output", str(output), "--num_workers", "1", *more]
    limit = Image.MAX_IMAGE_PIXELS
    try:
        pack_dataset.main(pack_dataset.parse_args(arguments))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return output


@pytest.fixture(scope="module")
def packed(drawn_images, tmp_path_factory) -> Path:
    """The drawn images, which are small enough to stay as they are, in shards of five; not to be changed."""
    return pack(drawn_images, tmp_path_factory.mktemp("packed") / "pack", "--images_per_shard", "5")


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
        image = as_picture(found, index, 3)
        assert image.size == size
        difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int))
        assert difference.max() == 0 if encoding == "raw" else difference.mean() < 4
        picture = found.open_picture(index, 3)
        cut = picture.cut(Area(2, 3, 10, 9)).permute(1, 2, 0).numpy()
        assert np.array_equal(cut, np.asarray(image)[2:12, 3:12])
        assert np.array_equal(picture.decoded().pixels.permute(1, 2, 0), np.asarray(image))
        grey = image.convert("L") if raw else read_image(found.pack.read(index), 1)
        assert np.array_equal(found.open_picture(index, 1).decoded().pixels[0], np.asarray(grey))


def test_rotation_and_transparency_are_settled_when_packing(tmp_path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "images" / "turned.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "images" / "clear.png")
    found = list_images(pack(tmp_path / "images", tmp_path / "pack"))
    assert as_picture(found, 1, 3).size == (20, 40) and np.asarray(as_picture(found, 0, 3)).min() > 250


def test_pairs_pack_byte_for_byte(tmp_path):
    root, generator = tmp_path / "pairs", np.random.default_rng(0)
    write_pairs(root, generator)
    packed_root, table = pack(root, tmp_path / "pack", "--images_per_shard", "2"), label_table(150, True)
    for split in ("training", "validation"):
        pairs, found = list_pairs(root, split), list_pairs(packed_root, split)
        assert np.array_equal(found.images, pairs.images) and np.array_equal(found.label_maps, pairs.label_maps)
        check_pairs(found, table, 1, ListCache(tmp_path / "cache"), held_out=True)
        check_pairs(found, table, 1, ListCache(tmp_path / "cache"), held_out=True)
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


def test_stopped_packing_leaves_no_half_shard_and_goes_on(image_folder, packed, tmp_path, monkeypatch):
    written, write_shard = [], pack_dataset.write_shard

    def stop_in_the_third(path, files, header, records, bar):
        if len(written) == 2:
            records = (record for record in list(records)[:2])  # too few: as if it died in between
        written.append(path)
        return write_shard(path, files, header, records, bar)

    monkeypatch.setattr(pack_dataset, "write_shard", stop_in_the_third)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        pack(image_folder, tmp_path / "pack", "--images_per_shard", "5")
    monkeypatch.setattr(pack_dataset, "write_shard", write_shard)
    folder = tmp_path / "pack" / "train"
    assert sorted(path.name for path in folder.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    with pytest.raises(ValueError, match="was not packed to the end"):
        list_images(folder)
    with pytest.raises(FileExistsError, match="begun with other files or flags"):
        pack(image_folder, tmp_path / "pack", "--images_per_shard", "6")
    before = (folder / "shard-000001.tar").stat().st_mtime_ns
    pack(image_folder, tmp_path / "pack", "--images_per_shard", "5")
    assert (folder / "shard-000001.tar").stat().st_mtime_ns == before
    for path in (packed / "train").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (packed / "train").iterdir())


@pytest.mark.parametrize("left", [[], ["packing.json.unfinished.tmp"], ["pack.json", "packing.json"]])
def test_packing_goes_on_after_a_kill_at_its_beginning_or_end(drawn_images, tmp_path, left):
    folder = tmp_path / "pack"
    if "pack.json" in left:
        pack(drawn_images / "val", folder)
    folder.mkdir(exist_ok=True)
    for name in set(left) - {"pack.json"}:
        (folder / name).write_text('{"version')
    assert len(list_images(pack(drawn_images / "val", folder))) == 8
    assert sorted(path.name for path in folder.iterdir()) == ["pack.json", "shard-000000.npz", "shard-000000.tar"]


def test_second_packer_of_a_folder_is_refused(drawn_images, tmp_path):
    ready, go_on = multiprocessing.Pipe(), multiprocessing.Pipe()

    def hold() -> None:
        with pack_dataset.locked(tmp_path / "pack"):
            ready[1].send(True)
            go_on[0].recv()

    other = multiprocessing.get_context("fork").Process(target=hold)
    other.start()
    ready[0].recv()
    with pytest.raises(BlockingIOError, match="another process packs into"):
        pack(drawn_images / "val", tmp_path / "pack")
    go_on[1].send(True)
    other.join()
    assert len(list_images(pack(drawn_images / "val", tmp_path / "pack"))) == 8


def test_pair_that_cannot_be_read_is_refused_as_leaving_one_out_would_shift_the_labels(tmp_path):
    write_pairs(tmp_path / "pairs", np.random.default_rng(0))
    image = tmp_path / "pairs" / "images" / "training" / "2.jpg"
    image.unlink()
    os.mkfifo(image)
    with pytest.raises(
        ValueError, match=r"a pair cannot be read: .*images/training/2\.jpg: OSError: .* no regular file"
    ):
        pack(tmp_path / "pairs", tmp_path / "pack")
    with pytest.raises(ValueError, match="was not packed to the end"):
        list_pairs(tmp_path / "pack", "training")


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


def test_verify_finds_one_changed_bit(drawn_images, tmp_path, capsys):
    folder = pack(drawn_images / "train", tmp_path / "pack")
    pack_dataset.main(pack_dataset.parse_args(["--verify", str(folder)]))
    assert "24 records in 1 shards are what was packed" in capsys.readouterr().out
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"changed since they were packed: .*cats/000\.jpg"):
        pack_dataset.main(pack_dataset.parse_args(["--verify", str(folder)]))


@pytest.mark.parametrize("flags", ["", "--verify x --quality 0", "x --output y --short_side 0"])
def test_impossible_flags_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        pack_dataset.parse_args(shlex.split(flags))
    assert "error: " in capsys.readouterr().err


# -------------------------------------------------------------------------------- what is no photograph, or huge


@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_images_in_their_own_units_are_packed_byte_for_byte(tmp_path, suffix):
    tiles = np.random.default_rng(0).integers(0, 60000, (3, 5, 6, 8), dtype=np.uint16)
    for index, tile in enumerate(tiles):
        folder = tmp_path / "tiles" / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        if suffix == "npy":
            np.save(folder / f"{index}.npy", tile)
        else:
            tifffile.imwrite(folder / f"{index}.tif", tile, planarconfig="separate", photometric="minisblack")
    packed = list_images(pack(tmp_path / "tiles", tmp_path / "pack", "--as_is") / "train")
    assert packed.classes == ("a", "b") and len(packed) == 3
    for index, tile in enumerate(tiles[[0, 2, 1]]):
        picture = packed.open_values(index, 5)
        assert (picture.cut(Area(1, 2, 3, 4)).numpy() == tile[:, 1:4, 2:6]).all()


@pytest.mark.parametrize("more", [[], ["--raw"]])
def test_packing_leaves_out_by_name_what_8_bits_would_change(tmp_path, more, capsys):
    draw_images(tmp_path / "images", 1)
    Image.new("I;16", (8, 6), 500).save(tmp_path / "images" / "deep.png")
    tifffile.imwrite(tmp_path / "images" / "signed.tif", np.zeros((6, 8), np.int16))
    tifffile.imwrite(tmp_path / "images" / "near.tif", np.zeros((6, 8, 4), np.uint8), extrasamples=["unspecified"])
    found = list_images(pack(tmp_path / "images", tmp_path / "pack", *more))
    assert len(found) == 1
    said = capsys.readouterr().out
    for name in ("deep.png", "signed.tif", "near.tif"):
        assert (
            f"{name}: ValueError: it has more than 8 bits, or more bands than colours: pack the folder with --as_is"
            in said
        )


def test_photographs_beyond_the_limit_of_pixels_are_packed_smaller(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for name in ("huge.jpg", "huge.png"):
        coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((800, 600), Image.Resampling.BICUBIC).save(tmp_path / "images" / name, quality=95)
    limit = ["--max_image_pixels", "100000", "--short_side", "64"]
    found = list_images(pack(tmp_path / "images", tmp_path / "pack", *limit))
    assert [os.path.basename(found.path(i)) for i in range(len(found))] == ["huge.jpg"]
    said = capsys.readouterr().out
    assert "huge.png: DecompressionBombError: " in said and "--max_image_pixels takes larger ones" in said
    with Image.open(tmp_path / "images" / "huge.jpg") as image:
        expected = np.asarray(image.resize((85, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(as_picture(found, 0, 3)).astype(int) - expected).mean() < 3


def test_pack_of_nothing_says_why(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("I;16", (8, 6), 500).save(tmp_path / "images" / "deep.png")
    with pytest.raises(ValueError, match=r"can be packed; left out: .*deep\.png: .*--as_is"):
        pack(tmp_path / "images", tmp_path / "pack")


def test_pack_as_is_serves_four_bands_and_a_raw_one_greys(tmp_path):
    draw_images(tmp_path / "images", 2)
    raw, kept = (pack(tmp_path / "images", tmp_path / name, f"--{name}") for name in ("raw", "as_is"))
    values = build_values((0, 255), (0.5,) * 4, (0.5,) * 4)
    assert (
        ImageDataset(list_images(kept), ResizeCenterCrop((8, 8)), channels=4, values=values)[
            SampleKey(0, 0)
        ].image.shape[0]
        == 4
    )
    expected = np.asarray(as_picture(list_images(raw), 0, 1))
    assert (list_images(raw).open_values(0, 1).whole()[0].numpy() == expected).all()
    with pytest.raises(ValueError, match="is packed as colours; --input_channels 2 needs the folder itself"):
        list_images(raw).open_values(0, 2)
