import functools
import itertools

import jax
import numpy as np
import pytest

from configs import compact_attention as config_file
from experiments.compact_attention import choosing, executing
from jaxlab.attention.selection import block_means, flash_prefill
from jaxlab.core.checks import InputError
from jaxlab.models.attention import dot_product_attention
from tests.common import run_and_continue


def test_everything_is_measured_once_of_a_users_model_too(tiny_checkpoint, tmp_path, monkeypatch):
  config = config_file.get_config("test")
  config.model, config.data.path = f"hf:{tiny_checkpoint}", "docs/*.md"
  measures = (
    "executing.measure",
    "choosing.measure",
    "choosing.unions",
    "beside.trained",
    "long_context.accuracy",
    "long_context.losses",
  )
  report = run_and_continue("compact_attention", tmp_path, monkeypatch, *measures, config=config)
  assert set(report.metrics) == {"executions", "choices", "unions", "accuracy", "losses"} and len(report.figures) == 3
  (chosen,) = report.metrics["choices"].values()
  (unions,) = report.metrics["unions"].values()
  for row in [*chosen.values(), *unions["rows"]]:
    assert 0 < row["before"] <= row["after"] <= 1 and row["mass_before"] <= row["mass_after"] <= 1 + 1e-5


def test_a_union_reads_more_the_more_heads_and_queries_share_it():
  """Means over layers, chunks and heads, against unions made one by one."""
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, heads: 3 * jax.random.normal(key, (1, heads, 64, 8))
  layers = [(draw(keys[i], 4), draw(keys[i + 1], 2)) for i in (0, 2)]
  select = functools.partial(flash_prefill, alpha=0.7, sink=0, window=1)
  found = {
    (chunk, share): choosing._over_layers(select, layers, chunk=chunk, block=4, share=share)["past"]
    for chunk in (16, 32)
    for share in (1, 2)
  }
  for (chunk, share), past in found.items():
    shares = []
    for (q, k), start in itertools.product(layers, range(chunk, 64, chunk)):
      chosen = select(q[:, :, start : start + chunk], block_means(k, 4), past=start, block=4)
      wanted = np.asarray(chosen).any(axis=2).reshape(4 // share, share, 16).any(axis=1)
      shares.append(wanted[:, : start // 4].mean())
    assert past == pytest.approx(np.mean(shares), abs=1e-6)
  assert found[16, 1] < min(found[16, 2], found[32, 1]) and max(found[16, 2], found[32, 1]) < found[32, 2]


SHAPE = dict(length=256, chunk=64, block=16, heads=4, kv_heads=2, size=16, dtype="float32")


def test_all_forms_attend_to_the_same_keys_and_the_full_table_to_all():
  """The union in place, copied and after its own selection; block-sparse attention to what is chosen."""
  problem = executing.planted(jax.random.key(0), **SHAPE)
  view, rows, means = executing._prepared(problem, 16)
  choose = lambda q, means, *, past, alpha: executing.flash_prefill(q, means, past=past, alpha=alpha, block=16)
  alpha, chosen = executing._at_density(lambda alpha: choose(rows, means, past=192, alpha=alpha), 2, 12, 0.6)
  wanted = executing.block_union(chosen, kv_heads=2, past=12)
  assert executing.density(executing._for_heads(wanted, chosen), 12) <= 0.6 < 1
  most = int(wanted.sum(axis=-1).max())
  assert most < 16  # pages there are
  given = (problem, view, means, chosen, wanted)
  forms = {name: form(given) for name, form in executing._forms(choose, alpha, most).items()}
  dense = dot_product_attention(*problem, start=192)
  same = lambda name, expected: np.testing.assert_allclose(forms[name], expected, rtol=1e-4, atol=1e-5)
  same(executing.FULL, dense)
  same(executing.COPY, forms[executing.IN_PLACE])
  same(executing.WHOLE, forms[executing.IN_PLACE])
  np.testing.assert_array_equal(forms[executing.SELECTION], wanted)
  for other in (executing.SPARSE, executing.FULL):
    assert np.abs(forms[other] - forms[executing.IN_PLACE]).max() > 1e-3
  work = executing._flops(problem, chosen, wanted, 16)
  see = np.repeat(np.repeat(np.asarray(chosen), 16, axis=2), 16, axis=3)
  causal = np.arange(256) <= 192 + np.arange(64)[:, None]
  assert work[executing.SPARSE] == 4 * 16 * (see & causal).sum()
  union = np.repeat(np.repeat(np.asarray(wanted), 2, axis=1), 16, axis=2)[:, :, None]
  assert work[executing.IN_PLACE] == work[executing.WHOLE] == 4 * 16 * (union & causal).sum()
  assert work[executing.FULL] == 4 * 16 * 4 * causal.sum()


@pytest.mark.parametrize(
  "text, message",
  [
    ("compact", "'compact' is not of the form 'compact 0.06'"),
    ("nearest 3", "the method is 'nearest'; it must be one of seer, quoka, compact"),
    ("seer 0.1", "needs a trained gate"),
  ],
)
def test_a_method_of_no_known_name_is_refused(text, message):
  with pytest.raises(InputError, match=message):
    choosing.decoders((text,), config_file.get_config("test"))
