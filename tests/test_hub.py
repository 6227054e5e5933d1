"""Data sets of the Hub, from repositories on this disk: the same runs as on folders; hostile and unfit ones."""

import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import as_picture, assert_close, rows, weights
from PIL import Image

import finetune_classifier
import finetune_segmentation
import pretrain_mae
from dataset import ImageDataset, SampleKey, build_pretraining_transform
from storage import hub
from storage.console import DataError
from storage.hub import Columns, find_revision, is_table, list_table, list_table_pairs, load_tables
from storage.lists import list_images
from storage.pairs import list_pairs

SIZES = "--img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 4 --encoder_num_heads 4"
COMMON = "--experiment_name run --warmup_epochs 1 --num_workers 0 --log_interval 1 --save_checkpoint_interval 2"
LAYOUTS = ("imagefolder", "parquet", "saved")
SCRIPTS = {
    "pretrain_mae": f"{SIZES} --decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --probe_every 4",
    "finetune_classifier": SIZES,
    "finetune_segmentation": f"{SIZES.replace('32', '64')} --from_scratch --num_classes 4 --norm group --channels 64",
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> str:
    """A cache of the library that no other test, and no user, has."""
    folder, before = str(tmp_path_factory.mktemp("cache")), datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(folder)
    yield folder
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def loaded_anew():
    load_tables.cache_clear()


def as_table(root: Path, split: str) -> datasets.Dataset:
    """The images of a split of a folder as a table, with their bytes."""
    files = list_images(root / split)
    images = [{"bytes": Path(files.path(i)).read_bytes(), "path": None} for i in range(len(files))]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(files.classes))}
    content = {"image": images, "label": files.labels.tolist()}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def as_pairs(root: Path, split: str) -> datasets.Dataset:
    pairs = list_pairs(root, split)
    columns = {"image": pairs.path, "annotation": pairs.label_path}
    content = {
        name: [{"bytes": Path(path(i)).read_bytes(), "path": None} for i in range(len(pairs))]
        for name, path in columns.items()
    }
    return datasets.Dataset.from_dict(content, features=datasets.Features(dict.fromkeys(content, datasets.Image())))


def write_parquet(folder: Path, splits: dict[str, datasets.Dataset]) -> str:
    (folder / "data").mkdir(parents=True)
    for name, table in splits.items():
        table.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return f"hf:{folder}"


@pytest.fixture(scope="module")
def places(drawn_images, drawn_pairs, tmp_path_factory) -> dict[str, str]:
    """Three layouts of the drawn images, and of the pairs one; not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    splits = {name: as_table(drawn_images, folder) for name, folder in (("train", "train"), ("validation", "val"))}
    datasets.DatasetDict(splits).save_to_disk(str(root / "saved"))
    shutil.copytree(drawn_images / "train", root / "imagefolder" / "train")
    shutil.copytree(drawn_images / "val", root / "imagefolder" / "validation")
    pairs = {name: as_pairs(drawn_pairs, split) for name, split in (("train", "training"), ("test", "validation"))}
    found = {"parquet": write_parquet(root / "parquet", splits), "pairs": write_parquet(root / "pairs", pairs)}
    return found | {"saved": str(root / "saved"), "imagefolder": f"hf:{root / 'imagefolder'}"}


def flags(script: str, data: str | Path, work: Path, *more: str) -> list[str]:
    given = shlex.split(f"{COMMON} {SCRIPTS[script]} --epochs 4 --per_gpu_batch_size 4 --gradient_accumulation_steps 1")
    return [*given, "--path_to_data", str(data), "--working_directory", str(work), *more]


def train(script: str, data: str | Path, work: Path, *more: str) -> Path:
    module = {m.__name__: m for m in (pretrain_mae, finetune_classifier, finetune_segmentation)}[script]
    module.main(module.parse_args(flags(script, data, work, *more)))
    return work / "run"


# -------------------------------------------------------------------------------- the same as from folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_labels_and_classes_are_those_of_the_folder(places, drawn_images, layout):
    tables = load_tables(places[layout])
    transform = build_pretraining_transform((16, 16), 0.2)
    for split, folder in (("train", "train"), ("validation", "val")):
        files, found = list_images(drawn_images / folder), list_table(tables, split, Columns())
        assert found.classes == files.classes and np.array_equal(found.labels, files.labels)
        for index in range(len(files)):
            assert as_picture(found, index, 3).tobytes() == as_picture(files, index, 3).tobytes()
            sample, expected = (ImageDataset(f, transform)[SampleKey(1, index)] for f in (found, files))
            assert torch.equal(sample.image, expected.image)


@pytest.mark.parametrize("script", ["pretrain_mae", "finetune_classifier"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_is_that_on_the_folder(places, drawn_images, tmp_path, script, layout):
    on_folder = train(script, drawn_images, tmp_path / "folder")
    on_table = train(script, places[layout], tmp_path / "table")
    assert_close(weights(on_table / "checkpoint_4"), weights(on_folder / "checkpoint_4"), atol=0)
    figures = [
        {k: v for k, v in rows(run)[-1].items() if k.startswith(("testing", "knn"))} for run in (on_folder, on_table)
    ]
    assert figures[0] == figures[1] and len(figures[0]) > 1


def test_segmentation_is_that_on_the_folder(places, drawn_pairs, tmp_path):
    runs = [train("finetune_segmentation", d, tmp_path / n) for n, d in (("a", drawn_pairs), ("b", places["pairs"]))]
    assert_close(*(weights(run / "checkpoint_4") for run in runs), atol=0)
    assert rows(runs[0])[-1]["testing_miou"] == rows(runs[1])[-1]["testing_miou"]


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_two_processes_and_a_resume_are_one_undisturbed_process(places, cache, fork, tmp_path, script):
    """Steps of two images in each of two processes, and all data workers forked after the table was loaded.

    In float64, as Adam makes much of the rounding of gradients near zero: in float32 a weight may differ by 2e-4.
    """
    data = places["pairs" if script == "finetune_segmentation" else "parquet"]
    for name, size, workers, num_processes in (("one", 4, 0, 1), ("two", 2, 1, 2)):
        more = ["--per_gpu_batch_size", str(size), "--num_workers", str(workers)]
        given = flags(script, data, tmp_path / name, *more)
        fork(script, given, ("in_float64", {}), num_processes=num_processes, HF_DATASETS_CACHE=cache)
    assert_close(*(weights(tmp_path / name / "run" / "checkpoint_4") for name in ("two", "one")), atol=1e-6)
    whole = train(script, data, tmp_path / "whole")
    shutil.copytree(whole / "checkpoint_2", tmp_path / "resumed" / "run" / "checkpoint_2")
    resumed = train(script, data, tmp_path / "resumed", "--resume_from_checkpoint", "latest")
    assert_close(weights(resumed / "checkpoint_4"), weights(whole / "checkpoint_4"), atol=0)


def test_run_does_not_go_on_with_another_data_set(places, drawn_images, tmp_path):
    train("pretrain_mae", places["parquet"], tmp_path)
    with pytest.raises(ValueError, match="cannot resume"):
        train("pretrain_mae", drawn_images, tmp_path, "--resume_from_checkpoint", "latest", "--epochs", "6")


def test_images_are_held_out_where_no_split_is(drawn_images, drawn_pairs, tmp_path, capsys):
    place = write_parquet(tmp_path / "alone", {"train": as_table(drawn_images, "train")})
    train("finetune_classifier", place, tmp_path / "a", "--val_fraction", "0.25")
    assert "18 for training, 6 held out" in capsys.readouterr().out
    place = write_parquet(tmp_path / "pairs", {"train": as_pairs(drawn_pairs, "training")})
    train("finetune_segmentation", place, tmp_path / "b", "--val_fraction", "0.2")
    assert "8 for training, 2 held out" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"no split of its own for validation, but train, or draw some by "):
        train("finetune_segmentation", place, tmp_path / "c")


def test_finetuned_classifier_is_evaluated_on_the_held_out_split(places, tmp_path):
    run = train("finetune_classifier", places["parquet"], tmp_path)
    arguments = ["--eval_only", "--path_to_data", places["saved"], "--path_to_pretrained_mae_weights", str(run)]
    arguments += ["--num_workers", "0", "--per_gpu_batch_size", "4"]
    figures = finetune_classifier.main(finetune_classifier.parse_args(arguments))
    record = json.loads((run / "best_checkpoint" / "config.json").read_text())
    assert figures["testing_top1_acc"] == record["testing"]["top1_acc"]


def test_set_of_one_split_is_evaluated_whole(places, drawn_images, tmp_path):
    run = train("finetune_classifier", places["parquet"], tmp_path)
    only = write_parquet(tmp_path / "only", {"test": as_table(drawn_images, "val")})
    found = []
    for place in (places["parquet"], only):
        arguments = ["--eval_only", "--path_to_data", place, "--path_to_pretrained_mae_weights", str(run)]
        arguments += ["--num_workers", "0", "--per_gpu_batch_size", "4"]
        found.append(finetune_classifier.main(finetune_classifier.parse_args(arguments)))
    assert found[0] == found[1]


def test_probe_on_a_set_with_two_splits_goes_with_held_out_images_of_the_run(places, drawn_images, tmp_path):
    own = write_parquet(tmp_path / "own", {"train": as_table(drawn_images, "train")})
    probed = ["--path_to_probe_data", places["parquet"], "--val_fraction", "0.25"]
    assert 0 <= rows(train("pretrain_mae", own, tmp_path, *probed))[-1]["knn_top1_acc"] <= 100


# -------------------------------------------------------------------------------- columns


def png(size: tuple[int, int] = (8, 6)) -> dict:
    content = io.BytesIO()
    Image.new("RGB", size, "red").save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def tables_of(splits: dict[str, datasets.Dataset]) -> hub.Tables:
    return hub.Tables(splits, "made up")


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (["dog", "cat", "dog"], ("cat", "dog"), [1, 0, 1]),
        ([7, 3, 7], ("3", "7"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
    ],
)
def test_classes_of_a_plain_column_are_its_values(values, classes, labels):
    table = datasets.Dataset.from_dict({"image": [png()] * 3, "kind": values}).cast_column("image", datasets.Image())
    found = list_table(tables_of({"train": table}), "train", Columns(label="kind"))
    assert found.classes == classes and found.labels.tolist() == labels
    assert list_table(tables_of({"train": table}), "train", Columns()).classes == ()


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ({"a": [png()], "b": [png()]}, Columns(), "give --image_column: of the columns a, b, images are a, b"),
        ({"a": [png()]}, Columns(image="x"), "give --image_column: of the columns a, images are a"),
        ({"a": [png()]}, Columns(label="x"), "--label_column x: there is none; columns are a"),
        ({"a": [png()], "v": [0.5]}, Columns(label="v"), "holds neither whole numbers nor texts, so no classes"),
    ],
)
def test_columns_that_are_not_clear_are_named(content, columns, message):
    table = datasets.Dataset.from_dict(content)
    for name, values in content.items():
        if isinstance(values[0], dict):
            table = table.cast_column(name, datasets.Image())
    with pytest.raises(DataError, match=message):
        list_table(tables_of({"train": table}), "train", columns)


def test_rows_without_a_class_are_refused():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"image": [png()] * 2, "label": [-1, -1]}, features=features)
    with pytest.raises(DataError, match=r"test has rows without a class \(label -1\)"):
        list_table(tables_of({"test": table}), "test", Columns())


def test_label_maps_are_told_by_their_columns_name_or_by_flag():
    content = {"photo": [png()], "mask": [png()], "depth": [png()]}
    table = datasets.Dataset.from_dict(content, features=datasets.Features(dict.fromkeys(content, datasets.Image())))
    with pytest.raises(DataError, match="give --image_column: of the columns photo, depth, images are photo, depth"):
        list_table_pairs(tables_of({"train": table}), "train", Columns())
    found = list_table_pairs(tables_of({"train": table}), "train", Columns(image="photo", annotation="depth"))
    assert found.path(0) == "made up/train/00000000/photo" and found.label_path(0) == "made up/train/00000000/depth"


# -------------------------------------------------------------------------------- hostile and missing


def test_image_that_is_a_file_elsewhere_is_not_read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    paths = [str(tmp_path / "secret.png"), "/dev/zero", "../../etc/passwd"]
    features = datasets.Features({"image": datasets.Image()})
    images = [*({"bytes": None, "path": path} for path in paths), None]
    table = datasets.Dataset.from_dict({"image": images}, features=features)
    saved = tmp_path / "saved" / "data"
    datasets.Dataset.from_dict({"image": [png()]}, features=features).save_to_disk(str(saved))
    (file,) = saved.glob("*.arrow")
    with pa.ipc.new_stream(file, table.data.table.schema) as stream:  # save_to_disk would read the files
        stream.write_table(table.data.table)
    files = list_table(load_tables(str(saved)), "train", Columns())
    for index, reason in enumerate(["outside the data set"] * 3 + ["holds no image"]):
        with pytest.raises(OSError, match=reason):
            as_picture(files, index, 3)


def test_place_outside_the_file_is_refused_and_not_read(places, drawn_images, tmp_path):
    """In a table that was made up the bytes of an image would lie two gigabytes behind its end."""
    copy = shutil.copytree(places["saved"], tmp_path / "copy")
    file = next((copy / "train").glob("*.arrow"))
    files = list_images(drawn_images / "train")
    sizes = [Path(files.path(i)).stat().st_size for i in range(len(files))]
    offsets = np.cumsum([0, *sizes]).astype("<i4")
    content = file.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    forged = offsets.copy()
    forged[-1] = 2**31 - 1
    file.write_bytes(content.replace(offsets.tobytes(), forged.tobytes()))
    with pytest.raises(DataError, match=rf"--path_to_data {copy} cannot be loaded: "):
        load_tables(str(copy))


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "info", "state"])
def test_damaged_folder_of_save_to_disk_is_a_sentence(places, tmp_path, damage):
    copy = shutil.copytree(places["saved"], tmp_path / "copy")
    file = next((copy / "train").glob("*.arrow"))
    if damage in ("info", "state"):
        file = copy / "train" / {"info": "dataset_info.json", "state": "state.json"}[damage]
    content = file.read_bytes()
    contents = dict(cut=content[: len(content) // 2], empty=b"", noise=bytes(range(256)) * 40, info=b"{", state=b"[]")
    file.write_bytes(contents[damage])
    with pytest.raises(DataError, match=rf"--path_to_data {copy} cannot be loaded: "):
        load_tables(str(copy))


@pytest.mark.parametrize("place", ["hf:/nowhere/at/all", "hf:a b", "hf:", "hf:a/b/c"])
def test_place_that_is_no_data_set_is_refused(place):
    with pytest.raises(DataError, match=r"neither a folder nor hf:OWNER/NAME\[:CONFIG\]\[@REVISION\]"):
        load_tables(place)


def test_split_that_is_not_there_is_named(drawn_images, tmp_path):
    place = write_parquet(tmp_path / "set", {"test": as_table(drawn_images, "val")})
    with pytest.raises(DataError, match="has no split train or training, but test"):
        train("pretrain_mae", place, tmp_path)


def test_flags_of_folders_are_refused_for_columns(places, tmp_path):
    with pytest.raises(DataError, match="has columns: give --image_column and --annotation_column instead"):
        train("finetune_segmentation", places["pairs"], tmp_path, "--label_suffix", "_mask", "--image_folder", "x")


def test_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="need a package: pip install datasets"):
        load_tables("hf:some/set")


def test_revision_is_the_commit_of_the_files():
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {"train": [f"hf://datasets/some/set@{commit}/data/train.parquet"]}
    assert find_revision(files) == commit
    assert find_revision(None) is find_revision({"train": ["/a@b/c.parquet"]}) is None
    assert find_revision(files | {"test": [f"hf://datasets/some/set@{commit[::-1]}/x"]}) is None


def test_folders_of_files_are_no_tables(drawn_images, places):
    assert not is_table(drawn_images) and is_table(places["saved"]) and is_table("hf:some/set")
