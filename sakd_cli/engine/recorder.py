"""What is counted on the device and read at times: which sample was distilled at which spot, running means."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sakd_cli.documents.spots import STEP_MEANS, EpochRecord, SpotInEpoch
from sakd_cli.engine.task import SpotUse
from sakd_cli.errors import UsageError


class SpotRecorder:
    """Counts the use of S spots by class over an epoch, and by training sample over the run.

    names   (name, kind) of every spot
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
        shapes = {
            "sample_distilled": (samples, spots),  # over the whole run
            "sample_visits": (samples,),
            "distilled": (spots, classes),  # since the last `close_epoch`, as all that follow
            "seen": (classes,),
            "probability": (spots,),
            "empty": (spots,),
            "steps": (),
            "steps_with_policy": (),
        }
        self._counts = {name: torch.zeros(shape, dtype=torch.float32, device=device) for name, shape in shapes.items()}
        self._events: dict[str, Tensor] = {}

    def add(self, use: SpotUse, labels: Tensor, index: Tensor) -> None:
        """Count one batch, of samples with these labels [N] and places [N]; nothing is read back."""
        weight = use.weight.float()
        ones = torch.ones_like(labels, dtype=torch.float32)
        counts = self._counts
        counts["distilled"].index_add_(1, labels, weight)
        counts["seen"].index_add_(0, labels, ones)
        counts["sample_distilled"].index_add_(0, index, weight.T)
        counts["sample_visits"].index_add_(0, index, ones)
        counts["empty"] += weight.sum(dim=1) == 0
        counts["steps"] += 1
        if use.probability is not None:
            counts["probability"] += use.probability.float().sum(dim=1)
            counts["steps_with_policy"] += 1
        for name, flag in use.events.items():
            self._events[name] = self._events.get(name, torch.zeros_like(flag)) + flag

    def close_epoch(self, epoch: int) -> EpochRecord:
        """The epoch's line for `spots.jsonl`; the counters by class start anew."""
        of_epoch = {name: count for name, count in self._counts.items() if not name.startswith("sample")}
        counts: dict[str, Any] = {name: count.tolist() for name, count in of_epoch.items()}
        seen, with_policy = counts["seen"], counts["steps_with_policy"] > 0
        samples, steps = sum(seen), max(counts["steps"], 1)
        rows = counts["distilled"], counts["probability"]
        spots = [
            SpotInEpoch(
                name=name,
                kind=kind,
                fraction=sum(row) / max(samples, 1),
                probability=probability / max(samples, 1) if with_policy else None,
                by_class=[count / total if total else None for count, total in zip(row, seen, strict=True)],
            )
            for (name, kind), row, probability in zip(self.names, *rows, strict=True)
        ]
        if any(not 0 <= (spot.fraction or 0) <= 1 for spot in spots):
            raise UsageError("the router gives weights outside of [0, 1]", "sakd guide extending")
        means: dict[str, float | None] = dict.fromkeys(STEP_MEANS)
        means |= {name: float(count) / steps for name, count in self._events.items()}
        for count in of_epoch.values():
            count.zero_()
        self._events = {}
        empty = [times / steps for times in counts["empty"]]
        return EpochRecord(epoch=epoch, samples=round(samples), spots=spots, empty_selection=empty, **means)

    def by_sample(self) -> dict[str, Tensor]:
        """What `samples.safetensors` holds: distilled [samples, S], visits [samples], index [samples]."""
        distilled, visits = (self._counts[f"sample_{name}"].cpu() for name in ("distilled", "visits"))
        return {"distilled": distilled, "visits": visits, "index": self.origin}

    def tensors(self) -> dict[str, Tensor]:
        """Every counter, for a checkpoint."""
        return self._counts | {f"event/{name}": count for name, count in self._events.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Continue with the counters of an earlier process."""
        for name, count in self._counts.items():
            count.copy_(tensors[name])
        device = self._counts["seen"].device
        events = {name: count for name, count in tensors.items() if name.startswith("event/")}
        self._events = {name.removeprefix("event/"): count.to(device) for name, count in events.items()}


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
