"""The heads against transformers' own and hand-made cases; windows by counting and by constants; labels by hand."""

import functools
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvf
from transformers.models.upernet.modeling_upernet import UperNetFCNHead as TheirFCNHead
from transformers.models.upernet.modeling_upernet import UperNetHead as TheirHead

import upernet
from dataset import normalize
from model import MAEConfig, ViTMAEForSegmentation
from upernet import (
    FCNHead,
    Feature2Pyramid,
    PyramidPooling,
    UperNetHead,
    ViewScores,
    build_norm,
    conv3x3_over_resized,
    label_pixels,
    predict,
    resize,
    resized_cross_entropy,
    slide_inference,
    window_starts,
)


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


# -------------------------------------------------------------------------------- fusion at the maps' own sizes

FUSED_SIZES = [
    ((16, 24), (8, 12), (4, 6), (2, 3)),
    ((13, 9), (7, 5), (3, 4), (1, 1)),  # no whole ratios, and a map of one cell
    ((1, 1), (1, 1)),
    ((5, 6), (8, 6), (9, 20)),  # larger than the first one
]


def plain_fusion(weight: Tensor, maps: list[Tensor]) -> Tensor:
    return F.conv2d(torch.cat([resize(x, size=maps[0].shape[-2:]) for x in maps], dim=1), weight, padding=1)


def draw_fusion(sizes: tuple, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    """Draw maps of 2, 3, 4, ... channels, and a kernel of five outputs over them, all asking for gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=dtype, requires_grad=True)
    maps = [draw(2, 2 + index, *size) for index, size in enumerate(sizes)]
    return draw(5, sum(x.shape[1] for x in maps), 3, 3), maps


def run_fusion(fusion: Callable, weight: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """Give what a fusion says and all its gradients, those of a loss that weighs every output differently."""
    out = fusion(weight, maps)
    loss = (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)).sum()
    return [out.detach(), *torch.autograd.grad(loss, [weight, *maps])]


@pytest.mark.parametrize("sizes", FUSED_SIZES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_fusion_equals_resizing_first(sizes, dtype, atol):
    """Outputs and gradients, sums of up to a thousand terms of size one; at the borders too, where the padding is."""
    weight, maps = draw_fusion(sizes, dtype)
    found, expected = (run_fusion(fusion, weight, maps) for fusion in (conv3x3_over_resized, plain_fusion))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("sizes", FUSED_SIZES)
def test_fusion_in_bfloat16_is_as_exact_as_resizing_first(sizes):
    """Under autocast each rounds at other places; neither may stray from the exact result much more than the other."""
    weight, maps = draw_fusion(sizes, torch.float32)
    exact = run_fusion(plain_fusion, weight.double(), [x.double() for x in maps])
    with torch.autocast("cpu", torch.bfloat16):
        found, plain = (run_fusion(fusion, weight, maps) for fusion in (conv3x3_over_resized, plain_fusion))
    assert found[0].dtype == torch.bfloat16
    for ours, other, true in zip(found, plain, exact, strict=True):
        ours, other = ((x.double() - true).norm() / true.norm() for x in (ours, other))
        assert 0 < ours < 3 * other


def test_fusion_compiles_as_one_graph():
    weight, maps = draw_fusion(FUSED_SIZES[1])
    compiled = torch.compile(conv3x3_over_resized, fullgraph=True, backend="aot_eager")
    found, expected = (run_fusion(fusion, weight, maps) for fusion in (compiled, plain_fusion))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_head_trains_as_one_that_resizes_first(norm, monkeypatch):
    """Through norm and ReLU, in training: scores, all gradients, and the running statistics."""
    pyramid = [torch.randn(2, 8, *size, dtype=torch.float64) for size in FUSED_SIZES[0]]
    noise, results = torch.rand(2, 64), []
    for fusion in (conv3x3_over_resized, plain_fusion):
        monkeypatch.setattr(upernet, "conv3x3_over_resized", fusion)
        head = randomise(UperNetHead([8] * 4, 64, 3, norm)).double().train()
        head.dropout.noise = noise
        scores = head(pyramid)
        scores.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
        results.append(dict(head.named_buffers()) | gradients | {"scores": scores.detach()})
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------- loss

LOSS_SIZES = [((8, 6), (32, 24)), ((5, 7), (13, 9)), ((9, 9), (4, 6)), ((1, 1), (3, 5)), ((4, 4), (4, 4))]


def plain_loss(scores: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    resized = resize(scores, size=labels.shape[-2:])
    return F.cross_entropy(resized, labels, ignore_index=ignore_index, reduction="sum")


@pytest.mark.parametrize(("cells", "pixels"), LOSS_SIZES)
@pytest.mark.parametrize("band_scores", [1, 7 * 30, 2**20])
def test_resized_cross_entropy_equals_torchs(cells, pixels, band_scores, monkeypatch):
    """Loss and gradient, in one band or in many, each pixel of another weight in what follows the loss."""
    monkeypatch.setitem(upernet.BAND_SCORES, "cpu", band_scores)
    torch.manual_seed(0)
    scores = 5 * torch.randn(3, 7, *cells, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, *pixels))
    labels[torch.rand(labels.shape) < 0.3] = 255
    found = []
    for loss in (resized_cross_entropy, plain_loss):
        leaf = scores.clone().requires_grad_()
        value = loss(leaf, labels, 255)
        found.append([value.detach(), *torch.autograd.grad(value.square(), leaf)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_resized_cross_entropy_is_float32_under_autocast():
    torch.manual_seed(0)
    scores, labels = torch.randn(1, 7, 4, 4, requires_grad=True), torch.randint(0, 7, (1, 16, 16))
    expected = plain_loss(scores.double(), labels, 255).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = resized_cross_entropy(scores, labels, 255)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert resized_cross_entropy(scores.bfloat16(), labels, 255).dtype == torch.float32


def test_resized_cross_entropy_of_ignored_labels_is_zero():
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = resized_cross_entropy(scores, torch.full((2, 8, 8), 255), 255)
    loss.backward()
    assert loss.item() == 0 and scores.grad.abs().max() == 0


def test_resized_cross_entropy_reports_what_is_not_finite():
    scores = torch.randn(1, 3, 4, 4)
    scores[0, 1, 2, 3] = torch.nan
    assert resized_cross_entropy(scores, torch.zeros(1, 8, 8, dtype=torch.long), 255).isnan()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_losses_of_200_steps_equal_those_of_resizing_first(dtype, atol, monkeypatch):
    """With neck, head and loss: rounding, and in float32 what Adam makes of gradients that are nothing but rounding."""
    torch.manual_seed(0)
    maps = [torch.randn(4, 8, 6, 4, dtype=dtype) for _ in range(4)]
    labels = (maps[0].mean(dim=1).repeat_interleave(8, 1).repeat_interleave(8, 2) > 0).long()
    labels[:, :3] = 255
    neck, head = Feature2Pyramid(8).to(dtype), UperNetHead([8] * 4, 16, 2).to(dtype)
    head.dropout.p = 0.0
    start = [{k: v.clone() for k, v in module.state_dict().items()} for module in (neck, head)]
    runs = []
    for fusion, compute_loss in ((conv3x3_over_resized, resized_cross_entropy), (plain_fusion, plain_loss)):
        monkeypatch.setattr(upernet, "conv3x3_over_resized", fusion)
        neck.load_state_dict(start[0])
        head.load_state_dict(start[1])
        optimizer = torch.optim.AdamW([*neck.parameters(), *head.parameters()], lr=1e-3)
        losses = []
        for _ in range(200):
            loss = compute_loss(head(neck(maps)), labels, 255) / labels.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append(torch.stack(losses))
    assert runs[0][-1] < runs[0][0] / 2  # it learned
    torch.testing.assert_close(*runs, rtol=0, atol=atol)


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


# -------------------------------------------------------------------------------- whole images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
MODES = [{}, {"flip": True}, {"multi_scale": True}, {"multi_scale": True, "flip": True}]
MODES += [{"slide": False, **mode} for mode in MODES[:3]]


@pytest.fixture(scope="module")
def opinionated() -> ViTMAEForSegmentation:
    """A segmenter for 32 x 24 pixels, not trained, whose answers change from place to place and are sure."""
    torch.manual_seed(0)
    config = MAEConfig(img_size=(32, 24), patch_size=4, encoder_embed_dim=32, encoder_depth=4, encoder_num_heads=2)
    model = ViTMAEForSegmentation(config, 4, channels=16)
    nn.init.normal_(model.decode_head.conv_seg.weight, std=3.0)
    for module in model.modules():  # with the statistics of real maps, else one class has the most everywhere
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 24))
    return model.eval()


@pytest.fixture(scope="module")
def odd_images() -> list[Tensor]:
    """Blocks of colour in three sizes: of several windows, smaller than one, and so wide that the long side binds."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 3, 13, 13), generator=generator, dtype=torch.uint8)
    sizes = ((50, 81), (20, 17), (24, 66))
    return [tvf.resize(x, list(size), antialias=False) for x, size in zip(blocks, sizes, strict=True)]


@torch.no_grad()
def label(model: ViTMAEForSegmentation, images: list[Tensor], resize_to=(70, 28), **mode: bool) -> list[Tensor]:
    to_input = functools.partial(normalize, mean=MEAN, std=STD)
    sizes = dict(crop_size=(32, 24), patch_size=4, resize_to=resize_to)
    return predict(model, images, normalize=to_input, **sizes, batch_size=3, **mode)


def label_by_hand(
    model: ViTMAEForSegmentation, image: Tensor, *, slide: bool = True, multi_scale: bool = False, flip: bool = False
) -> Tensor:
    """Label a uint8 (C, H, W) as `label` does: one view, one window, one step after the other."""
    total, (height, width) = 0, image.shape[1:]
    for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if multi_scale else (1.0,):
        scale = min(factor * 70 / max(height, width), factor * 28 / min(height, width))
        if multi_scale and slide:  # at least a window, and as long as it comes
            scale = max(factor * 28, 32) / min(height, width)
        size = [math.floor(side * scale + 0.5) for side in (height, width)]
        view = tvf.resize(image, size, antialias=False).float() / 255
        view = (view - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        for mirrored in (False, True) if flip else (False,):
            score = score_by_hand(model, view.flip(-1) if mirrored else view, slide)
            score = score.flip(-1) if mirrored else score
            total = total + F.interpolate(score[None], (height, width), mode="bilinear")[0].softmax(dim=0)
    return total.argmax(dim=0)


def score_by_hand(model: ViTMAEForSegmentation, view: Tensor, slide: bool) -> Tensor:
    """Score the pixels of one view by windows of 32 x 24, 21 and 16 apart, or padded to whole cells of 8 x 8."""
    height, width = view.shape[1:]
    crop, stride = ((32, 24), (21, 16)) if slide else ([math.ceil(side / 8) * 8 for side in (height, width)], (1, 1))
    tops, lefts = (
        {min(start, max(0, side - length)) for start in range(0, max(0, side - length) + step, step)}
        for side, length, step in zip((height, width), crop, stride, strict=True)
    )
    total, visits = torch.zeros(4, height, width), torch.zeros(height, width)
    for top, left in itertools.product(tops, lefts):
        pixels = view[:, top : top + crop[0], left : left + crop[1]]
        window = torch.zeros(1, 3, *crop)
        window[0, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        score = F.interpolate(model(window).logits, crop, mode="bilinear")[0]
        total[:, top : top + crop[0], left : left + crop[1]] += score[:, : pixels.shape[1], : pixels.shape[2]]
        visits[top : top + crop[0], left : left + crop[1]] += 1
    return total / visits


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_predict_equals_one_view_and_window_at_a_time(opinionated, odd_images, mode):
    """But for 0.2 % of the pixels, where two classes may be as good as equal and the order of sums decides."""
    answers = label(opinionated, odd_images, **mode)
    for answer, image in zip(answers, odd_images, strict=True):
        with torch.no_grad():
            expected = label_by_hand(opinionated, image, **mode)
        assert answer.shape == expected.shape == image.shape[1:] and answer.dtype == torch.int64
        assert (answer != expected).float().mean() <= 0.002


def test_every_mode_of_a_test_answers_otherwise(opinionated, odd_images):
    """Else the test above would not notice an option that is ignored."""
    found = [label(opinionated, odd_images[-1:], **mode)[0] for mode in MODES]
    for one, other in itertools.combinations(found, 2):
        assert (one != other).float().mean() > 0.1


@pytest.mark.parametrize("size", [(40, 29), (7, 9), (13, 40), (25, 8), (13, 17)])
def test_label_pixels_is_bilinear_then_argmax_however_it_is_cut(monkeypatch, size):
    """But for one pixel in a thousand, where two classes may be as good as equal."""
    monkeypatch.setitem(upernet.TILE_SCORES, "cpu", 5 * 6 * 6)
    score = torch.randn(5, 13, 17, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(score[None], size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    answer = label_pixels([ViewScores(score.permute(1, 2, 0), torch.eye(13), torch.eye(17))], size)
    assert answer.shape == size and (answer != whole).float().mean() <= 0.001


def test_label_pixels_is_exact_under_autocast():
    score = torch.randn(12, 9, 5, generator=torch.Generator().manual_seed(0))
    view = [ViewScores(score, torch.eye(12), torch.eye(9))]
    with torch.autocast("cpu", torch.bfloat16):
        found = label_pixels(view, (50, 40))
    assert torch.equal(found, label_pixels(view, (50, 40)))


def test_views_are_made_when_their_windows_are_scored(opinionated, odd_images):
    """So that the pixels of a whole batch of images in six sizes never are in memory."""
    seen, scored = [], []

    def note(pixels):
        seen.append(len(scored))
        return normalize(pixels, mean=MEAN, std=STD)

    handle = opinionated.register_forward_hook(lambda *_: scored.append(1))
    sizes = dict(crop_size=(32, 24), patch_size=4, resize_to=(70, 28), batch_size=1)
    with torch.no_grad():
        predict(opinionated, odd_images, normalize=note, multi_scale=True, **sizes)
    handle.remove()
    assert len(seen) == 6 * len(odd_images) and len(set(seen)) == len(seen)


def test_no_scale_of_a_windowed_test_is_smaller_than_a_window(opinionated, monkeypatch):
    seen = []

    def score_nothing(predict, views, crop_size, stride, batch_size):
        for view in views:
            seen.append(tuple(view.shape[-2:]))
            yield ViewScores(torch.zeros(*view.shape[-2:], 4), *map(torch.eye, view.shape[-2:]))

    monkeypatch.setattr(upernet, "score_windows", score_nothing)
    label(opinionated, [torch.zeros(3, 40, 60, dtype=torch.uint8)], resize_to=(128, 32), multi_scale=True)
    assert seen == [(32, 48), (32, 48), (32, 48), (40, 60), (48, 72), (56, 84)]  # short side 32 x 0.5 ... 1.75


def test_flipped_test_of_a_mirrored_image_is_the_mirror_image(opinionated):
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    (answer,), (mirrored,) = (label(opinionated, [x], flip=True, slide=False) for x in (image, image.flip(-1)))
    assert answer.unique().numel() > 1 and (answer.flip(-1) == mirrored).float().mean() > 0.99
