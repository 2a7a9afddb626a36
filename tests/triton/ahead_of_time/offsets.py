"""Products of two run-time numbers in 32 bits that end in an address, found in a kernel's Triton IR.

``row * stride`` passes 2³¹ in tensors that people do have, and neither the interpreter at small shapes nor a card at
middling ones shows it. Rows have to be widened before they are multiplied: ``row.to(tl.int64) * stride``. What a block
size bounds (a constant, ``tl.arange``) may be multiplied in 32 bits. A quotient, a remainder, and what is multiplied
again in 64 bits is an index, whatever it was computed from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_VALUE = r"%[\w.$-]+(?:#\d+)?"
_RESULT = re.compile(r"^(?P<name>%[\w.$-]+)(?::\d+)? = \"?(?P<op>[\w.]+)\"?(?P<rest>.*)$")
_PASSES_ON = {
    *(f"arith.{name}" for name in ("addi", "subi", "muli", "extsi", "extui", "trunci", "select")),
    *(f"arith.{name}" for name in ("minsi", "maxsi", "minui", "maxui", "ori", "xori", "andi", "index_cast")),
    *(f"tt.{name}" for name in ("splat", "broadcast", "expand_dims", "reshape", "trans", "join", "unsplat")),
}
_CONSTANT = {"arith.constant", "tt.make_range"}


@dataclass(frozen=True)
class _Value:
    """``fixed``: known when the kernel is compiled; ``products``: locations of the 32-bit products it was made of."""

    fixed: bool = False
    products: frozenset[str] = frozenset()


_UNKNOWN = _Value()


def narrow_products(ttir: str) -> list[str]:
    """``file.py:LINE``, where a 32-bit product of two run-time numbers is made that ends in an address; sorted."""
    lines = [line.strip() for line in ttir.splitlines()]
    values: dict[str, _Value] = {}
    found: set[str] = set()
    # The second time, loops' arguments hold what the first iteration left in them.
    for _ in range(2):
        found |= _walk(lines, values)
    return sorted({_place(location, ttir) for location in found})


def _walk(lines: list[str], values: dict[str, _Value]) -> set[str]:
    """One reading of the function from top to bottom; ``values`` is kept up to date."""
    found: set[str] = set()
    regions: list[
        tuple[str, list[str]]
    ] = []  # the open ones: the result's name, and what the region carries along
    for line in lines:
        body, _, location = line.partition(" loc(")
        match = _RESULT.match(body)
        if match:
            name, op, rest = match["name"], match["op"], match["rest"]
            operands = [values.get(operand, _UNKNOWN) for operand in re.findall(_VALUE, rest)]
            values[name] = _result(op, rest, operands, location)
            if op == "tt.addptr":
                found |= operands[1].products
            carried = (
                re.findall(rf"({_VALUE}) = ({_VALUE})", rest.partition("(")[2])
                if op.startswith("scf.")
                else []
            )
            for argument, initial in carried:
                _add(values, argument, values.get(initial, _UNKNOWN))
        if body.startswith("}") and regions:
            ended = regions.pop()
            if body.endswith("{"):
                regions.append(ended)
        elif body.endswith("{"):
            regions.append((match["name"], [argument for argument, _ in carried]) if match else ("", []))
        elif body.startswith(("scf.yield", "scf.condition")):
            result, arguments = regions[-1]
            yielded = re.findall(_VALUE, re.sub(r"^scf.condition\(.*?\)", "", body))
            for index, operand in enumerate(yielded):
                value = values.get(operand, _UNKNOWN)
                _add(values, f"{result}#{index}" if len(yielded) > 1 else result, value)
                if index < len(arguments):
                    _add(values, arguments[index], value)
    return found


def _add(values: dict[str, _Value], name: str, value: _Value) -> None:
    """One more value that a loop's argument or a region's result may have."""
    known = values.get(name, value)
    values[name] = _Value(known.fixed and value.fixed, known.products | value.products)


def _result(op: str, rest: str, operands: list[_Value], location: str) -> _Value:
    if op in _CONSTANT:
        return _Value(fixed=True)
    if op not in _PASSES_ON:
        return _UNKNOWN
    products = frozenset().union(*(operand.products for operand in operands))
    if op == "arith.muli" and rest.endswith(("i64", "i64>")):
        products = frozenset()
    fixed = all(operand.fixed for operand in operands)
    if (
        op == "arith.muli"
        and re.search(r"\bi32>?$|xi32>$", rest)
        and not any(operand.fixed for operand in operands)
    ):
        products |= {location.rstrip(")")}
    return _Value(fixed, products)


def _place(location: str, ttir: str) -> str:
    """The file and line behind ``#loc12``, through names and call sites."""
    for _ in range(8):
        here = re.search(r'"([^"]+)":(\d+):\d+', location)
        if here:
            return f"{here[1].rsplit('/', 1)[-1]}:{here[2]}"
        name = re.search(r"#loc\d*", location)
        definition = name and re.search(rf"^{re.escape(name[0])} = loc\((.*)\)$", ttir, re.MULTILINE)
        if not definition:
            break
        location = definition[1]
    return location
