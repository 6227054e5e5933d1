"""What a run shows: rows of images with titles and captions, label maps in colours, legends. Knows no network."""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CAPTION_GAP = 8  # pixels between the captions of neighbours, and below them


def draw_rows(
    rows: Mapping[str, Sequence[Tensor]],
    captions: Mapping[str, list[str]] | None = None,
    *,
    heading: str = "",
    text_size: int = 14,
    min_side: int = 128,
    margin: int = 4,
    caption_width: int = 0,
) -> Image.Image:
    """Draw titled rows of images, each (C, H, W) with 0 black and 1 white; small images are enlarged, all alike.

    One channel is drawn grey, more than three show their first three. `captions` give the images of a row a text below
    them, of one or several lines. A column is as wide as its images, or up to `caption_width` where a line needs it;
    longer lines are cut in the middle. Lengths are in pixels.
    """
    font, captions = ImageFont.load_default(size=text_size), captions or {}
    large_font = ImageFont.load_default(size=text_size * 1.5)
    heading_height = 2 * text_size + margin if heading else 0
    title_height, line_height = text_size + 6, text_size + 4
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
    caption_heights = {title: max(map(len, lines.get(title, [[]]))) * line_height for title in rows}
    caption_heights |= {title: caption_heights[title] + CAPTION_GAP for title in lines}
    row_heights = {title: title_height + heights[title] + caption_heights[title] + margin for title in rows}
    longest_title = math.ceil(max(large_font.getlength(heading), *(font.getlength(title) for title in rows)))
    canvas_width = max(sum(widths) + margin * len(widths), longest_title + margin) + margin
    canvas = Image.new("RGB", (canvas_width, heading_height + sum(row_heights.values()) + margin), "white")
    draw, top = ImageDraw.Draw(canvas), margin + heading_height
    draw.text((margin, margin), heading, fill="black", font=large_font)
    for title, images in rows.items():
        draw.text((margin, top), title, fill="black", font=font)
        for column, image in enumerate(images):
            left = margin + sum(widths[:column]) + column * margin
            picture = Image.fromarray(to_uint8(image[None])[0])
            size = picture.width * zoom, picture.height * zoom
            canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (left, top + title_height))
            for number, line in enumerate(lines[title][column] if title in lines else ()):
                place = left, top + title_height + heights[title] + 2 + number * line_height
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


def hide_removed(images: Tensor, mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Paint the removed patches of pictures (N, C, H, W) grey; `mask` (N, L) is 1 where a patch was removed."""
    removed = mask.to(images.device).view(-1, 1, *grid_size).float()
    removed = F.interpolate(removed, images.shape[-2:], mode="nearest")  # (N, 1, H, W)
    return images.where(removed == 0, GREY)


def paint_error(images: Tensor, answer: Tensor) -> Tensor:
    """Paint how far pictures (N, C, H, W) lie apart, as (N, 3, H, W): none black, then red, yellow, and white from 0.5.

    The distance is the mean over the channels.
    """
    distance = (images - answer).abs().mean(dim=1, keepdim=True) / 0.5
    return (3 * distance - torch.arange(3, device=images.device).view(3, 1, 1)).clamp(0, 1)


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


def draw_reconstructions(
    panels: list[Tensor],
    mask: Tensor,
    grid_size: tuple[int, int],
    names: list[str],
    heading: str,
    *,
    mask_ratio: float,
    norm_pix_loss: bool,
    channels: list[int] | None,
) -> Image.Image:
    """Draw rows of original, masked, reconstruction and error of N images with these names or none, below a heading.

    `panels` are the images and their reconstructions with the visible patches pasted in, both (N, C, H, W), and
    `channels` as for `show_values`; `mask` (N, L) is 1 where a patch was removed.
    """
    images, pasted = show_values(panels, channels)
    flattered = ", true mean and contrast of each patch put back: norm-pix" * norm_pix_loss
    rows = {
        "original" + describe_channels(channels): images,
        f"masked ({mask_ratio:.0%} removed)": hide_removed(images, mask, grid_size),
        f"reconstruction (the visible patches pasted in{flattered})": pasted,
        "error (black 0, white 0.5 and more)": paint_error(images, pasted),
    }
    return draw_rows(rows, {next(iter(rows)): names} if names else None, heading=heading, text_size=20, min_side=192)


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
