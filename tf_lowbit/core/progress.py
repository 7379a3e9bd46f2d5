"""Progress bars for long work, on a terminal or in a notebook."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator

import rich.console
import rich.progress

from tf_lowbit.core import checks

# Seconds before a bar appears.
_DELAY = 2.0


@contextlib.contextmanager
def bar(description: str, verbose: int = 1) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on the standard error if the work takes long.

    The bar appears after two seconds, only on a terminal or in a notebook, and
    disappears when the work is done.

    Args:
        description: Text in front of the bar.
        verbose: 0 shows nothing.

    Yields:
        A function (done, total) that moves the bar.

    Raises:
        ValueError: If `verbose` is none of 0, 1, False and True.
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
    """A list that moves a progress bar when it is iterated.

    Args:
        items: The items of the list.
        update: Function (done, total) from `bar`.
    """

    def __init__(self, items: Iterable, update: Callable[[int, int], None]):
        super().__init__(items)
        self._update = update

    def __iter__(self):
        for index, item in enumerate(super().__iter__(), 1):
            yield item
            self._update(index, len(self))
