"""Counts the FLOPs of a function from its jaxpr: the matrix products and convolutions.

    count(step, state, frozen, batch, key)    int: FLOPs of one call

A multiplication and an addition are two FLOPs. Elementwise work is not counted; in a transformer it
is a small share of the arithmetic. Shapes are global, so the count is the sum over all devices.
Arguments may be jax.ShapeDtypeStructs: nothing is computed. Imports jax.
"""

import math
from types import MappingProxyType

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters.partial_eval import dce_jaxpr


def count(function, *args, trips=MappingProxyType({})):
    """FLOPs of one call of `function(*args)`.

    What no result needs is left out, as compilers leave it out. Loops of a known length (scan,
    fori_loop between constants) count their body as often as it runs. `jax.lax.cond` counts the
    larger branch.

    Args:
        args: arrays or jax.ShapeDtypeStructs.
        trips: expected numbers of iterations of loops whose length is a traced value, such as the
            rollout's, by the name of the jitted function that the loop is in; "" for all others.

    Raises:
        ValueError: `trips` has no number for such a loop, and it contains matrix products.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return round(_jaxpr(needed, trips))


def _jaxpr(jaxpr, trips, scope=""):
    return sum(_equation(equation, trips, scope) for equation in jaxpr.eqns)


def _equation(equation, trips, scope):
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_general(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if (inside := params.get("name")) in trips:
        return sum(_jaxpr(jaxpr, trips, inside) for jaxpr in _jaxprs(params))
    parts = [_jaxpr(jaxpr, trips) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(parts)
    return _repeats(name, params, trips.get(scope), sum(parts)) * sum(parts) if any(parts) else 0


def _jaxprs(params):
    """The jaxprs among an equation's parameters."""
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, Jaxpr):
            yield leaf


def _repeats(name, params, trips, flops):
    """How often an equation runs the jaxprs that it contains."""
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # its shapes are those of one device
        specs = (*params["in_specs"], *params["out_specs"])
        axes = {axis for axis in jax.tree.leaves(list(map(tuple, specs))) if axis is not None}
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name != "while":
        return 1
    if trips is None:
        raise ValueError(
            f"a loop of {flops:,} FLOPs an iteration has a length that is a traced value: give its "
            "expected number of iterations in `trips`"
        )
    return trips


def _dot_general(equation):
    left = equation.invars[0].aval.shape
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _convolution(equation):
    """Every output takes a product with one filter: kernel size times input channels of its group.

    Positions in the padding or between the dilated inputs count like all others.
    """
    filters = equation.invars[1].aval
    numbers = equation.params["dimension_numbers"]
    return 2 * equation.outvars[0].aval.size * filters.size // filters.shape[numbers.rhs_spec[0]]
