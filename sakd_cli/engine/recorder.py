"""What is counted on the device and read at times: spots of every sample, running means, numbers that go wrong."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional

from sakd_cli.batch import Batch
from sakd_cli.documents.spots import STEP_MEANS, EpochRecord, SamplesHeader, SpotInEpoch, TrackedImage
from sakd_cli.engine.task import SpotUse, StepOutput
from sakd_cli.errors import NonFiniteError, UsageError
from sakd_cli.files import columns_digest

TRACKED = 8  # training images whose route is recorded epoch by epoch


def tracked_places(samples: int) -> list[int]:
    """Places of the tracked images among so many training images, evenly spaced."""
    most = min(TRACKED, samples)
    return [k * samples // most for k in range(most)]


class Rows(NamedTuple):
    """The samples of a batch: labels [N], places [N]; of mixed ones those of both sources, and a share.

    A share without other sources: 1 where a label is known, else 0.
    """

    labels: Tensor
    places: Tensor
    ratio: Tensor | None = None
    other_labels: Tensor | None = None
    other_places: Tensor | None = None

    def sources(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Labels, places and share of each source; None: it is all there is."""
        yield self.labels, self.places, self.ratio
        if self.ratio is not None and self.other_labels is not None and self.other_places is not None:
            yield self.other_labels, self.other_places, 1 - self.ratio


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
        # Every counter is a part of one of four tensors: a step has four additions to make.
        of_samples, of_classes, of_spots, of_steps = (
            torch.zeros(shape, dtype=torch.float32, device=device)
            for shape in ((samples, spots + 1), (spots + 1, classes), (4, spots), (3,))
        )
        self._tables = of_samples, of_classes, of_spots, of_steps
        self._counts = {
            "sample_distilled": of_samples[:, :spots],  # over the whole run
            "sample_visits": of_samples[:, spots],
            "distilled": of_classes[:spots],  # since the last `close_epoch`, as all that follow
            "seen": of_classes[spots],
            "empty": of_spots[0],
            "probability": of_spots[1],
            "gradients": of_spots[2:],
            "steps": of_steps[0],
            "steps_with_policy": of_steps[1],
            "steps_with_events": of_steps[2],
        }
        self._event_names: tuple[str, ...] = ()
        self._events = torch.zeros(0, device=device)

    def add(self, use: SpotUse, rows: Rows) -> None:
        """Count one batch; in place, and nothing is read back. A mixed sample counts for both its sources, by share."""
        of_samples, of_classes, of_spots, of_steps = self._tables
        # A last row counts the samples themselves.
        counted = functional.pad(use.weight.float(), (0, 0, 0, 1), value=1.0)
        if without := rows.ratio is not None and rows.other_labels is None:  # behind the others, and not counted
            rows = rows._replace(places=rows.places.clamp(max=len(of_samples) - 1))
        for labels, index, share in rows.sources():
            weight = counted if share is None else counted * share.float()
            of_classes.index_add_(1, labels, weight)
            of_samples.index_add_(0, index, weight.T)
        empty = (use.weight == 0).all(dim=1)
        of_spots[0] += empty
        if use.probability is None:
            of_steps[0] += 1
        else:
            known = rows.ratio if without else None
            chance = use.probability if known is None else use.probability * known
            of_spots[1] += chance.sum(dim=1, dtype=torch.float32)
            of_steps[:2] += 1
        if use.lengths is not None:
            of_spots[2:] += use.lengths.T.square()
        if use.events:
            of_steps[2] += 1
            names = tuple(sorted(use.events))
            events = torch.stack([use.events[name] for name in names])
            if not self._event_names:
                self._event_names, self._events = names, torch.zeros_like(events)
            self._events += events

    def close_epoch(self, epoch: int) -> EpochRecord:
        """The epoch's line for `spots.jsonl`; the counters by class start anew."""
        of_epoch = {name: count for name, count in self._counts.items() if not name.startswith("sample")}
        counts: dict[str, Any] = {name: count.tolist() for name, count in of_epoch.items()}
        seen, with_policy = counts["seen"], counts["steps_with_policy"] > 0
        samples, steps = sum(seen), max(counts["steps"], 1)
        rows = counts["distilled"], counts["probability"], *counts["gradients"]
        spots = [
            SpotInEpoch(
                name=name,
                kind=kind,
                fraction=sum(row) / max(samples, 1),
                probability=probability / max(samples, 1) if with_policy else None,
                by_class=[count / total if total else None for count, total in zip(row, seen, strict=True)],
                gradient_ratio=math.sqrt(hint / task) if task and hint else None,
            )
            for (name, kind), row, probability, task, hint in zip(self.names, *rows, strict=True)
        ]
        if any(not 0 <= (spot.fraction or 0) <= 1 for spot in spots):
            raise UsageError("the router gives weights outside of [0, 1]", "sakd guide extending")
        means: dict[str, float | None] = dict.fromkeys(STEP_MEANS)
        sums, counted = self._events.tolist(), max(counts["steps_with_events"], 1)
        means |= {name: count / counted for name, count in zip(self._event_names, sums, strict=True)}
        for count in (*self._tables[1:], self._events):
            count.zero_()
        empty = [times / steps for times in counts["empty"]]
        # Up to now and not of this epoch alone: a resumed run then has nothing to remember.
        places = tracked_places(len(self.origin))
        sofar = zip(self.origin[places].tolist(), self._tables[0][places].tolist(), strict=True)
        tracked = [TrackedImage(index=index, visits=row[-1], distilled=row[:-1]) for index, row in sofar]
        return EpochRecord(
            epoch=epoch, samples=round(samples), spots=spots, empty_selection=empty, tracked=tracked, **means
        )

    def by_sample(self) -> dict[str, Tensor]:
        """What `samples.safetensors` holds: distilled [samples, S], visits [samples], index [samples]."""
        distilled, visits = (self._counts[f"sample_{name}"].cpu().contiguous() for name in ("distilled", "visits"))
        return {"distilled": distilled, "visits": visits, "index": self.origin}

    def file(self) -> bytes:
        columns = self.by_sample()
        digest = columns_digest({name: column.numpy() for name, column in columns.items()})
        return bytes(save(columns, {"sakd": SamplesHeader(digest=digest).model_dump_json()}))

    def tensors(self) -> dict[str, Tensor]:
        events = {f"event/{name}": count for name, count in zip(self._event_names, self._events, strict=True)}
        counts = self._counts | events
        return {name: count.clone(memory_format=torch.contiguous_format) for name, count in counts.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, count in self._counts.items():
            count.copy_(tensors[name])
        events = {name.removeprefix("event/"): count for name, count in tensors.items() if name.startswith("event/")}
        if events:
            self._event_names = tuple(sorted(events))
            self._events = torch.stack([events[name] for name in self._event_names]).to(self._events)


class Meter:
    """Means over the batches since the last read, each batch counted with its number of samples."""

    def __init__(self) -> None:
        # Of each set of names that came: their sums, and behind them the number of samples.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, samples: int, values: dict[str, Tensor]) -> None:
        """Add one batch of scalar means; in place, and nothing is read back."""
        names, means = tuple(values), torch.stack([value.detach() for value in values.values()])
        if names not in self._sums:
            self._sums[names] = means.new_zeros(len(names) + 1)
        self._sums[names] += functional.pad(means, (0, 1), value=1.0) * samples

    def read(self) -> dict[str, float]:
        """The means, each over the steps that had it, in one read of the device; and start anew."""
        if not self._sums:
            return {}
        numbers = iter(torch.cat(list(self._sums.values())).tolist())
        totals: dict[str, tuple[float, float]] = {}
        for names, sums in self._sums.items():
            *of_names, samples = (next(numbers) for _ in sums)
            for name, value in zip(names, of_names, strict=True):
                total, seen = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, seen + samples
            sums.zero_()
        return {name: total / seen for name, (total, seen) in totals.items() if seen}

    def state(self) -> tuple[dict[str, Tensor], list[list[str]]]:
        """For each set of names, by its place: the sums since the last read, the number of samples behind; the sets."""
        return {str(k): sums.clone() for k, sums in enumerate(self._sums.values())}, [list(of) for of in self._sums]

    def load(self, sums: dict[str, Tensor], names: list[list[str]]) -> None:
        """What `state` gave. Raises KeyError or ValueError where the two do not belong together."""
        if any(sums[str(k)].shape != (len(of) + 1,) for k, of in enumerate(names)):
            raise ValueError("the means and their names do not belong together")
        self._sums = {tuple(of): sums[str(k)] for k, of in enumerate(names)}


def top1(logits: Tensor, rows: Rows) -> Tensor:
    """Share of right answers in percent, a scalar on the device; of mixed samples, the right one's share."""
    answer, right = logits.argmax(dim=1), []
    for labels, _, share in rows.sources():
        hit = (answer == labels).float()
        right.append(hit if share is None else hit * share)
    share_right = sum(right[1:], right[0]).mean()
    if rows.ratio is not None and rows.other_labels is None:
        share_right = share_right / rows.ratio.mean().clamp(min=1e-12)
    return share_right * 100.0


LOWER = "a lower learning rate may help: --set train.lr=..."
SHOWN = 6  # images that a message names
ROOM = 64  # numbers


def _not_finite(x: Tensor) -> Tensor:
    """Where it is NaN or infinite, in two launches instead of five."""
    return (x - x) != 0


class Guard:
    """Looks at every step's images, logits, loss terms and gradients; remembers the first that is NaN or infinite.

    Nothing is read back while looking: `found` is a flag on the device that keeps every later update from being made,
    and `check` reads it, at log points and before anything is saved; where reading costs nothing, in every step.
    """

    def __init__(self, device: torch.device) -> None:
        self.found = torch.zeros((), device=device)  # 1 from the first bad step on
        # Sets of names that steps have, and the number of each: a replayed step does not say here which it has.
        self._kinds: dict[tuple[str, ...], Tensor] = {}
        self._steps = torch.zeros((), dtype=torch.int64, device=device)  # looked at
        # Of the first bad step: of which kind it is, its number, a flag per name, and the images at fault, else -1.
        self._first = torch.full((0,), -1, dtype=torch.int64, device=device)
        self.every_step = device.type != "cuda"  # checked at once, where reading costs nothing

    def go_on(self, step: int) -> None:
        """So many steps were done before the next."""
        self._steps.fill_(step)

    def inspect(self, batch: Batch, output: StepOutput, gradients: Sequence[Tensor]) -> Tensor:
        """Check a step before its update; returns 1 if it must be skipped. In place, for CUDA graphs."""
        self._steps.add_(1)
        norms = torch.stack(torch._foreach_norm(list(gradients))).amax() if gradients else torch.zeros_like(output.loss)
        # A sum is finite where all its terms are, but for numbers near the end of the range, which end in inf anyway.
        of_rows = {"input": batch.images.flatten(1).sum(dim=1)}
        if output.logits is not None:
            of_rows["logits"] = output.logits.detach().sum(dim=1)
        scalars = {name: rows.sum() for name, rows in of_rows.items()} | output.parts
        scalars |= {"total loss": output.loss.detach(), "gradients": norms}
        bad = _not_finite(torch.stack(list(scalars.values())))
        rows = _not_finite(torch.stack(list(of_rows.values())).sum(dim=0))
        return self._noted(tuple(scalars), bad, rows, batch.index)

    def _noted(self, names: tuple[str, ...], bad: Tensor, rows: Tensor, index: Tensor) -> Tensor:
        """Remember a step with these flags [names] and [N] where it is the first bad one."""
        if names not in self._kinds:
            self._kinds[names] = self._steps.new_full((1,), len(self._kinds))
        noted = torch.cat([self._kinds[names], self._steps[None], bad, torch.where(rows | ~rows.any(), index, -1)])
        # At the first batch; or at the second, where a run went on at a short one. A captured step writes where it was
        # when it was captured: there is room for a batch of one image more, and for more names.
        if len(noted) > len(self._first):
            more = self._first.new_full((len(noted) + ROOM - len(self._first),), -1)
            self._first = torch.cat([self._first, more])
        first = bad.any() & (self.found == 0)
        ours = self._first[: len(noted)]
        torch.where(first, noted, ours, out=ours)
        self.found.masked_fill_(first, 1.0)
        if self.every_step:
            self.check()
        return self.found

    def check(self) -> None:
        """Raise NonFiniteError naming the term, the step and the training images, if any step was bad."""
        if not self.found.item():
            return
        kind, step, *noted = self._first.tolist()
        names = list(self._kinds)[kind]
        term = next(name for name, bad in zip(names, noted, strict=False) if bad)
        rows = [row for row in noted[len(names) :] if row >= 0]
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        images = f", with training images {', '.join(map(str, rows[:SHOWN]))}{more}" if rows else ""
        raise NonFiniteError(f"step {step}: {term} is not finite{images}; the weights were not changed", LOWER)
