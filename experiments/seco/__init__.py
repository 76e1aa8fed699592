"""SeCO and SpaCO: what gradients of a long sequence in chunks cost, how near they are, and what they train.

A module here is a part of the run. With config.model one checkpoint is fine-tuned, and nothing else.
"""

import functools
from pathlib import Path

from experiments import long_finetuning, results
from experiments.long_context import opened
from experiments.results import Claim
from experiments.seco import costs, drawing, gradients, training
from experiments.seco.costs import LAYERS, NAIVE, in_chunks
from experiments.seco.training import EXACT, SECO, TRUNCATED, spaco
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.models import hub
from jaxlab.training import loop

COSTS, GRADIENTS, TRAINING, TUNED = "costs", "gradients", "training", long_finetuning.TUNED


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """The parts of config.parts on config.subject; of config.model alone where it is given, a folder."""
  if config.model:
    gradient_of = training.gradient_of(config.tuning, config.method)
    run = lambda: long_finetuning.measure(config, gradient_of, workdir, cache, console)
    return {TUNED: results.part(workdir, TUNED, run)}
  missing = sorted({EXACT, SECO, TRUNCATED, main(config)} - set(config.methods))
  require(not missing, f"config.methods lacks {', '.join(missing)}, which the claims are about; name them and others")
  subject = functools.cache(lambda: opened(config, config.subject, cache))
  original = functools.cache(lambda: hub.load(subject()[1], dtype="float32"))

  def costs_of() -> dict:
    return costs.measure(config, loop.cast(original(), config.costs.dtype), console)

  def gradients_of() -> dict:
    console.say("drawing gradients")
    tokens = subject()[2].split("validation")
    batch = packing.evaluation_batches(tokens, row=config.gradients.length, batch=1, limit=1)[0]
    model = long_finetuning.stretched(original(), config.gradients.length, config.tuning.rope)
    return gradients.measure(config, model, batch)

  def kept(parameters: str, method: str, rate: float, seed: int) -> tuple[str, dict]:
    name = run_name(parameters, method, rate, seed)
    how = dict(rate=rate, seed=seed, workdir=workdir / "runs" / name, console=console)
    run = lambda: training.run(config, parameters, method, original(), subject()[2], **how)
    return name, results.part(workdir, f"{TRAINING}.{name}", run)

  def training_of() -> dict:
    found = {}
    for parameters in config.parameters:
      for method in config.methods:
        rates = config.rates[parameters]
        found |= dict(kept(parameters, method, rate, config.seeds[0]) for rate in rates)
        best = best_rate(config, {TRAINING: found}, parameters, method)
        found |= dict(kept(parameters, method, best, seed) for seed in config.seeds[1:])
    return found

  measures = {
    COSTS: lambda: results.part(workdir, COSTS, costs_of),
    GRADIENTS: lambda: results.part(workdir, GRADIENTS, gradients_of),
    TRAINING: training_of,
  }
  return {name: measures[name]() for name in config.parts}


def run_name(parameters: str, method: str, rate: float, seed: int) -> str:
  """Of a training run: no dot, which would part metrics."""
  return f"{parameters}_{method.replace(' ', '_')}_rate_{1e6 * rate:.0f}_seed_{seed}"


def main(config) -> str:
  """The method that the claims about SpaCO are of."""
  return spaco(config.share, "2")


def best_rate(config, metrics: dict, parameters: str, method: str) -> float:
  """By the validation loss of the first seed."""
  of = lambda rate: metrics[TRAINING][run_name(parameters, method, rate, config.seeds[0])]["validation"]
  return min(config.rates[parameters], key=of)


def losses_of(config, metrics: dict, parameters: str) -> dict[str, float]:
  """{method: loss of the test split at its best rate, mean over the seeds}."""
  found = {}
  for method in config.methods:
    best = best_rate(config, metrics, parameters, method)
    each = [metrics[TRAINING][run_name(parameters, method, best, seed)]["test"] for seed in config.seeds]
    found[method] = sum(each) / len(each)
  return found


def claims(config, metrics: dict) -> list[Claim]:
  if TUNED in metrics:
    return long_finetuning.claims(metrics[TUNED])
  made = cost_claims(config, metrics[COSTS]) if COSTS in metrics else []
  made += gradient_claims(config, metrics[GRADIENTS]) if GRADIENTS in metrics else []
  return made + (training_claims(config, metrics) if TRAINING in metrics else [])


def cost_claims(config, found: dict) -> list[Claim]:
  chunk = config.costs.chunks[0]
  small, few = in_chunks(chunk), in_chunks(chunk, config.costs.visited[0])
  longest = list(found)[-1]
  bytes_of = found[longest]["temporaries"]
  listed = "; ".join(
    f"{length}: " + ", ".join(f"{name} {size / 1e6:.4g}" for name, size in one["temporaries"].items())
    for length, one in found.items()
  )
  made = [
    Claim(
      f"Temporary memory of backpropagation over SeCO's, {longest} tokens", "x", "higher",
      ours=bytes_of[NAIVE] / bytes_of[small], threshold=4.0, paper=10.0,
      baseline=f"{bytes_of[NAIVE] / 1e6:.4g} MB, attention without scores", note=f"MB: {listed}",
    ),
    Claim(
      f"Temporary memory with every layer computed again over SeCO's, {longest} tokens", "x", "higher",
      ours=bytes_of[LAYERS] / bytes_of[small], threshold=2.0, paper=4.0,
      baseline=f"{bytes_of[LAYERS] / 1e6:.4g} MB",
    ),
  ]  # fmt: skip
  both = lambda *names: [length for length, one in found.items() if set(names) <= set(one["milliseconds"])]
  ms = lambda length, name: found[length]["milliseconds"][name]["median"]
  timed = lambda length: ", ".join(f"{name} {ms(length, name):.4g} ms" for name in found[length]["milliseconds"])
  if at := both(NAIVE, small)[-1:]:
    made.append(
      Claim(
        f"Time of SeCO's gradient over backpropagation's, {at[0]} tokens", "x", "lower",
        ours=ms(at[0], small) / ms(at[0], NAIVE), threshold=1.5, paper=1.3, baseline=f"{ms(at[0], NAIVE):.4g} ms",
        note=timed(at[0]),
      )
    )  # fmt: skip
  if at := both(small, few)[-1:]:
    made.append(
      Claim(
        f"How many times as fast as SeCO's SpaCO's gradient is, {at[0]} tokens", "x", "higher",
        ours=ms(at[0], small) / ms(at[0], few), threshold=2.0, paper=3.0, baseline=f"{ms(at[0], small):.4g} ms",
        note=f"{config.costs.visited[0]} of {int(at[0]) // chunk} chunks visited",
      )
    )  # fmt: skip
  return made


def gradient_claims(config, found: dict) -> list[Claim]:
  estimates = {name: one for name, one in found.items() if name != "seco"}
  first = next(iter(estimates)).split(",")[0]
  at = {limit: estimates[f"{first}, {limit}"] for limit in config.limits}
  listed = "; ".join(
    f"{name}: one {one['cosine']:.3f}, mean {one['of_mean']:.3f}, length {one['length']:.2f}"
    for name, one in estimates.items()
  )
  return [
    Claim(
      "Difference of SeCO's gradient to the exact one, over its length", "", "lower", ours=found["seco"]["error"],
      threshold=1e-4, baseline="backpropagation, float32",
    ),
    Claim(
      "Cosine to the exact gradient of SpaCO's mean over draws, above that without compensation", "", "higher",
      ours=at["none"]["of_mean"] - at["1"]["of_mean"], threshold=0.0, baseline=at["1"]["of_mean"],
      note=f"{first} chunks visited, {config.gradients.draws} draws; {listed}",
    ),
  ]  # fmt: skip


def training_claims(config, metrics: dict) -> list[Claim]:
  loss = {parameters: losses_of(config, metrics, parameters) for parameters in config.parameters}
  listed = "; ".join(
    f"{parameters}: " + ", ".join(f"{method} {value:.4g}" for method, value in of.items())
    for parameters, of in loss.items()
  )
  over = lambda method, rival: max(of[method] - of[rival] for of in loss.values())
  how, sparse, plain = f"{config.tuning.steps} steps", main(config), spaco(config.share, "1")
  made = [
    Claim(
      "Loss after SeCO over that after exact gradients, of it, worst of full and low-rank tuning", "%", "lower",
      ours=max(100 * abs(of[SECO] / of[EXACT] - 1) for of in loss.values()), threshold=0.3, baseline="exact gradients",
      note=f"{how}, each at the best of the same rates; {listed}",
    ),
    Claim(
      f"Loss after SpaCO with one chunk in {config.share} over that after exact gradients, worst", "nats", "lower",
      ours=over(sparse, EXACT), threshold=0.1, baseline="exact gradients", note="compensation at most 2",
    ),
    Claim(
      "Loss after SpaCO over that after truncated backpropagation, worst", "nats", "lower",
      ours=over(sparse, TRUNCATED), threshold=0.0,
      baseline="every chunk visited, nothing sent back: more work than SpaCO's",
    ),
  ]  # fmt: skip
  if plain in config.methods:
    made.append(
      Claim(
        "Loss after SpaCO with compensation over that without, worst", "nats", "lower", ours=over(sparse, plain),
        threshold=0.0, baseline=f"{plain}",
      )
    )  # fmt: skip
  return made


def finding(config, metrics: dict) -> str:
  if TUNED in metrics:
    return long_finetuning.finding(metrics[TUNED])
  said = []
  if COSTS in metrics:
    memory, layers, *times = cost_claims(config, metrics[COSTS])
    said.append(
      f"backpropagation takes {memory.ours:.2f}x SeCO's temporary memory at {list(metrics[COSTS])[-1]} tokens (paper "
      f"about 10x), with layers computed again {layers.ours:.2f}x (paper over 4x)"
    )
    said += [f"SeCO takes {time.ours:.2f}x the time (paper 1.3x)" for time in times[:1]]
  if TRAINING in metrics:
    exact, sparse, *_ = training_claims(config, metrics)
    said.append(
      f"fine-tuned by it the loss is {exact.ours:.2f} % from exact gradients', by SpaCO {sparse.ours:+.3f} nats"
    )
  text = "; ".join(said) or f"SeCO's gradient differs by {metrics[GRADIENTS]['seco']['error']:.1e}"
  return f"{text[0].upper()}{text[1:]}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  if TUNED in metrics:
    return {}
  losses = {p: losses_of(config, metrics, p) for p in config.parameters} if TRAINING in metrics else {}
  return drawing.picture(metrics.get(COSTS, {}), metrics.get(GRADIENTS, {}), losses, workdir)
