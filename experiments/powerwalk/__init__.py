"""PowerWalk: accuracy over walks and steps, full paths against ends of walks, pruning, throughput, cost by edges."""

import functools
from pathlib import Path

from experiments import results
from experiments.powerwalk import accuracy, speed
from experiments.results import Claim
from jaxlab.core.checks import require
from jaxlab.graphs import common, fingerprints


def measure(config, workdir: Path, cache: Path, console) -> dict:
  a = config.accuracy
  require(a.main in a.walks and 2 in a.steps and 0 in a.steps, "accuracy.main must be one of walks; steps need 0 and 2")
  graphs = {}
  for name in ("data", "undirected"):
    raw = common.load(**config[name], seed=config.seed)
    graphs[name] = fingerprints.walk_graph(raw)
    require(a.k <= raw.nodes, f"accuracy.k={a.k} exceeds the {raw.nodes} nodes of config.{name}; lower it")
    console.say(f"{name}: {raw.nodes} nodes, {len(raw.edges)} edges")
  part = functools.partial(results.part, workdir)
  scaling = [
    part(f"scaling.{nodes}", lambda n=nodes: speed.measure_size(config, n, console)) for nodes in config.scaling.nodes
  ]
  found = {
    name: part(f"accuracy.{name}", lambda g=graph: accuracy.measure(config, g, console))
    for name, graph in graphs.items()
  }
  caps = {name: part(f"caps.{name}", lambda g=graph: accuracy.caps(config, g)) for name, graph in graphs.items()}
  rates = part("speed", lambda: speed.measure(config, graphs["data"], found["data"], caps["data"], console))
  return {"accuracy": found, "caps": caps, "speed": rates, "scaling": scaling}


def claims(config, metrics: dict) -> list[Claim]:
  found = metrics["accuracy"]
  made = accuracy.claims(config, found, metrics.get("caps", {}))
  return made + speed.claims(config, metrics["speed"], metrics["scaling"], found["data"])


def finding(config, metrics: dict) -> str:
  a, found = config.accuracy, metrics["accuracy"]
  cell = lambda name, t: found[name]["grid"][f"R{a.main} T{t}"]["rag"]
  gains = " and ".join(f"{cell(name, 0):.2f} to {cell(name, 2):.2f}" for name in found)
  faster = {claim.name: claim.ours for claim in claims(config, metrics)}
  ratio = faster["How many times as many queries a second as the faster power iteration of equal RAG"]
  return (
    f"Two exact steps lift the accuracy of the top {a.k} from {gains} on two graphs with {a.main} walks a vertex; at "
    f"equal accuracy it answers {ratio:.2g}x as many queries a second as power iteration."
  )


def draw(config, metrics: dict, workdir: Path) -> dict[str, str]:
  files = accuracy.draw(config, metrics["accuracy"], workdir)
  return files | (speed.draw(metrics["scaling"], workdir) if len(metrics["scaling"]) > 1 else {})
