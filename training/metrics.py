"""What is said of answers: figures, tables and confusion matrices beside the weights; and weights of classes.

Knows no network and no data set. Every figure comes from the answers of all processes together, none from means.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from storage.files import (
    optional_write,
    read_json,
    read_text,
    rename_aside,
    user_path,
    write_json,
    write_rows,
    written_whole,
)
from storage.lists import as_text
from storage.snapshots import is_hub_model
from storage.weights import find_weights
from training.pictures import draw_rows, show_values
from training.process import gather_slices, process_slice
from training.records import print_figures
from utils import ConfusionMatrix, accuracy, class_scores, describe_class

EVALUATION_FILE = "evaluation.json"
TOP = 5
NUM_PICTURES = 8
ROWS = 1024  # of scores at a time
AUC_CLASSES = 64  # of which the scores of all images are gathered at a time
MAX_MATRIX_CLASSES = 2000  # a confusion matrix of more is not written: at 2000 classes it has about 8 MB

# ------------------------------------------------------------------------------------------------ classification


def class_auc(scores: Tensor, labels: Tensor, first_class: int = 0) -> Tensor:
    """Give each class's area under the ROC curve against all other classes, in percent, (c,) float64.

    `scores` (M, c) are of c classes from `first_class` on. It is the share of pairs of an image of the class and one
    of another in which the first has the higher score, a tie counting half (Mann and Whitney; scikit-learn's
    roc_auc_score with multi_class="ovr"). Nan where no image, or every image, is of the class.
    """
    columns = scores.T.contiguous()
    classes = torch.arange(first_class, first_class + len(columns), device=labels.device)
    positive = labels == classes[:, None]  #                                              (c, M)
    ordered = columns.sort(dim=1).values
    below = torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True)
    count = positive.sum(dim=1)
    twice_won = (below * positive).sum(dim=1) - count**2  # whole numbers: the same on any device
    return 100 * twice_won.double() / (2 * count * (len(labels) - count)).double()


class ImageSource(NamedTuple):
    """Where the evaluated images come from: names of classes (K), an image (C, H, W) by its index, channels to show."""

    names: Sequence[str]
    image_of: Callable[[int], Tensor]
    channels: list[int] | None


class ImageEvaluation(NamedTuple):
    """Of every image of a data set, in its order, on the CPU: `losses` (M,), best classes first `top` (M, up to 5).

    `auc` (K,) is each class's.
    """

    losses: Tensor
    top: Tensor
    labels: Tensor
    auc: Tensor
    source: ImageSource

    def per_class(self) -> dict[str, Tensor]:
        """Give precision, recall, F1 and AUC of each class in percent, (K,) float64; nan for one without images."""
        num_classes, answers = len(self.auc), self.top[:, 0]
        counted = (self.labels[self.labels == answers], self.labels, answers)
        scores = class_scores(*(torch.bincount(found, minlength=num_classes).double() for found in counted))
        found = {"precision": scores["precision"], "recall": scores["acc"], "f1": scores["dice"]}
        return found | {"auc": self.auc.where(~found["recall"].isnan(), torch.nan)}

    def figures(self, prefix: str = "testing") -> dict[str, float]:
        """Give what is watched in training: cross entropy; top-1, top-5 and macro F1 in percent."""
        return {
            f"{prefix}_loss": self.losses.double().mean().item(),
            f"{prefix}_top1_acc": accuracy(self.top, self.labels),
            f"{prefix}_top5_acc": accuracy(self.top, self.labels, TOP),
            f"{prefix}_macro_f1": self.per_class()["f1"].nanmean().item(),
        }

    def report(self, prefix: str = "testing") -> dict[str, float]:
        """Give all figures: those of `figures`, macro precision, recall and AUC, and over how many classes they are.

        A class without images is left out of the means, also when it is predicted somewhere. Where all images are of
        one class there is no AUC.
        """
        found = {f"{prefix}_macro_{name}": score.nanmean().item() for name, score in self.per_class().items()}
        found = {name: value for name, value in found.items() if not math.isnan(value)}
        return self.figures(prefix) | found | {f"{prefix}_classes": len(self.labels.unique())}

    def confusions(self) -> list[tuple[int, int, int]]:
        """Give all errors as (true class, predicted class, times), most frequent first."""
        num_classes, wrong = len(self.auc), self.labels != self.top[:, 0]
        places, times = (self.labels * num_classes + self.top[:, 0])[wrong].unique(return_counts=True)
        order = times.argsort(descending=True, stable=True)
        ordered = places[order].tolist(), times[order].tolist()
        return [(*divmod(place, num_classes), n) for place, n in zip(*ordered, strict=True)]

    def tables(self) -> dict[str, list]:
        """Give per_class.tsv, a row for each class, and the confusion matrix, as rows."""
        num_classes, names, taken_for = len(self.auc), self.source.names, {}
        for true, predicted, times in self.confusions():
            taken_for.setdefault(true, (names[predicted], times))
        scores = self.per_class()
        rows = [["class", "name", "images", "top1", "top5", *scores, "most_often_taken_for", "times"]]
        for index, name in enumerate(names):
            there = self.labels == index
            tops = [accuracy(self.top[there], self.labels[there], k) if there.any() else math.nan for k in (1, TOP)]
            cells = [f"{value:.2f}" for value in (*tops, *(values[index].item() for values in scores.values()))]
            rows.append((name, describe_class(name), int(there.sum()), *cells, *taken_for.get(index, ("", 0))))
        tables = {"per_class.tsv": rows}
        if num_classes <= MAX_MATRIX_CLASSES:
            counts = torch.bincount(self.labels * num_classes + self.top[:, 0], minlength=num_classes**2)
            tables["confusion.tsv"] = confusion_rows(counts.view(num_classes, num_classes), names)
        return tables

    def write(self, folder: Path, record: Mapping, prefix: str = "") -> list[str]:
        """Write a report with its tables, and a picture of the most frequent errors, and name the files."""
        rows, (names, image_of, channels) = {}, self.source
        for true, predicted, times in self.confusions()[:NUM_PICTURES]:
            wrong = (self.labels == true) & (self.top[:, 0] == predicted)
            pictures = torch.stack([image_of(index) for index in wrong.nonzero()[:NUM_PICTURES, 0].tolist()])
            what = f"{describe_class(names[true])}, taken for {describe_class(names[predicted])}"
            count = int((self.labels == true).sum())
            rows[f"{what}: {times} of {count}"] = show_values([pictures if channels else pictures / 255], channels)[0]
        written = write_report(folder, record, self.tables(), prefix=prefix)
        picture = folder / f"{prefix}worst_confusions.png"
        rename_aside(picture)
        if rows:
            draw_rows(rows).save(picture)
        return [*written, picture.name] if rows else written


def gather_evaluation(accelerator: Accelerator, scores: Tensor, labels: Tensor, source: ImageSource) -> ImageEvaluation:
    """Put together the scores (slice, K) that each process gave to its slice of M images; all know the labels (M,).

    For the AUC images are ranked by log-probability in float64: in float32 the sure answers would tie at 1.
    """
    rank, world_size = process_slice(accelerator)
    device = torch.device("cpu") if scores.device.type == "mps" else scores.device  # which has no float64
    own, there = labels[rank::world_size].to(scores.device), labels.to(device)
    parts = scores.split(ROWS), own.split(ROWS)
    losses = torch.cat([F.cross_entropy(*pair, reduction="none") for pair in zip(*parts, strict=True)])  # (slice,)
    top = scores.topk(min(TOP, scores.shape[1]), dim=1).indices.float()  # exact up to 16 million classes
    table = gather_slices(accelerator, torch.cat([losses[:, None], top], dim=1), len(labels)).cpu()  #    (M, 1 + 5)
    partitions = torch.cat([part.to(device).double().logsumexp(dim=1) for part in parts[0]])
    partitions = gather_slices(accelerator, partitions, len(labels))  #                                   (M,)
    auc = []
    for first, chunk in enumerate(scores.split(AUC_CLASSES, dim=1)):
        chunk = gather_slices(accelerator, chunk, len(labels)).to(device).double() - partitions[:, None]  # (M, 64)
        auc.append(class_auc(chunk, there, first * AUC_CLASSES))
    return ImageEvaluation(table[:, 0], table[:, 1:].long(), labels, torch.cat(auc).cpu(), source)


# ------------------------------------------------------------------------------------------------ segmentation


class PixelEvaluation(NamedTuple):
    """Of all labelled pixels of a data set: how often which class is taken for which, and the classes' names (K)."""

    confusion: ConfusionMatrix
    names: Sequence[str]

    def figures(self, prefix: str = "testing") -> dict[str, float]:
        return self.confusion.figures(prefix)

    def report(self, prefix: str = "testing") -> dict[str, float]:
        return self.figures(prefix)

    def tables(self) -> dict[str, list]:
        """Give per_class.tsv, each class's share of the pixels and its scores in percent, and the confusion matrix."""
        counts, scores = self.confusion.counts.cpu(), self.confusion.per_class()
        shares = 100 * counts.sum(dim=1).double() / counts.sum()
        table = [["class", "name", "pixels_percent", *scores]]
        for index, name in enumerate(self.names):
            table.append([index, name, *(f"{values[index].item():.2f}" for values in (shares, *scores.values()))])
        return {"per_class.tsv": table, "confusion.tsv": confusion_rows(counts, self.names)}

    def write(self, folder: Path, record: Mapping, prefix: str = "") -> list[str]:
        """Write a report with its tables, and name the files."""
        return write_report(folder, record, self.tables(), prefix=prefix)


# ------------------------------------------------------------------------------------------------ files


def find_writable_weights(path: str) -> Path:
    """Find weights whose figures can be written beside them; PermissionError where not."""
    if is_hub_model(path):
        get = f"hf download {path.removeprefix('hf:').partition('@')[0]} --local-dir FOLDER"
        raise PermissionError(f"the figures are written beside the weights, so get these to a folder of yours: {get}")
    weights = find_weights(path)
    if not os.access(weights.parent, os.W_OK):
        raise PermissionError(f"the figures are written beside the weights, but {weights.parent} cannot be written to")
    return weights


def confusion_rows(counts: Tensor, names: Sequence[str]) -> Iterator[Sequence]:
    """Give a confusion matrix (K, K) as the rows of a table: a row for each true class, a column for each answer."""
    yield ["true class, in columns the answers", *names]
    for name, row in zip(names, counts.tolist(), strict=True):
        yield [name, *row]


def read_evaluation(folder: Path) -> dict:
    """Read the evaluation.json of a folder; empty where there is none, or it is damaged."""
    try:
        return read_json(folder / EVALUATION_FILE)
    except (OSError, ValueError):
        return {}


def write_report(
    folder: Path, record: Mapping, tables: Mapping[str, Iterable[Sequence]], *, prefix: str = ""
) -> list[str]:
    """Write evaluation.json and tables beside weights, and name the files; those of before are renamed aside.

    With a prefix, "test_", tables have it before their names, and the record's entries are added to those there.
    """
    if prefix:
        record = read_evaluation(folder) | dict(record)
    else:
        rename_aside(folder / EVALUATION_FILE)
    with written_whole(folder / EVALUATION_FILE) as temporary:
        write_json(temporary, record)
    for name, rows in tables.items():
        rename_aside(folder / f"{prefix}{name}")
        write_rows(folder / f"{prefix}{name}", rows)
    return [EVALUATION_FILE, *(f"{prefix}{name}" for name in tables)]


def mark_images(files) -> str:
    """Tell a set of images from others by the names of its folder and of its files, wherever it lies."""
    return f"{Path(files.root).name} {files.fingerprint()}"


def note_selection(accelerator: Accelerator, files, record: Mapping) -> None:
    """Warn of a score on the very images that chose the weights, as the config.json beside them tells."""
    if record.get("chosen_on") == mark_images(files):
        accelerator.print(
            f"{'note':<16}best_checkpoint was chosen by its score on {files.describe()}: that score is too high on "
            "average; images that chose nothing give a fair one"
        )


def describe_evaluation(weights: Path, files, record: Mapping) -> dict[str, object]:
    """Say what was scored on which images, and whether these chose the weights."""
    places = {"weights": as_text(str(weights)), "data": as_text(str(files.root)), "num_images": len(files)}
    return places | {"chose_best_checkpoint": record.get("chosen_on") == mark_images(files)}


def report_evaluation(
    accelerator: Accelerator,
    weights: Path,
    files,
    evaluation: ImageEvaluation | PixelEvaluation,
    record: Mapping,
    **how: object,
) -> dict[str, float]:
    """Write beside weights what they score on files, print it, and give what is watched in training.

    Their score on --test_folder or --test_split, which training took once, stays in evaluation.json.
    """
    report = evaluation.report()
    if accelerator.is_main_process:
        before = read_evaluation(weights.parent)
        same = Path(str(before.get("weights"))).name == weights.name
        tested = {name: value for name, value in before.items() if same and name.startswith("test_")}
        summary = report | how | describe_evaluation(weights, files, record) | tested
        written = evaluation.write(weights.parent, summary)
        print(f"{'written':<16}{', '.join(written)} in {weights.parent}")
    note_selection(accelerator, files, record)
    print_figures(accelerator, report)
    return evaluation.figures()


def report_best(
    accelerator: Accelerator, best: Path, files, evaluation: ImageEvaluation | PixelEvaluation, record: Mapping
) -> None:
    """Write beside the best weights of a run what they score; a disk that is full costs no more than that."""
    if accelerator.is_main_process:
        summary = evaluation.report() | describe_evaluation(best / "model.safetensors", files, record)
        with optional_write(best / EVALUATION_FILE):
            evaluation.write(best, summary)


def report_test(
    accelerator: Accelerator, best: Path, files, evaluate: Callable[[], ImageEvaluation | PixelEvaluation]
) -> dict[str, float]:
    """Score the best weights on test images, add that to what lies beside them, and print it; once for the same."""
    figures = find_test_figures(accelerator, best, files)
    if figures is None:
        evaluation = evaluate()
        figures = evaluation.report("test") | {"test_num_images": len(files)}
        if accelerator.is_main_process:
            tested = {"test_data": as_text(str(files.root)), "test_images": mark_images(files)}
            with optional_write(best / EVALUATION_FILE):
                evaluation.write(best, figures | tested, prefix="test_")
    print_figures(accelerator, figures)
    return figures


def find_test_figures(accelerator: Accelerator, folder: Path, files) -> dict[str, float] | None:
    """Give the figures of a test on these images that lie beside weights, or None; every process calls this."""
    found: list = [None]
    if accelerator.is_main_process:
        record = read_evaluation(folder)
        if record.get("test_images") == mark_images(files):
            found = [{k: v for k, v in record.items() if k.startswith("test_") and isinstance(v, int | float)}]
    broadcast_object_list(found)
    return found[0]


# ------------------------------------------------------------------------------------------------ weights of classes


def read_class_weights(given: Sequence[str] | None) -> list[float] | str | None:
    """Read --class_weights: None, "balanced", or numbers, of the flag or of a file; ValueError where they are none."""
    if given is None or list(given) in (["none"], ["balanced"]):
        return None if given is None or given[0] == "none" else "balanced"
    source = " ".join(given)
    if len(given) == 1 and not is_float(given[0]):
        file = user_path(given[0])
        given = read_text(file).split() if file.is_file() else []
    if not given or not all(map(is_float, given)):
        raise ValueError(f"--class_weights {source}: give none, balanced, a number for each class, or a file of them")
    weights = [float(number) for number in given]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"--class_weights {source}: weights are at least 0, finite, and not all 0")
    return weights


def is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def choose_class_weights(weights: list[float] | str | None, counts: np.ndarray) -> Tensor | None:
    """Give the weight of each class (K,), None without; ValueError where there are not as many as classes.

    "balanced": N / (k n), of N samples in the k classes that have any, n of them in this one, so that the mean over
    the samples is 1 (scikit-learn's compute_class_weight; King and Zeng 2001). A class without samples has 0.
    """
    if weights is None:
        return None
    if weights == "balanced":
        weights = np.divide(counts.sum() / (counts > 0).sum(), counts, out=np.zeros(len(counts)), where=counts > 0)
    if len(weights) != len(counts):
        raise ValueError(
            f"--class_weights has {len(weights)} numbers, but there are {len(counts)} classes; give as many"
        )
    return torch.tensor(weights, dtype=torch.float32)


def describe_class_weights(weights: Tensor, names: Sequence[str]) -> str:
    """Name the classes of the lowest and the highest weight."""
    ends = (int(weights.argmin()), int(weights.argmax()))
    return " to ".join(f"{weights[k].item():.3g} ({describe_class(names[k])})" for k in ends)
