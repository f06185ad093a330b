"""The one error type of the package, so that a caller can tell a wrong input from a bug."""


class InputError(ValueError, RuntimeError):
    """Something the caller gave does not fit. The message says what was expected, what came, and the likely fix.

    It is both a ValueError (what Python raises for a wrong value) and a RuntimeError (what torch raises for a wrong
    shape or dtype), so code written around torch's own layers goes on catching it.
    """
