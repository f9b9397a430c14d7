"""The engines that a plan can be made for: one line per engine."""

from __future__ import annotations

from alphaq.engines import gptqmodel, native, vllm
from alphaq.engines.gguf import profile as llama_cpp
from alphaq.engines.mlx import profile as mlx
from alphaq.engines.profile import Profile
from alphaq.registry import lookup

ENGINES: dict[str, Profile] = {
    engine.PROFILE.name: engine.PROFILE for engine in (native, llama_cpp, vllm, mlx, gptqmodel)
}


def profile(name: str) -> Profile:
    """The profile of that name. Raises UnknownNameError with the closest name and the list of all."""
    return lookup("--engine", ENGINES, name)
