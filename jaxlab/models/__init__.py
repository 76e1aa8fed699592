"""Networks as nnx modules that are plain pytrees: repeated blocks are one module with a leading layer axis."""

from jaxlab.models import hub
from jaxlab.models.config import TransformerConfig
from jaxlab.models.generate import generate
from jaxlab.models.hnet import HNet
from jaxlab.models.hnet_config import HNetConfig
from jaxlab.models.mamba2 import Mamba2, Mamba2Config
from jaxlab.models.transformer import Transformer

LanguageModel = Transformer | Mamba2 | HNet  # what is trained and measured alike
LanguageModelConfig = TransformerConfig | Mamba2Config | HNetConfig

__all__ = [
  "HNet",
  "HNetConfig",
  "LanguageModel",
  "LanguageModelConfig",
  "Mamba2",
  "Mamba2Config",
  "Transformer",
  "TransformerConfig",
  "generate",
  "hub",
]
