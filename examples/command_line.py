"""The command line of the example programs: help by groups, and errors in one line.

This module does not import TensorFlow, which takes ten seconds. So a program can check
its flags first.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import rich.console
import rich.padding
import rich.table
import rich.text
from absl import app, flags

FLAGS = flags.FLAGS


def run(main: Callable, groups: Mapping[str, str] | None = None) -> None:
    """Parses the flags and runs a program's `main`.

    An error whose message has "Received: ", as the library's have, ends the program
    with one line and code 1. Any other error is a defect, and shows its traceback.

    Args:
        main: Function of the arguments that are not flags.
        groups: Title of a group -> its first flag. A group has all flags up to the next
            group, in the order of their definition. None for one group.
    """

    def parse(argv):
        if not {"-h", "-help", "--help"}.isdisjoint(argv[1:]):
            show_help(groups or {})
            sys.exit()
        try:
            return FLAGS(argv)
        except flags.Error as error:
            sys.exit(f"{Path(argv[0]).name}: {error}")

    def checked_main(argv):
        try:
            return main(argv)
        except (app.UsageError, ValueError, OSError) as error:
            if "Received: " not in str(error):
                raise
            sys.exit(f"{Path(argv[0]).name}: {error}")

    app.run(checked_main, flags_parser=parse)


def show_help(groups: Mapping[str, str]) -> None:
    """Prints the program's docstring, and its flags by group.

    Args:
        groups: As in `run`.
    """
    titles = {first: title for title, first in groups.items()}
    title, parts = "Flags", {}
    for flag in FLAGS.get_key_flags_for_module(sys.argv[0]):
        title = titles.get(flag.name, title)
        parts.setdefault(title, []).append(flag)
    console = rich.console.Console(highlight=False)
    print(sys.modules["__main__"].__doc__)
    for title, members in parts.items():
        table = rich.table.Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for flag in members:
            table.add_row(*map(rich.text.Text, _row(flag)))
        console.print(f"{title}:", style="bold")
        console.print(rich.padding.Padding(table, (0, 0, 1, 2)))


def _row(flag: flags.Flag) -> tuple[str, str]:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    if flag.default is None:
        return name, flag.help
    default = flag.default_as_str.strip("'")
    return name, f"{flag.help} (default: {default})"
