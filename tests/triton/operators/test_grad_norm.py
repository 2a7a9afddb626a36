"""The gradient norms' kernels equal the norms of the gradients, in both forms, and move no more than they say."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import (
    bias_grad_norm_sq,
    embedding_grad_norm_sq,
    weight_grad_norm_sq,
    weight_grad_norm_sq_per_example,
    weight_grad_norm_sq_sketch,
    weight_grad_norms_sq,
)
from aletheia_kernels.triton import grad_norm, panels
from aletheia_kernels.triton.cards import CARDS, Card
from aletheia_kernels.triton.launch import recording
from tests.drawn import DTYPES

SETTINGS = settings(max_examples=6)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_norm(x: Tensor, dy: Tensor) -> Tensor:
    return (dy.double().mT @ x.double()).square().sum((-2, -1))


def plain_norm(x: Tensor, dy: Tensor) -> Tensor:
    return (dy.mT @ x).float().square().sum((-2, -1))


def gapped(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values in rows that lie apart, with NaN between them."""
    *lead, rows, columns = tensor.shape
    storage = torch.full((*lead, rows, columns + 16), float("nan"), dtype=tensor.dtype, device=device)
    storage[..., :columns] = tensor
    return storage[..., :columns]


@DTYPES
@pytest.mark.parametrize("method", ["tiles", "gram", "auto"])
@SETTINGS
@given(
    tokens=st.integers(0, 128),
    in_features=st.integers(1, 128),
    out=st.integers(1, 128),
    seed=st.integers(0, 999),
)
@example(tokens=128, in_features=64, out=96, seed=0)  # 16-byte accesses
@example(tokens=1, in_features=1, out=1, seed=0)
@example(tokens=0, in_features=7, out=9, seed=0)
@example(tokens=129, in_features=130, out=257, seed=0)  # several tiles and token blocks
def test_weight_norm(device, guarded, two_times_rule, dtype, method, tokens, in_features, out, seed):
    x, dy = draw(tokens, in_features, dtype=dtype, seed=seed), draw(tokens, out, dtype=dtype, seed=seed + 1)
    ours = weight_grad_norm_sq(guarded(x), guarded(dy), method=method)
    assert ours.dtype == torch.float32
    exact = exact_norm(x, dy)
    if method == "gram":
        # What the form cannot help: cancellation among its terms, which "auto" is there to notice.
        terms = (x.double() @ x.double().T) * (dy.double() @ dy.double().T)
        if (ours.cpu() - exact).abs() <= grad_norm.GRAM_NOISE_UNITS * torch.finfo(
            torch.float32
        ).eps * terms.norm():
            return
    two_times_rule(method, ours, plain_norm(x, dy), exact)


@DTYPES
def test_cancelling_gram_entries_are_noticed_without_asking_the_host(device, two_times_rule, dtype):
    # dy alternates in sign from token to token: the Gram sum is a small difference of large terms. The pair beside it
    # has none of that, so that one launch has both kinds.
    x = (draw(1, 120, dtype=dtype).float() + draw(60, 120, dtype=dtype, seed=1).float() / 256).to(dtype)
    dy = (
        draw(1, 128, dtype=dtype, seed=2) * torch.tensor([1.0, -1.0]).to(dtype).repeat(30)[:, None]
    ).contiguous()
    other = draw(60, 128, dtype=dtype, seed=3)
    assert grad_norm.gram_is_cheaper(x, dy)
    for method in ("auto", "tiles"):
        two_times_rule(
            method,
            weight_grad_norm_sq(x.to(device), dy.to(device), method=method),
            plain_norm(x, dy),
            exact_norm(x, dy),
        )
    gram = weight_grad_norm_sq(x.to(device), dy.to(device), method="gram").item()
    assert abs(gram - exact_norm(x, dy).item()) > 1e-5 * exact_norm(x, dy).item(), (
        "the case does not cancel enough"
    )
    norms = weight_grad_norms_sq([x.to(device)] * 2, [dy.to(device), other.to(device)])
    two_times_rule(
        "list",
        norms,
        torch.stack([plain_norm(x, dy), plain_norm(x, other)]),
        torch.stack([exact_norm(x, dy), exact_norm(x, other)]),
    )


@DTYPES
def test_all_linears_of_a_layer_in_one_launch(device, guarded, two_times_rule, dtype):
    x, middle = draw(40, 48, dtype=dtype), draw(40, 100, dtype=dtype, seed=9)
    xs = [x, x, x, draw(3, 48, dtype=dtype, seed=4), x, x, middle]
    widths = [48, 16, 16, 48, 100, 100, 33]
    dys = [draw(len(x), n, dtype=dtype, seed=20 + n) for x, n in zip(xs, widths, strict=True)]
    on_device = {id(t): guarded(t) for t in (*xs, *dys)}
    with recording(CARDS["sm_90"]) as recorded:
        ours = weight_grad_norms_sq([on_device[id(x)] for x in xs], [on_device[id(dy)] for dy in dys])
    assert [launch.name for launch in recorded.launches].count("tile_sums") == 1
    two_times_rule(
        "norms",
        ours,
        torch.stack([plain_norm(x, dy) for x, dy in zip(xs, dys, strict=True)]),
        torch.stack([exact_norm(x, dy) for x, dy in zip(xs, dys, strict=True)]),
    )


@DTYPES
@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((3, 5, 90, 70), "gram_sums"),
        ((4, 100, 40, 33), "tile_sums"),
        ((0, 5, 9, 7), None),
        ((2, 0, 9, 7), None),
    ],
)
def test_single_examples(device, guarded, two_times_rule, dtype, shape, form):
    batch, tokens, in_features, out = shape
    x, dy = draw(batch, tokens, in_features, dtype=dtype), draw(batch, tokens, out, dtype=dtype, seed=1)
    with recording(CARDS["sm_90"]) as recorded:
        ours = weight_grad_norm_sq_per_example(guarded(x), guarded(dy))
    assert form is None or form == recorded.launches[0].name
    two_times_rule("examples", ours, plain_norm(x, dy), exact_norm(x, dy))
    if batch:
        strided = weight_grad_norm_sq_per_example(gapped(x, device), gapped(dy, device))
        two_times_rule("rows apart", strided, plain_norm(x, dy), exact_norm(x, dy))


@DTYPES
@pytest.mark.parametrize("method", ["tiles", "gram"])
def test_strides(device, two_times_rule, dtype, method):
    x, dy = draw(70, 40, dtype=dtype), draw(70, 24, dtype=dtype, seed=1)
    plain, exact = plain_norm(x, dy), exact_norm(x, dy)
    two_times_rule(
        "rows apart",
        weight_grad_norm_sq(gapped(x, device), gapped(dy, device), method=method),
        plain,
        exact,
    )
    columns_apart = gapped(x.T.contiguous(), device).T
    one_row = draw(1, 24, dtype=dtype, seed=5).to(device).expand(70, 24)
    given = weight_grad_norm_sq(columns_apart, one_row, method=method)
    two_times_rule("columns apart", given, plain_norm(x, one_row.cpu()), exact_norm(x, one_row.cpu()))


@DTYPES
def test_gram_in_chunks_and_whole(device, two_times_rule, dtype, monkeypatch):
    # Few token blocks leave a card idle, so the features are cut up; a card of one multiprocessor needs none of it.
    x, dy = draw(100, 700, dtype=dtype), draw(100, 600, dtype=dtype, seed=1)
    for multiprocessors, names in (
        (132, ["gram_sums", "gram_products", "gram_totals"]),
        (1, ["gram_sums", "gram_totals"]),
    ):
        card = Card("sm_90", "cuda", 90, 32, 232_448, multiprocessors)
        with recording(card) as recorded:
            ours = weight_grad_norm_sq(x.to(device), dy.to(device), method="gram")
        assert [launch.name for launch in recorded.launches] == names
        two_times_rule("gram", ours, plain_norm(x, dy), exact_norm(x, dy))


def test_a_panel_that_does_not_fit_the_cache(device, two_times_rule):
    card = Card("sm_90", "cuda", 90, 32, 232_448, l2_cache=3 * 40 * 256)
    x, dy = draw(40, 520, dtype=torch.bfloat16), draw(40, 600, dtype=torch.bfloat16, seed=1)
    assert len(panels.plan([(x, dy)], card, 128, 256)) > 1
    with recording(card):
        ours = weight_grad_norm_sq(x.to(device), dy.to(device), method="tiles")
    two_times_rule("panels", ours, plain_norm(x, dy), exact_norm(x, dy))


def test_a_run_repeats_bit_for_bit(device):
    x, dy = (
        draw(128, 100, dtype=torch.bfloat16).to(device),
        draw(128, 90, dtype=torch.bfloat16, seed=1).to(device),
    )
    for method in ("tiles", "gram"):
        first, second = (weight_grad_norm_sq(x, dy, method=method) for _ in range(2))
        assert torch.equal(first, second)


@DTYPES
@SETTINGS
@given(tokens=st.integers(0, 40), dim=st.integers(1, 128), rows=st.integers(1, 40), seed=st.integers(0, 999))
@example(tokens=60, dim=40, rows=1, seed=0)  # one index throughout
@example(tokens=3, dim=600, rows=40, seed=0)  # more than one block of columns
def test_embedding_and_bias_norms(device, guarded, two_times_rule, dtype, tokens, dim, rows, seed):
    dy = draw(tokens, dim, dtype=dtype, seed=seed)
    indices = torch.randint(0, rows, (tokens,), generator=torch.Generator().manual_seed(seed))

    def gradient(as_dtype: torch.dtype) -> Tensor:
        return torch.zeros(rows, dim, dtype=as_dtype).index_add_(0, indices, dy.to(as_dtype))

    exact, plain = gradient(torch.float64).square().sum(), gradient(dtype).float().square().sum()
    given_dy = guarded(dy)
    two_times_rule("embedding", embedding_grad_norm_sq(indices.to(device), given_dy), plain, exact)
    plain = dy.sum(0).float().square().sum()
    two_times_rule("bias", bias_grad_norm_sq(given_dy), plain, dy.double().sum(0).square().sum())


@DTYPES
def test_embedding_and_bias_norms_of_rows_apart(device, dtype):
    dy, indices = draw(30, 40, dtype=dtype).to(device), (torch.arange(30) % 7).to(device)
    apart = gapped(dy.cpu(), device)
    assert torch.equal(bias_grad_norm_sq(apart), bias_grad_norm_sq(dy))
    assert torch.equal(embedding_grad_norm_sq(indices.int(), apart), embedding_grad_norm_sq(indices, dy))


@DTYPES
@pytest.mark.parametrize("width", [2, 16, 300])
def test_sketch(device, guarded, two_times_rule, dtype, width):
    x, dy, omega = (
        draw(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate([(70, 33), (70, 65), (33, width)])
    )
    plain = (dy.T @ (x @ omega)).float().square().sum(0)
    exact = (dy.double().T @ (x.double() @ omega.double())).square().sum(0)
    estimate, error = weight_grad_norm_sq_sketch(guarded(x), guarded(dy), guarded(omega))
    two_times_rule("estimate", estimate, plain.mean(), exact.mean())
    # A spread of columns that are each off by a unit of roundoff is off by as much as they are large.
    slack = max(torch.finfo(dtype).eps, 1e-5) * exact.square().mean().sqrt() / width**0.5
    assert (error.cpu() - exact.std() / width**0.5).abs() <= slack


# Llama-3.1-8B at 4,096 tokens.
HIDDEN, KEYS, WIDTH = 4096, 1024, 14336
PROJECTIONS = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, WIDTH), (WIDTH, HIDDEN)]


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def moved(record) -> int:
    return sum(launch.traffic.read + launch.traffic.written for launch in record.launches)


@pytest.mark.parametrize(("in_features", "out"), PROJECTIONS)
def test_bytes_are_near_the_least_possible(in_features, out):
    x, dy = meta(4096, in_features), meta(4096, out)
    with recording(CARDS["sm_90"]) as recorded:
        grad_norm.weight_grad_norm_sq(x, dy, "auto")
    assert moved(recorded) <= 1.15 * (x.nbytes + dy.nbytes)


def layer(hidden: int, keys: int, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """What q, k, v, o, gate, up and down of a layer read, and the gradients of what they return."""
    x, attended, normed, product = (meta(4096, n) for n in (hidden, hidden, hidden, width))
    dys = [meta(4096, n) for n in (hidden, keys, keys, hidden, width, width, hidden)]
    return [x, x, x, attended, normed, normed, product], dys


def test_bytes_of_a_layer_are_near_the_least_possible():
    xs, dys = layer(HIDDEN, KEYS, WIDTH)
    with recording(CARDS["sm_90"]) as recorded:
        grad_norm.weight_grad_norms_sq(xs, dys)
    assert len(recorded.launches) == 2
    distinct = {id(t): t.nbytes for t in (*xs, *dys)}
    assert moved(recorded) <= 1.15 * sum(distinct.values())


def simulated_bytes(segments: list[panels.Segment], card: Card, blocks: dict[str, int]) -> int:
    """Bytes from device memory when waves of programs walk the tokens in step over a least-recently-used cache."""
    a, b, step = blocks["BLOCK_A"], blocks["BLOCK_B"], 4 * blocks["BLOCK_T"]
    # An operand may be streamed for one pair and stay for the next: both divide it into the same pieces.
    unit = math.gcd(a, b)
    tiles = []

    def pieces_of(tensor: Tensor, first: int, width: int) -> list[tuple[int, int]]:
        return [(id(tensor), column) for column in range(first // unit, (first + width) // unit)]

    for s in segments:
        rows, across = -(-s.streamed.shape[1] // a), -(-s.resident.shape[1] // b)
        panel = s.resident.storage_offset()
        for first in range(0, rows, panels.GROUP):
            group = range(first, min(first + panels.GROUP, rows))
            tiles += [
                pieces_of(s.streamed, row * a, a) + pieces_of(s.whole, panel + column * b, b)
                for column in range(across)
                for row in group
            ]
    held: OrderedDict = OrderedDict()
    used = missed = 0
    for start in range(0, len(tiles), card.multiprocessors):
        # Programs of a wave that read the same piece do so at the same time.
        pieces = dict.fromkeys(
            piece for tile in tiles[start : start + card.multiprocessors] for piece in tile
        )
        for token in range(0, segments[0].streamed.shape[0], step):
            for piece in pieces:
                key, size = (piece, token), 2 * step * unit
                if key in held:
                    held.move_to_end(key)
                    continue
                held[key], used, missed = size, used + size, missed + size
                while used > card.l2_cache:
                    used -= held.popitem(last=False)[1]
    return missed


@pytest.mark.parametrize(
    ("hidden", "keys", "width"),
    [(2048, 512, 8192), (3072, 1024, 8192), (HIDDEN, KEYS, WIDTH), (8192, 1024, 29568)],
)
def test_bytes_stated_are_those_of_a_cache_in_that_order(hidden, keys, width):
    card = CARDS["sm_90"]
    blocks, _ = grad_norm.tile_blocks(card, 2, aligned=True)
    pairs = list(zip(*layer(hidden, keys, width), strict=True))
    for some in (pairs, pairs[:4], *([pair] for pair in pairs)):
        segments = panels.plan(some, card, blocks["BLOCK_A"], blocks["BLOCK_B"])
        assert simulated_bytes(segments, card, blocks) <= 1.05 * panels.bytes_read(
            segments, card, blocks["BLOCK_A"], blocks["BLOCK_B"]
        )


@pytest.mark.parametrize("share", [1.0, 0.9])
@pytest.mark.parametrize("linears", [4, 7])  # Mixtral's attention; a layer of Llama
def test_the_order_of_panels_spares_memory_also_in_a_smaller_cache(linears, share):
    card = CARDS["sm_90"]
    blocks, _ = grad_norm.tile_blocks(card, 2, aligned=True)
    pairs = list(zip(*layer(HIDDEN, KEYS, WIDTH), strict=True))[:linears]
    ordered = panels.plan(pairs, card, blocks["BLOCK_A"], blocks["BLOCK_B"])
    as_given = sorted(ordered, key=lambda segment: segment.pair)
    smaller = replace(card, l2_cache=int(share * card.l2_cache))
    assert simulated_bytes(ordered, smaller, blocks) < 0.97 * simulated_bytes(as_given, smaller, blocks)
