"""A pipeline that is fed the policies' micro-batches, its stages as slow as the profile says."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sarathi.serve import ORCA, OURS, QUANTILES
from jaxlab.serving import pipeline, policies, traces
from jaxlab.serving.cost import StepCost
from jaxlab.serving.requests import Request


def bubbles(config, _, found: dict, console) -> dict:
  """{way: {makespan, idle: quantiles over requests of the seconds that stages stood idle for them}}."""
  b = config.bubbles
  fitted = StepCost(np.array(found["profile"]["weights"]), config.profile.tile_rows)
  rng = np.random.default_rng(config.seed)
  prompts = traces.zipf(rng, low=b.low, high=b.high, theta=0.4, count=b.requests)
  asked = [Request(f"{i}", [0] * int(p), max(1, int(p) // b.ratio)) for i, p in enumerate(prompts)]
  longest = int(prompts.max())

  def piped(policy, wanted, *, slots, rows, budget):
    parts = pipeline.microbatches(policies.POLICIES[policy], wanted, slots=slots, rows=rows, budget=budget)
    seconds = np.array([[fitted(part.work) / slots] * slots for part in parts])
    with jax.enable_x64(True):
      times = pipeline.stage_times(jnp.array(seconds), jnp.array([part.slot for part in parts]), b.link)
    idle = pipeline.idle_by_request(parts, times)
    return {"makespan": float(np.asarray(times.end).max()), "idle": np.percentile(idle, QUANTILES).tolist()}

  budgets = {OURS: b.budget, ORCA: b.rows + longest}
  rows = {policy: piped(policy, asked, slots=b.stages, rows=b.rows, budget=budgets[policy]) for policy in budgets}
  # As many copies of the whole network as there are stages: each serves its share, in less memory.
  alone = [
    piped(ORCA, asked[i :: b.stages], slots=1, rows=b.replica_rows, budget=b.replica_rows + longest)["makespan"]
    for i in range(b.stages)
  ]
  rows["replicas"] = {"makespan": max(alone), "idle": [0.0] * len(QUANTILES)}
  for name, row in rows.items():
    median = row["idle"][QUANTILES.index(50)]
    console.say(f"  {name}: makespan {row['makespan']:.4g} s, median idle {median:.4g} s a request")
  return rows
