"""SNLP: train a model with and without the regulariser, run both layer-parallel, report quality and speed.

With config.model = "hf:DIR" nothing is trained: the method is run on that checkpoint as it is.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import figures, results, snlp_speed, timing
from experiments.results import Claim, Report
from experiments.snlp_settings import forward, parse, refit_config
from experiments.text import Text, checkpoint_folder, load_text, model_config, train_model
from jaxlab.core import mesh as meshes
from jaxlab.core.checks import require
from jaxlab.data import packing
from jaxlab.depth import snlp, snlp_inference, snlp_suffix
from jaxlab.depth.snlp_speculative import speculate
from jaxlab.models import Transformer, hub
from jaxlab.models.config import HyperConnections
from jaxlab.models.transformer import sequential
from jaxlab.training import loop, losses
from jaxlab.training.metrics import read_metrics
from jaxlab.training.optimizers import muon_adamw

PLAIN, REGULARISED = "plain", "regularised"
MHC, MHC_REGULARISED = "mhc", "mhc_regularised"


def run(config, workdir: Path, cache: Path, console) -> Report:
  """Measures the parts of config.parts; a part that this workdir holds already is not measured again."""
  folder = checkpoint_folder(config)
  parts = config.parts
  if folder:
    config = refit_config(config, hub.read_config(folder)[0].depth)
    parts = [name for name in parts if name not in ("memory", "hcn", "competitors")]  # those train
  for text in (*config.snlp.settings, *config.snlp.cached):
    parse(text)

  @functools.cache
  def prepared():
    text = load_text(config, cache, given=folder)
    if folder:
      models = {PLAIN: hub.load(folder)}
    else:
      shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length)
      check_suffixes(config, shape.depth)
      models = train_pair(config, text, shape, config.reg, (PLAIN, REGULARISED), workdir, console)
    check_suffixes(config, next(iter(models.values())).depth)
    return text, {name: loop.cast(model, config.train.dtype) for name, model in models.items()}

  def with_streams():
    """The pair with hyper-connections and their own regulariser."""
    text = load_text(config, cache)
    shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length, hyper=HyperConnections())
    models = train_pair(config, text, shape, config.hcn.reg, (MHC, MHC_REGULARISED), workdir, console)
    return text, {name: loop.cast(model, config.train.dtype) for name, model in models.items()}

  measures = {
    "quality": lambda: measure_quality(config, *prepared(), console),
    "speculation": lambda: measure_speculation(config, *prepared(), console),
    "hcn": lambda: measure_hcn(config, *with_streams(), console),
    "competitors": lambda: measure_competitors(config, *prepared(), workdir, console),
    "memory": lambda: measure_memory(config, prepared()[0], workdir),
  }
  metrics = {name: results.part(workdir, name, measures[name]) for name in parts if name != "speed"}
  if "speed" in parts:
    last = lambda: next(reversed(prepared()[1].values()))
    metrics["speed"] = snlp_speed.measure(config.bench, last, workdir, console)
  claims, files = [], {}
  if "quality" in metrics:
    quality = metrics["quality"]
    claims += quality_claims(config, quality)
    files[draw_perplexity(quality, workdir)] = "Perplexity lost against the sequential network, by Newton steps K"
    files[draw_trace_error(quality, workdir)] = "Error of one Newton step at each layer of the suffix"
    if REGULARISED in quality and not folder:
      files[draw_training(quality, workdir)] = "Training loss of the two models"
  if "hcn" in metrics:
    claims += hcn_claims(metrics["hcn"])
  if "competitors" in metrics:
    claims += competitor_claims(metrics["competitors"])
    files[draw_competitors(metrics["competitors"], workdir)] = "SNLP beside networks trained to be as fast"
  if "memory" in metrics:
    claims += memory_claims(metrics["memory"])
  if "speculation" in metrics:
    claims += speculation_claims(metrics["speculation"])
  if "speed" in metrics:
    cases = metrics["speed"]["cases"]
    claims += speed_claims(config, cases)
    files[snlp_speed.draw_speed(metrics["speed"], tuple(config.bench.shown), workdir)] = "Speed-up by setting and case"
    if fits := latency_fits(cases):
      metrics["latency_model"] = fits
      files[snlp_speed.draw_latency(fits, workdir)] = "Latency model against measurement"
    if "quality" in metrics:
      files[draw_frontier(metrics, workdir)] = "Speed-up against perplexity lost"
  return Report(metrics, claims, files)


def check_suffixes(config, depth: int) -> None:
  wanted = [parse(text)["layers"] for text in (*config.snlp.settings, *config.snlp.cached)]
  for n in (*wanted, *config.reg.layers):
    require(1 <= n <= depth, f"n_par={n} layers in parallel, but the model has {depth}; see snlp.settings, reg.layers")


def training_loss(config, reg=None):
  """Cross-entropy, with the regulariser that `reg` describes if given."""
  remat = config.train.remat

  def plain_loss(model, batch, step, key):
    return losses.language_model_loss(model, batch, remat=remat)

  def regularised_loss(model, batch, step, key):
    h0, trace, side = model.trace(batch["inputs"], remat=remat)
    backout = trace[model.depth // 2] if model.config.backout else None
    ce = losses.mean_loss(losses.token_losses(model, (trace[-1], backout), batch["targets"]), batch["targets"])
    r = snlp.regulariser(
      model,
      h0,
      trace,
      side,
      layers=tuple(reg.layers),
      stride=reg.stride,
      surrogate=reg.surrogate,
      detach_target=reg.detach_target,
      key=key if reg.sampled else None,
      remat=remat != "none",
    )
    weight = snlp.regulariser_weight(step, weight=reg.weight, steps=config.train.steps)
    return ce + weight * r, {"cross_entropy": ce, "regulariser": r}

  return regularised_loss if reg else plain_loss


def train_pair(config, text: Text, shape, reg, names, workdir: Path, console) -> dict[str, Transformer]:
  """The same initial parameters and data, without and with the regulariser."""
  start = Transformer(shape, jax.random.key(config.seed))
  return {
    name: train_model(
      config, text, start, training_loss(config, how), workdir=workdir / name, console=console, title=name
    )
    for name, how in zip(names, (None, reg), strict=True)
  }


def measure_hcn(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """Perplexities of the models with hyper-connections, solved with their mixing matrices (HCN) and with A = I."""
  e = config.eval
  batches = packing.evaluation_batches(text.split(e.split), row=e.length, batch=e.batch, limit=e.tokens)
  evaluate = losses.evaluator(lambda m, tokens: m.hidden(tokens))
  result = {name: {"sequential": evaluate(m, batches), "snlp": {}} for name, m in models.items()}
  for setting in console.track("evaluating hyper-connections", config.hcn.settings):
    for surrogate in ("streams", "identity"):
      solved = losses.evaluator(forward(f"{setting} {surrogate}"))
      for name, m in models.items():
        result[name]["snlp"][f"{setting} {surrogate}"] = solved(m, batches)
  return result


def measure_competitors(config, text: Text, models: dict[str, Transformer], workdir: Path, console) -> dict:
  """Shallower or wider networks of the same training beside SNLP's settings: perplexity, and one decoding step's speed.

  {name: {"perplexity", "speedup" over the whole regularised network, "p10", "p90", "parameters"}}.
  """
  c, e = config.competitors, config.eval
  batches = packing.evaluation_batches(text.split(e.split), row=e.length, batch=e.batch, limit=e.tokens)
  main = models[REGULARISED]
  evaluate = losses.evaluator(lambda m, tokens: m.hidden(tokens))
  result = {"sequential": evaluate(main, batches)}
  networks = {"sequential": (snlp_inference.split(main), {})}
  for setting in c.settings:
    s = parse(setting)
    result[setting] = losses.evaluator(forward(setting))(main, batches)
    layers = snlp_suffix.fuse(main, s["layers"], chunk=s["chunk"]) if s["chunk"] else s["layers"]
    options = {key: s[key] for key in ("iterations", "surrogate", "initial")}
    networks[setting] = (snlp_inference.split(main, layers), options)
  for name, changes in c.shapes.items():
    shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length, **changes)
    start = Transformer(shape, jax.random.key(config.seed))
    model = train_model(config, text, start, training_loss(config), workdir=workdir / name, console=console, title=name)
    model = loop.cast(model, config.train.dtype)
    result[name] = evaluate(model, batches) | {"parameters": shape.matmul_parameters}
    networks[name] = (snlp_inference.split(model), {})
  runs = {}
  for name, (network, options) in networks.items():
    state = snlp_inference.empty_state(network, batch=1, capacity=c.context + 600)
    state = dataclasses.replace(state, length=jnp.int32(c.context))
    step = functools.partial(snlp_inference.step, **options)
    runs[name] = timing.steady(step, network, jnp.zeros((1, 1), jnp.int32), carry=state)
  times = timing.compare(runs, repetitions=c.repetitions, inner=20)
  for name in runs:
    ratio, (low, high) = times.speedup(name, "sequential")
    result[name] |= {"speedup": ratio, "p10": low, "p90": high, "milliseconds": times.summary()[name]}
  return result


def measure_memory(config, text: Text, workdir: Path) -> dict:
  """Temporary bytes of a compiled training step, plain and regularised."""
  shape = model_config(config, text.bpe.get_vocab_size(), context=config.train.length)
  t, mesh = config.train, meshes.make_mesh(config.mesh.to_dict())
  optimizer = muon_adamw(shape, steps=t.steps, batch_tokens=t.batch * t.length)
  state = loop.initial_state(Transformer(shape, jax.random.key(0)), optimizer, mesh, 0)
  ids = jax.ShapeDtypeStruct((t.batch, t.length), jnp.int32, sharding=meshes.batch_sharding(mesh))
  result = {}
  for name, loss in ((PLAIN, training_loss(config)), (REGULARISED, training_loss(config, config.reg))):
    step = loop.make_step(
      loss, optimizer, meshes.shardings(state, mesh), accumulate=t.accumulate, compute_dtype=t.dtype
    )
    result[name] = timing.memory(step.lower(state, {"inputs": ids, "targets": ids}).compile())
  return result


def measure_speculation(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """Greedy self-speculation on text prompts: acceptance, and the whole generation against sequential generation."""
  spec = config.speculation
  rows = packing.evaluation_batches(text.split(config.eval.split), row=config.eval.length, batch=1, limit=10**9)
  prompts = [jnp.asarray(rows[i]["inputs"][:, : spec.prompt]) for i in range(spec.prompts)]
  result = {}
  for name, model in models.items():
    plain = snlp_inference.split(model)
    sequential_run = jax.jit(lambda n, p: snlp_inference.generate(n, p, tokens=spec.tokens))
    expected = [sequential_run(plain, p) for p in prompts]
    result[name] = {}
    for setting in spec.settings:
      s = parse(setting)
      network = snlp_inference.split(model, s["layers"])
      options = {key: s[key] for key in ("iterations", "surrogate", "initial")}
      for draft in spec.drafts:
        console.say(f"speculating, {name}, {setting}, {draft} drafts")
        go = jax.jit(functools.partial(speculate, tokens=spec.tokens, draft=draft, **options))
        outputs = [go(network, p) for p in prompts]
        accepted, cycles = (sum(int(getattr(o[1], part)) for o in outputs) for part in ("accepted", "cycles"))
        equal = np.mean([np.mean(np.asarray(o[0] == e)) for o, e in zip(outputs, expected, strict=True)])
        pair = {
          "sequential": functools.partial(sequential_run, plain, prompts[0]),
          "speculative": functools.partial(go, network, prompts[0]),
        }
        times = timing.compare(pair, repetitions=spec.repetitions, warmup=2)
        ratio, spread = times.speedup("speculative", "sequential")
        result[name][f"{setting} B{draft}"] = {
          "acceptance": accepted / (cycles * draft),
          "tokens_per_cycle": 1 + accepted / cycles,
          "equal_tokens": float(equal),
          "speedup": ratio,
          "spread": spread,
          "milliseconds": times.summary(),
        }
  return result


def measure_quality(config, text: Text, models: dict[str, Transformer], console) -> dict:
  """Perplexity of every model, sequential, by the baselines and at every setting; agreement and trace errors."""
  e = config.eval
  split = text.split(e.split)
  full = packing.evaluation_batches(split, row=e.length, batch=e.batch, limit=e.tokens)
  slices = packing.mid_document_batches(split, row=e.slice, batch=e.batch, limit=e.tokens)
  depth = next(iter(models.values())).depth
  evaluate = losses.evaluator(lambda m, tokens: m.hidden(tokens), text.token_bytes)
  result = {
    name: {
      "depth": depth,
      "sequential": evaluate(m, full),
      "sequential_slices": evaluate(m, slices),
      "snlp": {},
      "baselines": {},
      "cached": {},
    }
    for name, m in models.items()
  }
  for n in dict.fromkeys(parse(text)["layers"] for text in config.snlp.settings):
    for baseline, hidden in (("early exit", early_exit), ("painters", painters)):
      if n < depth:
        loss = losses.evaluator(functools.partial(hidden, n=n))
        for name, m in models.items():
          result[name]["baselines"][f"{baseline} n{n}"] = loss(m, full)
  sample = full[0]["inputs"]
  for setting in console.track("evaluating", config.snlp.settings):
    hidden = forward(setting)
    parallel = losses.evaluator(hidden, text.token_bytes)
    agreement = jax.jit(functools.partial(_agreement, hidden))
    for name, m in models.items():
      top1, cosine = agreement(m, sample)
      result[name]["snlp"][setting] = parallel(m, full) | {
        **parse(setting),
        "slices": parallel(m, slices)["perplexity"] if setting in config.snlp.sliced else None,
        "top1_agreement": float(top1),
        "logit_cosine": float(cosine),
      }
  for setting in config.snlp.cached:
    for name, m in models.items():
      result[name]["cached"][setting] = cached_loss(m, full[0], setting)
  error = jax.jit(snlp.trace_error, static_argnames=("layers", "iterations", "surrogate"))
  for name, m in models.items():
    chosen = dict(layers=max(config.reg.layers), iterations=1, surrogate=config.reg.surrogate)
    result[name]["trace_error"] = np.asarray(error(m, sample, **chosen)).tolist()
    result[name]["jacobian_norms"] = np.asarray(jax.jit(snlp.jacobian_norms)(m, sample, jax.random.key(0))).tolist()
  return result


def early_exit(model: Transformer, tokens, n: int):
  """The network without its last n layers."""
  x, side, _ = model.embed(tokens)
  x, backout, _, _ = sequential(model, x, side, stop=model.depth - n)
  return x, (x if model.config.backout and model.depth // 2 >= model.depth - n else backout)


def painters(model: Transformer, tokens, n: int):
  """The last n layers on the same input, their outputs averaged (Layers as Painters)."""
  x, side, _ = model.embed(tokens)
  x, backout, _, _ = sequential(model, x, side, stop=model.depth - n)
  states = snlp.solve(model, x, side, layers=n, iterations=1, surrogate="jacobi").trace
  if model.config.backout and model.depth // 2 >= model.depth - n:
    backout = states[model.depth // 2 - (model.depth - n) + 1]
  return states[1:].mean(axis=0).astype(x.dtype), backout


def cached_loss(model: Transformer, batch: dict, setting: str) -> dict:
  """Teacher-forced loss of the cached decoder, token by token from an empty cache, with the sequential one's."""
  s = parse(setting)
  options = {key: s[key] for key in ("iterations", "surrogate", "initial")}
  inputs, targets = jnp.asarray(batch["inputs"]), jnp.asarray(batch["targets"])

  @jax.jit
  def total(network, plain):
    def one(state, pair):
      token, target = pair
      logits, state = snlp_inference.step(network, token[:, None], state, **options)
      chosen = jnp.take_along_axis(logits[:, 0], jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
      loss = jax.nn.logsumexp(logits[:, 0], axis=-1) - chosen
      return state, jnp.where(target >= 0, loss, 0.0).sum()

    state = snlp_inference.empty_state(network, batch=inputs.shape[0], capacity=inputs.shape[1])
    _, sums = jax.lax.scan(one, state, (inputs.T, targets.T))
    whole = losses.token_losses(plain, plain.hidden(inputs), targets)
    uncached = losses.token_losses(plain, forward(setting)(plain, inputs), targets)
    count = (targets >= 0).sum()
    return sums.sum() / count, uncached.sum() / count, whole.sum() / count

  cached, uncached, whole = (float(x) for x in total(snlp_inference.split(model, s["layers"]), model))
  return {"cached": cached, "uncached": uncached, "sequential": whole}


def _agreement(hidden, model, tokens):
  """Share of positions with the sequential network's argmax, and mean cosine of the logits."""
  a, b = model(tokens), model.logits(*hidden(model, tokens))
  cosine = jnp.sum(a * b, -1) / (jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1))
  return jnp.mean(jnp.argmax(a, -1) == jnp.argmax(b, -1)), jnp.mean(cosine)


def lost(quality: dict, name: str, setting: str) -> float:
  """Perplexity lost against the same model run sequentially, in %."""
  return 100 * (quality[name]["snlp"][setting]["perplexity"] / quality[name]["sequential"]["perplexity"] - 1)


def is_idn(s: dict) -> bool:
  """The paper's plain form: unfused layers, A = I, from h0."""
  return (s["chunk"], s["groups"], s["surrogate"], s["initial"]) == (0, 1, "identity", "h0")


def quality_claims(config, quality: dict) -> list[Claim]:
  """The paper's claims in its revised form, and the first version's."""
  depth = quality[PLAIN]["depth"]
  main = REGULARISED if REGULARISED in quality else PLAIN
  rows = {text: s for text in config.snlp.settings if is_idn(s := parse(text))}
  claims = []
  for text, s in rows.items():
    if s["layers"] == s["iterations"]:
      exact = quality[main]["snlp"][text]["loss"]
      claims.append(
        Claim(
          f"K = n is the network itself (n = {s['layers']})",
          "nats",
          "lower",
          ours=abs(exact - quality[main]["sequential"]["loss"]),
          threshold=1e-3,
          baseline="sequential",
        )
      )
  n = max(s["layers"] for s in rows.values())
  few = {s["iterations"]: text for text, s in rows.items() if s["layers"] == n and s["iterations"] in (1, 2, 4)}
  for k, text in few.items():
    claims.append(
      Claim(
        f"perplexity lost at n = {n} of {depth} layers, K = {k}, {main} model",
        "%",
        "lower",
        ours=lost(quality, main, text),
        threshold={1: 25.0, 2: 25.0, 4: 10.0}[k],
        paper={1: 17.0, 2: 5.1}.get(k),
        baseline=lost(quality, PLAIN, text) if main != PLAIN else "sequential",
        note="paper: 12 chunks of 2 layers, w/o x0 and value embeddings, 2048 tokens; baseline: the plain model",
      )
    )
  if main == PLAIN:
    return claims
  # A ratio of two losses says something only where the plain model loses something.
  for k, text in few.items():
    if k <= 2 and lost(quality, PLAIN, text) > (0 if k == min(few) else 0.1):
      claims.append(
        Claim(
          f"regularised over plain perplexity loss, n = {n}, K = {k}",
          "ratio",
          "lower",
          ours=lost(quality, main, text) / lost(quality, PLAIN, text),
          threshold=0.5,
          baseline=lost(quality, PLAIN, text),
          note="baseline: the plain model's loss in % at the same setting",
        )
      )
  errors = {name: quality[name]["trace_error"][-1] for name in (main, PLAIN)}
  claims.append(
    Claim(
      f"trace error of the last layer, regularised over plain, n = {len(quality[main]['trace_error'])}, K = 1",
      "ratio",
      "lower",
      ours=errors[main] / errors[PLAIN],
      threshold=0.5,
      baseline=errors[PLAIN],
      note="baseline: the plain model's relative error",
    )
  )
  change = lambda what: 100 * (quality[main][what]["perplexity"] / quality[PLAIN][what]["perplexity"] - 1)
  claims.append(
    Claim(
      "sequential perplexity changed by the regulariser, full context",
      "%",
      "lower",
      ours=change("sequential"),
      threshold=3.0,
      paper=-0.5,
      baseline=quality[PLAIN]["sequential"]["perplexity"],
    )
  )
  claims.append(
    Claim(
      f"v1: sequential perplexity changed by the regulariser, {config.eval.slice}-token slices without BOS",
      "%",
      "lower",
      ours=change("sequential_slices"),
      threshold=-4.7,
      paper=-23.4,
      baseline=quality[PLAIN]["sequential_slices"]["perplexity"],
      note="the first version of the paper claimed 4.7 to 23.4 % better; the second withdrew it",
    )
  )
  return claims


def hcn_claims(hcn: dict) -> list[Claim]:
  claims = []
  for setting in dict.fromkeys(text.rsplit(" ", 1)[0] for text in hcn[MHC_REGULARISED]["snlp"]):
    loss = lambda surrogate, setting=setting: hcn[MHC_REGULARISED]["snlp"][f"{setting} {surrogate}"]["loss"]
    claims.append(
      Claim(
        f"HCN's loss over that of A = I on the regularised mHC model, {setting}",
        "nats",
        "lower",
        ours=loss("streams") - loss("identity"),
        threshold=-1e-4,
        baseline=loss("identity"),
        note=f"sequential {hcn[MHC_REGULARISED]['sequential']['loss']:.4f} nats",
      )
    )
  return claims


def competitor_claims(result: dict) -> list[Claim]:
  """SNLP at each setting against the best trained network that is at least as fast."""
  claims = []
  rivals = {name: r for name, r in result.items() if "parameters" in r}
  for setting, r in result.items():
    fast = {name: rival for name, rival in rivals.items() if rival["speedup"] >= 0.95 * r["speedup"]}
    if setting == "sequential" or setting in rivals or not fast:
      continue
    name, best = min(fast.items(), key=lambda item: item[1]["perplexity"])
    claims.append(
      Claim(
        f"perplexity of SNLP {setting} over that of a network as fast, trained on the same tokens",
        "ratio",
        "lower",
        ours=r["perplexity"] / best["perplexity"],
        threshold=1.0,
        baseline=f"{name}: {best['perplexity']:.3f} at {best['speedup']:.2f}x",
        note=f"SNLP {r['perplexity']:.3f} at {r['speedup']:.2f}x; decoding one token, batch 1",
      )
    )
  return claims


def memory_claims(memory: dict) -> list[Claim]:
  ratio = memory[REGULARISED]["temporaries"] / memory[PLAIN]["temporaries"]
  return [
    Claim(
      "temporary memory of a training step, regularised over plain",
      "ratio",
      "lower",
      ours=ratio,
      threshold=2.0,
      baseline=f"{memory[PLAIN]['temporaries'] / 2**30:.2f} GiB",
      note="as config.train.remat says: 'none' keeps every evaluation of the regulariser for the gradient",
    )
  ]


def speculation_claims(speculation: dict) -> list[Claim]:
  main = REGULARISED if REGULARISED in speculation else PLAIN
  setting, best = max(speculation[main].items(), key=lambda item: item[1]["speedup"])
  same = min(row["equal_tokens"] for runs in speculation.values() for row in runs.values())
  return [
    Claim(
      f"self-speculative greedy generation over sequential generation, {main}, best of {len(speculation[main])}",
      "x",
      "higher",
      ours=best["speedup"],
      threshold=1.0,
      spread=tuple(best["spread"]),
      baseline="cached sequential generation, one jit",
      note=f"{setting}: acceptance {best['acceptance']:.2f}, {best['tokens_per_cycle']:.2f} tokens a cycle",
    ),
    Claim(
      "speculative tokens equal to sequential ones, all runs, worst",
      "",
      "higher",
      ours=same,
      threshold=1.0,
      baseline="sequential greedy generation",
      note="in 16 bits an argmax between near-equal logits can fall either way in two kernels",
    ),
  ]


def speed_claims(config, cases: dict) -> list[Claim]:
  claims = []
  for c in config.bench.claims:
    case = cases[c["case"]]
    measured = case["speedup"][c["setting"]]
    claims.append(
      Claim(
        f"speed-up, {c['case']}, {c['setting']}",
        "x",
        "higher",
        ours=measured["ratio"],
        threshold=c["threshold"],
        paper=c.get("paper"),
        baseline=f"compiled sequential step ({case['sequential']})",
        spread=(measured["p10"], measured["p90"]),
        note="paper: eager PyTorch, uncached 2048 tokens, one GPU" if c.get("paper") else None,
      )
    )
  for c in config.bench.floors:
    case = cases[c["case"]]
    claims.append(
      Claim(
        f"time over the bytes the step must read, {c['case']}, {c['setting']}",
        "x",
        "lower",
        ours=case["milliseconds"][c["setting"]]["median"] / case["floor_ms"][c["setting"]],
        threshold=1.3,
        baseline=f"{case['floor_ms'][c['setting']]:.3f} ms at the bandwidth of a large copy",
      )
    )
  return claims


def latency_fits(cases: dict) -> dict:
  """The latency model of every case with enough plain settings to tell its three terms apart."""
  enough = lambda c: sum(not parse(text)["chunk"] for text in c["speedup"]) >= 5
  return {name: snlp_speed.fit_latency(c) for name, c in cases.items() if enough(c)}


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
    # Linear where little is lost, logarithmic where much is.
    axis.set_yscale("symlog", linthresh=1.0)
    axis.set_yticks(ticks := [0, 0.25, 0.5, 1, 3, 10, 30, 100, 300], ticks)
    axis.set_ylim(-0.1, 1.2 * max(0.25, most))
    axis.set_xticks(ticks := sorted({r["iterations"] for r in rows.values()}), ticks)
    axis.minorticks_off()
    axis.legend()
  axes[0][0].set_ylabel("perplexity lost (%)")
  return figures.save(figure, workdir, "perplexity")


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


def draw_frontier(metrics: dict, workdir: Path) -> str:
  """Settings whose quality and speed were both measured; the first case stands for speed."""
  name, case = next(iter(metrics["speed"]["cases"].items()))
  quality = metrics["quality"]
  figure, axis = figures.subplots()
  for model in quality:
    both = [text for text in quality[model]["snlp"] if text in case["speedup"]]
    points = [(case["speedup"][text]["ratio"], lost(quality, model, text)) for text in both]
    axis.plot(*zip((1.0, 0.0), *points, strict=True), "o", label=model)
    for text, point in zip(("sequential", *both), ((1.0, 0.0), *points), strict=True):
      axis.annotate(text, point, xytext=(4, 3), textcoords="offset points", size=7)
  axis.set_yscale("symlog", linthresh=1.0)
  axis.set(xlabel=f"speed-up ({name})", ylabel="perplexity lost (%)", title="Speed against quality")
  axis.legend()
  return figures.save(figure, workdir, "frontier")


def draw_competitors(result: dict, workdir: Path) -> str:
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
  return figures.save(figure, workdir, "competitors")
