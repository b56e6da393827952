"""Five systems' own interfaces to attention, on NumPy and CuPy arrays: `megengine`, `torch`, `rtorch`, `paddle`, `ivy`.

Each has its system's names, parameter order, defaults, shapes and return values. Where a system's documentation and
its behaviour differ, the documentation counts; where both leave a case open or fail, the package's own rules do: a
query that sees no key gives 0, every mask that is given holds, ``is_causal`` needs no mask beside it. Bad calls raise
ValueError (shapes, sizes, flags) or TypeError (dtypes, array libraries).

Every function ``f`` has a twin ``f_vjp`` with the same parameters that returns ``(result, backward)``;
``backward(grad_output, grad_weights=None, mask_gradients=False)`` gives a dict of gradients keyed by the names of
``f``'s parameters. Those of float masks are in it on request.
"""
