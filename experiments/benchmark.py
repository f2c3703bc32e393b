"""Compare the speed and memory of a pre-training step with those of other implementations.

    pip install transformers timm Pillow            # what it compares with; in a new environment
    python -m experiments.benchmark                 # base model, 8 images per step; 8 to 13
                                                    # minutes on two cores
    python -m experiments.benchmark --images 64 --side-by-side bf16 tokenizer     # on a GPU
    python -m experiments.benchmark --attention     # ways to compute attention; needs no package

"transformers" is its BeitForMaskedImageModeling. The "released design" is the released
pre-training code on timm's backbone, which descends from it: attention without a fused kernel, the
head at the masked positions, AdamW not fused, and the tokenizer in float32 outside autocast.

All contestants have the same sizes, images, masks, stochastic depth, weight decay and AdamW
settings, those of our recipe `base`; no model has dropout; weights are random. Each repeat makes
one step of every contestant in turn, so that a slow moment of the machine affects all of them. The
rate of loading data is measured too.

"bf16" and "float32" run in that precision. "defaults" gives each side its own default: ours is what
--amp auto picks on this machine, transformers' is float32. The rest runs in what --amp auto picks.

`python pretrain.py --benchmark 10` shows where the time of one step goes.
"""

import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from beit import Beit, model_config, parameter_groups
from dvae import DVAE, DVAEConfig
from experiments import HERE, benchmark_attention, costs
from experiments.machine import default_precision, machine
from experiments.oracles import import_oracle, timm_beit, transformers_config
from images import sources, views
from masking import make_mask, mask_count
from plumbing import clock, command_line, processes
from pretrain import BeitForMaskedImageModeling, fixed_count, recovery_loss

RECIPE = costs.settings("pretraining", "base")
GRID, VOCAB, MASKED = 14, 8192, RECIPE.mask_ratio
WEIGHT_DECAY, LR = RECIPE.weight_decay, 1e-4


class ReleasedDesign(nn.Module):
    """The released pre-training model on timm's backbone."""

    def __init__(self, config):
        super().__init__()
        import_oracle("timm.layers").set_fused_attn(False)
        self.backbone = timm_beit(config, classes=0, drop_path=config.drop_path, pool="")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.lm_head = nn.Linear(config.dim, VOCAB)

    def forward(self, x, mask):
        """(B, 3, H, W), bool mask (B, N) -> logits at the masked positions (|M|, |V|)."""
        b = self.backbone
        h, w = b.patch_embed(x), mask[..., None].float()
        h = h * (1 - w) + self.mask_token * w
        h = torch.cat([b.cls_token.expand(len(x), -1, -1), h], dim=1)  # (B, N+1, D)
        bias = b.rel_pos_bias()
        for block in b.blocks:
            h = block(h, shared_rel_pos_bias=bias)
        return self.lm_head(b.norm(h)[:, 1:][mask])


# -------------------------------------------------------- one training step of each


def ours(config, device, compile_model=False):
    """pretrain.py's model: (parameter groups, loss function of x, mask and z)."""
    model = BeitForMaskedImageModeling(config, VOCAB).to(device)
    train_model = processes.compiled(model, device) if compile_model else model
    loss_of = processes.compiled(recovery_loss, device) if compile_model else recovery_loss

    def loss(x, mask, z):
        u = torch.rand(len(x), config.depth, 2, device=x.device)
        positions = fixed_count(mask, len(x) * mask_count(GRID, GRID, MASKED))
        prediction = train_model(x, mask, positions, u)
        return (loss_of(prediction, z[positions]) * mask[positions]).sum() / mask.sum()

    return parameter_groups(model, WEIGHT_DECAY), loss


def decayed_matrices(model):
    """AdamW's parameter groups, as in the released code: no decay for vectors and e_[S]."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith("cls_token")].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]


def alike(model, config):
    """Return the peer's model. Raises ValueError if its stochastic depth or dropout is not ours.

    Another version of a package may have other defaults, or ignore a setting.
    """
    with torch.device("meta"):
        our_rates = {round(block.drop_path_rate, 6) for block in Beit(config).blocks}
    paths = [part for part in model.modules() if type(part).__name__.endswith("DropPath")]
    their_rates = {round(part.drop_prob, 6) for part in paths if part.training}
    dropout = {part.p for part in model.modules() if isinstance(part, nn.Dropout)}
    if their_rates - {0} != our_rates - {0} or dropout - {0}:
        raise ValueError(
            f"{type(model).__name__} drops branches at rates {sorted(their_rates)} and has dropout "
            f"{sorted(dropout)}, ours drops branches at {sorted(our_rates)}: install the versions "
            "of docs/speed.md"
        )
    return model


def released(config, device):
    """The released design: (parameter groups, loss function of x, mask and z)."""
    model = alike(ReleasedDesign(config).to(device), config)

    def loss(x, mask, z):
        return F.cross_entropy(model(x, mask).float(), z[mask])

    return decayed_matrices(model), loss


def transformers(config, device):
    """transformers' model: (parameter groups, loss function of x, mask and z)."""
    settings = transformers_config(config, vocab_size=VOCAB, drop_path=config.drop_path)
    model = import_oracle("transformers").BeitForMaskedImageModeling(settings).to(device)
    model = alike(model.train(), config)

    def loss(x, mask, z):
        return model(x, bool_masked_pos=mask, labels=z[mask]).loss

    return decayed_matrices(model), loss


def training_step(contestant, autocast, fused, tokens):
    """Return step(x, pixels, mask), which makes one step: forward, backward and AdamW.

    contestant: what ours, released or transformers returns. fused: use fused AdamW. tokens:
    function of the tokenizer's view `pixels` that returns z, int64 (B, N).
    """
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
    """Yield batches of the same noise with new masks, without end.

    x (B, 3, H, W); the tokenizer's view (B, 3, 8h, 8w) in [0, 1]; bool mask (B, N).
    """
    rng, side = random.Random(0), config.grid * 8
    x = torch.randn(images, 3, config.image_size, config.image_size, device=device)
    pixels = torch.rand(images, 3, side, side, device=device)
    while True:
        masks = [
            make_mask(RECIPE.masking, rng, config.grid, MASKED, RECIPE.min_block)
            for _ in range(images)
        ]
        yield x, pixels, torch.from_numpy(np.stack(masks)).flatten(1).to(device)


# -------------------------------------------------------- the comparisons


def precision(name, device):
    """autocast's context factory for "bf16" or "float32"."""
    autocast, _ = processes.precision("off" if name == "float32" else name, device)
    return autocast


def precision_of(comparison, device):
    """The precision of our step in one of COMPARISONS."""
    return comparison if comparison in ("bf16", "float32") else default_precision(device)[0]


def random_tokens(pixels):
    """Random targets z (B, N), for steps without a tokenizer."""
    return torch.randint(VOCAB, (len(pixels), GRID**2), device=pixels.device)


def tokens_of(tokenizer, autocast):
    """Return a function of `pixels` that returns the tokenizer's tokens z (B, N)."""

    def tokens(pixels):
        with autocast():
            return tokenizer.tokens(pixels).flatten(1)

    return tokens


def contestants(comparison, config, device):
    """{name: step} of one of COMPARISONS, ours first."""
    amp = precision_of(comparison, device)
    autocast, float32 = precision(amp, device), precision("float32", device)
    if comparison == "tokenizer":  # a whole step of pre-training, tokenizer of DALL-E's size
        tokenizer = DVAE(DVAEConfig(vocab_size=VOCAB)).to(device).requires_grad_(False).eval()
        our_tokens, their_tokens = tokens_of(tokenizer, autocast), tokens_of(tokenizer, float32)
        our_step = training_step(ours(config, device), autocast, True, our_tokens)
        their_step = training_step(released(config, device), autocast, False, their_tokens)
        return {"ours": our_step, "released design, tokenizer in float32": their_step}
    if comparison == "compiled":
        found = {
            "ours, compiled": (ours(config, device, compile_model=True), autocast, True),
            "transformers": (transformers(config, device), autocast, True),
        }
    elif comparison == "defaults":
        found = {
            f"ours, {amp}": (ours(config, device), autocast, True),
            "transformers, float32": (transformers(config, device), float32, True),
        }
    else:
        found = {
            "ours": (ours(config, device), autocast, True),
            "transformers": (transformers(config, device), autocast, True),
            "transformers, AdamW not fused": (transformers(config, device), autocast, False),
            "released design": (released(config, device), autocast, False),
        }
    return {name: training_step(*settings, random_tokens) for name, settings in found.items()}


def side_by_side(steps, source, device, repeats, warm_up=2):
    """Median seconds of one step of each contestant: {name: step} -> {name: seconds}.

    Every repeat takes the next batch from the iterator `source` and makes one step of each.
    """
    seconds = {name: [] for name in steps}
    for _ in range(warm_up + repeats):
        batch = next(source)
        for name, step in steps.items():
            clock.synchronise(device)
            start = time.perf_counter()
            step(*batch)
            clock.synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[warm_up:]) for name, values in seconds.items()}


def flop_of_step(config, images):
    """Floating-point operations of our step without tokenizer: 3 x 2 for each weight and token.

    Not counted are what block L leaves out, its projection and MLP at rows without a prediction,
    and the gradient of the pixels, which nobody needs.
    """
    tokens, D = config.grid**2 + 1, config.dim
    block = tokens * (4 + 2 * config.mlp_ratio) * D**2 + 2 * tokens**2 * D
    masked = round(MASKED * config.grid**2)
    left_out = (tokens - masked) * (1 + 2 * config.mlp_ratio) * D**2
    patches = config.grid**2 * 3 * config.patch_size**2 * D
    trained = config.depth * block - left_out + masked * D * VOCAB
    return images * (6 * trained + 4 * patches)


def title(comparison, device):
    """A comparison's name, its precision, and whether --amp auto would pick that here."""
    amp, _ = default_precision(device)
    if comparison == "bf16" and amp != "bf16":
        return f"bf16, which is emulated here (--amp auto is {amp})"
    return comparison if comparison in ("bf16", "float32", "defaults") else f"{comparison}, {amp}"


def no_compiler(device):
    """What torch says if it cannot compile for a device, else None."""
    return benchmark_attention.refusal(
        lambda: processes.compiled(lambda x: x + 1, device)(torch.ones(1, device=device))
    )


def compare(comparison, config, images, device, repeats):
    """Run one comparison and print its rows."""
    if comparison == "compiled" and (said := no_compiler(device)):
        print(f"\ncompiled: left out, torch says: {said}", flush=True)
        return
    steps, source = contestants(comparison, config, device), batches(images, config, device)
    found = side_by_side(steps, source, device, repeats)
    amp = precision_of(comparison, device)
    rate = clock.matmul_rate(device, precision(amp, device))
    first = next(iter(found.values()))
    print(f"\n{title(comparison, device)}: matrix products {rate / 1e9:.0f} GFLOP/s in {amp}")
    for name, seconds in found.items():
        line = f"  {name:40s} {images / seconds:7.2f} images/s"
        if not name.startswith("ours"):
            line += f", ours is {seconds / first:.2f} times as fast"
        elif comparison != "tokenizer":
            share = flop_of_step(config, images) / seconds / rate
            line += f", {share:.0%} of the matrix products' rate"
        print(line, flush=True)


# -------------------------------------------------------- memory: one process each


def memory(images, device):
    """Print the peak memory of three steps of ours and of transformers', in --amp auto's precision.

    Each runs in a new process.
    """
    print(f"\nin {default_precision(device)[0]}:")
    for name in ("ours", "transformers"):
        command = [sys.executable, "-m", "experiments.benchmark", "--images", str(images)]
        command += ["--only", name, "--device", device.type]
        done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(f"{name} ended with status {done.returncode}")
        print(f"peak memory, {name:28s} {done.stdout.strip()}", flush=True)


def only(name, config, images, device):
    """Make three steps of one contestant; print this process's peak memory."""
    build = {"ours": ours, "transformers": transformers}[name]
    autocast = precision(default_precision(device)[0], device)
    step = training_step(build(config, device), autocast, True, random_tokens)
    source = batches(images, config, device)
    for _ in range(3):
        step(*next(source))
    print(f"{clock.peak_memory(device) / 2**30:.2f} GiB")


# -------------------------------------------------------- the data path


def rate_of(call, count, repeats=5):
    """`count` over the seconds that call() takes, the median of `repeats` calls."""
    return count / statistics.median(timeit.repeat(call, number=1, repeat=repeats))


def data_path():
    """Print masks per second, and images per second from arrays and from JPEG files."""
    rng = random.Random(0)

    def draw_masks():
        for _ in range(5000):
            make_mask(RECIPE.masking, rng, GRID, MASKED, RECIPE.min_block)

    print(f"\nmasks of 14 x 14                          {rate_of(draw_masks, 5000):,.0f} "
          "a second on one core")  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), np.uint8)
    two_views = [(224, "bicubic"), (112, "lanczos")]
    crops = views.Crops(
        sources.Arrays("noise", noise), two_views, train=True, min_crop=0.08, flip=True, jitter=0.4
    )
    keys = [(0, i) for i in range(64)]
    rate = rate_of(lambda: crops[keys], len(keys))
    print(f"arrays of 256 x 256, base recipe's crops  {rate:.0f} images/s")
    rate, share = jpeg_rate(32)
    print(f"JPEG files of 500 x 375, to 224 pixels    {rate:.0f} images/s per worker, "
          f"{share:.0%} of Pillow's own decode and resize")  # fmt: skip


def jpeg_rate(count):
    """(images per second that one worker reads from JPEG files, share of Pillow's own rate)."""
    with tempfile.TemporaryDirectory() as folder, single_thread():
        files = jpeg_files(Path(folder), count)
        source = sources.Files("photographs", files)
        crops = views.Crops(source, [(224, "bicubic")], train=False)
        keys = [(0, i) for i in range(count)]
        pillow, here = [], []
        for _ in range(5):  # in turn, as in side_by_side
            pillow.append(rate_of(lambda: pillow_alone(files), count, repeats=1))
            here.append(rate_of(lambda: crops[keys], count, repeats=1))
    rate = statistics.median(here)
    return rate, rate / statistics.median(pillow)


@contextlib.contextmanager
def single_thread():
    """Run with one thread, as loader processes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def jpeg_files(folder, count):
    """Write `count` JPEG files of smooth noise, of the size of ImageNet's; return their paths."""
    image = import_oracle("PIL.Image")
    rng, paths = np.random.default_rng(0), [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        small = image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        small.resize((500, 375), image.BICUBIC).save(path, quality=90)
    return paths


def pillow_alone(files):
    """What Pillow alone does: decode, convert to RGB, resize to 224 x 224 and make an array."""
    image = import_oracle("PIL.Image")
    for path in files:
        np.asarray(image.open(path).convert("RGB").resize((224, 224), image.BICUBIC))


# -------------------------------------------------------- main

COMPARISONS = ("bf16", "float32", "compiled", "defaults", "tokenizer")


def main(argv=None):
    parser = command_line.Parser(__doc__)
    parser.add_argument("--images", type=int, default=8, help="images per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each contestant")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    choices = (*COMPARISONS, "memory", "data")
    only_one = parser.add_mutually_exclusive_group()
    only_one.add_argument(
        "--side-by-side", nargs="+", choices=choices, help="comparisons to run; default: all"
    )
    only_one.add_argument(
        "--attention", action="store_true", help="compare ways to compute attention, nothing else"
    )
    only_one.add_argument(
        "--only", choices=("ours", "transformers"), help="print the peak memory of one contestant"
    )
    args = parser.parse_args(argv)
    if min(args.images, args.repeats) < 1:
        parser.error(f"--images {args.images} and --repeats {args.repeats} must be at least 1")
    device = processes.setup(args.device, "off").device
    config = model_config("base", positions=RECIPE.positions, drop_path=RECIPE.drop_path)
    torch.manual_seed(0)
    if args.only:
        return only(args.only, config, args.images, device)
    if not args.attention:
        for peer in ("transformers", "timm.models.beit", "PIL.Image"):  # fail now, not in minutes
            import_oracle(peer)
    print(f"{machine()}; --amp auto is {' here: '.join(default_precision(device))}\n"
          f"torch {torch.__version__}, {args.images} images per step, base model, medians of "
          f"{args.repeats}", flush=True)  # fmt: skip
    if args.attention:
        return benchmark_attention.compare(config, args.images, device, args.repeats)
    wanted = args.side_by_side or choices
    for comparison in COMPARISONS:
        if comparison in wanted:
            compare(comparison, config, args.images, device, args.repeats)
    if "memory" in wanted:
        memory(args.images, device)
    if "data" in wanted:
        data_path()


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()
