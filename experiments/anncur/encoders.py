"""The scorers of ANNCUR: cross-encoders that read query and item together, dual encoders that read them apart.

Both are the bidirectional `jaxlab.models` transformer with segment embeddings. Cross-encoder heads (Yadav et al. 2022):
"cls" is a linear map of the [CLS] state; "emb" is <(h[START] + h[END]) / 2, h[TITLE]> / sqrt(width).

  encoder = Encoder(config, jax.random.key(0), head="emb", marks=marks(bpe))
  encoder, losses = train(encoder, cross_loss, tokens, make_batches, key, epochs=1, steps=500, rate=1e-3)
  f = cross_scorer(encoder, *tokens)                       # f(i, j): the score of query i and item j

Token rows come from `data`.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from experiments.anncur import data
from jaxlab.core.checks import require, require_choice
from jaxlab.models import Transformer, TransformerConfig, maps
from jaxlab.models.layers import Linear, wide
from jaxlab.models.transformer import sequential

HEADS = ("cls", "emb", "dual")
_DROPOUT = 0.1


@dataclasses.dataclass(frozen=True)
class Marks:
  """Ids of the tokens that say where a representation is read, and of padding."""

  start: int
  end: int
  title: int
  pad: int


class Tokens(NamedTuple):
  """Token rows of all queries and all items; batches and scorers index them."""

  queries: Int[Array, "Q Lq"]
  items: Int[Array, "n Li"]


def marks(bpe: Tokenizer) -> Marks:
  return Marks(*(bpe.token_to_id(token) for token in (data.START, data.END, data.TITLE, data.PAD)))


class Encoder(nnx.Module):
  """A transformer in which every token sees every other that is not padding, with a head of `HEADS`."""

  def __init__(self, config: TransformerConfig, key: jax.Array, *, head: str, marks: Marks):
    require_choice("head", head, HEADS)
    keys = jax.random.split(key, 3)
    self.head, self.marks = head, marks
    self.body = Transformer(config, keys[0])
    # Equal words attend to each other from the start; from unequal maps a small encoder does not learn to match words.
    self.body.blocks.k.weight = nnx.Param(jnp.copy(self.body.blocks.q.weight[...]), axes=("embed", "heads"))
    rows = {name: RowsLinear(one.weight[...], one.weight.axes) for name, one in maps.named(self.body.blocks).items()}
    self.body.blocks = maps.replaced(self.body.blocks, rows)
    self.segment = nnx.Param(0.1 * jax.random.normal(keys[1], (2, config.width)), axes=(None, "embed"))
    if head == "cls":
      self.linear = _cls_head(config, keys[2])

  def hidden(self, tokens: Int[Array, "batch time"], segment: Int[Array, "time"]) -> Float[Array, "batch time width"]:
    """Contextual embeddings."""
    mask = (tokens != self.marks.pad)[:, None, None, :]
    attention = lambda q, k, v, *, window, start: jax.nn.dot_product_attention(q, k, v, mask=mask)
    x, side, _ = self.body.embed(tokens)
    x = x + self.segment[...][segment].astype(x.dtype)
    return self.body.norm(sequential(self.body, x, side, attention=attention)[0])

  def at(self, hidden, tokens, mark: int) -> Float[Array, "batch width"]:
    """The state at the (first) token `mark` of every row, float32."""
    return wide(jnp.take_along_axis(hidden, jnp.argmax(tokens == mark, 1)[:, None, None], axis=1)[:, 0])

  def mention(self, hidden, tokens) -> Float[Array, "batch width"]:
    """(h[START] + h[END]) / 2."""
    return (self.at(hidden, tokens, self.marks.start) + self.at(hidden, tokens, self.marks.end)) / 2


class RowsLinear(Linear):
  """A Linear that is a product of two matrices: with more leading axes than one XLA's CPU compiler writes some of the
  gradients it transposes entry by entry, and a training step takes 1.7 times as long.
  """

  def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
    return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def cast(encoder: Encoder, dtype) -> Encoder:
  """A copy for computing: matrices and tables in `dtype`, vectors as they are. Scores stay float32."""
  return jax.tree.map(lambda leaf: leaf if leaf.ndim < 2 else leaf.astype(dtype), encoder)


def with_head(encoder: Encoder, head: str, key: jax.Array) -> Encoder:
  """A new encoder that starts from a copy of this one's body, with a head of its own."""
  new = jax.eval_shape(lambda: Encoder(encoder.body.config, key, head=head, marks=encoder.marks))
  new.body, new.segment = jax.tree.map(jnp.copy, (encoder.body, encoder.segment))
  if head == "cls":
    new.linear = _cls_head(encoder.body.config, key)
  return new


def _cls_head(config, key):
  return Linear(jax.random.normal(key, (config.width, 1)) / math.sqrt(config.width), ("embed", None))


def score_pairs(
  encoder: Encoder,
  queries: Int[Array, "pairs Lq"],
  items: Int[Array, "pairs Li"],
  key: jax.Array | None = None,
) -> Float[Array, "pairs"]:
  """Cross-encoder scores of query and item rows, float32: one joint pass over query ++ item without its [CLS].

  With a key the [CLS] state is dropped out at rate 0.1 (training).
  """
  tokens = jnp.concatenate([queries, items[:, 1:]], 1)
  segment = jnp.arange(tokens.shape[1]) >= queries.shape[1]
  hidden = encoder.hidden(tokens, segment.astype(jnp.int32))
  if encoder.head == "cls":
    cls = wide(hidden[:, 0])
    if key is not None:
      cls *= jax.random.bernoulli(key, 1 - _DROPOUT, cls.shape) / (1 - _DROPOUT)
    return encoder.linear(cls)[:, 0]
  mention = encoder.mention(hidden, tokens)
  return jnp.sum(mention * encoder.at(hidden, tokens, encoder.marks.title), -1) / math.sqrt(mention.shape[-1])


def embed(encoder: Encoder, tokens: Int[Array, "rows time"], *, item: bool) -> Float[Array, "rows width"]:
  """A dual encoder's embeddings over width^(1/4): the states that the "emb" head multiplies, each from its own pass.

  One pretrained encoder so starts both: a cross-encoder whose two sides did not see each other would be this one.
  """
  segment = jnp.full(tokens.shape[1], int(item), jnp.int32)
  hidden = encoder.hidden(tokens, segment)
  state = encoder.at(hidden, tokens, encoder.marks.title) if item else encoder.mention(hidden, tokens)
  return state / encoder.body.config.width**0.25


def cross_loss(encoder: Encoder, tokens: Tokens, batch: dict, key: jax.Array) -> Float[Array, ""]:
  """-log softmax of the scores of 1 positive (candidate 0) and the negatives, mean over queries.

  Args:
    batch: query (B,), items (B, candidates), int32.
  """
  shape = batch["items"].shape
  queries = jnp.repeat(tokens.queries[batch["query"]], shape[1], 0)
  scores = score_pairs(encoder, queries, tokens.items[batch["items"].reshape(-1)], key).reshape(shape)
  return -jnp.mean(jax.nn.log_softmax(scores)[:, 0])


def dual_loss(encoder: Encoder, tokens: Tokens, batch: dict, key: jax.Array) -> Float[Array, ""]:
  """As `cross_loss`, with the candidates of the whole batch as negatives, but for copies of the positive."""
  del key
  flat, gold = batch["items"].reshape(-1), batch["items"][:, 0]
  q = embed(encoder, tokens.queries[batch["query"]], item=False)
  scores = q @ embed(encoder, tokens.items[flat], item=True).T
  own = jnp.arange(len(gold)) * batch["items"].shape[1]
  copies = (flat == gold[:, None]) & (jnp.arange(len(flat)) != own[:, None])
  return -jnp.mean(jax.nn.log_softmax(jnp.where(copies, -jnp.inf, scores))[jnp.arange(len(gold)), own])


def match_loss(encoder: Encoder, tokens: Tokens, batch: dict, key: jax.Array) -> Float[Array, ""]:
  """MATCH distillation: -sum_j p_j log softmax(student)_j over a query's candidates, p the softmax of the teacher.

  Args:
    batch: query (B,), items (m,), place (B, c) of each query's candidates among those, teacher (B, c) scores.
  """
  del key
  q = embed(encoder, tokens.queries[batch["query"]], item=False)
  scores = q @ embed(encoder, tokens.items[batch["items"]], item=True).T
  student = jax.nn.log_softmax(jnp.take_along_axis(scores, batch["place"], axis=1))
  return -jnp.mean(jnp.sum(jax.nn.softmax(batch["teacher"]) * student, -1))


def train(
  encoder: Encoder,
  loss,
  tokens: Tokens,
  make_batches,
  key: jax.Array,
  *,
  epochs: int,
  steps: int,
  rate: float,
  decay: float = 0.01,
  warmup: float = 0.05,
  dtype: str = "float32",
) -> tuple[Encoder, Float[Array, "epochs*steps"]]:
  """AdamW (no decay on gains), gradient norm clipped at 1, linear warm-up and fall to 0.

  Args:
    loss: `(encoder, tokens, batch, key) -> scalar`.
    make_batches: `(encoder, epoch) -> batches` with leading axis `steps`; it may mine negatives with the encoder.
    steps: steps an epoch.
    dtype: that the loss is computed in; parameters stay float32.

  Returns:
    (trained encoder, loss of every step).
  """
  total = epochs * steps
  first = max(1, int(warmup * total))
  options = dict(loss=loss, decay=decay, dtype=dtype)
  carry, losses = (jax.tree.map(jnp.copy, encoder), _first_state(encoder, decay)), []
  for epoch in range(epochs):
    batches = jax.tree.map(jnp.asarray, make_batches(carry[0], epoch))
    keys = jax.random.split(jax.random.fold_in(key, epoch), steps)
    carry, values = _train_epoch(carry, tokens, batches, keys, rate, first, total, **options)
    losses.append(values)
  return carry[0], jnp.concatenate(losses)


@functools.partial(jax.jit, static_argnames="decay")
def _first_state(encoder, decay):
  return _adamw(lambda count: 0.0, decay).init(encoder)


# The schedule's numbers are traced: trainings that differ in them alone share a program.
@functools.partial(jax.jit, static_argnames=("loss", "decay", "dtype"), donate_argnums=0)
def _train_epoch(carry, tokens, batches, keys, rate, first, total, *, loss, decay, dtype):
  schedule = lambda count: rate * jnp.minimum(count / first, (total - count) / jnp.maximum(total - first, 1))
  optimizer = _adamw(schedule, decay)

  def step(carry, part):
    encoder, state = carry
    batch, key = part
    value, grads = jax.value_and_grad(lambda e: loss(cast(e, dtype), tokens, batch, key))(encoder)
    updates, state = optimizer.update(grads, state, encoder)
    return (optax.apply_updates(encoder, updates), state), value

  return jax.lax.scan(step, carry, (batches, keys))


def _adamw(schedule, decay: float) -> optax.GradientTransformation:
  decayed = lambda tree: jax.tree_util.tree_map_with_path(
    lambda path, _: "gain" not in jax.tree_util.keystr(path), tree
  )
  adamw = optax.adamw(schedule, b2=0.98, weight_decay=decay, mask=decayed)
  return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def gold_batches(
  random: np.random.Generator,
  queries: Int[np.ndarray, "Q"],
  gold: Int[np.ndarray, "Q"],
  pool: Int[np.ndarray, "n"],
  hard: Int[np.ndarray, "Q m"],
  *,
  steps: int,
  batch: int,
  candidates: int,
) -> dict:
  """{"query": (steps, batch), "items": (steps, batch, candidates)}: the gold item, half hard and half random negatives.

  Queries come in random order, each once before any comes twice. A negative is never the gold item: a random draw that
  hits it is moved on to the next item of the pool.

  Args:
    hard: items that look right and are not, for each of `queries`.
  """
  order = np.concatenate([random.permutation(len(queries)) for _ in range(-(-steps * batch // len(queries)))])
  at = order[: steps * batch]
  count = (candidates - 1) // 2
  picked = np.take_along_axis(hard[at], random.integers(0, hard.shape[1], (len(at), count)), 1)
  place = random.integers(0, len(pool), (len(at), candidates - 1 - count))
  place = np.where(pool[place] == gold[at][:, None], (place + 1) % len(pool), place)
  items = np.concatenate([gold[at][:, None], picked, pool[place]], 1).astype(np.int32)
  return {
    "query": queries[at].astype(np.int32).reshape(steps, batch),
    "items": items.reshape(steps, batch, candidates),
  }


def cross_scorer(encoder: Encoder, queries: Int[Array, "Q Lq"], items: Int[Array, "n Li"], *, tile: int = 256):
  """f(i, j) -> float32 scores of query rows i and item rows j (index arrays that broadcast), `tile` pairs at a time.

  A tile's states should fit the cache of a CPU (256) or fill a GPU (8192). For bfloat16 give an encoder that is cast.
  """
  return functools.partial(_score, encoder, queries, items, tile=tile)


@functools.partial(jax.jit, static_argnames="tile")
def _score(encoder, queries, items, i, j, *, tile):
  i, j = jnp.broadcast_arrays(i, j)
  size = min(tile, i.size)
  flat = lambda index: jnp.pad(index.reshape(-1), (0, -index.size % size)).reshape(-1, size)
  one = lambda pair: score_pairs(encoder, queries[pair[0]], items[pair[1]])
  return jax.lax.map(one, (flat(i), flat(j))).reshape(-1)[: i.size].reshape(i.shape)


@functools.partial(jax.jit, static_argnames=("item", "tile"))
def dual_embeddings(
  encoder: Encoder, tokens: Int[Array, "rows time"], *, item: bool, tile: int = 256
) -> Float[Array, "rows width"]:
  """`embed`, `tile` rows at a time."""
  blocks = jnp.pad(tokens, ((0, -len(tokens) % tile), (0, 0)), mode="edge").reshape(-1, tile, tokens.shape[1])
  rows = jax.lax.map(lambda block: embed(encoder, block, item=item), blocks)
  return rows.reshape(-1, rows.shape[-1])[: len(tokens)]


def mine_negatives(
  encoder: Encoder,
  tokens: Tokens,
  queries: Int[np.ndarray, "Q"],
  gold: Int[np.ndarray, "Q"],
  pool: Int[np.ndarray, "n"],
  *,
  top: int = 64,
  rows: int = 256,
) -> Int[np.ndarray, "Q top-1"]:
  """The items of the pool that a dual encoder puts highest, without the gold item: hard negatives of an epoch.

  Raises:
    InputError: the pool holds fewer than `top` items.
  """
  require(top <= len(pool), f"{top} negatives are mined from {len(pool)} items; lower top")
  q = dual_embeddings(encoder, tokens.queries[queries], item=False)
  i = dual_embeddings(encoder, tokens.items[pool], item=True)
  best = jax.jit(lambda q: jax.lax.top_k(q @ i.T, top)[1])
  found = pool[np.concatenate([np.asarray(best(q[at : at + rows])) for at in range(0, len(q), rows)])]
  # Gold items move to the end and fall off with it; where there is none the last item does.
  last = np.argsort(found == gold[:, None], axis=1, kind="stable")
  return np.take_along_axis(found, last, 1)[:, :-1]
