import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import snlp_adapt as config_file
from experiments.console import Console
from experiments.snlp.settings import parse
from experiments.snlp_adapt import GIVEN, UNTOUCHED, adapting, choices, draw, fitted, measure, named_texts
from experiments.text import load_text
from jaxlab import evaluation
from jaxlab.core.checks import InputError
from jaxlab.data import tokenizer
from jaxlab.models import TransformerConfig, hub
from jaxlab.training import loop
from tests.common import PARITY, SHAPE, random_model, random_tokens, run_and_continue

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A random Llama of six layers with tied embeddings and a vocabulary, and text for it."""
  folder = tmp_path_factory.mktemp("checkpoint")
  texts = [file.read_text() for file in sorted((ROOT / "experiments").glob("*.py"))]
  bpe = tokenizer.train(texts, 320)
  shape = SHAPE | dict(vocab_size=bpe.get_vocab_size(), tied_embeddings=True)
  hub.save(random_model(TransformerConfig(**shape)), folder)
  (folder / "tokenizer.json").write_text(bpe.to_str())
  (folder / "train.txt").write_text("\n".join(texts[:3]))
  (folder / "validation.txt").write_text(texts[3][:4000])
  return folder


def config_of(checkpoint, **changes):
  config = config_file.get_config("test")
  config.model, config.data.path, config.unseen.path = f"hf:{checkpoint}", f"{checkpoint}/*.txt", f"{ROOT}/docs/*.md"
  config.update_from_flattened_dict(changes)
  return config


def adapt(config, checkpoint, workdir, cache, console=None, method="distilled"):
  workdir.mkdir(exist_ok=True)
  model = hub.load(checkpoint, dtype="float32")
  config = fitted(config, model.depth)
  text = load_text(named_texts(config)[GIVEN], cache, given=checkpoint)
  return adapting.adapted(config, method, text, model, workdir, console or Console(quiet=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


def test_everything_is_measured_once_and_the_folder_is_an_ordinary_checkpoint(checkpoint, tmp_path, monkeypatch):
  """What transformers reads in WORKDIR/adapted has the logits of what hub.load reads there, and the same vocabulary."""
  config = config_of(checkpoint, save_dtype="float32", methods=("distilled", "regularised"))
  config.measured = config.settings
  report = run_and_continue("snlp_adapt", tmp_path, monkeypatch, "adapting.adapted", config=config)
  assert set(report.metrics["quality"]) == {UNTOUCHED, *config.methods}
  exact = next(claim for claim in report.claims if "speculative tokens" in claim.name)
  assert exact.ours == 1.0 and report.claims[0].threshold == 5.0
  folder, tokens = tmp_path / "adapted", random_tokens(2, 12, vocab=300)
  ours = hub.load(folder)(tokens)
  assert float(jnp.abs(ours - hub.load(checkpoint)(tokens)).max()) > 1e-3
  torch, transformers = pytest.importorskip("torch", reason=PARITY), pytest.importorskip("transformers", reason=PARITY)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(np.asarray(tokens))).logits
  np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-3, atol=1e-4)
  text = "def measure(config):\n"
  assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == (
    hub.load_vocabulary(checkpoint).tokenizer.encode(text).ids
  )


class Interrupting(Console):
  """Ctrl-C after the third step."""

  @contextlib.contextmanager
  def training(self, title):
    yield lambda metrics: os.kill(os.getpid(), signal.SIGINT) if metrics["step"] == 3 else None


def test_an_interrupted_adaptation_goes_on_bit_for_bit(checkpoint, tmp_path, cache):
  config = config_of(checkpoint, settings=("n4 K1 T1",))
  config.train.steps = 6
  whole = adapt(config, checkpoint, tmp_path / "whole", cache)
  with pytest.raises(loop.Interrupted, match="same command continues"):
    adapt(config, checkpoint, tmp_path / "hurt", cache, Interrupting(quiet=True))
  chex.assert_trees_all_equal(adapt(config, checkpoint, tmp_path / "hurt", cache), whole)
  lines = [(tmp_path / run / "distilled" / "metrics.jsonl").read_text().splitlines() for run in ("whole", "hurt")]
  first, second = ([json.loads(line)["loss"] for line in run] for run in lines)
  assert first == second and len(first) == 6
  original = hub.load(checkpoint, dtype="float32")
  start = original.depth - sum(parse(config.settings[0])[name] for name in ("layers", "tail"))
  kept = jax.tree.map(lambda a: a[:start], (whole.blocks, original.blocks))
  chex.assert_trees_all_equal(*kept)
  chex.assert_trees_all_equal(whole.embedding, original.embedding)


def test_a_diverging_run_says_its_loss_and_goes_on_from_its_last_good_checkpoint(checkpoint, tmp_path, cache):
  config = config_of(checkpoint, parameters="lora", rank=2)
  config.train.steps, config.train.checkpoint_every = 9, 100
  run = lambda console=None: adapt(config, checkpoint, tmp_path / "run", cache, console, method="continued")
  with pytest.raises(loop.Interrupted):
    run(Interrupting(quiet=True))
  kept = [file.name for file in (tmp_path / "run" / "continued" / "checkpoints").iterdir()]
  config.train.rate = 1e30
  with pytest.raises(loop.Diverged, match=r"the loss is nan at step \d .*lower the learning rate") as caught:
    run()
  assert "\n" not in str(caught.value)
  assert kept == [file.name for file in (tmp_path / "run" / "continued" / "checkpoints").iterdir()]
  config.train.rate = 1e-4
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(run()))
  lines = (tmp_path / "run" / "continued" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))


def test_what_cannot_be_adapted_is_one_line(checkpoint, tmp_path, cache):
  def refused(message, **changes):
    config = config_of(checkpoint)
    for name, value in changes.items():
      part, field = name.split("__")
      config[part][field] = value
    with pytest.raises(InputError, match=message) as caught:
      adapt(config, checkpoint, tmp_path / "run", cache)
    assert "\n" not in str(caught.value)

  refused(r"has \d+ tokens to train on, one batch 1600000; give more", train__length=100_000)
  refused(r"own\.share is 0\.9, more\.share 0\.3", own__share=0.9, more__share=0.3)


def test_of_four_continuations_the_first_is_the_texts_own(checkpoint, tmp_path, cache):
  text = load_text(named_texts(config_of(checkpoint))[GIVEN], cache, given=checkpoint)
  sizes = dict(questions=5, context=12, continuation=6)
  choices.write_task(text, tmp_path / "task", split="validation", seed=0, **sizes)
  rows = [json.loads(line) for line in (tmp_path / "task" / "questions.jsonl").read_text().splitlines()]
  whole = text.bpe.decode(np.asarray(text.split("validation").ids).tolist())
  assert len(rows) == 5 and len({row["question"] for row in rows}) > 1
  for row in rows:
    assert row["question"] + row["choices"][0] in whole and len(set(row["choices"])) == 4
  with pytest.raises(InputError, match=r"has \d+ tokens; multiple choice needs more than 2000012"):
    choices.write_task(text, tmp_path / "task", split="validation", seed=0, **sizes | dict(context=10**6))


def test_without_the_harness_nothing_is_trained(checkpoint, tmp_path, cache, monkeypatch):
  # Another test may have imported it.
  for name in [n for n in sys.modules if n.startswith("lm_eval.") or n == "jaxlab.evaluation.lm_eval"]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.delattr(evaluation, "lm_eval", raising=False)
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(InputError, match=r"harness is not installed; pip install 'jaxlab\[eval\]'") as caught:
    measure(config_of(checkpoint, parts=("choices",)), tmp_path, cache, Console(quiet=True))
  assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_the_harness_scores_as_many_steps_as_layers_like_the_network_itself(checkpoint, tmp_path, cache):
  pytest.importorskip("lm_eval")
  config = config_of(checkpoint, settings=("n4 K2 G2 T1",))
  config.choices.questions = 12
  text = load_text(named_texts(config)[GIVEN], cache, given=checkpoint)
  found = choices.measure(config, text, {UNTOUCHED: str(checkpoint)}, tmp_path / "choices")[UNTOUCHED]
  assert set(found) == {"sequential", "n4 K2 G2 T1"} and len(set(found.values())) == 1


def test_a_missing_speed_part_still_draws(tmp_path):
  perplexity = {text: {"sequential": 3.0} for text in ("given", "unseen")}
  metrics = {"quality": {UNTOUCHED: {"perplexity": perplexity}}}
  assert list(draw(None, metrics, tmp_path)) == ["frontier.png"]


@pytest.mark.parametrize("depth", [1, 3, 6, 30])
@pytest.mark.parametrize("scale", ["test", "cpu", "gpu"])
def test_settings_fit_models_of_other_depths(scale, depth):
  config = fitted(config_file.get_config(scale), depth)
  for text in (*config.settings, *config.measured, *config.speculation.settings):
    s = parse(text)
    assert s["layers"] >= 1 and s["layers"] + s["tail"] <= depth and s["layers"] % s["groups"] == 0
  assert set(config.settings) <= set(config.measured)
