"""Weights in every layout: round trips, the target libraries' own models, and what is refused."""

import argparse
import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import types
import zipfile
from pathlib import Path

import numpy
import PIL.Image
import pytest
import safetensors.torch
import timm
import torch
import transformers
from conftest import ROOT, TINY, load_tool, weights
from safetensors.torch import load_file, save_file
from timm.layers import gen_relative_position_index
from torch import nn

from model import (
    MODEL_CONFIGS,
    MAEConfig,
    VisionTransformer,
    ViTMAEForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEForSegmentation,
    default_taps,
    load_classifier,
    load_pretrained_encoder,
    load_pretrained_mae,
    load_segmenter,
    read_sizes,
)
from storage.labels import ADE20K_CLASS_NAMES
from storage.layouts import detect_layout
from storage.weights import WEIGHT_FILES, find_weights, read_file, unwrap

tool = load_tool("convert_weights")

FOUR_BLOCKS = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_depth=4)  # the least that a segmenter takes
TOLD = ["--encoder_num_heads", "4", "--decoder_num_heads", "2", "--norm_pix_loss"]
VARIANTS = {  # of the paper's tables 1d and 1c; mask tokens of either width in either network
    "pca": dict(norm_pix_loss=False, pca_target=10),
    "mask tokens": dict(encode_mask_tokens=True),
    "mask tokens of equal widths": dict(encode_mask_tokens=True, decoder_embed_dim=TINY.encoder_embed_dim),
}
BUILD = {
    "masked autoencoder": lambda config: ViTMAEForPreTraining(config),
    "the same of `--target pca`": lambda config: ViTMAEForPreTraining(dataclasses.replace(config, **VARIANTS["pca"])),
    "the same of `--encode_mask_tokens`": lambda config: ViTMAEForPreTraining(
        dataclasses.replace(config, **VARIANTS["mask tokens of equal widths"])
    ),
    "encoder": lambda config: VisionTransformer(config),
    "classifier of the mean": lambda config: ViTMAEForImageClassification(config, 7),
    "classifier of the cls token": lambda config: ViTMAEForImageClassification(config, 7, "cls"),
    "linear probe": lambda config: ViTMAEForImageClassification(config, 7, "cls", probe_head=True),
    "segmenter": lambda config: ViTMAEForSegmentation(config, 5, channels=32),
    "segmenter with relative positions": lambda config: ViTMAEForSegmentation(
        config, 5, channels=32, rel_pos_bias=True
    ),
}


def build(kind: str, config: MAEConfig = TINY, seed: int = 0) -> nn.Module:
    """Build a model without any special value, so that no mistake hides behind a zero or a one."""
    torch.manual_seed(seed)
    model = BUILD[kind](config if "segmenter" not in kind else FOUR_BLOCKS)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                noise = 0.05 * torch.randn_like(value)
                value.add_(noise.abs() if (value > 0).all() else noise)  # variances stay positive
    return model.eval()


def change_json(file: Path, **entries) -> None:
    """Change entries of a JSON file; None takes one out."""
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def write_ours(folder: Path, model: nn.Module) -> Path:
    """Write a checkpoint as the training scripts do."""
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    segmenter = isinstance(model, ViTMAEForSegmentation)
    fields = (model.backbone if segmenter else model).config.as_record(decoder=True)
    if not isinstance(model, ViTMAEForPreTraining):
        fields = {key: value for key, value in fields.items() if not key.startswith(("decoder", "norm_pix"))}
    record = {"architecture": type(model).__name__, "config": fields, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    if segmenter:
        record |= dict(taps=[0, 1, 2, 3], channels=32, norm="batch", rel_pos_bias=model.backbone.rel_pos_bias)
        record |= dict(num_classes=5, class_names=list("abcde"), ignore_zero=True, resize_to=[64, 16])
    if isinstance(model, ViTMAEForImageClassification):
        record |= dict(num_classes=7, global_pool=model.global_pool, class_names=[f"n{i:08d}" for i in range(7)])
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def convert(source: Path, target: Path, layout: str, *flags: str) -> Path:
    tool.main(tool.parse_args([str(source), str(target), "--to", layout, *flags]))
    return target


def target_of(folder: Path, layout: str) -> Path:
    return folder / f"as_{layout}{tool.LAYOUTS[layout].suffix}"


def told(kind: str) -> list[str]:
    return TOLD if kind == "masked autoencoder" else TOLD[:2]


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []


# -------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("masked autoencoder", "original"),
        ("masked autoencoder", "huggingface"),
        *(("encoder", layout) for layout in ("original", "timm", "huggingface", "mmseg", "tutorial")),
        *(("classifier of the mean", layout) for layout in ("original", "timm")),
        *(("classifier of the cls token", layout) for layout in ("original", "timm", "huggingface", "tutorial")),
        ("linear probe", "original"),
        ("segmenter", "mmseg"),
        ("segmenter with relative positions", "mmseg"),
    ],
)
def test_round_trip_changes_no_bit(tmp_path, kind, layout):
    model = build(kind)
    ours = write_ours(tmp_path / "ours", model)
    theirs = convert(ours, target_of(tmp_path, layout), layout)
    flags = [] if layout == "huggingface" or "segmenter" in kind else told(kind)
    flags += ["--mean", "0.5", "0.5", "0.5", "--std", "0.25", "0.25", "0.25"] if layout != "huggingface" else []
    back = convert(theirs, tmp_path / "back", "ours", *flags)
    assert_same(weights(back), model.state_dict())
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (ours, back))
    untold = {"class_names", "ignore_zero"} if layout != "huggingface" else set()  # these have no place there
    assert {key: value for key, value in after.items() if key not in untold} == {
        key: value for key, value in before.items() if key not in untold
    }


def rows_of_docs() -> list[tuple[str, str, str]]:
    """Give (kind, layout, cell) of the table of what goes where in docs/weights.md."""
    lines = (
        (ROOT / "docs" / "weights.md").read_text().split("| checkpoint | original |")[1].split("\n\n")[0].splitlines()
    )
    layouts = ["original", *(name.strip() for name in lines[0].split("|")[:-1])]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return [(row[0], layout, cell) for row in rows for layout, cell in zip(layouts, row[1:], strict=True)]


@pytest.mark.parametrize(("kind", "layout", "cell"), rows_of_docs())
def test_readme_says_what_goes_where(tmp_path, kind, layout, cell):
    source, target = write_ours(tmp_path / "ours", build(kind)), target_of(tmp_path, layout)
    if cell != "whole":
        with pytest.raises(ValueError, match="--drop" if cell == "`--drop`" else r"needs .* lacks|--drop"):
            convert(source, target, layout)
    if cell == "no":
        with pytest.raises(ValueError, match=r"needs .* which .* lacks"):
            convert(source, target, layout, "--drop")
    else:
        convert(source, target, layout, *["--drop"] * (cell != "whole"))
    assert target.exists() == (cell != "no")


def test_heads_come_back_from_the_width_of_tables_of_zeros(tmp_path):
    theirs = convert(write_ours(tmp_path / "ours", build("segmenter")), tmp_path / "theirs.pth", "mmseg")
    back = convert(theirs, tmp_path / "back", "ours")
    assert read_sizes(back)["config"]["encoder_num_heads"] == 4


def test_tables_of_zeros_stay_in_a_segmenter_of_ours(tmp_path):
    """Its config.json says that it has relative positions, which are zero before any training."""
    model = build("segmenter with relative positions")
    for block in model.backbone.blocks:
        nn.init.zeros_(block.attn.relative_position_bias_table)
    back = convert(write_ours(tmp_path / "ours", model), tmp_path / "back", "ours")
    assert_same(weights(back), model.state_dict())


def test_a_ratio_that_gives_no_whole_width_comes_back(tmp_path):
    model = build("masked autoencoder", dataclasses.replace(TINY, encoder_mlp_ratio=2.67, decoder_mlp_ratio=2.3))
    ours = write_ours(tmp_path / "ours", model)
    file = convert(ours, tmp_path / "theirs.pth", "original")
    assert_same(torch.load(file)["model"], model.state_dict())
    folder = convert(ours, tmp_path / "theirs", "huggingface")
    open_in_transformers("ViTMAEForPreTraining", folder)
    for source, flags in ((file, TOLD), (folder, [])):
        back = convert(source, tmp_path / f"{source.name}_back", "ours", *flags)
        assert_same(weights(back), model.state_dict())
        assert load_pretrained_mae(back).blocks[0].mlp.fc1.out_features == 85  # of 85.44


@pytest.mark.parametrize("layout", ["timm", "mmseg", "tutorial"])
def test_decoder_without_a_place_needs_drop_and_the_encoder_comes_back(tmp_path, layout):
    model = build("masked autoencoder")
    ours, target = write_ours(tmp_path / "ours", model), target_of(tmp_path, layout)
    with pytest.raises(ValueError, match=r"no place for .*decoder_embed.*mask_token \(32 tensors\).*--drop"):
        convert(ours, target, layout)
    assert not target.exists()
    back = convert(convert(ours, target, layout, "--drop"), tmp_path / "back", "ours", *TOLD[:2])
    encoder = {key: value for key, value in model.state_dict().items() if not key.startswith(("decoder", "mask"))}
    assert_same(weights(back), encoder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_stay_what_they_are_here_and_give_up_their_encoder(tmp_path, capsys, variant):
    model = build("masked autoencoder", dataclasses.replace(TINY, **VARIANTS[variant]))
    ours = write_ours(tmp_path / "ours", model)
    back = convert(ours, tmp_path / "back", "ours")
    assert_same(weights(back), model.state_dict())
    assert load_pretrained_mae(back).config == model.config
    tool.main(tool.parse_args(["--inspect", str(ours)]))
    shown = ("pca_target", "encode_mask_tokens")["mask" in variant]
    assert f"{shown} {VARIANTS[variant][shown]}" in capsys.readouterr().out

    encoder = {k: v for k, v in model.state_dict().items() if not k.startswith(("decoder", "mask", "pca"))}
    file = convert(ours, tmp_path / "theirs.pth", "original", "--drop")
    assert_same(torch.load(file)["model"], encoder)
    folder = convert(ours, tmp_path / "theirs", "huggingface", "--drop")
    theirs, images = open_in_transformers("ViTModel", folder, add_pooling_layer=False), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found, expected = theirs(images).last_hidden_state, model.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not any("decoder" in name for name in json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("whole_in", ["ours", "mmseg"])
def test_a_segmenter_gives_up_its_encoder(tmp_path, whole_in):
    model = build("segmenter with relative positions")
    source = write_ours(tmp_path / "ours", model)
    if whole_in == "mmseg":
        source = convert(source, tmp_path / "whole.pth", "mmseg")
    with pytest.raises(ValueError, match=r"(?=.*neck)(?=.*relative_position_bias_table).*--drop"):
        convert(source, tmp_path / "encoder.pth", "original")
    encoder = torch.load(convert(source, tmp_path / "encoder.pth", "original", "--drop"))["model"]
    assert_same(encoder, {key: value for key, value in model.backbone.state_dict().items() if "relative" not in key})
    with pytest.raises(
        ValueError, match=r"encoder needs vit\.layernorm\.weight and vit\.layernorm\.bias, which .* lacks"
    ):
        convert(source, tmp_path / "theirs", "huggingface", "--drop")


@pytest.mark.parametrize("name", ["base_patch16", "large_patch16", "huge_patch14"])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("masked autoencoder", "original"),
        ("masked autoencoder", "huggingface"),
        *(("encoder", layout) for layout in ("original", "timm", "huggingface", "mmseg", "tutorial")),
        ("segmenter with relative positions", "mmseg"),
    ],
)
def test_round_trip_of_published_sizes_changes_no_bit(tmp_path, name, kind, layout):
    """Depths, heads and patches are theirs, a head is four wide and an image two patches."""
    config = MODEL_CONFIGS[f"mae_vit_{name}"]
    widths = dict(encoder_embed_dim=4 * config.encoder_num_heads, decoder_embed_dim=64)
    small = dataclasses.replace(config, img_size=2 * config.patch_size, **widths)
    torch.manual_seed(0)
    model = ViTMAEForSegmentation(small, 5, channels=32, rel_pos_bias=True) if "seg" in kind else BUILD[kind](small)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = write_ours(tmp_path / "ours", model)
    change_json(ours / "config.json", taps=default_taps(config.encoder_depth) if "seg" in kind else None)
    theirs = convert(ours, target_of(tmp_path, layout), layout)
    heads = ["--encoder_num_heads", str(config.encoder_num_heads)]
    if kind == "masked autoencoder":
        heads += ["--decoder_num_heads", "16", "--norm_pix_loss"]
    flags = [] if layout == "huggingface" or "seg" in kind else heads
    back = convert(theirs, tmp_path / "back", "ours", *flags)
    assert_same(weights(back), model.state_dict())
    assert read_sizes(back)["config"] == read_sizes(ours)["config"]


LAYOUTS_OF_SIZES = [
    ("masked autoencoder", "original", 0),
    ("masked autoencoder", "huggingface", 4),  # q, k and v of weights and biases, 6 for 2
    ("encoder", "timm", 0),
    ("encoder", "huggingface", 4),
    ("encoder", "mmseg", 0),
    ("encoder", "tutorial", 0),
    ("classifier of the mean", "beit", 3),  # BEiT's keys have no bias
]


@pytest.mark.parametrize(
    ("name", "encoder", "full"), [("base_patch16", 150, 254), ("large_patch16", 294, 398), ("huge_patch14", 390, 494)]
)
@pytest.mark.parametrize(("kind", "layout", "more"), LAYOUTS_OF_SIZES)
def test_names_and_shapes_of_published_sizes_are_a_bijection(name, encoder, full, kind, layout, more):
    config, device = MODEL_CONFIGS[f"mae_vit_{name}"], "meta"
    if layout == "beit":  # where values decide, of the same depth and narrow
        config, device = dataclasses.replace(TINY, encoder_depth=config.encoder_depth), "cpu"
    with torch.device(device):
        expected = BUILD[kind](config).state_dict()
    converted = tool.convert(tool.Source(Path("there"), "ours", expected), layout).tensors
    num_blocks = config.encoder_depth + (config.decoder_depth if kind == "masked autoencoder" else 0)
    tensors = {"masked autoencoder": full, "encoder": encoder, "classifier of the mean": encoder + 2}[kind]
    assert len(converted) == tensors + more * num_blocks
    assert detect_layout(converted, Path("there")) == {"original": "ours", "timm": "ours"}.get(layout, layout)
    back = tool.Source(Path("there"), detect_layout(converted, Path("there")), {})
    tool.rename(back, converted)
    assert {key: value.shape for key, value in back.tensors.items()} == {
        k: value.shape for k, value in expected.items()
    }


# -------------------------------------------------------------------------------- against timm


@pytest.mark.parametrize("kind", ["encoder", "classifier of the mean", "classifier of the cls token"])
def test_timm_opens_what_is_written_with_the_printed_line(tmp_path, capsys, kind):
    model = build(kind, dataclasses.replace(TINY, img_size=(8, 20), input_channels=1))
    convert(write_ours(tmp_path / "ours", model), tmp_path / "out.safetensors", "timm")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("opens with"))
    theirs = eval(line.removeprefix("opens with"), {"timm": timm}).eval()  # the line that users copy
    images = torch.randn(3, 1, 8, 20)
    with torch.no_grad():
        found = theirs.forward_features(images) if kind == "encoder" else theirs(images)
        torch.testing.assert_close(found, model(images), rtol=0, atol=1e-5)


def their_vit(folder: Path, model_config: dict | None = None, **arguments) -> nn.Module:
    """Save a ViT as timm does for a hub, with its config.json, and give it."""
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4)
    model = timm.create_model("vit_tiny_patch16_224", **sizes, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    timm.models.save_for_hf(model, folder, model_config, arguments | sizes, safe_serialization=True)
    return model


@pytest.mark.parametrize(("pool", "kind"), [("avg", "mean"), ("token", "cls token")])
def test_a_classifier_of_timms_hub_gives_the_same_logits_and_names(tmp_path, capsys, pool, kind):
    names = [f"class {index}" for index in (3, 1, 4, 15, 9, 2, 6, 5, 35, 8, 97, 93)]
    theirs = their_vit(tmp_path / "hub", {"label_names": names}, num_classes=12, global_pool=pool)
    loaded, record = load_classifier(convert(tmp_path / "hub", tmp_path / "ours", "ours"))
    assert f"timm's classifier of the {kind}" in capsys.readouterr().out
    assert record["class_names"] == names and record["image_mean"] == [0.5] * 3 and record["num_classes"] == 12
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"global_pool": "avg", "fc_norm": False}, r"timm's 'avg' pooling behind the norm is of no classifier here"),
        ({"global_pool": "max"}, r"timm's 'max' pooling before the norm is of no classifier here"),
        ({"global_pool": "token", "fc_norm": True}, r"timm's 'token' pooling before the norm"),
    ],
)
@pytest.mark.parametrize("told_in", ["global_pool", "model_args"])
def test_pooling_of_timm_that_ours_lack_is_not_taken_for_another(tmp_path, capsys, arguments, reason, told_in):
    their_vit(tmp_path / "hub", {"label_names": list("abcdefg")}, num_classes=7, **arguments)
    places = {"global_pool": None, "model_args": {"num_heads": 4}}
    change_json(tmp_path / "hub" / "config.json", **{name: places[name] for name in places if name != told_in})
    with pytest.raises(ValueError, match=rf"no place for (fc_norm, )?head \(\d tensors\) .*{reason}.*--drop"):
        convert(tmp_path / "hub", tmp_path / "ours", "ours")
    tool.main(tool.parse_args(["--inspect", str(tmp_path / "hub")]))
    output = capsys.readouterr().out
    assert "timm's encoder" in output and re.search(rf"^no counterpart .*{reason}", output, re.MULTILINE)
    back = convert(tmp_path / "hub", tmp_path / "ours", "ours", "--drop")
    assert "class_names" not in read_sizes(back)
    expected = load_file(tmp_path / "hub" / "model.safetensors")
    assert_same(weights(back), {key: value for key, value in expected.items() if not key.startswith(("head", "fc_"))})


def test_config_of_timms_older_hub_has_no_part_for_the_pretraining(tmp_path):
    their_vit(tmp_path / "hub", num_classes=7)
    told = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "mean": [0.1] * 3, "std": [0.2] * 3}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(told | {"global_pool": "token"}))
    record = read_sizes(convert(tmp_path / "hub", tmp_path / "ours", "ours", *TOLD[:2]))
    assert record["image_mean"] == [0.1] * 3 and record["image_std"] == [0.2] * 3


def test_layer_scales_of_timm_act_through_the_layers_before_them(tmp_path):
    theirs = their_vit(tmp_path / "hub", num_classes=7, init_values=0.1)
    assert "blocks.0.ls1.gamma" in theirs.state_dict()
    loaded, _ = load_classifier(convert(tmp_path / "hub", tmp_path / "ours", "ours"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), theirs(images), rtol=0, atol=1e-5)


def test_relative_positions_and_layer_scales_equal_timms_beit(tmp_path):
    torch.manual_seed(0)
    theirs = timm.models.Beit(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool="token",
        init_values=0.1,
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.save({"module": theirs.state_dict()}, tmp_path / "beit.pth")
    back = convert(tmp_path / "beit.pth", tmp_path / "ours", "ours")
    ours = VisionTransformer(MAEConfig(**read_sizes(back)["config"]))
    ours.add_relative_positions()
    assert load_pretrained_encoder(ours, back).missing == []
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        torch.testing.assert_close(ours.eval()(images), expected, rtol=0, atol=1e-5)
        for block in ours.blocks:
            nn.init.zeros_(block.attn.relative_position_bias_table)
        assert not torch.allclose(ours(images), expected, atol=1e-3)  # they do act


# -------------------------------------------------------------------------------- against transformers


def open_in_transformers(name: str, folder: Path, **options) -> transformers.PreTrainedModel:
    """Open a folder as its users do, and make sure that nothing in it was missing, left over or of another shape."""
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_masked_autoencoder_equals_transformers(tmp_path, norm_pix_loss):
    ours = build("masked autoencoder", dataclasses.replace(TINY, img_size=32, norm_pix_loss=norm_pix_loss))
    folder = convert(write_ours(tmp_path / "ours", ours), tmp_path / "theirs", "huggingface")
    theirs = open_in_transformers("ViTMAEForPreTraining", folder)
    assert theirs.config.layer_norm_eps == 1e-6 and theirs.config.norm_pix_loss == norm_pix_loss
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 64)
    with torch.no_grad():
        loss, pred, mask = ours(images, 0.75, noise)
        expected = theirs(images, noise=noise)
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(pred, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.5] * 3 and list(processor.image_std) == [0.25] * 3
    assert (processor.size["height"], processor.size["width"]) == (32, 32)
    assert processor.resample == PIL.Image.Resampling.BICUBIC


def test_encoder_alone_equals_transformers_vit(tmp_path):
    ours = build("encoder", dataclasses.replace(TINY, img_size=(8, 20)))
    folder = convert(write_ours(tmp_path / "ours", ours), tmp_path / "theirs", "huggingface")
    theirs = open_in_transformers("ViTModel", folder, add_pooling_layer=False)
    images = torch.randn(2, 3, 8, 20)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).last_hidden_state, ours(images), rtol=0, atol=1e-5)


def test_classifier_of_the_cls_token_equals_transformers_vit(tmp_path):
    ours = build("classifier of the cls token")
    folder = convert(write_ours(tmp_path / "ours", ours), tmp_path / "theirs", "huggingface")
    theirs = open_in_transformers("AutoModelForImageClassification", folder)  # by model_type
    assert type(theirs) is transformers.ViTForImageClassification and theirs.config.id2label[3] == "n00000003"
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, ours(images), rtol=0, atol=1e-5)


def test_classifier_of_the_mean_equals_transformers_beit_but_for_a_bias_without_effect(tmp_path):
    ours = build("classifier of the mean")
    source = write_ours(tmp_path / "ours", ours)
    with pytest.raises(ValueError, match=r"the keys' third of blocks\.N\.attn\.qkv\.bias.*--drop"):
        convert(source, tmp_path / "theirs", "huggingface")
    folder = convert(source, tmp_path / "theirs", "huggingface", "--drop")
    theirs = open_in_transformers("AutoModelForImageClassification", folder)
    assert type(theirs) is transformers.BeitForImageClassification and theirs.config.drop_path_rate == 0
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).logits, ours(images), rtol=0, atol=1e-5)
    back, expected = weights(convert(folder, tmp_path / "back", "ours")), ours.state_dict()
    for key in expected:
        if key.endswith("qkv.bias"):
            expected[key][32:64] = 0
    assert_same(back, expected)
    convert(tmp_path / "back", tmp_path / "again", "huggingface")  # with no such bias there is nothing to drop


@pytest.mark.parametrize("names", [[f"n{index}" for index in range(12)], ["crane", *"abcdefghij", "crane"], None])
def test_class_names_go_through_transformers_in_order(tmp_path, names):
    source = write_ours(tmp_path / "ours", ViTMAEForImageClassification(TINY, 12, "cls"))
    change_json(source / "config.json", num_classes=12, class_names=names)
    theirs = open_in_transformers(
        "ViTForImageClassification", convert(source, tmp_path / "theirs", "huggingface")
    ).config
    expected = names or [f"LABEL_{index}" for index in range(12)]
    assert theirs.id2label == dict(enumerate(expected))
    assert sorted(theirs.label2id.values()) == list(range(12)) and theirs.label2id[expected[3]] == 3
    open_in_transformers("ViTForImageClassification", tmp_path / "theirs").save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "theirs", tmp_path / "saved"):  # transformers writes the numbers in order of the text
        assert read_sizes(convert(folder, tmp_path / f"{folder.name}_ours", "ours")).get("class_names") == names


def their_mae(**changes) -> transformers.ViTMAEForPreTraining:
    torch.manual_seed(0)
    sizes = dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    sizes |= dict(intermediate_size=128, decoder_hidden_size=16, decoder_num_hidden_layers=2)
    sizes |= dict(decoder_num_attention_heads=2, decoder_intermediate_size=64, layer_norm_eps=1e-6)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("spelling", ["saved", ".bin", "in memory"])
def test_what_transformers_writes_gives_the_same_loss_here(tmp_path, spelling):
    theirs, folder = their_mae(), tmp_path / "theirs"
    theirs.save_pretrained(folder)
    if spelling == ".bin":  # as older versions of transformers did
        torch.save(weights(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif spelling == "in memory":
        assert any("q_proj" in key for key in theirs.state_dict())
        save_file(theirs.state_dict(), folder / "model.safetensors")
    ours = load_pretrained_mae(convert(folder, tmp_path / "ours", "ours"))
    assert ours.config == dataclasses.replace(TINY, norm_pix_loss=False)
    images, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    with torch.no_grad():
        expected, (loss, pred, _) = theirs(images, noise=noise), ours.eval()(images, 0.75, noise)
    torch.testing.assert_close(pred, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)


def test_another_activation_is_refused(tmp_path):
    their_mae(hidden_act="relu").save_pretrained(tmp_path / "mae")
    message = r"hidden_act in .*config\.json has to be gelu, as in all models here, not 'relu'"
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "mae", tmp_path / "ours", "ours")


def test_other_epsilon_of_transformers_is_said_and_its_pooler_needs_drop(tmp_path, capsys):
    their_mae(layer_norm_eps=1e-12).save_pretrained(tmp_path / "mae")
    convert(tmp_path / "mae", tmp_path / "ours", "ours")
    assert "epsilon 1e-12 there, 1e-06 here" in capsys.readouterr().out
    config = their_mae().config
    vit = transformers.ViTConfig(**{key: getattr(config, key) for key in ("image_size", "patch_size", "hidden_size")})
    vit.num_hidden_layers, vit.num_attention_heads, vit.intermediate_size = 3, 4, 128
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"no place for pooler \(2 tensors\)"):
        convert(tmp_path / "vit", tmp_path / "encoder", "ours")
    assert (
        load_pretrained_encoder(
            VisionTransformer(TINY), convert(tmp_path / "vit", tmp_path / "encoder", "ours", "--drop")
        ).missing
        == []
    )


# -------------------------------------------------------------------------------- against MMSegmentation's names


def as_beit2mmseg(encoder: dict) -> dict:
    """Rename an encoder by the rules of MMSegmentation's tools/model_converters/beit2mmseg.py."""
    renamed = {}
    for key, value in encoder.items():
        if key.startswith("blocks"):
            key = key.replace("blocks", "layers").replace("norm", "ln")
            key = key.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        elif key.startswith("patch_embed"):
            key = key.replace("patch_embed.proj", "patch_embed.projection")
        renamed[key] = value
    return renamed


def as_mmseg(model: ViTMAEForSegmentation) -> dict:
    """Rename a segmenter to MMSegmentation's MAE under UperNet, with the parts that only theirs has."""
    backbone = as_beit2mmseg(model.backbone.state_dict())
    index = gen_relative_position_index(model.backbone.config.grid_size, class_token=True)
    index = index.view(17, 17)
    for layer in range(4):
        backbone[f"layers.{layer}.gamma_1"] = torch.ones(64)
        backbone[f"layers.{layer}.gamma_2"] = torch.ones(64)
        backbone[f"layers.{layer}.attn.relative_position_index"] = index
    heads = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    return {f"backbone.{key}": value for key, value in backbone.items()} | heads


MMSEG_LAYER = """
    ln1.weight ln1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias ln2.weight ln2.bias
    ffn.layers.0.0.weight ffn.layers.0.0.bias ffn.layers.1.weight ffn.layers.1.bias
"""
MMSEG_MAE_LAYER = "gamma_1 gamma_2 attn.relative_position_bias_table attn.relative_position_index"
MMSEG_OTHERS = """
    cls_token pos_embed patch_embed.projection.weight patch_embed.projection.bias norm.weight norm.bias
"""
MMSEG_CONVS = """
    decode_head.psp_modules.0.1 decode_head.psp_modules.1.1 decode_head.psp_modules.2.1 decode_head.psp_modules.3.1
    decode_head.bottleneck decode_head.lateral_convs.0 decode_head.lateral_convs.1 decode_head.lateral_convs.2
    decode_head.fpn_convs.0 decode_head.fpn_convs.1 decode_head.fpn_convs.2 decode_head.fpn_bottleneck
    auxiliary_head.convs.0
"""


def test_encoder_for_mmsegmentation_is_what_its_own_converter_gives(tmp_path):
    model = build("encoder")
    written = torch.load(convert(write_ours(tmp_path / "ours", model), tmp_path / "out.pth", "mmseg"))
    assert_same(written, as_beit2mmseg(model.state_dict()))
    layers = {f"layers.{layer}.{key}" for layer in range(3) for key in MMSEG_LAYER.split()}
    assert written.keys() == layers | set(MMSEG_OTHERS.split())


def test_segmenter_for_mmsegmentation_has_its_names(tmp_path):
    model = build("segmenter with relative positions")
    content = torch.load(convert(write_ours(tmp_path / "ours", model), tmp_path / "out.pth", "mmseg"))
    written = content["state_dict"]
    assert_same(written, as_mmseg(model))
    keys = {f"backbone.{key}" for key in MMSEG_OTHERS.split() if not key.startswith("norm")}
    for layer in range(4):
        keys |= {f"backbone.layers.{layer}.{key}" for key in (MMSEG_LAYER + MMSEG_MAE_LAYER).split()}
    for name in MMSEG_CONVS.split():
        stats = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        keys |= {f"{name}.conv.weight", *(f"{name}.bn.{stat}" for stat in stats)}
    keys |= {f"neck.upsample_4x.1.{stat}" for stat in stats}
    for name in ("neck.upsample_4x.0", "neck.upsample_4x.3", "neck.upsample_2x.0"):
        keys |= {f"{name}.weight", f"{name}.bias"}
    for name in ("decode_head.conv_seg", "auxiliary_head.conv_seg"):
        keys |= {f"{name}.weight", f"{name}.bias"}
    assert written.keys() == keys
    assert content["meta"]["dataset_meta"]["classes"] == list("abcde")
    assert content["meta"]["dataset_meta"]["palette"][0] == [120, 120, 120]  # ADE20K's wall


def as_beit(model: ViTMAEForSegmentation) -> dict:
    """Rename a segmenter to BEiT's own, whose keys have no bias and whose pyramid is a part of the backbone."""
    names = {"neck.upsample_4x.": "backbone.fpn1.", "neck.upsample_2x.": "backbone.fpn2."}
    renamed = {}
    for key, value in model.state_dict().items():
        if key.endswith("qkv.bias"):
            renamed[key.replace("qkv.bias", "q_bias")], _, renamed[key.replace("qkv.bias", "v_bias")] = value.chunk(3)
        else:
            renamed[re.sub("|".join(names), lambda found: names[found[0]], key)] = value
    return renamed


def test_segmenter_of_beit_gives_the_same_logits(tmp_path, capsys):
    expected = build("segmenter with relative positions")
    for block in expected.backbone.blocks:
        block.attn.qkv.bias.data[64:128] = 0
    tensors = as_beit(expected)
    assert {key.split(".")[1] for key in tensors if key.startswith("backbone.fpn")} == {"fpn1", "fpn2"}
    torch.save({"model": tensors}, tmp_path / "beit.pth")
    tool.main(tool.parse_args(["--inspect", str(tmp_path / "beit.pth")]))
    assert "BEiT's segmenter" in capsys.readouterr().out
    loaded, _ = load_segmenter(convert(tmp_path / "beit.pth", tmp_path / "ours", "ours"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images).logits, expected(images).logits)


def test_statistics_of_old_torch_have_no_count_of_batches(tmp_path):
    expected = build("segmenter with relative positions")
    tensors = {key: value for key, value in as_mmseg(expected).items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
    loaded, _ = load_segmenter(convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours"))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images).logits, expected(images).logits)


def test_mmsegmentation_takes_batch_norm_only(tmp_path):
    torch.manual_seed(0)
    model = ViTMAEForSegmentation(FOUR_BLOCKS, 5, channels=64, norm="group")
    source = write_ours(tmp_path / "ours", model)
    change_json(source / "config.json", norm="group", channels=64)
    with pytest.raises(ValueError, match="MMSegmentation's heads have batch norm, not group norm"):
        convert(source, tmp_path / "out.pth", "mmseg")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    "meta",
    [{"CLASSES": tuple("vwxyz"), "epoch": 3}, {"dataset_meta": {"classes": list("vwxyz"), "palette": [[0, 0, 0]]}}],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_segmenter_of_mmsegmentation_gives_the_same_logits(tmp_path, prefix, meta):
    expected = build("segmenter with relative positions")
    tensors = {f"{prefix}{key}": value for key, value in as_mmseg(expected).items()}
    torch.save({"meta": meta, "state_dict": tensors, "optimizer": {"state": {}}}, tmp_path / "theirs.pth")
    loaded, record = load_segmenter(convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours"))
    assert record["class_names"] == list("vwxyz") and record["taps"] == [0, 1, 2, 3]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found, logits = loaded.eval()(images), expected(images)
    assert torch.equal(found.logits, logits.logits) and torch.equal(found.auxiliary, logits.auxiliary)


def test_layer_scales_of_mmsegmentation_act_through_the_layers_before_them(tmp_path):
    expected = build("segmenter with relative positions")
    tensors = as_mmseg(expected)
    for layer, block in enumerate(expected.backbone.blocks):
        for gamma, branch in (("gamma_1", block.attn), ("gamma_2", block.mlp)):
            scale = 1 + 0.5 * torch.randn(64)
            tensors[f"backbone.layers.{layer}.{gamma}"] = scale
            branch.register_forward_hook(lambda _module, _inputs, output, scale=scale: output * scale)
    torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
    loaded, _ = load_segmenter(convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours"))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)  # so that only the rounding of the scaled weights differs
    with torch.no_grad():
        logits, theirs = loaded.double().eval()(images).logits, expected.double()(images).logits
        torch.testing.assert_close(logits, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["ours", "mmseg"])
def test_layer_scales_of_our_segmenter_are_multiplied_into_its_weights(layout, tmp_path):
    model = build("segmenter with relative positions")
    model.backbone.add_layer_scale()
    for block in model.backbone.blocks:
        torch.nn.init.normal_(block.ls1.gamma), torch.nn.init.normal_(block.ls2.gamma)
    folder = write_ours(tmp_path / "scaled", model)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**record, "layer_scale": True}))
    images = torch.randn(2, 3, 16, 16)
    expected = model.eval()(images).logits
    assert torch.equal(load_segmenter(folder)[0].eval()(images).logits, expected)
    there = convert(folder, tmp_path / f"there{tool.LAYOUTS[layout].suffix if layout != 'ours' else ''}", layout)
    back = there if layout == "ours" else convert(there, tmp_path / "back", "ours")
    plain, record = load_segmenter(back)
    assert not record.get("layer_scale") and not any("gamma" in name for name in plain.state_dict())
    torch.testing.assert_close(plain.eval()(images).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", ["gamma_1", "gamma_2"])
def test_a_layer_without_its_scale_is_refused(tmp_path, gamma):
    tensors = as_mmseg(build("segmenter with relative positions"))
    del tensors[f"backbone.layers.2.{gamma}"]
    torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=rf"missing backbone\.layers\.2\.{gamma}$"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours")


def test_backbone_of_mmsegmentation_becomes_an_encoder(tmp_path):
    expected = build("segmenter with relative positions").backbone
    tensors = {
        key: value for key, value in as_mmseg(build("segmenter with relative positions")).items() if "backbone." in key
    }
    torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
    back = convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours")
    assert_same(weights(back), expected.state_dict())
    model = ViTMAEForSegmentation(MAEConfig(**read_sizes(back)["config"]), 5, channels=32, rel_pos_bias=True)
    assert load_pretrained_encoder(model.backbone, back).missing == []


def test_a_tensor_under_two_names_is_refused(tmp_path):
    tensors = as_mmseg(build("segmenter with relative positions"))
    torch.save({"state_dict": tensors | {"cls_token": torch.zeros(1, 1, 64)}}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"backbone\.cls_token and cls_token are the same tensor"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours")


def test_positions_of_another_grid_are_refused_without_computing_ours(tmp_path, monkeypatch):
    """Which has as many entries as tokens squared, while the file may say any number of tokens in few bytes."""
    tensors = as_mmseg(build("segmenter with relative positions"))
    tensors["backbone.layers.2.attn.relative_position_index"] = torch.zeros(3, 3, dtype=torch.int64)
    for layer in (0, 1, 3):
        del tensors[f"backbone.layers.{layer}.attn.relative_position_index"]
    torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
    monkeypatch.setattr(tool, "gen_relative_position_index", None)
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.relative_position_index numbers positions otherwise"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours")


def test_positions_numbered_otherwise_are_refused(tmp_path):
    tensors = as_mmseg(build("segmenter with relative positions"))
    key = "backbone.layers.2.attn.relative_position_index"
    tensors[key] = tensors[key].T.contiguous()
    torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.relative_position_index numbers positions otherwise"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours")


def test_ade20k_names_come_with_150_classes(tmp_path):
    torch.manual_seed(0)
    model = ViTMAEForSegmentation(FOUR_BLOCKS, 150, channels=32)
    torch.save({"state_dict": as_mmseg(model)}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"tells encoder_num_heads; add --encoder_num_heads N"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours")
    _, record = load_segmenter(convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours", *TOLD[:2]))
    assert record["class_names"] == list(ADE20K_CLASS_NAMES) and record["ignore_zero"] is True
    assert record["resize_to"] == [64, 16]


# -------------------------------------------------------------------------------- against the tutorial's names


def as_tutorial(model: ViTMAEForPreTraining) -> dict:
    """Rename a masked autoencoder to PyTorch-Adventures' names; its decoder has no row for the cls token."""
    renamed = {}
    for key, value in model.state_dict().items():
        if key == "decoder_pos_embed":
            renamed["decoder.dec_pos_embed"] = value[:, 1:].clone()
        elif key.startswith(("decoder_", "mask_token")):
            key = key.replace("decoder_embed", "encoder2decoder_embbedding_proj").replace(
                "decoder_norm", "decoder_layer_norm"
            )
            renamed["embed2image" + key.removeprefix("decoder_pred") if "pred" in key else f"decoder.{key}"] = value
        else:
            names = {"cls_token": "enc_cls_token", "pos_embed": "enc_pos_embed"}
            key = names.get(key, key.replace("blocks.", "encoder_blocks."))
            renamed["encoder." + (key.replace("norm", "encoder_layer_norm") if key.startswith("norm") else key)] = value
    return renamed


def test_tutorial_gives_its_encoder_and_not_its_decoder(tmp_path):
    model = build("masked autoencoder")
    save_file(as_tutorial(model), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no place for .*decoder.*embed2image.*never sees the cls token.*--drop"):
        convert(tmp_path / "model.safetensors", tmp_path / "ours", "ours", *TOLD[:2])
    back = convert(tmp_path / "model.safetensors", tmp_path / "ours", "ours", *TOLD[:2], "--drop")
    encoder = {key: value for key, value in model.state_dict().items() if not key.startswith(("decoder", "mask"))}
    assert_same(weights(back), encoder)
    theirs = load_file(convert(back, tmp_path / "out.safetensors", "tutorial"))
    assert_same(theirs, {key: value for key, value in as_tutorial(model).items() if key.startswith("encoder.")})
    save_file({key.removeprefix("encoder."): value for key, value in theirs.items()}, tmp_path / "inner.safetensors")
    assert_same(weights(convert(tmp_path / "inner.safetensors", tmp_path / "again", "ours", *TOLD[:2])), encoder)


def test_tutorials_classifier_opens_with_the_printed_line(tmp_path, capsys):
    model, taken = build("classifier of the cls token"), {}
    convert(write_ours(tmp_path / "ours", model), tmp_path / "it's.safetensors", "tutorial")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("opens with"))
    there = types.SimpleNamespace(load_state_dict=taken.update)  # for the tutorial's class, which is not installed
    names = {"ViTMAEForImageClassification": lambda config: there, "config": None, "safetensors": safetensors}
    eval(line.removeprefix("opens with"), names)  # the line that users copy
    ours = {key.removeprefix("encoder."): value for key, value in taken.items()}
    assert ours.keys() >= {"enc_cls_token", "head.weight"} and len(ours) == len(model.state_dict())


def test_tutorial_takes_no_classifier_of_the_mean(tmp_path):
    source = write_ours(tmp_path / "ours", build("classifier of the mean"))
    with pytest.raises(ValueError, match=r"needs encoder\.encoder_layer_norm\.weight .* lacks"):
        convert(source, tmp_path / "out.safetensors", "tutorial", "--drop")


# -------------------------------------------------------------------------------- what shapes do not tell


def test_training_file_of_the_original_tells_its_sizes(tmp_path):
    sizes = dict(img_size=32, encoder_depth=2, decoder_depth=1)
    model = ViTMAEForPreTraining(dataclasses.replace(MODEL_CONFIGS["mae_vit_base_patch16"], **sizes))
    arguments = argparse.Namespace(model="mae_vit_base_patch16", norm_pix_loss=True, lr=1.0)
    content = {"model": model.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": 3, "scaler": {}}
    torch.save({**content, "args": arguments}, tmp_path / "checkpoint-3.pth")
    loaded = load_pretrained_mae(convert(tmp_path / "checkpoint-3.pth", tmp_path / "ours", "ours"))
    assert loaded.config == model.config and torch.equal(loaded.mask_token, model.mask_token)


def test_numbers_of_heads_that_are_guessed_are_said_to_be(tmp_path, capsys):
    sizes = dict(encoder_embed_dim=192, encoder_depth=1, encoder_num_heads=3)
    sizes |= dict(decoder_embed_dim=128, decoder_depth=1, decoder_num_heads=4)
    torch.save(ViTMAEForPreTraining(dataclasses.replace(TINY, **sizes)).state_dict(), tmp_path / "a.pth")
    guesses = ["encoder_num_heads 3 is a guess from the width; --encoder_num_heads says otherwise"]
    guesses += ["decoder_num_heads 4 is a guess from the width; --decoder_num_heads says otherwise"]
    source = str(tmp_path / "a.pth")
    for arguments in (["--inspect", source], [source, str(tmp_path / "out"), "--to", "ours", "--norm_pix_loss"]):
        tool.main(tool.parse_args(arguments))
        output = capsys.readouterr().out
        assert all(re.search(rf"^note +{guess}$", output, re.MULTILINE) for guess in guesses)
    convert(tmp_path / "a.pth", tmp_path / "told", "ours", "--encoder_num_heads", "6", *TOLD[2:3], "8", TOLD[4])
    convert(tmp_path / "told", tmp_path / "theirs", "huggingface")
    assert "guess" not in capsys.readouterr().out
    assert read_sizes(tmp_path / "told")["config"]["encoder_num_heads"] == 6


def test_what_nobody_tells_is_asked_for(tmp_path):
    file = convert(write_ours(tmp_path / "ours", build("masked autoencoder")), tmp_path / "out.pth", "original")
    asked = (
        r"tells encoder_num_heads, decoder_num_heads, norm_pix_loss; add --encoder_num_heads N .*\[no-\]norm_pix_loss"
    )
    with pytest.raises(ValueError, match=asked):
        convert(file, tmp_path / "back", "ours")
    convert(file, tmp_path / "back", "ours", *TOLD)
    with pytest.raises(ValueError, match=r"--encoder_num_heads 8, but .*ours has 4; leave the flag out"):
        convert(tmp_path / "ours", tmp_path / "other", "huggingface", "--encoder_num_heads", "8")


def test_norm_behind_timms_mean_needs_drop_without_a_head(tmp_path):
    theirs = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=0, global_pool="avg"
    )
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    told = {"architecture": "vit", "pretrained_cfg": {"mean": [0.1] * 3}, "model_args": {"img_size": [16, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"no place for fc_norm \(2 tensors\)"):
        convert(tmp_path, tmp_path / "ours", "ours", *TOLD[:2])
    back = convert(tmp_path, tmp_path / "ours", "ours", *TOLD[:2], "--drop")
    assert read_sizes(back)["image_mean"] == [0.1] * 3
    assert_same(weights(back), {key: value for key, value in theirs.state_dict().items() if "fc_norm" not in key})


def test_mean_and_deviation_have_a_number_for_each_channel(tmp_path):
    weights_of_grey = build("encoder", dataclasses.replace(TINY, input_channels=1)).state_dict()
    torch.save({"model": weights_of_grey}, tmp_path / "grey.pth")
    with pytest.raises(
        ValueError, match=r"--std takes 1 numbers above 0, one for each channel, not \[0\.2, 0\.2, 0\.2\]"
    ):
        convert(tmp_path / "grey.pth", tmp_path / "ours", "ours", *TOLD[:2], "--std", "0.2", "0.2", "0.2")
    for flags in (["--std", "0"], ["--std", "nan"], ["--mean", "nan"], ["--mean", "inf"]):
        with pytest.raises(ValueError, match=rf"{flags[0]} takes 1 numbers.*, not \[{float(flags[1])}\]"):
            convert(tmp_path / "grey.pth", tmp_path / "ours", "ours", *TOLD[:2], *flags)
    record = read_sizes(convert(tmp_path / "grey.pth", tmp_path / "ours", "ours", *TOLD[:2], "--std", "0.25"))
    assert record["image_mean"] == [0.5] and record["image_std"] == [0.25]


def test_rectangles_are_told_by_a_flag_or_refused(tmp_path):
    config = dataclasses.replace(TINY, img_size=(8, 20))
    source = write_ours(tmp_path / "ours", build("masked autoencoder", config))
    file = convert(source, tmp_path / "out.pth", "original")
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 11, 32\) instead of \(1, 10, 32\)"):
        convert(file, tmp_path / "back", "ours", *TOLD)
    assert (
        load_pretrained_mae(convert(file, tmp_path / "back", "ours", *TOLD, "--img_size", "8", "20")).config == config
    )
    with pytest.raises(ValueError, match=r"img_size takes one number or \(height, width\), not \(16, 16, 16\)"):
        convert(file, tmp_path / "other", "ours", *TOLD, "--img_size", "16", "16", "16")
    with pytest.raises(ValueError, match=r"ViTMAE takes square images only, not 8 x 20"):
        convert(source, tmp_path / "theirs", "huggingface")


def test_config_of_another_layout_in_the_same_folder_says_nothing(tmp_path):
    folder = convert(write_ours(tmp_path / "ours", build("masked autoencoder")), tmp_path / "theirs", "huggingface")
    file = convert(tmp_path / "ours", folder / "original.pth", "original")
    with pytest.raises(ValueError, match="tells encoder_num_heads, decoder_num_heads, norm_pix_loss"):
        convert(file, tmp_path / "back", "ours")


def test_a_ratio_that_no_layer_has_is_refused(tmp_path):
    source = write_ours(tmp_path / "ours", build("encoder"))
    change_json(source / "config.json", config=dataclasses.asdict(TINY) | {"encoder_mlp_ratio": 1e308})
    with pytest.raises(ValueError, match=r"encoder_mlp_ratio is 1e\+308 in config\.json, 4\.0 in the weights"):
        convert(source, tmp_path / "out.pth", "original")


def test_config_that_contradicts_the_weights_is_refused(tmp_path):
    folder = convert(write_ours(tmp_path / "ours", build("masked autoencoder")), tmp_path / "theirs", "huggingface")
    tensors = {key: value for key, value in weights(folder).items() if "encoder.layer.2." not in key}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder_depth is 3 in config\.json, 2 in the weights"):
        convert(folder, tmp_path / "back", "ours")


# -------------------------------------------------------------------------------- what is refused


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


SMALL_VIT = dict(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
SMALL_VIT |= dict(intermediate_size=128)


def foreign_files(folder: Path) -> dict[str, Path]:
    """Write one source of each layout."""
    folder.mkdir(exist_ok=True)
    mae, segmenter = build("masked autoencoder"), build("segmenter with relative positions")
    ours = write_ours(folder / "mae", mae)
    torch.save({"state_dict": as_mmseg(segmenter)}, folder / "mmseg.pth")
    save_file(as_tutorial(mae), folder / "tutorial.safetensors")
    return {
        "original": convert(ours, folder / "original.pth", "original"),
        "huggingface": convert(ours, folder / "huggingface", "huggingface"),
        "mmseg": folder / "mmseg.pth",
        "tutorial": folder / "tutorial.safetensors",
    }


def change(path: Path, how) -> None:
    """Change the tensors of a source in place."""
    file = path / "model.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        how(tensors)
        return save_file(tensors, file)
    content = torch.load(file)
    how(content.get("model", content.get("state_dict")))
    return torch.save(content, file)


A_KEY = {
    "original": "blocks.1.mlp.fc1.weight",
    "huggingface": "vit.encoder.layer.1.attention.attention.key.weight",
    "mmseg": "backbone.layers.1.ffn.layers.0.0.weight",
    "tutorial": "encoder.encoder_blocks.1.mlp.fc1.weight",
}


@pytest.mark.parametrize("layout", A_KEY)
def test_renamed_missing_and_misshapen_keys_are_named_and_nothing_is_written(tmp_path, layout):
    source, key = foreign_files(tmp_path)[layout], A_KEY[layout]
    arguments = [source, tmp_path / "out", "ours", *TOLD, "--drop"]
    if layout in ("huggingface", "mmseg"):
        arguments = [source, tmp_path / "out", "ours", "--drop"]
    renamed = key.replace(".1.", ".1.new_", 1)
    change(source, lambda tensors: tensors.update({renamed: tensors.pop(key)}))
    with pytest.raises(ValueError, match=f"unknown key {renamed}".replace(".", r"\.")):
        convert(*arguments)
    change(source, lambda tensors: tensors.pop(renamed))
    with pytest.raises(ValueError, match=f"missing {key}".replace(".", r"\.")):
        convert(*arguments)
    change(source, lambda tensors: tensors.update({key: torch.zeros(7, 32)}))
    with pytest.raises(ValueError, match=rf"{key}.* \(7, 32\)".replace(".", r"\.").replace(r"\.*", ".*")):
        convert(*arguments)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 32), (5, 1, 1, 1, 1)])
@pytest.mark.parametrize("layout", ["original", "huggingface", "mmseg", "tutorial"])
def test_tensors_of_no_sensible_shape_are_named(tmp_path, layout, shape):
    source = foreign_files(tmp_path)[layout]
    tensors = unwrap(read_file(find_weights(source, WEIGHT_FILES)), source)
    one_block = r"(^|layer\.|layers\.|blocks\.)1\.|^[a-z_.]+$"
    for key in [key for key in tensors if re.search(one_block, key) and not re.match("neck|.*_head", key)]:
        if layout != "tutorial" or key.startswith("encoder."):
            torch.save(tensors | {key: torch.ones(shape)}, tmp_path / "changed.pth")
            with pytest.raises(ValueError, match=re.escape(key)):
                tool.main(tool.parse_args(["--inspect", str(tmp_path / "changed.pth")]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls_token": torch.zeros(1, 1, 32).to_sparse()}, "cls_token holds no values, or not as a plain array"),
        ({"cls_token": torch.zeros(1, 1, 32, device="meta")}, "cls_token holds no values, or not as a plain array"),
        ({"cls_token": torch.zeros(1, 1, 32, dtype=torch.int64)}, r"cls_token is of torch\.int64"),
        ({3: torch.zeros(1)}, "is not weights by name: 3 is a Tensor"),
        ({"cls_token": numpy.zeros((1, 1, 32))}, "'cls_token' is an object that is not opened"),
        (
            {"blocks.3000.norm1.weight": torch.zeros(32)},
            r"changed\.pth.*numbered up to 3000, but there is no blocks\.3$",
        ),
        ({f"blocks.{'9' * 5000}.norm1.weight": torch.zeros(32)}, "unknown key blocks.9999"),
        ({"blocks.\u0663.norm1.weight": torch.zeros(32)}, "unknown key blocks.\u0663"),
        ({"": torch.zeros(32)}, "unknown key $"),
    ],
)
def test_values_that_are_no_weights_are_named(tmp_path, change, message):
    torch.save({"model": build("encoder").state_dict() | change}, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "changed.pth", tmp_path / "out", "ours", *TOLD[:2])


@pytest.mark.parametrize("third", ["query", "key", "value"])
def test_thirds_that_differ_are_named(tmp_path, third):
    folder = foreign_files(tmp_path)["huggingface"]
    key = f"vit.encoder.layer.1.attention.attention.{third}.weight"
    for value, told in ((torch.zeros(7, 32), r"\(7, 32\)"), (torch.zeros(32, 32).half(), r"torch\.float16")):
        change(folder, lambda tensors, value=value: tensors.update({key: value}))
        with pytest.raises(ValueError, match=rf"{re.escape(key)} .*{told}"):
            convert(folder, tmp_path / "out", "ours")


@pytest.mark.parametrize(("layer", "gamma"), [("attn.proj", "gamma_1"), ("ffn.layers.1", "gamma_2")])
def test_layer_scales_of_another_length_than_the_layer_are_refused(tmp_path, layer, gamma):
    tensors = as_mmseg(build("segmenter with relative positions"))
    tensors[f"backbone.layers.1.{gamma}"] = torch.full((64,), 2.0)
    tensors[f"backbone.layers.1.{layer}.weight"] = torch.zeros(7, 64)
    torch.save({"state_dict": tensors}, tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=rf"lengths that differ: .*{gamma} \(64,\), .*{layer}\.weight \(7, 64\)"):
        convert(tmp_path / "theirs.pth", tmp_path / "ours", "ours")


def test_hostile_and_damaged_files_are_refused_in_one_sentence(tmp_path):
    torch.save({"model": Hostile(str(tmp_path / "owned"))}, tmp_path / "hostile.pth")
    save_file({"a": torch.zeros(100)}, tmp_path / "cut.safetensors")
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-50])
    torch.save({"model": build("encoder").state_dict()}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-500])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "weights.npz").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"a": torch.zeros(9)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "legacy.pth").write_bytes((tmp_path / "legacy.pth").read_bytes()[:-30])
    torch.save({"model": {"a": 1}}, tmp_path / "number.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, message in {
        "hostile.pth": r"hostile\.pth is not opened: it wants \S*open called",
        "cut.safetensors": r"cut\.safetensors is damaged",
        "cut.pth": r"cut\.pth is damaged",
        "empty.pth": r"empty\.pth is damaged, or no file of weights",
        "text.pth": r"text\.pth is damaged, or no file of weights",
        "weights.npz": r"weights\.npz is damaged, or no file of weights",
        "list.pth": r"list\.pth holds a list",
        "legacy.pth": r"legacy\.pth is damaged",
        "number.pth": r"number\.pth is not weights by name: 'a' is a int",
        "other.safetensors": r"is in no layout known here: its keys are such as \['a'\]",
    }.items():
        with pytest.raises(ValueError, match=message) as refusal:
            convert(tmp_path / name, tmp_path / "out", "ours")
        assert "\n" not in str(refusal.value) and "weights_only" not in str(refusal.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "owned").exists()


def test_the_command_ends_with_a_sentence_and_a_status(tmp_path, monkeypatch):
    torch.save({"model": Hostile(str(tmp_path / "owned"))}, tmp_path / "hostile.pth")
    arguments = ["convert_weights.py", str(tmp_path / "hostile.pth"), str(tmp_path / "out"), "--to", "ours"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "convert_weights.py"), run_name="__main__")
    assert re.fullmatch(r"error: .*hostile\.pth is not opened.*", end.value.code)  # printed, with status 1
    assert not (tmp_path / "owned").exists()


def test_logs_of_mmsegmentation_beside_the_weights_are_let_in_unopened(tmp_path, monkeypatch):
    """A training of MMSegmentation saves objects of its own; here a stand-in of that name, which is gone at reading."""
    name = "mmengine.logging.history_buffer"
    module = types.ModuleType(name)

    class HistoryBuffer:
        __module__, __qualname__ = name, "HistoryBuffer"

        def min(self):
            return 0.0

        def __getstate__(self):  # since mmengine 0.7.3; protocol 2 writes a method as getattr(HistoryBuffer, "min")
            return {**self.__dict__, "statistics_methods": {"min": HistoryBuffer.min}}

    HistoryBuffer.min.__module__, HistoryBuffer.min.__qualname__ = name, "HistoryBuffer.min"
    module.HistoryBuffer = HistoryBuffer
    buffer = HistoryBuffer()
    buffer.history, buffer.mean = numpy.arange(3.0), numpy.float64(1)
    model = build("segmenter with relative positions")
    content = {"state_dict": as_mmseg(model), "message_hub": {"log_scalars": {"loss": buffer}}}
    with monkeypatch.context() as patch:
        for package in ("mmengine", "mmengine.logging"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        patch.setitem(sys.modules, name, module)
        torch.save(content, tmp_path / "iter_160000.pth")
    assert b"getattr" in zipfile.ZipFile(tmp_path / "iter_160000.pth").read("iter_160000/data.pkl")
    back = convert(tmp_path / "iter_160000.pth", tmp_path / "ours", "ours")
    assert_same(weights(back), model.state_dict())


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("config.json", {"num_attention_heads": "4"}, "num_attention_heads in .* a whole number above 0, not '4'"),
        ("config.json", {"num_attention_heads": 4.0}, "a whole number above 0, not 4.0"),
        ("config.json", {"hidden_size": True}, "hidden_size in .* a whole number above 0, not True"),
        ("config.json", {"layer_norm_eps": [1e-6]}, "layer_norm_eps in .* a number of at least 0"),
        ("config.json", {"image_size": [16, 16, 16]}, "image_size in .* one or two whole numbers above 0"),
        ("config.json", {"id2label": {"x": "a"}}, "id2label in .* texts by number from 0"),
        ("config.json", {"id2label": {"1": "a"}}, "id2label in .* texts by number from 0"),
        ("config.json", {"id2label": {"0": 3}}, "id2label in .* texts by number from 0"),
        ("config.json", {"norm_pix_loss": "no"}, "norm_pix_loss in .* true or false"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "image_mean in .* a list of numbers, not 0.5"),
        ("preprocessor_config.json", {"image_std": ["a", "a", "a"]}, "image_std in .* a list of numbers"),
    ],
)
def test_entries_of_transformers_that_make_no_sense_are_named(tmp_path, file, entries, message):
    folder = convert(write_ours(tmp_path / "ours", build("masked autoencoder")), tmp_path / "theirs", "huggingface")
    change_json(folder / file, **entries)
    with pytest.raises(ValueError, match=message.replace(" in .*", rf" in {folder / file}.*")):
        convert(folder, tmp_path / "out", "ours")


def test_epsilon_that_is_null_is_named(tmp_path):
    folder = convert(write_ours(tmp_path / "ours", build("encoder")), tmp_path / "theirs", "huggingface")
    text = (folder / "config.json").read_text().replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": null')
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"layer_norm_eps in .* a number of at least 0, not None"):
        convert(folder, tmp_path / "out", "ours")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"pretrained_cfg": [1]}, "pretrained_cfg in .* a table"),
        ({"pretrained_cfg": {"mean": 0.5}}, "mean in .* a list of numbers"),
        ({"model_args": {"num_heads": "4"}}, "num_heads in .* a whole number"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer in .* gelu"),
        ({"label_names": {"n1": "a"}}, "label_names in .* texts by number"),
        ({"global_pool": True}, "global_pool in .* a text"),
    ],
)
def test_entries_of_timm_that_make_no_sense_are_named(tmp_path, entries, message):
    their_vit(tmp_path / "hub", num_classes=7)
    change_json(tmp_path / "hub" / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "hub", tmp_path / "out", "ours")


@pytest.mark.parametrize(
    ("kind", "entries", "message"),
    [
        ("classifier of the mean", {"class_names": list("ab")}, "ours has 2 class names, but weights for 7 classes"),
        ("classifier of the mean", {"num_classes": 8}, "num_classes is 8 beside the weights of .*, 7 in them"),
        ("classifier of the mean", {"global_pool": "cls"}, "global_pool is cls beside the weights of .*, avg in them"),
        ("classifier of the mean", {"image_mean": []}, r"--mean takes 3 numbers, one for each channel, not \[\]"),
        ("segmenter", {"class_names": list("abcdef")}, "ours has 6 class names, but weights for 5 classes"),
        ("segmenter", {"norm": "group"}, "norm is group beside the weights of .*, batch in them"),
        ("segmenter", {"rel_pos_bias": True}, "rel_pos_bias is True beside"),
        ("segmenter", {"taps": [0, 1, 2, 4]}, r"taps must be four blocks within 0\.\.3"),
        ("segmenter", {"taps": [0, 1, 2]}, r"taps must be four blocks within 0\.\.3"),
    ],
)
def test_what_lies_beside_the_weights_and_contradicts_them_is_refused(tmp_path, kind, entries, message):
    source = write_ours(tmp_path / "ours", build(kind))
    change_json(source / "config.json", **entries)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", "ours")


def test_class_names_of_another_project_are_compared_with_the_head(tmp_path):
    torch.save(
        {"meta": {"CLASSES": ("a",)}, "state_dict": as_mmseg(build("segmenter with relative positions"))},
        tmp_path / "theirs.pth",
    )
    with pytest.raises(ValueError, match=r"theirs\.pth has 1 class names, but weights for 5 classes"):
        convert(tmp_path / "theirs.pth", tmp_path / "out", "ours")


def test_a_head_without_half_its_norm_is_named_as_such(tmp_path):
    tensors = build("classifier of the mean").state_dict()
    del tensors["fc_norm.weight"]
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"does not fit: missing fc_norm\.weight$"):
        convert(tmp_path / "a.pth", tmp_path / "out", "ours", *TOLD[:2])


@pytest.mark.parametrize("key", ["state_dict_ema", "ema_state_dict"])
def test_weights_that_are_not_read_are_named(tmp_path, capsys, key):
    expected = build("encoder").state_dict()
    other = {name: value + 1 for name, value in expected.items()}
    torch.save({"state_dict": expected, key: other, "optimizer": {"state": {}}}, tmp_path / "a.pth")
    assert_same(weights(convert(tmp_path / "a.pth", tmp_path / "ours", "ours", *TOLD[:2])), expected)
    assert re.search(rf"^note +{key} in the same file not read", capsys.readouterr().out, re.MULTILINE)


def test_a_table_that_the_file_cannot_fill_is_not_computed(tmp_path):
    """The decoder's width is believed of one tensor, and its table of positions would have as many columns."""
    tensors = build("masked autoencoder").state_dict()
    tensors["decoder_embed.weight"] = torch.zeros(400_000, 1)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"decoder_pos_embed is \(1, 17, 16\) instead of \(1, 17, 400000\)$"):
        convert(tmp_path / "a.pth", tmp_path / "out", "ours", *TOLD)


def test_config_that_is_no_json_is_refused(tmp_path):
    folder = write_ours(tmp_path / "ours", build("encoder"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        convert(folder, tmp_path / "out.pth", "original")


def test_targets_are_never_replaced_by_accident(tmp_path):
    source = write_ours(tmp_path / "ours", build("encoder"))
    file, folder = convert(source, tmp_path / "out.pth", "original"), convert(source, tmp_path / "out", "huggingface")
    for target, layout in ((file, "original"), (folder, "huggingface")):
        with pytest.raises(FileExistsError, match="--overwrite"):
            convert(source, target, layout)
        convert(source, target, layout, "--overwrite")
    (folder / "optimizer.bin").write_text("of a training")
    with pytest.raises(ValueError, match=r"also holds optimizer\.bin, so --overwrite does not replace it"):
        convert(source, folder, "huggingface", "--overwrite")
    with pytest.raises(ValueError, match=r"writes a \.pth file, so .* must end in \.pth"):
        convert(source, tmp_path / "out.safetensors", "original")
    with pytest.raises(ValueError, match="looks like a file"):
        convert(source, tmp_path / "new.pth", "ours")
    with pytest.raises(ValueError, match="is a folder, which --overwrite does not replace"):
        (tmp_path / "folder.pth").mkdir()
        convert(source, tmp_path / "folder.pth", "original", "--overwrite")
    assert (folder / "optimizer.bin").exists()


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_links_are_followed_and_stay(tmp_path, layout):
    source = write_ours(tmp_path / "ours", build("encoder"))
    suffix = tool.LAYOUTS[layout].suffix
    link, place = tmp_path / f"link{suffix}", tmp_path / "disk" / f"place{suffix}"
    link.symlink_to(place)
    with pytest.raises(FileExistsError, match="--overwrite"):  # a link to nowhere
        convert(source, link, layout)
    for seed in (1, 2):
        shutil.rmtree(source)
        model = build("encoder", seed=seed)
        convert(write_ours(source, model), link, layout, "--overwrite")
        assert link.is_symlink() and [path.name for path in place.parent.iterdir()] == [place.name]
        assert_same(weights(convert(link, tmp_path / f"back_{seed}", "ours", *TOLD[:2])), model.state_dict())


def test_what_a_kill_leaves_behind_is_put_right_by_the_next_conversion(tmp_path):
    source, target = write_ours(tmp_path / "ours", build("encoder")), tmp_path / "out"
    (tmp_path / "out.unfinished.tmp").mkdir()
    (tmp_path / "out.unfinished.tmp" / "model.safetensors").write_bytes(b"half")
    convert(source, target, "huggingface")
    before = weights(target)
    os.rename(target, tmp_path / "out.replaced.old")  # killed between the two renames
    with pytest.raises(FileExistsError, match="out exists"):
        convert(source, target, "huggingface")
    assert_same(weights(target), before)
    shutil.copytree(target, tmp_path / "out.replaced.old")  # killed after them
    convert(source, target, "huggingface", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "out"]


def test_a_refused_conversion_touches_nothing_beside_its_target(tmp_path):
    source = write_ours(tmp_path / "ours", build("encoder"))
    for name in ("out", "out.old", "out.tmp"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match="out exists"):
        convert(source, tmp_path / "out", "huggingface")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "out", "out.old", "out.tmp"]


def test_weights_may_be_read_by_whom_the_system_lets(tmp_path):
    folder = convert(write_ours(tmp_path / "ours", build("encoder")), tmp_path / "out", "huggingface")
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert modes == {(folder / "config.json").stat().st_mode}


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    source = write_ours(tmp_path / "ours", build("encoder"))
    target = convert(source, tmp_path / "out", "huggingface")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def no_rename(*_):
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", no_rename)  # the second of the two
    with pytest.raises(OSError, match="no rename"):
        convert(source, target, "huggingface", "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, overwrite):
    source, target = write_ours(tmp_path / "ours", build("encoder")), tmp_path / "new" / "out"
    if overwrite:
        convert(source, target, "ours")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(tool.files, "write_json", full_disk)  # after the weights
    with pytest.raises(OSError, match="no space left"):
        convert(source, target, "ours", *["--overwrite"] * overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert target.exists() == overwrite and not list(target.parent.glob("out.*"))


# -------------------------------------------------------------------------------- inspecting


@pytest.mark.parametrize(
    ("layout", "title", "yes", "more"),
    [
        ("mae", "this project's masked autoencoder", "finetuning pretraining", "as it is"),
        (
            "original",
            "the original release's .* masked autoencoder",
            "finetuning pretraining",
            "nobody tells +encoder_num",
        ),
        (
            "huggingface",
            "Hugging Face's ViT and ViTMAE masked autoencoder",
            "finetuning pretraining",
            r"_ours --to ours$",
        ),
        ("mmseg", "MMSegmentation's segmenter", "segmenting", r"mmseg\.pth_ours --to ours$"),
        (
            "tutorial",
            "PyTorch-Adventures' encoder",
            "finetuning",
            r"(?s)no counterpart +decoder, embed2image .*--drop$",
        ),
    ],
)
def test_inspect_tells_what_a_source_serves(tmp_path, capsys, layout, title, yes, more):
    files = foreign_files(tmp_path) | {"mae": tmp_path / "mae"}
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    tool.main(tool.parse_args(["--inspect", str(files[layout])]))
    output = capsys.readouterr().out
    assert re.search(rf"^layout +{title}$", output, re.MULTILINE)
    for use in ("finetuning", "pretraining", "classifying", "segmenting"):
        line = next(line for line in output.splitlines() if line.startswith(use))
        assert line.endswith(" yes") == (use in yes.split()) and ("no, it lacks" in line) != line.endswith(" yes")
    assert re.search(more, output, re.MULTILINE)
    assert sorted(tmp_path.rglob("*")) == before


def wrapped_files(folder: Path) -> dict[str, Path]:
    """Write a named size as many trainings wrap it; what is no part of a name here the scripts take as it is."""
    expected = VisionTransformer(MAEConfig(encoder_embed_dim=192, encoder_depth=1, encoder_num_heads=3)).state_dict()
    contents = {
        "plain": expected,
        "none": {"model": None, "state_dict": expected},
        "nested": {"model": {"module": expected}},
    }
    for prefix in ("module.", "_orig_mod.", "model."):
        contents[prefix] = {prefix + key: value for key, value in expected.items()}
    contents["unnamed"] = build("encoder").state_dict()
    contents["pooled"] = expected | {"fc_norm.weight": torch.ones(192), "fc_norm.bias": torch.ones(192)}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    (folder / "folder").mkdir()
    torch.save(expected, folder / "folder" / "pytorch_model.bin")
    return {name: folder / f"{name}.pth" for name in contents} | {"folder": folder / "folder"}


def test_inspect_says_as_it_is_of_what_the_scripts_take(tmp_path, capsys):
    for name, path in wrapped_files(tmp_path).items():
        tool.main(tool.parse_args(["--inspect", str(path)]))
        line = capsys.readouterr().out.splitlines()[-1]
        assert re.fullmatch(r"to use it here +(as it is|convert it once with: .*)", line)
        assert ("as it is" in line) == (name not in ("folder", "unnamed", "pooled")), name
        if "as it is" in line:
            model = VisionTransformer(MAEConfig(encoder_embed_dim=192, encoder_depth=1, encoder_num_heads=3))
            assert load_pretrained_encoder(model, path).missing == [] and read_sizes(path)
        else:
            flags = line.split("--to ours")[1].replace(" N", " 4").split()
            convert(path, tmp_path / f"{name}_ours", "ours", *flags)


@pytest.mark.parametrize(
    ("kind", "serves"),
    [
        ("encoder", {"avg", "cls", "plain", "relative"}),
        ("classifier of the mean", {"avg", "plain", "relative"}),
        ("classifier of the cls token", {"avg", "cls", "plain", "relative"}),
        ("linear probe", {"avg", "cls", "plain", "relative"}),
        ("relative", {"relative"}),
    ],
)
def test_inspect_calls_finetuning_what_the_loader_does(tmp_path, capsys, kind, serves):
    model = build("encoder" if kind == "relative" else kind)
    if kind == "relative":
        model.add_relative_positions()
    source = write_ours(tmp_path / "ours", model)
    tool.main(tool.parse_args(["--inspect", str(source)]))
    verdict = re.search(r"^finetuning +(.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert ("no classifier" in verdict) == (not serves & {"avg", "cls"}) == ("--rel_pos_bias" in verdict)
    assert ("--global_pool avg" in verdict) == ("avg" in serves and "cls" not in serves)
    targets = {pool: ViTMAEForImageClassification(TINY, 3, pool) for pool in ("avg", "cls")}
    targets |= {"plain": VisionTransformer(TINY), "relative": VisionTransformer(TINY)}
    targets["relative"].add_relative_positions()
    for name in ("plain", "relative"):
        targets[name].norm = nn.Identity()  # as in a segmenter
    for name, target in targets.items():
        if name not in serves:
            with pytest.raises(ValueError, match="rel_pos_bias" if kind == "relative" else r"missing: norm\.weight"):
                load_pretrained_encoder(target, source)
        else:
            report = load_pretrained_encoder(target, source)
            if name in ("avg", "cls") and kind != "encoder":  # a head of seven classes for three
                assert any(key.startswith("head.") for key in report.unexpected)
                assert {"head.weight", "head.bias"} <= set(report.missing)


@pytest.mark.parametrize("kind", ["classifier of the mean", "classifier of the cls token", "linear probe", "encoder"])
def test_inspect_counts_parameters(tmp_path, capsys, kind):
    model = build(kind)
    tool.main(tool.parse_args(["--inspect", str(write_ours(tmp_path / "ours", model))]))
    output = capsys.readouterr().out
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,} in " in output and f"this project's {kind}\n" in output
    assert ("classifying" + " " * 13 + "yes" in output) == (kind != "encoder")


def test_the_line_that_opens_ours_is_for_a_shell(tmp_path, capsys):
    folder = convert(write_ours(tmp_path / "ours", build("segmenter")), tmp_path / "it's ours", "ours")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("opens with"))
    assert shlex.split(line.removeprefix("opens with")) == ["tools/segment.py", "--checkpoint", str(folder)]


# -------------------------------------------------------------------------------- the training scripts refuse


@pytest.mark.parametrize("layout", ["huggingface", "mmseg", "tutorial", "timm", "vit", "beit", "scaled"])
def test_foreign_layouts_are_refused_with_the_command_that_converts_them(tmp_path, layout):
    sources = foreign_files(tmp_path / "a b") | {name: tmp_path / name for name in ("timm", "vit", "beit", "scaled")}
    source = sources[layout]
    if layout == "timm":
        their_vit(source)
    elif layout == "scaled":
        source = tmp_path / "scaled.safetensors"
        save_file(their_vit(tmp_path / "hub", num_classes=0, init_values=0.1).state_dict(), source)
    elif layout == "vit":
        transformers.ViTModel(transformers.ViTConfig(**SMALL_VIT)).save_pretrained(source)
    elif layout == "beit":
        source = tmp_path / "beit.pth"
        torch.save({"model": as_beit(build("segmenter with relative positions"))}, source)
    loaders = [load_pretrained_mae, load_classifier, load_segmenter, read_sizes]
    loaders.append(lambda path: load_pretrained_encoder(VisionTransformer(TINY), path))
    commands = set()
    for loader in loaders[1:] if layout == "timm" else loaders:  # the first wants a decoder before it looks at sizes
        with pytest.raises(ValueError, match="convert it once with: ") as refusal:
            loader(f"{source}/" if source.is_dir() else source)
        commands.add(str(refusal.value).split("convert it once with: ")[1])
    (command,) = commands
    assert command.startswith("python tools/convert_weights.py ")
    arguments = shlex.split(command.replace("_heads N", "_heads 4"))[2:]
    assert arguments[:2] == [str(source), f"{source}_ours"]
    tool.main(tool.parse_args(arguments))
    expected = FOUR_BLOCKS if layout in ("mmseg", "beit") else TINY
    assert MAEConfig(**read_sizes(f"{source}_ours")["config"]).encoder_depth == expected.encoder_depth


def test_weights_in_shards_are_refused_with_what_to_do(tmp_path):
    """All published sizes are below the size at which any library begins to cut a file into shards."""
    their_mae().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    for path in (tmp_path / "theirs", index):
        for opens in (read_sizes, lambda source: convert(source, tmp_path / "ours", "ours")):
            with pytest.raises(ValueError, match=rf"^{path} lists several files .* save_pretrained\(FOLDER, max_shard"):
                opens(path)
