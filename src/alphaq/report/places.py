"""Where each matrix of a plan sits: layer, expert, projection and role, from the best source at hand."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from alphaq.errors import StatsError
from alphaq.nouns.matrix import MatrixRef, Role

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks?|blk|h)\.(\d{1,6})(?:\.|$)")
_EXPERT = re.compile(r"(?<!shared_)experts?\.(?:[a-z_]+\.)?(\d{1,6})(?:\.|$)")
_ROLES = (
    (Role.SHARED_EXPERT, re.compile(r"shared_(?:expert|mlp)")),
    (
        Role.MIXER,
        re.compile(r"mamba|ssm_|indexer|compressor|latent_proj|routed_expert_|\.(?:mixer|conv)\.(?:in|out)_proj"),
    ),
    (Role.ATTENTION, re.compile(r"attn|attention")),
    (Role.EMBEDDING, re.compile(r"embed|\bwte\b")),
    (Role.HEAD, re.compile(r"lm_head|(?:^|\.)output\.weight$")),
    (Role.DENSE_MLP, re.compile(r"mlp|feed_forward|ffn")),
)


@dataclass(frozen=True)
class Place:
    """A matrix's place in the model; weights: how many it has, None where that is not known."""

    layer: int | None
    expert: int | None
    projection: str
    role: Role
    weights: int | None = None


def place_by_name(name: str) -> Place:
    """What a matrix's name alone tells."""
    layer, expert = _LAYER.search(name), _EXPERT.search(name)
    parts = [part for part in name.split(".") if part != "weight" and not part.isdigit()]
    projection = parts[-1].removesuffix("_proj") if parts else name
    role = Role.EXPERT if expert else next((role for role, pattern in _ROLES if pattern.search(name)), Role.OTHER)
    return Place(int(layer[1]) if layer else None, int(expert[1]) if expert else None, projection, role)


def places_of_matrices(matrices: Iterable[MatrixRef]) -> dict[str, Place]:
    """Places as an opened checkpoint knows them."""
    return {
        matrix.name: Place(matrix.layer, matrix.expert, matrix.projection or "", matrix.role, matrix.parameters)
        for matrix in matrices
    }


def read_places(path: Path) -> tuple[dict[str, Place], dict[str, float]]:
    """Places and α by name, from a CSV of `alphaq analyze`. Raises StatsError."""
    needed = ("name", "layer", "expert", "projection", "role", "rows", "columns", "alpha")
    places: dict[str, Place] = {}
    alphas: dict[str, float] = {}
    remedy = f"Make it with `alphaq analyze MODEL -o {path.name}`."
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if missing := set(needed) - set(reader.fieldnames or ()):
                raise StatsError(f"{path} lacks the column(s) {', '.join(sorted(missing))}. {remedy}")
            for row in reader:
                try:
                    places[row["name"]] = Place(
                        int(row["layer"]) if row["layer"] else None,
                        int(row["expert"]) if row["expert"] else None,
                        row["projection"],
                        Role(row["role"]),
                        int(row["rows"]) * int(row["columns"]),
                    )
                    if row["alpha"]:
                        alphas[row["name"]] = float(row["alpha"])
                except (TypeError, ValueError) as error:
                    raise StatsError(f"{path}, line {reader.line_num}: {error}. {remedy}") from None
    except OSError as error:
        raise StatsError(f"{path} cannot be read: {error.strerror}. {remedy}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise StatsError(f"{path} is not a CSV file ({error}). {remedy}") from None
    return places, alphas
