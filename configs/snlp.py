r"""SNLP on nanochat: does one Newton step over most layers keep the model, and what does training for it cost?

Structured Newton Layer Parallelism, arXiv 2605.17842: 2.58x at +17 % perplexity (0.5 B, 12 chunks of 2 layers, K = 1,
eager PyTorch, 2048 tokens). Here the same pair of models, trained without and with the regulariser, is run with most of
its layers at once, against the compiled network in sequence.

  python -m experiments.run --config=configs/snlp.py:cpu --workdir=runs/snlp
  python -m experiments.run --config=configs/snlp.py:gpu --workdir=runs/snlp_gpu \
      --config.data.name=local_text --config.data.path=books

Scale cpu evaluates a small pair that ships and takes 3 minutes on two cores; --config.pair= trains one instead. Scale
gpu (32 layers of width 256, 79 M tokens of books, an hour on one H100 in parts of under ten minutes) printed
(2026-11-26), plain | regularised:

  perplexity added, 24 of 32 layers, K = 1 / 2 / 4   393 / 52 / 2.8 %   |  2.7 / 0.48 / 0.32 %
  perplexity of the network in sequence              47.4               |  48.7
  speed of one decoding step, K = 1 / 2              2.30 / 1.76 x      (2.5 x is not reached)
  self-speculation                                   1.55 x
  12 layers of width 384, trained as long            5 % better than 24 layers at K = 2, and as fast

What else was tried is in docs/log.md. With --config.model=hf:DIR the method runs on that checkpoint as it is.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="SNLP, layer parallelism by structured Newton steps",
  family="depth",
  link="https://arxiv.org/abs/2605.17842",
  does="runs a transformer's last n layers at once, corrected by Newton steps",
)

PARTS = ("quality", "speculation", "speed", "memory")
ALL = (*PARTS, "hcn", "competitors", "finetuning")
SETTINGS = {
  "test": ("n3 K1", "n2 K2", "n2 K1 F2"),
  "cpu": (
    *("n4 K1", "n8 K1", "n8 K2", "n12 K1", "n12 K2", "n12 K4"),
    *("n4 K4", "n12 K2 jacobi", "n12 K2 F2"),
  ),
  "gpu": (
    *(f"n{n} K{k}" for n in (8, 16, 24) for k in (1, 2, 4, 8)),
    *("n24 K1 batch_fwd", "n24 K2 jacobi", "n24 K2 diagonal"),
    *("n24 K1 F2", "n24 K2 F2", "n12 K1 F12", "n24 K1 G12"),
  ),
}
SLICED = {"test": ("n3 K1",), "cpu": ("n12 K1",), "gpu": ("n24 K1", "n24 K2", "n24 K2 F2")}
HCN = ("n8 K1", "n8 K4", "n16 K1", "n16 K2", "n16 K4", "n24 K2")
CACHED = {"test": ("n3 K2",), "cpu": ("n12 K1",), "gpu": ("n24 K1", "n24 K2")}


def bench(scale: str) -> dict:
  """Cases of the speed part: the trained model itself on a CPU; the paper's 0.5 B shapes and d20 x 1280 on a GPU."""
  decode = lambda shape, context, settings, batch=1, **more: (
    dict(shape=shape, kind="decode", context=context, room=600, batch=batch, settings=settings) | more
  )
  forward = lambda shape, tokens, settings, batch=1, **more: (
    dict(shape=shape, kind="forward", tokens=tokens, batch=batch, settings=settings) | more
  )
  if scale != "gpu":
    few = ("n3 K1",) if scale == "test" else ("n8 K1", "n12 K1", "n12 K2", "n12 K1 F2")
    length = 16 if scale == "test" else 64
    most = "n3 K1" if scale == "test" else "n12 K1 F2"
    cases = [forward("model", length, few)]
    cases += [decode("model", length, few)] if scale == "cpu" else []
    first = f"model, forward, {length} tokens, batch 1"
    says = f"How many times as fast as in sequence {length} tokens are read, most layers in one step"
    claims = [dict(case=first, setting=most, threshold=1.0, paper=2.58, says=says)]
    repetitions = 3 if scale == "test" else 10
    common = dict(shapes={}, dtype="float32", repetitions=repetitions)
    return dict(cases=cases, claims=claims, shown=few, **common)
  grid = tuple(f"n{n} K{k}" for n in (8, 12, 16, 24) for k in (1, 2, 4))
  fused = ("n24 K1 F2", "n24 K2 F2", "n24 K2 F6", "n12 K1 F12")
  table = ("n8 K4", "n12 K1", "n24 K1", "n24 K2", "n24 K4", "n24 K1 F2", "n24 K2 F2", "n12 K1 F12")
  few = ("n24 K1", "n24 K2", "n24 K1 F2")
  main = "d32_width640, decode, context 2048, batch 1"
  cases = [
    decode("d32_width640", 2048, grid + fused, kernels=("unrolled", "n24 K1", "n24 K2", "n24 K1 F2")),
    decode("d32_width640", 128, table),
    decode("d32_width640", 2048, few, batch=8),
    *(forward("d32_width640", t, table) for t in (64, 128)),
    # From 512 tokens on cuBLAS is faster than the Triton products XLA would choose (throughput.py).
    *(forward("d32_width640", t, table, compiler={"xla_gpu_enable_triton_gemm": False}) for t in (512, 2048)),
    forward("d32_width640", 128, few, batch=8),
    decode("d20_width1280", 2048, ("n8 K1", "n12 K1", "n16 K1", "n16 K2", "n16 K1 F2")),
    forward("d20_width1280", 128, ("n16 K1", "n16 K2", "n16 K1 F2")),
    decode("d32_width640_mhc", 2048, ("n16 K1 streams", "n16 K4 streams", "n24 K2 streams", "n24 K2")),
    forward("d32_width640_mhc", 128, ("n16 K1 streams", "n16 K4 streams")),
  ]
  plain = dict(depth=32, aspect_ratio=20, x0=False, value_embeddings=False)
  return dict(
    shapes={
      "d32_width640": plain,
      "d20_width1280": dict(depth=20),
      "d32_width640_mhc": plain | dict(value_embeddings=True, hyper=dict(streams=4)),
    },
    dtype="bfloat16",
    cases=cases,
    claims=[
      dict(
        case=main,
        setting="n24 K1 F2",
        threshold=2.5,
        paper=2.58,
        says="How many times as fast as in sequence one token is decoded, the last 24 of 32 layers in one step",
      ),
      dict(
        case="d32_width640, forward, 2048 tokens, batch 1",
        setting="n24 K2 F2",
        threshold=1.0,
        paper=2.09,
        says="How many times as fast as in sequence 2048 tokens are read, the last 24 of 32 layers in two steps",
      ),
    ],
    shown=("n16 K1", "n24 K1", "n24 K2", "n24 K1 F2", "n24 K2 F2", "n16 K1 streams"),
    repetitions=12,
  )


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (a minute), cpu (2 cores, 8 to 9 minutes), gpu (one GPU), paper (0.5B, four GPUs)."""
  pick = scales.picker(scale)
  sizes = "gpu" if scale == "paper" else scale if scale in SETTINGS else "cpu"
  return ml_collections.ConfigDict(
    dict(
      paper="snlp",
      experiment="snlp",
      scale=scale,
      seed=0,
      # Measured once a workdir, each in a file of its own.
      parts=pick(test=(*PARTS[:3], "convergence"), cpu=("quality", "convergence", "speculation"), gpu=ALL),
      pair=pick(test="", cpu="snlp_pair", gpu=""),  # a pair trained before, evaluated instead of training one
      model="nanochat",  # or hf:DIR or smollm2, a checkpoint to run as it is
      shape=dict(
        depth=pick(test=4, cpu=16, gpu=32, paper=32),
        aspect_ratio=pick(test=8, cpu=4, gpu=8, paper=20),
        head_dim=pick(test=16, cpu=32, gpu=64, paper=128),
        window_pattern="SSSL",
        x0=False,
        value_embeddings=False,
      ),
      data=dict(
        name="stdlib_code",  # or local_text with a path, or a tfds name
        path="",
        vocab_size=pick(test=320, cpu=1024, gpu=8192, paper=32768),
      ),
      train=dict(
        steps=pick(test=6, cpu=100, gpu=1200, paper=4800),
        batch=pick(test=4, cpu=8, gpu=128, paper=512),
        length=pick(test=32, cpu=256, gpu=512, paper=2048),
        accumulate=pick(cpu=1, gpu=2, paper=8),
        scale=pick(test=1.0, cpu=1.0),
        recall=0.0,  # share of rows that are generated recall tasks
        warmdown=0.65,
        warmup=pick(cpu=20, gpu=40, paper=40),
        dtype=pick(test="float32", cpu="float32", gpu="bfloat16", paper="bfloat16"),
        remat=pick(cpu="none", gpu="dots", paper="full"),
        checkpoint_every=pick(test=2, cpu=100, gpu=400),
      ),
      reg=dict(
        weight=0.5,
        stride=pick(test=1, cpu=3, gpu=6, paper=6),
        layers=pick(test=(2, 3), cpu=(4, 8, 12), gpu=(8, 16, 24), paper=(8, 16, 24)),
        surrogate="identity",
        detach_target=False,
        detach_input=False,
        sampled=False,
      ),
      snlp=dict(settings=SETTINGS[sizes], sliced=SLICED[sizes], cached=CACHED[sizes]),
      convergence=dict(  # on a few rows: the exact Jacobian takes as many evaluations a step as there are layers
        surrogates=("jacobi", "identity", "diagonal", "exact"),
        layers=pick(test=3, cpu=12, gpu=24, paper=24),
        iterations=pick(test=2, cpu=4),
        rows=pick(test=2, cpu=2),
      ),
      hcn=dict(  # three models with hyper-connections, of scale gpu and on
        settings=pick(test=("n3 K1",), cpu=("n12 K1",), gpu=HCN, paper=HCN),
        steps=pick(test=6, cpu=100, gpu=620, paper=4800),  # fewer than the other pair's at gpu, for time
        reg=dict(
          weight=0.5,
          stride=0,
          layers=pick(test=(2, 3), cpu=(4, 8, 12), gpu=(8, 16, 24), paper=(8, 16, 24)),
          surrogate="streams",
          detach_target=True,  # the third model of this part is trained without
          detach_input=False,
          sampled=False,
        ),
      ),
      competitors=dict(  # trained beside, of scale gpu and on
        settings=pick(test=("n3 K1",), cpu=("n12 K1",), gpu=("n24 K1", "n24 K2", "n24 K1 F2")),
        shapes=pick(
          test=dict(d2=dict(depth=2, aspect_ratio=16)),
          cpu=dict(d6=dict(depth=6, aspect_ratio=16)),
          gpu=dict(
            d14_width256=dict(depth=14, aspect_ratio=18),
            d12_width384=dict(depth=12, aspect_ratio=32),
            d18_width256_parallel=dict(depth=18, aspect_ratio=14, parallel_sublayers=True),
          ),
        ),
        context=pick(test=16, cpu=64, gpu=512),
        repetitions=pick(test=2, cpu=10),
      ),
      finetuning=dict(  # on recall tasks, of scale gpu and on
        setting=pick(test="n3 K1", cpu="n12 K1", gpu="n24 K2"),
        row=pick(test=160, cpu=256, gpu=512),
        batch=pick(test=2, cpu=8, gpu=64),
        steps=pick(test=2, cpu=100, gpu=300),
        questions=pick(test=2, cpu=64, gpu=512),
        scale=0.3,
        warmup=10,
      ),
      speculation=dict(
        settings=pick(test=("n2 K1",), cpu=("n8 K1",), gpu=("n24 K1", "n24 K2")),
        drafts=pick(test=(2,), cpu=(4,), gpu=(2, 4, 8), paper=(2, 4, 8)),
        prompt=pick(test=8, cpu=64),
        prompts=pick(test=2, cpu=4),
        tokens=pick(test=8, cpu=64, gpu=256, paper=256),
        repetitions=pick(test=2, cpu=3, gpu=5, paper=10),
      ),
      eval=dict(
        split="validation",
        length=pick(test=32, cpu=256, gpu=512, paper=2048),
        slice=pick(test=16, cpu=64, gpu=128, paper=128),
        batch=pick(test=4, cpu=8, gpu=16, paper=16),
        tokens=pick(test=512, cpu=8192, gpu=500_000, paper=1_000_000),
      ),
      bench=bench(sizes),
      mesh=dict(data=-1, fsdp=1, tensor=1),
    )
  )
