import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.serving import policies, traces
from jaxlab.serving.cost import StepCost, Work, choose_budget, error, fit
from jaxlab.serving.pipeline import idle_by_request, microbatches, stage_times
from jaxlab.serving.requests import Request

SIZES = dict(slots=3, rows=4, budget=12, part=2)


def requests(count=13, seed=0):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 30, count), rng.integers(1, 7, count)
  return [Request(f"{i}", [0] * int(p), int(d)) for i, (p, d) in enumerate(zip(*sizes, strict=True))]


def looped(seconds, slot, link):
  """The definition, stage by stage."""
  start, end, idle = (np.zeros_like(seconds) for _ in range(3))
  left = {}
  for m, s in itertools.product(*map(range, seconds.shape)):
    before = end[m, s - 1] + link if s else left.get(slot[m], 0.0)
    start[m, s] = max(before, end[m - 1, s] if m else 0.0)
    end[m, s] = start[m, s] + seconds[m, s]
    idle[m, s] = start[m, s] - end[m - 1, s] if m else 0.0
    if s == seconds.shape[1] - 1:
      left[slot[m]] = end[m, s]
  return start, end, idle


@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3]))
def test_times_are_those_of_the_definition(seed, link):
  rng = np.random.default_rng(seed)
  seconds, slot = rng.uniform(0.1, 2, (12, 3)), rng.integers(0, 3, 12)
  times = stage_times(jnp.array(seconds, jnp.float32), jnp.array(slot), link)
  for ours, wanted in zip(times, looped(seconds, slot, link), strict=True):
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-4)
  assert times.end.max() >= seconds.sum(axis=0).max() - 1e-4


def test_micro_batches_alike_leave_no_stage_idle_once_it_is_full():
  times = stage_times(jnp.full((12, 4), 0.5), jnp.arange(12) % 4)
  np.testing.assert_array_equal(times.idle[4:], 0)
  assert times.end[-1, -1] == 0.5 * (12 + 3)


def test_a_pipeline_of_two_by_hand():
  """A prompt of 4 s, then a decoding step of 1 s, twice, on two stages: the second stage waits 3 s for each prompt."""
  seconds = jnp.array([[4.0, 4.0], [1.0, 1.0], [4.0, 4.0], [1.0, 1.0]])
  times = stage_times(seconds, jnp.array([0, 1, 0, 1]))
  np.testing.assert_array_equal(times.start, [[0, 4], [4, 8], [8, 12], [12, 16]])
  np.testing.assert_array_equal(times.idle, [[0, 0], [0, 0], [3, 3], [0, 0]])


@pytest.mark.parametrize("name", policies.POLICIES)
def test_every_token_is_read_and_made_once(name):
  asked = requests()
  budget = 40 if name == "orca" else 12  # it reads prompts whole
  parts = microbatches(policies.POLICIES[name], asked, **SIZES | dict(budget=budget))
  decoded = sum(r.tokens - 1 for r in asked)
  read = sum(len(r.prompt) for r in asked)
  assert all(part.work.rows <= budget for part in parts)
  assert read + decoded <= sum(part.work.rows for part in parts) <= read + decoded + sum(len(p.requests) for p in parts)
  # Each token before the last one is a query once, whose keys are those up to itself (half the square of a chunk; a
  # prompt's last token may be left over, and is then a row that decodes).
  keys = sum(part.work.pairs + part.work.context for part in parts)
  wanted = sum(len(r.prompt) ** 2 / 2 + sum(range(len(r.prompt) + 1, len(r.prompt) + r.tokens)) for r in asked)
  assert abs(keys - wanted) <= 0.5 * len(asked)
  assert {i for part in parts for i in part.requests} == set(range(len(asked)))
  sets = [{i for part in parts if part.slot == slot for i in part.requests} for slot in range(3)]
  assert sum(map(len, sets)) == len(asked), "a request changed its set"


def test_decode_maximal_batches_read_one_prompt_and_stall_nobody():
  parts = microbatches(policies.sarathi, requests(), **SIZES)
  times = stage_times(jnp.array([[p.work.rows] * 2 for p in parts], jnp.float32), jnp.array([p.slot for p in parts]))
  idle = idle_by_request(parts, times)
  assert idle.shape == (13,)
  each = [np.asarray(times.idle).sum(axis=1)[[i in p.requests for p in parts]].sum() for i in range(13)]
  np.testing.assert_allclose(idle, each, rtol=1e-6)
  for slot in range(3):
    mine = [set(p.requests) for p in parts if p.slot == slot]
    for i in range(13):  # from its first micro-batch to its last a request is in every one of its set
      places = [k for k, members in enumerate(mine) if i in members]
      assert places == list(range(places[0], places[-1] + 1)) if places else True


def test_cost_is_found_again_from_steps_without_noise():
  truth = StepCost(np.array([2e-3, 3e-6, 4e-9, 5e-8]), 128)
  rng = np.random.default_rng(0)
  steps = [
    Work.of(rows=int(n), chunks=[(int(n + e), int(n))], contexts=rng.integers(1, 4000, 8).tolist())
    for n, e in zip(rng.integers(1, 900, 30), rng.integers(0, 3000, 30), strict=True)
  ]
  found = fit(steps, [truth(work) for work in steps])
  np.testing.assert_allclose(found.weights, truth.weights, rtol=1e-6)
  assert error(found, steps, [truth(work) for work in steps]) < 1e-6
  assert truth(Work(129, 0, 0)) == truth(Work(256, 0, 0)) > truth(Work(128, 0, 0))
  with pytest.raises(InputError, match="at least 4"):
    fit(steps[:3], [1, 1, 1])


@pytest.mark.parametrize("ratio", [50, 25, 15])
def test_the_best_budget_is_at_the_balance_of_chunks_and_tokens(ratio):
  """A step costs as much for one row as for 64, then in proportion: chunk = (rows - 1) prompt / answer, to a tile."""
  rows, tile, prompt = 9, 64, 64 * 720_720  # every chunk divides the prompt
  cost = lambda work: max(1.0, work.rows / 64)
  budgets = range(rows - 1 + tile, rows + 16 * tile, tile)
  best, seconds = choose_budget(cost, prompt=prompt, answer=prompt // ratio, rows=rows, budgets=budgets)
  assert seconds[best] == min(seconds.values())
  assert abs(best - (rows - 1) - (rows - 1) * ratio) <= tile
  with pytest.raises(InputError, match="no room"):
    choose_budget(cost, prompt=8, answer=8, rows=9, budgets=(8,))


def test_lengths_of_a_zipf_law():
  found = traces.zipf(np.random.default_rng(0), low=100, high=400, theta=0.4, count=20_000)
  assert found.min() == 100 and found.max() == 400
  likely = np.arange(1, 302) ** -0.4
  assert found.mean() == pytest.approx((np.arange(100, 401) * likely).sum() / likely.sum(), rel=0.01)
