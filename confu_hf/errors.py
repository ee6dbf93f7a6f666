"""One wording for every refusal: what was got, what was expected, and what to do about it."""

from __future__ import annotations


def refusal(subject: str, *, got: object, expected: object, fix: str) -> ValueError:
    """The `ValueError` of a refusal, for the caller to raise: `subject: got ..., expected .... fix`"""
    return ValueError(f"{subject}: got {got}, expected {expected}. {fix}")
