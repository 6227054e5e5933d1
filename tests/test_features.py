"""Features of whole images: the encoder's own to the bit, resumed exactly, and the same nearest neighbours as --knn."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, load_tool
from PIL import Image
from safetensors.torch import save_file

import finetune_classifier
import utils
from dataset import EVAL_EPOCH, SampleKey, build_eval_images, normalize
from model import ViTMAEForImageClassification, ViTMAEForPreTraining, load_pretrained_encoder
from storage.lists import list_images

HALF = (0.5,) * 3


def write_checkpoint(folder, model, **record) -> str:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    record = {"config": dataclasses.asdict(TINY), "image_mean": HALF, "image_std": HALF, **record}
    (folder / "config.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path) -> str:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path / "checkpoint", ViTMAEForPreTraining(TINY))


@pytest.fixture
def run(checkpoint, image_folder, tmp_path):
    """Run the tool on the drawn images, and give its exit code and the table."""

    def run(*flags: str, output: str = "features.npz", code: int = 0) -> dict[str, np.ndarray]:
        tool = load_tool("features")
        common = ["--checkpoint", checkpoint, "--path_to_data", str(image_folder), "--working_directory", str(tmp_path)]
        common += ["--num_workers", "0", "--batch_size", "8", "--output", str(tmp_path / output)]
        assert tool.main(tool.parse_args([*common, *flags])) == code
        return dict(np.load(tmp_path / output)) if output.endswith(".npz") else {}

    return run


def encode_by_hand(checkpoint, image_folder, split: str, encode) -> np.ndarray:
    """What `encode` gives for the images of a split, eight at a time."""
    model = finetune_classifier.VisionTransformer(TINY)
    load_pretrained_encoder(model, checkpoint)
    data = build_eval_images(list_images(image_folder / split), TINY.image_hw)
    images = torch.stack([data[SampleKey(EVAL_EPOCH, index)].image for index in range(len(data))])
    with torch.no_grad():
        return torch.cat([encode(model.eval(), chunk) for chunk in normalize(images, HALF, HALF).split(8)]).numpy()


POOLED = {
    "cls": lambda model, images: model.forward_features(images)[:, 0],
    "mean": lambda model, images: model.forward_features(images)[:, 1:].mean(dim=1),
    "patches": lambda model, images: model.forward_features(images)[:, 1:],
}


@pytest.mark.parametrize("pool", POOLED)
def test_features_equal_forward_features_to_the_bit(run, checkpoint, image_folder, pool):
    table = run("--pool", pool)
    for split, count in (("train", 24), ("val", 8)):
        rows, files = table["split"] == split, list_images(image_folder / split)
        assert (table["features"][rows] == encode_by_hand(checkpoint, image_folder, split, POOLED[pool])).all()
        assert table["paths"][rows].tolist() == [path.decode() for path in files.paths]
        assert table["labels"][rows].tolist() == files.labels.tolist() and rows.sum() == count
    assert table["classes"].tolist() == ["cats", "dogs"]


def test_features_of_a_block_equal_its_raw_output(run, checkpoint, image_folder):
    table = run("--pool", "patches", "--block", "1")

    def encode(model, images):
        return model.get_intermediate_layers(images, [1])[0].flatten(2).transpose(1, 2)

    expected = encode_by_hand(checkpoint, image_folder, "val", encode)
    assert (table["features"][table["split"] == "val"] == expected).all()


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_nearest_neighbours_of_the_table_score_as_knn(run, image_folder, tmp_path, kind):
    if kind == "classifier":
        torch.manual_seed(1)
        model = ViTMAEForImageClassification(TINY, 2)
        torch.nn.init.normal_(model.fc_norm.weight)
        table = run("--checkpoint", write_checkpoint(tmp_path / "classifier", model), "--img_size", "24")
    else:
        table = run("--img_size", "24")
    flags = ["--knn", "--path_to_data", str(image_folder), "--working_directory", str(tmp_path), "--num_workers", "0"]
    weights = str(tmp_path / ("classifier" if kind == "classifier" else "checkpoint"))
    flags += ["--path_to_pretrained_mae_weights", weights, "--img_size", "24"]
    expected = finetune_classifier.main(finetune_classifier.parse_args(flags))
    features, labels = F.normalize(torch.from_numpy(table["features"]), dim=1), torch.from_numpy(table["labels"])
    train = torch.from_numpy(table["split"] == "train")
    ranked = utils.knn_classify(features[train], labels[train], features[~train], 2)
    assert utils.accuracy(ranked, labels[~train], 1) == expected["knn_top1_acc"]


def test_killed_run_goes_on_where_it_was(run, image_folder, tmp_path, monkeypatch, capsys):
    expected = run(output="whole.npz")
    monkeypatch.setattr(np, "savez", fail_after(2, np.savez))
    with pytest.raises(KeyboardInterrupt):
        run_small_parts(run, monkeypatch)
    assert len(list((tmp_path / "features.npz.parts").glob("*.npz"))) == 2
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"was begun by another command: pool \(was mean, is cls\); give that one"):
        run("--pool", "cls")
    capsys.readouterr()
    found = run_small_parts(run, monkeypatch)
    assert "2 of 4 parts are there" in capsys.readouterr().out
    assert all((found[name] == expected[name]).all() for name in ("features", "paths", "labels", "split"))
    assert not (tmp_path / "features.npz.parts").exists()
    with pytest.raises(SystemExit):  # nothing is overwritten
        run()


def test_values_without_statistics_are_refused_with_a_way_that_this_tool_has(run, checkpoint, image_folder, tmp_path):
    """Mean and standard deviation are no flags of it: they come with the weights."""
    config = Path(checkpoint) / "config.json"
    config.write_text(json.dumps({"config": dataclasses.asdict(TINY)}))
    for split, name in (("train", "cats"), ("val", "cats")):
        (tmp_path / "values" / split / name).mkdir(parents=True)
        np.save(tmp_path / "values" / split / name / "0.npy", np.zeros((20, 20, 3), np.float32))
    with pytest.raises(ValueError, match=r"read beside the weights, where tools/convert_weights.py writes"):
        run("--path_to_data", str(tmp_path / "values"))
    tool = load_tool("convert_weights")
    told = ["--mean", *"123", "--std", *"456", "--value_range", "own", "--to", "ours"]
    tool.main(tool.parse_args([checkpoint, str(tmp_path / "told"), *told]))
    table = run("--path_to_data", str(tmp_path / "values"), "--checkpoint", str(tmp_path / "told"))
    assert table["features"].shape == (2, TINY.encoder_embed_dim)


def test_overwrite_begins_anew_what_another_command_began(run, checkpoint, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "savez", fail_after(3, np.savez))  # two lists of files, one part
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    assert len(list((tmp_path / "features.npz.parts").glob("*.npz"))) == 1
    table = run("--pool", "cls", "--overwrite")
    expected = encode_by_hand(checkpoint, image_folder, "train", POOLED["cls"])
    assert (table["features"][table["split"] == "train"] == expected).all()


def run_small_parts(run, monkeypatch) -> dict:
    """Run with parts of one batch: three of the training images, one of the others."""
    features = load_tool("features")
    monkeypatch.setattr(features, "PART_BATCHES", 1)
    monkeypatch.setitem(run.__globals__, "load_tool", lambda name: features)
    return run()


def fail_after(count: int, write):
    def savez(*args, **arrays):
        nonlocal count
        count -= 1
        if count < 0:
            raise KeyboardInterrupt
        write(*args, **arrays)

    return savez


def test_classes_that_only_one_part_has_are_refused_as_they_shift_all_numbers(run, image_folder):
    shutil.rmtree(min((image_folder / "val").iterdir()))
    with pytest.raises(ValueError, match="it lacks"):
        run()


def test_bad_file_is_left_out_and_named(run, image_folder, capsys):
    (image_folder / "val" / "cats" / "000.jpg").write_bytes(b"no picture")
    table = run(code=1)
    assert len(table["paths"]) == len(table["features"]) == 31 and "cats/000.jpg" in capsys.readouterr().err
    assert table["paths"][table["split"] == "val"][0] == "cats/001.jpg"


def test_parquet_holds_the_same_rows(run, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table, rows = run(), run(output="features.parquet")
    rows = parquet.read_table(tmp_path / "features.parquet")
    assert (np.array(rows["features"].to_pylist(), dtype=np.float32) == table["features"]).all()
    assert rows["paths"].to_pylist() == table["paths"].tolist()
    assert json.loads(rows.schema.metadata[b"about"])["classes"] == ["cats", "dogs"]


def test_names_that_are_no_utf8_are_in_both_tables(run, tmp_path, image_folder):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    Image.new("RGB", (20, 20)).save(os.fsencode(image_folder / "val" / "cats") + b"/\xff.png", "PNG")
    assert b"cats/\xff.png" in [os.fsencode(path) for path in run()["paths"]]
    run(output="features.parquet")
    assert r"cats/\xff.png" in pq.read_table(tmp_path / "features.parquet")["paths"].to_pylist()


def test_paths_and_sizes_that_cannot_be_are_refused_before_any_work(run, tmp_path, capsys):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    for flags, output in (([], "folder.npz"), (["--attention", str(tmp_path / "file")], "features.npz")):
        with pytest.raises(SystemExit):
            run("--overwrite", *flags, output=output)
        assert "--output takes a file and --attention a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="img_size 0 is not a multiple of patch_size 4; use 4"):
        run("--img_size", "0")


def test_attention_is_drawn_head_by_head(run, tmp_path):
    run("--attention", str(tmp_path / "attention"), "--attention_images", "2")
    pictures = sorted((tmp_path / "attention").iterdir())
    assert [file.name for file in pictures] == [
        f"{s}_{i:09d}.png" for s, i in (("train", 0), ("train", 12), ("val", 0), ("val", 4))
    ]
    pixels = np.asarray(Image.open(pictures[0]))  # a row with the image, and one with the four heads
    heads = pixels[4 + 20 + 128 + 4 + 20 :, 4:][:128].reshape(128, -1, 3)
    for head in range(4):
        weights = heads[:, head * 132 :][:, :128].reshape(4, 32, 4, 32, 3).swapaxes(1, 2).reshape(16, -1)
        assert (weights == weights[:, :1]).all() and weights.max() == 255  # a patch is all alike, and one is brightest


def test_two_processes_write_the_same_table(run, fork, checkpoint, image_folder, tmp_path):
    expected = run(output="whole.npz")
    flags = ["--checkpoint", checkpoint, "--path_to_data", str(image_folder), "--working_directory", str(tmp_path)]
    flags += ["--num_workers", "0", "--batch_size", "8", "--output", str(tmp_path / "two.npz")]
    fork("tools.features", flags, num_processes=2)
    assert (np.load(tmp_path / "two.npz")["features"] == expected["features"]).all()
