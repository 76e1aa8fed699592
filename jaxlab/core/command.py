"""What the commands of this project share."""

import argparse
import os
from pathlib import Path

import jax

from jaxlab.core.checks import InputError


class Parser(argparse.ArgumentParser):
  """One whose errors are one line of the command."""

  def error(self, message):
    raise InputError(f"{message}; see --help")


def cache_folder() -> Path:
  """Where commands keep what can be made again: $JAXLAB_CACHE, else ~/.cache/jaxlab. Compiled programs go there, too,
  unless jax has been told otherwise."""
  cache = Path(os.environ.get("JAXLAB_CACHE", "~/.cache/jaxlab")).expanduser()
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
  return cache
