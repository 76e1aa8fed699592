"""Graphs cut in two: connectivity by counting and by rank, the least overlap, a resistive network solved in parts."""

from pathlib import Path

import jax
import networkx
import numpy as np

from experiments import figures
from experiments.linkage import baselines
from experiments.results import Claim
from jaxlab.core.checks import InputError, require, require_choice
from jaxlab.tensors import fields, linkage, linkage_graphs

DATA = ("networkx", "edge_list")
SPLITS = ("spectral", "random")


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


def claims(rows: dict, network: dict) -> list[Claim]:
  wrong = sum(not r["formula"] == r["gf2"] == r["reals"] for r in rows.values())
  larger = sum(r.get("minimised", r["formula"]) != r["formula"] for r in rows.values())
  made = [
    Claim(
      "Cut graphs whose connectivity by counting pieces is not the rank over GF(2) and the reals", "", "lower",
      ours=float(wrong), threshold=0.0, baseline=f"{len(rows)} cuts",
      note="; ".join(
        f"{name}: {r['boundary']} boundary vertices, tree {r['tree']}, least {r['formula']}" for name, r in rows.items()
      ),
    ),
    Claim(
      "Cut graphs whose minimised overlap is not that connectivity", "", "lower", ours=float(larger), threshold=0.0,
      baseline=f"{sum('minimised' in r for r in rows.values())} cuts minimised",
    ),
  ]  # fmt: skip
  if network:
    ports, mesh = (sum(n[key] for n in network.values()) for key in ("ports", "star_mesh_ports"))
    kept = min(n["singular_values"][0] for n in network.values())
    dropped = max(n["singular_values"][1] for n in network.values())
    made.append(
      Claim(
        "Largest error of a voltage when a resistive network is solved in two parts joined at the least overlap", "V",
        "lower", ours=max(n["difference"] for n in network.values()), threshold=1e-8, baseline="solved whole",
        note=f"{ports} ports in all where star-mesh to the boundary needs {mesh}; singular values of the parts taken "
        f"as nonzero from {kept:.2g}, as zero up to {dropped:.1g}",
      )
    )  # fmt: skip
  return made


def draw(rows: dict, workdir: Path) -> dict[str, str]:
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
  caption = "Shared coordinates of two halves of a graph: boundary vertices, tree, minimum"
  return {figures.save(figure, workdir, "graphs"): caption}
