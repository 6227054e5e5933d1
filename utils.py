"""Pure verbs that scripts and tools share: learning rates, non-finite steps, maskings, metrics, nearest neighbours.

Nothing here knows a network, a data set or a run; the training loops are in the scripts.
"""

import contextlib
import functools
import math
import re
import unicodedata
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from timm.data import ImageNetInfo
from torch import Tensor, nn

from storage.sizes import num_kept_patches

# ------------------------------------------------------------------------------------------------ optimisation


def scaled_lr(base_learning_rate: float, effective_batch_size: int) -> float:
    """Linear scaling rule: learning rate = base x images per optimizer step over all processes / 256 (appendix A.1)."""
    return base_learning_rate * effective_batch_size / 256


def cosine_lr(step: int, *, peak: float, warmup_steps: float, total_steps: int, minimum: float = 0.0) -> float:
    """Give the learning rate of an optimizer step: linear from exactly 0, then half a cosine down to `minimum`.

    A pure function of the step, so nothing has to be saved, and no number of processes can make it run faster. Past
    `total_steps` it stays at the minimum.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1e-12, total_steps - warmup_steps))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def poly_lr(step: int, *, peak: float, warmup_steps: int, total_steps: int, start_factor: float = 1e-6) -> float:
    """Give the learning rate of an optimizer step: linear from `start_factor` x peak, then linear down to 0.

    MMSegmentation's warmup and polynomial of power 1. Past `total_steps` it stays at 0.
    """
    if step < warmup_steps:
        return peak * (start_factor + (1 - start_factor) * step / warmup_steps)
    return peak * max(0.0, 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Write a learning rate into every group, times the group's `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let a model answer as at test time, without gradients, and then train on as before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count the values of all parameters, and of those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def decay_more(groups: list[dict], model: nn.Module, *, biases: bool, norms: bool) -> None:
    """Let biases, or the weights of norms, decay as well: timm's groups without decay are cut in two, in place.

    The scales of LayerScale, of one dimension too, are no norm's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = max(group["weight_decay"] for group in groups)

    def decays(parameter: nn.Parameter) -> bool:
        name = names[id(parameter)]
        return biases if name.endswith("bias") else norms and parameter.ndim == 1 and not name.endswith(".gamma")

    for group in [group for group in groups if not group["weight_decay"]]:
        moved = [parameter for parameter in group["params"] if decays(parameter)]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if not decays(parameter)]
            groups.append({**group, "params": moved, "weight_decay": decay})


# ------------------------------------------------------------------------------------------------ non-finite losses


def nan_guard(loss: Tensor) -> Tensor:
    """Give a loss that is not finite a gradient that is NaN everywhere, so that every process meets it in the norm.

    A squared error can overflow where its gradient does not; with this all of 41 poisoned losses were left out by all
    processes (tests/faults). It costs three operations on one number.
    """
    return loss * (1 + 0 * loss.detach())


def skip_nonfinite(optimizer: torch.optim.Optimizer, grad_norm: Tensor) -> Tensor:
    """Make the coming `optimizer.step()` leave weights and state alone if the gradient norm is not finite.

    Gives 1.0 where it will and 0.0 where not, on the device. The norm is of the gradients after their reduction over
    the processes, and so all decide alike. A fused optimizer decides on the device, as it does for torch's GradScaler;
    for others the norm crosses to the host.
    """
    skipped = (~grad_norm.isfinite()).to(torch.float32)  # what the fused kernels take, whatever the weights are
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner.defaults.get("fused"):
        inner.found_inf = skipped
    elif skipped:
        optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is passed over
    return getattr(skipped, "full_tensor", lambda: skipped)()  # of sharded gradients the norm is a DTensor


# ------------------------------------------------------------------------------------------------ losses of pixels


def pixel_loss(
    log_probs: Tensor, labels: Tensor, ignore_index: int, *, weights: Tensor | None = None, gamma: float = 0.0
) -> Tensor:
    """Sum -w (1 - p)^gamma log p over the pixels that are not ignored; (K, H, W) and (H, W) -> ().

    p is the probability of the pixel's own class and w that class's weight. With gamma 0 this is cross entropy, else
    the focal loss, of which w is the alpha (Lin et al. 2017, arXiv 1708.02002, equation 5, here of a softmax).
    """
    counted = labels != ignore_index
    place = labels.where(counted, 0)
    log_p = log_probs.gather(0, place[None])[0]  #                          (H, W)
    losses = -log_p * counted
    if gamma:
        losses = losses * (1 - log_p.exp()) ** gamma
    if weights is not None:
        losses = losses * weights[place]
    return losses.sum()


def dice_loss(log_probs: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Give 1 - the mean Dice of the classes that an image's labels have; (K, H, W) and (H, W) -> (), 0 without labels.

    Of each class 2 sum(p g) / (sum(p^2) + sum(g^2)), p its probability and g 1 where it is, 0 elsewhere (V-Net,
    Milletari et al. 2016, arXiv 1606.04797, section 3). Ignored pixels, whose label is no class, are in no sum.
    """
    counted = labels != ignore_index
    probs = log_probs.exp() * counted
    masks = labels == torch.arange(len(probs), device=labels.device)[:, None, None]  # (K, H, W)
    sizes = masks.sum(dim=(1, 2))
    dice = 2 * (probs * masks).sum(dim=(1, 2)) / (probs.square().sum(dim=(1, 2)) + sizes).clamp(min=1e-12)
    there = sizes > 0
    return ((1 - dice) * there).sum() / there.sum().clamp(min=1)


# ------------------------------------------------------------------------------------------------ masking

BLOCK_MIN_SHARE = 16 / 196  # of the patches: the smallest block
BLOCK_MIN_ASPECT, BLOCK_TRIES = 0.3, 10


def block_masking(noise: Tensor, grid_size: tuple[int, int], mask_ratio: float) -> Tensor:
    """Raise the noise (L,) of the patches in random blocks, so that these are removed first (paper, table 1f).

    Blocks are drawn as in the release of BEiT (arXiv 2106.08254, algorithm 1), one after the other; draws from torch.
    Where no further block fits in, patches of highest noise are removed, so that the ratio is exact.
    """
    (h, w), limit = grid_size, -math.log(BLOCK_MIN_ASPECT)
    num_removed = h * w - num_kept_patches(h * w, mask_ratio)
    removed, tries = torch.zeros(h, w), 0
    while (room := num_removed - int(removed.sum())) and tries < BLOCK_TRIES:
        tries += 1
        area, ratio, y, x = torch.rand(4, dtype=torch.float64).tolist()
        area = BLOCK_MIN_SHARE * h * w * (1 - area) + room * area
        ratio = math.exp(limit * (2 * ratio - 1))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < h and 0 < width < w:
            top, left = int(y * (h - height + 1)), int(x * (w - width + 1))
            block = removed[top : top + height, left : left + width]
            if 0 < block.numel() - int(block.sum()) <= room:
                block.fill_(1)
                tries = 0
    return noise + removed.flatten()


def grid_masking(noise: Tensor, grid_size: tuple[int, int], mask_ratio: float) -> Tensor:
    """Raise the noise (L,) of all but one of every four patches, which stay (paper, table 1f; mask ratio 0.75)."""
    removed = torch.ones(grid_size)
    removed[::2, ::2] = 0
    return noise + removed.flatten()


def build_masking(name: str, grid_size: tuple[int, int], mask_ratio: float) -> Callable[[Tensor], Tensor] | None:
    """Give the function of an image's noise (L,) after which the patches of smallest noise stay; None leaves it.

    Data workers call it under the image's seed, so that what it draws is a function of (seed, epoch, index).
    """
    masking = {"random": None, "block": block_masking, "grid": grid_masking}[name]
    return masking and functools.partial(masking, grid_size=grid_size, mask_ratio=mask_ratio)


def trivial_answers(target: Tensor, mask: Tensor, grid_size: tuple[int, int], channels: int) -> dict[str, Tensor]:
    """Answer for all patches, each (N, L, P*P*C), without learning anything.

    `mean_colour_error` is of the mean colour of the image's visible patches, `nearest_patch_error` of a copy of the
    visible patch that is nearest in the grid (the first in reading order, where several are).
    """
    visible = (1 - mask)[:, :, None]  #                                               (N, L, 1)
    pixels = target.unflatten(2, (-1, channels))  #                                   (N, L, P*P, C)
    colour = (pixels.mean(dim=2) * visible).sum(dim=1) / visible.sum(dim=1)  #        (N, C)
    h, w = grid_size
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(target.device)  # (L, 2)
    distances = (places[:, None] - places).square().sum(dim=2)  #                     (L, L), whole numbers
    distances = distances + mask[:, None, :] * (h * h + w * w)  #                     (N, L, L), removed ones too far
    nearest = distances.argmin(dim=2)  #                                              (N, L)
    return {
        "mean_colour_error": colour[:, None, None].expand_as(pixels).flatten(2),
        "nearest_patch_error": torch.gather(target, 1, nearest[:, :, None].expand_as(target)),
    }


# ------------------------------------------------------------------------------------------------ metrics


def accuracy(predictions: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of the labels (M,) that are among the first k predictions (M, >= k), best first, in percent."""
    return 100 * (predictions[:, :k] == labels[:, None]).any(dim=1).sum().item() / len(labels)


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Give the first word of every ImageNet id, in English: n01440764 is a tench."""
    info = ImageNetInfo("imagenet-22k")
    return {name: info.label_name_to_description(name).split(",")[0] for name in info.label_names()}


def describe_class(name: str) -> str:
    """Put the name of a class folder into words where it is one of ImageNet's ids; what cannot be drawn is a ?."""
    if re.fullmatch(r"n\d{8}", name):
        return imagenet_names().get(name, name)
    return "".join("?" if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in name)


def class_scores(hit: Tensor, true: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """Give IoU, accuracy, Dice and precision of each class in percent, (K,); nan for classes that no label has.

    From how many of its samples were found, how many there are, and how many answers name it. Accuracy is recall, and
    Dice is F1. The precision of a class that occurs and that no answer names is 0, as scikit-learn's.
    """
    scores = {
        "iou": hit / (true + predicted - hit),
        "acc": hit / true,
        "dice": 2 * hit / (true + predicted),
        "precision": hit / predicted.clamp(min=1),
    }
    return {name: (100 * score).where(true > 0, torch.nan) for name, score in scores.items()}


class ConfusionMatrix:
    """Count how often which class is taken for which: `counts` (K, K) int64, rows true, columns predicted.

    From its counts, summed over images and processes, come all scores; none is a mean over batches or images.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", ignore_index: int | None = None):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        self.ignore_index = ignore_index

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Add labels and predictions of any equal shape; where the label is `ignore_index` nothing counts.

        ValueError for shapes that differ, and for classes that do not exist: they would be counted as others.
        """
        num_classes = len(self.counts)
        if labels.shape != predictions.shape:
            raise ValueError(f"labels of shape {tuple(labels.shape)}, predictions of shape {tuple(predictions.shape)}")
        labels, predictions = (x.flatten().to(self.counts.device).long() for x in (labels, predictions))
        if self.ignore_index is not None:
            counted = labels != self.ignore_index
            labels, predictions = labels[counted], predictions[counted]
        if len(labels) and max(labels.max(), predictions.max()) >= num_classes:
            raise ValueError(f"label {labels.max()} or prediction {predictions.max()} of {num_classes} classes from 0")
        found = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
        self.counts += found.view(num_classes, num_classes)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up what all processes counted; every process calls it, once."""
        self.counts = accelerator.reduce(self.counts, "sum")

    def per_class(self) -> dict[str, Tensor]:
        """Give the `class_scores`, (K,) float64 each."""
        counts = self.counts.double().cpu()
        return class_scores(counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0))

    def figures(self, prefix: str = "testing") -> dict[str, float]:
        """Give means of the `class_scores` over the classes that occur, and the accuracy of all pixels, in percent.

        Last comes over how many classes the means are.

        MMSegmentation's mIoU, mAcc, aAcc and mDice wherever every class occurs, as in ADE20K.

        Deviation: a class that no label has is left out, also when it is predicted somewhere; MMSegmentation then
        counts it as 0. Reason: sets with a few of the classes could not be compared. Effect: none on ADE20K.
        """
        scores = self.per_class()
        found = {f"{prefix}_m{name}": score.nanmean().item() for name, score in scores.items()}
        counts = self.counts.double()
        found[f"{prefix}_aacc"] = (100 * counts.diagonal().sum() / counts.sum()).item()
        return found | {f"{prefix}_classes": int((counts.sum(dim=1) > 0).sum())}


KNN_NEIGHBOURS, KNN_TEMPERATURE = 20, 0.07
KNN_CHUNK = 1024  # queries at a time: memory is this times the number of training features


def knn_classify(
    bank: Tensor, bank_labels: Tensor, features: Tensor, num_classes: int, num_neighbours: int = KNN_NEIGHBOURS
) -> Tensor:
    """Rank the classes of features (M, D) by their nearest neighbours in a bank (B, D): (M, K), best first.

    The vote of Wu et al. 2018 (arXiv 1805.01978, section 3.4), as DINO uses it: each neighbour counts
    exp(cosine similarity / 0.07). All features have unit length. A class without a vote has no place: there is -1.
    """
    num_neighbours = min(num_neighbours, len(bank))
    ranked = []
    for chunk in features.split(KNN_CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(num_neighbours, dim=1)  # (m, k)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, bank_labels[nearest], ((similarity - 1) / KNN_TEMPERATURE).exp())
        votes, classes = votes.sort(dim=1, descending=True, stable=True)
        ranked.append(classes.masked_fill(votes == 0, -1))
    return torch.cat(ranked)
