"""The numbers that fix a GPT, and the names and shapes of its weights. Arithmetic only, no torch.

Two lists of names describe the same memory, in the same order:
- *tensors*: what the world knows, Hugging Face's Llama names without their leading `model.`;
- *parameters*: what the program multiplies with. The rows of queries, keys and values are one matrix
  (`qkv_proj`), so are those of the feed-forward's gate and up: one large product instead of several small ones.

A tensor is a contiguous run of rows of the parameter that holds it, so nothing is ever copied to go from one to the
other: `parts("layers.0.self_attn.qkv_proj.weight")` is q_proj, k_proj and v_proj, one after the other.

    shape = Shape(layers=6, width=384, heads=6, vocab_size=8192)
    shape.tensors()["layers.0.self_attn.q_proj.weight"]        # (384, 384)
"""

from __future__ import annotations

from dataclasses import dataclass

HIDDEN_MULTIPLE = 64    # matrix units like multiples of 64


@dataclass(frozen=True)
class Shape:
    """A pre-norm decoder: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

    `kv_heads` 0 means as many as `heads`; `hidden` 0 means 8/3 of the width, rounded up to a multiple of 64.
    Both are resolved at construction, so equal shapes compare equal.
    """

    layers: int
    width: int
    heads: int
    vocab_size: int
    kv_heads: int = 0
    hidden: int = 0
    tied_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "hidden", self.hidden or -(-8 * self.width // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE)

    @property
    def head_width(self) -> int:
        """Elements of one head's query, key or value."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Elements of a token's keys (or values), over all heads."""
        return self.kv_heads * self.head_width

    @property
    def units(self) -> int:
        """What a pipeline may cut between: the embedding, every block, and the head with its norm."""
        return self.layers + 2

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, in the order of `GPT.named_parameters()`."""
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.width)}
        for layer in range(self.layers):
            for name, shape in self._block().items():
                shapes[f"layers.{layer}.{name}"] = shape
        shapes["norm.weight"] = (self.width,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.width)
        return shapes

    def _block(self) -> dict[str, tuple[int, ...]]:
        return {"input_layernorm.weight": (self.width,),
                "self_attn.qkv_proj.weight": (self.width + 2 * self.kv_width, self.width),
                "self_attn.o_proj.weight": (self.width, self.width),
                "post_attention_layernorm.weight": (self.width,),
                "mlp.gate_up_proj.weight": (2 * self.hidden, self.width),
                "mlp.down_proj.weight": (self.width, self.hidden)}

    def parts(self, name: str) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that the parameter `name` holds, in the order of their rows."""
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        if last == "qkv_proj":
            rows = {"q_proj": self.width, "k_proj": self.kv_width, "v_proj": self.kv_width}
        elif last == "gate_up_proj":
            rows = {"gate_proj": self.hidden, "up_proj": self.hidden}
        else:
            return {name: self.parameters()[name]}
        return {f"{prefix}.{part}.weight": (count, self.width) for part, count in rows.items()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, in the order of the parameters that hold them."""
        return {part: shape for name in self.parameters() for part, shape in self.parts(name).items()}
