import math
import re

import pytest
import torch

from segformer.config import VARIANTS, SegformerConfig
from segformer.errors import UserError
from segformer.model import SegformerForImageClassification, SegformerForSemanticSegmentation
from segformer.optim import adamw, parameter_groups, warmup_cosine, warmup_poly

RECIPE = {
    "lr": 6e-5,
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "head_lr_multiplier": 10,
    "warmup_ratio": 1e-6,
    "power": 1.0,
}


def test_every_parameter_is_in_exactly_one_group(tiny) -> None:
    groups = parameter_groups(tiny, lr=1.0, weight_decay=0.01, head_lr_multiplier=10)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in tiny.parameters())


# ours -> the names under which the original's rules see the parameters
ORIGINAL = (
    (r"segformer\.stages\.(\d)\.patch_embeddings\.layer_norm", r"backbone.patch_embed\1.norm"),
    (r"segformer\.stages\.(\d)\.patch_embeddings\.proj", r"backbone.patch_embed\1.proj"),
    (r"segformer\.stages\.(\d)\.layer_norm", r"backbone.norm\1"),
    (r"segformer\.stages\.(\d)\.blocks\.", r"backbone.block\1."),
    (r"attention\.layer_norm", "attn.norm"),
    (r"attention\.sequence_reduction", "attn.sr"),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.(q|kv)_proj", r"attn.\1"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    (r"linear_projections\.(\d)", r"linear_c\1.proj"),
    (r"linear_fuse\.", "linear_fuse.conv."),
    (r"decode_head\.batch_norm", "decode_head.linear_fuse.bn"),
    (r"decode_head\.classifier", "decode_head.linear_pred"),
)
RULES = {"pos_block": {"decay": 0.0}, "norm": {"decay": 0.0}, "head": {"lr": 10.0}}


def original(name: str) -> str:
    for ours, theirs in ORIGINAL:
        name = re.sub(ours, theirs, name)
    return name


@pytest.mark.parametrize("variant", VARIANTS)
def test_groups_follow_the_published_rules_on_the_published_names(variant) -> None:
    """mmcv: keys by length, longest first, ties by alphabet; the first one found in a name decides its multipliers."""
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(SegformerConfig.from_variant(variant, num_labels=150))
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, lr=6e-5, weight_decay=0.01, head_lr_multiplier=10)
        for parameter in group["params"]
    }
    seen = set()
    for name, parameter in model.named_parameters():
        rule: dict[str, float] = {}
        for key in sorted(sorted(RULES), key=len, reverse=True):
            if key in original(name):
                rule = RULES[key]
                break
        expected = (6e-5 * rule.get("lr", 1), 0.01 * rule.get("decay", 1))
        assert found[id(parameter)] == pytest.approx(expected, rel=1e-12), f"{name} = {original(name)}"
        seen.add(re.sub(r"\d", "", original(name)))
    assert {"backbone.norm.weight", "backbone.block..attn.norm.bias", "decode_head.linear_fuse.bn.weight"} <= seen
    assert len(found) == len(list(model.parameters()))


def test_schedule_multiplies_warmup_on_poly_for_both_rates(tiny) -> None:
    optimizer, schedule = adamw(tiny, max_steps=100, warmup_steps=10, **RECIPE)
    for step in range(101):
        poly = 1 - step / 100
        expected = 6e-5 * poly * (1 - (1 - step / 10) * (1 - 1e-6)) if step < 10 else 6e-5 * poly
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["encoder"] == rates["norms"] == pytest.approx(expected, rel=1e-9, abs=1e-18)
        assert rates["head"] == pytest.approx(10 * expected, rel=1e-9, abs=1e-17)
        optimizer.step()
        schedule.step()


def test_the_optimiser_is_the_papers(tiny) -> None:
    optimizer, _ = adamw(tiny, max_steps=100, warmup_steps=10, **RECIPE)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert not optimizer.defaults["amsgrad"]


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert warmup_poly(10, 0, 1e-6, 1.0)(0) == 1.0
    assert warmup_poly(10, 0, 1e-6, 0.9)(5) == pytest.approx(0.5**0.9)


def test_a_cosine_falls_to_what_is_left_of_the_rate(tiny) -> None:
    steps = {"max_steps": 100, "warmup_steps": 10, "schedule": "cosine", "end_ratio": 0.01}
    optimizer, schedule = adamw(tiny, **RECIPE | steps)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-5), T_max=100, eta_min=6e-7
    )
    for step in range(101):
        expected = theirs.get_last_lr()[0] * (1 - (1 - step / 10) * (1 - 1e-6) if step < 10 else 1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-6)
        optimizer.step()
        schedule.step()
        theirs.optimizer.step()
        theirs.step()
    assert warmup_cosine(100, 0, 1e-6)(50) == pytest.approx(0.5) and warmup_cosine(100, 0, 1e-6, 0.2)(100) == 0.2
    assert warmup_cosine(100, 0, 1e-6)(25) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_a_schedule_of_another_name_is_told(tiny) -> None:
    with pytest.raises(UserError, match="optim.schedule is 'cosin' .did you mean 'cosine'..: choose from poly, cosine"):
        adamw(tiny, max_steps=9, warmup_steps=1, schedule="cosin", **RECIPE)


def test_a_classifiers_head_is_its_linear_layer() -> None:
    model = SegformerForImageClassification(SegformerConfig.from_variant("b0", num_labels=3))
    groups = {group["name"]: group for group in parameter_groups(model, 1.0, 0.05, head_lr_multiplier=10)}
    assert [id(one) for one in groups["head"]["params"]] == [id(one) for one in model.classifier.parameters()]
    assert groups["head"]["lr"] == 10 and groups["norms"]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out(tiny) -> None:
    tiny.segformer.requires_grad_(False)
    groups = parameter_groups(tiny, lr=1.0, weight_decay=0.01, head_lr_multiplier=10)
    assert [group["name"] for group in groups] == ["head"]
    assert isinstance(torch.optim.AdamW(groups), torch.optim.AdamW)
