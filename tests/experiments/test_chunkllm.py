import jax
import numpy as np

from configs import chunkllm as config_file
from experiments import results
from experiments.chunkllm.decoders import ABLATIONS, EARLY, LATE, compared, named
from experiments.chunkllm.quality import _overlaps
from experiments.chunkllm.training import sentence_tokens
from experiments.compact_attention.choosing import captured
from experiments.long_context import documents, subjects
from jaxlab.attention.chunkllm import Adapted
from jaxlab.attention.chunkllm_chunks import ChunkAdapters, chunk_ends
from jaxlab.data import tokenizer
from jaxlab.models import inference
from tests.common import configs, random_model, random_tokens, run_and_continue


def test_everything_is_measured_once(two_layers, tmp_path, monkeypatch):
  """On a folder of one's own, named on the command line, with adapters trained for it."""
  config = config_file.get_config("test")
  config.model, config.data.path, config.data.split = f"hf:{two_layers}", "docs/**/*.md", "train"
  report = run_and_continue("chunkllm", tmp_path, monkeypatch, "subjects", "speed.measure", config=config)
  results.write(report, config, tmp_path, 1.0, "command")
  name = two_layers.name
  rows = {row["decoder"]: row for row in report.metrics["losses"][name]}
  assert set(rows) == {"dense", "ChunkLLM 0.4", "sliding window", "separators"}
  assert rows["dense"]["read"] == 1 > rows["ChunkLLM 0.4"]["read"] > 0.1
  assert rows["sliding window"]["read"] == rows["ChunkLLM 0.4"]["read"]
  assert set(report.metrics["adapters"]) == {name} and (tmp_path / f"adapters.{name}" / "checkpoints").is_dir()
  assert report.metrics["speed"]["keeps"].keys() == {"0.4"}


def test_every_ablation_is_a_decoder_of_its_own_and_more_tokens_end_a_chunk_at_a_lower_threshold(two_layers, tmp_path):
  config = config_file.get_config("test")
  config.model, config.data.path, config.data.split = f"hf:{two_layers}", "docs/*.md", "train"
  (one,) = subjects(config, tmp_path)
  adapters = ChunkAdapters(one.network.model.config, jax.random.key(0), hidden=16, size=8)
  adapters.w[...] = adapters.w[...] / 4  # probabilities on both sides of 0.2 and 0.8
  network = Adapted(one.network.model, one.network.blocks, adapters)
  made = compared(config, 6.0, (named(0.4), *ABLATIONS))
  assert len(set(made.values())) == 1 + len(ABLATIONS)
  prompt = documents(one.tokens, 1, 96)
  count = lambda name: int(made[name].prefill(network, prompt, capacity=128)[1].memory.count[0])
  assert count(LATE) < count(named(0.4)) < count(EARLY)


def test_overlaps_leave_out_what_is_always_read():
  """The open chunk and the newest that has ended would be in every set; of pairs the first token's choice counts."""
  net, tokens = jax.jit(inference.take_apart)(random_model(configs()["qwen3"])), random_tokens(1, 128)
  how, sums = dict(sink=2, min_chunk=4, max_chunk=9, top=2), []
  found = np.asarray(_overlaps(net, tokens, tokens % 7 == 0, how))
  (ends,) = jax.vmap(lambda row: chunk_ends(row, 128, min_chunk=4, max_chunk=9))(tokens % 7 == 0)
  ids = np.cumsum(ends) - ends
  for q, k in captured(net, tokens):
    score = np.einsum("hqd,hkd->hqk", q[0], np.repeat(k[0], q.shape[1] // k.shape[1], axis=0)) / q.shape[3] ** 0.5
    weight = np.where(np.tri(128, dtype=bool), np.exp(score), 0)
    weight = (weight / weight.sum(-1, keepdims=True)).mean(0)
    kinds = {True: [], False: []}
    for t in range(127):
      number = ids[t] + ends[t] - 1
      if number > 2:
        worth = [[weight[at, 2:][ids[2:] == c].sum() for c in range(number)] for at in (t, t + 1)]
        first, second = ({*np.argsort(w)[-2:].tolist()} for w in worth)
        kinds[bool(ids[t] == ids[t + 1])].append(len(first & second) / len(first | second))
    sums.append([sum(kinds[True]), len(kinds[True]), sum(kinds[False]), len(kinds[False])])
  np.testing.assert_allclose(found, sums, rtol=1e-4)


def test_sentences_are_found_in_tokens_of_any_kind():
  """Tokens of several bytes, an initial, a row that is cut within a sentence."""
  texts = ["Grüße, Ärger! Über 3.14 m. Dr. Müller kam. Und"] * 3
  bpe = tokenizer.train(texts, 300)
  ids = np.array([tokenizer.bos_id(bpe), *bpe.encode(texts[0], add_special_tokens=False).ids])
  labels = sentence_tokens(ids, bpe, tokenizer.token_bytes(bpe))
  ends = [len(bpe.decode(ids[: i + 1].tolist())) for i in np.flatnonzero(labels)]
  assert [texts[0][:end].split()[-1].rstrip() for end in ends] == ["Ärger!", "kam."]
