r"""Concatenated-matrix SVD: which matrices may share one truncated basis, at an error promised before?

Paper (arXiv 2601.11626): three bounds of the joint error, from norms alone to a truncated SVD kept up to date, and a
greedy clustering for each, all on data of its own. Measured here on travelling waves, channels of many antennas, the
columns of `base` and, where they are given, patches of pictures, and on all maps of `base` and `smollm2` that read or
write the residual stream.

  python -m experiments.run --config=configs/concat_svd.py:gpu --workdir=runs/concat_svd \
      --config.data.path='books/*.xz' --config.pictures.path=cifar10
  python -m experiments.run --config=configs/concat_svd.py --config.model=hf:DIR --config.budget=0.2 --workdir=runs/mine

Scale cpu printed (2026-12-01): compression by norms, residuals, the bound kept up to date, and true errors

  channels 1.02, 1.11, 4.82, 4.82   waves 1, 1, 3.21, 3.21   pictures 1, 1, 7.38, 8   columns of `base` 1.01 by all
  all maps of `base` in 0.90 of their numbers: perplexity 128 instead of 41 (SVD of each map 192, SVD-LLM 51)
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Concatenated-matrix SVD",
  family="weights",
  link="https://arxiv.org/abs/2601.11626",
  does="groups matrices that may share one truncated basis within an error promised before",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (attention of smollm2), paper (the paper's collections)."""
  pick = scales.picker(scale)

  def text(*, judged):
    return dict(
      rows=pick(test=8, cpu=24, gpu=64), time=pick(test=32, cpu=256, gpu=512), chosen=1, judged=judged
    ) | dict(batch=pick(test=4, cpu=4, gpu=32))

  def maps(*, types, pairs):
    return dict(types=types, pairs=pairs)

  return ml_collections.ConfigDict(
    dict(
      paper="concat_svd",
      experiment="concat_svd",
      scale=scale,
      seed=0,
      model="",  # a hub name, or hf:DIR: that one alone is compressed
      budget=0.2,  # the error that is promised to it
      rank=0.9,  # of its bases, a share of the residual stream's width
      subjects=pick(test=("base",), cpu=("base", "smollm2")),
      # A path to local text, or a tfds name; the splits.
      data=dict(name="stdlib_code", path="", calibration="validation", test="test"),
      parts=("bounds", "groups", "layers"),
      first=(),  # parts that are measured of the first model alone
      text=dict(
        base=text(judged=pick(test=128, cpu=8192, gpu=131_072)),
        others=text(judged=pick(test=128, cpu=2048, gpu=131_072)),
      ),
      # Of the collections: matrices, and of channels and columns their rank and promised error.
      collections=dict(
        waves=dict(count=pick(test=10, cpu=120, gpu=500, paper=5000), rank=67, eps=0.05),
        channels=dict(count=pick(test=10, cpu=120, gpu=500, paper=2000), rank=20, eps=0.1),
        columns=dict(count=pick(test=20, cpu=400, gpu=2000, paper=5000), rank=32, eps=0.2),
        wide_columns=dict(count=pick(test=8, cpu=80, gpu=200), rank=32, eps=0.2),
        pictures=dict(count=pick(test=6, cpu=120, gpu=500, paper=2000), rank=20, eps=0.1),
      ),
      # Patches of training pictures: a tfds set such as cifar10, or `path`, a folder with train/<class>/*.jpg and
      # test/<class>/*.jpg; without either that collection is left out. `most`: pictures of a class that are read.
      pictures=dict(name="", path="", most=pick(test=3, cpu=60, paper=300)),
      rivals=("random", "k-means", "HDBSCAN"),  # groups that know no error; the last needs scikit-learn
      bounds=dict(sizes=pick(test=(4, 8), cpu=(8, 16, 32, 64)), trials=pick(test=2, cpu=4, gpu=10)),
      layers=dict(  # types of maps, and pairs of (rank over rows, promised error)
        base=maps(
          types=("q", "k", "v", "o", "mlp.gate", "mlp.up", "mlp.down"),
          pairs=pick(test=((0.8, 0.4),), cpu=((0.9, 0.2), (0.8, 0.35), (0.65, 0.5))),
        ),
        others=maps(
          types=pick(cpu=("k", "v"), gpu=("q", "k", "v", "o")),
          pairs=pick(test=((0.8, 0.4),), cpu=((0.9, 0.2), (0.65, 0.5)), gpu=((0.9, 0.2), (0.8, 0.35), (0.65, 0.5))),
        ),
      ),
      bench=dict(  # of a folder that was written
        tokens=pick(test=4, cpu=64), repetitions=pick(test=2, cpu=3), dtype=pick(cpu="float32", gpu="bfloat16")
      ),
    )
  )
