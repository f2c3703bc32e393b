"""Quick checks of every equation, claim and error: `python -m pytest`. Tiny images, under two minutes on two cores."""

import functools
import gzip
import hashlib
import http.server
import io
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import beit
import benchmark
import data
import dvae
import finetune_cls
import finetune_seg
import masking
import pretrain
import reproduce
import train_tokenizer
import training
import verify
import visualize_attention

HERE = Path(__file__).resolve().parent
torch.set_num_threads(2)


# ---------------------------------------------------------------- masking: Algorithm 1


def test_blockwise_masks_match_the_released_generator():
    """Over 20,000 draws on 14 x 14 the released generator's masks: mean 74.47, minimum 64, 66.6 % exactly 75."""
    rng = random.Random(0)
    sizes = np.array([masking.blockwise_mask(rng, 14, 14, 75).sum() for _ in range(20_000)])
    assert sizes.max() == 75
    assert 60 <= sizes.min() <= 68
    assert abs(sizes.mean() - 74.47) < 4 * sizes.std() / math.sqrt(20_000)
    assert abs((sizes == 75).mean() - 0.666) < 4 * math.sqrt(0.666 * 0.334 / 20_000)


def test_blockwise_masks_have_the_generators_symmetries():
    """A block's place is uniform and its aspect ratio log-uniform, so that the map of how often each cell is masked
    looks the same mirrored and transposed, is 74.47 / 196 on average, and is highest in the middle."""
    rng, draws = random.Random(1), 20_000
    share = sum(masking.blockwise_mask(rng, 14, 14, 75).astype(float) for _ in range(draws)) / draws
    error = math.sqrt(2 * 0.25 / draws)  # of the difference of two cells
    for image in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - image).max() < 5 * error
    assert share.mean() == pytest.approx(74.47 / 196, abs=0.001)
    assert share[6:8, 6:8].min() > share[[0, 0, -1, -1], [0, -1, 0, -1]].max() + 20 * error


def test_masks_are_blocks():
    """Blockwise masks hang together: a masked patch has more masked neighbours than under random masking."""

    def neighbours(mask):
        return (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()

    rng = random.Random(0)
    blocks = np.mean([neighbours(masking.blockwise_mask(rng, 14, 14, 75)) for _ in range(200)])
    scattered = np.mean([neighbours(masking.random_mask(rng, 14, 14, 75)) for _ in range(200)])
    assert blocks > 1.7 * scattered


def test_printed_algorithm_stops_past_its_ratio():
    rng = random.Random(0)
    for _ in range(200):
        mask = masking.printed_mask(rng, 14, 14)
        assert mask.sum() > 0.4 * 196 and mask.sum() < 196


@pytest.mark.parametrize("kind", ["blockwise", "printed", "random"])
@pytest.mark.parametrize("grid, ratio, block", [(4, 0.3, 2), (7, 0.4, 4), (24, 0.5, 16)])
def test_masks_on_any_grid_are_a_function_of_the_seed(kind, grid, ratio, block):
    a = [masking.make_mask(kind, random.Random(s), grid, ratio, block) for s in range(20)]
    b = [masking.make_mask(kind, random.Random(s), grid, ratio, block) for s in range(20)]
    assert all(m.shape == (grid, grid) and m.dtype == bool and m.any() for m in a)
    assert np.array_equal(a, b) and not all(np.array_equal(a[0], m) for m in a)
    if kind == "blockwise":
        assert max(m.sum() for m in a) <= masking.target(grid, grid, ratio)
    if kind == "random":
        assert {m.sum() for m in a} == {masking.target(grid, grid, ratio)}


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, 0.001])
def test_mask_ratio_out_of_range(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        masking.make_mask("random", random.Random(0), 14, ratio, 16)


# ---------------------------------------------------------------- dVAE


def tiny_dvae(**changes):
    torch.manual_seed(0)
    settings = dict(vocab_size=16, hidden=8, groups=2, blocks_per_group=1, code_dim=8) | changes
    return dvae.DVAE(dvae.DVAEConfig(**settings))


def test_dalle_sizes():
    """DALL-E's networks have 53.8 M and 43.8 M parameters."""
    with torch.device("meta"):
        model = dvae.DVAE(dvae.DVAEConfig())
    count = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
    assert [round(c, 1) for c in count] == [53.8, 43.8]


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_grid_of_tokens(groups):
    model = tiny_dvae(groups=groups)
    z = model.tokens(torch.rand(2, 3, 16, 16))
    side = 16 // 2 ** (groups - 1)
    assert z.shape == (2, side, side) and z.dtype == torch.int64
    assert model.decode(z).shape == (2, 3, 16, 16)


def test_pixels_round_trip():
    x = torch.rand(100)
    assert torch.allclose(dvae.unmap_pixels(dvae.map_pixels(x)), x, atol=1e-6)
    assert dvae.map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("mu, ln_b", [(0.0, 0.0), (1.3, -1.0), (-2.0, 0.5)])
def test_logit_laplace_density_integrates_to_one(mu, ln_b):
    # In u = logit(x), dx = x (1 - x) du, so that the spike at mu and the tails are both resolved.
    u = torch.linspace(mu - 60, mu + 60, 2_000_001, dtype=torch.float64)
    x = torch.sigmoid(u)
    inside = (x > 1e-15) & (x < 1 - 1e-15)
    density = torch.exp(-dvae.logit_laplace_nll(x[inside], torch.tensor(mu), torch.tensor(ln_b)))
    integral = torch.trapezoid(density * (x * (1 - x))[inside], u[inside])
    assert integral.item() == pytest.approx(1, abs=1e-4)


def test_image_likelihood_is_a_density_over_0_to_1():
    """The change of variables of map_pixels: the density over x in [0, 1] has the mass between 0.1 and 0.9."""
    model = tiny_dvae()
    x = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mu, ln_b = torch.zeros(()), torch.zeros(())
    each = model.negative_log_likelihood(x.view(-1, 1, 1, 1), mu, ln_b)
    mass = 1 - math.exp(-math.log(9))  # Laplace(0, 1) between logit(0.1) and logit(0.9) = ±log 9
    assert torch.exp(-each).mean().item() == pytest.approx(mass, abs=1e-3)


def exponential(count, *shape):
    """The training loop's noise: Exp(1), (count, *shape)."""
    return training.sample_noise("exponential", shape, count, 0, 0, 0, torch.device("cpu"))


def test_gumbel_softmax_samples_q_and_has_gradients():
    logits = torch.tensor([0.5, -1.0, 2.0]).expand(20_000, 3).clone().requires_grad_()
    sample = dvae.gumbel_softmax(logits, 0.05, exponential(20_000, 3))
    assert torch.allclose(sample.sum(-1), torch.ones(20_000))
    shares = sample.argmax(-1).bincount() / 20_000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.02)
    # The gradient of E[code 0] points at raising logit 0 and lowering the others.
    dvae.gumbel_softmax(logits, 1.0, exponential(20_000, 3))[:, 0].mean().backward()
    gradient = logits.grad.sum(0)
    assert gradient[0] > 0 and gradient[1] < 0 and gradient[2] < 0


def test_gumbel_softmax_gradient_by_finite_differences():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    e = exponential(4, 5).double()
    assert torch.autograd.gradcheck(lambda values: dvae.gumbel_softmax(values, 0.7, e), (logits,))


def test_kl_to_uniform():
    assert dvae.kl_to_uniform(torch.zeros(3, 8)).abs().max() < 1e-6
    assert (dvae.kl_to_uniform(5 * torch.randn(100, 8)) >= -1e-6).all()
    certain = torch.tensor([100.0, 0, 0, 0])
    assert dvae.kl_to_uniform(certain).item() == pytest.approx(math.log(4), abs=1e-5)


def test_dvae_loss_normalises_both_terms_alike():
    """loss = (negative log-likelihood of the image + beta * KL of all its tokens) / (3 H W)."""
    model, x, e = tiny_dvae(), torch.rand(2, 3, 8, 8), exponential(2, 4, 4, 16)
    loss, terms, _ = model.loss(x, 1.0, 6.6, e)
    tokens, values = 4 * 4, 3 * 8 * 8
    expected = terms["reconstruction"] + 6.6 * terms["kl"] * tokens / values
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    codes = dvae.gumbel_softmax(model.encode(x), 1.0, e)
    nll = model.negative_log_likelihood(x, *model.decode_codes(codes)).mean() / values
    assert terms["reconstruction"].item() == pytest.approx(nll.item(), rel=1e-5)


def test_tokens_have_no_noise():
    model, x = tiny_dvae(), torch.rand(2, 3, 8, 8)
    assert torch.equal(model.tokens(x), model.encode(x).argmax(-1))
    assert torch.equal(model.tokens(x), model.tokens(x))


def test_vq_takes_the_nearest_code_and_passes_the_gradient_straight_through():
    model = tiny_dvae(quantizer="vq", likelihood="mse")
    z_e = torch.randn(2, 4, 4, 8, requires_grad=True)
    codes, z_q, z = model.straight_through(z_e)
    nearest = torch.cdist(z_e.detach().flatten(0, 2), model.codebook).argmin(1)
    assert torch.equal(z.flatten(), nearest) and torch.equal(z_q.flatten(0, 2), model.codebook[nearest])
    assert torch.allclose(codes.detach().flatten(0, 2), model.codebook[nearest], atol=1e-5)
    weight = torch.randn_like(codes)
    (codes * weight).sum().backward()
    assert torch.equal(z_e.grad, weight)


def test_vq_revives_dead_codes():
    """Without codes near the data one code takes everything; after revive_codes many are used."""
    model = tiny_dvae(quantizer="vq", likelihood="mse")
    x = torch.rand(32, 3, 8, 8)
    model.codebook.data.add_(100)
    model.codebook.data[0] = 0
    assert len(model.tokens(x).unique()) == 1
    model.revive_codes(x.chunk(2), rank=0, world=1, seed=0)
    assert len(model.tokens(x).unique()) > 8


# ---------------------------------------------------------------- backbone


def tiny_config(**changes):
    settings = dict(image_size=8, patch_size=2, dim=16, depth=2, heads=2, layer_scale=0.1, drop_path=0.0)
    return beit.BeitConfig(**settings | changes)


def tiny_mim(vocab=11, **changes):
    torch.manual_seed(0)
    model = pretrain.BeitForMaskedImageModeling(tiny_config(**changes), vocab)
    with torch.no_grad():  # biases and tables start at 0: give everything a value that can be seen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_base_has_the_parameters_of_the_released_model():
    """91,965,776 in the authors' log for the base pre-training model with the shared relative table."""
    with torch.device("meta"):
        model = pretrain.BeitForMaskedImageModeling(beit.model_config("base"), 8192)
    assert sum(p.numel() for p in model.parameters()) == 91_965_776


def test_patch_projection_is_a_linear_map_of_flattened_patches():
    config = tiny_config()
    embed, x = beit.PatchEmbed(config), torch.randn(1, 3, 8, 8)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)  # (1, N, 3PP)
    expected = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias
    assert torch.allclose(embed(x), expected, atol=1e-5)


def test_input_is_e_s_then_patches_plus_positions():
    """H_0 = [e_[S], E x_1, ..., E x_N] + E_pos, with e_[M] in place of a masked patch's projection."""
    model = tiny_mim(positions="absolute")
    x, mask = torch.randn(1, 3, 8, 8), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    H = model.embed(x, mask) - model.pos_embed
    assert torch.allclose(H[:, 0], model.cls_token[:, 0], atol=1e-6)
    assert torch.allclose(H[0, 6], model.mask_token[0, 0], atol=1e-6)
    assert torch.allclose(H[0, 7], model.patch_embed(x)[0, 6], atol=1e-6)


def test_attention_equals_scaled_dot_product_attention():
    model = tiny_mim(positions="relative")
    attention, x, bias = model.blocks[0].attn, torch.randn(2, 17, 16), next(model.biases())
    q, k, v = attention.project(x)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    assert torch.allclose(attention(x, bias), attention.proj(expected), atol=1e-6)


def test_relative_position_index():
    """Two pairs share a row exactly if their offset is the same; e_[S] has three rows of its own."""
    index, grid = beit.relative_position_index(3), 3
    rows = {}
    for i in range(9):
        for j in range(9):
            offset = (i // grid - j // grid, i % grid - j % grid)
            assert rows.setdefault(offset, index[i + 1, j + 1].item()) == index[i + 1, j + 1].item()
    assert sorted(rows.values()) == list(range(25))
    assert index[0, 1:].unique().item() == 25 and index[1:, 0].unique().item() == 26 and index[0, 0] == 27


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
def test_positions_tell_patches_apart(positions):
    """Without positions swapping two patches would only swap their outputs."""
    model = tiny_mim(positions=positions)
    x = torch.randn(1, 3, 8, 8)
    swapped = x.clone()
    swapped[..., :2, :2], swapped[..., 6:, 6:] = x[..., 6:, 6:], x[..., :2, :2]
    a, b = beit.Beit.forward(model, x), beit.Beit.forward(model, swapped)
    assert not torch.allclose(a[:, 1], b[:, 16], atol=1e-4)


def test_initialisation():
    """Cut at one std for pre-training (real std 0.0108), uncut for fine-tuning; output projections / sqrt(2l)."""
    config = beit.BeitConfig(image_size=32, patch_size=16, dim=256, depth=3, heads=4)
    torch.manual_seed(0)
    pre, fine = beit.Beit(config, mask_embedding=True), beit.Beit(config)
    assert pre.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.0108, rel=0.02)
    assert fine.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.0200, rel=0.02)
    assert pre.blocks[2].mlp.fc2.weight.std().item() == pytest.approx(0.0108 / math.sqrt(6), rel=0.02)
    assert fine.mask_token is None and pre.mask_token is not None


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(0)
    factor = beit.drop_path(torch.rand(20_000), 0.25)
    assert factor.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert factor.mean().item() == pytest.approx(1, abs=0.02)
    model = beit.Beit(tiny_config(drop_path=0.5))  # rates 0 and 0.5
    x, u = torch.randn(2, 3, 8, 8), torch.zeros(2, 2, 2)
    u[0] = 1  # the first sample keeps all its branches, scaled up; the second loses those of the second block
    one = model.blocks[0](model.embed(x), None)
    kept, lost = model(x, u=u)
    assert torch.allclose(lost, one[1], atol=1e-6) and not torch.allclose(kept, one[0], atol=1e-3)


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_the_last_block_at_some_positions_alone(positions, layer_scale):
    """Beit.forward(where=...) is the plain forward's rows, in value and in gradient; images may want 0 or all."""
    torch.manual_seed(0)
    model = beit.Beit(tiny_config(positions=positions, layer_scale=layer_scale, drop_path=0.5), mask_embedding=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, u, mask = torch.randn(3, 3, 8, 8), torch.rand(3, 2, 2), torch.rand(3, 16) < 0.4
    u[0] = 1  # keeps its branches
    mask[1], mask[2] = False, True
    image, i = mask.nonzero(as_tuple=True)
    results = []
    for plain in (True, False):
        model.zero_grad()
        h = model(x, mask, u)[:, 1:][mask] if plain else model(x, mask, u, (image, i + 1))
        h.sin().sum().backward()
        results.append([h.detach()] + [p.grad for p in model.parameters()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


def test_noise_is_a_function_of_the_place_in_the_global_batch():
    """However a batch of 8 is dealt, a sample gets the same numbers; another step has others; each kind is itself."""

    def noise(count, rank, step=3, distribution="exponential"):
        return training.sample_noise(distribution, (5, 7), count, 1, step, rank, torch.device("cpu"))

    whole = noise(8, 0)
    assert torch.equal(torch.cat([noise(4, 0), noise(4, 1)]), whole)
    assert torch.equal(torch.cat([noise(2, rank) for rank in range(4)]), whole)
    assert not torch.equal(noise(8, 0, step=4), whole)
    many = noise(2000, 0)
    assert many.min() >= 0 and many.mean().item() == pytest.approx(1, abs=0.02)
    uniform = noise(2000, 0, distribution="uniform")
    assert 0 <= uniform.min() and uniform.max() < 1 and uniform.var().item() == pytest.approx(1 / 12, abs=0.002)


def test_absolute_positions_are_interpolated():
    position = torch.randn(1, 17, 8)
    bigger = beit.resize_pos_embed(position, 7)
    assert bigger.shape == (1, 50, 8) and torch.equal(bigger[:, 0], position[:, 0])
    assert beit.resize_pos_embed(position, 4) is position
    constant = torch.ones(1, 17, 8)
    assert torch.allclose(beit.resize_pos_embed(constant, 7), torch.ones(1, 50, 8), atol=1e-5)


@pytest.mark.parametrize("new, q", [(24, 1.0903), (32, 1.1349), (60, None)])
def test_relative_tables_are_interpolated_on_the_released_geometric_scale(new, q):
    offsets = beit.geometric_offsets(14, new)
    assert offsets[14] == pytest.approx(1)
    assert q is None or offsets[15] - offsets[14] == pytest.approx(q, abs=5e-5)
    assert offsets[-1] == pytest.approx(new - 1, abs=1e-5)
    # A cubic spline without free ends reproduces a cubic of the offsets exactly.
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    table = torch.from_numpy(np.concatenate([(y**3 - 2 * x * y).ravel(), [1, 2, 3]]))[:, None]
    resized = beit.resize_relative_table(table, new).numpy()
    wide = np.arange(-(new - 1), new)
    y, x = np.meshgrid(wide, wide, indexing="ij")
    expected = np.concatenate([(y**3 - 2 * x * y).ravel(), [1, 2, 3]])[:, None]
    assert np.abs(resized - expected).max() < 1e-6 * np.abs(expected).max()


def test_layer_decay():
    """Block l of L gets d^(L+1-l), embeddings d^(L+1), head, norm and a shared table 1; no decay for vectors."""
    model = tiny_mim(positions="shared")
    groups = beit.parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
    scale, decay = {}, {}
    for group in groups:
        for parameter in group["params"]:
            scale[parameter], decay[parameter] = group["lr_scale"], group["weight_decay"]
    by_name = dict(model.named_parameters())
    assert len(scale) == len(by_name)
    assert scale[by_name["patch_embed.proj.weight"]] == scale[by_name["mask_token"]] == 0.5**3
    assert scale[by_name["blocks.0.mlp.fc1.weight"]] == 0.5**2 and scale[by_name["blocks.1.gamma_1"]] == 0.5
    assert scale[by_name["lm_head.weight"]] == scale[by_name["rel_pos_bias.relative_position_bias_table"]] == 1
    assert decay[by_name["cls_token"]] == decay[by_name["blocks.0.attn.q_bias"]] == decay[by_name["norm.weight"]] == 0
    assert decay[by_name["mask_token"]] == decay[by_name["rel_pos_bias.relative_position_bias_table"]] == 0.05


# ---------------------------------------------------------------- masked image modeling: eq. 1


def mim_loss(model, x, z, mask):
    return F.cross_entropy(model(x, mask), z[mask])


def test_loss_is_on_masked_positions_only():
    model = tiny_mim()
    x, z = torch.randn(2, 3, 8, 8), torch.randint(11, (2, 16))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3:6] = mask[1, 7] = True
    assert model(x, mask).shape == (4, 11)
    loss = mim_loss(model, x, z, mask)
    elsewhere = torch.where(mask, z, (z + 1) % 11)
    assert torch.equal(mim_loss(model, x, elsewhere, mask), loss)
    there = torch.where(mask, (z + 1) % 11, z)
    assert not torch.allclose(mim_loss(model, x, there, mask), loss)


def test_pixels_under_the_mask_are_not_seen():
    model = tiny_mim()
    x, mask = torch.randn(1, 3, 8, 8), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 0] = True  # the patch of rows 0-1, columns 0-1
    changed, visible = x.clone(), x.clone()
    changed[..., :2, :2] += 1
    visible[..., 4:6, 4:6] += 1
    assert torch.equal(model(changed, mask), model(x, mask))
    assert not torch.allclose(model(visible, mask), model(x, mask), atol=1e-4)


def test_bound_terms_are_those_of_eq_3(tmp_path):
    """stage1_nats and stage2_nats of evaluate(), recomputed image by image."""
    model, tokenizer = tiny_mim(vocab=16), tiny_dvae().eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    args = pretrain_arguments()
    held_out = pretrain.MaskedViews(args, data.Arrays("five", images), [(8, "bicubic"), (8, "lanczos")], 4, False)
    autocast, _ = training.precision("off", torch.device("cpu"))
    result = pretrain.evaluate(model, tokenizer, held_out, args, torch.device("cpu"), 0, 1, autocast)
    stage1 = stage2 = right = count = 0.0
    for i in range(5):
        x, pixels, mask = pretrain.two_views(held_out.__getitems__([(-1, i)]), torch.device("cpu"), "half")
        z = tokenizer.tokens(pixels)
        log_p = F.log_softmax(model(x, mask), -1)
        stage2 += log_p.gather(1, z.flatten(1)[mask][:, None]).sum().item()
        stage1 -= tokenizer.negative_log_likelihood(pixels, *tokenizer.decode_parameters(z)).item()
        right += (log_p.argmax(-1) == z.flatten(1)[mask]).sum().item()
        count += mask.sum().item()
    assert result["stage1_nats"] == pytest.approx(stage1 / 5, rel=1e-5)
    assert result["stage2_nats"] == pytest.approx(stage2 / 5, rel=1e-5)
    assert result["mim_loss"] == pytest.approx(-stage2 / count, rel=1e-5)
    assert result["mim_accuracy"] == pytest.approx(right / count)


def test_pixel_targets_are_the_patches_own_pixels():
    x = torch.randn(2, 3, 8, 8)
    pixels = pretrain.recovery_targets("pixels", x, None, None, 2)
    assert pixels.shape == (2, 16, 12)
    assert torch.equal(pixels[1, 6].sort().values, x[1, :, 2:4, 4:6].flatten().sort().values)  # row 1, column 2
    standard = pretrain.recovery_targets("normalised-pixels", 5 + 3 * x, None, None, 2)
    assert torch.allclose(standard.mean(-1), torch.zeros(2, 16), atol=1e-5)
    assert torch.allclose(standard.var(-1, correction=0), torch.ones(2, 16), atol=1e-3)
    assert torch.allclose(pretrain.recovery_loss(pixels[0], pixels[0] + 2), torch.full((16,), 4.0))


def test_recover_all_counts_every_position():
    model, x, z = tiny_mim(), torch.randn(2, 3, 8, 8), torch.randint(11, (2, 16))
    mask = torch.rand(2, 16) < 0.4
    where = pretrain.recovered_positions("all", mask)
    prediction = model(x, mask, where.nonzero(as_tuple=True))
    assert prediction.shape == (32, 11) and torch.equal(pretrain.recovered_positions("masked", mask), mask)
    assert torch.allclose(prediction[mask.flatten()], model(x, mask), atol=1e-6)
    expected = F.cross_entropy(prediction, z.flatten(), reduction="sum")
    assert pretrain.recovery_loss(prediction, z[where]).sum().item() == pytest.approx(expected.item())


def test_positions_that_fill_up_a_batch_change_nothing():
    """Always as many positions as the largest masks have: eq. 1's loss and gradients are those of M alone."""
    model, x, z = tiny_mim(), torch.randn(3, 3, 8, 8), torch.randint(11, (3, 16))
    mask = torch.rand(3, 16) < 0.3
    mask[1] = False
    image, i = at = pretrain.filled_positions(mask, 30)
    assert image.shape == (30,) and mask.sum() < 30 and len(set(zip(image.tolist(), i.tolist()))) == 30
    assert torch.equal(torch.stack(at)[:, : mask.sum()], torch.stack(mask.nonzero(as_tuple=True)))
    results = []
    for padded in (False, True):
        model.zero_grad()
        if padded:
            loss = (pretrain.recovery_loss(model(x, mask, at), z[at]) * mask[at]).sum()
        else:
            loss = F.cross_entropy(model(x, mask), z[mask], reduction="sum")
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "masking, recover",
    [("blockwise", "masked"), ("printed", "masked"), ("random", "masked"), ("blockwise", "all"), ("none", "all")],
)
def test_no_mask_has_more_positions_than_are_predicted(masking, recover, arrays):
    """MaskedViews.most_positions bounds every mask; filled_positions would drop what is beyond it."""
    flags = ["--masking", masking, "--recover", recover, "--data", str(arrays), "--out", "unused"]
    args = training.parse_recipe(training.recipe_parser("", pretrain.RECIPES), pretrain.RECIPES, flags)
    views = pretrain.MaskedViews(args, data.open_source(str(arrays), "train", None), [(24, "bicubic")], 6, True)
    masks = torch.cat([views.__getitems__([(epoch, i) for i in range(8)])[-1] for epoch in range(50)])
    counts = pretrain.recovered_positions(recover, masks.flatten(1)).sum(1)
    assert 0 < counts.max() <= views.most_positions <= 36


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, on importing its compiler
def test_compiled_is_the_plain_function():
    compiled = training.compiled(pretrain.recovery_loss, torch.device("cpu"))  # raises if there is no such option
    prediction, z = torch.randn(4, 11), torch.randint(11, (4,))
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(compiled(prediction, z), pretrain.recovery_loss(prediction, z))


@pytest.mark.parametrize(
    "flags",
    [
        ("--target", "pixels"),
        ("--target", "normalised-pixels", "--masking", "random"),
        ("--recover", "all"),
        ("--recover", "all", "--masking", "none"),
    ],
    ids=" ".join,
)
def test_ablations_of_table_4_run(flags, arrays, made, tmp_path):
    common = script_flags("beit", arrays, made)
    if "--target" in flags:
        where = common.index("--tokenizer")
        del common[where : where + 2]
    pretrain.main([*common, *flags, "--out", str(tmp_path / "run")])
    final = training.read_metrics(tmp_path / "run")[-1]
    assert math.isfinite(final["mim_loss"]) and ("mim_accuracy" in final) == ("--target" not in flags)
    assert (tmp_path / "run" / "predictions.png").stat().st_size > 100


def test_average_precision_of_a_hand_made_ranking():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.1, 0.2, 0.3, 0.4]])
    relevant = torch.tensor([[True, True, False, False], [False, False, False, True]])
    found = visualize_attention.average_precision(scores, relevant)
    assert found.tolist() == pytest.approx([(1 + 2 / 4) / 2, 1.0])


def test_attention_that_knows_the_objects_scores_100():
    """separation() with a model whose attention is the truth, and one that looks everywhere else."""
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[:, :4, :4], masks[:, 4:, 4:] = 1, 2
    source = data.Arrays("two objects", np.zeros((2, 8, 8, 3), np.uint8), masks=masks)
    classes = visualize_attention.patch_classes(torch.from_numpy(masks[0]), 2)
    same = F.pad((classes[:, None] == classes).float(), (1, 0, 1, 0))  # (N+1, N+1), e_[S] first

    def looking(attention):
        model = types.SimpleNamespace(config=tiny_config())
        model.last_attention = lambda x: attention.expand(1, 2, -1, -1)
        return model

    models = {"knows": looking(same), "opposite": looking(-same)}
    found = visualize_attention.separation(models, "half", source, 2)
    assert found["knows"] == pytest.approx(100)
    assert found["chance"] == pytest.approx(100 * 3 / 15)
    assert found["opposite"] < found["chance"]


def pretrain_arguments():
    parser = training.recipe_parser("", pretrain.RECIPES)
    return training.parse_recipe(parser, pretrain.RECIPES, ["--out", "x", "--mask-ratio", "0.4", "--min-block", "2"])


# ---------------------------------------------------------------- classification


def test_classifier_is_a_linear_map_of_the_mean_patch_output():
    torch.manual_seed(0)
    model = finetune_cls.BeitForClassification(tiny_config(), 5).eval()
    x = torch.randn(2, 3, 8, 8)
    mean = beit.Beit.forward(model, x)[:, 1:].mean(1)
    expected = F.layer_norm(mean, [16], eps=1e-6) @ model.head.weight.T
    assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_follow_mixed_pixels(mixup, cutmix):
    """Image i is constant i: the mean pixel of a mixture tells its share, which the targets must have."""
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    for seed in range(20):
        mixed, targets = finetune_cls.mix(x, torch.eye(4), mixup, cutmix, random.Random(seed))
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0), atol=1e-5)
        assert torch.allclose(targets.sum(1), torch.ones(4))


def test_randaugment_operations_keep_the_range_and_do_something():
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for operation in finetune_cls.OPERATIONS:
        for strength in (0.0, 0.5, 1.0):
            y = operation(image / 255, strength, -1)
            assert y.shape == image.shape and y.min() > -1e-5 and y.max() < 1 + 1e-5
        assert not torch.allclose(operation(image / 255, 0.7, 1), image / 255, atol=1e-3)
    again = [finetune_cls.randaugment(image, 9, random.Random(s)) for s in (1, 1)]
    assert torch.equal(*again)


def test_erasing_erases_one_rectangle():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    finetune_cls.erase(image, random.Random(0))
    changed = (image != 0).any(0)
    rows, columns = changed.any(1), changed.any(0)
    box = rows.sum() * columns.sum()
    assert 0.01 * 32 * 32 < box < 0.4 * 32 * 32 and changed.sum() > 0.99 * box


def test_linear_probe_trains_norm_and_head_only(arrays, tmp_path):
    flags = ["--recipe", "demo", "--data", arrays, "--init", "random", "--image-size", "16", "--batch-size", "8"]
    flags += ["--epochs", "1", "--warmup-epochs", "0", "--linear-probe", "--device", "cpu", "--labels-per-class", "0"]
    finetune_cls.main([*flags, "--out", str(tmp_path / "probe")])
    trained = training.load_checkpoint(tmp_path / "probe" / "checkpoint.pt", "classification")["model"]
    torch.manual_seed(0)
    fresh = finetune_cls.BeitForClassification(beit.finetuned_config(None, "tiny", 16, 0.0), 4).state_dict()
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert changed and all(name.startswith(("fc_norm.", "head.")) for name in changed)


def test_shared_table_becomes_one_per_block_at_another_size():
    """A pre-trained model with a shared table and an absolute one load into a classifier at twice the size."""
    for positions in ("shared", "absolute"):
        source = tiny_mim(positions=positions)
        init = {"config": vars(source.config)}
        config = beit.finetuned_config(init, None, 16, 0.0)
        model = finetune_cls.BeitForClassification(config, 3)
        beit.load_backbone(model, source.state_dict())
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)
        if positions == "shared":
            expected = beit.resize_relative_table(source.rel_pos_bias.relative_position_bias_table.data, 8)
            assert torch.equal(model.blocks[1].attn.relative_position_bias_table, expected)


def test_classifier_goes_on_at_a_higher_resolution_with_its_head():
    torch.manual_seed(0)
    small = finetune_cls.BeitForClassification(tiny_config(positions="relative"), 3)
    large = finetune_cls.BeitForClassification(tiny_config(positions="relative", image_size=16), 3)
    beit.load_backbone(large, small.state_dict(), with_head=True)
    assert torch.equal(large.head.weight, small.head.weight)
    beit.load_backbone(large, tiny_mim(positions="relative").state_dict())  # another head stays out
    assert torch.equal(large.head.weight, small.head.weight)


def test_weights_that_do_not_fit_are_named():
    state = tiny_mim().state_dict()
    del state["blocks.1.norm1.weight"]
    state["surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match="missing blocks.1.norm1.weight; unknown surprise"):
        beit.load_backbone(finetune_cls.BeitForClassification(tiny_config(), 3), state)


# ---------------------------------------------------------------- segmentation


def test_mean_iou_by_hand():
    """Truth 0 0 1 1 2 ignored, guess 0 1 1 1 0 2: IoU 1/3, 2/3, 0; three of five pixels right."""
    truth, guess = torch.tensor([0, 0, 1, 1, 2, data.IGNORE]), torch.tensor([0, 1, 1, 1, 0, 2])
    matrix = finetune_seg.confusion_matrix(truth, guess, 4)  # class 3 occurs nowhere and does not count
    miou, accuracy = finetune_seg.mean_iou(matrix)
    assert miou == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3) and accuracy == pytest.approx(60)


def test_decoder_reaches_full_resolution():
    for patch in (2, 4, 8):
        model = finetune_seg.BeitForSegmentation(tiny_config(image_size=16, patch_size=patch), 5, 8)
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5, 16, 16)


def test_segmentation_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model, x = finetune_seg.BeitForSegmentation(tiny_config(), 5, 8), torch.randn(3, 3, 8, 8)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)


def test_sliding_window():
    torch.manual_seed(0)
    model = finetune_seg.BeitForSegmentation(tiny_config(), 5, 8).eval()
    x = torch.randn(1, 3, 8, 8)
    assert torch.allclose(finetune_seg.slide(model, x), model(x), atol=1e-6)
    wide = torch.randn(1, 3, 8, 13)
    logits = finetune_seg.slide(model, wide)
    first, second = model(wide[..., :8]), model(wide[..., 5:])
    assert logits.shape == (1, 5, 8, 13)
    assert torch.allclose(logits[..., :5], first[..., :5], atol=1e-5)
    assert torch.allclose(logits[..., 5:8], (first[..., 5:] + second[..., :3]) / 2, atol=1e-5)


def test_segmentation_crops_keep_image_and_mask_together():
    """The mask is a function of the image's red channel: it must stay so after scaling by 1, crop and flip."""
    images = np.random.default_rng(0).integers(0, 4, (6, 20, 24, 3), np.uint8)
    source = data.Arrays("six", images, masks=images[..., 0].copy())
    flags = ["--out", "x", "--image-size", "16"]
    args = training.parse_recipe(training.recipe_parser("", finetune_seg.RECIPES), finetune_seg.RECIPES, flags)
    keys = [(epoch, i) for epoch in range(5) for i in range(6)]
    views, masks = finetune_seg.MaskedImages(args, source, 4, True).__getitems__(keys)
    assert views.shape == (30, 3, 16, 16) and torch.equal(views[:, 0], masks)


# ---------------------------------------------------------------- figure 2


def test_last_attention_is_what_the_last_block_uses():
    model = tiny_mim(positions="shared")
    x = torch.randn(1, 3, 8, 8)
    weights = model.last_attention(x)
    assert weights.shape == (1, 2, 17, 17) and torch.allclose(weights.sum(-1), torch.ones(1, 2, 17), atol=1e-5)
    seen = []
    model.blocks[-1].attn.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    beit.Beit.forward(model, x)
    (h, *_), out = seen[0]
    last = model.blocks[-1].attn
    assert torch.allclose(out, last.proj((weights @ last.project(h)[2]).transpose(1, 2).flatten(2)), atol=1e-5)


# ---------------------------------------------------------------- data


def test_resizing_is_pillows():
    """A crop in the middle of an image, resized with either filter, is Pillow's crop and resize but for rounding."""
    image = pytest.importorskip("PIL.Image")
    x = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    boxes = [(0, 0, 20, 30), (3, 5, 14, 17)]
    for kernel in ("bicubic", "lanczos"):
        ours = data.crop_resize(x, boxes, 8, kernel)
        for picture, (top, left, height, width), resized in zip(x, boxes, ours):
            whole = image.fromarray(picture.permute(1, 2, 0).numpy())
            part = whole.crop((left, top, left + width, top + height))
            theirs = np.asarray(part.resize((8, 8), getattr(image, kernel.upper())), np.int16)
            assert np.abs(resized.permute(1, 2, 0).numpy() - theirs).max() <= 1


def test_both_views_show_the_same_crop():
    """Shrinking the large view gives the small one, up to the filters' difference."""
    source = data.shapes("val")
    crops = data.Crops(source, [(32, "bicubic"), (16, "lanczos")], True, seed=3, min_crop=0.4, flip=True, jitter=0.4)
    large, small = (v.float() for v in crops.__getitems__([(0, i) for i in range(40)]))
    shrunk = F.interpolate(large, (16, 16), mode="bicubic", antialias=True)
    assert (shrunk - small).abs().mean() < 2.5
    assert (shrunk.flip(0) - small).abs().mean() > 25  # other images are far


def test_samples_depend_on_seed_epoch_and_index_alone(arrays):
    crops = data.Crops(data.open_source(arrays, "train"), [(16, "bicubic")], True, 7, 0.3, True, 0.4)
    (together,) = crops.__getitems__([(2, i) for i in range(8)])
    (alone,) = crops.__getitems__([(2, 5)])
    (later,) = crops.__getitems__([(3, 5)])
    assert torch.equal(together[5:6], alone) and not torch.equal(alone, later)


def test_batches_are_a_function_of_the_step():
    """A run resumed at step 7, and two processes together, see the samples that one whole run sees."""
    whole = list(data.StepBatches(20, 4, 0, 1, seed=5, first=0, last=12))
    assert list(data.StepBatches(20, 4, 0, 1, seed=5, first=7, last=12)) == whole[7:]
    halves = zip(*(data.StepBatches(20, 2, rank, 2, seed=5, first=0, last=12) for rank in (0, 1)))
    assert [a + b for a, b in halves] == whole
    assert sorted(i for batch in whole[:5] for _, i in batch) == list(range(20))


def test_shapes_are_deterministic_and_labelled():
    uniforms = np.stack([np.random.default_rng((0, i)).random(40) for i in range(64)])
    images, labels, masks = data.draw_shapes(uniforms, 32)
    again, _, _ = data.draw_shapes(uniforms[10:20], 32)
    assert np.array_equal(images[10:20], again)
    assert images.dtype == np.uint8 and set(labels) == set(range(8))
    for label, mask in zip(labels, masks):  # the large shape in front is the class
        assert np.bincount(mask[mask > 0]).argmax() == label + 1


def test_grey_becomes_three_equal_channels():
    source = data.Arrays("grey", np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4))
    images = source.read([0, 1])
    assert images.shape == (2, 4, 4, 3) and (images[..., 0] == images[..., 2]).all()


@pytest.mark.parametrize("destination", ["set.npz", "folder"])
def test_convert_once(arrays, tmp_path, destination):
    data.main([arrays, str(tmp_path / destination), "--size", "8"])
    source = data.open_source(str(tmp_path / destination), "train")
    assert source.images.shape == (32, 8, 8, 3) and len(source.labels) == 32 and source.masks.shape == (32, 8, 8)
    assert isinstance(source.images, np.memmap) == (destination == "folder")


def test_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = np.full((10 + i, 14, 3), 100 * i, np.uint8)
                image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    source = data.open_source(str(tmp_path), "train")
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0, 0, 1, 1]
    crops = data.Crops(source, [(8, "bicubic")], True)
    assert crops.__getitems__([(0, i) for i in range(4)])[0].shape == (4, 3, 8, 8)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"not an image")
    assert crops.__getitems__([(0, 0)])[0].shape == (1, 3, 8, 8) and crops.trouble() == {"skipped": 1}
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    crops = data.Crops(source, [(8, "bicubic")], True, labels=True)
    images, labels = crops.__getitems__([(0, 1)])  # the next readable file is the first dog
    assert labels.tolist() == [1] and (images == 0).all()
    with pytest.raises(ValueError, match="0.png is not a readable image"):
        data.Crops(source, [(8, "bicubic")], False).__getitems__([(-1, 0)])


def test_ade_folder(tmp_path):
    """Annotation value 0 is ignored, 1 is class 0."""
    image = pytest.importorskip("PIL.Image")
    for part in ("images/training", "annotations/training"):
        (tmp_path / part).mkdir(parents=True)
    image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "images/training/a.jpg")
    image.fromarray(np.array([[0, 1], [150, 7]], np.uint8).repeat(2, 0).repeat(2, 1)).save(
        tmp_path / "annotations/training/a.png"
    )
    source = data.open_source(str(tmp_path), "train")
    assert len(source.mask_classes) == 150
    assert source.read_masks([0])[0, ::2, ::2].tolist() == [[data.IGNORE, 0], [149, 6]]


def test_fashion_files_are_checked(tmp_path, monkeypatch):
    """The right content is read whatever its compression; other content, half a file and no file are refused."""
    name = "t10k-labels-idx1-ubyte"
    content = bytes(8) + bytes(range(10))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="checksum differs"):
        data.read_idx(name, str(tmp_path))
    monkeypatch.setitem(data.FASHION_SHA256, name, hashlib.sha256(content).hexdigest())
    assert data.read_idx(name, str(tmp_path)).tolist() == list(range(10))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content)[:-6])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        data.read_idx(name, str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        data.read_idx(name, str(tmp_path / "none"))


def right(path):
    """A check for data.fetch."""
    if path.read_bytes() != b"the right content":
        raise ValueError(f"{path}: checksum differs")


def test_download_that_fails_leaves_nothing_behind(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="cannot download"):
        data.fetch("a.gz", (tmp_path / "none.gz").as_uri(), [cache], right)
    (tmp_path / "some.gz").write_bytes(b"other content")
    with pytest.raises(ValueError, match="checksum differs"):
        data.fetch("a.gz", (tmp_path / "some.gz").as_uri(), [cache], right)
    assert list(cache.iterdir()) == []
    (tmp_path / "some.gz").write_bytes(b"the right content")
    assert data.fetch("a.gz", (tmp_path / "some.gz").as_uri(), [cache], right) == cache / "a.gz"
    assert [path.name for path in cache.iterdir()] == ["a.gz"]


@pytest.mark.parametrize("ranges", [True, False], ids=["server knows ranges", "server starts again"])
def test_download_that_breaks_off_goes_on(ranges, tmp_path):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers["Range"])
            start = 5 if ranges and self.headers["Range"] == "bytes=5-" else 0
            content = b"the right content"[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:5] if len(asked) == 1 else content)

        def log_message(self, *ignored):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetch = functools.partial(data.fetch, "a.gz", f"http://127.0.0.1:{server.server_port}/a.gz", [tmp_path], right)
        with pytest.raises(ValueError, match="it broke off after 5 of 17 bytes"):
            fetch()
        assert not (tmp_path / "a.gz").exists()
        assert fetch().read_bytes() == b"the right content"
        server.shutdown()
    assert asked == [None, "bytes=5-"]


def png(width, height, rows=b""):
    """A PNG that claims a size, whatever is in it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    parts = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BROKEN = {  # file name: (how it is made at its path, what it is)
    "zero.png": (lambda path: path.touch(), "of no bytes"),
    "text.jpg": (lambda path: path.write_text("not an image"), "text under another name"),
    "bomb.png": (lambda path: path.write_bytes(png(10_000, 10_000)), "a hundred million pixels in a few bytes"),
    "huge.png": (lambda path: path.write_bytes(png(60_000, 60_000)), "more than Pillow itself opens"),
    "short.png": (lambda path: path.write_bytes(png(8, 8, random.Random(0).randbytes(25 * 8))[:-100]), "truncated"),
    "garbage.png": (lambda path: path.write_bytes(png(8, 8, b"too few rows")), "with less in it than it claims"),
    "loop.png": (lambda path: path.symlink_to(path), "a symbolic link to itself"),
    "folder.png": (lambda path: path.mkdir(), "a folder"),
    "gone.png": (lambda path: path.symlink_to("nowhere.png"), "a link to nothing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_image_is_skipped_counted_and_named(name, tmp_path, capsys):
    """In training the next one takes its place; in evaluation it is an error in one line."""
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "train" / "only"
    folder.mkdir(parents=True)
    BROKEN[name][0](folder / name)
    image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(folder / "zz.png")
    source = data.open_source(str(tmp_path), "train")
    crops = data.Crops(source, [(8, "bicubic")], True)
    assert (crops.__getitems__([(0, 0)])[0] == 90).all() and crops.trouble() == {"skipped": 1}
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1
    with pytest.raises(ValueError, match=f"{name} is not a readable image"):
        data.Crops(source, [(8, "bicubic")], False).__getitems__([(-1, 0)])


def test_unusual_images_are_read_right(tmp_path):
    """Palette, transparency, CMYK, grey, 16 bits, an animation, a wrong suffix: what was put in comes out."""
    image = pytest.importorskip("PIL.Image")
    plain = image.new("RGB", (8, 8), (200, 100, 50))
    plain.quantize(4).save(tmp_path / "palette.png")
    plain.convert("RGBA").save(tmp_path / "alpha.png")
    plain.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    plain.save(tmp_path / "jpeg.png", format="jpeg", quality=100)
    plain.save(tmp_path / "moves.webp", save_all=True, append_images=[image.new("RGB", (8, 8))], lossless=True)
    image.fromarray(np.full((8, 8), 120, np.uint8)).save(tmp_path / "grey.png")
    image.fromarray(np.full((8, 8), 120 * 257, np.uint16)).save(tmp_path / "deep.png")
    for path in tmp_path.iterdir():
        pixels = data.Files("one", [path]).read([0])
        expected = (120, 120, 120) if path.name in ("grey.png", "deep.png") else (200, 100, 50)
        assert pixels.shape == (1, 8, 8, 3) and pixels.dtype == np.uint8
        assert np.abs(pixels[0, 4, 4].astype(int) - expected).max() <= 3, path.name


def test_broken_arrays_are_refused_in_one_line(arrays, tmp_path):
    whole = Path(arrays).read_bytes()
    (tmp_path / "zero.npz").touch()
    (tmp_path / "short.npz").write_bytes(whole[:3000])
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 16
    (tmp_path / "flipped.npz").write_bytes(flipped)
    np.savez_compressed(tmp_path / "packed.npz", train_images=np.random.default_rng(0).bytes(2000))
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    packed[len(packed) // 2 :: 7] = bytes(len(packed[len(packed) // 2 :: 7]))
    (tmp_path / "packed.npz").write_bytes(packed)
    np.savez(tmp_path / "pickled.npz", train_images=np.array([{}], dtype=object))
    for name in ("zero", "short", "pickled"):
        (tmp_path / name).mkdir()
    (tmp_path / "zero" / "train_images.npy").touch()
    np.save(tmp_path / "pickled" / "train_images.npy", np.array([{}], dtype=object))
    np.save(tmp_path / "short" / "train_images.npy", np.zeros((9, 8, 8), np.uint8))
    with open(tmp_path / "short" / "train_images.npy", "r+b") as file:
        file.truncate(300)
    for name in ("zero.npz", "short.npz", "flipped.npz", "packed.npz", "pickled.npz", "zero", "short", "pickled"):
        with pytest.raises((ValueError, OSError)) as refused:
            data.open_source(str(tmp_path / name), "train")
        assert str(refused.value).strip(), name


# ---------------------------------------------------------------- runs that are stopped (the rest: torture.py)


def test_a_flipped_bit_in_a_checkpoint_is_found(made, tmp_path):
    content = bytearray((made / "cls" / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole file of weights: the checksum of .* differs"):
        training.read_file(tmp_path / "a.pt")


def test_unfinished_last_line_of_the_log_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert training.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]
    training.Log(tmp_path, 0, 9, first_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_step_without_a_finite_gradient_is_skipped(arrays, made, tmp_path, monkeypatch):
    """The third step's gradient is not a number: it changes nothing and is counted; ten in a row end the run."""
    norms, clip = [], nn.utils.clip_grad_norm_

    def broken(*args):
        norms.append(clip(*args))
        return torch.tensor(math.nan) if len(norms) == 3 else norms[-1]

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", broken)
    saved, save = {}, training.save_checkpoint

    def remember(out, kind, args, step, model, *rest, **more):
        saved[step] = {name: value.clone() for name, value in model.state_dict().items()}
        save(out, kind, args, step, model, *rest, **more)

    monkeypatch.setattr(training, "save_checkpoint", remember)
    finetune_cls.main([*script_flags("cls", arrays, made), "--save-every", "1", "--out", str(tmp_path / "run")])
    assert all(torch.equal(saved[2][name], saved[3][name]) for name in saved[2])
    assert not all(torch.equal(saved[3][name], saved[4][name]) for name in saved[3])
    assert [m.get("skipped_steps", 0) for m in training.read_metrics(tmp_path / "run") if "loss" in m] == [0, 0, 1, 1]
    finite = training.FiniteSteps(tmp_path)
    assert not any(finite.allow(math.inf, step, 0.1) for step in range(9))
    with pytest.raises(ValueError, match=r"10 steps in a row, the last one step 9 at learning rate 0.1.*last good"):
        finite.allow(math.nan, 9, 0.1)


def test_weights_that_are_not_finite_are_never_saved(made, tmp_path):
    model = tiny_mim()
    model.lm_head.bias.data[0] = math.inf
    with pytest.raises(ValueError, match="lm_head.bias is not finite after step 7"):
        training.save_checkpoint(tmp_path, "pretraining", types.SimpleNamespace(), 7, model, None, None)
    assert list(tmp_path.iterdir()) == []


def test_second_interrupt_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(training, "signals", [])
    training.note_signal(signal.SIGINT, None)
    assert training.stop_asked(torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        training.note_signal(signal.SIGINT, None)


def test_output_that_is_in_use_is_refused(tmp_path):
    code = "import sys, training; training.lock(training.Path(sys.argv[1])); print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by process {owner.pid} on"):
            training.lock(tmp_path)
        owner.kill()
    training.lock(tmp_path)  # a dead process has no lock
    assert training.read_lock(tmp_path)["pid"] == os.getpid()


def test_cifar_records(tmp_path, monkeypatch):
    """A record is the class, then 1024 red, 1024 green and 1024 blue bytes, row by row."""
    red_row = np.repeat(np.arange(32, dtype=np.uint8), 32)
    record = np.concatenate([[7], red_row, np.full(1024, 100), np.full(1024, 200)]).astype(np.uint8)
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        entry = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        entry.size = len(record)
        archive.addfile(entry, io.BytesIO(record.tobytes()))
    with pytest.raises(ValueError, match="checksum differs"):
        data.cifar10("test", str(tmp_path))
    monkeypatch.setattr(data, "CIFAR_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    source = data.cifar10("test", str(tmp_path))
    assert source.labels.tolist() == [7] and source.images[0, 5, 9].tolist() == [5, 100, 200]


# ---------------------------------------------------------------- schedules, pictures


def test_schedules():
    rates = [training.warmup_cosine(s, 100, 10, 1.0, 0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == pytest.approx(1) and rates[55] == pytest.approx(0.55) and min(rates[10:]) >= 0.1
    linear = [training.warmup_linear(s, 100, 10, 2.0) for s in range(101)]
    assert linear[9] == linear[10] == 2.0 and linear[55] == pytest.approx(1) and linear[100] == 0
    assert training.cosine(0, 150_000, 1, 1 / 16) == 1 and training.cosine(150_000, 150_000, 1, 1 / 16) == 1 / 16
    assert training.cosine(200_000, 150_000, 1, 1 / 16) == 1 / 16
    assert [training.ramp(s, 5000, 6.6) for s in (0, 2500, 9000)] == [0, 3.3, 6.6] and training.ramp(0, 0, 2.0) == 2.0


def test_png_can_be_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    training.write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(np.asarray(image.open(tmp_path / "a.png")), pixels)


# ---------------------------------------------------------------- the scripts, alone and under torchrun


def make_arrays(path):
    """Write a small data set with labels and masks, a .npz: 32 training and 16 validation images of 16 x 16."""
    rng = np.random.default_rng(0)
    content = {}
    for split, count in (("train", 32), ("val", 16)):
        content[f"{split}_images"] = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
        content[f"{split}_labels"] = np.arange(count) % 4
        content[f"{split}_masks"] = (content[f"{split}_images"][..., 0] > 128).astype(np.uint8)
    np.savez(path, **content)
    return str(path)


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    return make_arrays(tmp_path_factory.mktemp("data") / "tiny.npz")


COMMON = ["--device", "cpu", "--amp", "off", "--log-every", "1", "--batch-size", "8"]
TOKENIZER = ["--image-size", "16", "--vocab-size", "16", "--hidden", "8", "--code-dim", "8", "--tau-steps", "2"]
SCRIPTS = {
    "tokenizer": ["train_tokenizer.py", *TOKENIZER, "--steps", "4", "--warmup-steps", "1"],
    "beit": ["pretrain.py", "--image-size", "16", "--token-size", "16", "--min-block", "2", "--epochs", "1",
             "--warmup-epochs", "0.25"],
    "cls": ["finetune_cls.py", "--image-size", "16", "--labels-per-class", "0", "--epochs", "1",
            "--warmup-epochs", "0.25"],
    "seg": ["finetune_seg.py", "--image-size", "16", "--train-images", "0", "--steps", "4", "--warmup-steps", "1"],
}  # fmt: skip
RESULTS = {
    "tokenizer": {"reconstruction_mse", "codebook_perplexity", "codebook_used"},
    "beit": {"mim_loss", "mim_accuracy"},
    "cls": {"top1", "top5"},
    "seg": {"miou", "pixel_accuracy"},
}
MODULES = {"tokenizer": train_tokenizer, "beit": pretrain, "cls": finetune_cls, "seg": finetune_seg}


def script_flags(stage, arrays, made):
    """Flags of a short run of one script on the small data set, after the scripts before it."""
    flags = [*SCRIPTS[stage][1:], *COMMON, "--data", arrays]
    if stage == "beit":
        flags += ["--tokenizer", str(made / "tokenizer" / "checkpoint.pt")]
    if stage in ("cls", "seg"):
        flags += ["--init", str(made / "beit" / "checkpoint.pt")]
    return flags


@pytest.fixture(scope="session")
def made(arrays, tmp_path_factory):
    """Every script run once, in order, in this process: a folder of their --out folders."""
    made = tmp_path_factory.mktemp("made")
    for stage, module in MODULES.items():
        module.main([*script_flags(stage, arrays, made), "--out", str(made / stage)])
    return made


@pytest.mark.parametrize("stage", SCRIPTS)
def test_script_writes_its_result_checkpoint_and_pictures(stage, made):
    final = training.read_metrics(made / stage)[-1]
    assert final["final"] is True and RESULTS[stage] <= final.keys()
    assert all(math.isfinite(final[name]) for name in RESULTS[stage])
    steps = [m["step"] for m in training.read_metrics(made / stage) if "loss" in m]
    assert steps == [1, 2, 3, 4]
    pictures = {"tokenizer": "reconstructions.png", "beit": "predictions.png", "seg": "segmentation.png"}
    for name in {"loss.png", pictures.get(stage, "loss.png"), "checkpoint.pt"}:
        assert (made / stage / name).stat().st_size > 100


@pytest.mark.parametrize("stage", SCRIPTS)
def test_benchmark_times_every_part_and_writes_nothing(stage, arrays, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    MODULES[stage].main([*script_flags(stage, arrays, made), "--benchmark", "2", "--accumulate", "2"])
    printed = capsys.readouterr().out
    for phase in training.Clock.PHASES:
        (line,) = (line for line in printed.splitlines() if line.startswith(phase))
        times = {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+)(?=,|$)", line)}
        assert set(times) >= {"data", "forward", "backward", "optimiser"}
        assert ("tokenizer" in times) == (stage == "beit")
        assert all(value >= 0 for value in times.values()) and times["backward"] > 0
    assert float(re.search(r"peak memory ([\d.]+) GiB", printed)[1]) > 0.05
    assert not list(tmp_path.iterdir())


def test_benchmark_counts_what_a_step_multiplies(capsys):
    """A step of one linear layer, forward and the weight's gradient: 2 products of 2 B n m each."""
    clock, layer = training.Clock(1, torch.device("cpu")), nn.Linear(5, 7, bias=False)
    for x in clock.batches(torch.utils.data.DataLoader([torch.randn(3, 5)] * 9, batch_size=None)):
        layer(x).sum().backward()
        clock.mark("all")
    assert clock.flop == 2 * (2 * 3 * 5 * 7)
    assert [len(clock.seconds[phase]) for phase in clock.PHASES] == [1, 1]


def test_benchmark_of_several_takes_turns_on_the_same_batches():
    seen = []
    steps = {name: functools.partial(lambda name, batch: seen.append((name, batch)), name) for name in "ab"}
    found = benchmark.side_by_side(steps, ([i] for i in range(99)), torch.device("cpu"), repeats=3, warm_up=1)
    assert seen == [(name, i) for i in range(4) for name in "ab"]
    assert found.keys() == steps.keys() and all(seconds >= 0 for seconds in found.values())


@pytest.mark.parametrize("flag", ["--images", "--repeats"])
def test_benchmark_of_nothing_is_refused_before_it_begins(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([flag, "0"])
    assert f"{flag} 0" in capsys.readouterr().err


def test_benchmarks_count_of_a_step_is_what_torch_counts():
    """By hand and by torch's counter, but for what is not counted by hand: block L's rows that nobody asks for."""
    config = beit.BeitConfig(dim=48, heads=3, depth=3, drop_path=0.0)
    groups, loss = benchmark.ours(config, torch.device("cpu"))
    x, _, mask = next(benchmark.batches(2, config, torch.device("cpu")))
    z = torch.zeros(2, 196, dtype=torch.int64)
    with benchmark.training.FlopCounterMode(display=False) as counter:
        loss(x, mask, z).backward()
    tokens, left_out = 2 * 197, 2 * 197 - int(mask.sum())
    expected = benchmark.flop_of_step(config, 2) - 6 * left_out * 9 * 48**2  # projection and MLP
    expected -= 2 * tokens * 3 * 16**2 * 48  # pixels need no gradient
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
def test_recomputed_blocks_give_the_same_gradients(positions):
    model = tiny_mim(positions=positions, drop_path=0.5)
    x, mask, u = torch.randn(2, 3, 8, 8), torch.rand(2, 16) < 0.4, torch.rand(2, 2, 2)
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model(x, mask, u=u).sin().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def weights(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state = state["model"] | {f"average {name}": value for name, value in state.get("average", {}).items()}
    return {name: value for name, value in state.items() if value.is_floating_point()}


def assert_same_bits(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


NOISE = {  # everything random that the short runs above leave out
    "tokenizer": ["--ema", "0.9", "--flip", "--min-crop", "0.5"],
    "beit": ["--drop-path", "0.2", "--min-crop", "0.5", "--jitter", "0.4"],
    "cls": ["--drop-path", "0.2", "--mixup", "0.8", "--cutmix", "1", "--randaugment", "9", "--erasing", "0.5"],
    "seg": ["--drop-path", "0.2", "--min-scale", "1.0", "--max-scale", "2.0", "--photometric"],
}


@pytest.mark.parametrize("stage", SCRIPTS)
def test_resumed_run_ends_with_the_same_bits(stage, arrays, made, tmp_path, monkeypatch):
    """Stopped after two of four steps and resumed."""

    class Stop(Exception):
        pass

    save = training.save_checkpoint

    def save_and_stop(out, kind, args, step, *rest, **more):
        save(out, kind, args, step, *rest, **more)
        if step == 2:
            raise Stop

    flags = [*script_flags(stage, arrays, made), *NOISE[stage]]
    MODULES[stage].main([*flags, "--out", str(tmp_path / "whole")])
    flags += ["--save-every", "2", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(training, "save_checkpoint", save_and_stop)
    with pytest.raises(Stop):
        MODULES[stage].main(flags)
    monkeypatch.setattr(training, "save_checkpoint", save)
    MODULES[stage].main([*flags, "--resume"])
    assert_same_bits(tmp_path / "whole", tmp_path / "run")
    steps = [m["step"] for m in training.read_metrics(tmp_path / "run") if "loss" in m]
    assert steps == [1, 2, 3, 4]
    MODULES[stage].main([*flags, "--resume"])  # finished: it is evaluated once more
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def torchrun(*command, processes=2):
    """Run a script under torchrun with one thread a process; return the completed process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*launcher, *command], cwd=HERE, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("stage", SCRIPTS)
def test_two_processes_equal_one(stage, arrays, made, tmp_path):
    """The same global batch over two processes with two accumulation passes each: the same four steps, noise and all.

    A small learning rate, because AdamW moves a weight whose gradient is next to nothing by its rounded sign; so it
    does with the biases that the tokenizer's standardised logits take away again, hence not here: see the next test.
    """
    flags = [*script_flags(stage, arrays, made), *NOISE[stage], "--lr", "1e-4"]
    flags += ["--no-normalise-logits"] if stage == "tokenizer" else []
    one, two = tmp_path / "one", tmp_path / "two"
    MODULES[stage].main([*flags, "--out", str(one)])
    done = torchrun(SCRIPTS[stage][0], *flags, "--out", str(two), "--accumulate", "2")
    assert done.returncode == 0, done.stderr
    for a, b in zip(training.read_metrics(one), training.read_metrics(two), strict=True):
        for name in {"loss", "gradient_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-4)
    one, two = weights(one), weights(two)
    assert max((one[name] - two[name]).abs().mean() for name in one) < 1e-6


@pytest.mark.parametrize("more", [(), ("--quantizer", "vq")], ids=["standardised logits", "vq"])
def test_tokenizers_statistics_are_of_all_processes(more, arrays, tmp_path):
    """Two processes have the loss of one at each step: batch statistics and dead codes are of the global batch."""
    flags = [*script_flags("tokenizer", arrays, tmp_path), *more, "--lr", "1e-4"]
    train_tokenizer.main([*flags, "--out", str(tmp_path / "one")])
    done = torchrun(SCRIPTS["tokenizer"][0], *flags, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, two = ([m["loss"] for m in training.read_metrics(tmp_path / name) if "loss" in m] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_decoding_tokens_equals_decoding_one_hot_codes():
    model = tiny_dvae()
    z = torch.randint(16, (2, 4, 4))
    for looked_up, multiplied in zip(model.decode_parameters(z), model.decode_codes(F.one_hot(z, 16).float())):
        assert torch.allclose(looked_up, multiplied, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["gumbel", "vq"])
def test_tokenizer_loss_of_a_batch_is_the_mean_of_its_halves(quantizer):
    model, x, e = tiny_dvae(quantizer=quantizer).eval(), torch.rand(4, 3, 8, 8), exponential(4, 4, 4, 16)
    halves = [model.loss(*half)[0] for half in zip(x.chunk(2), (1.0, 1.0), (2.0, 2.0), e.chunk(2))]
    assert model.loss(x, 1.0, 2.0, e)[0].item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)


def test_workers_change_nothing(arrays, made, tmp_path):
    pretrain.main([*script_flags("beit", arrays, made), "--out", str(tmp_path / "run"), "--workers", "2"])
    assert_same_bits(made / "beit", tmp_path / "run")


def test_evaluate_only_and_figure_2(arrays, made, tmp_path, capsys):
    for stage in ("cls", "seg"):
        checkpoint = str(made / stage / "checkpoint.pt")
        MODULES[stage].main(["--eval", "--init", checkpoint, "--data", arrays, "--device", "cpu", "--amp", "off"])
        final = training.read_metrics(made / stage)[-1]
        name = "top1" if stage == "cls" else "miou"
        assert f"{name} {final[name]:.5g}" in capsys.readouterr().out
    picture, checkpoint = tmp_path / "attention.png", str(made / "beit" / "checkpoint.pt")
    visualize_attention.main(
        [checkpoint, "3", "4", "--data", arrays, "--points", "0,0", "3,2", "--out", str(picture)]
    )
    assert picture.stat().st_size > 100
    visualize_attention.main([checkpoint, "--data", arrays, "--measure", "3"])
    scores = dict(re.findall(r"(.+?) +average precision ([\d.]+)", capsys.readouterr().out))
    assert list(scores) == ["pre-trained", "random weights", "nearness", "pixels", "chance"]
    assert all(0 < float(score) <= 100 for score in scores.values())
    unmasked = data.Arrays("no masks", np.zeros((1, 16, 16), np.uint8))
    models, _ = visualize_attention.load_models(checkpoint)
    with pytest.raises(ValueError, match="no masks has no masks"):
        visualize_attention.separation(models, "half", unmasked, 1)


def test_reproduce_continues_where_it_was_stopped(arrays, tmp_path, monkeypatch, capsys):
    """A stage that is finished is kept, one that was interrupted is resumed, one with other settings is another."""
    runner = reproduce.Runner(tmp_path, "demo")
    call = ("tokenizer", "train_tokenizer.py", *script_flags("tokenizer", arrays, tmp_path))
    record = runner.stage(*call)
    assert RESULTS["tokenizer"] <= record.keys()
    assert runner.stage(*call) == record
    commands = tmp_path / "commands.txt"
    assert commands.read_text().count("train_tokenizer.py") == 1
    folder = Path(record["checkpoint"]).parent
    folder.with_suffix(".json").unlink()
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:-1]))  # as if killed
    assert runner.stage(*call) == record
    assert "--resume" in commands.read_text().splitlines()[1]
    with pytest.raises(ValueError, match=r"stage tokenizer-\w{8} ended with status 2: .* is neither"):
        runner.stage(*call, "--quantizer", "none")


@pytest.fixture
def no_processes(monkeypatch):
    """Stages of reproduce.py report at once: the same numbers for the same stage, nothing is run."""

    def run(self, name, script, flags, threads):
        rng = random.Random(name)
        numbers = {key: rng.random() for names in RESULTS.values() for key in names}
        numbers |= {"commonest_token": 0.1, "stage1_nats": 1.0, "stage2_nats": -1.0}
        done = {"seconds": 1.0, "threads": threads, "resumed": False, "result": numbers}
        (self.out / f"{name}.json").write_text(json.dumps(done))
        self.missing[script] -= 1

    monkeypatch.setattr(reproduce.Runner, "run", run)
    monkeypatch.setattr(reproduce, "raw_pixels", lambda runner, labels: {"values": [[1.0, 2.0]]})


def test_reproduce_plans_what_it_runs(no_processes, tmp_path):
    """Every table has every row, the plan counts the stages, and a second pass runs none."""
    runner = reproduce.Runner(tmp_path, "demo", seeds=3, jobs=2)
    names = ["summary", "table 1", "table 3", "table 4"]
    runner.plan([reproduce.EXPERIMENTS[name] for name in names])
    assert runner.total > 100
    tables = {name: reproduce.EXPERIMENTS[name](runner) for name in names}
    assert runner.missing.total() == 0 and len(list(tmp_path.glob("*.json"))) == runner.total
    saved = reproduce.save_results(runner, tables)
    assert len(saved["stages"]) == runner.total
    again = reproduce.Runner(tmp_path, "demo", seeds=3, jobs=2)
    again.plan([reproduce.EXPERIMENTS[name] for name in names])
    assert again.total == 0
    assert [row[0] for row in tables["table 4"]["rows"]] == list(reproduce.ABLATIONS)
    assert len(tables["table 4"]["rows"][0][1]["values"]) == 2  # pre-training seeds
    claims = saved["tables"]["claims"]["rows"]
    assert len(claims) == len([claim for claim in reproduce.CLAIMS if claim[1] not in ("figure 2", "grid 14")])


def test_grid14_plans_what_it_runs(no_processes, tmp_path):
    """Four rows, each with its pre-training seeds, pre-trained and segmented on 14 x 14 patches; a verdict on each."""
    runner = reproduce.Runner(tmp_path, "fashion", seeds=2, jobs=2)
    runner.plan([reproduce.grid14])
    table = reproduce.grid14(runner)
    assert runner.missing.total() == 0 and len(list(tmp_path.glob("*.json"))) == runner.total
    seeds = runner.settings["grid14_seeds"]
    assert [row[0] for row in table["rows"]] == list(reproduce.MASKING)
    for row in table["rows"]:
        assert all(len(cell["values"]) == seeds and len(cell["values"][0]) == 2 for cell in row[1:3])
    claims = reproduce.save_results(runner, {"grid 14": table})["tables"]["claims"]["rows"]
    assert len(claims) == 2 * (len(reproduce.MASKING) - 1)
    with pytest.raises(SystemExit):
        reproduce.main(["--grid14", "--out", str(tmp_path / "demo")])


def test_verdicts_need_twice_the_pooled_deviation(monkeypatch):
    claims = [("far", "t", 1, "a", "b"), ("near", "t", 1, "c", "b"), ("less", "t", 1, "b", "a")]
    monkeypatch.setattr(reproduce, "CLAIMS", claims)
    rows = [["a", {"values": [[10.0, 12.0]]}], ["b", {"values": [[7.0, 5.0]]}], ["c", {"values": [[7.5], [8.1]]}]]
    found = {claim: verdict for claim, verdict, _ in reproduce.verdicts({"t": {"rows": rows}})["rows"]}
    assert found == {"far": "holds", "near": "undecided", "less": "does not hold"}  # 5 > 2 * 1.41, 1.8 < 2 * 1.04


def test_readme_tables_are_those_of_the_results():
    text = (HERE / "README.md").read_text()
    assert reproduce.fill_readme(text) == text
    for name in re.findall(r"<!-- (results/\w+\.json)", text):
        assert json.loads((HERE / name).read_text())["machine"]


# ---------------------------------------------------------------- bad input: one line, status 2, nothing lost


class Evil:
    """Unpickling it makes a folder: what a checkpoint with code in it could do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def bad_inputs(arrays, made, tmp_path):
    """{case: (script, flags, what the line must say)}; every case is one wrong thing in a command that works."""
    folder = tmp_path / "images"
    (folder / "train" / "empty").mkdir(parents=True)
    content = dict(np.load(arrays))
    for name in ("train/ant", "train/bee", "val/bee"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        (tmp_path / "zoo" / name / "1.png").touch()
    wrong = {
        "float": content | {"train_images": content["train_images"].astype(np.float32)},
        "flat": content | {"train_images": content["train_images"].reshape(32, -1)},
        "labels": content | {"train_labels": content["train_labels"] - 1},
        "val-labels": content | {"val_labels": content["val_labels"] + 1},
        "count": content | {"train_labels": content["train_labels"][:5]},
        "no-labels": {k: v for k, v in content.items() if "labels" not in k},
        "no-masks": {k: v for k, v in content.items() if "masks" not in k},
        "val-masks": content | {"val_masks": content["val_masks"] + np.uint8(7)},
        "pickled": content | {"train_images": np.array([{}] * 32, dtype=object)},
    }
    for name, arrays_ in wrong.items():
        np.savez(tmp_path / f"{name}.npz", **arrays_)
    (tmp_path / "half.pt").write_bytes((made / "beit" / "checkpoint.pt").read_bytes()[:20_000])
    torch.save({"kind": "pretraining", "config": {}, "model": Evil(tmp_path / "ran")}, tmp_path / "code.pt")
    (tmp_path / "half.npz").write_bytes(Path(arrays).read_bytes()[:5000])
    (tmp_path / "noise.npz").write_bytes(bytes(range(256)))
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("keep me")
    flags = {stage: script_flags(stage, arrays, made) for stage in SCRIPTS}
    npz = {name: ["--data", str(tmp_path / f"{name}.npz")] for name in wrong}
    return {
        "missing path": ("cls", ["--data", "nowhere"], "nowhere: no such file or folder"),
        "empty class folder": ("cls", ["--data", str(folder)], "an empty class folder"),
        "no split": ("cls", ["--eval-split", "test"], "test_images"),
        "array type": ("cls", npz["float"], "images are float32"),
        "array shape": ("cls", npz["flat"], "(32, 768)"),
        "label range": ("cls", npz["labels"], "label -1 is out of range"),
        "held-out label range": ("cls", npz["val-labels"], "label 4 is out of range for 4 classes"),
        "label count": ("cls", npz["count"], "labels are int64 (5,)"),
        "no labels": ("cls", npz["no-labels"], "no class labels"),
        "no masks": ("seg", npz["no-masks"], "no masks"),
        "mask range": ("seg", npz["val-masks"], "mask value 8 is out of range for 2 classes"),
        "pickled array": ("cls", npz["pickled"], "allow_pickle=False"),
        "too few labels": ("cls", ["--labels-per-class", "9"], "has 8 images, not 9"),
        "batch larger than set": ("cls", ["--batch-size", "64"], "fewer than the batch size 64"),
        "batch not divisible": ("cls", ["--accumulate", "3"], "batch size 8 does not divide"),
        "grids differ": ("beit", ["--token-size", "8"], "2 tokens along 8 pixels but there are 4 patches"),
        "patches do not divide": ("cls", ["--image-size", "18"], "18 is not a multiple of the patch size 4"),
        "tokens do not divide": ("tokenizer", ["--image-size", "18"], "not a multiple of 4"),
        "wrong kind": ("beit", ["--tokenizer", str(made / "cls" / "checkpoint.pt")], "is a classification checkpoint"),
        "half a checkpoint": ("cls", ["--init", str(tmp_path / "half.pt")], "not a whole file of weights"),
        "code in a checkpoint": ("cls", ["--init", str(tmp_path / "code.pt")], "not a whole file of weights"),
        "no checkpoint": ("cls", ["--init", str(tmp_path / "none.pt")], "there is no checkpoint"),
        "not a number": ("beit", ["--epochs", "nan"], "--epochs nan must be a finite number"),
        "endless": ("beit", ["--epochs", "inf"], "--epochs inf must be a finite number"),
        "negative number": ("cls", ["--labels-per-class", "-5"], "--labels-per-class -5 must be a finite number, 0 or"),
        "no pixels": ("seg", ["--image-size", "0"], "--image-size 0 must be above 0"),
        "no codes": ("tokenizer", ["--vocab-size", "0"], "--vocab-size 0 must be above 0"),
        "share above 1": ("cls", ["--smoothing", "2.0"], "--smoothing 2.0 must be at most 1"),
        "nothing kept": ("beit", ["--drop-path", "1"], "--drop-path 1.0 must be below 1"),
        "seed": ("cls", ["--seed", "99999999999999999999"], "--seed 99999999999999999999 must be from 0"),
        "statistics": ("beit", ["--normalise", "foo"], "--normalise 'foo' is none of half, imagenet"),
        "no archive": ("cls", ["--data", str(tmp_path / "noise.npz")], "not a whole array file"),
        "mask ratio": ("beit", ["--mask-ratio", "1.5"], "mask ratio 1.5 is outside (0, 1)"),
        "masking": ("beit", ["--masking", "spiral"], "masking 'spiral' is none of"),
        "no masking": ("beit", ["--masking", "none"], "--masking none leaves nothing to recover: add --recover all"),
        "target": ("beit", ["--target", "edges"], "--target 'edges' is none of tokens, pixels"),
        "tokenizer for pixels": ("beit", ["--target", "pixels"], "--target pixels has no use for --tokenizer"),
        "recover": ("beit", ["--recover", "some"], "--recover 'some' is none of masked, all"),
        "recipe": ("cls", ["--recipe", "gigantic"], "unknown recipe 'gigantic'"),
        "model": ("cls", ["--init", "random", "--model", "huge"], "model 'huge' is none of"),
        "option": ("cls", ["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
        "abbreviated option": ("cls", ["--epoch", "1"], "unrecognized arguments: --epoch"),
        "option's value": ("cls", ["--lr", "fast"], "invalid float value: 'fast'"),
        "device": ("cls", ["--device", "tpu"], "device 'tpu' is none of"),
        "warm-up": ("cls", ["--warmup-epochs", "9"], "--warmup-epochs 9"),
        "output not empty": ("cls", ["--out", str(full)], "not an empty folder"),
        "nothing to resume": ("cls", ["--out", str(full), "--resume"], "no checkpoint.pt in"),
        "eval of random weights": ("cls", ["--eval", "--init", "random"], "nothing to evaluate in random weights"),
        "zero steps": ("seg", ["--steps", "0"], "--steps 0 must be at least 1"),
        "long warm-up": ("seg", ["--warmup-steps", "4"], "leaves nothing of --steps 4"),
        "min block": ("beit", ["--min-block", "16"], "smallest block 16 is not between 1 and the 6"),
        "half an archive": ("cls", ["--data", str(tmp_path / "half.npz")], "not a whole array file"),
        "other classes": ("cls", ["--data", str(tmp_path / "zoo")], "'bee' is not at the same place"),
        "resume with other settings": (
            "cls", ["--out", str(made / "cls"), "--resume", "--seed", "9"], "--seed is 9, but",
        ),
    }, flags  # fmt: skip


def test_bad_input_ends_with_one_line_and_status_2(arrays, made, tmp_path, capsys, monkeypatch):
    cases, flags = bad_inputs(arrays, made, tmp_path)
    before = (made / "cls" / "checkpoint.pt").read_bytes()
    for case, (stage, wrong, says) in cases.items():
        monkeypatch.setattr(sys, "argv", [SCRIPTS[stage][0]])
        with pytest.raises(SystemExit) as stopped, training.one_line_errors():
            MODULES[stage].main([*flags[stage], "--out", str(tmp_path / "new"), *wrong])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and says in error and error.count("\n") == 1, f"{case}: {error}"
        assert not (tmp_path / "new" / "checkpoint.pt").exists(), case
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "full" / "precious.txt").read_text() == "keep me"
    assert (made / "cls" / "checkpoint.pt").read_bytes() == before


def test_base_needs_data(capsys):
    with pytest.raises(SystemExit):
        train_tokenizer.main(["--recipe", "base", "--out", "x"])
    assert "recipe 'base' needs --data" in capsys.readouterr().err


def test_error_in_a_real_process(tmp_path):
    """The same through the shell: status 2, one line, no traceback."""
    command = [sys.executable, "finetune_cls.py", "--init", "random", "--data", "nowhere", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_no_pillow_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="pip install pillow"):
        data.decode(tmp_path / "a.png")


def test_readme_names_every_script_and_flag_that_exists():
    text = (HERE / "README.md").read_text()
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (HERE / picture).is_file()
    for script in HERE.glob("*.py"):
        assert script.name in text or script.name == "test_beit.py"
    known = {"--nnodes", "--node_rank", "--master_addr", "--nproc_per_node", "--size", "--points", "--names"}
    for module in MODULES.values():
        known |= {f"--{name.replace('_', '-')}" for name in module.RECIPES}
    known |= set(training.recipe_parser("", {})._option_string_actions)
    known |= {"--init", "--tokenizer", "--eval", "--linear-probe", "--measure", "--max-restarts"}
    known |= {"--table", "--figure", "--grid14", "--seeds", "--readme", "--recompute"}
    assert set(re.findall(r"--[a-z][a-z0-9_-]+", text)) <= known


# ---------------------------------------------------------------- weights from elsewhere

# python verify.py --golden: timm 1.0.31's and DALL-E 0.1's outputs for weights and images from a formula
GOLDEN = {
    "absolute": [-1.065916, 0.968003, -0.803153],
    "relative": [-0.570755, 0.222425, 0.304369],
    "shared": [0.884013, -0.636977, 0.210377],
}
GOLDEN_DALLE = [-0.282044, -0.282035, -0.282168, -0.282464, -0.300753, -0.300739, -0.300884, -0.301212]


@pytest.mark.parametrize("positions", GOLDEN)
def test_golden_logits_of_timm(positions):
    model = verify.formula(finetune_cls.BeitForClassification(verify.golden_config(positions), 3))
    x = torch.sin(torch.arange(3 * 16 * 16) * 0.3).view(1, 3, 16, 16)
    assert torch.allclose(model(x)[0], torch.tensor(GOLDEN[positions]), atol=2e-6)


def test_golden_logits_of_dalle():
    model = dvae.DVAE(dvae.DVAEConfig(vocab_size=512, hidden=64, blocks_per_group=1))
    verify.formula(model.encoder)
    x = torch.sin(torch.arange(3 * 16 * 16) * 0.3).view(1, 3, 16, 16)
    logits = model.encode((x + 1) / 2)[0, :, :, :2].permute(2, 0, 1)
    assert torch.allclose(logits.flatten(), torch.tensor(GOLDEN_DALLE), atol=2e-6)


def wide_mim(positions):
    """A pre-training model whose heads are 64 wide, as published ones are."""
    return tiny_mim(dim=128, positions=positions, drop_path=0.0)


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
def test_published_files_load_as_they_are(positions, tmp_path):
    """A bare state dict, one under `model` or `module`, with relative_position_index, and transformers' names."""
    model = wide_mim(positions)
    state = model.state_dict()
    published = state | {"blocks.0.attn.relative_position_index": torch.zeros(2, dtype=torch.int64)}
    files = {"bare": published, "model": {"model": published}, "module": {"module": published}}
    files["transformers"] = beit.to_transformers(state)
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        found = beit.load_pretrained(tmp_path / f"{name}.pth", "pretraining")
        assert beit.BeitConfig(**found["config"]) == model.config
        assert found["model"].keys() == state.keys()
        assert all(torch.equal(found["model"][key], state[key]) for key in state)


def test_transformers_names_of_one_block():
    """The names that transformers' files have: written out for one block and the ends."""
    names = set(beit.to_transformers(tiny_mim(depth=1, positions="shared").state_dict()))
    block = "beit.encoder.layer.0."
    attention = "query.weight query.bias key.weight value.weight value.bias".split()
    expected = {f"{block}attention.attention.{name}" for name in attention}
    for module in "attention.output.dense layernorm_before layernorm_after intermediate.dense output.dense".split():
        expected |= {f"{block}{module}.weight", f"{block}{module}.bias"}
    expected |= {f"{block}lambda_1", f"{block}lambda_2", "beit.embeddings.cls_token", "beit.embeddings.mask_token"}
    for module in ("beit.embeddings.patch_embeddings.projection", "layernorm", "lm_head"):
        expected |= {f"{module}.weight", f"{module}.bias"}
    assert names == expected | {"beit.encoder.relative_position_bias.relative_position_bias_table"}


def test_weights_from_elsewhere_are_strict(tmp_path):
    """A missing, an unknown or a strange entry is an error that names it."""
    state = wide_mim("absolute").state_dict()
    without = {key: value for key, value in state.items() if key != "blocks.1.norm2.bias"}
    cases = {
        "missing blocks.1.norm2.bias": without,
        "missing blocks.1.attn.qkv.weight": {
            k: v for k, v in beit.to_transformers(state).items() if "layer.1.attention.attention.key" not in k
        },
        "unknown blocks.0.adapter": state | {"blocks.0.adapter": torch.zeros(1)},
        "'epoch' is not a tensor": state | {"epoch": 3},
        "holds a int as its model": {"model": 3},
        "holds a list, not a state dict": [1],
        "no patch_embed.proj.weight": {key: value for key, value in state.items() if "patch" not in key},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=re.escape(message)):
            found = beit.load_pretrained(tmp_path / "odd.pth", "pretraining")
            beit.load_backbone(beit.Beit(beit.BeitConfig(**found["config"])), found["model"])


def test_safetensors_is_optional(tmp_path, monkeypatch):
    """Absent: one line that says what to install. Present: the same tensors come back."""
    state = wide_mim("shared").state_dict()
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "safetensors", None)
        absent.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ValueError, match="pip install safetensors"):
            training.write_file(tmp_path / "model.safetensors", state)
    pytest.importorskip("safetensors")
    training.write_file(tmp_path / "model.safetensors", beit.to_transformers(state))
    found = beit.load_pretrained(tmp_path / "model.safetensors", "pretraining")["model"]
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_published_weights_are_fine_tuned_and_evaluated(arrays, tmp_path):
    """Bare weights without class names: --init takes pre-trained ones, --eval a classifier of as many classes."""
    config = tiny_config(image_size=16, patch_size=4, dim=64, heads=1, positions="shared")
    torch.save(pretrain.BeitForMaskedImageModeling(config, 11).state_dict(), tmp_path / "beit.pth")
    flags = ["--recipe", "demo", "--data", arrays, "--image-size", "16", "--amp", "off"]
    short = ["--epochs", "2", "--warmup-epochs", "1", "--batch-size", "8", "--labels-per-class", "4"]
    finetune_cls.main([*flags, *short, "--init", str(tmp_path / "beit.pth"), "--out", str(tmp_path / "cls")])
    ours = tmp_path / "cls" / "checkpoint.pt"
    beit.main([str(ours), str(tmp_path / "hub.pth"), "--names", "transformers"])
    results = []
    for path in (ours, tmp_path / "hub.pth"):
        finetune_cls.main([*flags, "--eval", "--init", str(path)])
        results.append(beit.load_pretrained(path, "classification")["model"])
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    more = [*flags, *short, "--init", str(tmp_path / "hub.pth"), "--lr", "0", "--min-lr", "0"]
    finetune_cls.main([*more, "--out", str(tmp_path / "on")])  # as many classes: it goes on with the head it has
    went_on = beit.load_pretrained(tmp_path / "on" / "checkpoint.pt", "classification")["model"]
    assert torch.equal(went_on["head.weight"], results[0]["head.weight"])
    state = {key: value[:3] if key.startswith("head.") else value for key, value in results[1].items()}
    torch.save(state, tmp_path / "three.pth")
    with pytest.raises(ValueError, match="tells 3 classes apart"):
        finetune_cls.main([*flags, "--eval", "--init", str(tmp_path / "three.pth")])


def test_export_refuses_to_overwrite(made, tmp_path):
    (tmp_path / "there.pth").write_text("keep me")
    with pytest.raises(ValueError, match="exists already"):
        beit.main([str(made / "beit" / "checkpoint.pt"), str(tmp_path / "there.pth")])
    with pytest.raises(ValueError, match="its folder does not"):
        beit.main([str(made / "beit" / "checkpoint.pt"), str(tmp_path / "nowhere" / "new.pth")])
    with pytest.raises(ValueError, match="no model with this deconvolution head"):
        beit.main([str(made / "seg" / "checkpoint.pt"), str(tmp_path / "seg.pth"), "--names", "transformers"])


def disguise(module, classes):
    """Our encoder or decoder as the modules of DALL-E's package: convolutions with `w` and `b`, pool and upsample."""
    if isinstance(module, nn.Conv2d):
        new = classes["Conv2d"]()
        new.w, new.b = module.weight, module.bias
        return new
    kind = {dvae.Encoder: "Encoder", dvae.Decoder: "Decoder", dvae.ResidualBlock: "Block"}.get(type(module))
    if not list(module.children()):
        return module
    new = classes[kind]() if kind else nn.Sequential()
    for name, child in module.named_children():
        if name == "resize":
            name = "pool" if isinstance(child, nn.MaxPool2d) else "upsample"
        new.add_module(name, disguise(child, classes))
    return new


@pytest.fixture
def dalle(tmp_path, monkeypatch):
    """(a tokenizer of ours, a folder with it as encoder.pkl and decoder.pkl: whole modules of a package now gone)."""
    model = tiny_dvae(groups=3, blocks_per_group=2).eval()
    for part in ("encoder", "decoder"):
        package = {name: types.ModuleType(f"dall_e.{name}") for name in (part, "utils")}
        homes = {"Conv2d": "utils", part.capitalize(): part, "Block": part}
        classes = {}
        for name, home in homes.items():
            real = f"{part.capitalize()}Block" if name == "Block" else name
            classes[name] = type(real, (nn.Module,), {"__module__": f"dall_e.{home}"})
            setattr(package[home], real, classes[name])
        with monkeypatch.context() as installed:
            installed.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            for home, content in package.items():
                installed.setitem(sys.modules, f"dall_e.{home}", content)
            torch.save(disguise(getattr(model, part), classes), tmp_path / f"{part}.pkl")
    return model, tmp_path


def test_dalle_pickles_are_read_without_their_package(dalle):
    model, folder = dalle
    read = dvae.load_tokenizer(f"dalle:{folder}")
    assert read.config == model.config
    x = torch.rand(3, 3, 16, 16)
    assert torch.equal(read.tokens(x), model.tokens(x))
    assert torch.equal(read.decode(read.tokens(x)), model.decode(model.tokens(x)))


def test_pretraining_on_a_dalle_tokenizer(dalle, arrays, made, tmp_path):
    """--tokenizer dalle:FOLDER instead of a checkpoint."""
    flags = [*script_flags("beit", arrays, made), "--tokenizer", f"dalle:{dalle[1]}", "--out", str(tmp_path / "beit")]
    pretrain.main(flags)
    assert training.read_metrics(tmp_path / "beit")[-1]["final"]


def test_hostile_pickles_run_nothing(dalle):
    """A pickle that wants to run a command is refused in one line, as DALL-E's or as BEiT's weights."""
    folder = dalle[1]
    with pytest.raises(ValueError, match="there is no .*encoder.pkl"):
        dvae.load_tokenizer("dalle:nowhere")
    for name in ("encoder.pkl", "weights.pth"):
        torch.save(Evil(folder / "ran"), folder / name)
    with pytest.raises(ValueError, match="is refused") as dalles:
        dvae.load_tokenizer(f"dalle:{folder}")
    with pytest.raises(ValueError, match="not a whole file of weights") as beits:
        beit.load_pretrained(folder / "weights.pth", "pretraining")
    assert not (folder / "ran").exists()
    assert all("\n" not in str(error.value) for error in (dalles, beits))
