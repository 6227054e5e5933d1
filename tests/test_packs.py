"""Packs: the same samples and labels as from the folder; damaged and made-up packs."""

import gc
import json
import os
import pickle
import random
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from conftest import as_picture
from PIL import Image
from test_pack_dataset import pack, write_pairs

from dataset import ImageDataset, SampleKey, StepSampler, build_pretraining_transform, build_training_loader
from storage.decoding import DECODE_ERRORS
from storage.lists import find_splits, list_images
from storage.packs import PACK_FILE, SHARD_TABLE, Pack, read_arrays
from storage.pairs import list_pairs


@pytest.fixture(scope="module")
def packed(drawn_images, tmp_path_factory) -> Path:
    """The drawn images, which are small enough to stay as they are, in shards of five; not to be changed."""
    return pack(drawn_images, tmp_path_factory.mktemp("packed") / "pack", "--images_per_shard", "5")


@pytest.fixture(scope="module")
def made_pack(drawn_images, tmp_path_factory) -> Path:
    """A pack of the training images in one shard; not to be changed."""
    return pack(drawn_images / "train", tmp_path_factory.mktemp("packed") / "one_pack")


@pytest.fixture
def train_pack(made_pack, tmp_path) -> Path:
    """A pack of the training images in one shard, free to be changed by the test."""
    return shutil.copytree(made_pack, tmp_path / "one_pack")


def test_pack_has_the_names_labels_classes_and_samples_of_its_folder(drawn_images, packed):
    for split in (0, 1):
        files, found = (list_images(find_splits(root)[split]) for root in (drawn_images, packed))
        assert found.classes == files.classes == ("cats", "dogs")
        assert np.array_equal(found.paths, files.paths) and np.array_equal(found.labels, files.labels)
        transform = build_pretraining_transform((16, 16), 0.2)
        for index in range(len(files)):
            assert as_picture(found, index, 3).tobytes() == as_picture(files, index, 3).tobytes()
            sample, expected = (ImageDataset(f, transform)[SampleKey(1, index)] for f in (found, files))
            assert torch.equal(sample.image, expected.image) and sample.label == expected.label


def test_pack_cannot_be_taken_for_its_folder_or_another_pack_by_a_resumed_run(drawn_images, packed, tmp_path):
    smaller = pack(drawn_images, tmp_path / "pack", "--short_side", "16")
    prints = {list_images(root / "train").fingerprint() for root in (drawn_images, packed, smaller)}
    assert len(prints) == 3


def test_packs_serve_workers_threads_and_other_processes(packed):
    files = list_images(packed / "train")
    data = ImageDataset(files, build_pretraining_transform((16, 16), 0.2), noise_size=4)
    copy = pickle.loads(pickle.dumps(files))  # as for a worker that is no fork
    assert as_picture(copy, 7, 3).tobytes() == as_picture(files, 7, 3).tobytes()
    del copy
    gc.collect()
    as_picture(files, 7, 3)  # its files are its own, and were not closed with the copy's
    sampler = StepSampler(24, 4)
    loader = build_training_loader(data, sampler, 2, pin_memory=False)
    for keys, batch in zip(sampler, loader, strict=True):
        assert torch.equal(batch.images, torch.stack([data[key].image for key in keys]))


def test_thinned_packs_keep_images_and_labels_together(packed):
    files = list_images(packed / "train")
    few = files.subsample(5)
    for index, place in enumerate([0, 6, 12, 17, 23]):
        assert few.paths[index] == files.paths[place] and few.labels[index] == files.labels[place]
        assert as_picture(few, index, 3).tobytes() == as_picture(files, place, 3).tobytes()


def test_damaged_record_is_replaced_and_reported_like_a_bad_file(train_pack):
    shard = train_pack / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    row = Pack(train_pack).table[2]
    content[row["offset"] + row["size"] // 2] ^= 255
    shard.write_bytes(content)
    data = ImageDataset(list_images(train_pack), build_pretraining_transform((16, 16), 0.2))
    (bad,) = data[SampleKey(0, 2)].bad_files
    assert bad.path == str(train_pack / "cats" / "002.jpg") and "damaged since it was packed" in bad.reason
    assert data[SampleKey(0, 3)].bad_files == []


@pytest.fixture
def raw_pack(drawn_images, tmp_path) -> Path:
    """A pack of the training images as pixels, in one shard."""
    return pack(drawn_images / "train", tmp_path / "raw_pack", "--raw")


def invert_pixels(folder: Path, record: int) -> None:
    """Overwrite the last row of an image of a raw pack, in place, as another program might."""
    row = Pack(folder).table[record]
    with (folder / "shard-000000.tar").open("r+b") as shard:
        shard.seek(row["offset"] + row["size"] - 3 * row["width"])
        line = shard.read(3 * row["width"])
        shard.seek(-len(line), os.SEEK_CUR)
        shard.write(bytes(255 - value for value in line))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_that_were_overwritten_are_a_bad_file_also_where_the_crop_does_not_reach(raw_pack, num_workers):
    data = ImageDataset(list_images(raw_pack), build_pretraining_transform((8, 8), 0.05))
    invert_pixels(raw_pack, 2)
    batches = build_training_loader(data, StepSampler(24, 4), num_workers)
    (bad,) = {bad for batch in batches for bad in batch.bad_files}
    assert bad.path == str(raw_pack / "cats" / "002.jpg") and "damaged since it was packed" in bad.reason


def test_record_is_compared_once_for_all_data_workers(raw_pack):
    data = ImageDataset(list_images(raw_pack), build_pretraining_transform((8, 8), 0.05))
    loader = build_training_loader(data, StepSampler(24, 4), 2)
    touched = {bad for batch in loader for bad in batch.bad_files}
    assert not touched and data.files.pack.compared.tolist() == [1] * 24  # seen here, where nothing was read
    assert list_images(raw_pack).pack.compared.sum() == 0  # another run looks again


def test_rows_of_a_raw_pack_are_the_same_at_the_first_and_later_touches(raw_pack):
    files, again = list_images(raw_pack), list_images(raw_pack)
    for record in range(len(files)):
        whole = files.pack.read_rows(record, 0, int(files.pack.table[record]["height"]))
        for _ in range(2):
            assert torch.equal(again.pack.read_rows(record, 3, 4), whole[:, 3:7])


def change_header(folder: Path, **changes: object) -> None:
    header = json.loads((folder / PACK_FILE).read_text())
    (folder / PACK_FILE).write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(version=1), "version 1, this code reads 2; pack the folder again: python tools/pack_dataset.py"),
        (dict(kind="videos"), "kind"),
        (dict(encoding="pickle"), "encoding"),
        (dict(classes=["cats"]), "a label"),
        (dict(classes=["cats", "cats"]), "classes"),
        (dict(classes="cats"), "classes"),
        (dict(short_side="256"), "short_side"),
        (dict(shards=[]), "shards"),
        (dict(shards={}), "shards"),
        (dict(shards=[{"file": "../one_pack/shard-000000.tar", "bytes": 1, "samples": 1}]), "shards"),
        (dict(shards=[{"file": "/etc/passwd", "bytes": 1, "samples": 1}]), "shards"),
        (dict(shards=[{"file": "shard-000000.tar", "bytes": True, "samples": 1}]), "shards"),
        (dict(shards=[{"file": "shard-000000.tar", "bytes": 5, "samples": 24}]), "bytes, not 5"),
        (dict(shards=[{"file": "shard-000007.tar", "bytes": 5, "samples": 24}]), "cannot be read"),
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
    (train_pack / "shard-000000.tar").rename(tmp_path / "elsewhere")
    (train_pack / "shard-000000.tar").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="cannot be read"):
        list_images(train_pack)


def test_shard_that_was_cut_off_is_refused(train_pack):
    shard = train_pack / "shard-000000.tar"
    content = shard.read_bytes()
    last = Pack(train_pack).table[-1]
    for size in (0, 10, len(content) // 2, int(last["offset"] + last["size"]) - 1):
        shard.write_bytes(content[:size])
        with pytest.raises(ValueError, match="is damaged"):
            list_images(train_pack)
        header = json.loads((train_pack / PACK_FILE).read_text())
        change_header(train_pack, shards=[header["shards"][0] | {"bytes": size}])
        with pytest.raises(ValueError, match="is damaged"):
            list_images(train_pack)


def make_up_shard(folder: Path, rows: list[tuple], names: list[bytes], **changes: object) -> None:
    """Write a pack of one shard of 300 zeros with a sound index of any table and names."""
    folder.mkdir()
    np.savez(folder / "shard-000000.npz", paths=np.array(names, dtype=bytes), table=np.array(rows, SHARD_TABLE))
    (folder / "shard-000000.tar").write_bytes(bytes(300))
    shard = {"file": "shard-000000.tar", "bytes": 300, "samples": len(rows)}
    header = {"version": 2, "kind": "images", "encoding": "raw", "short_side": 10, "classes": [], "shards": [shard]}
    (folder / PACK_FILE).write_text(json.dumps(header | changes))


@pytest.mark.parametrize(
    ("row", "name", "named"),
    [
        ((0, 300, 10, 10, -1, zlib.crc32(bytes(300))), b"ok.jpg", None),
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
    ],
)
def test_table_that_no_packing_wrote_is_refused(tmp_path, row, name, named):
    make_up_shard(tmp_path / "pack", [row], [name])
    if named is None:
        assert np.asarray(as_picture(list_images(tmp_path / "pack"), 0, 3)).shape == (10, 10, 3)
    else:
        with pytest.raises(ValueError, match=named):
            list_images(tmp_path / "pack")


def test_uncompressed_bombs_are_refused_as_others_are(tmp_path, monkeypatch):
    make_up_shard(tmp_path / "pack", [(0, 300, 10, 10, -1, 0)], [b"ok.jpg"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(ValueError, match="an image's size"):
        list_images(tmp_path / "pack")


def test_changed_name_is_found_by_the_checksum(train_pack):
    index = train_pack / "shard-000000.npz"
    content = index.read_bytes()
    assert content.count(b"dogs/004.jpg") == 1
    index.write_bytes(content.replace(b"dogs/004.jpg", b"dogs/904.jpg"))
    with pytest.raises(ValueError, match=r"Bad CRC-32 for file 'paths\.npy'"):
        list_images(train_pack)


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (dict(paths=np.array([b"a.jpg"])), "other arrays"),
        (dict(paths=np.array([b"a.jpg"]), table=np.zeros(1)), "other columns"),
        (dict(paths=np.array(["a.jpg"]), table=np.zeros(1, SHARD_TABLE)), "other columns"),
        (dict(paths=np.array([[b"a.jpg"]]), table=np.zeros((1, 1), SHARD_TABLE)), "other columns"),
        (dict(paths=np.array([b"a.jpg", b"b.jpg"]), table=np.zeros(1, SHARD_TABLE)), "its names"),
        (dict(paths=np.array([object()]), table=np.zeros(1, SHARD_TABLE)), "allow_pickle"),
    ],
)
def test_index_of_other_arrays_is_refused(train_pack, arrays, named):
    np.savez(train_pack / "shard-000000.npz", **arrays)
    with pytest.raises(ValueError, match=named):
        list_images(train_pack)


def test_index_that_is_compressed_or_claims_more_than_it_has_is_refused(train_pack):
    index = train_pack / "shard-000000.npz"
    arrays, content = read_arrays(index), index.read_bytes()
    np.savez_compressed(index, **arrays)
    with pytest.raises(ValueError, match="it is compressed"):
        list_images(train_pack)
    shape = f"({len(arrays['table'])},)".encode()
    index.write_bytes(content.replace(b"'shape': " + shape + b", }        ", b"'shape': (99999999999,), }"))
    with pytest.raises(ValueError, match=r"shard-000000\.npz is damaged"):
        list_images(train_pack)


def test_packs_are_read_by_webdataset(packed, drawn_images, tmp_path):
    files = list_images(packed / "train")
    shards = sorted(map(str, (packed / "train").glob("*.tar")))
    found = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg", "cls"))
    assert [f"{key}.jpg".encode() for key, _, _ in found] == files.paths.tolist() and len(shards) == 5
    for index, (_, image, label) in enumerate(found):
        assert image.tobytes() == as_picture(files, index, 3).tobytes() and label == files.labels[index]
    raw = pack(drawn_images / "train", tmp_path / "raw", "--raw")
    arrays = webdataset.WebDataset(str(raw / "shard-000000.tar"), shardshuffle=False).decode().to_tuple("npy", "cls")
    for index, (array, label) in enumerate(arrays):
        assert array.tobytes() == as_picture(list_images(raw), index, 3).tobytes() and label == files.labels[index]
    write_pairs(tmp_path / "pairs", np.random.default_rng(0))
    pairs = pack(tmp_path / "pairs", tmp_path / "pack") / "training" / "shard-000000.tar"
    samples = webdataset.WebDataset(str(pairs), shardshuffle=False)
    both = [(sample["jpg"], sample["seg.png"]) for sample in samples]
    listed = list_pairs(tmp_path / "pack", "training")
    assert both == [(listed.image_file(i).getvalue(), listed.label_file(i).getvalue()) for i in range(5)]


def test_packs_are_read_by_tar(packed):
    files = list_images(packed / "train")
    with tarfile.open(packed / "train" / "shard-000001.tar") as tar:
        assert tar.getnames()[:2] == ["cats/005.jpg", "cats/005.cls"]
        assert tar.extractfile("cats/005.jpg").read() == files.pack.read(5).getvalue()


def test_record_of_a_made_up_pack_is_as_safe_as_a_file(tmp_path):
    row = (0, 300, 0, 0, -1, zlib.crc32(bytes(300)))
    make_up_shard(tmp_path / "zeros", [row], [b"zeros.jpg"], encoding="jpeg")
    with pytest.raises(DECODE_ERRORS, match=r"cannot identify image file '.*/zeros/zeros\.jpg'"):
        list_images(tmp_path / "zeros").open_picture(0, 3)


def test_flipped_bytes_raise_the_errors_of_damaged_packs_and_nothing_else(train_pack):
    generator = random.Random(0)
    originals = {path: path.read_bytes() for path in train_pack.iterdir()}
    sound = list_images(train_pack)
    pixels = [sound.open_picture(index, 3).decoded().pixels for index in range(len(sound))]
    last_record = int(Pack(train_pack).table["offset"][-1])
    refused = 0
    for _ in range(300):
        path = generator.choice(sorted(originals))
        content = bytearray(originals[path])
        first = last_record if path.suffix == ".tar" else 0
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
                    assert torch.equal(files.open_picture(index, 3).decoded().pixels, pixels[index])
                except DECODE_ERRORS:
                    refused += 1
        path.write_bytes(originals[path])
    assert refused > 150  # the other bytes are padding, classes for webdataset, and numbers that nobody reads


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
