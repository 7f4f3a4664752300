"""The networks of a finished run: its backbone, and its projector where the method has one.

Shapes: N batch, M data set, F features, D embedding, S pixels per side, V views.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.backbones import seeded_backbone
from fastssl.config import Config
from fastssl.data.loading import build_views
from fastssl.data.splits import Split
from fastssl.device import choose_device
from fastssl.evaluation.features import centre_features, extract
from fastssl.runtime.checkpoint import load_checkpoint
from fastssl.runtime.run_dir import read_config
from fastssl.weights import FILE, load_weights
from fastssl_pipelines import View
from fastssl_pipelines.augment import as_images, views_of

EPOCH = 2**32 - 1  # of the views sampled here; training never reaches it
VIEWS_AT_ONCE = 512
PREFIX = "objective.projector."

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TrainedRun:
    """A run's config, device, `backbone` (N, 3, S, S) -> (N, F), and `projector` (N, F) -> (N, D)
    or None; both in evaluation mode."""

    config: Config
    device: torch.device
    backbone: nn.Module
    projector: nn.Sequential | None

    def centre_features(self, split: Split, chosen: Tensor | None = None) -> Tensor:
        """Features (M, F) of one centre view of the images of `split`, or of the chosen ones."""
        function = partial(centre_features, self.config, self.backbone)
        return extract(split, {"centre": function}, chosen=chosen)[1]["centre"]

    def training_views(self, count: int) -> tuple[View, ...]:
        """`count` views of the run's policy, repeated in order."""
        return tuple(islice(cycle(build_views(self.config)), count))

    @torch.no_grad()
    def view_features(
        self, split: Split, count: int, network: Network, chosen: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`network` (N, 3, S, S) -> (N, F) of `count` augmented views of the images of `split`, or
        of the chosen ones, a few at a time: (numbers (N,), features (N, V, F) float32 on the CPU).
        The same views at every call."""
        views, seed = self.training_views(count), self.config.seed
        chunks = split.chunks(max(1, VIEWS_AT_ONCE // count), chosen)
        for numbers, pixels in split.batches(chunks):
            images, index = as_images(pixels).to(self.device), numbers.to(self.device)
            rendered, _ = views_of(images, views, seed, EPOCH, index)
            rows = network(torch.cat(list(rendered))).float().cpu()
            yield numbers, rows.unflatten(0, (count, len(index))).transpose(0, 1)


def load_trained_run(folder: Path, log: Callable[[str], None]) -> TrainedRun:
    """The networks of a run's folder. FileNotFoundError where it has not finished pretraining;
    damaged checkpoints are logged."""
    config = read_config(folder)
    device = choose_device(config.device)
    backbone = seeded_backbone(config, device)
    load_weights(folder / FILE, backbone)
    return TrainedRun(config, device, backbone.eval(), _load_projector(folder, device, log))


def _load_projector(
    folder: Path, device: torch.device, log: Callable[[str], None]
) -> nn.Sequential | None:
    """The projector of the newest checkpoint, whatever the method; None where there is none."""
    saved = load_checkpoint(folder / "checkpoint", device, log)
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
