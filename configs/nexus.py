r"""Nexus: do prefill and decode, side by side on shares of one GPU, serve more than in one batch?

Paper (arXiv 2507.06608): on an L20 1.5 to 1.9 times the requests a second of vLLM within limits of latency and 1.18 to
1.8 times SGLang's, first tokens 2 to 20 times sooner, 1.24 to 1.48 times less between tokens.

  python -m experiments.run --config=configs/nexus.py:cpu --workdir=runs/nexus

Takes 12 min on two cores that others used as well and finds: 1.93 times the requests of one batch (shortest prompts
first in one batch 1.69, a split by feedback 1.94), 1.11 with long prompts alone, 1.49 of two GPUs, 1.57 on a Hopper.

A JAX process cannot limit a kernel to some processors, so lanes run in a simulator: its truth are curves of operators
over shares, bandwidth that lanes divide, and the engine's own policies; the controller believes a fitted model. Chips
are L20-like and Hopper-like (scale gpu: as measured). The engine itself runs prefill and decode in turns, on a clock
that counts what the steps would take (scale gpu: on a real one), and the simulator must predict it.
"""

import ml_collections

from configs import About, scales

ABOUT = About(
  method="Nexus, proactive intra-GPU disaggregation of prefill and decode",
  family="serving",
  link="https://arxiv.org/abs/2507.06608",
  does="runs prefill and decode side by side on shares of one GPU that a model of their costs chooses ahead of time",
)


def get_config(scale: str = "cpu") -> ml_collections.ConfigDict:
  """Scales: test (seconds), cpu (simulated chips, 2 cores), gpu (a measured chip and engine), paper (more of all)."""
  pick = scales.picker(scale)
  return ml_collections.ConfigDict(
    dict(
      paper="nexus",
      experiment="nexus",
      scale=scale,
      seed=0,
      simulate=dict(
        chips=pick(test=("l20",), cpu=("l20", "hopper"), gpu=("measured",), paper=("measured", "l20", "hopper")),
        workloads=pick(test=("mixed",), cpu=("mixed", "ldc", "arxiv"), gpu=("mixed",), paper=("mixed", "ldc", "arxiv")),
        systems=pick(
          test=("vllm", "sglang", "vllm_pd", "nexus"),
          cpu=("vllm", "sglang", "spf", "fastserve", "vllm_pd", "reactive", "nexus"),
        ),
        few=("vllm", "sglang", "nexus"),  # on other requests and chips
        arms=pick(
          test=("vllm", "fcfs_static", "fcfs_dynamic", "static_50", "nexus"),
          cpu=("vllm", "spf", "fcfs_static", "fcfs_dynamic", "static_30", "static_50", "static_70", "nexus"),
        ),
        tuned=("vllm", "sglang", "spf", "fastserve", "vllm_pd", "nexus"),
        budgets=pick(test=(2048,), cpu=(512, 1024, 2048), paper=(256, 512, 1024, 2048, 4096)),
        gammas=pick(test=(15.0,), cpu=(15.0,), paper=(0.0, 15.0, 100.0, 200.0, 1000.0)),
        gammas_shown=pick(test=(0.0,), cpu=(0.0, 15.0, 1000.0), paper=(0.0, 15.0, 100.0, 200.0, 1000.0)),
        quanta=pick(test=(0.5,), cpu=(0.1, 1.0), paper=(0.05, 0.1, 0.5, 1.0, 4.0)),
        loads=pick(test=(0.4, 0.85), cpu=(0.4, 0.55, 0.7, 0.85, 1.0), paper=(0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        tuning_loads=pick(test=(0.85,), cpu=(0.4, 0.55, 0.85, 1.0)),
        arms_load=0.85,
        requests=pick(test=20, cpu=150, paper=1000),
        seeds=pick(test=1, cpu=2, gpu=1, paper=5),
        seeds_more=pick(test=1, cpu=1, paper=5),  # of other requests and chips, and of the ablation
        rows=128,
        page=64,
        most_pages=40_000,
        groups=1,  # of layers whose operators run one after another
        tile=16,
        noise=0.02,
        mixed=1.7,  # 251 ms beside 132 + 15, as the paper measured
        overhead=0.002,  # seconds of the host before a step; SGLang's scheduler overlaps more of it
        overhead_sglang=0.001,
        slo_tbt=0.25,  # of the limit, for feedback
        slo_ttft=2.0,
      ),
      engine=dict(  # one network of random weights, served by the engine itself
        clock=pick(test="counted", cpu="counted", gpu="wall"),
        dtype=pick(cpu="float32", gpu="bfloat16"),
        shape=dict(
          depth=pick(test=1, cpu=1, gpu=12, paper=36),
          width=pick(test=32, cpu=32, gpu=2048),
          q_heads=pick(test=2, cpu=2, gpu=16),
          kv_heads=pick(test=1, cpu=1, gpu=2),
          head_dim=pick(test=16, cpu=16, gpu=128),
          mlp_width=pick(test=64, cpu=64, gpu=11_008),
          vocab_size=pick(test=64, cpu=64, gpu=32_000),
          context=32_768,
        ),
        requests=pick(test=8, cpu=24, gpu=32, paper=400),
        seeds=pick(test=2, cpu=10),  # where the clock counts: the simulator, which is the engine then, serves more
        seeds_requests=pick(test=8, cpu=96, paper=400),
        divide=pick(test=64, cpu=1),  # prompts and answers are so many times shorter
        loads=pick(test=(0.8,), cpu=(1.2,), gpu=(0.6, 1.2)),  # of the requests a second that are served where all wait
        rows=pick(test=4, cpu=32),
        budget=pick(test=12, cpu=2080),  # 32 rows and a chunk of 2,048
        part=pick(test=8, cpu=512),
        page=pick(test=4, cpu=64),
        pages=pick(test=400, cpu=2000),
        shares=(0.3, 0.5, 0.7),  # of the time, for reading; one is chosen by the simulator
        decode_first=0.25,  # where most of the cache is in use
      ),
      calibrate=dict(  # where a chip is "measured"
        network="qwen2.5-3b",
        processors=pick(test=10, cpu=0),  # 0: the device's own
        rows=pick(test=32, cpu=2048),
        tile=pick(test=16, cpu=128),
        divide=pick(test=128, cpu=1),  # sizes are so many times smaller
        bytes=pick(test=2**14, cpu=2**31),
        size=pick(test=64, cpu=32_768),  # numbers that a program reads at once
        repetitions=pick(test=1, cpu=5),
        inner=pick(test=1, cpu=3),
      ),
    )
  )
