"""What the frozen target says about a batch: one dataclass, from the model itself or from the store.

Nothing of the draft but its vocabulary and its choice of layers is known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from ..compat import cache_keyword, layer_states, layer_states_request
from ..errors import refusal
from ..target.weights import head_logits
from .store import FeatureStore

# Config fields of targets that change logits behind the head.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def logit_transforms(target: PreTrainedModel) -> list[str]:
    """What a target does to its logits behind the head."""
    config = target.config.get_text_config(decoder=True)
    return [name for name in LOGIT_TRANSFORMS if getattr(config, name, None)]


@dataclass(frozen=True)
class TeacherView:
    """What the target says about a batch of `B` sequences of `N` tokens, from position `first` on (`P = N - first`).

    Index `i` of `log_probs` and `choices` is position `first + i`: what the target says comes after it.
    """

    features: Tensor  # (B, N, 3 d), F_i of every position
    log_probs: Tensor  # (B, P, K) log-softmax over the draft's vocabulary
    choices: Tensor  # (B, P) long, the target's likeliest token as a draft id, -1 where the draft does not have it
    first: int
    cache: Cache | None  # keys and values of the whole batch, for contemplate tokens

    def locate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where `positions` `(B, R)` stand in `log_probs.flatten(0, 1)`, and their choices; each `(B, R)`.

        Positions behind the end give the last one: whoever asks for them leaves them out.
        """
        batch, length = self.choices.shape
        index = (positions - self.first).clamp_max(length - 1)
        start = torch.arange(batch, device=index.device)[:, None] * length
        return index + start, self.choices.gather(1, index)


class Teacher:
    """Asks the target, or the store where it knows the whole batch; fills the store on the way.

    Args:
        target: causal LM.
        layer_ids: layers whose entering hidden states are the features.
        store: keeps what the target says from epoch to epoch.

    Raises:
        ValueError: a store for a target whose logits are not its head's output.
    """

    def __init__(self, target: PreTrainedModel, layer_ids: list[int], store: FeatureStore | None = None):
        scaled = logit_transforms(target)
        if store is not None and scaled:
            raise refusal(
                "feature_store",
                got=f"a target with {scaled}",
                expected="one whose logits are its head's output",
                fix="Train without feature_store.",
            )
        self.target, self.layer_ids, self.store = target, list(layer_ids), store

    @torch.no_grad()
    def view(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_ids: Tensor,
        *,
        first: int,
        index: Tensor | None,
        with_cache: bool,
    ) -> TeacherView:
        """What is said about `input_ids` `(B, N)`, padded on the right.

        Args:
            token_ids: `(K,)` the draft's vocabulary.
            first: the first position whose prediction is asked for.
            index: `(B,)` which sequences these are; needed with a store.
            with_cache: whether keys and values are needed.
        """
        store = self.store
        if store is not None and index is None:
            raise refusal(
                "feature_store",
                got="a batch without `index`",
                expected="the sequences' own numbers, (B,) long",
                fix="Make batches with ConversationCollator.",
            )
        if store is not None and store.holds(index, cache=with_cache):
            return self._from_store(index, input_ids.shape[1], token_ids, first, with_cache)
        keep_cache = store is not None and store.cache_shape is not None
        cache = DynamicCache() if with_cache or keep_cache else None
        # Padding is on the right, where causal attention never looks: no mask, so the fastest attention there is.
        features, last, all_logits = self._from_target(input_ids, first, cache)
        logits = all_logits[..., token_ids]
        best, choice = logits.max(-1)
        choices = torch.where(best == all_logits.amax(-1), choice, -1)
        if store is not None:
            store.write(index, attention_mask, torch.cat([features, last], dim=-1), F.pad(choices, (first, 0)))
        if keep_cache:
            store.write_cache(index, attention_mask, cache)
        return TeacherView(features, _log_probs(logits), choices, first, cache)

    def _from_store(self, index: Tensor, length: int, token_ids: Tensor, first: int, with_cache: bool) -> TeacherView:
        weight = self.target.get_output_embeddings().weight
        states, choices = (part.to(weight.device) for part in self.store.read(index, length))
        width = states.shape[-1] // (len(self.layer_ids) + 1)
        features, last = states.to(weight.dtype).split([len(self.layer_ids) * width, width], dim=-1)
        cache = self.store.read_cache(index, length, weight.device) if with_cache else None
        logits = head_logits(self.target, last[:, first:], token_ids)
        return TeacherView(features, _log_probs(logits), choices[:, first:], first, cache)

    def _from_target(self, input_ids: Tensor, first: int, cache: DynamicCache | None):
        """Features `(B, N, 3 d)`; for the store, the head's inputs `(B, N, d)`, else None; logits from `first` on."""
        module = self.target if self.store is None else self.target.get_decoder()
        arguments = {
            "use_cache": cache is not None,
            "output_hidden_states": layer_states_request(self.layer_ids),
            **cache_keyword(module, cache),
        }
        if self.store is None:
            # Whole: soft-capped and scaled logits stay where they are.
            kept = torch.arange(first, input_ids.shape[1], device=input_ids.device)
            output = module(input_ids=input_ids, logits_to_keep=kept, **arguments)
            last, logits = None, output.logits
        else:
            output = module(input_ids=input_ids, **arguments)
            last = output.last_hidden_state
            logits = self.target.get_output_embeddings()(last[:, first:])
        return torch.cat(layer_states(output, self.layer_ids), dim=-1), last, logits


def _log_probs(logits: Tensor) -> Tensor:
    """In float32 at least: the differences of a loss are taken between them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
