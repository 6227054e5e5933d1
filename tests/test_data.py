"""Which images a run works on: splits of a data set, and of what is evaluated and tested on."""

import argparse

import pytest
from accelerate import Accelerator

from training.data import list_splits, list_test


def test_splits_are_listed_and_a_run_inside_its_images_is_refused(image_folder, tmp_path):
    accelerator, flags = Accelerator(cpu=True), argparse.Namespace(working_directory=tmp_path, rescan_data=False)
    flags.path_to_data, flags.val_fraction = str(image_folder), None
    train_files, val_files = list_splits(accelerator, str(image_folder), flags)
    assert (len(train_files), len(val_files)) == (24, 8) and (tmp_path / "file_lists").is_dir()
    alone, none = list_splits(accelerator, str(image_folder / "train" / "cats"), flags)
    assert len(alone) == 12 and none is None
    flags.working_directory = image_folder / "train" / "work"
    with pytest.raises(ValueError, match=r"--working_directory .* lies in the training images"):
        list_splits(accelerator, str(image_folder), flags)


def test_test_images_are_none_of_the_training_and_have_its_classes(image_folder, tmp_path):
    flags = argparse.Namespace(
        path_to_data=str(image_folder), working_directory=str(tmp_path), rescan_data=False, val_fraction=0.0
    )
    accelerator = Accelerator(cpu=True)
    splits = list_splits(accelerator, str(image_folder), flags)
    for given, message in (("train", "is in use by the training"), ("val/cats", "classes")):
        flags.test_folder = str(image_folder / given)
        with pytest.raises(ValueError, match=message):
            list_test(accelerator, splits, flags)
    flags.test_folder = None
    assert list_test(accelerator, splits, flags) is None
