"""Compare our networks with the independent implementations that people use.

    pip install timm transformers safetensors scipy dall-e attrs requests   # in a new environment
    python -m experiments.verify            # the table in docs/fidelity.md; minutes on two cores
    python -m experiments.verify --golden   # the values in tests/test_published.py

Random weights, random images, float32. Each row says what was compared, with which version of
what, the largest difference and its bound. Exit status 1 if a difference exceeds its bound.
"""

import importlib.metadata
import math
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import beit
import dvae
from beit import Beit, BeitConfig
from experiments.oracles import import_oracle, timm_beit, transformers_config
from finetune_cls import BeitForClassification
from masking import make_mask
from plumbing import command_line, published, weights
from pretrain import BeitForMaskedImageModeling

SIZES = {
    "tiny": dict(
        image_size=32, patch_size=4, dim=128, depth=4, heads=2, drop_path=0.0, layer_scale=0.1
    ),
    "base": dict(drop_path=0.0),
    "large": dict(dim=1024, depth=24, heads=16, drop_path=0.0, layer_scale=1e-5),
}
CLASSES, VOCABULARY = 10, 8192
IMAGES = 50  # for the tokenizer
ROWS = []  # (what, against, largest difference, bound)


def report(what, against, difference, bound):
    """Print one row of the table and keep it in ROWS."""
    package, _, _ = against.partition(" ")
    if package != "independent":
        against += " " + importlib.metadata.version(package)
    ROWS.append((what, against, float(difference), bound))
    print(f"| {what} | {against} | {difference:.1e} | {bound:.0e} |", flush=True)


def randomise(model):
    """Add noise to every parameter, also to biases, tables and norms: zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        centre = 1 if "norm" in name and name.endswith("weight") else 0.5 if "gamma" in name else 0
        parameter.data = centre + noise
    return model


def config(size, positions):
    """The BeitConfig of one of SIZES."""
    return BeitConfig(**SIZES[size], positions=positions)


def random_images(config):
    """Two images of normal noise (2, 3, H, W)."""
    side, generator = config.image_size, torch.Generator().manual_seed(1)
    return torch.randn(2, 3, side, side, generator=generator)


def gap(a, b):
    """Largest absolute difference of two tensors; infinite where one is not a number."""
    difference = (a - b).abs()
    return math.inf if difference.isnan().any() else difference.max().item()


def gradient_gap(ours, theirs):
    """Largest difference of a gradient, relative to its largest entry; ours, theirs: by name."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    largest = {name: max(gradient.abs().max().item(), 1e-12) for name, gradient in ours.items()}
    return max(gap(ours[name], theirs[name]) / largest[name] for name in ours)


def gradients(model):
    """{name: gradient} of every parameter."""
    return {name: p.grad for name, p in model.named_parameters()}


def against_timm(size, positions):
    """Compare a classifier with timm's: features, logits and gradients.

    The state dict that finetune_cls.py saves must load into timm's Beit with strict=True.
    """
    c = config(size, positions)
    ours = randomise(BeitForClassification(c, CLASSES)).eval()
    theirs = timm_beit(c, classes=CLASSES).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, what = random_images(c), f"{size}, {positions}"
    H, their_H = Beit.forward(ours, x), theirs.forward_features(x)
    report(f"features, {what}", "timm Beit", gap(H, their_H), 1e-5)
    logits, their_logits = ours(x), theirs(x)
    report(f"logits, {what}", "timm Beit", gap(logits, their_logits), 1e-5)
    for prediction in (logits, their_logits):
        F.cross_entropy(prediction, torch.tensor([1, 2])).backward()
    difference = gradient_gap(gradients(ours), gradients(theirs))
    report(f"gradients, {what}", "timm Beit", difference, 1e-4)


def as_transformers_reads(model, name, settings, folder):
    """Export our model to a .safetensors file in `folder`; load it as transformers' class `name`.

    settings: transformers' configuration.
    """
    weights.write(folder / "model.safetensors", published.to_transformers(model.state_dict()))
    settings.save_pretrained(folder)
    kind = getattr(import_oracle("transformers"), name)
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return loaded.eval()


def as_we_read(theirs, folder):
    """The state dict of a model of transformers, which saves it in `folder` for us to load."""
    theirs.save_pretrained(folder)
    path = folder / "model.safetensors"
    kinds = "pretraining", "classification"
    return published.load_pretrained(path, *kinds, normalise="half")["model"]


def against_transformers(size, positions):
    """Compare masked image modeling with transformers': logits, loss and gradients.

    Weights travel through .safetensors files in both directions.
    """
    c, what = config(size, positions), f"{size}, {positions}"
    ours = randomise(BeitForMaskedImageModeling(c, VOCABULARY)).eval()
    rng = random.Random(0)
    masks = [make_mask("blockwise", rng, c.grid, 75 / 196, 4) for _ in range(2)]
    mask = torch.from_numpy(np.stack(masks)).flatten(1)  # (B, N)
    x = random_images(c)
    z = torch.tensor([rng.randrange(VOCABULARY) for _ in range(mask.sum())])  # (|M|,)
    settings = transformers_config(c, vocab_size=VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        theirs = as_transformers_reads(ours, "BeitForMaskedImageModeling", settings, folder)
        count, their_count = (sum(p.numel() for p in m.parameters()) for m in (ours, theirs))
        row = f"parameters of pre-training, {what}: {count:,}"
        report(row, "transformers", abs(count - their_count), 0)
        logits = ours(x, mask)
        out = theirs(x, bool_masked_pos=mask, labels=z)
        row = f"p_MIM logits at masked positions, {what}"
        report(row, "transformers", gap(logits, out.logits[mask]), 1e-5)
        loss = F.cross_entropy(logits, z)
        report(f"eq. 1's loss, {what}", "transformers", gap(loss, out.loss), 1e-6)
        loss.backward()
        out.loss.backward()
        back = as_we_read(theirs, folder / "back")
        moved = max(gap(back[key], value) for key, value in ours.state_dict().items())
        report(f"weights there and back, {what}", "transformers", moved, 0)
        for p in theirs.parameters():  # saved as weights, its gradients come back under our names
            p.data = p.grad
        difference = gradient_gap(gradients(ours), as_we_read(theirs, folder / "gradients"))
        report(f"gradients, {what}", "transformers", difference, 1e-4)


def against_transformers_classifier(size, positions):
    """Compare a classifier's logits with transformers', through a .safetensors file."""
    c = config(size, positions)
    ours = randomise(BeitForClassification(c, CLASSES)).eval()
    x, settings = random_images(c), transformers_config(c, classes=CLASSES)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        folder = Path(folder)
        theirs = as_transformers_reads(ours, "BeitForImageClassification", settings, folder)
        difference = gap(ours(x), theirs(x).logits)
        report(f"classifier's logits, {size}, {positions}", "transformers", difference, 1e-5)


@torch.no_grad()
def against_dalle(folder):
    """Compare the tokenizer with DALL-E's modules: logits, tokens and reconstructions.

    We read the modules as they are published: each a pickle made by torch.save.
    """
    dall_e = import_oracle("dall_e")
    torch.manual_seed(0)
    encoder, decoder = dall_e.Encoder().eval(), dall_e.Decoder().eval()
    # One-hot input is small: without this every random image is the same grey.
    decoder.blocks.input.w.mul_(8192**0.5)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        torch.save(module, Path(folder) / f"{name}.pkl")
    ours = dvae.load_tokenizer(f"dalle:{folder}")
    counts = [sum(p.numel() for p in part.parameters()) for part in (ours.encoder, ours.decoder)]
    logits_gap = reconstruction_gap = wrong = 0
    for seed in range(0, IMAGES, 5):
        x = torch.rand(5, 3, 112, 112, generator=torch.Generator().manual_seed(seed))
        theirs = encoder(dall_e.map_pixels(x))
        logits_gap = max(logits_gap, gap(ours.encode(x), theirs.permute(0, 2, 3, 1)))
        z = theirs.argmax(1)
        wrong += (ours.tokens(x) != z).sum().item()
        one_hot = F.one_hot(z, 8192).permute(0, 3, 1, 2).float()
        image = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
        reconstruction_gap = max(reconstruction_gap, gap(ours.decode(z), image))
    row = f"tokenizer logits ({counts[0]:,} + {counts[1]:,} parameters)"
    report(row, "dall-e", logits_gap, 1e-4)
    report(f"tokens that differ, of {IMAGES * 196:,}", "dall-e", wrong, 0)
    report("reconstructions", "dall-e", reconstruction_gap, 1e-5)


def spline_table(table, grid):
    """A relative table interpolated to another grid with scipy: (q, table without e_[S]'s rows).

    scipy's cubic splines and another root finder stand in for ours.
    """
    CubicSpline = import_oracle("scipy.interpolate").CubicSpline
    brentq = import_oracle("scipy.optimize").brentq
    old = (math.isqrt(len(table) - 3) + 1) // 2
    q = brentq(lambda q: (q ** (old - 1) - 1) / (q - 1) - (grid - 1), 1.0001, 3)
    positive = np.cumsum(q ** np.arange(old - 1))
    knots = np.concatenate([-positive[::-1], [0], positive])
    new = np.arange(-(grid - 1), grid)
    square = table[:-3].double().numpy().reshape(2 * old - 1, 2 * old - 1, -1)
    rows = CubicSpline(knots, square, axis=0)(new)
    return q, torch.from_numpy(CubicSpline(knots, rows, axis=1)(new)).flatten(0, 1)


def interpolation():
    """224 -> 384 and 224 -> 512 pixels: compare E_pos with timm, relative tables with scipy."""
    timm = import_oracle("timm.layers")
    generator = torch.Generator().manual_seed(0)
    pos_embed = torch.randn(1, 197, 768, generator=generator)
    table = torch.randn(27**2 + 3, 12, generator=generator)
    for size in (384, 512):
        grid = size // 16
        expected = timm.resample_abs_pos_embed(pos_embed, [grid, grid], antialias=False)
        difference = gap(beit.resize_pos_embed(pos_embed, grid), expected)
        report(f"E_pos, 224 -> {size}", "timm resample_abs_pos_embed", difference, 1e-6)
        q, expected = spline_table(table, grid)
        difference = gap(beit.resize_relative_table(table, grid)[:-3], expected)
        row = f"relative table, 224 -> {size} (q {q:.4f})"
        report(row, "scipy CubicSpline", difference, 1e-5)


def large_and_384():
    """Check that every gradient of --model large, and of base at 384 pixels, is finite."""
    cases = {
        "large": config("large", "shared"),
        "base at 384": BeitConfig(image_size=384, drop_path=0.0),
    }
    for name, c in cases.items():
        model = BeitForMaskedImageModeling(c, VOCABULARY)
        mask = torch.zeros(1, c.grid**2, dtype=torch.bool)
        mask[:, :75] = True
        x = torch.randn(1, 3, c.image_size, c.image_size)
        model(x, mask).logsumexp(-1).sum().backward()
        broken = sum(not p.grad.isfinite().all() for p in model.parameters())
        row = f"forward and backward, {name}: parameters without a finite gradient"
        report(row, "independent count", broken, 0)


def formula(model):
    """Set parameters without a random generator: 0.05 sin(0.7 n), n counting all values.

    The scales of the norms get 1 more.
    """
    start = 0
    for name, parameter in model.named_parameters():
        n = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
        start += parameter.numel()
        values = torch.sin(n * 0.7).float() * 0.05
        parameter.data = values.view_as(parameter) + ("norm" in name and name.endswith("weight"))
    return model.eval()


def golden_config(positions):
    """Configuration of the model whose outputs tests/test_published.py holds."""
    return BeitConfig(16, 4, 32, 2, 2, positions=positions, layer_scale=0.1, drop_path=0.0)


def golden():
    """Print timm's and DALL-E's outputs for weights and images made by formulas, for the tests."""
    x = torch.sin(torch.arange(3 * 16 * 16) * 0.3).view(1, 3, 16, 16)
    for positions in ("absolute", "relative", "shared"):
        c = golden_config(positions)
        model = timm_beit(c, classes=3)
        model.load_state_dict(formula(BeitForClassification(c, 3)).state_dict())
        print(positions, [round(v, 6) for v in model.eval()(x)[0].tolist()])
    dall_e = import_oracle("dall_e")
    encoder = formula(dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512))
    logits = encoder(dall_e.map_pixels((x + 1) / 2))
    print("dall-e", [round(v, 6) for v in logits[0, :2].flatten().tolist()])


def main(argv=None):
    parser = command_line.Parser(__doc__)
    help_text = "print the values that tests/test_published.py holds, and compare nothing"
    parser.add_argument("--golden", action="store_true", help=help_text)
    args = parser.parse_args(argv)
    if args.golden:
        golden()
        return
    print("| what | against | largest difference | bound |\n| --- | --- | --- | --- |")
    for size in ("tiny", "base"):
        for positions in ("relative", "shared", "absolute"):
            against_timm(size, positions)
            against_transformers_classifier(size, positions)
        for positions in ("shared", "absolute"):
            against_transformers(size, positions)
    against_transformers("large", "shared")
    with tempfile.TemporaryDirectory() as folder:
        against_dalle(folder)
    interpolation()
    large_and_384()
    sys.exit(any(difference > bound for _, _, difference, bound in ROWS))


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()
