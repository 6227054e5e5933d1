"""The study of benchmarks/ablations.py: every row is a command that the scripts take, and the comparison of orders."""

import importlib
import json
import sys

import pytest
from conftest import ROOT
from safetensors.torch import save_file

import finetune_classifier
import pretrain_mae


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("ablations")
    for name in ("ablations", "pretraining_helps", "measure"):
        sys.modules.pop(name, None)


def test_every_row_is_taken_by_both_scripts_and_no_two_rows_train_the_same(ablations, tmp_path):
    folder = ["--path_to_data", str(tmp_path), "--working_directory", str(tmp_path)]
    configs, weights = set(), tmp_path / "weights"
    weights.mkdir()
    save_file({}, weights / "model.safetensors")  # parsing looks at the sizes alone
    for rows in ablations.TABLES.values():
        for row in rows:
            args = pretrain_mae.parse_args([*ablations.PRETRAINING, *row.flags.split(), *folder])
            sizes = pretrain_mae.build_config(args)
            configs.add((row.flags, sizes, args.masking, args.mask_ratio, args.augmentation))
            record = {"architecture": "ViTMAEForPreTraining", "config": sizes.as_record(decoder=True)}
            (weights / "config.json").write_text(json.dumps(record))
            start = ["--path_to_pretrained_mae_weights", str(weights), "--epochs", "5", *folder]
            finetune_classifier.parse_args([*ablations.FINETUNING, *row.finetuning_flags.split(), *start])
    assert len({config[1:] for config in configs}) == len(configs) == 27
    assert sum(map(len, ablations.TABLES.values())) == 38


def test_pairs_in_another_order_than_the_papers_are_named(ablations):
    rows = [ablations.Row(name) for name in "abc"]
    ours = [[50.0, 52.0], [51.0, 53.0], [40.0, 41.0]]
    assert ablations.compare_order(rows, [84.9, 84.8, 84.0], ours) == ["a / b (ranges overlap)"]
    assert ablations.compare_order(rows, [84.0, 84.8, 84.9], ours) == ["c / a", "c / b"]
    assert ablations.compare_order(rows, [84.9, 84.9, None], [*ours[:2], [0.0]]) == []
    assert ablations.show([50.0, 52.0]) == "51.00 (50.00 to 52.00)"
