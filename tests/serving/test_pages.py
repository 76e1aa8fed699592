from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.serving.pages import Pages


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_pages_are_held_as_a_plain_account_says(seed, index):
  """400 random takes, exchanges, matches, publications and releases: no page belongs to two but by sharing, none is
  lost."""
  rng, pages = np.random.default_rng(seed), Pages(12, 2, index=index)
  held: list[tuple[list[int], list[int]]] = []  # (pages, tokens)
  known: dict[tuple, int] = {}  # all tokens up to a page's end -> page, where it may still be known
  for _ in range(400):
    act = rng.integers(5)
    if act == 0:
      count, free = int(rng.integers(1, 5)), pages.free
      taken = pages.take(count)
      assert (taken is None) == (count > free)
      if taken:
        others = {page for mine, _ in held for page in mine}
        assert 0 not in taken and len(set(taken)) == count and not others & set(taken)
        known = {tokens: page for tokens, page in known.items() if page not in taken}
        held.append((taken, rng.integers(0, 2, 2 * count).tolist()))
    elif act == 1 and held:
      pages.release(held.pop(rng.integers(len(held)))[0])
    elif act == 2 and held:
      mine, tokens = held[rng.integers(len(held))]
      pages.publish(tokens, mine)
      for i, page in enumerate(mine if index else ()):
        known.setdefault(tuple(tokens[: 2 * i + 2]), page)
    elif act == 4 and held:
      mine, tokens = held[rng.integers(len(held))]
      count, alone = int(rng.integers(1, len(mine) + 2)), [p for p in mine if pages.holders[p] == 1]
      state = pages.free, pages.holders.tolist()
      new = pages.exchange(mine, count)
      assert (new is None) == (count > state[0] + len(alone))
      if new is None:
        assert state == (pages.free, pages.holders.tolist())
      else:
        known = {tokens: page for tokens, page in known.items() if page not in new}
        held.append((new, rng.integers(0, 2, 2 * count).tolist()))
        held.remove((mine, tokens))
    elif act == 3:
      tokens = rng.integers(0, 2, int(rng.integers(1, 9))).tolist()
      found = pages.match(tokens)
      assert len(found) <= (len(tokens) - 1) // 2
      for i, page in enumerate(found):
        assert known[tuple(tokens[: 2 * i + 2])] == page
      if found:
        held.append((found, tokens[: 2 * len(found)]))
    count = Counter(page for mine, _ in held for page in mine)
    assert {p: n for p, n in enumerate(pages.holders.tolist()) if n} == count
    assert pages.free + pages.held == 11 and pages.held == len(count)


def test_what_was_left_longest_is_given_away_first_and_what_is_known_last():
  pages = Pages(5, 2)
  first, second = pages.take(1), pages.take(1)
  pages.publish([1, 2], first)
  pages.publish([3, 4], second)
  pages.release(second)
  pages.release(first)
  fresh = pages.take(2)  # the two that nobody ever held
  assert not {*first, *second} & {*fresh} and pages.free == 2
  assert pages.take(1) == second and pages.match([3, 4, 5]) == [] and pages.match([1, 2, 5]) == first


def test_of_one_sequence_the_end_is_given_away_first():
  """A beginning that several share outlives what only one had."""
  pages = Pages(6, 2)
  tokens, held = list(range(8)), pages.take(4)
  pages.publish(tokens, held)
  pages.release(held)
  pages.take(2)
  found = pages.match([*tokens, 9])
  assert found == held[:3]


def test_the_index_knows_the_whole_beginning_and_what_it_was_made_with():
  pages = Pages(9, 2)
  mine = pages.take(2)
  pages.publish([1, 2, 3, 4], mine)
  assert pages.match([1, 2, 3, 4, 9]) == mine and pages.match([1, 2, 3, 4]) == mine[:1]
  assert pages.match([7, 7, 3, 4, 9]) == []
  other = Pages(9, 2, salt="another model")
  other.publish([1, 2], other.take(1))
  assert other._known.keys() & pages._known.keys() == set()


def test_what_cannot_be_is_named():
  with pytest.raises(InputError, match="needs at least 2"):
    Pages(1, 4)
  pages = Pages(3, 4)
  (page,) = pages.take(1)
  pages.release([page])
  with pytest.raises(InputError, match=f"page {page} is released, but nobody holds it"):
    pages.release([page])
