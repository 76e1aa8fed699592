import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import seco as config_file
from experiments import long_finetuning
from experiments.console import Console
from experiments.long_finetuning import stretched
from experiments.seco import best_rate, costs, losses_of, measure, run_name, training
from jaxlab.core.checks import InputError
from jaxlab.models import hub
from jaxlab.models.attention import dot_product_attention
from jaxlab.models.config import RopeScaling
from jaxlab.models.layers import rope_frequencies
from tests.common import PARITY, configs, random_model, random_tokens, run_and_continue

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A user's own text."""
  folder = tmp_path_factory.mktemp("text")
  files = sorted((ROOT / "docs").glob("*.md"))
  for split, part in (("train", files[:6]), ("validation", files[6:8]), ("test", files[8:10])):
    (folder / f"{split}.txt").write_text("\n".join(file.read_text() for file in part))
  return f"{folder}/*.txt"


def test_everything_is_measured_once(tiny_checkpoint, text, tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.subject, config.data.path = f"hf:{tiny_checkpoint}", text
  measures = ("costs.measure", "gradients.measure", "training.run")
  report = run_and_continue("seco", tmp_path, monkeypatch, *measures, config=config)
  cost = report.metrics["costs"]["64"]
  assert (
    set(cost["temporaries"]) == set(cost["milliseconds"]) == {"naive", "layers recomputed", "SeCO 16", "SpaCO 16, 2"}
  )
  claim = {one.name.split(",")[0]: one for one in report.claims}
  assert claim["Difference of SeCO's gradient to the exact one"].holds
  assert claim["Loss after SeCO over that after exact gradients"].ours < 1e-2
  assert claim["Cosine to the exact gradient of SpaCO's mean over draws"].paper is None
  assert len(report.metrics["training"]) == 4
  for parameters in config.parameters:
    loss = losses_of(config, report.metrics, parameters)
    assert loss["spaco 2 2"] != loss["exact"] != loss["truncated"]


def test_a_users_checkpoint_is_tuned_beyond_its_context_and_written(tiny_checkpoint, text, tmp_path, monkeypatch):
  """What transformers reads in WORKDIR/tuned has the logits of what hub.load reads there, also past the old context."""
  config = config_file.get_config("test")
  config.model, config.data.path, config.save_dtype = f"hf:{tiny_checkpoint}", text, "float32"
  config.tuning.update(dict(length=576, chunk=192, parameters="lora", steps=3, rate=3e-3))
  report = run_and_continue("seco", tmp_path, monkeypatch, "long_finetuning.measure", config=config)
  assert report.claims[0].holds and report.metrics["tuned"]["context"] == 512
  folder, tokens = tmp_path / "tuned", random_tokens(1, 560, vocab=300)
  model = hub.load(folder)
  assert model.config.context == 576 and model.config.rope_scaling.factor == 576 / 512
  assert (folder / "tokenizer.json").exists()
  torch, transformers = pytest.importorskip("torch", reason=PARITY), pytest.importorskip("transformers", reason=PARITY)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.tensor(np.asarray(tokens))).logits
  np.testing.assert_allclose(model(tokens), theirs.detach().numpy(), rtol=1e-3, atol=1e-3)


def test_stretching_slows_the_frequencies_that_a_context_does_not_turn_once():
  model = random_model(dataclasses.replace(configs()["qwen3"], head_dim=32, context=64))
  before = np.asarray(rope_frequencies(model.config))
  assert stretched(model, 64, "llama3") is model and stretched(model, 256, "none").config.context == 256
  linear = stretched(model, 256, "linear")
  np.testing.assert_allclose(rope_frequencies(linear.config), before / 4, rtol=1e-6)
  long = stretched(model, 256, "llama3")
  after, turns = np.asarray(rope_frequencies(long.config)), 64 * before / (2 * np.pi)
  np.testing.assert_allclose(after[turns > 4], before[turns > 4])
  np.testing.assert_allclose(after[turns < 1], before[turns < 1] / 4, rtol=1e-6)
  assert (turns > 4).any() and (turns < 1).any() and model.config.context == 64
  np.testing.assert_allclose(
    rope_frequencies(stretched(stretched(model, 128, "llama3"), 256, "llama3").config), after, rtol=1e-6
  )
  assert long.blocks.config.rope_scaling == RopeScaling(4.0, original_context=64)
  with pytest.raises(InputError, match=r"tuning\.rope is 'yarn'"):
    stretched(model, 256, "yarn")


@pytest.mark.parametrize("window", [None, 20])
def test_attention_by_blocks_of_queries_is_attention(window):
  q, k, v = (jax.random.normal(jax.random.key(i), (2, 64, heads, 8)) for i, heads in enumerate((4, 2, 2)))
  value = lambda attend: jax.value_and_grad(lambda q, k, v: jnp.sin(attend(q, k, v)).sum(), argnums=(0, 1, 2))
  ours = value(functools.partial(costs.blockwise, window=window, start=0, block=16))
  plain = value(functools.partial(dot_product_attention, window=window, start=0))
  for a, b in zip(*map(jax.tree.leaves, (jax.jit(ours)(q, k, v), jax.jit(plain)(q, k, v))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_spaco_visits_its_share_of_the_chunks():
  """With a chunk in one, every one: then it is SeCO, the exact gradient; truncated it is another."""
  t, model = config_file.get_config("test").tuning, random_model(configs()["qwen3"])
  ids = np.asarray(random_tokens(1, 65))
  batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}

  def flat(method):
    gradient_fn = training.gradient_of(t, method)(lambda model: model)
    found = jax.jit(lambda model: gradient_fn(model, batch, 0, jax.random.key(0))[1])(model)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

  exact = flat("exact")
  near = lambda method: np.linalg.norm(flat(method) - exact) / np.linalg.norm(exact)
  assert near("spaco 1 none") < 1e-5 and near("truncated") > 1e-3
  for name in ("spaco", "spaco 0 2", "sparse", "spaco x 2"):
    with pytest.raises(InputError, match="it must be exact, seco, truncated or like 'spaco 8 2'"):
      training.gradient_of(t, name)
  with pytest.raises(InputError, match="the largest compensation is '3'; it must be one of 1, 2, none"):
    training.gradient_of(t, "spaco 8 3")


def test_the_rate_is_the_best_on_the_validation_split():
  config = config_file.get_config("cpu")
  loss = dict(zip(config.rates.all, (3.0, 2.5, 2.7), strict=True))
  runs = {run_name("all", "spaco 4 2", rate, 0): {"validation": value} for rate, value in loss.items()}
  assert best_rate(config, {"training": runs}, "all", "spaco 4 2") == config.rates.all[1]


def test_what_the_claims_are_about_must_be_run(tmp_path):
  config = config_file.get_config("test")
  config.methods = ("exact", "seco")
  with pytest.raises(InputError, match=r"config\.methods lacks spaco 2 2, truncated"):
    measure(config, tmp_path, tmp_path, Console(quiet=True))
  config.tuning.parameters = "some"
  with pytest.raises(InputError, match=r"tuning\.parameters is 'some'; it must be one of all, lora"):
    long_finetuning.finetuned(config.tuning, None, None, None, rate=1.0, seed=0, mesh=None, workdir=None, progress=None)
