"""Exported programs: the model's own scores for any number of images, what they say of themselves, and refusals."""

import dataclasses
import functools
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, load_tool
from safetensors.torch import save_file
from torch import Tensor

from dataset import IMAGENET_MEAN, IMAGENET_STD
from model import (
    MAEConfig,
    ViTMAEForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEForSegmentation,
    load_classifier,
    load_segmenter,
)

ENCODER = dataclasses.replace(TINY, img_size=(32, 48), encoder_embed_dim=64, encoder_depth=4, encoder_num_heads=2)
ONE_PATCH_HIGH = dataclasses.replace(ENCODER, img_size=(7, 35), patch_size=7, input_channels=4, encoder_depth=1)
ODD_GRID = dataclasses.replace(ENCODER, img_size=(20, 28), input_channels=1)  # 5 x 7, whose half is 2 x 3
MODELS = {
    "avg": lambda: ViTMAEForImageClassification(ENCODER, 5, "avg"),
    "cls_of_one_row_and_four_channels": lambda: ViTMAEForImageClassification(ONE_PATCH_HIGH, 5, "cls"),
    "probe": lambda: ViTMAEForImageClassification(TINY, 5, "cls", probe_head=True),
    "segmenter": lambda: ViTMAEForSegmentation(ENCODER, 5, channels=64),
    "grey_segmenter_of_an_odd_grid": lambda: ViTMAEForSegmentation(
        ODD_GRID,
        5,
        channels=128,
        norm="group",
        rel_pos_bias=True,  # groups of 2 would round badly, in torch as well
    ),
}
MEAN, STD, NAMES = [0.1, 0.2, 0.3, 0.4], [0.4, 0.5, 0.6, 0.7], ["ant", "bee", "cat", "dog", "eel"]


def config_of(model: torch.nn.Module) -> MAEConfig:
    return (model.backbone if isinstance(model, ViTMAEForSegmentation) else model).config


def write_checkpoint(folder: Path, model: torch.nn.Module) -> Path:
    """Save a model as the finetuning scripts do, its every weight and statistic moved from where it starts."""
    torch.manual_seed(0)
    state_dict = model.state_dict()
    for name, value in state_dict.items():
        if value.is_floating_point():
            value += 0.05 * (torch.rand_like(value) if name.endswith("running_var") else torch.randn_like(value))
    config = config_of(model)
    record = {
        "config": dataclasses.asdict(config), "architecture": type(model).__name__, "num_classes": 5,
        "image_mean": MEAN[: config.input_channels], "image_std": STD[: config.input_channels], "class_names": NAMES,
    }  # fmt: skip
    if isinstance(model, ViTMAEForSegmentation):
        norm = "batch" if "running_mean" in "".join(state_dict) else "group"
        record |= dict(
            ignore_zero=False,
            resize_to=[64, 16],
            taps=model.taps,
            channels=model.decode_head.conv_seg.in_channels,
            norm=norm,
            rel_pos_bias=model.backbone.rel_pos_bias,
        )
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
    sizes = MAEConfig(**json.loads((checkpoint / "config.json").read_text())["config"])
    shape = (sizes.input_channels, *sizes.image_hw)
    for num_images in (1, 2, 5):
        images = torch.randn(num_images, *shape, generator=torch.Generator().manual_seed(num_images))
        expected = scores(checkpoint, images)
        assert expected.std() > 0.01  # of a size at which the tolerance tells something
        torch.testing.assert_close(run(images), expected, rtol=0, atol=atol)


def assert_no_paths(output: Path) -> None:
    """Nothing of the machine it was exported on is in a file."""
    content = output.read_bytes()
    assert b"aten" in content  # neither compressed nor empty
    for path in (ROOT, Path(torch.__file__).parent):
        assert str(path).encode() not in content


def check_metadata(metadata: dict, checkpoint: Path) -> None:
    record = json.loads((checkpoint / "config.json").read_text())
    channels, config = metadata["input_channels"], MAEConfig(**record["config"])
    assert (channels, tuple(metadata["image_hw"])) == (config.input_channels, config.image_hw)
    assert (metadata["image_mean"], metadata["image_std"]) == (MEAN[:channels], STD[:channels])
    assert metadata["class_names"] == NAMES


def test_torch_export_scores_any_number_of_images_as_the_model(checkpoint, tmp_path, capsys):
    output = tmp_path / "out" / "model.pt2"
    export(checkpoint, "torch_export", output)
    assert "on 3 random images it differs from the model by up to " in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]
    assert_no_paths(output)
    extra = {"metadata.json": ""}
    program = torch.export.load(output, extra_files=extra)
    check_metadata(json.loads(extra["metadata.json"]), checkpoint)
    assert not any(name.startswith("auxiliary_head") for name in program.state_dict)
    assert_same_scores(program.module(), checkpoint, atol=1e-5)  # the same kernels, perhaps in another order


def test_onnx_scores_any_number_of_images_as_the_model(checkpoint, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    output = tmp_path / "out" / "model.onnx"
    export(checkpoint, "onnx", output)
    assert list(output.parent.iterdir()) == [output]
    assert_no_paths(output)
    session = onnxruntime.InferenceSession(output)
    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    shape = ["batch", metadata["input_channels"], *metadata["image_hw"]]
    assert [(node.name, node.shape) for node in session.get_inputs()] == [("images", shape)]
    assert [node.name for node in session.get_outputs()] == ["logits"]
    assert metadata["task"] == ("segmentation" if session.get_outputs()[0].shape[2:] else "classification")
    check_metadata(metadata, checkpoint)

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

    def write_wrong(model, metadata, file, images):
        file.write_text("newer")
        return torch.full((len(images), 5), wrong)

    monkeypatch.setitem(tool.WRITERS, "torch_export", write_wrong)
    arguments = ["--checkpoint", str(folder), "--to", "torch_export", "--output", str(output), "--overwrite"]
    with pytest.raises(ValueError, match=r"differs from the model by up to .*nothing is written"):
        tool.main(tool.parse_args(arguments))
    assert output.read_text() == "older"
    assert {entry.name for entry in tmp_path.iterdir()} == {"best_checkpoint", "model.pt2"}


@pytest.mark.parametrize(("channels", "mean", "std"), [(3, IMAGENET_MEAN, IMAGENET_STD), (1, [0.5], [0.5])])
def test_original_file_has_the_scripts_mean_for_its_channels(channels, mean, std, tmp_path):
    sizes = dict(encoder_embed_dim=192, encoder_num_heads=3, encoder_depth=1)  # a width whose heads are known
    model = ViTMAEForImageClassification(MAEConfig(img_size=32, input_channels=channels, **sizes), 5)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_finetuned.pth")
    _, metadata = load_tool("export").open_model(str(tmp_path / "mae_finetuned.pth"))
    assert (metadata["image_mean"], metadata["image_std"]) == (list(mean), list(std))


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_output_that_cannot_be_a_file_is_refused_before_anything_is_loaded(more, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "model.onnx.data").mkdir()
    (tmp_path / "file").write_text("mine")
    nowhere = tmp_path / "no_checkpoint"
    with pytest.raises(IsADirectoryError, match=r"folder\.onnx is a folder; --output takes the name of a file"):
        export(nowhere, "onnx", tmp_path / "folder.onnx", *more)
    with pytest.raises(IsADirectoryError, match=r"model\.onnx\.data is a folder"):
        export(nowhere, "onnx", tmp_path / "model.onnx", *more)
    with pytest.raises(NotADirectoryError, match=r"file/below/model\.onnx"):
        export(nowhere, "onnx", tmp_path / "file" / "below" / "model.onnx", *more)
    (tmp_path / "link.onnx").symlink_to(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError if more else FileExistsError, match="no_checkpoint" if more else "--overwrite"
    ):
        export(nowhere, "onnx", tmp_path / "link.onnx", *more)


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.parametrize("had_data", [False, True])
def test_overwriting_leaves_no_weights_of_another_program(had_data, with_data, tmp_path, monkeypatch):
    tool, output = load_tool("export"), tmp_path / "model.onnx"
    written = tmp_path / "new" / "model.onnx"
    written.parent.mkdir()
    files = {"model.onnx": "older"} | ({"model.onnx.data": "older data"} if had_data else {})
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    newer = {"model.onnx": "newer"} | ({"model.onnx.data": "newer data"} if with_data else {})
    for name, text in newer.items():
        (written.parent / name).write_text(text)
    states = []

    def look(what, real):
        def change(*arguments, **options):
            real(*arguments, **options)
            states.append({file.name: file.read_text() for file in tmp_path.glob("model.onnx*")})

        monkeypatch.setattr(*what, change)

    look((os, "replace"), os.replace)
    look((Path, "unlink"), Path.unlink)
    tool.put_in_place(written, output)
    assert states[-1] == newer
    # Whenever a program stands there, it is with its own weights or, where it has none, alone.
    assert all(state in (files, newer) for state in states if "model.onnx" in state)


def test_weights_too_large_for_an_onnx_file_lie_beside_it(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    checkpoint = write_checkpoint(tmp_path / "best_checkpoint", MODELS["probe"]())
    output = tmp_path / "out" / "model.onnx"
    with monkeypatch.context() as patch:  # as torch does from 2 GB on
        patch.setattr(
            torch.onnx.ONNXProgram, "save", functools.partialmethod(torch.onnx.ONNXProgram.save, external_data=True)
        )
        export(checkpoint, "onnx", output)
    assert {file.name for file in output.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    session = onnxruntime.InferenceSession(output)
    assert_same_scores(
        lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), checkpoint, atol=1e-4
    )
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(checkpoint, "onnx", output)


def test_scores_that_are_no_numbers_are_not_exported(tmp_path):
    model = MODELS["avg"]()
    model.head.bias.data[2] = math.inf
    folder = write_checkpoint(tmp_path / "best_checkpoint", model)
    with pytest.raises(ValueError, match="best_checkpoint are not finite numbers"):
        export(folder, "torch_export", tmp_path / "model.pt2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["best_checkpoint"]


def write_text(model: torch.nn.Module, metadata: dict, file: Path, images: Tensor) -> Tensor:
    """Write in no time, and score as the model does."""
    file.write_text("whole")
    return model(images)


def test_disk_that_is_too_small_is_refused_before_the_work(tmp_path, monkeypatch):
    tool = load_tool("export")
    folder, output = write_checkpoint(tmp_path / "best_checkpoint", MODELS["avg"]()), tmp_path / "model.pt2"
    model, _ = tool.open_model(str(folder))
    monkeypatch.setitem(tool.WRITERS, "torch_export", write_text)
    arguments = tool.parse_args(["--checkpoint", str(folder), "--to", "torch_export", "--output", str(output)])
    needed = 4 * sum(value.numel() for value in model.state_dict().values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=r"the weights take 0\.00 GB in .*, where 0\.00 GB are free"):
        tool.main(arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["best_checkpoint"]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    tool.main(arguments)
    assert output.read_text() == "whole"


FULL = """
import resource, sys
sys.path.insert(0, {tests!r})
from conftest import load_tool
tool = load_tool("export")
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # as a full disk, for files of this process
try:
    tool.main(tool.parse_args({arguments!r}))
except OSError as error:
    print("refused:", error)
"""


def test_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    folder = write_checkpoint(tmp_path / "best_checkpoint", MODELS["cls_of_one_row_and_four_channels"]())
    arguments = ["--checkpoint", str(folder), "--to", "torch_export", "--output", str(tmp_path / "model.pt2")]
    code = FULL.format(tests=str(ROOT / "tests"), arguments=arguments)
    # In a process of its own, because torch's own writer ends it there.
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and re.search(r"^refused: .*File too large", done.stdout, re.MULTILINE), done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["best_checkpoint"]


def test_leftovers_of_a_killed_export_are_removed(tmp_path, monkeypatch):
    tool = load_tool("export")
    folder = write_checkpoint(tmp_path / "best_checkpoint", MODELS["avg"]())
    (tmp_path / "model.pt2.unfinished.tmp").mkdir()
    (tmp_path / "model.pt2.unfinished.tmp" / "model.pt2.data").write_text("half")
    (tmp_path / "model.pt2.old").write_text("mine")
    monkeypatch.setitem(tool.WRITERS, "torch_export", write_text)
    tool.main(
        tool.parse_args(["--checkpoint", str(folder), "--to", "torch_export", "--output", str(tmp_path / "model.pt2")])
    )
    assert {entry.name for entry in tmp_path.iterdir()} == {"best_checkpoint", "model.pt2", "model.pt2.old"}


def test_errors_and_interruptions_of_the_command_are_a_sentence(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def message() -> str:
        arguments = ["--checkpoint", str(tmp_path / "none"), "--to", "torch_export", "--output", "model.pt2"]
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "tools" / "export.py"), run_name="__main__")
        return stop.value.code

    assert message() == f"error: no checkpoint folder or weight file at {tmp_path / 'none'}"
    monkeypatch.setattr("model.find_weights", interrupt)
    assert message() == "interrupted; nothing is written"
    assert list(tmp_path.iterdir()) == []
