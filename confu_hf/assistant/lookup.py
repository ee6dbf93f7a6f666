"""`LookupAssistant`: an assistant without a trained draft, which drafts what the text itself, or an earlier one, said.

Who drafts is `decoding/lookup.py`'s, the route of `generate` into the decoding loop `routing.py`'s.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .. import compat
from ..adapter.attachment import base_model
from ..configuration_confu import ConFuConfig
from ..decoding.drafting import Drafter
from ..decoding.lookup import LookupDrafter
from ..decoding.stats import GenerationStats
from ..errors import refusal
from ..options import ConFuGenerationConfig, TreeOptions
from ..target.support import check_supported
from .compiling import CompilesProducts
from .policies import DecidesRounds
from .routing import release, serve

ATTACH = "Make it with LookupAssistant(target=model), or call its attach(model)."


class LookupAssistant(compat.OnlyRouted, CompilesProducts, DecidesRounds):
    """Prompt lookup with draft trees: nothing to train, nothing to download, for every target that ConFu supports.

        lookup = LookupAssistant(target=model)
        model.generate(**inputs, assistant_model=lookup)
        lookup.stats.mean_accepted_length
        lookup.detach()  # model is as it was

    Args:
        target: attach to this model; without it, call [`attach`] later.
        **options: tree options, kept on `generation_config` ([`ConFuGenerationConfig`]).

    Attributes:
        generation_config: the tree options, a [`ConFuGenerationConfig`].
        stats: statistics of the last `generate` call with this assistant, a [`GenerationStats`]; None before the first.
        target: the model that it is attached to, or None.
        costs: what `policy="auto"` goes by, in seconds; None = it measures.
    """

    def __init__(self, target: PreTrainedModel | PeftModel | None = None, **options: Any):
        defaults = {"total_tokens": 12, "depth": 12, "confidence_threshold": 0.05, "contemplate": False}
        self.generation_config = ConFuGenerationConfig(**{**defaults, **options})
        self.stats: GenerationStats | None = None
        self._target_reference: weakref.ref[PreTrainedModel] | None = None
        self._config: ConFuConfig | None = None
        if target is not None:
            self.attach(target)

    @property
    def target(self) -> PreTrainedModel | None:
        """The model that this assistant is attached to, if any."""
        return None if self._target_reference is None else self._target_reference()

    @property
    def config(self) -> ConFuConfig:
        """The target's vocabulary and geometry, as `generate` and `pipeline` want to know them of an assistant."""
        if self.target is None:
            raise refusal("LookupAssistant", got="one that is attached to no model", expected="a target", fix=ATTACH)
        return self._config

    @property
    def device(self) -> torch.device:
        """The target's, as nothing here is a network."""
        return compat.working_device(self.target)

    def attach(self, model: PreTrainedModel | PeftModel) -> LookupAssistant:
        """Route a target's `generate` here. Again on the same target: changes nothing.

        Args:
            model: a supported target, or a `PeftModel` of one.

        Returns:
            The assistant itself.

        Raises:
            ValueError: the model cannot be a target, or the assistant is attached to another.
        """
        target, attached = base_model(model), self.target
        if attached is target:
            return self
        if attached is not None:
            raise refusal(
                "lookup.attach",
                got="an assistant that is attached to another model",
                expected="a free one",
                fix="Call lookup.detach() first, or make a second LookupAssistant.",
            )
        check_supported(target)
        # Features are read by networks alone: of those there must be, the states entering layer 0 cost least.
        self._config = ConFuConfig.from_target_config(target.config, target_layer_ids=[0], contemplate=False)
        self._target_reference = weakref.ref(target)
        serve(target, self)
        return self

    def detach(self) -> PreTrainedModel | None:
        """Give the target back as it was before [`attach`], and return it."""
        target = self.target
        self._target_reference = self._config = self.products = None
        if target is not None:
            release(target, self)
        return target

    def new_drafter(self, target: PreTrainedModel, options: TreeOptions) -> Drafter:
        """Who drafts in one call of `generate`. Override it to draft in another way.

        Args:
            target: the model that verifies.
            options: the tree options of this call.
        """
        return LookupDrafter(self.answer_memory(options))

    def generate(self, *args: Any, **kwargs: Any) -> None:
        """An assistant cannot write by itself; Transformers calls this when it was attached to another model."""
        raise refusal(
            "LookupAssistant", got="another model than its own", expected="the one it is attached to", fix=ATTACH
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are detached."""
        return self.__dict__ | {"_target_reference": None, "_config": None, "products": None}
