"""Compile C once with the system's compiler, and keep what comes out in a folder that is the user's alone.

A library is a program, so it is loaded only from a folder and a file that nobody else could have written.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

TIMEOUT = 30.0  # seconds for one run of the compiler
# Contraction would join a product and a sum where the formula has two roundings.
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")

_libraries: dict[str, "ctypes.CDLL | CantBuild"] = {}
_turn = threading.Lock()


class CantBuild(Exception):
    """There is no library, for the reason that it says."""


def library(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Return the compiled source: from this process, from the cache, or new. Raises CantBuild, each time anew."""
    with _turn:
        place = "\0".join((source, os.environ.get("CC", ""), *flags))
        if place not in _libraries:
            try:
                _libraries[place] = _loaded(source, (*FLAGS, *flags))
            except (CantBuild, OSError, ValueError) as error:  # CC may have an open quote, or be no UTF-8
                _libraries[place] = CantBuild(str(error))
        found = _libraries[place]
    if isinstance(found, CantBuild):
        raise found
    return found


def _loaded(source: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    if not hasattr(os, "getuid"):
        raise CantBuild(f"the C code is compiled on Linux and macOS only, not on {platform.system()}")
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    key = hashlib.sha256("\0".join((source, *compiler, version, *flags, _processor())).encode()).hexdigest()
    with _folder() as folder:
        _only_ours(folder, private=True)
        path = folder / f"{key}.so"
        if not os.path.lexists(path):
            _compile(source, [*compiler, *flags], path)
        _only_ours(path)
        return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    """Return the words that call the compiler: those of CC, else the first that is installed."""
    words = shlex.split(os.environ.get("CC", ""))
    for name in words[:1] or ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found, *words[1:]]
    raise CantBuild(f"no C compiler ({words[0] if words else 'cc, gcc or clang'}) is installed")


def _run(command: list[str], given: str = "") -> str:
    """Run a compiler, and all that it starts, for at most TIMEOUT seconds: what it is given → what it prints."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            printed = process.communicate(given.encode(), TIMEOUT)[0].decode(errors="replace")
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise CantBuild(f"{command[0]} took more than {TIMEOUT:.0f} s") from None
            raise
    if process.returncode:
        lines = [line for line in printed.splitlines() if "error" in line] or printed.splitlines() or ["no message"]
        raise CantBuild(f"{command[0]} failed: {lines[0].strip()[:200]}")
    return printed


@cache
def _processor() -> str:
    """Return what -march=native depends on: the processor's features."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return "\n".join((platform.system(), platform.machine(), platform.processor(), *features))


def _compile(source: str, command: list[str], path: Path) -> None:
    """Compile beside `path` and rename, so that another process sees all of the library or none."""
    handle, name = tempfile.mkstemp(".so", "build-", path.parent)
    os.close(handle)
    written = Path(name)
    try:
        _run([*command, "-o", name, "-x", "c", "-", "-lm"], source)
        if written.stat().st_size == 0:  # kept, it would be refused by every later process
            raise CantBuild(f"{command[0]} wrote no library")
        written.chmod(0o700)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield the cache, made if need be; without a usable home a folder that is gone once the library is loaded."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "manual_mlp"
    if folder.is_absolute():
        with suppress(OSError):  # a home that is read-only, full, or no folder: then this is no folder either
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):  # Path.is_dir raises PermissionError
            yield folder
            return
    folder = Path(tempfile.mkdtemp(prefix="manual_mlp-"))
    try:
        yield folder
    finally:
        with suppress(OSError):  # a file system may keep a library that is loaded: it is of use all the same
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()


def _only_ours(path: Path, private: bool = False) -> None:
    """Raise CantBuild for what somebody else may have written."""
    found = path.lstat()
    expected = stat.S_ISDIR(found.st_mode) if private else stat.S_ISREG(found.st_mode)
    if not expected or found.st_uid != os.getuid() or found.st_mode & (0o077 if private else 0o022):
        kind = "a folder that only you can enter (chmod 700)" if private else "a file that only you can write"
        raise CantBuild(f"{path} is not {kind}: nothing in it is loaded; remove it")
