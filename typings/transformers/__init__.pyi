"""What this project imports from the root of Transformers, for pyright: the very classes, each from its own module.

The package's own root imports 2,500 modules for a type checker (5.23.0), a third of what pyright takes for all. The
file can go when it no longer does.
"""

from transformers.cache_utils import DynamicCache as DynamicCache
from transformers.masking_utils import AttentionMaskInterface as AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface as AttentionInterface
from transformers.models.auto.tokenization_auto import AutoTokenizer as AutoTokenizer
from transformers.models.internvl.configuration_internvl import InternVLConfig as InternVLConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig as InternVLVisionConfig
from transformers.models.internvl.modeling_internvl import (
    InternVLForConditionalGeneration as InternVLForConditionalGeneration,
)
from transformers.models.internvl.modeling_internvl import InternVLModel as InternVLModel
from transformers.models.internvl.modeling_internvl import InternVLVisionModel as InternVLVisionModel
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config as Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model as Qwen2Model
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer as Qwen2Tokenizer
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast as PreTrainedTokenizerFast
