"""The heads against transformers' own and hand-made cases; windows by counting and by constants."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.upernet.modeling_upernet import UperNetFCNHead as TheirFCNHead
from transformers.models.upernet.modeling_upernet import UperNetHead as TheirHead

from upernet import FCNHead, Feature2Pyramid, PyramidPooling, UperNetHead, build_norm, slide_inference, window_starts


def randomise(module: nn.Module) -> nn.Module:
    """Put everything off its special values, running statistics too, so that no mistake hides behind a one or zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.copy_(noise + 0.5 if name.endswith("running_var") else (noise - 0.5) / 4)
    return module.eval()


def to_transformers(state_dict: dict) -> dict:
    return {key.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): v for key, v in state_dict.items()}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_modules_have_the_published_parameter_counts():
    with torch.device("meta"):
        assert count(Feature2Pyramid(768)) == 7_081_728
        assert count(UperNetHead([768] * 4, 768, 150)) == 67_963_542
        assert count(UperNetHead([768] * 4, 512, 150)) == 32_332_950
        assert count(FCNHead(768, 150)) == 1_808_534


def test_heads_equal_transformers():
    config = transformers.UperNetConfig(
        backbone_config=transformers.ResNetConfig(), hidden_size=24, num_labels=7, auxiliary_channels=20
    )
    pyramid = [torch.randn(2, 16, side, side + side // 2) for side in (24, 12, 6, 4)]
    ours, theirs = randomise(UperNetHead([16] * 4, 24, 7)), TheirHead(config, [16] * 4).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(ours(pyramid), theirs(pyramid), rtol=0, atol=1e-5)
    config.auxiliary_in_channels = 16
    ours, theirs = randomise(FCNHead(16, 7, 20)), TheirFCNHead(config, [16] * 4).eval()
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(ours(pyramid[2]), theirs(pyramid), rtol=0, atol=1e-5)


def test_convolutions_start_as_mmsegmentations():
    """Kaiming with the fan of the outputs: a variance of 2 / (kernel area x output channels)."""
    torch.manual_seed(0)
    head = UperNetHead([96] * 4, 48, 5)
    for conv in (head.bottleneck.conv, head.fpn_bottleneck.conv):
        assert conv.weight.std().item() == pytest.approx((2 / (9 * 48)) ** 0.5, rel=0.02)


def test_keys_are_those_of_mmsegmentation():
    keys = set(UperNetHead([8] * 4, 8, 3).state_dict())
    for key in (
        "psp_modules.3.1.conv.weight",
        "psp_modules.0.1.bn.running_mean",
        "bottleneck.conv.weight",
        "lateral_convs.2.bn.weight",
        "fpn_convs.0.conv.weight",
        "fpn_bottleneck.bn.bias",
        "conv_seg.bias",
    ):
        assert key in keys
    assert {"upsample_4x.0.weight", "upsample_4x.1.running_var", "upsample_4x.3.bias", "upsample_2x.0.weight"} <= set(
        Feature2Pyramid(8).state_dict()
    )
    assert {"convs.0.conv.weight", "convs.0.bn.weight", "conv_seg.weight"} <= set(FCNHead(8, 3, 8).state_dict())


def test_pyramid_has_four_sizes_in_order():
    maps = [torch.randn(1, 8, 6, 10) for _ in range(4)]
    pyramid = Feature2Pyramid(8)(maps)
    assert [tuple(x.shape[-2:]) for x in pyramid] == [(24, 40), (12, 20), (6, 10), (3, 5)]
    assert torch.equal(pyramid[2], maps[2]) and torch.equal(pyramid[3], nn.functional.max_pool2d(maps[3], 2))


def test_pyramid_pooling_keeps_the_map_and_adds_its_means():
    pooling = PyramidPooling(4, 4)
    for stage in pooling:  # turn each stage into its average alone
        nn.init.dirac_(stage[1].conv.weight)
    x = torch.rand(2, 4, 6, 6)
    out = pooling.eval()(x)
    assert out.shape == (2, 20, 6, 6) and torch.equal(out[:, :4], x)
    torch.testing.assert_close(out[:, 4:8], x.mean(dim=(2, 3), keepdim=True).expand(2, 4, 6, 6), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[:, 16:], x, rtol=1e-4, atol=1e-4)  # six cells a side of a six by six map


def test_top_down_path_is_cumulative():
    """A change of the coarsest map reaches the finest through all levels between."""
    head = randomise(UperNetHead([4] * 4, 8, 2))
    for level in head.lateral_convs:
        nn.init.zeros_(level.conv.weight)
    seen = []
    for level, conv in enumerate(head.fpn_convs):
        conv.register_forward_hook(lambda module, inputs, output, level=level: seen.append(inputs[0].detach()))
    pyramid = [torch.randn(1, 4, side, side) for side in (16, 8, 4, 2)]
    head(pyramid)
    before, seen[:] = list(seen), []
    head([*pyramid[:3], pyramid[3] + 1])
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(before, seen, strict=True))


def test_group_norm_needs_no_batch_and_says_what_it_needs():
    head = UperNetHead([64] * 4, 64, 3, norm="group").train()
    pyramid = [torch.randn(1, 64, side, side) for side in (8, 4, 2, 1)]
    assert head(pyramid).shape == (1, 3, 8, 8)
    for channels in (20, 32):
        with pytest.raises(ValueError, match=f"{channels} channels cannot be cut into 32 groups of two or more"):
            build_norm(channels, "group")
    with pytest.raises(ValueError, match="norm must be one of batch, group, not 'layer'"):
        build_norm(32, "layer")


# -------------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize(("size", "count"), [((512, 683), 2), ((512, 1024), 3), ((512, 2048), 6), ((512, 512), 1)])
def test_number_of_windows_is_mmsegmentations(size, count):
    starts = [window_starts(side, 512, 341) for side in size]
    assert len(starts[0]) * len(starts[1]) == count
    for side, begin in zip(size, starts, strict=True):
        assert begin[0] == 0 and begin[-1] + 512 == side


SIZES = [(20, 45), (16, 16), (9, 40), (5, 7)]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_constant_model_gives_a_constant_map(batch_size):
    images = [torch.randn(3, *size) for size in SIZES]
    scores = torch.tensor([1.5, -2.0])[:, None, None]
    found = slide_inference(lambda x: scores.expand(len(x), 2, 16, 16), images, (16, 16), (10, 10), batch_size)
    for out, size in zip(found, SIZES, strict=True):
        torch.testing.assert_close(out, scores.expand(2, *size))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_windows_lie_where_they_are_put_back(batch_size):
    """A model that answers with its own input gives images of all sizes back, those smaller than a window too."""
    images, seen = [torch.randn(3, *size) for size in SIZES], []

    def echo(windows):
        seen.append(windows.shape)
        return windows

    for out, image in zip(slide_inference(echo, images, (16, 16), (10, 10), batch_size), images, strict=True):
        torch.testing.assert_close(out, image)
    num_windows = 2 * 4 + 1 + 4 + 1
    assert sum(shape[0] for shape in seen) == num_windows
    assert len(seen) == -(-num_windows // batch_size) and {shape[1:] for shape in seen} == {(3, 16, 16)}


def test_overlaps_are_averaged():
    answers = iter([torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)])
    (out,) = slide_inference(lambda windows: next(answers), [torch.zeros(1, 4, 6)], (4, 4), (2, 2), 1)
    assert out[0, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]
