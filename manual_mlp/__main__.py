"""`manual-mlp`, and `python -m manual_mlp`: every program of the package. What is no command's name goes to train."""

import sys
from difflib import get_close_matches
from importlib import import_module

from manual_mlp.shell import while_read

# The module whose `main` a command calls, and the arguments that stand before those given.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "train": ("training.command_line", []),
    "test": ("training.command_line", ["task=test"]),
    "predict": ("training.command_line", ["task=predict"]),
    "lecture": ("lecture", []),
    "battery": ("testing.__main__", []),
    "benchmark": ("benchmark", []),
}


def main() -> int | None:
    """Run the command that the first word names, if it is of letters alone; return its exit code."""
    command, arguments = "train", sys.argv[1:]
    if arguments and arguments[0].isalpha():
        command, *arguments = arguments
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        fix = f"did you mean {close[0]}?" if close else "an option of train has the form key=value"
        sys.exit(f"Error: expected a command, one of {', '.join(COMMANDS)}, but got {command}; {fix}")
    module, words = COMMANDS[command]
    with while_read():
        return import_module(f"manual_mlp.{module}").main([*words, *arguments])


if __name__ == "__main__":
    sys.exit(main())
