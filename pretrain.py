"""Stage 2 (sections 2.3 to 2.5): masked image modeling, BEiT's pre-training.

    python pretrain.py --tokenizer runs/tokenizer/checkpoint.pt --out runs/beit          # drawn shapes, on a CPU
    torchrun --nproc_per_node=8 pretrain.py --recipe base --data IMAGENET --tokenizer runs/tokenizer/checkpoint.pt \\
        --out runs/beit --workers 8                                                      # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 pretrain.py ...    # on each node

--batch-size is the global batch: processes x accumulation passes x images per pass.

An image has two views: patches x^p, some replaced by e_[M], and visual tokens z of the uncorrupted image.
The model is trained to tell the tokens at the masked positions M (eq. 1):

    max  sum_x E_M [ sum_(i in M) log p_MIM(z_i | x^M) ],   p_MIM = softmax(W_c h_i^L + b_c)

That is the second stage of the VAE view (section 2.4). The bound of eq. 2,

    log p(x | x~) >= E_(z ~ q_phi(z|x)) [ log p_psi(x|z) ] - KL[ q_phi(z|x), p_theta(z|x~) ],

becomes eq. 3 with the likeliest tokens z^ in place of the expectation: log p_psi(x|z^) + log p_theta(z^|x~).
`evaluate` reports its two terms in nats per image.

Table 4's ablations are flags, one each: --masking random, --target pixels, --recover all, --masking none with it.

OUT: checkpoint.pt, metrics.jsonl, predictions.png (original, masked input, the dVAE's decoding of the predicted
tokens in the masked places), loss.png.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import data
import masking
import training
from beit import RECOMPUTE, STD, Beit, init_weight, model_config, parameter_groups
from dvae import load_tokenizer

RECIPES = {
    # name: (demo, fashion, base, large, help). base and large are the paper's appendix, for ImageNet-1K.
    "data": ("shapes", "fashion-mnist", None, None, "data set: a name or a path, see data.py"),
    "image_size": (24, 28, 224, 224, "pixels of the view that is cut into patches"),
    "token_size": (24, 28, 112, 112, "pixels of the same crop as the tokenizer sees it: as many tokens as patches"),
    "normalise": ("half", "half", "imagenet", "imagenet", "mean and std of the pixels: half (0.5) or imagenet"),
    "min_crop": (1.0, 1.0, 0.08, 0.08, "smallest share of the area that a random crop keeps; 1: no crop"),
    "flip": (True, True, True, True, "mirror half of the images"),
    "jitter": (0.0, 0.0, 0.4, 0.4, "brightness, contrast and saturation vary by this share"),
    # what is masked, and what is to be recovered (other values: table 4)
    "masking": ("blockwise", "blockwise", "blockwise", "blockwise", "blockwise, printed (Algorithm 1), random or none"),
    "mask_ratio": (0.4, 0.4, 75 / 196, 75 / 196, "share of the patches to mask, at most: 75 of 196 in the paper"),
    "min_block": (4, 4, 16, 16, "smallest block, in patches"),
    "target": ("tokens", "tokens", "tokens", "tokens", "tokens z, or the patch's own: pixels, normalised-pixels"),
    "recover": ("masked", "masked", "masked", "masked", "positions to recover: masked, or all (100 %)"),
    # backbone
    "model": ("tiny", "tiny", "base", "large", "size of the backbone, see MODELS in beit.py"),
    "positions": ("absolute", "absolute", "shared", "shared", "absolute: E_pos; shared or relative: bias tables"),
    "drop_path": (0.0, 0.0, 0.1, 0.1, "stochastic depth"),
    # optimisation
    "epochs": (16.0, 4.4, 800.0, 800.0, "passes over the images"),
    "warmup_epochs": (1.0, 0.3, 10.0, 10.0, "of linear warm-up"),
    "batch_size": (128, 128, 2048, 2048, "images per step, all processes together; scale lr with it"),
    "lr": (2e-3, 2e-3, 1.5e-3, 1.5e-3, "peak learning rate; cosine to min_lr"),
    "min_lr": (1e-5, 1e-5, 1e-5, 1e-5, "final learning rate"),
    "beta2": (0.98, 0.98, 0.999, 0.999, "AdamW's second beta; the first is 0.9"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, "AdamW weight decay"),
    "clip": (3.0, 3.0, 3.0, 1.0, "largest norm of the gradient; 0: no clipping"),
    "eval_images": (1000, 5000, 5000, 5000, "held-out images to evaluate on, at most"),
    "save_every": (500, 500, 2500, 2500, "steps between evaluations and checkpoints"),
}

KIND = "pretraining"  # of its checkpoints
TARGETS, RECOVER = ("tokens", "pixels", "normalised-pixels"), ("masked", "all")


class BeitForMaskedImageModeling(Beit):
    """The backbone with e_[M] and the head W_c, b_c of p_MIM: n_out = |V| logits, or a patch's 3 P² pixel values."""

    def __init__(self, config, n_out):
        super().__init__(config, mask_embedding=True)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.lm_head = nn.Linear(config.dim, n_out)  # W_c, b_c
        init_weight(self.lm_head.weight, cut=STD)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, x, mask, where=None, u=None):
        """Logits at the masked positions only, in the mask's row-major order: (B, 3, H, W), (B, N) -> (|M|, n_out).

        where: indices (image, i), int64 (n,) each, of positions to predict in place of the masked ones: (n, n_out).
        u: stochastic depth's, see Beit.forward.
        """
        image, i = mask.nonzero(as_tuple=True) if where is None else where
        h = super().forward(x, mask, u, (image, i + 1))  # h_i^L, i in M, after e_[S]: (|M|, D)
        return self.lm_head(self.norm(h))


def recovery_targets(kind, x, pixels, tokenizer, patch):
    """What each position is to recover, of the uncorrupted image: z of eq. 1, int64 (B, N).

    Table 4, "- visual tokens": the pixels of its own patch, as the model sees them (normalised-pixels: standardised
    by the patch's own mean and deviation, so that contrast is all that counts), float (B, N, 3P²).
    """
    if kind == "tokens":
        return tokenizer.tokens(pixels).flatten(1)
    patches = F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)  # (B, N, 3P²)
    return F.layer_norm(patches, patches.shape[-1:], eps=1e-6) if kind == "normalised-pixels" else patches


def recovery_loss(prediction, target):
    """Of each position: -log p_MIM(z_i | x^M) in nats; for pixels the mean squared error over a patch's values.

    prediction (n, |V|) and target z int64 (n,), or both (n, 3P²) -> (n,) in float32.
    """
    prediction = prediction.float()
    if target.is_floating_point():
        return (prediction - target).pow(2).mean(-1)
    return F.cross_entropy(prediction, target, reduction="none")


def recovered_positions(recover, mask):
    """Bool (B, N): M, or with "recover 100 %" every position."""
    return torch.ones_like(mask) if recover == "all" else mask


def filled_positions(where, count):
    """Indices (image, i), int64 (count,) each, of True in bool (B, N) row by row, at most `count`, and then of others.

    Masks differ in size. With `count` positions at every step torch.compile makes one program for all of them, and the
    allocator gives the next step the memory of the last.
    """
    order = where.logical_not().flatten().to(torch.uint8).argsort(stable=True)[:count]
    return order // where.shape[1], order % where.shape[1]


class MaskedViews(data.Crops):
    """The two views of data.Crops, and a mask (B, h, w) for each image."""

    def __init__(self, args, source, views, grid, train):
        crop = (args.min_crop, args.flip, args.jitter) if train else ()
        super().__init__(source, views, train, args.seed, *crop)
        if args.masking == "none" and args.recover != "all":
            raise ValueError("--masking none leaves nothing to recover: add --recover all")
        self.how = args.masking, grid, args.mask_ratio, args.min_block
        may_be_all = args.recover == "all" or args.masking == "printed"  # which may overshoot
        # positions to recover in an image, at most
        self.most_positions = grid**2 if may_be_all else masking.target(grid, grid, args.mask_ratio)
        masking.make_mask(self.how[0], data.sample_rng(0), *self.how[1:])  # bad settings are found before training

    def __getitems__(self, keys):
        kind, *how = self.how
        masks = [masking.make_mask(kind, data.sample_rng(self.seed, *key, "mask"), *how) for key in keys]
        return [*super().__getitems__(keys), torch.stack([torch.from_numpy(m) for m in masks])]


def two_views(batch, device, statistics):
    """A loaded batch -> (patch view x normalised, tokenizer's view in [0, 1], mask (B, N)), on the device."""
    patches, *token_view, mask = batch
    (pixels,) = token_view or [patches]  # without a tokenizer there is one view
    x = data.normalise(data.to_float(patches, device), statistics)
    return x, data.to_float(pixels, device), mask.to(device, non_blocking=True).flatten(1)


@torch.no_grad()
def evaluate(model, tokenizer, held_out, args, device, rank, world, autocast):
    """Loss and accuracy of what is to be recovered, and the two terms of eq. 3, on held-out images with fixed masks.

    mim_loss: nats per token to recover, the masked ones (or, --recover all, every one). mim_accuracy: share of them
    whose likeliest prediction is right. commonest_token: accuracy of always saying the commonest. stage1_nats:
    log p_psi(x|z^); stage2_nats: log p_theta(z^|x~) of the tokens to recover; both per image. Pixels have mim_loss
    alone, a mean squared error.
    """
    model.eval()
    grid, batch_size = model.config.grid, max(1, args.batch_size // world // args.accumulate)
    counts = torch.zeros(tokenizer.config.vocab_size if tokenizer else 1, dtype=torch.float64, device=device)
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # positions, loss, images, right, log p_psi
    for batch in data.eval_batches(held_out, batch_size, args.eval_images, rank, world, args.workers):
        x, pixels, mask = two_views(batch, device, args.normalise)
        where = recovered_positions(args.recover, mask)
        with autocast():
            target = recovery_targets(args.target, x, pixels, tokenizer, model.config.patch_size)
            prediction = model(x, mask, where.nonzero(as_tuple=True))
        sums[0] += where.sum()
        sums[1] += recovery_loss(prediction, target[where]).sum()
        sums[2] += len(x)
        if tokenizer:
            counts += torch.bincount(target[where], minlength=len(counts))
            sums[3] += (prediction.argmax(-1) == target[where]).sum()
            # Eq. 3's first term; its second is the sum of log p_MIM over them, -loss.
            with autocast():
                parameters = tokenizer.decode_parameters(target.unflatten(1, (grid, grid)))
            sums[4] -= tokenizer.negative_log_likelihood(pixels, *parameters).sum()
    model.train()
    training.all_sum(counts)
    positions, loss, images, right, log_p = training.all_sum(sums).tolist()
    positions = max(positions, 1)
    result = {"mim_loss": loss / positions}
    if tokenizer:
        result |= {"mim_accuracy": right / positions, "commonest_token": counts.max().item() / positions}
        result |= {"stage1_nats": log_p / images, "stage2_nats": -loss / images}
    return result


def recovered_image(args, prediction, mask, x, pixels, tokenizer, patch):
    """`pixels` with the masked patches as predicted: prediction (B, N, n_out) -> (B, 3, H, W)."""
    h = w = math.isqrt(mask.shape[1])
    if tokenizer:
        z = torch.where(mask, prediction.argmax(-1), tokenizer.tokens(pixels).flatten(1))
        guess = tokenizer.decode(z.unflatten(1, (h, w)))
    else:
        if args.target == "normalised-pixels":  # what it leaves out, brightness and contrast, is lent by the truth
            truth = recovery_targets("pixels", x, pixels, tokenizer, patch)
            prediction = prediction * truth.std(-1, correction=0, keepdim=True) + truth.mean(-1, keepdim=True)
        patches = prediction.transpose(1, 2).unflatten(2, (h, w))  # (B, 3P², h, w)
        guess = data.denormalise(F.pixel_shuffle(patches, patch), args.normalise)
    return torch.where(pixel_mask(mask, pixels), guess, pixels)


def pixel_mask(mask, pixels):
    """A mask of patches, bool (B, N), as one of pixels: (B, 1, H, W)."""
    h = w = math.isqrt(mask.shape[1])
    return F.interpolate(mask.view(-1, 1, h, w).float(), size=pixels.shape[-2:], mode="nearest").bool()


@torch.no_grad()
def draw_pictures(out, model, tokenizer, held_out, args, device):
    """predictions.png: original, masked input, predictions in the masked places; loss.png."""
    batch = held_out.__getitems__([(-1, i) for i in range(min(12, len(held_out)))])
    x, pixels, mask = two_views(batch, device, args.normalise)
    model.eval()
    every = torch.ones_like(mask).nonzero(as_tuple=True)
    prediction = model(x, mask, every).unflatten(0, mask.shape)  # (B, N, n_out)
    masked = torch.where(pixel_mask(mask, pixels), torch.tensor(0.5, device=device), pixels)
    where = mask if args.masking != "none" else torch.ones_like(mask)
    recovered = recovered_image(args, prediction, where, x, pixels, tokenizer, model.config.patch_size)
    training.picture(out / "predictions.png", [pixels, masked, recovered])
    training.curve(out / "loss.png", [m["loss"] for m in training.read_metrics(out) if "loss" in m])


def build(args, tokenizer):
    """The model of the recipe. Raises ValueError on unknown names, and unless there is one token for each patch."""
    for name, known in (("target", TARGETS), ("recover", RECOVER), ("normalise", data.STATISTICS)):
        if getattr(args, name) not in known:
            raise ValueError(f"--{name} {getattr(args, name)!r} is none of {', '.join(known)}")
    config = model_config(
        args.model, image_size=args.image_size, positions=args.positions, drop_path=args.drop_path
    )
    if not tokenizer:
        return BeitForMaskedImageModeling(config, 3 * config.patch_size**2)
    tokens, rest = divmod(args.token_size, tokenizer.config.downsampling)
    if rest or tokens != config.grid:
        raise ValueError(
            f"the tokenizer makes {args.token_size / tokenizer.config.downsampling:g} tokens along "
            f"{args.token_size} pixels but there are {config.grid} patches: "
            f"set --token-size {config.grid * tokenizer.config.downsampling}"
        )
    return BeitForMaskedImageModeling(config, tokenizer.config.vocab_size)


def datasets(args, grid):
    """(training set, held-out set) of two views and a mask: bicubic for the patches, Lanczos for the tokenizer."""
    views = [(args.image_size, "bicubic"), (args.token_size, "lanczos")][: 2 if args.target == "tokens" else 1]
    train_source = data.open_source(args.data, "train", args.data_dir)
    held_out_source = data.open_source(args.data, args.eval_split, args.data_dir)
    return MaskedViews(args, train_source, views, grid, True), MaskedViews(args, held_out_source, views, grid, False)


def main(argv=None):
    parser = training.recipe_parser(__doc__, RECIPES)
    parser.add_argument("--tokenizer", help="checkpoint.pt of train_tokenizer.py, or dalle:FOLDER; not with pixels")
    parser.add_argument("--recompute", action="store_true", help=RECOMPUTE)
    args = training.parse_recipe(parser, RECIPES, argv)
    if args.target in TARGETS and (args.tokenizer is None) == (args.target == "tokens"):
        parser.error(f"--target {args.target} {'needs' if args.tokenizer is None else 'has no use for'} --tokenizer")
    device, rank, world = training.setup(args.device)
    batch_size = training.rank_batch(args.batch_size, args.accumulate, world)
    autocast, scaler = training.precision(args.amp, device)
    tokenizer = load_tokenizer(args.tokenizer).to(device) if args.tokenizer else None
    torch.manual_seed(args.seed)
    model = build(args, tokenizer).to(device)
    model.recompute = args.recompute
    train_set, held_out = datasets(args, model.config.grid)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    out = training.open_output(args, rank)
    step = training.resume_checkpoint(out, KIND, args, model, optimizer, scaler)["step"] if args.resume else 0
    steps, warmup = training.duration(args, data.steps_per_epoch(len(train_set), args.batch_size))

    def save(step):
        if rank == 0:
            training.save_checkpoint(out, KIND, args, step, model, optimizer, scaler, normalise=args.normalise)

    if not args.resume:
        save(0)  # a folder that cannot be written to fails now
    train_model, finite = training.wrap(model, device, args.compile), training.FiniteSteps(out)
    loss_of = training.compiled(recovery_loss, device) if args.compile else recovery_loss
    clock = training.Clock(args.benchmark, device)
    log = training.Log(out, rank, steps, step)
    loader = data.train_batches(train_set, batch_size, rank, world, args.seed, step, steps, args.workers, device)
    for batch in clock.batches(loader):
        lr = training.warmup_cosine(step, steps, warmup, args.lr, args.min_lr)
        training.set_lr(optimizer, lr)
        x, pixels, mask = two_views(batch, device, args.normalise)
        where = recovered_positions(args.recover, mask)
        u = training.depth_noise(model.config, len(x), args.seed, step, rank, device)
        # Eq. 1 as a mean over all masked tokens of the global batch: masks differ in size, so the sum is divided
        # by the count over all processes and passes; times `world` because DDP averages over processes.
        count = training.all_sum(where.sum()).clamp_min(1) / world
        clock.mark("data")
        total = 0.0
        parts = [t.chunk(args.accumulate) for t in (x, pixels, mask, where, u)]
        for i, (x_i, pixels_i, mask_i, where_i, u_i) in enumerate(zip(*parts), start=1):
            with training.sync_only_if(train_model, i == args.accumulate):
                with autocast():
                    z_i = recovery_targets(args.target, x_i, pixels_i, tokenizer, model.config.patch_size)  # (B, N)
                    clock.mark("tokenizer")
                    at = filled_positions(where_i, len(x_i) * train_set.most_positions)
                    prediction = train_model(x_i, mask_i, at, u_i)  # (n, |V|): M, and others that do not count
                loss = (loss_of(prediction, z_i[at]) * where_i[at]).sum() / count
                clock.mark("forward")
                scaler.scale(loss).backward()
                clock.mark("backward")
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()
        if finite.allow(norm, step, lr):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        clock.mark("optimiser")
        step += 1
        if step % args.log_every == 0 or step == steps:
            loss = (training.all_sum(total) / world).item()
            trouble = train_set.trouble() | finite.trouble()
            log.step(step, args.batch_size, loss=loss, lr=lr, gradient_norm=norm, **trouble)
        training.save_or_stop(save, step, steps, args.save_every, device)
        if step % args.save_every == 0 and step < steps:
            log.write(step=step, **evaluate(model, tokenizer, held_out, args, device, rank, world, autocast))
    if args.benchmark:
        clock.report(args.batch_size, autocast, rank)
        return
    result = evaluate(model, tokenizer, held_out, args, device, rank, world, autocast)
    log.final(**result)
    if rank == 0:
        draw_pictures(out, model, tokenizer, held_out, args, device)


if __name__ == "__main__":
    with training.one_line_errors(stoppable=True):
        main()
