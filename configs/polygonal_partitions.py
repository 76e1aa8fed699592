"""Fat polygonal partitions: are treemap polygons fat whatever the weights, and what does that cost?

de Berg, Onak, Sidiropoulos 2013, arXiv 1009.1866: theorems only. Convex polygonal partitions of an aspect ratio bounded
by the tree's depth and log n alone; rectangles of constant aspect ratio when areas may be off by eps; ultrametrics
embedded in R^d within polylog(spread) of the least distortion.

  python -m experiments.run --config=configs/polygonal_partitions.py:cpu --workdir=runs/polygonal_partitions

On two CPU cores (252 s; gpu, the same with larger trees and no GPU code, 273 s) it printed:

  worst aspect over its bound, 1000 adversarial trees    greedy 0.114, gap 0.192, angular 0.198
  worst aspect, 998 files of numpy                       greedy 8.2, gap 16.0, angular 26.9 (squarified 55, slices 1e6)
  slack boxes, worst side ratio over its bound           1.00; numpy at eps 0.1: 6.7
  distortion / lower bound from spread 2^4 to 2^20       flat: 2.2 in the plane, 3.0 in space
  100,000 leaves, speed over squarified                  slack boxes 5.4x, angular 0.98x, greedy 0.04x

--config.data.name=directory --config.data.path=FOLDER shows any folder, --config.data.name=wordnet WordNet's nouns.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Fat polygonal partitions",
  family="graphs",
  link="https://arxiv.org/abs/1009.1866",
  does="draws a weighted tree as convex polygons inside polygons, none of them long and thin",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, trees of 10^5 leaves), paper (the same as gpu)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="polygonal_partitions",
      experiment="polygonal_partitions",
      scale=scale,
      seed=0,
      data=dict(
        name="package",  # or directory, or wordnet: its nouns under their hypernyms
        path=pick(test="ml_collections", cpu="numpy"),  # a package's name, a folder, or WordNet's data.noun
        ultrametric_points=pick(test=40, cpu=400),  # files whose byte histograms make the real ultrametric
      ),
      trees=dict(count=pick(test=12, cpu=1000), leaves=pick(test=16, cpu=60)),
      skewed=dict(
        star=pick(test=12, cpu=200), levels=pick(test=8, cpu=30), caterpillars=pick(test=(4, 8), cpu=(15, 30, 60, 120))
      ),
      slack=dict(eps=(0.5, 0.1, 0.02), dimensions=(1, 2, 3), trees=pick(test=6, cpu=200)),
      embedding=dict(
        dimensions=(2, 3),
        points=pick(test=40, cpu=300),
        log2_spreads=pick(test=(4, 12), cpu=(4, 8, 12, 16, 20)),
        trees=pick(test=2, cpu=20),
        star=pick(test=50, cpu=2000),
      ),
      bench=dict(
        leaves=pick(test=(20, 60), cpu=(1000, 5000, 30_000), gpu=(1000, 10_000, 100_000)),
        repetitions=pick(test=1, cpu=3),
      ),
    )
  )
