"""What a run writes into its logs, shown in TensorBoard too (`--log tensorboard`, the extra `tensorboard`)"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sakd_cli.errors import UsageError
from sakd_cli.rundir import RunDir

FOLDER = "tensorboard"  # in the run directory


def check(kind: str | None) -> None:
    """Raise UsageError where TensorBoard is to be used and not installed."""
    if kind is None:
        return
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UsageError(f"--log {kind}: it is not installed", "pip install 'sakd[tensorboard]'") from None


@contextmanager
def log_to_tensorboard(run: RunDir, kind: str | None) -> Iterator[None]:
    """Also write every number of the run's logs to its TensorBoard folder: over the step, or over the epoch.

    A resumed run repeats the points of the epoch that it begins in; they are the same.
    """
    if kind is None:
        yield
        return
    from torch.utils.tensorboard import SummaryWriter

    writers: list[SummaryWriter] = []  # made with the first line: --overwrite clears the folder before

    def write(name: str, record: dict[str, Any]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(run.path / FOLDER)))
        for tag, value in _scalars(record).items():
            writers[0].add_scalar(tag, value, record.get("step", record["epoch"]))

    run.listeners.append(write)
    try:
        yield
    finally:
        run.listeners.remove(write)
        for writer in writers:
            writer.close()


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """Tag -> value for a line of metrics.jsonl or spots.jsonl."""
    found = {f"{record.get('kind', 'spots')}/{key}": value for key, value in record.items()}
    for spot in record.get("spots", ()):
        found |= {f"spots/{spot['name']}/{key}": spot[key] for key in ("fraction", "probability")}
    wanted = {tag: value for tag, value in found.items() if tag.rpartition("/")[2] not in ("step", "epoch", "samples")}
    return {tag: value for tag, value in wanted.items() if isinstance(value, float)}
