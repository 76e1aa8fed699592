"""Making a pretrained network layer-parallel: distilling it, as it was, through SNLP's solver.

A network that was not trained for SNLP breaks under it (`snlp`). These losses mend one in minutes of training:

  L = w KL(p || q_seq) + KL(p || q_par),

p the frozen original's next-token distribution, q_seq that of the trained network run in sequence, q_par that of the
same weights with n layers solved in K steps, gradients through the solver. What the network knew is the target, so
nothing but the layers' dependence on one another has to change, and the text may be any: given text, text of another
domain, text that the network writes itself (`own_text`).

The last layers of a pretrained network do not bear it: leave a tail of one or two in sequence (`snlp.hidden`).
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.core.checks import require, require_choice, require_counts, require_divides
from jaxlab.depth import snlp
from jaxlab.models import Transformer
from jaxlab.models.attention import AttentionFn, dot_product_attention
from jaxlab.models.block import Block, layer_slice
from jaxlab.models.generate import generate
from jaxlab.models.inference import take_apart
from jaxlab.models.transformer import sequential
from jaxlab.training import lora
from jaxlab.training.losses import divergences

PARAMETERS = ("all", "suffix", "lora")


def distillation(
  model: Transformer,
  teacher: Transformer,
  tokens: Int[Array, "batch time"],
  *,
  settings: Sequence[Mapping],
  shared: int | None = None,
  sequential_weight: float = 1.0,
  sequential_every: int = 1,
  remat: str = "none",
  attention: AttentionFn = dot_product_attention,
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """(L, {"sequential": KL(p || q_seq), "parallel": KL(p || q_par)}), means over positions.

  Args:
    settings: arguments of `snlp.hidden` each: {"layers": n, "iterations": K, ...}. The rows are dealt to them in turn:
      row b is solved by setting b mod their number.
    shared: layers at the start which, with the embedding and the head, are the teacher's and stay so: both networks
      then read one evaluation of them, and no gradient goes there. None: every parameter is trained.
    sequential_every: k; KL(p || q_seq) is of every k-th row alone, which makes a step cheaper: the sequential network
      starts where it should stay.
    remat: as `transformer.sequential`; anything but "none" also evaluates the solver's steps again for the gradient.

  Raises:
    InputError: no setting, settings or a `sequential_every` that do not divide the batch, `shared` beyond the first
      layer that is solved, and as `snlp.hidden`.
  """
  count = len(settings)
  require(count > 0, "distilling through the solver needs at least one setting such as layers=16, iterations=2")
  require_divides("settings", count, "batch rows", tokens.shape[0])
  require_divides("sequential_every", sequential_every, "batch rows", tokens.shape[0])
  original = jax.lax.stop_gradient(teacher)
  x, side, _ = original.embed(tokens)
  start, backout = shared or 0, None
  if start:
    x, backout, _, _ = sequential(original, x, side, stop=start, attention=attention)
  target, target_backout, _, _ = sequential(original, x, side, start=start, attention=attention)
  target_backout = target_backout if model.depth // 2 >= start else backout
  if shared is None:
    x, side, _ = model.embed(tokens)

  reader = model if shared is None else original
  # Strided, so that the rows of a part stay spread over the devices.
  some = lambda tree: jax.tree.map(lambda a: a[::sequential_every], tree)
  few = reader.embed(some(tokens))[1]
  h, h_backout, _, _ = sequential(model, some(x), few, start=start, attention=attention, remat=remat)
  h_backout = h_backout if model.depth // 2 >= start else some(backout)

  solved = []
  for i, setting in enumerate(settings):
    own, given = jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:])[:, i], (tokens, (x, backout)))  # noqa: B023
    how = dict(setting, attention=attention, remat=remat != "none")
    solved.append(snlp.hidden_from(model, *given, reader.embed(own)[1], start=start, **how))
  dealt = jax.tree.map(lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *solved)
  target = (target, target_backout)
  kept = divergences(original, some(target), reader, [(h, h_backout)]).mean()
  reached = divergences(original, target, reader, [dealt]).mean()
  return sequential_weight * kept + reached, {"sequential": kept, "parallel": reached}


def trainable(model: Transformer, parameters: str, *, start: int, key: jax.Array | None, rank: int = 16):
  """The tree that is trained, with the model's `config`: "all" of it, the "suffix" from layer `start` on, its "lora".

  Raises:
    InputError: another word, or as `lora.init`.
  """
  require_choice("parameters", parameters, PARAMETERS)
  if parameters == "lora":
    return lora.init(model, key, rank=rank, start=start, where=lambda name: name.startswith("blocks."))
  return model if parameters == "all" else layer_slice(model.blocks, start)


def assembled(original: Transformer, trained: Transformer | Block | lora.Lora) -> Transformer:
  """The whole network of a `trainable` tree: its layers, or its adapters merged, in the place of the original's."""
  if isinstance(trained, lora.Lora):
    return lora.merge(original, trained)
  if isinstance(trained, Block):
    model = jax.tree.map(lambda a: a, original)
    join = lambda old, new: jnp.concatenate([old[: len(old) - len(new)], new.astype(old.dtype)])
    model.blocks = jax.tree.map(join, original.blocks, trained)
    return model
  return jax.tree.map(lambda new, old: new.astype(old.dtype), trained, original)


def shuffled(tokens: Int[Array, "batch time"], key: jax.Array, *, share: float) -> Int[Array, "batch time"]:
  """The tokens, each row with probability `share` filled behind its first token by draws from all rows.

  The original's answer to a text that nobody wrote is as good a target as any. Where the text is all of one kind, such
  rows teach what holds for other kinds too.

  Raises:
    InputError: a share outside 0..1.
  """
  require(0 <= share <= 1, f"the share of rows to shuffle is {share}; it must lie in 0..1")
  where, which = jax.random.split(key)
  changed = jax.random.bernoulli(where, share, (len(tokens), 1)) & (jnp.arange(tokens.shape[1]) > 0)
  return jnp.where(changed, jax.random.choice(which, tokens.ravel(), tokens.shape), tokens)


def own_text(
  model: Transformer, key: jax.Array, *, bos: int, rows: int, length: int, batch: int, temperature: float = 1.0
) -> Int[np.ndarray, "rows length_plus_1"]:
  """Rows that the model writes itself, each from the token that starts a text: training text of its own domain.

  At temperature 1 they are drawn from the very distribution whose keeping is the aim.

  Raises:
    InputError: rows, length or batch below 1.
  """
  require_counts(rows=rows, length=length, batch=batch)
  network = jax.jit(take_apart)(model)
  start = jnp.full((batch, 1), bos, jnp.int32)
  keys = jax.random.split(key, -(-rows // batch))
  made = [np.asarray(generate(network, start, tokens=length, key=k, temperature=temperature)) for k in keys]
  return np.pad(np.concatenate(made)[:rows], ((0, 0), (1, 0)), constant_values=bos)
