"""What is counted on the device and read at times: spots of every sample, running means, numbers that go wrong."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.documents.spots import STEP_MEANS, EpochRecord, SpotInEpoch
from sakd_cli.engine.task import SpotUse, StepOutput
from sakd_cli.errors import NonFiniteError, UsageError


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
