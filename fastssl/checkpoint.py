"""Checkpoints: written whole or not at all, read without running what is in them."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "last.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by `state` (tensors, numbers and containers of them)."""
    folder.mkdir(exist_ok=True)
    temporary = folder / (FILE + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / FILE)


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The state last saved in `folder`, or None. Pickled code is refused (`weights_only`)."""
    path = folder / FILE
    return torch.load(path, map_location=device, weights_only=True) if path.is_file() else None


def save_backbone(path: Path, backbone: nn.Module) -> None:
    """The backbone's parameters and buffers as safetensors, under timm's names for a timm model."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def load_backbone(path: Path, backbone: nn.Module) -> None:
    """Fill every tensor of `backbone` from a file of `save_backbone`; ValueError where one is
    missing or strange."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run has not finished its pretraining")
    tensors: dict[str, Tensor] = load_file(path)
    wanted = backbone.state_dict()
    wrong = sorted(set(tensors) ^ set(wanted)) or [
        k for k in wanted if wanted[k].shape != tensors[k].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} is not this backbone: {len(wrong)} tensors do not fit, first {wrong[0]}"
        )
    backbone.load_state_dict(tensors)
