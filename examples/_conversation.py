"""A conversation as token ids, with the cache that goes with them: a turn costs only what is new. Knows no assistant."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from confu_hf.errors import refusal

# Stands for an answer while the chat template is asked what comes behind one.
PLACEHOLDER = "@@ANSWER@@"


class Conversation:
    """What was said so far.

    The ids of an answer stay as the model wrote them, since encoding its text again may give others, and then the
    cache would be of no use.

    Args:
        system: the system message; None = the template's own, if it has one.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None = None):
        if tokenizer.chat_template is None:
            raise refusal(
                "A chat",
                got="a tokenizer without a chat template",
                expected="an instruction-tuned model",
                fix="Name one with --target.",
            )
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.ids: list[int] = []
        self.cache: Cache = DynamicCache(config=self.model.config)

    def ask(self, text: str, max_new_tokens: int) -> Tensor:
        """`(1, n)` long: all ids up to where the answer begins. The conversation is unchanged until [`keep`].

        Raises:
            ValueError: with the answer, the conversation would be longer than the model can read.
        """
        ids = self.ids + (self._behind_answer(text) if self.ids else self._first(text))
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise refusal(
                "This conversation",
                got=f"{len(ids)} tokens, and up to {max_new_tokens} to come",
                expected=f"at most {limit}, the model's limit",
                fix="Start anew with /reset, or ask for shorter answers with --max-new-tokens.",
            )
        return torch.tensor([ids], device=self.model.device)

    def keep(self, sequence: Tensor) -> None:
        """`(n,)` long, all ids with the answer; the cache has been extended in place."""
        self.ids = sequence.tolist()

    def _first(self, text: str) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self._encode(self._render([*system, {"role": "user", "content": text}]))

    def _behind_answer(self, text: str) -> list[int]:
        """What closes the last answer, and the next question."""
        turns = [
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": PLACEHOLDER},
            {"role": "user", "content": text},
        ]
        rendered = self._render(turns)
        if PLACEHOLDER not in rendered:
            raise refusal(
                "The chat template",
                got="an earlier answer that it leaves out",
                expected="a template that repeats the conversation",
                fix="Ask one question at a time, with /reset in between.",
            )
        ids = self._encode(rendered.rpartition(PLACEHOLDER)[2])
        # An answer that came to its end has written the closing token itself.
        return ids[1:] if ids[:1] == self.ids[-1:] else ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
