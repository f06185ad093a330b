"""Meet the shell: end quietly if nobody reads on, find out if somebody watches, and print commands to paste.

A printed command runs when pasted, for Hydra and for the shell, and is harmless to look at.
"""

import logging
import os
import re
import select
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

BARE = re.compile(r"(?!(null|true|false|nan|inf)$)(\.{0,2}/|[a-z_])[\w/.-]*", re.ASCII | re.IGNORECASE)
EXTRAS = {  # of pyproject.toml: the packages that each brings
    "table": ("pandas", "pyarrow"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic", "sqlparse"),
    "sweep": ("hydra-joblib-launcher", "hydra-optuna-sweeper"),
}


@contextmanager
def while_read() -> Iterator[None]:
    """End the program quietly, with the exit code of a SIGPIPE, if nobody reads on, as in `program | head`."""
    print_error = logging.Handler.handleError

    def handle_error(handler: logging.Handler, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise  # logging calls this while it handles the error
        print_error(handler, record)

    logging.Handler.handleError = handle_error  # type: ignore[method-assign, assignment]
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        lost = [fd for fd in (1, 2) if _is_unread(fd)]
        if not lost:  # it was another pipe
            raise
        for fd in lost:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)  # takes what is still to be flushed
        sys.exit(128 + signal.SIGPIPE)
    finally:
        logging.Handler.handleError = print_error  # type: ignore[method-assign]


def is_watched() -> bool:
    """Return True if what the program prints is read on a terminal as it comes."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def _is_unread(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))


def override(key: str, text: object) -> str:
    """Return the override that gives `key` this text: Hydra and OmegaConf read nothing else out of it."""
    return f"{key}={_literal(str(text))}"


def from_here(word: str, here: str) -> str:
    """Return an override; if it gives an absolute path, one that leads there from the folder `here`."""
    key, _, value = word.partition("=")
    path = value[1:-1].replace("\\'", "'") if value[:1] == "'" else value
    return override(key, os.path.relpath(path, here)) if os.path.isabs(path) else word


def listing(key: str, texts: Iterable[str]) -> str:
    """Return the override that gives `key` a list of these texts, as a word for the shell."""
    return for_the_shell(f"{key}=[{','.join(map(_literal, texts))}]")


def _literal(text: str) -> str:
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)  # a bare ${ would begin an interpolation
    if BARE.fullmatch(literal):
        return literal
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", literal + "'")[:-2] + "'"  # a backslash counts only before a quote


def command(*words: str, shared: bool = False) -> str:
    """Return the shell's line that runs this program, as it was called, with these arguments.

    shared: for others to read, too, so it names no folder of this machine.
    """
    script = Path(sys.argv[0])
    if script.stem == "manual-mlp":
        started = ["manual-mlp" if shared else _found(script)]
    elif script.parts[-2:] == ("manual_mlp", "__main__.py"):
        started = ["python" if shared else python(), "-m", "manual_mlp"]
    else:
        own = script.name == "train.py" and not shared
        started = ["python" if shared else python(), str(script) if own else "train.py"]
    return " ".join(for_the_shell(word) for word in (*started, *words))


def python() -> str:
    """Return the word that starts this Python in the shell: `python` if that is the one, else its path."""
    return _found(Path(sys.executable), "python")


def install(extra: str) -> str:
    """Return the shell's line that installs what an extra of this package brings."""
    return " ".join(map(for_the_shell, (python(), "-m", "pip", "install", *EXTRAS[extra])))


def _found(program: Path, name: str = "") -> str:
    """Return the name of a program if the shell finds it by that, else its path, from here if it lies below."""
    found = shutil.which(name or program.name)
    if found and Path(found).parent.absolute() == program.parent.absolute():
        return name or program.name
    return os.path.relpath(program) if program.absolute().is_relative_to(Path.cwd()) else str(program)


def for_the_shell(word: str) -> str:
    """Return one word for any POSIX shell. Its printf makes the characters that should not be printed as such."""
    if word.isprintable():
        plain = "'" in word and not set(word) & set('"$`\\!')  # within "…" the shell reads these; '"'"' is hard to read
        return f'"{word}"' if plain else shlex.quote(word)
    octal = "".join(
        letter
        if letter.isprintable() and letter != "\\"
        else "".join(f"\\0{byte:03o}" for byte in letter.encode(errors="surrogateescape"))
        for letter in word
    )
    return f'"$(printf %b {shlex.quote(octal)})"'
