"""Figures and tables of answers, and weights of classes: by hand, by brute force, and against torchmetrics."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from accelerate import Accelerator

from training.metrics import (
    AUC_CLASSES,
    ImageEvaluation,
    ImageSource,
    choose_class_weights,
    class_auc,
    find_test_figures,
    gather_evaluation,
    mark_images,
    read_class_weights,
    write_report,
)

NOWHERE = ImageSource((), lambda index: torch.zeros(3, 4, 4), None)


def drawn(num_images: int, num_classes: int, absent: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, rounded so that some tie, and labels of all classes but some; right more often than not."""
    generator = torch.Generator().manual_seed(num_classes)
    there = torch.tensor([k for k in range(num_classes) if k not in absent])
    labels = there[torch.randint(0, len(there), (num_images,), generator=generator)]
    scores = torch.randn(num_images, num_classes, generator=generator)
    scores[torch.arange(num_images), labels] += 1.5
    return (scores * 4).round() / 4, labels


def pairs_won(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """The definition: the share of pairs of a positive and a negative that are in order, a tie counting half."""
    higher = scores[positive][:, None], scores[~positive][None]
    return 100 * ((higher[0] > higher[1]).double() + 0.5 * (higher[0] == higher[1])).mean().item()


# -------------------------------------------------------------------------------- classification


def test_auc_of_a_hand_made_case():
    """Images of class 1 have 0.8 and 0.4, others 0.6, 0.4 and 0.1: of six pairs four are in order, and one ties."""
    scores = torch.tensor([0.8, 0.4, 0.6, 0.4, 0.1])[:, None]
    assert class_auc(scores, torch.tensor([1, 1, 0, 2, 0]), 1).tolist() == [pytest.approx(100 * 4.5 / 6)]


def test_auc_equals_brute_force_and_torchmetrics_and_is_nan_for_absent_classes():
    scores, labels = drawn(300, 7, absent=(2, 6))
    found = class_auc(scores, labels)
    assert found.isnan().tolist() == [k in (2, 6) for k in range(7)]
    for k in (0, 1, 3, 4, 5):
        assert found[k].item() == pytest.approx(pairs_won(scores[:, k], labels == k), abs=1e-9)
        theirs = torchmetrics.functional.classification.binary_auroc(scores[:, k].sigmoid(), (labels == k).long())
        assert found[k].item() == pytest.approx(100 * theirs.item(), abs=1e-3)


def test_auc_is_nan_where_all_images_are_of_one_class():
    assert class_auc(torch.rand(4, 2), torch.ones(4, dtype=torch.long)).isnan().all()


def test_figures_equal_torchmetrics_with_absent_classes():
    """150 classes, of which some have no image, and so more than one gathering of scores."""
    scores, labels = drawn(900, 150, absent=(0, 77, 149))
    assert scores.shape[1] > 2 * AUC_CLASSES
    evaluation = gather_evaluation(Accelerator(cpu=True), scores, labels, NOWHERE)
    there = labels.unique().tolist()
    absent = sorted(set(range(150)) - set(there))
    assert {0, 77, 149} <= set(absent)
    answers = torch.from_numpy(scores.numpy().argmax(axis=1))
    evaluation = evaluation._replace(top=torch.cat([answers[:, None], evaluation.top[:, 1:]], dim=1))  # ties alike
    found, report = evaluation.per_class(), evaluation.report()
    kinds = {"precision": "MulticlassPrecision", "recall": "MulticlassRecall", "f1": "MulticlassF1Score"}
    for name, kind in kinds.items():
        theirs = getattr(torchmetrics.classification, kind)(num_classes=150, average=None)(answers, labels)
        torch.testing.assert_close(found[name][there], 100 * theirs[there].double(), rtol=0, atol=1e-4)
        assert found[name][absent].isnan().all()
        assert report[f"testing_macro_{name}"] == pytest.approx(100 * theirs[there].mean().item(), abs=1e-4)
    log_probs = scores.double().log_softmax(dim=1)
    by_hand = [pairs_won(log_probs[:, k], labels == k) for k in there]
    torch.testing.assert_close(found["auc"][there].tolist(), by_hand, rtol=0, atol=0.02)  # ties that rounding breaks
    assert report["testing_macro_auc"] == pytest.approx(np.mean(by_hand), abs=1e-3)
    assert report["testing_classes"] == len(there)
    assert report["testing_loss"] == pytest.approx(F.cross_entropy(scores.double(), labels).item(), abs=1e-6)


def test_two_classes_have_one_auc_and_sure_answers_do_not_tie():
    """Margins of 20 and more: in float32 all probabilities are 1."""
    margins, labels = torch.tensor([20.0, 22.0, 21.0, 25.0, 23.0]), torch.tensor([0, 1, 0, 1, 0])
    scores = torch.stack([torch.zeros(5), margins], dim=1)
    assert scores.softmax(dim=1)[:, 1].unique().tolist() == [1]
    evaluation = gather_evaluation(Accelerator(cpu=True), scores, labels, NOWHERE)
    assert evaluation.auc.tolist() == pytest.approx([100 * 5 / 6] * 2)


def test_report_of_images_of_one_class_has_no_auc():
    evaluation = gather_evaluation(Accelerator(cpu=True), torch.eye(3), torch.tensor([1, 1, 1]), NOWHERE)
    report = evaluation.report("test")
    assert "test_macro_auc" not in report and report["test_classes"] == 1
    assert report["test_macro_recall"] == pytest.approx(100 / 3) == report["test_top1_acc"]
    json.dumps(report, allow_nan=False)


def test_tables_of_a_hand_made_case():
    top = torch.tensor([[0, 1], [2, 0], [2, 0], [1, 0], [0, 1]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    names = ["ant", "bee", "n01440764", "never"]
    auc, source = torch.tensor([80.0, 70.0, torch.nan, torch.nan]).double(), NOWHERE._replace(names=names)
    evaluation = ImageEvaluation(torch.ones(5), top, labels, auc, source)
    assert evaluation.confusions() == [(0, 2, 2), (1, 0, 1)]
    tables = {name: [list(row) for row in rows] for name, rows in evaluation.tables().items()}
    assert tables["confusion.tsv"][0][1:] == names
    assert [row[1:] for row in tables["confusion.tsv"][1:]] == [[1, 0, 2, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]
    head, *rows = tables["per_class.tsv"]
    ant, bee, tench, never = (dict(zip(head, row, strict=True)) for row in rows)
    scores = [ant[name] for name in ("images", "precision", "recall", "f1", "auc")]
    assert scores == [3, "50.00", "33.33", "40.00", "80.00"]
    assert (ant["top1"], ant["top5"]) == ("33.33", "100.00") and (bee["precision"], bee["f1"]) == ("100.00", "66.67")
    assert (ant["most_often_taken_for"], ant["times"]) == ("n01440764", 2) and tench["name"] == "tench"
    assert (never["images"], never["precision"], never["recall"], never["times"]) == (0, "nan", "nan", 0)


# -------------------------------------------------------------------------------- files


class Images:
    """A set of images as far as a report knows it."""

    def __init__(self, root: str, content: str):
        self.root, self.content = root, content

    def fingerprint(self) -> str:
        return self.content


def test_report_renames_what_is_there_and_a_test_is_added_to_it(tmp_path):
    write_report(tmp_path, {"testing_loss": 1.0}, {"table.tsv": [["a"], [1]]})
    write_report(tmp_path, {"testing_loss": 2.0}, {"table.tsv": [["a"], [2]]})
    images = Images("/data/test", "abc")
    record = {"test_loss": 3.0, "test_classes": 2, "test_images": mark_images(images), "test_data": "/data/test"}
    written = write_report(tmp_path, record, {"table.tsv": [["a"], [3]]}, prefix="test_")
    assert written == ["evaluation.json", "test_table.tsv"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"testing_loss": 2.0} | record
    assert json.loads((tmp_path / "evaluation_1.json").read_text()) == {"testing_loss": 1.0}
    assert [(tmp_path / f"{name}.tsv").read_text() for name in ("table", "table_1", "test_table")] == [
        "a\n2\n", "a\n1\n", "a\n3\n",
    ]  # fmt: skip
    accelerator, moved = Accelerator(cpu=True), Images("/elsewhere/test", "abc")
    assert find_test_figures(accelerator, tmp_path, moved) == {"test_loss": 3.0, "test_classes": 2}
    assert find_test_figures(accelerator, tmp_path, Images("/data/val", "abc")) is None
    assert find_test_figures(accelerator, tmp_path, Images("/data/test", "abd")) is None
    (tmp_path / "evaluation.json").write_text("{cut sho")
    assert find_test_figures(accelerator, tmp_path, images) is None


# -------------------------------------------------------------------------------- weights of classes


def test_balanced_weights_are_inverse_frequencies_whose_mean_over_samples_is_one():
    counts = np.array([6, 3, 0, 1])
    weights = choose_class_weights("balanced", counts)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 0, 10 / 3])
    assert (weights.numpy() * counts).sum() / counts.sum() == pytest.approx(1)
    assert choose_class_weights(None, counts) is None


def test_class_weights_are_read_from_words_numbers_and_files(tmp_path):
    assert read_class_weights(None) is read_class_weights(["none"]) is None
    assert read_class_weights(["balanced"]) == "balanced" and read_class_weights(["1", "0", "2.5e-1"]) == [1, 0, 0.25]
    (tmp_path / "weights.txt").write_text("1\n0.5\n", encoding="utf-8-sig")
    assert read_class_weights([str(tmp_path / "weights.txt")]) == [1, 0.5]
    assert choose_class_weights([1, 0.5], np.array([3, 4])).tolist() == [1, 0.5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["1", "x"], "--class_weights 1 x: give none, balanced, a number for each class, or a file of them"),
        (["1", "-1"], "weights are at least 0, finite, and not all 0"),
        (["1", "nan"], "weights are at least 0, finite, and not all 0"),
        (["0", "0"], "weights are at least 0, finite, and not all 0"),
        ([str(math.inf)], "weights are at least 0, finite, and not all 0"),
    ],
)
def test_class_weights_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_class_weights(given)


def test_as_many_class_weights_as_classes_are_needed(tmp_path):
    with pytest.raises(ValueError, match="--class_weights has 3 numbers, but there are 2 classes; give as many"):
        choose_class_weights([1, 2, 3], np.array([1, 1]))
    with pytest.raises(ValueError, match=r"absent\.txt: give none, balanced"):
        read_class_weights([str(tmp_path / "absent.txt")])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt: give none, balanced"):
        read_class_weights([str(tmp_path / "empty.txt")])
