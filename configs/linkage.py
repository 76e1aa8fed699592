r"""Linking vector spaces, graphs and matroids: do two parts need more shared coordinates than their connectivity?

Paper (background: https://arxiv.org/abs/1609.07991): theory, no experiments. The overlap P of two vector spaces can be
brought to the connectivity of their link in polynomial time, a space can be decomposed with as little, and graphs and
matroids follow under conditions.

  python -m experiments.run --config=configs/linkage.py:cpu --workdir=runs/linkage

takes two minutes on two cores; scale gpu minimises 100,000 instances in one call and takes 80 s on one H100 (2^14 at a
time: of a space of (96, 96) int32 that is 0.6 GB). What was found is in results/linkage.
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
      # On a CPU one at a time: batched LAPACK calls that meet in XLA's pool wait for each other (jaxlib 0.10.2).
      reals=dict(instances=pick(test=60, cpu=1000, gpu=10_000), batch=pick(cpu=1, gpu=10_000)),
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
