"""Seconds of `minimise_overlap` an instance: one batch, packed words, and loops on the host."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, timing
from experiments.linkage.baselines import bitset_minimise, galois_minimise, numpy_minimise, to_bitset
from experiments.results import Claim
from jaxlab.tensors import fields, linkage

HOST = ("numpy", "bitset", "galois")
STYLES = {
  "numpy": "NumPy loop",
  "bitset": "loop of integer rows",
  "galois": "loop over galois arrays",
  "batched": "one batch",
  "packed": "one batch of packed words",
}


def time_minimise(b, p: int, n: int) -> dict:
  """Seconds an instance with blocks of n columns: the batched form, packed words over GF(2), and the host loops.

  Over GF(2) one peer keeps a row in one Python integer and adds rows by one XOR; over other fields it is NumPy, and
  galois where that is installed.
  """
  rng = np.random.default_rng(n)
  a, c = (rng.integers(0, p, (b.batch, n, 2 * n)) for _ in range(2))
  few = list(zip(a[: b.host_batch], c[: b.host_batch], strict=True))

  def batched(*spaces, size):
    """`chunk` instances at once, so that their intermediate spaces fit the memory."""
    one = lambda pair: linkage.minimise_overlap(*pair, size, size, size, p)
    run = jax.jit(lambda *spaces: jax.lax.map(one, spaces, batch_size=min(b.chunk, b.batch)))
    return functools.partial(run, *spaces)

  loop = lambda f, few, *sizes: [f(x, y, *sizes) for x, y in few]
  calls = {
    "batched": batched(*(jnp.asarray(x, jnp.int32) for x in (a, c)), size=n),
    "numpy": functools.partial(loop, numpy_minimise, few, n, n, n, p),
  }
  if p == 2:
    words = [pack_blocks(x, n) for x in (a, c)]
    calls["packed"] = batched(*words, size=words[0].shape[-1] // 2)
    integers = [(to_bitset(x), to_bitset(y)) for x, y in few]
    calls["bitset"] = functools.partial(loop, bitset_minimise, integers, n, n, n)
  if importlib.util.find_spec("galois"):
    import galois

    calls["galois"] = functools.partial(loop, galois_minimise, few, n, n, n, galois.GF(p))
  found = {}

  def keep(name):
    found[name] = calls[name]()
    return found[name]

  times = timing.compare({name: functools.partial(keep, name) for name in calls}, repetitions=b.repetitions, warmup=1)
  masks = {name: np.asarray(found[name][2]) for name in calls if name not in HOST}
  masks |= {name: fields.unpack_bits(words, n) for name, words in masks.items() if name == "packed"}
  chosen = [[np.flatnonzero(mask).tolist() for mask in of_all[: len(few)]] for of_all in masks.values()]
  agree = all([one[2] for one in found[name]] == kept for name in calls if name in HOST for kept in chosen)
  each = {name: times.seconds[name] / (len(few) if name in HOST else b.batch) for name in calls}
  median = {name: float(np.median(v)) for name, v in each.items()}
  ours, peer = (min((v for v in calls if (v in HOST) == host), key=median.get) for host in (False, True))
  return {
    "p": p,
    "size": n,
    "seconds_per_instance": median,
    "ours": ours,
    "peer": peer,
    "spread": np.percentile(each[peer] / each[ours], [10, 90]).tolist(),
    "all_choose_the_same_overlap": agree,
  }


def pack_blocks(rows, n: int):
  """Two blocks of n columns, each padded to whole words."""
  pad = [(0, 0)] * (rows.ndim - 1) + [(0, -n % 32)]
  return fields.pack_bits(np.concatenate([np.pad(rows[..., :n], pad), np.pad(rows[..., n:], pad)], -1))


def claims(config, rows: dict) -> list[Claim]:
  made = [
    Claim(
      "Sizes at which two ways to minimise choose different shared coordinates", "", "lower",
      ours=float(sum(not r["all_choose_the_same_overlap"] for r in rows.values())), threshold=0.0,
      baseline="host loops", note=f"{len(rows)} sizes",
    )
  ]  # fmt: skip
  for p in config.bench.fields:
    last = max((r for r in rows.values() if r["p"] == p), key=lambda r: r["size"])
    seconds, ours, peer = last["seconds_per_instance"], last["ours"], last["peer"]
    made.append(
      Claim(
        f"How many times as fast a batch finds least overlaps over GF({p}) as a loop, {last['size']} columns a block",
        "x", "higher", ours=seconds[peer] / seconds[ours], threshold=1.0, spread=tuple(last["spread"]),
        baseline=f"{STYLES[peer]}, {seconds[peer] * 1e3:.2f} ms an instance",
        note=f"{STYLES[ours]}; {config.bench.batch} instances in one call; {config.bench.host_batch} of them in the "
        "loop, on one core of the host",
      )
    )  # fmt: skip
  return made


def draw(speed: dict, workdir: Path) -> dict[str, str]:
  figure, axis = figures.subplots(width=1.7)
  for p in sorted({r["p"] for r in speed.values()}):
    for name, label in STYLES.items():
      points = [
        (r["size"], r["seconds_per_instance"][name])
        for r in speed.values()
        if r["p"] == p and name in r["seconds_per_instance"]
      ]
      if points:
        style, power = ("o" if p == 2 else "s") + ("--" if name in HOST else "-"), f"n^{timing.slope(points):.1f}"
        # Hollow, as two fields may take the same time.
        label = f"GF({p}), {label}: {power}"
        axis.loglog(*zip(*points, strict=True), style, ms=5 if p == 2 else 9, mfc="none", label=label)
  ticks = sorted({r["size"] for r in speed.values()})
  axis.set_xticks(ticks, ticks)
  axis.minorticks_off()
  axis.set(xlabel="|S| = |P| = |Q|", ylabel="seconds per instance", title="minimise_overlap")
  axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
  caption = "Seconds an instance of minimise_overlap against the size of its three blocks"
  return {figures.save(figure, workdir, "speed"): caption}
