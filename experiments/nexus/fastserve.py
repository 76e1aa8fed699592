"""FastServe's skip-join multi-level feedback queue (arXiv 2305.05920), as a policy of the engine."""

from collections.abc import Callable

from jaxlab.serving.policies import Plan, View
from jaxlab.serving.requests import Served


def skip_join(
  view: View, *, quantum: float, seconds: Callable[[int], float], levels: int = 8, starve: float = 20.0
) -> Plan:
  """Who has had the least goes first, in steps that read and decode.

  Queue i has a quantum of 2^i `quantum` seconds. Who comes joins the first queue whose quantum covers the reading of
  its prompt, goes one down when its own is used up, and to the first when nothing was done for it for `starve` seconds.
  Where pages are missing whoever is last gives its own up, to be computed again.

  Args:
    seconds: tokens of a prompt -> of its reading.
  """
  jobs: dict[Served, list] = view.memory.setdefault("jobs", {})  # level, seconds used at it, when it ran last
  last, then = view.memory.get("last", ()), view.memory.get("then", view.now)
  for served in last:
    if served in jobs:
      jobs[served][1] += view.now - then
      jobs[served][2] = view.now
  present = [*view.running, *view.waiting]
  for served in present:
    if served not in jobs:
      wanted = seconds(len(served.request.prompt))
      level = next((i for i in range(levels) if quantum * 2**i >= wanted), levels - 1)
      jobs[served] = [level, 0.0, view.now]
    job = jobs[served]
    if job[1] >= quantum * 2 ** job[0]:
      job[:2] = [min(job[0] + 1, levels - 1), 0.0]
    if view.now - job[2] > starve:
      job[:] = [0, 0.0, view.now]
  ordered = sorted(present, key=lambda s: (jobs[s][0], s.order))
  view.memory["jobs"] = {served: jobs[served] for served in ordered}
  plan = Plan()
  _decode(view, plan, [s for s in ordered if s.pending == 1 and s.pages], ordered)
  for served in ordered:
    if plan.preempt or len(plan.chunks) >= view.chunks or view.room(plan) < 1:
      break
    if served.pages:
      if served.pending == 1:
        continue
    elif view.admit(served) is None:
      continue  # who holds pages goes on, or nobody would ever give any up
    plan.chunks.append((served, min(served.pending, view.room(plan))))
  view.memory.update(last=[*plan.decode, *(s for s, _ in plan.chunks)], then=view.now)
  return plan


def _decode(view: View, plan: Plan, ready: list[Served], ordered: list[Served]) -> None:
  gone = set()
  for served in ready:
    if served in gone:
      continue
    while not view.hold(served, len(served.tokens)):
      holders = set(view.running) - set(plan.decode)
      victim = next(s for s in reversed(ordered) if s in holders)
      view.preempt(victim)
      plan.preempt.append(victim)
      gone.add(victim)
      if victim is served:
        break
    else:
      plan.decode.append(served)
