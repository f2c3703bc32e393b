"""Operations and memory of a training step of `base` and `large`, without running it.

Both are counted on tensors without data, which go through the scripts' own models: operations by
torch's FlopCounterMode, memory in its FakeTensorMode, as on a GPU.
experiments.scale makes tables of both, experiments.scale_check measures them on a CPU.
"""

import argparse
import contextlib
import functools
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import beit
import dvae
import finetune_cls
import finetune_seg
import pretrain
import train_tokenizer
from masking import most_masked
from plumbing import command_line

STAGES = {"tokenizer": train_tokenizer, "pretraining": pretrain,
          "classification": finetune_cls, "segmentation": finetune_seg}  # fmt: skip
CLASSES = {"classification": 1000, "segmentation": 150}  # ImageNet-1K, ADE20K
PRIME = 31  # images in a counted batch: divides the size of every activation and of no weight


# -------------------------------------------------------- the scripts' models


def settings(stage, recipe):
    """The flags of a stage's script, from the recipe's column."""
    return argparse.Namespace(**command_line.column(STAGES[stage].RECIPES, recipe), seed=0)


def tokenizer_of(recipe):
    """The dVAE of a recipe."""
    args, names = settings("tokenizer", recipe), dvae.DVAEConfig.__annotations__
    return dvae.build(dvae.DVAEConfig(**{name: getattr(args, name) for name in names}))


@functools.cache
def frozen_tokenizer(recipe):
    """The shapes of pre-training's tokenizer."""
    with torch.device("meta"):
        return tokenizer_of(recipe)


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


# -------------------------------------------------------- operations: counted on shapes


def counted(call):
    """Operations of call(), forward and backward, as torch counts them: two a multiplication."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def operations(stage, recipe, model):
    """Operations for one image in a step: {"trained", "tokenizer", "recompute"}.

    Only matrix products and convolutions count. The model is on the device "meta".
    """
    steps = []
    for recompute in (False, True):
        model.recompute = recompute
        steps.append(counted(lambda: loss_of(stage, recipe, model, 1).backward()))
    model.recompute = False
    model.zero_grad()
    tokenizer = 0
    if stage == "pretraining":
        size = settings(stage, recipe).token_size
        tokenizer = counted(lambda: frozen_tokenizer(recipe).encode(torch.rand(1, 3, size, size)))
    return {"trained": steps[0], "tokenizer": tokenizer, "recompute": steps[1] - steps[0]}


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


@contextlib.contextmanager
def as_on_a_gpu():
    """Inside, models keep for the backward pass what they would keep on a GPU."""
    fused = mock.patch.object(beit.Attention, "attend", fused_attend)
    with fused, mock.patch.object(nn.GroupNorm, "forward", float32_group_norm):
        yield


def saved(stage, recipe, model, amp):
    """Bytes at the start of the backward pass: (for each image, independent of the batch).

    The first are what the forward pass has kept, and two gradients of the size of its largest
    tensor. The second are the weights in bf16. Weights themselves do not count.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # kept, so that no other has its address
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=amp)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(stage, recipe, model, PRIME)
    sizes = [storage.nbytes() for storage in storages.values()]
    of_images = [size for size in sizes if size % PRIME == 0]
    others = sum(sizes) - sum(of_images)
    return np.array([(sum(of_images) + 2 * max(of_images)) / PRIME, others])


def activations(stage, recipe, gpu=True, amp=True):
    """What `saved` returns: {"plain", "recompute"}; the second, of --recompute, may be None.

    Counted with two blocks and with three; all others keep as much as the third. With --recompute
    one block's activations come on top, while it is computed again.
    """
    with without_data(), as_on_a_gpu() if gpu else contextlib.nullcontext():
        model = build(stage, recipe, depth=3)
        if stage == "tokenizer":
            return {"plain": saved(stage, recipe, model, amp), "recompute": None}
        found, blocks = {}, model.blocks
        for model.recompute in (False, True):
            for model.blocks in (blocks[:2], blocks):
                found[model.recompute, len(model.blocks)] = saved(stage, recipe, model, amp)
    more = beit.MODELS[settings(stage, recipe).model]["depth"] - 2
    block = {again: found[again, 3] - found[again, 2] for again in (False, True)}
    plain, recompute = (found[again, 2] + more * block[again] for again in (False, True))
    return {"plain": plain, "recompute": recompute + block[False]}


def fixed(stage, recipe, model):
    """Bytes independent of the batch: {"weights", "gradients", "moments"}.

    Weights include the tokenizer in pre-training and the averaged weights in its training.
    """
    trained = 4 * sum(p.numel() for p in model.parameters())
    others = 4 * sum(buffer.numel() for buffer in model.buffers())
    if stage == "tokenizer":
        others += trained if settings(stage, recipe).ema else 0
    elif stage == "pretraining":
        others += 4 * sum(p.numel() for p in frozen_tokenizer(recipe).parameters())
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


def frozen(recipe):
    """Bytes for each image while pre-training's tokenizer runs, before any activation is kept.

    Most in the first group of its encoder: x and ReLU(x) in float32, and the second in bf16.
    """
    hidden = settings("tokenizer", recipe).hidden
    return (4 + 4 + 2) * hidden * settings("pretraining", recipe).token_size ** 2


def cost(stage, recipe):
    """What a step costs on GPUs.

    "flop", for one image, of which "tokenizer" is the frozen one's; "again": more with --recompute;
    "held": see `fixed`; "plain" and "recompute" (None for the tokenizer): see `activations`;
    "checkpoint": bytes of a file.
    """
    with torch.device("meta"):  # tensors with a shape only
        model = build(stage, recipe)
        flop, held = operations(stage, recipe, model), fixed(stage, recipe, model)
    kept = activations(stage, recipe)
    if stage == "pretraining":
        kept = {kind: (max(of_image, frozen(recipe)), rest)
                for kind, (of_image, rest) in kept.items()}  # fmt: skip
    averaged = held["gradients"] if getattr(settings(stage, recipe), "ema", 0) else 0
    return {
        "flop": flop["trained"] + flop["tokenizer"],
        "tokenizer": flop["tokenizer"],
        "again": flop["recompute"],
        "held": held,
        **kept,
        "checkpoint": held["gradients"] + held["moments"] + averaged,
    }
