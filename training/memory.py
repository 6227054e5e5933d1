"""How much memory a training step needs, roughly, before it is made: said where the machine has less.

Weights, gradients and Adam's two moments have 4 bytes each; what a transformer block keeps for the backward pass is
counted by its layers. Compared with torch's own record of kept tensors the count is within 6 % for the MAE and the
classifier (tests/test_memory.py). With `TEMPORARY` and `OVERHEAD_BYTES`, which were fitted to them, the peaks of
three pretrainings on a CPU (ViT-Ti with 16 and 64 images, 1.26 and 2.18 GB; ViT-B with 8, 3.09 GB) are met to -5, -4
and +10 %. Not compared on a GPU, nor for the segmenter's whole process.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

STATE_BYTES = 16  # of a trained parameter: weight, gradient, two moments
LOW_PRECISION = 0.6  # of float32's bytes, as sums along the residual stream stay float32
IMAGE_COPIES = 3  # of an image's values: as read, normalised, as patches
TEMPORARY = 1.2  # what the backward pass needs beside what was kept, as a factor
OVERHEAD_BYTES = {"cpu": 0.8e9, "cuda": 0.8e9}  # Python, torch and decoded images; CUDA's context, kernels' work space
SAFE_SHARE = 0.9  # of what is free, that a step may take
CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of versions 2 and 1


def activation_values(config: object, tokens: Mapping[str, int], *, recompute: bool = False) -> float:
    """Count the values that a step keeps for each image, for `tokens` in the blocks of "encoder" and "decoder".

    A block keeps 8 + 2 * mlp_ratio vectors of each token: the inputs of both norms and what these give, queries, keys,
    values, the attention's result, and the MLP's hidden layer twice. With `recompute` all but one keep their input.
    """
    height, width = config.image_hw
    count = IMAGE_COPIES * config.input_channels * height * width
    for part, length in tokens.items():
        dim, depth, mlp_ratio = (getattr(config, f"{part}_{name}") for name in ("embed_dim", "depth", "mlp_ratio"))
        vectors = 8 + 2 * mlp_ratio
        count += length * dim * (depth + vectors if recompute else depth * vectors)
    return count


def free_bytes(device: torch.device) -> float:
    """Give the memory that is free: of the GPU, or of the machine or container on the CPU; infinity if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    if (table := Path("/proc/meminfo")).is_file():
        found += [1024 * int(line.split()[1]) for line in table.read_text().splitlines() if "MemAvailable" in line]
    for name in CGROUP_LIMITS:
        if (limit := Path("/sys/fs/cgroup", name)).is_file() and (text := limit.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found, default=float("inf"))


def has_room(device: torch.device, peak_gb: float, now_gb: float) -> bool:
    """Tell whether this process, whose peak is `now_gb`, can have one of `peak_gb` without taking all that is free."""
    room = SAFE_SHARE * free_bytes(device) / 1e9
    if device.type == "cuda":  # what torch holds is free as well
        return peak_gb <= room + torch.cuda.memory_reserved(device) / 1e9
    return peak_gb - now_gb <= room / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def note_memory(
    accelerator: Accelerator,
    args: argparse.Namespace,
    model: nn.Module,
    config: object,
    tokens: Mapping[str, int],
    head_values: float = 0,
) -> dict[str, str]:
    """Say, as a line by its name, that a step needs more memory than is free, and which flag lowers it; else nothing.

    Rough: on the CPU a tenth more or less, in lower precision and on a GPU not known. `head_values` are kept for each
    image beside the blocks.
    """
    device, batch, passes = accelerator.device, args.per_gpu_batch_size, args.gradient_accumulation_steps
    if device.type not in OVERHEAD_BYTES:
        return {}
    values = head_values + activation_values(config, tokens, recompute=args.activation_checkpointing)
    per_image = 4 * TEMPORARY * values * (1 if accelerator.mixed_precision == "no" else LOW_PRECISION)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    fixed = OVERHEAD_BYTES[device.type] + STATE_BYTES * parameters
    free = free_bytes(device)
    if device.type == "cpu":
        free /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = fixed + batch // passes * per_image
    if needed <= free:
        return {}
    fitting = [n for n in range(passes + 1, batch + 1) if batch % n == 0 and fixed + batch // n * per_image <= free]
    advice = [f"--gradient_accumulation_steps {fitting[0]} (the same result)"] if fitting else []
    advice += [] if args.activation_checkpointing else ["--activation_checkpointing (the same result, a third slower)"]
    advice += ["a smaller model or --img_size"] if not fitting else []
    return {
        "memory": f"a step of {batch // passes} images at once needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
        f"are free for this process: give {', or '.join(advice)}"
    }
