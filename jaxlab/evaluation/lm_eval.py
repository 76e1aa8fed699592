"""EleutherAI's lm-evaluation-harness on any checkpoint and method here (extra `eval`).

  python -m jaxlab.evaluation.lm_eval --model jaxlab --model_args model=smollm2 --tasks lambada_openai
  python -m jaxlab.evaluation.lm_eval --model jaxlab --model_args model=smollm2,method=snlp,layers=8,iterations=4 ...

The arguments are those of the harness' own command `lm_eval`, which looks for models nowhere but in its own registry:
this module puts `jaxlab` there and hands over.
"""

import collections
import functools
import json
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.core.checks import InputError, require
from jaxlab.evaluation.long_context import continuation_scores
from jaxlab.evaluation.methods import subject
from jaxlab.models import hub
from jaxlab.models.generate import Completion, pad, power_of_two, require_ids, stream
from jaxlab.models.text import render_chat
from jaxlab.models.vocabulary import load_vocabulary

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import model_registry
  from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
  )
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
  _MISSING = "the evaluation harness is not installed; pip install 'jaxlab[eval]'"
  if __name__ == "__main__":
    print(f"error: {_MISSING}", file=sys.stderr)
    sys.exit(2)
  raise InputError(_MISSING) from None

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class JaxLM(TemplateLM):
  """A checkpoint under a method as the harness sees a model; texts become tokens as its `hf` model makes them.

  Args:
    model: what `hub.load` takes.
    method, options: as `methods.subject`.
    dtype: of the parameters; None keeps the checkpoint's.
    batch_size: rows at once. Rows are padded at their ends to a power of two; few shapes are compiled.
    max_length: tokens a text may have; None: the model's context.
    add_bos_token: whether texts begin with the BOS token; None: as the tokenizer does.
    seed: of sampling.
    device, max_batch_size: the harness passes its defaults; JAX picks the device (JAX_PLATFORMS), nothing the batch.
  """

  def __init__(
    self,
    model: str,
    method: str | None = None,
    *,
    dtype: str | None = None,
    batch_size: int | str = 8,
    max_batch_size: int | None = None,
    max_length: int | None = None,
    add_bos_token: bool | None = None,
    seed: int = 0,
    device: str | None = None,
    **options,
  ):
    super().__init__()
    require(
      str(batch_size).isdigit() and int(batch_size) > 0, f"batch_size is {batch_size}; give a number of rows, such as 8"
    )
    loaded = hub.load(model, dtype=dtype)
    self.vocabulary, self.batch_size, self._tokenizer_name = load_vocabulary(model), int(batch_size), str(model)
    self.max_length, self.max_gen_toks = max_length or loaded.config.context, 256
    self._add_bos, self._key, self._vocab_size = add_bos_token, jax.random.key(seed), loaded.config.vocab_size
    self.network, logits, self.decoder = subject(loaded, method, **options)
    if logits is None:
      self._score = functools.partial(_score_behind, decoder=self.decoder)
    else:
      self._score = jax.jit(lambda network, *arrays: _score(logits(network, arrays[0]), *arrays[1:]))
    require(self.prefix_token_id is not None, f"{model} names no BOS or EOS token, with which scored texts begin")

  @property
  def tokenizer_name(self) -> str:
    return self._tokenizer_name

  @property
  def eot_token_id(self) -> int | None:
    return next(iter(self.vocabulary.eos), None)

  @property
  def prefix_token_id(self) -> int | None:
    return self.eot_token_id if self.vocabulary.bos is None else self.vocabulary.bos

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
    begun = add_special_tokens is None and has_bos_prefix(string, self._name(self.prefix_token_id))
    add = add_special_tokens is not False and self._add_bos is not False and not begun
    ids = self.vocabulary.tokenizer.encode(string, add_special_tokens=add).ids
    bos = self.vocabulary.bos
    return [bos, *ids] if add and self._add_bos and bos is not None and ids[:1] != [bos] else ids

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
    """Of (texts or None, context, continuation) each; long contexts lose tokens on the left."""
    answers: list = [None] * len(requests)
    rows = [
      ((context + continuation)[-self.max_length - 1 :], len(continuation)) for _, context, continuation in requests
    ]
    for batch in _batches([len(row) - 1 for row, _ in rows], self.batch_size):
      chosen = [rows[i] for i in batch] + [([0, 0], 1)] * (self.batch_size - len(batch))  # one shape a length
      inputs, lengths = pad([row[:-1] for row, _ in chosen])
      targets, _ = pad([row[1:] for row, _ in chosen])
      for tokens in (inputs, targets):
        require_ids(tokens, self._vocab_size)
      first = lengths - np.array([count for _, count in chosen], np.int32)
      sums, greedy = self._score(self.network, inputs, targets, first, lengths)
      for i, total, exact in zip(batch, sums.tolist(), greedy.tolist(), strict=False):
        answers[i] = (total, exact)
        if requests[i][0] is not None:
          self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
    return answers

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    windows = []
    for index, request in enumerate(requests):
      tokens = self.tok_encode(request.args[0])
      rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
      windows += [(index, None, *make_disjoint_window(window)) for window in rolling]
    totals = [0.0] * len(requests)
    for (index, *_), (total, _) in zip(windows, self._loglikelihood_tokens([w[1:] for w in windows]), strict=True):
      totals[index] += total
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    answers: list = [None] * len(requests)
    kinds = collections.defaultdict(list)
    for i, request in enumerate(requests):
      kinds[json.dumps(request.args[1], sort_keys=True)].append(i)
    for kind, indices in kinds.items():
      options = normalize_gen_kwargs(json.loads(kind), self.max_gen_toks)
      stop = handle_stop_sequences(options.pop("until", None), eos=self._name(self.eot_token_id))
      tokens, sampled = options.pop("max_gen_toks"), options.pop("do_sample", False)
      unknown = sorted(set(options) - set(_SAMPLING))
      require(not unknown, f"generation option {', '.join(unknown)} is none of {', '.join(_SAMPLING)}; leave it out")
      room = self.max_length - tokens
      require(room > 0, f"max_gen_toks is {tokens}; it must be less than max_length, {self.max_length}")
      options = options if sampled else {}
      prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in indices]
      for batch in _batches([len(prompt) for prompt in prompts], self.batch_size):
        texts = self._generate([prompts[j] for j in batch], tokens, [text for text in stop if text], options)
        for j, text in zip(batch, texts, strict=True):
          answers[indices[j]] = text
          self.cache_hook.add_partial("generate_until", requests[indices[j]].args, text)
    return answers

  def _generate(self, prompts: list[list[int]], tokens: int, stop: list[str], options: dict) -> list[str]:
    rows = [Completion([], []) for _ in prompts]
    texts, done = [""] * len(rows), [False] * len(rows)
    how = dict(tokens=tokens, stop=self.vocabulary.eos, key=self._key, decoder=self.decoder, **options)
    for new in stream(self.network, prompts, **how):
      for i, (row, part) in enumerate(zip(rows, new, strict=True)):
        if not done[i]:
          row.tokens.extend(part.tokens)
          texts[i] = self.vocabulary.tokenizer.decode(row.tokens)
          done[i] = any(text in texts[i] for text in stop)
      if all(done):
        break
    return [postprocess_generated_text(text, stop, None) for text in texts]

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return render_chat(self.vocabulary, chat_history, add_generation_prompt=add_generation_prompt)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return self.vocabulary.chat_template if chat_template else None

  def _name(self, token: int | None) -> str | None:
    """A token's own text, special or not."""
    return None if token is None else self.vocabulary.tokenizer.decode([token], skip_special_tokens=False)


def _score(logits, targets, first, lengths):
  """(sums of log-probabilities, whether all are the argmax), (batch,) each, of targets first .. lengths - 1."""
  place = jnp.arange(targets.shape[1])
  counted = (place >= first[:, None]) & (place < lengths[:, None])
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
  greedy = jnp.argmax(logits, axis=-1) == targets
  return jnp.where(counted, picked, 0).sum(axis=1), (greedy | ~counted).all(axis=1)


def _score_behind(network, inputs, targets, first, lengths, *, decoder):
  """`_score` where the tokens before `first` are a prompt, and the others are read one by one behind it."""
  steps = power_of_two(int((lengths - first).max()))
  at = first[:, None] + np.arange(steps)
  following = np.take_along_axis(targets, np.minimum(at, targets.shape[1] - 1), axis=1)
  logp, greedy = continuation_scores(network, inputs, first + 1, following, decoder=decoder)
  counted = at < lengths[:, None]
  return jnp.where(counted, logp, 0).sum(axis=1), (greedy | ~counted).all(axis=1)


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
  """Indices in batches of up to `size` whose lengths round up to the same power of two."""
  groups = collections.defaultdict(list)
  for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
    groups[power_of_two(lengths[i])].append(i)
  return [group[j : j + size] for group in groups.values() for j in range(0, len(group), size)]


def register() -> None:
  """Makes `jaxlab` known to the harness in this process."""
  import lm_eval.models  # noqa: F401  (fills the registry, which it does only while that is empty)

  model_registry.register("jaxlab", target=JaxLM)


def main() -> int:
  from lm_eval.__main__ import cli_evaluate

  register()
  try:
    cli_evaluate()
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
