r"""FunBaT: do factors that are functions of continuous indices predict better than discrete ones, and at what cost?

Paper (arXiv 2311.04829): lower errors than discrete tensor models on synthetic and real data, at linear cost.

  python -m experiments.run --config=configs/funbat.py:cpu --workdir=runs/funbat

Without a file the tensors are generated. With Beijing PM2.5 (428 x 501 x 1461 bins, 9,563 training entries; an .npz of
folds: --config.data.name=npz --config.data.path=FILE) it took 197 s on 2 CPU cores, other work beside it, and printed

  test RMSE on the surface                      0.0031   (paper's notebook 0.004)
  chosen on a held-out tenth                    FunBaT-CP (0.380 there; FunBaT 0.413), on the test sets 0.443
  that over discrete Tucker, RMSE               0.443 / 0.421   -1.1 standard deviations over folds: does not hold
  that over P-Tucker, RMSE                      0.443 / 0.448   0.08: does not hold
  that over exact GP, RMSE                      0.443 / 0.691   its 40 steps on 1,000 points are too few: 0.301 below
  parallel scans against the loop               4e-16
  smoother, 4,096 steps, over a NumPy loop      9.9 x
  epoch time against observations, slope        1.21: does not hold; 0.85 to 1.60 in earlier runs of that part

FunBaT itself has the lowest test RMSE of the tensor models, 0.393; the held-out tenth of a training set this sparse
does not find that out. The epochs it would stop at are 23 to 41.

US temperatures (15 x 95 x 267; y standardised) want --config.data.span=1 --config.funbat.lengthscale=0.5. Beijing PM10
and SO2, the paper's other sets, were not at hand. Every method and every chain length is a part of the run: the same
command goes on where one was cut off.

Also at scale cpu: GPTF 0.390 is level with FunBaT; FunBaT-CP 0.443 needs the authors' extra prior (0.402) to beat
discrete CP (0.428). Polynomial factors choose ridge 0.01 on the held-out tenth, and are then worse than the mean on the
test sets (1.24). Timings on a machine with other work are uncertain by a factor of two.

  XLA_FLAGS=--xla_gpu_enable_command_buffer=FUSION python -m experiments.run --config=configs/funbat.py:gpu \
      --config.data.name=npz --config.data.path=beijing_pm25.npz --workdir=runs/funbat

The flag keeps products of cuBLAS out of CUDA graphs: several programs run side by side in threads there, get temporary
buffers at new addresses, and a graph with such products in it refuses to be rewritten. On one H100 (756 s over all
parts, 2026-11-26) it printed

  test RMSE on the surface                      0.0031
  chosen on a held-out tenth                    FunBaT-CP (0.371 there; FunBaT 0.381), on the test sets 0.392
  that over discrete CP, RMSE                   0.392 / 0.395   0.29 standard deviations over folds: does not hold
  that over P-Tucker, RMSE                      0.392 / 0.413   1.001: holds by a thousandth
  that over exact GP, RMSE                      0.392 / 0.301   10 above it: does not hold
  parallel scans against the loop               6e-16
  smoother, 10,000 steps, over a NumPy loop     184 x [177, 190] by doubling, 108 x by the associative scan
  the same over lax.scan, from 3,200 steps on   348 x and 164 x at least; a step takes that loop 0.15 ms, NumPy 0.03
  epoch time against observations, slope        0.087: holds, and says little

With ranks up to 5 and five folds the tensor models draw level: FunBaT 0.389, FunBaT-CP 0.392, discrete CP 0.395,
discrete Tucker 0.400, and 0.379 with the authors' extra prior. Continuous indices cost no accuracy here and buy none
that the folds could tell. A GP of the coordinates is far ahead of all of them; its memory is the square of the 9,563
observations, theirs is linear. An epoch takes 3.4 to 3.5 ms from 1,000 to 100,000 observations and 7.0 ms of 1,000,000:
below that it is launches, and between the last two sizes the slope is still only 0.32.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="FunBaT, functional Bayesian Tucker decomposition",
  family="tensors",
  link="https://arxiv.org/abs/2311.04829",
  does="decomposes a tensor whose indices are real numbers into Gaussian processes, one a mode",
)


CPU_METHODS = (
  *("mean", "FunBaT-CP", "FunBaT", "discrete CP", "discrete Tucker", "FunBaT-CP, one lengthscale"),
  *("CP-ALS", "P-Tucker", "exact GP"),
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, long chains), paper (its ranks and epochs)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="funbat",
      experiment="funbat",
      scale=scale,
      seed=0,
      methods=pick(test=("FunBaT-CP", "discrete CP"), cpu=CPU_METHODS, gpu=()),  # () is all of them
      surface=dict(epochs=pick(test=20, cpu=100)),
      data=dict(
        name="field",  # generated; or npz with files of data/<fold>/{tr_ind,tr_y,te_ind,te_y}, ndims/<mode>
        paths=(),
        few=pick(test=0, cpu=500),  # each file a second time with as few training entries, 0: not
        folds=pick(test=2, cpu=5),
        observations=pick(test=400, cpu=6000, gpu=20000, paper=20000),  # of the generated field
        levels=pick(test=(12, 14, 20), cpu=(100, 120, 400), gpu=(400, 500, 1500), paper=(400, 500, 1500)),
      ),
      funbat=dict(
        ranks=pick(test=(2,), cpu=(3,), gpu=(2, 3, 5), paper=(2, 3, 5, 7)),
        epochs=pick(test=6, cpu=60, paper=100),
        rounds=pick(test=2, cpu=5),
        starts=pick(test=1, cpu=2, gpu=4),
        kernel="matern12",
        lengthscale=0.01,  # of the variant with one for all modes: the share of their range that the authors take
        variances=pick(test=(5.0,), cpu=(1.0, 5.0)),
        damping=(0.3, 0.8, 0.5),
        scan=pick(test="seq", cpu="seq", gpu="doubling", paper="doubling"),
      ),
      # All folds and regularisations as one batch; on a CPU one after another, as its memory and cores are fewer.
      together=pick(test=False, cpu=False, gpu=True, paper=True),
      baselines=dict(
        rates=pick(test=(1e-3,), cpu=(1e-3, 1e-2), gpu=(1e-3, 3e-3, 1e-2, 3e-2)),
        lengthscales=pick(test=(0.01,), cpu=(0.01, 0.1, 1.0)),
        ridges=pick(test=(1.0,), cpu=(1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0)),
        sweeps=pick(test=3, cpu=20, gpu=30, paper=50),
        basis=pick(test=5, cpu=20, gpu=40, paper=40),
        mlp_steps=pick(test=50, cpu=3000, gpu=10000, paper=50000),
        inducing=pick(test=10, cpu=100, gpu=200, paper=200),
        gp_steps=pick(test=5, cpu=150, gpu=300),
        gp_points=pick(test=50, cpu=1000, gpu=2000, paper=5000),
        gp_limit=20000,  # no exact GP beyond this many observations: its memory is their square
      ),
      bench=dict(
        steps=pick(
          test=(6,),
          cpu=(256, 1024, 4096),
          gpu=(32, 320, 1000, 3200, 10000, 32000),
          paper=(32, 320, 1000, 3200, 10000, 32000, 100000),
        ),
        rank=3,
        repetitions=pick(test=2, cpu=5, gpu=20, paper=20),
        loop_steps=pick(test=100, cpu=20000, gpu=20000, paper=20000),  # steps a smoother is repeated for, at most
        loop_limit=32000,  # no sequential form beyond: a step takes a GPU about 0.1 ms
        numpy_limit=pick(test=6, cpu=4096, gpu=10000, paper=10000),
        observations=pick(
          test=(200,),
          cpu=(8000, 32000, 96000),
          gpu=(1000, 10000, 100000, 1000000),
          paper=(1000, 10000, 100000, 1000000),
        ),
      ),
    )
  )
