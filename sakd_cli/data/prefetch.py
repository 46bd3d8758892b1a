"""Batches of images read by several processes, in the order in which they are requested."""

import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sakd_cli.data.decode import Unreadable
from sakd_cli.data.files import raise_if_unreadable
from sakd_cli.errors import MemoryLimitError

PREFETCH = 2  # batches that each process makes before they are needed
GRACE_SECONDS = 10
Answer = Callable[[Any], Tensor | Unreadable]


class _Requests:
    """The requests of the current pass."""

    def __init__(self) -> None:
        self.now: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.now)


class _RequestDataset(Dataset[Any]):
    """Answers a request with a batch."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __getitem__(self, request: Any) -> Tensor | Unreadable:
        return self._answer(request)


@final
class Pool:
    """Reads batches ahead; what is read depends on the requests alone, whoever reads it.

    answer      makes a batch of a request, which can be pickled; an unreadable file is an answer, too
    persistent  its `workers` (0: this process) wait for further requests when these are done
    """

    def __init__(self, answer: Answer, *, workers: int, persistent: bool, device: torch.device) -> None:
        self._answer, self._workers, self._persistent, self._device = answer, workers, persistent, device
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None

    def __call__(self, requests: Iterable[Any]) -> Iterator[Tensor]:
        """The answers in their order. DataError on an unreadable file, MemoryLimitError where a process was killed."""
        self._requests.now = requests
        loader = self._make_loader() if self._loader is None else self._loader
        self._loader = None
        try:
            with _no_warnings():
                answers = iter(loader)
            for answer in answers:
                yield raise_if_unreadable(answer)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise MemoryLimitError(
                "a process that reads images was killed, probably for lack of memory (or of /dev/shm)",
                "fewer of them: --set data.workers=1; or 0",
            ) from None
        # Not after a pass that was given up: its processes end with the loader, at once, and before anything is saved.
        self._loader = loader if self._persistent else None

    def _make_loader(self) -> DataLoader[Any]:
        fork = self._workers > 0 and sys.platform == "linux"
        with _no_warnings():
            return DataLoader(
                _RequestDataset(self._answer),
                sampler=self._requests,
                batch_size=None,
                num_workers=self._workers,
                pin_memory=self._device.type == "cuda",
                prefetch_factor=PREFETCH if self._workers else None,
                persistent_workers=self._persistent and self._workers > 0,
                worker_init_fn=_defer_signals,
                generator=torch.Generator(),  # else it would draw from the one that belongs to all
                multiprocessing_context=multiprocessing.get_context("fork") if fork else None,
            )


def _defer_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which all processes of the group get, to the main process for `GRACE_SECONDS`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def _no_warnings() -> "warnings.catch_warnings[None]":
    """Python warns of forks beside threads, torch of more processes than processors: both are meant."""
    return warnings.catch_warnings(action="ignore")
