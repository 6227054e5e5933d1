"""The networks: the ViT encoder, once, and on top of it the masked autoencoder, the classifier and the segmenter.

Masking, decoder, pixel loss, initialisation and loading live here; layers come from timm. Sizes lie in
storage/sizes.py, weight files are read in storage/weights.py, images become tensors in dataset.py. State-dict keys are
those of the original release, so that its files, and timm's, load by name.

Shapes   N batch   L patches   D width   P patch size   C channels   H W image   h w patch grid   K classes
Masks    1 = removed, 0 = kept
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerScale, PatchEmbed, gen_relative_position_index
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from storage.files import refuse_missing
from storage.layouts import BIAS_TABLE
from storage.sizes import MODEL_CONFIGS, MAEConfig, num_kept_patches
from storage.weights import (
    OF_DECODER,
    PREDICTION,
    LoadReport,
    adapt_channels,
    convert_command,
    find_weights,
    match_tensors,
    read_config,
    read_weights,
    refuse_as_encoder,
    sizes_from_shapes,
)
from upernet import FCNHead, Feature2Pyramid, UperNetHead

LAYER_NORM_EPS = 1e-6
NORM_PIX_EPS = 1e-6
PCA_PATCHES = 50_176  # of which principal components are found: those of 256 images of ViT-B/16


# ------------------------------------------------------------------------------------------------ positions


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: tuple[int, int], cls_token: bool = True) -> Tensor:
    """Give the fixed 2-D sine-cosine position table, (1 + h*w, embed_dim), float32.

    The first half of the width encodes the column, the second the row; within a half all sines come first, then
    all cosines, at frequencies 10000^(-i / (embed_dim/4)). The cls row is zero. Computed in float64.
    """
    rows, columns = np.meshgrid(np.arange(grid_size[0]), np.arange(grid_size[1]), indexing="ij")
    omega = 10000.0 ** (-np.arange(embed_dim // 4) / (embed_dim / 4))
    angles = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]  # two of (h*w, embed_dim/4)
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, embed_dim)), table])
    return torch.from_numpy(table).float()


def resample_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample a (1, 1 + h*w, D) position table to another grid, the cls row unchanged.

    Bicubic, not antialiased, corners not aligned: the original release's rule, here for rectangles too. (timm's
    function antialiases by default, and older versions of it take a 2x8 grid for a 4x4 one.)
    """
    if new_grid == old_grid:
        return pos_embed
    cls_row, table = pos_embed[:, :1], pos_embed[:, 1:]  #                  (1, 1, D), (1, h*w, D)
    maps = table.float().transpose(1, 2).unflatten(2, old_grid)  #          (1, D, h, w)
    maps = F.interpolate(maps, new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls_row, maps.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


# ------------------------------------------------------------------------------------------------ encoder


class SampleDropPath(DropPath):
    """timm's drop path, whose draws can be handed in: sample i is dropped where `noise[i]` is below the rate.

    Draws that come with the samples do not depend on how a batch is spread over processes and forward passes.
    """

    noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.noise is None or not self.training:
            return super().forward(x)
        keep = (self.noise >= self.drop_prob).to(x.dtype) / (1 - self.drop_prob)  # (N,)
        return x * keep.view(-1, *[1] * (x.ndim - 1))


class Block(vision_transformer.Block):
    """timm's pre-norm block, which can leave out the MLP of tokens that nothing asks for afterwards."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, only: Tensor | None = None) -> Tensor:
        """Give all tokens, (N, l, D) -> (N, l, D), or those at the indices `only` (N, m): (N, l, D) -> (N, m, D)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        if only is not None:
            x = take_tokens(x, only)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def take_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Gather tokens, each image its own: (N, l, D) and indices (N, m) -> (N, m, D)."""
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def build_blocks(dim: int, depth: int, num_heads: int, mlp_ratio: float, drop_path_rate: float = 0.0) -> nn.ModuleList:
    """Build pre-norm transformer blocks; the drop-path rate rises linearly from 0 to `drop_path_rate`."""
    rates = [drop_path_rate * index / max(1, depth - 1) for index in range(depth)]
    norm_layer = functools.partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
    blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in rates)
    for block, rate in zip(blocks, rates, strict=True):
        if rate > 0:
            block.drop_path1, block.drop_path2 = SampleDropPath(rate), SampleDropPath(rate)
    return blocks


def resample_relative_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample a ((2h-1)*(2w-1) + 3, heads) table to another grid, bicubic; the last three rows stay.

    These three are for cls to patch, patch to cls, and cls to cls. (timm's function mishandles rectangles.)
    """
    if new_grid == old_grid:
        return table
    old, new = ((2 * h - 1, 2 * w - 1) for h, w in (old_grid, new_grid))
    maps = table[:-3].T.unflatten(1, old)[None].float()  #                  (1, heads, 2h-1, 2w-1)
    maps = F.interpolate(maps, new, mode="bicubic", align_corners=False)
    return torch.cat([maps[0].flatten(1).T.to(table.dtype), table[-3:]])


class VisionTransformer(nn.Module):
    """Encode whole images, without any masking or shuffle (Dosovitskiy et al. 2021, as the MAE paper uses it).

    Images of another size than the one it was built for are accepted: the position embeddings are resampled.
    """

    rel_pos_bias = False
    activation_checkpointing = False  # in training, compute blocks again in the backward pass instead of keeping all
    global_pool = "avg"  # what stands for an image: the mean of the patch tokens ("avg") or the cls token ("cls")

    def __init__(self, config: MAEConfig, *, drop_path_rate: float = 0.0, custom_weight_init: bool = True):
        super().__init__()
        self.config = config
        width = config.encoder_embed_dim
        self.patch_embed = PatchEmbed(
            config.image_hw, config.patch_size, config.input_channels, width, strict_img_size=False
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        table = get_2d_sincos_pos_embed(width, config.grid_size)
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = build_blocks(
            width, config.encoder_depth, config.encoder_num_heads, config.encoder_mlp_ratio, drop_path_rate
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        if type(self) is VisionTransformer:  # a subclass has more parameters, and calls it when they are there
            self.initialize_weights(custom_weight_init)

    def initialize_weights(self, custom_weight_init: bool) -> None:
        """Set all weights as the release's pretraining; False leaves the layers' own and sets only the tokens.

        Deviation: a classifier from scratch starts so too; the release's has timm's (normal of 0.02, positions too).
        Reason: one start for all. Effect: not measured.
        """
        # Tokens are our own parameters, not a layer's: they have no default.
        for name in ("cls_token", "mask_token"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=0.02)
        if not custom_weight_init:
            return
        # The patch convolution's weight is initialised like a linear layer's on flattened patches; its bias keeps
        # Conv2d's own values, within 1 / sqrt(P*P*C) of zero.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Tell timm's layer-wise decay which parameters lie how deep; norms and heads behind the blocks come last."""
        return dict(stem=r"^(?:cls_token|pos_embed|patch_embed)", blocks=r"^blocks\.(\d+)")

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that finetuning does not decay, beside all of one dimension (original release)."""
        return {"cls_token", "pos_embed"}

    def patchify(self, images: Tensor) -> Tensor:
        """Cut (N, C, H, W) into (N, L, P*P*C); values of a patch in the order row, column, channel."""
        p = self.config.patch_size
        n, c, height, width = images.shape
        if c != self.config.input_channels or height % p or width % p:
            raise ValueError(
                f"images of shape {tuple(images.shape)} do not fit a model of {self.config.input_channels} channels "
                f"and patch size {p}: channels must be equal, height and width multiples of {p}"
            )
        x = images.reshape(n, c, height // p, p, width // p, p)  #         (N, C, h, P, w, P)
        x = x.permute(0, 2, 4, 3, 5, 1)  #                                 (N, h, w, P, P, C)
        return x.reshape(n, -1, p * p * c)  #                              (N, L, P*P*C)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Embed any selection of patches, (N, l, P*P*C) -> (N, l, D): the patch convolution as one matrix product."""
        proj = self.patch_embed.proj
        weight = proj.weight.permute(0, 2, 3, 1).flatten(1)  #             (D, P*P*C), channel fastest as in patchify
        return F.linear(patches, weight, proj.bias)

    def prepend_cls(self, patch_tokens: Tensor, pos_embed: Tensor) -> Tensor:
        """Put the cls token with its position in front, (N, l, D) -> (N, 1 + l, D)."""
        cls_token = (self.cls_token + pos_embed[:, :1]).to(patch_tokens.dtype).expand(len(patch_tokens), -1, -1)
        return torch.cat([cls_token, patch_tokens], dim=1)

    def positions(self, images: Tensor) -> Tensor:
        """Give the encoder's position table for the grid of these images, (1, 1 + L, D)."""
        return resample_pos_embed(self.pos_embed, self.config.grid_size, self.grid_of(images))

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed every patch in grid order, with positions and cls token: (N, C, H, W) -> (N, 1 + L, D)."""
        pos_embed = self.positions(images)
        x = self.embed_patches(self.patchify(images)) + pos_embed[:, 1:]
        return self.prepend_cls(x, pos_embed)

    @property
    def drop_path_noise_size(self) -> int:
        """How many uniform numbers a sample needs for its drop path; 0 where nothing is dropped."""
        return 2 * len(self.blocks) if any(isinstance(module, DropPath) for module in self.modules()) else 0

    def hand_out_noise(self, noise: Tensor | None) -> None:
        """Let uniform `noise` (N, 2 * depth) decide what the next forward pass drops; with None it draws by itself."""
        branches = [drop for block in self.blocks for drop in (block.drop_path1, block.drop_path2)]
        for index, drop_path in enumerate(branches):
            if isinstance(drop_path, SampleDropPath):
                drop_path.noise = None if noise is None else noise[:, index]

    def add_relative_positions(self) -> None:
        """Give every block a table of attention biases by relative position, at zero (paper, appendix A.4).

        Zero tables change nothing, so that a pretrained encoder starts as it is.
        """
        h, w = self.config.grid_size
        self.rel_pos_bias = True
        self.relative_indices: dict[tuple, Tensor] = {}  # by grid and device: built once, not in every pass
        for block in self.blocks:
            table = torch.zeros((2 * h - 1) * (2 * w - 1) + 3, self.config.encoder_num_heads)
            block.attn.relative_position_bias_table = nn.Parameter(table)

    def add_layer_scale(self) -> None:
        """Scale what each branch of a block adds by a trained vector that starts at one, as MMSegmentation's MAE."""
        for block in self.blocks:
            block.ls1, block.ls2 = (LayerScale(self.config.encoder_embed_dim, init_values=1.0) for _ in range(2))

    def relative_index(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        if (grid, device) not in self.relative_indices:
            index = gen_relative_position_index(grid, class_token=True)  # BEiT's numbering (arXiv 2106.08254)
            self.relative_indices[grid, device] = index.to(device)
        return self.relative_indices[grid, device]

    def encode_blocks(self, images: Tensor, last: int) -> Iterator[Tensor]:
        """Give the raw outputs of the blocks up to `last`, one after the other, each (N, 1 + L, D)."""
        x = self.embed_images(images)
        grid = self.grid_of(images)
        index = self.relative_index(grid, images.device) if self.rel_pos_bias else None
        for block in self.blocks[: last + 1]:
            if self.rel_pos_bias:
                table = block.attn.relative_position_bias_table
                table = resample_relative_positions(table, self.config.grid_size, grid)
                x = self.run_block(block, x, attn_mask=table[index].permute(2, 0, 1)[None])  # (1, heads, 1 + L, 1 + L)
            else:
                x = self.run_block(block, x)
            yield x

    def unfuse_attention(self) -> None:
        """Attend by matrix products and a softmax, which a CPU in bfloat16 does faster than torch's fused kernel.

        That keeps a weight for every pair of tokens for the backward pass, so it is for short sequences.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.fused_attn = False

    def run_block(self, block: Block, x: Tensor, **more: Tensor | None) -> Tensor:
        """Run one block as `Block.forward` says; with `activation_checkpointing` only its input is kept."""
        if self.activation_checkpointing and self.training:
            return checkpoint(block, x, use_reentrant=False, **more)
        return block(x, **more)

    def forward_features(self, images: Tensor) -> Tensor:
        """Encode whole images: (N, C, H, W) -> (N, 1 + L, D), cls token first, after the final norm."""
        *_, x = self.encode_blocks(images, len(self.blocks) - 1)
        return self.norm(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)

    def forward_pooled(self, images: Tensor) -> Tensor:
        """Encode whole images into one vector each, by `global_pool`: (N, C, H, W) -> (N, D)."""
        x = self.forward_features(images)  #                                (N, 1 + L, D)
        return x[:, 1:].mean(dim=1) if self.global_pool == "avg" else x[:, 0]

    def get_intermediate_layers(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Give the raw outputs of the named blocks (0-based, no final norm) as maps, each (N, D, h, w).

        Element [b, :, r, c] of a map is patch token r*w + c of image b; the cls token is left out.
        """
        depth = len(self.blocks)
        if not all(0 <= index < depth for index in indices):
            raise ValueError(f"block indices {list(indices)} must lie in 0..{depth - 1}, as the encoder has {depth}")
        h, w = self.grid_of(images)
        maps = {}
        for index, x in enumerate(self.encode_blocks(images, max(indices))):
            if index in indices:
                maps[index] = x[:, 1:].transpose(1, 2).unflatten(2, (h, w))  # (N, D, h, w)
        return [maps[index] for index in indices]


# ------------------------------------------------------------------------------------------------ masked autoencoder


class Masking(NamedTuple):
    """Which patches stay: `ids_keep` (N, kept), `ids_restore` (N, L), and `mask` (N, L), 1 = removed."""

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


class MAEOutput(NamedTuple):
    """`loss`, a float32 scalar; `pred` (N, L, T), T = P*P*C for pixels; `mask` (N, L), 1 = removed."""

    loss: Tensor
    pred: Tensor
    mask: Tensor


class Reconstruction(NamedTuple):
    """Three images of (N, C, H, W): removed patches zeroed, the model's answer, and visible patches pasted into it."""

    masked: Tensor
    reconstructed: Tensor
    pasted: Tensor


class ViTMAEForPreTraining(VisionTransformer):
    """The masked autoencoder of He et al. (arXiv 2111.06377, section 3): encode the visible, decode all."""

    def __init__(self, config: MAEConfig, *, custom_weight_init: bool = True):
        super().__init__(config)
        width = config.decoder_embed_dim
        self.decoder_embed = nn.Linear(config.encoder_embed_dim, width)
        masked_width = config.encoder_embed_dim if config.encode_mask_tokens else width
        self.mask_token = nn.Parameter(torch.empty(1, 1, masked_width))
        table = get_2d_sincos_pos_embed(width, config.grid_size)
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_blocks = build_blocks(
            width, config.decoder_depth, config.decoder_num_heads, config.decoder_mlp_ratio
        )
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder_pred = nn.Linear(width, config.pca_target or config.patch_dim)
        if config.pca_target:  # zero until `fit_pca`; kept in the checkpoint
            self.register_buffer("pca_mean", torch.zeros(config.patch_dim))
            self.register_buffer("pca_basis", torch.zeros(config.patch_dim, config.pca_target))
        self.initialize_weights(custom_weight_init)

    def unpatchify(self, patches: Tensor, grid_size: tuple[int, int] | None = None) -> Tensor:
        """Undo `patchify`: (N, L, P*P*C) -> (N, C, H, W), for the grid (h, w) it was built for or the one given."""
        p, c = self.config.patch_size, self.config.input_channels
        h, w = grid_size or self.config.grid_size
        x = patches.reshape(len(patches), h, w, p, p, c)  #                (N, h, w, P, P, C)
        x = x.permute(0, 5, 1, 3, 2, 4)  #                                 (N, C, h, P, w, P)
        return x.reshape(len(patches), c, h * p, w * p)  #                 (N, C, H, W)

    def random_masking(self, noise: Tensor, mask_ratio: float) -> Masking:
        """Keep the patches of smallest noise, (N, L) -> Masking; the rest is removed (paper, section 3)."""
        num_patches = noise.shape[1]
        # Stable, because equal noise values do occur (one image in a thousand at L = 196) and every device and batch
        # size must sort them alike.
        ids_shuffle = torch.argsort(noise, dim=1, stable=True)  #          (N, L)
        ids_restore = torch.argsort(ids_shuffle, dim=1)  #                 (N, L)
        kept = num_kept_patches(num_patches, mask_ratio)
        return Masking(ids_shuffle[:, :kept], ids_restore, (ids_restore >= kept).float())

    def forward_encoder(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the visible patches only: (N, C, H, W) -> latent (N, 1 + kept, D), mask and ids_restore (N, L).

        The mask is drawn first and the kept patches are gathered as pixels, so that nothing removed is embedded. With
        `encode_mask_tokens` the latent has all patches, in grid order, removed ones from the mask token (table 1c).
        """
        patches = self.patchify(images)  #                                 (N, L, P*P*C)
        pos_embed = self.positions(images)  #                              (1, 1 + L, D)
        if noise is None:
            noise = torch.rand(patches.shape[:2], device=images.device)
        if noise.shape != patches.shape[:2]:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, but the images have {tuple(patches.shape[:2])} patches"
            )
        ids_keep, ids_restore, mask = self.random_masking(noise, mask_ratio)
        if self.config.encode_mask_tokens:
            x = self.embed_patches(patches)  #                             (N, L, D)
            x = torch.where(mask[:, :, None].bool(), self.mask_token.to(x.dtype), x) + pos_embed[:, 1:]
        else:
            visible = take_tokens(patches, ids_keep)  #                    (N, kept, P*P*C)
            x = self.embed_patches(visible) + pos_embed[0, 1:][ids_keep]  # (N, kept, D)
        x = self.prepend_cls(x, pos_embed)  #                              (N, 1 + kept or L, D)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(
        self, latent: Tensor, ids_restore: Tensor, grid_size: tuple[int, int] | None = None, only: Tensor | None = None
    ) -> Tensor:
        """Predict every patch from the visible ones, or those at the indices `only` (N, m). The cls token takes part.

        (N, 1 + kept, D) -> (N, L, T) or (N, m, T), where T is P*P*C, or `pca_target`.
        """
        pos_embed = resample_pos_embed(
            self.decoder_pos_embed, self.config.grid_size, grid_size or self.config.grid_size
        )
        x = self.decoder_embed(latent)  #                                  (N, 1 + kept, D')
        if not self.config.encode_mask_tokens:
            cls_token, visible = x[:, :1], x[:, 1:]
            num_removed = ids_restore.shape[1] - visible.shape[1]
            mask_tokens = self.mask_token.to(x.dtype).expand(len(x), num_removed, -1)
            x = torch.cat([visible, mask_tokens], dim=1)  #                (N, L, D'), shuffled
            x = take_tokens(x, ids_restore)  #                             (N, L, D'), in grid order
            x = torch.cat([cls_token, x], dim=1)  #                        (N, 1 + L, D')
        x = x + pos_embed
        *blocks, last = self.decoder_blocks
        for block in blocks:
            x = self.run_block(block, x)
        x = self.run_block(last, x)[:, 1:] if only is None else self.run_block(last, x, only=1 + only)
        return self.decoder_pred(self.decoder_norm(x))  #                  (N, L or m, T)

    def make_target(self, patches: Tensor) -> Tensor:
        """Turn patches into what is predicted, (N, L, P*P*C) -> (N, L, T) (paper, table 1d).

        Pixels, pixels normalised in each patch, or the principal components of `fit_pca`. (The paper's fourth target,
        the tokens of a discrete VAE, needs that network's weights, and is not here.)
        """
        if self.config.norm_pix_loss:
            mean, std = patch_statistics(patches)
            return (patches - mean) / std
        return (patches - self.pca_mean) @ self.pca_basis if self.config.pca_target else patches

    def undo_target(self, pred: Tensor, patches: Tensor) -> Tensor:
        """Turn predictions into patches, (N, L, T) -> (N, L, P*P*C), with the help of the true ones for norm_pix."""
        if self.config.norm_pix_loss:
            mean, std = patch_statistics(patches)
            return pred * std + mean
        return pred @ self.pca_basis.T + self.pca_mean if self.config.pca_target else pred

    @torch.no_grad()
    def fit_pca(self, images: Tensor, valid: Tensor | None = None) -> None:
        """Take the leading principal components of the patches of normalised images (N, C, H, W) as the target.

        Of patches that hold data, `valid` (N, L), and of at most PCA_PATCHES, drawn from a seed of its own. Computed in
        float64; the entry of largest magnitude of a component is positive. Components keep their scale.
        """
        patches = self.patchify(images).flatten(0, 1)  #                   (N*L, P*P*C)
        patches = patches if valid is None else patches[valid.flatten() > 0]
        if len(patches) > PCA_PATCHES:
            patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:PCA_PATCHES]]
        patches = patches.double()
        covariance = torch.atleast_2d(torch.cov(patches.T))
        _, components = torch.linalg.eigh(covariance)  #                   columns, the smallest variance first
        basis = components[:, -self.config.pca_target :].flip(1)
        largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
        self.pca_mean.copy_(patches.mean(dim=0))
        self.pca_basis.copy_(basis * largest.sign())

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor, valid: Tensor | None = None) -> Tensor:
        """Mean squared error on the removed patches, float32 scalar (paper, section 3 and table 1d).

        Patches where `valid` (N, L) is 0 hold no data and count as predicted without error.
        """
        with torch.autocast(images.device.type, enabled=False):
            target = self.make_target(self.patchify(images.float()))  #    (N, L, T)
            loss = (pred.float() - target).square().mean(dim=2)  #         (N, L)
            counted = mask if valid is None else mask * valid
            return (loss * counted).sum() / mask.sum()

    def forward(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        *,
        predict_visible: bool = True,
        valid: Tensor | None = None,
    ) -> MAEOutput:
        """Mask, encode, decode and compare (N, C, H, W) normalised images; `noise` (N, L), smallest kept.

        The loss never looks at predictions of visible patches: without `predict_visible` they are zeros, and what leads
        to them alone is not computed.
        """
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        grid = self.grid_of(images)
        if predict_visible:
            pred = self.forward_decoder(latent, ids_restore, grid)
        else:
            kept = num_kept_patches(mask.shape[1], mask_ratio)
            removed = torch.argsort(ids_restore, dim=1)[:, kept:]  #       (N, L - kept)
            found = self.forward_decoder(latent, ids_restore, grid, removed)
            places = removed[:, :, None].expand_as(found)
            pred = found.new_zeros(*mask.shape, found.shape[2]).scatter(1, places, found)
        return MAEOutput(self.forward_loss(images, pred, mask, valid), pred, mask)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, pred: Tensor, mask: Tensor) -> Reconstruction:
        """Turn predictions into images in the space of the input.

        A model trained with `norm_pix_loss` predicts every patch without its brightness and contrast: the true mean
        and standard deviation of each patch are put back, so its pictures flatter it. Say so where they are shown.
        """
        grid, patches, removed = self.grid_of(images), self.patchify(images), mask[:, :, None]
        pred = self.undo_target(pred.float(), patches.float())
        panels = patches * (1 - removed), pred, patches * (1 - removed) + pred * removed
        return Reconstruction(*(self.unpatchify(panel, grid) for panel in panels))


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and standard deviation of each patch, (N, L, P*P*C) -> two of (N, L, 1); variance unbiased."""
    return patches.mean(dim=2, keepdim=True), (patches.var(dim=2, keepdim=True) + NORM_PIX_EPS).sqrt()


# ------------------------------------------------------------------------------------------------ classifier

HEAD_INIT_STD = 2e-5  # so small that finetuning starts from even scores
PROBE_INIT_STD = 0.01
PROBE_NORM_EPS = 1e-6


def check_trainable_blocks(num_blocks: float, depth: int) -> None:
    """Refuse a number of blocks to train that an encoder of this depth does not have; ValueError."""
    if num_blocks not in (0.5, *range(depth + 1)):
        raise ValueError(f"{num_blocks:g} blocks cannot be trained of {depth}; choose 0, 0.5, or 1 to {depth}")


class ViTMAEForImageClassification(VisionTransformer):
    """The encoder as a classifier (paper, appendix A.1), with the keys of the original finetuned release.

    `global_pool` "avg" averages the patch tokens and normalises the mean (`fc_norm`; there is no final `norm`); "cls"
    takes the normalised cls token (the paper; the mean is its release's). Position embeddings are trained, as in the
    original finetuning. `probe_head` puts a batch norm without weights before the linear layer (paper, appendix A.1).
    """

    def __init__(
        self,
        config: MAEConfig,
        num_classes: int,
        global_pool: str = "avg",
        drop_path_rate: float = 0.0,
        *,
        probe_head: bool = False,
        custom_weight_init: bool = True,
    ):
        if global_pool not in ("avg", "cls"):
            raise ValueError(f"global_pool must be 'avg' or 'cls', not {global_pool!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        super().__init__(config, drop_path_rate=drop_path_rate)
        self.pos_embed.requires_grad_(True)
        self.global_pool = global_pool
        width = config.encoder_embed_dim
        self.fc_norm = nn.Identity()
        if global_pool == "avg":
            self.norm, self.fc_norm = nn.Identity(), nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        linear = nn.Linear(width, num_classes)
        norm = nn.BatchNorm1d(width, affine=False, eps=PROBE_NORM_EPS)
        self.head = nn.Sequential(norm, linear) if probe_head else linear
        self.initialize_weights(custom_weight_init)
        nn.init.trunc_normal_(linear.weight, std=PROBE_INIT_STD if probe_head else HEAD_INIT_STD)
        nn.init.zeros_(linear.bias)

    @property
    def num_classes(self) -> int:
        return (self.head[1] if isinstance(self.head, nn.Sequential) else self.head).out_features

    def set_trainable_blocks(self, num_blocks: float) -> None:
        """Freeze all but the last blocks, norm and head (paper, section 4.3); half a block is the MLP of the last.

        With all blocks the embeddings are trained as well. ValueError when there are no such blocks.
        """
        depth = len(self.blocks)
        check_trainable_blocks(num_blocks, depth)
        self.requires_grad_(num_blocks == depth)
        trained = [self.norm, self.fc_norm, self.head, *self.blocks[depth - int(num_blocks) :]]
        if num_blocks == 0.5:
            trained += [self.blocks[-1].norm2, self.blocks[-1].mlp]
        for module in trained:
            module.requires_grad_(True)

    def train(self, mode: bool = True) -> "ViTMAEForImageClassification":
        """Set the training mode; frozen branches stay as at evaluation, so that none of them is dropped."""
        super().train(mode)
        for block in self.blocks:
            for branch, drop_path in ((block.attn, block.drop_path1), (block.mlp, block.drop_path2)):
                drop_path.train(mode and any(p.requires_grad for p in branch.parameters()))
        return self

    def forward_pooled(self, images: Tensor) -> Tensor:
        """Encode whole images into what the head sees: (N, C, H, W) -> (N, D)."""
        return self.fc_norm(super().forward_pooled(images))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Score the classes: (N, C, H, W) -> (N, K); `noise` (N, 2 * depth), uniform, decides the drop path."""
        self.hand_out_noise(noise)
        return self.head(self.forward_pooled(images))  #                     (N, K)


# ------------------------------------------------------------------------------------------------ segmenter

TAP_SHARES = (1 / 3, 1 / 2, 2 / 3, 1)  # of the depth: blocks 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24, counted from 0


def default_taps(depth: int) -> list[int]:
    """Give the blocks whose outputs a segmenter sees: 3, 5, 7, 11 of 12, and likewise for other depths."""
    taps = [round(depth * share) - 1 for share in TAP_SHARES]
    if len(set(taps)) < len(taps) or taps[0] < 0:
        raise ValueError(f"an encoder of {depth} blocks has no four taps a third apart; name four blocks by --taps")
    return taps


class SegmentationOutput(NamedTuple):
    """Scores of the cells: `logits` (N, K, h', w') of the finest level, `auxiliary` (N, K, h, w) of the third tap."""

    logits: Tensor
    auxiliary: Tensor


class ViTMAEForSegmentation(nn.Module):
    """The encoder under UperNet (paper, appendix A.4), with MMSegmentation's names for everything but the encoder.

    `taps` are 0-based blocks, whose raw outputs are used; `channels` is the heads' width (default: the encoder's).

    Deviation: MMSegmentation's blocks scale each branch by a trained vector that starts at one (LayerScale), here only
    with `layer_scale`. Reason: the paper's encoder has none, and the vectors can be multiplied into the weights.
    Effect: the same functions from the same start, on another path of the optimizer; not measured.
    """

    def __init__(
        self,
        config: MAEConfig,
        num_classes: int,
        *,
        taps: Sequence[int] | None = None,
        channels: int | None = None,
        norm: str = "batch",
        drop_path_rate: float = 0.0,
        rel_pos_bias: bool = False,
        layer_scale: bool = False,
    ):
        super().__init__()
        self.taps = list(taps or default_taps(config.encoder_depth))
        if len(self.taps) != 4 or not all(0 <= tap < config.encoder_depth for tap in self.taps):
            raise ValueError(f"taps must be four blocks within 0..{config.encoder_depth - 1}, not {self.taps}")
        self.backbone = VisionTransformer(config, drop_path_rate=drop_path_rate)
        self.backbone.norm = nn.Identity()  # taps are raw outputs, and what gets no gradient stalls DDP
        self.backbone.pos_embed.requires_grad_(True)
        if rel_pos_bias:
            self.backbone.add_relative_positions()
        if layer_scale:
            self.backbone.add_layer_scale()
        self.backbone.blocks[max(self.taps) + 1 :].requires_grad_(False)  # nothing looks at these
        width = config.encoder_embed_dim
        self.neck = Feature2Pyramid(width, norm)
        self.decode_head = UperNetHead([width] * 4, channels or width, num_classes, norm)
        self.auxiliary_head = FCNHead(width, num_classes, norm=norm)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Tell timm's layer-wise decay which parameters lie how deep; neck and heads come last."""
        return dict(stem=r"^backbone\.(?:cls_token|pos_embed|patch_embed)", blocks=r"^backbone\.blocks\.(\d+)")

    def no_weight_decay(self) -> set[str]:
        """Name what is not decayed, beside all parameters of one dimension.

        Deviation: MMSegmentation decays these three, because its test looks for names without `backbone.`. Reason: its
        own recipe means to leave them out. Effect: not measured.
        """
        tables = [name for name, _ in self.named_parameters() if name.endswith(BIAS_TABLE)]
        return {"backbone.cls_token", "backbone.pos_embed", *tables}

    @property
    def noise_size(self) -> int:
        """How many uniform numbers a sample needs for drop path and for the dropout of both heads' channels."""
        return self.backbone.drop_path_noise_size + sum(head.conv_seg.in_channels for head in self.heads)

    @property
    def heads(self) -> tuple[UperNetHead, FCNHead]:
        return self.decode_head, self.auxiliary_head

    def forward(self, images: Tensor, noise: Tensor | None = None) -> SegmentationOutput:
        """Score the cells of images of any size, (N, C, H, W); `noise` (N, noise_size), uniform, decides what drops."""
        parts = [None] * 3
        if noise is not None:
            parts = noise.split([self.backbone.drop_path_noise_size, *(h.conv_seg.in_channels for h in self.heads)], 1)
        self.backbone.hand_out_noise(parts[0])
        self.decode_head.dropout.noise, self.auxiliary_head.dropout.noise = parts[1:]
        maps = self.backbone.get_intermediate_layers(images, self.taps)  #  4 x (N, D, h, w)
        logits = self.decode_head(self.neck(maps))  #                       (N, K, 4h, 4w)
        return SegmentationOutput(logits, self.auxiliary_head(maps[2]))  #  (N, K, h, w)


# ------------------------------------------------------------------------------------------------ loading


def named_heads(sizes: dict) -> dict | None:
    """Give the numbers of heads of the named size of this width, and decoder width where there is one; else None."""
    for config in MODEL_CONFIGS.values():
        decoder_width = sizes.get("decoder_embed_dim", config.decoder_embed_dim)
        if (config.encoder_embed_dim, config.decoder_embed_dim) == (sizes["encoder_embed_dim"], decoder_width):
            return {name: getattr(config, name) for name in ("encoder_num_heads", "decoder_num_heads")}
    return None


def infer_config(state_dict: dict[str, Tensor], path: str | Path, norm_pix_loss: bool = True) -> MAEConfig:
    """Find the sizes of weights that have no config.json, with or without a decoder, from their names and shapes.

    Heads are those of the named size of this width, and the image is a square. ValueError where that leaves nothing.
    """
    sizes = sizes_from_shapes(state_dict, path)
    heads = named_heads(sizes)
    if heads is None:
        raise ValueError(
            f"these weights are {sizes['encoder_embed_dim']} wide, have no config.json beside them and fit none of "
            f"{', '.join(MODEL_CONFIGS)}; give the checkpoint folder that the training wrote, or "
            f"{convert_command(path, state_dict)}"
        )
    return MAEConfig(**sizes, **heads, norm_pix_loss=norm_pix_loss and "pca_target" not in sizes)


def read_sizes(path: str | Path) -> dict:
    """Give the config.json of a checkpoint folder or weight file, or as much of it as the shapes tell."""
    record = read_config(find_weights(path))
    if record is None:
        _, state_dict = read_weights(path)
        config = infer_config(state_dict, path)
        record = {"config": config.as_record(decoder="decoder_embed.weight" in state_dict)}
    return record


def load_all(model: nn.Module, state_dict: dict[str, Tensor], file: Path, title: str) -> None:
    """Load weights into the model that was built for them; ValueError names those that do not fit."""
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {title}: {error}") from error


def load_pretrained_mae(path: str | Path, *, norm_pix_loss: bool = True) -> ViTMAEForPreTraining:
    """Load a whole masked autoencoder, decoder included, from a checkpoint folder or a weight file.

    The sizes come from the config.json beside the weights; without one (files of the original release) from the
    shapes, and `norm_pix_loss` says how the file was trained. Encoder-only files raise ValueError.
    """
    file, state_dict = read_weights(path)
    if not any(key.startswith("decoder_") for key in state_dict):
        raise ValueError(
            f"{file} holds an encoder only, so it cannot draw; a decoder is in the checkpoints of pretrain_mae.py and "
            "in the original release's mae_visualize_vit_*.pth and mae_pretrain_vit_*_full.pth"
        )
    record = read_config(file)
    if record:
        refuse_missing(file.with_name("config.json"), record["config"], OF_DECODER)
    config = MAEConfig(**record["config"]) if record else infer_config(state_dict, path, norm_pix_loss)
    model = ViTMAEForPreTraining(config)
    load_all(model, state_dict, file, f"a masked autoencoder of {config}")
    return model


def load_classifier(path: str | Path) -> tuple[ViTMAEForImageClassification, dict]:
    """Load a finetuned classifier, and its config.json, from a checkpoint folder or a weight file.

    Files of the original finetuned release have no config.json: sizes come from the shapes. ValueError when there is
    no classifier in it.
    """
    file, state_dict = read_weights(path)
    head = "head.1" if "head.1.weight" in state_dict else "head"
    if f"{head}.weight" not in state_dict:
        raise ValueError(
            f"{file} holds no classifier (no head.weight); give a checkpoint of finetune_classifier.py or an original "
            "mae_finetuned_vit_*.pth"
        )
    record, pool = read_sizes(path), "avg" if "fc_norm.weight" in state_dict else "cls"
    config, num_classes = MAEConfig(**record["config"]), len(state_dict[f"{head}.weight"])
    model = ViTMAEForImageClassification(config, num_classes, pool, probe_head=head == "head.1")
    load_all(model, state_dict, file, f"a classifier of {config}")
    return model, record


def load_segmenter(path: str | Path) -> tuple[ViTMAEForSegmentation, dict]:
    """Load a segmenter, and its config.json, from a checkpoint folder; ValueError when there is none in it."""
    file, state_dict = read_weights(path)
    record = read_config(file) or {}
    if record.get("architecture") != "ViTMAEForSegmentation":
        raise ValueError(f"{file} holds no segmenter; give a checkpoint folder of finetune_segmentation.py")
    options = {name: record[name] for name in ("taps", "channels", "norm", "rel_pos_bias")}
    options["layer_scale"] = record.get("layer_scale", False)  # which checkpoints before it do not have
    model = ViTMAEForSegmentation(MAEConfig(**record["config"]), record["num_classes"], **options)
    load_all(model, state_dict, file, "the segmenter of its config.json")
    return model, record


OF_PRETRAINING = ("decoder_", "mask_token", "pca_")


def parts_of_another_variant(state_dict: dict[str, Tensor], file: Path, config: MAEConfig) -> tuple[str, ...]:
    """Name what a masked autoencoder cannot take of one with another target or use of mask tokens (tables 1c, 1d)."""
    theirs = (read_config(file) or {"config": {}})["config"]
    names = () if ("pca_basis" in state_dict) == bool(config.pca_target) else PREDICTION
    same_use = theirs.get("encode_mask_tokens", False) == config.encode_mask_tokens
    return names if same_use else (*names, "mask_token")


def load_pretrained_encoder(model: VisionTransformer, path: str | Path) -> LoadReport:
    """Load the encoder of a checkpoint folder or weight file into a model, into a masked autoencoder its decoder too.

    Positions are resampled to the model's grid, weights of 3 channels adapted to other channels. Only what is new in
    finetuning may be missing, a whole decoder, or what another target or use of mask tokens has in it; only decoder,
    final norm, and a head of other classes or another kind left over. Anything else raises ValueError with the names,
    before a weight is touched.
    """
    file, state_dict = read_weights(path)
    own = model.state_dict()
    tables = {key for key in own if key.endswith(BIAS_TABLE)}
    scales = {key for key in own if key.endswith(".gamma")}
    refuse_as_encoder(path, state_dict, relative_positions=bool(tables))
    heads = [{key: value.shape for key, value in of.items() if key.startswith("head.")} for of in (state_dict, own)]
    pretrains = isinstance(model, ViTMAEForPreTraining)
    other = parts_of_another_variant(state_dict, file, model.config) if pretrains else ()
    taken = {
        key: value
        for key, value in state_dict.items()
        if key in own.keys() - {*other} and (key not in heads[0] or heads[0] == heads[1])  # a head whole or not at all
    }
    resampled, adapted = (
        resample_positions(taken, file, model.config),
        adapt_channels(taken, model.config.input_channels),
    )
    has_decoder = any(key.startswith(OF_PRETRAINING) for key in taken)
    new = ("head.", "fc_norm.", *other, *(PREDICTION if adapted else ()), *(() if has_decoder else OF_PRETRAINING))
    left_out = ("head.", *((*PREDICTION, *other) if pretrains else (*OF_PRETRAINING, "norm.")))
    left_out += () if isinstance(model, ViTMAEForImageClassification) else ("fc_norm.",)
    may_be_missing = [key for key in own if key.startswith(new) or key in tables | scales]
    report = match_tensors(file, state_dict, taken, own, may_be_missing, left_out)
    model.load_state_dict(taken, strict=False)
    return report._replace(resampled=resampled, adapted=adapted)


def resample_positions(taken: dict[str, Tensor], file: Path, config: MAEConfig) -> list[str]:
    """Resample the position tables among a file's tensors to a model's grid, in place; give their names."""
    resampled, record = [], read_config(file)
    for name in ("pos_embed", "decoder_pos_embed"):
        if name not in taken or taken[name].ndim != 3:
            continue
        num_patches = taken[name].shape[1] - 1
        side = round(num_patches**0.5)
        old_grid = MAEConfig(**record["config"]).grid_size if record else (side, side)
        if old_grid[0] * old_grid[1] != num_patches:
            raise ValueError(f"{file}: {name} of {num_patches} patches fits no grid of {old_grid[0]} x {old_grid[1]}")
        if old_grid != config.grid_size:
            taken[name] = resample_pos_embed(taken[name], old_grid, config.grid_size)
            resampled.append(name)
    return resampled
