"""The claims of SNLP's experiment, from what it measured."""

from experiments.results import Claim
from experiments.snlp_settings import parse

PLAIN, REGULARISED = "plain", "regularised"
MHC, MHC_REGULARISED, MHC_MOVING = "mhc", "mhc_regularised", "mhc_moving_targets"


def lost(quality: dict, name: str, setting: str) -> float:
  """Perplexity lost against the same model run sequentially, in %."""
  return 100 * (quality[name]["snlp"][setting]["perplexity"] / quality[name]["sequential"]["perplexity"] - 1)


def is_idn(s: dict) -> bool:
  """The paper's plain form: unfused layers, A = I, from h0."""
  return (s["chunk"], s["groups"], s["surrogate"], s["initial"]) == (0, 1, "identity", "h0")


def quality(config, measured: dict) -> list[Claim]:
  """The paper's claims in its revised form, and the first version's."""
  depth = measured[PLAIN]["depth"]
  main = REGULARISED if REGULARISED in measured else PLAIN
  rows = {text: s for text in config.snlp.settings if is_idn(s := parse(text))}
  claims = []
  for text, s in rows.items():
    if s["layers"] == s["iterations"]:
      exact = measured[main]["snlp"][text]["loss"]
      claims.append(
        Claim(
          f"K = n is the network itself (n = {s['layers']})",
          "nats",
          "lower",
          ours=abs(exact - measured[main]["sequential"]["loss"]),
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
        ours=lost(measured, main, text),
        threshold={1: 25.0, 2: 25.0, 4: 10.0}[k],
        paper={1: 17.0, 2: 5.1}.get(k),
        baseline=lost(measured, PLAIN, text) if main != PLAIN else "sequential",
        note="paper: 12 chunks of 2 layers, w/o x0 and value embeddings, 2048 tokens; baseline: the plain model",
      )
    )
  if main == PLAIN:
    return claims
  # A ratio of two losses says something only where the plain model loses something.
  for k, text in few.items():
    if k <= 2 and lost(measured, PLAIN, text) > (0 if k == min(few) else 0.1):
      claims.append(
        Claim(
          f"regularised over plain perplexity loss, n = {n}, K = {k}",
          "ratio",
          "lower",
          ours=lost(measured, main, text) / lost(measured, PLAIN, text),
          threshold=0.5,
          baseline=lost(measured, PLAIN, text),
          note="baseline: the plain model's loss in % at the same setting",
        )
      )
  errors = {name: measured[name]["trace_error"][-1] for name in (main, PLAIN)}
  claims.append(
    Claim(
      f"trace error of the last layer, regularised over plain, n = {len(measured[main]['trace_error'])}, K = 1",
      "ratio",
      "lower",
      ours=errors[main] / errors[PLAIN],
      threshold=0.5,
      baseline=errors[PLAIN],
      note="baseline: the plain model's relative error",
    )
  )
  change = lambda what: 100 * (measured[main][what]["perplexity"] / measured[PLAIN][what]["perplexity"] - 1)
  claims.append(
    Claim(
      "sequential perplexity changed by the regulariser, full context",
      "%",
      "lower",
      ours=change("sequential"),
      threshold=3.0,
      paper=-0.5,
      baseline=measured[PLAIN]["sequential"]["perplexity"],
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
      baseline=measured[PLAIN]["sequential_slices"]["perplexity"],
      note="the first version of the paper claimed 4.7 to 23.4 % better; the second withdrew it",
    )
  )
  return claims


def hcn(measured: dict) -> list[Claim]:
  settings = list(dict.fromkeys(text.rsplit(" ", 1)[0] for text in measured[MHC]["snlp"]))
  most = max(settings, key=lambda text: (parse(text)["layers"], parse(text)["iterations"]))
  claims = []
  for name in (MHC_REGULARISED, MHC_MOVING):
    own, plain = (measured[model]["sequential"]["perplexity"] for model in (name, MHC))
    claims.append(
      Claim(
        f"sequential perplexity changed by HCN's regulariser, {name} model",
        "%",
        "lower",
        ours=100 * (own / plain - 1),
        threshold=3.0,
        paper=2.4 if name == MHC_REGULARISED else None,
        baseline=plain,
        note="mhc_regularised: no gradient through the targets, as in the paper's run; mhc_moving_targets: with it",
      )
    )
    solved = measured[name]["snlp"][f"{most} streams"]["perplexity"]
    claims.append(
      Claim(
        f"perplexity lost by HCN at {most}, {name} model",
        "%",
        "lower",
        ours=100 * (solved / own - 1),
        threshold=25.0,
        baseline=100 * (measured[MHC]["snlp"][f"{most} streams"]["perplexity"] / plain - 1),
        note="baseline: the plain mHC model",
      )
    )
  # The regularised model everywhere, the others where the surrogate has most to do.
  compared = [(MHC_REGULARISED, text) for text in settings] + [(name, most) for name in (MHC, MHC_MOVING)]
  for name, setting in compared:
    loss = lambda surrogate, of=measured[name]["snlp"], at=setting: of[f"{at} {surrogate}"]["loss"]
    claims.append(
      Claim(
        f"HCN's loss over that of A = I, {name} model, {setting}",
        "nats",
        "lower",
        ours=loss("streams") - loss("identity"),
        threshold=-1e-4,
        baseline=loss("identity"),
        note=f"sequential {measured[name]['sequential']['loss']:.4f} nats",
      )
    )
  return claims


def competitors(result: dict) -> list[Claim]:
  """Every setting against the best trained network as fast, and every network against the best setting as fast."""
  rivals = {name: r for name, r in result.items() if "parameters" in r}
  settings = {name: r for name, r in result.items() if name != "sequential" and name not in rivals}
  best_as_fast = lambda r, among: min(
    (name for name, other in among.items() if other["speedup"] >= 0.95 * r["speedup"]),
    key=lambda name: among[name]["perplexity"],
    default=None,
  )
  pairs = {(setting, best_as_fast(r, rivals)): None for setting, r in settings.items()}
  pairs |= {(best_as_fast(r, settings), rival): None for rival, r in rivals.items()}
  figure = lambda r: f"{r['perplexity']:.3f} at {r['speedup']:.2f}x"
  return [
    Claim(
      f"perplexity of SNLP {setting} over that of {rival}, trained on the same tokens",
      "ratio",
      "lower",
      ours=settings[setting]["perplexity"] / rivals[rival]["perplexity"],
      threshold=1.0,
      baseline=figure(rivals[rival]),
      note=f"SNLP {figure(settings[setting])}; decoding one token, batch 1",
    )
    for setting, rival in pairs
    if setting and rival
  ]


def memory(measured: dict) -> list[Claim]:
  ratio = measured[REGULARISED]["temporaries"] / measured[PLAIN]["temporaries"]
  return [
    Claim(
      "temporary memory of a training step, regularised over plain",
      "ratio",
      "lower",
      ours=ratio,
      threshold=2.0,
      baseline=f"{measured[PLAIN]['temporaries'] / 2**30:.2f} GiB",
      note="as config.train.remat says: 'none' keeps every evaluation of the regulariser for the gradient",
    )
  ]


def speed(config, cases: dict) -> list[Claim]:
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
