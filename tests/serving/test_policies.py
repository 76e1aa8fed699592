"""Every policy as a scheduler, beside a plain account of what its plans do; the model is left out."""

from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.serving import policies
from jaxlab.serving.pages import Pages
from jaxlab.serving.pipeline import advance
from jaxlab.serving.requests import Request, Served

ROWS, BUDGET, PART = 4, 12, 2


class Schedule:
  """Requests that come at random to few pages, and an account of what is planned for them."""

  def __init__(self, policy, seed: int, *, chunks: int, pages: int):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 21, (12, 2)).tolist()
    self.all = [Served(Request(f"{i}", [0] * p, d), [0] * p, i) for i, (p, d) in enumerate(sizes)]
    self.arrivals = rng.integers(0, 20, 12).tolist()
    self.policy, self.chunks = policies.POLICIES[policy], chunks
    self.pages, self.memory, self.running, self.waiting = Pages(pages, 4, index=False), {}, [], deque()
    self.worked, self.lost = Counter(), Counter()  # tokens of each that were worked out, and given up

  def run(self):
    for step in range(1000):
      self.waiting.extend(s for s, at in zip(self.all, self.arrivals, strict=True) if at == step)
      if step >= max(self.arrivals) and not self.running and not self.waiting:
        return
      self.step(step)
    raise AssertionError("somebody is never served")

  def step(self, number: int):
    ready = [s for s in self.running if s.pending == 1]
    before = {s: s.computed for s in self.all}
    size = dict(rows=ROWS, budget=BUDGET, chunks=self.chunks, part=PART, watermark=1, step=number, now=number)
    plan = self.policy(policies.View(self.running, self.waiting, self.pages, memory=self.memory, **size))
    members = {*plan.decode, *(s for s, _ in plan.chunks)}
    assert not members & {*plan.preempt} and len(self.running) <= ROWS and len(plan.chunks) <= self.chunks
    assert len(plan.decode) + sum(count for _, count in plan.chunks) <= BUDGET
    for s in plan.preempt:
      assert s in self.waiting and not s.pages and s.computed == 0
      self.lost[s.order] += before[s]
    for s, count in (*((s, 1) for s in plan.decode), *plan.chunks):
      assert 1 <= count <= s.pending and len(s.pages) * 4 >= s.computed + count
      self.worked[s.order] += count
    self.stalled = [s for s in ready if s not in plan.decode and s not in plan.preempt]
    policies.check(plan, policies.View(self.running, self.waiting, self.pages, **size))
    advance(plan, self.running, self.pages)
    held = [page for s in self.running for page in s.pages]
    assert len(set(held)) == len(held) == self.pages.held and 0 not in held  # nobody has another's page
    assert self.pages.free + self.pages.held == len(self.pages.holders) - 1
    if self.policy in (policies.sarathi, policies.orca, policies.spf):
      assert not self.stalled


@pytest.mark.parametrize("policy", policies.POLICIES)
@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.sampled_from([14, 60]))
def test_everybody_is_worked_out_once_and_again_after_giving_up(policy, seed, chunks, pages):
  """Each token but the last is, and what was given up on the way once more; who can decode does, where the policy says
  so; no page is lost or has two holders; in the end all are free."""
  schedule = Schedule(policy, seed, chunks=chunks, pages=pages)
  schedule.run()
  assert schedule.pages.held == 0
  for s in schedule.all:
    assert s.made == s.request.tokens
    assert schedule.worked[s.order] == len(s.tokens) - 1 + schedule.lost[s.order]
  assert pages == 14 or not schedule.lost


def test_few_pages_make_sequences_give_theirs_up():
  schedule = Schedule("sarathi", 0, chunks=3, pages=14)
  schedule.run()
  assert schedule.lost.total() > 0


def test_who_gives_its_pages_up_came_last_and_is_served_next():
  pages, running, waiting = Pages(9, 4, index=False), [], deque()
  for i in range(3):
    served = Served(Request(f"{i}", [0] * 7, 9), [0] * 8, i, computed=7)
    served.pages = pages.take(2 + (i == 0))
    running.append(served)
  late = Served(Request("late", [0] * 4, 1), [0] * 4, 3)
  waiting.append(late)
  first, second, third = running
  for served in (first, second):
    served.tokens, served.computed = [0] * 13, 12  # its next token needs another page, and one is left
  plan = policies.sarathi(policies.View(running, waiting, pages, ROWS, BUDGET, 3, PART, 1))
  assert plan.preempt == [third] and plan.decode == [first, second] and not plan.chunks
  assert list(waiting) == [third, late] and third.tokens == [0] * 8


@pytest.mark.parametrize(("watermark", "taken"), [(1, True), (2, False)])
def test_nobody_new_takes_the_last_pages(watermark, taken):
  """A prompt of 15 tokens and its first one need four of five."""
  pages, waiting, running = Pages(6, 4, index=False), deque(), []
  waiting.append(Served(Request("a", [0] * 15, 9), [0] * 15, 0))
  plan = policies.sarathi(policies.View(running, waiting, pages, ROWS, BUDGET, 3, PART, watermark))
  assert bool(plan.chunks) == bool(running) == taken != bool(waiting) and pages.held == 4 * taken
