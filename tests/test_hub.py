"""A pair's way to the Hub and back, by the real client over HTTP, to a Hub on 127.0.0.1 that stores real files."""

from __future__ import annotations

import base64
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import hub_client
import pytest
from foreign_drafts import CASES, save, tensors
from hub_server import TOKEN, listing, running_hub
from tiny_models import tiny_llama

from confu_hf import ConFuAssistant

FILES = ["README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
FILES += ["config.json", "generation_config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with running_hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Calls a function of `hub_client` in a process that is online, without a token unless one is passed."""
    home = tmp_path_factory.mktemp("home")
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    online |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    tests = str(Path(__file__).parent)
    online["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent.parent), tests, os.environ.get("PYTHONPATH", "")]
    )
    with mock.patch.dict(os.environ, online), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        os.environ.pop("HF_TOKEN", None)
        yield lambda name, *args, **kwargs: pool.submit(getattr(hub_client, name), *args, **kwargs).result(timeout=120)


@pytest.fixture(scope="module")
def pushed(client):
    """A public pair: its first commit, and the sum of its weights."""
    return client("push", "org/pair", token=TOKEN)


def test_push_list_and_pull(hub, client, pushed):
    commit, weights = pushed
    assert client("files", "org/pair") == FILES
    commits = [path for method, path, _ in hub.requests if method == "POST" and "/org/pair/commit/" in path]
    assert len(commits) == 1, "everything in one commit"
    got, config = client("pull", "org/pair")
    assert got == weights
    assert config["target_fingerprint"] and config["tokenizer_fingerprint"]
    card = (hub.store.resolve("org/pair", commit)[1] / "README.md").read_text()
    assert 'ConFuAssistant.from_pretrained("org/pair", target=model)' in card and "- confu_hf" in card


def test_pull_by_revision(hub, client, pushed):
    first, weights = pushed
    second, other = client("push", "org/pair", seed=1, revision="next", token=TOKEN)
    assert other != weights and client("pull", "org/pair")[0] == weights, "main is as it was"
    assert client("pull", "org/pair", revision="next")[0] == other
    third, newest = client("push", "org/pair", seed=2, token=TOKEN)
    assert client("pull", "org/pair")[0] == newest
    assert client("pull", "org/pair", revision=first)[0] == weights
    assert client("pull", "org/pair", revision=second)[0] == other
    assert len({first, second, third}) == 3
    kind, text = client("pull", "org/pair", revision="nonesuch")
    assert kind == "OSError" and "nonesuch" in text


def test_a_card_that_is_there_is_kept_and_an_adapter_that_is_not_there_goes(hub, client):
    client("push", "org/changing", token=TOKEN)
    card = hub.store.resolve("org/changing", "main")[1] / "README.md"
    card.write_text("# By hand\n")
    commit, _ = client("push", "org/changing", contemplate=False, token=TOKEN)
    folder = hub.store.resolve("org/changing", commit)[1]
    assert (folder / "README.md").read_text() == "# By hand\n"
    assert listing(folder) == ["README.md", "config.json", "generation_config.json", "model.safetensors"]


def test_a_private_repository_needs_a_token(hub, client):
    commit, weights = client("push", "org/secret", private=True, token=TOKEN)
    assert "org/secret" in hub.store.private
    kind, text = client("pull", "org/secret")
    assert kind == "OSError" and "org/secret is not a local folder and is not a valid model identifier" in text
    assert client("pull", "org/secret", token="hf_of_somebody_else")[0] == "OSError"
    assert client("pull", "org/secret", token=TOKEN)[0] == weights
    kind, text = client("push", "org/pair-of-others", token="hf_of_somebody_else")
    assert "401" in text or "403" in text


def test_a_wrong_repository(client, pushed):
    kind, text = client("pull", "org/nonesuch")
    assert kind == "OSError" and "org/nonesuch" in text
    kind, text = client("pull", "org/pair", subfolder="nonesuch")
    assert kind == "FileNotFoundError" and "org/pair, nonesuch: got no config.json" in text


def test_an_interrupted_download_goes_on_where_it_was(hub, client, tmp_path):
    """The client reads 10 MiB at a time and goes on behind the last whole part."""
    part = 10 * 2**20
    _, weights = client("push", "org/large", config={"intermediate_size": 20_000}, token=TOKEN)
    hub.requests.clear()
    hub.cut["model.safetensors"] = [part + 3000]
    assert client("pull", "org/large", cache_dir=str(tmp_path))[0] == weights
    asked = [interval for _, path, interval in hub.requests if path.endswith("/model.safetensors")]
    assert not hub.cut["model.safetensors"] and asked[-1] == f"bytes={part}-", "the rest alone was asked for"


def test_a_file_of_the_cache_that_was_cut_short_is_refused(hub, client, pushed, tmp_path):
    first, weights = pushed
    assert client("pull", "org/pair", revision=first, cache_dir=str(tmp_path))[0] == weights
    (blob,) = {path.resolve() for path in tmp_path.rglob("snapshots/*/model.safetensors")}
    blob.write_bytes(blob.read_bytes()[:3000])
    kind, text = client("pull", "org/pair", revision=first, cache_dir=str(tmp_path))
    assert kind == "ValueError" and "corrupted or truncated" in text
    assert client("pull", "org/pair", revision=first, cache_dir=str(tmp_path), force_download=True)[0] == weights


def test_two_pushes_at_once_leave_one_of_the_two_pairs(client):
    client("push", "org/busy", token=TOKEN)
    results = client("push_twice", "org/busy", (5, 6), TOKEN)
    commits = {commit: weights for commit, weights in results}
    assert len(commits) == 2 and all(isinstance(commit, str) for commit in commits), results
    for commit, weights in commits.items():
        assert client("pull", "org/busy", revision=commit)[0] == weights
    assert client("pull", "org/busy")[0] in commits.values(), "whole, not mixed"


def test_offline_and_from_the_cache_alone(hub, client, pushed, tmp_path):
    first, weights = pushed
    cache = str(tmp_path)
    kind, text = client("pull", "org/pair", cache_dir=cache, local_files_only=True)
    assert kind == "OSError", "nothing is there yet"
    assert client("pull", "org/pair", revision=first, cache_dir=cache)[0] == weights
    hub.requests.clear()
    assert client("pull", "org/pair", revision=first, cache_dir=cache, local_files_only=True)[0] == weights
    # This process is offline (HF_HUB_OFFLINE=1).
    pair = ConFuAssistant.from_pretrained("org/pair", target=tiny_llama(), revision=first, cache_dir=cache)
    assert hub_client.checksum(pair) == weights and not hub.requests


def test_a_subfolder(hub, client, tmp_path):
    """Another layout of the same repository: pairs beside each other."""
    commit, weights = client("push", "org/several", token=TOKEN)
    folder = hub.store.resolve("org/several", commit)[1]
    for path in listing(folder):
        (folder / "pairs" / "a" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).rename(folder / "pairs" / "a" / path)
    assert client("pull", "org/several", subfolder="pairs/a", cache_dir=str(tmp_path))[0] == weights


@pytest.mark.parametrize("pickled", [False, True])
def test_a_draft_of_another_project(hub, client, tmp_path, pickled):
    case, name = CASES["safeailab"], f"somebody/draft-{pickled}"
    folder = save(tmp_path / "theirs", case.config, tensors(case, None), pickled=pickled)
    hub.store.create(name, private=False)
    content = {path: base64.b64encode((folder / path).read_bytes()).decode() for path in listing(folder)}
    hub.store.push(name, "main", [{"key": "file", "value": {"path": p, "content": c}} for p, c in content.items()])
    weights, config = client("pull", name, allow_pickle=True) if pickled else client("pull", name)
    assert weights > 0 and config["draft_vocab_size"] == 61 and not config["contemplate"]
    if pickled:
        kind, text = client("pull", name)
        assert kind == "ValueError" and "pickled weights only (pytorch_model.bin)" in text
