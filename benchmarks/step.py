"""What does an optimizer step of pretraining cost, in time and memory, beside transformers' and lightly's?

    OMP_NUM_THREADS=1 python benchmarks/step.py
    OMP_NUM_THREADS=1 python benchmarks/step.py --model mae_vit_large_patch16 --tables mask_ratio

Networks of the same sizes, with the same AdamW and clipping, take turns on random images, on the GPU where there is
one and else on the CPU. Beside peers each step is taken in a process of its own, because on a CPU this project keeps
the memory that it frees. Peers are `pip install transformers lightly`; what is not installed is left out.
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
from collections.abc import Callable

import torch
from measure import (
    alternate,
    build_parser,
    choose_device,
    describe_machine,
    find_memory,
    matrix_rate,
    measure_apart,
    memory_gb,
    missing,
    print_table,
    ratio,
    take_turns,
    time_run,
)
from torch import Tensor, nn

from model import MODEL_CONFIGS, MAEConfig, ViTMAEForPreTraining, num_kept_patches
from training.process import keep_freed_memory

MODES = {
    "float32 eager": (torch.float32, False),
    "bfloat16 eager": (torch.bfloat16, False),
    "bfloat16 compiled": (torch.bfloat16, True),
}
MASK_RATIO, MASK_RATIOS = 0.75, (0.5, 0.75, 0.9)
IMG_SIZES = (160, 224, 320)
OURS, THEIRS = "this project", ("transformers", "lightly")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser, on_gpu = build_parser(__doc__), choose_device().type == "cuda"
    batch, batches = (128, [64, 128, 256, 512]) if on_gpu else (8, [1, 4, 16])
    parser.add_argument("--batch_size", type=int, default=batch, help=f"images of a step (default here: {batch})")
    parser.add_argument("--model", choices=MODEL_CONFIGS, default="mae_vit_base_patch16")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of the comparison with peers")
    shipped = "the optimizers that peers come with: transformers' Trainer clips and fuses, lightly's example does not"
    parser.add_argument("--as_shipped", action="store_true", help=shipped)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=batches, help="of the tables batch and memory")
    parser.add_argument("--step_of", nargs=2, metavar=("NETWORK", "MODE"), help=argparse.SUPPRESS)
    parser.add_argument("--activation_checkpointing", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ networks


def build_ours(config: MAEConfig, mask_ratio: float, *, predict_visible: bool = False) -> nn.Module:
    class Loss(ViTMAEForPreTraining):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images, mask_ratio, predict_visible=predict_visible).loss

    return Loss(config)


def build_transformers(config: MAEConfig, mask_ratio: float) -> nn.Module:
    import transformers

    sizes = transformers.ViTMAEConfig(
        image_size=config.img_size,
        patch_size=config.patch_size,
        num_channels=config.input_channels,
        hidden_size=config.encoder_embed_dim,
        num_hidden_layers=config.encoder_depth,
        num_attention_heads=config.encoder_num_heads,
        intermediate_size=int(config.encoder_embed_dim * config.encoder_mlp_ratio),
        decoder_hidden_size=config.decoder_embed_dim,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_num_attention_heads=config.decoder_num_heads,
        decoder_intermediate_size=int(config.decoder_embed_dim * config.decoder_mlp_ratio),
        mask_ratio=mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
    )

    class Loss(transformers.ViTMAEForPreTraining):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).loss

    return Loss(sizes)


def build_lightly(config: MAEConfig, mask_ratio: float) -> nn.Module:
    """Put lightly's parts together as its documentation does: only removed patches are predicted, as plain pixels."""
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            vit = VisionTransformer(
                config.image_hw,
                config.patch_size,
                config.input_channels,
                num_classes=0,
                embed_dim=config.encoder_embed_dim,
                depth=config.encoder_depth,
                num_heads=config.encoder_num_heads,
                mlp_ratio=config.encoder_mlp_ratio,
            )
            self.encoder = MaskedVisionTransformerTIMM(vit)
            width = config.decoder_embed_dim
            self.embed = nn.Linear(config.encoder_embed_dim, width)
            self.decoder = MaskedVisionTransformerDecoderTIMM(
                config.num_patches, width, config.decoder_depth, config.decoder_num_heads
            )
            self.predict = nn.Linear(width, config.patch_dim)

        def forward(self, images: Tensor) -> Tensor:
            size = len(images), self.encoder.sequence_length
            keep, removed = utils.random_token_mask(size, mask_ratio, device=images.device)
            x = self.embed(self.encoder.encode(images, idx_keep=keep))
            tokens = utils.repeat_token(self.decoder.mask_token, size)
            tokens = utils.set_at_index(tokens, keep, x.type_as(tokens))
            pred = self.predict(utils.get_at_index(self.decoder(tokens), removed))
            target = utils.get_at_index(utils.patchify(images, config.patch_size), removed - 1)
            return nn.functional.mse_loss(pred, target)

    return Loss()


BUILDERS = {OURS: build_ours, "transformers": build_transformers, "lightly": build_lightly}


def installed_networks() -> list[str]:
    """Give this project and the peers that are there; say which are not."""
    installed = [package for package in THEIRS if importlib.util.find_spec(package)]
    for package in set(THEIRS) - set(installed):
        missing(package)
    return [OURS, *installed]


class FullEncoder(ViTMAEForPreTraining):
    """What masking saves: an encoder that sees every position, removed ones as a mask token (paper, table 1c)."""

    def __init__(self, config: MAEConfig, mask_ratio: float):
        super().__init__(config)
        self.mask_ratio = mask_ratio
        self.encoder_mask_token = nn.Parameter(torch.zeros(1, 1, config.encoder_embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patchify(images)
        noise = torch.rand(patches.shape[:2], device=images.device)
        mask = self.random_masking(noise, self.mask_ratio).mask
        pos_embed = self.positions(images)
        x = self.embed_patches(patches)
        x = torch.where(mask[:, :, None].bool(), self.encoder_mask_token.to(x.dtype), x) + pos_embed[:, 1:]
        x = self.prepend_cls(x, pos_embed)
        for block in self.blocks:
            x = block(x)
        in_order = torch.arange(noise.shape[1], device=images.device).expand_as(noise)
        pred = self.forward_decoder(self.norm(x), in_order)
        return self.forward_loss(images, pred, mask)


# ------------------------------------------------------------------------------------------------ steps


def training_flops(config: MAEConfig, mask_ratio: float) -> float:
    """Count the FLOPs of the matrix products of one image, forwards and backwards (twice the forward's)."""

    def blocks(depth: int, tokens: int, width: int, mlp_ratio: float) -> float:
        return depth * (2 * tokens * width**2 * (4 + 2 * mlp_ratio) + 4 * tokens**2 * width)

    kept, patches = num_kept_patches(config.num_patches, mask_ratio), config.num_patches
    width, decoder_width = config.encoder_embed_dim, config.decoder_embed_dim
    forward = 2 * kept * config.patch_dim * width
    forward += blocks(config.encoder_depth, kept + 1, width, config.encoder_mlp_ratio)
    forward += 2 * (kept + 1) * width * decoder_width
    forward += blocks(config.decoder_depth, patches + 1, decoder_width, config.decoder_mlp_ratio)
    forward += 2 * patches * decoder_width * config.patch_dim
    return 3 * forward


def build_optimizer(network: nn.Module, *, fused: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True if fused else None
    )


def build_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, mode: str, *, clip: bool = True
) -> Callable[[], None]:
    """Give one optimizer step: loss, gradients, clipping to a norm of one, AdamW."""
    dtype, compiled = MODES[mode]
    parameters = [p for p in network.parameters() if p.requires_grad]
    compute_loss = torch.compile(network) if compiled else network

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = compute_loss(images)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def draw_images(batch_size: int, config: MAEConfig, device: torch.device) -> Tensor:
    return torch.randn(batch_size, config.input_channels, *config.image_hw, device=device)


def measure_step(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    """Print peak memory of a few steps above what the libraries take, and seconds; this process does nothing else."""
    name, mode = args.step_of
    if name == OURS and device.type == "cpu":
        keep_freed_memory()
    images = draw_images(args.batch_size, config, device)
    before = memory_gb(device)
    network = BUILDERS[name](config, MASK_RATIO).to(device).train()
    if name == OURS:
        network.activation_checkpointing = args.activation_checkpointing
        if device.type == "cpu" and MODES[mode][0] == torch.bfloat16:  # as pretrain_mae.py does
            network.unfuse_attention()
    bare = args.as_shipped and name == "lightly"
    step = build_step(network, build_optimizer(network, fused=not bare), images, mode, clip=not bare)
    for _ in range(2):
        step()
    seconds = statistics.median(time_run(step, device) for _ in range(3))
    print(json.dumps({"gb": memory_gb(device) - before, "seconds": seconds}))


def step_flags(args: argparse.Namespace, name: str, mode: str, batch_size: int, *more: str) -> list[str]:
    """Give the flags with which a process of its own measures a step."""
    flags = ["--model", args.model, "--step_of", name, mode, "--batch_size", str(batch_size), *more]
    return [*flags, "--as_shipped"] if args.as_shipped else flags


def measure_seconds(args: argparse.Namespace, name: str, mode: str) -> float:
    """Give the seconds of a step in a new process: where its memory happens to lie changes the time, too."""
    found = measure_apart(__file__, step_flags(args, name, mode, args.batch_size))
    if found is None:
        raise MemoryError(f"no memory for a step of {name} at batch {args.batch_size}; try a smaller --batch_size")
    return found["seconds"]


# ------------------------------------------------------------------------------------------------ tables


def compare_peers(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    names = installed_networks()
    keys = [(name, mode) for name in names for mode in args.modes]
    times = take_turns(keys, args.rounds, lambda key: measure_seconds(args, *key))
    rates = {dtype: matrix_rate(device, dtype) for dtype in {MODES[mode][0] for mode in args.modes}}
    flops, rows = training_flops(config, MASK_RATIO) * args.batch_size, []
    for (name, mode), seconds in times.items():
        typical = statistics.median(seconds)
        row = [name, mode, f"{typical:.3f}", f"{args.batch_size / typical:.1f}", f"{flops / typical / 1e12:.3f}"]
        row.append(f"{flops / typical / rates[MODES[mode][0]]:.0%}")
        for peer in names[1:]:
            row += [ratio(times[peer, other], seconds) if name == OURS else "" for other in (mode, args.modes[0])]
        rows.append(row)
    header = ["network", "mode", "s/step", "images/s", "TFLOP/s", "of matrix rate"]
    for peer in names[1:]:
        header += [f"times {peer}, same mode", f"times {peer}, {args.modes[0]}"]
    title = f"{args.model}, batch {args.batch_size}, {flops / args.batch_size / 1e9:.1f} GFLOP an image; matrix rate "
    title += ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {str(dtype)[6:]}" for dtype, rate in rates.items())
    print_table(title, header, rows)


def compare_memory(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    names, rows = installed_networks(), []
    for batch_size in args.batch_sizes:
        for mode in args.modes:
            cells = [find_memory(__file__, step_flags(args, name, mode, batch_size)) for name in names]
            rows.append([str(batch_size), mode, *cells])
    print_table(f"{args.model}, peak memory of a step in GB", ["batch", "mode", *names], rows)


def compare_attention(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    images, steps = draw_images(args.batch_size, config, device), {}
    for mode in args.modes:
        for way in ("fused", "by products"):
            network = build_ours(config, MASK_RATIO).to(device).train()
            if way == "by products":
                network.unfuse_attention()
            steps[mode, way] = build_step(network, build_optimizer(network), images, mode)
    times = alternate(steps, args.rounds, device, warmup=2)
    rows = []
    for mode in args.modes:
        fused, products = times[mode, "fused"], times[mode, "by products"]
        rows.append([mode, *(f"{statistics.median(found):.3f}" for found in (fused, products)), ratio(fused, products)])
    title = f"{args.model}, batch {args.batch_size}: attention by torch's fused kernel, or by matrix products"
    print_table(title, ["mode", "s/step fused", "s/step by products", "times as fast by products"], rows)


def default_mode(device: torch.device) -> str:
    return "bfloat16 eager" if device.type == "cuda" else "float32 eager"


def compare_mask_ratios(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    images, mode = draw_images(args.batch_size, config, device), default_mode(device)
    networks = {  # all predict every patch, so that only what is encoded differs
        f"{mask_ratio:g} removed": build_ours(config, mask_ratio, predict_visible=True) for mask_ratio in MASK_RATIOS
    }
    usual, everything = f"{MASK_RATIO:g} removed", f"{MASK_RATIO:g} removed, all encoded with mask tokens"
    networks[everything] = FullEncoder(config, MASK_RATIO)
    for network in networks.values():  # one set of weights, as there may be no room for four
        for name, parameter in networks[usual].named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, parameter)
        network.to(device).train()
    optimizer = build_optimizer(networks[everything])
    steps = {name: build_step(network, optimizer, images, mode) for name, network in networks.items()}
    times = alternate(steps, args.rounds, device)
    rows = [[name, f"{statistics.median(found):.3f}", ratio(found, times[usual])] for name, found in times.items()]
    title = f"{args.model}, {mode}, batch {args.batch_size}: cost against the mask ratio"
    print_table(title, ["patches", "s/step", f"cost / that at {MASK_RATIO:g}"], rows)


def compare_batches(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    compare_inputs(args, device, {f"batch {size}": (size, config) for size in args.batch_sizes})


def compare_image_sizes(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    sizes = {side: dataclasses.replace(config, img_size=side) for side in IMG_SIZES}
    compare_inputs(args, device, {f"{side} px": (args.batch_size, resized) for side, resized in sizes.items()})


def compare_inputs(args: argparse.Namespace, device: torch.device, inputs: dict[str, tuple[int, MAEConfig]]) -> None:
    """Compare batches of images of several sizes, by name, under one network."""
    network, mode = build_ours(MODEL_CONFIGS[args.model], MASK_RATIO).to(device).train(), default_mode(device)
    optimizer = build_optimizer(network)
    steps = {name: build_step(network, optimizer, draw_images(*of, device), mode) for name, of in inputs.items()}
    rows = []
    for name, found in alternate(steps, args.rounds, device).items():
        (batch_size, config), typical = inputs[name], statistics.median(found)
        flops = training_flops(config, MASK_RATIO) * batch_size
        rows.append([name, f"{typical:.3f}", f"{batch_size / typical:.2f}", f"{flops / typical / 1e12:.3f}"])
    title = f"{args.model}, {mode}; batch {args.batch_size} and {MODEL_CONFIGS[args.model].img_size} px unless said"
    print_table(title, ["input", "s/step", "images/s", "TFLOP/s"], rows)


def compare_checkpointing(args: argparse.Namespace, config: MAEConfig, device: torch.device) -> None:
    mode = default_mode(device)
    network, images = build_ours(config, MASK_RATIO).to(device).train(), draw_images(args.batch_size, config, device)
    plain = build_step(network, build_optimizer(network), images, mode)

    def run(checkpointing: bool) -> None:
        network.activation_checkpointing = checkpointing
        plain()

    times = alternate({"kept": lambda: run(False), "computed again": lambda: run(True)}, args.rounds, device)
    rows = []
    for size in args.batch_sizes:
        flags = step_flags(args, OURS, mode, size), step_flags(args, OURS, mode, size, "--activation_checkpointing")
        rows.append([str(size), *(find_memory(__file__, way) for way in flags)])
    cost = ratio(times["computed again"], times["kept"])
    title = f"{args.model}, {mode}: peak memory of a step in GB; --activation_checkpointing takes {cost} times as long"
    print_table(title, ["batch", "activations kept", "--activation_checkpointing"], rows)


TABLES = {
    "peers": compare_peers,
    "memory": compare_memory,
    "attention": compare_attention,
    "mask_ratio": compare_mask_ratios,
    "batch": compare_batches,
    "image_size": compare_image_sizes,
    "checkpointing": compare_checkpointing,
}


def main(args: argparse.Namespace) -> None:
    device, config = choose_device(), MODEL_CONFIGS[args.model]
    torch.manual_seed(0)
    if args.step_of:
        measure_step(args, config, device)
        return
    print(describe_machine(device), flush=True)
    for name in args.tables:
        TABLES[name](args, config, device)


if __name__ == "__main__":
    main(parse_args())
