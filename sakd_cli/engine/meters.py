"""Running means that stay on the device until they are read."""

import torch
from torch import Tensor


class Meter:
    """Means over the batches since the last read, each batch counted with its number of samples."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def add(self, samples: int, values: dict[str, Tensor]) -> None:
        """Add one batch of scalar means; nothing is read back."""
        self._samples += samples
        for name, value in values.items():
            scaled = value.detach() * samples
            self._sums[name] = self._sums[name] + scaled if name in self._sums else scaled

    def read(self) -> dict[str, float]:
        """The means, in one read of the device, and start anew."""
        if not self._samples:
            return {}
        means = torch.stack(list(self._sums.values())) / self._samples
        values = dict(zip(self._sums, means.tolist(), strict=True))
        self._sums, self._samples = {}, 0
        return values

    def state(self) -> tuple[dict[str, Tensor], int]:
        """The sums since the last read, and of how many samples they are."""
        return dict(self._sums), self._samples

    def load(self, sums: dict[str, Tensor], samples: int) -> None:
        """Go on with these sums."""
        self._sums, self._samples = dict(sums), samples


def top1(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers in percent, a scalar on the device."""
    return (logits.argmax(dim=1) == labels).float().mean() * 100.0
