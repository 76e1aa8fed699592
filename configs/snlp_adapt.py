r"""Adapting a pretrained checkpoint to SNLP: most layers at once on a model one has, after minutes of training.

SNLP, arXiv 2605.17842, trains a network for it from the start and says that pretrained ones break. Here the untouched
network is distilled through the solver, on given text and on text it writes itself, and compared with the paper's
regulariser in continued training. The folder WORKDIR/adapted is an ordinary checkpoint.

  python -m experiments.run --config=configs/snlp_adapt.py:gpu --config.model=smollm2 --workdir=runs/snlp_adapt \
      --config.data.path=books --config.unseen.path=wiki

Scale cpu (`base`, 4 of 6 layers in two groups before the last one, 80 steps of 512 tokens, 530 processor-seconds)
printed (2026-11-29), in % over the perplexity of the untouched network in sequence, held-out books | passages of an
encyclopaedia:

  untouched 39 | 6.6     distilled 21.0 | 7.1     regularised 41.8 | 8.5     continued 44.6 | 10.3
  in sequence            distilled  1.3 | -2.6    regularised  7.1 | -4.5    continued  8.7 | 4.6

What else was tried is in docs/log.md.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Adapting a checkpoint to SNLP",
  family="depth",
  link="https://arxiv.org/abs/2605.17842",
  does="makes a pretrained transformer's last n layers run at once, by distilling it through the solver",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (2 cores, `base`), gpu (smollm2, one GPU), paper (a billion tokens)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="snlp_adapt",
      experiment="snlp_adapt",
      scale=scale,
      seed=0,
      model=pick(cpu="base", gpu="smollm2"),  # what hub.load takes, or hf:DIR
      # The rows of a batch are dealt to them; the first is what the claims are about.
      settings=pick(test=("n4 K1 G2 T1", "n4 K2 T1"), cpu=("n4 K1 G2 T1",), gpu=("n16 K1 G4 T2",)),
      measured=pick(
        cpu=("n4 K1 G2 T1", "n4 K1 T1", "n4 K2 T1"),
        gpu=("n16 K1 G4 T2", "n16 K1 G8 T2", "n16 K1 T2", "n16 K2 T2", "n16 K4 T2"),
      ),
      depth=pick(cpu=6, gpu=30),  # that settings are written for; other models get the same shares of theirs
      methods=("distilled", "regularised", "continued"),
      # choices: of the evaluation harness, pip install 'jaxlab[eval]'
      parts=pick(cpu=("speed", "speculation"), paper=("speed", "speculation", "choices")),
      parameters="suffix",  # or "all", or "lora"
      rank=32,  # of lora
      sequential_weight=1.0,
      sequential_every=pick(test=2, cpu=1, gpu=2),  # of so many rows one is also run in sequence
      shuffled=pick(test=0.25, cpu=0.0, gpu=0.2),  # of the rows, in distilling: tokens without order
      data=dict(name="stdlib_code", path=""),  # a path to local text, or a tfds name
      unseen=dict(name="local_text", path="docs", split="train"),  # only measured on
      more=dict(name="stdlib_code", path="", share=pick(cpu=0.0, gpu=0.15)),  # another text to train on
      own=dict(  # rows the untouched model writes
        share=pick(cpu=0.25, gpu=0.5),
        rows=pick(test=8, cpu=64, gpu=24_576, paper=65_536),
        batch=pick(test=4, cpu=64, gpu=2048),
        temperature=1.0,
      ),
      train=dict(
        steps=pick(test=4, cpu=80, gpu=6500, paper=60_000),
        batch=pick(test=16, cpu=4, gpu=32),  # the rows of each setting should divide over devices
        length=pick(test=32, cpu=128, gpu=512),
        accumulate=1,
        rate=3e-4,
        warmup=pick(test=1, cpu=10, gpu=100),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        remat="none",  # "dots" or "full" where memory is short
        checkpoint_every=pick(test=2, cpu=40, gpu=1000),
      ),
      reg=dict(  # of "regularised", with the layers of the settings
        weight=0.5,
        stride=pick(cpu=1, gpu=4),
        layers=(),
        surrogate="identity",
        detach_target=False,
        detach_input=False,
        sampled=False,
      ),
      recall=dict(tasks=("needle",), questions=pick(test=1, cpu=16, gpu=256)),
      choices=dict(
        questions=pick(test=4, cpu=64, gpu=512), context=pick(test=16, cpu=64), continuation=pick(test=4, cpu=16)
      ),
      bench=dict(
        shape="model",
        kind="decode",
        context=pick(test=16, cpu=128, gpu=512),
        room=pick(test=64, cpu=600),
        batch=1,
        repetitions=pick(test=2, cpu=5, gpu=20),
      ),
      speculation=dict(
        settings=pick(cpu=("n4 K1 G2 T1",), gpu=("n16 K1 G4 T2",)),
        drafts=(4,),
        prompt=pick(test=8, cpu=32, gpu=64),
        prompts=pick(test=1, cpu=2, gpu=4),
        tokens=pick(test=8, cpu=32, gpu=256),
        repetitions=pick(test=2, cpu=3, gpu=5),
      ),
      eval=dict(
        split="validation",
        length=pick(test=160, cpu=256, gpu=512),
        batch=pick(test=2, cpu=8, gpu=16),
        tokens=pick(test=512, cpu=4096, gpu=131_072),
      ),
      save_dtype="bfloat16",
      mesh=dict(data=-1),
    )
  )
