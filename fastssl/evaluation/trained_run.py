"""A finished run's networks, frozen: its backbone, and its projector where the method has one.

Shapes: N batch, M data set, F features, D embedding, S pixels per side, V views.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.config import Config, read_config
from fastssl.data.datasets import Images
from fastssl.data.loading import build_views, centre_features, choose_device, seeded_backbone
from fastssl.runtime.checkpoint import load_backbone, load_checkpoint
from fastssl_pipelines import View
from fastssl_pipelines.engines.base import EngineSettings
from fastssl_pipelines.engines.resident import ResidentPipeline

EPOCH = 2**32 - 1  # of the views drawn here; no training reaches it
VIEWS_AT_ONCE = 512
PREFIX = "objective.projector."

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Frozen:
    """A run's config, device, `backbone` (N, 3, S, S) -> (N, F), and `projector` (N, F) -> (N, D)
    or None; both in evaluation mode."""

    config: Config
    device: torch.device
    backbone: nn.Module
    projector: nn.Sequential | None

    @torch.no_grad()
    def centre_features(self, images: Images) -> Tensor:
        """Features (M, F) of one centre view of images (M, S, S, 3)."""
        return centre_features(self.config, self.backbone, images)

    def training_views(self, count: int) -> tuple[View, ...]:
        """`count` views of the run's policy, its own in turn."""
        return tuple(islice(cycle(build_views(self.config)), count))

    @torch.no_grad()
    def view_features(self, images: Images, count: int, network: Network) -> Iterator[Tensor]:
        """`network` (N, 3, S, S) -> (N, F) of `count` augmented views of all images: (N, V, F)
        float32 on the CPU, a few images at a time. The same views whenever it is asked."""
        views, seed = self.training_views(count), self.config.seed
        settings = EngineSettings(views=views, batch_size=1, seed=seed, device=self.device)
        pipeline = ResidentPipeline(images, settings)
        everything = torch.arange(len(images), device=self.device)
        for index in everything.split(max(1, VIEWS_AT_ONCE // count)):
            rendered = pipeline.batch(index, EPOCH).views
            rows = network(torch.cat(list(rendered))).float().cpu()
            yield rows.unflatten(0, (count, len(index))).transpose(0, 1)


def load_frozen(folder: Path, say: Callable[[str], None]) -> Frozen:
    """The networks of a run's folder. FileNotFoundError where it has not finished its pretraining;
    `say` hears of checkpoints that are damaged."""
    config = read_config(folder)
    device = choose_device(config.device)
    backbone = seeded_backbone(config, device)
    load_backbone(folder / "backbone.safetensors", backbone)
    return Frozen(config, device, backbone.eval(), _load_projector(folder, device, say))


def _load_projector(
    folder: Path, device: torch.device, say: Callable[[str], None]
) -> nn.Sequential | None:
    """The projector of the newest checkpoint, whatever the method; None where there is none."""
    saved = load_checkpoint(folder / "checkpoint", device, say)
    modules: dict[str, Tensor] = saved["modules"] if saved else {}
    state = {k.removeprefix(PREFIX): v for k, v in modules.items() if k.startswith(PREFIX)}
    weights = [tensor for tensor in state.values() if tensor.ndim == 2]
    if not weights:
        return None
    layers: list[nn.Module] = []
    for weight in weights:
        out, width = weight.shape
        layers += [nn.Linear(width, out, bias=False), nn.BatchNorm1d(out), nn.ReLU()]
    projector = nn.Sequential(*layers[:-2]).to(device)
    projector.load_state_dict(state)
    return projector.eval()
