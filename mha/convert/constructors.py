"""`from_x` of `MultiHeadAttention`, for every format."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any, Self

from mha.convert.parameters import PackedParameters
from mha.convert.systems import FROM


def _constructor(name: str) -> classmethod[Any, Any, Any]:
    read = FROM[name]

    def construct(
        cls: type[FromFormats],
        /,
        state_dict: Mapping[str, Any],
        num_heads: int | None = None,
        prefix: str = "",
        *,
        num_kv_heads: int | None = None,
        xp: ModuleType | None = None,
        **options: Any,
    ) -> FromFormats:
        parameters = read(state_dict, num_heads, prefix, num_kv_heads=num_kv_heads)
        return cls.from_parameters(parameters, xp=xp, **options)

    construct.__name__ = f"from_{name}"
    construct.__qualname__ = f"MultiHeadAttention.from_{name}"
    construct.__doc__ = (
        f"A layer with the parameters that ``mha.convert.from_{name}`` reads, whose arguments these are; `xp` is the "
        "library to hold them in, else their own; the options are attn_dropout, out_dropout, add_zero_attn, scale."
    )
    return classmethod(construct)


class FromFormats:
    """What `MultiHeadAttention` can be made of."""

    @classmethod
    def from_parameters(cls, parameters: PackedParameters, *, xp: ModuleType | None = None, **options: Any) -> Self:
        """A layer with converted parameters."""
        raise NotImplementedError

    from_torch = _constructor("torch")
    from_paddle = _constructor("paddle")
    from_ivy = _constructor("ivy")
    from_keras = _constructor("keras")
    from_flax = _constructor("flax")
    from_hf_bert = _constructor("hf_bert")
    from_hf_vit = _constructor("hf_vit")
    from_hf_bart = _constructor("hf_bart")
    from_timm = _constructor("timm")
    from_gpt2 = _constructor("gpt2")
    from_llama = _constructor("llama")
    from_gpt_neo = _constructor("gpt_neo")
    from_gpt_neox = _constructor("gpt_neox")
    from_bloom = _constructor("bloom")
    from_megatron = _constructor("megatron")
    from_megatron_v0 = _constructor("megatron_v0")
    from_megatron_v1 = _constructor("megatron_v1")
    from_megatron_v2 = _constructor("megatron_v2")
    from_falcon = _constructor("falcon")
    from_falcon_mqa = _constructor("falcon_mqa")
    from_phi3 = _constructor("phi3")
    from_t5 = _constructor("t5")
    from_onnx = _constructor("onnx")
