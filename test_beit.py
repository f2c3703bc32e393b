"""Quick checks of the paper's equations and components, on tiny images.

    python -m pytest test_beit.py        # under 25 seconds on two cores

Algorithm 1 first, then the paper's order. The rest is in tests/: images, runs, bad input, published
files. `python -m pytest` runs everything.
"""

import argparse
import collections
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import beit
import dvae
import finetune_cls
import finetune_seg
import masking
import pretrain
import train_tokenizer
from images import batches, labelled, sources
from plumbing import command_line, noise, processes

torch.set_num_threads(1)  # tiny models gain nothing from more


# -------------------------------------------------------- Algorithm 1: masks


def test_blockwise_masks_match_the_released_generator():
    """20,000 masks on 14 x 14 against the released generator's: mean, smallest, share of 75."""
    rng = random.Random(0)
    sizes = np.array([masking.blockwise_mask(rng, 14, 14, 75).sum() for _ in range(20_000)])
    assert sizes.max() == 75
    assert 60 <= sizes.min() <= 68  # the released generator's: 64
    assert abs(sizes.mean() - 74.47) < 4 * sizes.std() / math.sqrt(20_000)
    assert abs((sizes == 75).mean() - 0.666) < 4 * math.sqrt(0.666 * 0.334 / 20_000)


def test_blockwise_masks_have_the_generators_symmetries():
    """How often each patch is masked, against its mirror images, its transpose and the mean.

    Blocks have a uniform place and a log-uniform aspect ratio, so the map of these frequencies is
    symmetric. Its mean is 74.47 / 196, and it is highest in the middle.
    """
    rng, draws = random.Random(1), 20_000
    share = sum(masking.blockwise_mask(rng, 14, 14, 75).astype(float) for _ in range(draws)) / draws
    error = math.sqrt(2 * 0.25 / draws)  # of the difference of two patches
    for image in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - image).max() < 5 * error
    assert share.mean() == pytest.approx(74.47 / 196, abs=0.001)
    assert share[6:8, 6:8].min() > share[[0, 0, -1, -1], [0, -1, 0, -1]].max() + 20 * error


def test_masks_are_blocks():
    """Pairs of masked neighbours: many more in blockwise masks than in random ones."""

    def neighbours(mask):
        return (mask[1:] & mask[:-1]).sum() + (mask[:, 1:] & mask[:, :-1]).sum()

    rng = random.Random(0)
    blocks = np.mean([neighbours(masking.blockwise_mask(rng, 14, 14, 75)) for _ in range(200)])
    scattered = np.mean([neighbours(masking.random_mask(rng, 14, 14, 75)) for _ in range(200)])
    assert blocks > 1.7 * scattered


def test_random_masks_are_uniform():
    """How often each patch is masked in 2,000 random masks: 75 times in 196."""
    masks = (masking.random_mask(random.Random(seed), 14, 14, 75) for seed in range(2000))
    share = sum(mask.astype(float) for mask in masks) / 2000
    assert np.abs(share - 75 / 196).max() < 5 * math.sqrt(0.25 / 2000)


def test_printed_algorithm_stops_past_its_ratio():
    """The printed algorithm's last line: |M| > 0.4 N; and never all patches.

    Its r is uniform, so 77 % of the first blocks are higher than wide (less where it rounds).
    """
    rng, high = random.Random(0), 0
    for _ in range(200):
        mask = masking.printed_mask(rng, 14, 14)
        assert mask.sum() > 0.4 * 196 and mask.sum() < 196
        block = masking.printed_mask(rng, 14, 14, ratio=0.05, min_block=16)
        high += block.any(1).sum() > block.any(0).sum()
    assert 0.6 < high / 200 < 0.85


@pytest.mark.parametrize("kind", ["blockwise", "printed", "random"])
@pytest.mark.parametrize("grid, ratio, block", [(4, 0.3, 2), (7, 0.4, 4), (24, 0.5, 16)])
def test_masks_on_any_grid_are_a_function_of_the_seed(kind, grid, ratio, block):
    """Equal seeds give equal masks and other seeds others; blocks mask at most mask_count().

    Random masking masks exactly as many; Algorithm 1 as printed more than the ratio.
    """
    a = [masking.make_mask(kind, random.Random(s), grid, ratio, block) for s in range(20)]
    b = [masking.make_mask(kind, random.Random(s), grid, ratio, block) for s in range(20)]
    assert all(m.shape == (grid, grid) and m.dtype == bool and m.any() for m in a)
    assert np.array_equal(a, b) and not all(np.array_equal(a[0], m) for m in a)
    if kind == "blockwise":
        assert max(m.sum() for m in a) <= masking.mask_count(grid, grid, ratio)
    if kind == "printed":
        assert min(m.sum() for m in a) > ratio * grid**2
    if kind == "random":
        assert {m.sum() for m in a} == {masking.mask_count(grid, grid, ratio)}


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, 0.001])
def test_mask_ratio_out_of_range(ratio):
    """A ratio outside (0, 1), or one that masks no patch, is an error that says so."""
    with pytest.raises(ValueError, match="mask ratio"):
        masking.make_mask("random", random.Random(0), 14, ratio, 16)


def test_blocks_larger_than_the_mask_or_the_grid():
    """A block larger than the mask is an error, except with random masking, which has no blocks.

    A block larger than the grid is cut as printed; as released, the mask stays empty.
    """
    with pytest.raises(ValueError, match="min block 16 fits nowhere: 15 of 4x4 to mask"):
        masking.make_mask("blockwise", random.Random(0), 4, 0.93, 16)
    released = (masking.make_mask("blockwise", random.Random(s), 4, 0.93, 15) for s in range(50))
    assert not any(mask.any() for mask in released)
    printed = (masking.make_mask("printed", random.Random(s), 4, 0.93, 15) for s in range(50))
    assert all(mask.any() for mask in printed)
    scattered = masking.make_mask("random", random.Random(0), 4, 0.2, 16)
    assert scattered.sum() == 3


# -------------------------------------------------------- section 2.1: the dVAE


def tiny_dvae(**changes):
    """A dVAE of 16 codes with random weights, always the same; changes: of its configuration."""
    torch.manual_seed(0)
    settings = dict(vocab_size=16, hidden=8, groups=2, blocks_per_group=1, code_dim=8) | changes
    return dvae.build(dvae.DVAEConfig(**settings))


def exponential(count, *shape):
    """The training loop's noise: Exp(1), (count, *shape)."""
    return noise.sample_noise("exponential", shape, count, 0, 0, 0, torch.device("cpu"))


def test_dalle_sizes():
    """Parameter counts against DALL-E's: 53.8 M in the encoder and 43.8 M in the decoder."""
    with torch.device("meta"):
        model = dvae.DVAE(dvae.DVAEConfig())
    parts = model.encoder, model.decoder
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert [round(count, 1) for count in millions] == [53.8, 43.8]


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_grid_of_tokens(groups):
    """2, 3 or 4 groups: the grid of tokens is 2, 4 or 8 times coarser, and decodes to an image."""
    model = tiny_dvae(groups=groups)
    z = model.tokens(torch.rand(2, 3, 16, 16))
    side = 16 // 2 ** (groups - 1)
    assert z.shape == (2, side, side) and z.dtype == torch.int64
    assert model.decode(z).shape == (2, 3, 16, 16)


def test_initialisation_is_dalles():
    """Convolutions: standard deviation 1 / sqrt(inputs) and bias 0."""
    model = tiny_dvae(hidden=64, vocab_size=512)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        std = layer.weight[0].numel() ** -0.5
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()
    assert len(layers) > 10


def test_pixels_round_trip():
    """unmap_pixels is the inverse of map_pixels, which maps [0, 1] to [0.1, 0.9]."""
    x = torch.rand(100)
    assert torch.allclose(dvae.unmap_pixels(dvae.map_pixels(x)), x, atol=1e-6)
    assert dvae.map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])


@pytest.mark.parametrize("mu, ln_b", [(0.0, 0.0), (1.3, -1.0), (-2.0, 0.5)])
def test_logit_laplace_density_integrates_to_one(mu, ln_b):
    """exp(-logit_laplace_nll), integrated numerically over (0, 1), is 1."""
    # In u = logit(x), dx = x (1 - x) du, so that the spike at mu and the tails are both resolved.
    u = torch.linspace(mu - 60, mu + 60, 2_000_001, dtype=torch.float64)
    x = torch.sigmoid(u)
    inside = (x > 1e-15) & (x < 1 - 1e-15)
    density = torch.exp(-dvae.logit_laplace_nll(x[inside], torch.tensor(mu), torch.tensor(ln_b)))
    integral = torch.trapezoid(density * (x * (1 - x))[inside], u[inside])
    assert integral.item() == pytest.approx(1, abs=1e-4)


def test_image_likelihoods_are_those_of_torchs_distributions():
    """Laplace of the logit of mapped pixels, with the change of variables; normal of the pixels."""
    x, mu, ln_b = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    mapped = 0.1 + 0.8 * x
    log_p = torch.distributions.Laplace(mu, ln_b.exp()).log_prob(torch.logit(mapped))
    log_p += (0.8 / (mapped * (1 - mapped))).log()
    found = tiny_dvae().negative_log_likelihood(x, mu, ln_b)
    assert torch.allclose(found, -log_p.sum((1, 2, 3)), rtol=1e-4)
    model = tiny_dvae(likelihood="mse")
    model.pixel_variance.fill_(0.04)
    log_p = torch.distributions.Normal((mu.sigmoid() - 0.1) / 0.8, 0.2).log_prob(x)
    found = model.negative_log_likelihood(x, mu, ln_b)
    assert torch.allclose(found, -log_p.sum((1, 2, 3)), rtol=1e-4)


def test_gumbel_softmax_samples_q_and_has_gradients():
    """Shares of the samples against q; the gradient of E[code 0] raises logit 0, not the others."""
    logits = torch.tensor([0.5, -1.0, 2.0]).expand(20_000, 3).clone().requires_grad_()
    sample = dvae.gumbel_softmax(logits, 0.05, exponential(20_000, 3))
    assert torch.allclose(sample.sum(-1), torch.ones(20_000))
    shares = sample.argmax(-1).bincount() / 20_000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.02)
    dvae.gumbel_softmax(logits, 1.0, exponential(20_000, 3))[:, 0].mean().backward()
    gradient = logits.grad.sum(0)
    assert gradient[0] > 0 and gradient[1] < 0 and gradient[2] < 0


def test_gumbel_softmax_gradient_by_finite_differences():
    """The gradient with respect to the logits against finite differences."""
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    e = exponential(4, 5).double()
    assert torch.autograd.gradcheck(lambda values: dvae.gumbel_softmax(values, 0.7, e), (logits,))


def test_kl_to_uniform():
    """0 for the uniform distribution, never negative, ln |V| for a certain code."""
    assert dvae.kl_to_uniform(torch.zeros(3, 8)).abs().max() < 1e-6
    assert (dvae.kl_to_uniform(5 * torch.randn(100, 8)) >= -1e-6).all()
    certain = torch.tensor([100.0, 0, 0, 0])
    assert dvae.kl_to_uniform(certain).item() == pytest.approx(math.log(4), abs=1e-5)


def test_dvae_loss_normalises_both_terms_alike():
    """loss = (negative log-likelihood of the image + beta * KL of all its tokens) / (3 H W)."""
    model, x, e = tiny_dvae(), torch.rand(2, 3, 8, 8), exponential(2, 4, 4, 16)
    loss, terms, _ = model(x, 1.0, 6.6, e)
    tokens, values = 4 * 4, 3 * 8 * 8
    expected = terms["reconstruction"] + 6.6 * terms["kl"] * tokens / values
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    codes = dvae.gumbel_softmax(model.encode(x), 1.0, e)
    nll = model.negative_log_likelihood(x, *model.decode_codes(codes)).mean() / values
    assert terms["reconstruction"].item() == pytest.approx(nll.item(), rel=1e-5)


def test_tokens_have_no_noise():
    """Tokens are the argmax of the logits, the same in every call."""
    model, x = tiny_dvae(), torch.rand(2, 3, 8, 8)
    assert torch.equal(model.tokens(x), model.encode(x).argmax(-1))
    assert torch.equal(model.tokens(x), model.tokens(x))


def test_standardised_logits():
    """Ours: over a batch each code's logits have mean 0 and deviation 3 at the start."""
    logits = tiny_dvae(normalise_logits=True).encode(torch.rand(8, 3, 8, 8)).flatten(0, 2)
    assert logits.mean(0).abs().max() < 1e-4
    assert torch.allclose(logits.std(0, correction=0), torch.full((16,), 3.0), rtol=1e-2)


def test_tokenizers_evaluation_by_hand(monkeypatch):
    """Squared error of the decoded tokens, codes used and perplexity, of batches of 4 and 2."""
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(batches, "eval_batches", lambda *_: [(part,) for part in images.split(4)])
    model = tiny_dvae(likelihood="mse")
    found = train_tokenizer.evaluate(model, None, None, processes.Process())
    z = model.tokens(images / 255)
    decoded = ((model.decode_parameters(z)[0].sigmoid() - 0.1) / 0.8).clamp(0, 1)
    error = (decoded - images / 255).pow(2).mean().item()
    assert found["reconstruction_mse"] == pytest.approx(error, rel=1e-5)
    share = z.unique(return_counts=True)[1] / z.numel()
    assert found["codebook_perplexity"] == pytest.approx((share**-share).prod().item(), rel=1e-5)
    assert found["codebook_used"] == len(share) > 1


def test_decoding_tokens_equals_decoding_one_hot_codes():
    """decode_parameters, a table look-up, against the decoder's convolution of one-hot codes."""
    model = tiny_dvae()
    z = torch.randint(16, (2, 4, 4))
    one_hot = F.one_hot(z, 16).float()
    pairs = zip(model.decode_parameters(z), model.decode_codes(one_hot), strict=True)
    for looked_up, multiplied in pairs:
        assert torch.allclose(looked_up, multiplied, atol=1e-5)


@pytest.mark.parametrize("quantizer", ["gumbel", "vq"])
def test_tokenizer_loss_of_a_batch_is_the_mean_of_its_halves(quantizer):
    """The loss of four images against the mean of the losses of two and two."""
    model, x = tiny_dvae(quantizer=quantizer).eval(), torch.rand(4, 3, 8, 8)
    e = exponential(4, 4, 4, 16)
    parts = zip(x.chunk(2), e.chunk(2))
    halves = [model(x_half, 1.0, 2.0, e_half)[0] for x_half, e_half in parts]
    assert model(x, 1.0, 2.0, e)[0].item() == pytest.approx(sum(halves).item() / 2, rel=1e-5)


def test_vq_takes_the_nearest_code_and_passes_the_gradient_straight_through():
    """z against a search by torch.cdist; the gradient of z_e against that of the codes."""
    model = tiny_dvae(quantizer="vq", likelihood="mse")
    z_e = torch.randn(2, 4, 4, 8, requires_grad=True)
    codes, z_q, z = model.straight_through(z_e)
    nearest = torch.cdist(z_e.detach().flatten(0, 2), model.codebook).argmin(1)
    assert torch.equal(z.flatten(), nearest)
    assert torch.equal(z_q.flatten(0, 2), model.codebook[nearest])
    assert torch.allclose(codes.detach().flatten(0, 2), model.codebook[nearest], atol=1e-5)
    weight = torch.randn_like(codes)
    (codes * weight).sum().backward()
    assert torch.equal(z_e.grad, weight)


def test_vq_counts_how_often_codes_are_used():
    """A moving sum with decay 0.99 over steps, of all passes of a step."""
    model, counts = tiny_dvae(quantizer="vq", likelihood="mse"), torch.arange(16.0)
    for step in range(2):
        model.track(step, [torch.tensor(0.1)] * 2, [counts, counts])
    assert torch.allclose(model.usage, 1.99 * 2 * counts)


def test_vq_revives_dead_codes():
    """Codes far from the data are dead; revive_codes moves them, and no code that is in use."""
    model = tiny_dvae(quantizer="vq", likelihood="mse")
    x = torch.rand(32, 3, 8, 8)
    model.codebook.data.add_(100)
    model.codebook.data[0] = 0
    model.usage[0] = 5
    assert len(model.tokens(x).unique()) == 1
    model.revive_codes(x.chunk(2), rank=0, world=1, seed=0)
    assert len(model.tokens(x).unique()) > 8
    assert (model.codebook[0] == 0).all() and model.codebook.max() < 50
    assert model.usage.tolist() == [5.0] + [1.0] * 15


def test_vq_revives_codes_every_50_steps_if_used_less_than_a_tenth():
    """The steps in which the loop revives codes, and which of three codes counts as dead."""
    revived, args = [], argparse.Namespace(quantizer="vq", accumulate=1, seed=0)
    watched = argparse.Namespace(revive_codes=lambda *_: revived.append(step))
    for step in range(101):
        train_tokenizer.revive_codes(watched, torch.zeros(1), step, args, processes.Process())
    assert revived == [0, 50, 100]
    model = tiny_dvae(quantizer="vq")
    model.usage[:3], before = torch.tensor([0.09, 0.11, 0]), model.codebook.detach().clone()
    model.revive_codes([torch.rand(4, 3, 8, 8)], rank=0, world=1, seed=0)
    assert (model.codebook != before).any(1)[:3].tolist() == [True, False, True]


def test_vq_loss_by_hand():
    """Squared error, and |sg(z_e) - z_q|² + 0.25 |z_e - sg(z_q)|², means over all values.

    The codebook's gradient is that of the first of the two terms, without the factor.
    """
    model, x = tiny_dvae(quantizer="vq", likelihood="mse"), torch.rand(2, 3, 8, 8)
    loss, terms, _ = model(x, 1.0, 1.0, None)
    z = model.tokens(x)
    difference = (model.codebook[z] - model.encode(x)).detach()
    squared_error = (model.decode_codes(model.codebook[z])[0].sigmoid() - 0.1) / 0.8 - x
    assert terms["reconstruction"].item() == pytest.approx(squared_error.pow(2).mean().item())
    assert terms["codebook"].item() == pytest.approx(1.25 * difference.pow(2).mean().item())
    assert loss.item() == pytest.approx(sum(terms.values()).item())
    loss.backward()
    expected = torch.zeros_like(model.codebook)
    expected.index_add_(0, z.flatten(), 2 * difference.flatten(0, 2) / difference.numel())
    assert torch.allclose(model.codebook.grad, expected, atol=1e-6)


# -------------------------------------------------------- section 2.2: the backbone


def tiny_config(**changes):
    """A BeitConfig of two blocks on 4 x 4 patches."""
    settings = dict(image_size=8, patch_size=2, dim=16, depth=2, heads=2, drop_path=0.0) | changes
    return beit.BeitConfig(**settings)


def tiny_mim(vocab=11, **changes):
    """A tiny pre-training model, always the same; changes: of its configuration."""
    torch.manual_seed(0)
    model = pretrain.BeitForMaskedImageModeling(tiny_config(**changes), vocab)
    with torch.no_grad():  # biases and tables start at 0, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_base_has_the_parameters_of_the_released_model():
    """The base pre-training model's parameter count against the authors' log: 91,965,776."""
    with torch.device("meta"):
        model = pretrain.BeitForMaskedImageModeling(beit.model_config("base"), 8192)
    assert sum(p.numel() for p in model.parameters()) == 91_965_776


def test_patch_projection_is_a_linear_map_of_flattened_patches():
    """PatchEmbed, a convolution, against a matrix product with each flattened patch."""
    config = tiny_config()
    embed, x = beit.PatchEmbed(config), torch.randn(1, 3, 8, 8)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5)  # (1, h, w, 3, P, P)
    patches = patches.flatten(1, 2).flatten(2)  # (1, N, 3P²)
    expected = patches @ embed.proj.weight.flatten(1).T + embed.proj.bias
    assert torch.allclose(embed(x), expected, atol=1e-5)


def test_input_is_e_s_then_patches_plus_positions():
    """H_0 = [e_[S], E x_1, ..., E x_N] + E_pos, with e_[M] for a masked patch's projection."""
    model = tiny_mim(positions="absolute")
    x, mask = torch.randn(1, 3, 8, 8), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    H = model.embed(x, mask) - model.pos_embed
    assert torch.allclose(H[:, 0], model.cls_token[:, 0], atol=1e-6)
    assert torch.allclose(H[0, 6], model.mask_token[0, 0], atol=1e-6)
    assert torch.allclose(H[0, 7], model.patch_embed(x)[0, 6], atol=1e-6)


def test_mlp_has_the_exact_gelu_and_norms_the_released_epsilon():
    """GELU with the error function, not its tanh approximation; every norm's eps is 1e-6."""
    model, x = tiny_mim(), torch.randn(5, 16)
    mlp = model.blocks[0].mlp
    h = mlp.fc1(x)
    expected = mlp.fc2(h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    assert torch.allclose(mlp(x), expected, atol=1e-6)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_attention_equals_scaled_dot_product_attention():
    """Attention with a relative bias against torch's scaled_dot_product_attention."""
    model = tiny_mim(positions="relative")
    attention, x = model.blocks[0].attn, torch.randn(2, 17, 16)
    _, bias, _ = next(model.layers())
    q, k, v = attention.project(x)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
    assert torch.allclose(attention(x, bias), attention.proj(expected), atol=1e-6)


def test_relative_position_index():
    """The released rows by hand for 3 x 3 patches: one for each offset, three for e_[S]."""
    index, grid = beit.relative_position_index(3), 3
    for i in range(9):
        for j in range(9):
            dy, dx = i // grid - j // grid, i % grid - j % grid  # query - key
            assert index[i + 1, j + 1] == (dy + 2) * 5 + dx + 2
    assert index[0, 1:].unique().item() == 25
    assert index[1:, 0].unique().item() == 26 and index[0, 0] == 27


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
def test_positions_distinguish_patches(positions):
    """Swapping two patches does more than swap their outputs, as it would without positions."""
    model = tiny_mim(positions=positions)
    x = torch.randn(1, 3, 8, 8)
    swapped = x.clone()
    swapped[..., :2, :2], swapped[..., 6:, 6:] = x[..., 6:, 6:], x[..., :2, :2]
    a, b = beit.Beit.forward(model, x), beit.Beit.forward(model, swapped)
    assert not torch.allclose(a[:, 1], b[:, 16], atol=1e-4)


def test_initialisation():
    """Standard deviations of new weights against the released code's.

    Cut at one std for pre-training, so that the real std is 0.0108; uncut for fine-tuning; output
    projections of block l divided by sqrt(2l); a classifier's head a thousandth.
    """
    shape = dict(image_size=32, patch_size=16, dim=256, depth=3, heads=4, positions="absolute")
    config = beit.BeitConfig(**shape)
    torch.manual_seed(0)
    pre = pretrain.BeitForMaskedImageModeling(config, 99)
    fine = finetune_cls.BeitForClassification(config, 9)
    for layer in (pre.blocks[0].mlp.fc1, pre.patch_embed.proj, pre.lm_head):
        assert layer.weight.std().item() == pytest.approx(0.0108, rel=0.03) and not layer.bias.any()
    for embedding in (pre.cls_token, pre.mask_token, pre.pos_embed):
        assert embedding.std().item() == pytest.approx(0.0108, rel=0.15)
    for projection in (pre.blocks[2].attn.proj, pre.blocks[2].mlp.fc2):
        assert projection.weight.std().item() == pytest.approx(0.0108 / math.sqrt(6), rel=0.02)
    assert fine.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.0200, rel=0.02)
    assert fine.head.weight.std().item() == pytest.approx(0.0200 / 1000, rel=0.1)
    assert fine.mask_token is None and not fine.head.bias.any()
    assert (pre.blocks[1].gamma_1 == 0.1).all() and (pre.blocks[1].gamma_2 == 0.1).all()


def test_stochastic_depth_keeps_the_mean():
    """Factors are 0 or 1 / (1 - rate), on average 1; a dropped branch adds nothing.

    Rates rise over the blocks, here 0, 0.25 and 0.5; each branch of each has a draw of its own.
    """
    torch.manual_seed(0)
    factor = beit.drop_path(torch.rand(20_000), 0.25)
    assert factor.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert factor.mean().item() == pytest.approx(1, abs=0.02)
    model = beit.Beit(tiny_config(depth=3, drop_path=0.5, positions="absolute"))
    x, u = torch.randn(2, 3, 8, 8), torch.ones(2, 3, 2)
    u[0, 1, 0] = u[0, 2, 1] = 0  # image 0: no attention in block 2, no MLP in block 3
    first, second, third = model.blocks
    h = first(model.embed(x[:1]), None)
    h = h + second.gamma_2 * second.mlp(second.norm2(h)) / 0.75
    h = h + third.gamma_1 * third.attn(third.norm1(h), None) / 0.5
    found = model(x, u=u)
    assert torch.allclose(found[:1], h, atol=1e-6)
    assert torch.allclose(found[1:], model(x[1:], u=u[1:]), atol=1e-6)


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_the_last_block_at_some_positions_alone(positions, layer_scale):
    """Beit.forward_at against rows of Beit.forward, in value and in gradient.

    One image asks for some positions, one for none, one for all.
    """
    torch.manual_seed(0)
    config = tiny_config(positions=positions, layer_scale=layer_scale, drop_path=0.5)
    model = beit.Beit(config, mask_embedding=True)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, u, mask = torch.randn(3, 3, 8, 8), torch.rand(3, 2, 2), torch.rand(3, 16) < 0.4
    u[0] = 1  # keeps its branches
    mask[1], mask[2] = False, True
    results = []
    for plain in (True, False):
        model.zero_grad()
        if plain:
            h = model(x, mask, u)[:, 1:][mask]
        else:
            h = model.forward_at(x, mask, mask.nonzero(as_tuple=True), u)
        h.sin().sum().backward()
        results.append([h.detach()] + [p.grad for p in model.parameters()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("positions", ["absolute", "relative", "shared"])
def test_recomputed_blocks_give_the_same_gradients(positions):
    """--recompute: gradients with it and without it, to the bit; each block runs twice."""
    model = tiny_mim(positions=positions, drop_path=0.5)
    x, mask, u = torch.randn(2, 3, 8, 8), torch.rand(2, 16) < 0.4, torch.rand(2, 2, 2)
    gradients, calls = [], []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *_: calls.append(model.recompute))
    for model.recompute in (False, True):
        model.zero_grad()
        model(x, mask, u=u).sin().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert calls == [False] * 2 + [True] * 4


def test_last_attention_is_what_the_last_block_uses():
    """Figure 2's weights, times v and projected, against the output of block L's attention."""
    model = tiny_mim(positions="shared")
    x, last, seen = torch.randn(1, 3, 8, 8), model.blocks[-1].attn, []
    weights = model.last_attention(x)
    assert weights.shape == (1, 2, 17, 17)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2, 17), atol=1e-5)
    last.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output)))
    beit.Beit.forward(model, x)
    (h, *_), out = seen[0]
    expected = last.proj((weights @ last.project(h)[2]).transpose(1, 2).flatten(2))
    assert torch.allclose(out, expected, atol=1e-5)


# -------------------------------------------------------- sections 2.3 and 2.4: eqs. 1 to 3


def pretrain_arguments(*flags):
    """pretrain.py's settings for these flags, on top of its recipe `demo`."""
    parser = command_line.recipe_parser("", pretrain.RECIPES)
    return command_line.parse_recipe(parser, pretrain.RECIPES, ["--out", "unused", *flags])


def test_predictions_are_those_of_the_masked_positions():
    """The logits against their formula, W_c LN(h_i^L) + b_c for i in M, row by row."""
    model, x = tiny_mim(), torch.randn(2, 3, 8, 8)
    nn.init.normal_(model.lm_head.bias)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, 3:6] = mask[1, 7] = True
    h = beit.Beit.forward(model, x, mask)[:, 1:][mask]
    expected = model.norm(h) @ model.lm_head.weight.T + model.lm_head.bias
    assert expected.shape == (4, 11)
    assert torch.allclose(model(x, mask), expected, atol=1e-6)


def test_training_loss_is_over_the_masked_positions(tmp_path, monkeypatch):
    """Eq. 1 in the loop: the logged loss of a step against the mean over M of its own losses.

    fixed_count adds positions outside M to those of masks that are smaller.
    """
    seen = collections.defaultdict(list)

    def watched(name, function):
        def call(*inputs):
            seen[name].append((inputs, function(*inputs)))
            return seen[name][-1][1]

        return call

    for name in ("fixed_count", "recovery_loss"):
        monkeypatch.setattr(pretrain, name, watched(name, getattr(pretrain, name)))
    images = np.random.default_rng(0).integers(0, 256, (16, 24, 24, 3), np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images, val_images=images[:1])
    flags = ["--data", str(tmp_path / "set.npz"), "--target", "pixels", "--model", "mini"]
    flags += ["--epochs", "1", "--warmup-epochs", "0", "--batch-size", "16", "--min-block", "8"]
    flags += ["--image-size", "24", "--device", "cpu", "--out", str(tmp_path / "run")]
    pretrain.main(flags)
    (mask, count), positions = seen["fixed_count"][0]
    each = seen["recovery_loss"][0][1]
    assert len(each) == count > mask.sum() > 0
    expected = each[: mask.sum()].sum() / mask.sum()
    assert torch.stack(positions).T[: mask.sum()].tolist() == mask.nonzero().tolist()
    logged = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_pixels_under_the_mask_are_not_seen():
    """Other pixels in a masked patch change no prediction; in a visible patch they do."""
    model = tiny_mim()
    x, mask = torch.randn(1, 3, 8, 8), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 0] = True  # the patch of rows 0-1, columns 0-1
    changed, visible = x.clone(), x.clone()
    changed[..., :2, :2] += 1
    visible[..., 4:6, 4:6] += 1
    assert torch.equal(model(changed, mask), model(x, mask))
    assert not torch.allclose(model(visible, mask), model(x, mask), atol=1e-4)


def test_bound_terms_are_those_of_eq_3():
    """What evaluate() returns, recomputed image by image: x of 16 pixels, tokens of 8."""
    model, tokenizer = tiny_mim(vocab=16, image_size=16, patch_size=4), tiny_dvae().eval()
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    args = pretrain_arguments("--mask-ratio", "0.4", "--min-block", "2")
    source, views = sources.Arrays("five", images), [(16, "bicubic"), (8, "lanczos")]
    held_out = pretrain.MaskedViews(args, source, views, 4, False)
    gradients = []
    model.register_forward_pre_hook(lambda *_: gradients.append(torch.is_grad_enabled()))
    result = pretrain.evaluate(model, tokenizer, held_out, args, processes.Process())
    assert gradients and not any(gradients)
    stage1 = stage2 = right = count = 0.0
    masked = []
    for index in range(5):
        view, token_view, mask = held_out[[(-1, index)]]
        x, pixels, mask = view / 127.5 - 1, token_view / 255, mask.flatten(1)
        z = tokenizer.tokens(pixels)
        masked.append(z.flatten(1)[mask])
        log_p = F.log_softmax(model(x, mask), -1)
        stage2 += log_p.gather(1, z.flatten(1)[mask][:, None]).sum().item()
        stage1 -= tokenizer.negative_log_likelihood(pixels, *tokenizer.decode_parameters(z)).item()
        right += (log_p.argmax(-1) == z.flatten(1)[mask]).sum().item()
        count += mask.sum().item()
    assert result["stage1_nats"] == pytest.approx(stage1 / 5, rel=1e-5)
    assert result["stage2_nats"] == pytest.approx(stage2 / 5, rel=1e-5)
    assert result["mim_loss"] == pytest.approx(-stage2 / count, rel=1e-5)
    assert result["mim_accuracy"] == pytest.approx(right / count)
    share = torch.cat(masked).bincount() / count
    assert result["commonest_token"] == pytest.approx(share.max().item())
    entropy = torch.special.entr(share).sum().item()
    assert result["token_entropy"] == pytest.approx(entropy, rel=1e-5)


def test_pixel_targets_are_the_patches_own_pixels():
    """Table 4, "- visual tokens": each target against the pixels of its patch, and the loss."""
    x = torch.randn(2, 3, 8, 8)
    pixels = pretrain.recovery_targets("pixels", x, None, None, 2)
    assert pixels.shape == (2, 16, 12)
    patch = x[1, :, 2:4, 4:6].flatten()  # row 1, column 2
    assert torch.equal(pixels[1, 6].sort().values, patch.sort().values)
    standard = pretrain.recovery_targets("normalised-pixels", 5 + 3 * x, None, None, 2)
    assert torch.allclose(standard.mean(-1), torch.zeros(2, 16), atol=1e-5)
    assert torch.allclose(standard.var(-1, correction=0), torch.ones(2, 16), atol=1e-3)
    assert torch.allclose(pretrain.recovery_loss(pixels[0], pixels[0] + 2), torch.full((16,), 4.0))


def test_pictures_of_predictions_change_masked_patches_alone():
    """recovered_image: decoded tokens, or pixels that are the image's own if predicted exactly."""
    tokenizer, pixels, mask = tiny_dvae(), torch.rand(2, 3, 8, 8), torch.zeros(2, 16) == 1
    mask[:, 5] = True  # row 1, column 1
    prediction = torch.randn(2, 16, 16)
    found = pretrain.recovered_image(None, prediction, mask, None, pixels, tokenizer, 2)
    changed = (found != pixels).any(1)
    assert changed[:, 2:4, 2:4].all() and changed.sum() == 2 * 4
    for target in ("pixels", "normalised-pixels"):
        args, x = argparse.Namespace(target=target, normalise="half"), 2 * pixels - 1
        exact = pretrain.recovery_targets(target, x, None, None, 2)
        found = pretrain.recovered_image(args, exact, mask, x, pixels, None, 2)
        assert torch.allclose(found, pixels, atol=1e-4)


def test_recover_all_counts_every_position():
    """Table 4, "+ recover 100 %": predictions at all positions against those at M alone."""
    model, x = tiny_mim(), torch.randn(2, 3, 8, 8)
    mask = torch.rand(2, 16) < 0.4
    predicted = pretrain.positions_to_predict("all", mask)
    prediction = model(x, mask, predicted.nonzero(as_tuple=True))
    assert prediction.shape == (32, 11)
    assert torch.equal(pretrain.positions_to_predict("masked", mask), mask)
    assert torch.allclose(prediction[mask.flatten()], model(x, mask), atol=1e-6)


def test_positions_that_fill_up_a_batch_change_nothing():
    """Loss and gradients with a fixed count of positions against eq. 1 over M alone."""
    model, x, z = tiny_mim(), torch.randn(3, 3, 8, 8), torch.randint(11, (3, 16))
    mask = torch.rand(3, 16) < 0.3
    mask[1] = False
    image, i = positions = pretrain.fixed_count(mask, 30)
    assert image.shape == (30,) and mask.sum() < 30
    assert len(set(zip(image.tolist(), i.tolist()))) == 30
    expected = torch.stack(mask.nonzero(as_tuple=True))
    assert torch.equal(torch.stack(positions)[:, : mask.sum()], expected)
    results = []
    for padded in (False, True):
        model.zero_grad()
        if padded:
            each = pretrain.recovery_loss(model(x, mask, positions), z[positions])
            loss = (each * mask[positions]).sum()
        else:
            loss = F.cross_entropy(model(x, mask), z[mask], reduction="sum")
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


def test_masks_change_with_epoch_and_seed():
    """The mask of an image is fixed by seed, epoch and image, and differs with each of them."""
    source = sources.Arrays("eight", np.zeros((8, 24, 24, 3), np.uint8))
    views = pretrain.MaskedViews(pretrain_arguments(), source, [(24, "bicubic")], 6, True)
    first, again, later = (views[[(epoch, 0)]][-1] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert not torch.equal(first, views[[(0, 1)]][-1])
    views.seed += 1
    assert not torch.equal(first, views[[(0, 0)]][-1])


@pytest.mark.parametrize(
    "kind, recover",
    [
        ("blockwise", "masked"),
        ("printed", "masked"),
        ("random", "masked"),
        ("blockwise", "all"),
        ("none", "all"),
    ],
)
def test_no_mask_has_more_positions_than_are_predicted(kind, recover):
    """MaskedViews.most_positions bounds the positions of 400 masks: fixed_count drops none."""
    args = pretrain_arguments("--masking", kind, "--recover", recover)
    source = sources.Arrays("eight", np.zeros((8, 24, 24, 3), np.uint8))
    views = pretrain.MaskedViews(args, source, [(24, "bicubic")], 6, True)
    keys = [[(epoch, index) for index in range(8)] for epoch in range(50)]
    masks = torch.cat([views[batch][-1] for batch in keys])
    counts = pretrain.positions_to_predict(recover, masks.flatten(1)).sum(1)
    assert 0 < counts.max() <= views.most_positions <= 36


# -------------------------------------------------------- section 2.6: fine-tuning


def test_classifier_is_a_linear_map_of_the_mean_patch_output():
    """The classifier's logits against its formula: LN(mean of h^L_i) W_c + b."""
    torch.manual_seed(0)
    model = finetune_cls.BeitForClassification(tiny_config(), 5).eval()
    with torch.no_grad():  # the norm and the bias start at 1 and 0, W_c near 0
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(2, 3, 8, 8)
    mean = beit.Beit.forward(model, x)[:, 1:].mean(1)
    norm, head = model.fc_norm, model.head
    expected = F.layer_norm(mean, [16], norm.weight, norm.bias, 1e-6) @ head.weight.T + head.bias
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_top_1_and_top_5_by_hand(monkeypatch):
    """Labels at ranks 1, 2, 6 and 1 of six logits."""
    logits = torch.tensor([[9.0, 5, 4, 3, 2, 1]] * 3 + [[1, 2, 3, 4, 5, 9]])
    batch = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 5, 5])
    monkeypatch.setattr(batches, "eval_batches", lambda *_: [batch])
    model = nn.Module()
    model.forward = lambda x: logits
    found = finetune_cls.evaluate(model, None, None, "half", processes.Process())
    assert found == {"top1": 50, "top5": 75}


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_follow_mixed_pixels(mixup, cutmix):
    """Targets against mean pixels: image n has the value n everywhere, so these show its share.

    Each image is mixed with its neighbour, 0 with 1 and 2 with 3; cutmix's pixels stay whole.
    """
    x, shares, whole = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8), [], []
    for seed in range(20):
        mixed, targets = labelled.mix(x, torch.eye(4), mixup, cutmix, random.Random(seed))
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0), atol=1e-5)
        own, other = targets.diagonal(), targets[range(4), [1, 0, 3, 2]]
        assert torch.allclose(own + other, torch.ones(4))
        shares.append(own[0].item())
        whole.append(torch.equal(mixed, mixed.round()))
    assert len(set(shares)) > 10 and min(shares) < 0.5 < max(shares)
    assert any(whole) == (cutmix > 0) and all(whole) == (mixup == 0)


def test_layer_decay():
    """Learning-rate shares and weight decay against the appendix.

    Block l of L gets d^(L+1-l), embeddings d^(L+1), head, norm and a shared table 1. Vectors,
    e_[S] and E_pos are not decayed.
    """
    scale, decay = {}, {}
    for positions in ("absolute", "shared"):
        model = tiny_mim(positions=positions)
        groups = beit.parameter_groups(model, weight_decay=0.05, layer_decay=0.5)
        names = {parameter: name for name, parameter in model.named_parameters()}
        assert sum(len(group["params"]) for group in groups) == len(names)
        for group in groups:
            for parameter in group["params"]:
                scale[names[parameter]] = group["lr_scale"]
                decay[names[parameter]] = group["weight_decay"]
    table = "rel_pos_bias.relative_position_bias_table"
    assert scale["pos_embed"] == 0.5**3 and decay["pos_embed"] == 0
    assert scale["patch_embed.proj.weight"] == scale["mask_token"] == 0.5**3
    assert scale["blocks.0.mlp.fc1.weight"] == 0.5**2 and scale["blocks.1.gamma_1"] == 0.5
    assert scale["lm_head.weight"] == scale[table] == 1
    assert decay["cls_token"] == decay["blocks.0.attn.q_bias"] == decay["norm.weight"] == 0
    assert decay["mask_token"] == decay[table] == 0.05


def test_absolute_positions_are_interpolated():
    """E_pos on another grid: e_[S]'s row stays, the others are bicubic; on its own grid E_pos.

    By hand from 4x4 to 2x2, whose places are halfway between two old ones: there the bicubic
    weights are -3/32, 19/32, 19/32, -3/32. Beyond the border the outermost place is repeated.
    """
    position = torch.randn(1, 17, 8)
    bigger = beit.resize_pos_embed(position, 7)
    assert bigger.shape == (1, 50, 8) and torch.equal(bigger[:, 0], position[:, 0])
    assert beit.resize_pos_embed(position, 4) is position
    weight = torch.tensor([-3, 19, 19, -3]) / 32
    first = torch.stack([weight[0] + weight[1], weight[2], weight[3], torch.tensor(0.0)])
    W = torch.stack([first, first.flip(0)])
    expected = torch.einsum("ay,bx,yxd->abd", W, W, position[0, 1:].view(4, 4, 8))
    smaller = beit.resize_pos_embed(position, 2)
    assert torch.allclose(smaller[0, 1:].view(2, 2, 8), expected, atol=1e-5)


@pytest.mark.parametrize("new, q", [(24, 1.0903), (32, 1.1349), (60, None)])
def test_relative_tables_are_interpolated_on_the_released_geometric_scale(new, q):
    """q against the released code's, and a table with the values of a cubic against that cubic.

    A cubic spline without free ends reproduces a cubic of the offsets exactly.
    """
    offsets = beit.geometric_offsets(14, new)
    assert offsets[14] == pytest.approx(1)
    assert q is None or offsets[15] - offsets[14] == pytest.approx(q, abs=5e-5)
    assert offsets[-1] == pytest.approx(new - 1, abs=1e-5)
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    table = torch.from_numpy(np.concatenate([(y**3 - 2 * x * y).ravel(), [1, 2, 3]]))[:, None]
    resized = beit.resize_relative_table(table, new).numpy()
    wide = np.arange(-(new - 1), new)
    y, x = np.meshgrid(wide, wide, indexing="ij")
    expected = np.concatenate([(y**3 - 2 * x * y).ravel(), [1, 2, 3]])[:, None]
    assert np.abs(resized - expected).max() < 1e-6 * np.abs(expected).max()


def test_shared_table_becomes_one_per_block_at_another_size():
    """A shared table, or E_pos, of a pre-trained model in a classifier for images twice the size.

    Each block's table is the shared one, interpolated; E_pos is interpolated.
    """
    for positions in ("shared", "absolute"):
        source = tiny_mim(positions=positions)
        init = {"config": vars(source.config)}
        config = beit.finetuned_config(init, None, 16, 0.0)
        model = finetune_cls.BeitForClassification(config, 3)
        beit.load_backbone(model, source.state_dict())
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 3)
        if positions == "shared":
            shared = source.rel_pos_bias.relative_position_bias_table.data
            expected = beit.resize_relative_table(shared, 8)
            assert torch.equal(model.blocks[1].attn.relative_position_bias_table, expected)
        else:
            assert torch.equal(model.pos_embed, beit.resize_pos_embed(source.pos_embed, 8))


def test_classifier_continues_at_a_higher_resolution_with_its_head():
    """load_backbone copies the head if it is to be kept; else the model keeps its own."""
    torch.manual_seed(0)
    small = finetune_cls.BeitForClassification(tiny_config(positions="relative"), 3)
    large = finetune_cls.BeitForClassification(tiny_config(positions="relative", image_size=16), 3)
    beit.load_backbone(large, small.state_dict(), beit.HEADS)
    assert torch.equal(large.head.weight, small.head.weight)
    other = finetune_cls.BeitForClassification(tiny_config(positions="relative"), 3)
    beit.load_backbone(large, other.state_dict())
    assert torch.equal(large.blocks[1].mlp.fc1.weight, other.blocks[1].mlp.fc1.weight)
    assert torch.equal(large.head.weight, small.head.weight)


def test_weights_that_do_not_fit_are_named():
    """The error of load_backbone names a missing and an unknown entry."""
    state = tiny_mim().state_dict()
    del state["blocks.1.norm1.weight"]
    state["surprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match="Missing.*blocks.1.norm1.weight.*Unexpected.*surprise"):
        beit.load_backbone(finetune_cls.BeitForClassification(tiny_config(), 3), state)


def test_decoder_reaches_full_resolution():
    """One logit per class and pixel, for patches of 2, 4 and 8 pixels."""
    for patch in (2, 4, 8):
        model = finetune_seg.BeitForSegmentation(tiny_config(image_size=16, patch_size=patch), 5, 8)
        assert model(torch.randn(1, 3, 16, 16)).shape == (1, 5, 16, 16)


def test_logits_lie_where_their_patches_lie():
    """Blocks that add nothing: a brighter patch changes most the logits at its own place."""
    torch.manual_seed(0)
    model = finetune_seg.BeitForSegmentation(tiny_config(image_size=16), 5, 8).eval()
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
    x = torch.randn(1, 3, 16, 16)
    brighter = x.clone()
    brighter[..., 2:4, 10:12] += 3
    change = (model(brighter) - model(x)).abs().sum((0, 1))
    row, column = divmod(change.argmax().item(), 16)
    assert 1 <= row <= 4 and 9 <= column <= 12


def test_segmenter_is_a_norm_deconvolutions_and_a_linear_map():
    """The segmenter's logits against its formula, for patches that one deconvolution covers."""
    torch.manual_seed(0)
    model, x = finetune_seg.BeitForSegmentation(tiny_config(), 5, 8), torch.randn(2, 3, 8, 8)
    for parameter in model.parameters():  # else norms and biases start at 1 and 0
        nn.init.normal_(parameter, std=0.3)
    h = beit.Beit.forward(model, x)[:, 1:]
    h = F.layer_norm(h, [16], model.norm.weight, model.norm.bias, 1e-6)
    h = h.transpose(1, 2).view(2, 16, 4, 4)  # (B, D, H/P, W/P)
    (deconvolution, norm, _), classifier = model.decoder
    assert torch.allclose(model(x), classifier(F.gelu(norm(deconvolution(h)))), atol=1e-5)


def test_segmentation_does_not_depend_on_the_batch():
    """Logits of an image in a training batch of three against those of the image alone."""
    torch.manual_seed(0)
    model, x = finetune_seg.BeitForSegmentation(tiny_config(), 5, 8), torch.randn(3, 3, 8, 8)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)


def test_sliding_window():
    """slide() against the model on one crop, and against the mean where crops overlap."""
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
    large = torch.randn(1, 3, 13, 13)  # windows begin at 0 and 5 in both directions
    logits = finetune_seg.slide(model, large)
    corner, below = model(large[..., :8, :8]), model(large[..., 5:, :8])
    assert torch.allclose(logits[..., 8:, :5], below[..., 3:, :5], atol=1e-5)
    mean = (corner[..., 5:, :5] + below[..., :3, :5]) / 2
    assert torch.allclose(logits[..., 5:8, :5], mean, atol=1e-5)
    x = torch.randn(1, 3, 8, 15)  # windows begin at 0 and 5, and at 7 instead of 10
    logits = finetune_seg.slide(model, x)
    first, second, third = (model(x[..., left : left + 8]) for left in (0, 5, 7))
    mean = (first[..., 7:] + second[..., 2:3] + third[..., :1]) / 3
    assert torch.allclose(logits[..., 7:8], mean, atol=1e-5)
    assert torch.allclose(logits[..., 13:], third[..., 6:], atol=1e-5)


def test_segmenters_evaluation_takes_the_largest_logit(monkeypatch):
    """A model whose logits are one-hot in the image's grey level, on masks of these levels.

    A fourth class is nowhere: it has no IoU.
    """
    masks = torch.randint(3, (2, 8, 8), dtype=torch.uint8)
    batch = masks[:, None].expand(2, 3, 8, 8), masks
    monkeypatch.setattr(batches, "eval_batches", lambda *_: [batch])
    model = nn.Module()
    model.config, model.classes = tiny_config(), 4
    model.forward = lambda x: F.one_hot((127.5 * (x[:, 0] + 1)).round().long(), 4).movedim(3, 1)
    held_out = argparse.Namespace(source=argparse.Namespace(mask_classes=["a", "b", "c", "d"]))
    found = finetune_seg.evaluate(model, held_out, None, "half", processes.Process())
    assert found["miou"] == found["pixel_accuracy"] == 100
    assert found["iou"] == {"a": 100, "b": 100, "c": 100}


def test_mean_iou_by_hand():
    """Truth 0 0 1 1 2 ignored, guess 0 1 1 1 0 2: IoU 1/3, 2/3, 0; three of five pixels right."""
    truth, guess = torch.tensor([0, 0, 1, 1, 2, sources.IGNORE]), torch.tensor([0, 1, 1, 1, 0, 2])
    matrix = finetune_seg.confusion_matrix(truth, guess, 4)  # class 3 occurs nowhere: not counted
    miou, accuracy = finetune_seg.mean_iou(matrix)
    assert miou == pytest.approx(100 * (1 / 3 + 2 / 3 + 0) / 3) and accuracy == pytest.approx(60)
