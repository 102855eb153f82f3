"""How inputs are broken: bytes, texts and JSON values, each by a seeded generator."""

import copy
import json
import random
import struct
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 255, 256, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**30,
    10**400, -(10**30), 0.0, -0.0, 0.5, 1e-320, 1e15, 1e300, 1.7e308, -1e308, float("nan"), float("inf"),
    float("-inf"),
)  # fmt: skip
TEXTS = ("", " ", "\0", "\n", "\u2028", "\ud800", "é" * 300, "x" * 70_000, "../../etc/passwd", "/dev/zero", "none",
         "{0}", "%s%n", "\x1b[2J", "blk.99999999999.attn_q.weight", "4" * 50, "1e999", "NaN", "﷽")  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": {}}, [[[[[[]]]]]], {"a": [1, 2]})
SNIPPETS = (
    "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "1e400", "-", "NaN", "Infinity", '"\\ud800"', "\\u0000",
    '"a": 1, "a": 2,', "}", "]", ",", ":", '"', "null", "true", "[[a]]\n", "a.b.c = 1\n", "'''", '"""', "\t", "\r",
    "= [", "2020-01-01", "0x7fffffffffffffffffff", "inf", "&a [*a, *a]", "!!python/object:os.system x", "---\n",
    "- " * 3000, "? ", "| ", "\ufeff", "\u202e", "\x00",
)  # fmt: skip
_DEEP = "(deep)"  # becomes lists in lists
JUNK = (b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\x00" * 64, b"\xf4\x90\x80\x80", b"\n" * 3, b"\x80")


def broken_bytes(data: bytes, rng: random.Random, *, within: int | None = None) -> bytes:
    """Break bytes in one to four places, the first ``within`` of them where that is given."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(max(1, min(within or len(out), len(out))))
        match rng.randrange(9):
            case 0:
                out[at : at + 1] = bytes([out[at] ^ (1 << rng.randrange(8))]) if out else b"\0"
            case 1:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 2 | 3:
                value = rng.choice(
                    (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**24, 2**40)
                )
                size = rng.choice((4, 8, 8))
                out[at : at + size] = struct.pack("<Q", value)[:size]
            case 4:
                del out[at:]
            case 5:
                del out[at : at + rng.randrange(1, 64)]
            case 6:
                start = rng.randrange(len(out) or 1)
                out[at:at] = out[start : start + rng.randrange(1, 256)]
            case 7:
                out[at:at] = rng.choice(JUNK)
            case 8:
                start, size = rng.randrange(len(out) or 1), rng.randrange(1, 64)
                out[at : at + size] = out[start : start + size]
    return bytes(out)


def broken_text(text: str, rng: random.Random) -> bytes:
    """Break a text by characters, snippets of several languages, or its bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(text) + 1)
        match rng.randrange(6):
            case 0:
                text = text[:at] + rng.choice(SNIPPETS) + text[at:]
            case 1:
                text = text[:at]
            case 2:
                text = text[:at] + text[at + rng.randrange(1, 20) :]
            case 3:
                text = text[:at] + repr(rng.choice(NUMBERS)) + text[at:]
            case 4:
                lines = text.split("\n")
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
                text = "\n".join(lines)
            case 5:
                return broken_bytes(text.encode("utf-8", "surrogatepass"), rng)
    return text.encode("utf-8", "surrogatepass")


def broken_json(value: Any, rng: random.Random) -> bytes:
    """Break a JSON value in one to four of its nodes, and sometimes its text too."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _broken_node(value, rng)
    depth = rng.choice((300, 700, 900, 980))  # near what a parser of this Python takes
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7).replace(f'"{_DEEP}"', "[" * depth + "1" + "]" * depth)
    if rng.random() < 0.2:
        return broken_text(text, rng)
    return text.encode("utf-8", "surrogatepass")


def _broken_node(value: Any, rng: random.Random) -> Any:
    at, parents = value, []
    while isinstance(at, dict | list) and at and (len(parents) < 1 or rng.random() < 0.85):
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        parents.append((at, key))
        at = at[key]
    if not parents:
        return _other(value, rng)
    holder, key = parents[-1]
    match rng.randrange(6):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        case 1:
            holder.insert(key, _other(at, rng))
        case 2:
            other = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
            holder[key] = copy.deepcopy(holder[other])
        case _:
            holder[key] = _other(at, rng)
    return value


def _other(old: Any, rng: random.Random) -> Any:
    if isinstance(old, int | float) and rng.random() < 0.3:
        return rng.choice((-old, old + 1, old - 1, old * 2, [old], bool(old)))
    if isinstance(old, str) and rng.random() < 0.3:
        return rng.choice((old + old, old[1:], old.upper(), old + "\n", [old], old + "\ud800"))
    if isinstance(old, list) and rng.random() < 0.4:
        return rng.choice((old + old, old[:-1], old[::-1], old * 100 if len(old) < 100 else old))
    return rng.choice(
        (rng.choice(NUMBERS), rng.choice(NUMBERS), rng.choice(TEXTS), copy.deepcopy(rng.choice(OTHERS)), _DEEP)
    )
