"""FedAvg: the server's branch is Σ n_k / n · client k's, A and B averaged separately (FEDDLP, section IV).

To weight clients in another way, change `client_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdlp.engine.schedule import Slot

CHUNK = 64  # clients summed at once: a copy in fp64 of a thousand clients' rows is large


def client_weights(slots: Sequence[Slot]) -> Tensor:
    """The weight of each client before normalization, its number of training samples: fp64 [clients]."""
    return torch.tensor([len(slot.train) for slot in slots], dtype=torch.float64)


def weighted_sum(weights: Tensor, rows: Sequence[int], client_weights: Tensor) -> Tensor:
    """Σ w_k · weights[rows[k]] in fp64.

    The product of a count and an fp32 number is exact in fp64, and their sum nearly always: the order of the clients,
    and so the number of processes, does not change the average.

    Args:
        weights: [slots, D] fp32.
        rows: of the clients that are summed.
        client_weights: [len(rows)] fp64.

    Returns:
        [D] fp64.
    """
    total = torch.zeros(weights.shape[1], dtype=torch.float64, device=weights.device)
    for start in range(0, len(rows), CHUNK):
        chunk = slice(start, start + CHUNK)
        total += client_weights[chunk].to(weights.device) @ weights[list(rows[chunk])].double()
    return total
