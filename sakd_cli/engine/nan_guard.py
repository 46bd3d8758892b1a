"""Numbers that go wrong, caught on the device before they reach the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.engine.task import StepOutput
from sakd_cli.errors import NonFiniteError

LOWER = "a lower learning rate may help: --set train.lr=..."
SHOWN = 8  # images that a message names


class Guard:
    """Looks at every step's images, logits, loss terms and gradients; remembers the first that is NaN or infinite.

    Nothing is read back while looking: `found` is a flag on the device that keeps every later update from being made,
    and `check` reads it, at log points and before anything is saved; where reading costs nothing, in every step.
    """

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)  # 1 from the first bad step on
        self._names: tuple[str, ...] = ()
        self._bad = torch.zeros(0, dtype=torch.bool, device=device)  # per name, of the first bad step
        self._steps = torch.zeros((), dtype=torch.int64, device=device)  # looked at
        self._step = torch.zeros((), dtype=torch.int64, device=device)  # the first bad one
        self._rows = torch.full((0,), -1, dtype=torch.int64, device=device)
        self._cheap = device.type != "cuda"

    def go_on(self, step: int) -> None:
        """So many steps were done before the next."""
        self._steps.fill_(step)

    def inspect(self, batch: Batch, output: StepOutput, gradients: Sequence[Tensor]) -> Tensor:
        """Check a step before its update; returns 1 if it must be skipped. In place, for CUDA graphs."""
        self._steps.add_(1)
        norms = torch.stack(torch._foreach_norm(list(gradients))) if gradients else torch.zeros(1)
        rows = ~batch.images.flatten(1).isfinite().all(dim=1)
        flags = {"input": rows.any()}
        if output.logits is not None:
            wrong = ~output.logits.isfinite().all(dim=1)
            flags["logits"] = wrong.any()
            rows = rows | wrong
        parts = output.parts | {"total loss": output.loss.detach()}
        flags |= {name: ~part.isfinite() for name, part in parts.items()}
        flags["gradients"] = ~norms.to(rows.device).isfinite().all()
        bad = torch.stack(list(flags.values()))
        first = bad.any() & (self.found == 0)
        self._names = tuple(flags)
        if not len(self._bad):
            self._bad = torch.zeros_like(bad)
        self._bad.copy_(torch.where(first, bad, self._bad))
        self._step.copy_(torch.where(first, self._steps, self._step))
        named = torch.where(rows | ~rows.any(), batch.index, -1)
        if len(named) > len(self._rows):  # the first batch; or the second, where the run went on at a short one
            self._rows = torch.cat([self._rows, torch.full_like(named[len(self._rows) :], -1)])
        self._rows[: len(named)] = torch.where(first, named, self._rows[: len(named)])
        self.found.copy_(torch.where(first, 1.0, self.found))
        if self._cheap:
            self.check()
        return self.found

    def check(self) -> None:
        """Raise NonFiniteError naming the term, the step and the training images, if any step was bad."""
        if not self.found.item():
            return
        term = next(name for name, bad in zip(self._names, self._bad.tolist(), strict=True) if bad)
        rows = [row for row in self._rows.tolist() if row >= 0]
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        raise NonFiniteError(
            f"step {int(self._step)}: {term} is not finite, with training images "
            f"{', '.join(map(str, rows[:SHOWN]))}{more}; the weights were not changed",
            LOWER,
        )
