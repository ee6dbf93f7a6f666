"""NVIDIA ModelOpt: a flat config with an `eagle_config` of its own, layers called `layers.N`; read only.

Its layer ids count by the state that *leaves* a layer. Only `d2t` is exported, and no embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .layer import Foreign, Format, flat_fields, refuse, stated_flags
from .specforge import FLAGS, eagle_layer_ids

# Switches of its EAGLE module, and the value that makes it an EAGLE-3 layer as all others know it.
SWITCHES = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}


def _matches(config: Mapping[str, Any]) -> bool:
    return bool({"use_last_layernorm", "use_input_layernorm_in_first_layer"} & set(config.get("eagle_config") or ()))


def _fields(checkpoint: Foreign) -> dict[str, Any]:
    eagle = checkpoint.config["eagle_config"]
    for name, needed in SWITCHES.items():
        if eagle.get(name, needed) not in (needed, None):
            raise refuse(checkpoint.source, f"{name}={eagle[name]}", f"{needed}", "Other norms are not supported.")
    if (eagle.get("parallel_draft_step") or 1) > 1:
        steps = eagle["parallel_draft_step"]
        raise refuse(checkpoint.source, f"parallel_draft_step={steps}", "1: a draft that goes token by token")
    fields = flat_fields(checkpoint.config, checkpoint.source)
    fields |= stated_flags({**eagle, **checkpoint.config}, FLAGS)
    fields["target_layer_ids"] = eagle_layer_ids(checkpoint)
    return fields


FORMAT = Format("modelopt", _matches, _fields)
