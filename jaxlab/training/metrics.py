"""Metrics of a run: a line of JSON a step, TensorBoard events, and what the device could do at best."""

import json
from pathlib import Path

import jax

from jaxlab.core.files import write_text

# Dense bfloat16 peak of a device, FLOP/s, by the vendors' data sheets.
_PEAKS = {
  "H200": 989e12,
  "H100": 989e12,
  "A100": 312e12,
  "B200": 2250e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6": 918e12,
  "TPU7": 2307e12,
}


def peak_flops() -> float:
  """Peak of one device, FLOP/s; 0 where unknown (CPUs)."""
  kind = jax.devices()[0].device_kind
  return next((peak for name, peak in _PEAKS.items() if name in kind), 0.0)


class MetricsWriter:
  """Appends to metrics.jsonl and to TensorBoard events, on the first of several hosts; a context manager."""

  def __init__(self, folder: Path, resume_after: int = 0):
    """Steps after `resume_after`, which a killed run wrote but did not checkpoint, are dropped: they come again."""
    self._active = jax.process_index() == 0
    if not self._active:
      return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.jsonl"
    kept = [line for line in _lines(file) if line["step"] <= resume_after]
    write_text(file, "".join(json.dumps(line) + "\n" for line in kept))
    self._file = open(file, "a")  # noqa: SIM115 (closed in __exit__)
    import tensorboardX  # takes seconds where PyTorch is installed, which it imports

    self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"), purge_step=resume_after + 1)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    if self._active:
      self._file.close()
      self._events.close()

  def __call__(self, metrics: dict) -> None:
    if not self._active:
      return
    self._file.write(json.dumps(metrics) + "\n")
    self._file.flush()
    for name, value in metrics.items():
      if name not in ("step", "steps"):
        self._events.add_scalar(name, value, metrics["step"])


def read_metrics(folder: Path) -> list[dict]:
  """The metrics of every step recorded in a folder, in order."""
  return list(_lines(Path(folder) / "metrics.jsonl"))


def _lines(file: Path):
  if not file.exists():
    return
  for line in file.read_text().splitlines():
    try:
      yield json.loads(line)
    except ValueError:  # the line a killed process was writing
      return
