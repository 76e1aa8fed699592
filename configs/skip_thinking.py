r"""Skip-thinking: do students learn more from one chunk of a rationale at a time, and which chunks can they do without?

Paper (EMNLP 2025, https://arxiv.org/abs/2505.18642): GPT-2 and T5 taught by text-davinci-002 on seven tasks; chunk-wise
training with searched cuts beats equal cuts, both beat whole rationales; students then leave chunks out at the same
accuracy, but for last letters. Its tables could not be obtained. Here a program is the teacher, sentences that do not
reason are among its own, and students are trained from nothing.

  python -m experiments.run --config=configs/skip_thinking.py:cpu --workdir=runs/skip_thinking
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Skip-Thinking",
  family="sequence",
  link="https://arxiv.org/abs/2505.18642",
  does="teaches rationales a chunk at a time, then to leave out the chunks that the answer does not need",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, minutes), gpu (one GPU, two seeds), paper."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="skip_thinking",
      experiment="skip_thinking",
      scale=scale,
      seed=0,
      seeds=pick(cpu=1, gpu=2, paper=3),
      tasks=pick(test=("coin", "letters"), cpu=("letters", "coin"), gpu=("letters", "coin", "swaps", "sums", "dates")),
      sizes=dict(  # least and most words, people, swaps, operations of a question
        letters=pick(cpu=(2, 3), gpu=(4, 6)),
        coin=pick(cpu=(2, 4), gpu=(3, 6)),
        swaps=pick(cpu=(2, 3), gpu=(3, 6)),
        sums=pick(cpu=(2, 3), gpu=(2, 4)),
        dates=(1, 1),
      ),
      filler=0.6,  # share of sentences that do not reason
      chunks=4,
      count=dict(  # samples a task
        first=pick(test=20, cpu=1000, gpu=4000),
        second=pick(test=20, cpu=200, gpu=1000),
        test=pick(test=4, cpu=100, gpu=500),
      ),
      length=pick(cpu=112, gpu=256),
      dtype=pick(cpu="float32", gpu="bfloat16"),
      shape=dict(
        depth=pick(test=1, cpu=2, gpu=6),
        width=pick(test=32, cpu=64, gpu=256),
        q_heads=pick(cpu=4, gpu=8),
        kv_heads=pick(cpu=4, gpu=8),
        head_dim=pick(test=8, cpu=16, gpu=32),
        mlp_width=pick(test=64, cpu=256, gpu=1024),
      ),
      train=dict(
        steps=pick(test=4, cpu=600, gpu=4800, paper=6000),
        more=pick(test=4, cpu=150, gpu=1200, paper=1500),
        slower=0.3,  # rate of what is trained on, over the rate before
        batch=pick(test=40, cpu=32, gpu=64),
        rates=pick(test=(1e-3,), cpu=(1e-3, 3e-3), paper=(3e-4, 1e-3, 3e-3)),
      ),
      search=dict(rounds=pick(test=1, cpu=3, gpu=5), threshold=0.02, score="mean_of_means"),
      probe="rollout",
      full=0.5,  # of skip-thinking's samples, those that keep their whole rationale
      draws=pick(test=1, cpu=2, gpu=4),  # rationales of its own a student may choose the shortest of
      diagnosed=pick(test=4, cpu=128),  # samples
      eval=dict(
        batch=pick(test=8, cpu=100, gpu=500), tokens=pick(test=16, cpu=96, gpu=230), timed=pick(test=2, cpu=20)
      ),
    )
  )
