"""Stage 1 (section 2.1, eq. 3 left): train the discrete VAE that turns images into visual tokens.

    python train_tokenizer.py --out runs/tokenizer                              # drawn shapes, a minute on a CPU
    torchrun --nproc_per_node=8 train_tokenizer.py --recipe base --data IMAGENET --out runs/tokenizer --workers 8
    torchrun --nnodes=2 --node_rank=R --master_addr=HOST --nproc_per_node=8 train_tokenizer.py ...   # on each node

--batch-size is the global batch: processes x accumulation passes x images per pass.
OUT: checkpoint.pt, metrics.jsonl, reconstructions.png (originals over reconstructions from hard tokens), loss.png.
"""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import training
from dvae import DVAE, DVAEConfig

RECIPES = {
    # name: (demo, fashion, base, large, help). base is DALL-E's appendix A; BEiT-large uses the same tokenizer.
    "data": ("shapes", "fashion-mnist", None, None, "data set: a name or a path, see data.py"),
    "image_size": (24, 28, 256, 256, "pixels; the tokenizer is convolutional and takes other sizes later"),
    "min_crop": (1.0, 1.0, 0.4, 0.4, "smallest share of the area that a random crop keeps; 1: no crop"),
    "flip": (True, True, True, True, "mirror half of the images"),
    # the networks
    "vocab_size": (256, 512, 8192, 8192, "|V|, number of visual tokens"),
    "hidden": (32, 48, 256, 256, "width of the first group of residual blocks"),
    "groups": (3, 3, 4, 4, "groups of blocks: downsampling by 2, 4 or 8"),
    "blocks_per_group": (1, 1, 2, 2, "residual blocks in each group"),
    "code_dim": (64, 64, 128, 128, "width of a code in the decoder"),
    "quantizer": ("gumbel", "gumbel", "gumbel", "gumbel", "gumbel, or vq for VQ-VAE"),
    "likelihood": ("mse", "mse", "logit-laplace", "logit-laplace", "logit-laplace or mse: p(x|z)"),
    "normalise_logits": (True, True, False, False, "keep a small codebook from collapsing; not in the paper"),
    # relaxation: temperature 1 -> 1/16, weight of the KL 0 -> beta
    "tau": (1 / 16, 1 / 16, 1 / 16, 1 / 16, "final temperature of the Gumbel-softmax, from 1, cosine"),
    "tau_steps": (300, 350, 150_000, 150_000, "steps until the final temperature"),
    "beta": (1e-2, 1e-2, 6.6, 6.6, "final weight of the KL; in units of 1 / squared error with mse"),
    "beta_steps": (0, 0, 5000, 5000, "steps until the final KL weight"),
    # optimisation
    "steps": (600, 700, 3_000_000, 3_000_000, "optimisation steps"),
    "batch_size": (64, 64, 512, 512, "images per step, all processes together"),
    "lr": (4e-3, 4e-3, 1e-4, 1e-4, "peak learning rate; cosine to min_lr"),
    "min_lr": (1e-4, 1e-4, 1.25e-6, 1.25e-6, "final learning rate"),
    "warmup_steps": (50, 50, 5000, 5000, "steps of linear warm-up"),
    "weight_decay": (1e-4, 1e-4, 1e-4, 1e-4, "AdamW weight decay"),
    "ema": (0.0, 0.0, 0.999, 0.999, "decay of the averaged weights that are evaluated and saved; 0: none"),
    "eval_images": (1000, 5000, 5000, 5000, "held-out images to evaluate on, at most"),
    "save_every": (1000, 1000, 5000, 5000, "steps between evaluations and checkpoints"),
}
KIND = "tokenizer"  # of its checkpoints


@torch.no_grad()
def evaluate(model, held_out, args, device, rank, world, autocast):
    """Reconstruction from hard tokens on the first --eval-images held-out images, shared by all processes.

    Returns reconstruction_mse (pixels in 0..1), codebook_perplexity (exp of the entropy of the codes' shares)
    and codebook_used (codes that occur at all).
    """
    model.eval()
    batch = max(1, args.batch_size // world // args.accumulate)
    counts = torch.zeros(model.config.vocab_size, dtype=torch.float64, device=device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # squared error, pixel values
    for (images,) in data.eval_batches(held_out, batch, args.eval_images, rank, world, args.workers):
        x = data.to_float(images, device)
        with autocast():
            z = model.tokens(x)
            reconstruction = model.decode(z)
        counts += torch.bincount(z.flatten(), minlength=len(counts))
        sums += torch.tensor([(reconstruction - x).pow(2).sum().item(), x.numel()], device=device)
    model.train()
    training.all_sum(counts)
    training.all_sum(sums)
    share = counts / counts.sum()
    return {
        "reconstruction_mse": (sums[0] / sums[1]).item(),
        "codebook_perplexity": torch.exp(-torch.xlogy(share, share).sum()).item(),
        "codebook_used": int((counts > 0).sum()),
    }


def build(args):
    """The dVAE of the recipe. Raises ValueError if the image size does not divide into tokens."""
    model = DVAE(DVAEConfig(**{name: getattr(args, name) for name in DVAEConfig.__dataclass_fields__}))
    if args.image_size % model.config.downsampling:
        raise ValueError(f"image size {args.image_size} is not a multiple of {model.config.downsampling} (--groups)")
    return model


def datasets(args):
    """(training set, held-out set): one view, random crops and flips in training only."""
    view = [(args.image_size, "bicubic")]
    source = data.open_source(args.data, "train", args.data_dir)
    held_out = data.Crops(data.open_source(args.data, args.eval_split, args.data_dir), view, train=False)
    return data.Crops(source, view, True, args.seed, args.min_crop, args.flip), held_out


@torch.no_grad()
def draw_pictures(out, model, held_out):
    """reconstructions.png: twelve originals over their reconstructions from hard tokens; loss.png."""
    device = model.pixel_variance.device
    x = data.to_float(held_out.__getitems__([(-1, i) for i in range(min(12, len(held_out)))])[0], device)
    model.eval()
    training.picture(out / "reconstructions.png", [x, model.decode(model.tokens(x))])
    training.curve(out / "loss.png", [m["loss"] for m in training.read_metrics(out) if "loss" in m])


def exponential_noise(args, config, count, step, part, device):
    """Exp(1) noise for the Gumbel-softmax of the `part`-th `count` images of a step: (count, h, w, |V|); VQ: None."""
    if config.quantizer == "vq":
        return None
    tokens = args.image_size // config.downsampling
    shape = tokens, tokens, config.vocab_size
    return training.sample_noise("exponential", shape, count, args.seed, step, part, device)


def main(argv=None):
    args = training.parse_recipe(training.recipe_parser(__doc__, RECIPES), RECIPES, argv)
    device, rank, world = training.setup(args.device)
    batch_size = training.rank_batch(args.batch_size, args.accumulate, world)
    autocast, scaler = training.precision(args.amp, device)
    train_set, held_out = datasets(args)
    data.steps_per_epoch(len(train_set), args.batch_size)  # refuses a batch larger than the set
    torch.manual_seed(args.seed)
    model = build(args).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema), use_buffers=True) if args.ema else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    out = training.open_output(args, rank)
    step = 0
    if args.resume:
        state = training.resume_checkpoint(out, KIND, args, model, optimizer, scaler)
        step = state["step"]
        if average:
            average.module.load_state_dict(state["average"])
            average.n_averaged.fill_(step)
    evaluated = average.module if average else model

    def save(step):
        if rank == 0:
            more = {"average": average.module.state_dict()} if average else {}
            training.save_checkpoint(out, KIND, args, step, model, optimizer, scaler, **more)

    if not args.resume:
        save(0)  # a folder that cannot be written to fails now
    train_model, finite = training.wrap(model, device, args.compile), training.FiniteSteps(out)
    clock = training.Clock(args.benchmark, device)
    log = training.Log(out, rank, args.steps, step)
    loader = data.train_batches(train_set, batch_size, rank, world, args.seed, step, args.steps, args.workers, device)
    for (images,) in clock.batches(loader):
        lr = training.warmup_cosine(step, args.steps, args.warmup_steps, args.lr, args.min_lr)
        tau = training.cosine(step, args.tau_steps, 1.0, args.tau)
        beta = training.ramp(step, args.beta_steps, args.beta)
        optimizer.param_groups[0]["lr"] = lr
        x = data.to_float(images, device)
        if args.quantizer == "vq" and step % 50 == 0:
            model.revive_codes(x.chunk(args.accumulate), rank, world, training.seed_for(args.seed, step))
        clock.mark("data")
        total, seen = 0.0, []
        for i, part in enumerate(x.chunk(args.accumulate)):
            e = exponential_noise(args, model.config, len(part), step, rank * args.accumulate + i, device)
            with training.sync_only_if(train_model, i == args.accumulate - 1):
                with autocast():
                    loss, terms, seen_i = train_model(part, tau, beta, e)
                clock.mark("forward")
                scaler.scale(loss / args.accumulate).backward()
                clock.mark("backward")
            total += loss.detach() / args.accumulate
            seen.append(seen_i)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
        squared_error, *counts = (training.all_sum(sum(values)) for values in zip(*seen))
        if finite.allow(norm, step, lr):
            scaler.step(optimizer)
            model.track(squared_error / args.accumulate / world, *counts)
            if average:
                average.update_parameters(model)
        scaler.update()
        optimizer.zero_grad()
        clock.mark("optimiser")
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            loss = (training.all_sum(total) / world).item()
            terms = {name: term.item() for name, term in terms.items()}  # of this process's last pass
            trouble = train_set.trouble() | finite.trouble()
            log.step(step, args.batch_size, loss=loss, **terms, tau=tau, beta=beta, lr=lr, **trouble)
        training.save_or_stop(save, step, args.steps, args.save_every, device)
        if step % args.save_every == 0 and step < args.steps:
            log.write(step=step, **evaluate(evaluated, held_out, args, device, rank, world, autocast))
    if args.benchmark:
        clock.report(args.batch_size, autocast, rank)
        return
    result = evaluate(evaluated, held_out, args, device, rank, world, autocast)
    log.final(**result)
    if rank == 0:
        draw_pictures(out, evaluated, held_out)


if __name__ == "__main__":
    with training.one_line_errors(stoppable=True):
        main()
