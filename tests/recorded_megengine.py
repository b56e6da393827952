"""The recorded cases of the real MegEngine 1.13.0: parameters, inputs and outputs.

The files `ref_*` hold a float64 model of what released MegEngine refuses (bias_k, bias_v, add_zero_attn, reslink).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from recorded_dropout import draws, keep_mask

DATA = Path(__file__).parent / "data" / "megengine"
NAMES = sorted(path.stem for path in DATA.glob("*.npz"))
SIZES = ("qproj_size", "kproj_size", "vproj_size", "oproj_size")
FLAGS = ("qbias", "kbias", "vbias", "obias", "is_causal", "maybe_cudnn_style_mask", "average_attn_weights",
         "add_zero_attn", "reslink", "training")  # fmt: skip

#: What MegEngine does otherwise: the flag lost beside a mask, a mask it takes for causal, masks it ignores, NaN.
DECIDED = ("causal_hint_dropped_by_kpm", "causal_hint_other_mask", "cudnn_style_ignored_on_cpu", "fully_masked_row_nan")


class Recorded:
    """One file: parameters, inputs and recorded outputs."""

    def __init__(self, name: str) -> None:
        with np.load(DATA / f"{name}.npz") as stored:
            arrays = dict(stored)
        self.params = json.loads(str(arrays.pop("params")))
        self.inputs = {key[3:]: x for key, x in arrays.items() if key.startswith("in_")}
        self.outputs = {key[4:]: x for key, x in arrays.items() if key.startswith("out_")}
        self.model = name.startswith("ref_")
        if self.model:
            floats = {key: x for key, x in self.inputs.items() if x.dtype == np.float32}
            self.inputs |= {key: x.astype(np.float64) for key, x in floats.items()}

    @property
    def drops(self) -> bool:
        return self.params["training"] and (self.params["attn_drop"] > 0 or self.params["out_drop"] > 0)

    @property
    def tolerance(self) -> tuple[float, float]:
        """Absolute, of forward and gradients: MegEngine rounds to float16 between all stages."""
        if self.inputs["q"].dtype == np.float16:
            return 4e-3, 1.5e-2
        return (1e-12, 1e-12) if self.model else (3e-6, 1e-5)

    def arguments(self) -> dict[str, Any]:
        p, x = self.params, self.inputs
        given = {name: x.get(name) for name in ("bias_k", "bias_v", "attn_mask", "key_padding_mask")}
        fixed = dict(query=x["q"], key=x["k"], value=x["v"], io_weight_bias=x["w"], need_weights=True)
        drops = dict(attn_drop=p["attn_drop"], out_drop=p["out_drop"])
        numbers = {name: p[name] for name in ("embed_dim", "num_heads", *SIZES, *FLAGS)}
        return {**fixed, **drops, **numbers, **given}

    def keep_masks(self) -> tuple[Any, Any]:
        """Of the weights (N, H, L, T) and the output (N, L, O), regenerated; checked where they were recorded."""
        p, stream = self.params, draws(self.params["seed"])
        batch, queries, width = self.outputs["out"].shape
        keys = self.inputs["k"].shape[1] + p["has_bias_kv"] + p["add_zero_attn"]
        weights = keep_mask(stream, p["attn_drop"], (batch, p["num_heads"], queries, keys))
        output = keep_mask(stream, p["out_drop"], (batch, queries, width))
        for kept, name in ((weights, "attn_keep"), (output, "out_keep")):
            if name in self.outputs:
                assert (kept.ravel() == (self.outputs[name].ravel() != 0)).all(), name
        return weights, output


def cases(drops: bool) -> list[str]:
    return [name for name in NAMES if name not in DECIDED and Recorded(name).drops == drops]
