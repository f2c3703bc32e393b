"""What a run of `base` and `large` costs: operations, memory, traffic, loading, hours.

    python -m experiments.scale                print the tables of docs/scale.md
    python -m experiments.scale --document     write them into docs/scale.md

No GPU is needed. Operations follow from the shapes of the models' weights. Memory is counted on
tensors without data (torch's FakeTensorMode) that go through the scripts' own models.
`python -m experiments.scale_check` measures on a CPU what can be measured.
"""

import argparse
import contextlib
import functools
import math
import re
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import beit
import dvae
import finetune_cls
import finetune_seg
import pretrain
import train_tokenizer
from experiments import HERE, tables
from masking import most_masked
from plumbing import command_line, schedules

STAGES = {"tokenizer": train_tokenizer, "pretraining": pretrain,
          "classification": finetune_cls, "segmentation": finetune_seg}  # fmt: skip
CLASSES = {"classification": 1000, "segmentation": 150}
IMAGES = 1_281_167  # of ImageNet-1K
GPUS, NODE = (1, 8, 16, 64, 512), 8
H100, A100, SHARE = 989e12, 312e12, 0.4  # FLOP/s, bf16 without sparsity; share of it
CARD, ROOM = 80e9, 72e9  # bytes of a GPU; those that tensors may take
NVLINK, ETHERNET = 450e9, 12.5e9  # bytes/s in each direction: of a GPU, of a node
LOADED = {"tokenizer": 450, "pretraining": 110, "classification": 250, "segmentation": 19}
JPEG = 110e3  # bytes
ASSUMED = [
    ["H100 SXM, bf16 matrix products", f"{H100 / 1e12:.0f} TFLOP/s", "published"],
    ["A100 SXM, bf16 matrix products", f"{A100 / 1e12:.0f} TFLOP/s", "published"],
    ["share of that rate in a training step", f"{SHARE:.0%}", "assumed"],
    ["memory of a GPU", f"{CARD / 1e9:.0f} GB", "published"],
    ["what tensors may take of it", f"{ROOM / 1e9:.0f} GB", "assumed"],
    ["NVLink of an H100, in each direction", f"{NVLINK / 1e9:.0f} GB/s", "published"],
    [f"Ethernet of a node of {NODE} GPUs", f"100 Gb/s, {ETHERNET / 1e9} GB/s", "assumed"],
    ["training images of ImageNet-1K", f"{IMAGES:,}", "published"],
    ["size of one of its files", f"{JPEG / 1e3:.0f} kB", "assumed"],
    *([f"images/s of a loader process, {stage}", rate, "measured"]
      for stage, rate in LOADED.items()),
]  # fmt: skip
PRIME = 31  # images in a counted batch: divides the size of no weight, and of all that images have


# -------------------------------------------------------- the scripts' models


def settings(stage, recipe):
    """The flags of a stage's script, from the recipe's column."""
    column = command_line.COLUMNS.index(recipe)
    values = {name: row[column] for name, row in STAGES[stage].RECIPES.items()}
    return argparse.Namespace(**values, seed=0)


def tokenizer_of(recipe):
    """The dVAE of a recipe."""
    args = settings("tokenizer", recipe)
    return dvae.build(
        dvae.DVAEConfig(**{name: getattr(args, name) for name in dvae.DVAEConfig.__annotations__})
    )


def build(stage, recipe, depth=None):
    """The model that a stage trains; depth: of the backbone, in place of its own."""
    if stage == "tokenizer":
        return tokenizer_of(recipe)
    args = settings(stage, recipe)
    changes = {"image_size": args.image_size, "drop_path": args.drop_path}
    changes |= {"depth": depth} if depth else {}
    if stage == "pretraining":
        config = beit.model_config(args.model, positions=args.positions, **changes)
        return pretrain.BeitForMaskedImageModeling(config, settings("tokenizer", recipe).vocab_size)
    config = beit.model_config(args.model, positions="relative", **changes)
    if stage == "classification":
        return finetune_cls.BeitForClassification(config, CLASSES[stage])
    return finetune_seg.BeitForSegmentation(config, CLASSES[stage], args.decoder_dim)


def predicted(recipe):
    """Positions of an image that pre-training's head predicts."""
    args = settings("pretraining", recipe)
    grid = args.image_size // beit.MODELS[args.model]["patch_size"]
    return most_masked(args.masking, grid, args.mask_ratio, args.min_block)


def loss_of(stage, recipe, model, images):
    """The loss of a step on `images` random images, as the stage's script computes it."""
    size = settings(stage, recipe).image_size
    x = torch.rand(images, 3, size, size)
    if stage == "tokenizer":
        side = size // model.config.downsampling
        e = torch.rand(images, side, side, model.config.vocab_size)
        return model(x, 1.0, 6.6, e)[0]
    u = torch.rand(images, model.config.depth, 2)
    if stage == "pretraining":
        count = predicted(recipe)
        image = torch.arange(images).repeat_interleave(count)
        positions = image, torch.arange(count).repeat(images)
        mask = torch.ones(images, model.config.grid**2, dtype=torch.bool)
        z = torch.zeros(images * count, dtype=torch.int64)
        return pretrain.recovery_loss(model(x, mask, positions, u), z).mean()
    logits = model(x, u).float()
    if stage == "classification":
        return F.cross_entropy(logits, torch.ones_like(logits) / CLASSES[stage])
    return F.cross_entropy(logits, torch.zeros(images, size, size, dtype=torch.int64))


# -------------------------------------------------------- operations: a formula


def convolutions(network, side):
    """Multiplications of a network of convolutions for one image or grid of side x side."""
    total = 0
    for _, module in network.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MaxPool2d):
            side //= 2
        elif isinstance(module, nn.Upsample):
            side *= 2
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            total += module.weight.numel() * side**2
            side *= module.stride[0]  # of a deconvolution
    return total


def operations(stage, recipe, model):
    """Operations for one image in a step: {"trained", "tokenizer", "recompute"}.

    Two for each multiplication of the forward pass, and four in the backward pass: the gradients of
    the input and of the weight. Pixels need none. Additions elsewhere are not counted.
    """
    size = settings(stage, recipe).image_size
    if stage == "tokenizer":
        first = model.encoder.blocks.input.weight.numel() * size**2
        forward = convolutions(model.encoder, size)
        forward += convolutions(model.decoder, size // model.config.downsampling)
        return {"trained": 6 * forward - 2 * first, "tokenizer": 0, "recompute": 0}
    c = model.config
    D, N = c.dim, c.grid**2
    last = predicted(recipe) if stage == "pretraining" else N + 1  # rows after block L's attention
    attention = (N + 1) * 3 * D**2 + 2 * (N + 1) ** 2 * D
    rest = (1 + 2 * c.mlp_ratio) * D**2  # of one row: projection and MLP
    blocks = c.depth * attention + ((c.depth - 1) * (N + 1) + last) * rest
    first = model.patch_embed.proj.weight.numel() * N
    tokenizer = 0
    if stage == "pretraining":
        head = last * model.lm_head.weight.numel()
        tokenizer = convolutions(tokenizer_of(recipe).encoder, settings(stage, recipe).token_size)
    elif stage == "classification":
        head = model.head.weight.numel()
    else:
        head = convolutions(model.decoder, c.grid)
    trained = 6 * (blocks + head) + 4 * first
    return {"trained": trained, "tokenizer": 2 * tokenizer, "recompute": 2 * blocks}


# -------------------------------------------------------- memory: counted on tensors without data


@contextlib.contextmanager
def without_data():
    """Tensors made inside have a shape, a type and a storage's size, but no values."""
    looks_at_values = mock.patch.object(nn.init, "trunc_normal_")
    swaps_tensors = mock.patch.object(dvae.DVAE, "to")  # for another layout of the same size
    with FakeTensorMode(), looks_at_values, swaps_tensors:
        yield


class FusedAttention(torch.autograd.Function):
    """What scaled_dot_product_attention keeps on a GPU: no (N+1, N+1) weights of each image."""

    @staticmethod
    def forward(context, q, k, v, bias):
        """q, k, v (B, heads, N+1, D/heads) -> the same shape, empty."""
        out, log_sums = torch.empty_like(q), torch.empty(q.shape[:-1])
        context.save_for_backward(q, k, v, bias, out, log_sums)
        return out


def fused_attend(self, x, bias):
    """Attention.attend on a GPU."""
    q, k, v = self.project(x)
    out = FusedAttention.apply(q, k, v, None if bias is None else bias.to(q.dtype))
    return out.transpose(1, 2).flatten(2)


def float32_group_norm(self, x):
    """GroupNorm on a GPU, where autocast makes it float32."""
    return F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)


@functools.cache
def saved(stage, recipe, depth, recompute=False, gpu=True, amp=True):
    """Bytes that a forward pass keeps for the backward pass: (for each image, whatever the batch).

    The second are the weights in bf16. Weights themselves do not count.
    """
    storages = {}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(without_data())
        if gpu:
            enter(mock.patch.object(beit.Attention, "attend", fused_attend))
            enter(mock.patch.object(nn.GroupNorm, "forward", float32_group_norm))
        model = build(stage, recipe, depth)
        model.recompute = recompute
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage  # kept, so that no other has its address
            return tensor

        enter(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        enter(torch.autocast("cpu", torch.bfloat16, enabled=amp))
        loss = loss_of(stage, recipe, model, PRIME)
        del loss
    sizes = [storage.nbytes() for storage in storages.values()]
    of_images = sum(size for size in sizes if size % PRIME == 0)
    return of_images / PRIME, sum(sizes) - of_images


def activations(stage, recipe, recompute=False, gpu=True, amp=True):
    """`saved` at the recipe's depth; with recompute also one block while it is computed again.

    Counted with two and with three blocks: all others keep as much as the third.
    """
    if stage == "tokenizer":
        return saved(stage, recipe, None, gpu=gpu, amp=amp)
    depth = beit.MODELS[settings(stage, recipe).model]["depth"]
    plain = [saved(stage, recipe, blocks, False, gpu, amp) for blocks in (2, 3)]
    two, three = [saved(stage, recipe, n, True, gpu, amp) for n in (2, 3)] if recompute else plain
    one = [b - a for a, b in zip(*plain)] if recompute else (0, 0)
    return tuple(a + (depth - 2) * (b - a) + c for a, b, c in zip(two, three, one))


def fixed(stage, recipe):
    """Bytes whatever the batch: {"weights", "gradients", "moments"}.

    Weights include the tokenizer in pre-training and the averaged weights in its training.
    """
    with without_data():
        model = build(stage, recipe)
        trained = 4 * sum(p.numel() for p in model.parameters())
        others = 4 * sum(t.numel() for t in model.buffers())
        if stage == "tokenizer":
            others += trained if settings(stage, recipe).ema else 0
        elif stage == "pretraining":
            others += 4 * sum(p.numel() for p in tokenizer_of(recipe).parameters())
    return {"weights": trained + others, "gradients": trained, "moments": 2 * trained}


def peak(held, images, activation, keeps_gradients):
    """Peak bytes of a step, given `fixed` and `activations` and the images of a pass.

    The backward pass frees activations while it makes gradients: the larger of the two. Gradients
    stay from pass to pass with --accumulate, and from step to step in DDP's buckets.
    """
    of_image, of_weights = activation
    larger = max(images * of_image + of_weights, held["gradients"])
    stays = held["gradients"] if keeps_gradients else 0
    return held["weights"] + held["moments"] + stays + larger


# -------------------------------------------------------- the tables


@functools.cache
def costs():
    """{(stage, recipe): {"batch", "steps", "held", "plain", "recompute", "flop"}}."""
    found = {}
    for recipe in ("base", "large"):
        for stage in list(STAGES)[recipe == "large":]:  # their tokenizers are the same
            args = settings(stage, recipe)
            with without_data():
                flop = operations(stage, recipe, build(stage, recipe))
            steps = getattr(args, "steps", None)
            found[stage, recipe] = {
                "batch": args.batch_size,
                "steps": steps or schedules.duration(args, IMAGES // args.batch_size)[0],
                "held": fixed(stage, recipe),
                "plain": activations(stage, recipe),
                "recompute": stage != "tokenizer" and activations(stage, recipe, recompute=True),
                "flop": flop,
            }
    return found


def named(stage, recipe):
    """The first cell of a row."""
    return stage if stage == "tokenizer" else f"{stage}, {recipe}"


def operations_table():
    """Operations and memory of each stage, whatever the number of GPUs."""
    rows = []
    for key, cost in costs().items():
        held, flop = cost["held"], cost["flop"]
        total = flop["trained"] + flop["tokenizer"]
        parts = [f"{held[name] / 1e9:.2f}" for name in ("weights", "gradients", "moments")]
        kept = [f"{c[0] / 1e6:.0f}" if c else "" for c in (cost["plain"], cost["recompute"])]
        shares = [f"{flop[k] / total:.0%}" if flop[k] else "" for k in ("tokenizer", "recompute")]
        rows.append([named(*key), f"{held['gradients'] / 4e6:.1f}", f"{total / 1e9:,.0f}",
                     *shares, *parts, *kept])  # fmt: skip
    columns = ["", "million parameters", "GFLOP per image", "of it frozen tokenizer",
               "more with `--recompute`", "weights, GB", "gradients, GB", "AdamW, GB",
               "activations per image, MB", "with `--recompute`, MB"]  # fmt: skip
    return {"columns": columns, "rows": rows}


def fit(cost, kind, gpus):
    """'57 GB in 4 passes': the fewest passes, a power of 2, whose peak is below ROOM."""
    if cost["batch"] % gpus:
        return "batch does not divide"
    images = cost["batch"] // gpus
    for passes in (2**k for k in range(images.bit_length())):
        bytes_ = peak(cost["held"], images / passes, cost[kind], gpus > 1 or passes > 1)
        if images % passes == 0 and bytes_ <= ROOM:
            return f"{bytes_ / 1e9:.0f} GB" + (f" in {passes} passes" if passes > 1 else "")
    return "does not fit"


def memory_table():
    """Memory of each GPU, with the passes of --accumulate that it needs."""
    rows = [
        [named(*key) + (", `--recompute`" if kind == "recompute" else ""), f"{cost['batch']:,}",
         *(fit(cost, kind, gpus) for gpus in GPUS)]
        for key, cost in costs().items() for kind in ("plain", "recompute") if cost[kind]
    ]  # fmt: skip
    return {"columns": ["", "images per step", *(f"{n} GPUs" for n in GPUS)], "rows": rows}


def time_table():
    """Time, traffic, loading and hours of each stage on each number of GPUs."""
    rows = []
    for key, cost in costs().items():
        flop = cost["flop"]["trained"] + cost["flop"]["tokenizer"]
        for gpus in GPUS:
            if cost["batch"] % gpus:
                continue
            step = flop * cost["batch"] / gpus / (SHARE * H100)
            sent = 2 * (gpus - 1) / gpus * cost["held"]["gradients"]  # ring all-reduce
            links = [sent / NVLINK, sent / ETHERNET]
            rate = cost["batch"] / step
            hours = [cost["steps"] * seconds / 3600
                     for seconds in (step, step + links[gpus > NODE], step * H100 / A100)]
            traffic = [f"{1e3 * t:.1f} ms, {t / (t + step):.0%}" if t else "" for t in links]
            rows.append([named(*key), gpus, f"{1e3 * step:,.1f}", f"{sent / 1e9:.2f}", *traffic,
                         f"{rate:,.0f}", f"{math.ceil(rate / LOADED[key[0]]):,}",
                         *(f"{h:,.1f}" if h < 100 else f"{h:,.0f}" for h in hours)])  # fmt: skip
    columns = ["", "GPUs", "step, ms", "sent by each, GB", "over NVLink", "over 100 Gb/s",
               "images/s", "loader processes", "hours", "with traffic", "on A100s"]  # fmt: skip
    return {"columns": columns, "rows": rows}


def fill(text):
    """docs/scale.md with its tables, each between `<!-- NAME -->` and `<!-- end -->`."""
    made = {
        "assumptions": {"columns": ["what", "value", "source"], "rows": ASSUMED},
        "operations and memory": operations_table(),
        "memory of each GPU": memory_table(),
        "time": time_table(),
    }
    for name, table in made.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(?=<!-- end -->)",
                      lambda found: f"{found[1]}{tables.markdown(table)}\n", text,
                      flags=re.DOTALL)  # fmt: skip
    return text


def main(argv=None):
    parser = command_line.Parser(__doc__)
    parser.add_argument("--document", action="store_true", help="write docs/scale.md's tables")
    document = HERE / "docs" / "scale.md"
    made = fill(document.read_text())
    if parser.parse_args(argv).document:
        document.write_text(made)
    else:
        print("\n\n".join(re.findall(r"<!-- .*? -->\n(.*?)\n<!-- end -->", made, re.DOTALL)))


if __name__ == "__main__":
    with command_line.one_line_errors():
        main()
