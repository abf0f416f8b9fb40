"""What a traced program costs: FLOPs by module, and the memory that it needs at once.

Read from a jaxpr, so from shapes alone: nothing is compiled and no array is made.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from triform.runtime.scopes import path_of

# Primitives that compilers fuse into what reads them, so that they need no memory of
# their own; what is not named here is kept.
FUSED = {
    *("add", "sub", "mul", "div", "neg", "abs", "sign", "max", "min", "pow", "rem"),
    *("integer_pow", "sqrt", "rsqrt", "square", "exp", "exp2", "expm1", "log", "log1p"),
    *("tanh", "logistic", "erf", "erfc", "erf_inv", "sin", "cos", "floor", "round"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "select_n"),
    *("shift_left", "shift_right_logical", "shift_right_arithmetic", "clamp", "iota"),
    *("is_finite", "nextafter", "convert_element_type"),
    *("broadcast_in_dim", "slice", "pad", "rev", "concatenate", "add_any"),
    *("random_wrap", "random_unwrap", "reduce_precision"),
}
# Primitives whose result is their operand, read in another order.
VIEWS = ("reshape", "squeeze", "expand_dims", "transpose", "name", "copy", "copy_p")
VIEWS += ("sharding_constraint", "optimization_barrier", "bitcast_convert_type")
VIEWS += ("stop_gradient",)
# Calls that stand for what they call.
INLINED = (
    *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin"),
)


Share = Callable[[str], float]  # path of a module -> share of its products


@dataclasses.dataclass
class Value:
    """An array of the program."""

    shape: tuple[int, ...]
    dtype: str
    size: int  # bytes
    scope: str = ""  # the module that makes it
    made_by: str = ""  # the primitive


@dataclasses.dataclass
class Operation:
    """One primitive, calls replaced by what they call."""

    name: str
    scope: str
    inputs: list[Value]
    outputs: list[Value]
    flops: int = 0  # of matrix products and convolutions, each time
    again: bool = False  # computed before, and not kept
    bodies: tuple["Program", ...] = ()  # of loops and branches
    times: int = 1  # a body is run
    carried: tuple[Value, ...] = ()  # inputs of a loop whose memory its outputs take


@dataclasses.dataclass
class Program:
    """Operations in order; `outputs` are live after the last."""

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Value]

    def flops(
        self, again: bool = True, share: Share = lambda path: 1.0
    ) -> Counter[str]:
        """{module: FLOPs of matrix products and convolutions, a multiplication and an
        addition counted as two}.

        Exact but for loops of unknown length, whose body counts once; of branches the
        most expensive counts. Without `again` what remat recomputes is left out.
        `share` of a module's path is what of its own products counts.
        """
        found: Counter[str] = Counter()
        for op in self.operations:
            if op.flops and (again or not op.again):
                found[op.scope] += round(op.flops * share(op.scope))
            bodies = [body.flops(again, share) for body in op.bodies]
            if op.name == "cond":
                bodies = [max(bodies, key=Counter.total)]
            for body in bodies:
                for scope, count in body.items():
                    found[scope] += op.times * count
        return +found

    def open_loops(self) -> bool:
        """Are there products in loops of unknown length?"""
        for op in self.operations:
            inside = any(body.flops() for body in op.bodies)
            if op.name == "while" and inside:
                return True
            if any(body.open_loops() for body in op.bodies):
                return True
        return False


def trace(fn: Callable, *inputs: Any) -> Program:
    """The program of `fn` for inputs of these shapes."""
    closed = jax.make_jaxpr(fn)(*inputs)
    return read(closed.jaxpr)


def read(jaxpr: Any, scope: str = "") -> Program:
    """A jaxpr as a Program; `scope` is where it is called."""
    values: dict[Any, Value] = {}
    for var in (*jaxpr.constvars, *jaxpr.invars):
        values[var] = _value(var)
    operations = list(_operations(jaxpr, values, scope))
    outputs = [_known(var, values) for var in jaxpr.outvars]
    return Program([values[v] for v in jaxpr.invars], operations, outputs)


def _value(var: Any, scope: str = "", made_by: str = "") -> Value:
    aval = var.aval
    shape, dtype = tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None)
    each = 4 if dtype is None else item_size(dtype)
    return Value(shape, str(dtype), math.prod(shape) * each, scope, made_by)


def item_size(dtype: Any) -> int:
    """Bytes of an element."""
    # A key is two words.
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize


def _known(var: Any, values: dict[Any, Value]) -> Value:
    return _value(var) if isinstance(var, core.Literal) else values[var]


def _operations(jaxpr: Any, values: dict, scope: str) -> Iterator[Operation]:
    """The operations in order; fills `values` by variable."""
    for eqn in jaxpr.eqns:
        name, where = eqn.primitive.name, f"{scope}/{eqn.source_info.name_stack}"
        inputs = [_known(var, values) for var in eqn.invars]
        bodies = list(core.jaxprs_in_params(eqn.params))
        if name in INLINED and bodies:
            inner = bodies[0]
            inner = getattr(inner, "jaxpr", inner)
            # A custom derivative's other functions are not run here.
            values |= dict(zip(inner.invars, inputs, strict=True))
            values |= {var: _value(var) for var in inner.constvars}
            yield from _operations(inner, values, where)
            made = [_known(var, values) for var in inner.outvars]
            values |= dict(zip(eqn.outvars, made, strict=True))
            continue
        if name in VIEWS:
            values |= dict(zip(eqn.outvars, inputs, strict=True))
            continue
        path = path_of(where)
        outputs = [_value(var, path, name) for var in eqn.outvars]
        values |= dict(zip(eqn.outvars, outputs, strict=True))
        yield Operation(
            name,
            path,
            inputs,
            outputs,
            _flops(eqn),
            "rematted_computation" in where,
            tuple(read(getattr(b, "jaxpr", b), where) for b in bodies),
            eqn.params.get("length", 1) if name == "scan" else 1,
            _carried(eqn, inputs),
        )


def _carried(eqn: Any, inputs: list[Value]) -> tuple[Value, ...]:
    """The first values of a loop's carry."""
    if eqn.primitive.name == "scan":
        first = eqn.params["num_consts"]
        return tuple(inputs[first : first + eqn.params["num_carry"]])
    if eqn.primitive.name == "while":
        return tuple(inputs[eqn.params["cond_nconsts"] + eqn.params["body_nconsts"] :])
    return ()


def _flops(eqn: Any) -> int:
    """Twice the multiplications of a matrix product or convolution, else 0."""
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == "dot_general":
        contracted, batched = eqn.params["dimension_numbers"]
        shapes = [var.aval.shape for var in eqn.invars]
        for shape, *taken in zip(shapes, contracted, batched, strict=True):
            used = {i for axes in taken for i in axes}
            if math.prod(n for i, n in enumerate(shape) if i not in used) == 1:
                return 0  # a sum, written as a product with a vector
        return 2 * out * math.prod(shapes[0][i] for i in contracted[0])
    if eqn.primitive.name == "conv_general_dilated":
        return _convolution(eqn)
    return 0


def _convolution(eqn: Any) -> int:
    """Twice the multiplications of a convolution, those with padding left out."""
    made, params = eqn.outvars[0].aval.shape, eqn.params
    image, kernel = (var.aval.shape for var in eqn.invars[:2])
    numbers = params["dimension_numbers"]
    rows, features, *places = numbers.out_spec
    # The kernel's input channels are those of a group.
    count = 2 * made[rows] * made[features] * kernel[numbers.rhs_spec[1]]
    for i, place in enumerate(places):
        size = image[numbers.lhs_spec[2 + i]]
        low, spread = params["padding"][i][0], params["lhs_dilation"][i]
        starts = np.arange(made[place]) * params["window_strides"][i] - low
        offsets = np.arange(kernel[numbers.rhs_spec[2 + i]]) * params["rhs_dilation"][i]
        at = starts[:, None] + offsets
        count *= int(
            ((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)).sum()
        )
    return count


@dataclasses.dataclass
class Peak:
    """The moment at which most memory is in use."""

    size: int  # bytes
    arrays: list[Value]  # in use then, largest first


Sizes = Callable[[Value], int]  # bytes on one device


def peak(
    program: Program, sizes: Sizes = lambda value: value.size, loop: bool = False
) -> Peak:
    """What a program needs at once beside its inputs, as compilers lay it out.

    Elementwise operations are fused into what reads them: their results are kept only
    where a matrix product or a loop reads them, or where they are smaller than what
    they are computed from. Outputs are in use until the end; those of the body of a
    `loop` have memory outside.
    """
    kept, roots = _kept(program, loop)
    ends = _ends(program, roots)
    live: dict[int, Value] = {}
    now, most, found = 0, 0, []

    def free(keys: Iterable[int]) -> None:
        nonlocal now
        for key in keys:
            if value := live.pop(key, None):
                now -= sizes(value)

    for number, op in enumerate(program.operations):
        over = ends.get(number, set())
        carried = {id(root) for x in op.carried for root in roots.get(id(x), ())}
        free(carried & over)
        for value in op.outputs:
            if id(value) in kept and id(value) not in live:
                live[id(value)] = value
                now += sizes(value)
        inner = [peak(body, sizes, op.name != "cond") for body in op.bodies]
        inside = max(inner, key=lambda p: p.size, default=Peak(0, []))
        if now + inside.size > most:
            most = now + inside.size
            found = [*live.values(), *inside.arrays]
        free(over)
    return Peak(most, sorted(found, key=sizes, reverse=True))


def _ends(program: Program, roots: dict[int, Sequence[Value]]) -> dict[int, set[int]]:
    """{number of an operation: ids of the kept values that it is the last to read}."""
    last: dict[int, int] = {}
    for number, op in enumerate(program.operations):
        for value in (*op.inputs, *op.outputs):
            for root in roots.get(id(value), ()):
                last[id(root)] = number
    for value in program.outputs:
        for root in roots.get(id(value), ()):
            last[id(root)] = len(program.operations)
    ends: dict[int, set[int]] = {}
    for key, number in last.items():
        ends.setdefault(number, set()).add(key)
    return ends


def _kept(program: Program, loop: bool) -> tuple[set[int], dict[int, Sequence[Value]]]:
    """(ids of the values that have memory, id -> the kept values it is computed from).

    Inputs of the program have none here: they are there anyway.
    """
    read = {
        id(value)
        for op in program.operations
        if op.name not in FUSED and not op.name.startswith(("reduce", "arg", "cum"))
        for value in op.inputs
    }
    if not loop:
        read |= {id(value) for value in program.outputs}
    kept: set[int] = set()
    roots: dict[int, Sequence[Value]] = {}
    for op in program.operations:
        sources = {id(r): r for x in op.inputs for r in roots.get(id(x), ())}
        total = sum(root.size for root in sources.values())
        for value in op.outputs:
            free = op.name in FUSED and id(value) not in read
            smaller = value.size < total
            if len(sources) == 1 and value.dtype == "bool":
                smaller = False
            if free and not smaller:
                roots[id(value)] = [*sources.values()]
            else:
                kept.add(id(value))
                roots[id(value)] = [value]
    return kept, roots
