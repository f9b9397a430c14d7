"""Log-probabilities of several checkpoints, one after another in one process: starting vLLM takes longer than a model.

Reads one JSON object a line: folder, prompts, and arguments of `vllm.LLM`. Answers in one line each, after MARK:
log-probabilities of every word at every place of each prompt but the last, or the error.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MARK = "answer: "


def logprobs(folder: str, prompts: list[list[int]], arguments: dict[str, Any]) -> list[list[list[float]]]:
    """By prompt, place and word."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, seed=0, max_logprobs=-1, enforce_eager=True,
        limit_mm_per_prompt=dict(image=0, video=0), **arguments,
    )  # fmt: skip
    try:
        sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=-1)
        answers = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [
            [[place[word].logprob for word in range(len(place))] for place in answer.prompt_logprobs[1:]]
            for answer in answers
        ]
    finally:
        engine.llm_engine.engine_core.shutdown()


class _Absent(ModuleType):
    """A package that is imported where images are read, and not used where there are none."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def without_images() -> None:
    """torchvision has no build for the plain torch of this version, and vLLM imports it with Qwen3.5."""
    import transformers.image_utils  # which must know that it is missing

    assert not transformers.image_utils.is_torchvision_available()
    names = ("torchvision", "transforms", "v2", "functional")
    for end in range(1, len(names) + 1):
        name = ".".join(names[:end])
        module = _Absent(name)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
        if end > 1:
            setattr(sys.modules[name.rpartition(".")[0]], names[end - 1], module)


def main() -> None:
    """Answer until there is no further line."""
    if find_spec("torchvision") is None:
        without_images()
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models import registry

    assert hasattr(registry, "_run_in_subprocess")
    registry._run_in_subprocess = lambda made: made()  # it looks at each model's class in a process of its own
    sys.path.append(__file__.rpartition("/")[0])
    import decoding_kernels

    decoding_kernels.install()
    gc.freeze()  # vLLM collects garbage eight times a model, and it and torch are large
    for line in sys.stdin:
        try:
            answer: Any = logprobs(**json.loads(line))
        except Exception as error:  # whatever a model does, the next may be asked
            answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-6000:]}
        sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
        sys.stdout.flush()
        cleanup_dist_env_and_memory()
        gc.collect()


if __name__ == "__main__":
    main()
