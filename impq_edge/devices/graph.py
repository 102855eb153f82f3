"""The size of llama.cpp's compute buffer: the graph of a dense decoder, replayed through ggml's allocator.

Best-fit placement leaves holes, which a sum over what is alive at once would miss; so the tensors of the
graph are placed one after another as ggml places them, and the result is exact. Sources (llama.cpp as vendored in
llama-cpp-python 0.3.36): the graphs in ``src/models/{llama,qwen3,gemma2}.cpp``, ``build_attn*`` and
``build_ffn`` in ``src/llama-graph.cpp``, the placement in ``ggml/src/ggml-alloc.c``, and the batch for which
``llama_context::sched_reserve`` (``src/llama-context.cpp``) reserves it.
"""

import dataclasses
import functools

from impq_edge.model.config import HyperParameters

_ALIGNMENT_BYTES = 32  # TENSOR_ALIGNMENT in ggml/src/ggml-impl.h
_F32_BYTES, _F16_BYTES, _I32_BYTES, _I64_BYTES = 4, 2, 4, 8
_ROTATION_UNIT = 64  # heads of a multiple of this are rotated before a quantised cache (llama-kv-cache.cpp)


@dataclasses.dataclass(frozen=True)
class GraphShape:
    """What fixes the compute graph besides the model."""

    batch: int  # tokens computed at once (n_ubatch)
    outputs: int  # tokens of a batch whose logits are wanted (n_outputs_max)
    cells: int  # KV cells of a block that sees the whole context
    window_cells: int  # KV cells of a sliding block
    flash_attention: bool
    quantised_cache: bool
    wide_cache: bool = False  # F32, which flash attention reads through copies in F16


@functools.cache
def compute_buffer_bytes(hyper: HyperParameters, shape: GraphShape) -> int:
    """Return the bytes of the compute buffer that llama.cpp reserves on the CPU for one sequence."""
    return _decoder(hyper, shape).peak_bytes()


@dataclasses.dataclass(frozen=True)
class GraphSize:
    """How much a graph does besides multiplying weights."""

    operations: int  # each ends with all threads waiting for one another
    elements: int  # written by them


def graph_size(hyper: HyperParameters, shape: GraphShape) -> GraphSize:
    """Return the number of operations that one batch takes, and of the elements they write."""
    return _decoder(hyper, shape).size()


@dataclasses.dataclass
class _Tensor:
    size_bytes: int
    users: int = 0  # operations still to read it
    offset_bytes: int = -1  # -1: holds no memory of its own (not placed yet, given to a successor, or freed)
    kept: bool = False  # a graph output: never overwritten, never freed


@dataclasses.dataclass(frozen=True)
class _Operation:
    sources: tuple[_Tensor, ...]
    result: _Tensor | None  # None: writes into the KV cache
    in_place: bool


class _Graph:
    """Operations in the order of execution, and the inputs they all start from."""

    def __init__(self) -> None:
        self._inputs: list[_Tensor] = []
        self._operations: list[_Operation] = []

    def input(self, size_bytes: int) -> _Tensor:
        self._inputs.append(_Tensor(_aligned(size_bytes)))
        return self._inputs[-1]

    def op(self, size_bytes: int, *sources: _Tensor, in_place: bool = False) -> _Tensor:
        """Add an operation; ``in_place`` ones may overwrite a source of the same size that nobody else reads.

        Weights are not among the sources, and a view stands for the tensor it looks into.
        """
        result = _Tensor(_aligned(size_bytes))
        self._add(_Operation(sources, result, in_place))
        return result

    def store(self, *sources: _Tensor) -> None:
        self._add(_Operation(sources, None, False))

    def _add(self, operation: _Operation) -> None:
        for source in operation.sources:
            source.users += 1
        self._operations.append(operation)

    def size(self) -> GraphSize:
        written_bytes = sum(operation.result.size_bytes for operation in self._operations if operation.result)
        return GraphSize(len(self._operations), written_bytes // _F32_BYTES)

    def peak_bytes(self) -> int:
        """Place every tensor as ``ggml_gallocr_reserve`` does and return the buffer's size (once per graph)."""
        arena = _Arena()
        for tensor in self._inputs:
            tensor.offset_bytes = arena.take(tensor.size_bytes)
        for operation in self._operations:
            if operation.result is not None:
                _place(operation, operation.result, arena)
            for source in operation.sources:
                source.users -= 1
                if source.users == 0 and source.offset_bytes >= 0 and not source.kept:
                    arena.give(source.offset_bytes, source.size_bytes)
        return arena.peak_bytes


def _place(operation: _Operation, result: _Tensor, arena: "_Arena") -> None:
    for source in operation.sources if operation.in_place else ():
        if source.users == 1 and source.size_bytes == result.size_bytes and source.offset_bytes >= 0:
            result.offset_bytes, source.offset_bytes = source.offset_bytes, -1
            return
    result.offset_bytes = arena.take(result.size_bytes)


class _Arena:
    """A buffer that grows at its end: best fit among the holes, the open end only when none fits."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._end = 0  # where the open end begins
        self._holes: list[tuple[int, int]] = []  # (offset, size), by offset, never adjacent

    def take(self, size: int) -> int:
        fitting = [(held, offset) for offset, held in self._holes if held >= size]
        if not fitting:
            self._end += size
            self.peak_bytes = max(self.peak_bytes, self._end)
            return self._end - size
        held = min(fitting)[0]
        offset = max(offset for size_, offset in fitting if size_ == held)  # of equal holes, ggml takes the last
        self._holes.remove((offset, held))
        if held > size:
            self._holes.append((offset + size, held - size))
            self._holes.sort()
        return offset

    def give(self, offset: int, size: int) -> None:
        before = next((hole for hole in self._holes if sum(hole) == offset), None)
        after = next((hole for hole in self._holes if hole[0] == offset + size), None)
        for hole in (before, after):
            if hole:
                self._holes.remove(hole)
                offset, size = min(offset, hole[0]), size + hole[1]
        if offset + size == self._end:
            self._end = offset
        else:
            self._holes.append((offset, size))
            self._holes.sort()


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@dataclasses.dataclass(frozen=True)
class _CacheInputs:
    """The graph inputs by which the blocks of one kind reach their cache."""

    k_rotation: _Tensor | None
    positions: _Tensor
    v_rotation: _Tensor | None
    k_cells: _Tensor
    v_cells: _Tensor
    mask: _Tensor
    cells: int


def _decoder(hyper: HyperParameters, shape: GraphShape) -> _Graph:
    graph = _Graph()
    rows = shape.batch
    tokens = graph.input(rows * _I32_BYTES)
    graph.input(rows * hyper.hidden * _F32_BYTES)  # embeddings given as vectors: reserved, never used here
    # Inputs lie in the order in which the graph first asks for them, and the first block is a sliding one.
    window = _cache_inputs(graph, hyper, shape, shape.window_cells) if hyper.sliding_window else None
    whole = _cache_inputs(graph, hyper, shape, shape.cells, window.positions if window else None)
    wanted = graph.input(shape.outputs * _I32_BYTES)

    stream = graph.op(rows * hyper.hidden * _F32_BYTES, tokens)
    if hyper.architecture == "gemma2":
        stream = graph.op(stream.size_bytes, stream, in_place=True)
    for block in range(hyper.n_blocks):
        cache = window if window and hyper.block_window(block) else whole
        attended = _attention(graph, hyper, shape, stream, cache)
        last = block == hyper.n_blocks - 1
        if last:
            rows = shape.outputs
            attended = graph.op(rows * hyper.hidden * _F32_BYTES, attended, wanted)
        if hyper.architecture == "gemma2":
            attended = _norm(graph, attended)
        if last:
            stream = graph.op(rows * hyper.hidden * _F32_BYTES, stream, wanted)
        stream = _feed_forward(graph, hyper, rows, graph.op(stream.size_bytes, attended, stream, in_place=True))
    _head(graph, hyper, rows, stream)
    return graph


def _cache_inputs(
    graph: _Graph, hyper: HyperParameters, shape: GraphShape, cells: int, positions: _Tensor | None = None
) -> _CacheInputs:
    rotated = shape.quantised_cache and hyper.head_dim % _ROTATION_UNIT == 0
    k_rotation = _ROTATION_UNIT
    while rotated and hyper.head_dim % (2 * k_rotation) == 0:
        k_rotation *= 2
    # Without flash attention V is stored transposed, one index per element, and the mask is F32.
    v_indices = 1 if shape.flash_attention else hyper.n_kv_heads * hyper.head_dim
    return _CacheInputs(
        k_rotation=graph.input(k_rotation**2 * _F32_BYTES) if rotated else None,
        positions=positions or graph.input(shape.batch * _I32_BYTES),
        v_rotation=graph.input(_ROTATION_UNIT**2 * _F32_BYTES) if rotated else None,
        k_cells=graph.input(shape.batch * _I64_BYTES),
        v_cells=graph.input(shape.batch * v_indices * _I64_BYTES),
        mask=graph.input(cells * shape.batch * (_F16_BYTES if shape.flash_attention else _F32_BYTES)),
        cells=cells,
    )


def _norm(graph: _Graph, tensor: _Tensor) -> _Tensor:
    normed = graph.op(tensor.size_bytes, tensor, in_place=True)
    return graph.op(tensor.size_bytes, normed, in_place=True)


def _attention(
    graph: _Graph, hyper: HyperParameters, shape: GraphShape, stream: _Tensor, cache: _CacheInputs
) -> _Tensor:
    q_bytes = shape.batch * hyper.n_heads * hyper.head_dim * _F32_BYTES
    kv_bytes = shape.batch * hyper.n_kv_heads * hyper.head_dim * _F32_BYTES
    normed = _norm(graph, stream)

    def projected(size_bytes: int, rotary: bool, rotation: _Tensor | None) -> _Tensor:
        tensor = graph.op(size_bytes, normed)
        if hyper.attention_bias:
            tensor = graph.op(size_bytes, tensor, in_place=True)
        if rotary:
            # What follows the split into heads reads through a view, and ggml reuses no memory through one.
            if hyper.architecture == "qwen3":
                normed_heads = graph.op(size_bytes, graph.op(size_bytes, tensor), in_place=True)
                tensor = graph.op(size_bytes, normed_heads, cache.positions, in_place=True)
            else:
                tensor = graph.op(size_bytes, tensor, cache.positions)
        return graph.op(size_bytes, rotation, tensor) if rotation else tensor

    q = projected(q_bytes, True, cache.k_rotation)
    if hyper.architecture == "gemma2":
        q = graph.op(q_bytes, q, in_place=True)
        k = projected(kv_bytes, True, cache.k_rotation)
        v = projected(kv_bytes, False, cache.v_rotation)
    else:
        v = projected(kv_bytes, False, cache.v_rotation)
        k = projected(kv_bytes, True, cache.k_rotation)
    graph.store(k, cache.k_cells)
    graph.store(v, cache.v_cells)

    mixed = _mixed_values(graph, hyper, shape, q, cache)
    if cache.v_rotation:
        mixed = graph.op(q_bytes, cache.v_rotation, mixed)
    out = graph.op(shape.batch * hyper.hidden * _F32_BYTES, mixed)
    return graph.op(out.size_bytes, out, in_place=True) if hyper.attention_bias else out


def _mixed_values(graph: _Graph, hyper: HyperParameters, shape: GraphShape, q: _Tensor, cache: _CacheInputs) -> _Tensor:
    if shape.flash_attention:
        copies_bytes = cache.cells * hyper.n_kv_heads * hyper.head_dim * _F16_BYTES
        copies = [graph.op(copies_bytes) for _ in "KV"] if shape.wide_cache else []
        return graph.op(q.size_bytes, q, *copies, cache.mask)
    scores_bytes = shape.batch * hyper.n_heads * cache.cells * _F32_BYTES
    scores = graph.op(scores_bytes, q)
    scores = graph.op(scores_bytes, scores, cache.mask, in_place=True)
    return graph.op(q.size_bytes, graph.op(q.size_bytes, scores))  # weighted values, then made contiguous


def _feed_forward(graph: _Graph, hyper: HyperParameters, rows: int, stream: _Tensor) -> _Tensor:
    wide_bytes = rows * hyper.ffn * _F32_BYTES
    normed = _norm(graph, stream)
    gate = graph.op(wide_bytes, normed)
    up = graph.op(wide_bytes, normed)
    down = graph.op(rows * hyper.hidden * _F32_BYTES, graph.op(wide_bytes, gate, up))
    if hyper.architecture == "gemma2":
        down = _norm(graph, down)
    return graph.op(stream.size_bytes, down, stream, in_place=True)


def _head(graph: _Graph, hyper: HyperParameters, rows: int, stream: _Tensor) -> None:
    normed = _norm(graph, stream)
    normed.kept = True
    graph.op(rows * hyper.vocabulary * _F32_BYTES, normed)
