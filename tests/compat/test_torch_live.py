"""Beside the installed PyTorch: random configurations, forward and backward, and torch's own sample generators.

A configuration is a function of its seed alone; a failing test's name is the line that reproduces it.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import pytest

import mha
from mha.compat import torch as compat

torch = pytest.importorskip("torch", reason="torch is not installed: run `make test-torch`")

#: The first 300 in every run, all of them with `make test-all`.
SEEDS = [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 300)) for seed in range(2000)]
TOLERANCE = {np.float64: {"rtol": 1e-9, "atol": 1e-11}, np.float32: {"rtol": 2e-4, "atol": 1e-4}}


class Configuration:
    """One random call, its arrays and the gradients of its loss, sum(output * up) + sum(weights * up_weights)."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = np.random.default_rng(seed)
        self.functional = bool(rng.random() < 0.5)
        self.dtype = np.float32 if rng.random() < 0.25 else np.float64
        self.heads, self.batch, self.queries = (int(rng.integers(1, high)) for high in (5, 5, 13))
        self.width = self.heads * int(rng.integers(1, 6))
        self.batched = bool(rng.random() < 0.8)
        self.batch = self.batch if self.batched else 1
        self.alias = str(rng.choice(["none", "kv", "qkv"], p=[0.5, 0.2, 0.3]))
        self.keys = self.queries if self.alias == "qkv" else int(rng.integers(1, 13))
        self.k_width = self.v_width = self.width
        if self.alias == "none" and rng.random() < 0.4:
            self.k_width, self.v_width = int(rng.integers(1, 9)), int(rng.integers(1, 9))
        self.bias, self.bias_kv, self.zero = (bool(rng.random() < p) for p in (0.7, 0.3, 0.3))
        self.batch_first = bool(rng.random() < 0.5) and not self.functional
        self.static = self.functional and not self.bias_kv and rng.random() < 0.2
        self.out_width = int(rng.integers(1, 9)) if self.functional and rng.random() < 0.2 else self.width
        self.options = {"need_weights": bool(rng.random() < 0.7), "average_attn_weights": bool(rng.random() < 0.5)}
        self.masks: dict[str, Any] = {}
        self._draw_masks()
        if rng.random() < 0.15:
            causal = ~np.tri(self.queries, self.keys, dtype=bool)
            self.masks.pop("key_padding_mask", None)
            self.masks["attn_mask"] = causal
            # Beside a mask and with appended keys torch drops the flag, or hides them: not what it documents.
            self.options["is_causal"] = not (self.bias_kv or self.zero)

    def array(self, *shape: int) -> Any:
        return self.rng.standard_normal(shape).astype(self.dtype)

    def _draw_masks(self) -> None:
        """Each row keeps at least one key: torch gives NaN without."""
        rng, kept = self.rng, int(self.rng.integers(self.keys))
        shape = (self.queries, self.keys)
        if rng.random() < 0.5:
            shape = (self.batch * self.heads, *shape)
        for name, size in (("attn_mask", shape), ("key_padding_mask", (self.batch, self.keys)[not self.batched :])):
            kind = rng.choice(["none", "bool", "float", "inf"], p=[0.4, 0.3, 0.15, 0.15])
            hidden = rng.random(size) < 0.4
            hidden[..., kept] = False
            if kind == "bool":
                self.masks[name] = hidden
            elif kind != "none":
                mask = self.array(*size)
                self.masks[name] = np.where(hidden & (kind == "inf"), -np.inf, mask).astype(self.dtype)

    def inputs(self) -> dict[str, Any]:
        def placed(length: int, width: int) -> Any:
            if not self.batched:
                return self.array(length, width)
            return self.array(*((self.batch, length) if self.batch_first else (length, self.batch)), width)

        made = {"query": placed(self.queries, self.width)}
        made["key"] = made["query"] if self.alias == "qkv" else placed(self.keys, self.k_width)
        made["value"] = made["key"] if self.alias != "none" else placed(self.keys, self.v_width)
        return made

    def parameters(self) -> dict[str, Any]:
        width, made = self.width, {}
        if self.k_width == self.v_width == width:
            made["in_proj_weight"] = self.array(3 * width, width)
        else:
            for letter, columns in zip("qkv", (width, self.k_width, self.v_width), strict=True):
                made[f"{letter}_proj_weight"] = self.array(width, columns)
        made["out_proj.weight"] = self.array(self.out_width, width)
        if self.bias:
            made |= {"in_proj_bias": self.array(3 * width), "out_proj.bias": self.array(self.out_width)}
        if self.bias_kv:
            made |= {"bias_k": self.array(1, 1, width), "bias_v": self.array(1, 1, width)}
        return made

    def statics(self) -> dict[str, Any]:
        shape = (self.batch * self.heads, self.keys, self.width // self.heads)
        return {"static_k": self.array(*shape), "static_v": self.array(*shape)} if self.static else {}

    def functional_arguments(self, parameters: dict[str, Any]) -> dict[str, Any]:
        named = dict.fromkeys(("in_proj_weight", "in_proj_bias", "bias_k", "bias_v", "out_proj_bias"))
        named |= {name.replace(".", "_"): x for name, x in parameters.items()}
        return named | {
            "embed_dim_to_check": self.width, "num_heads": self.heads, "add_zero_attn": self.zero, "dropout_p": 0.0,
            "use_separate_proj_weight": "q_proj_weight" in parameters,
        }  # fmt: skip

    def module_arguments(self) -> dict[str, Any]:
        return {
            "embed_dim": self.width, "num_heads": self.heads, "bias": self.bias, "add_bias_kv": self.bias_kv,
            "add_zero_attn": self.zero, "kdim": self.k_width, "vdim": self.v_width, "batch_first": self.batch_first,
            "dtype": getattr(torch, np.dtype(self.dtype).name),
        }  # fmt: skip


def leaves(arrays: dict[str, Any]) -> dict[str, Any]:
    """As tensors that want a gradient where they are floating; the same array is the same tensor."""
    made = {id(x): torch.from_numpy(x.copy()) for x in arrays.values()}
    for x in made.values():
        x.requires_grad_(x.is_floating_point())
    return {name: made[id(x)] for name, x in arrays.items()}


def of_torch(c: Configuration, inputs: Any, parameters: Any, statics: Any, ups: Any) -> dict[str, Any]:
    arrays = inputs | c.masks | statics
    tensors, held = leaves(arrays), leaves(parameters)
    if c.functional:
        output, weights = torch.nn.functional.multi_head_attention_forward(
            **tensors, **c.functional_arguments(held), **c.options
        )
    else:
        module = torch.nn.MultiheadAttention(**c.module_arguments())
        module.load_state_dict({name: x.detach() for name, x in held.items()})
        held = dict(module.named_parameters())
        output, weights = module(**tensors, **c.options)
    loss = (output * torch.from_numpy(ups(tuple(output.shape)))).sum()
    if weights is not None:
        loss = loss + (weights * torch.from_numpy(ups(tuple(weights.shape)))).sum()
    loss.backward()
    found = {"output": output, "weights": weights}
    unused = {"key", "value"} if c.static else set()
    found |= {f"gradient of {name}": x.grad for name, x in (tensors | held).items()
              if x.is_floating_point() and name not in unused}  # fmt: skip
    return {name: x.detach().numpy() for name, x in found.items() if x is not None}


def of_ours(c: Configuration, inputs: Any, parameters: Any, statics: Any, ups: Any) -> dict[str, Any]:
    if c.functional:
        (output, weights), backward = compat.multi_head_attention_forward_vjp(
            **inputs, **c.masks, **statics, **c.functional_arguments(parameters), **c.options
        )
        backward = functools.partial(backward, mask_gradients=True)
    else:
        module = compat.MultiheadAttention(**c.module_arguments())
        module.load_state_dict(parameters)
        output, weights = module(**inputs, **c.masks, **c.options)

        def backward(*ups: Any) -> dict[str, Any]:
            made = module.backward(*ups, mask_gradients=True)
            return made._asdict() | made.parameters

    found = {"output": output, "weights": weights}
    gradients = backward(ups(output.shape), None if weights is None else ups(weights.shape))
    by_array: dict[int, Any] = {}
    for name, x in inputs.items():
        by_array[id(x)] = by_array.get(id(x), 0) + gradients[name]
    gradients |= {name: by_array[id(x)] for name, x in inputs.items()}
    names = {name.replace(".", "_"): name for name in parameters}
    found |= {f"gradient of {names.get(name, name)}": x for name, x in gradients.items() if not isinstance(x, dict)}
    return {name: x for name, x in found.items() if x is not None}


@pytest.mark.parametrize("seed", SEEDS)
def test_random_configurations(seed: int) -> None:
    c = Configuration(seed)
    inputs, parameters, statics = c.inputs(), c.parameters(), c.statics()

    def ups(shape: tuple[int, ...]) -> Any:
        return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(c.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masks of two dtypes
        expected = of_torch(c, inputs, parameters, statics, ups)
    found = of_ours(c, inputs, parameters, statics, ups)
    assert expected.keys() <= found.keys()
    for name, right in expected.items():
        assert found[name].shape == right.shape, name
        atol = TOLERANCE[c.dtype]["atol"] * max(1.0, np.abs(right).max(initial=0))
        np.testing.assert_allclose(
            found[name], right, TOLERANCE[c.dtype]["rtol"], atol,
            err_msg=f"{name}; reproduce: python -m pytest '{__file__}::test_random_configurations[{seed}]'\n{vars(c)}",
        )  # fmt: skip


def arrays_of(x: Any) -> Any:
    """Tensors as arrays, whatever they are nested in."""
    if isinstance(x, torch.Tensor):
        return x.detach().numpy()
    if isinstance(x, (list, tuple)):
        return [arrays_of(y) for y in x]
    return {name: arrays_of(y) for name, y in x.items()} if isinstance(x, dict) else x


def operator_samples(name: str) -> Any:
    pytest.importorskip("expecttest", reason="expecttest is not installed: run `make test-torch`")
    from torch.testing._internal.common_methods_invocations import op_db

    (found,) = (op for op in op_db if op.name == name)
    torch.manual_seed(0)
    return [(x.input, *x.args, x.kwargs) for x in found.sample_inputs("cpu", torch.float64, requires_grad=False)]


def test_torch_samples_of_the_function() -> None:
    samples = operator_samples("nn.functional.multi_head_attention_forward")
    assert len(samples) == 192
    for *args, options in samples:
        args[10] = 0.0  # dropout
        expected = torch.nn.functional.multi_head_attention_forward(*args, **options)
        found = compat.multi_head_attention_forward(*arrays_of(args), **arrays_of(options))
        for one, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, right.numpy(), rtol=1e-10, atol=1e-12)


def test_torch_samples_of_scaled_dot_product_attention() -> None:
    samples = [x for x in operator_samples("nn.functional.scaled_dot_product_attention") if not x[-1]["dropout_p"]]
    assert len(samples) == 13
    for *args, options in samples:
        expected = torch.nn.functional.scaled_dot_product_attention(*args, **options)
        found = compat.scaled_dot_product_attention(*arrays_of(args), **arrays_of(options))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_torch_samples_of_the_module(training: bool) -> None:
    pytest.importorskip("expecttest", reason="expecttest is not installed: run `make test-torch`")
    from torch.testing._internal.common_modules import module_db

    (info,) = (m for m in module_db if m.name == "nn.MultiheadAttention")
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)
    assert len(samples) == 64
    for sample in samples:
        made, call = sample.constructor_input, sample.forward_input
        theirs = torch.nn.MultiheadAttention(*made.args, **made.kwargs, dtype=torch.float64).train(training)
        ours = compat.MultiheadAttention(*made.args, **made.kwargs, dtype="float64").train(training)
        ours.load_state_dict(theirs.state_dict())
        found = ours(*arrays_of(call.args), **arrays_of(call.kwargs))
        for one, right in zip(found, theirs(*call.args, **call.kwargs), strict=True):
            np.testing.assert_allclose(one, right.detach().numpy(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 40, "vdim": 24}, {"bias": False}])
def test_initial_distributions(options: dict[str, Any]) -> None:
    mha.seed(0)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(96, 4, **options).state_dict()
    ours = compat.MultiheadAttention(96, 4, **options).state_dict()
    assert list(ours) == list(theirs)
    for name, right in theirs.items():
        one, right = ours[name], right.numpy()
        assert one.shape == right.shape
        assert one.dtype == right.dtype
        assert abs(one.std() - right.std()) <= (0.3 if "bias" in name else 0.02) * right.std(), name
        assert abs(np.abs(one).max() - np.abs(right).max()) <= (0.4 if "bias" in name else 0.02) * np.abs(right).max()


def test_nested_tensors() -> None:
    """torch's fast path on a nested tensor, and a list here."""
    theirs = torch.nn.MultiheadAttention(12, 4, batch_first=True, dtype=torch.float64).eval()
    ours = compat.MultiheadAttention(12, 4, batch_first=True, dtype="float64").eval()
    ours.load_state_dict(theirs.state_dict())
    parts = [np.random.default_rng(n).standard_normal((n, 12)) for n in (3, 1, 7)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        x = torch.nested.nested_tensor([torch.from_numpy(part) for part in parts])
        expected, weights = theirs(x, x, x)
    found, found_weights = ours(parts, parts, parts)
    for i, right in enumerate(expected.unbind()):
        n = len(parts[i])
        np.testing.assert_allclose(found[i], right.numpy(), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found_weights[i], weights[i, :n, :n].numpy(), rtol=1e-10, atol=1e-12)
