"""Writes tests/fixtures: tiny checkpoints made by transformers, with its logits and greedy continuations.

python -m tests.models.make_fixtures          (needs the extra `parity`)
"""

import pathlib

import numpy as np
import torch
import transformers

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"
SHAPE = dict(
  vocab_size=96,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  initializer_range=0.2,
)
LLAMA3 = dict(
  rope_type="llama3",
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=32,
  rope_theta=10000.0,
)


def models():
  t = transformers
  return {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE)),
    "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False)),
    "qwen3_tied": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
      t.Qwen3MoeConfig(**SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "nanochat": lambda: t.NanoChatForCausalLM(t.NanoChatConfig(**SHAPE)),
  }


def make(name: str, seed: int):
  """A random model whose norm gains are random too: ones would hide a gain that is never read."""
  torch.manual_seed(seed)
  model = models()[name]().eval()
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.uniform_(0.5, 1.5)
  return model


def answers(model, tokens: np.ndarray, new_tokens: int = 64):
  """(logits, greedy continuation of the first 5 tokens of every row)."""
  with torch.no_grad():
    logits = model(torch.from_numpy(tokens)).logits.numpy()
    prompt = torch.from_numpy(tokens[:, :5])
    mask = torch.ones_like(prompt)
    # No end token: the comparison wants all 64.
    model.generation_config.eos_token_id = None
    greedy = model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
  return logits, greedy[:, 5:].numpy()


if __name__ == "__main__":
  for seed, name in enumerate(models()):
    model = make(name, seed)
    folder = FIXTURES / name
    model.save_pretrained(folder, max_shard_size="30KB" if name == "qwen3" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokens = np.random.default_rng(seed).integers(0, SHAPE["vocab_size"], (2, 40))
    logits, greedy = answers(model, tokens)
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=logits, greedy=greedy)
