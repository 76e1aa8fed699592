"""Prompts from text, and text from tokens while they are made."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxlab.core.checks import InputError
from jaxlab.models.text import chat_prompt, raw_prompt, render_chat, text_pieces, token_bytes, until
from jaxlab.models.vocabulary import Vocabulary, load_vocabulary

BASE = load_vocabulary("base")
TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}
{%- for message in messages %}
  {% if message.role == 'skipped' %}{% continue %}{% endif %}
<|user_start|>{{ message['content'] | trim }}<|user_end|>
{% endfor %}
{% if add_generation_prompt %}<|assistant_start|>{% endif %}"""


def vocabulary(template) -> Vocabulary:
  return Vocabulary(BASE.tokenizer, BASE.bos, (), template)


@given(st.text(max_size=20))
def test_pieces_are_whole_characters_and_together_the_text(text):
  """Characters of up to four bytes, each a token of its own in this vocabulary where they are rare."""
  tokens = BASE.tokenizer.encode(text + "naïve 🙂 漢 end").ids
  pieces = list(text_pieces(BASE.tokenizer, tokens))
  assert "".join(pieces) == BASE.tokenizer.decode(tokens)
  assert "�" in text or not any("�" in piece for piece in pieces)


@given(st.text(max_size=20))
def test_bytes_of_tokens_are_those_of_the_text(text):
  """Of a byte-level vocabulary, and of one that has tokens for bytes beside its pieces."""
  text += " a漢\ufffd"
  pieces = Tokenizer(
    tokenizers.models.BPE({f"<0x{n:02X}>": n for n in range(256)} | {"a": 256}, [], byte_fallback=True)
  )
  pieces.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
  for tokenizer in (BASE.tokenizer, pieces):
    ids = tokenizer.encode(text).ids
    assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode() and len(ids) > 6


def test_pieces_come_with_the_token_that_completes_them():
  tokens = BASE.tokenizer.encode("a🙂").ids
  assert len(tokens) == 5  # four bytes
  seen = []
  for piece in text_pieces(BASE.tokenizer, (seen.append(token) or token for token in tokens[:4])):
    assert piece == {1: "a", 4: "�"}[len(seen)]  # bytes that nothing completes come at the end, once
  assert list(text_pieces(BASE.tokenizer, tokens)) == ["a", "🙂"]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_text_before_a_stop_string_does_not_depend_on_the_pieces(text, stop, data):
  cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
  pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
  ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
  shown = list(until(pieces, stop))
  assert "".join(shown) == (text[: min(ends)[1]] if ends else text)


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
  pieces = until(iter(["one ", "two #", "# three", "##"]), ["##", "###"])
  assert [next(pieces) for _ in range(3)] == ["one ", "two ", ""]
  assert list(pieces) == []


def test_a_chat_template_makes_the_prompt():
  messages = [{"role": "user", "content": " hi "}, {"role": "skipped", "content": "x"}]
  assert render_chat(vocabulary(TEMPLATE), messages) == "<|user_start|>hi<|user_end|>\n<|assistant_start|>"
  names = [BASE.tokenizer.id_to_token(token) for token in chat_prompt(vocabulary(TEMPLATE), "hi")]
  assert names[0] == "<|user_start|>" and names[-1] == "<|assistant_start|>"


@pytest.mark.parametrize(
  "template, message",
  [
    (None, "no chat template; use plain text"),
    (TEMPLATE, "the chat template: no system messages; change the messages"),
    ("{% if %}", "the chat template: "),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template: .*unsafe"),
    ("{{ messages.append(1) }}", "the chat template: .*unsafe"),
  ],
)
def test_templates_that_fail_or_reach_out_are_refused(template, message):
  with pytest.raises(InputError, match=message):
    render_chat(vocabulary(template), [{"role": "system", "content": ""}])


def test_a_raw_prompt_begins_as_texts_begin():
  ids = raw_prompt(BASE, "abc")
  assert ids[0] == BASE.bos and BASE.tokenizer.decode(ids) == "abc"
  assert raw_prompt(BASE, "<|bos|>abc") == ids
