import numpy as np
import pytest

from jaxlab.core.checks import InputError
from jaxlab.serving import metrics, traces
from jaxlab.serving.engine import Engine
from jaxlab.serving.requests import Request, Served


def served(arrival, scheduled, times, prompt=4):
  request = Request(f"{arrival}", [1] * prompt, max(1, len(times)), arrival=arrival)
  return Served(request, [1] * (prompt + len(times)), 0, scheduled=scheduled, times=list(times))


TIMELINE = [served(0.0, 1.0, (2.0, 3.0, 5.0)), served(1.0, 1.5, (4.0,)), served(2.0, 2.0, (3.0, 3.5), prompt=6)]


def test_a_timeline_of_three_requests_by_hand():
  found = metrics.summary(TIMELINE)
  pool = dict(ttft=[2, 3, 1], tbt=[1, 2, 0.5], tpot=[1.5, 0.5], latency=[5 / 3, 3, 0.75], delay=[1, 0.5, 0])
  for name, values in pool.items():
    assert found[f"{name}_p50"] == pytest.approx(np.percentile(values, 50))
    assert found[f"{name}_p99"] == pytest.approx(np.percentile(values, 99))
  assert (found["makespan"], found["output_rate"], found["total_rate"]) == (5, 6 / 5, 20 / 5)
  assert metrics.goodput(TIMELINE, ttft=2, tbt=1.9) == pytest.approx(1 / 5)  # the first's own gaps: 1 and 2
  assert metrics.goodput(TIMELINE, ttft=3, tbt=2) == pytest.approx(3 / 5)
  with pytest.raises(InputError, match="no request was served"):
    metrics.summary([served(0.0, 0.0, ())])


def test_capacity_is_where_the_gaps_grow_too_long():
  at = lambda rate: [served(0.0, 0.0, (1.0, 1.0 + 0.1 * rate))]
  assert metrics.capacity(at, tbt=0.5, low=0.1, high=100) == pytest.approx(5, rel=0.02)
  late = lambda rate: [served(0.0, rate, (rate, rate))]
  assert metrics.capacity(late, tbt=0.5, low=0.1, high=100) == pytest.approx(2, rel=0.02)


def test_arrivals_have_the_moments_they_are_named_for():
  rng = np.random.default_rng(0)
  for cv, at in (
    (1.0, traces.poisson(rng, rate=4, count=20_000)),
    (3.0, traces.gamma(rng, rate=4, cv=3, count=20_000)),
  ):
    gaps = np.diff(at)
    assert (
      at[0] == 0
      and gaps.mean() == pytest.approx(0.25, rel=0.1)
      and gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    )
  at = traces.mmpp(rng, rates=(20.0, 0.0), hold=1.0, count=20_000)
  assert (np.diff(at) >= 0).all() and 20_000 / at[-1] == pytest.approx(10, rel=0.15)
  assert np.diff(at).std() * 10 > 2  # burstier than a Poisson process of its rate
  lengths = traces.inverse_cdf(rng, ((0, 1), (0.5, 400), (1, 2000)), 20_000)
  assert np.median(lengths) == pytest.approx(400, rel=0.05) and lengths.max() <= 2000 and lengths.min() >= 1


def test_a_trace_is_read_from_a_file_and_replayed_on_a_clock_that_stands_still(tmp_path, network):
  file = tmp_path / "trace.csv"
  file.write_text(
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,5,3\n2023-11-16 18:15:48.0000000,0,2\n"
  )
  trace = traces.read(file)
  np.testing.assert_allclose(trace.arrival, [0, 1.31941], atol=1e-4)
  assert trace.prompt.tolist() == [5, 1] and trace.answer.tolist() == [3, 2]
  now = [7.0]

  def clock():
    now[0] += 0.01  # what a look at it costs
    return now[0]

  wait = lambda seconds: now.__setitem__(0, now[0] + seconds)
  engine = Engine(network, pages=40, page=4, length=48, rows=2, budget=16, chunks=1, steps=1, part=8, clock=clock)
  asked = traces.requests_of(trace, np.random.default_rng(0), vocab_size=64)
  ended = sorted(traces.replay(engine, asked, wait=wait), key=lambda s: s.request.id)
  assert [s.made for s in ended] == [3, 2] and [s.request for s in ended] == asked
  for s in ended:
    assert s.request.arrival <= s.scheduled < s.times[0] and all(gap > 0 for gap in metrics.between(s))
  assert ended[1].scheduled == pytest.approx(1.33, abs=0.05)


@pytest.mark.parametrize(
  "text, message", [("a,b,c\n", "has no rows"), ("a,b,c\n1,2\n", "row 2"), ("h\n1,1,1\n0,1,1\n", "times")]
)
def test_files_that_are_no_trace_are_named(tmp_path, text, message):
  (tmp_path / "t.csv").write_text(text)
  with pytest.raises(InputError, match=message):
    traces.read(tmp_path / "t.csv")
  with pytest.raises(InputError, match="rate is 0"):
    traces.poisson(np.random.default_rng(0), rate=0, count=3)
