"""Semantic segmentation (section 2.6): BEiT as the encoder, several deconvolution layers as the decoder.

    python finetune_seg.py --init runs/beit/checkpoint.pt --out runs/seg                 # drawn shapes, on a CPU
    python finetune_seg.py --init runs/cls/checkpoint.pt --out runs/seg2                 # intermediate fine-tuning
    python finetune_seg.py --eval --init runs/seg/checkpoint.pt                          # evaluate only
    torchrun --nproc_per_node=8 finetune_seg.py --recipe base --data ADE20K --init runs/beit/checkpoint.pt \\
        --out runs/seg --workers 8                                                       # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 finetune_seg.py ...    # on each node

--batch-size is the global batch: processes x accumulation passes x images per pass.
OUT: checkpoint.pt, metrics.jsonl, segmentation.png (image, truth, prediction), loss.png.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

import data
import training
from beit import (
    RECOMPUTE,
    Beit,
    BeitConfig,
    finetuned_config,
    init_weight,
    load_backbone,
    load_pretrained,
    parameter_groups,
)

RECIPES = {
    # name: (demo, fashion, base, large, help). base is the paper's appendix, for ADE20K.
    "data": ("shapes", "fashion-scenes", None, None, "data set with masks: a name or a path, see data.py"),
    "image_size": (24, 28, 512, 512, "pixels of the crop; larger images are evaluated by a sliding window"),
    "train_images": (800, 200, 0, 0, "train on so many images, drawn by the seed; 0: all"),
    "model": ("tiny", "tiny", "base", "large", "size with --init random; a checkpoint brings its own"),
    "drop_path": (0.0, 0.0, 0.1, 0.2, "stochastic depth"),
    "decoder_dim": (64, 64, 256, 256, "channels between the deconvolution layers"),
    # augmentation
    "min_scale": (1.0, 1.0, 0.5, 0.5, "smallest factor by which a training image is resized before the crop"),
    "max_scale": (1.0, 1.0, 2.0, 2.0, "largest such factor"),
    "short_side": (0, 0, 512, 512, "the short side of every image is resized to this first; 0: left as it is"),
    "flip": (True, True, True, True, "mirror half of the images"),
    "photometric": (False, False, True, True, "vary brightness, contrast and saturation"),
    # optimisation
    "steps": (100, 300, 160_000, 160_000, "optimisation steps"),
    "warmup_steps": (10, 30, 1500, 1500, "of linear warm-up; then linear to 0"),
    "batch_size": (16, 32, 16, 16, "images per step, all processes together"),
    "lr": (1.6e-2, 8e-3, 1e-3, 1e-3, "peak learning rate of the decoder"),
    "layer_decay": (0.5, 0.5, 0.65, 0.75, "learning rate of a layer relative to the next; 1 suits random weights"),
    "beta2": (0.98, 0.98, 0.999, 0.999, "AdamW's second beta; the first is 0.9"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, "AdamW weight decay"),
    "clip": (3.0, 3.0, 0.0, 0.0, "largest norm of the gradient; 0: no clipping"),
    "eval_images": (500, 1000, 2000, 2000, "held-out images to evaluate on, at most"),
    "save_every": (1000, 1000, 16_000, 16_000, "steps between evaluations and checkpoints"),
}
KIND = "segmentation"  # of its checkpoints


def upsample(n_in, n_out):
    """One deconvolution layer, to twice the size. GroupNorm: its result does not depend on the rest of the batch."""
    layer = nn.ConvTranspose2d(n_in, n_out, kernel_size=4, stride=2, padding=1)
    return nn.Sequential(layer, nn.GroupNorm(8, n_out), nn.GELU())


class BeitForSegmentation(Beit):
    """Patch outputs h_i^L as a grid, log2(P) deconvolutions to full size (SETR-PUP's way), a linear classifier."""

    def __init__(self, config, classes, decoder_dim):
        super().__init__(config)
        stages = int(math.log2(config.patch_size))
        if 2**stages != config.patch_size:
            raise ValueError(f"patch size {config.patch_size} is not a power of 2: each deconvolution doubles the size")
        self.classes, self.decoder_dim = classes, decoder_dim
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        widths = [config.dim] + [decoder_dim] * stages
        self.decoder = nn.Sequential(*(upsample(n, m) for n, m in zip(widths, widths[1:])))
        self.decoder.append(nn.Conv2d(decoder_dim, classes, kernel_size=1))
        init_weight(self.decoder[-1].weight)

    def forward(self, x, u=None):
        """Logits of every pixel: (B, 3, H, W) -> (B, C, H, W). u: stochastic depth's, see Beit.forward."""
        h = self.norm(super().forward(x, u=u)[:, 1:])  # (B, N, D)
        grid = h.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))  # (B, D, h, w)
        return self.decoder(grid)


def slide(model, x):
    """Logits for images of any size not below the crop: windows of the crop, two thirds apart, averaged.

    (B, 3, H, W) -> (B, C, H, W). The last window of a row or column is moved back inside the image.
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


# ---------------------------------------------------------------- mean intersection over union


def confusion_matrix(truth, guess, classes):
    """Pixel counts (C, C): row = true class, column = predicted class; IGNORE pixels do not count."""
    counted = truth != data.IGNORE
    truth, guess = truth[counted].long(), guess[counted].long()
    return torch.bincount(truth * classes + guess, minlength=classes**2).view(classes, classes)


def mean_iou(matrix):
    """(mIoU, pixel accuracy) in percent from one confusion matrix over the whole set.

    Intersection over union of each class that occurs in truth or prediction, averaged over those classes.
    """
    matrix = matrix.double()
    hit = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hit
    iou = hit[union > 0] / union[union > 0]
    return 100 * iou.mean().item(), 100 * (hit.sum() / matrix.sum()).item()


# ---------------------------------------------------------------- images and masks


def resize(image, mask, height, width):
    """Image (1, 3, H, W) bilinear, antialiased; mask (1, 1, H, W) nearest; both float."""
    if image.shape[-2:] == (height, width):
        return image, mask
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image, F.interpolate(mask, (height, width), mode="nearest-exact")


def pad(image, mask, size):
    """Pad right and bottom to at least size x size: black, and IGNORE."""
    right, bottom = max(0, size - image.shape[-1]), max(0, size - image.shape[-2])
    return F.pad(image, (0, right, 0, bottom)), F.pad(mask, (0, right, 0, bottom), value=data.IGNORE)


class MaskedImages(data.Samples):
    """Images with per-pixel classes. A batch of keys (epoch, index) gives uint8 images (B, 3, S, S), masks (B, S, S).

    Training: resize by a random factor, a random crop S x S with at most 75 % of one class (ten tries), flip,
    photometric distortion. Evaluation: one whole image at a time, padded to at least S x S.
    """

    def __init__(self, args, source, classes, train):
        if source.masks is None:
            raise ValueError(
                f"{source.name}: it has no masks to learn segmentation from; of the named sets shapes and "
                "fashion-scenes have them"
            )
        super().__init__(source, train, args.seed)
        self.args, self.classes = args, classes
        if isinstance(source, data.Arrays):  # files are checked as they are read
            self.check(source.masks)

    def check(self, masks):
        """Raise ValueError if a mask value is neither a class nor IGNORE."""
        for part in masks:
            wrong = part[(part != data.IGNORE) & (part >= self.classes)]
            if len(wrong) == 0:
                continue
            raise ValueError(
                f"{self.source.name}: mask value {int(wrong[0])} is out of range for {self.classes} classes "
                f"({data.IGNORE}: ignored)"
            )

    def one(self, key):
        """Image (1, 3, H, W) and mask (1, 1, H, W) of one key, as float."""
        args, size = self.args, self.args.image_size
        image, mask = self.read([key[1]], self.source.read, self.source.read_masks)
        image = torch.from_numpy(image).permute(0, 3, 1, 2).float()
        mask = torch.from_numpy(mask)[:, None].float()
        if image.shape[-2:] != mask.shape[-2:]:
            raise ValueError(f"{self.source.name} {key[1]}: image {image.shape[-2:]} and mask {mask.shape[-2:]} differ")
        rng = data.sample_rng(args.seed, *key)
        factor = args.short_side / min(image.shape[-2:]) if args.short_side else 1
        factor *= rng.uniform(args.min_scale, args.max_scale) if self.train else 1
        height, width = (round(side * factor) for side in image.shape[-2:])
        image, mask = pad(*resize(image, mask, height, width), size)
        if not self.train:
            return image, mask
        for _ in range(10):
            top = rng.randint(0, image.shape[-2] - size)
            left = rng.randint(0, image.shape[-1] - size)
            crop = mask[..., top : top + size, left : left + size]
            counts = torch.bincount(crop[crop != data.IGNORE].long())
            if size == mask.shape[-1] == mask.shape[-2] or (len(counts) and counts.max() <= 0.75 * counts.sum()):
                break
        image, mask = image[..., top : top + size, left : left + size], crop
        if args.flip and rng.random() < 0.5:
            image, mask = image.flip(3), mask.flip(3)
        if args.photometric:
            strengths = [[rng.uniform(1 - s, 1 + s) for s in (0.125, 0.5, 0.5)]]
            image = data.colour_jitter(image / 255, torch.tensor(strengths)) * 255
        return image, mask

    def __getitems__(self, keys):
        images, masks = (torch.cat(parts) for parts in zip(*map(self.one, keys)))
        masks = masks[:, 0].byte()
        self.check(masks)
        return [images.round().clamp(0, 255).byte(), masks]


# ---------------------------------------------------------------- training


@torch.no_grad()
def evaluate(model, held_out, args, statistics, device, rank, world, autocast):
    """miou and pixel_accuracy in percent on held-out images, from one confusion matrix over all processes."""
    model.eval()
    matrix = torch.zeros(model.classes, model.classes, dtype=torch.int64, device=device)
    same_size = isinstance(held_out.source, data.Arrays)  # files come in any size: one at a time
    batch_size = max(1, args.batch_size // world // args.accumulate) if same_size else 1
    for images, masks in data.eval_batches(held_out, batch_size, args.eval_images, rank, world, args.workers):
        x = data.normalise(data.to_float(images, device), statistics)
        with autocast():
            guess = slide(model, x).argmax(1)  # (B, H, W)
        matrix += confusion_matrix(masks.to(device), guess, model.classes)
    miou, pixel_accuracy = mean_iou(training.all_sum(matrix))
    model.train()
    return {"miou": miou, "pixel_accuracy": pixel_accuracy}


def colours(masks):
    """A colour for each class, (B, H, W) -> (B, 3, H, W): class 0 black, the rest around the hue circle."""
    hue = masks.float()[:, None] * 2.4  # the golden angle keeps neighbours apart
    rgb = 0.55 + 0.45 * torch.cos(hue + torch.tensor([0.0, 2.1, 4.2], device=masks.device).view(1, 3, 1, 1))
    return torch.where(masks[:, None] == 0, 0.0, torch.where(masks[:, None] == data.IGNORE, 1.0, rgb))


@torch.no_grad()
def draw_pictures(out, model, held_out, args, statistics, device):
    """segmentation.png: image, truth, prediction, of up to twelve held-out images' top left crops; loss.png."""
    size = args.image_size
    some = [held_out.__getitems__([(-1, i)]) for i in range(min(12, len(held_out)))]
    images, masks = (torch.cat([part[..., :size, :size] for part in parts]) for parts in zip(*some))
    x = data.to_float(images, device)
    model.eval()
    guess = model(data.normalise(x, statistics)).argmax(1)
    training.picture(out / "segmentation.png", [x, colours(masks.to(device)), colours(guess)])
    training.curve(out / "loss.png", [m["loss"] for m in training.read_metrics(out) if "loss" in m])


def prepare(args, device):
    """(model, training set or None with --eval, held-out set, pixel statistics, class names)."""
    init = None
    if args.init != "random":
        kinds = (KIND,) if args.eval else ("pretraining", "classification", KIND)
        init = load_pretrained(args.init, *kinds)
    train_set = None
    if args.eval:
        classes = init["classes"]
        model = BeitForSegmentation(BeitConfig(**init["config"]), len(classes), init["decoder_dim"])
        model.load_state_dict(init["model"])
        args.image_size = model.config.image_size
    else:
        source = data.open_source(args.data, "train", args.data_dir)
        classes = source.mask_classes
        train_set = MaskedImages(args, source, len(classes), True)
        if args.train_images:
            train_set.source = data.random_subset(source, args.train_images, args.seed)
        config = finetuned_config(init, args.model, args.image_size, args.drop_path)
        torch.manual_seed(args.seed)
        model = BeitForSegmentation(config, len(classes), args.decoder_dim)
        if init:  # a segmenter of the same classes goes on with its decoder
            same = init["kind"] == KIND and (init["classes"], init["decoder_dim"]) == (classes, args.decoder_dim)
            load_backbone(model, init["model"], with_head=same)
    held_out = data.open_source(args.data, args.eval_split, args.data_dir)
    statistics = init["normalise"] if init else "half"
    held_out_set = MaskedImages(args, held_out, len(classes), False)
    data.check_names(held_out.mask_classes, classes, held_out)
    return model.to(device), train_set, held_out_set, statistics, classes


def main(argv=None):
    parser = training.recipe_parser(__doc__, RECIPES)
    parser.add_argument("--init", required=True, help="a checkpoint.pt, published BEiT weights, or random")
    parser.add_argument("--eval", action="store_true", help="evaluate --init on --eval-split and stop")
    parser.add_argument("--recompute", action="store_true", help=RECOMPUTE)
    args = training.parse_recipe(parser, RECIPES, argv)
    if args.eval and args.init == "random":
        parser.error("--eval needs --init CHECKPOINT: there is nothing to evaluate in random weights")
    device, rank, world = training.setup(args.device)
    autocast, scaler = training.precision(args.amp, device)
    model, train_set, held_out, statistics, classes = prepare(args, device)
    if args.eval:
        result = evaluate(model, held_out, args, statistics, device, rank, world, autocast)
        training.Log(None, rank, 0).final(**result)
        return
    model.recompute = args.recompute
    batch_size = training.rank_batch(args.batch_size, args.accumulate, world)
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    data.steps_per_epoch(len(train_set), args.batch_size)  # refuses a batch larger than the set
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    out = training.open_output(args, rank)
    step = training.resume_checkpoint(out, KIND, args, model, optimizer, scaler)["step"] if args.resume else 0

    def save(step):
        if rank == 0:
            more = {"normalise": statistics, "classes": classes, "decoder_dim": model.decoder_dim}
            training.save_checkpoint(out, KIND, args, step, model, optimizer, scaler, **more)

    if not args.resume:
        save(0)  # a folder that cannot be written to fails now
    train_model, finite = training.wrap(model, device, args.compile), training.FiniteSteps(out)
    clock = training.Clock(args.benchmark, device)
    log = training.Log(out, rank, args.steps, step)
    loader = data.train_batches(train_set, batch_size, rank, world, args.seed, step, args.steps, args.workers, device)
    for images, masks in clock.batches(loader):
        lr = training.warmup_linear(step, args.steps, args.warmup_steps, args.lr)
        training.set_lr(optimizer, lr)
        x = data.normalise(data.to_float(images, device), statistics)
        masks = masks.to(device).long()
        u = training.depth_noise(model.config, len(x), args.seed, step, rank, device)
        # The mean over all counted pixels of the global batch; times `world` because DDP averages over processes.
        count = training.all_sum((masks != data.IGNORE).sum()).clamp_min(1) / world
        clock.mark("data")
        total = 0.0
        parts = [t.chunk(args.accumulate) for t in (x, masks, u)]
        for i, (x_i, masks_i, u_i) in enumerate(zip(*parts), start=1):
            with training.sync_only_if(train_model, i == args.accumulate):
                with autocast():
                    logits = train_model(x_i, u_i).float()  # (B, C, H, W)
                loss = F.cross_entropy(logits, masks_i, ignore_index=data.IGNORE, reduction="sum") / count
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
        if step % args.log_every == 0 or step == args.steps:
            loss = (training.all_sum(total) / world).item()
            trouble = train_set.trouble() | finite.trouble()
            log.step(step, args.batch_size, loss=loss, lr=lr, gradient_norm=norm, **trouble)
        training.save_or_stop(save, step, args.steps, args.save_every, device)
        if step % args.save_every == 0 and step < args.steps:
            log.write(step=step, **evaluate(model, held_out, args, statistics, device, rank, world, autocast))
    if args.benchmark:
        clock.report(args.batch_size, autocast, rank)
        return
    result = evaluate(model, held_out, args, statistics, device, rank, world, autocast)
    log.final(**result)
    if rank == 0:
        draw_pictures(out, model, held_out, args, statistics, device)


if __name__ == "__main__":
    with training.one_line_errors(stoppable=True):
        main()
