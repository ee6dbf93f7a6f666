"""Assistants for tests of decoding: one whose every weight matters, and one that is mostly right."""

from __future__ import annotations

import torch
from tiny_models import VOCAB_SIZE

from confu_hf import ConFuAssistant
from confu_hf.decoding.drafting import NetworkDrafter


def make_assistant(model, assistant_class=ConFuAssistant, **config) -> ConFuAssistant:
    """An untrained pair whose every weight matters (fresh ones keep the future token's skip connection at zero), and
    with a tree of the same size in every round: on a tiny target drafting does not pay."""
    assistant = assistant_class.from_target(model, draft_vocab_size=VOCAB_SIZE, **config)
    assistant.generation_config.policy = "fixed"
    with torch.random.fork_rng():
        torch.manual_seed(11)
        for parameter in [*assistant.parameters(), *getattr(model, "confu", torch.nn.Module()).parameters()]:
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
    return assistant


class OracleDrafter(NetworkDrafter):
    """Drafts with the target itself: its likeliest tokens, but the best two swapped at every third row of a layer.

    The real draft runs along: its cache and masks are exercised.
    """

    def __init__(self, draft, target, unseen=None):
        super().__init__(draft, target.get_input_embeddings())
        self.target, self.steps, self.unseen = target, 0, unseen

    def observe(self, state, rows):
        super().observe(state, rows)
        self.decided = [ids[:length].tolist() for ids, length in zip(state.input_ids, state.lengths, strict=True)]
        self.decided = [ids[next((i for i, token in enumerate(ids) if token), 0) :] for ids in self.decided]  # padding
        if self.unseen is not None:
            self.decided = [[*unseen, *ids] for unseen, ids in zip(self.unseen, self.decided, strict=True)]

    def select(self, rows):
        super().select(rows)
        self.decided = [self.decided[row] for row in rows]
        self.unseen = None if self.unseen is None else [self.unseen[row] for row in rows]

    def step(self, tokens, parents, top_k):
        super().step(tokens, parents, top_k)
        if parents is None:
            self.paths, self.steps = [[ids] for ids in self.decided], 0
        else:
            self.paths = [
                [paths[parent] + [token] for parent, token in zip(*row, strict=True)]
                for paths, *row in zip(self.paths, parents.tolist(), tokens.tolist(), strict=True)
            ]
        self.steps += 1
        logits = torch.stack([self.next_logits(paths) for paths in self.paths])
        log_probs, children = logits.log_softmax(-1).topk(top_k, dim=-1)
        return (children.roll(1, dims=-1) if self.steps % 3 == 0 else children), log_probs

    def next_logits(self, paths):
        return self.target(torch.tensor(paths, device=self.target.device)).logits[:, -1].float()


class KnownTextDrafter(OracleDrafter):
    """Knows what will be written instead of asking the target, which may see more than ids."""

    def __init__(self, draft, target, texts):
        super().__init__(draft, target)
        self.texts = texts

    def next_logits(self, paths):
        logits = torch.arange(VOCAB_SIZE).expand(len(paths), -1).remainder(7).float()
        for row, path in zip(logits, paths, strict=True):
            row[[text[len(path)] for text in self.texts if text[: len(path)] == path and len(text) > len(path)]] = 9.0
        return logits


class KnownTextAssistant(ConFuAssistant):
    """`texts`: lists of ids, without padding."""

    texts = ()

    def new_drafter(self, target, options):
        return KnownTextDrafter(self, target, self.texts)


class OracleAssistant(ConFuAssistant):
    unseen = None  # of each row what the target reads and `generate` has no ids of

    def new_drafter(self, target, options):
        return OracleDrafter(self, target, self.unseen)


def make_oracle(model, unseen=None, **config) -> ConFuAssistant:
    """An assistant that is mostly right."""
    assistant = make_assistant(model, assistant_class=OracleAssistant, **config)
    assistant.unseen = unseen
    return assistant
