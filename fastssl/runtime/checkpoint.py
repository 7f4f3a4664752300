"""Checkpoints: written whole or not at all, checked before they are believed, read without running
code.

A checkpoint is one file whose name holds its step and the checksum of its bytes, put in place by a
rename. Two are kept: where the newest does not match its checksum, the one before it is taken.
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEPT = 2
NAME = re.compile(r"step-(\d{9,})-([0-9a-f]{16})\.pt")


class _HashingFile:
    """Passes bytes on to a file and hashes them."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Add the checkpoint of `step` to `folder`: tensors, numbers, strings and containers of them.

    The checkpoints there stay valid whenever the process or the machine stops; only when the new
    one is safely on the disk do the oldest go.
    """
    folder.mkdir(exist_ok=True)
    temporary = folder / "writing.tmp"
    with open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        torch.save(state, hashing)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / f"step-{step:09d}-{hashing.hash.hexdigest()[:16]}.pt")
    _sync_folder(folder)
    for path in checkpoints(folder)[KEPT:]:
        path.unlink()


def load_checkpoint(
    folder: Path, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The newest valid state in `folder`, or None where nothing was ever saved there.

    Names every checkpoint that it passes over. Raises ValueError where there are some and none is
    valid: to start again silently would lose a run. Pickled code is refused (`weights_only`).
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            _check(path)
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # whatever a damaged or hostile file makes the reader raise
            say(f"{path} is not used: {' '.join(str(error).split())[:200]}")
    if paths:
        raise ValueError(
            f"no checkpoint in {folder} is valid; delete {folder.parent} to start again"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files in `folder`, newest first."""
    found = [path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _check(path: Path) -> None:
    """ValueError where the file is not the one that was written under this name."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not path.name.endswith(f"-{digest[:16]}.pt"):
        raise ValueError("its checksum is wrong, so it is damaged")


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_backbone(path: Path, backbone: nn.Module) -> None:
    """The backbone's parameters and buffers as safetensors, under timm's names for a timm model."""
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()
    }
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def load_backbone(path: Path, backbone: nn.Module, *, partial: bool = False) -> str:
    """Fill every tensor of `backbone` from a file of `save_backbone`; returns the coverage, "loaded
    62 of 62 tensors".

    Anything less is a ValueError, unless `partial` asks for the tensors that fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run has not finished its pretraining")
    tensors: dict[str, Tensor] = load_file(path)
    wanted = backbone.state_dict()
    fitting = {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted and wanted[name].shape == tensor.shape
    }
    coverage = f"loaded {len(fitting)} of {len(wanted)} tensors"
    wrong = sorted((set(tensors) | set(wanted)) - set(fitting))
    if wrong and not (partial and fitting):
        raise ValueError(
            f"{path} is not this backbone: {len(fitting)} of its {len(wanted)} tensors fit, first "
            f"that does not: {wrong[0]}"
        )
    backbone.load_state_dict(fitting, strict=not wrong)
    return coverage
