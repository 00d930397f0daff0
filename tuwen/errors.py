"""Errors whose message is a sentence for the person at the terminal: what, got, expected, and the way out."""


class TuwenError(Exception):
    """Base of every error the library raises on purpose; the CLI prints it without a traceback and exits 1."""


class InvalidInput(TuwenError, ValueError):
    """A file, value or argument handed to us cannot be used as it is."""


class MissingDependency(TuwenError, ImportError):
    """An optional package or tool is not installed; the message says how to install it."""
