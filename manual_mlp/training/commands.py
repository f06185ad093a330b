"""Quote command lines so that they run when pasted, for Hydra and for the shell, and are harmless to look at."""

import re
import shlex
import sys
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

PLAIN = re.compile(r"(?!(null|true|false|nan|inf)$)(\.{0,2}/|[a-z_])[\w/.-]*", re.ASCII | re.IGNORECASE)


def override(key: str, text: object) -> str:
    """Return the override that gives `key` this text: Hydra and OmegaConf read nothing else out of it."""
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(text))  # a bare ${ would begin an interpolation
    return f"{key}={literal if PLAIN.fullmatch(literal) else QuotedString(literal, Quote.single).with_quotes()}"


def command(*words: str) -> str:
    """Return the shell's line that runs train.py, as it was called, with these arguments."""
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    return " ".join(for_the_shell(word) for word in ("python", script, *words))


def for_the_shell(word: str) -> str:
    """Return one word for any POSIX shell. Its printf makes the characters that should not be printed as such."""
    if word.isprintable():
        return shlex.quote(word)
    octal = "".join(
        letter if letter.isprintable() and letter != "\\" else "".join(f"\\0{byte:03o}" for byte in _bytes(letter))
        for letter in word
    )
    return f'"$(printf %b {shlex.quote(octal)})"'


def _bytes(letter: str) -> bytes:
    return letter.encode("utf-8", "surrogateescape")
