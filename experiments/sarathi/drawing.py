"""The figures."""

from pathlib import Path

from matplotlib import ticker

from experiments import figures
from experiments.sarathi.profile import marginal
from experiments.sarathi.serve import ORCA, OURS, QUANTILES, balance


def draw(config, metrics_: dict, workdir: Path) -> dict[str, str]:
  """{file: caption}, of the first model."""
  (name, found), *_ = metrics_.items()
  figure, (left, right) = figures.subplots(2)
  length = found["throughput"][0]["length"]
  for policy in config.throughput.policies:
    rows = [row for row in found["throughput"] if row["policy"] == policy and row["length"] == length]
    left.plot([r["ratio"] for r in rows], [r["rate"] for r in rows], "o-", label=policy.replace("_", " "))
  left.axvline(balance(config), color="grey", linestyle=":")
  left.set(xscale="log", xlabel="prompt over answer (P:D)", ylabel="tokens a second")
  left.set_xticks(config.throughput.ratios, labels=[f"{ratio:g}" for ratio in config.throughput.ratios], minor=False)
  left.minorticks_off()
  left.legend(fontsize=8)
  figures.leave_room(left)
  for chunk in config.profile.chunks:
    rows = [row for row in marginal(found["profile"]) if row["chunk"] + row["decode"] == chunk]
    right.plot([row["decode"] for row in rows], [row["ratio"] for row in rows], "o", label=f"steps of {chunk}")
  right.axhline(1, color="grey", linestyle=":")
  right.set(xscale="log", xlabel="rows that decode", ylabel="cost of a riding token over one alone", ylim=(0, None))
  right.set_xticks(config.profile.rows, labels=[f"{rows}" for rows in config.profile.rows])
  right.minorticks_off()
  right.legend(fontsize=8)
  captions = {
    figures.save(figure, workdir, "throughput"): f"{name}: {length} tokens a request, all of them waiting; dotted: the "
    "balance. Right: what the rows that decode add to a chunk, over what they cost alone."
  }
  figure, (left, right) = figures.subplots(2)
  for way, row in found["bubbles"].items():
    if way != "replicas":
      left.plot(row["idle"], QUANTILES, label={OURS: "chunks", ORCA: "whole prompts"}[way])
  left.set(xlabel="seconds that stages stood idle for a request", ylabel="% of requests", xscale="log")
  left.legend()
  load = max(config.online.loads)
  for row in found["online"]:
    if row["load"] == load:
      right.plot([1000 * seconds for seconds in row["tbt"]], QUANTILES, label=row["policy"].replace("_", " "))
  right.set(xlabel="milliseconds between tokens", ylabel="%", xscale="log")
  right.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  right.xaxis.set_major_formatter("{x:g}")
  right.xaxis.set_minor_formatter("")
  right.legend(fontsize=8)
  return captions | {
    figures.save(figure, workdir, "waiting"): f"Left: a pipeline of {config.bubbles.stages} stages, simulated with the "
    f"measured cost of a step. Right: {name} at {load:.2g} of its capacity, requests that arrive at random."
  }
