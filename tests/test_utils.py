"""The pure verbs of utils.py: golden values, oracles, and hand-made cases."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from timm.layers import LayerScale
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torchvision.ops import sigmoid_focal_loss

import utils
from utils import (
    ConfusionMatrix,
    accuracy,
    cosine_lr,
    decay_more,
    describe_class,
    dice_loss,
    knn_classify,
    nan_guard,
    pixel_loss,
    poly_lr,
    scaled_lr,
    set_learning_rate,
    skip_nonfinite,
)

# -------------------------------------------------------------------------------- optimisation


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (20, 1.2e-3), (40, 2.4e-3), (420, 1.2e-3), (800, 0.0)])
def test_cosine_lr_golden_values(step, expected):
    assert cosine_lr(step, peak=2.4e-3, warmup_steps=40, total_steps=800) == pytest.approx(expected, abs=1e-12)


def test_cosine_lr_equals_timm():
    peak, warmup, total, minimum = 2.4e-3, 7, 50, 1e-6
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    oracle = CosineLRScheduler(
        optimizer, t_initial=total - warmup, lr_min=minimum, warmup_t=warmup, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(total + 5):
        oracle.step_update(step)
        ours = cosine_lr(step, peak=peak, warmup_steps=warmup, total_steps=total, minimum=minimum)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)


def test_cosine_lr_without_warmup_starts_at_the_peak():
    assert cosine_lr(0, peak=1.0, warmup_steps=0, total_steps=10) == 1.0


def test_poly_lr_of_the_published_schedule():
    rate = functools.partial(poly_lr, peak=1e-4, warmup_steps=1500, total_steps=160_000)
    assert rate(0) == pytest.approx(1e-10) and rate(750) == pytest.approx(0.5e-4, rel=1e-5) and rate(1500) == 1e-4
    assert rate(80_750) == pytest.approx(0.5e-4) and rate(160_000) == 0.0 == rate(170_000)


@pytest.mark.parametrize(("batch", "expected"), [(2048, 1.2e-3), (4096, 2.4e-3)])
def test_scaled_lr_of_the_given_commands(batch, expected):
    assert scaled_lr(1.5e-4, batch) == pytest.approx(expected)


def test_set_learning_rate_multiplies_the_scale_of_a_group():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr_scale": 0.5}, {"params": parameters[1:]}], lr=1.0)
    set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


class OneLayer(torch.nn.Module):
    """A token that timm never decays, a norm and a linear layer; by timm's rule all but the last weight are free."""

    def __init__(self):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, 2))
        self.norm = torch.nn.LayerNorm(2)
        self.head = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("biases", "norms", "moved"),
    [
        (False, False, set()),
        (True, False, {"norm.bias", "head.bias"}),
        (False, True, {"norm.weight"}),
        (True, True, {"norm.bias", "head.bias", "norm.weight"}),
    ],
)
@pytest.mark.parametrize("layered", [False, True])
def test_decay_more_moves_biases_and_norms_and_nothing_else(layered, biases, norms, moved):
    model = OneLayer()
    if layered:  # as timm's layer decay: two groups a layer, each with the scale of its learning rate
        groups = [
            {"params": [model.cls_token, *model.norm.parameters()], "weight_decay": 0.0, "lr_scale": 0.25},
            {"params": [model.head.bias], "weight_decay": 0.0, "lr_scale": 1.0},
            {"params": [model.head.weight], "weight_decay": 0.5, "lr_scale": 1.0},
        ]
    else:
        groups = param_groups_weight_decay(model, 0.5, no_weight_decay_list=["cls_token"])
    decay_more(groups, model, biases=biases, norms=norms)
    found = [
        (name, group["weight_decay"], group.get("lr_scale"))
        for name, parameter in model.named_parameters()
        for group in groups
        if any(parameter is p for p in group["params"])
    ]
    assert found == [  # each of them once
        (
            name,
            0.5 if name in moved | {"head.weight"} else 0.0,
            None if not layered else 1.0 if name.startswith("head") else 0.25,
        )
        for name, _ in model.named_parameters()
    ]


def test_norms_that_decay_take_no_scale_of_layerscale_with_them():
    layers = {"ls1": LayerScale(4), "norm1": torch.nn.LayerNorm(4), "fc1": torch.nn.Linear(4, 4)}
    model = torch.nn.ModuleDict(layers)
    groups = param_groups_weight_decay(model, 0.5)
    decay_more(groups, model, biases=False, norms=True)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(layers["norm1"].weight), id(layers["fc1"].weight)}


def test_decay_more_leaves_groups_that_an_optimizer_takes():
    """Of a layer whose only free parameter is its bias, nothing is left without decay."""
    model = torch.nn.Linear(2, 1)
    groups = param_groups_weight_decay(model, 0.5)
    decay_more(groups, model, biases=True, norms=False)
    torch.nn.init.ones_(model.bias)
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=True)
    model.weight.grad, model.bias.grad = torch.zeros(1, 2), torch.zeros(1)
    optimizer.step()
    assert model.bias.item() == pytest.approx(1 - 0.1 * 0.5)  # the decay alone: lr x weight_decay


# -------------------------------------------------------------------------------- non-finite losses


@pytest.mark.parametrize("build", [functools.partial(torch.optim.AdamW, fused=True), torch.optim.SGD])
def test_step_with_a_gradient_that_is_not_finite_changes_nothing(build):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = build(model.parameters(), lr=0.1, weight_decay=0.1)
    twin = copy.deepcopy(model)
    twin_optimizer = build(twin.parameters(), lr=0.1, weight_decay=0.1)
    for step, poison in enumerate((1.0, math.nan, math.inf, 1.0)):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(inputs).square().mean() + (poison - 1)  # a constant, so that the gradient itself stays finite
        nan_guard(loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        assert skip_nonfinite(optimizer, norm).item() == (not math.isfinite(poison))
        optimizer.step()
        optimizer.zero_grad()
        if math.isfinite(poison):
            twin(inputs).square().mean().backward()
            twin_optimizer.step()
            twin_optimizer.zero_grad()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, expected)


# -------------------------------------------------------------------------------- metrics


def test_accuracy_of_a_hand_made_case():
    predictions = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 0, 1], [2, 1, 0]])
    labels = torch.tensor([0, 0, 0, 0])
    assert [accuracy(predictions, labels, k) for k in (1, 2, 3)] == [25.0, 75.0, 100.0]


def test_confusion_matrix_counts_rows_true_and_columns_predicted():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 0, 1]), torch.tensor([0, 2, 2]))
    confusion.update(torch.tensor([[1, 2]]), torch.tensor([[2, 0]]))
    assert confusion.counts.tolist() == [[1, 0, 1], [0, 0, 2], [1, 0, 0]]


def test_confusion_matrix_refuses_what_it_would_miscount():
    confusion = ConfusionMatrix(3, ignore_index=255)
    with pytest.raises(ValueError, match=r"labels of shape \(2, 3\), predictions of shape \(3, 2\)"):
        confusion.update(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="label 0 or prediction 3 of 3 classes"):
        confusion.update(torch.tensor([0, 255]), torch.tensor([3, 0]))
    assert confusion.counts.sum() == 0


def test_segmentation_scores_of_a_hand_made_case():
    """Of class 0 3 pixels, 2 hit, 1 taken for 1; of class 1 2 pixels, 1 hit, 1 taken for 3; none of classes 2 and 3."""
    confusion = ConfusionMatrix(4, ignore_index=255)
    confusion.update(torch.tensor([[0, 0, 0], [1, 1, 255]]), torch.tensor([[0, 0, 1], [1, 3, 2]]))
    scores = confusion.per_class()
    assert scores["iou"][:2].tolist() == pytest.approx([200 / 3, 100 / 3])
    assert scores["acc"][:2].tolist() == pytest.approx([200 / 3, 50])
    assert scores["dice"][:2].tolist() == pytest.approx([80, 50])
    assert scores["precision"][:2].tolist() == pytest.approx([100, 50])
    assert all(score[2:].isnan().all() for score in scores.values())  # 3 was predicted, but no label has it
    assert confusion.figures() == pytest.approx(
        {"testing_miou": 50, "testing_macc": 175 / 3, "testing_mdice": 65, "testing_mprecision": 75}
        | {"testing_aacc": 60, "testing_classes": 2}
    )


def test_segmentation_scores_equal_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (6, 20, 30), generator=generator)  # of 12 classes, so that three are absent
    answers = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, labels.flip(2))
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    confusion = ConfusionMatrix(12, ignore_index=255)
    for label, answer in zip(labels, answers, strict=True):
        confusion.update(label, answer)
    options = dict(num_classes=12, ignore_index=255)
    iou = torchmetrics.classification.MulticlassJaccardIndex(**options)(answers, labels)
    micro = torchmetrics.classification.MulticlassAccuracy(average="micro", **options)(answers, labels)
    figures = confusion.figures()
    assert figures["testing_miou"] == pytest.approx(100 * iou.item(), abs=1e-4)
    assert figures["testing_aacc"] == pytest.approx(100 * micro.item(), abs=1e-4)
    precision = torchmetrics.classification.MulticlassPrecision(average=None, **options)(answers, labels)
    f1 = torchmetrics.classification.MulticlassF1Score(average=None, **options)(answers, labels)
    scores, there = confusion.per_class(), torch.bincount(labels.flatten(), minlength=256)[:12] > 0
    for name, expected in (("precision", precision), ("dice", f1)):
        torch.testing.assert_close(scores[name][there], 100 * expected[there].double(), rtol=0, atol=1e-4)
        assert scores[name][~there].isnan().all() and there.sum() == figures["testing_classes"] == 9
        assert figures[f"testing_m{name}"] == pytest.approx(100 * expected[there].mean().item(), abs=1e-4)


def test_class_that_no_answer_names_has_precision_zero():
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1]))
    assert confusion.per_class()["precision"].tolist()[:2] == [0, pytest.approx(200 / 3)]
    assert confusion.per_class()["dice"].tolist()[:2] == [0, pytest.approx(80)]


# -------------------------------------------------------------------------------- losses of pixels


def drawn_pixels(num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (K, 6, 7) and labels of all classes but the last, a tenth of them ignored; seeded, float64."""
    generator = torch.Generator().manual_seed(num_classes)
    scores = 2 * torch.randn(num_classes, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, max(2, num_classes - 1), (6, 7), generator=generator)
    return scores, labels.where(torch.rand(6, 7, generator=generator) > 0.1, 255)


def test_pixel_loss_is_torchs_weighted_cross_entropy():
    scores, labels = drawn_pixels(5)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    for w in (None, weights):
        expected = F.cross_entropy(scores[None], labels[None], weight=w, ignore_index=255, reduction="sum")
        torch.testing.assert_close(pixel_loss(scores.log_softmax(0), labels, 255, weights=w), expected)


def test_focal_loss_of_two_classes_is_torchvisions():
    """A softmax over scores 0 and x is a sigmoid of x; alpha is the weight of class 1, and 1 - alpha of class 0."""
    scores, labels = drawn_pixels(2)
    counted, x = labels != 255, scores[1] - scores[0]
    for alpha in (-1, 0.25):
        weights = None if alpha < 0 else torch.tensor([1 - alpha, alpha], dtype=torch.float64)
        ours = pixel_loss(scores.log_softmax(0), labels, 255, weights=weights, gamma=2.0)
        theirs = sigmoid_focal_loss(x[counted], labels[counted].double(), alpha=alpha, gamma=2.0, reduction="sum")
        torch.testing.assert_close(ours, theirs)


def test_focal_loss_of_a_hand_made_case():
    log_probs = torch.tensor([[[0.9, 0.5, 0.2]], [[0.1, 0.5, 0.8]]], dtype=torch.float64).log()
    loss = pixel_loss(log_probs, torch.tensor([[0, 1, 255]]), 255, gamma=2.0)
    assert loss.item() == pytest.approx(-(0.01 * math.log(0.9) + 0.25 * math.log(0.5)))


def test_dice_loss_of_a_hand_made_case():
    """Class 0 has one pixel of 0.75, class 1 one of 0.5; class 2 none, and the last pixel counts nowhere."""
    probs = torch.tensor([[[0.75, 0.5, 0.1]], [[0.25, 0.5, 0.1]], [[0.0, 0.0, 0.8]]], dtype=torch.float64)
    first, second = 2 * 0.75 / (0.75**2 + 0.5**2 + 1), 2 * 0.5 / (0.25**2 + 0.5**2 + 1)
    loss = dice_loss(probs.log(), torch.tensor([[0, 1, 255]]), 255)
    assert loss.item() == pytest.approx(1 - (first + second) / 2)


def test_dice_loss_equals_numpy_and_its_gradient_leaves_ignored_pixels_alone():
    scores, labels = drawn_pixels(5)
    scores.requires_grad_()
    loss = dice_loss(scores.log_softmax(0), labels, 255)
    p = np.exp(scores.detach().numpy())
    p, g, found = p / p.sum(axis=0), labels.numpy(), []
    for k in np.unique(g[g != 255]):
        a, b = p[k][g != 255], (g[g != 255] == k).astype(float)
        found.append(2 * (a * b).sum() / ((a**2).sum() + (b**2).sum()))
    assert loss.item() == pytest.approx(1 - np.mean(found)) and len(found) == 4
    loss.backward()
    moved = scores.grad.abs().sum(dim=0)
    assert not moved[labels == 255].any() and moved[labels != 255].all()


def test_dice_loss_is_zero_without_a_label_and_where_all_is_right():
    scores, labels = drawn_pixels(3)
    assert dice_loss(scores.log_softmax(0), torch.full_like(labels, 255), 255).item() == 0
    labels = scores.argmax(dim=0)
    assert dice_loss((100 * scores).log_softmax(0), labels, 255).item() < 0.05


def test_knn_vote_equals_brute_force(monkeypatch):
    monkeypatch.setattr(utils, "KNN_CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator)) for n in (40, 11))
    labels = torch.randint(0, 3, (40,), generator=generator)
    ranked = knn_classify(bank, labels, queries, 3, num_neighbours=7)
    for query, order in zip(queries, ranked, strict=True):
        similarity = [(float(query @ vector), int(label)) for vector, label in zip(bank, labels, strict=True)]
        votes = [0.0] * 3
        for value, label in sorted(similarity, reverse=True)[:7]:
            votes[label] += math.exp(value / 0.07)
        best_first = sorted(range(3), key=lambda k: -votes[k])
        assert order.tolist() == [k if votes[k] else -1 for k in best_first]


def test_knn_ranks_no_class_of_which_nothing_is_near():
    """Else a class without a vote is right or wrong by its number: of ten the lowest are among the first five."""
    bank, queries = torch.eye(4).repeat_interleave(2, dim=0), torch.eye(4)[:1]
    labels = torch.tensor([9, 9, 0, 0, 1, 1, 2, 2])
    ranked = knn_classify(bank, labels, queries, 10, num_neighbours=2)
    assert ranked.tolist() == [[9] + 9 * [-1]]
    assert accuracy(ranked, torch.tensor([0]), 5) == 0 and accuracy(ranked, torch.tensor([9]), 5) == 100


def test_class_names_are_put_into_words_where_imagenet_has_them():
    assert describe_class("n01440764") == "tench" and describe_class("n03888257") == "parachute"
    assert describe_class("cats") == "cats" and describe_class("n99999999") == "n99999999"
