"""Which sample was taught where: counted on the device, read once per epoch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.engine.task import SpotUse


class SpotRecorder:
    """Counts the use of S spots by class over an epoch, and by training sample over the whole run.

    names   (name, kind) of every spot; classes, samples: how many there are
    origin  [samples] position of every sample in the data set, to find the images again; None: in order
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        classes: int,
        samples: int,
        device: torch.device,
        origin: Tensor | None = None,
    ) -> None:
        self.names = tuple(names)
        self.origin = torch.arange(samples) if origin is None else origin
        spots = len(self.names)
        self.taught_of_sample = torch.zeros(samples, spots, device=device)
        self.visits_of_sample = torch.zeros(samples, device=device)
        self._taught = torch.zeros(spots, classes, device=device)
        self._seen = torch.zeros(classes, device=device)
        self._probability = torch.zeros(spots, device=device)
        self._empty = torch.zeros(spots, device=device)
        self._events: dict[str, Tensor] = {}
        self._steps = 0
        self._has_policy = False

    def add(self, use: SpotUse, batch: Batch) -> None:
        """Count one batch; nothing is read back."""
        weight = use.weight.float()
        ones = torch.ones_like(batch.labels, dtype=torch.float32)
        self._taught.index_add_(1, batch.labels, weight)
        self._seen.index_add_(0, batch.labels, ones)
        self.taught_of_sample.index_add_(0, batch.index, weight.T)
        self.visits_of_sample.index_add_(0, batch.index, ones)
        self._empty += weight.sum(dim=1) == 0
        if use.probability is not None:
            self._probability += use.probability.float().sum(dim=1)
            self._has_policy = True
        for name, flag in use.events.items():
            self._events[name] = self._events.get(name, torch.zeros_like(flag)) + flag
        self._steps += 1

    def close_epoch(self, epoch: int) -> dict[str, Any]:
        """The epoch's line for `spots.jsonl`; the counters by class start anew."""
        seen, taught = self._seen.tolist(), self._taught.tolist()
        samples, steps = sum(seen), max(self._steps, 1)
        probability = (self._probability / max(samples, 1)).tolist() if self._has_policy else [None] * len(self.names)
        spots = [
            {
                "name": name,
                "kind": kind,
                "share": sum(row) / max(samples, 1),
                "probability": mean,
                "by_class": [count / total if total else None for count, total in zip(row, seen, strict=True)],
            }
            for (name, kind), row, mean in zip(self.names, taught, probability, strict=True)
        ]
        events = {name: float(count) / steps for name, count in self._events.items()}
        record = {"epoch": epoch, "samples": round(samples), "spots": spots, "empty": (self._empty / steps).tolist()}
        for counter in (self._taught, self._seen, self._probability, self._empty):
            counter.zero_()
        self._events, self._steps = {}, 0
        none = {"gamma_raised": None, "gamma_lowered": None, "count_active": None}
        return record | none | events

    def tensors(self) -> dict[str, Tensor]:
        """The record by sample, for `samples.safetensors` and the checkpoint."""
        return {"taught": self.taught_of_sample, "visits": self.visits_of_sample}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on with an earlier record."""
        self.taught_of_sample.copy_(tensors["taught"])
        self.visits_of_sample.copy_(tensors["visits"])
