"""Stage 2 (sections 2.3 to 2.5): masked image modeling, BEiT's pre-training.

    python pretrain.py --tokenizer runs/tokenizer/checkpoint.pt --out runs/beit
    python pretrain.py --eval --init runs/beit/checkpoint.pt --tokenizer ... --out runs/look
    torchrun --nproc_per_node=8 pretrain.py --recipe base --data IMAGENET --workers 8 \\
        --tokenizer runs/tokenizer/checkpoint.pt --out runs/beit          # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 pretrain.py ...

--batch-size is the global batch: processes x accumulation passes x images per pass.

An image has two views: patches x^p, some replaced by e_[M], and visual tokens z of the uncorrupted
image. The model is trained to predict the tokens at the masked positions M (eq. 1):

    max  sum_x E_M [ sum_(i in M) log p_MIM(z_i | x^M) ],   p_MIM = softmax(W_c h_i^L + b_c)

This is the second stage of the VAE view (section 2.4). The bound of eq. 2,

    log p(x | x~) >= E_(z ~ q_phi(z|x)) [ log p_psi(x|z) ] - KL[ q_phi(z|x), p_theta(z|x~) ],

becomes eq. 3: E_z[log p_psi(x|z)], stage 1, plus log p_theta(z^|x~), stage 2, with the likeliest
tokens z^. `evaluate` reports both in nats per image, the first at z^, the second over M only.

Each ablation of table 4 is a flag: --masking random, --target pixels, --recover all, and
--masking none together with --recover all.

OUT: checkpoint.pt, metrics.jsonl, predictions.png (original, masked input, the predicted tokens
decoded in the masked places), loss.svg.
"""

import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

import masking
from beit import STD, Beit, BeitConfig, init_weight, load_backbone, model_config, parameter_groups
from dvae import load_tokenizer
from images import batches, patches, sets, views
from plumbing import advice, checkpoints, command_line, log, memory, noise, pictures
from plumbing import processes, published, schedules, weights
from plumbing.run import Run, evaluate_only

RECIPES = {
    # name: (demo, fashion, photos, base, large, range, help). base, large: the paper's or released.
    "data": ("shapes", "fashion-mnist", "imagenette", None, None, "", "a data set (docs/data.md)"),
    "image_size": (24, 28, 112, 224, 224, "[1, 65536]", "pixels of the view cut into patches"),
    "token_size": (24, 28, 112, 112, 112, "[1, 65536]", "pixels of that crop for the tokenizer"),
    "normalise": (*("half",) * 3, *("imagenet",) * 2, "half|imagenet", "mean, std; or --init's"),
    "min_crop": (1.0, 1.0, 0.2, 0.08, 0.08, "(0, 1]", "least share of area in a crop; 1: a square"),
    "flip": (True, True, True, True, True, "", "mirror half of the images"),
    "jitter": (0.0, 0.0, 0.4, 0.4, 0.4, "[0, 1]", "vary brightness, contrast, saturation by this"),
    # masking and targets, which table 4's ablations change
    "masking": (*("blockwise",) * 5, "blockwise|printed|random|none", "printed: as in Algorithm 1"),
    "mask_ratio": (0.4, 0.4, *(75 / 196,) * 3, "(0, 1)", "largest share; printed: least, use 0.4"),
    "min_block": (4, 4, 16, 16, 16, "[1, 1e6]", "smallest block (blockwise, printed), in patches"),
    "target": (*("tokens",) * 5, "tokens|pixels|normalised-pixels", "z, or the patch's own pixels"),
    "recover": (*("masked",) * 5, "masked|all", "predict at masked positions only, or at all"),
    # backbone
    "model": ("tiny", "tiny", "tiny8", "base", "large", "", "size: see MODELS in beit.py"),
    "positions": (*("absolute",) * 3, *("shared",) * 2, "absolute|relative|shared", "E_pos, bias"),
    "drop_path": (0.0, 0.0, 0.0, 0.1, 0.1, "[0, 1)", "stochastic depth"),
    # optimisation
    "epochs": (16.0, 4.4, 36.0, 800.0, 800.0, "(0, 1e6]", "passes over the training images"),
    "warmup_epochs": (1.0, 0.3, 1.0, 10.0, 10.0, "[0, 1e6]", "epochs of linear warm-up"),
    "batch_size": (128, 128, 32, 2048, 2048, "[1, 1e6]", "global batch; scale lr with it"),
    "lr": (2e-3, 2e-3, 1e-3, 1.5e-3, 1.5e-3, "[0, 100]", "peak learning rate; cosine to min_lr"),
    "min_lr": (1e-5, 1e-5, 1e-5, 1e-5, 1e-5, "[0, 100]", "final learning rate"),
    "beta2": (0.98, 0.98, 0.98, 0.999, 0.999, "[0, 1)", "AdamW's second beta; the first is 0.9"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, 0.05, "[0, 100]", "AdamW weight decay"),
    "clip": (3.0, 3.0, 3.0, 3.0, 1.0, "[0, 1e9]", "largest norm of the gradient; 0: no clipping"),
    "eval_images": (1000, 5000, 4000, 5000, 5000, "[1, 1e9]", "limit on evaluation images"),
    "save_every": (1000, 500, 2000, 2500, 2500, "[1, 1e9]", "steps between evaluations, saves"),
}  # fmt: skip

KIND = "pretraining"  # of its checkpoints


class BeitForMaskedImageModeling(Beit):
    """The backbone with e_[M], a final LayerNorm (as released) and the head W_c, b_c of p_MIM.

    n_out: |V| for logits, or the 3 P² pixel values of a patch.
    """

    def __init__(self, config, n_out):
        super().__init__(config, mask_embedding=True)
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.lm_head = nn.Linear(config.dim, n_out)  # W_c, b_c
        init_weight(self.lm_head.weight, cut=STD)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, x, mask, positions=None, u=None):
        """Logits W_c LN(h_i^L) + b_c: (B, 3, H, W), mask (B, N) -> (n, n_out).

        positions: indices (image, i), int64 (n,) each; None: all masked positions, row by row.
        u: for stochastic depth, see Beit.forward.
        """
        if positions is None:
            positions = mask.nonzero(as_tuple=True)
        h = self.forward_at(x, mask, positions, u)  # h_i^L: (n, D)
        return self.lm_head(self.norm(h))


# -------------------------------------------------------- what to predict, and the loss


def recovery_targets(target, x, token_view, tokenizer, patch):
    """The target at each position of the uncorrupted image: z of eq. 1, int64 (B, N).

    token_view: what the tokenizer sees. Table 4, "- visual tokens": the patches of x, as the model
    sees them, float (B, N, 3P²); normalised-pixels: each by its own mean and deviation.
    """
    if target == "tokens":
        return tokenizer.tokens(token_view).flatten(1)
    x_p = patches.to_patches(x, patch)  # (B, N, 3P²)
    return F.layer_norm(x_p, x_p.shape[-1:], eps=1e-6) if target == "normalised-pixels" else x_p


def recovery_loss(prediction, target):
    """-log p_MIM(z_i | x^M) of each position in nats; for pixels their mean squared error.

    prediction (n, |V|) and target z int64 (n,), or both (n, 3P²) -> (n,) in float32.
    """
    prediction = prediction.float()
    if target.is_floating_point():
        return (prediction - target).pow(2).mean(-1)
    return F.cross_entropy(prediction, target, reduction="none")


def positions_to_predict(recover, mask):
    """Bool (B, N): M, or with "recover 100 %" every position."""
    return torch.ones_like(mask) if recover == "all" else mask


def fixed_count(to_predict, count):
    """Indices (image, i), int64 (count,) each: the True of bool (B, N) row by row, then others.

    Masks differ in size. With the same `count` at every step, which must be large enough for all,
    torch.compile compiles once, and the allocator can reuse memory.
    """
    order = to_predict.logical_not().flatten().to(torch.uint8).argsort(stable=True)[:count]
    return order // to_predict.shape[1], order % to_predict.shape[1]  # no wait for a GPU


class MaskedViews(views.Crops):
    """Batches of two views of one crop and masks (B, h, w). Raises ValueError on bad settings."""

    def __init__(self, args, source, sizes, grid, train):
        crop = (args.min_crop, args.flip, args.jitter) if train else ()
        super().__init__(source, sizes, train, args.seed, *crop)
        self.masking, self.mask_shape = args.masking, (grid, args.mask_ratio, args.min_block)
        drawn = [self.mask(key).any() for key in range(20)]  # raises for bad settings
        if args.masking == "blockwise" and sum(drawn) < 10:
            place = f"hardly ever fits {grid}x{grid} patches: choose a smaller one"
            raise ValueError(f"min block {args.min_block} {place}")
        # The largest number of positions to predict in an image.
        most = masking.most_masked(args.masking, *self.mask_shape)
        self.most_positions = grid**2 if args.recover == "all" else most

    def mask(self, *key):
        """The mask that belongs to a key: bool (h, w)."""
        return masking.make_mask(self.masking, noise.sample_rng(*key), *self.mask_shape)

    def __getitem__(self, keys):
        masks = [torch.from_numpy(self.mask(self.seed, *key, "mask")) for key in keys]
        return [*super().__getitem__(keys), torch.stack(masks)]


def two_views(batch, device, normalise):
    """A loaded batch -> (x standardised, the tokenizer's view in [0, 1], mask (B, N))."""
    view, *second, mask = batch
    (token_view,) = second or [view]  # without a tokenizer there is one view
    x = batches.standardise(batches.to_float(view, device), normalise)
    return x, batches.to_float(token_view, device), mask.to(device, non_blocking=True).flatten(1)


# -------------------------------------------------------- evaluation and pictures


@torch.no_grad()
def evaluate(model, tokenizer, held_out, args, process):
    """Loss, accuracy and the two terms of eq. 3 on held-out images with fixed masks.

    mim_loss: nats per predicted token, the masked ones (--recover all: every one). mim_accuracy:
    share of them whose likeliest prediction is right. commonest_token: the accuracy of always
    predicting the commonest token. token_entropy: the loss of always predicting the tokens' shares,
    in nats. Per image: stage1_nats, log p_psi(x|z^) of all pixels; stage2_nats, log p_theta(z^|x~)
    of the predicted tokens only. For pixels only mim_loss, a mean squared error.
    """
    model.eval()
    device, grid, patch = process.device, model.config.grid, model.config.patch_size
    double = {"dtype": torch.float64, "device": device}
    counts = torch.zeros(tokenizer.config.vocab_size if tokenizer else 1, **double)
    sums = torch.zeros(5, **double)  # tokens, loss, images, right, log p
    for batch in batches.eval_batches(held_out, args, process):
        x, token_view, mask = two_views(batch, device, args.normalise)
        to_predict = positions_to_predict(args.recover, mask)
        with process.autocast():
            target = recovery_targets(args.target, x, token_view, tokenizer, patch)
            prediction = model(x, mask, to_predict.nonzero(as_tuple=True))
        sums[0] += to_predict.sum()
        sums[1] += recovery_loss(prediction, target[to_predict]).sum()
        sums[2] += len(x)
        if tokenizer:
            counts += torch.bincount(target[to_predict], minlength=len(counts))
            sums[3] += (prediction.argmax(-1) == target[to_predict]).sum()
            with process.autocast():  # eq. 3's first term; the second is -loss
                parameters = tokenizer.decode_parameters(target.unflatten(1, (grid, grid)))
            sums[4] -= tokenizer.negative_log_likelihood(token_view, *parameters).sum()
    model.train()
    counts = processes.all_sum(counts)
    tokens, loss, images, right, log_p = processes.all_sum(sums).tolist()
    tokens = max(tokens, 1)
    result = {"mim_loss": loss / tokens}
    if tokenizer:
        share = counts / tokens
        result |= {"mim_accuracy": right / tokens, "commonest_token": share.max().item()}
        result |= {"token_entropy": -torch.xlogy(share, share).sum().item()}
        result |= {"stage1_nats": log_p / images, "stage2_nats": -loss / images}
    return result


def recovered_image(args, prediction, mask, x, token_view, tokenizer, patch):
    """`token_view` with predictions in the masked patches: (B, N, n_out) -> (B, 3, H, W)."""
    if tokenizer:
        z = tokenizer.tokens(token_view)  # (B, h, w)
        z = torch.where(mask, prediction.argmax(-1), z.flatten(1)).view_as(z)
        guess = tokenizer.decode(z)
    else:
        if args.target == "normalised-pixels":  # use the true patch's mean and deviation
            truth = patches.to_patches(x, patch)
            deviation = truth.std(-1, correction=0, keepdim=True)
            prediction = prediction * deviation + truth.mean(-1, keepdim=True)
        guess = batches.unstandardise(patches.to_image(prediction, patch), args.normalise)
    return torch.where(patches.pixel_mask(mask, token_view), guess, token_view)


@torch.no_grad()
def draw_pictures(model, tokenizer, held_out, args, process, out):
    """predictions.png: original, masked input, predictions in the masked places."""
    x, token_view, mask = two_views(held_out.pictures(12), process.device, args.normalise)
    model.eval()
    every = torch.ones_like(mask)
    prediction = model(x, mask, every.nonzero(as_tuple=True)).unflatten(0, mask.shape)
    grey = torch.full_like(token_view, 0.5)
    masked = torch.where(patches.pixel_mask(mask, token_view), grey, token_view)
    shown = every if args.masking == "none" else mask
    patch = model.config.patch_size
    recovered = recovered_image(args, prediction, shown, x, token_view, tokenizer, patch)
    pictures.picture(out / "predictions.png", [token_view, masked, recovered])
    model.train()


# -------------------------------------------------------- set-up and the loop


def build(args, tokenizer, predicts):
    """The model of the recipe, with the weights of --init if there are any.

    predicts: what its head predicts, a digest of the tokenizer or the name of the pixel target.
    Sets args.normalise. Raises ValueError if a size, the memory or a head to --eval does not fit.
    """
    init, changes = None, {"image_size": args.image_size, "drop_path": args.drop_path}
    if args.init:
        path, kinds = checkpoints.start_of(args), (KIND, "classification", "segmentation")
        init = published.load_pretrained(path, *kinds, normalise=args.normalise or "auto")
        args.normalise = init["normalise"]
        published.note_size(init, args.image_size)
        config = replace(BeitConfig(**init["config"]), **changes)
    else:
        if args.layer_scale is not None:
            changes["layer_scale"] = args.layer_scale
        config = model_config(args.model, positions=args.positions, **changes)
    memory.check(args, config)
    n_out = tokenizer.config.vocab_size if tokenizer else 3 * config.patch_size**2
    factor = tokenizer.config.downsampling if tokenizer else 0
    if tokenizer and args.token_size != config.grid * factor:
        raise ValueError(
            f"the tokenizer makes {args.token_size / factor:g} tokens along {args.token_size} "
            f"pixels but there are {config.grid} patches: set --token-size {config.grid * factor}"
        )
    model = BeitForMaskedImageModeling(config, n_out)
    if init:
        keep = kept_parts(args, init, model, predicts)
        if args.eval and keep != ["mask_token", "lm_head."]:
            lacks = "lacks e_[M], or a head for this target or this tokenizer"
            raise ValueError(f"--eval: {args.init} {lacks}")
        load_backbone(model, init["model"], keep)
        names = {"mask_token": "e_[M]", "lm_head.": "head"}
        kept = ", ".join(["backbone", *(names[part] for part in keep)])
        new = ", ".join(name for part, name in names.items() if part not in keep)
        log.note(f"--init {args.init}: kept its {kept}{f'; new: {new}' if new else ''}")
    return model


def kept_parts(args, init, model, predicts):
    """The parts of --init beside its backbone to keep: e_[M], and the head if it predicts the same.

    Published models predict the tokens of DALL-E's tokenizer. Returns prefixes of parameter names.
    """
    state = init["model"]
    keep = ["mask_token"] if "mask_token" in state else []
    if "arguments" in init:  # a checkpoint of these scripts
        same = init.get("predicts") == predicts
    else:
        same = str(args.tokenizer).startswith("dalle:")
    head = state.get("lm_head.weight", torch.empty(0))
    if same and head.shape == model.lm_head.weight.shape:
        keep.append("lm_head.")
    return keep


def dataset(args, split, grid, train):
    """A split's two views and masks: bicubic for the patches, Lanczos for the tokenizer."""
    sizes = [(args.image_size, "bicubic")]
    if args.target == "tokens":
        sizes.append((args.token_size, "lanczos"))
    source = sets.open_source(args.data, split, args.data_dir)
    return MaskedViews(args, source, sizes, grid, train)


def main(argv=None):
    parser = command_line.recipe_parser(__doc__, RECIPES)
    tokenizers = "checkpoint.pt of train_tokenizer.py, or dalle:FOLDER; needed for --target tokens"
    parser.add_argument("--tokenizer", type=command_line.text, help=tokenizers)
    layer_scale = "initial value of LayerScale; 0: none; default: that of --model"
    command_line.add_number(parser, "--layer-scale", float, "[0, 100]", layer_scale)
    command_line.add_look_flags(parser, "a checkpoint.pt, or published BEiT weights", True)
    args = command_line.parse_recipe(parser, RECIPES, argv)
    process = processes.setup(args.device, args.amp, args.compile)
    tokenizer = load_tokenizer(args.tokenizer).to(process.device) if args.tokenizer else None
    predicts = weights.digest(tokenizer.state_dict()) if tokenizer else args.target
    torch.manual_seed(args.seed)
    model = build(args, tokenizer, predicts).to(process.device)
    model.recompute = args.recompute
    held_out = dataset(args, args.eval_split, model.config.grid, False)
    measure = functools.partial(evaluate, model, tokenizer, held_out, args, process)
    draw = functools.partial(draw_pictures, model, tokenizer, held_out, args, process)
    if args.eval:
        return evaluate_only(args, process, held_out, measure, draw)
    train_set = dataset(args, "train", model.config.grid, True)
    per_epoch = batches.steps_per_epoch(len(train_set), args.batch_size)
    steps, warmup = schedules.step_counts(args, per_epoch)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    extra = {"normalise": args.normalise, "predicts": predicts}
    run = Run(args, KIND, process, model, optimizer, steps, extra, train_set, held_out)
    run.clock.watch(run.model, optimizer, tokenizer.encoder.blocks.input if tokenizer else None)
    loss_of = processes.compiled(recovery_loss, process.device) if args.compile else recovery_loss
    scaler, patch = process.scaler, model.config.patch_size
    loader = batches.train_batches(train_set, run)
    for step, batch in run.steps(loader, measure, draw, advice.masked_tokens):
        lr = schedules.warmup_cosine(step, steps, warmup, args.lr, args.min_lr)
        schedules.set_lr(optimizer, lr)
        x, token_view, mask = two_views(batch, process.device, args.normalise)
        to_predict = positions_to_predict(args.recover, mask)  # (B, N): i in M
        u = noise.depth_noise(model.config, len(x), args.seed, step, process)
        # Masks differ in size: eq. 1's sum over all masked tokens of the global batch is divided
        # by their count, and multiplied by `world` because DDP averages over processes.
        count = run.all_sum(to_predict.sum()).clamp_min(1) / process.world
        total = 0.0
        for x, token_view, mask, to_predict, u in run.passes(x, token_view, mask, to_predict, u):
            with process.autocast():
                z = recovery_targets(args.target, x, token_view, tokenizer, patch)  # (B, N)
                positions = fixed_count(to_predict, len(x) * train_set.most_positions)
                logits = run.model(x, mask, positions, u)  # (n, |V|): M, and others to ignore
            loss = (loss_of(logits, z[positions]) * to_predict[positions]).sum() / count  # eq. 1
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        if run.allows(step, norm, lr):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.report(total, lr=lr, gradient_norm=norm)
    run.finish(measure, draw)


if __name__ == "__main__":
    with command_line.one_line_errors(stoppable=True):
        main()
