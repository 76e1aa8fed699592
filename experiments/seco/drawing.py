"""The figure of the experiment."""

from pathlib import Path

from experiments import figures
from experiments.seco.training import EXACT


def picture(costs: dict, gradients: dict, losses: dict, workdir: Path) -> dict[str, str]:
  """Memory over lengths, cosines of estimates, and losses after fine-tuning over that of exact gradients."""
  figure, axes = figures.subplots(3)
  names = list(dict.fromkeys(name for one in costs.values() for name in one["temporaries"]))
  for name in names:
    points = [(int(n), one["temporaries"][name] / 1e6) for n, one in costs.items() if name in one["temporaries"]]
    axes[0].plot(*zip(*points, strict=True), "o-", ms=4, label=name)
  axes[0].set(xlabel="tokens", ylabel="MB", title="Temporary memory of a gradient", xscale="log", yscale="log")
  estimates = {name: one for name, one in gradients.items() if name != "seco"}
  for shift, kind, label in ((-0.2, "cosine", "one draw"), (0.2, "of_mean", "mean of the draws")):
    places = [place + shift for place in range(len(estimates))]
    axes[1].bar(places, [one[kind] for one in estimates.values()], 0.4, label=label)
  axes[1].set_xticks(range(len(estimates)), estimates, rotation=60, fontsize=7)
  axes[1].set(ylabel="cosine to the exact gradient", title="SpaCO: chunks visited, largest compensation")
  for shift, (parameters, of) in zip((-0.2, 0.2), losses.items(), strict=False):
    over = {method: value - of[EXACT] for method, value in of.items() if method != EXACT}
    axes[2].bar([place + shift for place in range(len(over))], list(over.values()), 0.4, label=parameters)
    axes[2].set_xticks(range(len(over)), over, rotation=60, fontsize=7)
  axes[2].set(ylabel="loss over exact gradients' (nats)", title="After fine-tuning")
  for axis in axes:
    if axis.get_legend_handles_labels()[1]:
      axis.legend(fontsize=7)
  caption = "Temporary memory of a gradient, how near SpaCO's estimates are, losses after fine-tuning"
  return {figures.save(figure, workdir, "gradients"): caption}
