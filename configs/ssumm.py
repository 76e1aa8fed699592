r"""SSumM: how well does a summary of k bits reconstruct a graph, against summaries that only merge or only drop edges?

Paper (KDD 2020, https://arxiv.org/abs/2006.01060): up to 11.2x smaller at similar error, up to 4.2x less error at
similar size, linear time. The authors' code on ego-Facebook at a fifth of its bits: absolute error 5.44e-3.

  python -m experiments.run --config=configs/ssumm.py:cpu --workdir=runs/ssumm \
      --config.data.name=edge_list --config.data.path=ego_facebook.txt \
      --config.second.name=edge_list --config.second.path=wiki-Vote.txt

Takes some twenty minutes on two cores. Without names it summarises generated graphs. Scale gpu takes more sizes and
seeds; only its `scaling` gains by a GPU. What was found is in results/ssumm.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="SSumM, sparse summarization of massive graphs",
  family="graphs",
  link="https://arxiv.org/abs/2006.01060",
  does="summarises a graph within a budget of bits by merging vertices and dropping edges",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, 10 M edges), paper (larger still)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="ssumm",
      experiment="ssumm",
      scale=scale,
      seed=0,
      data=dict(
        name="sbm",  # or edge_list with a path, rmat, barabasi_albert, karate, les_miserables, florentine
        path="",
        columns=(),  # of a table with a header, the titles of the two that hold the ends
        nodes=pick(test=64, cpu=2000, gpu=4000),
        degree=pick(test=6.0, cpu=12.0, gpu=20.0),
        blocks=pick(test=8, cpu=100),
        mixing=0.2,
      ),
      # A second graph for the curves; no name, no second graph.
      second=dict(
        name="rmat",
        path="",
        columns=(),
        nodes=pick(test=64, cpu=2**11, gpu=2**12),
        degree=pick(test=6.0, cpu=12.0, gpu=20.0),
        blocks=20,
        mixing=0.1,
      ),
      summary=dict(
        ratios=pick(test=(0.3,), cpu=(0.1, 0.2, 0.3, 0.5), gpu=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        # of the second graph, and of what no claim rests on: random groups, theta = 0
        side_ratios=pick(test=(0.3,), cpu=(0.3, 0.5), gpu=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6)),
        seeds=pick(test=2, cpu=3, gpu=5),
        # of summarise, where not its defaults; `share` is always the default
        options=dict(iterations=pick(test=3, cpu=20), hashes=10, max_group=500, fail_rule="code"),
      ),
      host=dict(ratio=pick(test=0.3, cpu=0.2), seeds=pick(test=1, cpu=3, gpu=5)),
      baselines=dict(
        supernodes=pick(
          test=(0.1, 0.5, 0.9),
          cpu=(0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7),
          gpu=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        ),
        samples=1.0,
      ),
      scaling=dict(  # summarise with every setting left as it is
        nodes=pick(
          test=(64, 128),
          cpu=(2**9, 2**12, 2**15, 2**18),
          gpu=(2**10, 2**13, 2**17, 2**20),
          paper=(2**17, 2**20, 2**22),
        ),
        degree=pick(test=6.0, cpu=8.0, gpu=10.5, paper=16.0),
        ratio=0.3,
      ),
    )
  )
