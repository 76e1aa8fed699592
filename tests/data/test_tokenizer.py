"""Tokenizers that others made: used as tokenizers of text, their bytes counted or refused."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxlab.core.checks import InputError
from jaxlab.data import corpora, tokenizer, tokens

TEXTS = ("hello a\nü <s>", " lead", "x  y", "日本\r\n\t</s>\x00", "", "😀 done ", "the<tool>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(style: str) -> Tokenizer:
  """Llama 2's kind: spaces as "▁", a space put before every text, bytes for characters that are no pieces."""
  names = ["<unk>", "<s>", "</s>", *BYTES, *"▁abcdehlotx", "▁a", "he", "ll"]
  vocabulary = {name: index for index, name in enumerate(names)}
  merges = [("▁", "a"), ("h", "e"), ("l", "l")]
  made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
  if style == "normalizer":
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  else:
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
  made.decoder = decoders.Sequence(steps)
  return finished(made)


def unigram() -> Tokenizer:
  """Special tokens are pieces of score 0 here, the likeliest of all."""
  pieces = [
    ("<unk>", 0.0),
    ("<s>", 0.0),
    ("</s>", 0.0),
    *((name, -9.0) for name in [*BYTES, *"▁<>/sheloa", "▁a", "he"]),
  ]
  made = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
  made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
  made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
  return finished(made)


def byte_level(style: str) -> Tokenizer:
  """GPT-2's kind, with an entry that is no special token; ids with a gap."""
  names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġa"]
  vocabulary = {name: 2 * index for index, name in enumerate(names)}
  made = Tokenizer(models.BPE(vocabulary, [("h", "e"), ("Ġ", "a")]))
  made.normalizer = normalizers.NFC()
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=style == "prefix")
  made.decoder = decoders.ByteLevel()
  made.add_tokens(["<tool>"])
  return finished(made)


def finished(made: Tokenizer) -> Tokenizer:
  """As checkpoints come: with truncation, padding and a template that adds <s>."""
  made.add_special_tokens(["<s>", "</s>"])
  made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
  made.enable_truncation(4)
  made.enable_padding(length=9)
  return made


@pytest.mark.parametrize(
  "made",
  [sentencepiece("normalizer"), sentencepiece("metaspace"), unigram(), byte_level("prefix"), byte_level("plain")],
)
def test_a_given_tokenizer_is_a_tokenizer_of_text_whose_bytes_are_counted(made, tmp_path):
  made.save(str(tmp_path / "tokenizer.json"))
  bpe = tokenizer.load(tmp_path)
  sizes = tokenizer.token_bytes(bpe)
  assert len(sizes) == tokenizer.largest_id(bpe) + 1
  for text in TEXTS:
    ids = bpe.encode(text, add_special_tokens=False).ids
    assert sizes[ids].sum() == len(text.encode())
    assert bpe.decode(ids, skip_special_tokens=False) == text
  prompt = tokenizer.load(tmp_path, prompts=True).encode("<s>hello world", add_special_tokens=False)
  assert prompt.tokens[0] == "<s>" and len(prompt.ids) > 4 and 0 not in prompt.attention_mask


def test_documents_are_encoded_whole_and_special_tokens_in_them_are_text(tmp_path):
  (tmp_path / "train.txt").write_text("hello <s> a" * 3)
  sentencepiece("normalizer").save(str(tmp_path / "tokenizer.json"))
  documents = corpora.documents("local_text", split="train", cache=tmp_path, path=str(tmp_path / "train.txt"))
  for prompts in (False, True):  # the cache tells them apart
    bpe = tokenizer.load(tmp_path, prompts=prompts)
    ids = tokens.tokenize(documents, bpe, bos=1, cache=tmp_path).ids
    assert (1 in ids) == prompts
  assert (
    tokenizer.token_bytes(tokenizer.load(tmp_path))[
      tokens.tokenize(documents, tokenizer.load(tmp_path), bos=1, cache=tmp_path).ids
    ].sum()
    == 33
  )


def changed(made: Tokenizer, **parts) -> Tokenizer:
  for name, part in parts.items():
    setattr(made, name, part)
  return made


@pytest.mark.parametrize(
  "made, message",
  [
    (Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "its WordPiece model changes text"),
    (changed(byte_level("plain"), normalizer=normalizers.Lowercase()), "its Lowercase changes text"),
    (changed(byte_level("plain"), normalizer=normalizers.NFKC()), "its NFKC changes text"),
    (changed(byte_level("plain"), normalizer=normalizers.Replace("a", "b")), "its Replace changes text"),
    (
      changed(
        byte_level("plain"),
        pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)]),
      ),
      "its Whitespace changes text",
    ),
    (Tokenizer(models.BPE({"a": 0, "b": 1}, [])), "no token for every byte"),
    (Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")), "its word affix changes text"),
    (sentencepiece("metaspace"), "puts a space before a text"),
  ],
)
def test_bits_per_byte_that_cannot_be_counted_are_refused(made, message):
  with pytest.raises(InputError, match=message):
    tokenizer.token_bytes(made)


def test_a_tokenizer_that_drops_bytes_counts_those_of_what_its_ids_decode_to():
  bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "Ġ": 3}, [("a", "b")]))
  bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
  ids = bpe.encode("abü ba").ids
  assert tokenizer.token_bytes(bpe, complete=False)[ids].sum() == len(bpe.decode(ids).encode()) == 5
  with pytest.raises(InputError, match="no token for every byte"):
    tokenizer.token_bytes(bpe)


def test_ids_are_compared_with_the_vocabulary_by_the_largest():
  bpe = byte_level("plain")
  largest = tokenizer.largest_id(bpe)
  assert largest > bpe.get_vocab_size()
  tokenizer.require_fits(bpe, largest + 1, "x")
  with pytest.raises(InputError, match=f"tokenizer of x has ids up to {largest}, its model {largest} embeddings"):
    tokenizer.require_fits(bpe, largest, "x")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10**5, b"\xff", b'{"model": {"type": "BPE"}}', b"\0" * 100])
def test_damaged_tokenizers_are_named(tmp_path, content):
  (tmp_path / "tokenizer.json").write_bytes(content)
  with pytest.raises(InputError, match=r"tokenizer\.json.*(own tokenizer\.json there|iconv)"):
    tokenizer.load(tmp_path)


def test_ids_out_of_proportion_are_refused(tmp_path):
  description = json.loads(byte_level("plain").to_str())
  description["model"]["vocab"]["Ġa"] = 2**31
  (tmp_path / "tokenizer.json").write_text(json.dumps(description))
  with pytest.raises(InputError, match="ids up to 2147483648, hardly a vocabulary"):
    tokenizer.load(tmp_path)
