"""The rules of a call, for rows that are decoded each at its own pace: who is asked what about which row.

`generate` prepares processors and stopping criteria for a batch whose rows have the same length at every step. Here a
row of a batch is ahead of another one. So processors that hold something for each row are taken apart, and of the
criteria those that look at one row only are asked while it is decoded; the others are asked with the whole batch, as
plain decoding asks them, once every row has come to that length (batch.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from .. import compat

# What these say of a row depends on that row alone.
ROW_CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopStringCriteria, MaxTimeCriteria)


@dataclass(frozen=True)
class Rules:
    """Rules of a call.

    Attributes:
        processors: of each row, called with its own ids and logits, once for every token in order.
        row_criteria: asked with a row's own ids `(1, n)`.
        batch_criteria: asked with the ids of the whole batch at each length; empty for a batch of one.
        rows_end: a row that has stopped ends there, and is padded; else it goes on until all have stopped.
        max_length: the most tokens a row may have; None = no limit.
    """

    processors: tuple[LogitsProcessorList, ...]
    row_criteria: StoppingCriteriaList
    batch_criteria: StoppingCriteriaList
    rows_end: bool
    max_length: int | None


def rules_for(processors: LogitsProcessorList, criteria: StoppingCriteriaList, batch_size: int) -> Rules:
    """The rules that `generate` prepared, for a batch of `batch_size` rows."""
    max_length = getattr(criteria, "max_length", None)
    if batch_size == 1:
        return Rules((processors,), criteria, StoppingCriteriaList(), True, max_length)
    # As plain decoding does: without an end token nothing is padded.
    rows_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    alone = ROW_CRITERIA if rows_end else (MaxLengthCriteria,)
    return Rules(
        tuple(
            LogitsProcessorList(processor_for(processor, row, batch_size) for processor in processors)
            for row in range(batch_size)
        ),
        StoppingCriteriaList(criterion for criterion in criteria if isinstance(criterion, alone)),
        StoppingCriteriaList(criterion for criterion in criteria if not isinstance(criterion, alone)),
        rows_end,
        max_length,
    )


def processor_for(processor: LogitsProcessor, row: int, batch_size: int) -> LogitsProcessor:
    """What `processor` does for one row of a batch; itself where it does the same for all rows, or is not known."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed, repeats = compat.prefix_rule(processor)
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row // repeats, ids), 1)
    if isinstance(processor, SynthIDTextWatermarkLogitsProcessor):
        return copy.deepcopy(processor)  # remembers contexts
    one = copy.copy(processor)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = processor.prompt_ignore_length
        one.prompt_ignore_length = ignored if ignored is None or isinstance(ignored, int) else ignored[row : row + 1]
    elif isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
        one.encoder_input_ids = processor.encoder_input_ids[row : row + 1]
    elif isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        prompt = row // max(1, batch_size // processor.batch_size)
        one.generated_ngrams, one.batch_size = processor.generated_ngrams[prompt : prompt + 1], 1
    elif isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
        context = processor.unconditional_context
        parts = {name: context[name] for name in ("input_ids", "attention_mask")}
        parts = {name: part if part is None else part[row : row + 1] for name, part in parts.items()}
        one.unconditional_context = {**context, **parts}
    else:
        return processor
    return one
