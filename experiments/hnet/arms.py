"""Training and judging one network: of bytes or of tokens, cut by its router, by a rule, or not at all."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.hnet.data import PERTURBATIONS, Corpus, perturbed
from jaxlab.core import mesh as meshes
from jaxlab.models import HNet, HNetConfig
from jaxlab.sequence import hnet
from jaxlab.training import loop, losses
from jaxlab.training.metrics import read_metrics

_SAMPLE = 160  # bytes of held-out text shown with its cuts
_POINTS = 40  # of a training curve


@dataclasses.dataclass(frozen=True)
class Arm:
  """What is trained: a shape, and what deviates from the method."""

  config: HNetConfig
  bpe: bool = False
  cutter: hnet.Cutter | None = None
  slack: float | None = None  # in the place of the config's
  factors: tuple[float, ...] | None = None
  weight: float = hnet.WEIGHT


def arm_of(config, name: str) -> Arm:
  """An arm or an ablation (of one stage) by its name."""
  shape = lambda name: HNetConfig(**tuples(config.shapes[name]), **config.mixer)
  one = shape("one")
  if name in ("mamba", "transformer", "bpe"):
    return Arm(shape(name), bpe=name == "bpe", factors=(1.0,))
  changed = lambda **fields: Arm(dataclasses.replace(one, **fields))
  return {
    "one": lambda: Arm(one),
    "two": lambda: Arm(shape("two")),
    "pool": lambda: Arm(one, cutter=hnet.every(round(one.ratios[0])), slack=1.0),
    "space": lambda: Arm(one, cutter=hnet.at_spaces),
    "none": lambda: Arm(one),
    "no smoothing": lambda: changed(smoothing=False),
    "linear routing": lambda: changed(routing="linear"),
    "no straight-through": lambda: changed(straight_through=False),
    "equal rates": lambda: Arm(one, factors=(1.0, 1.0)),
    "no ratio loss": lambda: Arm(one, weight=0.0),
  }[name]()


def tuples(shape) -> dict:
  """A shape of the config as arguments: lists of a stored config are tuples again."""
  return {name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()}


@functools.partial(jax.jit, static_argnums=0)
def fresh(shape: HNetConfig, seed: int) -> HNet:
  return HNet(shape, jax.random.key(seed))


def train(config, corpus: Corpus, arm: Arm, *, rate: float, steps: int, workdir: Path, console, title: str) -> HNet:
  t, length = config.train, corpus.length(arm.bpe)
  slack = arm.slack or t.slack
  factors = arm.factors or hnet.multipliers(arm.config)
  with console.training(title) as progress:
    return loop.train(
      fresh(arm.config, config.seed),
      corpus.batches(arm.bpe),
      hnet.loss_of(arm.config, length, slack=slack, weight=arm.weight, cutter=arm.cutter, remat=t.remat),
      hnet.optimizer(arm.config, rate, steps=steps, factors=factors),
      steps=steps,
      workdir=workdir,
      seed=config.seed,
      compute_dtype=t.dtype,
      checkpoint_every=t.checkpoint_every,
      mesh=meshes.make_mesh(config.mesh.to_dict()),
      progress=progress,
    )


def measured(config, corpus: Corpus, name: str, *, workdir: Path, console, rate: float | None = None) -> dict:
  """An arm trained at the best of the rates (or at the one that is given, for fewer steps), and what it can do."""
  arm, t = arm_of(config, name), config.train
  run = functools.partial(train, config, corpus, arm, console=console)
  steps, trials = t.steps if rate is None else config.ablated_steps, {}
  place = lambda rate, steps: workdir / f"{name} {rate:g} {steps}"  # a trial as long as the run is the run
  for tried in t.rates if rate is None else ():
    model = run(rate=tried, steps=t.trial, workdir=place(tried, t.trial), title=f"{name}, rate {tried:g}")
    trials[tried] = bits(config, corpus, arm, model, perturbations=())["clean"]
  rate = rate or min(trials, key=trials.get)
  folder = place(rate, steps)
  model = run(rate=rate, steps=steps, workdir=folder, title=name)
  rows = read_metrics(folder)
  return {
    "rate": rate,
    "trials": {f"{tried:g}": found for tried, found in trials.items()},
    "bits": bits(config, corpus, arm, model, perturbations=PERTURBATIONS if trials else ()),
    "parameters": sum(a.size for a in jax.tree.leaves(model)),
    "overflow": max((row.get(f"overflow_{i}", 0.0) for row in rows[len(rows) // 4 :] for i in range(2)), default=0.0),
    "curve": [[row["step"], row["nats"]] for row in rows[:: max(1, len(rows) // _POINTS)]],
    **cuts(config, corpus, arm, model),
  }


@functools.cache
def _hidden(cutter):
  """The exact forward, with room for every chunk, as `losses.evaluator` wants it."""
  return jax.jit(lambda model, tokens: model.hidden(tokens, boundaries=cutter(tokens) if cutter else None))


def bits(config, corpus: Corpus, arm: Arm, model: HNet, *, perturbations) -> dict[str, float]:
  """{"clean" or the perturbation: bits a byte of held-out text}."""
  model = loop.cast(model, config.train.dtype)
  evaluate = losses.evaluator(_hidden(arm.cutter), corpus.sizes(arm.bpe))
  texts = corpus.held_out
  found = {"clean": evaluate(model, corpus.evaluation(texts, arm.bpe))["bits_per_byte"]}
  size = max(1, len(texts) * config.eval.perturbed // config.eval.bytes)
  some = texts[:: max(1, len(texts) // size)]
  for how in ("unchanged", *perturbations) if perturbations else ():
    random = np.random.default_rng(config.seed)
    changed = some if how == "unchanged" else [perturbed(text, how, random) for text in some]
    found[how] = evaluate(model, corpus.evaluation(changed, arm.bpe))["bits_per_byte"]
  return found


def cuts(config, corpus: Corpus, arm: Arm, model: HNet) -> dict:
  """Where held-out text is cut, and the FLOPs a byte that follow.

  Returns:
    {sizes (positions a chunk, by stage), beside (share of the outermost cuts at or behind a space-like byte), chance
    (that of all positions), sample (text with its cuts), flops (training, a byte)}.
  """
  length, stages = corpus.length(arm.bpe), len(arm.config.ratios)
  per_id = corpus.bytes_a_token if arm.bpe else 1.0
  if not stages:
    return {"sizes": [], "flops": arm.config.flops_per_token(length) / per_id}
  found = jax.jit(lambda model, batch: _cuts(arm, model, batch))
  model = loop.cast(model, config.train.dtype)
  batches = corpus.evaluation(corpus.held_out, False)
  total = sum(np.asarray(found(model, batch)[0], np.float64) for batch in batches)
  begun, beside, near, positions = total[:stages], total[stages], total[stages + 1], total[-1]
  sizes = [float(a / b) for a, b in zip([positions, *begun[:-1]], begun, strict=True)]
  first = batches[0]
  at = np.asarray(found(model, first)[1])[0]
  sample = "".join(("|" if cut else "") + chr(byte) for byte, cut in zip(first["inputs"][0], at, strict=True))
  return {
    "sizes": sizes,
    "beside": float(beside / begun[0]),
    "chance": float(near / positions),
    "sample": sample[2 : 2 + _SAMPLE].replace("\n", " "),
    "flops": arm.config.flops_per_token(length, tuple(1 / size for size in sizes)),
  }


def _cuts(arm: Arm, model: HNet, batch):
  """(cuts by stage, outermost ones beside a space, positions beside one, positions; the outermost cuts)."""
  tokens, targets = batch["inputs"], batch["targets"]
  lengths = jnp.max(jnp.where(targets >= 0, jnp.arange(1, tokens.shape[1] + 1), 1), axis=1)
  given = arm.cutter(tokens) if arm.cutter else None
  _, chunks = model.chunked(tokens, lengths=lengths, boundaries=given)
  like = hnet.spacelike(tokens)
  beside = like | jnp.concatenate([jnp.zeros_like(like[:, :1]), like[:, :-1]], axis=1)
  outer = chunks[0]
  counts = [one.cut.sum() for one in chunks]
  return jnp.stack([*counts, (outer.cut & beside).sum(), (outer.valid & beside).sum(), outer.valid.sum()]), outer.cut
