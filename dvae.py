"""Visual tokens (section 2.1): the discrete VAE whose encoder is BEiT's image tokenizer.

    x in [0,1]^(3 x H x W)  --q_phi(z|x)-->  z in V^(h x w)  --p_psi(x|z)-->  x again

The networks are DALL-E's (Ramesh et al. 2021, appendix A): convolutional residual networks that
downsample by 2 between groups, so 2, 3 or 4 groups give an h x w grid 2, 4 or 8 times coarser than
the image. Three ways through the discrete bottleneck (read DVAE first: the others build on it):

    DVAE               Gumbel-softmax relaxation with temperature tau, KL to the uniform prior
    VQVAE              VQ-VAE (van den Oord et al. 2017): nearest code, straight-through gradient
    StandardisedDVAE   ours, not the paper's: a DVAE that keeps a small codebook from collapsing

Images are float tensors (B, 3, H, W) in [0, 1]; tokens are int64 (B, h, w) in [0, |V|).
Train it with train_tokenizer.py.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from plumbing import checkpoints, entries, processes, published, weights

EPSILON = 0.1  # map_pixels keeps pixels this far from 0 and 1, where logit(x) is infinite


@dataclass
class DVAEConfig:
    """Shape of the dVAE; default: DALL-E's published one. Raises ValueError on bad values."""

    vocab_size: int = 8192  # |V|
    hidden: int = 256  # width of the first group; group g is 2**(g-1) times as wide
    groups: int = 4  # downsampling factor 2**(groups-1)
    blocks_per_group: int = 2
    code_dim: int = 128  # width of the decoder's embedding of a code (and of VQ-VAE's codebook)
    quantizer: str = "gumbel"  # or "vq"
    likelihood: str = "logit-laplace"  # or "mse"
    normalise_logits: bool = False  # StandardisedDVAE

    def __post_init__(self):
        if self.quantizer not in ("gumbel", "vq"):
            raise ValueError(f"quantizer {self.quantizer!r} is neither 'gumbel' nor 'vq'")
        if self.likelihood not in ("logit-laplace", "mse"):
            raise ValueError(f"likelihood {self.likelihood!r} is neither 'logit-laplace' nor 'mse'")
        if not 2 <= self.groups <= 4:
            raise ValueError(f"groups {self.groups} must be 2, 3 or 4 (downsampling by 2, 4 or 8)")
        if self.hidden % 4:
            raise ValueError(f"hidden {self.hidden} must be a multiple of 4 (for the bottleneck)")

    @property
    def downsampling(self):
        """Image pixels per token along each side."""
        return 2 ** (self.groups - 1)


# -------------------------------------------------------- pixels and their likelihood


def map_pixels(x):
    """[0, 1] -> [eps, 1 - eps], the range in which the logit-Laplace density is well behaved."""
    return (1 - 2 * EPSILON) * x + EPSILON


def unmap_pixels(x):
    """Inverse of map_pixels."""
    return (x - EPSILON) / (1 - 2 * EPSILON)


def logit_laplace_nll(x, mu, ln_b):
    """-log f(x | mu, b) per pixel value, x in (0, 1).

    f = exp(-|logit(x) - mu| / b) / (2 b x (1 - x))
    """
    distance = (torch.logit(x) - mu).abs()
    return distance * torch.exp(-ln_b) + ln_b + math.log(2) + torch.log(x * (1 - x))


# -------------------------------------------------------- the two networks


def conv(n_in, n_out, kernel):
    """A same-size convolution, initialised as DALL-E's: N(0, 1/fan_in), bias 0."""
    layer = nn.Conv2d(n_in, n_out, kernel, padding=(kernel - 1) // 2)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(n_in * kernel**2))
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """x + 1/n_blocks**2 * bottleneck(x), a ReLU before each of four convolutions.

    The encoder's kernels are (3, 3, 3, 1), the decoder's mirror them: (1, 3, 3, 3). n_blocks: the
    number of residual blocks in the whole network.
    """

    def __init__(self, n_in, n_out, kernels, n_blocks):
        super().__init__()
        n_hidden = n_out // 4
        widths = [n_in, n_hidden, n_hidden, n_hidden, n_out]
        self.id_path = nn.Identity() if n_in == n_out else conv(n_in, n_out, 1)
        parts = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            parts[f"relu_{i}"] = nn.ReLU()
            parts[f"conv_{i}"] = conv(widths[i - 1], widths[i], kernel)
        self.res_path = nn.Sequential(parts)
        self.post_gain = 1 / n_blocks**2

    def forward(self, x):
        return torch.add(self.id_path(x), self.res_path(x), alpha=self.post_gain)


def residual_groups(widths, kernels, blocks, resize):
    """The groups between a network's first and last convolution, `resize` between two groups."""
    groups, n_blocks = OrderedDict(), (len(widths) - 1) * blocks
    for g, (n_in, n_out) in enumerate(zip(widths, widths[1:]), start=1):
        parts = OrderedDict()
        for b in range(1, blocks + 1):
            parts[f"block_{b}"] = ResidualBlock(n_in, n_out, kernels, n_blocks)
            n_in = n_out
        if g < len(widths) - 1:
            parts["resize"] = resize
        groups[f"group_{g}"] = nn.Sequential(parts)
    return groups


class Encoder(nn.Module):
    """q_phi(z|x): (B, 3, H, W) mapped pixels -> (B, n_out, h, w).

    n_out: |V| for logits; for VQ-VAE the width of a code.
    """

    def __init__(self, config, n_out):
        super().__init__()
        widths = [config.hidden] + [config.hidden * 2**g for g in range(config.groups)]
        groups = residual_groups(widths, (3, 3, 3, 1), config.blocks_per_group, nn.MaxPool2d(2))
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(widths[-1], n_out, 1)))
        parts = OrderedDict(input=conv(3, widths[0], 7), **groups, output=output)
        self.blocks = nn.Sequential(parts)

    def forward(self, x):
        return self.blocks(x)

    def exact(self, x):
        """forward(x) with the residual stream, which decides the argmax, in float32 (ours).

        Under autocast a branch uses the lower precision only if its scale 1/n_blocks**2, which also
        scales its rounding errors, is at most 1/64, as with DALL-E's 8 blocks.
        """
        kind, dtype = x.device.type, torch.get_autocast_dtype(x.device.type)
        low = torch.is_autocast_enabled(kind) and self.blocks.group_1.block_1.post_gain <= 1 / 64
        with torch.autocast(kind, enabled=False):
            for group in self.blocks:
                for part in group if isinstance(group, nn.Sequential) else [group]:
                    if isinstance(part, ResidualBlock):
                        with torch.autocast(kind, dtype=dtype, enabled=low):
                            branch = part.res_path(x)
                        x = torch.add(part.id_path(x), branch, alpha=part.post_gain)
                    else:
                        x = part(x)
        return x


class Decoder(nn.Module):
    """p_psi(x|z): (B, n_in, h, w) codes, one-hot or relaxed -> (B, 6, H, W).

    The output holds mu and ln b of the logit-Laplace for R, G, B.
    """

    def __init__(self, config, n_in):
        super().__init__()
        widths = [config.code_dim] + [config.hidden * 2**g for g in reversed(range(config.groups))]
        upsample = nn.Upsample(scale_factor=2)
        groups = residual_groups(widths, (1, 3, 3, 3), config.blocks_per_group, upsample)
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(widths[-1], 6, 1)))
        # Column k of the first convolution's weight is the embedding of code k.
        parts = OrderedDict(input=conv(n_in, widths[0], 1), **groups, output=output)
        self.blocks = nn.Sequential(parts)

    def forward(self, z):
        return self.blocks(z)


# -------------------------------------------------------- Gumbel-softmax


def gumbel_softmax(logits, tau, e):
    """A relaxed sample of z ~ softmax(logits) over the last dimension: softmax((logits + g) / tau).

    g = -log(e), with e ~ Exp(1) of the logits' shape, is Gumbel noise: argmax(logits + g) is an
    exact sample, and the softmax tends to its one-hot vector as tau falls to 0.
    """
    return torch.softmax((logits - e.log()) / tau, dim=-1)


def kl_to_uniform(logits):
    """KL(q || uniform) = log|V| - entropy(q) >= 0, in nats, of q = softmax(logits)."""
    log_q = torch.log_softmax(logits, dim=-1)
    return math.log(logits.shape[-1]) + (log_q.exp() * log_q).sum(-1)


class DVAE(nn.Module):
    """Encoder q_phi, Gumbel-softmax, decoder p_psi. `forward` is its loss, `tokens` BEiT's z."""

    def __init__(self, config, channels=None):
        """channels: of the grid between encoder and decoder; None: |V|."""
        super().__init__()
        self.config = config
        channels = channels or config.vocab_size
        self.encoder = Encoder(config, channels)
        self.decoder = Decoder(config, channels)
        # With likelihood "mse", the variance of p_psi: running mean of the squared error.
        self.register_buffer("pixel_variance", torch.tensor(1.0))
        self.to(memory_format=torch.channels_last)  # the fastest layout for convolutions

    def encode(self, x, exact=False):
        """Images (B, 3, H, W) in [0, 1] -> logits of q_phi(z|x), float32 (B, h, w, |V|).

        The convolutions follow autocast, unless exact: see Encoder.exact.
        """
        x = map_pixels(x).contiguous(memory_format=torch.channels_last)
        y = self.encoder.exact(x) if exact else self.encoder(x)
        return y.float().permute(0, 2, 3, 1)

    @torch.no_grad()
    def tokens(self, x):
        """z, the likeliest code at each position, no noise: (B, 3, H, W) -> int64 (B, h, w).

        bf16 cannot separate codes with close logits, and targets should not depend on precision.
        """
        return self.encode(x, exact=True).argmax(-1)

    def decode_codes(self, codes):
        """Codes, channels last (B, h, w, n) -> mu and ln b, each (B, 3, H, W)."""
        return self.decoder(codes.permute(0, 3, 1, 2)).float().chunk(2, dim=1)

    def decode_parameters(self, z):
        """p_psi(x|z) of hard tokens int64 (B, h, w): mu and ln b, each (B, 3, H, W)."""
        first = self.decoder.blocks.input  # a 1x1 convolution of one-hot codes is a table look-up
        codes = F.embedding(z, first.weight.flatten(1).T) + first.bias  # (B, h, w, code_dim)
        return self.decoder.blocks[1:](codes.permute(0, 3, 1, 2)).float().chunk(2, dim=1)

    def decode(self, z):
        """Reconstruction from hard tokens: int64 (B, h, w) -> images (B, 3, H, W) in [0, 1]."""
        mu, _ = self.decode_parameters(z)
        return unmap_pixels(torch.sigmoid(mu)).clamp(0, 1)

    def negative_log_likelihood(self, x, mu, ln_b):
        """-log p_psi(x|z) of images in [0, 1], in nats per image: (B,). A density can exceed 1."""
        if self.config.likelihood == "mse":  # a Gaussian around the predicted pixels
            squared = (x - unmap_pixels(torch.sigmoid(mu))).pow(2)
            variance = self.pixel_variance
            nll = squared / (2 * variance) + (2 * math.pi * variance).log() / 2
        else:  # change of variables from map_pixels(x) back to x
            nll = logit_laplace_nll(map_pixels(x), mu, ln_b) - math.log(1 - 2 * EPSILON)
        return nll.flatten(1).sum(1)

    def reconstruction(self, x, codes):
        """(loss of decoding the relaxed codes per pixel value, squared error per pixel value)."""
        mu, ln_b = self.decode_codes(codes)
        squared_error = (x - unmap_pixels(torch.sigmoid(mu))).pow(2).mean()
        if self.config.likelihood == "mse":
            return squared_error, squared_error
        nll = self.negative_log_likelihood(x, mu, ln_b).mean() / x[0].numel()
        return nll, squared_error

    def forward(self, x, tau, beta, e):
        """Stage 1: minus eq. 3's first term (mse: squared error), plus beta times DALL-E's KL.

        x: (B, 3, H, W) in [0, 1]; tau: temperature; e: Exp(1) noise (B, h, w, |V|). Both terms are
        sums over one image divided by its number of pixel values, 3HW; with different divisors the
        codebook collapses, or the KL does nothing. Returns the loss, its terms (`reconstruction`
        per pixel value, `kl` in nats per token) and the batch's statistics for `track`.
        """
        logits = self.encode(x)
        reconstruction, squared_error = self.reconstruction(x, gumbel_softmax(logits, tau, e))
        kl = kl_to_uniform(logits)  # of q, not of the sample, to the uniform prior: (B, h, w)
        loss = reconstruction + beta * kl.sum((1, 2)).mean() / x[0].numel()
        terms = {"reconstruction": reconstruction.detach(), "kl": kl.detach().mean()}
        return loss, terms, [squared_error.detach()]

    def track(self, step, squared_errors):
        """Update running statistics after `step` (from 0), from the statistics of its passes."""
        mean = processes.all_mean(sum(squared_errors) / len(squared_errors))
        # At first the mean of all steps (if none is skipped): 1.0 would bias a short run.
        self.pixel_variance.lerp_(mean, max(0.02, 1 / (step + 1)))


# -------------------------------------------------------- VQ-VAE


class VQVAE(DVAE):
    """VQ-VAE's bottleneck on the same networks: the nearest of |V| learned codes.

    `encode` gives the encoder's outputs z_e(x), (B, h, w, code_dim), in place of logits.
    """

    def __init__(self, config):
        super().__init__(config, channels=config.code_dim)
        self.codebook = nn.Parameter(torch.randn(config.vocab_size, config.code_dim))
        self.register_buffer("usage", torch.zeros(config.vocab_size))

    def code_distance(self, z_e):
        """Squared distance of (..., code_dim) to every code, less |z_e|²: (..., |V|)."""
        # bf16 cannot distinguish codes that are close.
        with torch.autocast(z_e.device.type, enabled=False):
            return self.codebook.pow(2).sum(1) - 2 * z_e @ self.codebook.T

    @torch.no_grad()
    def tokens(self, x):
        """z, the nearest code at each position: (B, 3, H, W) -> int64 (B, h, w)."""
        return self.code_distance(self.encode(x, exact=True)).argmin(-1)

    def decode_parameters(self, z):
        """p_psi(x|z) of hard tokens int64 (B, h, w): mu and ln b, each (B, 3, H, W)."""
        return self.decode_codes(self.codebook[z])

    def straight_through(self, z_e):
        """z_e (B, h, w, code_dim) -> (z_q with its gradient passed on to z_e, plain z_q, z)."""
        z = self.code_distance(z_e.detach()).argmin(-1)
        z_q = self.codebook[z]
        return z_e + (z_q - z_e).detach(), z_q, z

    def forward(self, x, tau, beta, e):
        """VQ-VAE's loss, as DVAE.forward; tau, beta and e, which it does not need, are ignored.

        Terms: `codebook`, the codebook and commitment losses together, in place of `kl`.
        """
        z_e = self.encode(x)
        codes, z_q, z = self.straight_through(z_e)
        # Codes move to the encoder's outputs. The commitment term (0.25) pulls outputs to codes.
        codebook = (z_q - z_e.detach()).pow(2).mean() + 0.25 * (z_q.detach() - z_e).pow(2).mean()
        reconstruction, squared_error = self.reconstruction(x, codes)
        terms = {"reconstruction": reconstruction.detach(), "codebook": codebook.detach()}
        counts = torch.bincount(z.flatten(), minlength=self.config.vocab_size).float()
        return reconstruction + codebook, terms, [squared_error.detach(), counts]

    def track(self, step, squared_errors, counts):
        """Also update the running count of each code."""
        super().track(step, squared_errors)
        self.usage.mul_(0.99).add_(processes.all_sum(sum(counts)))

    @torch.no_grad()
    def revive_codes(self, parts, rank, world, seed):
        """Move codes whose usage is below 0.1 to random outputs of the global batch.

        It falls from 1 to that in 230 steps without use. Ours, against VQ-VAE's index collapse. In
        the first call no code has been used, so it is the initialisation from data, too. parts:
        this process's images in pieces that fit in memory.
        """
        z_e = torch.cat([self.encode(part) for part in parts]).flatten(0, 2)  # (n, code_dim)
        generator = torch.Generator().manual_seed(seed)
        place = torch.randint(len(z_e) * world, self.usage.shape, generator=generator)
        place = place.to(z_e.device)
        mine = place // len(z_e) == rank
        fresh = torch.zeros_like(self.codebook)
        fresh[mine] = z_e[place[mine] % len(z_e)]
        processes.all_sum(fresh)  # each row comes from the one process that holds its place
        dead = self.usage < 0.1
        self.codebook[dead] = fresh[dead]
        self.usage[dead] = 1.0


# -------------------------------------------------------- ours, not the paper's


class StandardisedDVAE(DVAE):
    """A DVAE whose logits are standardised (ours, not the paper's): --normalise-logits.

    At small scale a few codes soon win everywhere, because mean logits differ more between codes
    than one code's logits do between positions. Standardising each code's logit over the batch (of
    all processes) removes that mean. One learned scale then decides how sharp q is.
    """

    def __init__(self, config):
        super().__init__(config)
        self.logit_norm = processes.GlobalBatchNorm(config.vocab_size)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(3.0)))  # std 3 at the start

    def encode(self, x, exact=False):
        """Standardised logits of q_phi(z|x): as DVAE.encode."""
        logits = super().encode(x, exact).permute(0, 3, 1, 2)  # a view: (B, |V|, h, w)
        return (self.logit_norm(logits) * self.logit_scale.exp()).permute(0, 2, 3, 1)


def build(config):
    """The model of a DVAEConfig, one of the three."""
    if config.quantizer == "vq":
        return VQVAE(config)
    return StandardisedDVAE(config) if config.normalise_logits else DVAE(config)


def load_tokenizer(name):
    """The frozen tokenizer of --tokenizer: a checkpoint.pt of train_tokenizer.py, or dalle:FOLDER.

    FOLDER holds DALL-E's published encoder.pkl and decoder.pkl. Averaged weights where a checkpoint
    has them. Raises ValueError if it cannot be read.
    """
    if str(name).startswith("dalle:"):
        config, state = published.read_dalle(str(name).removeprefix("dalle:"))
        state["pixel_variance"] = torch.tensor(1.0)  # theirs is a logit-Laplace likelihood
    else:
        saved = checkpoints.load(name, "tokenizer")
        config, state = saved["config"], saved.get("average", saved["model"])
        entries.check_config(name, config, DVAEConfig.__annotations__)
    config = DVAEConfig(**config)
    weights.check_built(name, state, lambda: build(config))
    model = build(config)
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()
