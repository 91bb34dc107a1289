"""To and from the Hugging Face hub's format for Llama: config.json and model.safetensors.

    hub.save("out", shape, tensors)        # any reader of Llama checkpoints opens it
    shape, tensors = hub.load("out")       # and we read what others wrote

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
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def to_hub(name: str) -> str:
    """The hub's name of the tensor `name`."""
    return name if name == HEAD else f"model.{name}"


def from_hub(name: str) -> str:
    """The inverse of `to_hub`."""
    return name.removeprefix("model.")


def config(shape: Shape, *, max_length: int = 2048, dtype: str = "float32") -> dict[str, object]:
    """What config.json says; `max_length` is the longest sequence the model was trained on."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": shape.width, "intermediate_size": shape.hidden, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width,
            "vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tied_embeddings,
            "rms_norm_eps": shape.norm_eps, "rope_theta": shape.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
            "max_position_embeddings": max_length, "attention_bias": False, "mlp_bias": False, "dtype": dtype}


def shape_of(config: Mapping[str, object]) -> Shape:
    """The shape that a hub configuration describes.

    Raises:
        UserError: It is another kind of model, or uses what ours does not have; named.
    """
    get = dict(config).get
    rope: object = get("rope_parameters") or get("rope_scaling") or {}
    rope = rope if isinstance(rope, Mapping) else {}
    unsupported = {"model_type": (get("model_type"), "llama"), "hidden_act": (get("hidden_act", "silu"), "silu"),
                   "attention_bias": (get("attention_bias", False), False), "mlp_bias": (get("mlp_bias", False), False),
                   "rope_type": (rope.get("rope_type", "default"), "default")}
    for key, (given, allowed) in unsupported.items():
        if given != allowed:
            raise UserError(f"The model's config.json has {key} = {given!r}; only {allowed!r} can be read.")
    return Shape(layers=_int(config, "num_hidden_layers"), width=_int(config, "hidden_size"),
                 heads=_int(config, "num_attention_heads"), vocab_size=_int(config, "vocab_size"),
                 kv_heads=int(str(get("num_key_value_heads") or 0)), hidden=_int(config, "intermediate_size"),
                 tied_embeddings=bool(get("tie_word_embeddings", False)),
                 rope_theta=float(str(rope.get("rope_theta") or get("rope_theta", 10000.0))),
                 norm_eps=float(str(get("rms_norm_eps", 1e-6))))


def _int(config: Mapping[str, object], key: str) -> int:
    if not isinstance(config.get(key), int):
        raise UserError(f"The model's config.json has no number {key!r}.")
    return int(str(config[key]))


def save(directory: str | Path, shape: Shape, tensors: Mapping[str, Tensor], *, max_length: int = 2048) -> None:
    """Write config.json and model.safetensors; `tensors` by `Shape.tensors()`'s names."""
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config(shape, max_length=max_length, dtype=dtype), indent=2))
    save_file({to_hub(name): tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS,
              metadata={"format": "pt"})


def load(directory: str | Path) -> tuple[Shape, dict[str, Tensor]]:
    """Read what `save` or transformers' `save_pretrained` wrote, in one file or several.

    Raises:
        UserError: A file is missing, or the tensors are not those of the configuration; named.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    try:
        shape = shape_of(json.loads((directory / "config.json").read_text()))
        found = {from_hub(name): tensor for file in _files(directory) for name, tensor in load_file(file).items()}
    except OSError as error:
        raise UserError(f"{directory} is not a model from the hub: {error}.") from None
    wrong = [name for name, dimensions in shape.tensors().items()
             if name not in found or tuple(found[name].shape) != dimensions]
    if wrong:
        raise UserError(f"{directory}: {wrong[0]} is missing or has another shape than config.json says.")
    return shape, {name: found[name] for name in shape.tensors()}


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        return [directory / WEIGHTS]
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
