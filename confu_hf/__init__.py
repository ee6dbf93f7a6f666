"""Speculative decoding with draft trees and contemplate tokens for Hugging Face Transformers.

    confu = ConFuAssistant.from_pretrained("org/confu-target", target=model)
    model.generate(**inputs, assistant_model=confu)

Importing the package registers the draft with Transformers' auto classes and the adapter with PEFT.
"""

from .versions import importing, warn_outside_tested_range

with importing("confu_hf"):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .adapter.config import ConFuAdapterConfig
    from .assistant.assistant import ConFuAssistant
    from .assistant.lookup import LookupAssistant
    from .configuration_confu import ConFuConfig
    from .decoding.stats import GenerationStats
    from .options import ConFuGenerationConfig, TreeOptions

AutoConfig.register(ConFuConfig.model_type, ConFuConfig, exist_ok=True)
AutoModel.register(ConFuConfig, ConFuAssistant, exist_ok=True)
AutoModelForCausalLM.register(ConFuConfig, ConFuAssistant, exist_ok=True)

warn_outside_tested_range("confu_hf")

__version__ = "0.1.0.dev0"

__all__ = [
    "ConFuAdapterConfig",
    "ConFuAssistant",
    "ConFuConfig",
    "ConFuGenerationConfig",
    "GenerationStats",
    "LookupAssistant",
    "TreeOptions",
]
