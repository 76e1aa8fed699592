"""The live comparison with transformers (extra `parity`): fresh random checkpoints, both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.models import formats, generate, hub
from tests.common import configs, random_model, random_tokens

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.models import make_fixtures  # noqa: E402

CONFIGS = configs()


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
  from experiments.throughput.torch_nanochat import Nanochat
  from jaxlab.models.config import nanochat

  model = random_model(nanochat(depth=6, aspect_ratio=8, head_dim=16, vocab_size=64, context=512, window_pattern="L"))
  tokens = random_tokens(2, 33)
  opponent = Nanochat(model.config, hub.to_tensors(model, formats.KARPATHY))
  np.testing.assert_allclose(model(tokens), opponent(torch.from_numpy(np.array(tokens)).long()).numpy(), atol=1e-4)
