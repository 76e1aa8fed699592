"""Parts of a run, each in a process of its own if need be: python -m experiments.daslam SCALE WORKDIR PART ..

What they find stays in the workdir, where the run of that scale finds it. First come the solvers and `itself`, then
arm.taught.*, arm.blind.* and arm.gold.*, then the other arms; parts of one stage may be measured at once.
"""

import sys
from pathlib import Path

from configs.daslam import get_config
from configs.scales import SCALES
from experiments import daslam, results
from experiments.console import Console
from jaxlab.core.checks import InputError, require_choice
from jaxlab.core.command import Parser, cache_folder


def main(argv: list[str]) -> int:
  """Measures the parts named; returns the exit status."""
  parser = Parser("python -m experiments.daslam", description=__doc__)
  parser.add_argument("scale", choices=SCALES)
  parser.add_argument("workdir", type=Path)
  parser.add_argument("part", nargs="+")
  try:
    wanted = parser.parse_args(argv)
    cache_folder()
    parts = daslam.parts(get_config(wanted.scale), wanted.workdir, Console())
    for name in wanted.part:
      require_choice("part", name, tuple(parts))
    for name in wanted.part:
      results.part(wanted.workdir, name, parts[name])
    return 0
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
