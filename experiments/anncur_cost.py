"""Time of ANNCUR against the number of items, and against its peers in one process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from jaxlab.tensors import anncur, anncur_encoders


def measure_cost(config, searched: anncur_encoders.Tokens, queries, encoders, console) -> dict:
  """Seconds a query and seconds of the algebra, by items; every contestant of a size runs in turn in this process.

  Items beyond the domain's repeat them: what f and a product cost does not depend on the text.
  """
  b, k = config.bench, 10
  budget, result = b.anchors + b.retrieve, {}
  vectors = np.random.default_rng(config.seed).normal(size=(config.domain.anchor_queries, max(b.sizes)))
  vectors = vectors.astype(np.float32)
  query = jnp.asarray(queries)
  for n in b.sizes:
    tokens = searched._replace(items=searched.items[jnp.arange(n) % len(searched.items)])
    embeddings = anncur_encoders.dual_embeddings(encoders["DE_base"], tokens.items, item=True)
    r_anc = jnp.asarray(vectors[:, :n])
    host, anchors = vectors[:, :n], anncur.draw_anchors(jax.random.key(0), n, b.anchors)
    build = jax.jit(lambda r, a: anncur.cur_index(r, a).embeddings)
    index = anncur.cur_index(r_anc, anchors)
    e = jnp.ones((1, b.anchors))

    # Encoders and tokens are arguments: as constants of a compiled function they would be copied into it.
    @jax.jit
    def every(cross, tokens, q):
      return anncur.top_k(anncur_encoders.cross_scorer(cross, *tokens)(q[:, None], jnp.arange(n)[None]), k)  # noqa: B023

    @jax.jit
    def rerank(cross, dual, tokens, v, q):
      s = anncur_encoders.embed(dual, tokens.queries[q], item=False) @ v.T
      return anncur.rerank(anncur_encoders.cross_scorer(cross, *tokens), q, s, retrieve=budget, k=k)

    @jax.jit
    def predict(cross, tokens, index, q):
      return anncur.search(anncur_encoders.cross_scorer(cross, *tokens), q, index, retrieve=b.retrieve, k=k)

    cross, dual = encoders["emb"], encoders["DE_base"]
    calls = {
      "all items by f": functools.partial(every, cross, tokens, query),
      "rerank DE_base": functools.partial(rerank, cross, dual, tokens, embeddings, query),
      "ANNCUR": functools.partial(predict, cross, tokens, index, query),
    }
    search = jax.jit(lambda e, v: anncur.top_k(anncur.cur_scores(e, v), b.retrieve))
    there, e_there, a_there = (np.asarray(x) for x in (index.embeddings, e, anchors))
    calls |= {
      "search": functools.partial(search, e, index.embeddings),
      "search, NumPy": lambda e=e_there, v=there: numpy_search(e, v, b.retrieve),
      "index": functools.partial(build, r_anc, anchors),
      "index, NumPy": lambda r=host, a=a_there: np.linalg.pinv(r[:, a], rcond=0.01) @ r,
    }
    times = timing.compare(calls, repetitions=b.repetitions, warmup=1)
    row = {name: times.median(name) for name in calls}
    for ours, peer in (("ANNCUR", "all items by f"), ("ANNCUR", "rerank DE_base"), ("search", "search, NumPy")):
      row[f"{peer} / {ours}"] = times.speedup(ours, over=peer)
    result[f"{n}"] = row
    console.say(f"{n} items: all by f {row['all items by f']:.3g} s, ANNCUR {row['ANNCUR']:.3g} s")
  return result


def numpy_search(e, embeddings, retrieve: int):
  """The host's way to the `retrieve` largest of e E, in order."""
  s = e @ embeddings
  best = np.argpartition(-s, retrieve - 1, axis=1)[:, :retrieve]
  order = np.argsort(-np.take_along_axis(s, best, 1), axis=1)
  return np.take_along_axis(best, order, 1)
