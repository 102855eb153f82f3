"""llama.cpp's own quantiser, as ``llama-quantize`` would run it, through the library that llama-cpp-python ships.

    python tools/llama_quantize.py IN.gguf OUT.gguf --type Q4_K_M --imatrix FILE --tensor-type 'attn_v=q6_k'

For comparisons: the same defaults, the same importance, the same metadata. Ends with status 1 and the last lines of
llama.cpp's log where it fails.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from llama_cpp import llama_cpp as api

from impq_edge.conversion.imatrix import Imatrix
from impq_edge.conversion.metadata import imatrix_keys
from impq_edge.errors import ImpqError
from impq_edge.validation.file import read_facts
from impq_edge.validation.llama import keep_log, log_lines

FILE_TYPES = {
    "F32": "ALL_F32", "Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
}  # fmt: skip
"""Names of llama-quantize that are not llama.cpp's own (tools/quantize/quantize.cpp)."""

SHOWN_LINES = 6


def main(
    source: Path,
    out: Path,
    kind: Annotated[str, typer.Option("--type", help="As llama-quantize names it: Q2_K, Q2_K_S, Q4_K_M, IQ4_XS, …")],
    tensor_type: Annotated[list[str], typer.Option(metavar="REGEX=TYPE")] = [],  # noqa: B006 - typer's way
    imatrix: Annotated[Path | None, typer.Option(help="An importance matrix in llama-imatrix's GGUF.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    pure: Annotated[bool, typer.Option("--pure", help="One type for all tensors.")] = False,
) -> None:
    """Quantise a GGUF of floats."""
    try:
        read_facts(source)
        found = Imatrix.read(imatrix) if imatrix else None
    except ImpqError as error:
        raise SystemExit(str(error)) from None
    if out.exists() and out.samefile(source):
        raise SystemExit(f"{out} is the file to read; name another one to write.")
    settings = api.llama_model_quantize_default_params()
    settings.ftype = file_type(kind)
    settings.nthread, settings.pure = threads, pure
    kept: list[Any] = []  # ctypes does not keep what a structure points to
    settings.tt_overrides = tensor_types(tensor_type)
    if found and imatrix:
        settings.imatrix = importances(found, kept)
        settings.kv_overrides = metadata(found, imatrix)
    keep_log()
    if api.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(settings)):
        out.unlink(missing_ok=True)
        print(*log_lines()[-SHOWN_LINES:], sep="\n", file=sys.stderr)
        raise SystemExit(1)
    print(*(line for line in log_lines() if " size  = " in line or "WARNING" in line), sep="\n")


def file_type(name: str) -> int:
    """Return llama.cpp's number of a file type."""
    wanted = name.upper()
    number = getattr(api, f"LLAMA_FTYPE_{FILE_TYPES.get(wanted, f'MOSTLY_{wanted}')}", None)
    if number is None:
        raise SystemExit(f"--type {name!r} is no file type of llama.cpp; give one such as Q2_K or Q4_K_M.")
    return int(number)


def tensor_types(given: list[str]) -> Any:
    """Return llama.cpp's array of overrides, ended by one without a pattern."""
    overrides = (api.llama_model_tensor_override * (len(given) + 1))()
    for override, text in zip(overrides, given, strict=False):
        pattern, _, kind = text.rpartition("=")
        number = getattr(api, f"GGML_TYPE_{kind.upper()}", None)
        if not pattern or number is None:
            raise SystemExit(f"--tensor-type {text!r} is not REGEX=TYPE, such as attn_v=q6_k.")
        override.pattern, override.type = pattern.lower().encode(), number  # llama-quantize lowers it too
    return overrides


def importances(found: Imatrix, kept: list[Any]) -> Any:
    """Return llama.cpp's array of importances, ended by one without a name; ``kept`` holds the numbers."""
    entries = (api.llama_model_imatrix_data * (len(found.sums) + 1))()
    for entry, name in zip(entries, found.sums, strict=False):
        values = found.importance(name)
        assert values is not None
        kept.append(values)
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def metadata(found: Imatrix, path: Path) -> Any:
    """Return the keys by which llama-quantize tells what it used, ended by one without a name."""
    values = imatrix_keys(found, str(path))
    overrides = (api.llama_model_kv_override * (len(values) + 1))()
    for override, (key, value) in zip(overrides, values.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, int):
            override.tag, override.value.val_i64 = api.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            override.tag, override.value.val_str = api.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return overrides


if __name__ == "__main__":
    typer.run(main)
