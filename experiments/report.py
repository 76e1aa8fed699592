"""Everything that is said of the results is made here, from results/<paper>/<scale>.json.

python -m experiments.report                 RESULTS.md, README's table, results/*/README.md, build/results.html
python -m experiments.report --publish DIR   first copies DIR's results.json and figures into results/<paper>
python -m experiments.report --restore results/<paper>/<scale>.json DIR
                                             the other way: a run into DIR measures the parts which that one lacks

A run is named after its scale, or, where its config says `per_machine`, after the machine's number of devices: x2, x4.
"""

import argparse
import base64
import html
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from configs import About
from configs.scales import SCALES
from experiments.results import PART, cell, finite, markdown, number, restored
from jaxlab.core.checks import InputError, require
from jaxlab.core.files import write_text
from jaxlab.core.foreign import foreign

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGE = ROOT / "build" / "results.html"
JSON_BYTES, FIGURE_BYTES = 100_000, 300_000  # a run; all figures of a paper
FAMILIES = (
  *("depth", "attention", "cache", "serving", "sequence", "weights", "tensors", "graphs", "text", "tasks", "images"),
  "foundation",
)
_BEGIN, _END = "<!-- methods: made by experiments.report -->", "<!-- end of methods -->"


def publish(workdir: Path, results: Path = RESULTS) -> Path:
  """Copies one finished run to results/<paper>/<name>.json and <name>.<figure>.png. Returns the JSON file.

  Metrics are rounded, and claims and finding made again of them: they follow from the digits beside them.

  Raises:
    InputError: no finished run, or more bytes than a paper may have.
  """
  file = workdir / "results.json"
  require(file.is_file(), f"{workdir} has no results.json; run the experiment to its end first")
  run = evaluated(rounded(json.loads(file.read_text())))
  folder, name = results / run["paper"], name_of(run)
  figures = {f"{name}.{figure}": caption for figure, caption in run["figures"].items()}
  text = compact(run | {"figures": figures})
  require(
    len(text) <= JSON_BYTES,
    f"{file} has {len(text)} bytes when published, {JSON_BYTES} at most; put summaries into the metrics, not arrays",
  )
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.glob(f"{name}.*.png"):
    old.unlink()
  for figure in run["figures"]:
    copy_figure(workdir / figure, folder / f"{name}.{figure}")
  size = sum(figure.stat().st_size for figure in folder.glob("*.png"))
  require(
    size <= FIGURE_BYTES, f"the figures in {folder} have {size} bytes, {FIGURE_BYTES} at most; draw fewer or less"
  )
  write_text(folder / f"{name}.json", text)
  return folder / f"{name}.json"


def evaluated(run: dict) -> dict:
  """A run with the claims and the finding that its metrics give."""
  config = importlib.import_module(f"configs.{run['paper']}").get_config(run["scale"])
  config, experiment = config.__class__(run["config"]), importlib.import_module(f"experiments.{config.experiment}")
  metrics = restored(run["metrics"])
  claims = [rounded(finite(claim.as_dict())) for claim in experiment.claims(config, metrics)]
  made = {"claims": claims, "headline": claims[0]["name"], "finding": experiment.finding(config, metrics)}
  return run | json.loads(json.dumps(made))


def restore(published: Path, workdir: Path) -> list[str]:
  """Writes the parts of a published run into a workdir, where a run of the same config finds them and measures only
  those that are missing; returns their names. Numbers have the digits they were published with.

  Raises:
    InputError: no published run, a workdir that holds something, or metrics that are not the parts by their names.
  """
  with foreign(published, "name results/<paper>/<scale>.json"):
    run = json.loads(published.read_text())
    parts, metrics = dict(run["parts"]), run["metrics"]
  require(not workdir.exists() or not any(workdir.iterdir()), f"{workdir} is not empty; name a new folder")
  for name, origin in parts.items():
    value = _entry(metrics, name)
    require(value is not None, f"part {name} of {published} is no entry of its metrics; run the experiment again")
    parts[name] = origin | {"result": value}
  workdir.mkdir(parents=True, exist_ok=True)
  write_text(workdir / "config.json", json.dumps(run["config"], indent=1))
  for name, part in parts.items():
    write_text(workdir / f"{name}{PART}", json.dumps(part, indent=1))
  return list(parts)


def _entry(metrics, name: str):
  """The entry "a.b.c" of nested metrics, whose keys may have dots themselves; None: there is none."""
  if not isinstance(metrics, dict):
    return None
  if name in metrics:
    return metrics[name]
  dots = (at for at, character in enumerate(name) if character == "." and name[:at] in metrics)
  return next((found for at in dots if (found := _entry(metrics[name[:at]], name[at + 1 :])) is not None), None)


def copy_figure(source: Path, target: Path) -> None:
  """As a PNG of 64 colours and at most 1100 pixels a side, which is all that a chart needs."""
  with Image.open(source) as image:
    image = image.convert("RGB")
    image.thumbnail((1100, 1100))
    # This method keeps thin lines of different colours apart, which the usual one merges.
    image.quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(target, optimize=True)


def rounded(value, digits: int = 6):
  """Floats to some significant digits, at any depth."""
  if isinstance(value, dict):
    return {k: rounded(v, digits) for k, v in value.items()}
  if isinstance(value, list):
    return [rounded(v, digits) for v in value]
  return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def compact(value, depth: int = 2) -> str:
  """JSON with a line for each of the first levels' entries, so that a change shows as lines, and no more space."""
  if depth == 0 or not isinstance(value, dict | list) or not value:
    return json.dumps(value, separators=(",", ":"))
  if isinstance(value, list):
    return "[\n" + ",\n".join(compact(v, depth - 1) for v in value) + "\n]"
  return "{\n" + ",\n".join(f"{json.dumps(k)}: {compact(v, depth - 1)}" for k, v in value.items()) + "\n}"


def load(results: Path = RESULTS) -> list[dict]:
  """Every committed run, by family, paper and scale."""
  runs = []
  for file in results.glob("*/*.json"):
    try:
      runs.append(json.loads(file.read_text()))
    except ValueError:
      raise InputError(f"{file} is not JSON; publish that run again") from None
  order = lambda run: (FAMILIES.index(about(run).family), run["paper"], SCALES.index(run["scale"]), name_of(run))
  return sorted(runs, key=order)


def name_of(run: dict) -> str:
  """What its files are called."""
  return run.get("name", run["scale"])


def about(run: dict) -> About:
  return importlib.import_module(f"configs.{run['paper']}").ABOUT


def headline(run: dict) -> dict:
  """The claim that decides."""
  return next(claim for claim in run["claims"] if claim["name"] == run["headline"])


def verdict(run: dict) -> str:
  """not: the headline fails. reproduced: with it every claim with a figure of the paper's holds, and most of all.

  open: what was measured so far is the small scale alone.
  """
  if run["scale"] == "cpu":
    return "open"
  if not headline(run)["holds"]:
    return "not"
  published = all(claim["holds"] for claim in run["claims"] if "paper" in claim)
  most = 2 * sum(claim["holds"] for claim in run["claims"]) > len(run["claims"])
  return "reproduced" if published and most else "partly"


def largest(runs: Iterable[dict]) -> list[dict]:
  """Of every paper the run at the largest scale, in the order of `runs`."""
  return list({run["paper"]: run for run in runs}.values())


def results_markdown(runs: list[dict]) -> str:
  """RESULTS.md: a line a paper."""
  lines = [
    "# Results",
    "",
    "Generated by `python -m experiments.report` from `results/`. A method links to its claims, also those that",
    "failed, with baselines, spreads, settings and commands. *reproduced*: the headline claim holds, every claim with",
    "a figure of the paper's and most of all claims; *partly*: the headline does; *not*: it does not; *open*: not yet",
    "measured on a GPU.",
    "",
    "| method | what we found | verdict | claims that hold |",
    "|---|---|---|---|",
  ]
  for run in largest(runs):
    scales = ", ".join(
      f"{name_of(other)} {sum(c['holds'] for c in other['claims'])} of {len(other['claims'])}"
      for other in runs
      if other["paper"] == run["paper"]
    )
    name = f"[{about(run).method}](results/{run['paper']}/README.md)"
    lines.append(f"| {name} | {cell(run['finding'])} | {verdict(run)} | {scales} |")
  return "\n".join([*lines, ""])


def readme_table(runs: list[dict]) -> str:
  """README's table: a line a paper, from its run at the largest committed scale."""
  lines = ["| splits | method | what it does | what we found | verdict | config |", "|---|---|---|---|---|---|"]
  for run in largest(runs):
    a, paper = about(run), run["paper"]
    cells = (
      a.family,
      f"[{a.method}]({a.link})",
      cell(a.does),
      cell(run["finding"]),
      f"[{verdict(run)}](results/{paper}/README.md)",
      f"[{paper}](configs/{paper}.py)",
    )
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def fill_readme(readme: str, table: str) -> str:
  """README with the table between its two markers."""
  before, rest = readme.split(_BEGIN)
  return f"{before}{_BEGIN}\n{table}\n{_END}{rest.split(_END)[1]}"


def paper_markdown(runs: list[dict]) -> str:
  """results/<paper>/README.md: its runs, the largest first."""
  a = about(runs[0])
  link = a.link if "://" in a.link else f"../../{a.link}"
  head = [f"# [{a.method}]({link})", "", f"{a.does[0].upper()}{a.does[1:]}.", ""]
  return "\n".join([*head, *(markdown(run) for run in reversed(runs))])


def page(runs: list[dict], results: Path = RESULTS) -> str:
  """One HTML page that needs no other file."""
  sections = "".join(_section(run, results) for run in runs)
  return (
    "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    f"<title>jaxlab results</title><style>{_STYLE}</style><h1>jaxlab results</h1>{sections}</html>\n"
  )


_STYLE = (
  "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}"
  "table{border-collapse:collapse}td,th{padding:.25rem .7rem;text-align:left;border-bottom:1px solid #ddd}"
  ".yes{color:#07723f}.no{color:#b3261e;font-weight:600}img{max-width:100%}figure{margin:1rem 0}small{color:#666}"
  "pre{background:#f4f4f4;padding:.5rem;overflow:auto}"
)


def _section(run: dict, results: Path) -> str:
  text = lambda value: html.escape(number(value))
  rows = []
  for c in run["claims"]:
    verdict = "yes" if c["holds"] else "no"
    cells = (c["name"], c.get("paper", "-"), c.get("baseline", "-"), f"{number(c['ours'])} {c['unit']}")
    rows.append(f"<tr>{''.join(f'<td>{text(cell)}' for cell in cells)}<td class={verdict}>{verdict}</tr>")
  images = []
  for name, caption in run["figures"].items():
    data = base64.b64encode((results / run["paper"] / name).read_bytes()).decode()
    image = f"<img alt='{text(caption)}' src='data:image/png;base64,{data}'>"
    images.append(f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>")
  header = "".join(f"<th>{name}</th>" for name in ("claim", "paper", "baseline", "ours", "holds"))
  title = f"<h2>{text(about(run).method)} <small>{text(name_of(run))}, {text(run['device'])}</small></h2>"
  table = f"<table><tr>{header}</tr>{''.join(rows)}</table>"
  return (
    f"<section>{title}<p>{text(run['finding'])}</p><pre>{text(run['command'])}</pre>{table}{''.join(images)}</section>"
  )


def generated(runs: list[dict], results: Path = RESULTS) -> dict[Path, str]:
  """{file: content} of everything committed that follows from the results."""
  readme = ROOT / "README.md"
  files = {ROOT / "RESULTS.md": results_markdown(runs), readme: fill_readme(readme.read_text(), readme_table(runs))}
  for paper in dict.fromkeys(run["paper"] for run in runs):
    files[results / paper / "README.md"] = paper_markdown([run for run in runs if run["paper"] == paper])
  return files


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="python -m experiments.report", description=__doc__.splitlines()[0])
  parser.add_argument("--publish", metavar="DIR", type=Path, action="append", default=[])
  parser.add_argument("--restore", metavar=("JSON", "DIR"), type=Path, nargs=2)
  arguments = parser.parse_args(argv)
  try:
    if arguments.restore:
      print(f"{arguments.restore[1]} holds {', '.join(restore(*arguments.restore))}")
      return 0
    for workdir in arguments.publish:
      print(f"published {publish(workdir)}")
    runs = load()
    PAGE.parent.mkdir(exist_ok=True)
    for file, text in (generated(runs) | {PAGE: page(runs)}).items():
      write_text(file, text)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"RESULTS.md and {PAGE.relative_to(ROOT)} hold {len(runs)} runs")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
