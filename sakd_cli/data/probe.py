"""Which of many files cannot be read: all of each is decoded, by several processes. No torch."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from sakd_cli.data.decode import Unreadable, fault
from sakd_cli.errors import DataError

FEW = 200  # files that are not worth a process
PIECE = 32  # files that a process gets at once


def _ended_by_the_first() -> None:
    """Ctrl-C goes to the whole group of processes, and is for the one that began the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def unreadable(paths: Sequence[str], processes: int | None = None) -> Iterator[Unreadable | None]:
    """Per file, in order, what is wrong with it; None: nothing. Raises DataError where a decoder crashes."""
    number = min(16, os.cpu_count() or 1) if processes is None else processes
    if len(paths) < FEW or number < 2:
        yield from map(fault, paths)
        return
    context = multiprocessing.get_context("fork") if sys.platform == "linux" else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the children touch none
            with ProcessPoolExecutor(number, context, initializer=_ended_by_the_first) as pool:
                yield from pool.map(fault, paths, chunksize=PIECE)
    except BrokenProcessPool:
        raise DataError("a process that decoded pictures was killed: for lack of memory, or by a picture") from None
