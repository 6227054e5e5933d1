"""Packs at an address: the runs on packs that are here, what is kept, and stores that fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import as_picture, assert_close, weights
from test_hub import SCRIPTS, flags, train
from test_pack_dataset import pack

from dataset import SHARDS_AT_ONCE, ImageDataset, SampleKey, StepSampler, build_pretraining_transform
from storage import remote
from storage.console import DataError
from storage.lists import list_images
from storage.packs import MAX_OPEN_REMOTE
from storage.remote import is_url, mirror, open_pack
from storage.workers import WaitInterrupted


@pytest.fixture(scope="module")
def packed(drawn_images, tmp_path_factory) -> Path:
    """The drawn images in three shards for training and one for validation; not to be changed."""
    return pack(drawn_images, tmp_path_factory.mktemp("store") / "pack", "--images_per_shard", "8")


@pytest.fixture(scope="module")
def packed_pairs(drawn_pairs, tmp_path_factory) -> Path:
    return pack(drawn_pairs, tmp_path_factory.mktemp("store") / "pairs", "--images_per_shard", "4")


@pytest.fixture
def store(packed, tmp_path) -> Path:
    """A store that the test may damage."""
    return shutil.copytree(packed, tmp_path / "store")


def kept(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "shards").glob("*/train*/*.tar"))


# -------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_run_is_that_on_the_pack_here_where_all_shards_are_mixed(packed, packed_pairs, tmp_path, script):
    data = packed_pairs if script == "finetune_segmentation" else packed
    here, there = train(script, data, tmp_path / "here"), train(script, f"file://{data}", tmp_path / "there")
    assert_close(weights(there / "checkpoint_4"), weights(here / "checkpoint_4"), atol=0)
    assert kept(tmp_path / "there") == sorted(path.name for path in data.glob("train*/*.tar"))


def test_two_processes_a_small_cache_and_a_resume_are_one_undisturbed_process(drawn_images, fork, tmp_path):
    """Twelve shards, of which no more than two are kept, and each process, and its data worker, reads all of them."""
    place = f"file://{pack(drawn_images, tmp_path / 'store', '--images_per_shard', '2')}"
    whole = train("pretrain_mae", place, tmp_path / "whole")
    assert len(kept(tmp_path / "whole")) == 12
    small = flags("pretrain_mae", place, tmp_path / "small", "--shard_cache_gb", "0", "--num_workers", "1")
    fork("pretrain_mae", [*small, "--per_gpu_batch_size", "2"], num_processes=2)
    assert 2 <= len(kept(tmp_path / "small")) <= 4  # one more for each process that has just fetched one
    assert_close(weights(tmp_path / "small" / "run" / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=1e-4)
    shutil.copytree(whole / "checkpoint_2", tmp_path / "resumed" / "run" / "checkpoint_2")
    resumed = train("pretrain_mae", place, tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    assert_close(weights(resumed / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=0)


def test_shards_come_a_few_at_a_time_and_each_image_once_an_epoch():
    shards = np.arange(120) // 5
    sampler = StepSampler(120, 4, shards=shards, seed=3)
    orders = [sampler.order(epoch) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sorted(order) == list(range(120))
        stretches = np.array(order).reshape(-1, 5 * SHARDS_AT_ONCE)
        found = [set(shards[stretch]) for stretch in stretches]
        assert all(len(few) == SHARDS_AT_ONCE for few in found) and set.union(*found) == set(range(24))
        assert any(np.diff(shards[stretch]).any() for stretch in stretches[:, :6])  # mixed, not one after another
    halves = [StepSampler(120, 2, rank=rank, world_size=2, shards=shards, seed=3) for rank in range(2)]
    both = [[key.index for keys in step for key in keys] for step in zip(*halves, strict=True)]
    assert [index for step in both for index in step] == orders[0]
    one = StepSampler(120, 4, shards=np.zeros(120, dtype=int), seed=3).order(1)
    assert sorted(one) == list(range(120)) and one != sorted(one)


# -------------------------------------------------------------------------------- what is kept


def test_what_is_used_last_is_kept_and_a_process_keeps_few_shards_open(drawn_images, tmp_path):
    store = pack(drawn_images / "train", tmp_path / "store", "--images_per_shard", "2")
    folder = mirror(f"file://{store}", tmp_path / "cache", 0)
    files = list_images(folder)
    assert files.shards.tolist() == [index // 2 for index in range(24)] and not list(folder.glob("*.tar"))
    expected = list_images(store)
    for index in (0, 23, 10, 5):
        assert as_picture(files, index, 3).tobytes() == as_picture(expected, index, 3).tobytes()
        assert (folder / f"shard-{index // 2:06d}.tar").is_file() and len(list(folder.glob("*.tar"))) <= 2
    for index in range(24):
        as_picture(files, index, 3)
        assert len(files.pack.open_shards) <= MAX_OPEN_REMOTE


def test_pack_that_is_made_anew_is_copied_anew(drawn_images, store, tmp_path):
    place = f"file://{store / 'val'}"
    folder = mirror(place, tmp_path / "cache", 1)
    before = as_picture(list_images(folder), 0, 3).size
    shutil.rmtree(store / "val")
    pack(drawn_images / "val", store / "val", "--short_side", "12")
    assert mirror(place, tmp_path / "cache", 1) == folder
    assert min(as_picture(list_images(folder), 0, 3).size) == 12 < min(before)


# -------------------------------------------------------------------------------- stores that fail


@pytest.fixture
def short_pauses(monkeypatch) -> None:
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shard_that_is_gone_ends_the_run_and_is_no_bad_file(store, tmp_path, num_workers, short_pauses):
    for shard in (store / "train").glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"train/shard-00000\d\.tar does not come from its store: FileNotFoundError"):
        train("pretrain_mae", f"file://{store}", tmp_path, "--num_workers", str(num_workers))
    assert not (tmp_path / "run" / "bad_files.txt").exists()


def test_shard_of_another_size_is_refused(store, tmp_path):
    shard = store / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    files = list_images(mirror(f"file://{store}", tmp_path / "cache", 1) / "train")
    with pytest.raises(DataError, match=r"shard-000000\.tar has .* bytes, not .*; pack the folder again"):
        as_picture(files, 0, 3)
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_store_that_fails_for_a_while_is_asked_again(store, tmp_path, monkeypatch, short_pauses):
    folder, failures = mirror(f"file://{store}", tmp_path, 1) / "train", [TimeoutError("slow"), ConnectionError("gone")]
    open_store = remote.open_store

    def failing(url: str):
        found, root = open_store(url)
        get_file = found.get_file

        def get(*args):
            if failures:
                raise failures.pop()
            get_file(*args)

        monkeypatch.setattr(found, "get_file", get)
        return found, root

    monkeypatch.setattr(remote, "open_store", failing)
    assert as_picture(list_images(folder), 0, 3).size and not failures


@pytest.mark.parametrize("error", [ValueError("of the store"), WaitInterrupted()])
def test_no_error_of_a_store_passes_for_a_bad_image_and_a_signal_is_not_held_up(
    store, tmp_path, monkeypatch, short_pauses, error
):
    files = list_images(mirror(f"file://{store}", tmp_path, 1) / "train")
    asked = []

    class Failing:
        def get_file(self, *paths: str) -> None:
            asked.append(paths)
            raise error

    monkeypatch.setattr(remote, "open_store", lambda url: (Failing(), "root"))
    expected = DataError if isinstance(error, ValueError) else WaitInterrupted
    with pytest.raises(expected):
        ImageDataset(files, build_pretraining_transform((16, 16), 0.2))[SampleKey(0, 0)]
    assert len(asked) == (3 if expected is DataError else 1)


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("file:///nowhere/at/all", DataError, r"holds no pack\.json, nor does train/ or validation/"),
        ("nosuch://a/b", DataError, "nosuch://a/b cannot be opened: Protocol not known"),
    ],
)
def test_address_without_a_pack_is_refused(tmp_path, place, error, message):
    with pytest.raises(error, match=message):
        mirror(place, tmp_path, 1)


def test_store_that_needs_a_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ImportError, match=r"s3://bucket/pack needs a package: Install s3fs"):
        mirror("s3://bucket/pack", tmp_path, 1)


def test_damaged_note_of_the_source_is_refused(store, tmp_path):
    folder = mirror(f"file://{store}", tmp_path, 1) / "train"
    (folder / "source.json").write_text(json.dumps({"url": 3}))
    with pytest.raises(ValueError, match=r"source\.json is damaged; remove"):
        open_pack(folder, "images")


def test_paths_are_no_addresses():
    places = ("s3://a/b", "file:///a", "/a/b", "hf:a/b", "C:/a")
    assert [is_url(place) for place in places] == [True, True, False, False, False]
