"""A hook of mkdocs: what the pages say of results comes from results/, as README's table does.

In docs/methods/<paper>.md the line `<!-- result -->` becomes the question, the picture and the finding; in index.md the
line `<!-- gallery -->` becomes a card for every method. The methods' pages enter the navigation by family.
"""

import importlib
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from experiments import report  # noqa: E402  (mkdocs runs this file from elsewhere)

_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


def on_config(config):
  """Fills the navigation's `Methods` with a list a family."""
  families = {family: [] for family in report.FAMILIES}
  for page in _PAGES:
    a = importlib.import_module(f"configs.{page.stem}").ABOUT
    families[a.family].append({a.method.split(",")[0]: f"methods/{page.name}"})
  methods = [{family.capitalize(): pages} for family, pages in families.items() if pages]
  config.nav = [{"Methods": methods} if entry == "methods" else entry for entry in config.nav]
  return config


def on_files(files, config):
  """The first figure of every method."""
  for run in report.largest(report.load()):
    path = report.RESULTS / run["paper"] / picture(run)
    files.append(File.generated(config, f"figures/{run['paper']}.png", abs_src_path=str(path)))
  return files


def on_page_markdown(markdown, page, config, files):
  runs = {run["paper"]: run for run in report.largest(report.load())}
  if page.file.src_uri == "index.md":
    return markdown.replace("<!-- gallery -->", gallery(list(runs.values())))
  if page.file.src_uri.startswith("methods/"):
    paper = Path(page.file.src_uri).stem
    found = result(runs[paper]) if paper in runs else unmeasured(paper)
    return markdown.replace("<!-- result -->", found)
  return markdown


def picture(run: dict) -> str:
  """The file name of the figure that stands for a run: its first."""
  return next(iter(run["figures"]))


def result(run: dict) -> str:
  """What a method does, its picture and what was found."""
  a, file = report.about(run), picture(run)
  held = f"{sum(claim['holds'] for claim in run['claims'])} of {len(run['claims'])} claims hold"
  return (
    f"The method [{a.method}]({a.link}) {a.does}.\n\n"
    f"![{run['figures'][file]}](../figures/{run['paper']}.png)\n\n*{run['figures'][file]}*\n\n"
    f'!!! success "What we found"\n    {run["finding"]}\n\n'
    f"    Verdict: **{report.verdict(run)}**; {held} at scale {run['scale']}:\n\n"
    f"    ```\n    {run['command']}\n    ```\n"
  )


def unmeasured(paper: str) -> str:
  """What a method does whose experiment was not run yet."""
  a = importlib.import_module(f"configs.{paper}").ABOUT
  command = f"python -m experiments.run --config=configs/{paper}.py --workdir=runs/{paper}"
  return f"The method [{a.method}]({a.link}) {a.does}. It was not measured yet:\n\n```\n{command}\n```\n"


def gallery(runs: list[dict]) -> str:
  """A card a method, by what the methods split."""
  lines = []
  for family in report.FAMILIES:
    chosen = [run for run in runs if report.about(run).family == family]
    if chosen:
      lines += [f"## {family.capitalize()}", "", '<div class="grid cards" markdown>', ""]
      lines += [_card(run) for run in chosen]
      lines += ["", "</div>", ""]
  return "\n".join(lines)


def _card(run: dict) -> str:
  a = report.about(run)
  page = f"methods/{run['paper']}.md"
  title = f"[{a.method}]({page})" if (ROOT / "docs" / page).exists() else a.method
  return (
    f"-   **{title}**\n\n    ![{run['figures'][picture(run)]}](figures/{run['paper']}.png)\n\n    {run['finding']}\n"
  )
