"""Who holds which page of a cache: counts of holders, and an index of full pages by all the tokens up to their end.

Page 0 belongs to nobody: what padding writes goes there, and nobody reads it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from jaxlab.core.checks import require, require_counts


class Pages:
  """Pages 1 .. count - 1 of `size` tokens each.

  A page that is published stays known when its last holder leaves, and is given away again only where no other is
  left, the one that was left first before the others.

  Args:
    salt: what the keys and values depend on beside the tokens (the model, a method); two indices differ by it.
    index: False: nothing is published.
  """

  def __init__(self, count: int, size: int, *, salt: str = "", index: bool = True):
    require_counts(size=size)
    require(count >= 2, f"the cache has {count} pages; it needs at least 2, as page 0 is for padding")
    self.size, self.index = size, index
    self.holders = np.zeros(count, np.int32)
    self._free = list(range(count - 1, 0, -1))
    self._known: dict[bytes, int] = {}  # hash -> page
    self._hash: dict[int, bytes] = {}
    self._left: OrderedDict[int, None] = OrderedDict()  # published pages without a holder
    self._root = hashlib.blake2b(salt.encode(), digest_size=16).digest()

  @property
  def free(self) -> int:
    """Pages that `take` could give."""
    return len(self._free) + len(self._left)

  @property
  def held(self) -> int:
    """Pages that somebody holds."""
    return int((self.holders > 0).sum())

  def take(self, count: int) -> list[int] | None:
    """So many pages, held once each; None if there are not enough, and nothing is taken."""
    if count > self.free:
      return None
    pages = []
    for _ in range(count):
      if self._free:
        page = self._free.pop()
      else:
        page, _ = self._left.popitem(last=False)
        del self._known[self._hash.pop(page)]
      self.holders[page] = 1
      pages.append(page)
    return pages

  def release(self, pages: Sequence[int]) -> None:
    """Gives up one hold of each page, of the last first: without what is before it, nobody can match a page."""
    for page in reversed(pages):
      require(page > 0 and self.holders[page] > 0, f"page {page} is released, but nobody holds it")
      self.holders[page] -= 1
      if self.holders[page] == 0:
        if page in self._hash:
          self._left[page] = None
        else:
          self._free.append(page)

  def exchange(self, pages: Sequence[int], count: int) -> list[int] | None:
    """So many pages for these, which may be among them; None if there are not enough, and nothing is changed."""
    if count > self.free + sum(self.holders[page] == 1 for page in pages):
      return None
    self.release(pages)
    return self.take(count)

  def match(self, tokens: Sequence[int]) -> list[int]:
    """The published pages that hold the longest beginning of the tokens, held once more each.

    At least one token is left, so that there are logits of the last one.
    """
    found = []
    for key in self._chain(tokens, (len(tokens) - 1) // self.size):
      page = self._known.get(key)
      if page is None:
        break
      if self.holders[page] == 0:
        del self._left[page]
      self.holders[page] += 1
      found.append(page)
    return found

  def publish(self, tokens: Sequence[int], pages: Sequence[int], first: int = 0) -> None:
    """Says that pages[first:] hold the keys and values of these tokens as far as they fill pages."""
    if not self.index:
      return
    for i, key in enumerate(self._chain(tokens, len(tokens) // self.size)):
      if i >= first and key not in self._known and pages[i] not in self._hash:
        self._known[key] = pages[i]
        self._hash[pages[i]] = key

  def _chain(self, tokens: Sequence[int], count: int):
    key = self._root
    for i in range(count if self.index else 0):
      part = np.asarray(tokens[i * self.size : (i + 1) * self.size], np.int32)
      key = hashlib.blake2b(key + part.tobytes(), digest_size=16).digest()
      yield key
