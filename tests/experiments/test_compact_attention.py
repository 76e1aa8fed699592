import functools
import itertools

import jax
import numpy as np
import pytest

from configs import compact_attention as config_file
from experiments import compact_attention as experiment
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
    assert row["least_gain"] >= -1e-5
  (claim,) = (claim for claim in report.claims if "best other selector" in claim.name)
  assert all(f"{name} {value}" in claim.note for name, value in (("compact", 0.8), ("x_attention", 0.3)))
  assert claim.note.count("read)") == 2


def test_ours_is_held_against_the_best_other_selector_of_the_worst_model_at_the_longest_prompts():
  """Of a kind the method counts that reads as much as ours; other lengths, QUOKA and dense attention do not."""
  shares = {
    "a": {"dense": 1.0, "compact 0.4": 0.9, "compact 0.1": 1.0, "quoka 0.3": 1.0, "seer 0.1": 0.8, "minference 3": 0.7},
    "b": {"dense": 1.0, "compact 0.4": 0.5, "x_attention 0.9": 1.0, "x_attention 0.5": 0.65, "flex_prefill 0.4": 0.6},
    "c": {"dense": 1.0, "compact 0.4": 0.5},
  }
  cell = lambda text, length, share: dict(decoder=text, task="needle", length=length, share=share)
  found = {
    name: {"rows": [row for text, at in each.items() for row in (cell(text, 64, at), cell(text, 32, 1 - at))]}
    for name, each in shares.items()
  }
  chosen = {"b": {"compact 0.4": {"past": 0.28}, "x_attention 0.5": {"past": 0.3}, "x_attention 0.9": {"past": 0.8}}}
  (claim,) = experiment.selector_claims(found, chosen)
  assert claim.ours == pytest.approx(-15) and not claim.holds
  assert claim.note == (
    "a, 64 tokens: compact 0.4 90.0%, minference 3 70.0%, seer 0.1 80.0%; "
    "b, 64 tokens: compact 0.4 50.0% (28.0% read), x_attention 0.5 65.0% (30.0% read), flex_prefill 0.4 60.0%"
  )
  assert experiment.selector_claims({"c": found["c"]}, {}) == []


@pytest.mark.parametrize("scale", ["test", "cpu", "gpu"])
def test_answers_and_losses_are_of_selectors_whose_choices_are_measured(scale):
  """By every selector at scales cpu and gpu, so that the shares of the past can be told beside the answers."""
  c = config_file.get_config(scale)
  selectors = lambda methods: {text for text in methods if text.split(" ")[0] in experiment.SELECTORS}
  asked = selectors(c.accuracy.methods)
  assert asked == selectors(c.losses.methods) <= set(c.choices.methods)
  assert len({text.split(" ")[0] for text in asked}) == (1 if scale == "test" else len(experiment.SELECTORS))


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
