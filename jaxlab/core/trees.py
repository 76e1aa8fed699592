"""Pytrees at the door of a compiled function."""

from collections.abc import Callable

import jax
from jaxtyping import PyTree


def flat_jit(function: Callable, tree: PyTree, **jit_options) -> tuple[Callable, list]:
  """`function(tree, *args)` for the shortest possible step: (jitted, leaves), to be called as jitted(leaves, *args).

  A module's tree takes as long to flatten as a small step takes to run; a list of its leaves does not. `jit_options`
  count `leaves` as argument 0.
  """
  leaves, structure = jax.tree.flatten(tree)
  return jax.jit(lambda leaves, *args: function(jax.tree.unflatten(structure, leaves), *args), **jit_options), leaves
