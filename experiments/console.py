"""What a person sees: a progress bar with rate and time left, then the table of claims."""

import time

import rich.box
import rich.console
import rich.progress
import rich.table

from experiments.results import number

_PLAIN_SECONDS = 5  # between lines where no terminal can redraw a bar


class Console:
  """Prints to stdout, or nothing if `quiet`. One instance a run."""

  def __init__(self, quiet: bool = False):
    self.out = rich.console.Console(width=None if rich.console.Console().is_terminal else 150, quiet=quiet)

  def say(self, text: str) -> None:
    self.out.print(text, highlight=False)

  def training(self, title: str):
    """A context manager that gives the `progress` callback of `training.loop.train`."""
    return _Training(self.out, title)

  def track(self, title: str, items):
    """Iterates over a list behind a bar; a line every few seconds where no terminal can redraw one."""
    if self.out.is_terminal:
      yield from rich.progress.track(items, title, console=self.out, transient=True)
      return
    then, of = -_PLAIN_SECONDS, f"/{len(items)}" if hasattr(items, "__len__") else ""
    for i, item in enumerate(items):
      if time.monotonic() - then > _PLAIN_SECONDS:
        then = time.monotonic()
        self.say(f"{title} {i}{of}")
      yield item

  def claims(self, results: dict) -> None:
    table = rich.table.Table(
      title=f"{results['paper']} ({results['scale']}) on {results['device']}", box=rich.box.SIMPLE
    )
    for column in ("claim", "paper", "baseline", "ours", "holds if", "holds"):
      table.add_column(column, justify="left" if column in ("claim", "baseline") else "right")
    for c in results["claims"]:
      sign = ">=" if c["better"] == "higher" else "<="
      table.add_row(
        c["name"],
        number(c.get("paper", "-")),
        number(c.get("baseline", "-")),
        f"{number(c['ours'])} {c['unit']}",
        f"{sign} {number(c['threshold'])}",
        "[green]yes[/]" if c["holds"] else "[red]no[/]",
      )
    self.out.print(table)


class _Training:
  def __init__(self, out, title):
    self._out, self._title, self._then = out, title, 0.0
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn("{task.fields[status]}"),
      rich.progress.TimeRemainingColumn(),
      console=out,
      disable=not out.is_terminal,
    )

  def __enter__(self):
    self._bar.start()
    self._task = self._bar.add_task(self._title, total=None, status="compiling")
    return self._step

  def __exit__(self, *exception):
    self._bar.stop()

  def _step(self, metrics: dict) -> None:
    rate = metrics.get("tokens_per_second")
    status = f"loss {metrics['loss']:.4f}" + (f"  {rate:,.0f} tokens/s" if rate else "")
    status += f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
    self._bar.update(self._task, total=metrics["steps"], completed=metrics["step"], status=status)
    last = metrics["step"] == metrics["steps"]
    if not self._out.is_terminal and (last or time.monotonic() - self._then > _PLAIN_SECONDS):
      self._then = time.monotonic()
      self._out.print(f"{self._title} {metrics['step']}/{metrics['steps']}  {status}", highlight=False)
