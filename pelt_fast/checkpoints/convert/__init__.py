"""Checkpoints of OpenDelta 0.3.2 as those of `adapters` and PEFT, and back.

| OpenDelta | `adapters` | PEFT |
|---|---|---|
| LoRA | `LoRAConfig`: query, key, value, intermediate.dense, output.dense | `LoraConfig`, any module |
| adapter | `DoubleSeqBnConfig` | |
| low-rank adapter (rank 1) | `CompacterConfig` with one summand, whose rule is 1 | |
| compacter | `CompacterConfig` without shared rules | |
| parallel adapter of the feed-forward part | `ParBnConfig`, scaling 1 | |
| prefix | `PrefixTuningConfig` | |
| soft prompt | | `PromptTuningConfig` |

Where a cell is empty the library computes something else: PEFT shifts the positions of BERT by the prefix, `adapters`
adds a prompt behind the layernorm of the embeddings, OpenDelta's parallel adapter of an attention adds behind that
one's.
Paths are those of encoders that transformers names as BERT (``encoder.layer.0.attention.self.query``), but for LoRA
with PEFT. What comes back has the tensors that went in: nothing is computed, but a prefix whose network does not fit.
"""

from .converted import Converted
from .from_opendelta import from_opendelta
from .to_opendelta import to_opendelta

__all__ = ["Converted", "from_opendelta", "to_opendelta"]
