import functools
import io
import re

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from alphaq.nouns.plan import Plan
from alphaq.report.bitmap import BLOCKS, alpha_histogram, bit_map


@functools.cache
def plan_of(layers: int, experts: int) -> Plan:
    bits = {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": 1 + (layer + expert) % 4
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    }
    return Plan(assignment=bits, choices={name: f"{value}g128" for name, value in bits.items()})


def console(width: int = 80, terminal: bool = False, **given: object) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=str(given.pop("encoding", "utf-8")))
    return Console(file=file, width=width, force_terminal=terminal, **given)  # type: ignore[arg-type]


def colours(text: Text) -> set[str]:
    return {str(span.style) for span in text.spans if str(span.style) not in ("bold", "")}


def test_a_cell_is_the_bits_of_layer_and_expert() -> None:
    lines = bit_map(plan_of(3, 8), console()).plain.splitlines()
    assert lines[1].split() == ["gate", "up", "down"]
    assert lines[2].split() == ["0", *["12341234"] * 3]
    assert lines[4].split() == ["2", *["34123412"] * 3]


def test_colour_terminals_get_blocks_whose_height_is_the_bits() -> None:
    found = bit_map(plan_of(2, 4), console(terminal=True, color_system="truecolor"))
    assert BLOCKS[:4] in found.plain
    assert len(colours(found)) == 4


@pytest.mark.parametrize("given", [{"no_color": True}, {"color_system": None}, {"encoding": "ascii"}])
def test_without_colour_or_blocks_there_are_digits(given: dict[str, object]) -> None:
    found = bit_map(plan_of(2, 4), console(terminal=True, **given)).plain
    assert "1234" in found
    assert not set(found) & set(BLOCKS)
    assert found.isascii()


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("shape", [(61, 384), (2, 5)])
def test_it_fits_any_terminal_and_says_what_is_pooled(width: int, shape: tuple[int, int]) -> None:
    text = bit_map(plan_of(*shape), console(width)).plain
    lines = text.splitlines()
    assert max(map(len, lines[:-1])) <= max(width, 43)
    if shape == (61, 384):
        assert len(lines) < 110
        assert re.search(r"mean of up to \d+ experts", text)
        assert "layers" in lines[-1]
    else:
        assert "mean" not in text


def test_pooled_cells_are_means_of_what_they_stand_for() -> None:
    bits = {f"layers.0.experts.{expert}.up.weight": (2 if expert < 64 else 4) for expert in range(128)}
    plan = Plan(assignment=bits, choices={name: f"{value}g128" for name, value in bits.items()})
    row = bit_map(plan, console(21)).plain.splitlines()[2].split()[1]
    assert row == "2" * (len(row) // 2) + "4" * (len(row) // 2)


def test_a_rate_with_a_fraction_is_drawn_as_the_bits_next_to_it() -> None:
    choices = {f"layers.0.experts.{number}.up.weight": f"t{rate}" for number, rate in enumerate((1, 1.75, 2.25, 3.75))}
    plan = Plan(assignment={name: float(text[1:]) for name, text in choices.items()}, choices=choices)
    digits = bit_map(plan, console()).plain.splitlines()
    assert digits[2].split()[1] == "1224" and digits[3].strip() == "a digit is bits to the nearest whole"
    blocks = bit_map(plan, console(terminal=True, color_system="truecolor"))
    assert len(colours(blocks)) == 3
    assert "1 bit" in blocks.plain and "1.75 to 2.25 bits" in blocks.plain and "3.75 bits" in blocks.plain


def dense_plan(layers: int) -> Plan:
    parts = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj")
    bits = {
        f"model.layers.{layer}.{part}.weight": 1 + (layer + row) % 4
        for row, part in enumerate(parts)
        for layer in range(layers)
    }
    return Plan(assignment=bits, choices={name: f"{value}g128" for name, value in bits.items()})


def test_a_model_without_experts_has_a_row_for_each_projection_and_a_cell_for_each_layer() -> None:
    lines = bit_map(dense_plan(12), console()).plain.splitlines()
    assert "expert" not in lines[0]
    assert [line.split() for line in lines[1:5]] == [
        ["gate", "234123412341"],
        ["up", "123412341234"],
        ["down", "341234123412"],
        ["q", "412341234123"],
    ]


def test_many_layers_without_experts_are_pooled() -> None:
    text = bit_map(dense_plan(120), console(60)).plain
    assert max(map(len, text.splitlines())) <= 60
    assert re.search(r"mean of up to \d+ layers", text)


def test_matrices_of_no_layer_have_no_cell() -> None:
    plan = Plan(assignment={"lm_head.weight": 6}, choices={"lm_head.weight": "Q6_K"})
    assert not bit_map(plan, console())


def test_bars_count_every_matrix() -> None:
    alphas = np.random.default_rng(0).normal(3, 0.4, 500).tolist()
    lines = alpha_histogram(alphas, console()).plain.splitlines()
    assert sum(int(line.rsplit(" ", 1)[1].replace(",", "")) for line in lines[1:-1]) == 500
    assert max(map(len, lines)) <= 80


def test_bars_are_ascii_where_the_terminal_is() -> None:
    assert alpha_histogram([2.0, 3.0, 3.1], console(encoding="ascii")).plain.isascii()


def test_there_are_no_bars_of_nothing() -> None:
    assert not alpha_histogram([], console())
    assert not alpha_histogram([2.0, 2.0], console())
