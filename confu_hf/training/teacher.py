"""What the frozen target says about a batch: one dataclass, from the model itself or from the store.

Nothing of the draft but its vocabulary and its choice of layers is known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
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
    """What the target says about a batch of `B` sequences of `N` tokens, and what it says comes after `P` of the positions.

    Prompts and padding are not asked for: the head over the whole vocabulary is dear.
    """

    features: Tensor  # (B, N, 3 d), F_i of every position
    log_probs: Tensor  # (P, K) log-softmax over the draft's vocabulary
    choices: Tensor  # (P,) long, the target's likeliest token as a draft id, -1 where the draft does not have it
    places: Tensor  # (B, N) long, which of the P each position is, -1 where it is none
    cache: Cache | None  # keys and values of the whole batch, for contemplate tokens

    def locate(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where `positions` `(B, R)` stand in `log_probs`, and their choices, -1 where nothing was asked; each `(B, R)`.

        Positions behind the end give the last one: whoever asks for them leaves them out.
        """
        index = self.places.gather(1, positions.clamp_max(self.places.shape[1] - 1))
        asked = index >= 0
        index = index.clamp_min(0)
        return index, torch.where(asked, self.choices[index], -1)

    def asked(self, positions: Tensor) -> Tensor:
        """`(B, R)` bool: which of these positions lie within the text and are among the `P`."""
        inside = positions < self.places.shape[1]
        return inside & (self.places.gather(1, positions.clamp_max(self.places.shape[1] - 1)) >= 0)


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
        needed: Tensor,
        index: Tensor | None,
        with_cache: bool,
    ) -> TeacherView:
        """What is said about `input_ids` `(B, N)`, padded on the right.

        Args:
            token_ids: `(K,)` the draft's vocabulary.
            needed: `(B, N)` bool, positions whose prediction is asked for; the same ones whenever a sequence comes.
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
            return self._from_store(index, token_ids, needed, with_cache)
        fills = store is not None and bool(needed.any())  # a sequence without its choices would be of no use there
        keep_cache = fills and store.cache_shape is not None
        cache = DynamicCache() if with_cache or keep_cache else None
        # Padding is on the right, where causal attention never looks: no mask, so the fastest attention there is.
        features, last, all_logits = self._from_target(input_ids, needed, cache)
        logits = all_logits[..., token_ids]  # (P, K)
        best, choice = logits.max(-1)
        choices = torch.where(best == all_logits.amax(-1), choice, -1)
        if fills:
            everywhere = torch.full_like(input_ids, -1).masked_scatter(needed, choices)
            store.write(index, attention_mask, torch.cat([features, last], dim=-1), everywhere)
        if keep_cache:
            store.write_cache(index, attention_mask, cache)
        return TeacherView(features, _log_probs(logits), choices, _places(needed), cache)

    def _from_store(self, index: Tensor, token_ids: Tensor, needed: Tensor, with_cache: bool) -> TeacherView:
        weight, length = self.target.get_output_embeddings().weight, needed.shape[1]
        states, choices = (part.to(weight.device) for part in self.store.read(index, length))
        width = states.shape[-1] // (len(self.layer_ids) + 1)
        features, last = states.to(weight.dtype).split([len(self.layer_ids) * width, width], dim=-1)
        cache = self.store.read_cache(index, length, weight.device) if with_cache else None
        logits = head_logits(self.target, last[needed], token_ids)
        return TeacherView(features, _log_probs(logits), choices[needed], _places(needed), cache)

    def _from_target(self, input_ids: Tensor, needed: Tensor, cache: DynamicCache | None):
        """Features `(B, N, 3 d)`; what the head reads, `(B, N, d)`, None where logits are more than its output; logits of
        the `needed` positions, `(P, V)`."""
        whole = bool(logit_transforms(self.target))
        module = self.target if whole else self.target.get_decoder()
        arguments = {
            "use_cache": cache is not None,
            "output_hidden_states": layer_states_request(self.layer_ids),
            **cache_keyword(module, cache),
        }
        if whole:
            # Soft-capped and scaled logits stay where they are: of all columns in which one is needed.
            columns = needed.any(0).nonzero()[:, 0]
            output = module(input_ids=input_ids, logits_to_keep=columns, **arguments)
            kept = output.logits if output.logits.shape[1] == len(columns) else output.logits[:, columns]
            last, logits = None, kept[needed[:, columns]]
        else:
            output = module(input_ids=input_ids, **arguments)
            last = output.last_hidden_state
            logits = self.target.get_output_embeddings()(last[needed])
        return torch.cat(layer_states(output, self.layer_ids), dim=-1), last, logits


def _places(needed: Tensor) -> Tensor:
    """`(B, N)` bool -> `(B, N)` long: numbers of the chosen ones, row after row, -1 for all others."""
    numbers = needed.flatten().cumsum(0).view(needed.shape) - 1
    return torch.where(needed, numbers, -1)


def _log_probs(logits: Tensor) -> Tensor:
    """In float32 at least: the differences of a loss are taken between them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
