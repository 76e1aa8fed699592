r"""MAKER: does a task of a million dependent steps go without one error if a small model votes on every step?

Paper (2025, https://arxiv.org/abs/2511.09030): Towers of Hanoi with 20 disks, 1,048,575 steps by gpt-4.1-mini without
an error, 3 votes ahead. Here the model is a decoder trained from nothing on single steps and stopped early, so that
its error rate is known, and every run is made several times.

  python -m experiments.run --config=configs/maker.py:cpu --workdir=runs/maker

Scale cpu: 6 disks, 63 steps, some six minutes on two cores. Scale gpu: 20 disks, 1,048,575 steps, ten runs at the
margin, 65,536 samples at once; results/maker/gpu.json has three, by the overrides in its command.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="MAKER, a million steps without an error",
  family="tasks",
  link="https://arxiv.org/abs/2511.09030",
  does="cuts a task into its smallest steps and decides each by votes until one answer is k ahead",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, 63 steps), gpu (one GPU, 1,048,575 steps), paper (more runs)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="maker",
      experiment="maker",
      scale=scale,
      seed=0,
      disks=pick(test=4, cpu=6, gpu=20),
      names=pick(test=6, cpu=8, gpu=24),  # disks can be called 1 .. names
      target=0.95,
      dtype=pick(cpu="float32", gpu="bfloat16"),
      shape=dict(
        depth=pick(test=1, cpu=2, gpu=4),
        width=pick(test=32, cpu=64, gpu=192),
        q_heads=4,
        kv_heads=4,
        head_dim=pick(test=8, cpu=16, gpu=48),
        mlp_width=pick(test=64, cpu=256, gpu=768),
        mlp="relu2",
        qk_norm="before_rope",
      ),
      train=dict(
        stages=pick(test=(4, 6), cpu=(400, 500, 600), gpu=(500, 1000, 1500)),  # steps after which a model is kept
        batch=pick(test=16, cpu=64, gpu=1024),
        irregular=0.1,
        rare=pick(cpu=0.0, gpu=0.25),  # of the states, those of any disk's moves; of 6 disks none is rare
        renamed="pegs and disks",
        scale=pick(test=1.5, cpu=1.5, gpu=1.0),
        warmup=pick(test=2, cpu=20),
        warmdown=0.3,
        checkpoint_every=pick(test=100, cpu=200, gpu=500),
      ),
      main=pick(test=6, cpu=600, gpu=1000),  # the stage whose runs are counted
      rates=dict(
        steps=pick(test=15, cpu=63, gpu=16_384),
        flat=pick(test=16, cpu=512, gpu=4096),
        draws=pick(test=2, cpu=32, gpu=8),
        batch=pick(test=16, cpu=512, gpu=16_384),
      ),
      seeds=pick(test=2, cpu=100, gpu=10),
      less_seeds=pick(test=1, cpu=100, gpu=4),  # at one vote less
      few_seeds=pick(test=1, cpu=50, gpu=1),  # of the rest of the curve, of rivals, other schemes and stages
      curve=dict(beyond=pick(cpu=1, gpu=0, paper=1), below=pick(test=0, cpu=20, gpu=1, paper=2), most=200),
      agent_steps=pick(test=(1, 2), cpu=(1, 2, 4), gpu=(1, 2, 4)),
      lengths=pick(test=(3, 4), cpu=(3, 4, 5, 6), gpu=(8, 12, 16, 20), paper=(8, 10, 12, 14, 16, 18, 20)),
      width=pick(test=16, cpu=256, gpu=65_536),
      most_samples=pick(test=4, cpu=500, gpu=200),
      flags=dict(
        stage=pick(test=4, cpu=500, gpu=1000),
        rambling=0.2,
        steps=pick(test=15, cpu=1000, gpu=20_000),
        width=pick(test=16, cpu=256, gpu=8192),
      ),
      multiplication=dict(
        digits=pick(test=(2,), cpu=(5, 6, 10)), count=pick(test=3, cpu=200), votes=(1, 2, 3), eps=0.05, depth=5
      ),
      loop_steps=pick(cpu=0, gpu=200),  # of the sequential run that speed is compared with; 0: no speed
    )
  )
