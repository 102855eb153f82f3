"""GPTQ onto the K-quant grid: Q2_K to Q6_K whose errors make up for each other on the calibration text.

For W (out, in) and H = E[x xᵀ] the error is tr((W − Q) H (W − Q)ᵀ), a sum over rows that have nothing to do with
each other. With H = V Vᵀ, V upper triangular, a row's share is Σ_j V_jj² (t_j − q_j)², where
t_j = w_j + Σ_{i<j} (w_i − q_i) V_ij / V_jj depends on the columns before j only. Rounding t_j column by column is GPTQ
(Frantar et al., arXiv:2210.17323), which writes the same with the Cholesky factor of the inverse.

What is rounded to is a K-quant's grid, w = (d · scale) q − (dmin · minimum); Q3_K and Q6_K have no minimum, but codes
and scales of both signs. Columns, groups and blocks are visited by falling H_jj within what the format keeps together.
Before a block of 256 its d and dmin, before a group its scale and minimum, are fitted to the weights that would make
up for all errors so far; of the scales and minima around the fitted ones, each row takes those with which its group
comes out best. Then every group is searched again with all others as they are, and each block's d and dmin are solved
for with its codes as they are, a few times over: no step of that adds to the error.

Matrices of weights are held transposed here, (columns, rows): what is done to a column is done to all rows at once.
"""

import dataclasses

import torch

from impq_edge.backends.kquant_pack import pack
from impq_edge.errors import BackendError
from impq_edge.ggml.types import TensorType

_BLOCK = 256
_CHUNK_ROWS = 1024  # rows are encoded in pieces of this many per thread, which bounds the temporaries
_CHUNKS_ON_GPU = 8  # pieces at once there
_STRETCHES = 9  # tries to fit a group before its block's d, with codes more or fewer than the grid has
_STRETCHES_AGAIN = 5  # and before the search that follows
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of the positive float16


@dataclasses.dataclass(frozen=True)
class _Grid:
    group: int  # columns that share a scale and a minimum
    codes: tuple[int, int]  # the lowest and the highest
    scales: tuple[int, int]
    top_minimum: int  # 0 in a format that has none
    near: int  # scales and minima this far from the fitted ones are tried
    near_again: int  # and this far from the former ones when a group is searched again


_GRIDS = {
    TensorType.Q2_K: _Grid(16, (0, 3), (0, 15), 15, 2, 1),
    TensorType.Q3_K: _Grid(16, (-4, 3), (-32, 31), 0, 4, 2),
    TensorType.Q4_K: _Grid(32, (0, 15), (0, 63), 63, 2, 1),
    TensorType.Q5_K: _Grid(32, (0, 31), (0, 63), 63, 2, 1),
    TensorType.Q6_K: _Grid(16, (-32, 31), (-128, 127), 0, 4, 2),
}
SOLVED = tuple(_GRIDS)
"""The types that this encodes."""


@dataclasses.dataclass(frozen=True)
class _Triangles:
    """V of every group or block, split into V = U diag(v): what a search within it needs."""

    unit: torch.Tensor  # (count, n, n), float32: U, upper triangular with a diagonal of ones
    inverse: torch.Tensor  # (count, n, n), float32: U⁻¹
    squares: torch.Tensor  # (count, n), float32: v²
    listed: list[list[float]]  # the same, where a number is wanted that no device has to be asked for


@dataclasses.dataclass(frozen=True)
class _Moment:
    """H, damped and in the order that columns are visited in, and what is solved with it."""

    whole: torch.Tensor  # (columns, columns), float32
    unit: torch.Tensor  # (columns, columns), float32: U of V
    blocks: _Triangles  # of V along its diagonal
    groups: _Triangles
    alone: _Triangles  # of H's own squares along its diagonal, group by group: all other columns as they are
    alone_inverse: torch.Tensor  # (groups, n, n), float32: the inverses of those squares


@dataclasses.dataclass
class _Encoded:
    """Rows in the making; whole numbers are held in float32, columns are in the order they are visited in."""

    grid: _Grid
    codes: torch.Tensor  # (columns, rows)
    scales: torch.Tensor  # (groups, rows)
    minima: torch.Tensor  # (groups, rows)
    d: torch.Tensor  # (blocks, rows), what float16 can hold, never 0
    dmin: torch.Tensor  # (blocks, rows), what float16 can hold

    @property
    def per_block(self) -> int:
        """Groups of a block."""
        return _BLOCK // self.grid.group

    def values(self, block: int) -> torch.Tensor:
        """Return the weights of a block, (256, rows), rounded as the decoder rounds."""
        groups = _slice(block, self.per_block)
        codes = self.codes[_slice(block, _BLOCK)].view(self.per_block, self.grid.group, -1)
        step, offset = self.d[block] * self.scales[groups], self.dmin[block] * self.minima[groups]
        return (codes * step.unsqueeze(1)).sub_(offset.unsqueeze(1)).flatten(0, 1)

    def put(self, group: int, found: "_Found") -> None:
        """Take over what was found for a group."""
        self.codes[_slice(group, self.grid.group)] = found.codes
        self.scales[group], self.minima[group] = found.scale, found.minimum


@dataclasses.dataclass(frozen=True)
class _Found:
    """The best of the scales and minima tried for a group, and its codes."""

    codes: torch.Tensor  # (n, rows)
    values: torch.Tensor  # (n, rows), what they stand for
    scale: torch.Tensor  # (rows,)
    minimum: torch.Tensor  # (rows,)
    error: torch.Tensor  # (rows,)

    def where(self, better: torch.Tensor, old: "_Found") -> "_Found":
        """Return this in the rows that are ``better``, and ``old`` in the others."""
        pairs = (
            (self.codes, old.codes),
            (self.values, old.values),
            (self.scale, old.scale),
            (self.minimum, old.minimum),
            (self.error, old.error),
        )
        return _Found(*(torch.where(better, new, kept) for new, kept in pairs))


def encode_gptq(
    weight: torch.Tensor, second_moment: torch.Tensor, kind: TensorType, *, damping: float = 0.01, sweeps: int = 3
) -> torch.Tensor:
    """Encode a matrix such that its product with the inputs changes little.

    Parameters
    ----------
    weight
        Shape (out, in), finite; ``in`` is a multiple of 256.
    second_moment
        Shape (in, in): mean over tokens of x xᵀ, any scale. Inputs that are always zero are as good as
        independent and small: their weights are rounded to nearest.
    kind
        One of :data:`SOLVED`.
    damping
        Share of the mean of H's diagonal that is added to its diagonal, as in GPTQ.
    sweeps
        How often all groups are searched again.

    Returns
    -------
    uint8, shape (out, bytes per row), on the device of ``weight``; a row's bytes depend on that row alone.

    Raises
    ------
    BackendError
        When the second moment is not finite, or not that of this matrix's inputs.
    """
    grid = _GRIDS[kind]
    second_moment = second_moment.to(weight.device)
    diagonal = _checked_diagonal(second_moment, weight.shape[1])
    order = _order(diagonal, grid)
    moment = _moment(second_moment, order, damping * float(diagonal.mean()) or 1.0, grid)
    at_once = _CHUNK_ROWS * (_CHUNKS_ON_GPU if weight.is_cuda else torch.get_num_threads())
    pieces = []
    for some in torch.split(weight, at_once):
        piece = some.float().T[order]
        encoded = _first_pass(piece, moment, grid)
        _sweep(piece, moment, encoded, sweeps)
        pieces.append(_packed(encoded, order, kind))
    return torch.cat(pieces)


def _checked_diagonal(second_moment: torch.Tensor, columns: int) -> torch.Tensor:
    if second_moment.shape != (columns, columns):
        raise BackendError(
            f"A second moment of shape {tuple(second_moment.shape)} was given for rows of {columns} weights; "
            "give one row and one column per weight."
        )
    if not all(bool(torch.isfinite(some).all()) for some in torch.split(second_moment, _BLOCK)):
        raise BackendError(
            f"The second moment of a matrix with {columns} inputs is not finite; "
            "use a text and a dtype with which the model's activations are finite."
        )
    return second_moment.diagonal().double()


def _order(diagonal: torch.Tensor, grid: _Grid) -> torch.Tensor:
    """Return the columns in the order to visit them: blocks, their groups and their columns by falling diagonal.

    Columns stay with their group and groups with their block, so that the file needs no permutation.
    """
    sizes = diagonal.view(-1, _BLOCK // grid.group, grid.group)
    columns = torch.arange(len(diagonal), device=diagonal.device).view_as(sizes)
    columns = columns.gather(2, sizes.argsort(dim=2, descending=True, stable=True))
    groups = sizes.sum(dim=2).argsort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, groups.unsqueeze(2).expand_as(columns))
    return columns[sizes.sum(dim=(1, 2)).argsort(descending=True, stable=True)].flatten()


def _moment(second_moment: torch.Tensor, order: torch.Tensor, added: float, grid: _Grid) -> _Moment:
    unit, blocks, groups = _factors(second_moment, order, added, grid)
    whole = _permuted(second_moment, order, added, torch.float32)
    squares = _diagonal_squares(whole, grid.group).double()
    alone = _triangles(_upper_factor(squares))
    return _Moment(whole, unit, blocks, groups, alone, torch.linalg.inv(squares).float())


def _permuted(second_moment: torch.Tensor, order: torch.Tensor, added: float, dtype: torch.dtype) -> torch.Tensor:
    """Return H in another order of the columns and with its diagonal raised, without a second copy on the way."""
    out = torch.empty(second_moment.shape, dtype=dtype, device=second_moment.device)
    for some, columns in zip(torch.split(out, _BLOCK), torch.split(order, _BLOCK), strict=True):
        some.copy_(second_moment[columns][:, order])
    out.diagonal().add_(added)
    return out


def _factors(
    second_moment: torch.Tensor, order: torch.Tensor, added: float, grid: _Grid
) -> tuple[torch.Tensor, _Triangles, _Triangles]:
    """Return U of V, and V's triangles of blocks and of groups.

    The factor of a damped moment exists in float64, of which wide matrices allow one copy at a time.
    """
    lower = _permuted(second_moment, order.flip(0), added, torch.float64).mT  # LAPACK's layout, so that it stays here
    torch.linalg.cholesky(lower, out=lower)
    blocks, groups = (_triangles(_diagonal_squares(lower, size).flip(0, 1, 2)) for size in (_BLOCK, grid.group))
    unit = torch.empty(second_moment.shape, device=second_moment.device)
    for some, reverse in zip(torch.split(unit, _BLOCK), reversed(torch.split(lower, _BLOCK)), strict=True):
        some.copy_((reverse / lower.diagonal()).flip(0, 1))
    return unit, blocks, groups


def _upper_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Return upper triangular V with V Vᵀ = matrix; (…, n, n)."""
    lower: torch.Tensor = torch.linalg.cholesky(matrix.flip(-2, -1))
    return lower.flip(-2, -1)


def _triangles(factors: torch.Tensor) -> _Triangles:
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    unit = factors / diagonal.unsqueeze(-2)
    ones = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device).expand_as(unit)
    inverse = torch.linalg.solve_triangular(unit, ones, upper=True)
    squares = diagonal.square().float()
    return _Triangles(unit.float(), inverse.float(), squares, squares.tolist())


def _diagonal_squares(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Return the squares along the diagonal, (count, size, size)."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _first_pass(weight: torch.Tensor, moment: _Moment, grid: _Grid) -> _Encoded:
    """Encode block after block and group after group, each for the errors before it."""
    (columns, rows), per_block = weight.shape, _BLOCK // grid.group
    sizes = (columns, columns // grid.group, columns // grid.group, columns // _BLOCK, columns // _BLOCK)
    encoded = _Encoded(grid, *(weight.new_zeros(size, rows) for size in sizes))
    blocks, groups, errors = moment.blocks, moment.groups, torch.zeros_like(weight)
    for block in range(columns // _BLOCK):
        inside, before = _slice(block, _BLOCK), slice(0, block * _BLOCK)
        # The weights that would make up for all errors before, were they not rounded.
        wanted = weight[inside] + blocks.inverse[block].T @ (moment.unit[before, inside].T @ errors[before])
        encoded.d[block], encoded.dmin[block] = _fit_block(wanted, blocks.squares[block], grid)
        left = torch.zeros_like(wanted)
        for index in range(per_block):
            own, done = _slice(index, grid.group), slice(0, index * grid.group)
            group = block * per_block + index
            target = wanted[own] + groups.inverse[group].T @ (blocks.unit[block, done, own].T @ left[done])
            scale, minimum = _fit(target, groups.squares[group], grid, _STRETCHES_AGAIN)
            scale, minimum = scale / encoded.d[block], minimum * _inverse(encoded.dmin[block])
            found = _search(target, groups, group, encoded, scale, minimum, grid.near)
            encoded.put(group, found)
            left[own] = wanted[own] - found.values
        errors[inside] = weight[inside] - encoded.values(block)
    return encoded


def _sweep(weight: torch.Tensor, moment: _Moment, encoded: _Encoded, sweeps: int) -> None:
    """Search every group again for the errors of all others, those after it too, and solve for d and dmin again."""
    blocks = range(len(encoded.d))
    if sweeps:
        slope = moment.whole @ (weight - torch.cat([encoded.values(block) for block in blocks]))
    for to_come in reversed(range(sweeps)):
        for block in blocks:
            inside = _slice(block, _BLOCK)
            before = encoded.values(block)
            left = _search_block_again(block, before, slope[inside], moment, encoded)
            _solve_block_scales(block, left, moment.whole[inside, inside], encoded)
            read = slice(0 if to_come else (block + 1) * _BLOCK, None)  # where the slope will be read again
            slope[read] -= moment.whole[inside, read].T @ (encoded.values(block) - before)


def _search_block_again(
    block: int, values: torch.Tensor, slope: torch.Tensor, moment: _Moment, encoded: _Encoded
) -> torch.Tensor:
    """Search the groups of a block of ``values``, H (W − Q)ᵀ being ``slope``; return what that is then, (256, rows)."""
    own, slope = moment.whole[_slice(block, _BLOCK), _slice(block, _BLOCK)], slope.clone()
    for index in range(encoded.per_block):
        inside, group = _slice(index, encoded.grid.group), block * encoded.per_block + index
        step = moment.alone_inverse[group] @ slope[inside]  # to the best weights, were they not rounded
        error = moment.alone.squares[group] @ (moment.alone.unit[group].T @ step).square_()
        scale, minimum = encoded.scales[group], encoded.minima[group]
        old = _Found(encoded.codes[_slice(group, len(step))], values[inside], scale, minimum, error)
        found = _search(values[inside] + step, moment.alone, group, encoded, scale, minimum, encoded.grid.near_again)
        kept = found.where(found.error < error, old)
        encoded.put(group, kept)
        slope -= own[inside].T @ (kept.values - old.values)
    return slope


def _solve_block_scales(block: int, slope: torch.Tensor, own: torch.Tensor, encoded: _Encoded) -> None:
    """Solve for the d and dmin of a block with its codes, scales and minima as they are; keep them where that helps."""
    size, groups = encoded.grid.group, _slice(block, encoded.per_block)
    d, dmin = encoded.d[block], encoded.dmin[block]
    a = encoded.codes[_slice(block, _BLOCK)] * encoded.scales[groups].repeat_interleave(size, dim=0)
    b = -encoded.minima[groups].repeat_interleave(size, dim=0)
    a_moved, b_moved = own @ a, own @ b
    aa, ab, bb = ((x * y).sum(dim=0) for x, y in ((a_moved, a), (a_moved, b), (b_moved, b)))
    slope_a, slope_b = (slope * a).sum(dim=0), (slope * b).sum(dim=0)
    x, y = _solve(aa, ab, bb, slope_a, slope_b)
    new_d, new_dmin = _nonzero(_float16(d + x), _SMALLEST), _float16(dmin + y)
    x, y = new_d - d, new_dmin - dmin
    change = x * (x * aa + 2 * y * ab - 2 * slope_a) + y * (y * bb - 2 * slope_b)
    better = change < 0
    encoded.d[block], encoded.dmin[block] = torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)


def _search(
    target: torch.Tensor,
    groups: _Triangles,
    group: int,
    encoded: _Encoded,
    scale: torch.Tensor,
    minimum: torch.Tensor,
    near: int,
) -> _Found:
    """Round ``target`` (n, rows) column by column on every grid near the given one (rows,), and return the best."""
    grid, unit, block = encoded.grid, groups.unit[group], group // encoded.per_block
    shifts = torch.arange(-near, near + 1, device=target.device)
    around = torch.cartesian_prod(shifts, shifts if grid.top_minimum else shifts.new_zeros(1)).unsqueeze(2)
    # What a scale of 0 stands for, codes of 0 do at any scale; without it nothing is divided by 0.
    scales = _nonzero((scale.round().clamp(*grid.scales) + around[:, 0]).clamp_(*grid.scales), 1)
    minima = (minimum.round().clamp(0, grid.top_minimum) + around[:, 1]).clamp_(0, grid.top_minimum)
    step, offset = encoded.d[block] * scales, encoded.dmin[block] * minima  # (grids, rows)
    per_step = 1 / step
    # In units of the step: first what is to be rounded, then column by column what rounding leaves.
    left = torch.addcmul(offset * per_step, target.unsqueeze(1), per_step)  # (n, grids, rows)
    codes = torch.empty_like(left)
    error, flat = torch.zeros_like(step), left.view(grid.group, -1)
    for column, square in enumerate(groups.listed[group]):
        own, code = left[column], codes[column]
        wanted = torch.addmv(flat[column], flat[:column].T, unit[:column, column]).view_as(step)
        torch.round(wanted, out=code).clamp_(*grid.codes)
        own -= code
        wanted -= code
        error.addcmul_(wanted, wanted, value=square)
    error *= step.square()
    best = error.argmin(dim=0, keepdim=True)
    chosen = codes.gather(1, best.expand(grid.group, 1, -1)).squeeze(1)
    step, offset, scale, minimum, least = (x.gather(0, best).squeeze(0) for x in (step, offset, scales, minima, error))
    return _Found(chosen, chosen * step - offset, scale, minimum, least)


def _fit_block(wanted: torch.Tensor, squares: torch.Tensor, grid: _Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return d and dmin (rows,) with which the largest scale and minimum of a block's groups are in range."""
    parts = zip(torch.split(wanted, grid.group), torch.split(squares, grid.group), strict=True)
    scales, minima = (torch.stack(x) for x in zip(*(_fit(x, s, grid, _STRETCHES) for x, s in parts), strict=True))
    return _nonzero(_float16(_unit(scales, grid)), _SMALLEST), _float16(minima.amax(dim=0) / (grid.top_minimum or 1))


def _unit(scales: torch.Tensor, grid: _Grid) -> torch.Tensor:
    """Return the smallest d (rows,) of either sign with which the scales (groups, rows) are in range."""
    (low, high), least, most = grid.scales, scales.amin(dim=0), scales.amax(dim=0)
    if not low:
        return most / high
    upright, flipped = torch.maximum(most / high, least / low), torch.maximum(-least / high, -most / low)
    return torch.where(upright <= flipped, upright, -flipped)


def _fit(x: torch.Tensor, squares: torch.Tensor, grid: _Grid, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minima (rows,), no minimum negative, with which x ≈ scale · q − minimum.

    As ggml does (``make_qkx3_quants`` and ``make_qx_quants`` in ggml/src/ggml-quants.c): for codes that spread the
    range over more or fewer levels than there are, the best scale and minimum are least squares; ``squares`` (n,)
    weigh the columns of ``x`` (n, rows), and the best codes win.
    """
    share = squares / squares.sum()
    stretches, low, high = torch.linspace(-0.9, 0.9, count, device=x.device), *grid.codes
    if grid.top_minimum:
        origin = x.amin(dim=0).clamp_(max=0)
        spans, across = high + stretches, x.amax(dim=0) - origin
    else:
        origin, across = torch.zeros_like(x[0]), x.gather(0, x.abs().argmax(dim=0, keepdim=True)).squeeze(0)
        spans = torch.cat([low - stretches, stretches - low])
    per_unit = torch.outer(spans, _inverse(across))  # (tries, rows)
    q = ((x - origin).unsqueeze(1) * per_unit).round_().clamp_(low, high)
    mean_q, mean_qq, mean_qx = ((share @ y.flatten(1)).view_as(q[0]) for y in (q, q.square(), q * x.unsqueeze(1)))
    scale, offset, gain = _least_squares(mean_q, mean_qq, mean_qx, share @ x, grid)
    # Of equal fits, as there are to constants, the first: so that groups that are alike are fitted alike.
    best = (gain >= (1 - 1e-5) * gain.amax(dim=0)).byte().argmax(dim=0, keepdim=True)
    return scale.gather(0, best).squeeze(0), -offset.gather(0, best).squeeze(0)


def _least_squares(
    q: torch.Tensor, qq: torch.Tensor, qx: torch.Tensor, x: torch.Tensor, grid: _Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a, b and by how much a q + b with them lowers the mean of (x − a q − b)²; given are means of products."""
    alone = qx * _inverse(qq)
    if not grid.top_minimum:
        return alone, torch.zeros_like(alone), alone * qx
    a, b = _solve(qq, q, torch.ones_like(q), qx, x.expand_as(q))
    a, b = torch.where(b > 0, alone, a), b.clamp_(max=0)
    a, b = a.clamp(min=0), torch.where(a > 0, b, x.clamp(max=0))
    return a, b, a * qx + b * x


def _solve(
    aa: torch.Tensor, ab: torch.Tensor, bb: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x, y with aa x + ab y = a and ab x + bb y = b; y is 0 where these are as good as one equation."""
    determinant = aa * bb - ab.square()
    two = determinant > 1e-6 * aa * bb
    share = _inverse(determinant)
    return (
        torch.where(two, (a * bb - b * ab) * share, a * _inverse(aa)),
        torch.where(two, (b * aa - a * ab) * share, 0.0),
    )


def _packed(encoded: _Encoded, order: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Put columns, groups and blocks back into the order of the weight, and pack them."""
    fields = (encoded.codes, encoded.scales, encoded.minima, encoded.d, encoded.dmin)
    back = []
    for field, size in zip(fields, (1, encoded.grid.group, encoded.grid.group, _BLOCK, _BLOCK), strict=True):
        there = torch.empty_like(field)
        there[order[::size] // size] = field
        back.append(there.T)
    return pack(back[0], back[1], back[2], back[3], back[4], kind)


def _slice(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def _nonzero(x: torch.Tensor, instead: float) -> torch.Tensor:
    return torch.where(x == 0, instead, x)


def _float16(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-_LARGEST, _LARGEST).half().float()
