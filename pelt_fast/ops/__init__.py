"""The operators: schema, fake kernel, and the step into a backend. Importing this package registers them."""

from .lora import lora_linear_bwd, lora_linear_fwd

__all__ = ["lora_linear_bwd", "lora_linear_fwd"]
