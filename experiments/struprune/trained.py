"""Two networks trained here, with an ungated MLP and as many keys as queries (as OPT) and with SwiGLU and groups (as
LLaMA): what pruning takes from them."""

from pathlib import Path

import jax

from experiments.compressing import Subject, subject_of
from experiments.text import Text, train_model
from jaxlab.models import Transformer
from jaxlab.models.config import TransformerConfig
from jaxlab.training.losses import language_model_loss


def subject(config, style: str, *, text: Text, folder: Path, workdir: Path, console) -> Subject:
  """A network of config.trained.shapes[style], trained on the text's split "train" and resumed from `workdir`.

  Args:
    folder: of the checkpoint whose tokenizer the text has.
  """
  t = config.trained
  shape = TransformerConfig(**t.shape, **t.shapes[style], vocab_size=text.bpe.get_vocab_size(), tied_embeddings=True)
  model = Transformer(shape, jax.random.key(config.seed))
  how = dict(workdir=workdir / f"trained.{style}", console=console, title=style, phase="trained")
  loss = lambda model, batch, step, key: language_model_loss(model, batch)
  model = train_model(config, text, model, loss, **how)
  model = jax.tree.map(lambda a: a.astype("float32"), model)
  return subject_of(config, style, folder, model, text)
