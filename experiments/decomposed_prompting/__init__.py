"""Decomposed prompting: programs over leaves that are functions, small trained models, or a pretrained one.

A module here is a part of the run: `shapes` has the published programs, `learned` trains models on generated tasks,
`worlds` answers questions of several hops, `pretrained` prompts a checkpoint, `retrieval` searches hop by hop.
"""

import functools
from pathlib import Path

import numpy as np

from experiments import figures, results
from experiments.decomposed_prompting import evaluation, learned, pretrained, retrieval, shapes, worlds
from experiments.report import rounded
from experiments.results import Claim
from jaxlab.core.checks import require

# How a question is answered; the first two by the same model.
WAYS = {
  "leaves": "decomposed",
  "mixed": "decomposed, copying by functions",
  "chain": "one chain of all sub-steps",
  "direct": "the answer at once",
}
COPYING = ("split", "merge", "remove_numbers", "join")


def measure(config, workdir: Path, cache: Path, console) -> dict:
  """Runs all parts; what the workdir holds is not measured again."""
  e = config.eval
  require(e.lists and e.words, "eval.lists and eval.words need at least one size each")
  part = functools.partial(results.part, workdir)
  seeds = range(config.seed, config.seed + config.train.seeds)
  tests, unseen = generated_tests(config), unseen_delimiter(config)
  found = {"programs": part("programs", lambda: symbolic(config, tests, console))}
  found["retrieval"] = part("retrieval", lambda: retrieval.measure(config))
  found["learned"] = {
    way: {
      f"{seed}": part(f"learned.{way}.{seed}", lambda w=way, s=seed: learn(config, w, s, tests, workdir, console))
      for seed in seeds
    }
    for way in WAYS
  }
  found["delimiter"] = {
    way: {
      f"{seed}": part(f"delimiter.{way}.{seed}", lambda w=way, s=seed: learn(config, w, s, unseen, workdir, console))
      for seed in seeds
    }
    for way in learned.MODELS
  }
  found["worlds"] = {"functions": part("worlds.functions", lambda: worlds.by_functions(config))} | {
    arm: {
      f"{seed}": part(f"worlds.{arm}.{seed}", lambda a=arm, s=seed: worlds.measure(config, a, s, workdir, console))
      for seed in seeds
    }
    for arm in worlds.ARMS
  }
  if config.pretrained.count:
    names = [f"reverse {config.pretrained.lists}", f"letters {config.pretrained.words}"]
    real = {name: english(config, *name.split()) for name in names}
    found["pretrained"] = part("pretrained", lambda: pretrained.measure(config, real, console))
  return rounded(found)


def generated_tests(config) -> dict[str, list[tuple[str, str]]]:
  """{"reverse 16": pairs, ...} over words that are in no training example."""
  vocabulary = learned.words(config, held_out=True)
  sizes = [("reverse", size) for size in config.eval.lists] + [("letters", size) for size in config.eval.words]
  make = lambda kind, size: shapes.generated(
    np.random.default_rng([config.seed, size]), kind, size, config.eval.count, vocabulary
  )
  return {f"{kind} {size}": make(kind, size) for kind, size in sizes}


def unseen_delimiter(config) -> dict[str, list[tuple[str, str]]]:
  """Letters of as many words as training has, or the fewest, with the delimiter that it never has."""
  size = learned.WORDS if learned.WORDS in config.eval.words else min(config.eval.words)
  rng, vocabulary = np.random.default_rng([config.seed, size]), learned.words(config, held_out=True)
  return {f"letters {size}": shapes.generated(rng, "letters", size, config.eval.count, vocabulary, (shapes.HELD_OUT,))}


def english(config, kind: str, size: str) -> list[tuple[str, str]]:
  """Questions over English words, for a model that knows them."""
  words = [
    *("apple", "river", "stone", "chair", "music", "paper", "cloud", "bread"),
    *("horse", "glass", "light", "tiger", "ocean", "grape", "candle", "window"),
  ]
  return shapes.generated(np.random.default_rng(config.seed), kind, int(size), config.pretrained.count, words)


def symbolic(config, tests: dict, console) -> dict:
  """{"tests", "given": {name: right, f1, calls}}, every leaf a function; given are the files of config.data.path."""
  library = shapes.decomposers() | shapes.symbolic_leaves()
  files = sorted(Path(config.data.path).rglob("*.json")) if config.data.path else []
  given = {}
  for file in files:
    pairs = shapes.given(file)
    if pairs and pairs[0][0].startswith(("Reverse the sequence", "Take the l")):
      console.say(f"programs on {file.name}: {len(pairs)} questions")
      given[file.stem] = evaluation.decomposed(pairs, library)
  return {"tests": {name: evaluation.decomposed(pairs, library) for name, pairs in tests.items()}, "given": given}


def learn(config, way: str, seed: int, tests: dict, workdir: Path, console) -> dict:
  """Trains a model and answers the tests with it: {"right": {test: share}, "leaves": {leaf: share}}."""
  kind = "leaves" if way == "mixed" else way
  ask = learned.trained(config, kind, seed, workdir, console)
  tally, right = evaluation.Tally(), {}
  leaves = {name: leaf for name, leaf in learned.leaves(ask).items() if way == "leaves" or name not in COPYING}
  library = shapes.decomposers() | shapes.symbolic_leaves() | tally.graded(leaves)
  for name, pairs in tests.items():
    if kind == "leaves":
      right[name] = evaluation.decomposed(pairs, library)["right"]
    else:
      answers = learned.monolithic(ask, [question for question, _ in pairs])
      right[name] = evaluation.right(answers, pairs)
    console.say(f"{way}, {name}: {right[name]:.0%}")
  return {"right": right, "leaves": tally.shares()}


def mean(metrics: dict, kind: str, test: str, of: str = "learned") -> float:
  """Over the seeds."""
  return float(np.mean([found["right"][test] for found in metrics[of][kind].values()]))


def longest(config, beyond: str) -> str:
  """The test by which a claim is judged: of lists 16 or the longest, of words 8 or the most."""
  sizes, wanted = (config.eval.lists, 16) if beyond == "reverse" else (config.eval.words, 8)
  return f"{beyond} {wanted if wanted in sizes else max(sizes)}"


def table(metrics: dict, kind: str, task: str) -> str:
  tests = next(iter(metrics["learned"][kind].values()))["right"]
  return ", ".join(f"{name.split()[1]}: {mean(metrics, kind, name):.0%}" for name in tests if name.startswith(task))


def claims(config, metrics: dict) -> list[Claim]:
  lists, letters = longest(config, "reverse"), longest(config, "letters")
  at = lambda way, test: mean(metrics, way, test)
  spread = lambda kind, test: tuple(
    pick(found["right"][test] for found in metrics["learned"][kind].values()) for pick in (min, max)
  )
  programs, found = metrics["programs"], metrics["retrieval"]
  rows = {name: row for rows in programs.values() for name, row in rows.items()}
  if "worlds" in metrics:
    rows |= {f"worlds {name}": row for name, row in metrics["worlds"]["functions"].items()}
  reversals = {int(name.split()[1]): row["calls"] for name, row in programs["tests"].items() if "reverse" in name}
  leaves = {
    name: float(np.mean([f["leaves"].get(name, 0) for f in metrics["learned"]["leaves"].values()]))
    for name in next(iter(metrics["learned"]["leaves"].values()))["leaves"]
  }
  size, seeds = lists.split()[1], len(metrics["learned"]["leaves"])
  made = [
    Claim(
      f"Lists of {size} reversed by a program over leaves trained on at most {learned.LISTS} items", "", "higher",
      ours=at("leaves", lists), threshold=0.95, spread=spread("leaves", lists),
      baseline=f"one chain {at('chain', lists):.3g}, at once {at('direct', lists):.3g}",
      note=f"{seeds} seeds; decomposed {table(metrics, 'leaves', 'reverse')}; chain "
      f"{table(metrics, 'chain', 'reverse')}; at once {table(metrics, 'direct', 'reverse')}",
    ),
    Claim(
      f"The same with functions for what copies ({', '.join(COPYING)}), lists of {size} and letters of "
      f"{letters.split()[1]} words, the worse", "", "higher",
      ours=min(at("mixed", lists), at("mixed", letters)), threshold=0.95,
      baseline=f"all leaves learned {min(at('leaves', lists), at('leaves', letters)):.3g}",
      note=f"lists {table(metrics, 'mixed', 'reverse')}; words {table(metrics, 'mixed', 'letters')}",
    ),
    Claim(
      f"Lists of {size} reversed by the model that writes the whole recursion as one chain", "", "lower",
      ours=at("chain", lists), threshold=0.5, spread=spread("chain", lists), baseline="the program above",
    ),
    Claim(
      f"Letters of {letters.split()[1]} words: the program's share right less that of the chain", "points", "higher",
      ours=100 * (at("leaves", letters) - at("chain", letters)), threshold=20.0,
      baseline=f"chain {at('chain', letters):.3g}, at once {at('direct', letters):.3g}",
      note=f"trained on at most {learned.WORDS} words; decomposed {table(metrics, 'leaves', 'letters')}; chain "
      f"{table(metrics, 'chain', 'letters')}; at once {table(metrics, 'direct', 'letters')}"
      f"{delimiter_note(metrics)}",
    ),
    Claim(
      "Share of its own questions that the weakest trained leaf answers rightly", "", "higher",
      ours=min(leaves.values()), threshold=0.95, baseline="the symbolic leaf on the same question",
      note=", ".join(f"{name} {share:.3g}" for name, share in leaves.items()),
    ),
    Claim(
      "Questions whose two documents are both found hop by hop, less those found by the whole question", "points",
      "higher", ours=100 * (found["hop by hop"] - found["at once"]), threshold=20.0,
      baseline=f"{found['at once']:.3g} by one search for as many documents",
      note=f"BM25, {found['documents']} documents, {found['questions']} questions, {found['answered']:.3g} answered",
    ),
    Claim(
      "Share right with every leaf a function, worst test", "", "higher", threshold=1.0,
      ours=min(row["right"] for row in rows.values()), baseline="none",
      note="; ".join(f"{name} {row['right']:.3g}" for name, row in rows.items()),
    ),
    Claim(
      "Model calls of a reversal over the count of the program, distance from 1, worst size", "", "lower",
      ours=max(abs(calls / shapes.model_calls(n) - 1) for n, calls in reversals.items()), threshold=0.0,
      baseline="L(n) = 11 + L(n / 2) + L(n - n / 2), 4 below 4 items",
      note=", ".join(f"{n}: {calls:.4g}" for n, calls in reversals.items()),
    ),
  ]  # fmt: skip
  return made + world_claims(config, metrics) + pretrained_claims(config, metrics.get("pretrained"))


def delimiter_note(metrics: dict) -> str:
  """What becomes of a delimiter that no training example has."""
  if "delimiter" not in metrics:
    return ""
  (name,) = next(iter(metrics["delimiter"]["leaves"].values()))["right"]
  share = lambda way: f"{mean(metrics, way, name, of='delimiter'):.0%} ({mean(metrics, way, name):.0%} with those seen)"
  return (
    f"; {name.split()[1]} words with {shapes.HELD_OUT}, a delimiter that training never has: decomposed "
    f"{share('leaves')}, chain {share('chain')}, at once {share('direct')}"
  )


def world_share(config, metrics: dict, arm: str, split: str) -> float:
  """Over seeds and hops."""
  return float(np.mean([mean(metrics, arm, f"{split} {hops}", of="worlds") for hops in config.worlds.hops]))


def world_claims(config, metrics: dict) -> list[Claim]:
  if "worlds" not in metrics:
    return []
  share = lambda arm, split="compositional": world_share(config, metrics, arm, split)
  cost = lambda arm, what: np.mean([found[what] for found in metrics["worlds"][arm].values()])
  by_hops = lambda arm, split: ", ".join(
    f"{hops}: {mean(metrics, arm, f'{split} {hops}', of='worlds'):.0%}" for hops in config.worlds.hops
  )
  told = [
    f"{label} {by_hops(arm, 'compositional')} (iid {by_hops(arm, 'iid')}), {cost(arm, 'calls'):.3g} calls, "
    f"{cost(arm, 'read'):.3g} tokens read, {cost(arm, 'written'):.3g} written"
    for arm, label in worlds.LABELS.items()
  ]
  fine, chain = metrics["worlds"]["fine"], metrics["worlds"]["chain"]
  tests = [f"compositional {hops}" for hops in config.worlds.hops]
  gains = [100 * float(np.mean([fine[s]["right"][t] - chain[s]["right"][t] for t in tests])) for s in fine]
  return [
    Claim(
      "Questions over worlds with pairs of relations unseen in training: the share right by a handler a hop less that "
      "by a chain of thought", "points", "higher", ours=100 * (share("fine") - share("chain")), threshold=15.0,
      baseline=f"chain {share('chain'):.3g}, a handler for two hops {share('coarse'):.3g}, at once "
      f"{share('direct'):.3g}", spread=(min(gains), max(gains)),
      note=f"{len(fine)} seeds; with pairs as in training {100 * (share('fine', 'iid') - share('chain', 'iid')):.3g} "
      f"points; share right by hops: {'; '.join(told)}",
    ),
    Claim(
      "The same, a handler a hop less a handler for two hops", "points", "higher",
      ours=100 * (share("fine") - share("coarse")), threshold=0.0, baseline=f"{share('coarse'):.3g}",
    ),
  ]  # fmt: skip


def pretrained_claims(config, found: dict | None) -> list[Claim]:
  if not found:
    return []
  both = lambda how: ", ".join(f"{name} {share:.3g}" for name, share in found[how].items())
  gain = min(found["decomposed"][name] - found["direct"][name] for name in found["direct"])
  return [
    Claim(
      f"What programs add to {config.pretrained.model} by a few examples, worst of two tasks", "points", "higher",
      ours=100 * gain, threshold=10.0, baseline=f"at once: {both('direct')}",
      note=f"decomposed: {both('decomposed')}; leaves by themselves: "
      + ", ".join(f"{name} {share:.2g}" for name, share in found["leaves"].items())
      + f"; {found['count']} questions each",
    )
  ]  # fmt: skip


def finding(config, metrics: dict) -> str:
  lists, letters, found = longest(config, "reverse"), longest(config, "letters"), metrics["retrieval"]
  share = lambda way, test: f"{mean(metrics, way, test):.0%}"
  text = (
    f"Trained on lists of at most {learned.LISTS}, a program over small trained leaves reverses "
    f"{share('leaves', lists)} of lists of {lists.split()[1]}, and {share('mixed', lists)} with functions for what "
    f"copies (one chain {share('chain', lists)}, at once {share('direct', lists)}); letters of {letters.split()[1]} "
    f"words {share('leaves', letters)} and {share('mixed', letters)} (chain {share('chain', letters)}); hop by hop "
    f"BM25 finds both documents of {found['hop by hop']:.0%} of questions (at once {found['at once']:.0%})"
  )
  if "worlds" in metrics:
    told = lambda arm: " and ".join(f"{world_share(config, metrics, arm, split):.0%}" for split in worlds.SPLITS[::-1])
    text += (
      f"; over worlds with relations paired as never in training and as there, a handler a hop gets {told('fine')}, "
      f"one for two hops {told('coarse')}, a chain of thought {told('chain')}"
    )
  if pretrained_found := metrics.get("pretrained"):
    told = lambda how: " and ".join(f"{share:.0%}" for share in pretrained_found[how].values())
    text += f"; {config.pretrained.model} gets {told('decomposed')} decomposed, {told('direct')} at once"
  return f"{text}."


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(2)
  for axis, task, limit in zip(axes, ("reverse", "letters"), (learned.LISTS, learned.WORDS), strict=True):
    sizes = config.eval.lists if task == "reverse" else config.eval.words
    for kind, label in WAYS.items():
      axis.plot(sizes, [mean(metrics, kind, f"{task} {size}") for size in sizes], "o-", label=label)
    axis.axvline(limit, color="black", ls=":", lw=1)
    axis.set(xlabel="items" if task == "reverse" else "words", ylabel="share right", ylim=(-0.03, 1.03))
    axis.set_title("list reversal" if task == "reverse" else "letters of words")
  axes[0].legend(fontsize=8)
  caption = "Share right against length, beyond the longest trained on (dotted), on words that were held out"
  made = {figures.save(figure, workdir, "length"): caption}
  return made | draw_worlds(config, metrics, workdir) if "worlds" in metrics else made


def draw_worlds(config, metrics: dict, workdir: Path) -> dict[str, str]:
  figure, axes = figures.subplots(2)
  for axis, split in zip(axes, worlds.SPLITS, strict=True):
    for arm, label in worlds.LABELS.items():
      shares = [mean(metrics, arm, f"{split} {hops}", of="worlds") for hops in config.worlds.hops]
      axis.plot(config.worlds.hops, shares, "o-", label=label)
    axis.set(xlabel="hops", ylabel="share right", ylim=(-0.03, 1.03), xticks=config.worlds.hops)
    axis.set_title("pairs of relations as in training" if split == "iid" else "with a pair that training never has")
  axes[0].legend(fontsize=8)
  return {figures.save(figure, workdir, "worlds"): "Share right of questions over generated worlds against their hops"}
