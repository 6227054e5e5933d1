"""The memory of a step: against torch's record of what it keeps, against a process, and what is said and when."""

import argparse
import dataclasses
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator

from model import MODEL_CONFIGS, MAEConfig, ViTMAEForImageClassification, ViTMAEForPreTraining
from training import memory
from training.memory import activation_values, note_memory

CONFIG = MAEConfig(
    img_size=64, patch_size=8, encoder_embed_dim=96, encoder_depth=6, encoder_num_heads=3, decoder_embed_dim=64,
    decoder_depth=3, decoder_num_heads=4,
)  # fmt: skip


def kept_values(act: Callable[[], torch.Tensor], parameters: list) -> int:
    """Count the values of all tensors that torch keeps for a backward pass, but for the parameters."""
    sizes, kept, own = {}, [], {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes() // 4
            kept.append(tensor)  # so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = act()
    assert result.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("mlp_ratio", [2.0, 4.0])
def test_count_is_what_torch_keeps(mlp_ratio):
    config = dataclasses.replace(CONFIG, encoder_mlp_ratio=mlp_ratio, decoder_mlp_ratio=mlp_ratio)
    images = torch.randn(2, 3, 64, 64)
    mae, classifier = ViTMAEForPreTraining(config), ViTMAEForImageClassification(config, 10)
    found = kept_values(lambda: mae(images, predict_visible=False).loss, list(mae.parameters())) / 2
    assert activation_values(config, {"encoder": 17, "decoder": 65}) == pytest.approx(found, rel=0.06)
    found = kept_values(lambda: classifier(images).sum(), list(classifier.parameters())) / 2
    assert activation_values(config, {"encoder": 65}) == pytest.approx(found, rel=0.06)


def test_recomputed_blocks_keep_their_inputs():
    images, found, expected = torch.randn(2, 3, 64, 64), [], []
    for depth in (2, 12):
        config = dataclasses.replace(CONFIG, encoder_depth=depth)
        model = ViTMAEForImageClassification(config, 10).train()
        model.activation_checkpointing = True
        found.append(kept_values(lambda m=model: m(images).sum(), list(model.parameters())) / 2)
        expected.append(activation_values(config, {"encoder": 65}, recompute=True))
    assert expected[1] - expected[0] == pytest.approx(found[1] - found[0], rel=0.01)


def flags(**changes) -> argparse.Namespace:
    common = dict(per_gpu_batch_size=64, gradient_accumulation_steps=1, activation_checkpointing=False)
    return argparse.Namespace(**common | changes)


@pytest.mark.parametrize(
    ("free", "changes", "advice"),
    [
        (1e12, {}, None),
        (1.6e9, {}, "give --gradient_accumulation_steps 2 (the same result), or --activation_checkpointing (the same"),
        (1.6e9, {"gradient_accumulation_steps": 2}, None),
        (1.6e9, {"activation_checkpointing": True}, None),
        (0.5e9, {}, "GB, 0.5 GB are free for this process: give --activation_checkpointing"),
        (0.5e9, {"activation_checkpointing": True}, "give a smaller model or --img_size"),
    ],
)
def test_flag_that_lowers_it_is_named_where_memory_is_short(monkeypatch, free, changes, advice):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    config = dataclasses.replace(MODEL_CONFIGS["mae_vit_tiny_patch16"], img_size=128)
    with torch.device("meta"):
        model = ViTMAEForPreTraining(config)
    said = note_memory(Accelerator(cpu=True), flags(**changes), model, config, {"encoder": 65, "decoder": 65})
    assert said == {} if advice is None else advice in said["memory"]
