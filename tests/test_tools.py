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
