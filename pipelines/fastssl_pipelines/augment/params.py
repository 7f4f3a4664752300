"""What was drawn for a batch of views: one row per sample.

Shapes: N batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl_pipelines.augment.sample_params import COLUMNS


@dataclass(frozen=True)
class Params:
    """`params["sigma"]` is a (N,) column of the (N, len(COLUMNS)) float32 `table`; integers are
    exact."""

    table: Tensor

    def __getitem__(self, column: str) -> Tensor:
        return self.table[:, COLUMNS.index(column)]

    def __len__(self) -> int:
        return len(self.table)

    def replace(self, **columns: Tensor | float) -> "Params":
        """A copy with some columns changed, to replay a view with other parameters."""
        table = self.table.clone()
        for name, values in columns.items():
            table[:, COLUMNS.index(name)] = torch.as_tensor(values, dtype=table.dtype).to(
                table.device
            )
        return Params(table)
