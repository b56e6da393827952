"""Layers of the real libraries with random weights, converted: outputs equal to theirs. `make test-convert`."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mha
from mha import convert
from mha.convert import FROM, TO, PackedParameters

N, L, E, H = 2, 7, 24, 4
X = np.random.default_rng(0).standard_normal((N, L, E)).astype("f4")


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: run `make test-convert`")


def answers(parameters: PackedParameters, x: np.ndarray = X, **options: Any) -> np.ndarray:
    layer = mha.MultiHeadAttention.from_parameters(parameters).eval()
    output, _ = layer(x, x, x, **options)
    return np.asarray(output)


def assert_same_answer(found: np.ndarray, expected: Any) -> None:
    expected = np.asarray(expected.detach() if hasattr(expected, "detach") else expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))


def assert_writes_back(name: str, parameters: PackedParameters, state: dict[str, Any]) -> None:
    for key, x in TO[name](parameters).items():
        np.testing.assert_array_equal(x, np.asarray(state[key]))


def randomised(module: Any) -> Any:
    """Every parameter random, biases too."""
    torch = library("torch")
    torch.manual_seed(1)
    with torch.no_grad():
        for x in module.parameters():
            x.copy_(torch.randn_like(x) / 4)
    return module.eval()


@pytest.mark.parametrize("bias", [True, False])
def test_torch(bias: bool) -> None:
    torch = library("torch")
    for widths in ({}, {"kdim": 5, "vdim": 9}):
        module = randomised(torch.nn.MultiheadAttention(E, H, bias=bias, batch_first=True, **widths))
        key, value = (torch.randn(N, 6, widths.get(name, E)) for name in ("kdim", "vdim"))
        expected, _ = module(torch.from_numpy(X), key, value, need_weights=False)
        layer = mha.MultiHeadAttention.from_torch(module.state_dict(), H).eval()
        assert_same_answer(layer(X, key.numpy(), value.numpy())[0], expected)


def of_transformers(model: str, config: str, class_name: str, options: dict[str, Any], **given: Any) -> Any:
    library("torch")
    library("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    made = getattr(configuration, config)(**options, attn_implementation="eager")
    return randomised(getattr(module, class_name)(made, **given))


def called(module: Any, **options: Any) -> Any:
    torch = library("torch")
    with torch.no_grad():
        output = module(torch.from_numpy(X), **options)
    return output[0] if isinstance(output, tuple) else output


def no_rotation() -> Any:
    """Rotary embeddings that leave everything where it is."""
    torch = library("torch")
    width = E // H
    return torch.ones(N, L, width), torch.zeros(N, L, width)


_BERT = {"hidden_size": E, "num_attention_heads": H, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("model", "config", "class_name"),
    [("bert", "BertConfig", "BertSelfAttention"), ("roberta", "RobertaConfig", "RobertaSelfAttention"),
     ("electra", "ElectraConfig", "ElectraSelfAttention")],
)  # fmt: skip
def test_bert(model: str, config: str, class_name: str) -> None:
    """The layer without BERT's residual link and norm, which are another module there."""
    torch = library("torch")
    inner = of_transformers(model, config, class_name, _BERT)
    dense = randomised(torch.nn.Linear(E, E))
    state = {f"self.{key}": x for key, x in inner.state_dict().items()}
    state |= {f"output.dense.{key}": x for key, x in dense.state_dict().items()}
    parameters = FROM["hf_bert"](state, H)
    assert_same_answer(answers(parameters), dense(called(inner)))
    assert_writes_back("hf_bert", parameters, state)


def test_gpt2() -> None:
    options = {"n_embd": E, "n_head": H, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    module = of_transformers("gpt2", "GPT2Config", "GPT2Attention", options, layer_idx=0)
    parameters = FROM["gpt2"](module.state_dict(), H)
    assert_same_answer(answers(parameters, is_causal=True), called(module, attention_mask=causal()))
    assert_writes_back("gpt2", parameters, module.state_dict())


def causal() -> Any:
    torch = library("torch")
    return torch.full((1, 1, L, L), -torch.inf).triu(1)


@pytest.mark.parametrize("kv_heads", [H, 2, 1])
@pytest.mark.parametrize(
    ("model", "config", "class_name"),
    [("llama", "LlamaConfig", "LlamaAttention"), ("mistral", "MistralConfig", "MistralAttention"),
     ("qwen2", "Qwen2Config", "Qwen2Attention")],
)  # fmt: skip
def test_llama(model: str, config: str, class_name: str, kv_heads: int) -> None:
    """Without rotation. Qwen2 has biases on query, key and value only."""
    options = {"hidden_size": E, "num_attention_heads": H, "num_key_value_heads": kv_heads, "head_dim": E // H}
    module = of_transformers(model, config, class_name, options, layer_idx=0)
    parameters = FROM["llama"](module.state_dict(), H, num_kv_heads=kv_heads)
    expected = called(module, position_embeddings=no_rotation(), attention_mask=causal())
    assert_same_answer(answers(parameters, is_causal=True), expected)
    assert (parameters.layout.qbias, parameters.layout.obias) == (model == "qwen2", False)
    assert_writes_back("llama", parameters, module.state_dict())


def test_gemma_has_heads_of_another_width() -> None:
    torch = library("torch")
    options = {"hidden_size": E, "num_attention_heads": H, "num_key_value_heads": 1, "head_dim": 16}
    module = of_transformers("gemma", "GemmaConfig", "GemmaAttention", options, layer_idx=0)
    rotation = torch.ones(N, L, 16), torch.zeros(N, L, 16)
    parameters = FROM["llama"](module.state_dict(), H, num_kv_heads=1)
    expected = called(module, position_embeddings=rotation, attention_mask=causal())
    assert_same_answer(answers(parameters, is_causal=True), expected)


def test_phi3() -> None:
    options = {"hidden_size": E, "num_attention_heads": H, "num_key_value_heads": 2, "pad_token_id": 0}
    module = of_transformers("phi3", "Phi3Config", "Phi3Attention", options, layer_idx=0)
    parameters = FROM["phi3"](module.state_dict(), H, num_kv_heads=2)
    expected = called(module, position_embeddings=no_rotation(), attention_mask=causal())
    assert_same_answer(answers(parameters, is_causal=True), expected)
    assert_writes_back("phi3", parameters, module.state_dict())


def test_gpt_neox() -> None:
    options = {"hidden_size": E, "num_attention_heads": H, "intermediate_size": 8, "rotary_pct": 1.0}
    module = of_transformers("gpt_neox", "GPTNeoXConfig", "GPTNeoXAttention", options, layer_idx=0)
    parameters = FROM["gpt_neox"](module.state_dict(), H)
    expected = called(module, position_embeddings=no_rotation(), attention_mask=causal())
    assert_same_answer(answers(parameters, is_causal=True), expected)
    assert_writes_back("gpt_neox", parameters, module.state_dict())


def test_gpt_neo() -> None:
    """Scores without a scale; only the output has a bias."""
    options = {"hidden_size": E, "num_heads": H, "num_layers": 1, "attention_types": [[["global"], 1]],
               "max_position_embeddings": 16}  # fmt: skip
    library("torch")
    library("transformers")
    module = importlib.import_module("transformers.models.gpt_neo.modeling_gpt_neo")
    configuration = importlib.import_module("transformers.models.gpt_neo.configuration_gpt_neo")
    layer = randomised(module.GPTNeoSelfAttention(configuration.GPTNeoConfig(**options), "global", 0))
    parameters = FROM["gpt_neo"](layer.state_dict(), H)
    assert_same_answer(answers(parameters, is_causal=True), called(layer))
    assert_writes_back("gpt_neo", parameters, layer.state_dict())


def test_bloom() -> None:
    torch = library("torch")
    options = {"hidden_size": E, "n_head": H, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    module = of_transformers("bloom", "BloomConfig", "BloomAttention", options, layer_idx=0)
    parameters = FROM["bloom"](module.state_dict(), H)
    expected = called(module, residual=torch.zeros(N, L, E), alibi=torch.zeros(N * H, 1, L), attention_mask=causal())
    assert_same_answer(answers(parameters, is_causal=True), expected)
    assert_writes_back("bloom", parameters, module.state_dict())


@pytest.mark.parametrize(
    ("name", "kv_heads", "options"),
    [("falcon_mqa", 1, {"multi_query": True}), ("falcon", 2, {"new_decoder_architecture": True, "num_kv_heads": 2}),
     ("gpt_neox", H, {"multi_query": False})],
)  # fmt: skip
def test_falcon(name: str, kv_heads: int, options: dict[str, Any]) -> None:
    """Three layouts under the same names; the third is GPT-NeoX's."""
    torch = library("torch")
    given = {"hidden_size": E, "num_attention_heads": H, "alibi": False} | options
    module = of_transformers("falcon", "FalconConfig", "FalconAttention", given, layer_idx=0)
    parameters = FROM[name](module.state_dict(), H, num_kv_heads=kv_heads)
    rotation = torch.ones(N, L, E // H), torch.zeros(N, L, E // H)
    expected = called(module, alibi=None, attention_mask=causal(), position_embeddings=rotation)
    assert_same_answer(answers(parameters, is_causal=True), expected)
    assert_writes_back(name, parameters, module.state_dict())


def test_t5() -> None:
    options = {"d_model": E, "num_heads": H, "d_kv": 5, "dropout_rate": 0.0}
    module = of_transformers("t5", "T5Config", "T5Attention", options, layer_idx=0)
    parameters = FROM["t5"](module.state_dict(), H)
    assert parameters.scale == 1.0
    assert_same_answer(answers(parameters), called(module))
    assert_writes_back("t5", parameters, module.state_dict())


@pytest.mark.parametrize(
    ("model", "config", "class_name", "given"),
    [("bart", "BartConfig", "BartAttention", {"embed_dim": E, "num_heads": H, "layer_idx": 0}),
     ("clip", "CLIPTextConfig", "CLIPAttention", {}), ("whisper", "WhisperConfig", "WhisperAttention",
     {"embed_dim": E, "num_heads": H, "layer_idx": 0})],
)  # fmt: skip
def test_bart(model: str, config: str, class_name: str, given: dict[str, Any]) -> None:
    """Whisper has no bias on its key."""
    options = {"hidden_size": E, "num_attention_heads": H} if model == "clip" else {"d_model": E}
    library("torch")
    library("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    made = getattr(configuration, config)(**options)
    made._attn_implementation = "eager"
    arguments = {"config": made} | given
    layer = randomised(getattr(module, class_name)(**arguments))
    parameters = FROM["hf_bart"](layer.state_dict(), H)
    assert parameters.layout.kbias == (model != "whisper")
    assert_same_answer(answers(parameters), called(layer, attention_mask=None))
    assert_writes_back("hf_bart", parameters, layer.state_dict())


def test_timm() -> None:
    """As timm writes it, without its package: one linear to query, key and value, one behind."""
    torch = library("torch")

    class Attention(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = torch.nn.Linear(E, 3 * E), torch.nn.Linear(E, E)

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(x).reshape(N, L, 3, H, E // H).permute(2, 0, 3, 1, 4).unbind(0)
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(x.transpose(1, 2).reshape(N, L, E))

    module = randomised(Attention())
    parameters = FROM["timm"](module.state_dict(), H)
    assert_same_answer(answers(parameters), called(module))
    assert_writes_back("timm", parameters, module.state_dict())


def test_vit_on_disk() -> None:
    """The names that ViT's files have, which transformers renames when it loads them."""
    torch = library("torch")
    linears = {name: randomised(torch.nn.Linear(E, E)) for name in ("query", "key", "value")}
    dense = randomised(torch.nn.Linear(E, E))
    state = {f"attention.{name}.{key}": x for name, one in linears.items() for key, x in one.state_dict().items()}
    state |= {f"output.dense.{key}": x for key, x in dense.state_dict().items()}
    q, k, v = (one(torch.from_numpy(X)).reshape(N, L, H, -1).transpose(1, 2) for one in linears.values())
    context = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, E)
    assert_same_answer(answers(FROM["hf_vit"](state, H)), dense(context))


@pytest.fixture
def keras(monkeypatch: pytest.MonkeyPatch) -> Any:
    """On its NumPy back end."""
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    return library("keras")


def keras_state(layer: Any) -> dict[str, Any]:
    """By the last two parts of each variable's path."""
    return {"/".join(x.path.split("/")[-2:]): np.asarray(x.numpy()) for x in layer.weights}


def filled(layer: Any, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.standard_normal(x.shape).astype("f4") / 4 for x in layer.weights])
    return layer


#: Keras asks its own variables for arrays as NumPy 1 did.
KERAS = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@KERAS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [E // H, 5])
def test_keras(keras: Any, bias: bool, width: int) -> None:
    layer = keras.layers.MultiHeadAttention(H, width, use_bias=bias)
    layer(X, X)
    state = keras_state(filled(layer))
    parameters = FROM["keras"](state)
    assert parameters.layout.num_heads == H
    assert_same_answer(answers(parameters), layer(X, X))
    assert_writes_back("keras", parameters, state)


@KERAS
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_keras_grouped(keras: Any, kv_heads: int) -> None:
    layer = keras.layers.GroupQueryAttention(E // H, H, kv_heads)
    layer(X, X)
    state = keras_state(filled(layer))
    parameters = FROM["keras"](state)
    assert parameters.layout.num_kv_heads == kv_heads
    assert_same_answer(answers(parameters), layer(X, X))


@pytest.mark.parametrize("bias", [True, False])
def test_flax(bias: bool) -> None:
    jax = library("jax")
    linen = library("flax.linen")
    layer = linen.MultiHeadDotProductAttention(H, use_bias=bias, deterministic=True)
    variables = layer.init(jax.random.key(0), X)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype("f4") / 4, variables)
    parameters = FROM["flax"](variables, prefix="params/")
    assert_same_answer(answers(parameters), layer.apply(variables, X))
    assert_writes_back(
        "flax", parameters, {f"{a}/{b}": x for a, tree in variables["params"].items() for b, x in tree.items()}
    )


@pytest.mark.parametrize("bias", [True, False])
def test_flax_nnx(bias: bool) -> None:
    nnx = library("flax.nnx")
    layer = nnx.MultiHeadAttention(H, E, use_bias=bias, decode=False, deterministic=True, rngs=nnx.Rngs(0))
    state = {
        f"{name}/{kind}": np.asarray(variable[...])
        for name in ("query", "key", "value", "out")
        for kind in ("kernel", "bias")
        if (variable := getattr(getattr(layer, name), kind)) is not None
    }
    assert_same_answer(answers(FROM["flax"](state)), layer(X))


def test_onnx_contrib() -> None:
    onnx, runtime = library("onnx"), library("onnxruntime")
    helper = onnx.helper
    parameters = convert.from_torch(
        {"in_proj_weight": np.random.default_rng(0).standard_normal((3 * E, E)).astype("f4") / 4,
         "in_proj_bias": np.random.default_rng(1).standard_normal(3 * E).astype("f4"),
         "out_proj.weight": np.eye(E, dtype="f4")}, H)  # fmt: skip
    views = parameters.layout.views(parameters.io_weight_bias)
    state = {kind: np.concatenate([views[f"{x}_{word}"] for x in "qkv"], axis=-1)
             for kind, word in (("weights", "weight"), ("bias", "bias"))}  # fmt: skip
    node = helper.make_node("Attention", ["x", "weights", "bias"], ["y"], domain="com.microsoft", num_heads=H)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "layer", [info("x", 1, [N, L, E])], [info("y", 1, [N, L, E])],
        [onnx.numpy_helper.from_array(x, name) for name, x in state.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": X})
    made = FROM["onnx"](state, H)
    found = mha.multi_head_attention(X, X, X, attn_drop=0.0, out_drop=0.0, training=False, **made.options).attn_output
    assert_same_answer(found, expected)
    assert_writes_back("onnx", made, state)


CHECKED: dict[str, Callable[..., None]] = {
    "torch": test_torch, "hf_bert": test_bert, "gpt2": test_gpt2, "llama": test_llama, "phi3": test_phi3,
    "gpt_neo": test_gpt_neo, "gpt_neox": test_gpt_neox, "bloom": test_bloom, "falcon": test_falcon,
    "falcon_mqa": test_falcon, "t5": test_t5, "hf_bart": test_bart, "timm": test_timm, "hf_vit": test_vit_on_disk,
    "keras": test_keras, "flax": test_flax, "onnx": test_onnx_contrib,
}  # fmt: skip
#: Those whose library has no CPU package to install; their formulas are in layers.py.
NOT_INSTALLABLE = {"paddle", "ivy", "megatron", "megatron_v0", "megatron_v1", "megatron_v2"}


def test_every_format_is_checked_or_has_a_reason() -> None:
    assert set(CHECKED) | NOT_INSTALLABLE == set(FROM)
