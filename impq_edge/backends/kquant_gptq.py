"""GPTQ onto the K-quant grid: Q2_K and Q4_K whose errors make up for each other on the calibration text.

For W (out, in) and H = E[x xᵀ] the error is tr((W − Q) H (W − Q)ᵀ), a sum over rows that have nothing to do with
each other. With H = V Vᵀ, V upper triangular, a row's share is Σ_j V_jj² (t_j − q_j)², where
t_j = w_j + Σ_{i<j} (w_i − q_i) V_ij / V_jj depends on the columns before j only. Rounding t_j column by column is GPTQ
(Frantar et al., arXiv:2210.17323), which writes the same with the Cholesky factor of the inverse.

What is rounded to is a K-quant's grid, w = (d · scale) q − (dmin · minimum). Columns, groups and blocks are visited by
falling H_jj within what the format keeps together. Before a block of 256 its d and dmin, before a group its scale and
minimum, are fitted to the weights that would make up for all errors so far; of the scales and minima around the
fitted ones, each row takes those with which its group comes out best. Then every group is searched again with all
others as they are, and each block's d and dmin are solved for with its codes as they are, a few times over: no step
of that adds to the error.
"""

import dataclasses

import torch

from impq_edge.backends.kquant_pack import pack
from impq_edge.errors import BackendError
from impq_edge.ggml.types import TensorType

_BLOCK = 256
_CHUNK_ROWS = 8192  # rows are encoded in pieces of this many, which bounds the temporaries
_NEAR = 2  # scales and minima this far from the fitted ones are tried
_STRETCHES = torch.linspace(-0.9, 0.9, 19).tolist()  # codes more or fewer than the grid has, that a group's range spans


@dataclasses.dataclass(frozen=True)
class _Grid:
    group: int  # columns that share a scale and a minimum
    top_code: int
    top_scale: int  # and minimum


_GRIDS = {TensorType.Q2_K: _Grid(16, 3, 15), TensorType.Q4_K: _Grid(32, 15, 63)}
SOLVED = tuple(_GRIDS)
"""The types that this encodes."""


@dataclasses.dataclass(frozen=True)
class _Triangles:
    """V of every group, split into V = U diag(v): what a search within the group needs."""

    unit: torch.Tensor  # (groups, n, n), float32: U, upper triangular with a diagonal of ones
    inverse: torch.Tensor  # (groups, n, n), float32: U⁻¹
    squares: torch.Tensor  # (groups, n), float32: v²


@dataclasses.dataclass
class _Encoded:
    """Rows in the making; whole numbers are held in float32, columns are in the order they are visited in."""

    grid: _Grid
    codes: torch.Tensor  # (rows, columns)
    scales: torch.Tensor  # (rows, groups)
    minima: torch.Tensor  # (rows, groups)
    d: torch.Tensor  # (rows, blocks), what float16 can hold
    dmin: torch.Tensor  # (rows, blocks), what float16 can hold

    def values(self, block: int) -> torch.Tensor:
        """Return the weights of a block, (rows, 256), rounded as the decoder rounds."""
        groups = _slice(block, _BLOCK // self.grid.group)
        scale = (self.d[:, block, None] * self.scales[:, groups]).repeat_interleave(self.grid.group, dim=1)
        minimum = (self.dmin[:, block, None] * self.minima[:, groups]).repeat_interleave(self.grid.group, dim=1)
        return self.codes[:, _slice(block, _BLOCK)] * scale - minimum

    def put(self, group: int, found: "_Found") -> None:
        """Take over what was found for a group."""
        self.codes[:, _slice(group, self.grid.group)] = found.codes
        self.scales[:, group], self.minima[:, group] = found.scale, found.minimum


@dataclasses.dataclass(frozen=True)
class _Found:
    """The best of the scales and minima tried for a group, and its codes."""

    codes: torch.Tensor  # (rows, n)
    values: torch.Tensor  # (rows, n), what they stand for
    scale: torch.Tensor  # (rows,)
    minimum: torch.Tensor  # (rows,)
    error: torch.Tensor  # (rows,)

    def where(self, better: torch.Tensor, old: "_Found") -> "_Found":
        """Return this in the rows that are ``better``, and ``old`` in the others."""
        return _Found(
            torch.where(better[:, None], self.codes, old.codes),
            torch.where(better[:, None], self.values, old.values),
            *(
                torch.where(better, new, kept)
                for new, kept in (
                    (self.scale, old.scale),
                    (self.minimum, old.minimum),
                    (self.error, old.error),
                )
            ),
        )


def encode_gptq(
    weight: torch.Tensor, second_moment: torch.Tensor, kind: TensorType, *, damping: float = 0.01, sweeps: int = 2
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
    columns = weight.shape[1]
    grid = _GRIDS[kind]
    damped = _damped(second_moment.to(weight.device), columns, damping)
    order = _order(damped.diagonal(), grid)
    damped = damped[order][:, order]
    factor = _upper_factor(damped)
    damped = damped.float()
    source, pieces = weight.float()[:, order], []
    for first in range(0, max(1, len(source)), _CHUNK_ROWS):
        piece = source[first : first + _CHUNK_ROWS]
        encoded = _first_pass(piece, factor, grid)
        _sweep(piece, damped, encoded, sweeps)
        pieces.append(_packed(encoded, order, kind))
    return torch.cat(pieces)


def _damped(second_moment: torch.Tensor, columns: int, damping: float) -> torch.Tensor:
    """Return H in float64, in which the factor of a damped moment exists."""
    if second_moment.shape != (columns, columns):
        raise BackendError(
            f"A second moment of shape {tuple(second_moment.shape)} was given for rows of {columns} weights; "
            "give one row and one column per weight."
        )
    if not torch.isfinite(second_moment).all():
        raise BackendError(
            f"The second moment of a matrix with {columns} inputs is not finite; "
            "use a text and a dtype with which the model's activations are finite."
        )
    damped = second_moment.double()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return damped


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


def _upper_factor(matrix: torch.Tensor) -> torch.Tensor:
    """Return upper triangular V with V Vᵀ = matrix; (…, n, n)."""
    lower: torch.Tensor = torch.linalg.cholesky(matrix.flip(-2, -1))
    return lower.flip(-2, -1)


def _triangles(factors: torch.Tensor) -> _Triangles:
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    unit = factors / diagonal.unsqueeze(-2)
    ones = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device).expand_as(unit)
    inverse = torch.linalg.solve_triangular(unit, ones, upper=True)
    return _Triangles(unit.float(), inverse.float(), diagonal.square().float())


def _diagonal_squares(matrix: torch.Tensor, size: int) -> torch.Tensor:
    """Return the squares along the diagonal, (count, size, size)."""
    count = len(matrix) // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _first_pass(weight: torch.Tensor, factor: torch.Tensor, grid: _Grid) -> _Encoded:
    """Encode block after block and group after group, each for the errors before it."""
    rows, columns = weight.shape
    per_block = _BLOCK // grid.group
    blocks = _triangles(_diagonal_squares(factor, _BLOCK))
    groups = _triangles(_diagonal_squares(factor, grid.group))
    unit = (factor / factor.diagonal()).float()
    sizes = (columns, columns // grid.group, columns // grid.group, columns // _BLOCK, columns // _BLOCK)
    encoded = _Encoded(grid, *(weight.new_zeros(rows, size) for size in sizes))
    errors = torch.zeros_like(weight)
    for block in range(columns // _BLOCK):
        inside, before = _slice(block, _BLOCK), slice(0, block * _BLOCK)
        # The weights that would make up for all errors before, were they not rounded.
        wanted = weight[:, inside] + errors[:, before] @ unit[before, inside] @ blocks.inverse[block]
        encoded.d[:, block], encoded.dmin[:, block] = _fit_block(wanted, blocks.squares[block], grid)
        left = torch.zeros_like(wanted)
        for index in range(per_block):
            own, done = _slice(index, grid.group), slice(0, index * grid.group)
            group = block * per_block + index
            target = wanted[:, own] + left[:, done] @ blocks.unit[block, done, own] @ groups.inverse[group]
            scale, minimum = (x[:, 0] for x in _fit(target[:, None], groups.squares[group][None], grid))
            scale = (scale * _inverse(encoded.d[:, block])).round().clamp(0, grid.top_scale)
            minimum = (minimum * _inverse(encoded.dmin[:, block])).round().clamp(0, grid.top_scale)
            found = _search(target, groups, group, encoded, scale, minimum)
            encoded.put(group, found)
            left[:, own] = wanted[:, own] - found.values
        errors[:, inside] = weight[:, inside] - encoded.values(block)
    return encoded


def _sweep(weight: torch.Tensor, damped: torch.Tensor, encoded: _Encoded, sweeps: int) -> None:
    """Search every group again for the errors of all others, those after it too, and solve for d and dmin again."""
    squares = _diagonal_squares(damped, encoded.grid.group).double()
    groups, inverses = _triangles(_upper_factor(squares)), torch.linalg.inv(squares).float()
    blocks = range(encoded.d.shape[1])
    for _ in range(sweeps):
        slope = (weight - torch.cat([encoded.values(block) for block in blocks], dim=1)) @ damped
        for block in blocks:
            inside, after = _slice(block, _BLOCK), slice((block + 1) * _BLOCK, None)
            before = encoded.values(block)
            own = damped[inside, inside]
            left = _search_block_again(block, before, slope[:, inside], own, groups, inverses, encoded)
            _solve_block_scales(block, left, own, encoded)
            slope[:, after] -= (encoded.values(block) - before) @ damped[inside, after]


def _search_block_again(
    block: int,
    values: torch.Tensor,
    slope: torch.Tensor,
    own: torch.Tensor,
    groups: _Triangles,
    inverses: torch.Tensor,
    encoded: _Encoded,
) -> torch.Tensor:
    """Search the groups of a block of ``values``, where (W − Q) H is ``slope``; return what it is then, (rows, 256)."""
    slope, size = slope.clone(), encoded.grid.group
    for index in range(_BLOCK // size):
        inside, group = _slice(index, size), block * (_BLOCK // size) + index
        step = slope[:, inside] @ inverses[group]  # to the best weights, were they not rounded
        scale, minimum = encoded.scales[:, group], encoded.minima[:, group]
        found = _search(values[:, inside] + step, groups, group, encoded, scale, minimum)
        better = found.error < ((step @ groups.unit[group]).square() * groups.squares[group]).sum(dim=1)
        old = _Found(encoded.codes[:, _slice(group, size)], values[:, inside], scale, minimum, found.error)
        kept = found.where(better, old)
        encoded.put(group, kept)
        slope -= (kept.values - values[:, inside]) @ own[inside]
    return slope


def _solve_block_scales(block: int, slope: torch.Tensor, own: torch.Tensor, encoded: _Encoded) -> None:
    """Solve for the d and dmin of a block with its codes, scales and minima as they are; keep them where that helps."""
    size, groups = encoded.grid.group, _slice(block, _BLOCK // encoded.grid.group)
    d, dmin = encoded.d[:, block], encoded.dmin[:, block]
    a = encoded.codes[:, _slice(block, _BLOCK)] * encoded.scales[:, groups].repeat_interleave(size, dim=1)
    b = -encoded.minima[:, groups].repeat_interleave(size, dim=1)
    a_moved, b_moved = a @ own, b @ own
    aa, ab, bb = ((x * y).sum(dim=1) for x, y in ((a_moved, a), (a_moved, b), (b_moved, b)))
    slope_a, slope_b = (slope * a).sum(dim=1), (slope * b).sum(dim=1)
    share = _inverse(aa * bb - ab.square())
    new_d = _float16(d + (slope_a * bb - slope_b * ab) * share)
    new_dmin = _float16(dmin + (slope_b * aa - slope_a * ab) * share)
    x, y = new_d - d, new_dmin - dmin
    change = x * (x * aa + 2 * y * ab - 2 * slope_a) + y * (y * bb - 2 * slope_b)
    better = (change < 0) & (new_d >= 0) & (new_dmin >= 0)
    encoded.d[:, block], encoded.dmin[:, block] = torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)


def _search(
    target: torch.Tensor,
    groups: _Triangles,
    group: int,
    encoded: _Encoded,
    scale: torch.Tensor,
    minimum: torch.Tensor,
) -> _Found:
    """Round ``target`` (rows, n) column by column on every grid near the given one (rows,), and return the best."""
    grid, unit, squares = encoded.grid, groups.unit[group], groups.squares[group]
    block = group * grid.group // _BLOCK
    near = torch.arange(-_NEAR, _NEAR + 1, device=target.device)
    around = torch.cartesian_prod(near, near)
    scales = (scale[:, None] + around[:, 0]).clamp_(0, grid.top_scale)
    minima = (minimum[:, None] + around[:, 1]).clamp_(0, grid.top_scale)
    step, offset = encoded.d[:, block, None] * scales, encoded.dmin[:, block, None] * minima
    per_step = _inverse(step)
    codes = target.new_empty(grid.group, *step.shape)  # (n, rows, grids)
    left = torch.empty_like(codes)
    error = torch.zeros_like(step)
    for column in range(grid.group):
        own = target[:, column, None]
        wanted = own + torch.tensordot(unit[:column, column], left[:column], 1) if column else own
        codes[column] = ((wanted + offset) * per_step).round_().clamp_(0, grid.top_code)
        value = codes[column] * step - offset
        left[column] = own - value
        error += squares[column] * (wanted - value).square_()
    best = error.argmin(dim=1, keepdim=True)
    chosen = codes.gather(2, best.expand(grid.group, -1, 1)).squeeze(2).T
    values = chosen * step.gather(1, best) - offset.gather(1, best)
    return _Found(chosen, values, *(x.gather(1, best).squeeze(1) for x in (scales, minima, error)))


def _fit_block(wanted: torch.Tensor, squares: torch.Tensor, grid: _Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return d and dmin (rows,) with which the largest scale and minimum of a block's groups are in range."""
    found = _fit(wanted.view(len(wanted), -1, grid.group), squares.view(-1, grid.group), grid)
    d, dmin = (_float16(x.amax(dim=1) / grid.top_scale) for x in found)
    return d, dmin


def _fit(x: torch.Tensor, squares: torch.Tensor, grid: _Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minima, no minimum negative, with which x ≈ scale · q − minimum.

    As ggml does (``make_qkx3_quants`` in ggml/src/ggml-quants.c): for codes that spread the range over more or fewer
    levels than there are, the best scale and minimum are least squares; ``squares`` (groups, n) weigh the columns of
    ``x`` (rows, groups, n), and the best codes win. Returns two of (rows, groups).
    """
    low = x.amin(dim=2, keepdim=True).clamp_(max=0)
    per_range = _inverse(x.amax(dim=2, keepdim=True) - low)
    share = squares / squares.sum(dim=1, keepdim=True)
    mean = (share * x).sum(dim=2)
    best = torch.full_like(mean, torch.inf)
    scale, offset = torch.zeros_like(mean), low.squeeze(2)
    for stretch in _STRETCHES:
        q = ((x - low) * (per_range * (grid.top_code + stretch))).round_().clamp_(0, grid.top_code)
        shared = share * q
        mean_q, mean_qq, mean_qx = shared.sum(dim=2), (shared * q).sum(dim=2), (shared * x).sum(dim=2)
        determinant = mean_qq - mean_q.square()
        a = (mean_qx - mean * mean_q) * _inverse(determinant)
        b = (mean_qq * mean - mean_q * mean_qx) * _inverse(determinant)
        a, b = torch.where(b > 0, mean_qx * _inverse(mean_qq), a), b.clamp(max=0)
        error = (share * (a[..., None] * q + b[..., None] - x).square_()).sum(dim=2)
        better = (error < best) & (determinant > 0) & (a > 0)
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, a, scale), torch.where(better, b, offset)
    return scale, -offset


def _packed(encoded: _Encoded, order: torch.Tensor, kind: TensorType) -> torch.Tensor:
    """Put columns, groups and blocks back into the order of the weight, and pack them."""
    fields = (encoded.codes, encoded.scales, encoded.minima, encoded.d, encoded.dmin)
    back = []
    for field, size in zip(fields, (1, encoded.grid.group, encoded.grid.group, _BLOCK, _BLOCK), strict=True):
        back.append(torch.empty_like(field))
        back[-1][:, order[::size] // size] = field
    return pack(back[0], back[1], back[2], back[3], back[4], kind)


def _slice(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


def _inverse(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def _float16(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()
