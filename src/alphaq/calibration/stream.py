"""One forward pass through a model that need not fit into memory: layer by layer, straight from disk.

The model's own class is built on the meta device, where parameters have shapes but no bytes. A hook
before each decoder layer reads that layer's tensors, a hook after it drops them, so a single call of
the model's own forward carries all windows through one layer at a time. Names and layouts (experts
apart or fused, Mixtral's other names) are translated by the functions with which transformers' own
`from_pretrained` does it, so whatever it loads can be streamed. The head is never run. Routed experts
are most of a layer (45 GB in float32 in DeepSeek-V3), so they are read and run one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from alphaq.calibration.experts import ExpertForm, form_of, is_expert_module
from alphaq.calibration.libraries import config_of, map_large_tensors, no_progress_bars
from alphaq.calibration.passage import Passage, Recorder
from alphaq.calibration.products import Room, look_up_rows
from alphaq.calibration.uneven import take_own_counts
from alphaq.checkpoint.reader import Checkpoint
from alphaq.errors import AlphaQError, CheckpointError, PassError, first_line
from alphaq.nouns.matrix import MatrixRef, Role

Keywords = Mapping[str, Any]
"""Arguments of a module of transformers; what they are is its class's business."""


@dataclass(frozen=True, eq=False)
class LayerTraffic:
    """What one MoE layer saw: `weights` are as the layer multiplies its experts' outputs.

    inputs: float32 [tokens, hidden]. experts: int64 [tokens, top_k]. weights: float32 [tokens, top_k].
    passage: how the experts' output reaches the stream; None if not asked for, or not run.
    """

    layer: int
    inputs: Tensor
    experts: Tensor
    weights: Tensor
    form: ExpertForm
    passage: Passage | None = None


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor that is read when it is sliced, as transformers expects of what it loads."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.checkpoint.tensor(self.name)[index]


def model_class(config: Any) -> Any:
    """The class with a head for words that transformers has for a config. Raises CheckpointError if it has none."""
    import transformers
    from transformers.models.auto import modeling_auto

    # A config with parts for images or sound belongs to a class for all of them, though one for text may exist.
    tables = ["IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM"][:: 1 if config.sub_configs else -1]
    for table in (*tables, "TOKEN_CLASSIFICATION"):
        name = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").get(config.model_type)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0])
    raise CheckpointError(
        f"transformers {transformers.__version__} has no class that writes text for {config.model_type!r}. Update it."
    )


def _without_weights(checkpoint: Checkpoint) -> Any:
    """The model's own class on the meta device. Raises CheckpointError if transformers cannot build it."""
    if checkpoint.plain:
        raise CheckpointError(
            f"{checkpoint.name} is a GGUF file whose tensors are known by their names alone, so transformers cannot "
            "run it. `alphaq eval` without --dtype and --device can, and so can planning by the default method. For "
            "anything else start from the Hugging Face folder."
        )
    try:
        config = config_of(checkpoint)
        with torch.device("meta"):
            # Attention is left to transformers: sdpa where the class has it, which skips the mask of windows
            # without padding. "eager" goes expert by expert; the others copy every token once per expert.
            model = model_class(config)._from_config(config, dtype=torch.float32, experts_implementation="eager")
        take_own_counts(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"transformers cannot build the model of {checkpoint.folder} ({reason}). Check config.json, update "
            "transformers, or use --method alphaq, which needs the weights alone."
        ) from error
    return model.eval()


def _decoder_of(model: Any) -> Any:
    """The part of a model that holds its decoder layers."""
    base = model.get_decoder() or model.base_model
    if hasattr(base, "layers"):
        return base
    deeper = (one for one in model.modules() if hasattr(one, "layers") and hasattr(one, "embed_tokens"))
    return next(deeper, base)


def _by_place(planned: Iterable[MatrixRef]) -> dict[int, dict[int, dict[str, MatrixRef]]]:
    """Matrices by layer, expert and projection; the MLP of a dense model is expert 0."""
    places: dict[int, dict[int, dict[str, MatrixRef]]] = {}
    for matrix in planned:
        assert matrix.layer is not None and matrix.projection is not None
        places.setdefault(matrix.layer, {}).setdefault(matrix.expert or 0, {})[matrix.projection] = matrix
    return places


class HollowModel:
    """A model without weights whose modules are filled from disk, in float32, and emptied again.

    layers: name of each decoder layer. experts: name of each layer's module of routed experts, by layer; of a dense
    model its MLP, which is one expert that all tokens go to. forms: what that module computes. matrices: those
    of each expert, by layer, expert and projection.
    Raises CheckpointError if transformers cannot build the model, no experts module is in it, or its experts
    compute something else than an `ExpertForm`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        self.checkpoint = checkpoint
        self.model: Any = _without_weights(checkpoint)
        self.base: Any = _decoder_of(self.model)
        names = {module: name for name, module in self.model.named_modules()}
        stack = getattr(self.base, "layers", getattr(self.base, "blocks", None))  # DBRX has blocks
        layers = list(stack or ())
        self.layers = [names[layer] for layer in layers]
        self.planned_role = checkpoint.planned_role
        self.matrices = _by_place(checkpoint.planned)
        self.experts = {
            number: names[module]
            for number, layer in enumerate(layers)
            for module in layer.modules()
            if number in self.matrices
            and "shared" not in names[module]
            and is_expert_module(module, len(self.matrices[number]), self.planned_role)
        }
        if self.experts.keys() != self.matrices.keys():
            raise PassError(
                f"{checkpoint.folder}: {type(self.base).__name__} has no module in its layers whose experts could be "
                "run one at a time."
            )
        self.forms = {
            layer: form_of(self.model.get_submodule(name), self.matrices[layer], f"{name} of {checkpoint.folder}")
            for layer, name in self.experts.items()
        }
        self.parts = [names[part] for part in self.base.children() if part is not stack] + self.layers
        mapping: Any = get_model_conversion_mapping(self.model)
        self._loading = LoadStateDictConfig(dtype=torch.float32, weight_mapping=mapping)
        self._sources = self._match_stored_tensors()
        self._compute_buffers()

    def _match_stored_tensors(self) -> dict[str, list[str]]:
        """Stored tensors by the parameter that they make up; tensors of no parameter are left out."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = self._loading.weight_mapping or []
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        parameters = self.model.state_dict()
        prefix = self.model.base_model_prefix
        sources: dict[str, list[str]] = {}
        for name in self.checkpoint.shard_of:
            target = rename_source_key(name, renamings, converters, prefix, parameters)[0]
            if target not in parameters and name in parameters:
                target = name
            if target in parameters:
                sources.setdefault(target, []).append(name)
        return sources

    def _compute_buffers(self) -> None:
        """Rotary frequencies and the like are in no file: the class computes them, as in `from_pretrained`."""
        for module in self.model.modules():
            computed = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
            for name in computed:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if computed:
                self.model._init_weights(module)

    def fill(self, name: str, without: Container[Role] = (), besides: str | None = None) -> None:
        """Read a module's tensors, except those of some roles, and of `besides`, a module in it.

        Raises CheckpointError if any is missing or unfit.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        left_out = set()
        for target, sources in self._sources.items():
            if not target.startswith(f"{name}."):
                continue
            if self.checkpoint.roles[sources[0]] in without or (besides and target.startswith(f"{besides}.")):
                left_out.add(target)
                continue
            # One parameter at a time: fused experts take three times their bytes while they are put together.
            tensors = {source: self._stored(source) for source in sources}
            with no_progress_bars():
                loaded, _ = convert_and_load_state_dict_in_model(self.model, tensors, self._loading)
            if loaded.conversion_errors or loaded.mismatched_keys:
                what = "; ".join(error.strip().splitlines()[-1] for error in loaded.conversion_errors.values())
                unfit = "; ".join(f"{key}: {list(is_)} is not {list(be)}" for key, is_, be in loaded.mismatched_keys)
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {target} cannot be made of {sources[0]} ({what or unfit}). "
                    "Download the checkpoint again or correct config.json."
                )
        state = self.model.get_submodule(name).state_dict(prefix=f"{name}.", keep_vars=True)
        missing = [key for key, value in state.items() if value.is_meta and key not in left_out]
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.folder} stores no tensor for {missing[0]} ({len(missing)} missing in {name}). "
                "Complete the download, or update transformers if the names are new to it."
            )

    def sources(self, parameter: str) -> list[str]:
        """Stored tensors that make up a parameter."""
        return self._sources.get(parameter, [])

    def stores(self, name: str) -> bool:
        """Whether files hold tensors of a module's own."""
        return any(target.startswith(f"{name}.") for target in self._sources)

    def whole_matrix(self, module: str) -> MatrixRef | None:
        """The stored matrix that is a module's weight as it is, if its rows can be read by themselves."""
        weight: Any = self.model.get_submodule(module).weight
        (source, *others) = self.sources(f"{module}.weight") or [""]
        if self.checkpoint.store is not None or others or not source:
            return None
        if self.checkpoint.info(source).shape != tuple(weight.shape):
            return None
        return next((matrix for matrix in self.checkpoint.matrices if matrix.tensor == source), None)

    def come_and_go(self, name: str, without: Container[Role] = ()) -> None:
        """Have a module's tensors read before it runs and dropped after; of the embedding the rows that are looked up.

        An embedding that is run in another way, or has more than a matrix, may need all of them.
        """
        module = self.model.get_submodule(name)
        if isinstance(module, nn.Embedding) and "forward" not in vars(module) and {*module.state_dict()} == {"weight"}:
            matrix = self.whole_matrix(name)
            if matrix is not None:
                look_up_rows(module, self.checkpoint, matrix)
                return
        module.register_forward_pre_hook(lambda module, args: self.fill(name, without))
        module.register_forward_hook(lambda module, args, output: self.empty(name))

    def _stored(self, name: str) -> _StoredTensor:
        return _StoredTensor(self.checkpoint, name)

    def empty(self, name: str) -> None:
        """Drop what `fill` read of a module; computed buffers stay."""
        for module in self.model.get_submodule(name).modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    module._buffers[key] = torch.empty_like(buffer, device="meta")


def stream_forward(
    checkpoint: Checkpoint,
    ids: Tensor,
    visit: Callable[[LayerTraffic], None],
    hollow: HollowModel | None = None,
    experts_of: Callable[[HollowModel, LayerTraffic], Tensor] | None = None,
    with_passages: bool = False,
) -> Tensor:
    """Final hidden states, float32 [windows, length, hidden], of int64 token ids [windows, length].

    On the way `visit` is shown each MoE layer's traffic, in order; tokens are in row-major order of the windows.
    experts_of: gives a layer's output of its experts instead of `run_experts`. with_passages: traffic comes with them.
    Memory: a layer's weights without its routed experts and one of these, in float32, and the activations of all
    windows in one layer. Raises CheckpointError as `HollowModel` does, and AlphaQError for
    ids that are no windows of this model's tokens.
    """
    map_large_tensors()
    hollow = hollow or HollowModel(checkpoint)
    vocabulary = hollow.base.get_input_embeddings().num_embeddings
    if ids.ndim != 2 or not ids.numel() or not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise AlphaQError(
            f"Token ids of shape {list(ids.shape)} are no windows over the {vocabulary} tokens of {checkpoint.name}. "
            "Give [windows, length] ids from this model's own tokenizer."
        )

    for layer in hollow.experts:
        _Watched(hollow, layer, experts_of or run_experts, visit, with_passages)
    for name in hollow.parts:
        hollow.come_and_go(name, (hollow.planned_role,))
    try:
        with torch.no_grad():  # not inference mode, whose tensors `visit` could not change in threads of its own
            return hollow.base(input_ids=ids, use_cache=False).last_hidden_state
    except torch.linalg.LinAlgError as error:
        raise PassError(f"{checkpoint.name} does not run in float32: what its layers put out overflows.") from error
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        raise PassError(
            f"{type(hollow.base).__name__} of {checkpoint.name} cannot be run layer by layer ({str(error)[:200]})."
        ) from error


class _Watched:
    """One MoE layer: its experts compute with what is on disk, and what they saw is shown once the layer is done."""

    def __init__(
        self,
        hollow: HollowModel,
        layer: int,
        experts_of: Callable[[HollowModel, LayerTraffic], Tensor],
        visit: Callable[[LayerTraffic], None],
        with_passage: bool,
    ) -> None:
        self.hollow, self.layer, self.experts_of, self.visit = hollow, layer, experts_of, visit
        self.traffic: LayerTraffic | None = None
        self.output: Tensor | None = None
        experts: Any = hollow.model.get_submodule(hollow.experts[layer])
        decoder = hollow.model.get_submodule(hollow.layers[layer])
        self.recorder = Recorder(decoder, experts) if with_passage else None
        experts.register_forward_pre_hook(self._see, with_kwargs=True)
        experts.forward = self._run
        decoder.register_forward_hook(self._show, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Keywords) -> None:
        if self.output is None:
            self.traffic = traffic_of(self.hollow, self.layer, args, kwargs)

    def _run(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.traffic is not None  # the hook comes first
        if self.output is None:
            self.output = self.experts_of(self.hollow, self.traffic)
        return self.output.view_as(states)

    def _show(self, module: Any, args: tuple[Any, ...], kwargs: Keywords, output: Any) -> None:
        assert self.traffic is not None and self.output is not None  # the layer has been run
        traffic, put_out, recorder = self.traffic, self.output, self.recorder
        if recorder is not None:

            def rerun(other: Tensor) -> Tensor:
                self.output = other
                with recorder.replaying():
                    return _stream(module.forward(*args, **kwargs))

            where = f"{self.hollow.layers[self.layer]} of {self.hollow.checkpoint.name}"
            traffic = replace(traffic, passage=Passage(rerun, put_out, _stream(output), where))
        self.visit(traffic)
        self.traffic = self.output = None
        if recorder is not None:
            recorder.clear()


def _stream(output: Any) -> Tensor:
    """The stream in what a decoder layer gives."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


def run_experts(
    hollow: HollowModel, traffic: LayerTraffic, read: Callable[[MatrixRef], Tensor] | None = None
) -> Tensor:
    """Σ w·expert(x) over each token's experts, float32 [tokens, hidden], an expert at a time.

    read: gives a matrix in float32, which is used before the next is asked for; the stored one by default.
    """
    read = read or Room(hollow.checkpoint).read
    output, form = torch.zeros_like(traffic.inputs), traffic.form
    for number, matrices in hollow.matrices[traffic.layer].items():
        token, slot = torch.where(traffic.experts == number)
        if not len(token):
            continue
        inputs = traffic.inputs[token]
        hidden = form.hidden([inputs @ read(matrices[part]).T for part in form.first], number)
        put_out = form.output(hidden @ read(matrices["down"]).T, number)
        output.index_add_(0, token, put_out * traffic.weights[token, slot, None])
    return output


def traffic_of(hollow: HollowModel, layer: int, args: tuple[Any, ...], kwargs: Keywords) -> LayerTraffic:
    """The arguments of an experts module's forward, however they were passed; all tokens of a dense model's MLP."""
    names = ("hidden_states", "top_k_index", "top_k_weights")
    passed = (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
    inputs = passed[0].float().flatten(0, -2)
    if hollow.planned_role is not Role.EXPERT:
        passed = (inputs, inputs.new_zeros(len(inputs), 1), inputs.new_ones(1, 1))
    if len(passed) != len(names):
        raise PassError(
            f"{hollow.experts[layer]} of {hollow.checkpoint.name} is not told which experts its tokens go to."
        )
    _, experts, weights = passed
    weights = weights.float().expand(experts.shape)
    return LayerTraffic(layer, inputs, experts.long(), weights, hollow.forms[layer])
