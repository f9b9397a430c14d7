import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaq.errors import ChoiceError
from alphaq.formats.table import format_of, parse_choice, plain_choice, rate_of, storage_bytes, stored_choice
from alphaq.nouns.choice import Choice

groups, signs = st.sampled_from((32, 64, 128)), st.booleans()
choices = (
    st.builds(Choice, st.integers(1, 8), groups, signs)
    | st.builds(parse_choice, st.sampled_from([f"{bits}-slim" for bits in range(2, 8)]), groups, signs)
    | st.builds(parse_choice, st.sampled_from(("1-pb2", "1-pb4", "1-pb8")), groups, signs)
    | st.just(Choice(16))
)


@given(choices)
def test_choice_text_round_trips(choice: Choice) -> None:
    assert parse_choice(str(choice)) == choice


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
    assert storage_bytes(parse_choice(text), shape) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "9", "3g", "3g100", "16g64", "x", "-3", "3g64x", "16s"),
        *("2g64-", "2-fat", "1-slim", "8g128-slim", "9-slim", "2-pb4", "1-pb5", "1g100-pb4", "16-slim", "Q4_K-slim"),
    ],
)
def test_bad_choice_is_refused_with_the_alternatives(text: str) -> None:
    with pytest.raises(ChoiceError, match=r"Available|Write|write"):
        parse_choice(text)


def test_bits_alone_mean_plain_groups() -> None:
    assert [plain_choice(bits) for bits in (1, 3, 16)] == [Choice(1, 128), Choice(3, 128), Choice(16)]
    for bits in (-1, 0, 9, 100):
        with pytest.raises(ChoiceError, match=f"{bits} bits cannot be stored"):
            plain_choice(bits)


def test_a_choice_that_no_format_made_is_refused() -> None:
    with pytest.raises(ChoiceError, match="is of no format"):
        format_of(Choice(4, 128, name="4g128-toy"))


def test_a_rate_is_no_part_of_what_is_stored() -> None:
    assert rate_of(parse_choice("@2.75")) == 2.75
    assert stored_choice(parse_choice("@2.75")) == Choice(4, 128, symmetric=True)
    assert rate_of(Choice(4, 128)) == 0


def test_other_groups_leave_the_kind_as_it_is() -> None:
    found = {
        text: str(format_of(choice).regrouped(choice, 32, symmetric=True))
        for text in ("3", "1", "2-slim", "1-pb4", "4-nest", "@2.75", "16", "Q4_K")
        if (choice := parse_choice(text))
    }
    assert found == {
        "3": "3g32s",
        "1": "1g32s",
        "2-slim": "2g32s-slim",
        "1-pb4": "1g32s-pb4",
        "4-nest": "4g32-nest",
        "@2.75": "4g32s@2.75",
        "16": "16",
        "Q4_K": "Q4_K",
    }
    with pytest.raises(ChoiceError, match="Group size 48"):
        format_of(Choice(3, 64)).regrouped(Choice(3, 64), 48, symmetric=False)


def test_choices_sort_by_bits_then_groups_then_symmetry() -> None:
    texts = ["1g32", "1g32s", "2g128", "2g128-nest", "3g32", "3g64", "3g64-slim", "3g64s", "4g128s@2.5", "16"]
    assert [str(choice) for choice in sorted(parse_choice(text) for text in reversed(texts))] == [
        *("1g32", "1g32s", "2g128", "2g128-nest", "3g32", "3g64", "3g64-slim", "3g64s", "4g128s@2.5", "16")
    ]
