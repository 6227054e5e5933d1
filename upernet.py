"""UperNet: the pyramid that a plain ViT lacks, the heads, their loss, and how whole images are labelled with them.

UperNet is Xiao et al. 2018 (arXiv 1807.10221); sizes, order and state-dict keys are those of MMSegmentation, whose
published MAE result this reproduces. The encoder, and the model that joins it with this, live in model.py.

Shapes   N batch   D, D' channels   H W image   h w map   K classes
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

POOL_SCALES = (1, 2, 3, 6)
CLASSIFIER_INIT_STD = 0.01
DROPOUT_RATIO = 0.1
NUM_GROUPS = 32
NORMS = ("batch", "group")

Size = tuple[int, int]
resize = functools.partial(F.interpolate, mode="bilinear", align_corners=False)


def build_norm(channels: int, norm: str) -> nn.Module:
    """Batch norm as published, or group norm, which does without a batch; ValueError for anything else."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if channels % NUM_GROUPS or channels == NUM_GROUPS:  # a group of one has no spread where a map is pooled to a cell
        raise ValueError(
            f"{channels} channels cannot be cut into {NUM_GROUPS} groups of two or more, as group norm needs"
        )
    return nn.GroupNorm(NUM_GROUPS, channels)


class SampleDropout2d(nn.Dropout2d):
    """Torch's channel dropout, whose draws can be handed in: `noise` (N, D), uniform; below the ratio is dropped.

    Draws that come with the samples do not depend on how a batch is spread over processes and forward passes.
    """

    noise: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.noise is None or not self.training:
            return super().forward(x)
        return x * ((self.noise >= self.p).to(x.dtype) / (1 - self.p))[:, :, None, None]


class ConvModule(nn.Module):
    """Convolution without bias, norm, ReLU; the size of the map stays."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str = "batch"):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = build_norm(out_channels, norm)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")  # MMSegmentation's mode

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def resize_matrix(size: int, target: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Give the matrix (target, size) that resizes one side of a map as `resize` does, float32 or float64."""
    dtype = torch.promote_types(dtype, torch.float32)
    centres = (torch.arange(target, device=device, dtype=dtype) + 0.5) * (size / target) - 0.5
    cells = torch.arange(size, device=device, dtype=dtype)
    return (1 - (centres.clamp(0, size - 1)[:, None] - cells).abs()).clamp(min=0)


def shifted_resize_matrix(size: int, target: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Give what three taps see along one side of a resized map, (target, 3 * size), one block for each tap.

    Row y of the blocks reads the resized map at y - 1, y and y + 1, and zero outside it, as a convolution pads.
    """
    padded = F.pad(resize_matrix(size, target, device=device, dtype=dtype), (0, 0, 1, 1))
    return torch.cat([padded[tap : tap + target] for tap in range(3)], dim=1).to(dtype)


def conv3x3_over_resized(weight: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Convolve maps of several sizes as if resized to the first one's and concatenated, without doing so.

    `weight` (D', sum of the maps' channels, 3, 3), maps (N, D, h, w) each -> (N, D', H, W), with a padding of one.

    A 3x3 convolution is a sum of nine shifted mixes of channels, and mixing channels commutes with resizing. So each
    coarse map is mixed at its own size, nine ways, and each side is resized and shifted by one small matrix. The
    result is the same up to rounding, gradients too, for less than half of the arithmetic at UperNet's four sizes.
    """
    height, width = maps[0].shape[-2:]
    own, *others = weight.split([x.shape[1] for x in maps], dim=1)
    out = F.conv2d(maps[0], own, padding=1)  #                             (N, D', H, W)
    for taps, x in zip(others, maps[1:], strict=True):
        h, w = x.shape[-2:]
        mix = taps.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None, None]  #   (D' * 3 * 3, D, 1, 1)
        mixed = F.conv2d(x, mix).unflatten(1, (-1, 3, 3))  #               (N, D', 3, 3, h, w)
        mixed = mixed.transpose(3, 4).flatten(4, 5).flatten(2, 3)  #       (N, D', 3h, 3w)
        rows = shifted_resize_matrix(h, height, device=x.device, dtype=mixed.dtype)
        columns = shifted_resize_matrix(w, width, device=x.device, dtype=mixed.dtype)
        out = out + rows @ (mixed @ columns.T)  #                          (N, D', H, W)
    return out


class FusionConvModule(ConvModule):
    """The same over several maps, as if resized to the first one's size and concatenated; a kernel of three."""

    def __init__(self, in_channels: int, out_channels: int, norm: str = "batch"):
        super().__init__(in_channels, out_channels, 3, norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return F.relu(self.bn(conv3x3_over_resized(self.conv.weight, maps)))


class Feature2Pyramid(nn.Module):
    """Turn four maps of one size, each (N, D, h, w), into a pyramid of 4h, 2h, h and h/2."""

    def __init__(self, channels: int, norm: str = "batch"):
        super().__init__()
        double = functools.partial(nn.ConvTranspose2d, channels, channels, kernel_size=2, stride=2)
        self.upsample_4x = nn.Sequential(double(), build_norm(channels, norm), nn.GELU(), double())
        self.upsample_2x = nn.Sequential(double())
        self.downsample_2x = nn.MaxPool2d(kernel_size=2, stride=2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        first, second, third, fourth = maps
        return [
            self.upsample_4x(first),  #                                    (N, D, 4h, 4w)
            self.upsample_2x(second),  #                                   (N, D, 2h, 2w)
            third,  #                                                      (N, D, h, w)
            self.downsample_2x(fourth),  #                                 (N, D, h/2, w/2)
        ]


class PyramidPooling(nn.ModuleList):
    """Average a map over grids of 1, 2, 3 and 6 cells a side, and bring each back to its size (PSPNet)."""

    def __init__(self, in_channels: int, channels: int, norm: str = "batch"):
        super().__init__(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(in_channels, channels, 1, norm))
            for scale in POOL_SCALES
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, D + 4 D', h, w), the map itself first."""
        return torch.cat([x, *(resize(pool(x), size=x.shape[-2:]) for pool in self)], dim=1)


class UperNetHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down path over all, one classifier (UperNet, section 3)."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, norm: str = "batch"):
        super().__init__()
        *fine_channels, coarse_channels = in_channels
        self.psp_modules = PyramidPooling(coarse_channels, channels, norm)
        self.bottleneck = ConvModule(coarse_channels + len(POOL_SCALES) * channels, channels, 3, norm)
        self.lateral_convs = nn.ModuleList(ConvModule(fine, channels, 1, norm) for fine in fine_channels)
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm) for _ in fine_channels)
        self.fpn_bottleneck = FusionConvModule(len(in_channels) * channels, channels, norm)
        self.dropout = SampleDropout2d(DROPOUT_RATIO)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=CLASSIFIER_INIT_STD)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """Score every cell of the finest map: four maps, finest first -> (N, K, h, w)."""
        *fine, coarse = pyramid
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, fine, strict=True)]
        levels.append(self.bottleneck(self.psp_modules(coarse)))
        for index in reversed(range(len(fine))):  # cumulative: each level has all coarser ones in it
            levels[index] = levels[index] + resize(levels[index + 1], size=levels[index].shape[-2:])
        smooth = [conv(level) for conv, level in zip(self.fpn_convs, levels, strict=False)] + levels[-1:]
        return self.conv_seg(self.dropout(self.fpn_bottleneck(smooth)))  #   (N, K, h, w)


class FCNHead(nn.Module):
    """One convolution and a classifier: the auxiliary head, which only helps training."""

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, norm: str = "batch"):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3, norm))
        self.dropout = SampleDropout2d(DROPOUT_RATIO)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=CLASSIFIER_INIT_STD)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D, h, w) -> (N, K, h, w)."""
        return self.conv_seg(self.dropout(self.convs(x)))


# ------------------------------------------------------------------------------------------------ loss

BAND_SCORES = {"cpu": 2**20, "cuda": 2**26}  # scores in memory at a time: near the caches, or enough to fill a GPU


class ResizedCrossEntropy(torch.autograd.Function):
    """Cross entropy of upsampled scores, with its gradient found on the way, so that no upsampled map is kept."""

    @staticmethod
    def forward(ctx, scores: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        (num_images, num_classes, h, w), (height, width) = scores.shape, labels.shape[-2:]
        options = dict(device=scores.device, dtype=scores.dtype)
        rows, columns = resize_matrix(h, height, **options), resize_matrix(w, width, **options)
        band = max(1, BAND_SCORES.get(scores.device.type, BAND_SCORES["cuda"]) // (num_classes * width))
        loss, gradient = scores.new_zeros(()), torch.zeros_like(scores)
        with torch.autocast(scores.device.type, enabled=False):
            for image in range(num_images):
                wide = scores[image] @ columns.T  #                           (K, h, W)
                wide_gradient = torch.zeros_like(wide)
                for top in range(0, height, band):
                    bottom = min(top + band, height)
                    # The cells that these rows are made of, and one more at either end, where a product may round.
                    near = slice(max(0, top * h // height - 2), min(h, -(-bottom * h // height) + 2))
                    mix, label = rows[top:bottom, near], labels[image, top:bottom]
                    counted = label != ignore_index
                    place = label.where(counted, 0)[None]  #                  (1, band, W)
                    score = mix @ wide[:, near]  #                            (K, band, W)
                    score -= score.amax(dim=0)
                    own = score.gather(0, place)[0]
                    shares = score.exp_()
                    total = shares.sum(dim=0)
                    loss += ((total.log() - own) * counted).sum()
                    shares *= counted / total  #                              softmax, zero where ignored
                    shares.scatter_add_(0, place, -counted[None].to(shares.dtype))
                    wide_gradient[:, near] += mix.T @ shares
                gradient[image] = wide_gradient @ columns  #                  (K, h, w)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None


def resized_cross_entropy(scores: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Sum the cross entropy of scores (N, K, h, w), resized to the labels (N, H, W), over all that are not ignored.

    `F.cross_entropy(resize(scores), labels, reduction="sum")` up to rounding, gradient too, in bands of rows: the
    scores at the labels' size, which are 150 numbers a pixel in ADE20K, never are in memory at once.
    """
    return ResizedCrossEntropy.apply(scores.float() if scores.dtype != torch.float64 else scores, labels, ignore_index)


# ------------------------------------------------------------------------------------------------ whole images

SCALE_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of a test with several scales, MMSegmentation's
TILE_SCORES = {"cpu": 2**18, "cuda": 2**26}  # of pixels in memory at a time: a core's cache, or enough to fill a GPU


class ViewScores(NamedTuple):
    """Scores of cells (a, b, K), and how pixels are mixed of them: rows (h, a), columns (w, b), each of sum one."""

    cells: Tensor
    rows: Tensor
    columns: Tensor


def window_starts(length: int, crop_size: int, stride: int) -> list[int]:
    """Give where windows begin along one side; the last one is shifted inside, so that it is whole where it can be."""
    count = max(length - crop_size + stride - 1, 0) // stride + 1
    return [min(index * stride, max(length - crop_size, 0)) for index in range(count)]


def window_matrix(length: int, starts: list[int], crop_size: int, num_cells: int) -> Tensor:
    """Give the matrix (length, windows * cells) that resizes windows of cells along one side, and averages them."""
    window = resize_matrix(num_cells, crop_size, device=torch.device("cpu"), dtype=torch.float64)
    matrix = window.new_zeros(length, len(starts), num_cells)
    for index, start in enumerate(starts):
        matrix[start : start + crop_size, index] = window[: length - start]
    return (matrix / matrix.sum(dim=(1, 2), keepdim=True)).flatten(1)


def score_windows(
    predict: Callable[[Tensor], Tensor], images: Iterable[Tensor], crop_size: Size, stride: Size, batch_size: int = 16
) -> Iterator[ViewScores]:
    """Score images of any sizes, (C, H, W) each, by overlapping windows; a pixel has the mean of those it is in.

    `predict` scores windows, (n, C, *crop_size) -> (n, K, a, b), and gets up to `batch_size` of them at once, across
    images. An image's scores are given as soon as its last window has been seen, so that those of the other images
    are not in memory. Images smaller than a window are padded with zeros, and the padding is cut off again.
    """

    def cut() -> Iterator[tuple[Tensor, Size, list[list[int]]]]:
        for image in images:
            starts = [window_starts(*side) for side in zip(image.shape[1:], crop_size, stride, strict=True)]
            for top, left in itertools.product(*starts):
                window = image[:, top : top + crop_size[0], left : left + crop_size[1]]
                padding = (0, crop_size[1] - window.shape[2], 0, crop_size[0] - window.shape[1])
                yield F.pad(window, padding), image.shape[1:], starts

    windows, scores = cut(), []
    while batch := list(itertools.islice(windows, batch_size)):
        for (_, size, starts), score in zip(batch, predict(torch.stack([x for x, *_ in batch])), strict=True):
            scores.append(score)  #                                                      (K, a, b)
            counts = [len(places) for places in starts]
            if len(scores) == math.prod(counts):
                cells = torch.stack(scores).unflatten(0, counts).permute(0, 3, 1, 4, 2)  # (rows, a, columns, b, K)
                sides = zip(size, starts, crop_size, score.shape[1:], strict=True)
                yield ViewScores(cells.flatten(2, 3).flatten(0, 1), *(window_matrix(*side) for side in sides))
                scores = []


def slide_inference(
    predict: Callable[[Tensor], Tensor], images: Iterable[Tensor], crop_size: Size, stride: Size, batch_size: int = 16
) -> Iterator[Tensor]:
    """Give the scores of every pixel by `score_windows`, (K, H, W) for each image."""
    for cells, rows, columns in score_windows(predict, images, crop_size, stride, batch_size):
        with torch.autocast(cells.device.type, enabled=False):
            yield rows.to(cells) @ cells.permute(2, 0, 1) @ columns.to(cells).T


def fit_within(height: int, width: int, long_side: float, short_side: float) -> Size:
    """Give the largest size of the same ratio whose long side is at most `long_side` and short at most `short_side`."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize_image(image: Tensor, size: Size) -> Tensor:
    """Bilinear without antialiasing, as MMSegmentation resizes (OpenCV)."""
    return tvf.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=False)


def predict(
    model: nn.Module,
    images: Sequence[Tensor],
    *,
    normalize: Callable[[Tensor], Tensor],
    crop_size: Size,
    patch_size: int,
    resize_to: Size,
    slide: bool = True,
    multi_scale: bool = False,
    flip: bool = False,
    batch_size: int = 16,
) -> list[Tensor]:
    """Label every pixel of images of any sizes, uint8 (C, H, W) each -> int64 (H, W) each.

    Images are resized as in MMSegmentation's test, to fit within `resize_to` (long side, short side); `normalize`
    turns uint8 (N, C, h, w) into what the model takes, whose `model(...).logits` are scores of cells. They are scored
    by windows of `crop_size`, or whole without `slide`, and the scores are brought back to the images' own sizes.
    `multi_scale` and `flip` average the probabilities of six scales and of the mirror image.
    """
    mirrored, answers = (False, True) if flip else (False,), []
    num_views = len(mirrored) * (len(SCALE_FACTORS) if multi_scale else 1)

    def draw_views() -> Iterator[Tensor]:
        for image in images:
            for size in choose_sizes(image.shape[-2:], resize_to, crop_size if slide else None, multi_scale):
                pixels = normalize(resize_image(image, size)[None])[0]  #     (C, h, w)
                yield from (pixels.flip(-1) if mirror else pixels for mirror in mirrored)

    score = functools.partial(score_windows, lambda windows: model(windows).logits.float(), batch_size=batch_size)
    if slide:
        views = score(draw_views(), crop_size, tuple(2 * side // 3 for side in crop_size))
    else:
        views = score_whole(score, draw_views(), 2 * patch_size)  # the pyramid halves the patches' grid
    for image in images:
        own = zip(itertools.islice(views, num_views), itertools.cycle(mirrored), strict=False)
        own = [view._replace(columns=view.columns.flip(0)) if mirror else view for view, mirror in own]
        answers.append(label_pixels(own, image.shape[-2:]))
    return answers


def choose_sizes(size: Size, resize_to: Size, window: Size | None, multi_scale: bool) -> Iterator[Size]:
    """Give the sizes to which a test resizes an image: one, or several scales."""
    for factor in SCALE_FACTORS if multi_scale else (1.0,):
        long_side, short_side = (factor * side for side in resize_to)
        if window and multi_scale:  # as published: no scale smaller than a window
            long_side, short_side = math.inf, max(short_side, *window)
        yield fit_within(*size, long_side, short_side)


def score_whole(score: Callable, images: Iterable[Tensor], unit: int) -> Iterator[ViewScores]:
    """Score whole images, padded to multiples of `unit`: each is a window; neighbours of one size share a batch."""
    for size, group in itertools.groupby(images, lambda image: tuple(side + -side % unit for side in image.shape[1:])):
        yield from score(group, size, size)


def cut_side(matrix: Tensor, target: int, tile: int, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Resize one side of a view (h, a), and give for each tile the cells that it is made of, and their mix."""
    resized = F.interpolate(matrix.T[None], target, mode="linear", align_corners=False)[0].T
    near = [(part.any(dim=0).nonzero()[:, 0], part) for part in resized.split(tile)]
    return [(places.to(like.device), part[:, places].to(like)) for places, part in near]


def label_pixels(views: Sequence[ViewScores], size: Size) -> Tensor:
    """Give the best class of each pixel of an image, int64 (H, W), by the scores of one view or several, `resize`d.

    Of several the probabilities are averaged. In tiles and from the cells at once, because the scores of all classes
    at the size of a photograph would take gigabytes.
    """
    cells = views[0].cells
    tile = max(1, math.isqrt(TILE_SCORES.get(cells.device.type, TILE_SCORES["cuda"]) // cells.shape[-1]))
    sides = [[cut_side(*side, tile, cells) for side in zip(view[1:], size, strict=True)] for view in views]
    answer = torch.empty(size, dtype=torch.int64, device=cells.device)
    with torch.autocast(cells.device.type, enabled=False):
        for i, j in itertools.product(*(range(math.ceil(side / tile)) for side in size)):
            total = None
            for view, (rows, columns) in zip(views, sides, strict=True):
                (near_rows, mix_rows), (near_columns, mix_columns) = rows[i], columns[j]
                near = view.cells[near_rows[:, None], near_columns]  #         (a, b, K)
                score = mix_columns @ (mix_rows @ near.flatten(1)).unflatten(1, near.shape[1:])  # (tile, tile, K)
                if len(views) > 1:
                    score = score.softmax(dim=-1)
                total = score if total is None else total.add_(score)
            answer[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile] = total.argmax(dim=-1)
    return answer
