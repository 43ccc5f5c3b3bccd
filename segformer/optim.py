"""The recipe's optimiser: parameter groups and the warm-up x poly schedule (SegFormer, arXiv 2105.15203)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, head_lr_multiplier: float
) -> list[dict[str, Any]]:
    """Three AdamW groups; every parameter is in exactly one.

    The decode head learns `head_lr_multiplier` times faster and all of it is decayed, its BatchNorm included; the
    encoder's LayerNorms are not decayed; the rest of the encoder, biases included, is. Source: NVlabs' paramwise rules
    ("head" lr x10, "norm" decay x0), which match the head's BatchNorm by neither name.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[str, dict[str, Any]] = {
        "encoder": {"lr": lr, "weight_decay": weight_decay},
        "norms": {"lr": lr, "weight_decay": 0.0},
        "head": {"lr": lr * head_lr_multiplier, "weight_decay": weight_decay},
    }
    for name, parameter in model.named_parameters():
        group = "head" if "decode_head." in name else "norms" if id(parameter) in norms else "encoder"
        if parameter.requires_grad:
            groups[group].setdefault("params", []).append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


def warmup_poly(max_steps: int, warmup_steps: int, warmup_ratio: float, power: float) -> Callable[[int], float]:
    """Factor on the learning rate at optimiser step i: poly decay to zero, multiplied by a linear warm-up.

    (1 - i/N)^power * (1 - (1 - i/w)(1 - ratio)) for i < w, then (1 - i/N)^power. Source: mmcv's poly policy with
    linear warm-up, which multiplies the two (mmsegmentation 1.x chains them instead).
    """

    def factor(step: int) -> float:
        poly = max(0.0, 1 - step / max_steps) ** power
        if step >= warmup_steps:
            return poly
        return poly * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))

    return factor


def adamw(
    model: nn.Module,
    max_steps: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    head_lr_multiplier: float,
    warmup_steps: int,
    warmup_ratio: float,
    power: float,
    fused: bool = True,
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The recipe's optimiser and its schedule, counted in optimiser steps."""
    groups = parameter_groups(model, lr, weight_decay, head_lr_multiplier)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused)
    factor = warmup_poly(max_steps, warmup_steps, warmup_ratio, power)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
