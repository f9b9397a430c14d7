"""Multiply with native blocks on a GPU, straight from their packed codes.

Decode has few tokens: time goes into fetching weights, and at 2 bits nearly as much into unpacking them. One launch
covers every (token, expert) pair and projection, whatever their bit-widths. A thread takes 32 codes of a row, which
at b bits are exactly b words, and reuses each input for eight rows. No code is converted: shifted to the top of the
mantissa of 1.0, q is the float 1 + q / 2^b, one shift and one logical operation, and

    Σ s·(q − z)·x = Σ_groups s·( 2^b · (Σ f·x − c·Σ x)  +  (2^(b−1) − z)·Σ x ),    f = 1 + q / 2^b,  c = 3/2

so that the zero point costs once per group, not once per weight. (One bit: ±1 = 4·(f − 5/4), and the mean in place of
the second term.) Inputs are first rearranged once per token, which makes them adjacent where threads are, and padded
with zeros: whatever a thread reads beyond a row's end does not count, so nothing is masked, only kept within the block.

Prefill has many tokens per expert: pairs are sorted by expert and cut into tiles on the device, without waiting for
it, and a grouped matrix product restores one tile of weights at a time, in the inputs' type.

Trellis codes have functions of their own for both, in `triton_trellis`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alphaq.errors import DeviceError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise DeviceError(
        f"The GPU kernels need triton, which cannot be imported ({error}). Install it: pip install triton."
    ) from None

from alphaq.runtime.triton_trellis import levels_on, product_with_trellis, store_trellis_rows

BLOCK = 32  # codes that are whole words at every bit-width
FIELDS = tl.constexpr(4)  # of a table: address, bits, group size, flags
HEADER_BYTES = tl.constexpr(16)
TRELLIS = tl.constexpr(8)  # a flag of `block_kernels`: bits are a rate in quarters

ROWS_PER_THREAD = 8
ONE = 0x3F800000  # 1.0 in bits; an argument of the kernel, as some versions of ptxas take two steps to use a constant
LONGEST_TILE = 128
ENOUGH_PROGRAMS = 1024
PAIRS_PER_EXPERT = 2  # more of them, and restoring weights once for all is cheaper than unpacking them for each


def packed_linear(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    """What `alphaq.runtime.multiply.packed_linear` does, on a GPU. Reads blocks by address: they must live on.

    Sums are float32 and in a fixed order: the same call gives the same bits.
    """
    pairs, projections, available = experts.shape[0], table.shape[0], table.shape[1]
    inputs, table = inputs.contiguous(), table.contiguous()
    experts, tokens = experts.contiguous(), tokens.contiguous()
    if not pairs or not projections * rows:
        return inputs.new_empty(pairs, projections * rows)
    with torch.cuda.device_of(inputs):
        if pairs <= PAIRS_PER_EXPERT * available:
            return _decode(inputs, table, rows, experts, tokens)
        return _prefill(inputs, table, rows, experts, tokens)


def _decode(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    """One program per pair, projection and few rows."""
    count, columns = inputs.shape
    pairs, projections, available = experts.shape[0], table.shape[0], table.shape[1]
    tile_rows, tile_blocks, warps = _decode_tile(rows, columns, pairs * projections)
    tiles = -(-columns // (BLOCK * tile_blocks))
    arranged = torch.empty(count, tiles, BLOCK, tile_blocks, dtype=inputs.dtype, device=inputs.device)
    sums = torch.empty(count, tiles * tile_blocks, dtype=torch.float32, device=inputs.device)
    _arrange[(count, tiles)](inputs, arranged, sums, columns, BLOCK, tile_blocks)
    out = inputs.new_empty(pairs, projections * rows)
    _decode_kernel[(pairs * projections * -(-rows // tile_rows),)](
        inputs, arranged, sums, table, levels_on(inputs.device), experts, tokens, out,
        pairs, projections, available, rows, columns, ONE,
        WORD_PAIRS=columns % 64 == 0, RAGGED=columns % BLOCK != 0, BLOCK=BLOCK,
        TILE_ROWS=tile_rows, TILE_BLOCKS=tile_blocks, num_warps=warps,
    )  # fmt: skip
    return out


def _decode_tile(rows: int, columns: int, products: int) -> tuple[int, int, int]:
    """Rows, blocks of 32 columns, and warps per program: little beyond a row's end, and work for every processor."""
    blocks = -(-columns // BLOCK)
    tile_blocks = min((16, 32, 64, LONGEST_TILE), key=lambda size: (-(-blocks // size) * size, -size))
    warps = 4
    tile_rows = ROWS_PER_THREAD * 32 * warps // tile_blocks
    while warps > max(1, tile_blocks // 32) and products * -(-rows // tile_rows) < ENOUGH_PROGRAMS:
        warps, tile_rows = warps // 2, tile_rows // 2
    return tile_rows, tile_blocks, warps


def _prefill(inputs: Tensor, table: Tensor, rows: int, experts: Tensor, tokens: Tensor) -> Tensor:
    """One program per tile of pairs that share an expert, projection and some rows."""
    columns = inputs.shape[1]
    pairs, projections, available = experts.shape[0], table.shape[0], table.shape[1]
    tile_pairs, tile_rows, warps, stages = _prefill_tile(inputs.dtype, pairs // available)
    order, tile_expert, tile_start, tile_end = _tiles(experts, available, tile_pairs)
    out = inputs.new_zeros(pairs, projections * rows)
    _prefill_kernel[(len(tile_expert) * projections * -(-rows // tile_rows),)](
        inputs, table, levels_on(inputs.device), tokens, order, tile_expert, tile_start, tile_end, out,
        len(tile_expert), projections, available, rows, columns,
        RAGGED=columns % BLOCK != 0, BLOCK=BLOCK, TILE_PAIRS=tile_pairs, TILE_ROWS=tile_rows,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _prefill_tile(dtype: torch.dtype, expected: int) -> tuple[int, int, int, int]:
    """Pairs, rows, warps and pipeline stages per program, where that many pairs are expected per expert."""
    if dtype == torch.float32:  # no matrix units: larger tiles would not fit into registers
        return 16, 32, 4, 1
    if expected > 256:
        return 128, 128, 8, 2
    return 16 if expected <= 16 else 32 if expected <= 32 else 64, 64, 4, 2


def _tiles(experts: Tensor, available: int, tile_pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs sorted by expert, and of each tile its expert, first pair and the end of its expert's pairs.

    There are as many tiles as could be needed; those that are not, and those of experts that the table does not have,
    belong to expert `available`.
    """
    pairs = experts.shape[0]
    known = torch.where((experts >= 0) & (experts < available), experts, available)
    by_expert, order = known.sort(stable=True)
    numbers = torch.arange(available + 1, device=experts.device)
    ends = torch.searchsorted(by_expert, numbers, right=True)
    starts = torch.searchsorted(by_expert, numbers)
    needed = ((ends - starts + tile_pairs - 1) // tile_pairs)[:available].cumsum(0)
    tiles = torch.arange(-(-pairs // tile_pairs) + min(available, pairs), device=experts.device)
    tile_expert = torch.searchsorted(needed, tiles, right=True)
    before = torch.cat([needed.new_zeros(1), needed])[tile_expert]
    return order, tile_expert, starts[tile_expert] + (tiles - before) * tile_pairs, ends[tile_expert]


@triton.jit
def _arrange(inputs, arranged, sums, columns, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    """Inputs [tokens, columns] as [tokens, tiles, BLOCK, TILE_BLOCKS] and their sums over BLOCK, padded with zeros."""
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    block = tl.arange(0, TILE_BLOCKS)
    place = tl.arange(0, BLOCK)
    column = (tile * TILE_BLOCKS + block[:, None]) * BLOCK + place[None, :]
    values = tl.load(inputs + token * columns + column, mask=column < columns, other=0.0)
    start = (token * tiles + tile) * TILE_BLOCKS
    tl.store(arranged + start * BLOCK + place[None, :] * TILE_BLOCKS + block[:, None], values)
    tl.store(sums + start + block, tl.sum(values.to(tl.float32), 1))


@triton.jit(do_not_specialize=["pairs", "projections", "available", "rows", "one"])
def _decode_kernel(
    inputs,
    arranged,
    sums,
    table,
    levels,
    experts,
    tokens,
    out,
    pairs,
    projections,
    available,
    rows,
    columns,
    one,
    WORD_PAIRS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """out[pair, projection · rows + row] for TILE_ROWS rows; neighbours in the grid may share an expert's weights."""
    program = tl.program_id(0)
    product = program % (pairs * projections)
    pair = product % pairs
    projection = product // pairs
    first_row = program // (pairs * projections) * TILE_ROWS
    y = out + pair.to(tl.int64) * (projections * rows) + projection * rows
    expert = tl.load(experts + pair)
    if (expert >= 0) & (expert < available):
        token = tl.load(tokens + pair)
        entry = table + (projection * available + expert) * FIELDS
        address = tl.load(entry)
        bits = tl.load(entry + 1)
        group_size = tl.load(entry + 2).to(tl.int32)
        flag = tl.load(entry + 3)
        padded = tl.cdiv(columns, BLOCK * TILE_BLOCKS) * TILE_BLOCKS
        x = arranged + token * padded * BLOCK
        x_sums = sums + token * padded
        if flag == TRELLIS:
            for rate in tl.static_range(4, 17):
                if bits == rate:
                    store_trellis_rows(
                        address, x, y, first_row, rows, columns, levels, rate, BLOCK, TILE_ROWS, TILE_BLOCKS
                    )
        else:
            if bits == 16:
                _store_matrix_rows(
                    address, inputs + token * columns, y, first_row, rows, columns, flag, TILE_ROWS, TILE_BLOCKS
                )
            for width in tl.static_range(1, 9):
                if bits == width:
                    _store_block_rows(
                        address, x, x_sums, y, first_row, rows, columns, group_size, flag, one,
                        width, WORD_PAIRS, RAGGED, BLOCK, TILE_ROWS, TILE_BLOCKS,
                    )  # fmt: skip
    else:
        row = first_row + tl.arange(0, TILE_ROWS)
        tl.store(y + row, tl.full([TILE_ROWS], 0.0, out.dtype.element_ty), mask=row < rows)


@triton.jit
def _store_matrix_rows(
    address, x, y, first_row, rows, columns, half, TILE_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr
):
    """y[first_row:][:TILE_ROWS] = W·x of a matrix in 16 bits: float16 if `half`, else bfloat16."""
    row = first_row + tl.arange(0, TILE_ROWS)
    inside = tl.minimum(row, rows - 1)
    if half == 1:
        halves = address.to(tl.pointer_type(tl.float16))
        result = _times_matrix(halves, x, inside, columns, TILE_ROWS, TILE_BLOCKS)
    else:
        brains = address.to(tl.pointer_type(tl.bfloat16))
        result = _times_matrix(brains, x, inside, columns, TILE_ROWS, TILE_BLOCKS)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def _times_matrix(matrix, x, row, columns, TILE_ROWS: tl.constexpr, TILE_BLOCKS: tl.constexpr):
    """W·x of some rows of a matrix in 16 bits, float32 [TILE_ROWS]."""
    WIDTH: tl.constexpr = 4 * TILE_BLOCKS
    start = matrix + row.to(tl.int64) * columns
    total = tl.full([TILE_ROWS, WIDTH], 0.0, tl.float32)
    for first in range(0, columns, WIDTH):
        column = first + tl.arange(0, WIDTH)[None, :]
        inside = column < columns
        values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(start[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.fma(weights, values, total)
    return tl.sum(total, 1)


@triton.jit(noinline=True)
def _store_block_rows(
    address,
    x,
    x_sums,
    y,
    first_row,
    rows,
    columns,
    group_size,
    symmetric,
    one,
    BITS: tl.constexpr,
    WORD_PAIRS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """y[first_row:][:TILE_ROWS] = Ŵ·x of a block. Zero points are taken as their middle first, then put right.

    A function of its own in the compiled code too: inlined eight times, it takes Triton minutes.
    """
    out_row = first_row + tl.arange(0, TILE_ROWS)
    row = tl.minimum(out_row, rows - 1)
    codes, offsets, scales = _parts(address, rows, columns, group_size, symmetric, BITS)
    groups = tl.cdiv(columns, group_size)
    if WORD_PAIRS and BITS % 4 == 0:  # at fewer bits strided single words are no slower, and less to compile
        if address % 8 == 0:
            result = _times_codes(
                codes, scales, x, x_sums, row, columns, groups, group_size, one,
                BITS, True, RAGGED, BLOCK, TILE_ROWS, TILE_BLOCKS,
            )  # fmt: skip
        else:
            result = _times_codes(
                codes, scales, x, x_sums, row, columns, groups, group_size, one,
                BITS, False, RAGGED, BLOCK, TILE_ROWS, TILE_BLOCKS,
            )  # fmt: skip
    else:
        result = _times_codes(
            codes, scales, x, x_sums, row, columns, groups, group_size, one,
            BITS, False, RAGGED, BLOCK, TILE_ROWS, TILE_BLOCKS,
        )  # fmt: skip
    if symmetric != 1:
        result += _times_offsets(
            offsets, scales, x_sums, row, rows, columns, groups, group_size, symmetric, BITS, BLOCK, TILE_ROWS
        )
    tl.store(y + out_row, result.to(y.dtype.element_ty), mask=out_row < rows)


@triton.jit
def _parts(address, rows, columns, group_size, symmetric, BITS: tl.constexpr):
    """Addresses of a block's codes, zero points or means, and scales."""
    groups = tl.cdiv(columns, group_size)
    many = rows.to(tl.int64)
    codes = address + HEADER_BYTES
    offsets = codes + many * (4 * tl.cdiv(columns * BITS, 32))
    if symmetric != 0:
        scales = offsets
    elif BITS == 1:
        scales = offsets + many * (2 * groups)
    else:
        scales = offsets + tl.cdiv(many * BITS, 32) * (4 * groups)
    return codes, offsets, scales


@triton.jit
def _times_codes(
    codes,
    scales,
    x,
    x_sums,
    row,
    columns,
    groups,
    group_size,
    one,
    BITS: tl.constexpr,
    WORD_PAIRS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """Σ s·(q − 2^(BITS−1))·x, or Σ s·(2q − 1)·x of one bit, [TILE_ROWS]. WORD_PAIRS: rows are whole, aligned pairs."""
    GAIN: tl.constexpr = 4 if BITS == 1 else 2**BITS
    CENTRE: tl.constexpr = 1.25 if BITS == 1 else 1.5
    blocks = tl.cdiv(columns, BLOCK)
    row_words = tl.cdiv(columns * BITS, 32)
    row_start = codes.to(tl.pointer_type(tl.uint32)) + row.to(tl.int64) * row_words
    row_scales = scales.to(tl.pointer_type(tl.float16)) + row.to(tl.int64) * groups
    blocks_shift = group_size // (2 * BLOCK)  # 32, 64, 128 columns are 2^0, 2^1, 2^2 blocks
    lane = tl.arange(0, TILE_BLOCKS)[None, :]  # two axes throughout: else values change threads before each use
    total = tl.full([TILE_ROWS, TILE_BLOCKS], 0.0, tl.float32)
    for first in range(0, blocks, TILE_BLOCKS):
        block = tl.minimum(first + lane, blocks - 1)
        # The hint only keeps neighbouring threads within a row, which not all versions of Triton do unasked. Nothing is
        # known of where blocks are, so that no load is made wider for it.
        scale = tl.load(tl.max_contiguous(row_scales[:, None] + (block >> blocks_shift), [1, 2])).to(tl.float32)
        centred = tl.load(x_sums + first + lane) * -CENTRE
        products = tl.full([TILE_ROWS, TILE_BLOCKS], 0.0, tl.float32) + centred
        word = tl.full([TILE_ROWS, TILE_BLOCKS], 0, tl.uint32)
        two_words = tl.full([TILE_ROWS, TILE_BLOCKS], 0, tl.uint64)
        for place in tl.static_range(0, 32):
            following = word
            if place * BITS % 32 == 0:
                word, two_words = _load_word(
                    row_start, block, row_words, two_words, place * BITS // 32, BITS, WORD_PAIRS, RAGGED
                )
            elif place * BITS % 32 + BITS > 32:
                following, two_words = _load_word(
                    row_start, block, row_words, two_words, place * BITS // 32 + 1, BITS, WORD_PAIRS, RAGGED
                )
            values = tl.load(x + (first * BLOCK + place * TILE_BLOCKS) + lane).to(tl.float32)
            fraction = _in_mantissa(word, following, one, place * BITS % 32, BITS)
            products = tl.fma(fraction, values, products)
            if place * BITS % 32 + BITS > 32:
                word = following
        total = tl.fma(products, scale, total)
    return tl.sum(total, 1) * GAIN


@triton.jit
def _load_word(
    row_start,
    block,
    row_words,
    two_words,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
    WORD_PAIRS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Word INDEX of blocks of 32 codes, [TILE_ROWS, TILE_BLOCKS], and the pair of words that it came with."""
    if WORD_PAIRS:
        if INDEX % 2 == 0:
            start = row_start.to(tl.pointer_type(tl.uint64), bitcast=True)
            two_words = tl.load(tl.max_contiguous(start[:, None] + (block * (BITS // 2) + INDEX // 2), [1, 2]))
            word = two_words.to(tl.uint32)
        else:
            word = (two_words >> 32).to(tl.uint32)
    else:
        at = block * BITS + INDEX
        if RAGGED:
            at = tl.minimum(at, row_words - 1)
        word = tl.load(tl.max_contiguous(row_start[:, None] + at, [1, 2]))
    return word, two_words


@triton.jit
def _in_mantissa(word, following, one, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """1 + q / 2^BITS, where q begins at bit SHIFT of a word and may end in the following one."""
    MOVE: tl.constexpr = SHIFT + BITS - 23
    if SHIFT + BITS > 32:
        field = (word >> MOVE) | (following << (32 - MOVE))
    elif MOVE > 0:
        field = word >> MOVE
    else:
        field = word << -MOVE
    return ((field & (((1 << BITS) - 1) << (23 - BITS))) | one.to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def _times_offsets(
    offsets,
    scales,
    x_sums,
    row,
    rows,
    columns,
    groups,
    group_size,
    symmetric,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Σ_groups s·(2^(BITS−1) − z)·Σ x, or Σ_groups mean·Σ x of one bit, [TILE_ROWS]. Nested: z = 2^(BITS−1) − ½."""
    TILE_GROUPS: tl.constexpr = 32
    blocks = tl.cdiv(columns, BLOCK)
    row_start = row.to(tl.int64) * groups
    total = tl.full([TILE_ROWS, TILE_GROUPS], 0.0, tl.float32)
    for first in range(0, groups, TILE_GROUPS):
        group = first + tl.arange(0, TILE_GROUPS)[None, :]
        block = group * (group_size // BLOCK)
        end = tl.minimum(block + group_size // BLOCK, blocks)
        x_sum = tl.full([1, TILE_GROUPS], 0.0, tl.float32)
        for part in tl.static_range(0, 4):
            x_sum += tl.load(x_sums + block + part, mask=block + part < end, other=0.0)
        group = tl.minimum(group, groups - 1)
        at = row_start[:, None] + group
        if BITS == 1:
            weight = tl.load(offsets.to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
        else:
            scale = tl.load(scales.to(tl.pointer_type(tl.float16)) + at).to(tl.float32)
            if symmetric == 0:
                weight = scale * (2 ** (BITS - 1) - _zero_points(offsets, row[:, None], group, rows, BITS))
            else:
                weight = scale * 0.5
        total = tl.fma(weight, x_sum, total)
    return tl.sum(total, 1)


@triton.jit
def _zero_points(offsets, row, group, rows, BITS: tl.constexpr):
    """Zero points of some rows and groups, float32 in the shape that the two make together."""
    group_words = tl.cdiv(rows * BITS, 32)
    start = offsets.to(tl.pointer_type(tl.uint32)) + group.to(tl.int64) * group_words
    return _codes(start, row, group_words, BITS, False).to(tl.float32)


@triton.jit
def _codes(start, place, words, BITS: tl.constexpr, ALONG_ROW: tl.constexpr):
    """Codes at some places of packed streams of that many words, uint32 in the shape that starts and places make."""
    word = place * BITS // 32
    shift = (place * BITS % 32).to(tl.uint32)
    at = start + tl.minimum(word, words - 1)
    if ALONG_ROW:
        at = tl.max_contiguous(at, [1, 2])  # where threads lie, as in _times_codes
    code = tl.load(at) >> shift
    if 32 % BITS != 0:
        at = start + tl.minimum(word + 1, words - 1)
        if ALONG_ROW:
            at = tl.max_contiguous(at, [1, 2])
        code |= (tl.load(at) << (31 - shift)) << 1  # a shift by 32 would be undefined
    return code & ((1 << BITS) - 1)


@triton.jit(do_not_specialize=["tiles", "projections", "available", "rows"])
def _prefill_kernel(
    inputs,
    table,
    levels,
    tokens,
    order,
    tile_expert,
    tile_start,
    tile_end,
    out,
    tiles,
    projections,
    available,
    rows,
    columns,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """out[pair, projection · rows + row] for up to TILE_PAIRS pairs of one expert and TILE_ROWS rows."""
    program = tl.program_id(0)
    tile = program % tiles
    projection = program // tiles % projections
    row = program // (tiles * projections) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    expert = tl.load(tile_expert + tile)
    if expert < available:
        place = tl.load(tile_start + tile) + tl.arange(0, TILE_PAIRS)
        filled = place < tl.load(tile_end + tile)
        pair = tl.load(order + place, mask=filled, other=0)
        token = tl.load(tokens + pair, mask=filled, other=0)
        x = inputs + token * columns
        entry = table + (projection * available + expert) * FIELDS
        address = tl.load(entry)
        bits = tl.load(entry + 1)
        group_size = tl.load(entry + 2).to(tl.int32)
        flag = tl.load(entry + 3)
        inside = tl.minimum(row, rows - 1)
        result = tl.full([TILE_PAIRS, TILE_ROWS], 0.0, tl.float32)
        if flag == TRELLIS:
            rate = bits.to(tl.int32)
            result = product_with_trellis(
                x, filled, address, inside, rows, columns, rate, levels, BLOCK, TILE_PAIRS, TILE_ROWS
            )
        elif bits == 16:
            if flag == 1:
                halves = address.to(tl.pointer_type(tl.float16))
                result = _product_with_matrix(x, filled, halves, inside, columns, TILE_PAIRS, TILE_ROWS)
            else:
                brains = address.to(tl.pointer_type(tl.bfloat16))
                result = _product_with_matrix(x, filled, brains, inside, columns, TILE_PAIRS, TILE_ROWS)
        for width in tl.static_range(1, 9):
            if (bits == width) & (flag != TRELLIS):
                result = _product_with_block(
                    x, filled, address, inside, rows, columns, group_size, flag,
                    width, RAGGED, BLOCK, TILE_PAIRS, TILE_ROWS,
                )  # fmt: skip
        at = pair[:, None] * (projections * rows) + projection * rows + row[None, :]
        tl.store(out + at, result.to(out.dtype.element_ty), mask=filled[:, None] & (row < rows)[None, :])


@triton.jit
def _product_with_matrix(x, filled, matrix, row, columns, TILE_PAIRS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """X·Wᵀ of some rows of a matrix in 16 bits, float32 [TILE_PAIRS, TILE_ROWS]."""
    DEPTH: tl.constexpr = 64
    start = matrix + row.to(tl.int64) * columns
    total = tl.full([TILE_PAIRS, TILE_ROWS], 0.0, tl.float32)
    for first in range(0, columns, DEPTH):
        column = first + tl.arange(0, DEPTH)
        inside = column < columns
        values = tl.load(x[:, None] + column[None, :], mask=filled[:, None] & inside[None, :], other=0.0)
        weights = tl.load(start[:, None] + column[None, :], mask=inside[None, :], other=0.0).to(values.dtype)
        total = tl.dot(values, weights.trans(1, 0), total, input_precision="ieee")
    return total


@triton.jit
def _product_with_block(
    x,
    filled,
    address,
    row,
    rows,
    columns,
    group_size,
    symmetric,
    BITS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_PAIRS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """X·Ŵᵀ of some rows of a block, float32 [TILE_PAIRS, TILE_ROWS]."""
    codes, offsets, scales = _parts(address, rows, columns, group_size, symmetric, BITS)
    groups = tl.cdiv(columns, group_size)
    row_words = tl.cdiv(columns * BITS, 32)
    row_start = codes.to(tl.pointer_type(tl.uint32)) + row.to(tl.int64) * row_words
    row_scales = scales.to(tl.pointer_type(tl.float16)) + row.to(tl.int64) * groups
    row_means = offsets.to(tl.pointer_type(tl.float16)) + row.to(tl.int64) * groups
    total = tl.full([TILE_PAIRS, TILE_ROWS], 0.0, tl.float32)
    for first in range(0, columns, BLOCK):
        place = tl.arange(0, BLOCK)
        inside = first + place < columns
        values = tl.load(x[:, None] + (first + place)[None, :], mask=filled[:, None] & inside[None, :], other=0.0)
        word = first // 32 * BITS
        if 32 % BITS == 0:
            at = word + tl.arange(0, BITS)
            if RAGGED:
                at = tl.minimum(at, row_words - 1)
            shift = (tl.arange(0, 32 // BITS) * BITS).to(tl.uint32)
            fields = tl.load(row_start[:, None] + at[None, :])[:, :, None] >> shift[None, None, :]
            code = (fields & ((1 << BITS) - 1)).reshape(TILE_ROWS, BLOCK)
        else:
            code = _codes(row_start[:, None] + word, place[None, :], row_words - word, BITS, True)
        group = first // group_size
        scale = tl.load(row_scales + group).to(tl.float32)
        zero_point = tl.full([TILE_ROWS], 0.5 if BITS == 1 else 2 ** (BITS - 1), tl.float32)
        if BITS == 1:
            scale *= 2
        elif symmetric == 0:
            zero_point = _zero_points(offsets, row, group, rows, BITS)
        elif symmetric == 3:
            zero_point -= 0.5
        weights = (code.to(tl.float32) - zero_point[:, None]) * scale[:, None]
        if BITS == 1:  # noqa: SIM102 (known when compiling, unlike the next)
            if symmetric == 0:
                weights += tl.load(row_means + group).to(tl.float32)[:, None]
        if RAGGED:
            weights = tl.where(inside[None, :], weights, 0.0)  # infinity in 16 bits, times zero, would be no number
        total = tl.dot(values, weights.to(values.dtype).trans(1, 0), total, input_precision="ieee")
    return total
