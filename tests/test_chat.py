"""The terminal chat: its texts are plain decoding's over several turns on one cache, and every token has an origin."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from confu_hf.tree.draft_tree import DraftTree

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import chat  # noqa: E402
from _conversation import Conversation  # noqa: E402
from _rounds import TokenText, WatchedConFu, WatchedLookup, accepted_path, origins  # noqa: E402
from _terminal import Screen, default_show  # noqa: E402

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"


@pytest.fixture
def tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def pair(tmp_path):
    target = tiny_llama()
    tiny_pair(target).save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def arguments(*words: str):
    return chat.parse_arguments(["--device", "cpu", "--max-new-tokens", "24", *words])


def assistant_of(kind, target, pair):
    if kind == "plain":
        return None
    return WatchedLookup(target=target) if kind == "lookup" else WatchedConFu.from_pretrained(pair, target=target)


def plainly(model, ids: torch.Tensor) -> list[int]:
    # Random models write the padding token, too: without a mask, generate would take it for padding.
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0].tolist()


@pytest.mark.parametrize("kind", ["plain", "lookup", "confu"])
def test_every_turn_is_plain_decoding_of_the_whole_conversation(kind, pair, tokenizer):
    target, plain = tiny_llama(), tiny_llama()
    assistant, conversation = assistant_of(kind, target, pair), Conversation(target, tokenizer)
    for question in ("abcabcabc", "xyz", "abcxyz"):
        ids = conversation.ask(question, 24)
        out = io.StringIO()
        answer = chat.reply(conversation, question, assistant, Screen(out, "none"), arguments())
        expected = plainly(plain, ids)
        assert conversation.ids == expected
        assert conversation.cache.get_seq_length() == len(conversation.ids) - 1, "the next turn reads only what is new"
        new = expected[ids.shape[1] :]
        assert out.getvalue() == tokenizer.decode(new, skip_special_tokens=True)
        assert sum(answer.counts) == sum(answer.came.values()) == len(new)
        if assistant is None:
            assert answer.came == {"target": len(new)}
        else:
            assert answer.came["target"] == assistant.stats.rounds + 1, "one a round, and prefill's"
            assert f"{assistant.stats.mean_accepted_length:.2f} a pass" in answer.figures()


def test_an_answer_is_closed_once(tokenizer):
    conversation = Conversation(tiny_llama(), tokenizer)
    end = tokenizer.eos_token_id
    first = conversation.ask("ab", 4)[0].tolist()
    assert tokenizer.decode(first) == "<s>ab</s><s>"
    for answer in ([40, 41], [40, 41, end]):  # cut by the limit, and ended by the model
        conversation.keep(torch.tensor(first + answer))
        assert conversation.ask("cd", 4)[0].tolist() == [*first, 40, 41, end, *tokenizer("<s>cd</s><s>")["input_ids"]]
    conversation.reset()
    assert conversation.ask("ab", 4)[0].tolist() == first and conversation.cache.get_seq_length() == 0


def test_what_a_conversation_cannot_be(tokenizer):
    conversation = Conversation(tiny_llama(), tokenizer)
    with pytest.raises(ValueError, match="got 6 tokens, and up to 251 to come, expected at most 256.* /reset"):
        conversation.ask("abc", 251)
    conversation.keep(torch.tensor([5, 6]))
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="got an earlier answer that it leaves out"):
        conversation.ask("abc", 4)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="got a tokenizer without a chat template"):
        Conversation(tiny_llama(), tokenizer)


def test_origins_follow_the_path():
    """Root 7; the network drafted 1, below it 2; looked up was 3 behind 1, and 4 behind that."""
    fields = ([7, 1, 2, 3, 4], [-1, 0, 1, 1, 3], [0, 1, 2, 2, 3], [0.0, -1.0, -2.0, -2.0, -3.0])
    looked_up = torch.tensor([[False, False, False, True, True]])
    tree = DraftTree(*(torch.tensor([values]) for values in fields), looked_up)
    assert accepted_path(tree, [1, 3, 4, 9]) == [0, 1, 3, 4]
    assert origins(tree, [1, 3, 4, 9]) == ["drafted", "looked up", "looked up", "target"]
    assert origins(tree, [1, 9]) == ["drafted", "target"] and origins(tree, [9]) == ["target"]


def test_a_character_of_several_tokens_comes_whole():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, merges=[]))
    characters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    characters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters)
    text = TokenText(tokenizer)
    ids = tokenizer("a é\nö b")["input_ids"]
    assert [text.push(token) for token in ids] == ["a", " ", "", "é", "\n", "", "ö", " ", "b"]
    half = TokenText(tokenizer)
    assert half.push(ids[2]) == "" and half.rest() == "\ufffd"


def run_chat(monkeypatch, capsys, target, tokenizer, lines, *words):
    monkeypatch.setattr(chat, "load_target", lambda *args: (target, tokenizer))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat.main(["--device", "cpu", "--max-new-tokens", "24", *words])
    return capsys.readouterr().out


def test_a_whole_chat_without_a_terminal(pair, tokenizer, monkeypatch, capsys):
    lines = ["abcabc", "", "abc", "/reset", "abcabc", "/what", "/quit", "never"]
    out = run_chat(monkeypatch, capsys, tiny_llama(), tokenizer, lines, "--confu", str(pair))
    assert "\x1b" not in out and "never" not in out and out.count("/reset forgets") == 2
    answers = re.findall(r"^> abcabc\n(.*)\n(confu: \d+ tokens, [\d.]+ a pass, [\d.]+ tokens/s) \((.*)\)$", out, re.M)
    assert len(answers) == 2 and answers[0][0] == answers[1][0], "after /reset the same question gets the same answer"
    assert "Forgotten." in out and len(re.findall("a pass", out)) == 3


def test_a_refusal_is_a_line_and_the_unforeseen_ends_the_chat(pair, tokenizer, monkeypatch, capsys):
    target, words = tiny_llama(), ("--confu", str(pair), "--max-new-tokens", "250")
    out = run_chat(monkeypatch, capsys, target, tokenizer, ["abcdefabcdef", "/quit"], *words)
    assert "expected at most 256" in out
    monkeypatch.setattr(chat, "reply", lambda *arguments: int("nothing"))
    with pytest.raises(ValueError, match="invalid literal"):
        run_chat(monkeypatch, capsys, target, tokenizer, ["abc", "/quit"], *words)


def test_sampling_by_seed_and_marks(pair, tokenizer, monkeypatch, capsys):
    """Seed-exact: plain, prompt lookup and the pair sample one text."""
    texts = set()
    for way in (["--plain"], ["--target", "tiny"], ["--confu", str(pair)]):
        words = ["--temperature", "0.8", "--seed", "3", "--dtype", "float64", "--show", "marks", *way]
        out = run_chat(monkeypatch, capsys, tiny_llama(), tokenizer, ["abc"], *words)
        texts.add(re.search(r"> abc\n(.*)\n\w+: ", out, re.S)[1])
    assert len({re.sub(r"[][{}]", "", text) for text in texts}) == 1


def test_colors_are_for_terminals(monkeypatch):
    assert default_show(io.StringIO(), {}) == "none" and default_show(Terminal(), {}) == "color"
    assert (
        default_show(Terminal(), {"NO_COLOR": "1"}) == "none" and default_show(Terminal(), {"TERM": "dumb"}) == "none"
    )
    out = Terminal()
    screen = Screen(out, "color")
    screen.write([("a", "drafted"), ("b", "drafted"), ("", "looked up"), ("c", "target")])
    assert out.getvalue() == "\x1b[32mab\x1b[0m\x1b[1mc\x1b[0m"
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setenv("LINES", "9")
    screen.status("figures that are too long")
    assert "\x1b[1;8r" in out.getvalue() and "\x1b[9;1H\x1b[2K\x1b[7m figures th \x1b[0m" in out.getvalue()
    screen.close()
    assert "\x1b[r" in out.getvalue()
    piped = io.StringIO()
    Screen(piped, "marks").write([("a", "drafted"), ("b", "looked up"), ("c", "target")])
    Screen(piped, "color").status("no line is kept")
    assert piped.getvalue() == "[a]{b}c"


def test_ctrl_c_ends_the_answer_and_not_the_chat(pair, tokenizer):
    target, plain = tiny_llama(), tiny_llama()
    assistant, conversation = WatchedConFu.from_pretrained(pair, target=target), Conversation(target, tokenizer)

    class Impatient(Screen):
        def status(self, text):
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    stopped = chat.reply(conversation, "abc", assistant, Impatient(io.StringIO(), "none"), arguments())
    assert sum(stopped.counts) < 24 and signal.getsignal(signal.SIGINT) is handler
    ids = conversation.ask("abc", 24)
    chat.reply(conversation, "abc", assistant, Screen(io.StringIO(), "none"), arguments())
    assert conversation.ids == plainly(plain, ids)
