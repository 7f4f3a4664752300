"""What an evaluation has finished, in the run folder: one that was killed resumes from it, and the
ranks of a launch share the features through it.

Shapes: M images of a part, F features.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.evaluation.probes import Accuracy
from fastssl.runtime.run_dir import write_text

Saved = dict[str, Any]  # of tensors, strings, and containers of them
Cell = tuple[str, str]  # kind of features, probe and labels


class PartialResults:
    """The folder evaluation-KEY in a run folder, where KEY is a hash of the backbone's weights and
    of `settings`, on which the results depend; so results of other settings are never used.

    Where it cannot be written, as on a full disk, that is logged and the evaluation continues.
    """

    def __init__(self, run: Path, settings: Mapping[str, Any], log: Callable[[str], None]):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        backbone = run / "backbone.safetensors"
        if backbone.is_file():  # else loading it fails, with the reason
            digest.update(hashlib.sha256(backbone.read_bytes()).digest())
        self.folder = run / f"evaluation-{digest.hexdigest()[:12]}"
        self._log, self._writable = log, True

    def load_features(self) -> Saved | None:
        """What `save_features` saved, on the CPU and mapped from the file, so that the ranks of a
        machine hold it once; None where it is absent or damaged."""
        try:
            return torch.load(
                self.folder / "features.pt", map_location="cpu", mmap=True, weights_only=True
            )
        except Exception:  # whatever a damaged file makes the reader raise
            return None

    def save_features(self, features: Saved) -> None:
        """Write the features, unless that would take more than half of the free disk space."""
        path = self.folder / "features.pt"

        def write() -> None:
            if 2 * _bytes(features) > shutil.disk_usage(self.folder).free:
                raise OSError("the features would fill half of the disk")
            torch.save(features, path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)

        self._try(write)

    def load_accuracies(self) -> dict[Cell, Accuracy]:
        """The accuracies that all ranks have saved."""
        found: dict[Cell, Accuracy] = {}
        for path in self.folder.glob("accuracies-*.json"):
            try:
                rows = json.loads(path.read_text())
                found |= {(kind, name): Accuracy(**cell) for kind, name, cell in rows}
            except (OSError, ValueError, TypeError):
                continue  # damaged: they are computed again
        return found

    def save_accuracies(self, rank: int, accuracies: Mapping[Cell, Accuracy]) -> None:
        """Write all that `rank` has computed."""
        rows = [[*cell, asdict(accuracy)] for cell, accuracy in accuracies.items()]
        text = json.dumps(rows)
        self._try(lambda: write_text(self.folder / f"accuracies-{rank}.json", text))

    def delete(self) -> None:
        """Delete the folder, and those that killed evaluations with other settings left."""
        for folder in self.folder.parent.glob("evaluation-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _try(self, write: Callable[[], None]) -> None:
        if not self._writable:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            write()
        except (OSError, RuntimeError) as error:  # torch.save on a full disk: RuntimeError
            self._writable = False
            self._log(f"this evaluation cannot resume if it is interrupted: {error}")


def _bytes(saved: Any) -> int:
    """The bytes of all tensors in containers of them."""
    if isinstance(saved, Tensor):
        return saved.nbytes
    if isinstance(saved, dict):
        saved = list(saved.values())
    return sum(_bytes(part) for part in saved) if isinstance(saved, list | tuple) else 0
