"""How fast an engine gets through weights, by the way in which they are stored.

Kernels are bound by memory for some formats and by arithmetic for others, so that each has its own rate:

    seconds per token = Σ bytes read ÷ rate of their format + layers · seconds of a layer + seconds of a token,

the last two for what takes its time whatever the weights: attention over few tokens, norms, routers, Python.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from alphaq.errors import BudgetError
from alphaq.nouns.sizes import parse_size

SECOND_NS = 10**9
_LAYER, _TOKEN = "layer", "token"
_TIMES = {"ns": 1, "us": 10**3, "ms": 10**6}


class Rates(BaseModel):
    """Bytes per second that are read of each format. memory: of all formats that have none of their own.

    formats: by choice, as it is written in plans; sorted. layer_ns, token_ns: nanoseconds of a layer and of a token
    beside. Written '24GB/s,Q4_K=19.5GB/s,layer=110us,token=400us', in plans too; '80GB/s' is one rate for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: int = Field(gt=0)
    formats: tuple[tuple[str, int], ...] = ()
    layer_ns: int = Field(default=0, ge=0)
    token_ns: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: object) -> object:
        """Plans hold the text, or a number where all formats have the same rate."""
        if isinstance(given, int):
            return {"memory": given}
        try:
            return cls.parse(given).__dict__ if isinstance(given, str) else given
        except BudgetError as error:
            raise ValueError(str(error)) from error

    @model_serializer
    def _text(self) -> str:
        return str(self)

    @classmethod
    def parse(cls, text: str) -> Rates:
        """The inverse of `str`. Raises BudgetError."""
        first, *rest = text.split(",")
        named = {name.strip(): rate for name, _, rate in (part.partition("=") for part in rest)}
        if len(named) < len(rest):
            raise BudgetError(f"--bandwidth {text!r} names a format twice. Name each once.")
        times = {name: _nanoseconds(named.pop(name, "0ns"), text) for name in (_LAYER, _TOKEN)}
        formats = tuple(sorted((name, _rate(rate, text)) for name, rate in named.items()))
        return cls(memory=_rate(first, text), formats=formats, layer_ns=times[_LAYER], token_ns=times[_TOKEN])

    def __str__(self) -> str:
        parts = [_show_rate(self.memory), *(f"{name}={_show_rate(rate)}" for name, rate in self.formats)]
        beside = ((_LAYER, self.layer_ns), (_TOKEN, self.token_ns))
        return ",".join([*parts, *(f"{name}={_show_time(time)}" for name, time in beside if time)])

    @property
    def words(self) -> str:
        """What counts, for people: one rate for all formats, or each one's own."""
        memory = f"{self.memory / 10**9:.4g} GB/s"
        if not self.formats:
            return memory
        own = ", ".join(f"{name} {rate / 10**9:.4g}" for name, rate in self.formats)
        beside = f"{self.layer_ns / 10**6:.3g} ms a layer and {self.token_ns / 10**6:.3g} ms a token beside"
        return f"{own} GB/s, all else {memory}, {beside}"

    def of(self, choice: str) -> int:
        """Bytes per second of a format."""
        return dict(self.formats).get(choice, self.memory)

    def renamed(self, written: Callable[[str], str]) -> Rates:
        """With formats as plans write them. Raises BudgetError where two are the same."""
        formats = tuple(sorted((written(name), rate) for name, rate in self.formats))
        if len(dict(formats)) < len(formats):
            raise BudgetError(f"--bandwidth {str(self)!r} names a format twice. Name each once.")
        return self.model_copy(update={"formats": formats})

    def unrated(self, reads: Mapping[str, int]) -> dict[str, float]:
        """Formats without a rate of their own where others have one, and their share of the bytes that are read."""
        own, total = dict(self.formats), sum(reads.values())
        return {name: nbytes / total for name, nbytes in reads.items() if own and nbytes and name not in own}

    def among(self, choices: Iterable[str]) -> Rates:
        """Without what says nothing of these choices."""
        wanted = set(choices)
        return self.model_copy(update={"formats": tuple(one for one in self.formats if one[0] in wanted)})

    def token_time_ns(self, reads: Mapping[str, int], layers: int) -> int:
        """Whole nanoseconds, rounded up, of a token that reads so many bytes by choice in so many layers."""
        read = sum(math.ceil(nbytes * SECOND_NS / self.of(choice)) for choice, nbytes in reads.items())
        return read + layers * self.layer_ns + self.token_ns


def _no_rate(text: str) -> BudgetError:
    return BudgetError(
        f"--bandwidth {text!r} is no rate of memory. Write for example --bandwidth 80GB/s, or "
        "80GB/s,Q4_K=60GB/s,layer=50us for formats with rates of their own; times are whole numbers of ns, us or ms."
    )


def _rate(text: str, whole: str) -> int:
    number, slash, second = text.partition("/")
    try:
        rate = parse_size(number)
    except BudgetError:
        rate = 0
    if rate < 1 or (slash and second.strip() != "s"):
        raise _no_rate(whole)
    return rate


def _show_rate(rate: int) -> str:
    texts = (f"{rate / 10**9:.{digits}f}GB" for digits in (0, 1, 2))
    return next((text for text in texts if parse_size(text) == rate), f"{rate}B") + "/s"


def _nanoseconds(text: str, whole: str) -> int:
    match = re.fullmatch(r"(\d{1,12})(ns|us|ms)", text.strip())
    if match is None:
        raise _no_rate(whole)
    return int(match[1]) * _TIMES[match[2]]


def _show_time(time: int) -> str:
    unit = next(unit for unit, factor in reversed(_TIMES.items()) if time % factor == 0)
    return f"{time // _TIMES[unit]}{unit}"
