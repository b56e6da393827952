"""Every foreign format as data: the names of its tensors, what each holds, and what the format cannot say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

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
    #: Whether a layer with any bias has them all.
    all_biases: bool = False
    #: Key heads where nothing says them; None is as many as query heads.
    kv_heads: int | None = None
    #: The `model_type` of Hugging Face's config.json; None is any, for names that one system alone has.
    model_types: tuple[str, ...] | None = None
    #: What may lie beside these tensors and is no part of attention's weights, besides what may in every format.
    beside: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Those that a layer cannot be without, and that recognise it."""
        return tuple(tensor for tensor in self.tensors if not tensor.is_bias)

    @cached_property
    def never(self) -> tuple[str, ...]:
        """Names of biases that layers with such weights may have in other formats, but not in this."""
        biased = {letter for tensor in self.tensors if tensor.is_bias for letter in tensor.holds}
        return tuple(
            tensor.name.removesuffix("weight") + "bias"
            for tensor in self.weights
            if tensor.name.endswith(".weight") and not biased & set(tensor.holds)
        )

    def passes_over(self, name: str) -> bool:
        """Whether this tensor is one that lies beside."""
        return any(re.fullmatch(pattern, name) for pattern in (*_BUFFERS, *self.beside))


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
    o_axes: Axes | None = None, o_bias: bool | None = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    made = [tensor for name, letter in zip((q, k, v), "qkv", strict=True)
            for tensor in _linear(name, letter, axes, bias, kind)]  # fmt: skip
    return (*made, *_linear(o, "o", o_axes or axes, o_bias or bias, kind))


def _fused(
    qkv: str, o: str, axes: Axes = OUT_IN, bias: bool | None = False, kind: str = "weight", o_axes: Axes | None = None
) -> tuple[Tensor, ...]:
    return (*_linear(qkv, "qkv", axes, bias, kind), *_linear(o, "o", o_axes or axes, bias, kind))


#: Tables of positions and the states of random generators.
_BUFFERS = (r"(.*\.)?rotary_(emb|embeddings)\.(inv_freq|cos_cached|sin_cached)", r"embed_positions", r"(.*/)?rngs/.*")
_OUTPUT_NORM = r"output\.(LayerNorm|layer_norm|layernorm)\..*"
_CAUSAL_MASK = r"(attn\.)?(bias|masked_bias)"

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            "torch", "torch.nn.MultiheadAttention",
            (Tensor("in_proj_weight", "qkv", OUT_IN, True), Tensor("in_proj_bias", "qkv", OUT),
             *_linear("out_proj.", "o")),
            square=True, appended=True, all_biases=True,
        ),
        Format(
            "torch_separate", "torch.nn.MultiheadAttention with kdim or vdim",
            (*(Tensor(f"{x}_proj_weight", x, OUT_IN, True) for x in "qkv"), Tensor("in_proj_bias", "qkv", OUT),
             *_linear("out_proj.", "o")),
            square=True, appended=True, all_biases=True,
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
        Format("paddle_nn", "paddle.nn.MultiHeadAttention",
               _separate("q_proj.", "k_proj.", "v_proj.", "out_proj.", IN_OUT), all_biases=True, model_types=()),
        Format(
            "ivy", "ivy.MultiHeadAttention",
            (Tensor("in_proj_weights", "qkv", OUT_IN, True), Tensor("in_proj_bias", "qkv", OUT),
             Tensor("out_proj_weights", "o", OUT_IN, True), Tensor("out_proj_bias", "o", OUT)),
            appended=True, all_biases=True,
        ),
        Format(
            "ivy_separate", "ivy.MultiHeadAttention with key_dim or value_dim",
            (*(Tensor(f"{x}_proj_weights", x, OUT_IN, True) for x in "qkv"), Tensor("in_proj_bias", "qkv", OUT),
             Tensor("out_proj_weights", "o", OUT_IN, True), Tensor("out_proj_bias", "o", OUT)),
            appended=True, all_biases=True,
        ),
        Format("keras", "keras.layers.MultiHeadAttention and GroupQueryAttention",
               _separate("query/", "key/", "value/", "attention_output/", IN_HEADS, kind="kernel", o_axes=HEADS_OUT),
               grouped=True, all_biases=True),
        Format("flax", "flax.linen and flax.nnx MultiHeadAttention",
               _separate("query/", "key/", "value/", "out/", IN_HEADS, kind="kernel", o_axes=HEADS_OUT),
               grouped=True, all_biases=True),
        Format("hf_bert", "Hugging Face BERT, RoBERTa, ELECTRA",
               _separate("self.query.", "self.key.", "self.value.", "output.dense.", bias=True),
               beside=(_OUTPUT_NORM,)),
        Format("hf_vit", "Hugging Face ViT on disk",
               _separate("attention.query.", "attention.key.", "attention.value.", "output.dense.", o_bias=True)),
        Format("timm", "timm's ViT", _fused("qkv.", "proj.")),
        Format("gpt2", "Hugging Face GPT-2", _fused("c_attn.", "c_proj.", IN_OUT, bias=True), beside=(_CAUSAL_MASK,)),
        Format("llama", "LLaMA, Mistral, Qwen2, Gemma",
               _separate("q_proj.", "k_proj.", "v_proj.", "o_proj."), grouped=True),
        Format("hf_bart", "Hugging Face BART, CLIP, OPT, Whisper, GPT-J",
               _separate("q_proj.", "k_proj.", "v_proj.", "out_proj."), grouped=True, beside=(_CAUSAL_MASK,)),
        Format("gpt_neo", "GPT-Neo",
               _separate("q_proj.", "k_proj.", "v_proj.", "out_proj.", bias=None, o_bias=True), scale=1.0,
               model_types=("gpt_neo",), beside=(_CAUSAL_MASK,)),
        Format("gpt_neox", "GPT-NeoX", _fused("query_key_value.", "dense."), HEAD_BY_HEAD,
               model_types=("gpt_neox", "falcon_rw"), beside=(_CAUSAL_MASK,)),
        Format("bloom", "BLOOM", _fused("query_key_value.", "dense.", bias=True), HEAD_BY_HEAD,
               model_types=("bloom",)),
        Format("megatron", "Megatron core",
               _fused("linear_qkv.", "linear_proj."), GROUPS, grouped=True,
               beside=(r"linear_qkv\.layer_norm_(weight|bias)", r".*_extra_state")),
        Format("megatron_v2", "Megatron-LM, checkpoint version 2", _fused("query_key_value.", "dense."), GROUPS,
               grouped=True, model_types=()),
        Format("megatron_v1", "Megatron-LM, checkpoint version 1", _fused("query_key_value.", "dense."),
               FEATURE_BY_FEATURE, model_types=()),
        Format("megatron_v0", "Megatron-LM, checkpoint version 0", _fused("query_key_value.", "dense."),
               model_types=()),
        Format("falcon", "Falcon with new_decoder_architecture", _fused("query_key_value.", "dense."), GROUPS,
               grouped=True, model_types=("falcon",)),
        Format("falcon_mqa", "Falcon with one key head", _fused("query_key_value.", "dense."), grouped=True,
               kv_heads=1, model_types=("falcon_mqa",)),
        Format("phi3", "Phi-3", _fused("qkv_proj.", "o_proj.", bias=None), grouped=True),
        Format("t5", "T5", _separate("q.", "k.", "v.", "o.", bias=None), scale=1.0,
               beside=(r"relative_attention_bias\.weight",)),
        Format("onnx", "ONNX Runtime's Attention (com.microsoft)",
               (Tensor("weights", "qkv", IN_OUT, True), Tensor("bias", "qkv", OUT, True))),
    )
}  # fmt: skip

#: What one function reads: the formats of one system that names or numbers of axes tell apart.
FAMILIES = {"torch": ("torch", "torch_separate"), "paddle": ("paddle", "paddle_flat", "paddle_nn"),
            "ivy": ("ivy", "ivy_separate")}  # fmt: skip
#: Format -> the name in `from_<name>` of the function that reads it.
READ_BY = {name: name for name in FORMATS} | {name: of for of, names in FAMILIES.items() for name in names}
