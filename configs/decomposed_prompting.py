r"""Decomposed prompting: does a program over leaves go on to lengths at which one model that does it all breaks?

Paper (ICLR 2023, https://arxiv.org/abs/2210.02406): prompts for GPT-3; programs win by a margin that grows with the
length of lists and the number of words. Here the models are trained from nothing on generated tasks, equal in size, in
training tokens and in decoding; decomposers write the published programs. Questions of several hops over generated
worlds are answered by handlers for a hop, for two, and by a chain of thought. A pretrained model of 135 M parameters is
prompted too.

  python -m experiments.run --config=configs/decomposed_prompting.py:cpu --workdir=runs/decomposed_prompting

--config.data.path=DIR adds test sets (JSON as in the authors' repository) to what symbolic leaves answer. Scale cpu:
some ten minutes on two cores. Scale gpu: three seeds of 5 M parameters. What was found is in
results/decomposed_prompting.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Decomposed prompting",
  family="tasks",
  link="https://arxiv.org/abs/2210.02406",
  does="answers a question by a small program whose steps go to a library of handlers, itself among them",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, three seeds), paper (larger and longer)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="decomposed_prompting",
      experiment="decomposed_prompting",
      scale=scale,
      seed=0,
      data=dict(path=""),  # a folder of test sets, or none
      dtype=pick(cpu="float32", gpu="bfloat16"),
      words=dict(letters=pick(cpu=(2, 3), gpu=(2, 7)), count=pick(test=50, cpu=500, gpu=5000)),
      shape=dict(
        depth=pick(test=1, cpu=3, gpu=6),
        width=pick(test=32, cpu=64, gpu=256),
        q_heads=pick(cpu=4, gpu=8),
        kv_heads=pick(cpu=4, gpu=8),
        head_dim=pick(test=8, cpu=16, gpu=32),
        mlp_width=pick(test=64, cpu=256, gpu=1024),
        mlp="relu2",
        qk_norm="before_rope",
      ),
      train=dict(
        steps=pick(test=2, cpu=700, gpu=800, paper=2000),
        batch=pick(test=8, cpu=12, gpu=128),
        length=pick(test=48, cpu=128, gpu=512),
        seeds=pick(cpu=1, gpu=3),
        scale=pick(cpu=1.5, gpu=1.0),
        warmup=20,
        warmdown=0.4,
        checkpoint_every=pick(test=100, cpu=200, gpu=1000),
      ),
      eval=dict(
        lists=pick(test=(4,), cpu=(4, 8, 16), gpu=(4, 6, 8, 10, 16, 32)),
        words=pick(test=(2,), cpu=(3, 5, 8), gpu=(3, 4, 5, 8, 12)),
        count=pick(test=2, cpu=40, gpu=500),
        batch=pick(test=4, cpu=64, gpu=512),
        tokens=pick(test=16, cpu=400, gpu=2000),  # at most, of an answer
        growth=(2, 2, 8),  # of leaves, direct, chain: at most so many times the prompt's length
      ),
      worlds=dict(
        entities=pick(cpu=20, gpu=300),
        letters=pick(cpu=1, gpu=2),  # of a name
        facts=pick(cpu=6, gpu=12),  # told with a question
        asked=6,  # questions after the same facts, in training
        hops=pick(test=(2, 3), cpu=(2, 3, 4)),
      ),
      retrieval=dict(documents=pick(test=40, cpu=5000), questions=pick(test=5, cpu=500)),
      pretrained=dict(model="smollm2", count=pick(test=0, cpu=4, gpu=100), lists=4, words=2, tokens=48),
    )
  )
