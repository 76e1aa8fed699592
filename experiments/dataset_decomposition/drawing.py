"""The figure of the experiment."""

from pathlib import Path

from experiments import figures
from experiments.dataset_decomposition.training import BEST_FIT, CONCAT, MASKED

NAMES = {CONCAT: "concat-and-chunk", MASKED: "with document mask", BEST_FIT: "best fit, mask"}


def picture(curves: dict, losses: dict, edges: list[int], rates: dict, workdir: Path) -> dict[str, str]:
  """Loss against training time, loss by position beside concat-and-chunk's, tokens a second by length.

  Args:
    curves: {arm: [(seconds, loss), ...]}; losses: {arm: of the groups of positions that end at `edges`};
    rates: {length, or "masked": thousand tokens a second}.
  """
  figure, axes = figures.subplots(3)
  for arm, points in curves.items():
    name = NAMES.get(arm, f"DD, {arm.replace('_', '-')}")
    axes[0].plot(*zip(*points, strict=True), "o-", ms=4, label=name)
    over = [a - b for a, b in zip(losses[arm], losses[CONCAT], strict=True)]
    axes[1].plot(range(len(edges)), over, "o-", ms=4, label=name)
  axes[0].set(xlabel="seconds of training steps", ylabel="loss of held-out chapters (nats)", title="Loss against time")
  axes[0].legend(fontsize=8)
  axes[1].set(xlabel="positions up to", ylabel="loss over concat-and-chunk's (nats)", title="Loss by position")
  axes[1].set_xticks(range(len(edges)), edges)
  lengths = [kind for kind in rates if kind != "masked"]
  axes[2].bar(lengths, [rates[kind] for kind in lengths])
  axes[2].axhline(rates["masked"], color="black", lw=1, ls="--", label=f"{lengths[-1]} with document mask")
  axes[2].set(xlabel="tokens of a sequence", ylabel="thousand tokens/s", title="Speed of a training step")
  figures.leave_room(axes[2], 0.15)
  axes[2].legend(fontsize=8, loc="upper right")
  caption = "Loss against training time, loss by position, speed by length of the sequences"
  return {figures.save(figure, workdir, "training"): caption}
