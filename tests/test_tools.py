"""The commands that do not train: what they draw, and what they refuse."""

import csv
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import TINY, load_tool
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune_classifier
import finetune_segmentation
import pretrain_mae
from model import ViTMAEForImageClassification, ViTMAEForPreTraining
from storage.files import read_json
from storage.weights import find_weights
from training.logs import name_runs


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    save_file(ViTMAEForPreTraining(TINY).state_dict(), folder / "model.safetensors")
    record = {"config": dataclasses.asdict(TINY), "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


HEADING, ROW = 2 * 20 + 4, 26 + 192 + 4
CAPTIONS = slice(HEADING + ROW, HEADING + ROW + 24 + 8)  # rows of pixels with the names of files in a reconstruction


def test_reconstruct_draws_images_of_any_size(checkpoint, image_folder, tmp_path):
    tool = load_tool("reconstruct")
    images = [str(path) for path in sorted((image_folder / "val").rglob("*.jpg"))[:4]]
    output = tmp_path / "out" / "picture.png"
    arguments = ["--checkpoint", str(checkpoint), *images, "--output", str(output)]
    assert tool.main(tool.parse_args(arguments)) == 0
    with Image.open(output) as picture:
        assert picture.width > 4 * (192 + 4) and picture.height == HEADING + 4 * ROW + 24 + 8 + 4
        first = picture.tobytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.main(tool.parse_args(arguments))
    tool.main(tool.parse_args([*arguments, "--overwrite"]))
    with Image.open(output) as picture:
        assert picture.tobytes() == first  # the same seed, the same masks
    tool.main(tool.parse_args([*arguments, "--overwrite", "--seed", "1"]))
    with Image.open(output) as picture:
        assert picture.tobytes() != first


def test_reconstruct_masks_as_the_model_was_trained(checkpoint, image_folder, tmp_path, monkeypatch):
    tool, masks = load_tool("reconstruct"), []
    draw = tool.draw_reconstructions

    def keep_mask(panels, mask, *rest, **look):
        masks.append(mask)
        return draw(panels, mask, *rest, **look)

    monkeypatch.setattr(tool, "draw_reconstructions", keep_mask)
    arguments = ["--checkpoint", str(checkpoint), str(image_folder / "val"), "--output", str(tmp_path / "picture.png")]
    for masking in ("grid", "block"):
        tool.main(tool.parse_args([*arguments, "--masking", masking, "--overwrite"]))
    grid, block = (mask.view(-1, 4, 4) for mask in masks)
    assert torch.equal(grid, torch.tensor([[0.0, 1, 0, 1], [1] * 4, [0, 1, 0, 1], [1] * 4]).expand_as(grid))
    assert (block.sum(dim=(1, 2)) == 12).all() and not torch.equal(block, grid)
    with pytest.raises(ValueError, match=r"--mask_ratio is 0\.75, not 0\.5"):
        tool.main(tool.parse_args([*arguments, "--masking", "grid", "--mask_ratio", "0.5", "--overwrite"]))


def test_reconstruct_refuses_what_it_cannot_draw(checkpoint, image_folder, tmp_path):
    tool = load_tool("reconstruct")
    image = str(next((image_folder / "val").rglob("*.jpg")))
    output = ["--output", str(tmp_path / "picture.png")]
    model = ViTMAEForPreTraining(TINY).state_dict()
    encoder = {key: value for key, value in model.items() if not key.startswith(("decoder", "mask"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    with pytest.raises(ValueError, match=r"encoder only.*mae_visualize_vit_\*\.pth"):
        tool.main(tool.parse_args(["--checkpoint", str(tmp_path / "encoder.pth"), image, *output]))
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="none of the 1 files can be read"):
        tool.main(tool.parse_args(["--checkpoint", str(checkpoint), str(tmp_path / "text.jpg"), *output]))
    with pytest.raises(FileNotFoundError, match=r"no image or folder at .*missing\.jpg"):
        tool.main(tool.parse_args(["--checkpoint", str(checkpoint), image, str(tmp_path / "missing.jpg"), *output]))
    with pytest.raises(ValueError, match=r"mask_ratio 1\.0 keeps 0 of 16 patches"):
        tool.main(tool.parse_args(["--checkpoint", str(checkpoint), image, *output, "--mask_ratio", "1"]))
    assert not (tmp_path / "picture.png").exists()


def test_reconstruct_shows_some_of_a_folder_and_passes_over_what_cannot_be_read(
    checkpoint, image_folder, tmp_path, capsys
):
    tool, output = load_tool("reconstruct"), tmp_path / "picture.png"
    (tmp_path / "text.jpg").write_text("no picture")
    arguments = ["--checkpoint", str(checkpoint), str(image_folder / "train"), str(tmp_path / "text.jpg")]
    assert tool.main(tool.parse_args([*arguments, "--max_images", "3", "--output", str(output)])) == 1
    printed = capsys.readouterr()
    assert "3 of 24 images" in printed.out and "passed over: cannot decode" in printed.err
    with Image.open(output) as picture:
        pixels = np.asarray(picture)
    tops = [CAPTIONS.stop + 4 + 26 + row * ROW for row in range(3)]  # of the rows below the originals
    masked, _, error = (pixels[top:][:192, 4:196] for top in tops)  # the first image's
    masked, error = (row.reshape(4, 48, 4, 48, 3).swapaxes(1, 2).reshape(16, -1) for row in (masked, error))
    assert ((masked == 128).all(axis=1) != (error == 0).all(axis=1)).all()  # grey where removed, right where not
    assert (error == 0).all(axis=1).sum() == 4


# -------------------------------------------------------------------------------- folders of experiments


@pytest.fixture
def experiment(checkpoint, tmp_path) -> Path:
    folder = tmp_path / "experiment"
    folder.mkdir()
    checkpoint.rename(folder / "checkpoint_1")
    return folder


def test_folder_of_an_experiment_stands_for_its_best_checkpoint_or_its_last(experiment, image_folder, tmp_path, capsys):
    tool, image = load_tool("reconstruct"), str(next((image_folder / "val").rglob("*.jpg")))
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors and no best_checkpoint and no last_ch"):
        find_weights(experiment)
    (experiment / "last_checkpoint").symlink_to("checkpoint_1")
    assert find_weights(experiment) == experiment / "last_checkpoint" / "model.safetensors"
    shutil.copytree(experiment / "checkpoint_1", experiment / "best_checkpoint")
    assert find_weights(experiment) == experiment / "best_checkpoint" / "model.safetensors"
    assert find_weights(experiment / "checkpoint_1") == experiment / "checkpoint_1" / "model.safetensors"
    tool.main(tool.parse_args(["--checkpoint", str(experiment), image, "--output", str(tmp_path / "picture.png")]))
    assert str(experiment / "best_checkpoint" / "model.safetensors") in capsys.readouterr().out
    (experiment / "best_checkpoint" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"best_checkpoint holds no model\.safetensors"):
        find_weights(experiment)


def test_link_to_a_checkpoint_that_is_gone_is_none(experiment):
    (experiment / "last_checkpoint").symlink_to("checkpoint_9")
    with pytest.raises(FileNotFoundError, match="no best_checkpoint and no last_checkpoint; give a checkpoint folder"):
        find_weights(experiment)


# -------------------------------------------------------------------------------- plot_log

FIRST_COLOUR = (0x1F, 0x6F, 0xB4)
FRAME = dict(left=82, right=560 - 18, top=12 + 18, bottom=340 + 18 - 46)  # of a panel whose legend has one line


def plot(logs: dict[Path, list[dict]], output: Path, *arguments: str) -> np.ndarray:
    """Write logs, draw them, and give the picture's pixels."""
    for log, rows in logs.items():
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return draw_logs(list(logs), output, *arguments)


def draw_logs(paths: list[Path], output: Path, *arguments: str) -> np.ndarray:
    tool = load_tool("plot_log")
    tool.main(tool.parse_args([*map(str, paths), "--output", str(output), "--overwrite", *arguments]))
    with Image.open(output) as picture:
        return np.asarray(picture)


def is_drawn(pixels: np.ndarray, across: float, up: float, colour: tuple = FIRST_COLOUR) -> bool:
    """Tell whether a curve passes within a pixel of a place in the frame of the first panel, in shares of its sides."""
    x = round(FRAME["left"] + across * (FRAME["right"] - FRAME["left"]))
    y = round(FRAME["bottom"] - up * (FRAME["bottom"] - FRAME["top"]))
    return bool((np.abs(pixels[y - 1 : y + 2, x - 1 : x + 2].astype(int) - colour).max(axis=-1) < 24).any())


def test_plot_log_draws_a_panel_for_each_figure(tmp_path):
    rows = [{"epoch": epoch, "loss": 10 - 2 * epoch, "error": 0.5} for epoch in range(6)]
    log, output = tmp_path / "run" / "log.jsonl", tmp_path / "curve.png"
    pixels = plot({log: rows}, output, "--y", "loss", "error", "loss+error")
    assert pixels.shape == (2 * (340 + 18), 2 * 560, 3)
    assert all(is_drawn(pixels, share, 1 - share) for share in (0.1, 0.5, 0.9))  # from 10 to 0, which are ticks
    assert not is_drawn(pixels, 0.5, 0.3)
    with pytest.raises(ValueError, match="has both 'epoch' and 'nothing'; there are epoch, error, loss"):
        draw_logs([log], tmp_path / "other.png", "--y", "nothing")
    tool = load_tool("plot_log")
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.main(tool.parse_args([str(log), "--output", str(output)]))
    with pytest.raises(SystemExit):
        tool.parse_args([str(log), "--output", "curve"])


def test_plot_log_takes_the_folder_of_an_experiment(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    pixels = plot(
        {log: [{"epoch": e, "training_loss": e} for e in range(3)]}, tmp_path / "a.png", "--y", "training_loss"
    )
    again = draw_logs([log.parent], tmp_path / "b.png", "--y", "training_loss")
    assert (pixels == again).all()
    with pytest.raises(FileNotFoundError, match=r"no log at .*log\.jsonl; give an experiment's folder"):
        draw_logs([tmp_path], tmp_path / "c.png")


def test_plot_log_names_runs_by_as_many_folders_as_tell_them_apart(tmp_path):
    logs = [tmp_path / a / b / "run" / "log.jsonl" for a in "xy" for b in "uv"]
    assert list(name_runs(logs[:2]).values()) == ["u/run", "v/run"]
    assert list(name_runs(logs[::2]).values()) == ["x/u/run", "y/u/run"]
    (name,) = name_runs([tmp_path / ("n" * 50 + "o" * 50) / "log.jsonl"]).values()
    assert name.startswith("nnn") and name.endswith("ooo") and len(name) == 60
    odd = Path(os.fsdecode(b"/a\xff\n/log.jsonl"))
    assert name_runs([odd])[odd] == "a\\udcff\\n"


def test_plot_log_leaves_a_gap_for_null_and_passes_over_a_line_cut_off(tmp_path, capsys):
    log, output = tmp_path / "run" / "log.jsonl", tmp_path / "curve.png"
    losses = [1.0, 1.0, None, 1.0, 1.0, math.nan, 1.0]
    rows = [{"epoch": epoch, "training_loss": loss} for epoch, loss in enumerate(losses)]
    rows.insert(1, {"epoch": 0.5})  # an evaluation's figures are in some rows alone, and no gap between them
    plot({log: rows}, output, "--y", "training_loss")
    with log.open("a") as opened:
        opened.write('{"epoch": 7, "training_l')
    pixels = draw_logs([log], output, "--y", "training_loss")
    assert f"{log}: the last line was cut off" in capsys.readouterr().out
    drawn = [is_drawn(pixels, (epoch + 0.5) / 6, 0.5) for epoch in range(6)]
    assert drawn == [True, False, False, True, False, False]
    assert is_drawn(pixels, 1, 0.5)  # a point between gaps
    log.write_text("cut\n" + log.read_text())
    with pytest.raises(ValueError, match=r"line 1 of .*log\.jsonl is no JSON"):
        draw_logs([log], output)
    for row, message in (
        ({"epoch": 1, "training_loss": None}, "has both"),
        ({"epoch": 1, "training_loss": "a"}, "no nu"),
    ):
        with pytest.raises(ValueError, match=message):
            plot({log: [row]}, output, "--y", "training_loss")
    log.write_text("")
    with pytest.raises(ValueError, match="there is no complete row yet"):
        draw_logs([log], output)


def test_plot_log_ticks_are_1_2_5_times_powers_of_10():
    tool = load_tool("plot_log")
    for low, high in ((0, 1), (0.3, 2.1), (-7, 1234), (3e-5, 4e-5), (1e6, 1e6 + 3), (84, 390)):
        axis = tool.build_axis([low, high], to_ticks=True)
        assert 3 <= len(axis.ticks) <= 8 and axis.low <= low and axis.high >= high
        (step,) = {f"{b - a:.2g}" for a, b in itertools.pairwise(axis.ticks)}
        assert f"{float(step):e}"[0] in "125" and float(step) == pytest.approx(float(f"{float(step):.0e}"))
    axis = tool.build_axis([0.4, 30], log=True)
    assert list(axis.ticks.values()) == ["0.5", "1", "2", "5", "10", "20"]
    assert axis.share(math.log10(0.4)) == 0 and axis.share(math.log10(30)) == 1
    assert list(tool.build_axis([2, 2.5], log=True).ticks.values()) == ["2", "2.1", "2.2", "2.3", "2.4", "2.5"]


def test_plot_log_smooths_with_the_raw_curve_light_behind(tmp_path):
    tool = load_tool("plot_log")
    points = [(0, 1.0), (1, 0.0), (2, None), (3, 0.0)]
    assert tool.smooth(points, 0.5) == [(0, 1.0), (1, pytest.approx(1 / 3)), (2, None), (3, pytest.approx(1 / 7))]
    assert tool.smooth(points, 0.0) == points
    rows = [{"step": step, "loss": 1.0 if step < 5 else 0.0} for step in range(11)]
    pixels = plot(
        {tmp_path / "run" / "log.jsonl": rows}, tmp_path / "a.png", "--x", "step", "--y", "loss", "--smooth", "0.9"
    )
    light = tuple((255 * 2 + value) // 3 for value in FIRST_COLOUR)
    assert is_drawn(pixels, 0.7, 0.0, light) and not is_drawn(pixels, 0.7, 0.0)
    assert is_drawn(pixels, 0.2, 1.0)


def test_plot_log_with_a_logarithmic_axis_leaves_out_what_has_no_logarithm(tmp_path, capsys):
    log = tmp_path / "run" / "log.jsonl"
    rows = [{"epoch": epoch, "loss": 10.0 ** (2 - epoch)} for epoch in range(5)]
    pixels = plot({log: rows}, tmp_path / "a.png", "--y", "loss", "--log_y")
    assert all(is_drawn(pixels, share, 1 - share) for share in (0.1, 0.5, 0.9))
    rows[2]["loss"] = 0.0
    pixels = plot({log: rows}, tmp_path / "a.png", "--y", "loss", "--log_y")
    assert "1 values of loss are 0 or less" in capsys.readouterr().out and not is_drawn(pixels, 0.5, 0.5)


def test_plot_log_starts_without_torch(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"epoch": 1, "training_loss": 1, "testing_loss": 1}\n')
    code = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); assert 'torch' not in sys.modules"
    command = f"import sys; sys.argv = sys.argv[1:]; {code}"
    tool = Path(__file__).resolve().parent.parent / "tools" / "plot_log.py"
    arguments = [str(tool), str(log), "--output", str(tmp_path / "curve.png")]
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, timeout=60)


# -------------------------------------------------------------------------------- classify


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    folder, names = tmp_path_factory.mktemp("classifier") / "last_checkpoint", ["n01440764", 'a "b", c', "dogs"]
    folder.mkdir()
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(TINY, 3, "avg")
    torch.nn.init.normal_(model.head.weight)  # so that classes have different probabilities
    save_file(model.state_dict(), folder / "model.safetensors")
    record = {"config": TINY.as_record(decoder=False), "class_names": names}
    (folder / "config.json").write_text(json.dumps(record))
    return folder.parent


def classify(*arguments: object) -> int:
    tool = load_tool("classify")
    return tool.main(tool.parse_args(list(map(str, arguments))))


def test_classify_writes_a_row_for_each_image_below_its_folders(classifier, image_folder, tmp_path, capsys):
    odd = image_folder / "val" / os.fsdecode(b'odd\xff "x",\n.jpg')
    shutil.copyfile(next((image_folder / "val").rglob("*.jpg")), odd)
    single = next((image_folder / "train").rglob("*.jpg"))
    arguments = ("--checkpoint", classifier, image_folder / "val", single, "--top", 2)
    tables = []
    for batch_size in (1, 4):
        table = tmp_path / f"{batch_size}.csv"
        assert classify(*arguments, "--csv", table, "--batch_size", batch_size) == 0
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
            tables.append(list(csv.DictReader(opened)))
    expected = [*sorted((image_folder / "val").rglob("*.jpg"), key=lambda path: os.fsencode(path)), single]
    assert sorted(row["path"] for row in tables[0]) == sorted(map(str, expected))
    assert list(tables[0][0]) == ["path", "class_1", "probability_1", "class_2", "probability_2"]
    for one, four in zip(*tables, strict=True):
        assert {one["class_1"], one["class_2"]} < {"n01440764", 'a "b", c', "dogs"}  # as the folders are called
        assert float(one["probability_1"]) >= float(one["probability_2"]) > 0
        assert float(four["probability_1"]) == pytest.approx(float(one["probability_1"]), abs=1e-5)
    with pytest.raises(FileExistsError, match="--overwrite"):
        classify(*arguments, "--csv", table)
    capsys.readouterr()
    classify(*arguments[:2], single, "--top", 5)
    weights, name, *lines = capsys.readouterr().out.splitlines()
    assert weights.endswith("last_checkpoint/model.safetensors") and name == str(single) and len(lines) == 3
    assert any(line.endswith("tench") for line in lines)  # in words, on the screen


def test_classify_names_and_passes_over_what_it_cannot_read(classifier, image_folder, tmp_path, capsys):
    folder = image_folder / "val" / "cats"
    (folder / "000.jpg").write_text("no picture")
    (folder / "999.jpg").symlink_to("nowhere.jpg")
    table = tmp_path / "table.csv"
    assert classify("--checkpoint", classifier, folder, "--csv", table) == 1
    printed = capsys.readouterr()
    assert [line.split(": ")[0] for line in printed.err.splitlines()[:2]] == ["passed over"] * 2
    assert "000.jpg" in printed.err and "999.jpg" in printed.err and "2 of 5 files" in printed.err
    assert f"{table}: 3 images" in printed.out and len(table.read_text().splitlines()) == 1 + 3
    for path, message in ((tmp_path / "missing", "no image or folder at"), (tmp_path / "empty", "no images below")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=message):
            classify("--checkpoint", classifier, folder, path)


# -------------------------------------------------------------------------------- images in their own units

BANDS = 5
RUN = [
    "--experiment_name",
    "experiment",
    "--num_workers",
    "0",
    "--per_gpu_batch_size",
    "4",
    "--gradient_accumulation_steps",
    "1",
    "--save_checkpoint_interval",
    "1",
]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Path:
    """Draw tiles of five bands of 16 bits as class folders and as pairs, .npy and TIFF of the same values."""
    root, generator = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for split, ade_split in (("train", "training"), ("val", "validation")):
        for index in range(4):
            labels = 1 + (np.arange(20) > 9).astype(np.uint8)[None].repeat(18, axis=0)
            tile = (
                generator.integers(0, 300, (18, 20, BANDS)) + 2000 * labels[:, :, None].astype(int) + 500 * (index % 2)
            )
            tile = tile.astype(np.uint16)
            for path in (root / "classes" / split / "ab"[index % 2], root / "pairs" / "images" / ade_split):
                path.mkdir(parents=True, exist_ok=True)
                np.save(path / f"{index}.npy", tile)
            tifffile.imwrite(root / f"{split}_{index}.tif", tile, photometric="minisblack", planarconfig="contig")
            maps = root / "pairs" / "annotations" / ade_split
            maps.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(maps / f"{index}.png")
    return root


def measure(folder: Path, *more: str, capsys) -> list[str]:
    tool = load_tool("measure_values")
    tool.main(tool.parse_args([str(folder), "--input_channels", str(BANDS), *more]))
    return capsys.readouterr().out.splitlines()[-1].split()


@pytest.fixture(scope="module")
def pretrained(tiles, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("work")
    sizes = "--img_size 16 --patch_size 4 --encoder_embed_dim 32 --encoder_depth 4 --encoder_num_heads 4"
    sizes += " --decoder_embed_dim 16 --decoder_depth 1 --decoder_num_heads 2 --epochs 2 --warmup_epochs 1"
    own = ["--input_channels", str(BANDS), "--mean", *["4000"] * BANDS, "--std", *["1000"] * BANDS]
    argv = ["--path_to_data", str(tiles / "classes"), "--working_directory", str(work), *RUN, *sizes.split(), *own]
    pretrain_mae.main(pretrain_mae.parse_args(argv))
    return work / "experiment" / "checkpoint_2"


def test_measured_values_are_numpys(tmp_path, capsys):
    generator = np.random.default_rng(0)
    values = generator.normal(1e5, 3, (6, 7, 8, BANDS)).astype(np.float32)
    values[0, :3] = np.nan
    values[1, 0, 0, 2] = np.inf
    for index, tile in enumerate(values):
        np.save(tmp_path / f"{index}.npy", tile)
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    words = measure(tmp_path, capsys=capsys)
    known = np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    assert words[:4] == ["--input_channels", "5", "--value_range", "own"]
    mean, std = (list(map(float, words[start : start + BANDS])) for start in (5, 6 + BANDS))
    assert mean == pytest.approx(np.nanmean(known, axis=(0, 1, 2)).tolist(), rel=1e-5)
    assert std == pytest.approx(np.nanstd(known, axis=(0, 1, 2)).tolist(), rel=1e-4)
    words = measure(tmp_path, "--value_range", "99990", "100010", capsys=capsys)
    mapped = (known - 99990) / 20
    assert list(map(float, words[6 : 6 + BANDS])) == pytest.approx(
        np.nanmean(mapped, axis=(0, 1, 2)).tolist(), rel=1e-3
    )


def test_reconstruct_takes_tiles_from_npy_and_tiff_alike(pretrained, tiles, tmp_path):
    tool, pictures = load_tool("reconstruct"), []
    for path in (tiles / "classes" / "val" / "a" / "0.npy", tiles / "val_0.tif"):
        output = tmp_path / f"{path.suffix[1:]}.png"
        shown = ["--show_channels", "4", "2", "0"]
        tool.main(tool.parse_args(["--checkpoint", str(pretrained), str(path), "--output", str(output), *shown]))
        with Image.open(output) as picture:
            pixels = np.array(picture)
        pixels[CAPTIONS] = 0
        pictures.append(pixels)
    assert (pictures[0] == pictures[1]).all()


def test_classifier_of_tiles_is_finetuned_scored_and_asked(pretrained, tiles, tmp_path, capsys):
    argv = ["--path_to_data", str(tiles / "classes"), "--working_directory", str(tmp_path), *RUN, "--epochs", "2"]
    argv += ["--warmup_epochs", "1", "--path_to_pretrained_mae_weights", str(pretrained), "--random_aug_magnitude", "0"]
    figures = finetune_classifier.main(finetune_classifier.parse_args(argv))
    weights = str(tmp_path / "experiment" / "best_checkpoint")
    again = ["--eval_only", "--path_to_data", str(tiles / "classes"), "--path_to_pretrained_mae_weights", weights]
    scored = finetune_classifier.main(finetune_classifier.parse_args([*again, "--num_workers", "0"]))
    assert scored.keys() == figures.keys() and read_json(Path(weights) / "config.json")["value_range"] == "own"
    tool = load_tool("classify")
    capsys.readouterr()
    for path in (tiles / "classes" / "val" / "b" / "1.npy", tiles / "val_1.tif"):
        tool.main(tool.parse_args(["--checkpoint", weights, str(path)]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == lines[6:8] and {line.split()[1] for line in lines[2:4]} == {"a", "b"}


def test_segmenter_of_tiles_is_finetuned_and_asked(pretrained, tiles, tmp_path):
    argv = ["--path_to_data", str(tiles / "pairs"), "--working_directory", str(tmp_path), *RUN, "--epochs", "2"]
    argv += ["--path_to_backbone_checkpoint", str(pretrained), "--num_classes", "2", "--channels", "16"]
    figures = finetune_segmentation.main(finetune_segmentation.parse_args([*argv, "--img_size", "16"]))
    assert figures["testing_classes"] == 2
    tool, weights = load_tool("segment"), str(tmp_path / "experiment")
    for name, path in (("npy", tiles / "pairs" / "images" / "validation" / "2.npy"), ("tif", tiles / "val_2.tif")):
        tool.main(tool.parse_args(["--checkpoint", weights, str(path), "--output", str(tmp_path / name)]))
    (tmp_path / "text.npy").write_text("no array")
    arguments = ["--checkpoint", weights, str(tmp_path / "text.npy"), str(path), "--output", str(tmp_path / "tif")]
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.main(tool.parse_args(arguments))
    assert tool.main(tool.parse_args([*arguments, "--overwrite"])) == 1  # one is passed over, the other written
    maps = [np.asarray(Image.open(next((tmp_path / name).glob("*_labels.png")))) for name in ("npy", "tif")]
    assert (maps[0] == maps[1]).all() and maps[0].shape == (18, 20) and set(np.unique(maps[0])) <= {1, 2}


def test_encoder_of_tiles_goes_to_timm_and_back_without_a_changed_bit(pretrained, tmp_path):
    tool, target = load_tool("convert_weights"), str(tmp_path / "encoder.safetensors")
    tool.main(tool.parse_args([str(pretrained), target, "--to", "timm", "--drop"]))
    options = dict(img_size=16, patch_size=4, embed_dim=32, depth=4, num_heads=4, in_chans=BANDS, num_classes=0)
    encoder = timm.create_model("vit_base_patch16_224", **options)
    encoder.load_state_dict(load_file(target))
    numbers = ["--mean", *["4000"] * BANDS, "--std", *["1000"] * BANDS, "--value_range", "own"]
    back = [target, str(tmp_path / "back"), "--to", "ours", "--encoder_num_heads", "4", *numbers]
    tool.main(tool.parse_args(back))
    ours, before = load_file(tmp_path / "back" / "model.safetensors"), load_file(pretrained / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in ours.items()) and "patch_embed.proj.weight" in ours
    record = read_json(tmp_path / "back" / "config.json")
    assert (record["value_range"], record["image_std"]) == ("own", [1000] * BANDS)
