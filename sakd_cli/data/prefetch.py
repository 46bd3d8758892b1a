"""Batches of pictures read by several processes, in the order in which they are asked for."""

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
from sakd_cli.data.files import good
from sakd_cli.errors import MemoryLimitError

AHEAD = 2  # batches that each process makes before they are needed
PATIENCE = 10


Answer = Callable[[Any], Tensor | Unreadable]


class _Requests:
    """What the present pass asks for."""

    def __init__(self) -> None:
        self.now: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.now)


class _Asked(Dataset[Any]):
    """Answers a request with a batch."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def __getitem__(self, request: Any) -> Tensor | Unreadable:
        return self._answer(request)


@final
class Pool:
    """Reads batches ahead. What is read depends on the requests alone, not on who reads it or on how many do.

    answer   makes a batch of a request, which is small and can be pickled; an unreadable file is an answer, too
    workers  processes; 0: this one does it
    staying  the processes wait for the next requests, and do not end with these
    """

    def __init__(self, answer: Answer, *, workers: int, staying: bool, device: torch.device) -> None:
        self._answer, self._workers, self._staying, self._device = answer, workers, staying, device
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None

    def __call__(self, requests: Iterable[Any]) -> Iterator[Tensor]:
        """The answers in their order. DataError on an unreadable file, MemoryLimitError where a process was killed."""
        self._requests.now = requests
        loader = self._made() if self._loader is None else self._loader
        self._loader = None
        try:
            with _quiet():
                answers = iter(loader)
            for answer in answers:
                yield good(answer)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise MemoryLimitError(
                "a process that reads images was killed, probably for lack of memory (or of /dev/shm)",
                "fewer of them: --set data.workers=1; or 0",
            ) from None
        # Not after a pass that was given up: its processes end with the loader, at once, and before anything is saved.
        self._loader = loader if self._staying else None

    def _made(self) -> DataLoader[Any]:
        fork = self._workers > 0 and sys.platform == "linux"
        with _quiet():
            return DataLoader(
                _Asked(self._answer),
                sampler=self._requests,
                batch_size=None,
                num_workers=self._workers,
                collate_fn=_as_it_is,
                pin_memory=self._device.type == "cuda",
                prefetch_factor=AHEAD if self._workers else None,
                persistent_workers=self._staying and self._workers > 0,
                worker_init_fn=_patient,
                generator=torch.Generator(),  # else it would draw from the one that belongs to all
                multiprocessing_context=multiprocessing.get_context("fork") if fork else None,
            )


def _as_it_is(answer: Any) -> Any:
    return answer


def _patient(worker: int) -> None:
    """Ctrl-C and SIGTERM go to the whole group of processes: the main one answers, and ends the others when it likes.

    It has `PATIENCE` seconds for that: who leaves without a word must not wait for ever for a process that is deaf.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(PATIENCE))


def _quiet() -> "warnings.catch_warnings[None]":
    """Python warns of forks beside threads, torch of more processes than processors: both are meant."""
    return warnings.catch_warnings(action="ignore")
