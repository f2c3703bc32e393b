"""BEiT's pre-training step beside other implementations of it, and the data path beside the step.

    pip install transformers timm Pillow        # what it is compared with; nothing else needs them
    python benchmark.py                         # base model, 8 images a step: 8 to 13 minutes on two cores
    python benchmark.py --images 64 --side-by-side bf16 tokenizer     # two of the comparisons, on a GPU for instance

transformers is its BeitForMaskedImageModeling. "Released design" is the released pre-training code as it runs on timm's
backbone, which descends from it: attention by hand, head on the masked positions, AdamW not fused, and the tokenizer
outside autocast in single precision. All have the same sizes, images, masks, stochastic depth and AdamW settings;
weights are random. Each repeat makes one step of every contestant in turn, so that a slow moment meets all of them.
Where one step of training goes: python pretrain.py --benchmark 10.
"""

import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
import reproduce
import training
from beit import model_config, parameter_groups
from dvae import DVAE, DVAEConfig
from masking import make_mask, target
from pretrain import BeitForMaskedImageModeling, filled_positions, recovery_loss
from verify import import_oracle, transformers_config

GRID, VOCAB, MASKED = 14, 8192, 75 / 196
WEIGHT_DECAY, LR = 0.05, 1e-4


class ReleasedDesign(nn.Module):
    """The released pre-training model on timm's backbone: (B, 3, H, W), mask (B, N) -> logits (|M|, |V|)."""

    def __init__(self, config):
        super().__init__()
        timm = import_oracle("timm.models.beit")
        import_oracle("timm.layers").set_fused_attn(False)
        self.backbone = timm.Beit(
            img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.dim, depth=config.depth,
            num_heads=config.heads, init_values=config.layer_scale, drop_path_rate=config.drop_path, num_classes=0,
            use_abs_pos_emb=False, use_shared_rel_pos_bias=True, global_pool="",
        )  # fmt: skip
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.lm_head = nn.Linear(config.dim, VOCAB)

    def forward(self, x, mask):
        b = self.backbone
        h, w = b.patch_embed(x), mask[..., None].float()
        h = torch.cat([b.cls_token.expand(len(x), -1, -1), h * (1 - w) + self.mask_token * w], dim=1)
        bias = b.rel_pos_bias()
        for block in b.blocks:
            h = block(h, shared_rel_pos_bias=bias)
        return self.lm_head(b.norm(h)[:, 1:][mask])


# ---------------------------------------------------------------- one training step of each


def ours(config, device, compile_model=False):
    """(parameter groups, loss function of x, mask, z) of the model of pretrain.py."""
    model = BeitForMaskedImageModeling(config, VOCAB).to(device)
    run = training.compiled(model, device) if compile_model else model
    loss_of = training.compiled(recovery_loss, device) if compile_model else recovery_loss

    def loss(x, mask, z):
        u = torch.rand(len(x), config.depth, 2, device=x.device)
        at = filled_positions(mask, len(x) * target(GRID, GRID, MASKED))
        return (loss_of(run(x, mask, at, u), z[at]) * mask[at]).sum() / mask.sum()

    return parameter_groups(model, WEIGHT_DECAY), loss


def released(config, device):
    """The same of the released design."""
    model = ReleasedDesign(config).to(device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    return [{"params": decayed}, rest], lambda x, mask, z: F.cross_entropy(model(x, mask).float(), z[mask])


def transformers(config, device):
    """The same of transformers' model."""
    more = dict(use_mask_token=True, vocab_size=VOCAB)
    settings = transformers_config(config, **more)
    settings.drop_path_rate = config.drop_path
    model = import_oracle("transformers").BeitForMaskedImageModeling(settings).to(device).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
    return [{"params": decayed}, rest], lambda x, mask, z: model(x, bool_masked_pos=mask, labels=z[mask]).loss


def training_step(contestant, autocast, fused, tokens):
    """A function that makes one step on (x, pixels, mask): forward, backward, AdamW. tokens: pixels -> z (B, N)."""
    groups, loss = contestant
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=fused)

    def step(x, pixels, mask):
        z = tokens(pixels)
        with autocast():
            value = loss(x, mask, z)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batches(images, config, device):
    """Batches of noise for ever, each with masks of its own: x, the tokenizer's pixels, mask (B, N)."""
    rng = random.Random(0)
    x = torch.randn(images, 3, config.image_size, config.image_size, device=device)
    pixels = torch.rand(images, 3, config.grid * 8, config.grid * 8, device=device)
    while True:
        masks = [make_mask("blockwise", rng, config.grid, MASKED, 16) for _ in range(images)]
        yield x, pixels, torch.from_numpy(np.stack(masks)).flatten(1).to(device)


# ---------------------------------------------------------------- the comparisons


def precision(amp, device):
    """autocast's context factory: bf16, or float32."""
    return training.precision(amp, device)[0]


def no_tokens(pixels):
    """Targets at random, for steps without a tokenizer."""
    return torch.randint(VOCAB, (len(pixels), GRID**2), device=pixels.device)


def tokens_of(tokenizer, context):
    """Targets from a tokenizer, under autocast or outside it."""

    def tokens(pixels):
        with context():
            return tokenizer.tokens(pixels).flatten(1)

    return tokens


def contestants(comparison, config, device):
    """{name: step} of one comparison; the first is ours."""
    bf16, float32 = precision("bf16", device), precision("off", device)
    if comparison == "tokenizer":  # the whole step of pre-training, with a tokenizer of DALL-E's size
        tokenizer = DVAE(DVAEConfig(vocab_size=VOCAB)).to(device).requires_grad_(False).eval()
        here = training_step(ours(config, device), bf16, True, tokens_of(tokenizer, bf16))
        there = training_step(released(config, device), bf16, False, tokens_of(tokenizer, float32))
        return {"ours": here, "released design, tokenizer in float32": there}
    amp = {"bf16": bf16, "float32": float32}
    if comparison == "compiled":
        calls = {"ours, compiled": (ours(config, device, True), bf16, True)}
        calls["transformers"] = (transformers(config, device), bf16, True)
    elif comparison == "defaults":  # as each comes: ours in bf16, transformers in float32
        calls = {"ours, bf16": (ours(config, device), bf16, True)}
        calls["transformers, float32"] = (transformers(config, device), float32, True)
    else:
        autocast = amp[comparison]
        calls = {"ours": (ours(config, device), autocast, True)}
        calls["transformers"] = (transformers(config, device), autocast, True)
        calls["transformers, AdamW not fused"] = (transformers(config, device), autocast, False)
        calls["released design"] = (released(config, device), autocast, False)
    return {name: training_step(*call, no_tokens) for name, call in calls.items()}


def side_by_side(steps, source, device, repeats, warm_up=2):
    """Median seconds of one step of each, {name: seconds}: all in turn, `repeats` times, each time on a new batch."""
    seconds = {name: [] for name in steps}
    for repeat in range(warm_up + repeats):
        batch = next(source)
        for name, step in steps.items():
            training.synchronise(device)
            start = time.perf_counter()
            step(*batch)
            training.synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[warm_up:]) for name, values in seconds.items()}


def flop_of_step(config, images):
    """Floating-point operations of a step without tokenizer by the usual count, 3 x 2 for each weight and token.

    Nothing is taken off for what block L leaves out, so that all contestants are measured by the same work.
    """
    tokens, D = config.grid**2 + 1, config.dim
    block = tokens * (4 + 2 * config.mlp_ratio) * D**2 + 2 * tokens**2 * D
    other = config.grid**2 * 3 * config.patch_size**2 * D + round(MASKED * config.grid**2) * D * VOCAB
    return 6 * images * (config.depth * block + other)


def compare(comparison, config, images, device, repeats):
    """Run one comparison and print its rows."""
    found = side_by_side(contestants(comparison, config, device), batches(images, config, device), device, repeats)
    rate = training.matmul_rate(device, precision("off" if comparison == "float32" else "bf16", device))
    first = next(iter(found.values()))
    print(f"\n{comparison}: matrix products {rate / 1e9:.0f} GFLOP/s")
    for name, seconds in found.items():
        line = f"  {name:40s} {images / seconds:7.2f} images/s"
        if name.startswith("ours") and comparison != "tokenizer":
            line += f", {flop_of_step(config, images) / seconds / rate:.0%} of the matrix products' rate"
        elif not name.startswith("ours"):
            line += f", ours is {seconds / first:.2f} times as fast"
        print(line, flush=True)


# ---------------------------------------------------------------- memory: a process for each


def memory(images, device):
    """Print the peak memory of three bf16 steps of ours and of transformers', each in a new process."""
    print()
    for name in ("ours", "transformers"):
        command = [sys.executable, __file__, "--images", str(images), "--only", name, "--device", device.type]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(f"peak memory, {name:28s} {done.stdout.strip()}", flush=True)


def only(name, config, images, device):
    """Three steps of one contestant; print the process's peak memory."""
    build = {"ours": ours, "transformers": transformers}[name]
    step = training_step(build(config, device), precision("bf16", device), True, no_tokens)
    source = batches(images, config, device)
    for _ in range(3):
        step(*next(source))
    print(f"{training.peak_memory(device) / 2**30:.2f} GiB")


# ---------------------------------------------------------------- the data path


def rate_of(call, count, repeats=5):
    """How many a second: `call` makes `count`; the median of `repeats`."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return count / statistics.median(seconds)


def data_path():
    """Print masks a second, images a second from arrays with the base recipe's crops, and JPEG files against Pillow."""
    rng = random.Random(0)
    masks = rate_of(lambda: [make_mask("blockwise", rng, GRID, MASKED, 16) for _ in range(5000)], 5000)
    print(f"\nmasks of 14 x 14                          {masks:,.0f} a second on one core")
    views, crop = [(224, "bicubic"), (112, "lanczos")], (0.08, True, 0.4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), np.uint8)
    crops = data.Crops(data.Arrays("noise", noise), views, True, 0, *crop)
    keys = [(0, i) for i in range(64)]
    print(f"arrays of 256 x 256, base recipe's crops  {rate_of(lambda: crops.__getitems__(keys), 64):.0f} images/s")
    with tempfile.TemporaryDirectory() as folder, single_thread():
        files = jpeg_files(Path(folder), 32)
        source = data.Crops(data.Files("photographs", files), [(224, "bicubic")], train=False)
        pillow, here = [], []
        for _ in range(5):  # in turn, as above
            pillow.append(rate_of(lambda: pillow_alone(files), len(files), 1))
            here.append(rate_of(lambda: source.__getitems__(keys[: len(files)]), len(files), 1))
        ratio = statistics.median(here) / statistics.median(pillow)
        print(f"JPEG files of 500 x 375, to 224 pixels    {statistics.median(here):.0f} images/s a worker, "
              f"{ratio:.0%} of Pillow's own decode and resize")  # fmt: skip


@contextlib.contextmanager
def single_thread():
    """As loader processes are: one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def jpeg_files(folder, count):
    """Smooth noise as JPEG files, the size of ImageNet's."""
    image = import_oracle("PIL.Image")
    rng, paths = np.random.default_rng(0), [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        small = image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        small.resize((500, 375), image.BICUBIC).save(path, quality=90)
    return paths


def pillow_alone(files):
    """Pillow's own way: decode, to RGB, to 224 x 224 bicubic, as an array."""
    image = import_oracle("PIL.Image")
    for path in files:
        np.asarray(image.open(path).convert("RGB").resize((224, 224), image.BICUBIC))


COMPARISONS = ("bf16", "float32", "compiled", "defaults", "tokenizer")


def main(argv=None):
    parser = training.Parser(__doc__)
    parser.add_argument("--images", type=int, default=8, help="a step")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each that are timed")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--side-by-side", nargs="+", default=None, choices=(*COMPARISONS, "memory", "data"),
                        help="default: all")  # fmt: skip
    parser.add_argument("--only", choices=("ours", "transformers"), help="the peak memory of one, and nothing else")
    args = parser.parse_args(argv)
    if min(args.images, args.repeats) < 1:
        parser.error(f"--images {args.images} and --repeats {args.repeats} must be at least 1")
    device, *_ = training.setup(args.device)
    config = model_config("base", image_size=224)
    torch.manual_seed(0)
    if args.only:
        return only(args.only, config, args.images, device)
    for peer in ("transformers", "timm.models.beit", "PIL.Image"):  # a missing one is found before minutes are spent
        import_oracle(peer)
    print(f"{reproduce.machine()}, torch {torch.__version__}, {args.images} images a step, base model, medians of "
          f"{args.repeats}")  # fmt: skip
    wanted = args.side_by_side or (*COMPARISONS, "memory", "data")
    for comparison in COMPARISONS:
        if comparison in wanted:
            compare(comparison, config, args.images, device, args.repeats)
    if "memory" in wanted:
        memory(args.images, device)
    if "data" in wanted:
        data_path()


if __name__ == "__main__":
    if set(reproduce.MALLOC) - set(os.environ):  # read by the C library before Python starts: begin again with them
        os.execve(sys.executable, [sys.executable, *sys.argv], {**reproduce.MALLOC, **os.environ})
    with training.one_line_errors():
        main()
