"""Key names of other projects: every table is read both ways without a loss, and what no table knows is named."""

from pathlib import Path

import pytest

from model import MODEL_CONFIGS
from storage.layouts import (
    HUGGINGFACE_SIZES,
    LAYOUTS,
    PUBLISHED_WIDTHS,
    detect_layout,
    our_name,
    split_name,
    their_names,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_name_of_a_table_comes_back_with_its_third(layout):
    names = [f"{ours.replace('.N', '.10')}.weight" for ours in LAYOUTS[layout].table]
    found = {ours: their_names(ours, layout) for ours in names}
    assert {len(theirs) for theirs in found.values()} <= {1, 3}
    for ours, theirs in found.items():
        assert [our_name(name, layout) for name in theirs] == [(ours, index) for index in range(len(theirs))]
    every = [name for theirs in found.values() for name in theirs]
    assert len(set(every)) == len(every)


@pytest.mark.parametrize(
    ("layout", "key", "ours"),
    [
        ("ours", "backbone.blocks.3.ls1.gamma", ("blocks.3.gamma_1", 0)),
        ("ours", "fpn1.1.running_mean", ("neck.upsample_4x.1.running_mean", 0)),
        ("huggingface", "encoder.layer.0.attention.attention.value.bias", ("blocks.0.attn.qkv.bias", 2)),
        ("huggingface", "vit.layers.11.attention.k_proj.weight", ("blocks.11.attn.qkv.weight", 1)),
        ("huggingface", "vit.layers.11.mlp.fc2.bias", ("blocks.11.mlp.fc2.bias", 0)),
        (
            "huggingface",
            "decoder.decoder_encoder.layer.7.attention.o_proj.bias",
            ("decoder_blocks.7.attn.proj.bias", 0),
        ),
        ("mmseg", "backbone.layers.0.ffn.layers.0.0.weight", ("blocks.0.mlp.fc1.weight", 0)),
        ("tutorial", "encoder_blocks.0.norm1.weight", ("blocks.0.norm1.weight", 0)),
        ("timm", "decoder_embed.weight", None),
    ],
)
def test_names_by_hand(layout, key, ours):
    assert our_name(key, layout) == ours


def test_a_name_is_split_at_its_first_number_and_its_leaf():
    assert split_name("blocks.3.norm1.weight") == ("blocks.N.norm1", "3", ".weight")
    assert split_name("head.1.bias") == ("head.N", "1", ".bias")
    assert split_name("cls_token") == ("cls_token", "", "")


def test_layouts_are_detected_by_most_keys_and_ours_come_first():
    assert detect_layout(["cls_token", "blocks.0.norm1.weight"], Path("a")) == "ours"
    assert detect_layout(["vit.embeddings.cls_token"], Path("a")) == "huggingface"
    assert detect_layout(["beit.embeddings.cls_token", "cls_token", "beit.pooler.layernorm.bias"], Path("a")) == "beit"
    with pytest.raises(ValueError, match=r"a\.pth is in no layout known here: its keys are such as \['other'\]. Known"):
        detect_layout(["other"], Path("a.pth"))


def test_widths_and_sizes_are_those_of_the_models():
    assert set(PUBLISHED_WIDTHS) == {config.encoder_embed_dim for config in MODEL_CONFIGS.values()}
    assert HUGGINGFACE_SIZES.keys() < MODEL_CONFIGS["mae_vit_base_patch16"].as_record(decoder=True).keys()
