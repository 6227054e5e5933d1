"""What is compared: this project's networks and others' of the same sizes, each of which gives its loss."""

import dataclasses
import importlib
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, nn

from model import MAEConfig, SegmentationOutput, ViTMAEForPreTraining, ViTMAEForSegmentation, num_kept_patches
from storage.pairs import IGNORE_INDEX
from upernet import resize, resized_cross_entropy

# ------------------------------------------------------------------------------------------------ pretraining


def build_ours(config: MAEConfig, mask_ratio: float, *, predict_visible: bool = False) -> nn.Module:
    class Loss(ViTMAEForPreTraining):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images, mask_ratio, predict_visible=predict_visible).loss

    return Loss(config)


def build_transformers(config: MAEConfig, mask_ratio: float) -> nn.Module:
    import transformers

    sizes = transformers.ViTMAEConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_channels=config.input_channels,
        hidden_size=config.encoder_embed_dim,
        num_hidden_layers=config.encoder_depth,
        num_attention_heads=config.encoder_num_heads,
        intermediate_size=int(config.encoder_embed_dim * config.encoder_mlp_ratio),
        decoder_hidden_size=config.decoder_embed_dim,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_num_heads,
        decoder_intermediate_size=int(config.decoder_embed_dim * config.decoder_mlp_ratio),
        mask_ratio=mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
    )

    class Loss(transformers.ViTMAEForPreTraining):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).loss

    return Loss(sizes)


def build_lightly(config: MAEConfig, mask_ratio: float) -> nn.Module:
    """Put lightly's parts together as its documentation does: only removed patches are predicted, as plain pixels."""
    from lightly.models import modules, utils

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            width, decoder_width = config.encoder_embed_dim, config.decoder_embed_dim
            sizes = dict(embed_dim=width, depth=config.encoder_depth, num_heads=config.encoder_num_heads)
            vit = vision_transformer.VisionTransformer(config.image_hw, config.patch_size, num_classes=0, **sizes)
            self.encoder = modules.MaskedVisionTransformerTIMM(vit)
            self.embed = nn.Linear(width, decoder_width)
            self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
                config.num_patches, decoder_width, config.decoder_depth, config.decoder_num_heads
            )
            self.predict = nn.Linear(decoder_width, config.patch_dim)

        def forward(self, images: Tensor) -> Tensor:
            size = len(images), self.encoder.sequence_length
            keep, removed = utils.random_token_mask(size, mask_ratio, device=images.device)
            x = self.embed(self.encoder.encode(images, idx_keep=keep))
            tokens = utils.repeat_token(self.decoder.mask_token, size)
            tokens = utils.set_at_index(tokens, keep, x.type_as(tokens))
            pred = self.predict(utils.get_at_index(self.decoder(tokens), removed))
            target = utils.get_at_index(utils.patchify(images, config.patch_size), removed - 1)
            return F.mse_loss(pred, target)

    return Loss()


def build_original(config: MAEConfig, mask_ratio: float, *, checkout: Path) -> nn.Module:
    """Build the network of a checkout of facebookresearch/mae; it is for timm 0.3.2, here it gets today's blocks."""

    class Block(vision_transformer.Block):
        def __init__(self, *args, qk_scale: None = None, **options):  # which timm no longer has
            super().__init__(*args, **options)

    sys.path.append(str(checkout))
    with mock.patch.object(vision_transformer, "Block", Block):
        models_mae = importlib.import_module("models_mae")

    class Loss(models_mae.MaskedAutoencoderViT):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images, mask_ratio)[0]

    sizes = {  # without "encoder_", and three others by their names there
        name.removeprefix("encoder_"): value
        for name, value in config.as_record(decoder=True).items()
        if name not in ("input_channels", "encoder_mlp_ratio", "decoder_mlp_ratio")
    }
    with mock.patch.object(np, "float", float, create=True):  # which numpy no longer has
        return Loss(in_chans=config.input_channels, mlp_ratio=config.encoder_mlp_ratio, **sizes)


def build_full_encoder(config: MAEConfig, mask_ratio: float) -> nn.Module:
    """What masking saves: an encoder that sees every position, removed ones as a mask token (paper, table 1c)."""
    return build_ours(dataclasses.replace(config, encode_mask_tokens=True), mask_ratio, predict_visible=True)


def training_flops(config: MAEConfig, mask_ratio: float) -> float:
    """Count the FLOPs of the matrix products of one image, forwards and backwards (twice the forward's)."""

    def blocks(depth: int, tokens: int, width: int, mlp_ratio: float) -> float:
        return depth * (2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width)

    kept, patches = num_kept_patches(config.num_patches, mask_ratio), config.num_patches
    width, decoder_width = config.encoder_embed_dim, config.decoder_embed_dim
    forward = 2 * kept * config.patch_dim * width
    forward += blocks(config.encoder_depth, kept + 1, width, config.encoder_mlp_ratio)
    forward += 2 * (kept + 1) * width * decoder_width
    forward += blocks(config.decoder_depth, patches + 1, decoder_width, config.decoder_mlp_ratio)
    forward += 2 * patches * decoder_width * config.patch_dim
    return 3 * forward


# ------------------------------------------------------------------------------------------------ segmentation


class Segmenter(ViTMAEForSegmentation):
    """This project's segmenter, with the loss that training computes."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        maps = self.backbone.get_intermediate_layers(images, self.taps)
        logits, auxiliary = self.decode_head(self.neck(maps)), self.auxiliary_head(maps[2])
        losses = [
            resized_cross_entropy(scores, labels, IGNORE_INDEX) / labels.numel() for scores in (logits, auxiliary)
        ]
        return losses[0] + 0.4 * losses[1]


class TransformersSegmenter(ViTMAEForSegmentation):
    """This project's encoder and neck under transformers' heads, with torch's loss of the scores at full size."""

    def __init__(self, config: MAEConfig, num_classes: int, channels: int | None = None):
        import transformers
        from transformers.models.upernet import modeling_upernet

        super().__init__(config, num_classes)
        width = config.encoder_embed_dim
        heads = transformers.UperNetConfig(
            backbone_config=transformers.ResNetConfig(),
            hidden_size=channels or width,
            num_labels=num_classes,
            auxiliary_channels=256,
            auxiliary_in_channels=width,
        )
        self.decode_head = modeling_upernet.UperNetHead(heads, [width] * 4)
        self.auxiliary_head = modeling_upernet.UperNetFCNHead(heads, [width] * 4)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | SegmentationOutput:
        """Give the loss, or without labels the scores, for which nobody needs the auxiliary head."""
        maps = self.backbone.get_intermediate_layers(images, self.taps)
        logits = self.decode_head(self.neck(maps))
        if labels is None:
            return SegmentationOutput(logits, None)
        auxiliary = self.auxiliary_head(maps)  # which looks at the third
        resized = [resize(scores.float(), size=labels.shape[-2:]) for scores in (logits, auxiliary)]
        losses = [F.cross_entropy(scores, labels, ignore_index=IGNORE_INDEX, reduction="sum") for scores in resized]
        return (losses[0] + 0.4 * losses[1]) / labels.numel()
