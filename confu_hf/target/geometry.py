"""What shapes a target has, read from its config. The numbers are `TargetGeometry`'s, which configuration derives."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..configuration_confu import TargetGeometry


def attention_geometry(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Shape of a target's cache: `(num_layers, kv_heads, head_dim)`."""
    geometry = TargetGeometry.of(config)
    return geometry.num_hidden_layers, geometry.num_key_value_heads, geometry.head_dim


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type per layer; inferred, as Transformers does for its caches, where the config does not list it."""
    listed = getattr(config, "layer_types", None)
    if listed is not None:
        return list(listed)
    if getattr(config, "sliding_window", None) is not None:
        only = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        only = "chunked_attention"
    else:
        only = "full_attention"
    return [only] * config.num_hidden_layers
