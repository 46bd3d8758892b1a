"""Two parts of the training images for a bilevel search, and their batches in turn."""

from collections.abc import Iterator
from dataclasses import fields, replace

from sakd_cli.batch import Batch, UpperBatch
from sakd_cli.data.dataset import Dataset, Split, hold_out
from sakd_cli.data.loader import TrainLoader


def split_in_halves(dataset: Dataset, train: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Cut `train` in two, disjoint, every class alike: `share` of it for the upper level, the rest for the lower."""
    lower, upper = hold_out(replace(dataset, train=train), share, seed)
    assert upper is not None, "a share of 0 is no share"
    return upper, lower


class AlternatingLoader:
    """A batch of the upper level, as an UpperBatch, then one of the lower, and so on.

    An epoch shows all of the lower level's images once; the upper level's go round and round beside them. Like those
    of one loader, the batches from any step on are a pure function of epoch and step.

    ahead  the upper level's batches bring the lower level's next one along
    """

    def __init__(self, upper: TrainLoader, lower: TrainLoader, *, ahead: bool) -> None:
        self.upper, self.lower, self.ahead = upper, lower, ahead
        self.steps_per_epoch = 2 * len(lower)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start` + 1, ... of that epoch, whatever was or was not iterated before."""
        pair = (epoch - 1) * len(self.lower) + start // 2
        above, below = _endless(self.upper, pair + start % 2), _endless(self.lower, pair)
        coming: Batch | None = None
        for step in range(start, self.steps_per_epoch):
            if step % 2:
                yield coming or next(below)
                continue
            coming = next(below) if self.ahead else None
            batch = next(above)
            yield UpperBatch(**{field.name: getattr(batch, field.name) for field in fields(batch)}, lower=coming)


def _endless(loader: TrainLoader, first: int) -> Iterator[Batch]:
    """Batches `first`, `first` + 1, ... of epoch after epoch."""
    epoch, start = divmod(first, len(loader))
    while True:
        yield from loader.epoch(epoch + 1, start)
        epoch, start = epoch + 1, 0
