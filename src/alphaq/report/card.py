"""A Hugging Face model card of an output: what it is, how large, how faithful, and how to run and remake it.

The card that came with the original is not lost: its metadata is carried over where it still holds, and it follows
below ours as it was. Making the card again replaces our part only, and not if someone has edited it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from alphaq.checkpoint.config import read_config
from alphaq.checkpoint.families.architecture import architecture_of
from alphaq.engines.output import Output
from alphaq.errors import AlphaQError, CheckpointError, OutputError, first_line
from alphaq.evaluation.certificate import Certificate, Figures
from alphaq.formats.table import code_bits, parse_choice
from alphaq.nouns.choice import Choice
from alphaq.nouns.fidelity import CERTIFICATE_NAME
from alphaq.nouns.plan import Plan
from alphaq.report.commands import Names, remake, reproduce
from alphaq.report.tables import figure_cells, human_bytes, predicted_words, verdict_lines
from alphaq.work.untrusted import read_bounded

README_NAME = "README.md"
MAX_CARD_BYTES = 2_000_000
KNOWN_LICENCES = {"Apache License": "apache-2.0", "MIT License": "mit", "The MIT License": "mit"}
NOT_CARRIED = ("model-index", "base_model_relation", "quantized_by", "alphaq", "widget", "co2_eq_emissions")
"""What a card says of the original's own weights, which are not these; and our own keys."""

OURS = re.compile(r"<!-- alphaq card ([0-9a-f]{16}) -->\n")
ORIGINAL = "<!-- alphaq: below is the original's card as it was -->\n"
METADATA = re.compile(r"^(`{4,})yaml\n(.*?)\n?\1$", re.MULTILINE | re.DOTALL)
FrontMatter: TypeAlias = dict[str, Any]
"""A card's metadata: YAML, of which other programs decide what stands in it."""
FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Card:
    """The whole README, its metadata, and what the user should know of it."""

    text: str
    metadata: FrontMatter
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Original:
    """The card that came with the original: its front matter's YAML, parsed and as it was, and the rest."""

    raw_metadata: str = ""
    body: str = ""
    metadata: FrontMatter = field(default_factory=dict)


@dataclass(frozen=True)
class Licence:
    """The front matter's licence, empty where none was found, and the sentence that says it."""

    metadata: FrontMatter
    sentence: str


@dataclass(frozen=True)
class RoleRow:
    """A row of the card's plan: entries of a role, their bytes, and how many are stored at which choice."""

    name: str
    entries: int
    bytes: int
    choices: str


def make_card(
    folder: Path,
    target: Path | None = None,
    base_model: str | None = None,
    reference: Path | None = None,
    certificate_path: Path | None = None,
    force: bool = False,
) -> Card:
    """The card of what `alphaq quantize` wrote to `folder`.

    target: the file it is meant for, whose hand-made changes are respected; None for none. base_model: hub id of the
    original. reference: its folder, for a card and a licence that the output lacks. force: replace what was edited.
    Raises CheckpointError for what is no output, and OutputError for an edited card.
    """
    opened = Output(folder)
    if target is not None and not force:
        _require_unedited(target)
    original, notes = _original_of(folder, reference), []
    certificate, why = _certificate_of(folder, certificate_path)
    notes += [why] if why else []
    base = base_model or _known_id(opened.plan, certificate)
    if base is None:
        notes.append("the original's hub id is not known, so base_model is left out; add it with --base-model")
    elif not _is_id(base):
        raise AlphaQError(f"--base-model {base!r} is not a hub id. Write it as OWNER/NAME.")
    licence = _licence(original, folder, reference)
    if not licence.metadata:
        notes.append("no licence was found in the original's card or files; add one before you publish")
    metadata = _metadata(opened, original, base, licence, certificate)
    body = _body(opened, base, certificate, licence)
    return Card(_joined(metadata, body, original), metadata, tuple(notes))


def _joined(metadata: FrontMatter, body: str, original: Original) -> str:
    front = f"---\n{ModelCardData(**metadata).to_yaml().rstrip()}\n---\n"
    digest = hashlib.sha256((front + body).encode()).hexdigest()[:16]
    text = f"{front}<!-- alphaq card {digest} -->\n{body}"
    if original.body.strip() or original.raw_metadata.strip():
        text += "\n## The original's card\n\n"
        if original.raw_metadata.strip():
            longest = max(map(len, re.findall("`+", original.raw_metadata)), default=0)
            fence = "`" * max(4, longest + 1)
            text += f"<details><summary>Its metadata</summary>\n\n{fence}yaml\n{original.raw_metadata}\n{fence}\n\n"
            text += "</details>\n\n"
        text += ORIGINAL + original.body
    if ModelCard(text).data.to_dict() != ModelCardData(**metadata).to_dict():
        raise AlphaQError(
            "The card's metadata does not read back as it was written. Shorten the original's front matter."
        )
    return text


def _split(text: str) -> tuple[str, str, str] | None:
    """Front matter, digest and what follows, up to the original's card; None if the card is not ours."""
    match = OURS.search(text)
    if match is None:
        return None
    body = text[match.end() :]
    end = body.find("\n## The original's card\n\n") if ORIGINAL in body else -1
    return text[: match.start()], match[1], body if end < 0 else body[:end]


def _require_unedited(path: Path) -> None:
    if not path.is_file():
        return
    parts = _split(_read(path))
    if parts is not None and hashlib.sha256((parts[0] + parts[2]).encode()).hexdigest()[:16] != parts[1]:
        raise OutputError(
            f"{path} was edited since `alphaq card` wrote it. Write elsewhere with -o, or replace it with --force."
        )


def _read(path: Path) -> str:
    try:
        return read_bounded(path, MAX_CARD_BYTES).decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a readable card ({error}). Move it out of the way.") from None


def _original_of(folder: Path, reference: Path | None) -> Original:
    """From the output, as a README of its own or below ours; else from the original's folder."""
    for place in (folder, *([reference] if reference is not None else [])):
        path = place / README_NAME
        if not path.is_file():
            continue
        text = _read(path)
        if OURS.search(text) is None:
            return _parsed(text, path)
        ours, mark, body = text.partition(ORIGINAL)
        if mark:
            quoted = METADATA.search(ours[ours.rfind("\n## The original's card\n\n") :])
            return _parsed(f"---\n{quoted[2]}\n---\n{body}" if quoted else body, path)
    return Original()


def _parsed(text: str, path: Path) -> Original:
    match = FRONT_MATTER.match(text)
    if match is None:
        return Original(body=text)
    try:
        metadata = ModelCard(text).data.to_dict()
    except Exception as error:  # whatever YAML and the hub's checks raise for what a stranger wrote
        reason = first_line(error)
        raise CheckpointError(f"The metadata of {path} cannot be read ({reason}). Correct or remove it.") from None
    return Original(match[1], text[match.end() :], metadata)


def _certificate_of(folder: Path, named: Path | None) -> tuple[Certificate | None, str | None]:
    """The certificate, if it was made of these files; else why it is not quoted."""
    path = named or folder / CERTIFICATE_NAME
    if named is None and not path.is_file():
        return None, None
    certificate = Certificate.read(path)
    if not certificate.belongs_to(folder):
        return None, f"{path} is of other weights than those in {folder}, so it is not quoted"
    return certificate, None


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _known_id(plan: Plan, certificate: Certificate | None) -> str | None:
    """The original's hub id, where the certificate's reference was given as one and is what the plan was made for."""
    if certificate is None or plan.original is None or certificate.reference.fingerprint != plan.original:
        return None
    return certificate.reference.name if _is_id(certificate.reference.name) else None


def _licence(original: Original, folder: Path, reference: Path | None) -> Licence:
    """From the original's card or the licence file that was carried over."""
    keys = ("license", "license_name", "license_link")
    files = sorted(path for place in (folder, reference) if place for path in place.glob("LICENSE*") if path.is_file())
    named = f" Its text is in `{files[0].name}`." if files and files[0].parent == folder else ""
    if original.metadata.get("license"):
        metadata = {key: original.metadata[key] for key in keys if original.metadata.get(key)}
        known = metadata.get("license_name") or metadata["license"]
        return Licence(metadata, f"That of the original: {known}.{named}")
    if not files:
        return Licence(
            {}, "The original's files name no licence. Its terms hold for this model all the same: ask its authors."
        )
    first = next((line.strip() for line in _read(files[0]).splitlines() if line.strip()), "")
    if first in KNOWN_LICENCES:
        return Licence({"license": KNOWN_LICENCES[first]}, f"That of the original: {KNOWN_LICENCES[first]}.{named}")
    other = {"license": "other", "license_name": "original", "license_link": files[0].name}
    return Licence(other, f"That of the original.{named}")


def _metadata(
    opened: Output, original: Original, base: str | None, licence: Licence, certificate: Certificate | None
) -> FrontMatter:
    plan = opened.plan
    carried = {
        str(key): value
        for key, value in original.metadata.items()
        if key not in (*NOT_CARRIED, "base_model", "library_name", "tags", *licence.metadata)
    }
    own = original.metadata.get("tags") or []
    tags = [*([own] if isinstance(own, str) else own), "alphaq", "quantized", f"{_width(plan):g}-bit"]
    facts = {
        "engine": plan.engine,
        "method": plan.method,
        "average_bits": plan.average_bits,
        "bits_per_weight": plan.bits_per_weight,
        "size_bytes": plan.size_bytes,
        "ear": None if certificate is None else certificate.overall.ear.value,
    }
    return {
        **({"base_model": base, "base_model_relation": "quantized"} if base else {}),
        **licence.metadata,
        "library_name": opened.profile.library,
        "tags": list(dict.fromkeys(tags)),
        **carried,
        "quantized_by": "alphaq",
        "alphaq": {
            key: round(value, 4) if isinstance(value, float) else value
            for key, value in facts.items()
            if value is not None
        },
    }


def _width(plan: Plan) -> float:
    """The width that people would call the model by."""
    bits = [code_bits(plan.choice(name)) for name in plan.assignment or plan.choices]
    return round(plan.average_bits if plan.average_bits is not None else sum(bits) / len(bits))


def _body(opened: Output, base: str | None, certificate: Certificate | None, licence: Licence) -> str:
    plan, name = opened.plan, opened.folder.resolve().name
    original_name = base or (plan.source.name if plan.source else "the original")
    names = Names(original_name, name)
    files = sorted({one.place.file for one in opened.stored.values()})
    return _template().render(
        name=name,
        base=original_name,
        plan=plan,
        planned="expert weight" if any(".experts." in one for one in plan.assignment) else "planned weight",
        size=sum((opened.folder / file).stat().st_size for file in files),
        original_bytes=None if certificate is None else certificate.reference.size_bytes,
        budget=_budget(plan),
        predicted=predicted_words(plan.prediction) if plan.prediction else "",
        own_runtime=opened.profile.searchable,
        roles=_roles(opened),
        certificate=certificate,
        figures=[] if certificate is None else _figures(certificate),
        verdicts=[] if certificate is None else verdict_lines(certificate),
        planning=[command for step, command in reproduce(plan, opened.options, names) if step in ("Plan", "Refine")],
        remaking=[command for _, command in remake(plan, opened.options, names)],
        usage=opened.profile.writer.used(name, files).partition(": ")[2],
        licence=licence.sentence,
    )


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("alphaq.report"),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["bytes"] = human_bytes
    return environment.get_template("card.md.j2")


def _figures(certificate: Certificate) -> list[tuple[str, ...]]:
    """Rows of figures: of each text, and of all together where there are several."""
    rows: list[tuple[str, int, Figures]] = [(text.name, text.tokens, text) for text in certificate.texts]
    if len(rows) > 1:
        rows.append(("all", sum(tokens for _, tokens, _ in rows), certificate.overall))
    return [(text, f"{tokens:,}", *figure_cells(figures)) for text, tokens, figures in rows]


def _budget(plan: Plan) -> str:
    if plan.settings is None:
        return "of another tool"
    budget = plan.settings.budget
    if budget.size_bytes is not None:
        return f"{budget.size_bytes:,} bytes of weight files"
    return f"{budget.bits:g} bits" if budget.bits is not None else f"{budget.bpw:g} stored bits per weight"


def _roles(opened: Output) -> list[RoleRow]:
    """The roles, largest first; planned and other matrices where there is no config."""
    plan = opened.plan
    architecture = None
    if (opened.folder / "config.json").is_file():
        architecture = architecture_of(read_config(opened.folder))

    def role_of(name: str) -> str:
        rule = None if architecture is None else architecture.first_match(name)[0]
        if rule is not None:
            return rule.role.value.replace("_", " ")
        return "planned" if name in plan.assignment else "other quantized" if name in plan.choices else "other"

    choices: dict[str, Counter[str]] = defaultdict(Counter)
    nbytes: Counter[str] = Counter()
    for name in opened.manifest:
        role = role_of(name)
        choices[role][plan.choices.get(name, "kept")] += 1
        nbytes[role] += sum(place.nbytes for place in opened.places(name))

    def listed(counts: Counter[str]) -> str:
        order = sorted(counts, key=lambda text: (text == "kept", Choice(16) if text == "kept" else parse_choice(text)))
        return ", ".join(f"{text} ({counts[text]:,})" for text in order)

    return [
        RoleRow(role, sum(choices[role].values()), count, listed(choices[role])) for role, count in nbytes.most_common()
    ]
