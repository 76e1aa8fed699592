r"""FunBaT: do factors that are functions of continuous indices predict better than discrete ones, and at what cost?

Paper (https://arxiv.org/abs/2311.04829): lower errors than discrete tensor models, at linear cost.

  python -m experiments.run --config=configs/funbat.py:cpu --config.data.name=npz \
      --config.data.paths="('beijing_pm25.npz','us_temp.npz')" --workdir=runs/funbat

Without files the tensors are generated. Beijing PM2.5 has 428 x 501 x 1461 bins and 9,563 training entries a fold, US
temperatures 15 x 95 x 267 and 44,755; each runs again with 500 of them. The exact GP of all entries takes most of a
run: --config.baselines.gp_limit=1000 keeps it to the 500.

Scale gpu adds rank 5, eight starts and all other baselines, in parts of under four minutes on one H100; take
XLA_FLAGS=--xla_gpu_enable_command_buffer=FUSION, as programs run side by side in threads there (docs/measuring.md).
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
        few=pick(test=(), cpu=(500,)),  # each file again with as few training entries
        folds=pick(test=2, cpu=5),
        observations=pick(test=400, cpu=6000, gpu=20000, paper=20000),  # of the generated field
        levels=pick(test=(12, 14, 20), cpu=(100, 120, 400), gpu=(400, 500, 1500), paper=(400, 500, 1500)),
      ),
      funbat=dict(
        ranks=pick(test=(2,), cpu=(3,), gpu=(3, 5), paper=(2, 3, 5, 7)),
        epochs=pick(test=6, cpu=60, paper=100),
        rounds=pick(test=2, cpu=5),
        starts=pick(test=1, cpu=2, gpu=4, paper=8),
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
