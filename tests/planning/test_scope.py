"""What a request decides of a checkpoint: every matrix is planned, joined, fixed or left, and only one of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import BudgetError
from alphaq.nouns.matrix import Role
from alphaq.nouns.settings import Budget, PlanConfig, Rule
from alphaq.planning import Scope, resolve

SIZE = Budget(size_bytes=6_000_000)


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def scope_of(checkpoint: Checkpoint, *pins: str, **settings: object) -> Scope:
    rules = tuple(Rule.parse(pin, "--pin") for pin in pins)
    config = {"budget": Budget(bits=3.5), "engine": "llama.cpp", "choices": "Q2_K,Q4_K,Q8_0", "pins": rules}
    return Scope.of(checkpoint, resolve(PlanConfig.model_validate(config | settings)))


@pytest.mark.parametrize("budget", [Budget(bits=3.5), SIZE], ids=["bits", "size"])
def test_every_matrix_has_one_place(checkpoint: Checkpoint, budget: Budget) -> None:
    scope = scope_of(checkpoint, "attention=Q6_K", budget=budget, head_bits=8)
    planned, joined = ({matrix.name for matrix in matrices} for matrices in (scope.planned, scope.joined))
    assert not planned & joined and not (planned | joined) & scope.fixed.keys()
    quantizable = scope.request.profile.roles | {Role.EXPERT}
    assert planned | joined | scope.fixed.keys() == {m.name for m in checkpoint.matrices if m.role in quantizable}
    assert bool(joined) == (budget is SIZE)
    roles = {matrix.name: matrix.role for matrix in checkpoint.matrices}
    by_role = {roles[name]: str(choice) for name, choice in scope.fixed.items()}
    assert by_role[Role.ATTENTION] == "Q6_K" and by_role[Role.HEAD] == "Q8_0"


def test_of_two_pins_the_later_holds(checkpoint: Checkpoint) -> None:
    name = checkpoint.planned[0].name
    scope = scope_of(checkpoint, "expert=Q4_K", f"{name}=Q8_0")
    assert str(scope.pinned[name]) == "Q8_0"
    assert {str(choice) for other, choice in scope.pinned.items() if other != name} == {"Q4_K"}
    assert {str(choice) for choice in scope.open_to(checkpoint.planned[0])} == {"Q8_0"}


def test_a_pin_that_names_nothing_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BudgetError, match=r"--pin 'nothing' names no matrix"):
        scope_of(checkpoint, "nothing=Q4_K")


def test_what_rows_do_not_fit_is_not_open(save_family: Callable[..., Path]) -> None:
    narrow = open_checkpoint(save_family("mixtral"))
    scope = scope_of(narrow, choices="Q4_0,Q4_K,Q8_0")
    for matrix in scope.planned:
        whole = matrix.shape[1] % 256 == 0
        assert {str(choice) for choice in scope.open_to(matrix)} == {"Q4_0", "Q8_0"} | ({"Q4_K"} if whole else set())
