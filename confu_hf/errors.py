"""One wording for every refusal: what was got, what was expected, and what to do about it."""

from __future__ import annotations

from typing import TypeVar

Error = TypeVar("Error", bound=Exception)


def refusal(
    subject: str, *, got: object, expected: object, fix: str, error: type[Error] = ValueError
) -> ValueError | Error:
    """The error of a refusal, for the caller to raise: `subject: got ..., expected .... fix`

    Args:
        error: another class than `ValueError`, where callers may want to tell it apart (a missing file).
    """
    return marked(error(f"{subject}: got {got}, expected {expected}. {fix}"))


def marked(error: Error) -> Error:
    """An error whose one line says all: `error.is_refusal`. Scripts show it without a traceback."""
    error.is_refusal = True
    return error
