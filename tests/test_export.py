"""Exported programs: the model's own scores for any number of images, what they say of themselves, and refusals."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, load_tool
from safetensors.torch import save_file
from torch import Tensor

from model import (
    ViTMAEForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEForSegmentation,
    load_classifier,
    load_segmenter,
)

ENCODER = dataclasses.replace(TINY, img_size=(32, 48), encoder_embed_dim=64, encoder_depth=4, encoder_num_heads=2)
MODELS = {
    "avg": lambda: ViTMAEForImageClassification(ENCODER, 5, "avg"),
    "cls": lambda: ViTMAEForImageClassification(ENCODER, 5, "cls"),
    "segmenter": lambda: ViTMAEForSegmentation(ENCODER, 5, channels=64),
    "segmenter_with_relative_positions": lambda: ViTMAEForSegmentation(ENCODER, 5, channels=64, rel_pos_bias=True),
}
MEAN, STD, NAMES = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], ["ant", "bee", "cat", "dog", "eel"]


def write_checkpoint(folder: Path, model: torch.nn.Module) -> Path:
    """Save a model as the finetuning scripts do, its every weight and statistic moved from where it starts."""
    torch.manual_seed(0)
    state_dict = model.state_dict()
    for name, value in state_dict.items():
        if value.is_floating_point():
            value += 0.05 * (torch.rand_like(value) if name.endswith("running_var") else torch.randn_like(value))
    record = {
        "config": dataclasses.asdict(ENCODER), "architecture": type(model).__name__, "num_classes": 5,
        "image_mean": MEAN, "image_std": STD, "class_names": NAMES,
    }  # fmt: skip
    if isinstance(model, ViTMAEForSegmentation):
        record |= dict(taps=model.taps, channels=64, norm="batch", rel_pos_bias=model.backbone.rel_pos_bias)
    folder.mkdir()
    save_file(state_dict, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(params=MODELS)
def checkpoint(request, tmp_path) -> Path:
    return write_checkpoint(tmp_path / "best_checkpoint", MODELS[request.param]())


def scores(checkpoint: Path, images: Tensor) -> Tensor:
    """What the model of a checkpoint says, from model.py alone."""
    if "taps" not in json.loads((checkpoint / "config.json").read_text()):
        return load_classifier(checkpoint)[0].eval()(images)
    logits = load_segmenter(checkpoint)[0].eval()(images).logits
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def export(checkpoint: Path, to: str, output: Path, *more: str) -> None:
    tool = load_tool("export")
    tool.main(tool.parse_args(["--checkpoint", str(checkpoint), "--to", to, "--output", str(output), *more]))


@torch.no_grad()
def assert_same_scores(run, checkpoint: Path, atol: float) -> None:
    for num_images in (1, 2, 5):
        images = torch.randn(num_images, 3, 32, 48, generator=torch.Generator().manual_seed(num_images))
        expected = scores(checkpoint, images)
        assert expected.std() > 0.01  # of a size at which the tolerance tells something
        torch.testing.assert_close(run(images), expected, rtol=0, atol=atol)


def test_torch_export_scores_any_number_of_images_as_the_model(checkpoint, tmp_path, capsys):
    output = tmp_path / "out" / "model.pt2"
    export(checkpoint, "torch_export", output)
    assert "on 3 random images it differs from the model by up to " in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]
    extra = {"metadata.json": ""}
    program = torch.export.load(output, extra_files=extra)
    metadata = json.loads(extra["metadata.json"])
    assert (metadata["image_mean"], metadata["image_std"], metadata["class_names"]) == (MEAN, STD, NAMES)
    assert metadata["image_hw"] == [32, 48]
    assert not any(name.startswith("auxiliary_head") for name in program.state_dict)
    assert_same_scores(program.module(), checkpoint, atol=1e-5)  # the same kernels, perhaps in another order


def test_onnx_scores_any_number_of_images_as_the_model(checkpoint, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    output = tmp_path / "out" / "model.onnx"
    export(checkpoint, "onnx", output)
    assert list(output.parent.iterdir()) == [output]
    session = onnxruntime.InferenceSession(output)
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("images", ["batch", 3, 32, 48])]
    assert [node.name for node in session.get_outputs()] == ["logits"]
    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["task"] == ("segmentation" if session.get_outputs()[0].shape[2:] else "classification")
    assert (metadata["image_mean"], metadata["image_std"], metadata["class_names"]) == (MEAN, STD, NAMES)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    assert_same_scores(run, checkpoint, atol=1e-4)  # other kernels


def test_export_refuses_what_it_cannot_write(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "best_checkpoint", MODELS["avg"]())
    output = tmp_path / "model.pt2"
    output.write_text("older")
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(folder, "torch_export", output)
    with pytest.raises(ValueError, match=r"writes a \.onnx file, not model\.pt2"):
        export(folder, "onnx", output)
    tool = load_tool("export")
    monkeypatch.setattr(tool, "ONNX_PACKAGES", ("torch", "no_such_package"))
    arguments = ["--checkpoint", str(folder), "--to", "onnx", "--output", str(tmp_path / "model.onnx")]
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: pip install no_such_package$"):
        tool.main(tool.parse_args(arguments))
    pretrained = write_checkpoint(tmp_path / "checkpoint_1", ViTMAEForPreTraining(ENCODER))
    with pytest.raises(ValueError, match="holds no classifier"):
        export(pretrained, "torch_export", tmp_path / "other.pt2")
    assert output.read_text() == "older"
    assert {entry.name for entry in tmp_path.iterdir()} == {"best_checkpoint", "checkpoint_1", "model.pt2"}


@pytest.mark.parametrize("wrong", [0.0, math.nan])
def test_export_writes_nothing_where_the_program_differs(wrong, tmp_path, monkeypatch):
    tool = load_tool("export")
    folder = write_checkpoint(tmp_path / "best_checkpoint", MODELS["avg"]())
    output = tmp_path / "model.pt2"
    output.write_text("older")
    monkeypatch.setitem(tool.WRITERS, "torch_export", lambda model, metadata, file: file.write_text("newer"))
    monkeypatch.setitem(tool.RUNNERS, "torch_export", lambda file, images: torch.full((len(images), 5), wrong))
    arguments = ["--checkpoint", str(folder), "--to", "torch_export", "--output", str(output), "--overwrite"]
    with pytest.raises(RuntimeError, match=r"differs from the model by up to .*nothing is written"):
        tool.main(tool.parse_args(arguments))
    assert output.read_text() == "older"
    assert {entry.name for entry in tmp_path.iterdir()} == {"best_checkpoint", "model.pt2"}
