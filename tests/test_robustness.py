"""Scores on some of a classifier's classes, and on ImageNet-C's corruptions, by hand on drawn images."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_images, weights
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import finetune_classifier
from dataset import (
    EVAL_EPOCH,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ResizeCenterCrop,
    SampleKey,
    build_eval_images,
    normalize,
)
from finetune_classifier import main, parse_args
from model import ViTMAEForImageClassification
from storage.decoding import read_image
from storage.lists import FileList, list_images
from storage.sizes import MAEConfig
from training.robustness import ALEXNET_ERRORS, choose_classes, find_corruptions, summarize_corruptions

CONFIG = MAEConfig(img_size=16, patch_size=4, encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2)
NAMES = [f"class{number}" for number in range(10)]
RELEASED = MAEConfig(img_size=32, encoder_embed_dim=192, encoder_depth=1, encoder_num_heads=3)
IMAGENET = ImageNetInfo("imagenet-1k").label_names()


@pytest.fixture
def classifier(tmp_path) -> Path:
    """A classifier of ten classes whose answers vary."""
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(CONFIG, 10)
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path / "classifier"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    record = {"architecture": "ViTMAEForImageClassification", "config": CONFIG.as_record(decoder=False)}
    (folder / "config.json").write_text(json.dumps({**record, "num_classes": 10, "class_names": NAMES}))
    return folder


def evaluate(data: Path, classifier: Path, *more: str) -> dict[str, float]:
    given = ["--path_to_data", str(data), "--path_to_pretrained_mae_weights", str(classifier), "--eval_only"]
    return main(parse_args([*given, "--working_directory", str(data.parent / "work"), "--num_workers", "0", *more]))


def score(folder: Path, classifier: Path, crop_ratio: float = 0.875) -> torch.Tensor:
    """Give the scores of the images of a folder, in the order of its list, (M, 10)."""
    model = ViTMAEForImageClassification(CONFIG, 10).eval()
    model.load_state_dict(weights(classifier))
    files = list_images(folder)
    images = torch.stack([ResizeCenterCrop((16, 16), crop_ratio)(read_image(files.path(i))) for i in range(len(files))])
    with torch.no_grad():
        return model(normalize(images, IMAGENET_MEAN, IMAGENET_STD))


def test_other_classes_are_masked_where_images_have_some_of_them_alone(classifier, tmp_path):
    chosen = [2, 5, 7]
    for number in chosen:
        draw_images(tmp_path / "some" / NAMES[number], 8, seed=number)
    figures = evaluate(tmp_path / "some", classifier, "--class_subset")
    scores, labels = score(tmp_path / "some", classifier), torch.tensor(chosen).repeat_interleave(8)
    masked = torch.full_like(scores, -torch.inf)
    masked[:, chosen] = scores[:, chosen]
    assert figures["testing_top1_acc"] == pytest.approx(100 * (masked.argmax(dim=1) == labels).float().mean().item())
    assert figures["testing_loss"] == pytest.approx(torch.nn.functional.cross_entropy(masked, labels).item(), rel=1e-5)
    assert (masked.argmax(dim=1) != scores.argmax(dim=1)).any()  # so that the mask decides something


def test_a_class_that_the_classifier_does_not_know_is_named(classifier, tmp_path):
    for name in ("class3", "class11"):
        draw_images(tmp_path / "some" / name, 1)
    with pytest.raises(ValueError, match=r"class11"):
        evaluate(tmp_path / "some", classifier, "--class_subset")
    with pytest.raises(ValueError, match=r"it lacks"):  # without the flag all ten are needed
        evaluate(tmp_path / "some", classifier)


@pytest.fixture
def released(tmp_path) -> Path:
    """A classifier of 1000 classes as the original release has them: without their names, and with varied answers."""
    torch.manual_seed(0)
    model = ViTMAEForImageClassification(RELEASED, 1000)
    torch.nn.init.normal_(model.head.weight)
    torch.save({"model": model.state_dict()}, tmp_path / "mae_finetuned_vit.pth")
    return tmp_path / "mae_finetuned_vit.pth"


def test_weights_of_the_original_release_have_imagenets_classes(released, tmp_path):
    assert len(IMAGENET) == 1000 and sorted(IMAGENET) == IMAGENET and IMAGENET[0] == "n01440764"
    for number in (0, 3):
        draw_images(tmp_path / "some" / IMAGENET[number], 4, seed=number)
    figures = evaluate(tmp_path / "some", released, "--class_subset")
    assert 0 <= figures["testing_top1_acc"] <= 100 and figures["testing_top5_acc"] == 100  # of two classes


def test_folders_named_by_numbers_are_imagenets_classes(released, tmp_path):
    """As in ImageNet-V2, whose names stand in another order than their numbers: 0, 1, 10, 100."""
    for number, name in enumerate(IMAGENET):
        draw_images(tmp_path / "by_name" / name, 1, seed=number)
        (tmp_path / "by_number").mkdir(exist_ok=True)
        (tmp_path / "by_number" / str(number)).symlink_to(tmp_path / "by_name" / name)
    figures = evaluate(tmp_path / "by_name", released)
    assert evaluate(tmp_path / "by_number", released) == pytest.approx(figures)
    for number in (2, 10):
        shutil.copytree(tmp_path / "by_name" / IMAGENET[number], tmp_path / "some" / str(number))
    with pytest.raises(ValueError, match=r"some has classes that are none of .*: 10, 2; rename them"):
        evaluate(tmp_path / "some", released, "--class_subset")  # they may be counted within ImageNet-A's 200


def choose(classes: list[str], class_names=None, path: str = "folder", num_classes: int = 1000, subset: bool = False):
    files = FileList(Path(path), np.array([], dtype="S"), np.array([], dtype=np.int32), tuple(classes))
    args = argparse.Namespace(path_to_data=path, class_subset=subset, num_classes=None)
    return choose_classes(files, class_names, num_classes, Path("weights.pth"), args)


def test_classes_of_tables_of_the_hub_are_found_by_what_they_are_called():
    """ClassLabels have an order of their own; values of a column come sorted as texts: 0, 1, 10."""
    table, some, words = "hf:owner/name", [IMAGENET[7], IMAGENET[3]], [f"word {n}" for n in range(1000)]
    as_texts = sorted(map(str, range(1000)))
    assert choose(as_texts, path=table) == list(map(int, as_texts)) != list(range(1000))
    assert choose([f"{n:03d}" for n in range(1000)], path=table) == list(range(1000))
    assert choose(IMAGENET, path=table) == choose(words, path=table) == list(range(1000))
    assert choose(some, path=table, subset=True) == [7, 3]
    with pytest.raises(ValueError, match=r"which names none, so they are ImageNet's"):
        choose(sorted(words), path=table)  # the order of a column of texts is the alphabet's
    with pytest.raises(ValueError, match=r"are none of .*: crane; rename them"):
        choose(["crane", "kite"], ["crane", "kite", "crane"], num_classes=3, subset=True)
    assert choose(["crane", "kite", "crane"], ["crane", "kite", "crane"], num_classes=3) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"outside class folders"):
        choose([], ["a", "b"], num_classes=2, subset=True)


def test_a_thousand_folders_of_other_names_are_refused(released, tmp_path):
    for number in range(1000):
        draw_images(tmp_path / "words" / f"word{number}", 1)
    with pytest.raises(ValueError, match=r"names none, so they are ImageNet's .*: it lacks n01440764"):
        evaluate(tmp_path / "words", released)
    names = [f"word{number}" for number in range(1000)]  # the way out that it names
    (tmp_path / "config.json").write_text(
        json.dumps({"config": RELEASED.as_record(decoder=False), "class_names": names})
    )
    assert "testing_top1_acc" in evaluate(tmp_path / "words", released)


def test_classes_in_another_order_are_found_by_name(classifier, tmp_path):
    for number, name in enumerate(NAMES):
        draw_images(tmp_path / "all" / name, 2, seed=number)
    figures = evaluate(tmp_path / "all", classifier)
    state, order = weights(classifier), torch.randperm(10, generator=torch.Generator().manual_seed(1))
    state |= {name: state[name][order].contiguous() for name in ("head.weight", "head.bias")}
    save_file(state, classifier / "model.safetensors")
    record = json.loads((classifier / "config.json").read_text())
    names = [NAMES[number] for number in order]
    (classifier / "config.json").write_text(json.dumps(record | {"class_names": names}))
    assert evaluate(tmp_path / "all", classifier) == pytest.approx(figures)


def test_corruptions_are_scored_by_severity(classifier, tmp_path, capsys):
    root = tmp_path / "corrupted"
    for name, seed in (("noise/gaussian_noise", 0), ("fog", 50)):
        for severity in range(1, 6):
            for number, label in enumerate(NAMES):
                draw_images(root / name / str(severity) / label, 2, seed=seed + 10 * severity + number)
    figures = evaluate(root, classifier)
    assert not {"mCE", "corruptions"} & figures.keys()  # ten classes are not AlexNet's thousand
    assert "no mCE: AlexNet's errors" in capsys.readouterr().out
    errors = {}
    for name, folder in (("gaussian_noise", root / "noise" / "gaussian_noise"), ("fog", root / "fog")):
        answers = [score(folder / str(severity), classifier, 1.0).argmax(dim=1) for severity in range(1, 6)]
        labels = torch.arange(10).repeat_interleave(2)
        errors[name] = [100 * (found != labels).double().mean().item() for found in answers]
    ratios = [sum(found) / 5 / ALEXNET_ERRORS[name] for name, found in errors.items()]
    assert summarize_corruptions(
        {name: dict(zip("12345", found, strict=True)) for name, found in errors.items()}, of_imagenet=True
    ) == pytest.approx({"mean_error": figures["mean_error"], "mCE": sum(ratios) / 2, "corruptions": 2})
    assert figures["mean_error"] == pytest.approx(sum(map(sum, errors.values())) / 10)
    header, *rows = [line.split("\t") for line in (classifier / "corruptions.tsv").read_text().splitlines()]
    assert header == ["corruption", "1", "2", "3", "4", "5"]
    assert {name: [float(cell) for cell in cells] for name, *cells in rows} == errors
    alone = {root / "fog": sum(errors["fog"]) / 5, root / "noise" / "gaussian_noise" / "3": errors["gaussian_noise"][2]}
    for folder, error in alone.items():  # which are not cut either
        assert evaluate(folder, classifier) == pytest.approx({"mean_error": error})
    assert len(list(classifier.glob("corruptions*.tsv"))) == 3  # nothing is overwritten


def test_corruptions_are_refused_before_the_first_is_scored(classifier, tmp_path, monkeypatch):
    """A class that the last folder lacks; a corruption that is there twice."""
    root = tmp_path / "corrupted"
    for severity in (1, 2):
        for number, label in enumerate(NAMES[: 10 - severity // 2]):
            draw_images(root / "fog" / str(severity) / label, 1, seed=number)
    monkeypatch.setattr("finetune_classifier.evaluate", lambda *args: pytest.fail("scored"))
    with pytest.raises(ValueError, match=r"fog/2 are not the 10 .* it lacks class9"):
        evaluate(root, classifier)
    (root / "weather" / "fog" / "1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"fog is in .*corrupted/fog and in .*weather/fog; leave one"):
        evaluate(root, classifier)
    assert not (classifier / "corruptions.tsv").exists()


def test_errors_of_a_run_that_is_stopped_are_written(classifier, tmp_path, monkeypatch):
    root = tmp_path / "corrupted"
    for name in ("gaussian_noise", "fog"):
        for number, label in enumerate(NAMES):
            draw_images(root / name / "1" / label, 1, seed=number)
    whole, calls = finetune_classifier.evaluate, []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr("finetune_classifier.evaluate", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(root, classifier)
    lines = (classifier / "corruptions.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["corruption", "gaussian_noise"]


def test_a_corrupted_image_of_the_networks_size_goes_in_as_it_is(tmp_path):
    """As in the authors' script, which cuts 224 pixels from images of 224; resizing would undo part of a corruption."""
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    (tmp_path / "class0").mkdir()
    Image.fromarray(pixels).save(tmp_path / "class0" / "0.png")
    data = build_eval_images(list_images(tmp_path), (224, 224), 1.0, seed=0)
    assert torch.equal(data[SampleKey(EVAL_EPOCH, 0)].image, torch.from_numpy(pixels).permute(2, 0, 1))


def test_corruptions_without_all_severities_have_no_mce(tmp_path):
    for severity in ("1", "3"):
        (tmp_path / "snow" / severity / "cats").mkdir(parents=True)
    assert find_corruptions(tmp_path / "snow") == {"snow": {s: tmp_path / "snow" / s for s in ("1", "3")}}
    assert find_corruptions(tmp_path / "snow" / "3") == {"snow": {"3": tmp_path / "snow" / "3"}}
    assert find_corruptions(tmp_path) == {"snow": {s: tmp_path / "snow" / s for s in ("1", "3")}}
    assert summarize_corruptions({"snow": {"1": 20.0, "3": 60.0}}, of_imagenet=True) == {"mean_error": 40.0}
    shutil.rmtree(tmp_path / "snow")
    draw_images(tmp_path / "cats", 1)
    assert find_corruptions(tmp_path) == {}
    draw_images(tmp_path / "mnist_c" / "fog" / "1", 1)  # classes 0 to 9 of one corruption
    for split in ("train", "val"):
        draw_images(tmp_path / "snow" / "1" / split / "cats", 1)
    assert find_corruptions(tmp_path / "mnist_c" / "fog") == find_corruptions(tmp_path / "snow" / "1") == {}


def test_subset_needs_eval_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--path_to_data", str(tmp_path), "--class_subset"])
    assert "--class_subset judges finished weights: give --eval_only" in capsys.readouterr().err
