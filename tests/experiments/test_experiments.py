import json
import subprocess
import sys
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import report, results, run, text, timing
from experiments.results import Claim, Report
from jaxlab.core.checks import InputError
from tests.common import start, wait

# This project's own text: the standard library, the default, takes seconds to tokenize.
DATA = ("--config.data.name=local_text", f"--config.data.path={report.ROOT}/[ejt]*/**/*.py")


def command(*arguments, cache):
  return wait(start("experiments.run", *map(str, arguments), JAXLAB_CACHE=str(cache)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def snlp_run(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp("snlp")
  done = command("--config=configs/snlp.py:test", f"--workdir={workdir}", *DATA, cache=cache)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


def test_snlp_writes_results_figures_and_a_table(snlp_run):
  workdir, out = snlp_run
  written = json.loads((workdir / "results.json").read_text())
  assert {"paper", "scale", "git", "device", "versions", "seconds", "config", "metrics", "claims"} <= set(written)
  assert "as many Newton steps as layers" in out and str(workdir / "results.json") in out
  for claim in written["claims"]:
    sign = 1 if claim["better"] == "higher" else -1
    assert claim["holds"] == (sign * claim["ours"] >= sign * claim["threshold"])
  exact = next(claim for claim in written["claims"] if "as many Newton steps as layers" in claim["name"])
  assert exact["holds"] and written["headline"] == written["claims"][0]["name"] and written["finding"]
  for name in written["figures"]:
    assert (workdir / name).read_bytes().startswith(b"\x89PNG")


def test_the_better_the_surrogate_the_faster_newton_converges(snlp_run):
  written = json.loads((snlp_run[0] / "results.json").read_text())
  for found in written["metrics"]["convergence"].values():
    start, after_one = ({name: rows["errors"][k] for name, rows in found.items()} for k in (0, 1))
    assert len(set(start.values())) == 1
    assert 5 * after_one["exact"] < after_one["identity"] < 0.1 * after_one["jacobi"]
    for rows in found.values():
      assert len(rows["residuals"]) == 2 and rows["residuals"][1] < rows["residuals"][0]


def test_a_second_run_resumes_and_another_config_is_refused(snlp_run, cache):
  workdir, _ = snlp_run
  before = (workdir / "plain" / "metrics.jsonl").read_text()
  again = command("--config=configs/snlp.py:test", f"--workdir={workdir}", *DATA, cache=cache)
  assert again.returncode == 0
  assert (workdir / "plain" / "metrics.jsonl").read_text() == before
  results_before = (workdir / "results.json").read_text()
  other = command("--config=configs/snlp.py:test", f"--workdir={workdir}", *DATA, "--config.train.steps=7", cache=cache)
  assert other.returncode == 2
  assert "another config (train.steps was 6, is 7); use another --workdir" in other.stderr
  assert (workdir / "results.json").read_text() == results_before


def test_a_run_goes_on_with_other_devices(tmp_path):
  config = ml_collections.ConfigDict(dict(mesh=dict(data=-1, fsdp=4), steps=2))
  run._same_config(config, tmp_path)
  config.mesh.fsdp = 1
  run._same_config(config, tmp_path)
  assert json.loads((tmp_path / "config.json").read_text())["mesh"]["fsdp"] == 1
  config.steps = 3
  with pytest.raises(InputError, match="another config"):
    run._same_config(config, tmp_path)


@pytest.mark.slow
def test_the_parts_that_larger_scales_add_run_too(tmp_path, cache):
  done = command(
    "--config=configs/snlp.py:test",
    f"--workdir={tmp_path}",
    "--config.parts=('memory','hcn','competitors','finetuning','speculation')",
    "--config.train.dtype=bfloat16",
    cache=cache,
  )
  assert done.returncode == 0, done.stderr
  written = json.loads((tmp_path / "results.json").read_text())
  parts = {"memory", "hcn", "competitors", "finetuning", "speculation"}
  assert set(written["metrics"]) == parts and (tmp_path / "competitors.png").exists()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=configs/snlp.py:test"], "give --workdir"),
    (["--workdir={}"], "give --config"),
    (["--config=configs/none.py:test", "--workdir={}"], "configs/none.py"),
    (["--config=configs/snlp.py:huge", "--workdir={}"], "config.scale is 'huge'; it must be one of test, cpu"),
    (["--config=configs/snlp.py:test", "--workdir={}", "--config.train.stepz=5"], "stepz"),
    (["--config=configs/snlp.py:test", "--workdir={}", "--config.train.steps=many"], "many"),
    (["--config=configs/snlp.py:test", "--workdir={}", "stray"], "unexpected argument stray"),
    (["--config=configs/snlp.py:test", "--workdir={}", "--config.data.name=nope"], "unknown dataset 'nope'"),
    (["--config=configs/snlp.py:test", "--workdir={}", "--config.model=gpt2"], "no checkpoint 'gpt2'"),
    (["--config=configs/snlp.py:test", "--workdir={}", "--config.model=hf:/no/where"], "no checkpoint '/no/where'"),
    (
      ["--config=configs/snlp.py:test", "--workdir={}", *DATA, "--config.shape.depth=1"],
      "n_par=3 layers in parallel.* has 1",
    ),
    (["--config=configs/snlp.py:test", "--workdir={}", *DATA, "--config.shape.window_pattern=X"], "made of S"),
    (["--config=configs/snlp.py:test", "--workdir=/dev/null/x"], "/dev/null"),
  ],
)
def test_mistakes_end_in_one_line_and_status_2(arguments, message, tmp_path, cache):
  import re

  done = command(*[a.format(tmp_path) for a in arguments], cache=cache)
  lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
  assert done.returncode == 2 and len(lines) == 1, done.stderr
  assert re.search(message, lines[0]) and "Traceback" not in done.stderr
  assert not (tmp_path / "results.json").exists()


GOOD = Claim("good", "x", "lower", ours=1.0, threshold=2.0)


def test_claims_compute_their_verdict():
  make = lambda better, ours: Claim("c", "x", better, ours=ours, threshold=2.0)
  assert [make("higher", 2.0).holds, make("higher", 1.9).holds, make("lower", 1.9).holds] == [True, False, True]
  assert not make("lower", float("nan")).holds
  with pytest.raises(InputError, match="must be one of higher, lower"):
    make("more", 1.0)


@pytest.mark.parametrize(
  "metrics, claims, message",
  [
    ({"text": {"64": {"loss": float("nan")}}}, [], r"metric text\.64\.loss is nan; no result is written"),
    ({"rates": [1.0, np.float32("inf")]}, [], r"metric rates\.1 is inf"),
    ({}, [Claim("c", "x", "lower", ours=float("nan"), threshold=2.0)], "claim 'c': ours is nan"),
    ({}, [Claim("c", "x", "lower", 1.0, 2.0, spread=(0.0, float("inf")))], r"claim 'c': spread\.1 is inf"),
  ],
)
def test_what_is_no_number_fails_the_run(metrics, claims, message, tmp_path):
  config = ml_collections.ConfigDict({"paper": "p", "scale": "test"})
  with pytest.raises(InputError, match=message):
    results.write(Report(metrics, [GOOD, *claims], "found"), config, tmp_path, 1.0, "command")
  assert not list(tmp_path.iterdir())


def test_a_metric_may_be_infinite_where_the_experiment_says_so(tmp_path):
  config = ml_collections.ConfigDict({"paper": "p", "scale": "test"})
  metrics = {"a": {"distortion": {"mds": float("inf")}}, "jax": jnp.float32(1)}
  results.write(Report(metrics, [GOOD], "found", undefined=("a.distortion.*",)), config, tmp_path, 1.0, "command")
  assert json.loads((tmp_path / "results.json").read_text())["metrics"]["a"] == {"distortion": {"mds": "inf"}}
  with pytest.raises(InputError, match="distortion"):
    results.require_finite(Report(metrics, [GOOD], "found", undefined=("b.*",)))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
  config = json.loads((report.ROOT / "checkpoints" / "base" / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 8191}))
  (tmp_path / "tokenizer.json").symlink_to(report.ROOT / "checkpoints" / "base" / "tokenizer.json")
  with pytest.raises(InputError, match=r"has ids up to 8191, its model 8191 embeddings"):
    text.load_text(None, tmp_path, given=tmp_path)


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 700 KB, where the machine lets us have one."""
  done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(tmp_path)], capture_output=True)
  if done.returncode:
    pytest.skip("mounting a disk needs root")
  yield tmp_path
  subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


FULL_DISK = """
import sys, types
import numpy as np
from experiments import run

def save(config, workdir, cache, console):
  from jaxlab.training.checkpoints import Checkpoints
  random = np.random.default_rng(0)
  state = {f"{i}": random.integers(0, 2**31, 2**15, np.int32) for i in range(40)}
  with Checkpoints(workdir / "checkpoints") as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.wait(1)

sys.modules["experiments.full"] = types.SimpleNamespace(measure=save)
sys.exit(run.main(sys.argv))
"""


def test_a_full_disk_ends_in_one_line_and_status_2(small_disk, tmp_path_factory, cache):
  file = tmp_path_factory.mktemp("config") / "full.py"
  file.write_text(
    "import ml_collections\n\n\ndef get_config(scale):\n"
    "  return ml_collections.ConfigDict(dict(paper='full', experiment='full', scale=scale))\n"
  )
  done = wait(start(FULL_DISK, f"--config={file}:test", f"--workdir={small_disk / 'run'}", JAXLAB_CACHE=str(cache)))
  assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
  assert "No space left on device" in done.stderr


def test_only_the_noise_of_a_failed_save_is_kept_quiet(monkeypatch):
  shown = []
  monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
  unraisable = [types.SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "another")]
  for one in unraisable:
    run._quiet_about_closed_loops(one)
  assert shown == unraisable[1:]


def test_json_has_no_nan():
  assert results.finite({"a": [float("nan"), 1.0], "b": np.float32(2)}) == {"a": ["nan", 1.0], "b": 2.0}


def test_timing_alternates_and_reports_ratios_of_medians(monkeypatch):
  """By a clock that only the contestants advance: no busy machine changes it."""
  now, log = [0.0], []
  monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
  slow, fast = iter([9.0, 9.0, 0.02, 0.02, 0.02]), iter([9.0, *[0.005] * 4])

  def contestant(name, seconds):
    def call():
      log.append(name)
      now[0] += next(seconds)

    return call

  contestants = {"slow": contestant("slow", slow), "fast": contestant("fast", fast)}
  times = timing.compare(contestants, repetitions=4, warmup=1)
  assert log == ["slow", "fast"] + ["slow", "fast"] * 4
  np.testing.assert_allclose(times.seconds["slow"], [9.0, 0.02, 0.02, 0.02])
  ratio, (low, high) = times.speedup("fast", over="slow")
  np.testing.assert_allclose([ratio, low], [4.0, 4.0])
  assert 4 < high < 1800 and times.summary()["slow"]["median"] == pytest.approx(20)


def test_steady_runs_reuse_their_buffers_and_carry_their_state():
  tree = {"a": jnp.ones(3)}
  count = timing.Steady(lambda tree, x, carry: (tree["a"] * x + carry, carry + 1), tree, 2.0, carry=jnp.zeros(3))
  plain = timing.Steady(lambda tree, x: tree["a"] * x, tree, 2.0)
  places = set()
  for i in range(4):
    out = count()
    np.testing.assert_array_equal(out, 2.0 + i)
    places.add(out.unsafe_buffer_pointer())
    np.testing.assert_array_equal(plain(), 2.0)
  assert len(places) == 1


def test_published_runs_make_the_report(snlp_run, tmp_path):
  file = report.publish(snlp_run[0], tmp_path)
  assert file == tmp_path / "snlp" / "test.json"
  runs = report.load(tmp_path)
  text = report.paper_markdown(runs)
  assert "## snlp at scale test" in text and "![" in text and "test.perplexity.png" in text
  assert "](results/snlp/README.md) |" in report.results_markdown(runs) and runs[0]["finding"] in report.readme_table(
    runs
  )
  page = report.page(runs, tmp_path)
  assert page.count("data:image/png;base64") == len(runs[0]["figures"])
  with pytest.raises(InputError, match=r"no results\.json"):
    report.publish(tmp_path / "empty", tmp_path)
  assert runs == [report.evaluated(runs[0])] and runs[0]["claims"]  # of the digits that are published


def test_a_published_run_is_restored_and_goes_on(tmp_path, monkeypatch):
  """Its parts, with where they were measured; what it did not have is measured, nothing else."""
  monkeypatch.setattr(report, "evaluated", lambda run: run)  # its claims are no experiment's
  calls, config = (
    [],
    ml_collections.ConfigDict({"paper": "snlp", "scale": "test", "parts": ("a",), "a": {"subjects": ("base",)}}),
  )

  def measured(workdir, *names):
    workdir.mkdir(exist_ok=True)
    one = lambda name: lambda: calls.append(name) or {"value": [1.0, float("nan")]}
    metrics = {"a": {name: results.part(workdir, f"a.{name}", one(name)) for name in names}}
    metrics["x.y"] = {"z": results.part(workdir, "x.y.z", lambda: {"value": 2.0})}  # a key with a dot
    found = Report(metrics, [Claim("c", "x", "lower", ours=1.0, threshold=2.0)], "f", undefined=("a.*",))
    results.write(found, config, workdir, 1.0, "command")
    return metrics

  first = measured(tmp_path / "first", "base")
  file = report.publish(tmp_path / "first", tmp_path / "results")
  assert report.restore(file, tmp_path / "again") == ["a.base", "x.y.z"]
  config.parts, config.a.subjects = ("a", "b"), ("base", "smollm2")
  run._same_config(config, tmp_path / "again")
  second = measured(tmp_path / "again", "base", "smollm2")
  np.testing.assert_equal(second["a"]["base"], first["a"]["base"])
  origins = [json.loads((tmp_path / name / "results.json").read_text())["parts"] for name in ("first", "again")]
  assert calls == ["base", "smollm2"] and report.rounded(origins[0]["a.base"]) == origins[1]["a.base"]
  with pytest.raises(InputError, match="is not empty; name a new folder"):
    report.restore(file, tmp_path / "again")
  lost = json.loads(file.read_text())
  file.write_text(json.dumps(lost | {"metrics": {"b": 1}}))
  with pytest.raises(InputError, match=r"part a\.base of .* is no entry of its metrics"):
    report.restore(file, tmp_path / "more")
  with pytest.raises(InputError, match=r"name results/<paper>/<scale>\.json"):
    report.restore(tmp_path / "none.json", tmp_path / "more")


def test_what_is_published_is_small_or_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "evaluated", lambda run: run)
  run = {"paper": "snlp", "scale": "test", "figures": {}, "metrics": {"raw": list(range(30_000))}}
  (tmp_path / "results.json").write_text(json.dumps(run))
  with pytest.raises(InputError, match="100000 at most; put summaries"):
    report.publish(tmp_path, tmp_path / "out")
  assert json.loads(report.compact(run)) == run
  assert report.rounded({"a": [1.23456789, "x", 7]}) == {"a": [1.23457, "x", 7]}


def test_the_verdict_follows_the_headline_and_the_papers_figures():
  claim = lambda name, holds, **more: {"name": name, "holds": holds} | more
  run = lambda *claims: {"headline": "a", "claims": claims, "scale": "gpu"}
  assert report.verdict(run(claim("a", True)) | {"scale": "cpu"}) == "open"
  assert report.verdict(run(claim("a", False), claim("b", True))) == "not"
  assert report.verdict(run(claim("a", True), claim("b", False, paper=1))) == "partly"
  assert report.verdict(run(claim("a", True, paper=2), claim("b", False), claim("c", True))) == "reproduced"
  assert report.verdict(run(claim("a", True, paper=2), claim("b", False))) == "partly"


def test_the_committed_report_is_what_the_results_say():
  for file, content in report.generated(report.load()).items():
    assert file.read_text() == content, f"{file}: run make report"


def test_a_part_is_measured_once_and_read_as_it_was_measured(tmp_path):
  calls = []

  def measure():
    calls.append(1)
    return {"loss": [1.5, float("nan")], "best": float("-inf"), "name": "nano"}

  for _ in range(2):
    found = results.part(tmp_path, "quality", measure)
    np.testing.assert_equal(found, {"loss": [1.5, np.nan], "best": -np.inf, "name": "nano"})
  assert len(calls) == 1
  (tmp_path / "quality.part.json").write_text('{"result": [1')
  with pytest.raises(InputError, match=r"quality\.part\.json: .*; remove it to measure this part again"):
    results.part(tmp_path, "quality", measure)


def test_results_name_every_version_that_measured_a_part(tmp_path):
  config = ml_collections.ConfigDict({"paper": "p", "scale": "test"})
  for name, device, jax in (("a", "1 x CPU", "0.1"), ("b", "1 x GPU", "0.2"), ("c", "1 x GPU", "0.2")):
    assert not results.has_part(tmp_path, name)
    results.part(tmp_path, name, lambda: 1)
    file = tmp_path / f"{name}.part.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"device": device, "versions": kept["versions"] | {"jax": jax}}))
    assert results.has_part(tmp_path, name)
  report_of = Report({}, [Claim("c", "x", "lower", ours=1.0, threshold=2.0)], "found")
  written = results.write(report_of, config, tmp_path, 1.0, "command")
  assert written["device"] == "1 x CPU, 1 x GPU" and written["versions"]["jax"] == "0.1, 0.2"
  assert written["versions"]["flax"].count(",") == 0
