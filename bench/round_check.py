"""Whether a form of a federated round computes what another computes: the losses of its first steps."""

from __future__ import annotations

import numpy as np

from fastdlp.bench.runner import Losses
from fastdlp.errors import FastdlpError

# Of each loss of each client and step, by what its name begins with, relative to the loss's largest. Right forms of
# ViT-B/32 were found 4e-5 and 3e-4 off in fp32, 7e-3 and 1e-1 in bf16, at the learning rates of `problem.LR`. An update
# left out makes 7e-4 to 6e-3 and 3e-2 to 4e-2 in fp32; in bf16 2e-3 to 2e-2 and 1e-1 to 2e-1, which rounding comes too
# close to: there the steps behind the first show gross errors alone.
TOLERANCE = {"fp32": {"ce": 3e-4, "kd": 3e-3}, "bf16": {"ce": 3e-2, "kd": 3e-1}}
COMPARED = ("ce_local", "kd_local", "ce_global")


def compare(form: str, precision: str, losses: Losses, other: str, right: Losses) -> dict[str, np.ndarray]:
    """Errors [steps, clients] of each loss that both have, over the steps that `right` has, relative to its largest.

    Args:
        form, other: what a refusal names.
        precision: of the form.
        losses, right: of the form, and what they should be.

    Raises:
        FastdlpError: a loss is wrong; the message names the first.
    """
    shared = {name: value for name, value in right.items() if name in COMPARED}
    errors = {name: np.abs(losses[name][: len(value)] - value) / np.abs(value).max() for name, value in shared.items()}
    for step in range(len(next(iter(shared.values())))):
        for name, error in errors.items():
            allowed = TOLERANCE[precision][name[:2]]
            client = int(np.nan_to_num(error[step], nan=np.inf).argmax())
            if not error[step, client] <= allowed:
                raise FastdlpError(
                    f"{form} does not compute the losses of {other}: {name} of client {client} in step {step + 1} is "
                    f"{losses[name][step, client]:.6g}, expected {shared[name][step, client]:.6g} (allowed "
                    f"±{allowed:.0e} of its largest); it was not timed"
                )
    return errors
