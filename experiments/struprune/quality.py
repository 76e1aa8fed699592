"""What pruned networks lose at a share of their parameters, by STRUPRUNE, its parts, and its rivals."""

import functools
from collections.abc import Callable

import jax

from experiments.compressing import Subject, parse, row, selection_loss, sizes
from experiments.struprune import rivals, slicegpt, sparsellm
from jaxlab.core.checks import require_choice
from jaxlab.models import Transformer, maps
from jaxlab.training import losses
from jaxlab.weights import pruning, structured, struprune

SLICEGPT = "slicegpt"


def makers(config, subject: Subject) -> dict[str, Callable[[float], Transformer]]:
  """{method: share of the blocks' parameters -> the pruned model}; what several budgets share is made once."""
  model, text, batch = subject.model, subject.calibration, sizes(config.text, subject).batch
  full = rivals.options(config)
  survey = functools.cache(lambda score: struprune.survey(model, text, score=score, batch=batch))
  temperature = functools.cache(
    lambda budget, score: struprune.best_temperature(model, text, survey(score), budget=budget, batch=batch)
  )

  def pruned(budget, *, rule="softmax", score="wanda", options=full):
    how = dict(budget=budget, biases=options.biases)
    how |= dict(rule=rule, temperature=temperature(budget, score) if rule == "softmax" else None)
    kept = struprune.allocate(model.config, survey(score), **how)
    return struprune.rebuild(model, text, *kept, options=options, batch=batch)

  def by_weight(budget):
    """As a file holds it."""
    return pruning.stored_sparse(sparsellm.prune(model, text, density=budget, options=full, batch=batch))

  changed = lambda **fields: functools.partial(pruned, options=full._replace(**fields))
  return {
    "struprune": pruned,
    "threshold": functools.partial(pruned, rule="threshold"),
    "uniform": functools.partial(pruned, rule="uniform"),
    "obs": functools.partial(pruned, score="obs"),
    "one_step": changed(admm=struprune.Admm(stages=0)),
    "one_round": changed(split=struprune.Split(outer=1)),
    "weights_kept": changed(refit=False),
    "no_biases": changed(biases=False),
    "sparsellm": by_weight,
  } | rivals.makers(config, subject, selection_loss(subject))


def frontier(config, subject: Subject, methods, *, console) -> dict:
  """Rows of `compressing.row` by method, with the sizes of layers where they are STRUPRUNE's."""
  make = makers(config, subject)
  rows = [row(subject, "dense", 1, subject.model)]
  for text in sizes(methods, subject):
    method, budget = parse(text)
    require_choice("a method", method, (*make, SLICEGPT))
    if method == SLICEGPT:
      rows.append(_sliced_row(config, subject, budget))
    else:
      small = make[method](budget)
      c = small.config
      kept = {"heads": c.layer_kv_heads or c.kv_heads, "neurons": c.layer_mlp_widths or c.mlp_width, "layers": c.depth}
      kept |= {"all heads": subject.model.config.kv_heads, "all neurons": subject.model.config.mlp_width}
      rows.append(row(subject, method, budget, small) | ({"kept": kept} if method == "struprune" else {}))
    console.say(f"  {text}: perplexity {rows[-1]['perplexity']:.4g}, {rows[-1]['share']:.3f} of the blocks' bytes")
  return {"rows": rows}


def _sliced_row(config, subject: Subject, budget: float) -> dict:
  """Of SliceGPT, whose narrower embeddings are counted, too."""
  model, c = subject.model, subject.model.config
  kept = slicegpt.kept_at(c, budget)
  found = slicegpt.directions(model, subject.calibration, kept, batch=sizes(config.text, subject).batch)
  bases, last = slicegpt.filled(found, c.width)
  forward = lambda model, tokens: slicegpt.hidden(model, bases, last, tokens)
  blocks, dense = slicegpt.parameters(c, kept), structured.dense_parameters(c)
  tables = sum(leaf.size for leaf in jax.tree.leaves(maps.with_blocks(model, None)))
  return dict(
    subject=subject.name, method=SLICEGPT, budget=budget, share=blocks / dense,
    bytes=2 * (blocks + int(tables * kept / c.width)),
    perplexity=losses.evaluator(forward)(model, subject.batches)["perplexity"],
  )  # fmt: skip


def chosen(config, subject: Subject) -> Transformer:
  """STRUPRUNE at config.budget."""
  return makers(config, subject)["struprune"](config.budget)
