"""The LoRA group in Triton equals its definition, forward and every gradient."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import triton
from aletheia_kernels.triton import lora
from aletheia_kernels.triton.cards import CARDS
from aletheia_kernels.triton.launch import recording
from tests.drawn import DTYPES
from tests.lora_case import Case


def check(case: Case, ours: dict[str, Tensor], dtype: torch.dtype, rule) -> None:
    plain, exact = case.plain(dtype), case.plain(torch.float64)
    for name in exact:
        rule(name, ours[name], plain[name], exact[name])


@DTYPES
@settings(max_examples=4)
@given(
    tokens=st.integers(0, 100),
    features=st.integers(1, 100),
    group=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 70), st.booleans()), min_size=1, max_size=3),
    dropout_p=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**31),
)
@example(tokens=0, features=33, group=[(5, 1, True), (7, 300, False)], dropout_p=0.5, seed=0)
@example(tokens=1, features=1, group=[(1, 1, False)], dropout_p=0.0, seed=1)
@example(tokens=70, features=36, group=[(33, 300, True), (17, 1, False)], dropout_p=0.0, seed=2)
@example(
    tokens=96, features=64, group=[(64, 8, False), (32, 64, False), (32, 16, False)], dropout_p=0.1, seed=3
)
@example(tokens=65, features=67, group=[(33, 3, True)], dropout_p=0.5, seed=4)
def test_equals_the_definition(guarded, two_times_rule, dtype, tokens, features, group, dropout_p, seed):
    case = Case.draw(tokens, features, group, dtype, dropout_p, seed)
    check(case, case.ours(guarded), dtype, two_times_rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_wide_master_adapters_get_gradients_in_their_own_dtype(guarded, two_times_rule, dtype):
    case = Case.draw(80, 96, [(80, 8, True), (48, 40, False)], dtype, dropout_p=0.1)
    ours = case.ours(guarded, adapters=torch.float32)
    check(case, ours, dtype, two_times_rule)
    for name, value in ours.items():
        assert value.dtype == (torch.float32 if name[:2] in ("dA", "dB") else dtype)


@DTYPES
def test_strides(guarded, two_times_rule, dtype):
    case = Case.draw(50, 44, [(36, 5, False), (20, 17, True)], dtype, dropout_p=0.5)
    rows_apart = guarded(torch.cat((case.x, case.x), dim=1))[:, :44]
    columns_apart = guarded(case.x.T.contiguous()).T
    dys = [guarded(torch.cat((dy, dy), dim=1))[:, : dy.shape[1]] for dy in case.dys]
    for x in (rows_apart, columns_apart):
        check(case, case.ours(guarded, x=x, dys=dys), dtype, two_times_rule)


def test_a_gradient_of_one_row_for_all_rows(guarded, two_times_rule):
    """What the sum of an output hands back: rows of stride 0."""
    case = Case.draw(40, 32, [(24, 5, False)], torch.float32)
    row = guarded(case.dys[0][:1])
    case.dys[0] = case.dys[0][:1].expand(40, 24)
    check(case, case.ours(guarded, dys=[row.expand(40, 24)]), torch.float32, two_times_rule)


def test_one_projection_of_rank_zero_in_a_group(guarded, two_times_rule):
    case = Case.draw(40, 32, [(24, 0, False), (16, 9, False)], torch.float32)
    check(case, case.ours(guarded), torch.float32, two_times_rule)


def test_many_rows_are_summed_over_parts(guarded, two_times_rule):
    case = Case.draw(2100, 20, [(18, 3, False)], torch.float32)
    with recording(CARDS["sm_90"]) as kept:
        ours = case.ours(guarded)
    check(case, ours, torch.float32, two_times_rule)
    parts = {launch.name: launch.grid[1] for launch in kept.launches if launch.name in ("lora_dy", "lora_dx")}
    assert parts["lora_dy"] > 1
    assert parts["lora_dx"] > 1


def test_many_columns_are_summed_over_parts(guarded, two_times_rule):
    case = Case.draw(9, 2100, [(18, 3, False), (7, 6, False)], torch.bfloat16, dropout_p=0.1)
    with recording(CARDS["sm_90"]) as kept:
        ours = case.ours(guarded)
    check(case, ours, torch.bfloat16, two_times_rule)
    assert kept.launches[0].name == "lora_shrink"
    assert kept.launches[0].grid[2] > 1


@pytest.mark.parametrize("card", ["sm_90", "sm_120", "gfx942", "gfx1100"])
def test_the_block_sizes_of_every_kind_of_card(guarded, two_times_rule, card):
    case = Case.draw(66, 48, [(64, 24, False), (16, 128, True)], torch.bfloat16, dropout_p=0.1)
    with recording(CARDS[card]):
        ours = case.ours(guarded)
    check(case, ours, torch.bfloat16, two_times_rule)


def test_nothing_is_written_past_the_outputs(guarded, monkeypatch):
    """Every buffer that a launcher allocates lies between margins, and they are still NaN when it is done."""
    case = Case.draw(45, 37, [(33, 5, True), (18, 20, False)], torch.bfloat16, dropout_p=0.2)
    storages: list[tuple[Tensor, int]] = []
    new_empty = Tensor.new_empty

    def guarded_empty(self, *size, dtype=None, **options):
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, torch.Size)) else size)
        count, dtype = shape.numel(), dtype or self.dtype
        if options or not count:  # not a launcher's
            return new_empty(self, shape, dtype=dtype, **options)
        storage = new_empty(self, count + 2 * 4096, dtype=dtype).fill_(float("nan"))
        storages.append((storage, count))
        return storage[4096 : 4096 + count].view(shape)

    monkeypatch.setattr(Tensor, "new_empty", guarded_empty)
    case.ours(guarded, adapters=torch.float32)
    monkeypatch.undo()
    assert len(storages) > 6
    for storage, count in storages:
        assert storage[:4096].isnan().all()
        assert storage[4096 + count :].isnan().all()


def test_outputs_of_the_vendor_library_are_added_to_within_their_bounds(guarded):
    h, lora_B = guarded(torch.randn(45, 5)), guarded(torch.randn(33, 5))
    y = guarded(torch.zeros(45, 33))
    lora.expand(h, [lora_B], [2.0], [y])
    torch.testing.assert_close(y, 2.0 * h @ lora_B.T, rtol=1e-5, atol=1e-5)
    storage = torch.empty(0, device=y.device).set_(y.untyped_storage())
    assert storage[: y.storage_offset()].isnan().all()
    assert storage[y.storage_offset() + y.numel() :].isnan().all()


def test_two_runs_agree_bit_for_bit(guarded):
    case = Case.draw(70, 40, [(30, 6, False), (20, 20, False)], torch.bfloat16, dropout_p=0.1)
    first, second = case.ours(guarded), case.ours(guarded)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_caller_s_tensors_are_left_as_they_were(guarded):
    case = Case.draw(33, 40, [(30, 6, True)], torch.float32)
    placed: list[tuple[Tensor, Tensor]] = []

    def place(tensor: Tensor) -> Tensor:
        put = guarded(tensor)
        placed.append((put, tensor))
        return put

    case.ours(place)
    for put, original in placed:
        assert torch.equal(put.cpu(), original)


def test_scaling_and_dropout_make_no_other_kernel():
    def compiled(scaling: float, dropout_p: float) -> list[tuple]:
        x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
        weights = [torch.empty(48, 64, dtype=torch.bfloat16, device="meta")]
        lora_As = [torch.empty(8, 64, device="meta")]
        lora_Bs = [torch.empty(48, 8, device="meta")]
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        with recording(CARDS["sm_90"]) as kept:
            lora.lora_group_forward(x, weights, [None], lora_As, lora_Bs, [scaling], dropout_p, seed)
        return [(launch.name, sorted(launch.constants.items()), launch.options) for launch in kept.launches]

    assert compiled(0.5, 0.1) == compiled(2.0, 0.5)


def distinct_bytes(touched: list[tuple[numpy.ndarray, int]]) -> int:
    """Of accesses to addresses, each with its size in bytes."""
    return sum(
        size * len(numpy.unique(numpy.concatenate([a for a, s in touched if s == size])))
        for size in {s for _, s in touched}
    )


def test_the_bytes_declared_are_those_that_launches_touch(monkeypatch):
    """Of the elements that a launch's masks let through, in a case where the grid makes one pass over each tensor."""
    if not triton.interpreted():
        pytest.skip("counts what the interpreter loads")
    from triton.runtime.interpreter import InterpreterBuilder

    case = Case.draw(60, 64, [(48, 16, False), (32, 8, False)], torch.bfloat16, dropout_p=0.1)
    read: dict[int, list] = {}
    written: dict[int, list] = {}
    kept_launches: list = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(where: dict[int, list], pointers, mask) -> None:
        addresses = pointers.data[mask.data.astype(bool)].ravel()
        size = pointers.get_element_ty().primitive_bitwidth // 8
        where.setdefault(len(kept_launches), []).append((addresses, size))

    def counting_load(self, pointers, mask, *rest):
        note(read, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        note(written, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    with recording(CARDS["sm_90"]) as kept:
        kept_launches = kept.launches
        case.ours(lambda t: t, adapters=torch.float32)
    assert [launch.name for launch in kept.launches] == [
        "lora_shrink",
        "lora_expand",
        "lora_dy",
        "lora_sum",
        "lora_dx",
    ]
    for index, launch in enumerate(kept.launches, start=1):
        seed = 8 if launch.arguments.get("seed") is not None else 0
        assert distinct_bytes(read[index]) == launch.traffic.read + seed, launch.name
        assert distinct_bytes(written[index]) == launch.traffic.written, launch.name
        streamed = [launch.arguments[name] for name in ("x", "dx") if name in launch.arguments]
        streamed += [t for name in ("ys", "dys") for t in launch.arguments.get(name, ())]
        for tensor in streamed:
            first = tensor.data_ptr()
            last = first + tensor.numel() * tensor.element_size()
            loads = sum(
                int(((addresses >= first) & (addresses < last)).sum()) for addresses, _ in read[index]
            )
            assert loads == tensor.numel(), (
                f"{launch.name} loads a tensor of {tensor.numel()} elements {loads} times"
            )
