"""Independent implementations to compare with: timm, transformers, dall-e, scipy and Pillow.

Only experiments.verify, experiments.benchmark and experiments.scale_check need these packages.
"""

import importlib

import torch

TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def import_oracle(name):
    """Import one of the packages. Raises ValueError if that fails.

    timm and transformers import torchvision. Without its compiled part torchvision lacks two
    operators, which neither of them calls, so they are declared here.
    """
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            arguments = "Tensor dets, Tensor scores, float iou_threshold"
            TORCHVISION.define(f"{operator}({arguments}) -> Tensor")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {name} ({error}): --help lists the packages to install"
        ) from error


def timm_beit(config, classes, drop_path=0.0, pool="avg"):
    """timm's Beit with the shape of our BeitConfig.

    classes: of the classifier; 0: no classifier. drop_path: stochastic depth, 0 by default to
    compare outputs. pool: timm's global_pool, "" to keep all N + 1 positions.
    """
    return import_oracle("timm.models.beit").Beit(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=classes,
        global_pool=pool,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=drop_path,
        init_values=config.layer_scale,
        use_abs_pos_emb=config.positions == "absolute",
        use_rel_pos_bias=config.positions == "relative",
        use_shared_rel_pos_bias=config.positions == "shared",
    )


def transformers_config(config, vocab_size=0, classes=0, drop_path=0.0):
    """Our BeitConfig as a BeitConfig of transformers.

    vocab_size: |V| of masked image modeling, which also adds e_[M]; 0: neither. classes: of the
    classifier; 0: no classifier. drop_path: stochastic depth, 0 by default to compare outputs.
    """
    return import_oracle("transformers").BeitConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=int(config.dim * config.mlp_ratio),
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=1e-6,
        layer_scale_init_value=float(config.layer_scale),
        drop_path_rate=drop_path,
        use_absolute_position_embeddings=config.positions == "absolute",
        use_relative_position_bias=config.positions == "relative",
        use_shared_relative_position_bias=config.positions == "shared",
        use_mask_token=vocab_size > 0,
        vocab_size=vocab_size,
        num_labels=classes,
    )
