"""The figures."""

from pathlib import Path

from experiments import figures
from experiments.nexus.chips import title
from experiments.nexus.simulate import limit_of, sustained

NAMES = {
  "vllm": "as vLLM", "sglang": "as SGLang", "spf": "one batch, shortest first", "fastserve": "FastServe",
  "vllm_pd": "two GPUs", "reactive": "feedback", "nexus": "Nexus", "static_30": "split 30:70",
  "static_50": "split 50:50", "static_70": "split 70:30", "fcfs_static": "50:50, by arrival",
  "fcfs_dynamic": "dynamic, by arrival",
}  # fmt: skip


def draw(config, metrics_: dict, workdir: Path) -> dict[str, str]:
  """{file: caption}."""
  s = config.simulate
  chip, workload = s.chips[0], s.workloads[0]
  rows, limit = metrics_[f"sweep.{chip}.{workload}"]["rows"], limit_of(chip, workload)
  figure, (left, right) = figures.subplots(2)
  for system in dict.fromkeys(row["system"] for row in rows):
    mine = [row for row in rows if row["system"] == system and row["load"]]
    style = dict(linewidth=2.5) if system == "nexus" else dict(alpha=0.8)
    left.plot([r["rate"] for r in mine], [r["latency_p95"] for r in mine], "o-", label=NAMES[system], **style)
  left.axhline(limit, color="grey", linestyle=":")
  left.set(yscale="log", xlabel="requests a second", ylabel="seconds a token, 95th percentile")
  left.legend(fontsize=8)
  arms = {row["arm"]: row for row in metrics_[f"ablation.{chip}"]["rows"] if row["arm"] in s.arms}
  for arm, row in arms.items():
    right.scatter(row["ttft_mean"], row["tbt_mean"], label=NAMES[arm], marker="*" if arm == "nexus" else "o", s=70)
  right.set(xlabel="seconds to the first token, mean", ylabel="seconds between tokens, mean")
  right.set(xlim=(0, None), ylim=(0, None))
  right.legend(fontsize=8)
  captions = {
    figures.save(figure, workdir, "rates"): f"Left: {workload} requests on {title(chip)}, simulated; dotted: the "
    f"limit. Right: at {s.arms_load:.0%} of the prompts that the chip could read by itself."
  }
  figure, (left, right) = figures.subplots(2)
  curves = metrics_[f"predictor.{chip}"]["curves"]
  for color, (phase, row) in zip(("C0", "C1"), curves.items(), strict=True):
    whole = row["truth"][-1]
    scaled = lambda name, row=row, whole=whole: [value / whole for value in row[name]]
    left.plot(row["percent"], scaled("truth"), color=color, label=f"{phase}: chip")
    left.plot(row["percent"], scaled("paper"), color=color, linestyle="--", label=f"{phase}: the paper's model, fitted")
    left.plot(row["percent"], scaled("memory"), color=color, linestyle=":", label=f"{phase}: with memory by share")
  left.set(xlabel="percent of the processors", ylabel="seconds, over those on all of them", yscale="log")
  left.set_yticks((1, 2, 5, 10), labels=("1", "2", "5", "10"))
  left.legend(fontsize=8)
  labels, gains = [], []
  for name in (name for name in metrics_ if name.startswith("sweep.")):
    _, on, what = name.split(".")
    most = limit_of(on, what)
    at = lambda system, name=name, most=most: sustained(metrics_[name]["rows"], system, most)
    labels.append(f"{what},\n{title(on).split(maxsplit=1)[1]}")
    gains.append([at(system) / at("vllm") for system in ("sglang", "nexus")])
  width = 0.25
  for i, system in enumerate(("sglang", "nexus")):
    right.bar([x + width * i for x in range(len(gains))], [row[i] for row in gains], width, label=NAMES[system])
  right.axhline(1, color="grey", linestyle=":")
  right.set_xticks([x + width / 2 for x in range(len(gains))], labels=labels, fontsize=8)
  right.set(ylabel="requests a second within the limit, over vLLM's")
  right.legend(fontsize=8)
  return captions | {
    figures.save(figure, workdir, "model"): "Left: a step by itself on a share of the chip, and what the controller "
    "believes. Right: what systems sustain on other requests and chips."
  }
