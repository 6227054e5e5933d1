"""The commands that do not train: what they draw, and what they refuse."""

import dataclasses
import json
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
from model import ViTMAEForPreTraining
from storage.files import read_json


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    save_file(ViTMAEForPreTraining(TINY).state_dict(), folder / "model.safetensors")
    record = {"config": dataclasses.asdict(TINY), "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_reconstruct_draws_images_of_any_size(checkpoint, image_folder, tmp_path):
    tool = load_tool("reconstruct")
    images = [str(path) for path in sorted((image_folder / "val").rglob("*.jpg"))[:4]]
    output = tmp_path / "out" / "picture.png"
    arguments = ["--checkpoint", str(checkpoint), *images, "--output", str(output)]
    tool.main(tool.parse_args(arguments))
    with Image.open(output) as picture:
        assert picture.width == 4 * (128 + 4) + 4
        first = picture.tobytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        tool.main(tool.parse_args(arguments))
    tool.main(tool.parse_args([*arguments, "--overwrite"]))
    with Image.open(output) as picture:
        assert picture.tobytes() == first  # the same seed, the same masks
    tool.main(tool.parse_args([*arguments, "--overwrite", "--seed", "1"]))
    with Image.open(output) as picture:
        assert picture.tobytes() != first


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
    with pytest.raises(ValueError, match=r"cannot decode .*text\.jpg"):
        tool.main(tool.parse_args(["--checkpoint", str(checkpoint), str(tmp_path / "text.jpg"), *output]))
    with pytest.raises(ValueError, match=r"mask_ratio 1\.0 keeps 0 of 16 patches"):
        tool.main(tool.parse_args(["--checkpoint", str(checkpoint), image, *output, "--mask_ratio", "1"]))
    assert not (tmp_path / "picture.png").exists()


def test_plot_log_draws_a_panel_for_each_figure(tmp_path):
    tool = load_tool("plot_log")
    log, output = tmp_path / "log.jsonl", tmp_path / "curve.png"
    rows = [{"epoch": epoch, "loss": 1 / (1 + epoch), "error": 0.5} for epoch in range(5)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tool.main(tool.parse_args([str(log), "--y", "loss", "error", "loss+error", "--output", str(output)]))
    with Image.open(output) as picture:
        assert picture.size == (2 * tool.PANEL_SIZE[0], 2 * tool.PANEL_SIZE[1])
        # The first loss, the largest, is at the top left corner of the first plot, in the first colour.
        assert picture.getpixel((tool.MARGIN["left"], tool.MARGIN["top"])) == (0x1F, 0x6F, 0xB4)
    with pytest.raises(ValueError, match="has both 'epoch' and 'nothing'"):
        tool.main(tool.parse_args([str(log), "--y", "nothing", "--output", str(tmp_path / "other.png")]))


def test_plot_log_leaves_a_gap_for_null_and_passes_over_a_line_cut_off(tmp_path, capsys):
    tool = load_tool("plot_log")
    log, output = tmp_path / "log.jsonl", tmp_path / "curve.png"
    losses = [1.0, 1.0, None, 1.0, 1.0]
    rows = [json.dumps({"epoch": epoch, "training_loss": loss}) + "\n" for epoch, loss in enumerate(losses)]
    log.write_text("".join(rows) + '{"epoch": 5, "training_l')
    arguments = [str(log), "--y", "training_loss", "--output", str(output)]
    tool.main(tool.parse_args(arguments))
    assert "the last line was cut off" in capsys.readouterr().out
    left, bottom = tool.MARGIN["left"], tool.PANEL_SIZE[1] - tool.MARGIN["bottom"]
    width = tool.PANEL_SIZE[0] - left - tool.MARGIN["right"]
    with Image.open(output) as picture:
        drawn = [picture.getpixel((left + round(share * width), bottom)) for share in (0.125, 0.375, 0.625, 0.875)]
    assert [colour == (0x1F, 0x6F, 0xB4) for colour in drawn] == [True, False, False, True]
    log.write_text("cut\n" + "".join(rows))
    with pytest.raises(ValueError, match=r"line 1 of .*log\.jsonl is no JSON"):
        tool.main(tool.parse_args([*arguments, "--overwrite"]))
    log.write_text(rows[2])
    with pytest.raises(ValueError, match="has both 'epoch' and 'training_loss'"):
        tool.main(tool.parse_args([*arguments, "--overwrite"]))


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
            pictures.append(picture.tobytes())
    assert pictures[0] == pictures[1]


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
    assert lines[1:3] == lines[4:6] and {line.split()[1] for line in lines[1:3]} == {"a", "b"}


def test_segmenter_of_tiles_is_finetuned_and_asked(pretrained, tiles, tmp_path):
    argv = ["--path_to_data", str(tiles / "pairs"), "--working_directory", str(tmp_path), *RUN, "--epochs", "2"]
    argv += ["--path_to_backbone_checkpoint", str(pretrained), "--num_classes", "2", "--channels", "16"]
    figures = finetune_segmentation.main(finetune_segmentation.parse_args([*argv, "--img_size", "16"]))
    assert figures["testing_classes"] == 2
    tool, weights = load_tool("segment"), str(tmp_path / "experiment" / "best_checkpoint")
    for name, path in (("npy", tiles / "pairs" / "images" / "validation" / "2.npy"), ("tif", tiles / "val_2.tif")):
        tool.main(tool.parse_args(["--checkpoint", weights, str(path), "--output", str(tmp_path / name)]))
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
