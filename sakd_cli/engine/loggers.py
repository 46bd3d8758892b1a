"""What a run writes into its logs, shown elsewhere too: `--log csv,tensorboard,mlflow,wandb`, each a row of one table.

Nothing leaves the machine unless the environment says so (`WANDB_MODE=online`, `MLFLOW_TRACKING_URI`). A resumed run
goes on in what it began there; points of the epoch that it begins in are repeated, and are the same.
"""

import importlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from csv import DictWriter
from typing import Any, Protocol

from sakd_cli.config.resolve import flat
from sakd_cli.errors import DiskError, UsageError, first_line
from sakd_cli.rundir import RunDir
from sakd_cli.writing import write_aside

Warn = Callable[[str], None]


class Logger(Protocol):
    """Where the numbers of a run go, beside its own logs."""

    def write(self, scalars: dict[str, float], step: int) -> None:
        """Tag -> value of a line of a log, over the optimizer step, or over the epoch where the line has no step."""

    def close(self) -> None:
        """The run has ended, well or not."""


class _Csv:
    """`metrics.csv` in the run directory: all lines of the logs in one table, written anew after every epoch."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def write(self, scalars: dict[str, float], step: int) -> None:
        if any(tag.startswith(("eval/", "spots/")) for tag in scalars):  # what an epoch ends with, before it is saved
            self.close()

    def close(self) -> None:
        lines = [*self.run.lines("metrics.jsonl"), *self.run.lines("spots.jsonl")]
        rows = [{"epoch": one["epoch"], "step": one.get("step"), **_scalars(one)} for one in lines]
        text = io.StringIO()
        writer = DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_aside(self.run.path / "metrics.csv", text.getvalue().encode())


class _TensorBoard:
    """Event files in the folder `tensorboard` of the run directory."""

    def __init__(self, run: RunDir) -> None:
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(run.path / "tensorboard"))

    def write(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self.writer.close()


class _MLflow:
    """The store that MLFLOW_TRACKING_URI names, else the folder `mlruns` of the run directory; experiment sakd."""

    def __init__(self, run: RunDir) -> None:
        mlflow, entities = (importlib.import_module(name) for name in ("mlflow", "mlflow.entities"))
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer versions ask for before they use folders
        place = os.environ.get("MLFLOW_TRACKING_URI") or (run.path / "mlruns").resolve().as_uri()
        self.client, self.metric = mlflow.MlflowClient(tracking_uri=place), entities.Metric
        known = self.client.get_experiment_by_name("sakd")
        experiment = known.experiment_id if known else self.client.create_experiment("sakd")
        begun = self.client.search_runs([experiment], f"tags.sakd = '{run.identity}'")
        tags = {"sakd": str(run.identity)}
        made = begun[0] if begun else self.client.create_run(experiment, run_name=run.path.name, tags=tags)
        self.id = made.info.run_id
        for key, value in {} if begun else flat(run.config).items():
            self.client.log_param(self.id, "".join(c if c.isalnum() or c in "_-./ " else "_" for c in key), value)

    def write(self, scalars: dict[str, float], step: int) -> None:
        self.client.log_batch(self.id, [self.metric(tag, value, 0, step) for tag, value in scalars.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


class _Wandb:
    """Weights & Biases, project sakd; offline, in the run directory, unless WANDB_MODE says otherwise."""

    def __init__(self, run: RunDir) -> None:
        self.wandb = importlib.import_module("wandb")
        about: dict[str, Any] = {"project": "sakd", "name": run.path.name, "id": run.identity, "resume": "allow"}
        about |= {"dir": str(run.path), "mode": os.environ.get("WANDB_MODE", "offline"), "config": flat(run.config)}
        # No run is written that holds a symbolic link.
        self.run = self.wandb.init(**about, settings=self.wandb.Settings(symlink=False, silent=True))

    def write(self, scalars: dict[str, float], step: int) -> None:
        self.run.log({**scalars, "step": step})

    def close(self) -> None:
        self.run.finish()


# Each needs a module of its own name, which an extra of that name has; csv is Python's.
LOGGERS: dict[str, Callable[[RunDir], Logger]] = {
    "csv": _Csv,
    "mlflow": _MLflow,
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


def check(names: Sequence[str] | None) -> None:
    """Raise UsageError where one is to be used and not installed."""
    for name in names or ():
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(f"--log {name}: it is not installed", f"pip install 'sakd[{name}]'") from None


@contextmanager
def logging_to(run: RunDir, names: Sequence[str] | None, warn: Warn) -> Iterator[None]:
    """Also write every number of the run's logs there; a logger that fails is told once, and the run goes on."""
    found = [_Listener(run, name, warn) for name in names or ()]
    run.listeners += found
    try:
        yield
    finally:
        run.listeners[:] = [one for one in run.listeners if one not in found]
        for one in found:
            one.close()


class _Listener:
    """A logger of a run, opened with the first line: `--overwrite` clears the folder before."""

    def __init__(self, run: RunDir, name: str, warn: Warn) -> None:
        self.run, self.name, self.warn = run, name, warn
        self.logger: Logger | None = None
        self.failed = False

    def __call__(self, file: str, record: dict[str, Any]) -> None:
        if self.failed:
            return
        with self._survived():
            self.logger = self.logger or LOGGERS[self.name](self.run)
            self.logger.write(_scalars(record), record.get("step", record["epoch"]))

    def close(self) -> None:
        if self.logger is not None:
            with self._survived():
                self.logger.close()

    @contextmanager
    def _survived(self) -> Iterator[None]:
        try:
            yield
        except DiskError:
            raise
        except Exception as error:  # foreign code, a server that is away
            self.failed = True
            self.warn(f"--log {self.name}: {type(error).__name__}: {first_line(error)}; the run goes on without it")


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """Tag -> value for a line of metrics.jsonl or spots.jsonl."""
    found = {f"{record.get('kind', 'spots')}/{key}": value for key, value in record.items()}
    for spot in record.get("spots", ()):
        found |= {f"spots/{spot['name']}/{key}": spot[key] for key in ("fraction", "probability")}
    wanted = {tag: value for tag, value in found.items() if tag.rpartition("/")[2] not in ("step", "epoch", "samples")}
    numbers = {tag: value for tag, value in wanted.items() if isinstance(value, int | float)}
    return {tag: float(value) for tag, value in numbers.items() if not isinstance(value, bool)}
