"""Solvers, which are then frozen, decomposers taught by noisy examples, and what rewards make of them."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from experiments.daslam import chain, solving
from jaxlab.models import Transformer, TransformerConfig
from jaxlab.models.generate import generate
from jaxlab.tasks import daslam, ppo
from jaxlab.training import losses
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.loop import train


class Batches:
  """Endless batches `make(key, number) -> {"inputs", "targets"}`, each of a key of its own."""

  def __init__(self, make, seed: int):
    self._make, self._key, self._next = jax.jit(make), jax.random.key(seed), 0

  def __iter__(self):
    return self

  def __next__(self):
    self._next += 1
    return jax.device_get(self._make(jax.random.fold_in(self._key, self._next), self._next))

  def get_state(self) -> dict:
    return {"next": self._next}

  def set_state(self, state: dict) -> None:
    self._next = state["next"]


def fitted(config, t, shape, make, seed: int, workdir: Path, console, title: str) -> Transformer:
  """A model of `shape` from nothing, trained by t.steps, t.rate on rows from `make`."""
  p = chain.Sizes(**config.problems)
  context = p.history + p.question + 4 * p.longest + p.asked + 2
  sizes = shape.to_dict() | dict(vocab_size=p.vocabulary, context=context)
  model = Transformer(TransformerConfig(**sizes), jax.random.key(seed))
  schedule = optax.warmup_cosine_decay_schedule(0, t.rate, max(1, t.steps // 20), t.steps)
  with console.training(title) as progress:
    return train(
      model,
      Batches(make, seed),
      lambda model, batch, step, key: losses.language_model_loss(model, batch),
      optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)),
      steps=t.steps,
      workdir=workdir,
      seed=seed,
      compute_dtype=config.dtype,
      checkpoint_every=max(1, t.steps // 2),
      progress=progress,
    )


def solver(config, name: str, workdir: Path, console) -> Transformer:
  """In the computing dtype: it is only sampled."""
  t, sizes = config.solving, chain.Sizes(**config.problems)
  make = lambda key, number: chain.row(*chain.solver_rows(key, t.batch, sizes, steps_by(number, t.steps, sizes)))
  made = fitted(
    config, t, config.solvers[name], make, config.seed, workdir / f"solver_{name}", console, f"solver {name}"
  )
  return jax.tree.map(lambda a: a.astype(config.dtype), made)


def steps_by(number: int | jax.Array, batches: int, sizes: chain.Sizes) -> jax.Array:
  """The longest chain of batch `number`: two steps in the first half of `batches`, all in the last quarter."""
  grown = (number / batches - 0.5) * 4 * (sizes.longest - 2)
  return 2 + jnp.clip(jnp.ceil(grown), 0, sizes.longest - 2).astype(jnp.int32)


def examples(config, solver: Transformer, condition: str):
  """Rows of (question, attempt) and noisy sub-questions."""

  def make(key, number):
    keys = jax.random.split(key, 2)
    p = chain.problems(keys[0], config.teaching.batch, chain.Sizes(**config.problems), *config.depths.trained)
    attempt = solving.solve(solver, solving.asked(p, solving.wanted(p)[0]))
    return chain.row(solving.seen(p, attempt, solving.CONDITIONS.index(condition)), chain.noisy(keys[1], p))

  return make


def taught(config, solver: Transformer, condition: str, seed: int, workdir: Path, console) -> Transformer:
  """A decomposer by supervision alone."""
  make, folder = examples(config, solver, condition), workdir / f"taught_{condition}_{seed}"
  title = f"decomposer, {condition}, seed {seed}"
  return fitted(config, config.teaching, config.decomposer, make, seed, folder, console, title)


def both_jobs(config, workdir: Path, console) -> Transformer:
  """A solver of size M that is taught to ask as well, half of its steps each: it reads its question alone."""
  t, sizes = config.solving, chain.Sizes(**config.problems)

  def make(key, number):
    keys = jax.random.split(key, 3)
    first = chain.row(*chain.solver_rows(keys[0], t.batch // 2, sizes, steps_by(number, t.steps, sizes)))
    p = chain.problems(keys[1], t.batch // 2, sizes, *config.depths.trained)
    none = solving.seen(p, solving.nothing(t.batch // 2, 0), solving.CONDITIONS.index("none"))
    second = chain.row(none, chain.noisy(keys[2], p))
    width = max(a["inputs"].shape[1] for a in (first, second))
    pad = lambda a, value: jnp.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=value)
    return {
      name: jnp.concatenate([pad(first[name], value), pad(second[name], value)])
      for name, value in (("inputs", 0), ("targets", -1))
    }

  made = fitted(config, t, config.solvers.M, make, config.seed, workdir / "both_jobs", console, "a solver that asks")
  return jax.tree.map(lambda a: a.astype(config.dtype), made)


@functools.partial(jax.jit, static_argnames=("batch", "sizes", "depths", "least"))
def collect(actor, reference, solver, key, beta, *, batch, sizes, depths, condition, least, weights, form):
  """(rollout, report) of `batch` questions; those the solver got right at once count nowhere. condition, form: their
  places in solving.CONDITIONS and daslam.FORMS."""
  keys = jax.random.split(key, 2)
  p = chain.problems(keys[0], batch, sizes, *depths)
  attempt = solving.solve(solver, solving.asked(p, solving.wanted(p)[0]))
  live = ~solving.right(p, attempt)
  prompt = solving.seen(p, attempt, condition)
  text = generate(actor.model, prompt.tokens, prompt.length, tokens=sizes.asked, key=keys[1], temperature=1.0)
  tokens, mask = ppo.written(prompt.tokens, prompt.length, text, chain.END)
  logp, values = ppo.scores(actor, tokens)
  was, _ = ppo.scores(reference, tokens)
  names, count = chain.parse(text, least)
  final, texts, _ = solving.follow(solver, p, names, count)
  forms = [solving.rewards(p, names, count, texts, attempt, final, sizes.modulus, name) for name in daslam.FORMS]
  terms = jax.tree.map(lambda *both: jnp.stack(both)[form], *forms)
  total = sum(weights[name] * term for name, term in terms.items())
  mask = mask & live[:, None]
  advantages, returns = ppo.gae(ppo.token_rewards(logp, was, mask, beta, total), values, mask)
  share = lambda x: jnp.where(live, x, 0.0).sum() / jnp.maximum(live.sum(), 1)
  report = {name: share(term) for name, term in terms.items()}
  report |= {"live": live.mean(), "kl": ppo.kl(logp, was, mask), "asked": share(count)}
  return ppo.Rollout(tokens, mask, logp, values, ppo.whiten(advantages, mask), returns), report


def tuned(config, solver, start, condition: str, weights: dict, form: str, seed: int, workdir: Path, console):
  """(the decomposer after config.ppo.updates rounds of PPO from `start`, reports by round); weights: of each reward;
  form: theirs (`solving.rewards`)."""
  t = config.ppo
  actor, reference = ppo.Actor(start), ppo.Actor(start)
  parts = [optax.clip_by_global_norm(1.0), optax.adam(t.rate)]
  if t.last_blocks:
    parts.append(ppo.scaled_by(ppo.last_blocks(actor, t.last_blocks)))
  optimizer = optax.chain(*parts)
  state, beta, reports = optimizer.init(actor), jnp.float32(t.beta), []
  how = dict(
    batch=t.batch, sizes=chain.Sizes(**config.problems), depths=tuple(config.depths.trained), least=config.least,
    condition=solving.CONDITIONS.index(condition), weights=weights, form=daslam.FORMS.index(form),
  )  # fmt: skip
  with Checkpoints(workdir) as kept, console.training(f"PPO, {condition}, seed {seed}") as progress:
    if (done := kept.latest()) is not None:
      (actor, state, beta), position = kept.restore(done, (actor, state, beta))
      reports = position["reports"]
    for i in range(done or 0, t.updates):
      key = jax.random.fold_in(jax.random.key(seed), i)
      rollout, report = collect(actor, reference, solver, key, beta, **how)
      actor, state, more = ppo.improve(
        actor, state, rollout, optimizer, key=key, epochs=t.epochs, minibatches=t.minibatches
      )
      beta = ppo.adapted(beta, report["kl"], t.batch, target=t.target)
      reports.append({name: float(value) for name, value in (report | more).items()})
      progress({"step": i + 1, "steps": t.updates, "loss": reports[-1]["policy"]})
      if (i + 1) % t.checkpoint_every == 0 or i + 1 == t.updates:
        kept.save(i + 1, (actor, state, beta), {"reports": reports})
        kept.wait(i + 1)
  return actor.model, reports
