"""One config a paper: `get_config(scale)` says what is run, `ABOUT` what the paper is."""

from typing import NamedTuple


class About(NamedTuple):
  """What README, RESULTS.md and the docs say of a method beside its measured results.

  Attributes:
    method: its name, spelt out where it is an acronym.
    family: the folder of `jaxlab` it lies in.
    link: where the paper is; of the foundation, a path from the root.
    does: what it does, a clause that continues "the method ...".
  """

  method: str
  family: str
  link: str
  does: str
