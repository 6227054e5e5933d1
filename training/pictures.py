"""What a run shows: rows of images with titles and captions, label maps in colours, legends. Knows no network."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

TITLE_HEIGHT, LINE_HEIGHT = 20, 18
CAPTION_GAP = 8  # pixels between the captions of neighbours, and below them


def draw_rows(
    rows: Mapping[str, Sequence[Tensor]],
    captions: Mapping[str, list[str]] | None = None,
    *,
    min_side: int = 128,
    margin: int = 4,
    caption_width: int = 0,
) -> Image.Image:
    """Draw titled rows of images, each (C, H, W) with 0 black and 1 white; small images are enlarged, all alike.

    One channel is drawn grey, more than three show their first three. `captions` give the images of a row a text below
    them, of one or several lines. A column is as wide as its images, or up to `caption_width` where a line needs it;
    longer lines are cut in the middle.
    """
    font, captions = ImageFont.load_default(size=14), captions or {}
    first = next(iter(rows.values()))
    zoom = max(1, math.ceil(min_side / max(min(image.shape[-2:]) for image in first)))
    lines = {title: [text.split("\n") for text in texts] for title, texts in captions.items()}
    widths = []
    for column in range(max(len(images) for images in rows.values())):
        below = itertools.chain(*(itertools.chain(*texts[column : column + 1]) for texts in lines.values()))
        needed = map(font.getlength, below)
        image_width = max(images[column].shape[-1] * zoom for images in rows.values() if column < len(images))
        widths.append(max(image_width, min(caption_width, math.ceil(max(needed, default=0)) + CAPTION_GAP)))
    heights = {title: max(image.shape[-2] for image in images) * zoom for title, images in rows.items()}
    caption_heights = {title: max(map(len, lines.get(title, [[]]))) * LINE_HEIGHT for title in rows}
    caption_heights |= {title: caption_heights[title] + CAPTION_GAP for title in lines}
    row_heights = {title: TITLE_HEIGHT + heights[title] + caption_heights[title] + margin for title in rows}
    longest_title = math.ceil(max(font.getlength(title) for title in rows))
    canvas_width = max(sum(widths) + margin * len(widths), longest_title + margin) + margin
    canvas = Image.new("RGB", (canvas_width, sum(row_heights.values()) + margin), "white")
    draw, top = ImageDraw.Draw(canvas), margin
    for title, images in rows.items():
        draw.text((margin, top), title, fill="black", font=font)
        for column, image in enumerate(images):
            left = margin + sum(widths[:column]) + column * margin
            picture = Image.fromarray(to_uint8(image[None])[0])
            size = picture.width * zoom, picture.height * zoom
            canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (left, top + TITLE_HEIGHT))
            for number, line in enumerate(lines[title][column] if title in lines else ()):
                place = left, top + TITLE_HEIGHT + heights[title] + 2 + number * LINE_HEIGHT
                draw.text(place, cut_middle(line, widths[column] - CAPTION_GAP, font), fill="#404040", font=font)
        top += row_heights[title]
    return canvas


def cut_middle(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Give a text as it is where it fits into `width` pixels, else as much of its beginning and its end as does."""
    kept = len(text)
    shown = text
    while kept and font.getlength(shown) > width:
        kept -= 1
        shown = text[: kept - kept // 2] + "…" + text[len(text) - kept // 2 :]
    return shown


GREY = 0.5


def hide_visible(panel: Tensor, mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Paint the visible patches of pictures (N, C, H, W) grey, where no training taught a model what to say.

    `mask` (N, L) is 1 where a patch was removed.
    """
    removed = mask.to(panel.device).view(-1, 1, *grid_size).float()
    removed = F.interpolate(removed, panel.shape[-2:], mode="nearest")  # (N, 1, H, W)
    return panel.where(removed > 0, GREY)


def show_values(panels: list[Tensor], channels: list[int] | None) -> list[Tensor]:
    """Make pictures of panels of values, each (N, C, H, W) in any units: (N, 3, H, W), 0 black and 1 white.

    Without `channels` they are pictures already. Otherwise these become red, green and blue (the last band, where
    there are fewer), each stretched to percentiles 2 and 98 of the first panel.
    """
    if channels is None:
        return panels
    chosen = [min(channel, panels[0].shape[1] - 1) for channel in channels]
    panels = [panel[:, chosen].float().cpu() for panel in panels]
    known = [values[values.isfinite()].numpy() for values in panels[0].unbind(dim=1)]  # of each channel
    limits = [np.percentile(values, (2, 98)) if len(values) else (0, 1) for values in known]
    low, high = torch.tensor(np.array(limits), dtype=torch.float32).T.reshape(2, 3, 1, 1)
    return [(panel - low) / (high - low).clamp(min=1e-12) for panel in panels]


def colour_classes(labels: Tensor, palette: np.ndarray) -> Tensor:
    """Paint a label map (H, W) in the colours of its classes, (3, H, W) in 0..1; ignored pixels are black."""
    colours = np.zeros((256, 3), dtype=np.float32)
    colours[: len(palette)] = palette / 255
    return torch.from_numpy(colours)[labels.cpu().long()].permute(2, 0, 1)


def draw_legend(names: Mapping[str, tuple[int, int, int]], width: int) -> Image.Image:
    """Draw a box of its colour beside every name, in as many lines as the width needs."""
    font, places, x, y = ImageFont.load_default(size=14), [], 4, 4
    for name in names:
        needed = 18 + math.ceil(font.getlength(name)) + 12
        if x + needed > width and x > 4:
            x, y = 4, y + 20
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, y + 22), "white")
    draw = ImageDraw.Draw(canvas)
    for (name, colour), (x, y) in zip(names.items(), places, strict=True):
        draw.rectangle((x, y, x + 13, y + 13), fill=tuple(int(value) for value in colour), outline="black")
        draw.text((x + 18, y - 2), name, fill="black", font=font)
    return canvas


def reconstruction_titles(
    mask_ratio: float,
    norm_pix_loss: bool,
    channels: list[int] | None = None,
    *,
    loss: float | None = None,
    step: int | None = None,
) -> list[str]:
    """Name the four rows of a reconstruction picture; `channels` as for `show_values`, `loss` that of its images."""
    answer = "reconstruction of the removed patches"
    if loss is not None:
        answer += f": loss {loss:.4f}"
    if step is not None:
        answer += f" at step {step:,}"
    if norm_pix_loss:
        answer += " (true mean and contrast of each patch put back: norm-pix)"
    return [
        "original" + describe_channels(channels),
        f"masked ({mask_ratio:.0%} removed)",
        answer,
        "reconstruction with the visible patches pasted in",
    ]


def describe_channels(channels: list[int] | None) -> str:
    """Say what `show_values` did."""
    if channels is None:
        return ""
    bands = "bands " + ", ".join(map(str, channels)) if len(set(channels)) > 1 else f"band {channels[0]}"
    return f" ({bands}, stretched to percentiles 2 and 98)"


def to_uint8(images: Tensor) -> np.ndarray:
    """Clip (N, C, H, W) in 0..1 to uint8 (N, H, W, 3), grey repeated, channels after the third left out."""
    images = images.detach().float().cpu().clamp(0, 1)
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
