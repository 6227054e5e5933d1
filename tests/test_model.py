"""The networks against independent implementations, golden numbers, round trips and invariances."""

import argparse
import dataclasses
import json
import math

import pytest
import timm
import torch
import transformers
from accelerate import Accelerator
from conftest import TINY
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.optim import param_groups_layer_decay

from model import (
    MODEL_CONFIGS,
    MAEConfig,
    VisionTransformer,
    ViTMAEForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEForSegmentation,
    default_taps,
    get_2d_sincos_pos_embed,
    infer_config,
    load_classifier,
    load_pretrained_encoder,
    load_pretrained_mae,
    load_segmenter,
    num_kept_patches,
    resample_pos_embed,
    resample_relative_positions,
)
from training.checkpoints import Checkpoints

TINY_PIXELS = dataclasses.replace(TINY, norm_pix_loss=False)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few hundred values wait longer for a second thread than they are computed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_model(config: MAEConfig, seed: int = 0) -> ViTMAEForPreTraining:
    """Build a model in which no parameter is at a special value, so that no mistake hides behind a zero."""
    torch.manual_seed(seed)
    model = ViTMAEForPreTraining(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("pos_embed"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


# -------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "trainable", "tensors"),
    [
        ("mae_vit_base_patch16", 85_798_656, 26_109_184, 111_655_680, 254),
        ("mae_vit_large_patch16", 303_301_632, 26_240_256, 329_239_296, 398),
        ("mae_vit_huge_patch14", 630_764_800, 26_309_708, 656_613_964, 494),
    ],
)
def test_model_has_the_original_parameter_and_tensor_counts(name, encoder, decoder, trainable, tensors):
    with torch.device("meta"):
        model = ViTMAEForPreTraining(MODEL_CONFIGS[name], custom_weight_init=False)
    counts = {key: value.numel() for key, value in model.state_dict().items()}
    of_decoder = {key: n for key, n in counts.items() if key.startswith(("decoder", "mask_token"))}
    assert sum(of_decoder.values()) == decoder
    assert sum(counts.values()) - sum(of_decoder.values()) == encoder
    assert len(counts) == tensors and len(of_decoder) == 104
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 98), (0.6, 78), (0.75, 49), (0.8, 39), (0.85, 29), (0.9, 19)])
def test_num_kept_patches_truncates_as_the_original(ratio, kept):
    assert num_kept_patches(196, ratio) == kept


def test_num_kept_patches_of_huge():
    assert num_kept_patches(MODEL_CONFIGS["mae_vit_huge_patch14"].num_patches, 0.75) == 64


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.999])
def test_num_kept_patches_refuses_ratios_that_keep_nothing(ratio):
    with pytest.raises(ValueError, match="of 196 patches"):
        num_kept_patches(196, ratio)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 230}, "img_size 230 is not a multiple of patch_size 16; use 224 or 240"),
        ({"img_size": (224, 10)}, "img_size 10 is not a multiple of patch_size 16; use 16"),
        ({"encoder_embed_dim": 100}, "encoder_embed_dim 100 is not a multiple of encoder_num_heads 12"),
        ({"decoder_embed_dim": 18, "decoder_num_heads": 3}, "decoder_embed_dim 18 is not a multiple of 4"),
        ({"encoder_depth": 0}, "encoder_depth must be at least 1"),
        ({"patch_size": 1, "input_channels": 1}, "at least two values"),
    ],
)
def test_config_refuses_what_cannot_be_built(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MAEConfig(), **changes)


def test_config_is_built_of_the_flags_that_were_given():
    flags = argparse.Namespace(img_size=(8, 24), encoder_depth=2, patch_size=None, epochs=3, norm_pix_loss=False)
    changed = {"img_size": (8, 24), "encoder_depth": 2, "norm_pix_loss": False}
    assert MAEConfig.from_flags(flags, TINY) == dataclasses.replace(TINY, **changed)
    assert MAEConfig.from_flags(argparse.Namespace(epochs=3)) == MAEConfig()
    with pytest.raises(ValueError, match="img_size 30 is not a multiple of patch_size 4"):
        MAEConfig.from_flags(argparse.Namespace(img_size=30), TINY)


def test_record_of_a_config_builds_it_again_and_leaves_out_a_decoder_that_is_not_there():
    assert MAEConfig(**TINY.as_record(decoder=True)) == TINY
    encoder = TINY.as_record(decoder=False)
    assert encoder.keys() == {
        name for name in TINY.as_record(decoder=True) if not name.startswith(("decoder", "norm_"))
    }
    assert len(encoder) == 7 and all(getattr(TINY, name) == value for name, value in encoder.items())


# -------------------------------------------------------------------------------- positions


def test_sincos_golden_values():
    table = get_2d_sincos_pos_embed(768, (14, 14))
    assert table.shape == (197, 768) and table.dtype == torch.float32
    assert (table[0] == 0).all()
    token = table[1 + 1]  # row 0, column 1
    for index, value in {0: 0.841471, 1: 0.815251, 192: 0.540302, 193: 0.579108}.items():
        assert token[index].item() == pytest.approx(value, abs=1e-6)
    assert (token[384:576] == 0).all() and (token[576:] == 1).all()


def test_sincos_rectangle_puts_the_column_first_and_the_row_second():
    table = get_2d_sincos_pos_embed(16, (3, 5), cls_token=False)
    token = table[2 * 5 + 4]
    assert token[0].item() == pytest.approx(math.sin(4), abs=1e-6)
    assert token[8].item() == pytest.approx(math.sin(2), abs=1e-6)
    assert token[15].item() == pytest.approx(math.cos(2 / 10000 ** (3 / 4)), abs=1e-6)


@pytest.mark.parametrize(("old", "new"), [((4, 6), (8, 3)), ((14, 14), (32, 32)), ((8, 8), (4, 6))])
def test_resample_pos_embed_equals_timm_without_antialiasing(old, new):
    table = torch.randn(1, 1 + old[0] * old[1], 32)
    expected = resample_abs_pos_embed(table, list(new), list(old), antialias=False)
    torch.testing.assert_close(resample_pos_embed(table, old, new), expected, rtol=0, atol=0)


def test_resample_pos_embed_minds_the_shape_not_the_count():
    table = torch.randn(1, 1 + 16, 8)
    assert resample_pos_embed(table, (4, 4), (4, 4)) is table
    resampled = resample_pos_embed(table, (2, 8), (4, 4))
    assert resampled.shape == table.shape and torch.equal(resampled[:, 0], table[:, 0])
    assert not torch.allclose(resampled[:, 1:], table[:, 1:])


# -------------------------------------------------------------------------------- patches and masks


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize(("patch_size", "size"), [(4, (8, 20)), (14, (28, 42)), (16, (48, 32))])
def test_unpatchify_undoes_patchify_bit_for_bit(channels, patch_size, size):
    config = dataclasses.replace(TINY, img_size=size, patch_size=patch_size, input_channels=channels)
    model = ViTMAEForPreTraining(config)
    images = torch.randn(2, channels, *size)
    patches = model.patchify(images)
    assert patches.shape == (2, config.num_patches, patch_size**2 * channels)
    assert torch.equal(model.unpatchify(patches), images)


def test_patchify_orders_a_patch_by_row_column_channel():
    model = ViTMAEForPreTraining(TINY)
    images = torch.arange(3 * 16 * 16.0).reshape(1, 3, 16, 16)
    patch = model.patchify(images)[0, 1 * 4 + 2].reshape(4, 4, 3)  # grid row 1, column 2
    for row, column, channel in [(0, 0, 0), (0, 0, 2), (1, 3, 1)]:
        assert patch[row, column, channel] == images[0, channel, 4 + row, 8 + column]


def test_patchify_refuses_images_that_do_not_fit():
    model = ViTMAEForPreTraining(TINY)
    with pytest.raises(ValueError, match="3 channels and patch size 4"):
        model.patchify(torch.zeros(1, 1, 16, 16))


def test_embedding_visible_patches_equals_the_convolution_on_everything():
    model = random_model(TINY)
    images = torch.randn(2, 3, 16, 16)
    embedded = model.embed_patches(model.patchify(images))
    torch.testing.assert_close(embedded, model.patch_embed(images), rtol=0, atol=1e-5)
    ids_keep = torch.tensor([[3, 0, 15], [7, 8, 1]])
    index = ids_keep[:, :, None]
    visible = torch.gather(model.patchify(images), 1, index.expand(-1, -1, 48))
    expected = torch.gather(embedded, 1, index.expand(-1, -1, 32))
    torch.testing.assert_close(model.embed_patches(visible), expected, rtol=0, atol=1e-6)


def test_random_masking_keeps_the_smallest_noise():
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.5, 0.6, 0.7, 0.4]])
    ids_keep, ids_restore, mask = ViTMAEForPreTraining(TINY).random_masking(noise, 0.5)
    assert ids_keep.tolist() == [[1, 3], [3, 0]]
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
    shuffled = torch.gather(noise, 1, torch.argsort(noise, dim=1))
    assert torch.equal(torch.gather(shuffled, 1, ids_restore), noise)


def test_random_masking_breaks_ties_by_position():
    ids_keep, _, mask = ViTMAEForPreTraining(TINY).random_masking(torch.full((1, 64), 0.5), 0.75)
    assert ids_keep.tolist() == [list(range(16))] and mask.sum() == 48


def test_mask_has_exactly_the_removed_patches_per_row():
    output = random_model(TINY)(torch.randn(5, 3, 16, 16), mask_ratio=0.9)
    assert output.mask.sum(dim=1).tolist() == [16 - 1] * 5


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise has shape \(2, 9\)"):
        random_model(TINY)(torch.randn(2, 3, 16, 16), noise=torch.rand(2, 9))


# -------------------------------------------------------------------------------- the encoder


def test_encoder_without_masking_equals_the_whole_image_encoder():
    model = random_model(TINY)
    images = torch.randn(2, 3, 16, 16)
    in_order = torch.arange(16.0).expand(2, -1)
    latent, mask, _ = model.forward_encoder(images, mask_ratio=0.0, noise=in_order)
    assert mask.sum() == 0
    torch.testing.assert_close(latent, model.forward_features(images), rtol=0, atol=1e-6)


def test_checkpoint_of_ours_gives_the_same_features_in_timm(tmp_path):
    accelerator = Accelerator(cpu=True)
    ours = accelerator.prepare(random_model(MAEConfig()))
    Checkpoints(accelerator, tmp_path, 2).save(ours, {}, {"epoch": 1, "step": 1}, epoch_ends=True)
    weights = load_file(tmp_path / "checkpoint_1" / "model.safetensors")
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0).eval()
    theirs.load_state_dict({k: v for k, v in weights.items() if not k.startswith(("decoder", "mask_token"))})
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found, expected = ours.forward_features(images), theirs.forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_intermediate_layers_are_raw_block_outputs_in_grid_order():
    config = dataclasses.replace(TINY, img_size=(8, 20))
    model = random_model(config)
    images = torch.randn(2, 3, 8, 20)
    outputs = {}
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _module, _inputs, output, index=index: outputs.update({index: output}))
    maps = model.get_intermediate_layers(images, [2, 0])
    assert [tuple(m.shape) for m in maps] == [(2, 32, 2, 5)] * 2
    for found, index in zip(maps, [2, 0], strict=True):
        for row, column in [(0, 0), (0, 4), (1, 2)]:
            assert torch.equal(found[:, :, row, column], outputs[index][:, 1 + row * 5 + column])


def test_intermediate_layers_refuse_blocks_that_do_not_exist():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.2"):
        random_model(TINY).get_intermediate_layers(torch.zeros(1, 3, 16, 16), [3])


def test_encoder_takes_other_sizes_than_its_own():
    config = dataclasses.replace(TINY, img_size=(8, 24))
    model = VisionTransformer(config)
    assert model.forward_features(torch.randn(2, 3, 16, 12)).shape == (2, 1 + 4 * 3, 32)


def test_pretraining_takes_other_sizes_than_its_own():
    output = random_model(TINY)(torch.randn(2, 3, 8, 24), noise=torch.rand(2, 12))
    assert output.pred.shape == (2, 12, 48) and output.loss.isfinite()


# -------------------------------------------------------------------------------- against transformers


def to_transformers(state_dict: dict) -> dict:
    """Rename our keys to those of transformers' ViTMAE, and split the fused q, k, v."""
    renamed = {}
    for key, value in state_dict.items():
        prefix = "decoder." if key.startswith("decoder") or key == "mask_token" else "vit."
        key = key.replace("patch_embed.proj", "embeddings.patch_embeddings.projection")
        key = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}.get(key, key)
        key = key.replace("decoder_blocks", "decoder_layers").replace("blocks.", "layers.")
        key = key.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
        key = key.replace("attn.proj", "attention.o_proj")
        if prefix == "vit.":
            key = key.replace("norm.", "layernorm.") if key.startswith("norm.") else key
        if "attn.qkv" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                renamed[prefix + key.replace("attn.qkv", f"attention.{name}_proj")] = part
        else:
            renamed[prefix + key] = value
    return renamed


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("mask_ratio", [0.75, 0.6])
def test_loss_prediction_and_mask_equal_transformers(norm_pix_loss, mask_ratio):
    config = dataclasses.replace(TINY, img_size=32, norm_pix_loss=norm_pix_loss)
    ours = random_model(config)
    theirs = transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            image_size=32,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=64,
            layer_norm_eps=1e-6,
            norm_pix_loss=norm_pix_loss,
            mask_ratio=mask_ratio,
        )
    ).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 64)
    with torch.no_grad():
        loss, pred, mask = ours(images, mask_ratio, noise)
        expected = theirs(images, noise=noise)
    assert torch.equal(mask, expected.mask)
    torch.testing.assert_close(pred, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------- loss


def test_loss_counts_removed_patches_only():
    model = random_model(TINY_PIXELS)
    images = torch.randn(1, 3, 16, 16)
    pred = model.patchify(images).clone()
    pred[0, 3] += 2.0  # squared error 4 on patch 3
    pred[0, 5] += 100.0
    mask = torch.zeros(1, 16)
    mask[0, 3] = mask[0, 4] = 1
    assert model.forward_loss(images, pred, mask).item() == pytest.approx(2.0, abs=1e-5)


def test_norm_pix_target_uses_the_unbiased_variance():
    model = random_model(TINY)
    images = torch.randn(1, 3, 16, 16)
    patch = model.patchify(images)[0, 0]
    expected = (patch - patch.mean()) / (patch.var(unbiased=True) + 1e-6).sqrt()
    mask = torch.zeros(1, 16)
    mask[0, 0] = 1
    loss = model.forward_loss(images, torch.zeros(1, 16, 48), mask)
    assert loss.item() == pytest.approx(expected.square().mean().item(), rel=1e-5)


def test_norm_pix_of_a_constant_image_has_a_target_of_zeros():
    model = random_model(TINY)
    loss = model.forward_loss(torch.full((1, 3, 16, 16), 0.5), torch.zeros(1, 16, 48), torch.ones(1, 16))
    assert loss.item() == 0.0


@pytest.mark.parametrize(("precision", "atol"), [(torch.float64, 1e-8), (torch.bfloat16, 2e-2)])
def test_losses_of_200_steps_do_not_depend_on_how_they_are_computed(precision, atol, monkeypatch):
    """Attention by products, visible patches not predicted: the same losses as without these changes.

    Up to rounding, of 1e-16 in double precision and 4e-3 in bfloat16, which 200 steps of Adam blow up.
    """
    torch.manual_seed(0)
    dtype = torch.float32
    if precision == torch.float64:
        dtype = torch.float64
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    images, noise = torch.rand(8, 3, 16, 16, dtype=dtype), torch.rand(8, 16)
    runs = []
    for unfused, predict_visible in ((False, True), (True, True), (False, False)):
        torch.manual_seed(1)
        model = ViTMAEForPreTraining(TINY).to(dtype)
        if unfused:
            model.unfuse_attention()
        fused = [block.attn.fused_attn for block in (*model.blocks, *model.decoder_blocks)]
        assert fused == [not unfused] * len(fused)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        losses = []
        for _ in range(200):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = model(images, noise=noise, predict_visible=predict_visible).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append(torch.stack(losses))
    assert runs[0][-1] < runs[0][0] / 2  # it learned
    for changed in runs[1:]:
        torch.testing.assert_close(changed, runs[0], rtol=0, atol=atol)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("decoder_depth", [1, 3])
def test_predictions_of_removed_patches_alone_are_the_same(checkpointing, decoder_depth, monkeypatch):
    """Also the gradients of all weights; visible patches are zeros then, and their MLP is not computed."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = random_model(dataclasses.replace(TINY, decoder_depth=decoder_depth)).double().train()
    model.activation_checkpointing = checkpointing
    images, noise = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.rand(2, 16)
    widths, outputs, gradients, mlp = [], [], [], model.decoder_blocks[-1].mlp
    mlp.register_forward_hook(lambda _module, inputs, _output: widths.append(inputs[0].shape[1]))
    for predict_visible in (True, False):
        outputs.append(model(images, noise=noise, predict_visible=predict_visible))
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(outputs[-1].loss, trained))
    (loss, pred, mask), (same_loss, removed, same_mask) = outputs
    removed_only = mask[:, :, None].bool().expand_as(pred)
    torch.testing.assert_close((same_loss, same_mask), (loss, mask), rtol=0, atol=1e-14)
    torch.testing.assert_close(removed[removed_only], pred[removed_only], rtol=0, atol=1e-12)
    assert not removed[~removed_only].any() and pred[~removed_only].any()
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert sorted(set(widths)) == [12, 17]


def test_loss_is_float32_under_bfloat16():
    model = random_model(TINY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(2, 3, 16, 16), noise=torch.rand(2, 16))
    assert output.pred.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    target_error = model.forward_loss(torch.zeros(1, 3, 16, 16), torch.ones(1, 16, 48).bfloat16(), torch.ones(1, 16))
    assert target_error.item() == 1.0


def test_every_trainable_parameter_gets_a_gradient():
    model = random_model(TINY)
    model(torch.randn(2, 3, 16, 16)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["pos_embed", "decoder_pos_embed"]


# -------------------------------------------------------------------------------- pictures


CHECKPOINTED = {
    "pretraining": lambda: ViTMAEForPreTraining(TINY),
    "classifier": lambda: ViTMAEForImageClassification(TINY, 5, drop_path_rate=0.4),
    "segmenter": lambda: ViTMAEForSegmentation(SEGMENTED, 5, channels=8, drop_path_rate=0.4, rel_pos_bias=True),
}
SEGMENTED = dataclasses.replace(TINY, encoder_depth=4)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_activation_checkpointing_computes_twice_and_gives_the_same_gradients(name):
    """To the bit, with paths dropped at random; at evaluation nothing is computed twice."""
    torch.manual_seed(0)
    model, images = CHECKPOINTED[name](), torch.randn(4, 3, 16, 16)
    encoder, calls = getattr(model, "backbone", model), []
    blocks = [*encoder.blocks, *getattr(encoder, "decoder_blocks", [])]
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def run() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        calls.clear()
        out = model(images)
        loss = out.loss if name == "pretraining" else (out if name == "classifier" else out.logits).square().sum()
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
        return found | {"loss": loss.detach()}

    plain = run()
    assert len(calls) == len(blocks)
    encoder.activation_checkpointing = True
    checkpointed = run()
    assert len(calls) == 2 * len(blocks)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
    model.eval()
    run()
    assert len(calls) == len(blocks)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstruct_of_a_perfect_prediction_is_the_image(norm_pix_loss):
    model = random_model(dataclasses.replace(TINY, norm_pix_loss=norm_pix_loss))
    images = torch.randn(2, 3, 16, 16)
    pred = model.patchify(images)
    if norm_pix_loss:
        pred = (pred - pred.mean(dim=2, keepdim=True)) / (pred.var(dim=2, keepdim=True) + 1e-6).sqrt()
    mask = (torch.rand(2, 16) > 0.25).float()
    masked, reconstructed, pasted = model.reconstruct(images, pred, mask)
    torch.testing.assert_close(reconstructed, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(pasted, images, rtol=0, atol=1e-5)
    assert torch.equal(model.patchify(masked)[mask == 1], torch.zeros(int(mask.sum()), 48))
    assert torch.equal(model.patchify(masked)[mask == 0], model.patchify(images)[mask == 0])


# -------------------------------------------------------------------------------- initialisation


def test_custom_weight_init_follows_the_original():
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(MODEL_CONFIGS["mae_vit_small_patch16"])
    qkv, patch = model.blocks[0].attn.qkv, model.patch_embed.proj
    assert qkv.weight.std().item() == pytest.approx(math.sqrt(2 / (384 + 3 * 384)), rel=0.02)
    assert qkv.weight.abs().max().item() <= math.sqrt(6 / (384 + 3 * 384))
    assert patch.weight.std().item() == pytest.approx(math.sqrt(2 / (384 + 768)), rel=0.02)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.1)
    biased = [name for name, p in model.named_parameters() if name.endswith("bias") and p.any()]
    assert biased == ["patch_embed.proj.bias"]


def test_custom_weight_init_keeps_the_patch_bias_of_conv2d():
    """The original release initialises the bias of nn.Linear alone; Conv2d's is uniform within 1 / sqrt(P*P*C)."""
    biases = []
    for custom_weight_init in (True, False):
        torch.manual_seed(0)
        model = ViTMAEForPreTraining(MODEL_CONFIGS["mae_vit_tiny_patch16"], custom_weight_init=custom_weight_init)
        biases.append(model.patch_embed.proj.bias)
    assert torch.equal(*biases) and biases[0].abs().max() <= 768**-0.5
    assert biases[0].std().item() == pytest.approx((768 * 3) ** -0.5, rel=0.1)


def test_no_custom_weight_init_leaves_the_layers_own():
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(TINY, custom_weight_init=False)
    assert model.blocks[0].attn.qkv.bias.any()
    assert model.decoder_pred.weight.abs().max() <= 1 / math.sqrt(16)
    assert model.mask_token.std() > 0


# -------------------------------------------------------------------------------- classifier


def random_classifier(global_pool: str, num_classes: int = 7) -> ViTMAEForImageClassification:
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(TINY, num_classes, global_pool)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def test_classifier_has_the_original_parameter_count():
    with torch.device("meta"):
        model = ViTMAEForImageClassification(MAEConfig(), 1000, custom_weight_init=False)
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert {"fc_norm.weight", "head.bias"} <= model.state_dict().keys()
    assert not any(key.startswith("norm.") for key in model.state_dict())


@pytest.mark.parametrize(("global_pool", "theirs"), [("avg", "avg"), ("cls", "token")])
def test_classifier_equals_timm(global_pool, theirs):
    ours = random_classifier(global_pool)
    expected = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=7, global_pool=theirs
    ).eval()
    expected.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), expected(images), rtol=0, atol=1e-5)


def test_classifier_of_the_cls_token_equals_transformers():
    ours = random_classifier("cls")
    theirs = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            layer_norm_eps=1e-6,
            num_labels=7,
        )
    ).eval()
    head = {"classifier.weight": ours.head.weight, "classifier.bias": ours.head.bias}
    encoder = {key: value for key, value in ours.state_dict().items() if not key.startswith("head")}
    theirs.load_state_dict(to_transformers(encoder) | head)
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images).logits, rtol=0, atol=1e-5)


def test_classifier_trains_its_positions_and_starts_from_even_scores():
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(TINY, 7)
    assert all(p.requires_grad for p in model.parameters())
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.2) and not model.head.bias.any()
    assert model(torch.randn(2, 3, 16, 16)).abs().max() < 1e-3


def test_classifier_drops_paths_more_often_with_depth():
    model = ViTMAEForImageClassification(TINY, 7, drop_path_rate=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def dropped(rate: float = 0.6) -> ViTMAEForImageClassification:
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(TINY, 7, drop_path_rate=rate)
    torch.nn.init.normal_(model.head.weight)
    return model.train()


def test_drop_path_follows_the_noise_of_each_sample():
    model, images, noise = dropped(), torch.randn(6, 3, 16, 16), torch.rand(6, 6)
    together = model(images, noise)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(model(images[order], noise[order]), together[order])
    torch.testing.assert_close(torch.cat([model(images[i : i + 1], noise[i : i + 1]) for i in range(6)]), together)
    torch.testing.assert_close(model(images, noise * 0 + 0.99), model(images, noise * 0 + 0.61))  # nothing dropped
    assert not torch.allclose(model(images, noise * 0), together)  # all dropped, but for the first block
    assert torch.equal(model.eval()(images, noise), model(images))


def test_drop_path_scales_what_it_keeps_by_the_rate():
    model, images = dropped(), torch.randn(2, 3, 16, 16)
    for block, rate in zip(model.blocks, (0.0, 0.3, 0.6), strict=True):
        x = torch.randn(2, 5, 32)
        for drop_path in (block.drop_path1, block.drop_path2):
            drop_path.noise = torch.tensor([rate, rate - 1e-6])
            expected = x / (1 - rate) * torch.tensor([1.0, 0.0 if rate else 1.0])[:, None, None]
            torch.testing.assert_close(drop_path(x), expected)
    model(images)  # without noise it draws by itself again, as timm's
    assert model.blocks[1].drop_path1.noise is None
    torch.manual_seed(1)
    ours = model.blocks[2].drop_path1(x)
    torch.manual_seed(1)
    assert torch.equal(ours, timm.layers.drop_path(x, 0.6, training=True)) and model.drop_path_noise_size == 6
    assert ViTMAEForImageClassification(TINY, 7).drop_path_noise_size == 0


@pytest.mark.parametrize(
    ("name", "decay", "golden"),
    [
        ("mae_vit_base_patch16", 0.65, {"pos_embed": 0.003697, "blocks.0": 0.005688, "blocks.11": 0.65, "head": 1.0}),
        ("mae_vit_large_patch16", 0.75, {"pos_embed": 0.000753, "blocks.0": 0.001003, "fc_norm": 1.0}),
    ],
)
def test_layer_decay_groups_are_the_original_ones(name, decay, golden):
    with torch.device("meta"):
        model = ViTMAEForImageClassification(MODEL_CONFIGS[name], 1000)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=decay)
    by_parameter = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(by_parameter) == len(list(model.parameters()))
    depth = model.config.encoder_depth
    for key, parameter in model.named_parameters():
        if key in ("cls_token", "pos_embed") or key.startswith("patch_embed"):
            layer = 0
        else:
            layer = int(key.split(".")[1]) + 1 if key.startswith("blocks") else depth + 1
        group = by_parameter[id(parameter)]
        assert group["lr_scale"] == pytest.approx(decay ** (depth + 1 - layer))
        exempt = parameter.ndim == 1 or key in ("cls_token", "pos_embed")
        assert group["weight_decay"] == (0.0 if exempt else 0.05)
        for prefix, scale in golden.items():
            if key.startswith(f"{prefix}.") or key == prefix:
                assert group["lr_scale"] == pytest.approx(scale, abs=5e-7)


def test_layer_decay_of_the_cls_variant_leaves_the_final_norm_to_the_head():
    model = ViTMAEForImageClassification(TINY, 7, "cls")
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.norm.weight)] == scales[id(model.head.weight)] == 1.0
    assert scales[id(model.blocks[2].norm1.weight)] == 0.5 and scales[id(model.cls_token)] == 0.5**4


@pytest.mark.parametrize(
    ("blocks", "trained"),
    [
        (0, {"head", "fc_norm"}),
        (0.5, {"head", "fc_norm", "blocks.2.norm2", "blocks.2.mlp"}),
        (1, {"head", "fc_norm", "blocks.2"}),
        (2, {"head", "fc_norm", "blocks.2", "blocks.1"}),
        (3, {"head", "fc_norm", "blocks", "cls_token", "pos_embed", "patch_embed"}),
    ],
)
def test_trainable_blocks_are_the_last_ones(blocks, trained):
    model = dropped()
    model.set_trainable_blocks(blocks)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == any(key == name or key.startswith(f"{name}.") for name in trained)
    model.train()
    active = [drop.training for block in model.blocks[1:] for drop in (block.drop_path1, block.drop_path2)]
    assert active == [blocks >= 2, blocks >= 2, blocks >= 1, blocks >= 0.5]  # nothing is dropped in what is frozen


@pytest.mark.parametrize("blocks", [-1, 1.5, 4])
def test_blocks_that_do_not_exist_cannot_be_trained(blocks):
    with pytest.raises(ValueError, match=r"cannot be trained of 3; choose 0, 0\.5, or 1 to 3"):
        dropped().set_trainable_blocks(blocks)


def test_probe_head_is_a_batch_norm_without_weights_and_a_linear_layer():
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(TINY, 200, "cls", probe_head=True)
    new = {key for key in model.state_dict() if key.startswith("head")}
    assert new == {f"head.0.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")} | {
        "head.1.weight",
        "head.1.bias",
    }
    assert model.head[1].weight.std().item() == pytest.approx(0.01, rel=0.1) and model.num_classes == 200
    features = model.forward_pooled(torch.randn(16, 3, 16, 16))
    normalised = model.head[0](features)
    torch.testing.assert_close(normalised.mean(dim=0), torch.zeros(32), rtol=0, atol=1e-5)
    torch.testing.assert_close(normalised.var(dim=0, unbiased=False), torch.ones(32), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"), [({"global_pool": "max"}, "'avg' or 'cls'"), ({"num_classes": 0}, "at least 1")]
)
def test_classifier_refuses_what_it_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        ViTMAEForImageClassification(**{"config": TINY, "num_classes": 7, **changes})


def test_load_pretrained_encoder_takes_the_encoder_and_nothing_else(tmp_path):
    pretrained = random_model(TINY)
    write_checkpoint(tmp_path / "checkpoint_1", pretrained)
    for pool, missing in (("avg", {"fc_norm", "head"}), ("cls", {"head"})):
        model = ViTMAEForImageClassification(TINY, 7, pool)
        report = load_pretrained_encoder(model, tmp_path / "checkpoint_1")
        assert {key.split(".")[0] for key in report.missing} == missing and not report.resampled
        left_over = {key.split("_")[0].split(".")[0] for key in report.unexpected}
        assert left_over == {"decoder", "mask"} | ({"norm"} if pool == "avg" else set())
        assert all(torch.equal(model.state_dict()[key], pretrained.state_dict()[key]) for key in report.loaded)
        assert len(report.loaded) == 4 + 3 * 12 + (2 if pool == "cls" else 0)


def test_load_pretrained_encoder_resamples_positions_of_rectangles(tmp_path):
    pretrained = random_model(dataclasses.replace(TINY, img_size=(8, 24)))
    write_checkpoint(tmp_path / "checkpoint_1", pretrained)
    model = ViTMAEForImageClassification(TINY, 7)
    assert load_pretrained_encoder(model, tmp_path / "checkpoint_1").resampled == ["pos_embed"]
    assert torch.equal(model.pos_embed, resample_pos_embed(pretrained.pos_embed, (2, 6), (4, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.weight"), r"missing: blocks\.1\.attn\.qkv\.weight"),
        (lambda w: w.update({"extra": torch.zeros(1)}), "unexpected: extra"),
        (
            lambda w: w.update({"cls_token": torch.zeros(1, 1, 64)}),
            r"cls_token: \(1, 1, 64\) in the file, \(1, 1, 32\)",
        ),
        (lambda w: w.update({"pos_embed": torch.zeros(1, 12, 32)}), "pos_embed of 11 patches fits no grid"),
    ],
)
def test_load_pretrained_encoder_names_what_does_not_fit_and_touches_nothing(tmp_path, change, message):
    weights = {key: value.clone() for key, value in random_model(TINY).state_dict().items()}
    change(weights)
    torch.save({"model": weights}, tmp_path / "weights.pth")
    model = ViTMAEForImageClassification(TINY, 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained_encoder(model, tmp_path / "weights.pth")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_masked_autoencoder_takes_a_whole_one_and_resamples_both_tables(tmp_path):
    pretrained = random_model(TINY)
    write_checkpoint(tmp_path / "checkpoint_1", pretrained)
    model = ViTMAEForPreTraining(TINY)
    report = load_pretrained_encoder(model, tmp_path / "checkpoint_1")
    assert (report.missing, report.unexpected, report.adapted) == ([], [], "")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pretrained.parameters(), strict=True))
    larger = ViTMAEForPreTraining(dataclasses.replace(TINY, img_size=(24, 8)))
    assert load_pretrained_encoder(larger, tmp_path / "checkpoint_1").resampled == ["pos_embed", "decoder_pos_embed"]
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = resample_pos_embed(getattr(pretrained, name), (4, 4), (6, 2))
        assert torch.equal(getattr(larger, name), expected)


def test_masked_autoencoder_takes_an_encoder_and_keeps_a_fresh_decoder(tmp_path):
    encoder = VisionTransformer(TINY)
    torch.save({"model": encoder.state_dict()}, tmp_path / "encoder.pth")
    model = random_model(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_pretrained_encoder(model, tmp_path / "encoder.pth")
    assert {key.split("_")[0] for key in report.missing} == {"decoder", "mask"}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in report.missing)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in encoder.state_dict().items())
    fresh = "fresh (decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, mask_token)"
    assert fresh in report.describe() and report.describe().endswith(f"from {tmp_path / 'encoder.pth'}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder_norm.weight"), r"missing: decoder_norm\.weight"),  # half a decoder is a fault
        (lambda w: w.update({"decoder_blocks.9.norm1.bias": torch.zeros(16)}), r"unexpected: decoder_blocks\.9"),
        (lambda w: w.pop("norm.weight"), r"missing: norm\.weight"),
    ],
)
def test_masked_autoencoder_refuses_what_is_neither_whole_nor_an_encoder(tmp_path, change, message):
    weights = {key: value.clone() for key, value in random_model(TINY).state_dict().items()}
    change(weights)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        load_pretrained_encoder(ViTMAEForPreTraining(TINY), tmp_path / "weights.pth")


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_weights_of_three_channels_see_repeated_channels_as_before(tmp_path, channels):
    """A grey image, given once or more often, gets the features that it had as three equal channels."""
    pretrained = random_model(TINY)
    write_checkpoint(tmp_path / "checkpoint_1", pretrained)
    model = ViTMAEForPreTraining(dataclasses.replace(TINY, input_channels=channels)).eval()
    report = load_pretrained_encoder(model, tmp_path / "checkpoint_1")
    assert f"first layer adapted from 3 channels to {channels}" in report.describe()
    assert report.missing == report.unexpected == ["decoder_pred.bias", "decoder_pred.weight"]
    if channels == 2:  # which take turns: the third channel's weights are in neither
        weight = 1.5 * pretrained.patch_embed.proj.weight[:, :2]
        torch.testing.assert_close(model.patch_embed.proj.weight, weight)
        return
    grey = torch.randn(2, 1, 16, 16)
    found, expected = (m.forward_features(grey.expand(-1, c, -1, -1)) for m, c in ((model, channels), (pretrained, 3)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_weights_of_other_channels_than_three_are_refused(tmp_path):
    write_checkpoint(tmp_path / "checkpoint_1", random_model(dataclasses.replace(TINY, input_channels=4)))
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.weight: \(32, 4, 4, 4\) in the file, \(32, 3, 4, 4\)"):
        load_pretrained_encoder(VisionTransformer(TINY), tmp_path / "checkpoint_1")


# -------------------------------------------------------------------------------- weight files


def write_checkpoint(folder, model):
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"config": dataclasses.asdict(model.config)}))


def test_load_pretrained_mae_takes_sizes_from_the_folder(tmp_path):
    model = random_model(dataclasses.replace(TINY, img_size=(8, 20), input_channels=1))
    write_checkpoint(tmp_path / "checkpoint_1", model)
    for path in (tmp_path / "checkpoint_1", tmp_path / "checkpoint_1" / "model.safetensors"):
        loaded = load_pretrained_mae(path)
        assert loaded.config == model.config
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_load_pretrained_mae_infers_the_size_of_an_original_file(tmp_path):
    config = MODEL_CONFIGS["mae_vit_tiny_patch16"]
    model = random_model(config)
    content = {"model": model.state_dict(), "args": argparse.Namespace(lr=1.0), "epoch": 3}
    torch.save(content, tmp_path / "full.pth")
    loaded = load_pretrained_mae(tmp_path / "full.pth", norm_pix_loss=False)
    assert loaded.config == dataclasses.replace(config, norm_pix_loss=False)
    assert torch.equal(loaded.decoder_pred.weight, model.decoder_pred.weight)


@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"])
def test_sizes_are_inferred_from_files_of_the_original_release(name):
    config = MODEL_CONFIGS[name]
    with torch.device("meta"):
        full = ViTMAEForPreTraining(config).state_dict()
        finetuned = ViTMAEForImageClassification(config, 1000).state_dict()
    encoder = {key: value for key, value in full.items() if not key.startswith(("decoder", "mask"))}
    assert all(infer_config(tensors, "a.pth") == config for tensors in (full, encoder, finetuned))


def test_sizes_that_shapes_do_not_tell_are_refused():
    with pytest.raises(ValueError, match=r"are 32 wide, have no config\.json .* fit none of mae_vit_tiny"):
        infer_config(random_model(TINY).state_dict(), "a.pth")
    with pytest.raises(ValueError, match=r"'patch_embed\.proj\.weight' is not among these weights.*\['other'\]"):
        infer_config({"other": torch.zeros(1)}, "a.pth")


@pytest.mark.parametrize(("pool", "probe_head"), [("avg", False), ("cls", False), ("cls", True)])
def test_load_classifier_gives_back_what_was_written(tmp_path, pool, probe_head):
    model = ViTMAEForImageClassification(TINY, 7, pool, probe_head=probe_head)
    write_checkpoint(tmp_path / "best_checkpoint", model)
    loaded, record = load_classifier(tmp_path / "best_checkpoint")
    assert loaded.global_pool == pool and record["config"] == dataclasses.asdict(TINY)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_load_classifier_reads_a_file_of_the_original_finetuned_release(tmp_path):
    model = ViTMAEForImageClassification(MODEL_CONFIGS["mae_vit_tiny_patch16"], 10)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "mae_finetuned.pth")
    loaded, record = load_classifier(tmp_path / "mae_finetuned.pth")
    assert torch.equal(loaded.head.weight, model.head.weight) and "class_names" not in record


def test_load_classifier_refuses_what_is_none(tmp_path):
    write_checkpoint(tmp_path / "checkpoint_1", random_model(TINY))
    with pytest.raises(ValueError, match=r"holds no classifier \(no head\.weight\)"):
        load_classifier(tmp_path / "checkpoint_1")
    write_checkpoint(tmp_path / "damaged", ViTMAEForImageClassification(TINY, 7))
    state_dict = load_file(tmp_path / "damaged" / "model.safetensors")
    state_dict.pop("blocks.1.norm1.weight")
    save_file(state_dict, tmp_path / "damaged" / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)does not fit a classifier.*blocks\.1\.norm1\.weight"):
        load_classifier(tmp_path / "damaged")


def test_load_pretrained_mae_refuses_an_encoder_only_file(tmp_path):
    encoder = VisionTransformer(TINY).state_dict()
    torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit.pth")
    with pytest.raises(ValueError, match=r"encoder only.*mae_visualize_vit_\*\.pth"):
        load_pretrained_mae(tmp_path / "mae_pretrain_vit.pth")


def test_load_pretrained_mae_says_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load_pretrained_mae(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint folder or weight file"):
        load_pretrained_mae(tmp_path / "nowhere")


def test_load_pretrained_mae_refuses_other_key_names(tmp_path):
    torch.save(to_transformers(random_model(TINY).state_dict()), tmp_path / "theirs.pth")
    with pytest.raises(ValueError, match=r"other key names than the original release, such as \['decoder\."):
        load_pretrained_mae(tmp_path / "theirs.pth")


# -------------------------------------------------------------------------------- segmenter


def random_segmenter(**options) -> ViTMAEForSegmentation:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_depth=4)
    return ViTMAEForSegmentation(config, 5, **options).eval()


def test_segmenter_scores_images_of_any_size():
    model = random_segmenter(channels=32)
    for h, w in ((4, 4), (6, 2)):
        logits, auxiliary = model(torch.randn(2, 3, 4 * h, 4 * w))
        assert logits.shape == (2, 5, 4 * h, 4 * w) and auxiliary.shape == (2, 5, h, w)
    assert {key.split(".")[0] for key in model.state_dict()} == {"backbone", "neck", "decode_head", "auxiliary_head"}


@pytest.mark.parametrize(("depth", "taps"), [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 2, 3])])
def test_taps_scale_with_the_depth(depth, taps):
    assert default_taps(depth) == taps


def test_taps_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="an encoder of 3 blocks has no four taps"):
        ViTMAEForSegmentation(TINY, 5)
    with pytest.raises(ValueError, match=r"taps must be four blocks within 0\.\.3, not \[0, 1, 2, 4\]"):
        random_segmenter(taps=[0, 1, 2, 4])


def test_maps_keep_the_order_of_the_grid():
    """A patch that differs from all others stands out at its own place in every map."""
    model = random_segmenter()
    for block in model.backbone.blocks:  # without attention, a token sees itself alone
        torch.nn.init.zeros_(block.attn.proj.weight)
    plain, marked = torch.zeros(1, 3, 16, 24), torch.zeros(1, 3, 16, 24)
    marked[:, :, 8:12, 20:24] = 1  # row 2, column 5 of a grid of 4 x 6
    seen = []
    model.neck.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(plain), model(marked)
    for a, b in zip(*seen, strict=True):
        changed = (a - b).abs().amax(dim=1)[0] > 1e-6
        assert changed.nonzero().tolist() == [[2, 5]]


def test_zero_relative_positions_equal_the_plain_encoder():
    plain, biased = random_segmenter(), random_segmenter(rel_pos_bias=True)
    missing = biased.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing == [f"backbone.blocks.{i}.attn.relative_position_bias_table" for i in range(4)]
    for images in (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 24, 8)):
        torch.testing.assert_close(biased(images).logits, plain(images).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 4), (4, 4)])
def test_relative_position_index_by_hand(grid):
    """Row (dy + h - 1) * (2w - 1) + dx + w - 1 for a query dy below and dx right of a key; three more for cls."""
    (h, w), index = grid, random_segmenter(rel_pos_bias=True).backbone.relative_index(grid, torch.device("cpu"))
    size = (2 * h - 1) * (2 * w - 1)
    assert index.shape == (1 + h * w, 1 + h * w) and index.dtype == torch.int64
    assert index[0].tolist() == [size + 2] + [size] * (h * w) and index[1:, 0].unique().tolist() == [size + 1]
    for query in range(h * w):
        for key in range(h * w):
            down, right = query // w - key // w, query % w - key % w
            assert index[1 + query, 1 + key] == (down + h - 1) * (2 * w - 1) + right + w - 1


def test_relative_positions_act():
    model = random_segmenter(rel_pos_bias=True)
    images = torch.randn(1, 3, 16, 16)
    before = model(images).logits
    torch.nn.init.normal_(model.backbone.blocks[0].attn.relative_position_bias_table)
    assert not torch.allclose(model(images).logits, before)


def test_relative_positions_are_resampled_as_positions_are():
    table = torch.randn(7 * 7 + 3, 2)
    assert resample_relative_positions(table, (4, 4), (4, 4)) is table
    for grid in ((7, 4), (6, 6), (2, 3)):
        resampled = resample_relative_positions(table, (4, 4), grid)
        size = [2 * side - 1 for side in grid]
        theirs = resample_abs_pos_embed(table[None, :-3], size, [7, 7], 0, antialias=False)
        torch.testing.assert_close(resampled, torch.cat([theirs[0], table[-3:]]))


def test_segmenter_decays_by_depth_and_spares_positions():
    model = random_segmenter(rel_pos_bias=True)
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.65)
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        if key.startswith("backbone.blocks"):
            layer = int(key.split(".")[2]) + 1
        else:
            layer = 0 if key.startswith("backbone") else 5
        assert found[id(parameter)]["lr_scale"] == pytest.approx(0.65 ** (5 - layer))
        spared = parameter.ndim == 1 or key.endswith(("cls_token", "pos_embed", "bias_table"))
        assert found[id(parameter)]["weight_decay"] == (0.0 if spared else 0.05)


def test_what_a_segmenter_drops_follows_the_noise_of_each_sample():
    """In float64, because group norm over the few values of a pooled map enlarges rounding."""
    model = random_segmenter(norm="group", channels=64, drop_path_rate=0.5).double()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    images, noise = torch.randn(4, 3, 16, 16).double(), torch.rand(4, model.noise_size)
    assert model.noise_size == 2 * 4 + 64 + 256
    model.train()
    together = model(images, noise)
    alone = [model(images[i : i + 1], noise[i : i + 1]) for i in range(4)]
    for index in range(2):  # logits, auxiliary
        torch.testing.assert_close(torch.cat([out[index] for out in alone]), together[index])
    changed = noise.clone()
    changed[:, 8:72] = noise[:, 8:72].flip(1)  # the head's dropout alone
    again = model(images, changed)
    assert torch.equal(again.auxiliary, together.auxiliary) and not torch.equal(again.logits, together.logits)
    torch.testing.assert_close(model.eval()(images, noise).logits, model(images).logits)


def test_load_pretrained_encoder_fills_a_segmenter(tmp_path):
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_depth=4)
    pretrained = ViTMAEForPreTraining(config)
    write_checkpoint(tmp_path / "checkpoint_1", pretrained)
    model = ViTMAEForSegmentation(dataclasses.replace(config, img_size=32), 5, rel_pos_bias=True)
    report = load_pretrained_encoder(model.backbone, tmp_path / "checkpoint_1")
    assert report.resampled == ["pos_embed"] and all(key.endswith("bias_table") for key in report.missing)
    assert torch.equal(model.backbone.blocks[3].mlp.fc2.weight, pretrained.blocks[3].mlp.fc2.weight)


def test_a_classifier_may_become_a_segmenters_backbone_and_a_segmenter_may_not(tmp_path):
    config = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_depth=4, encoder_num_heads=2)
    for name, source in (
        ("classifier", ViTMAEForImageClassification(config, 5)),
        ("segmenter", ViTMAEForSegmentation(config, 5, channels=48)),
    ):
        (tmp_path / name).mkdir()
        save_file(source.state_dict(), tmp_path / name / "model.safetensors")
        record = {"config": dataclasses.asdict(config)}
        (tmp_path / name / "config.json").write_text(json.dumps(record))
    model = ViTMAEForSegmentation(config, 7, channels=48)
    report = load_pretrained_encoder(model.backbone, tmp_path / "classifier")
    assert {key.split(".")[0] for key in report.unexpected} == {"head", "fc_norm"} and report.missing == []
    with pytest.raises(ValueError, match=r"is a segmenter.*convert_weights\.py .* --to original --drop$"):
        load_pretrained_encoder(model.backbone, tmp_path / "segmenter")


def test_layer_scale_is_beits_in_logits_and_in_an_optimizer_step():
    """MMSegmentation's MAE has BEiT's blocks: against transformers' own, with the same weights under the same heads."""
    torch.manual_seed(0)
    model = random_segmenter(rel_pos_bias=True, layer_scale=True, channels=16).double()
    encoder, config = model.backbone, model.backbone.config
    theirs = transformers.BeitModel(
        transformers.BeitConfig(
            hidden_size=config.encoder_embed_dim,
            num_hidden_layers=config.encoder_depth,
            num_attention_heads=config.encoder_num_heads,
            intermediate_size=int(config.encoder_embed_dim * config.encoder_mlp_ratio),
            image_size=config.img_size,
            patch_size=config.patch_size,
            layer_norm_eps=1e-6,
            use_relative_position_bias=True,
            use_absolute_position_embeddings=True,
            layer_scale_init_value=1.0,
            drop_path_rate=0.0,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).double()
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    leaves = ("weight", "bias")
    names |= {f"patch_embed.proj.{leaf}": f"embeddings.patch_embeddings.projection.{leaf}" for leaf in leaves}
    pairs = dict(norm1="layernorm_before", norm2="layernorm_after")
    pairs |= {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for layer in range(config.encoder_depth):
        our, their = f"blocks.{layer}.", f"layers.{layer}."
        names |= {f"{our}{a}.{leaf}": f"{their}{b}.{leaf}" for a, b in pairs.items() for leaf in leaves}
        names |= {f"{our}ls{number}.gamma": f"{their}lambda_{number}" for number in (1, 2)}
        table = "relative_position_bias_table"
        names[f"{our}attn.{table}"] = f"{their}relative_position_bias.{table}"
    ours, own = dict(encoder.named_parameters()), dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.items():
            if "gamma" in name or "relative" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            if "qkv.bias" in name:
                parameter.chunk(3)[1].zero_()  # BEiT's keys have no bias
        for name, their_name in names.items():
            own[their_name].copy_(ours[name])
        for layer in range(config.encoder_depth):
            for part, part_name in enumerate("qkv"):
                for leaf in leaves:
                    target = own.get(f"layers.{layer}.attention.{part_name}_proj.{leaf}")
                    if target is not None:
                        target.copy_(ours[f"blocks.{layer}.attn.qkv.{leaf}"].chunk(3)[part])
    images = torch.randn(2, 3, *config.image_hw, dtype=torch.float64)

    def run_theirs() -> list[torch.Tensor]:
        states = theirs(images, output_hidden_states=True).hidden_states[1:]
        return [states[tap][:, 1:].transpose(1, 2).unflatten(2, config.grid_size) for tap in model.taps]

    model.eval(), theirs.eval()
    expected = model.decode_head(model.neck(run_theirs()))
    torch.testing.assert_close(model(images).logits, expected)

    answers = encoder.get_intermediate_layers(images, model.taps)
    for maps, parameters in ((answers, ours), (run_theirs(), own)):
        sum(part.square().mean() + part.mean() for part in maps).backward()
        trained = [p for p in parameters.values() if p.grad is not None]
        torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05, eps=1e-5).step()  # 1e-8 makes steps of rounding
    for name, their_name in names.items():
        torch.testing.assert_close(ours[name].grad, own[their_name].grad)
        torch.testing.assert_close(ours[name], own[their_name], rtol=0, atol=1e-7)  # of steps of 1e-3
    assert all((ours[f"blocks.{layer}.ls1.gamma"].grad != 0).any() for layer in range(config.encoder_depth))


def test_blocks_behind_the_last_tap_are_not_trained():
    """Two processes would wait for their gradients."""
    model = ViTMAEForSegmentation(dataclasses.replace(TINY, encoder_depth=5), 4, taps=[0, 1, 2, 3], channels=48)
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad and ".blocks." in name}
    assert trained == {"0", "1", "2", "3"}
    output = model.eval()(torch.randn(1, 3, 16, 16))
    (output.logits.sum() + output.auxiliary.sum()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("more", [{}, {"layer_scale": True}])
def test_load_segmenter_gives_back_what_was_written_and_refuses_the_rest(more, tmp_path):
    options = dict(taps=[0, 1, 2, 3], channels=32, norm="batch", rel_pos_bias=True) | more
    model = random_segmenter(**options)
    folder = tmp_path / "best_checkpoint"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    record = {"architecture": "ViTMAEForSegmentation", "config": dataclasses.asdict(model.backbone.config)}
    record |= {"num_classes": 5, "ignore_zero": False, "resize_to": [64, 16], "class_names": list("abcde"), **options}
    (folder / "config.json").write_text(json.dumps(record))
    loaded, _ = load_segmenter(folder)
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(loaded.eval()(images).logits, model(images).logits)
    write_checkpoint(tmp_path / "checkpoint_1", random_model(TINY))
    with pytest.raises(ValueError, match="holds no segmenter"):
        load_segmenter(tmp_path / "checkpoint_1")
    del record["taps"], record["class_names"]
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"config\.json lacks taps, class_names; give the checkpoint folder as the"):
        load_segmenter(folder)


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("encoder_num_heads", load_pretrained_mae),
        ("decoder_num_heads", load_pretrained_mae),
        ("norm_pix_loss", load_pretrained_mae),
        ("encoder_num_heads", load_classifier),
        ("encoder_mlp_ratio", load_classifier),
    ],
)
def test_sizes_that_config_json_lacks_are_named_and_no_default_stands_for_them(name, load, tmp_path):
    is_mae = load is load_pretrained_mae
    model = random_model(TINY) if is_mae else ViTMAEForImageClassification(TINY, 3)
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    sizes = TINY.as_record(decoder=is_mae)
    del sizes[name]
    (folder / "config.json").write_text(json.dumps({"config": sizes}))
    with pytest.raises(ValueError, match=rf"config\.json lacks {name}; give the checkpoint folder"):
        load(folder)


def test_patches_without_data_count_as_predicted_without_error():
    model = ViTMAEForPreTraining(TINY).eval()
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    plain = model(images, 0.75, noise)
    assert torch.equal(model(images, 0.75, noise, valid=torch.ones(2, 16)).loss, plain.loss)
    errors = [model.forward_loss(images, plain.pred, torch.eye(16)[[i, i]]) * 2 for i in range(16)]  # of both images
    valid = (torch.arange(16) % 3 > 0).float().expand(2, 16)
    mask = torch.ones(2, 16)
    expected = sum(error for i, error in enumerate(errors) if i % 3) / 32
    assert model.forward_loss(images, plain.pred, mask, valid).item() == pytest.approx(expected.item(), rel=1e-5)
    other = images.clone()
    other[:, :, :4, :4] = 9.0  # a patch that is not valid: its pixels are no target
    assert model.forward_loss(other, plain.pred, mask, valid).item() == pytest.approx(expected.item(), rel=1e-5)
