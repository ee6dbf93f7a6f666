"""What training computes for a row is what decoding computes when a round starts there: all rows, all steps."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_models import ARCHITECTURES, NUM_LAYERS, keep_softmax_in_float64, tiny_llama
from tiny_pairs import conversations, tiny_pair

from confu_hf.decoding.contemplation import Contemplator
from confu_hf.decoding.drafting import NetworkDrafter
from confu_hf.decoding.state import Rows
from confu_hf.target.cache import TreeCache
from confu_hf.target.passes import prefill, verify
from confu_hf.target.soft_prompts import soft_prompt_key_values
from confu_hf.training.data import ConversationCollator
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.rows import DraftRows
from confu_hf.training.unroll import DraftUnroll
from confu_hf.tree.draft_tree import DraftTree
from confu_hf.tree.layout import verify_layout

STEPS, PROMPT, LENGTH = 4, 5, 13
KINDS = [
    ("llama", "kv"),
    ("llama", "embedding"),
    ("llama", None),  # EAGLE-3
    ("qwen3", "kv"),
    ("mistral", "kv"),
    ("gemma2", "embedding"),
    ("gemma3", "kv"),
    ("granite", None),
]
CASES = [(*case, lag) for case in KINDS for lag in ((1, 3) if case[1] else (1,))]
VARIANTS = {
    "feedback_after_norm": {"feedback_after_norm": True},
    "eagle3.1": {"feedback_after_norm": True, "fc_norm": True},
    "norm_before_residual": {"norm_before_residual": True, "qk_norm": True},
    "own embeddings": {"own_embeddings": True, "target_layer_ids": [1, 2, 4]},
    "gated LoRA": {"lora_rank": 2},
    "future word": {"future_words": 1},
    "future word, after the norm": {"future_words": 1, "feedback_after_norm": True, "fc_norm": True},
    "two words": {"future_words": 2, "lora_rank": 2},
    "three words, after the norm": {"future_words": 3, "feedback_after_norm": True},
    "narrow, scaled": {"hidden_size": 16, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
}


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def pair(architecture: str, kind: str | None, **variant):
    target = ARCHITECTURES[architecture]()
    fields = {"contemplate": False, **variant} if kind is None else {"soft_prompt_type": kind, **variant}
    draft = tiny_pair(target, **fields)
    if kind is not None:
        with torch.no_grad():
            target.confu.prompt_weight().mul_(3.0)  # so that nobody overlooks them
            for weight in target.confu.confu_lora_up.parameters():
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return target, draft


def trained_outputs(target, draft, batch, *, lag: int, monkeypatch):
    """`(K, B, R, d)` normalised outputs of the unrolled draft, and the rows they belong to."""
    objective = ConFuTrainingObjective(ttt_steps=STEPS, num_anchors=100, replication=1, max_lag=lag)
    module = ConFuForTraining(target, draft, objective).eval()
    if lag > 1:  # evaluation contemplates at lag 1; training draws 1..max_lag
        module.train()
        monkeypatch.setattr(torch, "randint", lambda low, high, shape, device=None: torch.full(shape, high - 1))
    seen, step = [], DraftUnroll.step
    monkeypatch.setattr(DraftUnroll, "step", lambda unroll: seen.append(step(unroll)) or seen[-1])
    with torch.no_grad():
        module(**batch)
    return torch.stack(seen), DraftRows.of(batch["labels"], STEPS)


def chain(tokens: torch.Tensor) -> DraftTree:
    """`(1, W)` tokens, each the child of the one before."""
    index = torch.arange(tokens.shape[1])[None]
    return DraftTree(tokens, index - 1, index, torch.zeros_like(index, dtype=torch.float))


def decoded_round(target, draft, tokens, row: int, lag: int):
    """`(K, d)` normalised outputs of a round that starts at `row`, driven with the true tokens.

    The round before verified the `lag` tokens up to `row` as a chain: its newest known features were those of position
    `row - lag`, its root was the token behind them, and the contemplate token of the chain's last node gives `f`.
    """
    contemplate, ids = draft.config.contemplate, draft.config.target_layer_ids
    prompts = None
    if contemplate:
        layer = target.confu
        weight = layer.prompt_weight()
        prompts = weight if layer.soft_prompt_type == "kv" else soft_prompt_key_values(target, weight)
    cache = TreeCache(NUM_LAYERS, prompts)
    known = row - lag + 1
    features = prefill(target, tokens[:, :known], cache, ids).features
    nodes = torch.full((1, 1), lag - 1) if contemplate else torch.empty(1, 0, dtype=torch.long)
    layout = verify_layout(
        chain(tokens[:, known : row + 1]),
        nodes,
        slot_position_ids=torch.arange(known)[None],
        soft_prompt_length=cache.soft_prompt_length,
        contemplate_length=draft.config.contemplate_length,
    )
    embedding = target.confu.contemplate_embedding(features[:, -1]) if contemplate else None
    future_ids = draft.config.future_layer_ids
    arguments = (
        (target, target.confu, target.confu.current, future_ids, layout.contemplate_length) if contemplate else ()
    )
    with Contemplator(*arguments).acting(layout.contemplate_length) if contemplate else nullcontext():
        verified = verify(target, layout, embedding, cache, ids, future_layer_ids=future_ids)
    drafter = NetworkDrafter(draft, draft.input_embeddings(target.get_input_embeddings()))
    everything = torch.cat([features, verified.features], dim=1)
    future = verified.futures[:, 0] if contemplate else None
    # Told in two parts, as decoding tells it: rows that it has not read wait.
    for part in (slice(0, known), slice(known, row + 1)):
        positions = torch.arange(row + 1)[None, part]
        drafter.observe(None, Rows(tokens[:, 1 : row + 2][:, part], everything[:, part], positions, future))
    outputs = []  # what the head reads
    hook = draft.lm_head.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0][0, 0]))
    for step in range(min(STEPS, tokens.shape[1] - row - 1)):
        parents = None if step == 0 else torch.zeros(1, 1, dtype=torch.long)
        drafter.step(tokens[:, row + 1 + step, None], parents, 1)
    hook.remove()
    return torch.stack(outputs)


@pytest.mark.parametrize(("architecture", "kind", "lag"), CASES)
def test_every_row_and_step(architecture, kind, lag, monkeypatch):
    check_every_row_and_step(*pair(architecture, kind), lag, monkeypatch)


@pytest.mark.parametrize("kind", ["kv", None])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_and_step_of_the_variants(name, kind, monkeypatch):
    check_every_row_and_step(*pair("llama", kind, **VARIANTS[name]), 1, monkeypatch)


def check_every_row_and_step(target, draft, lag, monkeypatch):
    # The second sequence is shorter: padding on the right, and other rows.
    batch = ConversationCollator(0)(conversations((PROMPT, LENGTH), (PROMPT + 1, LENGTH - 3)))
    outputs, rows = trained_outputs(target, draft, batch, lag=lag, monkeypatch=monkeypatch)
    assert rows.starts[0].tolist() == list(range(PROMPT - 1, LENGTH - 2))
    compared = 0
    for sequence in range(2):
        tokens = batch["input_ids"][sequence : sequence + 1, : batch["attention_mask"][sequence].sum()]
        for index in rows.valid[0, sequence].nonzero().flatten().tolist():
            row = rows.starts[sequence, index].item()
            with torch.no_grad():
                expected = decoded_round(target, draft, tokens, row, lag)
            steps = rows.valid[:, sequence, index].sum()  # those that are trained
            torch.testing.assert_close(outputs[:steps, sequence, index], expected[:steps], rtol=1e-9, atol=1e-9)
            compared += steps.item()
    assert compared == (4 * 4 + 3 + 2 + 1) + (
        3 + 2 + 1
    )  # 7 rows and 3; the end of the answer cuts the last ones short


def test_a_slip_of_the_future_would_be_seen(monkeypatch):
    """The negative control: soft prompts, the source of the contemplate token and its position all matter, and its word."""
    target, draft = pair("llama", "kv", lora_rank=2, future_words=2)
    batch = ConversationCollator(0)(conversations((PROMPT, LENGTH)))
    outputs, rows = trained_outputs(target, draft, batch, lag=1, monkeypatch=monkeypatch)
    row = rows.starts[0, 3].item()

    def differs() -> bool:
        with torch.no_grad():
            return (decoded_round(target, draft, batch["input_ids"], row, 1) - outputs[:, 0, 3]).abs().max() > 1e-4

    assert not differs()
    weights = target.confu.adapter_weights(target.confu.current)
    for name in ("confu_prompts", "confu_experts", "confu_router", "confu_lora_up"):
        kept = weights[name].clone()
        weights[name].copy_(-kept)
        assert differs(), name
        weights[name].copy_(kept)
    with torch.no_grad():
        for word in draft.future_word.weight.unflatten(0, (2, -1)):
            word.neg_()
            assert differs(), "future_word"
            word.neg_()
    with torch.no_grad():
        other_lag = decoded_round(target, draft, batch["input_ids"], row, 2)
    assert (other_lag - outputs[:, 0, 3]).abs().max() > 1e-4


def test_training_mode_with_an_anchor_at_every_row_is_evaluation(monkeypatch):
    target, draft = pair("llama", "kv")
    batch = ConversationCollator(0)(conversations((PROMPT, LENGTH)))
    objective = ConFuTrainingObjective(ttt_steps=STEPS, num_anchors=100, replication=1, max_lag=1)
    module = ConFuForTraining(target, draft, objective)
    torch.testing.assert_close(module.train()(**batch)["loss"], module.eval()(**batch)["loss"], rtol=1e-12, atol=0)


def test_the_target_is_in_eval_mode_while_the_draft_trains():
    """With dropout the target would say other things than it does when it decodes."""
    target = tiny_llama(attention_dropout=0.5)
    draft = tiny_pair(target, contemplate=False)
    batch = ConversationCollator(0)(conversations((PROMPT, LENGTH)))
    module = ConFuForTraining(target, draft)
    assert module.train()(**batch)["loss"] == module.eval()(**batch)["loss"]
