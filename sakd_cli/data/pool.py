"""Processes that read batches ahead, of images that are not in memory."""

import atexit
import multiprocessing
import signal
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sakd_cli.data.decode import Unreadable
from sakd_cli.data.files import raise_if_unreadable
from sakd_cli.errors import MemoryLimitError, SakdError

PREFETCH = 2  # batches that each process makes before they are needed
GRACE_SECONDS = 10
Answer = Callable[[Any], Tensor | tuple[Tensor, Tensor] | Unreadable | SakdError]


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

    def __getitem__(self, request: Any) -> Tensor | tuple[Tensor, Tensor] | Unreadable | SakdError:
        try:
            answer = self._answer(request)
            for one in answer if isinstance(answer, tuple) else [answer]:
                if get_worker_info() and isinstance(one, Tensor):
                    one.share_memory_()  # by torch's own thread, which would lose it for want of room, unseen
            return answer
        except SakdError as error:  # torch would make another of it
            return error
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return MemoryLimitError(f"a batch of images has no room in /dev/shm: {error}", "--set data.workers=0")


_POOLS: "weakref.WeakSet[Pool]" = weakref.WeakSet()


@atexit.register
def close_pools() -> None:
    """Before Python's own end, which would send signals that the processes wait out (`_defer_signals`)."""
    for pool in list(_POOLS):
        pool.close()


class Pool:
    """Reads batches ahead; what is read depends on the requests alone, whoever reads it.

    answer      makes a batch of a request, which can be pickled; an unreadable file is an answer, too
    persistent  its `workers` (0: this process) wait for further requests when these are done
    """

    def __init__(self, answer: Answer, *, workers: int, persistent: bool, device: torch.device) -> None:
        self._answer, self._workers, self._persistent, self._device = answer, workers, persistent, device
        self._requests = _Requests()
        self._loader: DataLoader[Any] | None = None
        _POOLS.add(self)

    def __call__(self, requests: Iterable[Any]) -> Iterator[Any]:
        """The answers in their order. DataError on an unreadable file, MemoryLimitError where a process was killed."""
        self._requests.now = requests
        loader = self._make_loader() if self._loader is None else self._loader
        self._loader = None
        try:
            with warnings.catch_warnings(action="ignore"):  # as below
                if loader.num_workers:  # as many as torch needs, which would begin, and end in a traceback
                    [multiprocessing.Lock() for _ in range(12 + 3 * loader.num_workers)]
                answers = iter(loader)
            for answer in answers:
                if isinstance(answer, SakdError):  # a copy: it would hold this frame, which holds it and the processes
                    raise type(answer)(answer.message, answer.hint)
                yield raise_if_unreadable(answer)
        except (RuntimeError, OSError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise MemoryLimitError(
                f"a process that reads images was killed or cannot be had, for lack of memory or /dev/shm? ({error})",
                "fewer of them: --set data.workers=1; or 0",
            ) from None
        # Not after a pass that was given up: its processes end with the loader, at once, and before anything is saved.
        self._loader = loader if self._persistent else None

    def close(self) -> None:
        """End the processes, if they wait for further requests."""
        self._loader = None

    def _make_loader(self) -> DataLoader[Any]:
        fork = self._workers > 0 and sys.platform == "linux"
        # Python warns of forks beside threads, torch of more processes than processors: both are meant.
        with warnings.catch_warnings(action="ignore"):
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
