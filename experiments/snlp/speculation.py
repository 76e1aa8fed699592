"""Self-speculation in SNLP's experiment: how fast whole generations are, and whether the tokens are the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import timing
from experiments.overlap import overlapped
from experiments.results import Claim
from experiments.snlp.quality import main_model
from experiments.snlp.settings import parse, solved_layers
from experiments.text import Text
from jaxlab.data import packing
from jaxlab.depth import snlp_inference
from jaxlab.depth.snlp_speculative import speculate
from jaxlab.models import Transformer
from jaxlab.training import loop

SEQUENTIAL = None  # the contestant without a drafter


def measure(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """{model: {"settings": {"n24 K2 B4": acceptance, times, ...}, "shortfall" of sequential generation's own tokens}}.

  A run's `equal_tokens` is the share of tokens equal to sequential ones. In 16 bits two kernels may round near-equal
  logits to either order, after which the texts differ; `float32` says what is equal where that is rare, `shortfall`
  how far below its network's largest logit a token lies (see `shortfall`).
  """
  spec = config.speculation
  rows = packing.evaluation_batches(text.split(config.eval.split), row=config.eval.length, batch=1, limit=10**9)
  prompts = [jnp.asarray(rows[i]["inputs"][:, : spec.prompt]) for i in range(spec.prompts)]
  programs = _compiled(spec, models, prompts, spec.drafts)
  result = {}
  for name, model in models.items():
    console.say(f"speculating, {name}")
    sequential = [programs[SEQUENTIAL](_split(model, SEQUENTIAL), p) for p in prompts]
    short = functools.partial(_worst_and_mean, loop.cast(model, "float32"), prompts)
    result[name] = {"shortfall": short(sequential), "settings": {}}
    for case in _cases(spec, spec.drafts):
      tokens, statistics = zip(*[programs[case](_split(model, case), p) for p in prompts], strict=True)
      accepted, cycles = (sum(int(getattr(s, part)) for s in statistics) for part in ("accepted", "cycles"))
      result[name]["settings"][_title(case)] = {
        "acceptance": accepted / (cycles * case[1]),
        "tokens_per_cycle": 1 + accepted / cycles,
        "equal_tokens": _equal(tokens, sequential),
        "shortfall": short(tokens),
        **_times(spec, programs, model, case, prompts),
      }
  if config.train.dtype != "float32":
    _add_float32(spec, models, prompts, result, console)
  return result


def _add_float32(spec, models, prompts, result: dict, console) -> None:
  """`float32` of every setting at its longest draft: equal tokens of the same weights in float32, full products."""
  models = {name: loop.cast(model, "float32") for name, model in models.items()}
  longest = (max(spec.drafts),)
  programs = _compiled(spec, models, prompts, longest)
  for name, model in models.items():
    console.say(f"speculating in float32, {name}")
    sequential = [programs[SEQUENTIAL](_split(model, SEQUENTIAL), p) for p in prompts]
    for case in _cases(spec, longest):
      tokens = [programs[case](_split(model, case), p)[0] for p in prompts]
      result[name]["settings"][_title(case)]["float32"] = _equal(tokens, sequential)


def _cases(spec, drafts) -> list[tuple[str, int]]:
  return [(setting, draft) for setting in spec.settings for draft in drafts]


def _title(case: tuple[str, int]) -> str:
  return f"{case[0]} B{case[1]}"


def _split(model: Transformer, case) -> snlp_inference.Network:
  return snlp_inference.split(model, 0 if case is SEQUENTIAL else solved_layers(model, parse(case[0])))


def _compiled(spec, models: dict[str, Transformer], prompts, drafts) -> dict:
  """{SEQUENTIAL or (setting, draft): compiled generation}; all models have one shape."""
  model = next(iter(models.values()))
  functions = {SEQUENTIAL: lambda n, p: snlp_inference.generate(n, p, tokens=spec.tokens)}
  for setting, draft in _cases(spec, drafts):
    options = {key: parse(setting)[key] for key in ("iterations", "surrogate", "initial")}
    functions[setting, draft] = functools.partial(speculate, tokens=spec.tokens, draft=draft, **options)

  def compiled(item):
    case, function = item
    with jax.default_matmul_precision("highest" if model.dtype == jnp.float32 else "default"):
      return jax.jit(function).lower(_split(model, case), prompts[0]).compile()

  return dict(zip(functions, overlapped(compiled, functions.items()), strict=True))


def _times(spec, programs, model: Transformer, case, prompts) -> dict:
  """Whole generations of all prompts, beside sequential ones."""
  plain, network = _split(model, SEQUENTIAL), _split(model, case)
  pair = {
    "sequential": lambda: [programs[SEQUENTIAL](plain, p) for p in prompts],
    "speculative": lambda: [programs[case](network, p) for p in prompts],
  }
  times = timing.compare(pair, repetitions=spec.repetitions, warmup=1)
  ratio, spread = times.speedup("speculative", "sequential")
  return {"speedup": ratio, "spread": spread, "milliseconds": times.summary()}


def _equal(tokens, expected) -> float:
  return float(np.mean([np.mean(np.asarray(a == b)) for a, b in zip(tokens, expected, strict=True)]))


@jax.jit
def shortfall(model: Transformer, prompt, generated):
  """Largest logit less the token's own, for every generated token given those before it: 0 where it is the argmax.

  (batch, tokens), by one forward of the sequential network. Greedy decoding by other arithmetic than `model`'s falls
  short by as much as it rounds.
  """
  with jax.default_matmul_precision("highest"):
    logits = model(jnp.concatenate([prompt, generated], axis=1)[:, :-1])[:, prompt.shape[1] - 1 :]
  return logits.max(axis=-1) - jnp.take_along_axis(logits, generated[..., None], axis=-1)[..., 0]


def _worst_and_mean(model: Transformer, prompts, generated) -> dict:
  short = np.concatenate([np.ravel(shortfall(model, p, g)) for p, g in zip(prompts, generated, strict=True)])
  return {"worst": float(short.max()), "mean": float(short.mean())}


def claims(measured: dict) -> list[Claim]:
  """Faster than sequential generation, with its tokens: those of the same network up to its own rounding."""
  main = main_model(measured)
  setting, best = max(measured[main]["settings"].items(), key=lambda item: item[1]["speedup"])
  runs = [run for model in measured.values() for run in model["settings"].values()]
  exact = [run["float32"] for run in runs if "float32" in run]
  equal = min(run["equal_tokens"] for run in runs)
  made = [
    Claim(
      "How many times as fast self-speculation generates as the sequential network", "x", "higher",
      ours=best["speedup"], threshold=1.0, spread=tuple(best["spread"]),
      baseline="cached sequential generation, one jit",
      note=f"{main} model, {setting}, the best of {len(measured[main]['settings'])}: "
      f"{best['acceptance']:.0%} of drafts taken, {best['tokens_per_cycle']:.2f} tokens a cycle",
    ),
    Claim(
      "Share of speculative tokens that are the sequential ones in float32, worst run", "", "higher",
      ours=min(exact, default=equal), threshold=1.0, baseline="sequential greedy generation",
    ),
  ]  # fmt: skip
  if exact:
    worst = max(run["shortfall"]["worst"] for run in runs)
    own = max(model["shortfall"]["worst"] for model in measured.values())
    made.append(
      Claim(
        "Share of speculative tokens that are the sequential ones in 16 bits, worst run", "", "higher",
        ours=equal, threshold=1.0, baseline="sequential greedy generation",
        note="one rounding of a near tie, and the texts differ from there on: scored in float32, a speculative token "
        f"misses its network's largest logit by {worst:.2g} at most, a sequential one by {own:.2g}",
      )
    )  # fmt: skip
  return made
