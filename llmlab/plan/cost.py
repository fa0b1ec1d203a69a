"""FLOPs of a function, counted in its jaxpr.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and sees nothing of custom kernels:
attention mapped over blocks of queries looks linear in the sequence. Here every loop is multiplied by its trip count,
and a kernel counts what a table says; what is neither known nor in the table is an error, never zero.

    dot_general, conv        2 per multiply-add; masked or padded elements count like others
    elementwise              1 per element of the result, whatever the function; comparisons and integers do not count
    reductions               1 per element of the operand
    moves (reshape, gather)  0
    scan, map, fori_loop     body x trip count
    while                    the same where the trip count shows, else an error or what the caller says
    cond                     the most expensive branch; of platform_dependent, the platform's branch
    grouped matmul           the rows there are, and the most that can be computed in vain beside them; on devices
                             that share the experts out, the rows that their first round of exchange has room for (1.5
                             times those of even use), and nothing of further rounds, which only uneven use needs
    shard_map                body x devices, so the count is that of the whole program
    remat                    what the backward pass computes again counts again, as it runs again

Dead code does not count: jax leaves the value of a function in its gradient's jaxpr, and XLA removes it. What XLA
fuses or finds twice is counted as written.

    cost = count(jax.grad(loss), params, batch)        # arrays or jax.ShapeDtypeStruct
    cost.matmul_flops, cost.by_primitive
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from llmlab.plan.operations import ATTENTION, FUNCTIONS, MATMULS, MOVES, Kernel, elementwise_flops

Known = Mapping[Any, int]
"""Values of integer scalars that are known before the program runs."""


@dataclass(frozen=True)
class Cost:
    """What one call of a function computes."""

    matmul_flops: int = 0
    """FLOPs of matrix products, convolutions and kernels."""
    elementwise_flops: int = 0
    """FLOPs of everything else."""
    bytes: int = 0
    """Operands read and results written by each operation by itself: more than a compiler that fuses them moves."""
    by_primitive: Mapping[str, int] = field(default_factory=dict)
    """FLOPs of both kinds by the name of the operation (or kernel)."""

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return self.matmul_flops + self.elementwise_flops

    def __add__(self, other: "Cost") -> "Cost":
        names = dict.fromkeys([*self.by_primitive, *other.by_primitive])
        return Cost(
            self.matmul_flops + other.matmul_flops,
            self.elementwise_flops + other.elementwise_flops,
            self.bytes + other.bytes,
            {name: self.by_primitive.get(name, 0) + other.by_primitive.get(name, 0) for name in names},
        )

    def times(self, trips: int) -> "Cost":
        """The cost of so many calls."""
        by_primitive = {name: flops * trips for name, flops in self.by_primitive.items()}
        return Cost(self.matmul_flops * trips, self.elementwise_flops * trips, self.bytes * trips, by_primitive)


def count(
    function: Callable[..., Any],
    *args: Any,
    kernels: Mapping[str, Kernel] = MappingProxyType({}),
    while_trips: int | None = None,
    platform: str | None = None,
) -> Cost:
    """The cost of `function(*args)`.

    Args:
        args: pytrees of arrays or of jax.ShapeDtypeStruct; nothing is computed.
        kernels: cost of kernels (the name of a pallas_call or custom call) and of other operations that this module
            does not know, by name. Attention of cuDNN is known.
        while_trips: trip count of while loops whose own does not show; None makes them an error.
        platform: whose branch of jax.lax.platform_dependent counts, "cpu", "cuda" or "tpu"; None for the default
            backend's.

    Raises:
        ValueError: a kernel or operation is unknown, or a while loop's trip count is.
    """
    closed = jax.make_jaxpr(function)(*args)
    jaxpr, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    default = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    counter = _Counter({**ATTENTION, **kernels}, while_trips, platform or default)
    return counter.count(jaxpr, _constants(jaxpr, closed.consts))


@dataclass(frozen=True)
class _Counter:
    kernels: Mapping[str, Kernel]
    while_trips: int | None
    platform: str

    def count(self, jaxpr: Jaxpr, known: Known) -> Cost:
        total = Cost()
        for eqn in jaxpr.eqns:
            total += self.equation(eqn, known)
        return total

    def equation(self, eqn: JaxprEqn, known: Known) -> Cost:
        name = eqn.primitive.name
        inputs, outputs = [atom.aval for atom in eqn.invars], [var.aval for var in eqn.outvars]
        traffic = sum(_bytes(aval) for aval in (*inputs, *outputs))
        # Newer versions of jax may call what a function computes of no argument as a call of its own, by its name.
        if name in ("jit", "pjit") and inputs and (function := eqn.params["name"]) in FUNCTIONS:
            flops = FUNCTIONS[function](inputs, outputs)
            return Cost(matmul_flops=flops, bytes=traffic, by_primitive={function: flops})
        kernel = _kernel_name(eqn)
        if kernel in self.kernels or name in self.kernels:
            kernel = kernel if kernel in self.kernels else name
            flops = self.kernels[kernel](inputs, outputs)
            return Cost(matmul_flops=flops, bytes=traffic, by_primitive={kernel: flops})
        if name in MATMULS:
            flops = MATMULS[name](inputs, outputs, eqn.params)
            return Cost(matmul_flops=flops, bytes=traffic, by_primitive={name: flops})
        if name in MOVES:
            return Cost(bytes=traffic)
        if (flops := elementwise_flops(name, inputs, outputs, eqn.params)) is not None:
            return Cost(elementwise_flops=flops, bytes=traffic, by_primitive={name: flops} if flops else {})
        return self._nested(eqn, name, known)

    def _nested(self, eqn: JaxprEqn, name: str, known: Known) -> Cost:
        """An operation that holds other jaxprs."""
        if name == "cond":
            return self._cond(eqn, known)
        if name == "while":
            return self._while(eqn, known)
        bodies = list(jaxprs_in_params(eqn.params)) if name != "pallas_call" else []
        if len(bodies) != 1:
            raise ValueError(
                f"the cost of {_kernel_name(eqn)!r} is unknown (inputs {[str(a.aval) for a in eqn.invars]}); give it "
                f"as kernels={{{_kernel_name(eqn)!r}: lambda inputs, outputs: FLOPs}}"
            )
        body = self.count(bodies[0], {} if name == "scan" else _passed(bodies[0], eqn.invars, known))
        if name == "scan":
            return body.times(eqn.params["length"])
        if name == "shard_map":
            return body.times(math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]))
        return body

    def _cond(self, eqn: JaxprEqn, known: Known) -> Cost:
        branches: Sequence[ClosedJaxpr] = eqn.params["branches"]
        platforms = eqn.params.get("branches_platforms")
        if platforms is not None:
            mine = [b for b, names in zip(branches, platforms, strict=True) if names is None or self.platform in names]
            if not mine:
                raise ValueError(f"no branch of platform_dependent is for platform={self.platform!r}: {platforms}")
            branches = mine[:1]
        costs = [self.count(b.jaxpr, _passed(b.jaxpr, eqn.invars[1:], known)) for b in branches]
        return max(costs, key=lambda cost: (cost.flops, cost.bytes))

    def _while(self, eqn: JaxprEqn, known: Known) -> Cost:
        trips = _trip_count(eqn, known)
        if trips is None:
            trips = self.while_trips
        if trips is None:
            raise ValueError(
                "a while loop runs until a condition that only the data decides; give its trip count as "
                f"while_trips=..., or loop with scan or fori_loop over a known range. Its condition:\n"
                f"{eqn.params['cond_jaxpr']}"
            )
        condition = self.count(eqn.params["cond_jaxpr"].jaxpr, {})
        return self.count(eqn.params["body_jaxpr"].jaxpr, {}).times(trips) + condition.times(trips + 1)


# --- what is known before the program runs ---------------------------------------------------------------------------


def _value(atom: Any, known: Known) -> int | None:
    if isinstance(atom, Literal):
        return _integer(atom.val)
    return known.get(atom)


def _integer(value: Any) -> int | None:
    """A concrete integer scalar, or None for anything else."""
    if isinstance(value, Tracer) or getattr(value, "shape", ()) != ():
        return None
    kind = getattr(getattr(value, "dtype", None), "kind", "i" if isinstance(value, int) else "")
    return int(value) if kind in ("i", "u") else None


def _constants(jaxpr: Jaxpr, values: Sequence[Any]) -> dict[Any, int]:
    found = {var: _integer(value) for var, value in zip(jaxpr.constvars, values, strict=True)}
    return {var: value for var, value in found.items() if value is not None}


def _passed(body: Jaxpr, atoms: Sequence[Any], known: Known) -> dict[Any, int]:
    """What is known inside a body that is called with these arguments, one for each of its inputs."""
    if len(atoms) != len(body.invars):
        return {}
    found = {var: _value(atom, known) for var, atom in zip(body.invars, atoms, strict=True)}
    return {var: value for var, value in found.items() if value is not None}


def _trip_count(eqn: JaxprEqn, known: Known) -> int | None:
    """Trips of `while i < n: i += c` where the first i and n are known; fori_loop over traced bounds becomes this."""
    condition: Jaxpr = eqn.params["cond_jaxpr"].jaxpr
    body: Jaxpr = eqn.params["body_jaxpr"].jaxpr
    num_condition, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    start = eqn.invars[num_condition + num_body :]
    if len(condition.eqns) != 1 or condition.eqns[0].primitive.name != "lt":
        return None
    counter, limit = condition.eqns[0].invars
    if condition.outvars != condition.eqns[0].outvars or counter not in condition.invars[num_condition:]:
        return None
    position = condition.invars.index(counter) - num_condition
    before, after = body.invars[num_body + position], body.outvars[position]
    steps = [e for e in body.eqns if after in e.outvars and e.primitive.name == "add" and before in e.invars]
    if len(steps) != 1:
        return None
    step = next((_value(atom, {}) for atom in steps[0].invars if atom is not before), None)
    first = _value(start[position], known)
    if limit in condition.invars[:num_condition]:
        last = _value(eqn.invars[condition.invars.index(limit)], known)
    elif limit in condition.invars:  # carried along: it must not change
        index = condition.invars.index(limit) - num_condition
        unchanged = body.outvars[index] is body.invars[num_body + index]
        last = _value(start[index], known) if unchanged else None
    else:
        last = _value(limit, {})
    if step is None or first is None or last is None or step < 1:
        return None
    return max(0, -(-(last - first) // step))


def _kernel_name(eqn: JaxprEqn) -> str:
    """The name of a pallas_call's or custom call's kernel; of any other operation, its own."""
    name = eqn.params.get("name") or eqn.params.get("call_target_name") or eqn.params.get("target_name")
    about = eqn.params.get("name_and_src_info")
    if about is not None:
        name = about.name
    opaque = eqn.primitive.name in ("pallas_call", "ffi_call", "custom_call", "custom_partitioning")
    return str(name) if opaque and name else eqn.primitive.name


def _bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize
