"""The figures of the experiment."""

from pathlib import Path

from experiments import figures


def frontier(perplexities: dict, rates: dict[str, float], workdir: Path) -> dict[str, str]:
  """Tokens a second against perplexity on every text, one line a network.

  Args:
    perplexities: {network: {text: {setting: perplexity}}}.
    rates: {setting: tokens a second}.
  """
  names = list(next(iter(perplexities.values())))
  figure, axes = figures.subplots(len(names), squeeze=False)
  for axis, text in zip(axes[0], names, strict=True):
    for network, found in perplexities.items():
      points = sorted((rates[setting], p, setting) for setting, p in found[text].items() if setting in rates)
      x, y, settings = zip(*points, strict=True)
      axis.plot(x, y, "o-", label=network)
      for point in zip(x, y, settings, strict=True) if network == next(iter(perplexities)) else ():
        axis.annotate(point[2], point[:2], xytext=(4, 4), textcoords="offset points", size=7)
    axis.set(xlabel="decoded tokens/s", ylabel="perplexity", yscale="log", title=f"{text} text")
    axis.legend(fontsize=7)
  return {
    figures.save(figure, workdir, "frontier"): "Speed of decoding against perplexity, the untouched network first"
  }
