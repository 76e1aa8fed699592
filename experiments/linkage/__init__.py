"""Linkage: identities on random instances, graphs cut in two, a resistive network solved in parts, and throughput."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import networkx
import numpy as np

from experiments import figures, results, timing
from experiments.linkage import baselines
from experiments.linkage.baselines import bitset_minimise, galois_minimise, numpy_minimise, to_bitset
from experiments.results import Claim, Report
from jaxlab.core.checks import InputError, require, require_choice
from jaxlab.tensors import fields, linkage, linkage_graphs

DATA = ("networkx", "edge_list")
HOST = ("numpy", "bitset", "galois")
SPLITS = ("spectral", "random")
STYLES = {
  "numpy": "NumPy loop",
  "bitset": "loop of integer rows",
  "galois": "loop over galois arrays",
  "batched": "one batch",
  "packed": "one batch of packed words",
}


def run(config, workdir: Path, cache: Path, console) -> Report:
  graphs = load_graphs(config)
  for p in (*config.fields, *config.bench.fields):
    fields.check_field(p)
  part = functools.partial(results.part, workdir)
  identities = {
    p: part(f"identities.{p}", lambda p=p: check_identities(p, config))
    for p in console.track("identities", list(config.fields))
  }
  matroids = part("matroids", lambda: check_matroids(config))
  rows, network = {}, {}
  for name, graph in console.track("graphs", list(graphs.items())):
    file = name.replace(", ", ".")
    rows[name] = part(f"cut.{file}", lambda g=graph: cut_graph(*g))
    # Solving it whole is dense.
    if len(graph[0]) <= 300:
      network[name] = part(f"network.{file}", lambda g=graph: solve_in_parts(*g))
  b, speed = config.bench, {}
  for p, n in console.track("timing", [(p, n) for p in b.fields for n in b.sizes]):
    speed[f"GF({p}) {n}"] = part(f"speed.{p}.{n}", lambda p=p, n=n: time_minimise(b, p, n))
  metrics = {"identities": identities, "matroids": matroids, "graphs": rows, "network": network, "speed": speed}
  files = {
    draw_graphs(rows, workdir): "Shared coordinates of two halves of a graph: boundary vertices, tree, minimum",
    draw_speed(speed, workdir): "Seconds per instance of minimise_overlap against the size of its three blocks",
  }
  return Report(metrics, make_claims(config, identities, matroids, rows, network, speed), files)


def random_spaces(p: int, instances: int, size: int, seed: int):
  """Pairs over 3 * size columns, of random density, rank and number of columns that are used (the others are zero).

  Of two draws the larger number of columns is used: many rows over few columns are everything, and nothing is shared.
  """
  rng = np.random.default_rng(seed)
  use = lambda: np.arange(size) < rng.integers(1, size + 1, (2, instances)).max(0)[:, None]
  s, shared, q = use(), use(), use()

  def draw(columns):
    dense = rng.random((instances, size, 2 * size)) < rng.uniform(0.2, 1.0, (instances, 1, 1))
    rows = (np.arange(size) < rng.integers(0, size + 1, instances)[:, None])[:, :, None]
    return jnp.asarray(rng.integers(0, p, dense.shape) * dense * rows * columns[:, None], fields.dtype_of(p))

  return draw(np.concatenate([s, shared], 1)), draw(np.concatenate([shared, q], 1))


def check_identities(p: int, config) -> dict:
  """Failures of every identity, and the mean size of the overlap before and after."""
  size, instances = config.identities.size, config.identities.instances
  a, b = random_spaces(p, instances, size, config.seed)
  result = jax.jit(jax.vmap(lambda a, b: identities(a, b, size, p)))(a, b)
  before = float(np.mean(np.any(np.asarray(a[:, :, size:]) != 0, 1).sum(-1)))
  failures = {name: int(np.sum(~np.asarray(ok))) for name, ok in result.items() if name != "size"}
  return {
    "instances": instances,
    "failures": failures,
    "before": before,
    "after": float(np.mean(result["size"])),
    "sizes": np.bincount(result["size"]).tolist(),
  }


def identities(a, b, size: int, p: int) -> dict:
  """F1 dimension, F2 duality, minimisation: same link, |P'| = lambda, full restrictions and zero contractions (F5)."""
  n, rank = size, lambda m: linkage.rank(m, p)
  on_s, on_p = jnp.arange(2 * n) < n, jnp.arange(2 * n) >= n
  same = lambda x, y: jnp.all(x == y)
  whole = linkage.link(a, b, n, n, n, p)
  from_a, from_b = linkage.contract(a, on_p, p)[:, n:], linkage.contract(b, on_s, p)[:, :n]
  restricted, contracted = linkage.intersect(a[:, n:], b[:, :n], p), linkage.intersect(from_a, from_b, p)
  outside = rank(linkage.contract(a, on_s, p)) + rank(linkage.contract(b, on_p, p))
  dual_b = linkage.perp(b, p)
  dual_b = jnp.where(on_s, fields.negate(dual_b, p), dual_b)
  small_a, small_b, kept, count = linkage.minimise_overlap(a, b, n, n, n, p)
  p_nonzero = jnp.any(small_a[:, n:] != 0, 0) | jnp.any(small_b[:, :n] != 0, 0)
  p_a, p_b = small_a[:, n:], small_b[:, :n]
  c_a, c_b = linkage.contract(small_a, on_p, p), linkage.contract(small_b, on_s, p)
  return {
    "dimension": rank(whole) == outside + rank(restricted) - rank(contracted),
    "duality": same(linkage.perp(whole, p), linkage.link(linkage.perp(a, p), dual_b, n, n, n, p)),
    "same link": same(linkage.link(small_a, small_b, n, n, n, p), whole),
    "minimum": count == linkage.connectivity(whole, on_s, p),
    "subset": ~jnp.any(jnp.where(kept, jnp.all(a[:, n:] == 0, 0) & jnp.all(b[:, :n] == 0, 0), p_nonzero)),
    "irreducible": (rank(p_a) == count) & (rank(p_b) == count) & (rank(c_a) == 0) & (rank(c_b) == 0),
    "size": count,
  }


def check_matroids(config) -> dict:
  """The matroid link against the column matroid of the vector link, with random scales on P and without any.

  Counts subsets whose rank differs from the scaled link's, pairs whose connectivity exceeds |P|, and pairs where the
  unscaled link has a lower or a higher rank somewhere.
  """
  n, pairs, p = config.matroids.size, config.matroids.pairs, fields.LARGE
  rng = np.random.default_rng(config.seed)

  def ranks(a, b, key):
    scaled, plain = linkage_graphs.generic_link(a, b, n, n, n, key, p), linkage.link(a, b, n, n, n, p)
    table = linkage_graphs.link_rank_table(a, b, n, n, n, p)
    return table, *jax.vmap(lambda m: linkage_graphs.rank_table(m, p))(jnp.stack([scaled, plain]))

  with jax.enable_x64(True):
    a, b = (jnp.asarray(rng.integers(0, 2, (pairs, n, 2 * n)), jnp.int64) for _ in range(2))
    keys = jax.random.split(jax.random.key(config.seed), pairs)
    exact, scaled, plain = map(np.asarray, jax.jit(jax.vmap(ranks))(a, b, keys))
  on_s = 2**n - 1
  connectivity = exact[:, on_s] + exact[:, -1 - on_s] - exact[:, -1]
  return {
    "pairs": pairs,
    "mismatches": int(np.sum(exact != scaled)),
    "bound_violations": int(np.sum(connectivity > n)),
    "unscaled_lower": int(np.any(plain < exact, 1).sum()),
    "unscaled_higher": int(np.any(plain > exact, 1).sum()),
    "unscaled_differs": int(np.any(plain != exact, 1).sum()),
  }


def load_graphs(config) -> dict:
  """{"name, split": (edges, vertices, edges that belong to the first half)}.

  A spectral cut leaves both halves connected, where a tree is already the least overlap; a random one does not.
  """
  d = config.data
  require_choice("config.data.name", d.name, DATA)
  if d.name == "edge_list":
    require(
      Path(d.path).is_file(), f"config.data.path is '{d.path}', not a file; data.name=edge_list needs an edge list"
    )
    try:
      chosen = {Path(d.path).stem: networkx.read_edgelist(d.path, comments="#", data=False)}
    except (TypeError, ValueError, UnicodeDecodeError) as error:
      raise InputError(f"{d.path}: {error}; expected two vertex names a line") from None
  else:
    makers = {
      "karate": networkx.karate_club_graph,
      "les_miserables": networkx.les_miserables_graph,
      "florentine": networkx.florentine_families_graph,
      "geometric": lambda: networkx.random_geometric_graph(d.vertices, 1.6 / np.sqrt(d.vertices), seed=config.seed),
    }
    for name in d.graphs:
      require_choice("an entry of config.data.graphs", name, makers)
    chosen = {name: makers[name]() for name in d.graphs}
  for split in d.splits:
    require_choice("an entry of config.data.splits", split, SPLITS)
  rng, result = np.random.default_rng(config.seed), {}
  for name, graph in chosen.items():
    edges, vertices, side = bisect(graph)
    for split in d.splits:
      part = side if split == "spectral" else rng.random(len(edges)) < 0.5
      result[f"{name}, {split}"] = edges, vertices, part
  return result


def bisect(graph):
  """The largest component, cut by the sign of the Fiedler vector; edges across belong to the first half."""
  require(graph.number_of_edges() > 0, "the graph has no edges; nothing to cut")
  graph = networkx.Graph(graph.subgraph(max(networkx.connected_components(graph), key=len)))
  graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
  number = {v: i for i, v in enumerate(graph)}
  edges = np.array([(number[a], number[b]) for a, b in graph.edges])
  laplacian = networkx.laplacian_matrix(graph, weight=None).toarray().astype(float)
  side = np.linalg.eigh(laplacian)[1][:, 1] > 0
  return edges, len(number), side[edges].any(1)


def cut_graph(edges, vertices: int, part) -> dict:
  """Connectivity by formula and by rank over GF(2) and the reals; boundary, tree and minimum overlap."""
  w = linkage_graphs.boundary(edges, part)
  matrix = linkage_graphs.incidence(edges, vertices)
  # Rows are vertices: the rank of a column subset is that of its transpose, over far fewer columns.
  exact = jax.jit(lambda m: linkage.rank(m, 2))
  sides = matrix * part, matrix * ~part, matrix
  binary = [int(exact(fields.pack_bits(np.abs(m.T)))) for m in sides]
  # Over the reals m m' has the rank of m: a Laplacian, small and well conditioned where m is neither.
  real = [int(np.linalg.matrix_rank(m @ m.T, hermitian=True)) for m in (side.astype(float) for side in sides)]
  row = {
    "edges": len(edges),
    "boundary": len(w),
    "tree": max(len(w) - 1, 0),
    "formula": linkage_graphs.graph_connectivity(edges, vertices, part),
    "gf2": binary[0] + binary[1] - binary[2],
    "reals": real[0] + real[1] - real[2],
    "excess": linkage_graphs.split_graph(edges, vertices, part)[2],
  }
  if len(edges) <= 300:
    a, b, sizes = halves(edges, vertices, part, 2)
    row["minimised"] = int(minimise(a, b, *sizes, 2)[3])
  return row


minimise = jax.jit(linkage.minimise_overlap, static_argnums=(2, 3, 4, 5))


def halves(edges, vertices: int, part, p: int):
  """Cut spaces of the two halves, joined by a tree on the boundary; and (|S|, |P|, |Q|)."""
  with_s, with_q, _ = linkage_graphs.split_graph(edges, vertices, part)
  a, b = (linkage_graphs.graph_space(e, vertices, p) for e in (with_s, with_q))
  s = int(part.sum())
  return a, b, (s, len(with_s) - s, len(edges) - s)


def solve_in_parts(edges, vertices: int, part) -> dict:
  """Voltages of a resistive network with a source in every branch: whole, and as two multiports joined at P'.

  A part with rows [A_S | A_P] has v = A' x, and A_S (G A_S' x + j) + A_P i_P = 0; it answers v_P = -Z i_P + e.
  The other part sees -i_P; equal v_P on both sides is a system of size |P'|.
  """
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    a, b, (s, shared, q) = halves(edges, vertices, part, 0)
    small_a, small_b, kept, _ = minimise(a, b, s, shared, q, 0)
    gaps = fields.gap(a), fields.gap(b)
    singular = min(g[0] for g in gaps), max(g[1] for g in gaps)
    basis = lambda m: linkage.compact(m, np.ones(m.shape[1], bool))
    a, b, kept = basis(small_a), basis(small_b), np.asarray(kept)
    whole = np.asarray(linkage_graphs.graph_space(edges[np.argsort(~part, kind="stable")], vertices, 0))
    whole = basis(whole)
  g, j = rng.uniform(0.5, 2, s + q), rng.normal(size=s + q)
  x = np.linalg.solve(whole * g @ whole.T, -whole @ j)

  def port(rows, conductance, source, shared):
    solve = lambda right, m=rows * conductance @ rows.T: np.linalg.solve(m, right)
    return (
      shared.T @ solve(shared),
      shared.T @ solve(-rows @ source),
      lambda i: rows.T @ solve(-rows @ source - shared @ i),
    )

  z1, e1, back1 = port(a[:, :s], g[:s], j[:s], a[:, s:][:, kept])
  z2, e2, back2 = port(b[:, shared:], g[s:], j[s:], b[:, :shared][:, kept])
  current = np.linalg.solve(z1 + z2, e1 - e2)
  voltage = np.concatenate([back1(current), back2(-current)])
  star_mesh, interface = baselines.solve_by_star_mesh(edges, vertices, part, g, j)
  return {
    "ports": int(kept.sum()),
    "difference": float(np.abs(voltage - whole.T @ x).max()),
    "star_mesh_ports": interface,
    "star_mesh_difference": float(np.abs(star_mesh - whole.T @ x).max()),
    "singular_values": [float(v) for v in singular],
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


def make_claims(config, identities, matroids, rows, network, speed) -> list[Claim]:
  """The sheet's criterion: no failures, |P'| = lambda always, and the graph formula equals the ranks."""
  total = sum(r["instances"] for r in identities.values())
  where = ", ".join(f"GF({p})" for p in identities)
  names = list(next(iter(identities.values()))["failures"])
  claims = [
    Claim(
      f"failures of '{name}', {total} random instances over {where}",
      "",
      "lower",
      ours=float(sum(r["failures"][name] for r in identities.values())),
      threshold=0.0,
      paper=0.0,
      baseline="theorem",
    )
    for name in names
  ]
  wrong = sum(not r["formula"] == r["gf2"] == r["reals"] for r in rows.values())
  claims += [
    Claim(
      f"subsets where matroid link and generic vector link differ, {matroids['pairs']} pairs",
      "",
      "lower",
      ours=float(matroids["mismatches"]),
      threshold=0.0,
      baseline=f"{matroids['unscaled_differs']} pairs differ without scaling",
    ),
    Claim(
      f"matroid links whose connectivity exceeds |P|, {matroids['pairs']} pairs",
      "",
      "lower",
      ours=float(matroids["bound_violations"]),
      threshold=0.0,
      baseline="theorem",
    ),
    Claim(
      "graphs where |W| + 1 - c_S - c_Q is not the rank over GF(2) and the reals",
      "",
      "lower",
      ours=float(wrong),
      threshold=0.0,
      baseline=f"{len(rows)} graphs",
    ),
    Claim(
      "graphs whose minimised overlap is not the formula",
      "",
      "lower",
      ours=float(sum(r.get("minimised", r["formula"]) != r["formula"] for r in rows.values())),
      threshold=0.0,
      baseline=f"{sum('minimised' in r for r in rows.values())} graphs minimised",
    ),
  ]
  if network:
    ports, mesh = (sum(n[key] for n in network.values()) for key in ("ports", "star_mesh_ports"))
    kept = min(n["singular_values"][0] for n in network.values())
    dropped = max(n["singular_values"][1] for n in network.values())
    claims.append(
      Claim(
        "resistive networks in two parts joined at P', largest difference of a voltage",
        "V",
        "lower",
        ours=max(n["difference"] for n in network.values()),
        threshold=1e-8,
        baseline="solved whole",
        note=f"{ports} ports in all where star-mesh to the boundary needs {mesh}; singular values of the parts taken "
        f"as nonzero from {kept:.2g}, as zero up to {dropped:.1g}",
      )
    )
  claims.append(
    Claim(
      "block sizes at which the ways to minimise choose different P'",
      "",
      "lower",
      ours=float(sum(not r["all_choose_the_same_overlap"] for r in speed.values())),
      threshold=0.0,
      baseline="host loops",
    )
  )
  for p in config.bench.fields:
    last = max((r for r in speed.values() if r["p"] == p), key=lambda r: r["size"])
    seconds, ours, peer = last["seconds_per_instance"], last["ours"], last["peer"]
    claims.append(
      Claim(
        f"minimise_overlap over GF({p}), |S| = |P| = |Q| = {last['size']}, {STYLES[ours]} over {STYLES[peer]}",
        "x",
        "higher",
        ours=seconds[peer] / seconds[ours],
        threshold=1.0,
        spread=tuple(last["spread"]),
        baseline=f"{STYLES[peer]}, {seconds[peer] * 1e3:.2f} ms an instance",
        note=f"{config.bench.batch} instances in one call; {config.bench.host_batch} of them in the loop, on the host",
      )
    )
  return claims


def draw_graphs(rows, workdir: Path) -> str:
  splits = [s for s in SPLITS if any(name.endswith(s) for name in rows)]
  figure, axes = figures.subplots(len(splits), squeeze=False)
  for axis, split in zip(axes[0], splits, strict=True):
    chosen, width = {name: row for name, row in rows.items() if name.endswith(split)}, 0.27
    for i, (key, label) in enumerate(
      (("boundary", "boundary vertices"), ("tree", "tree |W| - 1"), ("formula", "minimum"))
    ):
      bars = axis.bar(np.arange(len(chosen)) + (i - 1) * width, [r[key] for r in chosen.values()], width, label=label)
      axis.bar_label(bars, fontsize=7)
    axis.set_xticks(range(len(chosen)), [n.rsplit(",", 1)[0].replace("_", "\n") for n in chosen])
    axis.grid(axis="x", alpha=0)
    axis.set(ylabel="shared coordinates", title=f"Edges in two halves, {split}")
  axes[0, -1].legend(loc="upper left")
  return figures.save(figure, workdir, "graphs")


def draw_speed(speed, workdir: Path) -> str:
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
  return figures.save(figure, workdir, "speed")
