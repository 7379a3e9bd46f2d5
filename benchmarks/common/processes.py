"""Runs of a sweep, each in a process of its own, several at a time."""

import concurrent.futures
import os
import pickle
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import rich.progress

ROOT = Path(__file__).resolve().parents[2]


def run(
    python: str | Path,
    program: str,
    arguments: list,
    variables: dict[str, str] | None = None,
) -> None:
    """Runs a module of this repository to its end.

    A process that dies (killed for memory, say) is tried once more.

    Args:
        python: The interpreter.
        program: The module's name.
        arguments: Pickled to its standard input.
        variables: Of its process environment; this process's without them.

    Raises:
        RuntimeError: With what it said, if it fails.
    """
    variables = dict(os.environ if variables is None else variables)
    path = variables.get("PYTHONPATH", "")
    for attempt in (1, 2):
        done = subprocess.run(
            [python, "-m", program],
            input=pickle.dumps(arguments),
            env={**variables, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"},
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return
        if done.returncode > 0 or attempt == 2:
            raise RuntimeError(
                f"A run must end without an error. Received: {arguments}, exit status "
                f"{done.returncode}:\n{done.stderr.decode(errors='replace')[-3000:]}"
            )


def perform(tasks: dict[str, Callable[[], None]], workers: int) -> None:
    """Calls tasks in threads, and shows how far they are; the first error ends it.

    Args:
        tasks: By the name to show.
        workers: How many at a time.
    """
    if not tasks:
        return
    columns = rich.progress.Progress.get_default_columns()
    with (
        rich.progress.Progress(*columns, rich.progress.MofNCompleteColumn()) as bar,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        shown = bar.add_task(f"{len(tasks)} runs", total=len(tasks))
        futures = {pool.submit(task): name for name, task in tasks.items()}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                bar.advance(shown)
                if not bar.console.is_terminal:
                    print(time.strftime("%H:%M:%S"), futures[future], flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
