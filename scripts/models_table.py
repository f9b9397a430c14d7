"""Check every family of models and write docs/models.md: `make models`.

Each row is a tiny random model of the family's own class, taken from disk through plan and quantized file to logits.
"""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections import defaultdict
from datetime import date
from pathlib import Path

import engines_table
import transformers

import alphaq
from alphaq import pipeline
from alphaq.checkpoint.families.architecture import architectures, unsupported
from alphaq.checkpoint.reader import Checkpoint, open_checkpoint
from alphaq.errors import AlphaQError
from alphaq.nouns.settings import Budget, PlanConfig
from alphaq.planning import resolve
from families import FAMILIES, ONE_LAYOUT, UNLOADABLE, Outcome, outcome, random_family

ROOT = Path(__file__).parents[1]
HEAD = """# Models

Every family below is checked with a tiny random model of its own class from transformers {version}: saved under the
names of the hub and, where they differ, under those of transformers' own modules; its planned matrices counted against
the class's modules; then `analyze`, `plan`, `quantize`, and the logits of the loaded result compared with those of the
same model with the dequantized matrices in plain float32. This page is written by `make models`;
`make test-all` runs the same checks (tests/checkpoint/test_families.py).

`alphaq inspect MODEL` says what is found in a checkpoint. The number of experts, their layers and their projections
must be exactly what config.json promises; otherwise the first one missing or too many is named.

## Families

- **matrices**: what a plan decides on, of a model with mostly 3 layers and 6 experts in each.
- **weights**: those of the matrices found / those of the expert modules in the class, counted apart.
- **logits**: largest difference between the loaded model and the dequantized one.
- **default method**: whether `alphaq plan` works without further options. It runs the model layer by layer to see its
  routing; where the class does not allow that, use `--method alphaq`, which needs the weights alone.

Version {alphaq}, {today}, `make models`.

| family | `model_type` | on disk | matrices | weights | logits | default method |
|---|---|---|--:|--:|---|---|
"""
BEGIN, END = "<!-- published: begin -->\n", "<!-- published: end -->\n"
TAIL = """
"fused, columns first" is how some families are published: `[experts, in, out]`.

Dense models, whose budget decides on the MLP of every layer (role `dense_mlp`):
{dense}.

## Engines

`--engine native` writes every family above; transformers loads the result with the plug-in that `alphaq` brings.
Other engines have programs of their own for each family. **verified**: the engine computes with our files, of a mixed
plan, the logits that transformers computes with the weights which they stand for, or the export refuses the settings
that it would compute otherwise (what follows the word says which, where published models have them; *not on CPUs*:
there vLLM itself computes otherwise or stops, whatever the files). Tested with: mlx-lm 0.32.2 in the test suite;
llama.cpp 2026.10, see [its page](engines/gguf-families.md); vLLM 0.32.0 on a CPU in `make test-vllm`, with kernels
that restore the packed weights and a router in place of those for CPUs, see [its
page](engines/vllm.md#what-was-tested); GPTQModel 7.7.0 with defuser 0.0.28 and transformers 5.23 in `make
test-gptqmodel`, see [its page](engines/gptqmodel.md#what-was-tested). `make test` compares names with transformers'
class for the last two. *no such model*: the engine has none, where its source was at hand. *refused*: it has one, and
cannot load or run our files, or would on machines only where nobody has tried it. *not yet*: not run there, so the
export refuses it. `scripts/engines_table.py` writes this table.

{engines}

Of dense models llama.cpp and MLX have files for Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma 2 and 3 (`gemma3_text`),
Granite, OLMo 2, Seed-OSS and SmolLM3; GPTQModel for the same but SmolLM3; vLLM for the same but OLMo 2, Seed-OSS and
SmolLM3.

## Published checkpoints

Stand-ins of published checkpoints, with their configs, names, shapes and dtypes, were opened as a user's folder is.
What native plans leave in 16 bits is embeddings and heads, towers for images and sound, and layers that predict
further tokens.

{published}

## Also good to know

- **Multi-modal models**: the language model is planned and quantized; towers for images and sound, and the second
  model that speaks in Qwen3-Omni, are copied.
- **Multi-token prediction**: layers after `num_hidden_layers`, and tensors under `mtp`, are copied in the native
  format and left out of GGUF files, and of all files of models without some of their experts.
- **FP8, MXFP4, NVFP4 and int4** checkpoints of all families are read
  ([quantized sources](large-models.md#quantized-sources)); those of GPTQ, AWQ, bitsandbytes, MLX and others are not.
- {unloadable}: only the published names, because transformers cannot load its own other ones.
- **Wrappers**: a `model_type` that is not listed but nests a known one, under any key and any prefix, such as InternVL
  with Qwen3-MoE, Mistral 3 with `mistral4` or Kimi-K3 with `kimi_linear`, is read as that one.
- **Base models**, whose names lack `model.`, are read as if they had it.
- transformers has no class for `arctic`, `bailing_moe`, `deepseek`, `deepseek_vl_v2`, `internvl_chat`, `kimi_k3` and
  `mimo_v2`: use `--method alphaq`, and an engine that has.
- **State-space, convolution, latent and indexer layers**: their large matrices have the role `mixer` and are quantized
  like attention (`--attention-bits`).
- **Dense members** of a family, such as Granite 4 without experts, are planned as dense models.
- `qwen3_omni_moe`, as published, is read by its thinker's names; use `--method alphaq`.
- `kimi_k2` has the names of DeepSeek-V3. transformers does not know it: use `--method alphaq`, and an engine that does.
- LongCat's experts without weights are not run by the default method. A checkpoint whose tensors have rows for them is
  refused, because the counts disagree.

## Not supported

| `model_type` | why |
|---|---|
{unsupported}
"""


def difference(found: Outcome) -> str:
    return "0" if found.difference == 0 else f"{found.difference:.0e}"


def default_method(folder: Path) -> str:
    source = open_checkpoint(folder)
    try:
        request = resolve(PlanConfig(budget=Budget(bits=2.5), group_size=32))
        pipeline.make_plan(source, request, pipeline.measure_for_plan(source, request))
    except AlphaQError:
        return "`--method alphaq`"
    return "yes"


def layout(source: Checkpoint, found: Outcome) -> str:
    return found.layout + ", columns first" * any(matrix.transposed for matrix in source.planned)


def rows() -> dict[tuple[str, ...], list[str]]:
    """Families by what is the same for several of their types."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for family in FAMILIES:
        method = ""
        for published in (True, False)[: 1 if family in ONE_LAYOUT | UNLOADABLE else 2]:
            with tempfile.TemporaryDirectory() as scratch:
                one = outcome(random_family(family), Path(scratch), published)
                source = open_checkpoint(Path(scratch) / "source")
                method = method or default_method(Path(scratch) / "source")
                assert (one.found, one.wide) == (one.expected, 0), family
                counts = (f"{one.matrices}", f"{one.found:,} / {one.expected:,}")
                key = (source.architecture.name, layout(source, one), *counts, difference(one), method)
            print(family, *key, flush=True)
            found[key].append(family)
    return found


def main() -> None:
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    os.environ["ALPHAQ_CACHE"] = tempfile.mkdtemp()
    lines = [
        f"| {name} | {', '.join(f'`{kind}`' for kind in dict.fromkeys(kinds))} | {' | '.join(rest)} |"
        for (name, *rest), kinds in sorted(rows().items())
    ]
    known = architectures()
    dense = textwrap.fill(", ".join(f"`{kind}`" for kind, one in known.items() if not one.num_experts_keys), 120)
    page = ROOT / "docs" / "models.md"
    published = page.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]  # another script's part
    tail = TAIL.format(
        published=BEGIN + published + END,
        dense=dense,
        engines=engines_table.BEGIN + engines_table.table() + engines_table.END,
        unloadable=", ".join(sorted(UNLOADABLE)),
        unsupported="\n".join(f"| `{kind}` | {why} |" for kind, why in unsupported().items()),
    )
    head = HEAD.format(version=transformers.__version__, alphaq=alphaq.__version__, today=date.today())
    text = head + "\n".join(lines) + "\n" + tail
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
