"""What the Hub tests have another process do: a client that talks to the Hub of `HF_ENDPOINT`.

The tests' own process is offline for good: `huggingface_hub` reads its environment once, on import.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from assisted_calls import PROMPT
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair
from transformers import PreTrainedTokenizerFast


def outcome(work, *args: Any, **kwargs: Any) -> Any:
    """What it returns, or what it raised as `(class name, text)`: exceptions of the client do not all pickle."""
    try:
        return work(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)


def tokenizer(first: str = "a") -> PreTrainedTokenizerFast:
    """Words instead of text; two of different first words have different vocabularies."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = [first, *(f"w{index}" for index in range(1, 97))]
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token=first)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token=None)


def push(
    repo_id: str, *, seed: int = 0, contemplate: bool = True, config: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    """Push a tiny pair; returns the commit and the sum of its weights."""
    target = tiny_llama()
    pair = tiny_pair(target, seed=seed, contemplate=contemplate, **(config or {}))
    commit = outcome(pair.push_to_hub, repo_id, tokenizer=tokenizer(), **arguments)
    return commit if isinstance(commit, tuple) else (commit.oid, checksum(pair))


def checksum(pair) -> float:
    weights = [*pair.state_dict().values()]
    if pair.config.contemplate:
        loose = pair._loose_adapter()
        weights += [*loose.weights.values()]
    return float(sum(weight.double().abs().sum() for weight in weights))


def push_twice(repo_id: str, seeds: tuple[int, int], token: str) -> list[Any]:
    """Two pushes at once."""
    results: dict[int, Any] = {}
    barrier = threading.Barrier(2)
    pairs = {seed: tiny_pair(tiny_llama(), seed=seed) for seed in seeds}

    def work(seed: int) -> None:
        barrier.wait()
        results[seed] = outcome(lambda: pairs[seed].push_to_hub(repo_id, token=token).oid)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(results[seed], checksum(pairs[seed])) for seed in seeds]


def pull(repo_id: str, **arguments: Any) -> Any:
    """Load a pair onto a fresh target and use it; returns the sum of its weights and what its config remembers."""
    from confu_hf import ConFuAssistant

    def work() -> tuple[float, dict[str, Any]]:
        target = tiny_llama()
        pair = ConFuAssistant.from_pretrained(repo_id, target=target, **arguments)
        plain = target.generate(PROMPT, max_new_tokens=8)
        assert torch.equal(target.generate(PROMPT, max_new_tokens=8, assistant_model=pair), plain)
        return checksum(pair), pair.config.to_dict()

    return outcome(work)


def files(repo_id: str, **arguments: Any) -> Any:
    from huggingface_hub import HfApi

    return outcome(HfApi().list_repo_files, repo_id, **arguments)
