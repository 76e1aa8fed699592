import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlab.core.checks import InputError
from jaxlab.data import byte_level, packing


@given(st.binary())
def test_any_bytes_come_back(raw):
  assert byte_level.decode(byte_level.encode(raw)) == raw


@given(st.text())
def test_text_comes_back_and_never_has_the_special_ids(text):
  ids = byte_level.encode(text)
  assert byte_level.decode(ids).decode() == text and not set(ids.tolist()) & {byte_level.BOS, byte_level.EOS}


def test_a_corpus_by_bytes_is_packed_like_any_other():
  tokens = byte_level.tokens_of(["né", "b"])
  assert tokens.ids.tolist() == [110, 195, 169, 98] and tokens.document(1).tolist() == [98]
  row = next(iter(packing.training_rows(tokens, row=6, seed=0)))
  assert row[0] == byte_level.BOS and row.dtype == np.int32


def test_a_corpus_of_any_bytes_is_what_it_is():
  """254 and 255 too, which stay where they are."""
  raw = bytes(range(256))
  tokens = byte_level.tokens_of([raw, b"\xff\xfe", "né"])
  assert tokens.document(0).tobytes() == raw and tokens.document(1).tolist() == [255, 254]
  assert tokens.document(2).tolist() == [110, 195, 169] and tokens.bos == byte_level.BOS


def test_other_ids_and_empty_corpora_are_named():
  with pytest.raises(InputError, match=r"ids of bytes lie in 0\.\.255"):
    byte_level.decode(np.array([3, 256]))
  with pytest.raises(InputError, match="has no byte in it"):
    byte_level.tokens_of([""])
