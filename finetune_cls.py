"""Image classification (section 2.6): a linear classifier on the mean of the patch outputs.

    softmax(avg({h_i^L}, i = 1..N) W_c)

    python finetune_cls.py --init runs/beit/checkpoint.pt --out runs/cls
    python finetune_cls.py --init random --out runs/scratch                   # the baseline
    python finetune_cls.py --eval --init runs/cls/checkpoint.pt               # evaluate only
    torchrun --nproc_per_node=8 finetune_cls.py --recipe base --data IMAGENET --workers 8 \\
        --init runs/beit/checkpoint.pt --out runs/cls                         # one node of GPUs
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 finetune_cls.py ...

--batch-size is the global batch: processes x accumulation passes x images per pass. At 384 pixels:
--init runs/cls/checkpoint.pt --image-size 384; positions are interpolated.
OUT: checkpoint.pt, metrics.jsonl, loss.svg.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from beit import Beit, BeitConfig, finetuned_config, init_weight, load_backbone, parameter_groups
from images import batches, sets, sources
from images.labelled import LabelledViews
from plumbing import command_line, log, noise, processes, published, schedules
from plumbing.run import Run

RECIPES = {
    # name: (demo, fashion, base, large, help). base and large: the paper's appendix, ImageNet-1K.
    "data": ("shapes", "fashion-mnist", None, None, "data set: a name or a path (docs/data.md)"),
    "image_size": (24, 28, 224, 224, "pixels; if pre-training had others, positions are resized"),
    "labels_per_class": (100, 100, 0, 0, "train on a balanced subset drawn by the seed; 0: all"),
    "model": ("tiny", "tiny", "base", "large", "size with --init random; checkpoints have theirs"),
    "drop_path": (0.0, 0.0, 0.1, 0.2, "stochastic depth"),
    # augmentation
    "min_crop": (1.0, 1.0, 0.08, 0.08, "smallest share of the area kept by a crop; 1: no crop"),
    "flip": (True, False, True, True, "mirror half of the images"),
    "randaugment": (0.0, 0.0, 9.0, 9.0, "magnitude 0 to 10 of two random operations; 0: none"),
    "erasing": (0.0, 0.0, 0.25, 0.25, "probability of random erasing"),
    "mixup": (0.0, 0.0, 0.8, 0.8, "alpha of mixup; 0: none"),
    "cutmix": (0.0, 0.0, 1.0, 1.0, "alpha of cutmix; 0: none; with mixup, half of the steps each"),
    "smoothing": (0.1, 0.1, 0.1, 0.1, "label smoothing"),
    "eval_crop": (1.0, 1.0, 224 / 256, 224 / 256, "share of the short side to evaluate on"),
    # optimisation
    "epochs": (15.0, 10.0, 100.0, 50.0, "passes over the labelled images"),
    "warmup_epochs": (1.5, 1.0, 20.0, 5.0, "epochs of linear warm-up"),
    "batch_size": (40, 50, 1024, 1024, "images per step of all processes; scale lr with it"),
    "lr": (1e-3, 1e-3, 4e-3, 1e-3, "peak learning rate of the head; cosine to min_lr"),
    "min_lr": (1e-6, 1e-6, 1e-6, 1e-6, "final learning rate"),
    "layer_decay": (0.75, 0.75, 0.65, 0.75, "lr of a layer over that of the next; 1: all alike"),
    "beta2": (0.98, 0.98, 0.999, 0.999, "AdamW's second beta; the first is 0.9"),
    "weight_decay": (0.05, 0.05, 0.05, 0.05, "AdamW weight decay"),
    "clip": (3.0, 3.0, 0.0, 0.0, "largest norm of the gradient; 0: no clipping"),
    "eval_images": (1000, 10_000, 50_000, 50_000, "largest number of held-out images to evaluate"),
    "save_every": (1000, 1000, 1000, 1000, "steps between evaluations and checkpoints"),
}  # fmt: skip
KIND = "classification"  # of its checkpoints


class BeitForClassification(Beit):
    """Mean of the patch outputs, norm, linear. The head starts near zero (x 0.001)."""

    def __init__(self, config, classes):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, classes)  # W_c
        init_weight(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.weight.data.mul_(0.001)

    def forward(self, x, u=None):
        """Logits, before section 2.6's softmax: (B, 3, H, W) -> (B, C). u: see Beit.forward."""
        h = super().forward(x, u=u)[:, 1:].mean(dim=1)  # avg of h_i^L: (B, D)
        return self.head(self.fc_norm(h))


# -------------------------------------------------------- mixing images and labels (appendix)


def mix(x, targets, mixup, cutmix, rng):
    """Mixup or cutmix of each image with its neighbour: x (B, 3, H, W), targets (B, C).

    lambda ~ Beta(alpha, alpha), one for the step, is the image's own share: of every pixel (mixup),
    or of the area, outside a pasted box (cutmix; recomputed after the box is cut at the border).
    Neighbours (0 and 1, 2 and 3, ...) stay together when the batch is split among processes.
    """
    if not mixup and not cutmix:
        return x, targets
    # An odd last image is its own neighbour.
    neighbour = (torch.arange(len(x), device=x.device) ^ 1).clamp_max(len(x) - 1)
    if cutmix and (not mixup or rng.random() < 0.5):
        share = rng.betavariate(cutmix, cutmix)
        H, W = x.shape[-2:]
        h, w = H * math.sqrt(1 - share), W * math.sqrt(1 - share)
        cy, cx = rng.random() * H, rng.random() * W
        top, bottom = max(round(cy - h / 2), 0), min(round(cy + h / 2), H)
        left, right = max(round(cx - w / 2), 0), min(round(cx + w / 2), W)
        share = 1 - (bottom - top) * (right - left) / (H * W)
        pasted, x = x[neighbour, :, top:bottom, left:right], x.clone()
        x[:, :, top:bottom, left:right] = pasted
    else:
        share = rng.betavariate(mixup, mixup)
        x = share * x + (1 - share) * x[neighbour]
    return x, share * targets + (1 - share) * targets[neighbour]


# -------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model, held_out, args, normalise, process):
    """top1 and top5 accuracy in percent on held-out images."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=process.device)  # top 1, top 5, images
    for images, labels in batches.eval_batches(held_out, args, process):
        x = batches.standardise(batches.to_float(images, process.device), normalise)
        with process.autocast():
            logits = model(x)
        best = logits.float().topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = best == labels.to(process.device)[:, None]
        sums += torch.tensor([hits[:, 0].sum(), hits.sum(), len(x)], device=process.device)
    model.train()
    top1, top5, count = processes.all_sum(sums).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count}


# -------------------------------------------------------- set-up and the loop


def prepare(args):
    """(model, training set, held-out set, normalise, class names) to fine-tune --init.

    Raises ValueError if the weights or the data do not fit.
    """
    init = published.load_init(args.init, "pretraining", KIND)
    source, held_out = sets.open_splits(args)
    classes = source.classes
    train_set = LabelledViews(args, source, len(classes), True)
    if args.labels_per_class:
        train_set.source = sources.balanced_subset(source, args.labels_per_class, args.seed)
    config = finetuned_config(init, args.model, args.image_size, args.drop_path)
    torch.manual_seed(args.seed)
    model = BeitForClassification(config, len(classes))
    if init:  # a classifier of the same classes, or of as many unnamed ones, keeps its head
        keep = init["kind"] == KIND and init["classes"] in (classes, None)
        keep = keep and len(init["model"]["head.weight"]) == len(classes)
        load_backbone(model, init["model"], with_head=keep)
    if args.linear_probe:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(("fc_norm.", "head.")))
    held_out_set = LabelledViews(args, held_out, len(classes), False)
    sources.check_names(held_out.classes, classes, held_out)
    return model, train_set, held_out_set, init["normalise"] if init else "half", classes


def prepare_evaluation(args):
    """(model, held-out set, normalise) of the classifier --init, for --eval.

    Raises ValueError if its classes are not the data's.
    """
    init = published.load_pretrained(args.init, KIND)
    model = BeitForClassification(BeitConfig(**init["config"]), len(init["model"]["head.weight"]))
    load_backbone(model, init["model"], with_head=True)
    args.image_size = model.config.image_size
    held_out = sets.open_source(args.data, args.eval_split, args.data_dir)
    # Published weights have no class names; the data's fit if there are as many.
    known, classes = model.head.out_features, init["classes"] or held_out.classes
    if len(classes) != known or len(held_out.classes) > known:
        raise ValueError(
            f"{args.init} was trained on {known} classes, {args.data} has {len(held_out.classes)}"
        )
    held_out_set = LabelledViews(args, held_out, len(classes), False)
    sources.check_names(held_out.classes, classes, held_out)
    return model, held_out_set, init["normalise"]


def main(argv=None):
    parser = command_line.recipe_parser(__doc__, RECIPES)
    command_line.add_init_flags(parser)
    frozen = "freeze the backbone: train only the norm and the head"
    parser.add_argument("--linear-probe", action="store_true", help=frozen)
    args = command_line.parse_recipe(parser, RECIPES, argv)
    process = processes.setup(args.device, args.amp)
    if args.eval:
        model, held_out, normalise = prepare_evaluation(args)
        result = evaluate(model.to(process.device), held_out, args, normalise, process)
        log.Log(None, process.rank, 0).final(**result)
        return
    model, train_set, held_out, normalise, classes = prepare(args)
    model.to(process.device).recompute = args.recompute
    groups = parameter_groups(model, args.weight_decay, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)
    per_epoch = batches.steps_per_epoch(len(train_set), args.batch_size)
    steps, warmup = schedules.duration(args, per_epoch)
    extra = {"normalise": normalise, "classes": classes}
    run = Run(args, KIND, process, model, optimizer, steps, extra)
    run.clock.watch(run.model, optimizer)
    scaler, device = process.scaler, process.device
    measure = functools.partial(evaluate, model, held_out, args, normalise, process)
    loader = batches.train_batches(train_set, run)
    for step, (images, labels) in run.steps(loader, measure):
        lr = schedules.warmup_cosine(step, steps, warmup, args.lr, args.min_lr)
        schedules.set_lr(optimizer, lr)
        x = batches.standardise(batches.to_float(images, device), normalise)
        targets = F.one_hot(labels.to(device), len(classes)).float()  # (B, C)
        rng = noise.sample_rng(args.seed, step, "mix")
        x, targets = mix(x, targets, args.mixup, args.cutmix, rng)
        u = noise.depth_noise(model.config, len(x), args.seed, step, process)
        total = 0.0
        for x, targets, u in run.passes(x, targets, u):
            with process.autocast():
                logits = run.model(x, u).float()  # (B, C)
            loss = F.cross_entropy(logits, targets, label_smoothing=args.smoothing)
            scaler.scale(loss / args.accumulate).backward()
            total += loss.detach() / args.accumulate
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()
        if run.allows(step, norm, lr):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.report(total, lr=lr, gradient_norm=norm)
    run.finish(measure)


if __name__ == "__main__":
    with command_line.one_line_errors(stoppable=True):
        main()
