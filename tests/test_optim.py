import pytest
import torch

from segformer.optim import adamw, parameter_groups, warmup_poly

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


def test_groups_follow_the_published_name_rules(tiny) -> None:
    """The original matches substrings of its own names: head first, then norm; restated on ours."""
    groups = {
        id(p): g for g in parameter_groups(tiny, lr=1.0, weight_decay=0.01, head_lr_multiplier=10) for p in g["params"]
    }
    for name, parameter in tiny.named_parameters():
        group = groups[id(parameter)]
        head = "head" in name
        norm = "layer_norm" in name or "layernorm" in name
        assert group["lr"] == (10.0 if head else 1.0), name
        assert group["weight_decay"] == (0.0 if norm and not head else 0.01), name


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


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert warmup_poly(10, 0, 1e-6, 1.0)(0) == 1.0
    assert warmup_poly(10, 0, 1e-6, 0.9)(5) == pytest.approx(0.5**0.9)


def test_frozen_parameters_are_left_out(tiny) -> None:
    tiny.segformer.requires_grad_(False)
    groups = parameter_groups(tiny, lr=1.0, weight_decay=0.01, head_lr_multiplier=10)
    assert [group["name"] for group in groups] == ["head"]
    assert isinstance(torch.optim.AdamW(groups), torch.optim.AdamW)
