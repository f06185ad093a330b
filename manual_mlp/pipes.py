"""Find out if somebody watches the output, and end quietly if nobody reads on."""

import logging
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
