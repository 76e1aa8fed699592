import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.depth import snlp, snlp_adapt
from jaxlab.training import losses
from tests.common import configs, plain_attention, random_model, random_tokens, whole

ALL = configs()
TOKENS = random_tokens(2, 8)
distillation = whole(snlp_adapt.distillation)
TWO = dict(layers=4, iterations=2)


@functools.cache
def pair(name, dtype="float32"):
  """(a network, another of its shape)."""
  return random_model(ALL[name], 0, dtype), random_model(ALL[name], 5, dtype)


@pytest.mark.parametrize("name", ["nanochat", "qwen3_moe"])
def test_the_untouched_network_loses_nothing_in_sequence_and_with_as_many_steps_as_layers(name):
  teacher, _ = pair(name)
  _, found = distillation(teacher, teacher, TOKENS, settings=[TWO])
  assert abs(float(found["sequential"])) < 1e-5 < float(found["parallel"])
  exact = dict(layers=4, iterations=2, groups=2, tail=1)
  assert abs(float(distillation(teacher, teacher, TOKENS, settings=[exact], shared=1)[0])) < 1e-5


@pytest.mark.parametrize("name", ["llama", "nanochat"])
def test_the_loss_is_the_divergence_of_both_networks_from_the_original(name):
  teacher, student = pair(name)
  log = lambda logits: jax.nn.log_softmax(logits)
  p = log(teacher(TOKENS))
  kl = lambda logits: float((jnp.exp(p) * (p - log(logits))).sum(axis=-1).mean())
  loss, found = distillation(student, teacher, TOKENS, settings=[TWO], sequential_weight=3.0)
  expected = kl(student(TOKENS)), kl(snlp.forward(student, TOKENS, **TWO))
  np.testing.assert_allclose([found["sequential"], found["parallel"]], expected, rtol=1e-4)
  np.testing.assert_allclose(loss, 3 * expected[0] + expected[1], rtol=1e-4)


def test_its_gradient_is_that_of_finite_differences():
  """Through both networks, the solver and recomputation, along a random direction in float64."""
  with jax.enable_x64(True):
    teacher, student = pair("llama", "float64")
    direction = random_model(ALL["llama"], 9, "float64")
    how = dict(settings=[dict(layers=4, iterations=2, tail=1)], remat="full", attention=plain_attention)
    loss = lambda m: snlp_adapt.distillation(m, teacher, TOKENS, **how)[0]
    along = jax.jit(lambda t: loss(jax.tree.map(lambda a, b: a + t * b, student, direction)))
    slope = jax.jit(jax.grad(lambda t: loss(jax.tree.map(lambda a, b: a + t * b, student, direction))))(0.0)
    np.testing.assert_allclose(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-5)


def test_shared_layers_are_the_originals_and_get_no_gradient():
  """What the trained network holds in their place does not matter; the rest is as with layers of its own."""
  teacher, other = pair("llama")
  student = snlp_adapt.assembled(teacher, snlp_adapt.trainable(other, "suffix", start=2, key=None))
  chex.assert_trees_all_equal(student.blocks.q.weight[...][:2], teacher.blocks.q.weight[...][:2])
  chex.assert_trees_all_equal(student.blocks.q.weight[...][2:], other.blocks.q.weight[...][2:])
  chex.assert_trees_all_equal(student.embedding, teacher.embedding)
  options = dict(settings=[TWO])
  expected = distillation(student, teacher, TOKENS, **options)
  chex.assert_trees_all_close(distillation(other, teacher, TOKENS, shared=2, **options), expected, rtol=1e-5)
  gradient = jax.jit(jax.grad(lambda m: snlp_adapt.distillation(m, teacher, TOKENS, shared=2, **options)[0]))(other)
  size = jnp.abs(gradient.blocks.o.weight[...]).sum(axis=(1, 2))
  assert float(size[:2].max()) == 0 < float(size[2:].min()) and float(jnp.abs(gradient.embedding[...]).max()) == 0


def test_rows_are_dealt_to_the_settings():
  """Row b by setting b mod 2: as if each setting had been given its rows alone."""
  teacher, student = pair("nanochat")
  tokens, settings = random_tokens(4, 8, seed=2), [TWO, dict(layers=2, iterations=1)]
  _, found = distillation(student, teacher, tokens, settings=settings, shared=1)
  alone = [distillation(student, teacher, tokens[i::2], settings=[s], shared=1)[1] for i, s in enumerate(settings)]
  for part in ("sequential", "parallel"):
    np.testing.assert_allclose(found[part], np.mean([float(one[part]) for one in alone]), rtol=1e-4)


def test_few_rows_hold_the_sequential_network():
  """Every second row's divergence in sequence, all rows' layer-parallel: the teacher of a row is its own."""
  teacher, student = pair("nanochat")
  tokens = random_tokens(4, 8, seed=2)
  few = distillation(student, teacher, tokens, settings=[TWO], sequential_every=2)[1]
  some, every = (distillation(student, teacher, rows, settings=[TWO])[1] for rows in (tokens[::2], tokens))
  np.testing.assert_allclose(few["sequential"], some["sequential"], rtol=1e-4)
  np.testing.assert_allclose(few["parallel"], every["parallel"], rtol=1e-4)
  assert abs(float(some["sequential"]) - float(every["sequential"])) > 1e-4


def test_as_many_rows_as_asked_are_filled_with_tokens_of_the_text():
  tokens = jnp.arange(4000).reshape(400, 10)
  found = snlp_adapt.shuffled(tokens, jax.random.key(0), share=0.25)
  changed = np.asarray((found != tokens).sum(axis=1))
  assert (found[:, 0] == tokens[:, 0]).all() and set(changed) <= {0, 8, 9} and 60 < (changed > 0).sum() < 140
  assert len(set(np.ravel(found[changed > 0, 1:] // 1000))) == 4
  chex.assert_trees_all_equal(snlp_adapt.shuffled(tokens, jax.random.key(0), share=0.0), tokens)


def test_kept_parameters_come_back_as_they_were_and_adapters_merge():
  model, _ = pair("llama")
  for parameters in snlp_adapt.PARAMETERS:
    trained = snlp_adapt.trainable(model, parameters, start=2, key=jax.random.key(0), rank=2)
    assert trained.config == model.config
    chex.assert_trees_all_equal(snlp_adapt.assembled(model, trained), model)


def test_divergences_are_the_same_in_slices(monkeypatch):
  teacher, student = pair("llama")
  target, hidden = teacher.hidden(TOKENS), [student.hidden(TOKENS), teacher.hidden(TOKENS)]
  expected = losses.divergences(teacher, target, student, hidden)
  assert expected.shape == (2, 2, 8)
  monkeypatch.setattr(losses, "_SLICE_BYTES", 6 * 64 * 4 * 3)
  np.testing.assert_allclose(losses.divergences(teacher, target, student, hidden), expected, rtol=1e-5)


def test_own_text_is_the_models_and_the_keys():
  """At temperature 0 it continues the first token greedily; at 1 rows differ, and the key says how."""
  model, _ = pair("llama")
  write = lambda seed=0, **how: snlp_adapt.own_text(
    model, jax.random.key(seed), **(dict(bos=3, rows=3, length=5, batch=2) | how)
  )
  text = write(temperature=0.0)
  assert text.shape == (3, 6) and (text == text[0]).all() and text[0, 0] == 3
  logits = model(jnp.asarray(text[:1, :-1]))
  np.testing.assert_array_equal(jnp.argmax(logits[0], axis=-1), text[0, 1:])
  drawn = write()
  np.testing.assert_array_equal(drawn, write())
  assert (drawn[0] != drawn[1]).any() and (drawn != write(seed=1)).any() and drawn.max() < 64


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda m: snlp_adapt.distillation(m, m, TOKENS, settings=[]), "needs at least one setting"),
    (lambda m: snlp_adapt.distillation(m, m, TOKENS, settings=[TWO] * 3), "settings=3 must divide batch rows=2"),
    (lambda m: snlp_adapt.shuffled(TOKENS, jax.random.key(0), share=1.5), r"is 1\.5; it must lie in 0\.\.1"),
    (
      lambda m: snlp_adapt.distillation(m, m, TOKENS, settings=[TWO], sequential_every=3),
      "sequential_every=3 must divide batch rows=2",
    ),
    (lambda m: snlp_adapt.distillation(m, m, TOKENS, settings=[TWO], shared=3), "begin at layer 2; .* before layer 3"),
    (lambda m: snlp_adapt.distillation(m, m, TOKENS, settings=[dict(layers=7, iterations=1)]), "layers .* is 7"),
    (lambda m: snlp_adapt.distillation(m, m, TOKENS, settings=[TWO | dict(tail=3)]), r"is 4; it must lie in 1\.\.3"),
    (lambda m: snlp_adapt.distillation(m, m, TOKENS, settings=[TWO | dict(tail=6)]), "tail is 6"),
    (lambda m: snlp_adapt.trainable(m, "heads", start=1, key=None), "parameters is 'heads'"),
    (lambda m: snlp_adapt.own_text(m, jax.random.key(0), bos=0, rows=0, length=4, batch=1), "rows is 0"),
  ],
)
def test_mistakes_are_told_in_one_line(call, message):
  with pytest.raises(InputError, match=message) as caught:
    call(pair("llama")[0])
  assert "\n" not in str(caught.value)
