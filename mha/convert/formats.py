"""Every foreign format as data: the names of its tensors, what each holds, and what the format cannot say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mha.convert.axes import (
    BLOCKS,
    FEATURE_BY_FEATURE,
    GROUPS,
    HEAD_BY_HEAD,
    HEADS,
    HEADS_OUT,
    IN_HEADS,
    IN_OUT,
    OUT,
    OUT_IN,
    THREE_HEADS,
    THREE_HEADS_IN,
    Axes,
    Order,
)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer: the weight or bias of the projections `holds`, letters of "qkvo"."""

    name: str
    holds: str
    axes: Axes
    #: Whether a layer of this format always has it; a bias that is absent elsewhere becomes zeros then.
    required: bool = False

    @property
    def is_bias(self) -> bool:
        """Rather than a weight."""
        return self.axes in (OUT, HEADS, THREE_HEADS)


@dataclass(frozen=True)
class Format:
    """How one system keeps an attention layer."""

    name: str
    #: As people call it.
    title: str
    tensors: tuple[Tensor, ...]
    order: Order = BLOCKS
    #: Whether key and value may have fewer heads than the query.
    grouped: bool = False
    #: Whether query, key and value widths and the projections' are all one, E.
    square: bool = False
    #: Whether bias_k and bias_v have a place.
    appended: bool = False
    #: Factor on the scores; None is head width ** -0.5.
    scale: float | None = None
    #: What may lie beside these tensors and is no part of attention's weights.
    beside: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Those that a layer cannot be without, and that recognise it."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_bias)

    def passes_over(self, name: str) -> bool:
        """Whether this tensor is one that lies beside."""
        return any(re.fullmatch(pattern, name) for pattern in self.beside)


def _linear(
    name: str, holds: str, axes: Axes = OUT_IN, bias: bool | None = False, kind: str = "weight"
) -> list[Tensor]:
    """A projection as frameworks store it; `bias`: required, possible (False) or never there (None)."""
    made = [Tensor(f"{name}{kind}", holds, axes, required=True)]
    of_bias = {IN_HEADS: HEADS, THREE_HEADS_IN: THREE_HEADS}.get(axes, OUT)
    if bias is not None:
        made.append(Tensor(f"{name}bias", holds, of_bias, required=bias))
    return made


def _separate(
    q: str, k: str, v: str, o: str, axes: Axes = OUT_IN, bias: bool | None = False, kind: str = "weight",
    o_axes: Axes | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    names = zip((q, k, v, o), "qkvo", (axes, axes, axes, o_axes or axes), strict=True)
    return tuple(tensor for name, letter, lie in names for tensor in _linear(name, letter, lie, bias, kind))


def _fused(
    qkv: str, o: str, axes: Axes = OUT_IN, bias: bool | None = False, kind: str = "weight", o_axes: Axes | None = None
) -> tuple[Tensor, ...]:
    return (*_linear(qkv, "qkv", axes, bias, kind), *_linear(o, "o", o_axes or axes, bias, kind))


_SQUARE = {"square": True}
_NORM = r".*(LayerNorm|layer_norm|layernorm|ln)\..*"
_CAUSAL_BUFFERS = (r"bias", r"masked_bias", r"attn\.(bias|masked_bias)")
_ROTARY = r"(.*\.)?rotary_emb\.inv_freq"

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "torch", "torch.nn.MultiheadAttention",
            (Tensor("in_proj_weight", "qkv", OUT_IN, True), Tensor("in_proj_bias", "qkv", OUT),
             *_linear("out_proj.", "o")),
            square=True, appended=True,
        ),
        Format(
            "torch_separate", "torch.nn.MultiheadAttention with kdim or vdim",
            (*(Tensor(f"{x}_proj_weight", x, OUT_IN, True) for x in "qkv"), Tensor("in_proj_bias", "qkv", OUT),
             *_linear("out_proj.", "o")),
            square=True, appended=True,
        ),
        Format(
            "paddle", "Paddle's fused_multi_head_attention",
            (Tensor("qkv_weight", "qkv", THREE_HEADS_IN, True), Tensor("qkv_bias", "qkv", THREE_HEADS),
             Tensor("linear_weight", "o", IN_OUT, True), Tensor("linear_bias", "o", OUT)),
            beside=(r"(pre_)?ln_(scale|bias)",),
        ),
        Format(
            "paddle_flat", "Paddle's fused_multi_head_attention with transpose_qkv_wb",
            (Tensor("qkv_weight", "qkv", IN_OUT, True), Tensor("qkv_bias", "qkv", OUT),
             Tensor("linear_weight", "o", IN_OUT, True), Tensor("linear_bias", "o", OUT)),
            beside=(r"(pre_)?ln_(scale|bias)",),
        ),
        Format(
            "ivy", "ivy.MultiHeadAttention",
            (Tensor("in_proj_weights", "qkv", OUT_IN, True), Tensor("in_proj_bias", "qkv", OUT),
             Tensor("out_proj_weights", "o", OUT_IN, True), Tensor("out_proj_bias", "o", OUT)),
            appended=True,
        ),
        Format(
            "ivy_separate", "ivy.MultiHeadAttention with key_dim or value_dim",
            (*(Tensor(f"{x}_proj_weights", x, OUT_IN, True) for x in "qkv"), Tensor("in_proj_bias", "qkv", OUT),
             Tensor("out_proj_weights", "o", OUT_IN, True), Tensor("out_proj_bias", "o", OUT)),
            appended=True,
        ),
        Format("keras", "keras.layers.MultiHeadAttention and GroupQueryAttention",
               _separate("query/", "key/", "value/", "attention_output/", IN_HEADS, kind="kernel", o_axes=HEADS_OUT),
               grouped=True),
        Format("flax", "flax.linen and flax.nnx MultiHeadAttention",
               _separate("query/", "key/", "value/", "out/", IN_HEADS, kind="kernel", o_axes=HEADS_OUT), grouped=True),
        Format("hf_bert", "Hugging Face BERT, RoBERTa, ELECTRA",
               _separate("self.query.", "self.key.", "self.value.", "output.dense."), beside=(_NORM,)),
        Format("hf_vit", "Hugging Face ViT on disk",
               _separate("attention.query.", "attention.key.", "attention.value.", "output.dense."), beside=(_NORM,)),
        Format("timm", "timm's ViT", _fused("qkv.", "proj.")),
        Format("gpt2", "Hugging Face GPT-2", _fused("c_attn.", "c_proj.", IN_OUT, bias=True), beside=_CAUSAL_BUFFERS),
        Format("llama", "LLaMA, Mistral, Qwen2, Gemma",
               _separate("q_proj.", "k_proj.", "v_proj.", "o_proj."), grouped=True, beside=(_ROTARY,)),
        Format("hf_bart", "Hugging Face BART, CLIP, OPT, Whisper, GPT-J",
               _separate("q_proj.", "k_proj.", "v_proj.", "out_proj."), grouped=True),
        Format("gpt_neox", "GPT-NeoX", _fused("query_key_value.", "dense."), HEAD_BY_HEAD,
               beside=(*_CAUSAL_BUFFERS, _ROTARY)),
        Format("bloom", "BLOOM", _fused("query_key_value.", "dense."), HEAD_BY_HEAD),
        Format("megatron", "Megatron core",
               _fused("linear_qkv.", "linear_proj."), GROUPS, grouped=True,
               beside=(r".*layer_norm.*", r".*_extra_state")),
        Format("megatron_v2", "Megatron-LM, checkpoint version 2", _fused("query_key_value.", "dense."), HEAD_BY_HEAD),
        Format("megatron_v1", "Megatron-LM, checkpoint version 1", _fused("query_key_value.", "dense."),
               FEATURE_BY_FEATURE),
        Format("megatron_v0", "Megatron-LM, checkpoint version 0", _fused("query_key_value.", "dense.")),
        Format("falcon", "Falcon with new_decoder_architecture", _fused("query_key_value.", "dense."), GROUPS,
               grouped=True, beside=(_ROTARY,)),
        Format("falcon_mqa", "Falcon with one key head", _fused("query_key_value.", "dense."), BLOCKS, grouped=True,
               beside=(_ROTARY,)),
        Format("phi3", "Phi-3", _fused("qkv_proj.", "o_proj.", bias=None), grouped=True, beside=(_ROTARY,)),
        Format("t5", "T5", _separate("q.", "k.", "v.", "o.", bias=None), scale=1.0,
               beside=(r"relative_attention_bias\.weight",)),
        Format("onnx", "ONNX Runtime's Attention (com.microsoft)",
               (Tensor("weights", "qkv", IN_OUT, True), Tensor("bias", "qkv", OUT, True))),
    )
}  # fmt: skip

#: What one function reads: the formats of one system that names or numbers of axes tell apart.
FAMILIES = {"torch": ("torch", "torch_separate"), "paddle": ("paddle", "paddle_flat"), "ivy": ("ivy", "ivy_separate")}
#: Format -> the name in `from_<name>` of the function that reads it.
READ_BY = {name: name for name in FORMATS} | {name: of for of, names in FAMILIES.items() for name in names}
