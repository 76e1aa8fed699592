r"""DaSLaM: does a small model that is rewarded for its sub-questions make larger, frozen ones better?

Paper (EMNLP 2023, https://arxiv.org/abs/2310.18338): LLaMA 13 B, tuned to ask, brings text-davinci-003 near GPT-4 on
questions of several steps, whatever the solver's size; its cells could not be verified. Here solvers of three sizes
are trained on chained arithmetic of at most two steps and then frozen; the decomposer is smaller than the middle one,
and is taught by noisy examples before it is rewarded.

  python -m experiments.run --config=configs/daslam.py:cpu --workdir=runs/daslam
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="DaSLaM",
  family="tasks",
  link="https://arxiv.org/abs/2310.18338",
  does="trains a small model by reward to ask the sub-questions that a frozen, larger one needs",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, three seeds), paper (larger and longer)."""
  pick = scales.picker(scale)

  def shape(depth: int, width: int, head_dim: int = 16) -> dict:
    heads = width // head_dim
    sizes = dict(depth=depth, width=width, q_heads=heads, kv_heads=heads, head_dim=head_dim, mlp_width=4 * width)
    # Lines are found by the token before them: without these parts of nanochat that takes thousands of steps to learn.
    return sizes | dict(mlp="relu2", embed_norm=True, qk_norm="after_rope", smear=True)

  return ml_collections.ConfigDict(
    dict(
      paper="daslam",
      experiment="daslam",
      scale=scale,
      seed=0,
      seeds=pick(cpu=1, gpu=3),
      problems=pick(
        cpu=dict(modulus=3, names=12, longest=5, beside=1),
        gpu=dict(modulus=7, names=26, longest=8, beside=3),
        paper=dict(modulus=31, names=26, longest=8, beside=3),
      ),
      dtype=pick(cpu="float32", gpu="bfloat16"),
      solvers=pick(
        test=dict(S=shape(1, 32), M=shape(1, 32)),
        cpu=dict(S=shape(3, 48), M=shape(3, 64), L=shape(3, 80)),
        gpu=dict(S=shape(3, 96, 32), M=shape(4, 128, 32), L=shape(6, 256, 32)),
        paper=dict(S=shape(4, 128, 32), M=shape(6, 256, 32), L=shape(8, 512, 32)),
      ),
      decomposer=pick(test=shape(1, 32), cpu=shape(3, 48), gpu=shape(3, 96, 32), paper=shape(4, 192, 32)),
      depths=dict(
        trained=pick(cpu=(2, 5), gpu=(2, 8)),
        judged=pick(test=(4, 5), cpu=(3, 4, 5), gpu=(3, 4, 5, 6, 7, 8)),
        claimed=4,
      ),
      least=3,  # sub-questions, or there are none
      count=pick(test=8, cpu=200, gpu=2000),  # questions a depth
      solving=dict(
        steps=pick(test=2, cpu=1600, gpu=8000, paper=20_000),
        batch=pick(test=8, cpu=32, gpu=512, paper=1024),
        rate=pick(cpu=5e-3, gpu=2e-3, paper=1e-3),
      ),
      teaching=dict(
        steps=pick(test=2, cpu=300, gpu=800, paper=4000),
        batch=pick(test=8, cpu=32, gpu=256, paper=512),
        rate=pick(cpu=3e-3, gpu=1e-3),
      ),
      ppo=dict(
        updates=pick(test=2, cpu=40, gpu=150, paper=600),
        batch=pick(test=8, cpu=64, gpu=256, paper=512),
        epochs=4,
        minibatches=pick(test=1, cpu=2, gpu=4),
        rate=pick(cpu=3e-4, gpu=1e-4),
        beta=0.01,
        target=4.0,
        last_blocks=0,  # train these alone, as the paper does; 0: all
        checkpoint_every=pick(test=1, cpu=20, gpu=75),
      ),
    )
  )
