"""Sizes of networks, names of checkpoints. Nothing here imports torch."""

import argparse
import dataclasses
from dataclasses import dataclass

ADE20K_NUM_CLASSES = 150
BEST_CHECKPOINT, LAST_CHECKPOINT = "best_checkpoint", "last_checkpoint"  # weights alone, and a link to the newest state


VARIANTS = ("pca_target", "encode_mask_tokens")  # fields of MAEConfig that are off in the paper's default


@dataclass(frozen=True)
class MAEConfig:
    """Give the sizes of a masked autoencoder; the defaults are ViT-B/16 with the decoder of the paper's table 1.

    `img_size` is one number, or (height, width). A size that cannot be built raises ValueError.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    input_channels: int = 3
    encoder_embed_dim: int = 768
    encoder_depth: int = 12
    encoder_num_heads: int = 12
    encoder_mlp_ratio: float = 4.0
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    decoder_mlp_ratio: float = 4.0
    norm_pix_loss: bool = True
    pca_target: int = 0  # predict so many principal components of a patch instead of its pixels (table 1d)
    encode_mask_tokens: bool = False  # the encoder sees removed patches too, as mask tokens (table 1c)

    def __post_init__(self):
        if not isinstance(self.img_size, int):
            if len(self.img_size) != 2:
                raise ValueError(f"img_size takes one number or (height, width), not {self.img_size!r}")
            height, width = (int(side) for side in self.img_size)
            object.__setattr__(self, "img_size", height if height == width else (height, width))
        for name in ("patch_size", "input_channels", "encoder_depth", "decoder_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for side in self.image_hw:
            if side < 1 or side % self.patch_size:
                below = side // self.patch_size * self.patch_size
                choices = " or ".join(str(s) for s in (below, below + self.patch_size) if s > 0)
                raise ValueError(f"img_size {side} is not a multiple of patch_size {self.patch_size}; use {choices}")
        for part in ("encoder", "decoder"):
            dim, heads = getattr(self, f"{part}_embed_dim"), getattr(self, f"{part}_num_heads")
            if heads < 1 or dim < 1 or dim % heads:
                raise ValueError(f"{part}_embed_dim {dim} is not a multiple of {part}_num_heads {heads}")
            if dim % 4:  # two axes, a sine and a cosine each
                raise ValueError(f"{part}_embed_dim {dim} is not a multiple of 4, as 2-D sin-cos positions need")
        if self.norm_pix_loss and self.patch_dim < 2:
            raise ValueError("norm_pix_loss needs at least two values in a patch; a 1x1 patch of one channel has one")
        if not 0 <= self.pca_target <= self.patch_dim or (self.pca_target and self.norm_pix_loss):
            raise ValueError(
                f"pca_target must lie in 0..{self.patch_dim}, the values of a patch, and excludes norm_pix_loss; "
                f"not {self.pca_target}"
            )

    @classmethod
    def from_flags(cls, args: argparse.Namespace, base: "MAEConfig | None" = None) -> "MAEConfig":
        """Build the sizes that were given as flags, which are named like the fields; the rest is as in `base`."""
        names = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in vars(args).items() if name in names and value is not None}
        return dataclasses.replace(base or cls(), **given)

    def as_record(self, *, decoder: bool) -> dict:
        """Give the sizes as config.json holds them; what has no decoder leaves out the decoder's.

        Variants that the paper only studies are left out where they are not used.
        """
        sizes = {name: value for name, value in dataclasses.asdict(self).items() if value or name not in VARIANTS}
        return sizes if decoder else without_decoder(sizes)

    @property
    def image_hw(self) -> tuple[int, int]:
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid_size(self) -> tuple[int, int]:
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def patch_dim(self) -> int:
        return self.patch_size**2 * self.input_channels


def without_decoder(sizes: dict) -> dict:
    """Leave out the fields of MAEConfig that only pretraining needs."""
    return {name: value for name, value in sizes.items() if not name.startswith(("decoder", "norm_pix", *VARIANTS))}


# B, L and H are the paper's, with its one decoder for all. Tiny and small are ViT-Ti and ViT-S of DeiT.
# Deviation: their decoders, sizes that the original release does not have, are narrow and shallow. Reason: the paper's
# finetuned accuracy hardly depends on either (tables 1a, 1b). Effect: cheaper steps; accuracy not measured.
MODEL_CONFIGS = {
    "mae_vit_tiny_patch16": MAEConfig(
        encoder_embed_dim=192, encoder_num_heads=3, decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4
    ),
    "mae_vit_small_patch16": MAEConfig(
        encoder_embed_dim=384, encoder_num_heads=6, decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8
    ),
    "mae_vit_base_patch16": MAEConfig(),
    "mae_vit_large_patch16": MAEConfig(encoder_embed_dim=1024, encoder_depth=24, encoder_num_heads=16),
    "mae_vit_huge_patch14": MAEConfig(patch_size=14, encoder_embed_dim=1280, encoder_depth=32, encoder_num_heads=16),
}


MASKINGS = ("random", "block", "grid")


def check_masking(masking: str, config: MAEConfig, mask_ratio: float) -> None:
    """Refuse a ratio or a grid that a masking (paper, table 1f) cannot have; ValueError."""
    num_kept_patches(config.num_patches, mask_ratio)
    h, w = config.grid_size
    if masking == "grid" and mask_ratio != 0.75:
        raise ValueError(f"--masking grid keeps one of every four patches: --mask_ratio is 0.75, not {mask_ratio:g}")
    if masking == "grid" and (h % 2 or w % 2):
        even = 2 * config.patch_size
        raise ValueError(f"--masking grid needs an even grid, not {h} x {w} patches: an --img_size that {even} divides")
    if masking == "block" and min(h, w) < 2:
        raise ValueError(f"--masking block needs two rows and two columns of patches at least, not {h} x {w}")


def num_kept_patches(num_patches: int, mask_ratio: float) -> int:
    """Count the patches that stay, truncated as in the original release: 0.9 of 196 keeps 19."""
    kept = int(num_patches * (1 - mask_ratio))
    if not 0 <= mask_ratio < 1 or kept < 1:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps {max(kept, 0)} of {num_patches} patches; it must lie in [0, 1) and keep one"
        )
    return kept
