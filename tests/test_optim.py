"""Schedules step by step, parameter groups, and LARS against its published definition."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastssl.config import Config
from fastssl.optim import build_optimizer, learning_rate, parameter_groups

CONFIG = Config(lr=0.1, weight_decay=0.01, momentum=0.9)


def test_schedule_values() -> None:
    rates = [learning_rate(s, total=12, warmup=4, peak=2.0, final=0.1) for s in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[11] == pytest.approx(0.2)
    assert rates[8] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 4 / 7))))
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 5)])
def test_schedules_too_short_for_their_parts(total: int, warmup: int) -> None:
    rates = [
        learning_rate(s, total=total, warmup=warmup, peak=1.0, final=0.0) for s in range(total)
    ]
    assert all(0 <= rate <= 1 for rate in rates)


def test_vectors_are_not_decayed() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    decayed, exempt = parameter_groups([net], 0.05)
    assert decayed["weight_decay"] == 0.05 and [p.shape for p in decayed["params"]] == [(4, 3)]  # type: ignore[attr-defined]
    assert exempt["weight_decay"] == 0.0 and len(exempt["params"]) == 3  # type: ignore[arg-type]


def test_lars_is_the_published_update() -> None:
    """arXiv:1708.03888: local lr = trust |w| / (|g| + decay |w|) for weights; biases take plain
    momentum SGD."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    weight, bias = (p.detach().clone() for p in (layer.weight, layer.bias))
    optimizer = build_optimizer(replace(CONFIG, optimizer="lars"), [layer])
    weight_buffer, bias_buffer = torch.zeros_like(weight), torch.zeros_like(bias)
    for step in range(3):
        gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        bias_gradient = torch.ones(3) * (step + 1)
        layer.weight.grad, layer.bias.grad = gradient.clone(), bias_gradient.clone()
        optimizer.step()
        local = 1e-3 * weight.norm() / (gradient.norm() + 0.01 * weight.norm())
        weight_buffer = 0.9 * weight_buffer + local * (gradient + 0.01 * weight)
        bias_buffer = 0.9 * bias_buffer + bias_gradient
        weight, bias = weight - 0.1 * weight_buffer, bias - 0.1 * bias_buffer
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), bias)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimizer_descends(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    optimizer = build_optimizer(replace(CONFIG, optimizer=name), [layer])  # type: ignore[arg-type]
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
