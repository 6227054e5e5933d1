"""Rows 22 and 23: shards that are overwritten, locales, names, rights, and places where nothing can be kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, draw_images
from test_pack_dataset import pack

from storage.packs import Pack

# ------------------------------------------------------------------------------------------------ overwritten shards


def overwrite(shard: Path, row) -> None:
    """Write zeros over the last rows of an image of a raw pack, in place."""
    with shard.open("r+b") as file:
        file.seek(row["offset"] + row["size"] // 2)
        file.write(bytes(int(row["size"] - row["size"] // 2)))


def test_pixels_of_a_pack_overwritten_between_two_starts_are_a_bad_file(job, data, faults, tmp_path):
    packed = pack(data["pretrain_mae"] / "train", tmp_path / "packed", "--raw")
    flags = f"--path_to_data {packed} --max_bad_fraction 0.1 --min_crop_scale 0.05"
    with faults(22, "record of a raw pack overwritten between two starts, pretrain_mae") as count:
        first = job("pretrain_mae", tmp_path / "work").with_flags(flags)
        assert first.start(("save_at", {"steps": [7]}), ("die", {"rank": 0, "step": 8})).wait() == -signal.SIGKILL
        assert not (first.experiment / "bad_files.txt").exists()
        found = Pack(packed)
        for record in (3, 30):
            overwrite(packed / "00000.shard", found.table[record])
        count.injected += 2
        printed = first.finish()
        rows = (first.experiment / "bad_files.txt").read_text(encoding="utf-8").splitlines()
        expected = {found.path(record) for record in (3, 30)}
        assert {row.split("\t")[0] for row in rows} == expected
        assert all("damaged since it was packed" in row for row in rows)
        assert all(f"cannot be used, replaced by another: {path}" in printed for path in expected)
        count.survived += 2


# ------------------------------------------------------------------------------------------------ locales

NAMES = [name.encode() for name in ("café", "cafe", "日本", "zebra", "\U0001f600", "\ufb01")] + [
    b"\xff\xfe",
    b"caf\xe9",
]
PROGRAM = """
import json, sys
from pathlib import Path
from storage.lists import ListCache, check_same_classes, list_images
from storage.pairs import list_pairs
root, cache = Path(sys.argv[1]), ListCache(Path(sys.argv[2]))
files, pairs = list_images(root / "images" / "training", cache), list_pairs(root, "training")
again = list_images(root / "images" / "training", cache)
assert again.classes == files.classes and again.notes
for index in range(len(files)):
    files.read_image(index, 3), pairs.read_image(index, 3), pairs.label_file(index)
paths = [[path.hex() for path in array.tolist()] for array in (files.paths, pairs.images, pairs.label_maps)]
lists = [files.classes, files.labels.tolist(), files.fingerprint(), pairs.fingerprint(), paths]
print(json.dumps([sys.getfilesystemencoding(), lists]))
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture(scope="session")
def latin(tmp_path_factory) -> dict[str, str]:
    """The environment of a locale whose names of files are Latin-1."""
    folder = tmp_path_factory.mktemp("locales")
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not there to make a locale of Latin-1")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("localedef has no sources of locales to make one of Latin-1")
    return {"LC_ALL": "en_US.ISO-8859-1", "LOCPATH": str(folder), "PYTHONUTF8": "0"}


def draw_classes(root: Path) -> None:
    """Draw pairs whose folders have strange names; those of the label maps spell accents in two letters."""
    for seed, name in enumerate(NAMES):
        folder = Path(os.fsdecode(name))
        draw_images(root / "images" / "training" / folder, 1, seed=seed)
        apart = Path(os.fsdecode(name.replace("é".encode(), "e\u0301".encode())))
        draw_images(root / "annotations" / "training" / apart, 1, seed=seed)


def test_lists_and_classes_are_the_same_in_every_locale(latin, faults, tmp_path):
    draw_classes(tmp_path / "data")
    found, encodings = [], []
    environments = ({"PYTHONUTF8": "1"}, ASCII, latin)
    with faults(23, "names that are not ASCII, listed in other locales") as count:
        count.injected += len(environments) - 1
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(tmp_path / "data"), str(tmp_path / f"lists_{number}")],
                env=os.environ | environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
            )
            for number, environment in enumerate(environments)
        ]
        for run in runs:
            printed, _ = run.communicate(timeout=60)
            assert run.returncode == 0
            encoding, lists = json.loads(printed)
            encodings.append(encoding)
            found.append(lists)
        assert encodings == ["utf-8", "ascii", "iso8859-1"]
        assert found[1] == found[0] and found[2] == found[0]
        assert "café" in found[0][0] and b"caf\xe9".decode("utf-8", "surrogateescape") in found[0][0]
        count.survived += len(environments) - 1
