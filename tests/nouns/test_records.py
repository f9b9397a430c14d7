import pytest

from alphaq.errors import BudgetError, PlanError
from alphaq.formats.table import parse_choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.nouns.sizes import parse_size, show_size
from alphaq.planning import resolve


def test_a_mix_takes_the_usual_group_and_symmetry() -> None:
    assert str(parse_choice("2-slim")) == "2g128-slim"
    assert str(parse_choice("1-pb8", 32, symmetric=True)) == "1g32s-pb8"
    request = resolve(PlanConfig(budget=Budget(bits=2), choices="1,1-pb8,2,2-slim", group_size=64))
    assert [str(choice) for choice in request.choices] == ["1g64", "1g64-pb8", "2g64", "2g64-slim"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9.5MiB", 9961472),
        ("12GiB", 12 * 2**30),
        ("800MB", 800_000_000),
        ("1024", 1024),
        ("1 kib", 1024),
        ("2G", 2**31),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "abc", "12XB", "-1GiB", "1e9"])
def test_bad_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("given_budget", [{}, {"bits": 2.5, "bpw": 3.0}, {"bits": 2.0, "size": "1MiB"}])
def test_budget_is_stated_exactly_once(given_budget: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match="exactly once"):
        Budget.of(**given_budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [0, -1, float("nan"), float("inf")])
def test_senseless_bits_are_refused(bits: float) -> None:
    with pytest.raises(BudgetError, match="--bits"):
        Budget.of(bits=bits)


def test_candidates_are_sorted_and_unique() -> None:
    request = resolve(PlanConfig(budget=Budget(bits=2), choices="4, 2,2,3g64", group_size=32))
    assert [str(choice) for choice in request.choices] == ["2g32", "3g64", "4g32"]


def test_plan_round_trips_and_is_stable() -> None:
    plan = Plan(choices={"b": "2g64", "a": "3g128"}, assignment={"b": 2}, average_bits=2.0)
    assert Plan.from_json(plan.to_json(), "here") == plan
    assert Plan.from_json(plan.to_json(), "here").to_json() == plan.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"choices": {}}',
        '{"choices": {"a": "9"}}',
        '{"choices": {"a": "2"}, "assignment": {"a": 3}}',
        '{"choices": {"a": "2"}, "assignment": {"b": 2}}',
        '{"choices": {"a": "2"}, "format_version": 99}',
        '{"choices": {"a": "2"}, "extra": 1}',
    ],
)
def test_bad_plan_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(PlanError, match=r"^p\.json is not a valid plan: [^\n]+\.$"):
        Plan.from_json(text, "p.json")


@pytest.mark.parametrize("text", ["16GiB", "16GB", "15.5GiB", "800MB", "64MiB", "8.25GiB", "123456789"])
def test_a_size_is_repeated_as_it_was_typed(text: str) -> None:
    assert show_size(parse_size(text)) == text
