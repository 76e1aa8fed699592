"""The figures of the experiment."""

from pathlib import Path

from experiments import figures


def frontier(perplexities: dict, rates: dict[str, float], workdir: Path) -> dict[str, str]:
  """Tokens a second against perplexity on every text, a colour a network.

  Args:
    perplexities: {network: {text: {setting: perplexity}}}.
    rates: {setting: tokens a second}.
  """
  names = list(next(iter(perplexities.values())))
  figure, axes = figures.subplots(len(names), squeeze=False)
  for axis, text in zip(axes[0], names, strict=True):
    for network, found in perplexities.items():
      points = [(rates[setting], perplexity) for setting, perplexity in found[text].items() if setting in rates]
      axis.plot(*zip(*points, strict=True), "o", ms=4, label=network)
    for setting, rate in rates.items():
      lowest = min(found[text][setting] for found in perplexities.values())
      axis.annotate(setting, (rate, lowest), xytext=(0, -10), textcoords="offset points", size=7, ha="center")
    axis.set(xlabel="decoded tokens/s", ylabel="perplexity", yscale="log", title=f"{text} text")
    axis.legend(fontsize=7)
  return {
    figures.save(figure, workdir, "frontier"): "Speed of decoding against perplexity, the untouched network first"
  }
