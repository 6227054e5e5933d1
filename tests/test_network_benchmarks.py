"""The benchmarks: what they count, that every network they time trains, what they print. No speed is asserted."""

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import TINY, load_benchmark
from torch.utils.flop_counter import FlopCounterMode

from model import MODEL_CONFIGS, ViTMAEForPreTraining
from storage.pairs import IGNORE_INDEX


@pytest.fixture
def step(monkeypatch) -> ModuleType:
    return load_benchmark("step", monkeypatch)


def test_measures_take_turns_and_are_compared_round_by_round(monkeypatch, capsys):
    measure, order = load_benchmark("measure", monkeypatch), []
    found = measure.take_turns(["a", "b"], 3, lambda name: order.append(name) or len(order))
    assert order == ["a", "b", "b", "a", "a", "b"] and found == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert measure.ratio([2, 4, 9], [1, 2, 3]) == "2.00 (2.00 to 3.00)"
    measure.print_table("title", ["name", "s"], [["a", "1.0"]])
    assert capsys.readouterr().out == "\ntitle\n\n| name | s |\n| --- | --- |\n| a | 1.0 |\n"


@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_training_flops_are_those_that_torch_counts(step, mask_ratio):
    """Attention written out, as torch does not count the fused one of the CPU; but for the first layer's backward pass,
    which needs no gradient of the pixels."""
    model = ViTMAEForPreTraining(TINY)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    images = torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as counter:
        model(images, mask_ratio).loss.backward()
    kept = round(16 * (1 - mask_ratio))
    first_layer = 2 * kept * TINY.patch_dim * TINY.encoder_embed_dim
    assert counter.get_total_flops() / 2 == step.training_flops(TINY, mask_ratio) - first_layer


def test_fewer_flops_are_made_than_counted(step):
    """The count is the mathematics' own; this project leaves out what the loss never looks at."""
    with FlopCounterMode(display=False) as counter:
        step.build_ours(TINY, 0.75)(torch.randn(2, 3, 16, 16)).backward()
    whole = step.training_flops(TINY, 0.75)
    width, visible = TINY.decoder_embed_dim, 5  # the cls token among them
    unseen = 3 * 2 * width * (2 * visible * int(width * TINY.decoder_mlp_ratio) + (visible - 1) * TINY.patch_dim)
    fused = 3 * 4 * (TINY.encoder_depth * 5**2 * TINY.encoder_embed_dim + TINY.decoder_depth * 17**2 * width)
    first_layer = 2 * 4 * TINY.patch_dim * TINY.encoder_embed_dim
    assert counter.get_total_flops() / 2 == whole - unseen - fused - first_layer


def test_every_network_takes_steps_that_lower_its_loss(step):
    for build in [*step.PRETRAINING.values(), step.build_full_encoder]:
        torch.manual_seed(0)
        network, images = build(TINY, 0.75).train(), torch.randn(2, 3, 16, 16)
        run = step.build_step(network, step.build_optimizer(network), [images], "float32 eager")
        with torch.no_grad():
            before = sum(network(images) for _ in range(20))
        for _ in range(30):
            run()
        with torch.no_grad():
            assert sum(network(images) for _ in range(20)) < before


def test_networks_compared_have_as_many_weights_to_train(step):
    def count(network: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in network.named_parameters() if p.requires_grad and "pos" not in name)

    ours = count(step.build_ours(TINY, 0.75))
    assert count(step.build_transformers(TINY, 0.75)) == ours
    assert count(step.build_full_encoder(TINY, 0.75)) == ours + TINY.encoder_embed_dim - TINY.decoder_embed_dim


def test_segmenters_compared_give_the_same_loss_and_gradients(step):
    """The whole step of both, from the same weights and of the same images."""
    config = dataclasses.replace(MODEL_CONFIGS["mae_vit_tiny_patch16"], img_size=64)
    ours, theirs = (build(config, 5).eval() for build in step.SEGMENTATION.values())
    weights = {k.replace(".bn.", ".batch_norm."): value for k, value in ours.state_dict().items()}
    theirs.load_state_dict({k.replace("conv_seg", "classifier"): value for k, value in weights.items()})
    images, labels = torch.randn(1, 3, 64, 64), torch.randint(0, 5, (1, 64, 64))
    labels[:, :9] = IGNORE_INDEX
    losses = [network(images, labels) for network in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(losses[i], net.neck.parameters()) for i, net in enumerate((ours, theirs))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_steps_beside_peers_are_taken_in_processes_of_their_own(step, monkeypatch, capsys):
    monkeypatch.setattr(step, "matrix_rate", lambda dtype: 1e12)
    flags = ["--tables", "peers", "--modes", "float32 eager", "--rounds", "1", "--batch_size", "1"]
    step.main(step.parse_args(["--model", "mae_vit_tiny_patch16", *flags]))
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    ours, theirs = (next(row for row in rows if row[0] == name) for name in ("this project", "transformers"))
    assert all(float(row[column]) > 0 for row in (ours, theirs) for column in (2, 3, 4))
    assert float(ours[5].split()[0]) == pytest.approx(float(theirs[2]) / float(ours[2]), rel=0.03)


def test_each_start_is_repeated_at_its_best_rate(tmp_path, monkeypatch, capsys):
    helps, started = load_benchmark("pretraining_helps", monkeypatch), []

    def run(folder: Path, script: str, name: str, epochs: int, flags: list[str]) -> dict[str, float]:
        started.append(name)
        best = "_mae_2e-3_" in name or "_scratch_4e-3_" in name
        return {"testing_top1_acc": 10 * best + epochs + int(name[-1])}

    monkeypatch.setattr(helps, "run", run)
    flags = ["--path_to_data", "DATA", "--working_directory", str(tmp_path), "--seeds", "0", "1", "--at_once", "1"]
    helps.main(helps.parse_args(flags))
    assert started[:2] == ["pretrained_seed0", "pretrained_seed1"]
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "| mae | 5 | 2e-3 | 15.00 | 16.00 | 15.50 |",
        "| scratch | 5 | 4e-3 | 15.00 | 16.00 | 15.50 |",
        "| scratch | 15 | 4e-3 | 25.00 | 26.00 | 25.50 |",
    ]
