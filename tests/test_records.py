import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaq.errors import BudgetError, ChoiceError, PlanError
from alphaq.nouns.choice import Choice
from alphaq.nouns.plan import Plan
from alphaq.nouns.settings import Budget, PlanConfig, parse_size
from alphaq.planning import resolve

groups, signs = st.sampled_from((32, 64, 128)), st.booleans()
choices = (
    st.builds(Choice, st.integers(1, 8), groups, signs)
    | st.builds(Choice, st.integers(2, 7), groups, signs, mix=st.just("slim"))
    | st.builds(Choice, st.just(1), groups, signs, mix=st.sampled_from(("pb2", "pb4", "pb8")))
    | st.just(Choice(16))
)


@given(choices)
def test_choice_text_round_trips(choice: Choice) -> None:
    assert Choice.parse(str(choice)) == choice


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        # header 16 + codes 4·1408·⌈2048·3/32⌉ + zero points 4·16·⌈1408·3/32⌉ + scales 2·1408·16
        ("3g128", (1408, 2048), 16 + 4 * 1408 * 192 + 4 * 16 * 132 + 2 * 1408 * 16),
        ("4g128s", (1408, 2048), 16 + 4 * 1408 * 256 + 2 * 1408 * 16),
        ("1g64", (256, 256), 16 + 4 * 256 * 8 + 2 * 256 * 4 + 2 * 256 * 4),
        ("2g32", (3, 33), 80),  # 16 + 4·3·3 + 4·2·1 + 2·3·2 = 72, padded to a multiple of 16
        ("16", (3, 5), 30),
        # as 2g128, and 16 widths
        ("2g128-slim", (1408, 2048), 16 + 4 * 1408 * 128 + 4 * 16 * 88 + 2 * 1408 * 16 + 16),
        ("3g32-slim", (3, 33), 112),  # 16 + 4·3·4 + 4·2·3 + 2·3·2 + 2 = 102
        # as 1g128, and 4 positions, 4 values and a scale for each of 16 groups
        ("1g128-pb4", (1408, 2048), 16 + 4 * 1408 * 64 + 4 * 1408 * 16 + 1408 * 16 * 10),
        ("1g64s-pb8", (3, 65), 176),  # 16 + 4·3·3 + 0 + 2·3·2 + 3·2·18 = 172
    ],
)
def test_storage_bytes_count_everything(text: str, shape: tuple[int, int], expected: int) -> None:
    assert Choice.parse(text).storage_bytes(shape) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "9", "3g", "3g100", "16g64", "x", "-3", "3g64x", "16s"),
        *("2g64-", "2-fat", "1-slim", "8g128-slim", "9-slim", "2-pb4", "1-pb5", "1g100-pb4", "16-slim", "Q4_K-slim"),
    ],
)
def test_bad_choice_is_refused_with_the_alternatives(text: str) -> None:
    with pytest.raises(ChoiceError, match=r"Available|Write|write"):
        Choice.parse(text)


def test_a_ggml_type_has_no_mix() -> None:
    with pytest.raises(ChoiceError, match="Q4_K has no widths to mix"):
        Choice(4, 256, scheme="Q4_K", mix="slim")


def test_a_mix_takes_the_usual_group_and_symmetry() -> None:
    assert str(Choice.parse("2-slim")) == "2g128-slim"
    assert str(Choice.parse("1-pb8", 32, symmetric=True)) == "1g32s-pb8"
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
