"""Generation beside transformers (extra `parity`), on the CPU: every contestant makes the same tokens."""

from pathlib import Path

import ml_collections
import numpy as np
import pytest

from experiments.console import Console
from experiments.throughput import decoding as experiment
from experiments.throughput import serving
from experiments.throughput.decoding import DYNAMIC, OURS, STATIC, STREAM

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_every_contestant_makes_the_same_tokens_and_the_claim_is_their_ratio():
  spec = ml_collections.ConfigDict(
    dict(
      model=str(Path(__file__).parents[1] / "fixtures" / "llama"),
      dtype="float32",
      prompt=9,
      tokens=20,
      repetitions=2,
      transformers=True,
    )
  )
  result = experiment.measure(spec)
  assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # the static cache was compiled
  assert result["equal"] == dict.fromkeys((OURS, STREAM, DYNAMIC, STATIC), 20)
  times = {name: row["median"] for name, row in result["times"].items()}
  np.testing.assert_allclose(result["rates"][STATIC], 20 / (1e-3 * times[STATIC]))
  (claim,) = experiment.claims(result, spec)
  np.testing.assert_allclose(claim.ours, times[STATIC] / times[OURS])
  assert f"{result['rates'][OURS]:.0f} tokens/s" in claim.note and claim.threshold == 4.5


def test_the_engine_is_held_against_as_many_rows_of_the_static_cache():
  spec = ml_collections.ConfigDict(
    dict(
      model=str(Path(__file__).parents[1] / "fixtures" / "llama"),
      dtype="float32",
      batches=(2,),
      goals=(2.0,),
      prompt=9,
      tokens=8,
      budget=32,
      part=8,
      page=8,
      steps=4,
      repetitions=2,
      transformers=True,
      large=dict(rows=2, context=16, read=32),
    )
  )
  row = serving.served(spec, 2, Console(quiet=True))
  times = {name: row["times"][name]["median"] for name in (serving.ENGINE, STATIC)}
  np.testing.assert_allclose(row["rates"][STATIC], 2 * 8 / (1e-3 * times[STATIC]))
  step = {"seconds": 1e-3, "share": 0.5}
  first, *_, host = serving.claims(
    {"served": {"2": row}, "large": dict.fromkeys(("decode", "read", "host"), step)}, spec
  )
  np.testing.assert_allclose(first.ours, times[STATIC] / times[serving.ENGINE] / 2.0)
  assert not host.holds
