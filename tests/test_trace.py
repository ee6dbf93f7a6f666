"""A trace shows what happened: its text, paths and trees against plain decoding, its page in a real browser."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import _browser  # noqa: E402
from _trace_page import page  # noqa: E402
from _trace_tree import draw_tree, places  # noqa: E402

# Not by its name: the standard library has a `trace`, too.
SPEC = importlib.util.spec_from_file_location("trace_script", EXAMPLES / "trace.py")
trace_script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(trace_script)

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
OPTIONS = ["--device", "cpu", "--dtype", "float64", "--prompt", "abcabcabc", "--max-new-tokens", "24"]
FIXED = ["--policy", "fixed", "--total-tokens", "12", "--depth", "3", "--top-k", "6", "--confidence-threshold", "0"]


@pytest.fixture
def make(tmp_path, tokenizer, monkeypatch):
    """Runs the script on a tiny pair; returns what it gathered."""
    tokenizer.chat_template = TEMPLATE
    tiny_pair(tiny_llama()).save_pretrained(tmp_path / "pair")
    monkeypatch.setattr(trace_script, "load_target", lambda *args: (tiny_llama(), tokenizer))

    def run(*arguments: str, pair: bool = True) -> dict:
        way = ["--confu", str(tmp_path / "pair")] if pair else ["--target", "tiny"]
        trace_script.main([*OPTIONS, *way, "--no-plot", "--output", str(tmp_path), *arguments])
        return json.loads((tmp_path / "trace.json").read_text())

    return run


def check(found: dict, tokenizer) -> None:
    """Texts, paths and counts fit each other, and plain decoding."""
    ids = tokenizer("<s>abcabcabc", add_special_tokens=False, return_tensors="pt")["input_ids"]
    plain = tiny_llama().generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    assert "".join(token["text"] for token in found["tokens"]) == tokenizer.decode(plain)
    assert found["new_tokens"] == len(plain) == 1 + sum(one["emitted"] for one in found["rounds"])
    for number, one in enumerate(found["rounds"], start=1):
        tokens = [token for token in found["tokens"] if token["round"] == number]
        path = [node for node in one["nodes"] if node["accepted"]]
        assert len(path) == len(tokens) == one["emitted"] and [node["depth"] for node in path] == list(
            range(len(path))
        )
        words = [node["text"] for node in path[1:]] + [one["bonus"]]
        assert words == [token["text"] for token in tokens]
        ways = ["looked up" if node["looked_up"] else "drafted" for node in path[1:]] + ["target"]
        assert ways == [token["origin"] for token in tokens]
        assert all(one["milliseconds"][name] > 0 for name in ("verify", "rest"))


def test_a_trace_is_what_happened(make, tokenizer):
    found = make(*FIXED, "--no-lookup", "--contemplate-tokens", "2")
    check(found, tokenizer)
    rounds = found["rounds"]
    assert all(sum(n["contemplated"] for n in one["nodes"]) == min(2, len(one["nodes"])) for one in rounds)
    # Without lookup, the network drafted over again gives the very trees: it would have accepted what was accepted.
    known = [one for one in rounds if one["opinions"]]
    assert len(known) >= len(rounds) // 2 and rounds[0]["opinions"] is None, (
        "before the first round nothing contemplated"
    )
    assert [one["opinions"]["given"]["accepted"] for one in known] == [one["emitted"] for one in known]
    assert any(one["opinions"]["given"]["chance"] != one["opinions"]["masked"]["chance"] for one in known)


def test_masked_is_what_a_draft_without_future_gives(make, tokenizer):
    """No future in the first round, so EAGLE-3 mode's second round starts from the same text with the masked tree."""
    contemplating = make(*FIXED, "--no-lookup")
    without = make(*FIXED, "--no-lookup", "--no-contemplate")
    check(without, tokenizer)
    assert not any(one["opinions"] for one in without["rounds"])
    assert contemplating["rounds"][0]["emitted"] == without["rounds"][0]["emitted"]
    assert contemplating["rounds"][1]["opinions"]["masked"]["accepted"] == without["rounds"][1]["emitted"]


def test_lookup_and_a_policy_that_decides(make, tokenizer):
    check(make(), tokenizer)
    alone = make(pair=False)
    check(alone, tokenizer)
    assert not any(one["opinions"] for one in alone["rounds"])
    drafted = [node for one in alone["rounds"] for node in one["nodes"][1:]]
    assert drafted and all(node["looked_up"] for node in drafted)


def test_nodes_stand_on_lines_of_their_own():
    nodes = [{"parent": parent, "depth": depth} for parent, depth in ((-1, 0), (0, 1), (0, 1), (1, 2))]
    assert places(nodes) == [(0, 0.5), (1, 0.0), (1, 1.0), (2, 0.0)]


def node(text, parent, depth, **kinds):
    plain = {"accepted": False, "looked_up": False, "contemplated": False}
    return {"text": text, "parent": parent, "depth": depth, "probability": 0.5, **plain, **kinds}


def test_a_tree_shows_what_its_nodes_are():
    nodes = [
        node("a", -1, 0, accepted=True),
        node("<b>", 0, 1, accepted=True, contemplated=True),
        node("c", 0, 1),
        node("a long word", 1, 2, looked_up=True),
    ]
    drawn = draw_tree({"nodes": nodes, "bonus": "&"})
    assert drawn.count('<g class="node') == 4 and drawn.count('<g class="node accepted') == 2
    assert "&lt;b&gt;" in drawn and "<b>" not in drawn and "&amp;" in drawn and "a long …" in drawn
    assert drawn.count("<circle") == 1 and drawn.count("stroke-dasharray") == 1
    assert drawn.count('stroke-width="3"') == 1, "one edge of the accepted path"


def test_an_answer_of_one_token_has_a_page(make):
    found = make("--max-new-tokens", "1")
    assert found["rounds"] == [] and "No round had a future" in page(found)


def test_the_picture(make, tmp_path):
    pytest.importorskip("matplotlib")
    from _trace_plot import COLUMNS, draw, wrapped

    found = make(*FIXED)
    assert draw(found, tmp_path / "trace.png").stat().st_size > 5000
    tokens = [{"text": text, "origin": "target", "round": 0} for text in ("a" * 100, "b" * 20, "c\nd")]
    lines = wrapped(tokens)
    assert [[(column, part) for column, _, part in line] for line in lines] == [
        [(0, "a" * 100)],
        [(0, "b" * 20), (20, "c")],
        [(0, "d")],
    ]
    assert COLUMNS < 120


@pytest.mark.skipif(_browser.find_browser() is None, reason="no Chromium on the path")
def test_the_page_in_a_browser(make, tmp_path):
    found = make(*FIXED, "--screenshot", str(tmp_path / "page.png"), "--size", "640", "480")
    dom = _browser.document(tmp_path / "trace.html")
    rounds = found["rounds"]
    assert len(re.findall(r'<section class="round"', dom)) == len(rounds) >= 2
    assert len(re.findall(r'<g class="bar"', dom)) == len(rounds)
    accepted = sum(node["accepted"] for one in rounds for node in one["nodes"])
    assert len(re.findall(r'<g class="node accepted', dom)) == accepted
    assert len(re.findall(r'<span class="token [^"]*" data-round', dom)) == len(found["tokens"])
    assert "http://" not in dom and "https://" not in dom, "the page fetches nothing"
    picture = (tmp_path / "page.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and struct.unpack(">2I", picture[16:24]) == (640, 480) and len(picture) > 5000


def test_without_a_browser(make, monkeypatch, tmp_path):
    monkeypatch.setattr(_browser.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="got no Chromium on the path, expected one of chromium, .* apt-get install"):
        _browser.document(tmp_path / "trace.html")


def test_a_sampled_trace(make):
    torch.manual_seed(5)
    first, again = (make("--temperature", "0.9", "--seed", "4") for _ in range(2))
    assert [token["text"] for token in first["tokens"]] == [token["text"] for token in again["tokens"]]
