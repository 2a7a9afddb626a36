"""The page shows what the command counts, and what it shows holds together."""

from __future__ import annotations

import pytest

from benchmarks import roofline
from benchmarks.predicted_step import layers
from benchmarks.traffic import RATES, total_flops


@pytest.fixture(scope="module")
def counted() -> list[roofline.Row]:
    return list(roofline.rows())


def test_the_page_has_the_tables_that_the_command_makes(counted):
    tables = roofline.PAGE.read_text().split(roofline.BEGIN)[1].split(roofline.END)[0]
    assert tables == roofline.markdown(counted), (
        "docs/roofline.md is stale: python benchmarks/roofline.py --markdown docs/roofline.md"
    )


def test_writing_the_page_leaves_its_words(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{roofline.BEGIN}old\n{roofline.END}after\n")
    roofline.write_page(page, "new\n")
    assert page.read_text() == f"before\n{roofline.BEGIN}new\n{roofline.END}after\n"


def test_every_time_is_marked_as_predicted(counted):
    timed = [heading for heading in (*roofline.HEADINGS, *roofline.STEP_HEADINGS) if " ms" in heading]
    assert all("predicted" in heading for heading in timed)
    figures = roofline.figures(counted)
    seconds = [key for row in figures["operators"].values() for key in row if key.endswith("_s")]
    assert all("predicted" in key for key in seconds)


def test_every_model_and_choice_of_ranks_is_there(counted):
    names = set(roofline.figures(counted)["operators"])
    for model in ("llama-3.2-1b", "llama-3.1-8b", "qwen2.5-72b", "mixtral-8x7b"):
        own = "lora_experts" if model.startswith("mixtral") else "lora_gated_mlp"
        for ranks in ("r16", "r64", "mixed"):
            assert {f"{model}/{ranks}/lora_group", f"{model}/{ranks}/{own}"} <= names
        assert f"{model}/weight_grad_norms_sq" in names


def test_nothing_moves_less_than_the_least(counted):
    for row in counted:
        figures = row.figures
        assert figures["least_bytes"] <= figures["bytes"] < figures["peft_bytes"], row.name


def test_the_lora_group_moves_hardly_more_than_the_least(counted):
    ratios = {
        row.name: row.figures["bytes"] / row.least for row in counted if row.name.endswith("lora_group")
    }
    assert len(ratios) == 12
    # Its k and v are 512 wide, an eighth of which is the rank: sums in parts are a larger share there.
    narrow = ratios.pop("llama-3.2-1b/r64/lora_group")
    assert narrow < 1.16
    assert max(ratios.values()) <= 1.15, ratios


def test_a_gradient_norm_moves_hardly_more_than_the_least_unless_bound_by_arithmetic(counted):
    h100 = RATES[0]
    for row in counted:
        if row.name.endswith("weight_grad_norms_sq"):
            by_arithmetic = total_flops(row.around) / h100.flops > 2 * row.figures["bytes"] / h100.bandwidth
            assert row.figures["bytes"] <= 1.15 * row.least or by_arithmetic, row.name


def test_a_layer_of_llama_trains_the_parameters_that_are_known():
    forms = layers(roofline.STEP_SHAPE, 16)
    # PEFT says so of Llama-3.1-8B with rank 16 on all linears: 41,943,040 in 32 layers.
    assert forms["ours"].parameters == forms["peft"].parameters == 41_943_040 // 32
    assert forms["below"].parameters == 0
    # 218 million weights a layer, 2 FLOPs each a token; the backward forms as many again for the input.
    assert total_flops(forms["below"].costs) / (2 * 218_103_808 * 4096) == pytest.approx(1, abs=0.05)
    assert total_flops(forms["ours"].costs) / total_flops(forms["below"].costs) == pytest.approx(2, abs=0.1)


def test_a_step_of_the_upper_half_is_shorter_and_ours_shorter_than_pefts():
    for rate in RATES:
        seconds = roofline.steps(rate)
        for form in ("ours", "peft", "peft_bf16"):
            assert seconds[f"{form}, upper half"] < seconds[f"{form}, uniform"]
        assert seconds["ours, uniform"] < seconds["peft_bf16, uniform"] < seconds["peft, uniform"]
