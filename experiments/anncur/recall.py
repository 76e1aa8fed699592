"""Who finds the cross-encoder's nearest items at equal calls: recall of every method, split and budget."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures
from experiments.anncur import baselines
from experiments.anncur.domain import Domain
from experiments.anncur.training import Kept
from experiments.overlap import overlapped
from experiments.results import Claim
from jaxlab.tensors import anncur

# All that reranks or completes by anything else than ANNCUR's own anchors, distilled encoders and fixed anchors too.
RIVALS = (
  *("TF-IDF", "BM25", "mean score", "DE_base", "DE distilled, MATCH", "DE distilled, TRP"),
  *("DE distilled, MATCH on random items", "fixed_anc_ent", "fixed_anc_ent_cur"),
)
METHODS = {
  "ADACUR": dict(color="C1", marker="s"),
  "ANNCUR": dict(color="C0", marker="o"),
  "fixed_anc_ent_cur": dict(color="C5", marker="P", ls="-."),
  "DE_base": dict(color="C2", marker="^", ls="--"),
  "DE distilled, MATCH on random items": dict(color="C3", marker="v", ls="--"),
  "mean score": dict(color="0.2"),
  "BM25": dict(color="C4", marker="x", ls=":"),
  "TF-IDF": dict(color="0.5", marker="d", ls=":"),
  "random": dict(color="0.7", ls=":"),
}


@functools.partial(jax.jit, static_argnames=("ks", "retrieve", "strength", "inverse"))
def recall_of_anchors(r_anc, exact, anchors, *, ks, retrieve, strength, inverse=True):
  """Recall (seeds, k, queries) of `search` by the anchors (seeds, k_i); `inverse` False: s = e R[A], R item-item."""

  def one(chosen):
    e = exact[:, chosen]
    embeddings = anncur.cur_index(r_anc, chosen, strength=strength).embeddings if inverse else r_anc
    s = anncur.cur_scores(e, embeddings)
    return anncur.evaluate(exact, s, ks=ks, retrieves=(retrieve,), anchors=chosen)[:, 0]

  return jax.lax.map(one, anchors)


def measure(config, domain: Domain, kept: Kept, retrievers: dict, budget: int) -> dict:
  """{"recall", "oracle_split", "shares"} by method and k with so many calls.

  Recall is that on test queries with the share of the calls on anchors that is best on dev; the oracle split is the
  best on test, for the record.
  """
  s, n = config.search, len(domain.items)
  cut, dev = len(domain.anchor), len(domain.dev)
  r_anc, exact = (jnp.asarray(part) for part in np.split(kept.scores["emb"], [cut]))
  cls = [jnp.asarray(part) for part in np.split(kept.scores["cls"], [cut])]
  rows, item_rows = jnp.asarray(kept.rows), jnp.asarray(kept.item_scores)
  keys = [jax.random.key(config.seed + 100 + seed) for seed in range(s.seeds)]
  ks = within(s.ks, budget)
  found = {"recall": {}, "oracle_split": {}, "shares": {}}

  def record(name, by_share):
    """Enters one method, {share: recall (k, queries)}; dev queries come first."""
    mean = {share: (r[:, :dev].mean(1), r[:, dev:].mean(1)) for share, r in by_share.items()}
    best = {f"k={k}": max(mean, key=lambda share, i=i: mean[share][0][i]) for i, k in enumerate(ks)}
    found["shares"][name] = best
    found["recall"][name] = {k: float(mean[share][1][i]) for i, (k, share) in enumerate(best.items())}
    found["oracle_split"][name] = {k: max(float(test[i]) for _, test in mean.values()) for i, k in enumerate(best)}

  def of_share(share):
    """{method: recall (k, queries)} with that share of the budget on anchors."""
    k_i = int(share * budget) // s.rounds * s.rounds
    options = dict(ks=ks, retrieve=budget - k_i, strength=s.strength)
    uniform = jnp.stack([anncur.draw_anchors(key, n, k_i) for key in keys])
    clusters = jnp.stack([baselines.cluster_anchors(key, kept.item_vectors, k_i) for key in keys])
    ways = {
      "ANNCUR": (r_anc, exact, uniform),
      "ANNCUR, cluster anchors": (r_anc, exact, clusters),
      "ANNCUR on CLS-CE": (*cls, uniform),
      "fixed_anc_ent_cur": (item_rows, exact, uniform),
    }
    by_name = {name: np.asarray(recall_of_anchors(*way, **options).mean(0)) for name, way in ways.items()}
    if k_i <= len(rows):
      part = jnp.stack([jnp.sort(jax.random.permutation(key, len(rows))[:k_i]) for key in keys])
      each = [recall_of_anchors(item_rows[p], exact, rows[p][None], inverse=False, **options)[0] for p in part]
      by_name["fixed_anc_ent"] = np.asarray(jnp.stack(each).mean(0))
    first = {"DE_base": retrievers["DE_base"], "vectors": kept.item_vectors}
    return by_name | adaptive(config, r_anc, exact, first, keys, k_i=k_i, retrieve=budget - k_i)

  for name, approximate in retrievers.items():
    record(name, {1.0: np.asarray(anncur.evaluate(exact, approximate, ks=ks, retrieves=(budget,))[:, 0])})
  shares = list(overlapped(of_share, s.shares))
  for name in dict.fromkeys(name for by_name in shares for name in by_name):
    record(name, {share: by_name[name] for share, by_name in zip(s.shares, shares, strict=True) if name in by_name})
  return found


def by_budget(found: dict) -> dict:
  """{what: {method: {k: {budget: value}}}} of {budget: what `measure` returned}."""
  tree = {}
  for budget, tables in found.items():
    for what, methods in tables.items():
      for name, row in methods.items():
        for k, value in row.items():
          tree.setdefault(what, {}).setdefault(name, {}).setdefault(k, {})[f"C={budget}"] = value
  return tree


def within(ks, budget: int) -> tuple[int, ...]:
  """The k that so many calls can find: the others have no recall of 1."""
  return tuple(k for k in ks if k <= budget)


def adaptive(config, r_anc, exact, by_dual, keys, *, k_i: int, retrieve: int) -> dict:
  """ADACUR from random and from the dual encoder's first anchors, sampled, and AXN: recall (k, queries) of each."""
  s, (queries, n) = config.search, exact.shape
  slots = k_i // s.rounds
  f, ks = lambda q, i: exact[q, i], within(s.ks, k_i + retrieve)
  best = [anncur.top_k(exact, k)[1] for k in ks]

  @functools.partial(jax.jit, static_argnames="sample")
  def one(vectors, first, key, sample):
    found = anncur.adacur(
      f, jnp.arange(queries), vectors, first, rounds=s.rounds, retrieve=retrieve, k=max(ks),
      strength=s.strength, key=key if sample else None,
    )  # fmt: skip
    return jnp.stack([anncur.recall(found.items[:, :k], top) for k, top in zip(ks, best, strict=True)])

  draw = lambda key: jax.vmap(lambda q: anncur.draw_anchors(q, n, slots))(jax.random.split(key, queries))
  start = anncur.top_k(by_dual["DE_base"], slots)[1]
  mean = lambda rows: np.asarray(jnp.stack(rows).mean(0))
  return {
    "ADACUR": mean([one(r_anc, draw(key), key, False) for key in keys]),
    "ADACUR, sampled": mean([one(r_anc, draw(key), key, True) for key in keys]),
    "ADACUR, first by DE_base": mean([one(r_anc, start, keys[0], False)]),
    "AXN (item vectors of DE_base)": mean([one(by_dual["vectors"].T, start, keys[0], False)]),
  }


def claims(config, metrics: dict) -> list[Claim]:
  """The first at every budget, the others at that of the claims; splits chosen on dev queries."""
  s, table = config.search, metrics["recall"]
  at = lambda name, k, budget=s.budget: table[name][f"k={k}"][f"C={budget}"]
  best, ahead = leads(config, table)
  worst = min(ahead, key=ahead.get)
  k, share = worst[0], metrics["shares"]["ANNCUR"][f"k={worst[0]}"][f"C={worst[1]}"]
  of = lambda place: f"k = {place[0]}, {place[1]} calls: ANNCUR {at('ANNCUR', *place):.3f}"
  made = [
    Claim(
      "Recall of the nearest items by ANNCUR less that of the best rival with as many calls, worst k and budget", "",
      "higher", ours=ahead[worst], threshold=0.0, baseline=f"{best[worst]} {at(best[worst], *worst):.3f}",
      note=f"of {config.domain.size} items; {of(worst)} with {share:.0%} of the calls on anchors (chosen on dev), "
      + ", ".join(f"{name} {at(name, *worst):.3f}" for name in table if name != "ANNCUR")
      + "; elsewhere "
      + "; ".join(
        f"{of(place)}, ADACUR {at('ADACUR', *place):.3f}, {best[place]} {at(best[place], *place):.3f}"
        for place in ahead
        if place != worst
      ),
    ),
    Claim(
      f"Recall of the {(k := s.claimed[-1])} nearest items by ANNCUR less that of the items of largest mean score", "",
      "higher",
      ours=at("ANNCUR", k) - at("mean score", k), threshold=0.05, baseline=at("mean score", k),
      note=f"{s.budget} calls; scores that hardly depend on the query make every method look good; this is the floor",
    ),
    Claim(
      "Recall of the nearest item by reranking a dual encoder less that by ANNCUR", "", "higher",
      ours=at("DE_base", 1) - at("ANNCUR", 1), threshold=0.0, baseline=at("ANNCUR", 1),
      note=f"{s.budget} calls; the paper has the dual encoder ahead at k = 1; here dual encoder and ANNCUR: "
      + ", ".join(f"{c} {table['DE_base']['k=1'][c]:.3f} and {r:.3f}" for c, r in table["ANNCUR"]["k=1"].items()),
    ),
    Claim(
      f"Recall of the {k} nearest items by ANNCUR on the EMB-CE encoder less that on CLS-CE", "", "higher",
      ours=at("ANNCUR", k) - at("ANNCUR on CLS-CE", k), threshold=0.0, baseline=at("ANNCUR on CLS-CE", k),
      note=f"{s.budget} calls",
    ),
  ]  # fmt: skip
  return made + adaptive_claims(config, table)


def leads(config, table: dict) -> tuple[dict, dict]:
  """By (k, budget): the best rival on the test queries, and by how much ANNCUR is ahead of it."""
  s = config.search
  best, ahead = {}, {}
  for place in ((k, c) for c in s.budgets for k in within(s.claimed, c)):
    at = lambda name, place=place: table[name][f"k={place[0]}"][f"C={place[1]}"]
    best[place] = max((name for name in RIVALS if name in table and f"k={place[0]}" in table[name]), key=at)
    ahead[place] = at("ANNCUR") - at(best[place])
  return best, ahead


def adaptive_claims(config, table: dict) -> list[Claim]:
  """Over the budgets at which ANNCUR misses one test query's nearest item or more: of no error there is no share."""
  at = lambda name, budget: table[name]["k=1"][f"C={budget}"]
  least = (1 - 1e-6) / config.domain.test_queries  # recalls are means in float32
  share = {
    c: (at("ADACUR", c) - at("ANNCUR", c)) / (1 - at("ANNCUR", c))
    for c in config.search.budgets
    if 1 - at("ANNCUR", c) >= least
  }
  if not share:
    return []
  worst = min(share, key=share.get)
  others = [name for name in table if name.startswith(("ADACUR,", "AXN"))]
  return [
    Claim(
      "Share of ANNCUR's misses of the nearest item that ADACUR removes with as many calls, worst budget", "",
      "higher", ours=share[worst], threshold=0.0, paper=0.7, baseline=f"ANNCUR {at('ANNCUR', worst):.3f}",
      note=f"{config.search.rounds} rounds, first anchors at random; the paper's figure is 'up to'; "
      + "; ".join(
        f"{c} calls: ANNCUR {at('ANNCUR', c):.3f}, ADACUR {at('ADACUR', c):.3f} ({removed:.0%}), "
        + ", ".join(f"{name} {at(name, c):.3f}" for name in others)
        for c, removed in share.items()
      ),
    )
  ]  # fmt: skip


def draw(config, table: dict, workdir: Path) -> dict[str, str]:
  ks = (1, *config.search.claimed)
  figure, axes = figures.subplots(len(ks), sharey=True)
  for axis, k in zip(axes, ks, strict=True):
    for name, style in METHODS.items():
      row = table[name][f"k={k}"]
      axis.plot([int(c.removeprefix("C=")) for c in row], list(row.values()), ms=5, label=name, **style)
    axis.set(xlabel="calls of f a query, C", title=f"k = {k}", ylim=(0, 1.02))
  axes[0].set_ylabel("recall of the exact top k")
  figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
  return {figures.save(figure, workdir, "recall"): "Share of the cross-encoder's top k found, by calls of it"}
