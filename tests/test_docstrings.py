"""Every public name says what it is, what it takes, and what its numbers are."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

import confu_hf

NAMES = [name for name in confu_hf.__all__ if inspect.isclass(getattr(confu_hf, name))]


def members(owner: type) -> dict[str, object]:
    """Public methods and properties that this package defines, those of its mixins among them."""
    found = {}
    for base in reversed(owner.__mro__):
        if base.__module__.startswith("confu_hf."):
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    kinds = (property, classmethod, staticmethod)
    return {name: value for name, value in found.items() if inspect.isfunction(value) or isinstance(value, kinds)}


def function_of(member: object):
    return member.fget if isinstance(member, property) else getattr(member, "__func__", member)


MEMBERS = [(name, member) for name in NAMES for member in members(getattr(confu_hf, name))]


def test_the_public_names_are_there():
    assert len(NAMES) == len(confu_hf.__all__) and len(MEMBERS) > 20
    assert confu_hf.__doc__ and all(name in dir(confu_hf) for name in confu_hf.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_says_what_it_is_and_what_it_holds(name):
    owner = getattr(confu_hf, name)
    text = vars(owner).get("__doc__") or ""
    assert text.strip().splitlines()[0].endswith((".", ":", "`.")), f"{name}: no first sentence"
    if dataclasses.is_dataclass(owner):
        own = [field for field in dataclasses.fields(owner) if field.name in vars(owner).get("__annotations__", {})]
        told = lambda field: re.search(rf"\b{field.name}\b", text) or field.metadata.get("help")  # noqa: E731
        silent = [field.name for field in own if not told(field)]
        # What every config of Transformers has is told there.
        assert not set(silent) - {"tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}, silent


@pytest.mark.parametrize(("name", "member"), MEMBERS)
def test_a_method_says_what_it_does_and_what_it_takes(name, member):
    function = function_of(members(getattr(confu_hf, name))[member])
    text = function.__doc__ or ""
    assert text.strip(), f"{name}.{member} has no docstring"
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    silent = [one for one in named if not re.search(rf"\b{one}\b", text)]
    assert not silent, f"{name}.{member} does not tell of {silent}"


@pytest.mark.parametrize(
    "method",
    [confu_hf.ConFuAssistant.from_pretrained, confu_hf.ConFuAssistant.attach, confu_hf.LookupAssistant.attach],
)
def test_what_refuses_says_so(method):
    assert "Raises:" in method.__doc__
