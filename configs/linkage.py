r"""Linking vector spaces, graphs and matroids: do two parts need more shared coordinates than their connectivity?

Paper (arXiv 2024; background arXiv 1609.07991): theory, no experiments. The overlap P of two vector spaces can be
brought to the connectivity of their link in polynomial time, a space can be decomposed with as little, and graphs and
matroids follow under conditions.

  python -m experiments.run --config=configs/linkage.py:cpu --workdir=runs/linkage

printed on two shared cores (102 s; load average 6 to 7):

  failures of six identities, 1000 random instances each over GF(2), GF(3), GF(101)        0          <= 0     yes
  subsets where matroid link and generic vector link differ, 300 pairs                     0          <= 0     yes
  matroid links whose connectivity exceeds |P|, 300 pairs                                  0          <= 0     yes
  graphs where |W| + 1 - c_S - c_Q is not the rank over GF(2) and the reals, of 8          0          <= 0     yes
  graphs whose minimised overlap is not the formula, of 6                                  0          <= 0     yes
  resistive networks in two parts joined at P', largest difference of a voltage            9.659e-15  <= 1e-8  yes
  block sizes at which the ways to minimise choose different P'                            0          <= 0     yes
  minimise_overlap over GF(2), 32 columns a block, packed words over loop of integer rows  2.106 x    >= 1     yes
  minimise_overlap over GF(101), 32 columns a block, one batch over NumPy loop             3.263 x    >= 1     yes

Without the random scales on P, 20 of the 300 pairs of matroids differ, 15 with a lower and 5 with a higher rank.
A spectral cut leaves both halves of a graph connected: a tree on the boundary is then the least overlap. Cut at random
they are in pieces, and the least is 1 or 2 below the tree.
The lead of the batched form falls with the size (25 x at 4 columns over GF(101)): it eliminates padded shapes, the
loops drop rows and columns as they go. The identities run on spaces of at most 6 columns a block.
Where the galois package is installed it is timed too: with 8 and 32 columns it took 4 to 12 times what NumPy takes.

  XLA_FLAGS=--xla_gpu_enable_command_buffer=FUSION python -m experiments.run --config=configs/linkage.py:gpu \
      --workdir=runs/linkage

The flag is for experiments whose programs run side by side in threads, get temporary buffers at new addresses, and
whose CUDA graphs with products of cuBLAS in them then refuse to be rewritten; this one has no such threads and was run
with it all the same. It minimises 100,000 instances in one call, 2^14 at a time: of a space of (96, 96) int32 that is
0.6 GB. On one H100 (77 s over all parts, 2026-11-26) it printed:

  failures of six identities, 20,000 random instances over GF(101)                         0          <= 0     yes
  subsets where matroid link and generic vector link differ, 300 pairs                     0          <= 0     yes
  matroid links whose connectivity exceeds |P|, 300 pairs                                  0          <= 0     yes
  graphs where |W| + 1 - c_S - c_Q is not the rank over GF(2) and the reals, of 4          0          <= 0     yes
  graphs whose minimised overlap is not the formula, of 2                                  0          <= 0     yes
  resistive networks in two parts joined at P', largest difference of a voltage            1.146e-14  <= 1e-8  yes
  block sizes at which the ways to minimise choose different P'                            0          <= 0     yes
  minimise_overlap over GF(2), 32 columns a block, packed words over loop of integer rows  806.5 x    >= 1     yes
  minimise_overlap over GF(32749), 32 columns a block, one batch over NumPy loop           476.1 x    >= 1     yes

The loops run 4 of the instances on one core of the host; the ratios are of seconds an instance, so they say what a GPU
full of instances gains over a loop, not over a rival on that GPU: there is none. With 8 columns they are 183 and 1211.
Packed words take 1.3 us with 8 columns as with 32, as either fills one word; with 8, the form that is not packed is
faster, 0.75 us. The random geometric graph of 2000 vertices is too large to be minimised: its formula and ranks agree
(25 of 26 boundary vertices by a spectral cut, 1888 of 1916 at random), its minimum is not computed.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Linking vector spaces, graphs and matroids",
  family="tensors",
  link="https://arxiv.org/abs/1609.07991",
  does="splits a system of equations into parts that share as few coordinates as their connectivity allows",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, 1e5 instances), paper (theory only: as gpu)."""
  pick = scales.picker(scale)
  large = dict(gpu=100_000, paper=100_000)
  return ml_collections.ConfigDict(
    dict(
      paper="linkage",
      experiment="linkage",
      scale=scale,
      seed=0,
      fields=pick(test=(2,), cpu=(2, 3, 101), gpu=(101,)),
      identities=dict(instances=pick(test=400, cpu=1000, gpu=20_000, paper=20_000), size=6),
      reals=dict(instances=pick(test=60, cpu=1000, gpu=10_000)),
      matroids=dict(pairs=pick(test=60, cpu=300), size=2),
      data=dict(
        name="networkx",  # karate club, Les Miserables, a random geometric graph; or edge_list with a path
        path="",
        graphs=pick(
          test=("florentine",),
          cpu=("karate", "les_miserables", "florentine", "geometric"),
          gpu=("karate", "geometric"),
        ),
        splits=pick(test=("random",), cpu=("spectral", "random")),  # how the edges of a graph fall into two halves
        vertices=pick(test=30, cpu=150, gpu=2000, paper=2000),  # of the random geometric graph
      ),
      bench=dict(
        fields=pick(test=(2,), cpu=(2, 101), gpu=(2, 32749), paper=(2, 32749)),
        sizes=pick(test=(4,), cpu=(4, 8, 16, 32), gpu=(8, 32), paper=(8, 16, 32)),  # |S| = |P| = |Q|
        batch=pick(test=8, cpu=256, **large),
        chunk=2**14,  # instances whose intermediate spaces are in memory together
        host_batch=pick(test=1, cpu=4),
        repetitions=pick(test=1, cpu=5, gpu=2, paper=2),
      ),
    )
  )
