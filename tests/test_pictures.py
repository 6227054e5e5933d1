"""What a run shows: sizes and places of pictures, titles, captions, and which pixels are what."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from training.pictures import cut_middle, draw_reconstructions, draw_rows, show_values


def test_draw_rows_shows_the_whole_title_over_a_single_image():
    title = "reconstruction (true mean and contrast of each patch put back: norm-pix)"
    picture = draw_rows({title: torch.zeros(1, 3, 16, 16)})
    title_strip = np.asarray(picture.convert("L"))[:20]
    inked = (title_strip < 128).any(axis=0).nonzero()[0]
    assert 400 < inked.max() < picture.width - 4


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_draw_rows_paints_the_images_it_is_given(channels):
    images = torch.full((3, channels, 32, 64), 0.5)
    images[1] = 2.0  # clipped to white
    picture = draw_rows({"one": images, "two": images}, min_side=32, margin=4)
    assert picture.size == (3 * 68 + 4, 2 * (20 + 32 + 4) + 4)
    assert picture.getpixel((4 + 30, 4 + 20 + 16)) == (128,) * 3
    assert picture.getpixel((72 + 30, 4 + 20 + 16)) == (255,) * 3


def test_draw_rows_enlarges_small_images_by_whole_numbers():
    assert draw_rows({"one": torch.zeros(1, 3, 10, 20)}, min_side=25, margin=0).size == (60, 20 + 30)


def reconstructions(norm_pix_loss: bool = False) -> Image.Image:
    """Draw two images of two patches, of which the second is removed: black, and answered by grey and by black."""
    pasted = torch.zeros(2, 3, 192, 384)
    pasted[0, :, :, 192:] = 0.25
    panels, mask = [torch.zeros(2, 3, 192, 384), pasted], torch.tensor([[0, 1], [0, 1]])
    return draw_reconstructions(
        panels, mask, (1, 2), ["a.png", "b.png"], "100 steps", **LOOK, norm_pix_loss=norm_pix_loss
    )


LOOK = dict(mask_ratio=0.5, channels=None)


def test_reconstructions_are_four_rows_below_a_heading():
    picture = np.asarray(reconstructions())
    heading, caption, row = 2 * 20 + 4, 24 + 8, 26 + 192 + 4
    assert picture.shape == (heading + 4 * row + caption + 4, 2 * 388 + 4, 3)
    tops = [4 + heading + 26 + caption * (number > 0) + number * row for number in range(4)]
    colours = [[picture[top + 96, left].tolist() for left in (100, 300, 488, 688)] for top in tops]
    black, grey, half = [0, 0, 0], [128, 128, 128], [255, 128, 0]  # an error of 0.25 is half of what is shown
    assert colours[0] == [black] * 4 and colours[1] == [black, grey, black, grey]
    assert colours[2] == [black, [64, 64, 64], black, black] and colours[3] == [black, half, black, black]


def test_norm_pix_pictures_are_labelled_so():
    plain, labelled = (np.asarray(reconstructions(flag).convert("L"))[:, :780] for flag in (False, True))
    differ = (plain != labelled).any(axis=1).nonzero()[0]
    assert differ.min() > 44 + 2 * 222 and differ.max() < 44 + 2 * 222 + 80  # the title of the third row alone


LONG = "a very long caption that does not fit below an image"


def test_captions_are_drawn_below_their_images_and_cut_to_their_width():
    images = torch.ones(2, 3, 128, 128)
    plain = draw_rows({"row": images, "other": images})
    captioned = draw_rows({"row": images, "other": images}, {"row": ["a\nb", LONG]})
    assert captioned.height == plain.height + 2 * 18 + 8 and captioned.width == plain.width
    below = np.asarray(captioned)[4 + 20 + 128 :][: 2 * 18]
    first, second = (rows.min(axis=(0, 2)) for rows in (below[:18], below[20:]))  # darkest in each column
    assert first[4:16].min() < 128 and second[4:16].min() < 128 and first[136:264].min() < 128
    assert second[136:].min() == 255 and first[:136][-6:].min() == 255 and first[-6:].min() == 255


def test_captions_make_room_for_themselves_up_to_a_width():
    images = torch.ones(2, 3, 128, 128)
    narrow, wide = (draw_rows({"row": images}, {"row": ["a", LONG]}, caption_width=width) for width in (200, 1000))
    assert narrow.width == 4 + 128 + 4 + 200 + 4
    assert wide.width == 4 + 128 + 4 + math.ceil(FONT.getlength(LONG)) + 8 + 4
    assert narrow.getpixel((4 + 128 + 2, 60)) == (255,) * 3  # the images are as they were


FONT = ImageFont.load_default(size=14)


def test_cut_in_the_middle_keeps_both_ends_and_fits():
    assert cut_middle("tench", 100, FONT) == "tench"
    cut = cut_middle("is: American Staffordshire terrier 93 %", 150, FONT)
    assert cut.startswith("is: Amer") and cut.endswith(" 93 %") and "…" in cut and FONT.getlength(cut) <= 150
    assert cut_middle("anything", 1, FONT) == "…"


def test_images_of_different_sizes_stand_beside_each_other_without_bars():
    images = [torch.zeros(3, 40, 80), torch.zeros(3, 40, 30)]
    picture = draw_rows({"one": images, "two": images[:1]}, min_side=1, margin=4)
    assert picture.size == (4 + 80 + 4 + 30 + 4, 2 * (20 + 40 + 4) + 4)
    row = np.asarray(picture)[4 + 20 : 4 + 20 + 40, :, 0]
    assert (row[:, 4:84] == 0).all() and (row[:, 88:118] == 0).all()
    assert (row[:, :4] == 255).all() and (row[:, 84:88] == 255).all() and (row[:, 118:] == 255).all()


def test_channel_without_data_does_not_change_how_others_are_shown():
    panel = torch.full((1, 3, 2, 2), torch.nan)
    panel[:, 0] = torch.tensor([[0.0, 10.0], [20.0, 30.0]])
    (shown,) = show_values([panel], [0, 1, 2])
    low, high = np.percentile([0, 10, 20, 30], (2, 98))
    assert torch.allclose(shown[:, 0], (panel[:, 0] - low) / (high - low))
    assert shown[:, 1:].isnan().all()
