"""Drawn scenes: what they show, and that they are written once and whole."""

import numpy as np
import pytest

import storage.demo
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
    assert set(np.unique(labels)) <= {0, 1, 2 + kind, 12}
    inside, outside = labels == 2 + kind, labels == 1
    assert 0.05 < inside.mean() < 0.6 and outside.mean() > 0.3
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


def test_demo_data_of_two_runs_at_once_is_written_by_one(tmp_path, monkeypatch):
    def draw_while_another_run_finishes(seed, kind):
        monkeypatch.undo()
        write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
        return draw_demo_scene(seed, kind)

    monkeypatch.setattr(storage.demo, "draw_demo_scene", draw_while_another_run_finishes)
    write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


def test_demo_data_that_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(seed, kind):
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.demo, "draw_demo_scene", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_demo_data(tmp_path / "demo", num_train=20, num_val=10)
    assert list(tmp_path.iterdir()) == []
