"""Drawn scenes: what they show, and that they are written once and whole."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from storage.demo import DEMO_KINDS, draw_demo_scene, write_demo_data
from storage.lists import find_splits, list_images


def test_demo_scene_is_a_function_of_seed_and_kind():
    image, labels = draw_demo_scene(7, 4)
    again, again_labels = draw_demo_scene(7, 4)
    assert image.tobytes() == again.tobytes() and labels.tobytes() == again_labels.tobytes()
    assert draw_demo_scene(8, 4)[0].tobytes() != image.tobytes()
    assert (image.mode, labels.mode) == ("RGB", "L") and image.size == labels.size


@pytest.mark.parametrize("kind", range(10))
def test_demo_labels_mark_the_object_on_its_background(kind):
    image, labels = (np.asarray(picture) for picture in draw_demo_scene(3, kind))
    assert set(np.unique(labels)) == {0, 1, 2, 3 + kind}
    inside, outside = labels == 3 + kind, (labels == 1) | (labels == 2)
    assert 0.1 < inside.mean() < 0.6 and outside.mean() > 0.3
    assert np.abs(image[inside].mean(axis=0) - image[outside].mean(axis=0)).max() > 20  # it can be seen


def test_demo_data_has_both_layouts_and_is_written_once(tmp_path):
    write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    train, val, _ = find_splits(tmp_path / "demo" / "imagefolder")
    files = list_images(train)
    assert files.classes == tuple(sorted(DEMO_KINDS)) and np.bincount(files.labels).tolist() == [2] * 10
    assert len(list_images(val)) == 10
    ade = tmp_path / "demo" / "ADEChallengeData2016"
    for split, count in (("training", 20), ("validation", 10)):
        stems = [sorted(p.stem for p in (ade / part / split).iterdir()) for part in ("images", "annotations")]
        assert stems[0] == stems[1] and len(stems[0]) == count
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == before
    with pytest.raises(FileExistsError, match="is not the demo data"):
        write_demo_data(tmp_path / "demo", num_train=30, num_val=10)


def start_drawing(root: Path) -> subprocess.Popen:
    """Draw in another process, and give it when it has begun."""
    # A shell starts what it has in the background without SIGINT, and so would the tests
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += f"import storage.demo as demo, pathlib; demo.write_demo_data(pathlib.Path({str(root)!r}), 400, 10)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not list(root.parent.glob(f"{root.name}.*.tmp/imagefolder/train/*/*")):
        assert process.poll() is None
        time.sleep(0.001)
    return process


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.endswith(".lock"))


def test_demo_data_of_two_processes_at_once_is_drawn_by_one(tmp_path):
    process = start_drawing(tmp_path / "demo")
    write_demo_data(tmp_path / "demo", 400, 10)  # waits
    assert process.wait() == 0 and names_in(tmp_path) == ["demo"]
    assert len(list((tmp_path / "demo").rglob("*.png"))) == 410


def test_demo_data_is_drawn_anew_where_a_drawing_was_killed(tmp_path):
    process = start_drawing(tmp_path / "demo")
    process.kill()
    assert process.wait() == -signal.SIGKILL and names_in(tmp_path) == ["demo.unfinished.tmp"]
    write_demo_data(tmp_path / "demo", 20, 10)
    assert names_in(tmp_path) == ["demo"] and len(list((tmp_path / "demo").rglob("*.png"))) == 30


def test_demo_data_that_was_interrupted_leaves_nothing(tmp_path):
    process = start_drawing(tmp_path / "demo")
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT and names_in(tmp_path) == []
