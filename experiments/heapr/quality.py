"""What is lost at a share of the experts' parameters removed, by HEAPr and by its rivals; what the layouts take."""

import functools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.compressing import Subject, selection_loss, sizes
from experiments.heapr import baselines
from jaxlab.models import Transformer
from jaxlab.weights import heapr

SCORES = ("identity", "fisher", "magnitude", "wanda", "camera", "random")
EXPERTS = ("naee", "least_used", "merged")  # whole experts
DELTAS = "low_rank"


def measure(config, subject: Subject, console) -> dict:
  """{rows: [{method, ratio, perplexity, accuracy, error}], chosen: {method: variant}, layouts, kept (share by layer),
  empty (experts without neurons), each at every ratio, unused (experts no token went to), seconds (of the statistics)}.
  """
  model = subject.model
  start = time.perf_counter()
  found = jax.block_until_ready(heapr.statistics(model, subject.calibration, batch=config.text.others.batch))
  seconds = time.perf_counter() - start
  made, chosen = makers(config, subject, found)
  judge = Judge(subject.batches)
  rows = [judge("dense", 0.0, model)]
  cases = [(name, ratio) for ratio in config.ratios for name in made]
  cases += [("heapr", ratio) for ratio in config.fine]
  for name, ratio in cases:
    small = made[name](ratio)
    if small is None:
      continue
    rows.append(judge(name, ratio, small))
    console.say(f"  {name} without {ratio:g}: perplexity {rows[-1]['perplexity']:.4g}")
  s = heapr.scores(found)
  keeps = {f"{ratio:g}": heapr.select(s, ratio) for ratio in config.ratios}
  return {
    "rows": rows,
    "chosen": chosen,
    "layouts": {ratio: layouts(config, subject, found, float(ratio)) for ratio in keeps},
    "kept": {ratio: keep.mean(axis=(1, 2)).tolist() for ratio, keep in keeps.items()},
    "empty": {ratio: int((keep.sum(axis=-1) == 0).sum()) for ratio, keep in keeps.items()},
    "unused": int((np.asarray(found.count) == 0).sum()),
    "seconds": seconds,
  }


def makers(config, subject: Subject, found: heapr.Statistics) -> tuple[dict[str, Callable], dict[str, str]]:
  """({method: ratio -> the model, or None where whole experts do not make that ratio}, {method: its variant})."""
  model, seed = subject.model, config.seed
  moe = model.blocks.mlp
  experts, size = moe.down.shape[1:3]
  loss = jax.jit(selection_loss(subject))
  s, by_use = heapr.scores(found), heapr.scores(found, freq_weight=True)
  plain = lambda scores, ratio, **how: heapr.masked(model, heapr.select(scores, ratio, **how))
  made = {
    "heapr": lambda ratio: plain(s, ratio),
    "heapr_layer": lambda ratio: plain(s, ratio, pool="layer"),
    "heapr_use": lambda ratio: plain(by_use, ratio),
    "heapr_tiles": lambda ratio: plain(s, ratio, multiple=config.tile),
  }
  chosen = {}

  def best(name: str, ways: dict[str, Callable]) -> Callable:
    """The way whose model is best on the text to choose by, at config.budget."""
    losses = {way: float(loss(make(whole_ratio(1 - config.budget, experts)))) for way, make in ways.items()}
    chosen[name] = min(losses, key=losses.get)
    return ways[chosen[name]]

  for name, ways in baselines.variants(found, moe, seed).items():
    given = {way: lambda ratio, a=a, pool=pool: plain(a, ratio, pool=pool) for way, (a, pool) in ways.items()}
    made[name] = best(name, given)
  read = functools.cache(lambda: baselines.captured(model, subject.calibration, config.tokens))
  only = lambda alive: heapr.sliced(model, np.repeat(alive[..., None], size, axis=-1), tile=size, skip_empty=True)
  drop = lambda ratio: round(ratio * experts)
  use = lambda ratio: baselines.least_used(found, drop(ratio))
  dropping = {way: lambda ratio, way=way: only(use(ratio)[way]) for way in ("tokens", "weights")}
  joined = lambda align: lambda ratio: baselines.merged(model, found, read(), experts - drop(ratio), align=align)
  how = dict(batch=config.text.others.batch, covariance=True)
  full = lambda: heapr.statistics(model, subject.calibration, **how)
  parts = functools.cache(lambda: baselines.differences(model, full(), read()))
  whole = {
    "naee": lambda ratio: only(baselines.naee(model, read(), drop(ratio))),
    "least_used": best("least_used", dropping),
    "merged": best("merged", {"as they are": joined(False), "neurons matched": joined(True)}),
  }
  exact = lambda make: lambda ratio: make(ratio) if math.isclose(ratio * experts, drop(ratio)) else None
  room = lambda ratio: (1 - ratio) * experts - 1 > 0
  made |= {name: exact(make) for name, make in whole.items()}
  made[DELTAS] = lambda ratio: baselines.low_rank(model, parts(), ratio) if room(ratio) else None
  return made, chosen


def whole_ratio(ratio: float, experts: int) -> float:
  """The nearest ratio of whole experts, at least one and not all."""
  return min(max(round(ratio * experts), 1), experts - 1) / experts


@jax.jit
def _sums(model: Transformer, batch):
  """(loss, right, counted) of every row, over the targets that count."""
  logits, targets = model(batch["inputs"]), batch["targets"]
  counted = targets >= 0
  logp = jax.nn.log_softmax(logits, axis=-1)
  loss = -jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
  right = (logits.argmax(axis=-1) == targets) & counted
  return jnp.where(counted, loss, 0).sum(axis=1), right.sum(axis=1), counted.sum(axis=1)


class Judge:
  """Perplexity, the share of next tokens that are the most likely one, and how sure a difference is.

  On text that nothing was chosen by. error: of the mean loss less HEAPr's at the same ratio (the dense model's for
  HEAPr's own), the standard error over rows: of the perplexities' ratio, nearly.
  """

  def __init__(self, batches):
    self._batches, self._rows = batches, {}

  def __call__(self, method: str, ratio: float, model: Transformer) -> dict:
    parts = [jax.tree.map(np.asarray, _sums(model, batch)) for batch in self._batches]
    loss, right, counted = (np.concatenate(column) for column in zip(*parts, strict=True))
    total = counted.sum()
    self._rows[method, ratio] = loss
    beside = self._rows.get(("heapr", ratio) if method != "heapr" else ("dense", 0.0), loss)
    error = (loss - beside)[counted > 0].std() * math.sqrt((counted > 0).sum()) / total
    found = dict(perplexity=math.exp(loss.sum() / total), accuracy=float(right.sum() / total), error=float(error))
    return dict(method=method, ratio=ratio) | found


def layouts(config, subject: Subject, found: heapr.Statistics, ratio: float) -> dict[str, dict[str, float]]:
  """{layout: {memory (experts' numbers over the dense ones), experts (share of their FLOPs that goes), flops (of a
  token, over the dense model's)}}.

  FLOPs are counted from the widths, by how often an expert was used. exact: as it was chosen; tiles: in config.tile,
  chosen so; stacked: the same, each level as large as in the largest layer; padded: to each layer's widest expert.
  """
  c, size = subject.model.config, found.energy.shape[-1]
  use = np.asarray(found.count, np.float64)
  use = use / use.sum(axis=-1, keepdims=True)
  neuron = 6 * c.width * c.experts.active
  dense = c.flops_per_token(subject.calibration.shape[1]) / 3
  s = heapr.scores(found)
  exact = heapr.select(s, ratio).sum(axis=-1)
  tile = config.tile
  wide = heapr.select(s, ratio, multiple=tile).sum(axis=-1)
  levels = np.stack([(wide > j * tile).sum(axis=-1) for j in range(size // tile)], axis=-1)  # (layers, levels)
  most = -(-exact.max(axis=-1, keepdims=True) // tile) * tile
  saved = lambda widths: (use * (size - widths)).sum() / (len(use) * size)
  cost = lambda widths: dict(experts=saved(widths), flops=1 - neuron * len(use) * size * saved(widths) / dense)
  held = lambda numbers: float(numbers / (found.count.size * size))
  return {
    "exact": dict(memory=held(exact.sum()), **cost(exact)),
    "tiles": dict(memory=held(wide.sum()), **cost(wide)),
    "stacked": dict(memory=held(levels.max(axis=0).sum() * tile * len(wide)), **cost(wide)),
    "padded": dict(memory=held(most.sum() * exact.shape[1]), **cost(np.broadcast_to(most, exact.shape))),
  }


def chosen(config, subject: Subject) -> Transformer:
  """HEAPr at config.budget, in tiles; a dense model as a mixture of one expert a layer."""
  model = mixture(subject)
  found = heapr.statistics(model, subject.calibration, batch=sizes(config.text, subject).batch)
  keep = heapr.select(heapr.scores(found), 1 - config.budget, multiple=config.tile)
  return heapr.sliced(model, keep, tile=config.tile)


def mixture(subject: Subject) -> Transformer:
  return subject.model if subject.model.config.experts else heapr.of_one_expert(subject.model)


def measure_dense(config, subject: Subject, console) -> list[dict]:
  """Rows as of `measure`, of a dense pretrained model's MLPs at 1 - config.budget."""
  model, ratio = mixture(subject), 1 - config.budget
  found = heapr.statistics(model, subject.calibration, batch=config.text.base.batch)
  others = baselines.variants(found, model.blocks.mlp, config.seed)
  ways = {"heapr": (heapr.scores(found), "model"), "heapr_layer": (heapr.scores(found), "layer")}
  ways |= {f"{name}, {pool}": others[name][pool] for name in ("identity", "magnitude") for pool in ("model", "layer")}
  ways |= {"fisher": others["fisher"]["model"], "random": others["random"]["model"]}
  judge = Judge(subject.batches)
  rows = [judge("dense", 0.0, model)]
  for name, (scores, pool) in ways.items():
    small = heapr.masked(model, heapr.select(scores, ratio, pool=pool))
    rows.append(judge(name, ratio, small))
    console.say(f"  {subject.name}, {name} without {ratio:g}: perplexity {rows[-1]['perplexity']:.4g}")
  return rows
