r"""SNLP on nanochat: does one Newton step over most layers keep the model, and what does training for it cost?

Paper (arXiv 2605.17842): 2.58x at +17 % perplexity (0.5 B, 12 chunks of 2 layers, K = 1, eager PyTorch, 2048 tokens);
its first version claimed 2.3x with perplexity 6.1 % better on 128-token slices. Here: the same pair of models without
and with the regulariser, run with 3, 6 and 9 (cpu) of their layers in parallel, against the compiled network.

  python -m experiments.run --config=configs/snlp.py:cpu --workdir=runs/snlp

Took 8 to 9 min on 2 CPU cores (12 layers of width 96, 0.2 M tokens of Python's standard library) and printed
(2026-11-26):
  perplexity lost, n = 9 of 12, K = 1, regularised     0.06 %   (plain model 0.14 %)
  trace error of the last layer over the plain one's   0.45     (0.19 after twice the training)
  sequential perplexity changed by the regulariser     +1.0 %; on slices without BOS +0.9 %: the first version's gain is
                                                       not there; -0.3 % and +0.4 % after twice the training
  memory of a training step, regularised over plain    2.3 x: nothing is recomputed at this scale
  error of the last state after 0, 1, 2, 3 steps       A = I 9e-2, 6e-3, 2e-4, 6e-6; exact Newton 9e-2, 3e-4, 1e-7;
                                                       Jacobi 9e-2, 8e-2, 7e-2, 7e-2 (plain model)
  speed-up, 8 layers as 4 wide ones, K = 1             0.90 x of a forward of 64 tokens: two cores have no room for
                                                       parallel layers
  self-speculation over sequential generation          0.68 x, the same tokens
So small and so briefly trained a network is nearly additive in its layers; what it shows is the regulariser at work.

At scale gpu the pair has 32 layers of width 256 and reads 79 M tokens of books (1.6 times each; 2026-11-26, parts of
some commits on H100s, an hour one after the other):

  python -m experiments.run --config=configs/snlp.py:gpu --workdir=runs/snlp_h200 \
      --config.data.name=local_text --config.data.path=books

printed 27 of 40 claims that hold. This network is not additive, and the regulariser decides. Perplexity lost against
the same model in sequence, plain | regularised:
  n = 24 of 32, K = 1 / 2 / 4                393 / 52 / 2.8 %    |  2.7 / 0.48 / 0.32 %
  n = 16, K = 1 / 2                          57 / 6.8 %          |  0.49 / 0.07 %
  n = 24 as 12 wide layers of 2, K = 1 / 2   195 / 37 %          |  3.4 / 0.86 %
  n = 24, K = 1, cached decoding             233 % (keys of the last iteration: 361 %)   |  1.2 % (1.6 %)
  early exit before the last 24              1500 %              |  143 %
  sequential perplexity                      47.4                |  48.7; on slices without BOS 58.5 | 59.4
So the first version's claim, that perplexity itself improves by 4.7 to 23.4 %, does not hold: it is 2.6 % worse (1.5 %
on slices), much as the second version reports (up to 2.4 %). Trained on half of the books, read 3.2 times, the
regularised model had been 1.6 % better: protection against overfitting. Training steps take 2.1 times as long and
1.46 times the temporary memory. More Newton steps bring the regularised model little: at K = 8 it still loses 0.28 %,
the plain one 0.001 %. The norms of its Jacobians are the larger ones (2.0 to 10.8 against 1.7 to 2.7), so what the
regulariser makes small is the error of the first step, not of every step.
  Self-speculation, 256 tokens: 1.55 x sequential generation (regularised, n24 K1, 8 drafts, 91 % taken); plain 1.07 x.
    In float32 all tokens are the sequential ones. In bfloat16 61 to 81 % are: the texts part where two logits nearly
    tie. Scored in float32, speculative tokens miss the argmax by 0.33 at most (0.0012 on average), sequential
    generation's own by 0.20 (0.0010); of the plain model 0.033 and 0.012.
  Fine-tuning on recall (answers right at n24 K2): plain model, ordinary tuning 30 %, through SNLP 99 %; regularised
    100 % either way.
  Other networks trained on the same tokens, by one decoding step: 14 layers of 256 (2.0 x, 49.8) and 18 with parallel
    sublayers (1.6 x, 49.3) lose to SNLP n24 K2 (2.5 x, 48.9); 12 layers of width 384 (2.3 x, 46.4) beat it by 5 %.
  Hyper-connections (620 steps): without a regulariser HCN loses 41 % at n24 K2, A = I 59 %; with few layers the mixing
    is so near I that they are equal. With the paper's regulariser, which keeps the gradient from the targets, HCN loses
    0.6 %, but the network itself is 34 % worse (74.5 against 55.7; the paper's 2.4 %). With the gradient it is 0.4 %
    better than without regulariser, and HCN loses 0.2 % where A = I loses 6.3 %. At scale cpu with
    --config.parts="('hcn',)" the perplexity of 153 becomes 395 by the paper's recipe, 359 at a fifth of the weight
    (hcn.reg.weight=0.1), and 159 if no gradient reaches h_S either (hcn.reg.detach_input=True): what does harm is h_S
    following a target that moves on with it.
Speed on random weights over the compiled sequential step, K = 1 / 2 / 4 with n = 24 of 32 layers of width 640:
  one token, context 2048 (0.83 ms)   2.30 / 1.76 / 1.15 x; 12 wide layers of 2: 2.29 / 1.79 x   (2.5 x is not reached)
  one token, context 128 (0.86 ms)    2.50 / 1.97 / 1.30 x
  64, 128, 512 tokens                 2.13 / 1.53 x, 2.20 / 1.60 x, 1.60 / 1.04 x
  2048 tokens (2.90 ms)               1.06 / 0.63 x: nothing waits there, and every layer costs its arithmetic
  8 sequences, one token (1.10 ms)    1.80 / 1.24 x
  d20 x 1280, n = 16, one token       1.66 / 1.07 x
  four streams, n24 K2 (0.86 ms)      1.59 x; n16 K1 1.49 x
A step launches 364 kernels in sequence, 109 at K = 1, which is 2.4 times its bytes over the bandwidth (1.3 asked). Of
its 0.36 ms the eight layers in sequence take 0.19: if the other 24 and the head took no longer than their bytes, 0.115,
it would be 2.4 to 2.7 x. The sequential step varies with the host that launches it, 0.73 to 0.83 ms on three machines,
the other two do not: on the fastest the ratios were 2.05 and 1.55.
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
    *(f"n{n} K{k}" for n in (3, 6, 9) for k in (1, 2, 4) if k <= n),
    *("n3 K3", "n9 K1 batch_fwd", "n9 K2 jacobi", "n9 K2 diagonal", "n8 K1 F2", "n8 K1 G4"),
  ),
  "gpu": (
    *(f"n{n} K{k}" for n in (8, 16, 24) for k in (1, 2, 4, 8)),
    *("n24 K1 batch_fwd", "n24 K2 jacobi", "n24 K2 diagonal"),
    *("n24 K1 F2", "n24 K2 F2", "n12 K1 F12", "n24 K1 G12"),
  ),
}
SLICED = {"test": ("n3 K1",), "cpu": ("n9 K1", "n9 K2"), "gpu": ("n24 K1", "n24 K2", "n24 K2 F2")}
HCN = ("n8 K1", "n8 K4", "n16 K1", "n16 K2", "n16 K4", "n24 K2")
CACHED = {"test": ("n3 K2",), "cpu": ("n9 K1", "n9 K2"), "gpu": ("n24 K1", "n24 K2")}


def bench(scale: str) -> dict:
  """Cases of the speed part: the trained model itself on a CPU; the paper's 0.5 B shapes and d20 x 1280 on a GPU."""
  decode = lambda shape, context, settings, batch=1, **more: (
    dict(shape=shape, kind="decode", context=context, room=600, batch=batch, settings=settings) | more
  )
  forward = lambda shape, tokens, settings, batch=1, **more: (
    dict(shape=shape, kind="forward", tokens=tokens, batch=batch, settings=settings) | more
  )
  if scale != "gpu":
    few = ("n3 K1",) if scale == "test" else ("n3 K1", "n6 K1", "n9 K1", "n9 K2", "n9 K4", "n8 K1 F2")
    length = 16 if scale == "test" else 64
    most = "n3 K1" if scale == "test" else "n8 K1 F2"
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
      parts=pick(test=(*PARTS[:3], "convergence"), cpu=(*PARTS, "convergence"), gpu=ALL, paper=ALL),
      pair="",  # a folder with a pair trained before, plain and regularised, to evaluate instead of training one
      model="nanochat",  # or hf:DIR, a Hugging Face checkpoint to run as it is
      shape=dict(
        depth=pick(test=4, cpu=12, gpu=32, paper=32),
        aspect_ratio=pick(test=8, cpu=8, gpu=8, paper=20),
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
        checkpoint_every=pick(test=2, cpu=40, gpu=400, paper=200),
      ),
      reg=dict(
        weight=0.5,
        stride=pick(test=1, cpu=3, gpu=6, paper=6),
        layers=pick(test=(2, 3), cpu=(3, 6, 9), gpu=(8, 16, 24), paper=(8, 16, 24)),
        surrogate="identity",
        detach_target=False,
        detach_input=False,
        sampled=False,
      ),
      snlp=dict(settings=SETTINGS[sizes], sliced=SLICED[sizes], cached=CACHED[sizes]),
      convergence=dict(  # on a few rows: the exact Jacobian takes as many evaluations a step as there are layers
        surrogates=("jacobi", "identity", "diagonal", "exact"),
        layers=pick(test=3, cpu=9, gpu=24, paper=24),
        iterations=pick(test=2, cpu=4),
        rows=pick(test=2, cpu=2),
      ),
      hcn=dict(  # three models with hyper-connections, of scale gpu and on
        settings=pick(test=("n3 K1",), cpu=("n9 K1",), gpu=HCN, paper=HCN),
        steps=pick(test=6, cpu=100, gpu=620, paper=4800),  # fewer than the other pair's at gpu, for time
        reg=dict(
          weight=0.5,
          stride=0,
          layers=pick(test=(2, 3), cpu=(3, 6, 9), gpu=(8, 16, 24), paper=(8, 16, 24)),
          surrogate="streams",
          detach_target=True,  # the third model of this part is trained without
          detach_input=False,
          sampled=False,
        ),
      ),
      competitors=dict(  # trained beside, of scale gpu and on
        settings=pick(test=("n3 K1",), cpu=("n9 K1",), gpu=("n24 K1", "n24 K2", "n24 K1 F2")),
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
        setting=pick(test="n3 K1", cpu="n9 K1", gpu="n24 K2"),
        row=pick(test=160, cpu=256, gpu=512),
        batch=pick(test=2, cpu=8, gpu=64),
        steps=pick(test=2, cpu=100, gpu=300),
        questions=pick(test=2, cpu=64, gpu=512),
        scale=0.3,
        warmup=10,
      ),
      speculation=dict(
        settings=pick(test=("n2 K1",), cpu=("n6 K1",), gpu=("n24 K1", "n24 K2")),
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
      mesh=dict(data=-1),
    )
  )
