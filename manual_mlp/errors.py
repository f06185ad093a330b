"""The one error type of the package, so that a caller can distinguish a wrong input from a bug."""


class InputError(ValueError, RuntimeError):
    """Something the caller gave does not fit. The message says what was expected, what came, and the likely fix.

    It is both a ValueError (what Python raises for a wrong value) and a RuntimeError (what torch raises for a wrong
    shape or dtype), so code written around torch's own layers goes on catching it. The message is safe on a terminal,
    whatever names out of files are in it.

    >>> import torch, manual_mlp as mm
    >>> try:
    ...     mm.Affine(3, 2)(torch.ones(5, 2))
    ... except mm.InputError as error:
    ...     print(str(error).partition(";")[0])
    expected an input whose last dimension is in_features=3
    """

    def __str__(self) -> str:
        return shown(super().__str__(), keep="\n")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; its class if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shown(text: object, keep: str = "") -> str:
    r"""Return text in which what can't be seen, or a terminal would obey, is written as in Python: \t, \x1b, \u202e.

    keep: letters to leave as they are.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))
