"""Squared norms of weight gradients G = dyᵀ x from x [tokens, in] and dy [tokens, out], G never in memory.

    tiles    ‖G‖² = Σ over tiles of ‖dy[:, columns]ᵀ x[:, columns]‖²; a tile is summed over all tokens in registers
    gram     ‖G‖² = Σ_{t,t'} (x_t · x_t') (dy_t · dy_t'), over pairs of token blocks, the symmetric half only

Both are one launch for any number of (x, dy) pairs, over a work list: a table in device memory says, for each run of
tiles, where the operands lie, how large they are and which pair they belong to, and a program finds its row by its
number. Every program writes its sum to a place of its own and a second launch adds those in order, in float64: no
atomics, and a run repeats bit for bit.

Bytes of the tile form: see :mod:`aletheia_kernels.triton.panels`, which orders the tiles. Where each
input of a layer fits the second-level cache as one panel, every operand is read nearly once.

Bytes of the Gram form. Programs of one wave walk the features in step, so each wave reads every token once. Where
there are fewer pairs of blocks than multiprocessors, the features are cut into chunks and partial Gram matrices are
summed in a further launch.

Cost. Multiply-adds a token are T (K + N) / 2 against K N. The Gram form counts twice: its two accumulators halve the
tile, which doubles what is fetched from shared memory for a product, and its blocks re-read more. bfloat16 products
are exact in the float32 they are summed in, so nothing needs widening as it does on a processor. Where the Gram form
lost too much to cancellation, the tile launch that follows computes that pair after all: it reads a flag that the Gram
form has left on the device, and where the sum can be trusted its programs see no tokens. The host waits for nothing.

A last dimension that is not contiguous is copied: a tile reads each operand many times, and uncoalesced each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aletheia_kernels.reference.grad_norm import GRAM_NOISE_UNITS, GRAM_TOLERANCE
from aletheia_kernels.triton import interpreted, panels
from aletheia_kernels.triton.cards import Card
from aletheia_kernels.triton.dot import tile_dot
from aletheia_kernels.triton.launch import Options, Traffic, card_for, launch

# A row of the work list, int64: its first tile; the addresses of two matrices [tokens, columns]; tokens; both matrices'
# columns; both row strides; the index of the pair. One more row holds the number of all tiles.
FIELDS = tl.constexpr(9)
GROUP = tl.constexpr(panels.GROUP)

GRAM_COST = 2.0
MOST_CHUNKS = 8


@triton.jit
def _row_of(table, tile):
    """The row of the work list that a tile belongs to."""
    row = table
    while tl.load(row + FIELDS) <= tile:
        row += FIELDS
    return row


@triton.jit
def _matrix(row, WHICH: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Address, columns and row stride of one of a row's two matrices."""
    pointer = tl.load(row + 1 + WHICH).to(tl.pointer_type(ELEMENT))
    columns = tl.load(row + 4 + WHICH).to(tl.int32)
    stride = tl.load(row + 6 + WHICH)
    if ALIGNED:
        # Loaded values carry no divisibility of their own, without which there are no 16-byte accesses.
        pointer = tl.multiple_of(pointer, 16)
        columns = tl.multiple_of(columns, 128 // ELEMENT.primitive_bitwidth)
        stride = tl.multiple_of(stride, 128 // ELEMENT.primitive_bitwidth)
    return pointer, columns, stride


@triton.jit
def tile_sums(
    partials,
    table,
    trusted,
    GUARDED: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """partials[tile] = ‖aᵀ b‖² of one block of a's columns and one of b's."""
    tile = tl.program_id(0)
    row = _row_of(table, tile)
    a, a_columns, a_stride = _matrix(row, 0, ELEMENT, ALIGNED)
    b, b_columns, b_stride = _matrix(row, 1, ELEMENT, ALIGNED)
    tokens = tl.load(row + 3).to(tl.int32)
    if GUARDED:
        tokens = tl.where(tl.load(trusted + tl.load(row + 8)) != 0, 0, tokens)
    local = tile - tl.load(row).to(tl.int32)
    blocks_b = tl.cdiv(b_columns, BLOCK_B)
    group = local // (GROUP * blocks_b) * GROUP
    in_group, size = local - group * blocks_b, tl.minimum(tl.cdiv(a_columns, BLOCK_A) - group, GROUP)
    in_a = (group + in_group % size) * BLOCK_A + tl.arange(0, BLOCK_A)
    in_b = in_group // size * BLOCK_B + tl.arange(0, BLOCK_B)
    steps = tl.arange(0, BLOCK_T)
    a_tile = a + steps.to(tl.int64)[:, None] * a_stride + in_a[None, :]
    b_tile = b + steps.to(tl.int64)[:, None] * b_stride + in_b[None, :]
    a_inside, b_inside = in_a[None, :] < a_columns, in_b[None, :] < b_columns
    product = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        there = steps[:, None] < tokens - start
        left = tl.load(a_tile, mask=there & a_inside, other=0.0)
        right = tl.load(b_tile, mask=there & b_inside, other=0.0)
        product = tile_dot(tl.trans(left), right, product, INTERPRETED)
        a_tile += BLOCK_T * a_stride
        b_tile += BLOCK_T * b_stride
    tl.store(partials + tile, tl.sum(product * product))


@triton.jit(do_not_specialize=["rows"])
def tile_totals(out, partials, table, rows, grams, trusted, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    """out[pair] = Σ of its tiles' sums, in order; the Gram form's sum where that can be trusted."""
    pair = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float64)
    for index in range(rows):
        row = table + index * FIELDS
        first, last = tl.load(row).to(tl.int32), tl.load(row + FIELDS).to(tl.int32)
        last = tl.where(tl.load(row + 8) == pair, last, first)
        for start in range(first, last, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(partials + at, mask=at < last, other=0.0).to(tl.float64)
    norm = tl.sum(total).to(tl.float32)
    if GUARDED:
        norm = tl.where(tl.load(trusted + pair) != 0, tl.load(grams + pair), norm)
    tl.store(out + pair, norm)


@triton.jit
def _token_blocks(tile, row):
    """The pair (i ≤ j) of token blocks that a tile of the symmetric half stands for."""
    local = tile - tl.load(row).to(tl.int32)
    j = ((tl.sqrt(8.0 * local.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    # The root may be a unit off.
    j = tl.where(j * (j + 1) // 2 > local, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= local, j + 1, j)
    return local - j * (j + 1) // 2, j


@triton.jit
def _gram(
    row,
    WHICH: tl.constexpr,
    i,
    j,
    chunk,
    chunks,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The products of the rows of blocks i and j over one chunk of the features."""
    matrix, columns, stride = _matrix(row, WHICH, ELEMENT, ALIGNED)
    tokens = tl.load(row + 3).to(tl.int32)
    rows_i, rows_j = i * BLOCK_T + tl.arange(0, BLOCK_T), j * BLOCK_T + tl.arange(0, BLOCK_T)
    tile_i = matrix + rows_i.to(tl.int64)[:, None] * stride
    tile_j = matrix + rows_j.to(tl.int64)[:, None] * stride
    there_i, there_j = rows_i[:, None] < tokens, rows_j[:, None] < tokens
    width = tl.cdiv(tl.cdiv(columns, BLOCK_F), chunks) * BLOCK_F
    gram = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for start in range(chunk * width, tl.minimum((chunk + 1) * width, columns), BLOCK_F):
        at = start + tl.arange(0, BLOCK_F)[None, :]
        left = tl.load(tile_i + at, mask=there_i & (at < columns), other=0.0)
        right = tl.load(tile_j + at, mask=there_j & (at < columns), other=0.0)
        gram = tile_dot(left, tl.trans(right), gram, INTERPRETED)
    return gram


@triton.jit
def _write_terms(partials, tile, terms, i, j):
    """Σ p and Σ p² of a tile's terms; a tile off the diagonal stands for two."""
    weight = tl.where(i == j, 1.0, 2.0)
    tl.store(partials + 2 * tile, weight * tl.sum(terms))
    tl.store(partials + 2 * tile + 1, weight * weight * tl.sum(terms * terms))


@triton.jit(do_not_specialize=["chunks"])
def gram_sums(
    partials,
    grams,
    table,
    chunks,
    CHUNKED: tl.constexpr,
    ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The sums of one tile of (x xᵀ) ∘ (dy dyᵀ), or, of one chunk of the features, both Gram tiles themselves."""
    tile, chunk = tl.program_id(0), tl.program_id(1)
    row = _row_of(table, tile)
    i, j = _token_blocks(tile, row)
    x = _gram(row, 0, i, j, chunk, chunks, ELEMENT, ALIGNED, BLOCK_T, BLOCK_F, INTERPRETED)
    dy = _gram(row, 1, i, j, chunk, chunks, ELEMENT, ALIGNED, BLOCK_T, BLOCK_F, INTERPRETED)
    if CHUNKED:
        at = tl.arange(0, BLOCK_T)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        here = grams + (tile * chunks + chunk).to(tl.int64) * (2 * BLOCK_T * BLOCK_T)
        tl.store(here + at, x)
        tl.store(here + BLOCK_T * BLOCK_T + at, dy)
    else:
        _write_terms(partials, tile, x * dy, i, j)


@triton.jit(do_not_specialize=["chunks"])
def gram_products(partials, grams, table, chunks, BLOCK_T: tl.constexpr):
    """The sums of one tile of (x xᵀ) ∘ (dy dyᵀ) from its chunks."""
    tile = tl.program_id(0)
    i, j = _token_blocks(tile, _row_of(table, tile))
    at = tl.arange(0, BLOCK_T)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    x = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    dy = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    here = grams + (tile * chunks).to(tl.int64) * (2 * BLOCK_T * BLOCK_T)
    for _ in range(chunks):
        x += tl.load(here + at)
        dy += tl.load(here + BLOCK_T * BLOCK_T + at)
        here += 2 * BLOCK_T * BLOCK_T
    _write_terms(partials, tile, x * dy, i, j)


@triton.jit
def gram_totals(grams, trusted, partials, table, noise, BLOCK: tl.constexpr):
    """grams[pair] = Σ of its tiles' sums; trusted[pair]: whether noise √(Σ p²) is no more than that."""
    row = table + tl.program_id(0) * FIELDS
    first, last = tl.load(row).to(tl.int32), tl.load(row + FIELDS).to(tl.int32)
    totals = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        totals += tl.load(partials + 2 * at, mask=at < last, other=0.0).to(tl.float64)
        squares += tl.load(partials + 2 * at + 1, mask=at < last, other=0.0).to(tl.float64)
    total = tl.maximum(tl.sum(totals), 0.0)
    pair = tl.load(row + 8)
    tl.store(grams + pair, total.to(tl.float32))
    believed = tl.sum(squares) * noise * noise <= total * total
    tl.store(trusted + pair, believed.to(tl.int32))


@triton.jit(do_not_specialize=["tokens"])
def column_sum_squares(partials, dy, tokens, columns, stride, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """partials[block] = Σ over a block of columns of (Σ over tokens)²."""
    block = tl.program_id(0)
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_T)
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        rows = start + steps
        inside = (rows < tokens)[:, None] & (at < columns)[None, :]
        here = dy + rows.to(tl.int64)[:, None] * stride + at[None, :]
        sums += tl.load(here, mask=inside, other=0.0).to(tl.float32)
    column = tl.sum(sums, 0)
    tl.store(partials + block, tl.sum(column * column))


@triton.jit(do_not_specialize=["tokens"])
def index_sum_squares(
    partials, dy, sorted_indices, order, tokens, columns, stride, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Σ over a block of columns of (Σ over the rows of one index)², by the program of the index's first row.

    ``order`` is where the rows of the sorted indices lie in dy. Programs of the other rows write 0.
    """
    first, block = tl.program_id(0), tl.program_id(1)
    index = tl.load(sorted_indices + first)
    before = tl.load(sorted_indices + tl.maximum(first - 1, 0))
    at = block * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    start = first
    ours = (first == 0) | (before != index)
    while ours:
        places = start + tl.arange(0, BLOCK_T)
        same = (places < tokens) & (tl.load(sorted_indices + places, mask=places < tokens, other=0) == index)
        rows = tl.load(order + places, mask=same, other=0)
        inside = same[:, None] & (at < columns)[None, :]
        sums += tl.load(dy + rows[:, None] * stride + at[None, :], mask=inside, other=0.0).to(tl.float32)
        start += BLOCK_T
        ours = tl.min(same.to(tl.int32)) == 1
    column = tl.sum(sums, 0)
    tl.store(partials + first.to(tl.int64) * tl.num_programs(1) + block, tl.sum(column * column))


@triton.jit(do_not_specialize=["count"])
def total(out, partials, count, BLOCK: tl.constexpr):
    """out = Σ partials, in order."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(partials + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(out, tl.sum(sums).to(tl.float32))


@triton.jit(do_not_specialize=["tokens"])
def sketch_sums(
    partials,
    dy,
    h,
    tokens,
    columns,
    width,
    dy_stride,
    h_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """partials[block, m] = Σ over a block of dy's columns of (dyᵀ h)²."""
    block = tl.program_id(0)
    in_dy = block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_h = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        there, place = (rows < tokens)[:, None], rows.to(tl.int64)[:, None]
        left = tl.load(
            dy + place * dy_stride + in_dy[None, :], mask=there & (in_dy < columns)[None, :], other=0.0
        )
        right = tl.load(h + place * h_stride + in_h[None, :], mask=there & (in_h < width)[None, :], other=0.0)
        product = tile_dot(tl.trans(left), right, product, INTERPRETED)
    tl.store(partials + block.to(tl.int64) * width + in_h, tl.sum(product * product, 0), mask=in_h < width)


@triton.jit(do_not_specialize=["blocks"])
def sketch_estimate(estimate, error, partials, blocks, width, BLOCK_M: tl.constexpr):
    """Mean of the columns' estimates, and its standard error."""
    at = tl.arange(0, BLOCK_M)
    columns = tl.zeros((BLOCK_M,), tl.float32)
    sums = partials + at
    for _ in range(blocks):
        columns += tl.load(sums, mask=at < width, other=0.0)
        sums += width
    mean = tl.sum(columns) / width
    spread = tl.where(at < width, columns - mean, 0.0)
    tl.store(estimate, mean)
    tl.store(error, tl.sqrt(tl.sum(spread * spread) / (width - 1.0) / width))


ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _is_rdna(card: Card) -> bool:
    """A Radeon, whose matrix instructions hold their operands twice and whose registers run out sooner."""
    return card.backend == "hip" and card.warp_size == 32


def tile_blocks(card: Card, itemsize: int, aligned: bool) -> tuple[dict[str, int], Options]:
    """Block sizes of the tile form, none of which spill.

    The wide tile needs half as many bytes of shared memory a product as the square one, and three stages of it fit an
    A100, H100 and B200; loaded element by element it does not fit the registers. float32 is multiplied without tensor
    cores, from registers: its tile is small.
    """
    if itemsize == 4:
        return {"BLOCK_A": 64, "BLOCK_B": 64, "BLOCK_T": 16}, Options(8 if _is_rdna(card) else 4, 2)
    if _is_rdna(card):
        return {"BLOCK_A": 64, "BLOCK_B": 128, "BLOCK_T": 32}, Options(8, 2)
    stages = 2 if card.backend == "hip" else 3
    wide = aligned and stages * (128 + 256) * 64 * itemsize <= card.shared_memory
    return {"BLOCK_A": 128, "BLOCK_B": 256 if wide else 128, "BLOCK_T": 64}, Options(8, stages)


def gram_blocks(card: Card, itemsize: int, tokens: int, aligned: bool) -> tuple[dict[str, int], Options]:
    """Block sizes of the Gram form: square, for two accumulators a program; none of which spill."""
    if itemsize == 4:
        return {"BLOCK_T": 64, "BLOCK_F": 16}, Options(8 if _is_rdna(card) else 4, 2)
    if _is_rdna(card) or not aligned:
        return {"BLOCK_T": 64, "BLOCK_F": 32}, Options(8, 2)
    stages = 2 if card.backend == "hip" else 3
    if tokens <= 64:
        return {"BLOCK_T": 64, "BLOCK_F": 64}, Options(4, stages)
    return {"BLOCK_T": 128, "BLOCK_F": 64}, Options(8, stages)


def gram_is_cheaper(x: Tensor, dy: Tensor) -> bool:
    """Whether the Gram form costs less on a card; the module's docstring argues the factor."""
    (tokens, k), n = x.shape, dy.shape[1]
    return GRAM_COST * tokens * (k + n) / 2 < float(k) * n


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _on_device(rows: list[list[int]], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "gradient norms cannot be captured: their work list is copied from the host in each call"
        )
    # From pinned memory, so that the host does not wait for the copy; on the host whatever the default device is.
    return torch.tensor(rows, dtype=torch.int64, device="cpu").pin_memory().to(device, non_blocking=True)


def _is_aligned(matrix: Tensor) -> bool:
    """Whether every row of 16-byte pieces lies where 16-byte accesses can reach it."""
    unit = 16 // matrix.element_size()
    return not (matrix.shape[1] % unit or matrix.stride(0) % unit or matrix.data_ptr() % 16)


def _work_list(entries: Sequence[tuple[int, Tensor, Tensor, int]]) -> tuple[Tensor, int]:
    """The table for entries (tiles, matrix, matrix, pair), and how many tiles there are."""
    rows, first = [], 0
    for tiles, a, b, pair in entries:
        sizes = [a.shape[1], b.shape[1], a.stride(0), b.stride(0)]
        rows.append([first, a.data_ptr(), b.data_ptr(), a.shape[0], *sizes, pair])
        first += tiles
    rows.append([first, *[0] * (FIELDS.value - 1)])
    return _on_device(rows, entries[0][1].device), first


def _gram_norms(
    pairs: Sequence[tuple[int, Tensor, Tensor]], grams: Tensor, trusted: Tensor, card: Card, aligned: bool
) -> None:
    """Fills ``grams`` and ``trusted`` at the given indices."""
    _, x, _ = pairs[0]
    tokens = max(x.shape[0] for _, x, _ in pairs)
    blocks, options = gram_blocks(card, x.element_size(), tokens, aligned)
    block_t = blocks["BLOCK_T"]

    def tiles_of(x: Tensor) -> int:
        count = triton.cdiv(x.shape[0], block_t)
        return count * (count + 1) // 2

    table, tiles = _work_list([(tiles_of(x), x, dy, index) for index, x, dy in pairs])
    features = max(x.shape[1] + dy.shape[1] for _, x, dy in pairs)
    chunks = max(
        1, min(MOST_CHUNKS, card.multiprocessors // max(tiles, 1), features // (16 * blocks["BLOCK_F"]))
    )
    partials = torch.empty(2 * tiles, dtype=torch.float32, device=x.device)
    kept = tiles * chunks * 2 * block_t**2 if chunks > 1 else 0
    matrices = torch.empty(kept, dtype=torch.float32, device=x.device)
    reads = flops = 0
    for _, x, dy in pairs:
        passes = triton.cdiv(tiles_of(x), card.multiprocessors)
        reads += passes * (x.numel() + dy.numel()) * x.element_size()
        flops += tiles_of(x) * block_t**2 * 2 * (x.shape[1] + dy.shape[1])
    launch(
        gram_sums,
        (tiles, chunks),
        {"partials": partials, "grams": matrices, "table": table, "chunks": chunks},
        {
            "CHUNKED": chunks > 1,
            "ELEMENT": ELEMENTS[x.dtype],
            "ALIGNED": aligned,
            **blocks,
            "INTERPRETED": interpreted(),
        },
        options,
        Traffic(reads + table.nbytes, matrices.nbytes if chunks > 1 else partials.nbytes, flops),
    )
    if chunks > 1:
        launch(
            gram_products,
            (tiles,),
            {"partials": partials, "grams": matrices, "table": table, "chunks": chunks},
            {"BLOCK_T": block_t},
            Options(num_warps=8, num_stages=1),
            Traffic(matrices.nbytes + table.nbytes, partials.nbytes, 2 * kept),
        )
    launch(
        gram_totals,
        (len(pairs),),
        {
            "grams": grams,
            "trusted": trusted,
            "partials": partials,
            "table": table,
            "noise": GRAM_NOISE_UNITS * torch.finfo(torch.float32).eps / GRAM_TOLERANCE,
        },
        {"BLOCK": 1024},
        Options(num_warps=4, num_stages=1),
        Traffic(partials.nbytes + table.nbytes, 8 * len(pairs), 4 * tiles),
    )


def _norms(pairs: Sequence[tuple[Tensor, Tensor]], method: str) -> Tensor:
    """‖dyᵀ x‖² of every pair, float32 [pairs]."""
    pairs = [(_contiguous_rows(x), _contiguous_rows(dy)) for x, dy in pairs]
    x = pairs[0][0]
    card = card_for(x)
    aligned = all(_is_aligned(matrix) for pair in pairs for matrix in pair)
    grams = torch.empty(len(pairs), dtype=torch.float32, device=x.device)
    by_gram = [
        (index, x, dy)
        for index, (x, dy) in enumerate(pairs)
        if method == "gram" or (method == "auto" and gram_is_cheaper(x, dy))
    ]
    # Pairs that the Gram form does not see are not trusted to it.
    trusted = torch.zeros(len(pairs), dtype=torch.int32, device=x.device)
    if by_gram:
        _gram_norms(by_gram, grams, trusted, card, aligned)
        if method == "gram":
            return grams

    blocks, options = tile_blocks(card, x.element_size(), aligned)
    sides = blocks["BLOCK_A"], blocks["BLOCK_B"]
    segments = panels.plan(pairs, card, *sides)
    table, tiles = _work_list([(s.tiles, s.streamed, s.resident, s.pair) for s in segments])
    partials = torch.empty(tiles, dtype=torch.float32, device=x.device)
    # A sum that is trusted to the Gram form moves nothing here.
    computed = [s for s in segments if s.pair not in {index for index, _, _ in by_gram}]
    flops = sum(2 * s.streamed.numel() * s.resident.shape[1] for s in computed)
    launch(
        tile_sums,
        (tiles,),
        {"partials": partials, "table": table, "trusted": trusted},
        {
            "GUARDED": bool(by_gram),
            "ELEMENT": ELEMENTS[x.dtype],
            "ALIGNED": aligned,
            **blocks,
            "INTERPRETED": interpreted(),
        },
        options,
        Traffic(panels.bytes_read(computed, card, *sides) + table.nbytes, partials.nbytes, flops),
    )
    out = torch.empty(len(pairs), dtype=torch.float32, device=x.device)
    launch(
        tile_totals,
        (len(pairs),),
        {
            "out": out,
            "partials": partials,
            "table": table,
            "rows": len(segments),
            "grams": grams,
            "trusted": trusted,
        },
        {"GUARDED": bool(by_gram), "BLOCK": 1024},
        Options(num_warps=4, num_stages=1),
        Traffic(partials.nbytes + table.nbytes, out.nbytes, tiles),
    )
    return out


def weight_grad_norm_sq(x: Tensor, dy: Tensor, method: str) -> Tensor:
    """As :func:`aletheia_kernels.reference.weight_grad_norm_sq`."""
    return _norms([(x, dy)], method)[0]


def weight_grad_norms_sq(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    """As :func:`aletheia_kernels.reference.weight_grad_norms_sq`."""
    return _norms(list(zip(xs, dys, strict=True)), "auto")


def weight_grad_norm_sq_per_example(x: Tensor, dy: Tensor) -> Tensor:
    """As :func:`aletheia_kernels.reference.weight_grad_norm_sq_per_example`."""
    if x.shape[0] == 0:
        return x.new_empty(0, dtype=torch.float32)
    x, dy = _contiguous_rows(x), _contiguous_rows(dy)
    return _norms(list(zip(x.unbind(), dy.unbind(), strict=True)), "auto")


def _sum(partials: Tensor) -> Tensor:
    out = torch.empty((), dtype=torch.float32, device=partials.device)
    launch(
        total,
        (1,),
        {"out": out, "partials": partials, "count": partials.numel()},
        {"BLOCK": 1024},
        Options(num_warps=4, num_stages=1),
        Traffic(partials.nbytes, 4, partials.numel()),
    )
    return out


def bias_grad_norm_sq(dy: Tensor) -> Tensor:
    """As :func:`aletheia_kernels.reference.bias_grad_norm_sq`."""
    dy = _contiguous_rows(dy)
    tokens, columns = dy.shape
    # 64 columns are a cache line of bfloat16, and enough programs to fill a card from 8,192 columns on.
    block_n = 64
    partials = torch.empty(triton.cdiv(columns, block_n), dtype=torch.float32, device=dy.device)
    launch(
        column_sum_squares,
        (partials.numel(),),
        {"partials": partials, "dy": dy, "tokens": tokens, "columns": columns, "stride": dy.stride(0)},
        {"BLOCK_T": 64, "BLOCK_N": block_n},
        Options(num_warps=4, num_stages=3),
        Traffic(dy.numel() * dy.element_size(), partials.nbytes, dy.numel()),
    )
    return _sum(partials)


def embedding_grad_norm_sq(indices: Tensor, dy: Tensor) -> Tensor:
    """As :func:`aletheia_kernels.reference.embedding_grad_norm_sq`."""
    dy = _contiguous_rows(dy)
    tokens, columns = dy.shape
    sorted_indices, order = indices.sort(stable=True)
    block_n = min(512, max(16, triton.next_power_of_2(columns)))
    grid = tokens, triton.cdiv(columns, block_n)
    partials = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=dy.device)
    launch(
        index_sum_squares,
        grid,
        {
            "partials": partials,
            "dy": dy,
            "sorted_indices": sorted_indices,
            "order": order,
            "tokens": tokens,
            "columns": columns,
            "stride": dy.stride(0),
        },
        {"BLOCK_T": 8, "BLOCK_N": block_n},
        Options(num_warps=4, num_stages=1),
        Traffic(
            dy.numel() * dy.element_size() + sorted_indices.nbytes + order.nbytes, partials.nbytes, dy.numel()
        ),
    )
    return _sum(partials)


def weight_grad_norm_sq_sketch(x: Tensor, dy: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`aletheia_kernels.reference.weight_grad_norm_sq_sketch`; x Ω is the vendor library's."""
    h, dy = torch.mm(x, omega.to(x.dtype)), _contiguous_rows(dy)
    (tokens, columns), width = dy.shape, h.shape[1]
    itemsize = dy.element_size()
    block_m = min(
        64 if itemsize == 4 or _is_rdna(card_for(dy)) else 128, max(16, triton.next_power_of_2(width))
    )
    block_n = 64
    blocks, passes = triton.cdiv(columns, block_n), triton.cdiv(width, block_m)
    partials = torch.empty(blocks, width, dtype=torch.float32, device=dy.device)
    launch(
        sketch_sums,
        (blocks, passes),
        {
            "partials": partials,
            "dy": dy,
            "h": h,
            "tokens": tokens,
            "columns": columns,
            "width": width,
            "dy_stride": dy.stride(0),
            "h_stride": h.stride(0),
        },
        {
            "BLOCK_N": block_n,
            "BLOCK_M": block_m,
            "BLOCK_T": 32 if itemsize == 4 else 64,
            "INTERPRETED": interpreted(),
        },
        Options(num_warps=4, num_stages=2),
        # h, of a few MB, stays in the second-level cache.
        Traffic(passes * dy.numel() * itemsize + h.nbytes, partials.nbytes, 2 * tokens * columns * width),
    )
    estimate, error = (torch.empty((), dtype=torch.float32, device=dy.device) for _ in range(2))
    launch(
        sketch_estimate,
        (1,),
        {"estimate": estimate, "error": error, "partials": partials, "blocks": blocks, "width": width},
        {"BLOCK_M": max(16, triton.next_power_of_2(width))},
        Options(num_warps=4, num_stages=1),
        Traffic(partials.nbytes, 8, 4 * partials.numel()),
    )
    return estimate, error
