"""What the training step sends between devices, and the experiment that measures it, at scale test."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import many_gpus as config_file
from experiments import many_gpus as experiment
from experiments import results
from experiments.many_gpus import collectives, suffix, training
from tests.common import run_and_continue

HLO = """HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %c = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %gather = (bf16[4,8]{1,0:T(8)}, bf16[16,8]{1,0:S(1)}) all-gather-start(%x), channel_id=1, dimensions={0}
  %done = bf16[16,8]{1,0} all-gather-done(%gather)
  ROOT %t = (s32[], f32[4]) tuple(%i, %y)
}

%outer (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %w = (s32[], /*index=1*/f32[4]) while(%p), condition=%sum, body=%inner, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %r = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), to_apply=%sum
}

ENTRY %main (p: (s32[], f32[4])) -> f32[4] {
  %s = ((f32[8]{0}, f32[8]{0}), (f32[2]{0}, f32[2]{0}), u32[]) reduce-scatter-start(%a, %b), to_apply=%sum
  %l = (s32[], f32[4]) while(%p), condition=%sum, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %g = f32[4]{0} get-tuple-element(%l), index=1
}
"""


def test_collectives_are_counted_in_nested_loops_and_asynchronous_forms():
  assert collectives.collectives(HLO) == [
    ("all-gather", 16 * 8 * 2, 24, 2),
    ("all-reduce", 4 * (4 + 6), 3, 1),
    ("reduce-scatter", 2 * 2 * 4, 1, 0),
  ]
  assert collectives.summary(HLO)["all-gather"] == {"instructions": 1, "runs": 24, "bytes": 24 * 256}


CASE = dict(
  shape=dict(
    depth=4,
    aspect_ratio=16,
    head_dim=16,
    vocab_size=96,
    context=64,
    window_pattern="L",
    x0=False,
    value_embeddings=False,
  ),
  batch=64,
  rows=4,
  length=128,
  dtype="float32",
)
