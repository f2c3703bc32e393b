"""Number for number: our networks against the independent implementations that people use.

    pip install timm transformers safetensors scipy dall-e attrs requests     # in an environment of its own
    python verify.py                                                    # the README's table, minutes on two cores
    python verify.py --golden                                           # the values in test_beit.py

Random weights, random images, float32. A row says what was compared, with which version, and the largest difference;
exit status 1 if one is larger than its bound. Nothing else in this project needs those packages.
"""

import importlib
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
import training
from finetune_cls import BeitForClassification
from masking import make_mask
from pretrain import BeitForMaskedImageModeling

SIZES = {
    "tiny": dict(image_size=32, patch_size=4, dim=128, depth=4, heads=2, drop_path=0.0, layer_scale=0.1),
    "base": dict(drop_path=0.0),
    "large": dict(dim=1024, depth=24, heads=16, drop_path=0.0, layer_scale=1e-5),
}
CLASSES, VOCABULARY = 10, 8192
ROWS = []  # (what, against, largest difference, bound)


def report(what, against, difference, bound):
    """Print one row of the table and keep it."""
    name, _, _ = against.partition(" ")
    version = "" if name in ("independent", "published") else " " + importlib.metadata.version(name)
    ROWS.append((what, against + version, float(difference), bound))
    print(f"| {what} | {against}{version} | {difference:.1e} | {bound:.0e} |", flush=True)


def randomise(model, seed=0):
    """Noise in every parameter, biases, tables and norms too: an initial zero would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = 0.02 * torch.randn(parameter.shape, generator=generator)
        centre = 1 if "norm" in name and name.endswith("weight") else 0.5 if "gamma" in name else 0
        parameter.data = centre + noise
    return model


def config(size, positions):
    """BeitConfig of one of SIZES."""
    return beit.BeitConfig(**SIZES[size], positions=positions)


def gap(a, b):
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def gradient_gap(ours, theirs):
    """Largest difference of a gradient relative to its largest entry, over all parameters of both dicts."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(gap(ours[key], theirs[key]) / max(ours[key].abs().max().item(), 1e-12) for key in ours)


def gradients(model):
    """{name: gradient} of every parameter."""
    return {name: p.grad for name, p in model.named_parameters()}


TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def import_oracle(name):
    """Import one of the packages to compare with. Raises ValueError saying what to install if it is absent.

    timm and transformers import torchvision, which without its compiled part lacks two operators that they never call.
    """
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            TORCHVISION.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"cannot import {name} ({error}): see python verify.py --help for what to install") from error


def against_timm(size, positions):
    """Features, logits and gradients of the classifier; a finetune_cls.py state dict loads with strict=True."""
    timm = import_oracle("timm.models.beit")
    c = config(size, positions)
    ours = randomise(BeitForClassification(c, CLASSES)).eval()
    theirs = timm.Beit(
        img_size=c.image_size, patch_size=c.patch_size, num_classes=CLASSES, embed_dim=c.dim, depth=c.depth,
        num_heads=c.heads, init_values=c.layer_scale, use_abs_pos_emb=positions == "absolute",
        use_rel_pos_bias=positions == "relative", use_shared_rel_pos_bias=positions == "shared",
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, c.image_size, c.image_size, generator=torch.Generator().manual_seed(1))
    H, theirs_H = beit.Beit.forward(ours, x), theirs.forward_features(x)
    report(f"features, {size}, {positions}", "timm Beit", gap(H, theirs_H), 1e-5)
    a, b = ours(x), theirs(x)
    report(f"logits, {size}, {positions}", "timm Beit", gap(a, b), 1e-5)
    for logits in (a, b):
        F.cross_entropy(logits, torch.tensor([1, 2])).backward()
    report(f"gradients, {size}, {positions}", "timm Beit", gradient_gap(gradients(ours), gradients(theirs)), 1e-4)


def transformers_config(c, **more):
    """Ours, as transformers' configuration."""
    return import_oracle("transformers").BeitConfig(
        hidden_size=c.dim, num_hidden_layers=c.depth, num_attention_heads=c.heads,
        intermediate_size=int(c.dim * c.mlp_ratio), image_size=c.image_size, patch_size=c.patch_size,
        layer_norm_eps=1e-6, layer_scale_init_value=float(c.layer_scale), drop_path_rate=0.0,
        use_absolute_position_embeddings=c.positions == "absolute",
        use_relative_position_bias=c.positions == "relative",
        use_shared_relative_position_bias=c.positions == "shared", **more,
    )  # fmt: skip


def as_transformers_reads(model, kind, folder, **more):
    """Our model exported to a .safetensors file in `folder` and loaded by transformers."""
    training.write_file(folder / "model.safetensors", beit.to_transformers(model.state_dict()))
    transformers_config(model.config, **more).save_pretrained(folder)
    loaded, info = getattr(import_oracle("transformers"), kind).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return loaded.eval()


def as_we_read(theirs, folder):
    """The state dict of transformers' model, saved by it and loaded by us."""
    theirs.save_pretrained(folder)
    return beit.load_pretrained(folder / "model.safetensors", "pretraining", "classification")["model"]


def against_transformers(size, positions):
    """Masked-image-modelling logits, loss and gradients, and a classifier's logits; files in both directions."""
    c = config(size, positions)
    ours = randomise(BeitForMaskedImageModeling(c, VOCABULARY)).eval()
    rng = random.Random(0)
    masks = [make_mask("blockwise", rng, c.grid, 75 / 196, 4) for _ in range(2)]
    mask = torch.from_numpy(np.stack(masks)).flatten(1)
    x = torch.randn(2, 3, c.image_size, c.image_size, generator=torch.Generator().manual_seed(1))
    z = torch.tensor([rng.randrange(VOCABULARY) for _ in range(mask.sum())])
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        more = dict(vocab_size=VOCABULARY, use_mask_token=True)
        theirs = as_transformers_reads(ours, "BeitForMaskedImageModeling", folder, **more)
        counts = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
        what = f"{size}, {positions}"
        report(f"parameters of pre-training, {what}: {counts[0]:,}", "transformers", abs(counts[0] - counts[1]), 0)
        a = ours(x, mask)
        out = theirs(x, bool_masked_pos=mask, labels=z)
        report(f"p_MIM logits at masked positions, {what}", "transformers", gap(a, out.logits[mask]), 1e-5)
        loss = F.cross_entropy(a, z)
        report(f"eq. 1's loss, {what}", "transformers", gap(loss, out.loss), 1e-6)
        loss.backward()
        out.loss.backward()
        back = as_we_read(theirs, folder / "back")
        moved = max(gap(back[key], value) for key, value in ours.state_dict().items())
        report(f"weights there and back, {what}", "transformers", moved, 0)
        for p in theirs.parameters():  # its gradients come back under our names as its weights do
            p.data = p.grad
        difference = gradient_gap(gradients(ours), as_we_read(theirs, folder / "gradients"))
        report(f"gradients, {what}", "transformers", difference, 1e-4)


def against_transformers_classifier(size, positions):
    """A classifier's logits, through a .safetensors file."""
    c = config(size, positions)
    ours = randomise(BeitForClassification(c, CLASSES)).eval()
    x = torch.randn(2, 3, c.image_size, c.image_size, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        theirs = as_transformers_reads(ours, "BeitForImageClassification", Path(folder), num_labels=CLASSES)
        report(f"classifier's logits, {size}, {positions}", "transformers", gap(ours(x), theirs(x).logits), 1e-5)


@torch.no_grad()
def against_dalle(folder, images=50):
    """DALL-E's own modules, saved whole with torch.save, read by us: logits, tokens and reconstructions."""
    dall_e = import_oracle("dall_e")
    torch.manual_seed(0)
    encoder, decoder = dall_e.Encoder().eval(), dall_e.Decoder().eval()
    decoder.blocks.input.w.mul_(8192**0.5)  # one-hot input: at its own scale every random image is the same grey
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        torch.save(module, Path(folder) / f"{name}.pkl")
    ours = dvae.load_tokenizer(f"dalle:{folder}")
    counts = [sum(p.numel() for p in part.parameters()) for part in (ours.encoder, ours.decoder)]
    logits_gap = reconstruction_gap = wrong = 0
    for i in range(0, images, 5):
        x = torch.rand(5, 3, 112, 112, generator=torch.Generator().manual_seed(i))
        theirs = encoder(dall_e.map_pixels(x))
        logits_gap = max(logits_gap, gap(ours.encode(x), theirs.permute(0, 2, 3, 1)))
        z = theirs.argmax(1)
        wrong += (ours.tokens(x) != z).sum().item()
        one_hot = F.one_hot(z, 8192).permute(0, 3, 1, 2).float()
        image = dall_e.unmap_pixels(torch.sigmoid(decoder(one_hot)[:, :3]))
        reconstruction_gap = max(reconstruction_gap, gap(ours.decode(z), image))
    report(f"tokenizer logits ({counts[0]:,} + {counts[1]:,} parameters)", "dall-e", logits_gap, 1e-4)
    report(f"tokens that differ, of {images * 196:,}", "dall-e", wrong, 0)
    report("reconstructions", "dall-e", reconstruction_gap, 1e-5)


def against_spline(table, grid):
    """The relative table of another grid by scipy's cubic splines, the knots found by another root finder."""
    CubicSpline = import_oracle("scipy.interpolate").CubicSpline
    old = (math.isqrt(len(table) - 3) + 1) // 2
    q = import_oracle("scipy.optimize").brentq(lambda q: (q ** (old - 1) - 1) / (q - 1) - (grid - 1), 1.0001, 3)
    positive = np.cumsum(q ** np.arange(old - 1))
    x = np.concatenate([-positive[::-1], [0], positive])
    new = np.arange(-(grid - 1), grid)
    square = table[:-3].double().numpy().reshape(2 * old - 1, 2 * old - 1, -1)
    rows = CubicSpline(x, square, axis=0)(new)
    return q, torch.from_numpy(CubicSpline(x, rows, axis=1)(new)).flatten(0, 1)


def interpolation():
    """224 -> 384 and 224 -> 512: E_pos against timm, relative tables against scipy."""
    timm = import_oracle("timm.layers")
    generator = torch.Generator().manual_seed(0)
    pos_embed, table = torch.randn(1, 197, 768, generator=generator), torch.randn(27**2 + 3, 12, generator=generator)
    for size in (384, 512):
        grid = size // 16
        theirs = timm.resample_abs_pos_embed(pos_embed, [grid, grid], antialias=False)
        ours = beit.resize_pos_embed(pos_embed, grid)
        report(f"E_pos, 224 -> {size}", "timm resample_abs_pos_embed", gap(ours, theirs), 1e-6)
        q, expected = against_spline(table, grid)
        ours = beit.resize_relative_table(table, grid)
        report(f"relative table, 224 -> {size} (q {q:.4f})", "scipy CubicSpline", gap(ours[:-3], expected), 1e-5)


def large_and_384():
    """--model large, and base at 384 pixels: forward and backward give finite numbers."""
    cases = {"large": config("large", "shared"), "base at 384": beit.BeitConfig(image_size=384, drop_path=0.0)}
    for name, c in cases.items():
        model = BeitForMaskedImageModeling(c, VOCABULARY)
        mask = torch.zeros(1, c.grid**2, dtype=torch.bool)
        mask[:, :75] = True
        model(torch.randn(1, 3, c.image_size, c.image_size), mask).logsumexp(-1).sum().backward()
        broken = sum(not p.grad.isfinite().all() for p in model.parameters())
        report(f"forward and backward, {name}: parameters without a finite gradient", "independent count", broken, 0)


def formula(model):
    """Parameters that need no random generator: 0.05 times sines of a running number, 1 more for the norms' scales."""
    start = 0
    for name, parameter in model.named_parameters():
        values = torch.sin(torch.arange(start, start + parameter.numel(), dtype=torch.float64) * 0.7).float() * 0.05
        start += parameter.numel()
        parameter.data = values.view_as(parameter) + ("norm" in name and name.endswith("weight"))
    return model.eval()


def golden():
    """A handful of timm's and DALL-E's outputs from formula weights and images, for test_beit.py."""
    timm, dall_e = import_oracle("timm.models.beit"), import_oracle("dall_e")
    x = torch.sin(torch.arange(3 * 16 * 16) * 0.3).view(1, 3, 16, 16)
    for positions in ("absolute", "relative", "shared"):
        model = timm.Beit(
            img_size=16, patch_size=4, num_classes=3, embed_dim=32, depth=2, num_heads=2, init_values=0.1,
            use_abs_pos_emb=positions == "absolute", use_rel_pos_bias=positions == "relative",
            use_shared_rel_pos_bias=positions == "shared",
        )  # fmt: skip
        ours = BeitForClassification(golden_config(positions), 3)
        model.load_state_dict(formula(ours).state_dict())
        print(positions, [round(v, 6) for v in model.eval()(x)[0].tolist()])
    encoder = formula(dall_e.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512))
    logits = encoder(dall_e.map_pixels((x + 1) / 2))
    print("dall-e", [round(v, 6) for v in logits[0, :2].flatten().tolist()])


def golden_config(positions):
    """Of the model whose outputs test_beit.py holds."""
    return beit.BeitConfig(16, 4, 32, 2, 2, positions=positions, layer_scale=0.1, drop_path=0.0)


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("--golden", action="store_true", help="print the values that test_beit.py holds")
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
    with training.one_line_errors():
        main()
