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
        self._requests = _Requests()
        fork = workers > 0 and sys.platform == "linux"
        with _quiet():
            self._loader: DataLoader[Any] = DataLoader(
                _Asked(answer),
                sampler=self._requests,
                batch_size=None,
                num_workers=workers,
                collate_fn=_as_it_is,
                pin_memory=device.type == "cuda",
                prefetch_factor=AHEAD if workers else None,
                persistent_workers=staying and workers > 0,
                worker_init_fn=_deaf,
                generator=torch.Generator(),  # else it would draw from the one that belongs to all
                multiprocessing_context=multiprocessing.get_context("fork") if fork else None,
            )

    def __call__(self, requests: Iterable[Any]) -> Iterator[Tensor]:
        """The answers in their order. DataError on an unreadable file, MemoryLimitError where a process was killed."""
        self._requests.now = requests
        try:
            with _quiet():
                answers = iter(self._loader)
            for answer in answers:
                yield good(answer)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise MemoryLimitError(
                "a process that reads images was killed, probably for lack of memory (or of /dev/shm)",
                "fewer of them: --set data.workers=1; or 0",
            ) from None


def _as_it_is(answer: Any) -> Any:
    return answer


def _deaf(worker: int) -> None:
    """Ctrl-C and SIGTERM go to the whole group of processes: it is the main one that answers, and ends the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _quiet() -> "warnings.catch_warnings[None]":
    """Python warns of forks beside threads, torch of more processes than processors: both are meant."""
    return warnings.catch_warnings(action="ignore")
