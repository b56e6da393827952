"""Architectures of Hugging Face transformers with random weights: our attention in theirs, hidden states as in eager
mode. `make test-convert`."""

from __future__ import annotations

from typing import Any

import pytest

import mha

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-convert`")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: run `make test-convert`")

_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_DECODER = _COMMON | {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
#: Name of the configuration -> its sizes, and what the model eats.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "BertConfig": (_COMMON | {"vocab_size": 50}, "text"),
    "RobertaConfig": (_COMMON | {"vocab_size": 50, "pad_token_id": 1}, "text"),
    "GPT2Config": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50}, "text"),
    "GPTNeoXConfig": (_DECODER, "text"),
    "LlamaConfig": (_GROUPED, "text"),
    "MistralConfig": (_GROUPED | {"sliding_window": 4}, "text"),
    "Qwen2Config": (_GROUPED, "text"),
    "Qwen3Config": (_GROUPED | {"head_dim": 8}, "text"),
    "Gemma2Config": (_GROUPED | {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 3.0}, "text"),
    "Phi3Config": (_GROUPED, "text"),
    "OPTConfig": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 40, "vocab_size": 50,
                   "word_embed_proj_dim": 32}, "text"),
    "ViTConfig": (_COMMON | {"image_size": 16, "patch_size": 4}, "image"),
    "BartConfig": ({"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
                    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "vocab_size": 50},
                   "text"),
    "T5Config": ({"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 40, "vocab_size": 50}, "both"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registered() -> list[str]:
    """The name "mha" as an attention of transformers; the list notes who called."""
    calls: list[str] = []

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None,
        dropout: float = 0.0, is_causal: bool | None = None, softcap: float | None = None, position_bias: Any = None,
        **_: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        calls.append(type(module).__name__)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = attention_mask
        if position_bias is not None:
            mask = position_bias if mask is None else position_bias.masked_fill(~mask, -torch.inf)
            mask = mask.expand(*query.shape[:3], key.shape[2])
        output = mha.scaled_dot_product_attention(
            query, key, value, mask, is_causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
            scale=scaling, enable_gqa=True, softcap=softcap,
        )  # fmt: skip
        return output.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("mha", attend)
    transformers.AttentionMaskInterface.register("mha", transformers.masking_utils.sdpa_mask)
    return calls


def inputs(kind: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 50, (2, 9), generator=generator)
    kept = torch.ones(2, 9, dtype=torch.int64)
    kept[1, 6:] = 0
    both = {"decoder_input_ids": ids[:, :5]} if kind == "both" else {}
    return {"input_ids": ids, "attention_mask": kept} | both


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_equal_eager(name: str, registered: list[str]) -> None:
    sizes, kind = ARCHITECTURES[name]
    config = getattr(transformers, name)(**sizes)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) / 20)
        expected = model(**inputs(kind), output_hidden_states=True)
        model.set_attn_implementation("mha")
        registered.clear()
        found = model(**inputs(kind), output_hidden_states=True)
    assert len(registered) >= 2, "our attention was not called"
    layers = "hidden_states" if "hidden_states" in expected else "decoder_hidden_states"
    kept = inputs(kind).get("attention_mask")
    for ours, theirs in zip(found[layers], expected[layers], strict=True):
        # What padding answers is nobody's: eager mode gives it the mean of all values.
        if kept is not None and kept.shape == ours.shape[:2]:
            ours, theirs = ours[kept.bool()], theirs[kept.bool()]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
