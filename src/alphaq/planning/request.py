"""A config made concrete: which engine, which method, which choices."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from alphaq.checkpoint.reader import Checkpoint
from alphaq.engines.profile import Profile
from alphaq.engines.profiles import profile as engine_profile
from alphaq.errors import BudgetError, ChoiceError
from alphaq.formats.ggml import GGML_TYPES
from alphaq.formats.kept import KEPT
from alphaq.formats.table import code_bits, format_of, rate_of
from alphaq.formats.table import parse_choice as read_choice
from alphaq.formats.versions import CODECS
from alphaq.nouns.choice import Choice
from alphaq.nouns.matrix import Role
from alphaq.nouns.settings import PlanConfig
from alphaq.sensitivity.base import Method
from alphaq.sensitivity.methods import method

WIDTHS = (*range(1, 9), 16)


@dataclass(frozen=True)
class Request:
    """A config made concrete: which engine, which method, which choices, and how they are accounted.

    choices: every column of the tables, pins included. ladder: the plain choice of each width that is a column.
    offered: those that unpinned matrices may take.
    """

    config: PlanConfig
    profile: Profile
    method: Method
    choices: tuple[Choice, ...]
    offered: frozenset[Choice]
    ladder: tuple[Choice, ...]

    @property
    def joint(self) -> bool:
        """Whether one budget covers the other roles too: where all files count and losses can be compared.

        Coded bytes are measured of experts alone.
        """
        config = self.config
        whole = config.budget.size_bytes is not None and not config.per_layer and config.codec is None
        return whole and config.roles == "shared" and self.method.joint

    @property
    def rungs(self) -> tuple[int, ...]:
        """Columns of the ladder's choices that are offered, from narrow to wide.

        Where a finer ladder is offered, its rates come first: they cost less than plain choices of as many bits.
        """
        finer = sorted((choice for choice in self.offered if format_of(choice).graded), key=code_bits)
        widest = code_bits(finer[-1]) if finer else 0
        wider = [choice for choice in self.ladder if choice in self.offered and code_bits(choice) > widest]
        return tuple(self.choices.index(choice) for choice in (*finer, *wider))

    @property
    def plain(self) -> tuple[Choice, ...]:
        """What `--head-bits 5` and the like mean, for each width that the engine has."""
        found = []
        for bits in WIDTHS:
            with suppress(ChoiceError):
                found.append(self.of_width(bits))
        return tuple(found)

    def of_width(self, bits: int) -> Choice:
        """What a role of so many bits is stored as: a rung of the finer ladder, where one is offered, else the engine's
        usual choice. Raises ChoiceError if it has no such width."""
        finer = (choice for choice in self.ladder if choice.bits == bits and format_of(choice).graded)
        return next(finer, None) or self.choice(str(bits))

    def with_stored(self, checkpoint: Checkpoint | None) -> Request:
        """The same with the types that a GGUF file has already on offer, where a user has named none and methods may
        mix them: what has one of them may be copied."""
        if checkpoint is None or checkpoint.gguf is None or self.config.choices is not None or self.method.by_widths:
            return self
        if not self.profile.writer.from_gguf:
            return self
        held = {checkpoint.gguf_tensor(matrix.tensor).type for matrix in checkpoint.matrices}
        own = {choice for choice in self.profile.choices if str(choice) in held}
        return replace(self, choices=tuple(sorted({*self.choices, *own})), offered=self.offered | own)

    def check_speed(self) -> None:
        """BudgetError for a speed where there are no losses to weigh against it."""
        if self.config.min_speed is not None and self.method.kind != "loss":
            raise BudgetError(f"--min-speed needs losses, and {self.config.method} has none for each choice. Drop it.")

    def choice(self, text: str) -> Choice:
        """A choice as a user writes it, for this engine. Raises ChoiceError if it cannot be stored."""
        return parse_choice(text, self.profile, self.config)


def resolve(config: PlanConfig, with_model: bool = True) -> Request:
    """Check a config as far as it can be without a checkpoint. Raises AlphaQError.

    Without a model the default method is `alphaq`, since the others need weights; of a share of the bytes `typical`,
    since the others need all.
    """
    if config.method == "auto" and not (with_model and config.share is None):
        config = config.model_copy(update={"method": "typical" if with_model else "alphaq"})
    chosen, profile = method(config.method), engine_profile(config.engine)
    if chosen.kind == "expert" and profile.unit != "matrix":
        raise BudgetError(
            f"--method {config.method} chooses per expert, but in {profile.name} experts share a choice. "
            "Use another method or engine."
        )
    preset = {key: value for key, value in chosen.preset.items() if _is_unset(getattr(config, key))}
    if config.fast and "choices" in preset:
        raise BudgetError(f"--method {config.method} has choices of its own, so --fast does nothing. Drop it.")
    config = config.model_copy(update=preset)
    _check_speed(config)
    if config.bandwidth is not None:
        written = config.bandwidth.renamed(lambda text: _format_named(text, profile, config))
        config = config.model_copy(update={"bandwidth": written})
    if config.codec is not None:
        _check_codec(config, profile, with_model)
    offered = _offered(config, profile)
    ladder = _ladder(profile, config, offered, chosen.by_widths)
    # Code bits see no scales, so that the finest groups would come for nothing.
    codes_only = config.choices is None and config.budget.bits is not None and (config.unweighted or not with_model)
    if chosen.by_widths or codes_only:
        finer = [choice for choice in offered if format_of(choice).graded]
        offered = [
            *_plain(offered, ladder, config, profile),
            *(finer if chosen.spreads_evenly and not codes_only else ()),
        ]
    pinned = {parse_choice(rule.value, profile, config) for rule in config.pins}
    choices = tuple(sorted({*offered, *pinned}))
    _check_choices(choices, config, chosen, profile)
    if config.noise is None:
        config = config.model_copy(update={"noise": "measured" if with_model else "analytic"})
    _check_options(config, profile)
    if config.drop:
        _check_drop(config, chosen, profile)
    if config.share is not None:
        _check_share(config, chosen, with_model)
    return Request(config, profile, chosen, choices, frozenset(offered), ladder)


def _offered(config: PlanConfig, profile: Profile) -> list[Choice]:
    """The choices that a user named, or the engine's usual ones. Raises BudgetError for a --fast that does nothing."""
    nothing_to_leave_out = {
        "--choices says which": config.choices is not None,
        "--codec has rates of its own": config.codec is not None and not (config.symmetric or config.group_size),
        f"{profile.name} has no choices that take long": not profile.fast,
    }
    if config.fast and (why := next((why for why, holds in nothing_to_leave_out.items() if holds), None)):
        raise BudgetError(f"--fast leaves out choices that take long, but {why}. Drop it.")
    if config.choices is None and config.codec is not None and not (config.symmetric or config.group_size):
        return [choice for choice in profile.choices if rate_of(choice)]
    if config.choices is None:
        usual = profile.fast if config.fast else profile.defaults
        if config.group_size or config.symmetric:  # which trellis codes and the like do not have
            usual = tuple(choice for choice in profile.fast or usual if format_of(choice).regroups) or usual
        return [_storable(_styled(choice, config), profile) for choice in usual]
    named = [one for text in config.choices.split(",") if text.strip() for one in _named(text.strip(), profile, config)]
    if not named:
        raise BudgetError("--choices is empty. Give at least one, for example 1,2,3,4.")
    return named


def _plain(offered: Sequence[Choice], ladder: Sequence[Choice], config: PlanConfig, profile: Profile) -> list[Choice]:
    """The plain choice of each width that is offered."""
    if any(rate_of(choice) for choice in offered) and config.choices is not None:
        raise BudgetError(f"--method {config.method} takes plain widths only, not rates. Offer other --choices.")
    widths = {choice.bits for choice in offered}
    plain = [choice for choice in ladder if choice.bits in widths]
    if not plain:
        raise BudgetError(
            f"--method {config.method} takes plain widths only, and {profile.name} has none of "
            f"{', '.join(map(str, sorted(widths)))} bits. Offer other --choices."
        )
    return plain


def _check_choices(choices: Sequence[Choice], config: PlanConfig, chosen: Method, profile: Profile) -> None:
    """BudgetError where choices go with no files or no measurement."""
    if config.codec is None and (rated := [choice for choice in choices if rate_of(choice)]):
        raise BudgetError(
            f"{rated[0]} is for entropy-coded files. Add --codec {CODECS[-1]}, or use other --choices and pins."
        )
    if "outputs" in chosen.needs and any(format_of(choice).foreign for choice in choices):
        raise BudgetError(
            f"--method {config.method} needs every choice's output, and {profile.name}'s quantizer is not ours. Use "
            "another method, such as hessian."
        )


def _check_options(config: PlanConfig, profile: Profile) -> None:
    """BudgetError for options that are of no use to the engine, or exclude each other."""
    for option, rules in (("--min-bits", config.min_bits), ("--max-bits", config.max_bits)):
        for rule in rules:
            rule.number(option)
    for name in () if config.drop else ("drop_counts", "max_drop", "max_drop_loss"):
        if getattr(config, name) != PlanConfig.model_fields[name].default:
            raise BudgetError(f"--{name.replace('_', '-')} limits what --drop may do. Add --drop, or drop it.")
    if config.imatrix is not None and profile.importance is None:
        raise BudgetError(f"--imatrix is for llama.cpp's quantizers; {profile.name} has none. Drop it.")
    if config.split_bytes is not None and (profile.export is None or profile.export.split is None):
        raise BudgetError(f"--split-size splits GGUF files, which are for llama.cpp, not {profile.name}. Drop it.")
    for role, bits in config.widths().items():
        profile.with_bits(bits)
        if role not in profile.roles and role not in (Role.DENSE_MLP, Role.MIXER):
            raise BudgetError(
                f"{profile.name} keeps the {role.value} in 16 bits; --{role.value}-bits does nothing. Drop it."
            )
    if config.unweighted and config.budget.bpw is not None:
        raise BudgetError("--unweighted counts matrices, so stored bits per weight mean nothing. Use --bits or --size.")


def _check_drop(config: PlanConfig, chosen: Method, profile: Profile) -> None:
    """BudgetError for what does not go with dropping experts."""
    if config.drop_counts == "own" and not profile.uneven:
        raise BudgetError(
            f"{profile.name} has one number of experts for all layers. Drop --drop-counts own, or use --engine native."
        )
    if config.drop_counts == "own" and config.min_speed is not None:
        raise BudgetError("--drop-counts own and --min-speed are not solved together. Drop one of them.")
    if not chosen.needs_fisher or config.noise != "measured":
        raise BudgetError(
            "--drop weighs experts against bits in nats, which are not known here. Use --method auto with measured "
            "noise, or drop --drop."
        )
    if config.per_layer or config.codec is not None or config.unweighted:
        raise BudgetError(
            "--drop needs one budget for all experts, of plain bytes. Drop --per-layer, --codec or --unweighted."
        )
    if named := next(
        (rule for rule in (*config.pins, *config.min_bits, *config.max_bits) if "experts." in str(rule)), ""
    ):
        raise BudgetError(f"--drop numbers experts anew, so {str(named)!r} cannot name one. Drop one or the other.")


def _check_share(config: PlanConfig, chosen: Method, with_model: bool) -> None:
    """BudgetError for what cannot be known of a share of the weights."""
    if beyond := {*chosen.needs} - {"errors", "places", "prior"}:
        raise BudgetError(
            f"--share reads few rows, and --method {config.method} needs all weights ({', '.join(sorted(beyond))}). "
            "Use the method typical, or drop --share."
        )
    if not with_model or config.noise != "measured" or config.stats is not None:
        raise BudgetError("--share reads rows of MODEL to measure them. Drop --noise analytic, --stats or --share.")
    if config.codec is not None or config.unweighted or config.imatrix is not None:
        raise BudgetError("--codec, --unweighted and --imatrix go by whole matrices. Drop them or --share.")


def _check_speed(config: PlanConfig) -> None:
    """BudgetError for a speed of unknown memory, of files whose codes are taken apart when they are loaded,
    or beside budgets for each layer."""
    if config.min_speed is not None and config.codec is not None:
        raise BudgetError("--min-speed counts what a token reads, which codes do not change. Drop --codec.")
    if config.min_speed is not None and config.per_layer:
        raise BudgetError("--per-layer and --min-speed are not solved together. Drop one of them.")
    if config.min_speed is not None and config.bandwidth is None:
        raise BudgetError("--min-speed needs to know how fast weights are read. Add --bandwidth 80GB/s.")


def _check_codec(config: PlanConfig, profile: Profile, with_model: bool) -> None:
    """BudgetError where there are no coded files, or nothing to measure them on."""
    if not profile.writer.codable:
        raise BudgetError(f"{profile.name} reads no coded tensors. Drop --codec, or use --engine native.")
    if not with_model or config.noise == "analytic" or config.unweighted:
        raise BudgetError(
            "--codec needs the weights, since coded bytes are measured: give MODEL, and neither --noise analytic nor "
            "--unweighted."
        )


def _is_unset(setting: object) -> bool:
    """Whether a setting is at its default; a 0 is not, though it equals False."""
    return setting is None or setting is False or setting == "auto"


def parse_choice(text: str, profile: Profile, config: PlanConfig) -> Choice:
    """'3' is the engine's usual 3-bit choice (at --group-size, --symmetric); '3g64', '4g128s', 'Q4_K', '16' are exact.

    Raises ChoiceError if the engine cannot store it.
    """
    text = text.strip()
    if text.isdigit():
        choice = _styled(profile.with_bits(int(text)), config)
    else:
        choice = read_choice(text, config.group_size or 128, config.symmetric)
    return _storable(choice, profile)


def _format_named(text: str, profile: Profile, config: PlanConfig) -> str:
    """A format of --bandwidth as plans write it. Raises ChoiceError for one that the engine's files do not have."""
    copied = profile.writer.from_gguf and text in GGML_TYPES
    return text if copied or text == str(KEPT) else str(parse_choice(text, profile, config))


def _named(text: str, profile: Profile, config: PlanConfig) -> list[Choice]:
    """What one of `--choices` names: a choice, or all of a format that the engine stores ('trellis')."""
    own = [choice for choice in profile.choices if format_of(choice).name == text]
    return own or [parse_choice(text, profile, config)]


def _storable(choice: Choice, profile: Profile) -> Choice:
    if choice not in profile.choices:
        raise ChoiceError(f"{profile.name} cannot store {choice}. Available: {', '.join(map(str, profile.choices))}.")
    return choice


def _styled(choice: Choice, config: PlanConfig) -> Choice:
    """A plain choice with the group size and symmetry that the user asked for."""
    group_size, symmetric = config.group_size or choice.group_size, config.symmetric or choice.symmetric
    return format_of(choice).regrouped(choice, group_size, symmetric)


def _named_in_width(usual: Choice, offered: Sequence[Choice]) -> Choice:
    """What stands for a width where none of its usual format was named: the largest named of that width, if any."""
    named = [choice for choice in offered if code_bits(choice) == usual.bits and not rate_of(choice)]
    if not named or any(format_of(choice) is format_of(usual) and format_of(usual).regroups for choice in named):
        return usual
    return (
        usual if usual in named else max(named, key=lambda choice: format_of(choice).storage_bytes(choice, (256, 256)))
    )


def _whole_rate(usual: Choice, offered: Sequence[Choice], profile: Profile) -> Choice:
    """What stands for a width around which rates are offered: the rate of its bits, unless the usual choice is, too."""
    if usual in offered:
        return usual
    return next(one for one in profile.choices if format_of(one).graded and code_bits(one) == usual.bits)


def _ladder(profile: Profile, config: PlanConfig, offered: Sequence[Choice], by_widths: bool) -> tuple[Choice, ...]:
    """The plain choice of every width the engine has; if the user named choices, in the coarsest groups of those.

    To a method that goes by widths, a named choice of another format, such as `IQ2_XS`, is its width's own; where a
    finer ladder is offered, its whole widths are, to all methods.
    """
    groups = [choice.group_size for choice in offered if format_of(choice).regroups]
    rates = [code_bits(choice) for choice in offered if format_of(choice).graded]
    rungs = []
    for bits in WIDTHS:
        try:
            choice = _styled(profile.with_bits(bits), config)
        except ChoiceError:
            continue
        if config.choices is not None and groups and format_of(choice).regroups:
            symmetric = all(other.symmetric for other in offered if not other.kept)
            choice = format_of(choice).regrouped(choice, max(groups), symmetric)
        if rates and min(rates) < bits + 1 and bits - 1 < max(rates):
            choice = _whole_rate(choice, offered, profile)
        elif by_widths and config.choices is not None:
            choice = _named_in_width(choice, offered)
        if choice in profile.choices:
            rungs.append(choice)
    return tuple(rungs)
