"""Rows 22, 23 and 27: overwritten shards, locales, names, rights, and places where nothing can be kept."""

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

from faults.conftest import SCRIPTS, draw_data
from faults.harness import check_exact
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
            overwrite(packed / "shard-000000.tar", found.table[record])
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
from storage.console import protect_output
from storage.lists import ListCache, list_images
from storage.pairs import list_pairs
root, cache = Path(sys.argv[1]), ListCache(Path(sys.argv[2]))
files, pairs = list_images(root / "images" / "training", cache), list_pairs(root, "training")
again = list_images(root / "images" / "training", cache)
assert again.classes == files.classes and again.notes
for index in range(len(files)):
    files.open_picture(index, 3).whole(), pairs.open_picture(index, 3).whole(), pairs.label_file(index)
paths = [[path.hex() for path in array.tolist()] for array in (files.paths, pairs.images, pairs.label_maps)]
lists = [files.classes, files.labels.tolist(), files.fingerprint(), pairs.fingerprint(), paths]
print(json.dumps([sys.getfilesystemencoding(), lists]))
protect_output()
print(*files.classes)
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
            lines = printed.splitlines()
            encoding, lists = json.loads(lines[0])
            assert len(lines) == 2 and b"zebra" in lines[1] and b"\\udcff\\udcfe" in lines[1]
            encodings.append(encoding)
            found.append(lists)
        assert encodings == ["utf-8", "ascii", "iso8859-1"]
        assert found[1] == found[0] and found[2] == found[0]
        assert "café" in found[0][0] and b"caf\xe9".decode("utf-8", "surrogateescape") in found[0][0]
        count.survived += len(environments) - 1


def test_run_in_a_locale_of_ascii_writes_the_same_names(job, data, faults, full, tmp_path):
    """Class names, the order of classes and images, and so all weights; and it is the same run, for a resume."""
    if not full:
        pytest.skip("with --full")
    for split in ("train", "val"):
        for old, new in (("cats", "\U0001f408 café"), ("dogs", "犬")):
            shutil.copytree(data["finetune_classifier"] / split / old, tmp_path / "data" / split / new)
    (tmp_path / "data" / "train" / "犬" / "é.jpg").write_bytes(b"no image")
    flags = f"--path_to_data {tmp_path / 'data'} --max_bad_fraction 0.1 --save_minutes 0"
    jobs = [job("finetune_classifier", tmp_path / name).with_flags(flags) for name in ("ascii", "utf8")]
    with faults(23, "classes that are not ASCII, run in a locale of ASCII, finetune_classifier") as count:
        count.injected += 1
        command = [sys.executable, "finetune_classifier.py", *jobs[0].arguments()]
        environment = os.environ | ASCII | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as run:
            jobs[1].finish()
            printed, _ = run.communicate(timeout=120)
        assert run.returncode == 0, printed
        check_exact(*(job.experiment for job in jobs))
        config = json.loads((jobs[0].experiment / "last_checkpoint" / "config.json").read_bytes())
        assert config["class_names"] == ["犬", "\U0001f408 café"]
        rows = [(job.experiment / "bad_files.txt").read_bytes().splitlines() for job in jobs]
        assert [row.split(b"\t")[0] for row in rows[0]] == [row.split(b"\t")[0] for row in rows[1]]
        assert len(rows[0]) == 1 and rows[0][0].split(b"\t")[0].decode().endswith("/犬/é.jpg")
        jobs[0].finish()  # goes on from where the other locale ended, and is not refused
        count.survived += 1


# ------------------------------------------------------------------------------------------------ names and places


def umask() -> int:
    """Give the rights that this process, and with it the runs, take from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_a_run_leaves_has_the_rights_that_the_umask_gives(undisturbed, faults):
    experiment = undisturbed("finetune_classifier")
    with faults(23, "rights of everything below the working directory, finetune_classifier") as count:
        for path in experiment.parent.rglob("*"):
            if not path.is_symlink() and path.name != "output.txt":
                count.injected += 1
                expected = (0o777 if path.is_dir() else 0o666) & ~umask()
                assert path.stat().st_mode & 0o777 == expected, f"{path} has {path.stat().st_mode & 0o777:o}"
                count.survived += 1


@pytest.fixture
def places(tmp_path) -> dict[str, tuple[str, str]]:
    """Give flags, and a part of the sentence that refuses them."""
    (tmp_path / "file").touch()
    return {
        "long name": (f"--experiment_name {'x' * 300}", "has 300 bytes, a folder's name at most 255"),
        "line break in the name": ("--experiment_name 'a\nb'", "characters that cannot be seen; leave them out"),
        "file for a folder": (f"--working_directory {tmp_path / 'file'}", "is a file; a folder is needed"),
        "file on the way": (f"--working_directory {tmp_path / 'file' / 'below'}", "is no folder; choose another place"),
        "data in a file": (f"--path_to_data {tmp_path / 'file'}", "is a file; a folder is needed"),
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_and_places_that_no_run_can_use_are_refused_before_any_work(script, job, places, faults, tmp_path):
    with faults(23, f"names and places that cannot be, {script}") as count:
        for number, (flags, words) in enumerate(places.values()):
            run = job(script, tmp_path / str(number))
            count.injected += 1
            refused = run.start(more=flags)
            assert refused.wait() == 2, refused.printed()  # of argparse
            assert words in refused.printed().splitlines()[-1] and "Traceback" not in refused.printed()
            assert [path.name for path in run.work.iterdir()] == ["output.txt"]
            count.survived += 1


# ------------------------------------------------------------------------------------------------ names that are orders

# Colour, title, clear the screen, turn the line around, end it
ORDERS = "\x1b[31m\x1b]0;title\x07\x9b2J\u202e\n\t\u2028"
OBEYED = set(ORDERS) - set("\n[]012;Jmtitle3")


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_that_a_terminal_would_obey_are_shown_not_sent(script, job, faults, full, tmp_path):
    """Of a class, a bad file of training, and one of validation, which ends classifier and segmenter."""
    if script != "pretrain_mae" and not full:
        pytest.skip("with --full")
    data = draw_data(script, tmp_path / "data")
    images = sorted(path for path in data.rglob("*.jpg") if "train" in str(path.relative_to(data)))
    images[0].with_name(f"bad{ORDERS}.jpg").write_bytes(b"no image")
    labels = data / "annotations"
    if script == "finetune_segmentation":
        shutil.copy(labels / "training" / "00.png", labels / "training" / f"bad{ORDERS}.png")
    else:
        for split in ("train", "val"):
            (data / split / "cats").rename(data / split / f"cats{ORDERS}")
    with faults(27, f"names with control characters, {script}") as count:
        count.injected += 2
        flags = f"--path_to_data {data} --save_minutes 0 --max_bad_fraction 0.1"
        named = job(script, tmp_path / "work").with_flags(flags)
        named.finish()
        named.finish()  # lists the bad file no second time
        said = (named.work / "output.txt").read_bytes().decode()
        assert r"bad\x1b[31m\x1b]0;title\x07\x9b2J\u202e\n\t\u2028.jpg" in said
        assert not set(said) & OBEYED
        assert len((named.experiment / "bad_files.txt").read_text().splitlines()) == 1
        file = min(path for path in data.rglob("*.jpg") if "val" in str(path.relative_to(data)))
        file.rename(file.with_name(f"worse{ORDERS}.jpg")).write_bytes(b"no image")
        if script == "finetune_segmentation":
            label = labels / "validation" / f"{file.stem}.png"
            label.rename(label.with_name(f"worse{ORDERS}.png"))
        run = job(script, tmp_path / "other").with_flags(flags).start()
        assert run.wait() == (0 if script == "pretrain_mae" else 1), run.printed()
        assert not set(run.printed()) & OBEYED and r"worse\x1b[31m" in run.printed()
        count.survived += 2
