"""The figures of SNLP's experiment; those of speed are in `snlp_speed`."""

from pathlib import Path

from experiments import figures
from experiments.snlp_claims import REGULARISED, is_idn, lost
from jaxlab.training.metrics import read_metrics


def quality(measured: dict, workdir: Path, *, trained: bool) -> dict[str, str]:
  """{file: caption} of the figures of quality; of training too if this run trained the models."""
  files = {
    draw_perplexity(measured, workdir): "Perplexity lost against the sequential network, by Newton steps K",
    draw_trace_error(measured, workdir): "Error of one Newton step at each layer of the suffix",
  }
  if trained and REGULARISED in measured:
    files[draw_training(measured, workdir)] = "Training loss of the two models"
  return files


def draw_perplexity(quality: dict, workdir: Path) -> str:
  most = max(lost(quality, name, t) for name, q in quality.items() for t, r in q["snlp"].items() if is_idn(r))
  figure, axes = figures.subplots(len(quality), squeeze=False, sharey=True)
  for axis, (name, q) in zip(axes[0], quality.items(), strict=True):
    rows = {text: r for text, r in q["snlp"].items() if is_idn(r)}
    for n in sorted({r["layers"] for r in rows.values()}):
      points = sorted((r["iterations"], lost(quality, name, t)) for t, r in rows.items() if r["layers"] == n)
      axis.plot(*zip(*points, strict=True), "o-", label=f"n = {n} of {q['depth']}")
    axis.axhline(0, color="black", lw=0.8, ls=":")
    axis.set(title=f"{name} model", xlabel="Newton steps K", xscale="log")
    axis.set_xticks(ticks := sorted({r["iterations"] for r in rows.values()}), ticks)
    _scale_lost(axis, most)
    axis.legend()
  axes[0][0].set_ylabel("perplexity lost (%)")
  return figures.save(figure, workdir, "perplexity")


def _scale_lost(axis, most: float) -> None:
  """Up to `most` percent: linear where little is lost, logarithmic where much is."""
  axis.set_yscale("symlog", linthresh=1.0)
  axis.set_yticks(ticks := [0, 0.25, 0.5, 1, 3, 10, 30, 100, 300], ticks)
  axis.set_ylim(-0.1, 1.2 * max(0.25, most))
  axis.minorticks_off()


def draw_trace_error(quality: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  for name, q in quality.items():
    axis.plot(range(1, len(q["trace_error"]) + 1), q["trace_error"], "o-", label=name)
  axis.set(xlabel="layer of the suffix", ylabel="||z - h|| / ||h|| after one step", title="Trace error, K = 1 from h0")
  axis.legend()
  return figures.save(figure, workdir, "trace_error")


def draw_training(quality: dict, workdir: Path) -> str:
  figure, axis = figures.subplots()
  for name in quality:
    rows = read_metrics(workdir / name)
    axis.plot([r["step"] for r in rows], [r.get("cross_entropy", r["loss"]) for r in rows], label=name, lw=1)
  axis.set(xlabel="step", ylabel="cross-entropy (nats)", title="Training")
  axis.legend()
  return figures.save(figure, workdir, "training")


def frontier(metrics: dict, workdir: Path) -> dict[str, str]:
  """Settings whose quality and speed were both measured; the first case stands for speed."""
  name, case = next(iter(metrics["speed"]["cases"].items()))
  quality = metrics["quality"]
  figure, axis = figures.subplots()
  for model in quality:
    both = [text for text in quality[model]["snlp"] if text in case["speedup"]]
    points = {text: (case["speedup"][text]["ratio"], lost(quality, model, text)) for text in both}
    points["sequential"] = (1.0, 0.0)
    axis.plot(*zip(*points.values(), strict=True), "o", label=model)
    for text, (speed, loss) in points.items():
      # Those that another one beats in both would only cover the names of the rest.
      if not any(s > speed and least < loss for s, least in points.values()):
        axis.annotate(text, (speed, loss), xytext=(4, 3), textcoords="offset points", size=7)
  _scale_lost(axis, max(lost(quality, model, text) for model in quality for text in both))
  axis.set_ylim(bottom=-0.2)
  axis.set(xlabel=f"speed-up ({name})", ylabel="perplexity lost (%)", title="Speed against quality")
  axis.legend()
  return {
    figures.save(figure, workdir, "frontier"): "Speed-up against perplexity lost; named where nothing is better in both"
  }


def competitors(result: dict, workdir: Path) -> dict[str, str]:
  """SNLP's settings and the rivals, speed against perplexity."""
  figure, axis = figures.subplots()
  for kind, rows in (
    ("SNLP, one network", {name: r for name, r in result.items() if "parameters" not in r}),
    ("networks of their own", {name: r for name, r in result.items() if "parameters" in r}),
  ):
    axis.plot([r["speedup"] for r in rows.values()], [r["perplexity"] for r in rows.values()], "o", label=kind)
    for name, r in rows.items():
      axis.annotate(name, (r["speedup"], r["perplexity"]), xytext=(4, 3), textcoords="offset points", size=7)
  axis.set(xlabel="speed-up of one decoding step", ylabel="perplexity", title="The same training tokens")
  axis.legend()
  return {figures.save(figure, workdir, "competitors"): "SNLP beside networks trained to be as fast"}
