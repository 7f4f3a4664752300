"""Schedules step by step, parameter groups, and LARS against its published definition."""

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastssl.backbones import build_backbone
from fastssl.config import Config
from fastssl.objectives import build_objective, configured
from fastssl.optim import build_optimizer, parameter_groups, undecayed
from fastssl.schedule import learning_rate

CONFIG = Config(lr=0.1, weight_decay=0.01, momentum=0.9)
BARLOW = configured(Config(), method="barlow", projector_width=32)


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
    decayed, exempt = parameter_groups([net], 0.05, bias_lr=0.024)
    assert (decayed["lr_scale"], exempt["lr_scale"]) == (1.0, 0.024)
    assert decayed["weight_decay"] == 0.05 and [p.shape for p in decayed["params"]] == [(4, 3)]
    assert exempt["weight_decay"] == 0.0 and len(exempt["params"]) == 3


UNDECAYED = {
    "test_vit": ("cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"),
    "vit_mediumd_patch16_reg4_gap_256": ("reg_token", "blocks.0.ls1.gamma"),
    "beit_base_patch16_224": ("cls_token", "blocks.0.attn.relative_position_bias_table"),
    "swin_tiny_patch4_window7_224": ("layers.0.blocks.0.attn.relative_position_bias_table",),
    "swinv2_tiny_window8_256": (
        "layers.0.blocks.0.attn.logit_scale",  # (3, 1, 1)
        "layers.0.blocks.0.attn.cpb_mlp.0.weight",
    ),
    "convnext_atto": ("stages.0.blocks.0.gamma",),
    "fastvit_t8": ("stages.0.blocks.0.layer_scale.gamma",),  # (C, 1, 1)
    "resmlp_12_224": ("blocks.0.norm1.alpha", "blocks.0.ls1"),  # (1, 1, C)
    "xcit_nano_12_p16_224": ("blocks.0.attn.temperature", "pos_embed.token_projection.weight"),
    "levit_128s": ("stages.0.blocks.0.attn.attention_biases",),
    "twins_svt_small": ("pos_block.0.proj.0.weight",),
    "samvit_base_patch16": ("pos_embed", "blocks.0.attn.rel_pos_h"),
    "mvitv2_tiny": ("stages.0.blocks.0.attn.rel_pos_w",),
    "visformer_tiny": ("pos_embed1", "pos_embed2"),
    "botnet26t_256": ("stages.2.1.self_attn.pos_embed.height_rel",),
    "nf_ecaresnet26": ("stages.0.0.conv1.gain",),  # (C, 1, 1, 1)
    "crossvit_tiny_240": ("pos_embed_0", "cls_token_1"),
}


@pytest.mark.parametrize("name", UNDECAYED)
def test_what_weight_decay_must_not_pull_towards_zero(name: str) -> None:
    """In families of timm; every matrix and kernel that they do not name is decayed."""
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0)
    decayed, exempt = parameter_groups([net], 0.05)
    parameters = dict(net.named_parameters())
    assert len(decayed["params"]) + len(exempt["params"]) == len(parameters)
    spared = {id(p) for p in exempt["params"]}
    for k in UNDECAYED[name]:
        assert id(parameters[k]) in spared, k
    listed = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    named = {k for k in parameters if any(fnmatchcase(k, pattern) for pattern in listed)}
    for k, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert (id(module.weight) in spared) == (f"{k}.weight" in named), k


def test_parts_name_what_they_spare_and_a_layer_of_one_output_is_decayed() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mixing = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
            self.head = nn.Linear(4, 1)

        def no_weight_decay(self) -> set[str]:
            return {"tab*"}

    net = nn.Sequential(nn.Conv2d(1, 5, 1), nn.LayerNorm((5, 2, 2)), Part())
    assert set(undecayed(net)) == {"0.bias", "1.weight", "1.bias", "2.table", "2.head.bias"}


@pytest.mark.parametrize("backbone", ["fastnet-8", "resnet18"])
def test_groups_of_networks_without_such_parameters_are_by_rank(backbone: str) -> None:
    """In the same order as ever: the bits of a run depend on it."""
    with torch.device("meta"):
        modules = [build_backbone(backbone), build_objective(BARLOW, features=8, num_samples=9)]
    decayed, exempt = parameter_groups(modules, 0.05)
    parameters = [p for module in modules for p in module.parameters()]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in parameters if p.ndim > 1]
    assert [id(p) for p in exempt["params"]] == [id(p) for p in parameters if p.ndim <= 1]


def steps(
    optimizer: Optimizer, layer: nn.Linear, count: int = 4
) -> Iterator[tuple[Tensor, Tensor]]:
    """Take `count` steps with random gradients of weight and bias, yielding them before each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        gradients = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
        layer.weight.grad, layer.bias.grad = (g.clone() for g in gradients)
        yield gradients
        optimizer.step()


def layer_and_copies() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    return layer, layer.weight.detach().clone(), layer.bias.detach().clone()


@pytest.mark.parametrize("decay", [0.01, 0.0])
def test_lars_is_the_published_update(decay: float) -> None:
    """arXiv:1708.03888, algorithm 1: local lr = eta |w| / (|g| + decay |w|) for weights; biases
    take plain momentum SGD, undecayed."""
    layer, weight, bias = layer_and_copies()
    optimizer = build_optimizer(configured(CONFIG, optimizer="lars", weight_decay=decay), [layer])
    weight_buffer, bias_buffer = torch.zeros_like(weight), torch.zeros_like(bias)
    for gradient, bias_gradient in steps(optimizer, layer):
        local = 1e-3 * weight.norm() / (gradient.norm() + decay * weight.norm())
        weight_buffer = 0.9 * weight_buffer + local * (gradient + decay * weight)
        bias_buffer = 0.9 * bias_buffer + bias_gradient
        weight, bias = weight - 0.1 * weight_buffer, bias - 0.1 * bias_buffer
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), bias)


def test_lars_is_the_one_of_barlow_twins_and_vicreg() -> None:
    """Their codes divide by |g + decay w|. With their decay of 1e-6 that is the same to 1e-6;
    biases have a rate of their own, 0.0048 to 0.2."""
    layer, weight, bias = layer_and_copies()
    config = configured(CONFIG, optimizer="lars", weight_decay=1e-6, bias_lr=0.024, lr=0.2)
    optimizer = build_optimizer(config, [layer])
    buffers = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for group in optimizer.param_groups:  # as the training loop does
        group["lr"] = 0.2 * group["lr_scale"]
    for gradient, bias_gradient in steps(optimizer, layer):
        update = gradient + 1e-6 * weight
        buffers[0] = 0.9 * buffers[0] + update * (0.001 * weight.norm() / update.norm())
        buffers[1] = 0.9 * buffers[1] + bias_gradient
        weight, bias = weight - 0.2 * buffers[0], bias - 0.0048 * buffers[1]
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(layer.bias.detach(), bias, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("lr", [0.3, 1e-4])
def test_lars_is_the_one_of_emp_ssl(lr: float) -> None:
    """eta 0.005, clipped at the rate (which matters at the lower one), around Nesterov SGD with
    decay 1e-4; biases and norms excluded from both."""
    layer, weight, bias = layer_and_copies()
    config = configured(CONFIG, optimizer="lars", lr=lr, weight_decay=1e-4, nesterov=True)
    optimizer = build_optimizer(configured(config, lars_eta=0.005, lars_clip=True), [layer])
    buffers = [torch.zeros_like(weight), torch.zeros_like(bias)]
    ratios = []
    for gradient, bias_gradient in steps(optimizer, layer):
        ratio = 0.005 * weight.norm() / (gradient.norm() + 1e-4 * weight.norm() + 1e-8)
        ratios.append(min(float(ratio) / lr, 1.0))
        update = (gradient + 1e-4 * weight) * ratios[-1]
        buffers = [0.9 * buffers[0] + update, 0.9 * buffers[1] + bias_gradient]
        weight = weight - lr * (update + 0.9 * buffers[0])
        bias = bias - lr * (bias_gradient + 0.9 * buffers[1])
    assert all((ratio == 1) == (lr == 1e-4) for ratio in ratios)
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), bias)


def test_lars_without_a_gradient_or_a_weight_takes_plain_steps() -> None:
    layer = nn.Linear(5, 3)
    nn.init.zeros_(layer.weight)
    optimizer = build_optimizer(configured(CONFIG, optimizer="lars", momentum=0.0), [layer])
    gradient, _ = next(steps(optimizer, layer))
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), -0.1 * gradient)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimizer_descends(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 1)
    optimizer = build_optimizer(configured(CONFIG, optimizer=name), [layer])  # type: ignore[arg-type]
    x, y = torch.randn(64, 4), torch.randn(64, 1)
    losses = []
    for _ in range(30):
        loss = nn.functional.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
