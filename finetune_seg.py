"""Semantic segmentation (section 2.6): BEiT encodes, several deconvolution layers decode.

    python finetune_seg.py --init runs/beit/checkpoint.pt --out runs/seg
    python finetune_seg.py --init runs/cls/checkpoint.pt --out runs/seg2  # intermediate fine-tuning
    python finetune_seg.py --eval --init runs/seg/checkpoint.pt           # evaluate only
    torchrun --nproc_per_node=8 finetune_seg.py --recipe base --data ADE20K --workers 8 \\
        --init runs/beit/checkpoint.pt --out runs/seg                     # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 finetune_seg.py ...

--batch-size is the global batch: processes x accumulation passes x images per pass.
OUT: checkpoint.pt, metrics.jsonl, segmentation.png (image, truth, prediction), loss.svg.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from beit import Beit, BeitConfig, finetuned_config, init_weight, load_backbone, parameter_groups
from images import batches, masked, sources
from plumbing import command_line, memory, noise, pictures, processes, published, schedules
from plumbing.run import Run, evaluate_only

RECIPES = {
    # name: (demo, fashion, photos, base, large, range, help). base: ADE20K; large: ours.
    "data": ("shapes", "fashion-scenes", None, None, None, "", "a set with masks (docs/data.md)"),
    "image_size": (24, 28, 112, 512, 512, "[1, 65536]", "pixels of crop and sliding window"),
    "train_images": (200, 200, 0, 0, 0, "[0, 1e9]", "train on this many drawn by the seed; 0: all"),
    "model": ("tiny", "tiny", "tiny8", "base", "large", "", "size for --init random: see MODELS"),
    "drop_path": (0.0, 0.0, 0.0, 0.1, 0.2, "[0, 1)", "stochastic depth"),
    "decoder_dim": (64, 64, 32, 256, 256, "[8, 65536]", "decoder channels, a multiple of 8"),
    # augmentation
    "min_scale": (1.0, 1.0, 1.0, 0.5, 0.5, "[0.01, 100]", "smallest factor to resize an image by"),
    "max_scale": (1.0, 1.0, 1.25, 2.0, 2.0, "[0.01, 100]", "largest factor; then comes the crop"),
    "short_side": (0, 0, 112, 512, 512, "[0, 65536]", "resize the short side first; 0: do not"),
    "long_side": (0, 0, 0, 2048, 2048, "[0, 65536]", "limit on the long side then; 0: none"),
    "flip": (True, True, True, True, True, "", "mirror half of the images"),
    "photometric": (False, False, True, True, True, "", "vary brightness, contrast, colours"),
    # optimisation
    "steps": (200, 300, 1000, 160_000, 160_000, "[1, 1e9]", "optimisation steps"),
    "warmup_steps": (20, 30, 100, 1500, 1500, "[0, 1e9]", "linear warm-up; then linear to 0"),
    "decay_from_start": (*(False,) * 3, *(True,) * 2, "", "decay from step 0, not after warm-up"),
    "batch_size": (16, 32, 16, 16, 16, "[1, 1e6]", "global batch; scale lr with it"),
    "lr": (1.6e-2, 8e-3, 1.6e-2, 1e-3, 1e-3, "[0, 100]", "peak learning rate of the decoder"),
    "layer_decay": (0.5, 0.5, 0.1, 0.65, 0.75, "(0, 1]", "lr factor per layer below the head"),
    "beta2": (0.98, 0.98, 0.98, 0.999, 0.999, "[0, 1)", "AdamW's second beta; the first is 0.9"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, 0.05, "[0, 100]", "AdamW weight decay"),
    "clip": (3.0, 3.0, 3.0, 0.0, 0.0, "[0, 1e9]", "largest norm of the gradient; 0: no clipping"),
    "eval_images": (500, 1000, 1000, 2000, 2000, "[1, 1e9]", "limit on evaluation images"),
    "save_every": (*(1000,) * 3, *(16_000,) * 2, "[1, 1e9]", "steps between evaluations, saves"),
}  # fmt: skip
KIND = "segmentation"  # of its checkpoints
SIZE_OF_INIT = ("demo", "fashion")  # recipes that take the image size of --init; the paper's is 512


def upsample(n_in, n_out):
    """One deconvolution layer, to twice the size.

    GroupNorm, so that an image's result does not depend on the rest of the batch.
    """
    layer = nn.ConvTranspose2d(n_in, n_out, kernel_size=4, stride=2, padding=1)
    return nn.Sequential(layer, nn.GroupNorm(8, n_out), nn.GELU())


class BeitForSegmentation(Beit):
    """Patch outputs h_i^L as a grid, log2(P) deconvolutions to full size, a linear classifier.

    Progressive upsampling by 2 as in SETR-PUP, but by learned deconvolutions; before it a LayerNorm
    as in pre-training. Raises ValueError if P is not a power of 2, or decoder_dim not one of 8.
    """

    def __init__(self, config, classes, decoder_dim):
        super().__init__(config)
        stages = int(math.log2(config.patch_size))
        if 2**stages != config.patch_size:
            raise ValueError(f"patch size {config.patch_size} is not a power of 2")
        if decoder_dim % 8:  # GroupNorm's groups
            raise ValueError(f"decoder dim {decoder_dim} is not a multiple of 8")
        self.classes, self.decoder_dim = classes, decoder_dim
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        widths = [config.dim] + [decoder_dim] * stages
        self.decoder = nn.Sequential(*(upsample(n, m) for n, m in zip(widths, widths[1:])))
        self.decoder.append(nn.Conv2d(widths[-1], classes, kernel_size=1))
        init_weight(self.decoder[-1].weight)

    def forward(self, x, u=None):
        """Logits of every pixel: (B, 3, H, W) -> (B, C, H, W). u: see Beit.forward."""
        h = self.norm(super().forward(x, u=u)[:, 1:])  # (B, N, D)
        side = self.config.grid
        return self.decoder(h.transpose(1, 2).unflatten(2, (side, side)))  # from (B, D, h, w)


def slide(model, x):
    """Logits for images of at least the crop's size, by the released code's sliding window.

    (B, 3, H, W) -> (B, C, H, W). Crop-sized windows have a stride of 2/3 of their size; where they
    overlap, logits are averaged. The last window of a row or column is moved back inside the image.
    """
    size = model.config.image_size
    H, W = x.shape[-2:]
    stride = max(1, size * 2 // 3)
    total = x.new_zeros(len(x), model.classes, H, W)
    visits = x.new_zeros(1, 1, H, W)
    for top in [*range(0, H - size, stride), H - size]:
        for left in [*range(0, W - size, stride), W - size]:
            window = slice(top, top + size), slice(left, left + size)
            total[:, :, *window] += model(x[:, :, *window]).float()
            visits[:, :, *window] += 1
    return total / visits


# -------------------------------------------------------- mean intersection over union


def confusion_matrix(truth, guess, classes):
    """Pixel counts (C, C): row = true class, column = predicted; IGNORE pixels do not count."""
    counted = truth != sources.IGNORE
    truth, guess = truth[counted].long(), guess[counted].long()
    return torch.bincount(truth * classes + guess, minlength=classes**2).view(classes, classes)


def class_iou(matrix):
    """Intersection over union of each class in percent, (C,), from a confusion matrix (C, C).

    NaN for a class that occurs in neither truth nor prediction.
    """
    hit = matrix.double().diagonal()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_iou(matrix):
    """(mIoU over the classes that occur, pixel accuracy) in percent, from a confusion matrix."""
    right = matrix.diagonal().sum() / matrix.sum()
    return class_iou(matrix).nanmean().item(), 100 * right.item()


@torch.no_grad()
def evaluate(model, held_out, args, normalise, process):
    """miou, pixel_accuracy, iou of each class in percent, on masks resized like their images."""
    model.eval()
    device = process.device
    matrix = torch.zeros(model.classes, model.classes, dtype=torch.int64, device=device)
    for images, masks in batches.eval_batches(held_out, args, process):
        x = batches.standardise(batches.to_float(images, device), normalise)
        with process.autocast():
            guess = slide(model, x).argmax(1)  # (B, H, W)
        matrix += confusion_matrix(masks.to(device), guess, model.classes)
    matrix = processes.all_sum(matrix)
    miou, pixel_accuracy = mean_iou(matrix)
    model.train()
    each = zip(held_out.source.mask_classes, class_iou(matrix).tolist())
    iou = {name: round(value, 2) for name, value in each if not math.isnan(value)}
    return {"miou": miou, "pixel_accuracy": pixel_accuracy, "iou": iou}


@torch.no_grad()
def draw_pictures(model, held_out, normalise, process, out):
    """segmentation.png: image, truth, prediction of twelve held-out images' centre crops."""
    images, masks = held_out.pictures(12)
    x = batches.to_float(images, process.device)
    model.eval()
    guess = model(batches.standardise(x, normalise)).argmax(1)
    rows = [x, masked.colours(masks.to(process.device)), masked.colours(guess)]
    pictures.picture(out / "segmentation.png", rows)
    model.train()


# -------------------------------------------------------- set-up and the loop


def prepare(args):
    """(model, training set, held-out set, normalise, class names) to fine-tune --init."""
    init, normalise = published.load_init(args, "pretraining", "classification", KIND)
    args.image_size = args.image_size or init["config"]["image_size"]
    train_set, held_out, classes = masked.open_sets(args, normalise)
    config = finetuned_config(init, args.model, args.image_size, args.drop_path)
    memory.check(args, config)
    torch.manual_seed(args.seed)
    model = BeitForSegmentation(config, len(classes), args.decoder_dim)
    if init:  # a segmenter of the same classes keeps its decoder
        known = init.get("classes"), init.get("decoder_dim")
        same = init["kind"] == KIND and known == (classes, args.decoder_dim)
        load_backbone(model, init["model"], ("decoder.",) if same else ())
    return model, train_set, held_out, normalise, classes


def prepare_evaluation(args):
    """(model, held-out set, normalise) of the segmenter --init, for --eval."""
    init, normalise = published.load_init(args, KIND)
    classes = init["classes"]
    model = BeitForSegmentation(BeitConfig(**init["config"]), len(classes), init["decoder_dim"])
    model.load_state_dict(init["model"])
    args.image_size = model.config.image_size
    return model, masked.open_held_out(args, normalise, classes), normalise


def main(argv=None):
    parser = command_line.recipe_parser(__doc__, RECIPES)
    command_line.add_init_flags(parser)
    args = command_line.parse_recipe(parser, RECIPES, argv, SIZE_OF_INIT)
    process = processes.setup(args.device, args.amp, args.compile)
    if args.eval:
        model, held_out, normalise = prepare_evaluation(args)
    else:
        model, train_set, held_out, normalise, classes = prepare(args)
    model.to(process.device).recompute = args.recompute
    measure = functools.partial(evaluate, model, held_out, args, normalise, process)
    draw = functools.partial(draw_pictures, model, held_out, normalise, process)
    if args.eval:
        return evaluate_only(args, process, held_out, measure, draw)
    batches.steps_per_epoch(len(train_set), args.batch_size)  # refuses too large a batch
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    extra = {"normalise": normalise, "classes": classes, "decoder_dim": model.decoder_dim}
    run = Run(args, KIND, process, model, optimizer, args.steps, extra, train_set, held_out)
    run.clock.watch(run.model, optimizer)
    scaler, device, from_start = process.scaler, process.device, args.decay_from_start
    loader = batches.train_batches(train_set, run)
    for step, (images, masks) in run.steps(loader, measure, draw):
        lr = schedules.warmup_linear(step, args.steps, args.warmup_steps, args.lr, from_start)
        schedules.set_lr(optimizer, lr)
        x = batches.standardise(batches.to_float(images, device), normalise)
        masks = masks.to(device).long()
        u = noise.depth_noise(model.config, len(x), args.seed, step, process)
        # The mean over the counted pixels of the global batch; times `world` because DDP averages.
        count = run.all_sum((masks != sources.IGNORE).sum()).clamp_min(1) / process.world
        total = 0.0
        for x, masks, u in run.passes(x, masks, u):
            with process.autocast():
                logits = run.model(x, u).float()  # (B, C, H, W)
            loss = F.cross_entropy(logits, masks, ignore_index=sources.IGNORE, reduction="sum")
            scaler.scale(loss / count).backward()
            total += (loss / count).detach()
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
