"""The recipe's optimiser: parameter groups and the warm-up x poly schedule (SegFormer, arXiv 2105.15203)."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from segformer.errors import UserError, nearest

HEADS = ("decode_head.", "classifier.")  # of segmentation, of classification


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, head_lr_multiplier: float
) -> list[dict[str, Any]]:
    """Three AdamW groups; every parameter is in exactly one.

    The head learns `head_lr_multiplier` times faster and all of it is decayed, its BatchNorm included; the
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
        group = "head" if any(head in name for head in HEADS) else "norms" if id(parameter) in norms else "encoder"
        if parameter.requires_grad:
            groups[group].setdefault("params", []).append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


def warmup_poly(max_steps: int, warmup_steps: int, warmup_ratio: float, power: float) -> Callable[[int], float]:
    """Factor on the learning rate at optimiser step i: poly decay to zero, multiplied by a linear warm-up.

    (1 - i/N)^power * (1 - (1 - i/w)(1 - ratio)) for i < w, then (1 - i/N)^power. Source: mmcv's poly policy with
    linear warm-up, which multiplies the two (mmsegmentation 1.x chains them instead).
    """

    return partial(_warmed_up, lambda done: max(0.0, 1 - done) ** power, max_steps, warmup_steps, warmup_ratio)


def warmup_cosine(
    max_steps: int, warmup_steps: int, warmup_ratio: float, end_ratio: float = 0.0
) -> Callable[[int], float]:
    """Factor on the learning rate at optimiser step i: half a cosine from 1 down to end_ratio, times that warm-up.

    end + (1 - end) (1 + cos(pi i/N)) / 2, counted from step 0 as DeiT's (arXiv 2012.12877), whose warm-up replaces the
    first steps of the cosine instead, where it is 1 but for a thousandth.
    """

    def cosine(done: float) -> float:
        return end_ratio + (1 - end_ratio) * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    return partial(_warmed_up, cosine, max_steps, warmup_steps, warmup_ratio)


def _warmed_up(
    decay: Callable[[float], float], max_steps: int, warmup_steps: int, warmup_ratio: float, step: int
) -> float:
    """decay: of the share of the steps that is done."""
    factor = decay(step / max_steps)
    return factor if step >= warmup_steps else factor * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))


def adamw(
    model: nn.Module,
    max_steps: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    head_lr_multiplier: float,
    warmup_steps: int,
    warmup_ratio: float,
    power: float = 1.0,
    schedule: str = "poly",
    end_ratio: float = 0.0,
    fused: bool = True,
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """The recipe's optimiser and its schedule, counted in optimiser steps.

    schedule: "poly" with its power, or "cosine" with its end_ratio.
    """
    schedules = {"poly": partial(warmup_poly, power=power), "cosine": partial(warmup_cosine, end_ratio=end_ratio)}
    if schedule not in schedules:
        raise UserError(f"optim.schedule is {schedule!r}{nearest(schedule, schedules)}: choose from poly, cosine")
    groups = parameter_groups(model, lr, weight_decay, head_lr_multiplier)
    if not groups:
        raise UserError("model.freeze leaves nothing to learn: leave out a part of the network")
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused)
    factor = schedules[schedule](max_steps, warmup_steps, warmup_ratio)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
