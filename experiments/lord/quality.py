"""What LoRD and its rivals lose at a share of the parameters or in few bits, and what the calibration text does."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from experiments.compressing import Subject, made_rows, rivals, row, selection_loss, sizes, stored
from experiments.lord import tuning
from experiments.text import Text
from jaxlab.data import tokenizer
from jaxlab.models import Transformer, hub, maps
from jaxlab.weights import bitstack, lord, lord_sequential, svd, svd_search
from jaxlab.weights.calibration import rows_of
from jaxlab.weights.quantise import nf4, quantise, rtn, spqr

_SVDS = {"svd": svd.plain_svd, "asvd": svd.asvd, "svd_llm": svd.svd_llm}


def makers(config, subject: Subject, bases: Mapping, table) -> dict[str, Callable[[float], Transformer]]:
  """{method: its budget -> the compressed model}; what several budgets share is made once.

  Args:
    bases, table: centred, and their sweep.
  """
  model, text, batch = subject.model, subject.calibration, sizes(config.text, subject).batch
  multiple = config.sweep.multiple
  shares, loss = sizes(config.sweep, subject), selection_loss(subject)
  plain = functools.cache(lambda: lord.decompose(model, text, centre=False, batch=batch))
  full = functools.cache(lambda how: svd.decompose(model, text, _SVDS[how], batch=batch))

  def at_ranks(bases, budget):
    return lord.truncate(model, bases, lord.choose(bases, table, budget=budget))

  @functools.cache
  def swept_svd(how):
    rivals = lord.of_factors(full(how))
    return rivals, lord.sweep(model, rivals, loss, shares=shares, multiple=multiple)

  def at_own_ranks(how, budget):
    """Ranks by type of map, chosen by loss as LoRD's are."""
    rivals, found = swept_svd(how)
    return lord.truncate(model, rivals, lord.choose(rivals, found, budget=budget))

  @functools.cache
  def tried():
    """ASVD's losses of every map alone, on the first rows of the calibration text."""
    read = dataclasses.replace(subject, selection=text[: config.sweep.searched])
    return svd_search.sensitivity(model, full("asvd"), selection_loss(read))

  def searched(budget):
    """Ranks by map and layer, as ASVD chooses them."""
    return svd_search.truncate_each(model, full("asvd"), svd_search.search(full("asvd"), tried(), budget=budget))

  def in_order(budget):
    """One share for all maps, block after block."""
    ranks = lord.uniform(bases, budget=budget, multiple=multiple)
    return lord.truncate(model, lord_sequential.decompose(model, text, ranks, batch=batch), ranks)

  def stacked(model, blocks):
    return bitstack.decompose(model, text, blocks=blocks, rank=config.block_rank, batch=batch)

  @functools.cache
  def both() -> Transformer:
    """LoRD in stacks of all blocks."""
    return stacked(at_ranks(bases, config.budget), config.blocks)

  def like_both(_) -> Transformer:
    """BitStack alone, one more block of every map in turn while it takes no more bytes."""
    whole = stored(stacked(model, config.blocks))
    return bitstack.at_budget(whole, bitstack.level_order(whole), budget=maps.bytes_of(stored(both())))

  def four_bits(model, how):
    return quantise(model, text, how, bits=4, group=config.group, batch=batch)

  def with_outliers(model, bits):
    of = config.spqr
    how = functools.partial(spqr, outliers=of.outliers)
    return quantise(model, text, how, bits=int(bits), group=of.group, batch=batch)

  return (
    {
      "lord": lambda budget: at_ranks(bases, budget),
      "uncentred": lambda budget: at_ranks(plain(), budget),
      "uniform": lambda budget: lord.truncate(model, bases, lord.uniform(bases, budget=budget, multiple=multiple)),
      "lord+rtn": lambda budget: four_bits(at_ranks(bases, budget), rtn),
      "lord+nf4": lambda budget: four_bits(at_ranks(bases, budget), nf4),
      "lord+spqr": lambda budget: with_outliers(at_ranks(bases, budget), config.spqr.bits),
      "nf4": lambda _: four_bits(model, nf4),
      "spqr": lambda bits: with_outliers(model, bits),
      "lord+bitstack": lambda _: both(),
      "sequential": in_order,
      "asvd_searched": searched,
      "bitstack": like_both,
    }
    | rivals(config, subject)
    | {how: lambda budget, how=how: svd.truncate(model, full(how), budget=budget) for how in _SVDS}
    | {f"{how}_ranked": functools.partial(at_own_ranks, how) for how in _SVDS}
  )


def tuning_of(config, subject: Subject, *, cache: Path) -> dict[str, dict]:
  """As `tuning.measure`, at the ranks chosen."""
  bases, table, _ = swept(config, subject)
  return tuning.measure(config, subject, bases=bases, table=table, cache=cache)


def swept(config, subject: Subject):
  """(bases, the sweep over ranks by type of map, seconds to the bases)."""
  start = time.perf_counter()
  batch = sizes(config.text, subject).batch
  bases = jax.block_until_ready(lord.decompose(subject.model, subject.calibration, batch=batch))
  seconds = time.perf_counter() - start
  how = dict(shares=sizes(config.sweep, subject), multiple=config.sweep.multiple)
  return bases, lord.sweep(subject.model, bases, selection_loss(subject), **how), seconds


def chosen(config, subject: Subject) -> Transformer:
  """LoRD at config.budget."""
  bases, table, _ = swept(config, subject)
  return lord.truncate(subject.model, bases, lord.choose(bases, table, budget=config.budget))


def frontier(config, subject: Subject, *, console) -> dict:
  """Rows of `compressing.row` by method; the sweep; seconds to the bases."""
  bases, table, seconds = swept(config, subject)
  rows = made_rows(subject, sizes(config.methods, subject), makers(config, subject, bases, table), console)
  shape = lambda one: dict(full=one.up.shape[-2], even=one.weights / (one.down.shape[-2] + one.up.shape[-1]))
  budgets = sorted({row["budget"] for row in rows if row["method"] == "lord"})
  return {
    "rows": rows,
    "sweep": {"dense": table[0], "losses": table[1]},
    "sizes": {name: shape(one) for name, one in bases.items()},
    "ranks": {f"{budget:g}": lord.choose(bases, table, budget=budget) for budget in budgets},
    "seconds": seconds,
  }


def texts(config, subject: Subject, *, cache: Path) -> dict[str, float]:
  """{calibration text: perplexity at config.budget, at the ranks chosen on the subject's own}."""
  bases, table, _ = swept(config, subject)
  ranks = lord.choose(bases, table, budget=config.budget)
  rows, length = subject.calibration.shape
  batch = sizes(config.text, subject).batch
  other = Text(config.other, tokenizer.of_text(hub.load_vocabulary(subject.folder).tokenizer), cache)
  given = {
    "other": rows_of(other.split(config.other.split).ids, rows=rows, time=length, seed=config.seed),
    "no BOS": subject.calibration[:, 1:],
    "a quarter": subject.calibration[: max(batch, rows // 4 // batch * batch)],
  }
  given["other"][:, 0] = subject.calibration[:, 0]

  def judged(bases) -> float:
    return row(subject, "lord", config.budget, lord.truncate(subject.model, bases, ranks))["perplexity"]

  found = {name: judged(lord.decompose(subject.model, np.asarray(text), batch=batch)) for name, text in given.items()}
  return {"own": judged(bases)} | found
