"""How matrices are rounded: by a quantizer alone, or by one that looks at their inputs too."""

from __future__ import annotations

from dataclasses import dataclass

from alphaq.calibration.text import SELF, Text
from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.output import QuantizeOptions
from alphaq.engines.profiles import profile
from alphaq.errors import AlphaQError, PlanError
from alphaq.quantizers.base import FORMERLY, QUANTIZERS, looks_at_inputs, offered
from alphaq.registry import unknown

ENOUGH, MOST = 2, 131_072  # tokens for each column of an average expert; tokens, unless asked for otherwise


def enough_tokens(checkpoint: Checkpoint) -> int:
    """How many tokens give the experts' inputs more tokens than columns, as far as they are used alike."""
    experts = checkpoint.architecture.experts_per_layer(checkpoint.config)
    chosen = int(checkpoint.text_config.get("num_experts_per_tok") or 1)
    columns = max(matrix.shape[1] for matrix in checkpoint.planned)
    return min(max(Text.tokens, ENOUGH * columns * max(1, experts) // chosen), MOST)


@dataclass(frozen=True)
class Rounding:
    """`plain` needs no inputs, `by_inputs` improves on it; names in QUANTIZERS."""

    plain: str
    by_inputs: str | None = None
    inputs: Text | None = None
    coded: bool = False
    """Whether codes will be entropy-coded, and may then take no more bytes than those of `plain`."""

    @classmethod
    def of(cls, engine: str, name: str | None = None, inputs: Text | None = None) -> Rounding:
        """What a user means by a quantizer's name; the engine's usual one without. Raises PlanError, AlphaQError."""
        usual = profile(engine).quantizer
        if name in FORMERLY:
            raise AlphaQError(f"Quantizer {name} is called {FORMERLY[name]} now. Use --quantizer {FORMERLY[name]}.")
        if looks_at_inputs(name) and not profile(engine).writer.takes_roundings:
            raise PlanError(
                f"Quantizer {name} cannot be used for {engine}, whose types llama.cpp's own code rounds. Drop it, or "
                "give --imatrix."
            )
        if name is not None and name not in (known := offered(usual)):
            raise AlphaQError(unknown(f"quantizer of engine {engine}", name, known))
        if not looks_at_inputs(name):
            if inputs is not None:
                raise AlphaQError(f"--calibration does nothing for quantizer {name or usual}. Drop it.")
            return cls(name or usual)
        return cls(usual, name, inputs or Text(SELF))

    @property
    def name(self) -> str:
        """The quantizer, as users call it."""
        return self.by_inputs or self.plain

    def options(self, engine: str, pre_tokenizer: str | None = None) -> QuantizeOptions:
        """What a user types for it."""
        usual = self == Rounding.of(engine)
        return QuantizeOptions(
            quantizer=None if usual else self.name,
            calibration=None if self.inputs is None else self.inputs.name,
            calibration_tokens=None if self.inputs is None else self.inputs.tokens,
            pre_tokenizer=pre_tokenizer,
        )

    def __str__(self) -> str:
        """Tells apart what leaves other bytes."""
        coded = "coded" if self.coded else ""
        parts = (self.by_inputs, self.plain, self.inputs, QUANTIZERS[self.plain].version, coded)
        return " ".join(str(part) for part in parts if part)


def check_codable(rounding: Rounding, engine: str) -> None:
    """PlanError if an engine reads no coded tensors, or if what a quantizer's codes take once coded cannot be held to
    what a plan says."""
    if not profile(engine).writer.codable:
        raise PlanError(f"{engine} reads no coded tensors. Drop --codec, or use --engine native.")
    if rounding.plain != profile(engine).quantizer or not QUANTIZERS[rounding.name].coded_size_known:
        raise PlanError(
            f"What codes of quantizer {rounding.name} will take is not known to a plan. Use --quantizer gptq, or "
            "quantize without --codec and code the result with `alphaq recode`."
        )
