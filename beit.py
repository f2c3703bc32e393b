"""The backbone (section 2.2) and the mask embedding e_[M] (section 2.3): a vision Transformer.

    H_0 = [e_[S], E x^p_1, ..., E x^p_N] + E_pos        Beit.embed
    H^l = Transformer(H^(l-1)),  l = 1, ..., L          Block
    H^L = [h^L_[S], h^L_1, ..., h^L_N]                  Beit.forward

One class for every size. Parameter names are those of the released weights. Each head is defined
in the script that trains it: pretrain.py (masked image modeling), finetune_cls.py, finetune_seg.py.

Images are float tensors (B, 3, H, W), standardised. A mask is bool, True = masked.
"""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

STD = 0.02  # of the truncated normal of matrices, e_[S], e_[M] and E_pos (as released)
SDPA_ON = ("cuda",)  # on CPUs SDPA's backward is slower in bf16 than the plain products


@dataclass
class BeitConfig:
    """Shape of the backbone; default: BEiT-base as released. Raises ValueError on bad values."""

    image_size: int = 224  # H = W, pixels
    patch_size: int = 16  # P, pixels
    dim: int = 768  # D
    depth: int = 12  # L
    heads: int = 12
    mlp_ratio: float = 4.0
    positions: str = "shared"  # "absolute": E_pos; "relative": a table per block; "shared": one
    layer_scale: float = 0.1  # initial value of gamma_1 and gamma_2; 0: no LayerScale
    drop_path: float = 0.1  # stochastic depth of the last block, rising linearly from 0

    def __post_init__(self):
        if self.image_size % self.patch_size:
            size, patch = self.image_size, self.patch_size
            raise ValueError(f"image size {size} is not a multiple of the patch size {patch}")
        if self.dim % self.heads:
            raise ValueError(f"width {self.dim} is not a multiple of {self.heads} heads")
        if self.positions not in ("absolute", "relative", "shared"):
            raise ValueError(f"positions {self.positions!r} is none of absolute, relative, shared")
        if not 0 <= self.layer_scale < math.inf:
            raise ValueError(f"layer scale {self.layer_scale} must be a finite number, 0 or more")

    @property
    def grid(self):
        """Patches along one side: h = w."""
        return self.image_size // self.patch_size


MODELS = {  # --model: the appendix's two sizes, and five for small images on a laptop
    "mini": dict(patch_size=4, dim=64, depth=4, heads=2, positions="absolute", layer_scale=0.0),
    "tiny": dict(patch_size=4, dim=128, depth=4, heads=4, positions="absolute", layer_scale=0.0),
    "mini8": dict(patch_size=8, dim=64, depth=4, heads=2, positions="absolute", layer_scale=0.0),
    "tiny8": dict(patch_size=8, dim=128, depth=4, heads=4, positions="absolute", layer_scale=0.0),
    "small8": dict(patch_size=8, dim=192, depth=4, heads=6, positions="absolute", layer_scale=0.0),
    "base": dict(patch_size=16, dim=768, depth=12, heads=12, positions="shared", layer_scale=0.1),
    "large": dict(patch_size=16, dim=1024, depth=24, heads=16, positions="shared", layer_scale=1e-5)
}  # fmt: skip


def model_config(name, **changes):
    """The BeitConfig of --model NAME with changes. Raises ValueError on a bad name or value."""
    if name not in MODELS:
        raise ValueError(f"model {name!r} is none of {', '.join(MODELS)}")
    return BeitConfig(**MODELS[name] | changes)


def init_weight(weight, cut=2.0):
    """Normal with std 0.02, cut off at ±`cut`.

    The authors cut at ±0.02 in pre-training (real std 0.0108); fine-tuning's ±2.0 cuts nothing.
    """
    nn.init.trunc_normal_(weight, std=STD, a=-cut, b=cut)


# -------------------------------------------------------- relative positions (released models)


def relative_position_index(grid):
    """(N+1, N+1) rows of the bias table, [query, key], for e_[S] and the N = grid**2 patches.

    Offset (dy, dx) = query - key has row (dy + grid-1) * (2 grid-1) + dx + grid-1. The last three
    rows are, as query -> key, e_[S] -> patch, patch -> e_[S] and e_[S] -> e_[S].
    """
    side = 2 * grid - 1
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    place = (y * side + x).flatten()  # place[p] - place[q] is the row of offset p - q, shifted
    index = torch.empty(grid**2 + 1, grid**2 + 1, dtype=torch.int64)
    index[1:, 1:] = place[:, None] - place[None, :] + (grid - 1) * (side + 1)
    index[0, 1:], index[1:, 0], index[0, 0] = side**2, side**2 + 1, side**2 + 2
    return index


def relative_table(config):
    """A bias table, zero at the start: ((2h-1)(2w-1) + 3, heads)."""
    return nn.Parameter(torch.zeros((2 * config.grid - 1) ** 2 + 3, config.heads))


def relative_bias(table, index):
    """Look up the bias of every pair: (rows, heads), (N+1, N+1) -> (heads, N+1, N+1).

    The result is laid out as the scores it is added to. table[index] would have the heads last in
    memory, and adding that is slow on CPUs.
    """
    return table.T.index_select(1, index.flatten()).view(-1, *index.shape)


class SharedRelativePosition(nn.Module):
    """The one table that all blocks share in pre-training."""

    def __init__(self, config):
        super().__init__()
        self.relative_position_bias_table = relative_table(config)


# -------------------------------------------------------- Transformer block


class Attention(nn.Module):
    """Multi-head self-attention. q and v have a bias; k needs none, softmax would cancel it."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)
        if config.positions == "relative":
            self.relative_position_bias_table = relative_table(config)

    def project(self, x):
        """(B, N+1, D) -> q, k, v, each (B, heads, N+1, D/heads)."""
        B, rows, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(B, rows, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def weights(self, q, k, bias):
        """softmax(q k^T / sqrt(D/heads) + bias): (B, heads, N+1, N+1)."""
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias).softmax(dim=-1)

    def attend(self, x, bias):
        """The weighted sums of v, all heads side by side: (B, N+1, D) -> (B, N+1, D)."""
        q, k, v = self.project(x)
        bias = None if bias is None else bias.to(q.dtype)
        if x.device.type in SDPA_ON:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            out = self.weights(q, k, bias) @ v
        return out.transpose(1, 2).flatten(2)  # (B, N+1, D)

    def forward(self, x, bias):
        """x (B, N+1, D), bias (heads, N+1, N+1) or None -> (B, N+1, D)."""
        return self.proj(self.attend(x, bias))


class MLP(nn.Module):
    """fc2(GELU(fc1(x)))."""

    def __init__(self, config):
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden)
        self.fc2 = nn.Linear(hidden, config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(u, probability):
    """Stochastic depth: the factor of each sample's residual branch, from uniform numbers u.

    0, which drops the branch, where u < probability; 1 / (1 - probability) for the others.
    """
    return (u >= probability) / (1 - probability)


class Block(nn.Module):
    """Pre-LN Transformer block: x + gamma_1 Attention(LN(x)), then x + gamma_2 MLP(LN(x))."""

    def __init__(self, config, drop_path_rate):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        self.drop_path_rate = drop_path_rate
        self.gamma_1 = self.gamma_2 = None  # LayerScale
        if config.layer_scale > 0:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def keep(self, u):
        """Stochastic depth's factors of the two branches, from u (B, 2): each (B, 1, 1) or None."""
        if u is None or self.drop_path_rate == 0:
            return None, None
        return drop_path(u, self.drop_path_rate)[:, None].split(1, dim=-1)

    def residual(self, x, branch, gamma, keep):
        """x + keep * gamma * branch; None stands for 1."""
        # One factor, so that the branch, which is large, is read and written once.
        scale = keep if gamma is None else gamma if keep is None else keep * gamma
        return x + (branch if scale is None else branch * scale)

    def forward(self, x, bias, u=None):
        """x (B, N+1, D), bias (heads, N+1, N+1) or None, u (B, 2) or None -> (B, N+1, D).

        u: uniform numbers for stochastic depth, one for each branch; None: nothing is dropped.
        """
        keep_1, keep_2 = self.keep(u)
        x = self.residual(x, self.attn(self.norm1(x), bias), self.gamma_1, keep_1)
        return self.residual(x, self.mlp(self.norm2(x)), self.gamma_2, keep_2)

    def forward_at(self, x, bias, rows, u=None):
        """forward(x, bias, u)[rows] in less time; rows: indices (image, row), each (n,).

        Attention reads all rows of its input; after it, rows are independent: (n, D).
        """
        keep_1, keep_2 = (None if k is None else k[rows[0], 0] for k in self.keep(u))  # (n, 1)
        attended = self.attn.proj(self.attn.attend(self.norm1(x), bias)[rows])
        x = self.residual(x[rows], attended, self.gamma_1, keep_1)
        return self.residual(x, self.mlp(self.norm2(x)), self.gamma_2, keep_2)


# -------------------------------------------------------- the backbone


class PatchEmbed(nn.Module):
    """E: a convolution whose stride equals its kernel is a linear map of each flattened patch."""

    def __init__(self, config):
        super().__init__()
        P = config.patch_size
        self.proj = nn.Conv2d(3, config.dim, kernel_size=P, stride=P)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, N, D)


class Beit(nn.Module):
    """The backbone. A subclass adds a head.

    mask_embedding=True adds e_[M] and initialises as for pre-training. Fine-tuning has no e_[M]: it
    sees whole images, and DistributedDataParallel refuses a parameter that gets no gradient.
    """

    def __init__(self, config, mask_embedding=False):
        super().__init__()
        self.config = config
        self.recompute = False  # --recompute: trade time for memory
        self.patch_embed = PatchEmbed(config)  # E
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))  # e_[S]
        self.mask_token = self.pos_embed = self.rel_pos_bias = None
        if mask_embedding:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))  # e_[M]
        if config.positions == "absolute":  # E_pos (the paper prints N x D) has a row for e_[S]
            self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.dim))
        else:
            index = relative_position_index(config.grid)
            self.register_buffer("relative_position_index", index, persistent=False)
        if config.positions == "shared":
            self.rel_pos_bias = SharedRelativePosition(config)
        rates = np.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.init_weights(cut=STD if mask_embedding else 2.0)

    @torch.no_grad()
    def init_weights(self, cut):
        """Section 2.5: small values, as released; layer l's output projections / sqrt(2l)."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                init_weight(module.weight, cut)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for embedding in (self.cls_token, self.mask_token, self.pos_embed):
            if embedding is not None:
                init_weight(embedding, cut)
        for l, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2 * l))
            block.mlp.fc2.weight.div_(math.sqrt(2 * l))

    def embed(self, x, mask=None):
        """H_0 of the corrupted image x^M: (B, 3, H, W), mask (B, N) or None -> (B, N+1, D).

        e_[M] replaces a masked patch's projection before E_pos is added; e_[S] is never masked.
        Raises ValueError if the image does not have the configured size.
        """
        size = self.config.image_size
        if x.shape[-2:] != (size, size):
            height, width = x.shape[-2:]
            raise ValueError(f"images are {height}x{width} pixels, the model needs {size}x{size}")
        H = self.patch_embed(x)
        if mask is not None:
            H = torch.where(mask[:, :, None], self.mask_token.to(H.dtype), H)  # x^M: e_[M] in M
        H = torch.cat([self.cls_token.expand(len(H), -1, -1), H], dim=1)  # e_[S] first (B, N+1, D)
        return H if self.pos_embed is None else H + self.pos_embed

    def layers(self, u=None):
        """Yield (block, its attention bias or None, its part (B, 2) of u or None), l = 1, ..., L.

        A bias table that all blocks share is looked up once.
        """
        bias = None
        if self.rel_pos_bias is not None:
            table = self.rel_pos_bias.relative_position_bias_table
            bias = relative_bias(table, self.relative_position_index)
        for l, block in enumerate(self.blocks, start=1):
            if self.config.positions == "relative":
                table = block.attn.relative_position_bias_table
                bias = relative_bias(table, self.relative_position_index)
            yield block, bias, None if u is None else u[:, l - 1]

    def run(self, block, *inputs):
        """block(*inputs); with --recompute, the backward pass computes its activations again."""
        return checkpoint(block, *inputs, use_reentrant=False) if self.recompute else block(*inputs)

    def forward(self, x, mask=None, u=None):
        """H^L, before the head's norm: (B, 3, H, W), mask (B, N) bool or None -> (B, N+1, D).

        u: uniform numbers (B, L, 2) for stochastic depth; None: nothing is dropped.
        """
        H = self.embed(x, mask)  # H_0
        for block, bias, u_l in self.layers(u):
            H = self.run(block, H, bias, u_l)  # H^l = Transformer(H^(l-1))
        return H

    def forward_at(self, x, mask, positions, u=None):
        """h_i^L at some patches only: forward(x, mask, u)[:, 1:][positions], (n, D), in less time.

        positions: indices (image, i), int64 (n,) each. An optimisation of ours: only h_i^L for
        i in M is needed, so block L skips its projection and MLP elsewhere.
        """
        image, i = positions
        H = self.embed(x, mask)
        *layers, (last, bias, u_L) = self.layers(u)
        for block, bias_l, u_l in layers:
            H = self.run(block, H, bias_l, u_l)
        return self.run(last.forward_at, H, bias, (image, i + 1), u_L)  # row 0 is e_[S]

    def features(self, x, layer):
        """H^l of layer l, from 0, the embedding, to L: (B, 3, H, W) -> (B, N+1, D)."""
        H = self.embed(x)
        for block, bias, _ in itertools.islice(self.layers(), layer):
            H = block(H, bias)
        return H

    @torch.no_grad()
    def last_attention(self, x):
        """Attention weights of block L (figure 2): (B, 3, H, W) -> (B, heads, N+1, N+1)."""
        H = self.features(x, self.config.depth - 1)  # H^(L-1)
        *_, (last, bias, _) = self.layers()
        q, k, _ = last.attn.project(last.norm1(H))
        return last.attn.weights(q, k, bias)


# -------------------------------------------------------- other resolutions (section 3.1)


def resize_pos_embed(pos_embed, grid):
    """E_pos for another grid, bicubic: (1, 1 + n*n, D) -> (1, 1 + grid*grid, D)."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    patches = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (old, old)).float()  # (1, D, old, old)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def geometric_offsets(old, new):
    """The released code's places of a table's 2*old-1 offsets on the new grid: ±1, ±(1+q), ...

    Offset k is at 1 + q + ... + q^(k-1). Bisection finds the q for which the last one reaches
    new-1: near offsets keep their meaning, far ones stretch. 14 -> 24 patches gives q 1.0903,
    14 -> 32 gives 1.1349. q is at least 1.01: unless the grid grows enough, far offsets fall away.
    """
    low, high = 1.01, float(max(new - 1, 2))
    while high - low > 1e-9:
        q = (low + high) / 2
        low, high = (low, q) if np.sum(q ** np.arange(old - 1)) > new - 1 else (q, high)
    positive = np.cumsum(q ** np.arange(old - 1))
    return np.concatenate([-positive[::-1], [0.0], positive])


def cubic_spline_matrix(x, x_new):
    """(len(x_new), len(x)) matrix that evaluates the cubic spline through values at x.

    Built in the truncated-power basis 1, t, t², t³, (t - knot)³+ with knots at all but the two
    outermost points of each end, which makes it the "not-a-knot" spline.
    """

    def basis(t):
        powers = (t[:, None] / x[-1]) ** np.arange(4)  # of t in [-1, 1], for a stable inverse
        return np.hstack([powers, np.maximum(t[:, None] - x[None, 2:-2], 0) ** 3 / x[-1] ** 3])

    return basis(x_new) @ np.linalg.inv(basis(x))


def resize_relative_table(table, grid):
    """A relative table for another grid: ((2n-1)² + 3, heads) -> ((2 grid - 1)² + 3, heads).

    Cubic interpolation from geometric_offsets to unit spacing in both directions; the last three
    rows stay. Raises ValueError for a table of fewer than 3 x 3 patches: too few for a cubic.
    """
    side = math.isqrt(table.shape[0] - 3)
    old = (side + 1) // 2
    if old == grid:
        return table
    if old < 3:
        raise ValueError(f"a relative table of {old}x{old} patches is too small to be resized")
    new = np.arange(-(grid - 1), grid, dtype=np.float64)
    S = torch.from_numpy(cubic_spline_matrix(geometric_offsets(old, grid), new))
    square = table[:-3].double().T.unflatten(1, (side, side))  # (heads, side, side)
    square = (S @ square @ S.T).flatten(1).T
    return torch.cat([square.to(table.dtype), table[-3:]])


# -------------------------------------------------------- fine-tuning (section 2.6)


HEADS = ("mask_token", "lm_head.", "fc_norm.", "head.", "decoder.")  # beside the backbone


def finetuned_config(init, name, image_size, drop_path):
    """BeitConfig for fine-tuning: the checkpoint's, or --model's where `init` is None.

    A relative table shared by all blocks in pre-training becomes one table per block.
    """
    config = model_config(name) if init is None else BeitConfig(**init["config"])
    positions = "relative" if config.positions == "shared" else config.positions
    return replace(config, image_size=image_size, drop_path=drop_path, positions=positions)


def load_backbone(model, state, keep=()):
    """Copy a pre-trained or fine-tuned state dict into `model`, whatever its head and resolution.

    keep: which of HEADS to copy too; of the others the model keeps its own. The final norm is left
    out where only one side has it. A shared relative table is copied into every block if the model
    has one per block. Positions are interpolated. Raises ValueError naming whatever else is
    missing, left over or of another shape.
    """
    own = model.state_dict()
    heads = tuple(head for head in HEADS if head not in keep)
    if ("norm.weight" in own) != ("norm.weight" in state):
        heads += ("norm.",)
    state = {k: v for k, v in state.items() if not k.startswith(heads)}
    shared = "rel_pos_bias.relative_position_bias_table"
    if shared in state and model.config.positions == "relative":
        table = state.pop(shared)
        for number in range(model.config.depth):
            state[f"blocks.{number}.attn.relative_position_bias_table"] = table.clone()
    for key in state:
        if key == "pos_embed":
            state[key] = resize_pos_embed(state[key], model.config.grid)
        elif key.endswith("relative_position_bias_table"):
            state[key] = resize_relative_table(state[key], model.config.grid)
    state |= {k: v for k, v in own.items() if k.startswith(heads)}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit: {' '.join(str(error).split())[:400]}") from error


# -------------------------------------------------------- layer-wise learning-rate decay (appendix)


def layer_of(name, depth):
    """The layer of a parameter: 0 embeddings, l for block l (from 1), depth + 1 for the rest."""
    if name.startswith(("patch_embed.", "cls_token", "mask_token", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1  # head, final norm, shared relative table


def parameter_groups(model, weight_decay, layer_decay=1.0):
    """AdamW groups with `lr_scale` = d^(L+1-l) for layer l, and no decay for vectors, E_pos, e_[S].

    e_[M] and the relative tables are decayed, as in the released code.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        layer = layer_of(name, model.config.depth)
        decayed = parameter.ndim > 1 and name not in ("pos_embed", "cls_token")
        group = {
            "params": [],
            "lr_scale": layer_decay ** (model.config.depth + 1 - layer),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        groups.setdefault((layer, decayed), group)["params"].append(parameter)
    return list(groups.values())
