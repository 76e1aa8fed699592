"""Quantisers and pruners beside llmcompressor's on a real model: equal bits or zeros, equal calibration text, nearly
equal perplexity.

llmcompressor has an environment of its own: `make parity-llmcompressor`.
"""

import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlab.models import hub
from jaxlab.training import losses
from jaxlab.weights.calibration import rows_of
from jaxlab.weights.pruning import prune
from jaxlab.weights.quantise import awq, gptq, quantise, rtn

llmcompressor = pytest.importorskip("llmcompressor")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
BITS, GROUP, ROWS, TIME = 4, 32, 16, 256


@pytest.fixture(scope="module")
def subject(smollm2, tmp_path_factory):
  """(model, its folder, rows to calibrate on, rows to be judged on), of the project's own pages."""
  model, vocabulary = smollm2
  folder = tmp_path_factory.mktemp("smollm2")
  hub.save(model, folder)
  texts = [page.read_text() for page in sorted(ROOT.glob("docs/**/*.md"))]
  ids = [vocabulary.tokenizer.encode("\n".join(texts[part::2])).ids for part in (0, 1)]
  return model, folder, rows_of(ids[0], rows=ROWS, time=TIME), rows_of(ids[1], rows=16, time=TIME + 1, seed=1)


def recipe(name):
  """The modifiers that do it."""
  from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
  from llmcompressor.modifiers.gptq import GPTQModifier
  from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
  from llmcompressor.modifiers.quantization import QuantizationModifier
  from llmcompressor.modifiers.transform.awq import AWQModifier

  args = QuantizationArgs(num_bits=BITS, type="int", symmetric=False, strategy="group", group_size=GROUP)
  how = dict(config_groups={"all": QuantizationScheme(targets=["Linear"], weights=args)}, ignore=["lm_head"])
  return {
    "rtn": [QuantizationModifier(**how)],
    "gptq": [GPTQModifier(**how, dampening_frac=0.01)],
    "awq": [AWQModifier(duo_scaling=False), QuantizationModifier(**how)],
    "wanda": [WandaPruningModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"])],
    "sparsegpt": [SparseGPTModifier(sparsity=0.5, targets=["Linear"], ignore=["lm_head"])],
  }[name]


HOW = dict(bits=BITS, group=GROUP)
OURS = {
  "rtn": lambda *given: quantise(*given, rtn, **HOW),
  "gptq": lambda *given: quantise(*given, gptq, **HOW),
  "awq": lambda *given: awq(*given, **HOW),
  "wanda": lambda *given: prune(*given, "wanda", density=0.5).model,
  "sparsegpt": lambda *given: prune(*given, "sparsegpt", density=0.5).model,
}


def theirs(folder, calibration, judged, name=None):
  """Perplexity of transformers' model, by what llmcompressor made of it."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
  table = model.get_input_embeddings().weight
  kept = table.detach().clone()
  if name:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=hub.load_vocabulary("smollm2").tokenizer)
    rows = [dict(input_ids=row.tolist(), attention_mask=[1] * len(row)) for row in calibration]
    llmcompressor.oneshot(
      model=model, dataset=datasets.Dataset.from_list(rows), recipe=recipe(name), max_seq_length=TIME,
      num_calibration_samples=len(rows), shuffle_calibration_samples=False, processor=tokenizer,
    )  # fmt: skip
  with torch.no_grad():
    table.copy_(kept)  # its pruners take a head that is tied to the embeddings for a map, whatever is ignored
  ids = torch.from_numpy(judged).long()
  with torch.no_grad():
    logits = model(ids[:, :-1]).logits
  return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


@jax.jit
def loss(model, judged):
  inputs, targets = judged[:, :-1], judged[:, 1:]
  return losses.mean_loss(losses.token_losses(model, model.hidden(inputs), targets), targets)


@pytest.mark.parametrize("name", OURS)
def test_perplexity_is_that_of_llmcompressor(name, subject, monkeypatch):
  from llmcompressor.pipelines.cache import IntermediatesCache

  monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)  # its AWQ asks for a GPU's, on a CPU too
  model, folder, calibration, judged = subject
  dense = theirs(folder, calibration, judged)
  np.testing.assert_allclose(np.exp(loss(model, judged)), dense, rtol=1e-3)
  ours = float(np.exp(loss(OURS[name](model, calibration), judged)))
  public = theirs(folder, calibration, judged, name)
  print(f"{name}: {ours:.3f}, llmcompressor {public:.3f}, dense {dense:.3f}")
  assert ours <= 1.02 * public
