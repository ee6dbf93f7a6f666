"""What `generate` may be asked: the list behind the tests and behind the table in examples/options.md.

python tests/options.py  # writes the table anew
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models  # noqa: E402
from transformers import (  # noqa: E402
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer  # noqa: E402

from confu_hf.compat import cache_keyword  # noqa: E402

PAGE = Path(__file__).parent.parent / "examples" / "options.md"
BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"

# Logits processors, by the class that an option of `generate` switches on; greedy and sampled.
PROCESSORS = {
    "MinLengthLogitsProcessor": {"min_length": 20},
    "MinNewTokensLengthLogitsProcessor": {"min_new_tokens": 9},
    "RepetitionPenaltyLogitsProcessor": {"repetition_penalty": 1.4},
    "EncoderRepetitionPenaltyLogitsProcessor": {"encoder_repetition_penalty": 1.3},
    "NoRepeatNGramLogitsProcessor": {"no_repeat_ngram_size": 2},
    "EncoderNoRepeatNGramLogitsProcessor": {"encoder_no_repeat_ngram_size": 1},
    "SequenceBiasLogitsProcessor": {"sequence_bias": [[[3], 2.0], [[9, 31], -4.0]]},
    "NoBadWordsLogitsProcessor": {"bad_words_ids": [[20], [7, 3]]},
    "PrefixConstrainedLogitsProcessor": {"prefix_allowed_tokens_fn": lambda _, ids: range(int(ids[-1]) % 7, 97, 7)},
    "ForcedBOSTokenLogitsProcessor": {"forced_bos_token_id": 7},
    "ForcedEOSTokenLogitsProcessor": {"forced_eos_token_id": 2},
    "InfNanRemoveLogitsProcessor": {"remove_invalid_values": True},
    "ExponentialDecayLengthPenalty": {"exponential_decay_length_penalty": (3, 1.5)},
    "LogitNormalization": {"renormalize_logits": True},
    "SuppressTokensLogitsProcessor": {"suppress_tokens": [3, 54, 20]},
    "SuppressTokensAtBeginLogitsProcessor": {"begin_suppress_tokens": [3, 54, 20]},
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": {
        "guidance_scale": 1.7,
        "negative_prompt_ids": torch.tensor([[4, 8]]),
    },
    "WatermarkLogitsProcessor": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    "SynthIDTextWatermarkLogitsProcessor": {
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[654, 400, 836], ngram_len=3)
    },
}
# Those for sampling.
WARPERS = {
    "TemperatureLogitsWarper": {"temperature": 0.6},
    "TopKLogitsWarper": {"top_k": 5},
    "TopPLogitsWarper": {"top_p": 0.7},
    "TopHLogitsWarper": {"top_h": 0.5},
    "MinPLogitsWarper": {"min_p": 0.2},
    "TypicalLogitsWarper": {"typical_p": 0.6},
    "EpsilonLogitsWarper": {"epsilon_cutoff": 0.02},
    "EtaLogitsWarper": {"eta_cutoff": 0.1},
}
# Those that hold something for every row, and others, with a padded batch.
BATCHED = {
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.3,
    "encoder_no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "sequence_bias": [[[3], 2.0], [[9, 31], -4.0]],
    "guidance_scale": 1.5,
    "prefix_allowed_tokens_fn": lambda row, ids: [2, *range(row * 20, row * 20 + 30)],
}
# No option of `generate` for text switches these on: speech, audio codes, batches of conditioned and bare prompts.
ELSEWHERE = {
    "AlternatingCodebooksLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "WhisperNoSpeechDetection",
    "WhisperTimeStampLogitsProcessor",
}

Inputs = dict[str, Any]
ONCE, ROWS, SAMPLED = "one row, greedy", "padded batch, greedy", "one row, sampled"


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Attributes:
        name: as it is written in a call.
        change: the arguments of a call -> the same with the option, for a model. Called anew for every call.
        runs: the kinds of calls that are held against plain `generate`.
        returned: fields of the output that are compared besides the ids.
        refusal: what the refusal says (a pattern), for what is not served.
        attention: of the model.
    """

    name: str
    change: Callable[[PreTrainedModel, Inputs], Inputs]
    runs: tuple[str, ...] = (ONCE, ROWS, SAMPLED)
    returned: tuple[str, ...] = ()
    refusal: str | None = None
    attention: str = "sdpa"


def adds(**arguments: Any) -> Callable[[PreTrainedModel, Inputs], Inputs]:
    return lambda model, inputs: {**inputs, **arguments}


def _embeddings(keep_ids: bool) -> Callable[[PreTrainedModel, Inputs], Inputs]:
    def change(model: PreTrainedModel, inputs: Inputs) -> Inputs:
        embeds = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        kept = {name: value for name, value in inputs.items() if keep_ids or name != "input_ids"}
        return {**kept, **embeds}

    return change


def _positions(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    counted = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return {**inputs, "position_ids": counted * 2 + 5}


def _cache(make: Callable[[PreTrainedModel], Any]) -> Callable[[PreTrainedModel, Inputs], Inputs]:
    return lambda model, inputs: {**inputs, **cache_keyword(model, make(model))}


def _offloading(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # one that was made so asks for a GPU
    return cache


class _Sum(StoppingCriteria):
    """The newest tokens add up to a multiple of five."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -2:].sum(-1) % 5 == 0


class _Streamer(BaseStreamer):
    """Reads along."""

    def put(self, value):
        """Takes anything."""

    def end(self):
        """Done."""


def _stop_strings(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """One visible character per token; several of them stop."""
    characters = list(map(chr, range(33, 33 + model.config.vocab_size)))
    raw = Tokenizer(models.BPE({character: index for index, character in enumerate(characters)}, merges=[]))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    return {**inputs, "stop_strings": characters[:90:6], "tokenizer": tokenizer}


def _returned(*names: str) -> Callable[[PreTrainedModel, Inputs], Inputs]:
    return adds(return_dict_in_generate=True, **{f"output_{name}": True for name in names})


_DICT = "return_dict_in_generate, "
SERVED = [
    Option("input_ids, attention_mask", adds()),
    Option("inputs_embeds", _embeddings(keep_ids=False)),
    Option("inputs_embeds with input_ids", _embeddings(keep_ids=True)),
    Option("position_ids", _positions),
    Option("prefill_chunk_size", adds(prefill_chunk_size=3)),
    Option(
        "num_return_sequences, do_sample, top_k=1",
        adds(num_return_sequences=3, do_sample=True, top_k=1),
        runs=(ONCE, ROWS),
    ),
    Option("a DynamicCache handed in", _cache(lambda model: DynamicCache(config=model.config))),
    Option("a StaticCache handed in", _cache(lambda model: StaticCache(config=model.config, max_cache_len=40))),
    Option("cache_implementation='dynamic'", adds(cache_implementation="dynamic")),
    Option("cache_implementation='static'", adds(cache_implementation="static")),
    Option(_DICT + "output_scores", _returned("scores"), returned=("scores",)),
    Option(_DICT + "output_logits", _returned("logits"), returned=("logits",)),
    Option(_DICT + "output_hidden_states", _returned("hidden_states"), returned=("hidden_states",)),
    Option(
        _DICT + "output_attentions, eager attention",
        _returned("attentions"),
        returned=("attentions",),
        attention="eager",
    ),
    Option("max_new_tokens", adds(max_new_tokens=5)),
    Option("max_length", adds(max_length=14, max_new_tokens=None)),
    Option("eos_token_id, pad_token_id", adds(eos_token_id=list(range(0, 97, 6)), pad_token_id=0)),
    Option("stopping_criteria", lambda model, inputs: {**inputs, "stopping_criteria": StoppingCriteriaList([_Sum()])}),
    Option("stop_strings, tokenizer", _stop_strings),
    Option("max_time", adds(max_time=1000.0)),
    Option("streamer", lambda model, inputs: {**inputs, "streamer": _Streamer()}, runs=(ONCE, SAMPLED)),
]
REFUSED = [
    Option("num_beams > 1", adds(num_beams=3), refusal="got num_beams=3"),
    Option("use_cache=False", adds(use_cache=False), refusal="got use_cache=False"),
    Option("prompt_lookup_num_tokens", adds(prompt_lookup_num_tokens=3), refusal="Use one way of drafting"),
    Option("dola_layers", adds(dola_layers="high"), refusal="Leave out the assistant for DoLa"),
    Option(
        _DICT + "output_attentions, other attention",
        _returned("attentions"),
        refusal="expected attn_implementation='eager'",
    ),
    Option(
        _DICT + "output_attentions, static cache",
        lambda model, inputs: {**_returned("attentions")(model, inputs), "cache_implementation": "static"},
        refusal="expected None with output_attentions",
        attention="eager",
    ),
    Option(
        "cache_implementation='quantized'",
        adds(cache_implementation="quantized"),
        refusal="got cache_implementation='quantized'",
    ),
    Option(
        "cache_implementation='offloaded', and its static kin",
        adds(cache_implementation="offloaded"),
        refusal="got cache_implementation='offloaded'",
    ),
    Option("a cache that offloads, handed in", _cache(_offloading), refusal="that offloads its layers"),
    Option("synced_gpus", adds(synced_gpus=True), refusal="got synced_gpus=True"),
    Option(
        "position_ids of three dimensions",
        lambda model, inputs: {**inputs, "position_ids": torch.zeros(3, *inputs["input_ids"].shape, dtype=torch.long)},
        refusal="got position_ids",
    ),
    Option(
        "a streamer with a batch",
        lambda model, inputs: {**{name: part.repeat(2, 1) for name, part in inputs.items()}, "streamer": _Streamer()},
        refusal="got a streamer with a batch of 2",
    ),
]


def processor_rows() -> list[tuple[str, str, str]]:
    """Name, whether it is the same, how that is tested, of every processor."""
    rows = []
    for name, arguments in {**PROCESSORS, **WARPERS}.items():
        options = ", ".join(f"`{option}`" for option in arguments)
        runs = [*([ONCE] if name in PROCESSORS else []), SAMPLED]
        runs += [ROWS] if set(arguments) & set(BATCHED) else []
        rows.append((f"{options} ({name})", "yes", "; ".join(runs)))
    return rows


def table() -> str:
    """The table in Markdown."""
    lines = ["| option | same as plain `generate` | how tested |", "|---|---|---|"]
    for one in SERVED:
        also = f"; {', '.join(one.returned)} compared" if one.returned else ""
        lines.append(f"| {code(one.name)} | yes | {'; '.join(one.runs)}{also} |")
    lines += [f"| {name} | {same} | {runs} |" for name, same, runs in processor_rows()]
    lines += [
        f"| {code(one.name)} | refused before it starts | the call raises, and says what to do |" for one in REFUSED
    ]
    return "\n".join(lines)


def code(name: str) -> str:
    """Names of arguments as code, words as they are."""
    return re.sub(r"[a-z]+_[a-z_]+(='[a-z]+'|=False)?|(Dynamic|Static)Cache|streamer\b", r"`\g<0>`", name)


def written(text: str) -> str:
    """`text` with the table between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
