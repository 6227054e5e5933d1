"""The commands that do not train: what they draw, and what they refuse."""

import dataclasses
import json

import pytest
import torch
from conftest import TINY, load_tool
from PIL import Image
from safetensors.torch import save_file

from model import ViTMAEForPreTraining


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
