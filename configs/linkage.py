r"""Linking vector spaces, graphs and matroids: do two parts need more shared coordinates than their connectivity?

python -m experiments.run --config=configs/linkage.py:cpu --workdir=runs/linkage
"""

import ml_collections


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), h200 (one GPU, 1e5 instances), paper (theory only: as h200)."""
  pick = lambda **by_scale: by_scale.get(scale, by_scale["cpu"])
  large = dict(h200=100_000, paper=100_000)
  return ml_collections.ConfigDict(
    dict(
      paper="linkage",
      experiment="linkage",
      scale=scale,
      seed=0,
      fields=pick(test=(2,), cpu=(2, 3, 101)),
      identities=dict(instances=pick(test=400, cpu=1000, h200=20_000, paper=20_000), size=6),
      matroids=dict(pairs=pick(test=60, cpu=300), size=2),
      data=dict(
        name="networkx",  # karate club, Les Miserables, a random geometric graph; or edge_list with a path
        path="",
        graphs=pick(test=("florentine",), cpu=("karate", "les_miserables", "florentine", "geometric")),
        splits=pick(test=("random",), cpu=("spectral", "random")),  # how the edges of a graph fall into two halves
        vertices=pick(test=30, cpu=150, h200=2000, paper=2000),  # of the random geometric graph
      ),
      bench=dict(
        fields=pick(test=(2,), cpu=(2, 101), h200=(2, 32749), paper=(2, 32749)),
        sizes=pick(test=(4,), cpu=(4, 8, 16, 32), h200=(8, 16, 32), paper=(8, 16, 32)),  # |S| = |P| = |Q|
        batch=pick(test=8, cpu=256, **large),
        host_batch=pick(test=1, cpu=4),
        repetitions=pick(test=1, cpu=5),
      ),
    )
  )
