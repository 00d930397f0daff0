"""Why a package cannot be run."""

from __future__ import annotations

from tuwen.errors import TuwenError


class UnusablePackage(TuwenError):
    """A package is damaged, or its program does what the evaluator does not know; the sentence names it."""
