"""To the Hugging Face hub's format for Llama: what any reader of its checkpoints opens.

    hub.save("out", shape, tensors, max_length=1024, end_of_text=0)     # config.json, model.safetensors

Tensors go by `Shape.tensors()`'s names; the hub's carry `model.` before all but the head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mpilm.log import UserError
from mpilm.model.shape import Shape

HEAD = "lm_head.weight"
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def to_hub(name: str) -> str:
    """The hub's name of the tensor `name`."""
    return name if name == HEAD else f"model.{name}"


def config(shape: Shape, *, max_length: int, end_of_text: int, dtype: str = "float32") -> dict[str, object]:
    """What config.json says.

    Args:
        max_length: Tokens of the longest sequence the model was trained on.
        end_of_text: The token that ends a text; nothing begins one.
        dtype: Of the weights, by torch's name.
    """
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": shape.width, "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width,
            "vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tied_embeddings,
            "rms_norm_eps": shape.norm_eps, "rope_theta": shape.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "max_position_embeddings": max_length, "attention_bias": False, "mlp_bias": False,
            "bos_token_id": None, "eos_token_id": end_of_text, "pad_token_id": None, "dtype": dtype}


def save(directory: Path, shape: Shape, tensors: Mapping[str, Tensor], *, max_length: int, end_of_text: int) -> None:
    """Write config.json and model.safetensors into a folder that is there; arguments as of `config`.

    Raises:
        UserError: The disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    settings = config(shape, max_length=max_length, end_of_text=end_of_text, dtype=dtype)
    (directory / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    try:
        save_file({to_hub(name): tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS,
                  metadata={"format": "pt"})
    except SafetensorError as error:    # of the disk
        raise UserError(f"{directory / WEIGHTS}: {error}") from None
    (directory / WEIGHTS).chmod((directory / CONFIG).stat().st_mode & 0o777)    # the library lets nobody else read it
