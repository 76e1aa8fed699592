"""The live comparison with transformers (extra `parity`): fresh random checkpoints, both directions."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from jaxlab.models import formats, generate, hub
from tests.common import configs, random_model, random_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.models import differential, make_fixtures  # noqa: E402

CONFIGS = configs()
TEXT = "The sun rose over the quiet village, and the baker opened his shop. In 1969 two people walked on the Moon."


@pytest.mark.parametrize("name", make_fixtures.models())
def test_fresh_checkpoints_agree_both_ways(name, tmp_path):
  theirs = make_fixtures.make(name, seed=100)
  theirs.save_pretrained(tmp_path / "theirs")
  tokens = np.random.default_rng(7).integers(0, 96, (2, 33))
  logits, greedy = make_fixtures.answers(theirs, tokens)
  ours = hub.load(tmp_path / "theirs", dtype="float32")
  np.testing.assert_allclose(jax.jit(lambda m, t: m(t))(ours, tokens), logits, atol=1e-4)
  np.testing.assert_array_equal(generate(ours, jnp.asarray(tokens[:, :5]), tokens=64), greedy)
  hub.save(ours, tmp_path / "ours")
  back = type(theirs).from_pretrained(tmp_path / "ours").eval()
  np.testing.assert_array_equal(make_fixtures.answers(back, tokens, new_tokens=2)[0], logits)


def test_nanochat_torch_files_round_trip(tmp_path):
  model = random_model(CONFIGS["nanochat"])
  hub.save(model, tmp_path, layout="nanochat")
  assert sorted(path.name for path in tmp_path.iterdir()) == ["meta_000000.json", "model_000000.pt"]
  state = torch.load(tmp_path / "model_000000.pt", weights_only=True)
  torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, tmp_path / "model_000000.pt")
  tokens = random_tokens(1, 17)
  np.testing.assert_array_equal(hub.load(tmp_path)(tokens), model(tokens))


def test_the_torch_opponent_computes_the_same_function():
  from experiments.torch_nanochat import Nanochat
  from jaxlab.models.config import nanochat

  model = random_model(nanochat(depth=6, aspect_ratio=8, head_dim=16, vocab_size=64, context=512, window_pattern="L"))
  tokens = random_tokens(2, 33)
  opponent = Nanochat(model.config, hub.to_tensors(model, formats.KARPATHY))
  np.testing.assert_allclose(model(tokens), opponent(torch.from_numpy(np.array(tokens)).long()).numpy(), atol=1e-4)


@pytest.mark.parametrize("draws", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_config_computes_what_transformers_does_or_is_refused_in_one_line(draws, tmp_path):
  """Function-changing fields set, removed, null, mistyped; most draws must be models, not refusals."""
  results, seeds = collections.Counter(), itertools.count()

  @settings(max_examples=draws, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
  @given(differential.checkpoints())
  def compare(checkpoint):
    results[differential.compare(tmp_path / "drawn", *checkpoint, seed=next(seeds))] += 1

  compare()
  assert results["equal"] >= 0.6 * draws and results["refused"] >= 0.05 * draws, results
  assert results["loaded"] <= 0.05 * draws, results


@pytest.mark.smollm2
@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-4), ("float64", 1e-4)])
def test_smollm2_has_the_logits_of_transformers(smollm2, dtype, tolerance, tmp_path):
  """Logits reach 30 and inner states thousands: in float32 either is 1e-4 off its own float64."""
  import transformers

  model, vocabulary = smollm2
  hub.save(model, tmp_path)
  tokens = np.array([vocabulary.tokenizer.encode(TEXT).ids])
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=dtype).eval()
  with torch.no_grad():
    expected = theirs(torch.from_numpy(tokens)).logits.numpy()
  with jax.enable_x64(dtype == "float64"):
    logits = jax.jit(lambda m, t: m(t))(hub.load(tmp_path, dtype=dtype), tokens)
  np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)


@pytest.mark.smollm2
def test_the_tokenizer_of_smollm2_is_that_of_transformers(smollm2):
  """Read by transformers from the same file."""
  import transformers

  (file,) = hub.find("smollm2").glob("*.gguf")
  theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
  _, vocabulary = smollm2
  for text in (
    TEXT,
    "  two  spaces\n\n\ttab 12345 x=3.14;",
    "naïve café 東京 🙂 don't we'll",
    "<|im_start|>user\nHi<|im_end|>",
  ):
    assert vocabulary.tokenizer.encode(text).ids == theirs(text).input_ids
  assert (vocabulary.bos, vocabulary.eos) == (theirs.bos_token_id, (theirs.eos_token_id,))
  assert vocabulary.chat_template == theirs.chat_template
