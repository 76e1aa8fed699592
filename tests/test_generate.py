"""The command that prints text from a checkpoint."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab import generate as command
from jaxlab.data import byte_level
from jaxlab.models import HNet, HNetConfig, Mamba2, Mamba2Config, generate, hub
from jaxlab.models.generate import complete
from jaxlab.models.hnet import DECODER
from jaxlab.models.layers import cast
from jaxlab.models.text import BYTES, byte_pieces, byte_prompt, raw_prompt
from jaxlab.models.vocabulary import load_vocabulary
from tests.common import random_model

BYTEWISE = HNetConfig("m1 [T1] m1", (16, 16), (0, 20), (0, 2), ratios=(3.0,), head_dim=8, state=4, chunk=4)


@pytest.fixture(scope="module")
def expected() -> str:
  """What the base model says after "import", greedily."""
  vocabulary = load_vocabulary("base")
  tokens = generate(hub.load("base", dtype="float32"), jnp.array([raw_prompt(vocabulary, "import")]), tokens=24)
  return vocabulary.tokenizer.decode(tokens[0].tolist())


def test_it_prints_the_text_and_the_rate(expected, capsys):
  assert command.main(["--raw", "import", "--tokens=24"]) == 0
  out, err = capsys.readouterr()
  assert out == expected + "\n"
  assert re.fullmatch(r"24 tokens, the first after [\d.]+ s, [\d.]+ tokens/s\n", err)


def test_it_ends_before_a_stop_string_also_under_a_method(expected, capsys):
  """SNLP with as many steps as layers is the model."""
  stop = expected[9:12]
  assert command.main(["--raw", "import", "--tokens=24", f"--stop={stop}", "--method=snlp,layers=2,iterations=2"]) == 0
  assert capsys.readouterr().out == expected[: expected.index(stop)] + "\n"


def test_sampling_depends_on_the_seed(capsys):
  def text(seed):
    assert command.main(["--raw", "import", "--tokens=24", "--temperature=1.5", "--top-k=50", f"--seed={seed}"]) == 0
    return capsys.readouterr().out

  assert text(1) == text(1) != text(2)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "the following arguments are required: text"),
    (["hello"], "the checkpoint has no chat template; use plain text"),
    (["--raw", "a", "--tokens=x"], "argument --tokens: invalid int value"),
    (["--raw", "a", "--tokens=0"], "tokens is 0"),
    (["--raw", "a", "--tokens=100000"], "the prompt leaves room for"),
    (["--raw", "a", "--model=nowhere"], "no checkpoint 'nowhere'"),
    (["--raw", "a", "--stop="], "a stop string is empty"),
    (["--raw", "a", "--method=snlp,layers"], "--method has 'layers'; its options are NAME=VALUE"),
    (["--raw", "a", "--method=snlp,layers=99"], "layers"),
    (["--raw", "a", "--top-k=3"], "give a --temperature too"),
    (["--raw", "a", "--dtype=int8"], "argument --dtype: invalid choice"),
  ],
)
def test_mistakes_are_one_line_and_status_2(arguments, message, capsys):
  assert command.main(arguments) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.fixture(scope="module")
def bytewise():
  """An H-Net of bytes."""
  return random_model(BYTEWISE)


def continued(model: HNet, prompt: list[int], count: int) -> bytes:
  """The likeliest bytes up to one that begins or ends a document, each by a forward over all that is before it."""
  row = list(prompt)
  logits = jax.jit(lambda model, tokens: model(tokens))
  padded = lambda: jnp.array([row + [0] * (len(prompt) + count - len(row))])
  while len(row) < len(prompt) + count and (token := int(logits(model, padded())[0, len(row) - 1].argmax())) < 254:
    row.append(token)
  return bytes(row[len(prompt) :])


def test_an_hnet_continues_bytes_by_the_likeliest_ones_to_the_end_of_the_document(bytewise, tmp_path, capsysbinary):
  """Bytes in, those of no UTF-8 too, and bytes out, with --raw or without."""
  ending = jax.tree.map(jnp.array, bytewise)
  ending.head.weight.set_value(ending.head.weight[...].at[:, 255].multiply(9))
  sizes = []
  for model, more in ((bytewise, []), (ending, ["--raw"])):
    hub.save(model, tmp_path)
    assert command.main([f"--model={tmp_path}", "é\udcff", "--tokens=12", *more]) == 0  # the last: byte 255
    out, err = capsysbinary.readouterr()
    expected = continued(model, [254, 0xC3, 0xA9, 0xFF], 12)
    assert out == expected + b"\n" and err.startswith(f"{len(expected) + (model is ending)} tokens, ".encode())
    sizes.append(len(expected))
  assert sizes[0] == 12 > sizes[1]


def test_an_hnet_is_sampled_by_the_seed_in_either_precision(bytewise, tmp_path, capsysbinary, monkeypatch):
  """In 16 bits too, its router stays as it is."""
  hub.save(bytewise, tmp_path)
  printed, networks = {}, []
  streamed = command.stream
  monkeypatch.setattr(
    command, "stream", lambda network, *a, **o: networks.append(network) or streamed(network, *a, **o)
  )
  for seed, dtype in ((0, "float32"), (1, "float32"), (1, "bfloat16")):
    how = [f"--seed={seed}", f"--dtype={dtype}", "--temperature=1.5", "--top-k=200"]
    assert command.main([f"--model={tmp_path}", "a", "--tokens=12", *how]) == 0
    options = dict(tokens=12, stop=(254, 255), key=jax.random.key(seed), temperature=1.5, top_k=200, decoder=DECODER)
    (made,) = complete(cast(bytewise, dtype), [[254, *b"a"]], **options)
    printed[seed, dtype] = capsysbinary.readouterr().out
    assert printed[seed, dtype] == bytes(token for token in made.tokens if token < 254) + b"\n"
  assert printed[0, "float32"] != printed[1, "float32"]
  assert networks[-1].dtype == jnp.bfloat16 and networks[-1].stage.chunker.q.dtype == jnp.float32


@given(st.lists(st.integers(0, 255)))
def test_bytes_come_through_as_text(tokens):
  """But for the two that begin and end documents."""
  pieces = list(byte_pieces(tokens))
  assert "".join(pieces).encode(errors=BYTES) == bytes(token for token in tokens if token < byte_level.BOS)
  assert all(pieces) and byte_prompt("".join(pieces))[1:] == [token for token in tokens if token < byte_level.BOS]


def test_characters_are_printed_whole():
  assert list(byte_pieces([*"né€".encode(), 0xE2, 0x82])) == ["n", "é", "€", "\udce2\udc82"]


@pytest.mark.parametrize(
  "config, arguments, message",
  [
    (BYTEWISE, ["--method=snlp,layers=1"], "--method is of transformers"),
    (BYTEWISE, ["--tokens=0"], "tokens is 0"),
    (BYTEWISE, ["--top-p=0.5"], "give a --temperature too"),
    (dataclasses.replace(BYTEWISE, vocab_size=300), [], "has a vocabulary of 300, not the 256 bytes"),
    (Mamba2Config(256, 1, 16, head_dim=8, state=4), [], "no tokenizer at"),
  ],
)
def test_what_does_not_apply_to_an_hnet_is_refused_in_a_line(config, arguments, message, tmp_path, capsys):
  kind = HNet if isinstance(config, HNetConfig) else Mamba2
  shapes = jax.eval_shape(lambda: kind(config, jax.random.key(0)))
  hub.save(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes), tmp_path)
  test_mistakes_are_one_line_and_status_2([f"--model={tmp_path}", "a", *arguments], message, capsys)


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_answers_by_its_chat_template(capsys):
  assert command.main(["--model=smollm2", "What is the capital of France?", "--tokens=40"]) == 0
  assert "Paris" in capsys.readouterr().out
  jax.clear_caches()
