"""The backbone in a file of weights: its configuration and its parameters' names and shapes.

They are known without the model (beit.py), so that a file is refused before a model is made of it.
"""

import math

from plumbing import entries, weights

LARGEST_GRID = 256  # patches along a side, with relative positions: their pairs alone take 34 GB

HEADS = {  # kind of checkpoint: beginnings of the names of its parameters beside the backbone's
    "pretraining": ("mask_token", "norm.", "lm_head."),
    "classification": ("fc_norm.", "head."),
    "segmentation": ("norm.", "decoder."),
}


def block_count(state, prefix):
    """The number of blocks in a state dict whose blocks are named PREFIX0., PREFIX1., and so on."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def assumed_heads(dim):
    """The heads of a published model, from its width: with E_pos nothing else tells them."""
    return max(1, dim // 64)


def inferred_config(state):
    """Infer the fields of BeitConfig, as a dict, from a state dict under the released names.

    A relative table has one column per head. With E_pos the tensors do not determine the number of
    heads; it follows from a width of 64 per head, as in every published model. Nor do they
    determine LayerScale's initial value: any number above 0 says that the model has LayerScale.
    Raises ValueError if these are not the weights of a BEiT.
    """
    not_beit = "these are not the weights of a BEiT"
    first = ", ".join(name[:80] for name in list(state)[:3])
    tables = [value for key, value in state.items() if key.endswith("relative_position_bias_table")]
    missing = {"patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} - state.keys()
    if missing:
        raise ValueError(f"{not_beit}: no {', '.join(sorted(missing))}; they begin {first}")
    if ("pos_embed" in state) == bool(tables):
        raise ValueError(
            f"{not_beit}: either E_pos or relative tables are needed; they begin {first}"
        )
    sizes = [state["patch_embed.proj.weight"].shape, state["blocks.0.mlp.fc1.weight"].shape]
    positions = tables[0].shape if tables else state["pos_embed"].shape
    if [*map(len, sizes), len(positions)] != [4, 2, 2 if tables else 3] or not all(sizes[0]):
        raise ValueError(f"{not_beit}: patch_embed, mlp.fc1 or positions have other shapes")
    (dim, _, patch, _), (hidden, _) = sizes
    if tables:
        grid = (math.isqrt(max(positions[0] - 3, 0)) + 1) // 2  # (2 grid - 1)**2 + 3 rows
        heads = positions[1]
        shared = "rel_pos_bias.relative_position_bias_table" in state
    else:
        grid = math.isqrt(max(positions[1] - 1, 0))
        heads = assumed_heads(dim)
    if not heads or dim % heads:
        raise ValueError(f"{not_beit}: width {dim} is not a multiple of {heads} heads")
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "dim": dim,
        "depth": block_count(state, "blocks."),
        "heads": heads,
        "mlp_ratio": hidden / dim,
        "positions": ("shared" if shared else "relative") if tables else "absolute",
        "layer_scale": 0.1 if "blocks.0.gamma_1" in state else 0.0,
        "drop_path": 0.0,
    }


def check(path, found):
    """Check a file's configuration and backbone against each other, before a model is made.

    found: see load_pretrained. The tensors determine every field of the configuration except the
    initial value of LayerScale, stochastic depth and, with E_pos, the heads, so a file cannot claim
    a model larger than itself. Raises ValueError naming the field, or the tensor that does not fit.
    """
    config, state, inferred = found["config"], found["model"], inferred_config(found["model"])
    entries.check_config(path, config, {name: type(value) for name, value in inferred.items()})
    free = {"drop_path", "mlp_ratio"}
    free |= {"heads"} if inferred["positions"] == "absolute" else set()
    inferred["layer_scale"] = config["layer_scale"] if inferred["layer_scale"] else 0.0
    for name, value in inferred.items():
        if name not in free and config[name] != value:
            wrong = f"{name} is {entries.shown(config[name])}, but {value} by its tensors"
            raise ValueError(f"{path}: config: {wrong}")
    if config["drop_path"] >= 1 or config["dim"] % config["heads"]:
        raise ValueError(f"{path}: config: drop_path or heads are out of range")
    grid = config["image_size"] // config["patch_size"]
    if grid > LARGEST_GRID and inferred["positions"] != "absolute":
        raise ValueError(f"{path}: relative positions of {grid} x {grid} patches are too many")
    backbone = {
        name: value for name, value in state.items()
        if not name.startswith(sum(HEADS.values(), ()))
    }  # fmt: skip
    weights.check_shapes(path, backbone, backbone_shapes(config))
    head = {name: value for name, value in state.items() if name not in backbone}
    ours = "arguments" in found  # published files have any part of a head, or none
    wanted = HEADS[found["kind"]] if ours else tuple(head)
    shapes = {name: s for name, s in head_shapes(found).items() if name.startswith(wanted)}
    weights.check_shapes(path, head, shapes)
    classes = found.get("classes")
    if found["kind"] == "classification" and classes and len(classes) != len(head["head.bias"]):
        count = len(head["head.bias"])
        raise ValueError(f"{path}: classes has {len(classes)} names, but its head {count} outputs")


def backbone_shapes(config):
    """{name: shape} of the backbone's parameters, from the fields of BeitConfig."""
    D, P, grid = config["dim"], config["patch_size"], config["image_size"] // config["patch_size"]
    hidden, table = int(D * config["mlp_ratio"]), ((2 * grid - 1) ** 2 + 3, config["heads"])
    vectors = ["norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.proj.bias"]
    vectors += ["norm2.weight", "norm2.bias", "mlp.fc2.bias"]
    vectors += ["gamma_1", "gamma_2"] if config["layer_scale"] > 0 else []
    block = dict.fromkeys(vectors, (D,)) | {
        "attn.qkv.weight": (3 * D, D),
        "attn.proj.weight": (D, D),
        "mlp.fc1.weight": (hidden, D),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (D, hidden),
    }
    shapes = {"cls_token": (1, 1, D), "patch_embed.proj.weight": (D, 3, P, P)}
    shapes["patch_embed.proj.bias"] = (D,)
    if config["positions"] == "absolute":
        shapes["pos_embed"] = (1, grid**2 + 1, D)
    elif config["positions"] == "shared":
        shapes["rel_pos_bias.relative_position_bias_table"] = table
    else:
        block["attn.relative_position_bias_table"] = table
    for l in range(config["depth"]):
        shapes |= {f"blocks.{l}.{name}": shape for name, shape in block.items()}
    return shapes


def head_shapes(found):
    """{name: shape} of the heads' parameters and e_[M], of those in a file or that it must have.

    The number of outputs is that of the file's own tensor, at least 1.
    """
    state, config = found["model"], found["config"]
    D = config["dim"]
    shapes = {"mask_token": (1, 1, D)}
    shapes |= {f"{n}.{part}": (D,) for n in ("norm", "fc_norm") for part in ("weight", "bias")}
    for name in ("lm_head", "head"):
        count = max([1, *state[f"{name}.weight"].shape[:1]]) if f"{name}.weight" in state else 1
        shapes |= {f"{name}.weight": (count, D), f"{name}.bias": (count,)}
    if found["kind"] == "segmentation":
        width, stages = found["decoder_dim"], config["patch_size"].bit_length() - 1
        for l, n in enumerate([D] + [width] * (stages - 1) if stages else []):
            shapes[f"decoder.{l}.0.weight"] = (n, width, 4, 4)
            names = f"decoder.{l}.0.bias", f"decoder.{l}.1.weight", f"decoder.{l}.1.bias"
            shapes |= dict.fromkeys(names, (width,))
        count = len(found["classes"])
        shapes |= {f"decoder.{stages}.weight": (count, width if stages else D, 1, 1)}
        shapes |= {f"decoder.{stages}.bias": (count,)}
    return shapes
