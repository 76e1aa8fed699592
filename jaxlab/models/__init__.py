"""Networks as nnx modules that are plain pytrees: repeated blocks are one module with a leading layer axis."""

from jaxlab.models import hub
from jaxlab.models.config import TransformerConfig
from jaxlab.models.generate import generate
from jaxlab.models.transformer import Transformer

__all__ = ["Transformer", "TransformerConfig", "generate", "hub"]
