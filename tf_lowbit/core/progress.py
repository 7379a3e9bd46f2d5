"""Progress bars for what may take its time, on a terminal or in a notebook."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import rich.console
import rich.progress

from tf_lowbit.core import checks

# Seconds after which a bar is worth its place on the screen.
_DELAY = 2.0


@contextlib.contextmanager
def bar(description: str, verbose: int = 1) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on the standard error, if the work takes long.

    It comes after two seconds, on a terminal or in a notebook alone, and goes when the
    work is done.

    Args:
        description: what is being done.
        verbose: 0 shows nothing.

    Yields:
        A function (done, total) that moves the bar.

    Raises:
        ValueError: if `verbose` is none of 0, 1, False and True.
    """
    checks.choice("verbose", verbose, (0, 1, False, True))
    console = rich.console.Console(stderr=True)
    progress = rich.progress.Progress(console=console, transient=True)
    if not (verbose and (console.is_terminal or console.is_jupyter)):
        yield lambda done, total: None
        return
    task = progress.add_task(description, total=None)
    begin = time.monotonic()

    def update(done, total):
        progress.update(task, completed=done, total=total)
        if time.monotonic() - begin > _DELAY:
            progress.start()

    try:
        yield update
    finally:
        progress.stop()


class Tracked(list):
    """A list that moves a progress bar whenever somebody goes through it.

    Args:
        items: what is in it.
        update: function (done, total), as `bar` yields it.
    """

    def __init__(self, items: Iterable, update: Callable[[int, int], None]):
        super().__init__(items)
        self._update = update

    def __iter__(self):
        for index, item in enumerate(super().__iter__(), 1):
            yield item
            self._update(index, len(self))
