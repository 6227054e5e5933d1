"""The variants of the paper's table 1: maskings, targets, mask tokens in the encoder, augmentations."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from conftest import TINY, draw_images, weights
from PIL import Image
from sklearn.decomposition import PCA
from torch.utils.flop_counter import FlopCounterMode

import dataset
import model as networks
from model import MODEL_CONFIGS, ViTMAEForPreTraining, load_pretrained_mae
from pretrain_mae import build_config, main, parse_args
from storage.lists import list_images
from storage.sizes import MAEConfig, num_kept_patches
from storage.weights import SIZES
from utils import block_masking, build_masking

SMALL = dataclasses.replace(TINY, norm_pix_loss=False)


# ------------------------------------------------------------------------------------------------ masking


def draw_beit_mask(generator: random.Random, side: int, num_removed: int) -> np.ndarray:
    """Draw blocks by algorithm 1 of BEiT with the constants of its release: at least 16 patches, aspect from 0.3."""
    mask = np.zeros((side, side), dtype=int)
    for _ in range(side**2):
        room = num_removed - mask.sum()
        if not room:
            break
        for _ in range(10):
            area = generator.uniform(16, room)
            aspect = math.exp(generator.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < side and width < side:
                top, left = generator.randint(0, side - height), generator.randint(0, side - width)
                block = mask[top : top + height, left : left + width]
                if 0 < block.size - block.sum() <= room:
                    block[:] = 1
                    break
        else:
            break
    return mask


def describe_mask(mask: np.ndarray) -> list[float]:
    """Give what tells masks apart: how much is removed, where, in how long runs; of a single block its sides."""
    rows, columns = mask.any(axis=1).sum(), mask.any(axis=0).sum()
    single = rows * columns == mask.sum()
    return [
        mask.sum(),
        mask[[0, 0, -1, -1], [0, -1, 0, -1]].sum(),
        mask[5:9, 5:9].sum(),
        (mask[:, 1:] == mask[:, :-1]).sum(),
        (mask[1:] == mask[:-1]).sum(),
        single,
        rows * columns if single else 0,
        abs(math.log(rows / columns)) if single else 0,
    ]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
def test_block_masks_have_the_statistics_of_beits_generator(ratio):
    side, count, generator = 14, 1500, random.Random(0)
    num_removed = side**2 - num_kept_patches(side**2, ratio)
    torch.manual_seed(0)
    ours, theirs = (
        np.array([describe_mask(draw()) for _ in range(count)], dtype=float)
        for draw in (
            lambda: block_masking(torch.zeros(side**2), (side, side), ratio).view(side, side).int().numpy(),
            lambda: draw_beit_mask(generator, side, num_removed),
        )
    )
    assert ours[:, 0].max() <= num_removed
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / count)
    means = ours.mean(axis=0), theirs.mean(axis=0)
    # Eight figures at three ratios: one beyond four standard errors by chance is a case in 600
    assert (np.abs(means[0] - means[1]) <= 4 * error).all(), means
    spread = ours.std(axis=0), theirs.std(axis=0)
    assert np.allclose(*spread, rtol=0.15, atol=0.05), spread


def test_block_masks_remove_exactly_the_ratio_and_their_blocks_first():
    noise = torch.rand(196, generator=torch.Generator().manual_seed(1))
    raised = block_masking(noise, (14, 14), 0.75)
    in_blocks = raised >= 1
    assert torch.allclose(raised, noise + in_blocks) and 0 < in_blocks.sum() <= 147
    mask = ViTMAEForPreTraining(SMALL).random_masking(raised[None], 0.75).mask[0]
    assert mask.sum() == 147 and mask[in_blocks].all()


def test_grid_masking_keeps_one_of_every_four_patches():
    noise = build_masking("grid", (4, 6), 0.75)(torch.rand(24))
    mask = ViTMAEForPreTraining(SMALL).random_masking(noise[None], 0.75).mask
    assert mask.view(4, 6).tolist() == [[0, 1, 0, 1, 0, 1], [1] * 6, [0, 1, 0, 1, 0, 1], [1] * 6]


def test_masks_are_a_function_of_seed_epoch_and_index(tmp_path):
    draw_images(tmp_path / "images", 4)
    files = list_images(tmp_path / "images")
    masking = build_masking("block", (4, 4), 0.75)

    def draw(seed, epoch, index, masking=masking):
        transform = dataset.build_pretraining_transform((16, 16), 0.2)
        data = dataset.ImageDataset(files, transform, seed=seed, noise_size=16, masking=masking)
        return data[dataset.SampleKey(epoch, index)].noise

    torch.manual_seed(5)
    first = draw(0, 1, 2)
    torch.manual_seed(6)
    assert torch.equal(first, draw(0, 1, 2))
    assert not any(torch.equal(first, draw(*key)) for key in ((1, 1, 2), (0, 2, 2), (0, 1, 3)))
    plain = draw(0, 1, 2, None)
    assert torch.allclose(first, plain + (first >= 1))


# ------------------------------------------------------------------------------------------------ targets


def test_principal_components_are_scikit_learns():
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 2, 16)
    model = ViTMAEForPreTraining(dataclasses.replace(SMALL, pca_target=10))
    model.fit_pca(images)
    patches = model.patchify(images)
    reference = PCA(10, svd_solver="full").fit(patches.flatten(0, 1).double().numpy())
    expected = torch.from_numpy(reference.transform(patches.flatten(0, 1).double().numpy()))
    found = model.make_target(patches).flatten(0, 1).double()
    signs = (found * expected).sum(dim=0).sign()  # which are free
    assert torch.allclose(found, expected * signs, atol=1e-4)  # float32 of values up to 40
    back = torch.from_numpy(reference.inverse_transform(expected.numpy())).float().view_as(patches)
    assert torch.allclose(model.undo_target(model.make_target(patches), patches), back, atol=1e-4)


def test_components_are_found_in_patches_with_data_and_in_no_more_than_so_many(monkeypatch):
    images, valid = torch.randn(12, 3, 16, 16), (torch.rand(12, 16) < 0.5).float()
    model = ViTMAEForPreTraining(dataclasses.replace(SMALL, pca_target=10))
    empty = model.unpatchify((1 - valid)[:, :, None].expand(12, 16, 48)).bool()
    model.fit_pca(images.masked_fill(empty, 100.0), valid)
    reference = PCA(10, svd_solver="full").fit(model.patchify(images)[valid > 0].double().numpy())
    torch.testing.assert_close(model.pca_mean.double(), torch.from_numpy(reference.mean_), rtol=0, atol=1e-6)
    cosines = (model.pca_basis.T.double() * torch.from_numpy(reference.components_)).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(10, dtype=torch.double), rtol=0, atol=1e-5)

    monkeypatch.setattr(networks, "PCA_PATCHES", 60)
    found = []
    for _ in range(2):
        model.fit_pca(images)
        found.append(model.pca_mean.clone())
    assert torch.equal(*found)
    drawn = model.patchify(images).flatten(0, 1)[torch.randperm(192, generator=torch.Generator().manual_seed(0))[:60]]
    torch.testing.assert_close(found[0], drawn.mean(dim=0))


def test_every_size_of_a_network_is_read_back_from_its_config():
    known = {name for names in SIZES.values() for name in names.split()}
    assert {field.name for field in dataclasses.fields(MAEConfig)} == known


def test_loss_of_principal_components_by_hand():
    model = ViTMAEForPreTraining(dataclasses.replace(SMALL, pca_target=2))
    model.pca_mean.fill_(1)
    model.pca_basis[0, 0], model.pca_basis[5, 1] = 1, 1  # the first and the sixth value of a patch
    images = torch.randn(1, 3, 16, 16)
    mask = torch.zeros(1, 16)
    mask[0, 3], mask[0, 7] = 1, 1
    pred = torch.zeros(1, 16, 2)
    pred[0, 3] = torch.tensor([0.5, -0.5])
    a, b = (model.patchify(images)[0, patch] - 1 for patch in (3, 7))
    expected = ((a[0] - 0.5) ** 2 + (a[5] + 0.5) ** 2 + b[0] ** 2 + b[5] ** 2) / 4
    assert model.forward_loss(images, pred, mask).item() == pytest.approx(expected.item(), rel=1e-6)


def test_pictures_of_predicted_components_are_of_the_pixels_they_stand_for():
    images = torch.randn(2, 3, 16, 16)
    whole = ViTMAEForPreTraining(dataclasses.replace(SMALL, pca_target=48))
    whole.fit_pca(torch.randn(20, 3, 16, 16))
    target, mask = whole.make_target(whole.patchify(images)), torch.ones(2, 16)
    assert torch.allclose(whole.reconstruct(images, target, mask).reconstructed, images, atol=1e-5)


# ------------------------------------------------------------------------------------------------ mask tokens


def test_encoder_sees_removed_patches_as_mask_tokens():
    model = ViTMAEForPreTraining(dataclasses.replace(SMALL, encode_mask_tokens=True)).eval()
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    latent, mask, _ = model.forward_encoder(images, 0.75, noise)
    assert latent.shape == (2, 17, 32) and mask.sum(dim=1).tolist() == [12, 12]
    # By hand: a whole image's tokens, of which the removed ones are the token
    x = model.embed_patches(model.patchify(images))
    x[mask.bool()] = model.mask_token[0, 0]
    x = model.prepend_cls(x + model.pos_embed[:, 1:], model.pos_embed)
    for block in model.blocks:
        x = block(x)
    assert torch.equal(model.norm(x), latent)
    # What lies under a removed patch cannot be seen; the order of the prediction is the grid's
    changed = model.unpatchify(torch.where(mask[:, :, None].bool(), 5.0, model.patchify(images)))
    assert torch.equal(model(changed, 0.75, noise).pred, model(images, 0.75, noise).pred)
    full, part = model(images, 0.75, noise), model(images, 0.75, noise, predict_visible=False)
    assert torch.allclose(full.loss, part.loss) and torch.allclose(full.pred * mask[:, :, None], part.pred, atol=1e-6)


def test_mask_tokens_in_the_encoder_cost_what_the_paper_says():
    flops = {}
    for encodes in (False, True):
        config = dataclasses.replace(MODEL_CONFIGS["mae_vit_large_patch16"], encode_mask_tokens=encodes)
        model = ViTMAEForPreTraining(config, custom_weight_init=False).to("meta")
        with FlopCounterMode(display=False) as counter:
            latent, _, ids_restore = model.forward_encoder(
                torch.empty(1, 3, 224, 224, device="meta"), 0.75, torch.empty(1, 196, device="meta")
            )
            model.forward_decoder(latent, ids_restore)
        flops[encodes] = counter.get_total_flops()
    assert flops[True] / flops[False] == pytest.approx(3.3, abs=0.1)  # table 1c


# ------------------------------------------------------------------------------------------------ augmentations


def test_fixed_crops_are_seven_eighths_of_the_shorter_side():
    transform = dataset.build_pretraining_transform((32, 32), 0.2, "fixed_crop")
    torch.manual_seed(0)
    areas = [transform.draw_area(256, 400) for _ in range(300)]
    assert {(area.height, area.width) for area in areas} == {(224, 224)}
    assert min(a.top for a in areas) == 0 and max(a.top for a in areas) == 32
    assert min(a.left for a in areas) < 5 and max(a.left for a in areas) > 171
    wide = dataset.build_pretraining_transform((16, 32), 0.2, "fixed_crop").draw_area(256, 256)
    assert (wide.height, wide.width) == (112, 224)


def test_no_augmentation_is_the_middle_and_the_same_every_epoch(tmp_path):
    draw_images(tmp_path / "images", 2)
    transform = dataset.build_pretraining_transform((16, 16), 0.2, "none")
    data = dataset.ImageDataset(list_images(tmp_path / "images"), transform, noise_size=16)
    first, later = (data[dataset.SampleKey(epoch, 1)] for epoch in (0, 7))
    assert torch.equal(first.image, later.image) and not torch.equal(first.noise, later.noise)
    with Image.open(data.files.path(1)) as image:
        assert torch.equal(first.image, dataset.ResizeCenterCrop((16, 16))(image.convert("RGB")))


def test_jitter_changes_colours_after_the_same_crop(tmp_path):
    draw_images(tmp_path / "images", 1)
    plain, jittered = (
        dataset.ImageDataset(list_images(tmp_path / "images"), dataset.build_pretraining_transform((16, 16), 0.2, kind))
        for kind in ("random_crop", "random_crop_jitter")
    )
    for epoch in range(3):
        a, b = (data[dataset.SampleKey(epoch, 0)].image for data in (plain, jittered))
        assert a.dtype == b.dtype == torch.uint8 and a.shape == b.shape and not torch.equal(a, b)
        # Where the crop is the same, places of equal colour stay places of equal colour
        grey = [x.float().mean(dim=0).flatten() for x in (a, b)]
        assert torch.corrcoef(torch.stack(grey))[0, 1] > 0.8


# ------------------------------------------------------------------------------------------------ runs


def flags(folder, *more):
    sizes = "--img_size 16 --patch_size 4 --encoder_embed_dim 16 --encoder_depth 2 --encoder_num_heads 2"
    sizes += " --decoder_embed_dim 8 --decoder_depth 1 --decoder_num_heads 2 --epochs 1 --per_gpu_batch_size 4"
    work = ["--path_to_data", str(folder), "--working_directory", str(folder.parent / "work"), "--num_workers", "0"]
    return [*sizes.split(), *work, *more]


def test_basis_is_kept_in_the_checkpoint_and_its_pictures_can_be_drawn(image_folder):
    main(parse_args(flags(image_folder, "--target", "pca")))
    model = load_pretrained_mae(image_folder.parent / "work" / "MAEPretraining" / "checkpoint_1")
    assert model.config.pca_target == 48 and model.config.norm_pix_loss is False  # all 4 x 4 x 3 values
    assert torch.allclose(model.pca_basis.T @ model.pca_basis, torch.eye(48), atol=1e-5)
    source = str(image_folder.parent / "work" / "MAEPretraining")
    args = parse_args(["--path_to_data", str(image_folder), "--init_from", source])
    assert build_config(args) == model.config


FEWER = "2 fresh (decoder_pred), 4 left out (decoder_pred, pca_basis, pca_mean)"
MORE = "4 fresh (decoder_pred, pca_basis, pca_mean), 2 left out (decoder_pred)"
MASKED = "1 fresh (mask_token), 1 left out (mask_token)"


@pytest.mark.parametrize(
    "before, after, fresh",
    [
        ("--target pca", "--target pixels", FEWER),
        ("--target pca", "--no-norm_pix_loss", FEWER),
        ("--target pixels", "--target pca", MORE),
        ("--target pixels", "--encode_mask_tokens", MASKED),
        ("--encode_mask_tokens", "--no-encode_mask_tokens", MASKED),
        ("--target pca --encode_mask_tokens", "", "tensors loaded, from"),
    ],
)
@pytest.mark.parametrize("width", [8, 16])  # of the decoder; 16 is the encoder's
def test_a_start_from_another_variant_takes_all_but_what_differs(image_folder, capsys, before, after, fresh, width):
    main(parse_args(flags(image_folder, *before.split(), "--decoder_embed_dim", str(width))))
    work = image_folder.parent / "work"
    command = ["--path_to_data", str(image_folder), "--working_directory", str(work), "--experiment_name", "next"]
    command += ["--init_from", str(work / "MAEPretraining"), "--epochs", "1", "--per_gpu_batch_size", "4"]
    capsys.readouterr()
    args = parse_args([*command, "--num_workers", "0", "--base_learning_rate", "0", *after.split()])
    main(args)
    assert fresh in capsys.readouterr().out
    old, new = (weights(work / name / "checkpoint_1") for name in ("MAEPretraining", "next"))
    config = build_config(args)
    assert (config.pca_target > 0) == ("pca" in after or not after)
    assert config.encode_mask_tokens == ("--encode_mask_tokens" in (after or before).split())
    shared = [key for key in new if not key.startswith(("decoder_pred", "mask_token", "pca_"))]
    assert [key for key in shared if not torch.equal(new[key], old[key])] == []
    if config.pca_target:
        assert torch.allclose(new["pca_basis"].T @ new["pca_basis"], torch.eye(48), atol=1e-5)


@pytest.mark.parametrize(
    "given, message",
    [
        ("--masking grid --mask_ratio 0.5", "--masking grid keeps one of every four patches"),
        ("--masking grid --img_size 12", "an even grid, not 3 x 3 patches: an --img_size that 8 divides"),
        ("--masking block --img_size 4 16", "two rows and two columns of patches at least, not 1 x 4"),
        ("--target pca --patch_size 64 --img_size 128", "takes patches of at most 8,192 values, not 12,288"),
        ("--target pixels --norm_pix_loss", "--target pixels and --norm_pix_loss exclude each other"),
        ("--target normalized_pixels --no-norm_pix_loss", "--target normalized_pixels and --no-norm_pix_loss"),
        ("--augmentation random_crop_jitter --input_channels 4", "--augmentation random_crop_jitter"),
    ],
)
def test_variants_that_cannot_be_are_refused(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(flags(tmp_path, *given.split()))
    assert message in capsys.readouterr().err


def test_colours_of_images_in_their_own_units_are_not_changed(tmp_path):
    (tmp_path / "tiles").mkdir()
    for index in range(4):
        np.save(tmp_path / "tiles" / f"{index}.npy", np.random.default_rng(index).random((3, 20, 20), dtype=np.float32))
    args = parse_args(
        flags(tmp_path / "tiles", *["--augmentation", "random_crop_jitter", "--mean", "0.5", "--std", "0.3"])
    )
    with pytest.raises(ValueError, match="these images are read in their own units"):
        main(args)


def test_target_is_norm_pix_loss_by_another_name(tmp_path):
    assert build_config(parse_args(flags(tmp_path))) == build_config(
        parse_args(flags(tmp_path, "--target", "normalized_pixels"))
    )
    assert build_config(parse_args(flags(tmp_path, "--target", "pixels"))) == build_config(
        parse_args(flags(tmp_path, "--no-norm_pix_loss"))
    )
