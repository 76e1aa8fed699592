import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.models.config import TransformerConfig
from jaxlab.serving import metrics, policies, simulator, traces
from jaxlab.serving.cost import OPERATORS, StepCost, Work
from jaxlab.serving.requests import Request
from jaxlab.serving.simulator import Chip, Lane, Segment, Server, simulate, steps_of

CONFIG = TransformerConfig(vocab_size=1000, depth=8, width=256, q_heads=8, kv_heads=2, head_dim=32, mlp_width=512)
SHARES = (0.1, 0.5, 1.0)
CHIP = Chip(1e12, 1e10, SHARES, {name: (0.1, 0.45, 0.7) for name in OPERATORS}, (0.3, 0.8, 1.0))
READ, DECODE = Lane(policies.read_only, 50, "prefill"), Lane(policies.decode_only, 50, "decode")
SERVER = Server(pages=400, page=8, rows=8, budget=64)


def requests(count=20, rate=50.0, seed=0, longest=120, answers=9):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, longest, count), rng.integers(1, answers, count)
  trace = traces.Trace(traces.poisson(rng, rate=rate, count=count), *sizes)
  return traces.requests_of(trace, rng, vocab_size=50)


def test_a_lane_by_itself_takes_as_long_as_its_operators():
  """A prompt in three chunks and four tokens, on 100 and on 40 percent; the host's part comes on top."""
  asked = [Request("a", [0] * 150, 5)]
  for percent, overhead in ((100, 0.0), (40, 0.25)):
    found = simulate(
      asked, [Lane(policies.sarathi, percent)], steps_of(CHIP, CONFIG, groups=2), chip=CHIP,
      server=SERVER._replace(overhead=overhead),
    )  # fmt: skip
    work = [Work.of(rows=count, chunks=[(end, count)]) for end, count in ((56, 56), (112, 56), (150, 38))]
    work = [Work.of(rows=count, chunks=[(end, count)]) for end, count in ((64, 64), (128, 64), (150, 22))]
    work += [Work.of(rows=1, contexts=[151 + i]) for i in range(4)]
    assert [step.work for step in found.steps] == work
    seconds = [sum(simulator.alone(CHIP, steps_of(CHIP, CONFIG, groups=2)(w), percent)) for w in work]
    np.testing.assert_allclose([step.seconds for step in found.steps], seconds, rtol=1e-9)
    assert found.ended[0].times[-1] == pytest.approx(sum(seconds) + overhead * len(work))


def test_seconds_alone_follow_from_the_curves():
  """45 % of the peak at half the processors; a quarter of them can draw 0.3 + 0.5 (15 / 40) of the bandwidth."""
  of = lambda flops, bytes_, percent: simulator.alone(CHIP, [Segment(0, flops, bytes_)], percent)[0]
  assert of(9e11, 1.0, 50) == pytest.approx(9e11 / (0.45 * 1e12))
  assert of(1.0, 3e9, 25) == pytest.approx(3e9 / ((0.3 + 0.5 * 15 / 40) * 1e10))
  assert of(7e11, 9e9, 100) == pytest.approx(1.0)
  assert simulator.alone(CHIP, [Segment(None, 0.3)], 10) == [pytest.approx(0.3)]


def test_lanes_divide_bandwidth_fairly_and_processors_in_proportion():
  tables = [CHIP.table(name) for name in (*OPERATORS, None)]
  rates = lambda *running: simulator._rates(CHIP, tables, running)
  both = rates((Segment(0, 0.0, 1e9), 50), (Segment(0, 0.0, 2e9), 50))
  np.testing.assert_allclose(both, [5e9 / 1e9, 5e9 / 2e9])  # half of it each, though either could draw 0.8
  little = 1e9 / 1e10 / 2 * 0.45e12  # so many operations that it draws a fifth of the bandwidth
  uneven = rates((Segment(0, little * 4, 1e9), 50), (Segment(0, 0.0, 1e9), 50))
  np.testing.assert_allclose(uneven[0], 0.45e12 / (little * 4))
  np.testing.assert_allclose(uneven[1], min(1e10 - uneven[0] * 1e9, 8e9) / 1e9)
  over = rates((Segment(0, 1e12, 1.0), 100), (Segment(0, 1e12, 1.0), 100))
  np.testing.assert_allclose(over, 0.45)  # as with 50 percent each
  host = rates((Segment(None, 0.5), 100), (Segment(0, 1e12, 1.0), 100))
  np.testing.assert_allclose(host, [2.0, 0.7])


def test_a_step_is_slower_beside_another_lane_and_the_more_so_the_longer_that_ones_context():
  """The third observation of the paper: at a split that is held the same rows decode slower beside a longer prompt,
  whose steps spend more of their time where they read keys and values."""
  chip = CHIP._replace(peak=2e11, compute=CHIP.compute | {"chunk_attention": (5.0, 22.0, 35.0)})

  def slower(prompt):
    """Times as long as by itself."""
    asked = [Request("rows", [0] * 30, 700), Request("prompt", [0] * prompt, 1, arrival=0.001)]
    steps, server = steps_of(chip, CONFIG, tile=1), SERVER._replace(pages=4000)
    found = simulate(asked, [READ, DECODE], steps, chip=chip, server=server)
    beside = [step for step in found.steps if step.lane == 1 and step.beside]
    return np.mean([step.seconds / sum(simulator.alone(chip, steps(step.work), 50)) for step in beside])

  short, long = slower(1000), slower(8000)
  assert short > 1.01 and long > 1.05 * short


def queue(load, count=12_000):
  """Requests of one step each, of a second, that arrive at random: (mean wait, of the formula)."""
  rng = np.random.default_rng(1)
  at = traces.poisson(rng, rate=load, count=count)
  asked = [Request(f"{i}", [0], 1, arrival=float(t)) for i, t in enumerate(at)]
  found = simulate(
    asked, [Lane(policies.sarathi)], lambda work: [Segment(None, 1.0)], server=Server(pages=9, page=4, rows=1, budget=2)
  )
  return np.mean([s.scheduled - s.request.arrival for s in found.ended]), load / (2 * (1 - load))


def test_one_server_of_constant_time_has_the_waits_of_queueing_theory():
  """M/D/1: rho s / (2 (1 - rho))."""
  waited, expected = queue(0.5)
  assert waited == pytest.approx(expected, rel=0.05)


SYSTEMS = {
  "monolithic": [Lane(policies.sarathi)],
  "shortest": [Lane(policies.spf)],
  "turns": [Lane(policies.nexus_time)],
  "lanes": [READ, DECODE],
  "two chips": [Lane(policies.read_only), Lane(policies.decode_only, chip=1)],
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("pages", [400, 24])
def test_everybody_gets_all_tokens_and_no_page_is_lost(name, pages):
  """Also with so few pages that sequences have to be computed again; the same seed gives the same times."""
  options = dict(chip=CHIP, server=SERVER._replace(pages=pages, overhead=1e-4), noise=0.1, handoff=lambda n: 1e-4 * n)
  controller = (lambda tick: 30 if tick.kv_used < 0.5 else 70) if name == "lanes" else None
  runs = [
    simulate(requests(), SYSTEMS[name], steps_of(CHIP, CONFIG), controller=controller, seed=seed, **options)
    for seed in (1, 1, 2)
  ]
  times = [[(s.request.id, s.times) for s in run.ended] for run in runs]
  assert times[0] == times[1] != times[2]
  for run in runs:
    assert {s.request.id: s.made for s in run.ended} == {r.id: r.tokens for r in requests()}
    for s in run.ended:
      assert s.finish == "length" and len(s.times) == s.made and s.request.arrival <= s.scheduled < s.times[0]
      assert (np.diff(s.times) > 0).all()
  made = metrics.summary(runs[0].ended)
  assert made["ttft_mean"] > 0 and made["ttft_p50"] <= made["ttft_p95"] <= made["ttft_p99"]


def test_no_processor_idles_while_somebody_waits():
  """One lane: it works whenever a request has arrived and has not ended."""
  found = simulate(requests(rate=30.0), SYSTEMS["monolithic"], steps_of(CHIP, CONFIG), chip=CHIP, server=SERVER)
  end = 0.0
  for step in found.steps:
    if step.start > end + 1e-12:
      assert not any(s.request.arrival < step.start - 1e-12 and s.times[-1] > end for s in found.ended)
    assert step.start >= end - 1e-12
    end = step.start + step.seconds


def test_a_lane_takes_its_share_on_at_its_own_step_and_all_where_the_other_is_empty():
  percents = []
  simulate(
    [Request("a", [0] * 200, 60), Request("b", [0] * 900, 3, arrival=0.02)], [READ, DECODE], steps_of(CHIP, CONFIG),
    chip=CHIP, server=SERVER, controller=lambda tick: percents.append(tick) or 30,
  )  # fmt: skip
  found = simulate(
    [Request("a", [0] * 200, 60), Request("b", [0] * 900, 3, arrival=0.02)], [READ, DECODE], steps_of(CHIP, CONFIG),
    chip=CHIP, server=SERVER, controller=lambda tick: 30,
  )  # fmt: skip
  assert percents and found.splits == [(0.0, 30)]
  for step in found.steps:
    assert step.percent == ((30, 70)[step.lane] if step.beside else 100)
  assert {bool(step.beside) for step in found.steps} == {True, False}


def test_a_prompt_that_is_known_is_not_read_again():
  asked = [Request("a", list(range(40)), 1), Request("b", list(range(40)), 1, arrival=5.0)]
  read = lambda prefix: sum(
    step.work.rows
    for step in simulate(
      asked, [Lane(policies.sarathi)], steps_of(CHIP, CONFIG), chip=CHIP, server=SERVER._replace(prefix=prefix)
    ).steps
  )
  assert read(False) == 80 and read(True) == 40 + 8  # a token at least is left, here a page


def test_steps_that_read_and_decode_can_cost_more_than_both():
  slow = CHIP._replace(mixed=1.5)
  seconds = lambda chip, work: sum(simulator.alone(chip, steps_of(chip, CONFIG)(work), 100))
  mixed = Work.of(rows=20, chunks=[(40, 16)], contexts=[9] * 4)
  assert seconds(slow, mixed) == pytest.approx(1.5 * seconds(CHIP, mixed))
  only = Work.of(rows=16, chunks=[(40, 16)])
  assert seconds(slow, only) == seconds(CHIP, only)


def test_ones_own_measured_steps_in_three_lines():
  cost = StepCost(np.array([1e-3, 1e-5, 0.0, 1e-8]), 1)
  found = simulate(requests(), [Lane(policies.sarathi)], lambda work: [Segment(None, cost(work))], server=SERVER)
  assert all(step.seconds == pytest.approx(cost(step.work)) for step in found.steps)


def test_what_cannot_be_simulated_is_named():
  run = lambda lanes=(READ, DECODE), asked=requests(), **options: simulate(
    asked, lanes, steps_of(CHIP, CONFIG), **dict(chip=CHIP, server=SERVER) | options
  )
  for options, message in (
    (dict(lanes=()), "there is no lane"),
    (dict(lanes=(READ,)), "are never served by these lanes"),
    (dict(lanes=(Lane(policies.sarathi, chip=2),)), "lanes are on chips"),
    (dict(asked=[Request("a", [0] * 9999, 1)]), "a request has 10000 tokens and the cache"),
    (dict(controller=lambda tick: 0), "gives the prefill 0 percent"),
  ):
    with pytest.raises(InputError, match=message):
      run(**options)
  with pytest.raises(InputError, match="groups is 0"):
    steps_of(CHIP, CONFIG, groups=0)
