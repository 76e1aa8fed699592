"""The command that prints text from a checkpoint."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxlab import generate as command
from jaxlab.models import generate, hub
from jaxlab.models.text import raw_prompt
from jaxlab.models.vocabulary import load_vocabulary


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


@pytest.mark.slow
@pytest.mark.smollm2
def test_smollm2_answers_by_its_chat_template(capsys):
  assert command.main(["--model=smollm2", "What is the capital of France?", "--tokens=40"]) == 0
  assert "Paris" in capsys.readouterr().out
  jax.clear_caches()
