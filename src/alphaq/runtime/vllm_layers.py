"""vLLM's layers on packed blocks.

vLLM gives every layer a placeholder parameter whose weight_loader it calls once per tensor of the checkpoint, with the
shard (q, k, v; gate, up; w1, w2, w3) and the expert that it is for. Blocks have different lengths, so the placeholders
hold nothing and their loaders collect. When all have arrived, a layer's blocks become `PackedWeights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    MoEActivation,
    apply_moe_activation,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from alphaq.errors import CheckpointError
from alphaq.nouns.matrix import Shape
from alphaq.runtime.multiply import packed_linear
from alphaq.runtime.packed import PackedWeights

PLACES = {"q": 0, "k": 1, "v": 2}
"""Shard ids of attention, which come in this order; elsewhere they are numbers."""
HALVES = {MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH}
"""Activations of [gate | up] that vLLM has on every platform."""
CLAMPED = {MoEActivation.SITU, MoEActivation.SWIGLUOAI_UNINTERLEAVE, MoEActivation.SWIGLUSTEP}
"""Those that it has on GPUs only."""


def method_of(layer: nn.Module, prefix: str, parts: Sequence[str] | None) -> Any:
    """A method object of its own for each layer, because it holds what has arrived for it.

    parts: last words of the names of the matrices that vLLM has merged, if it has. Raises CheckpointError if matrices
    would have to be split.
    """
    if not isinstance(layer, LinearBase | RoutedExperts | VocabParallelEmbedding):
        return None
    if (size := get_tensor_model_parallel_world_size()) > 1:
        raise CheckpointError(
            f"Native checkpoints cannot be split over {size} devices: a block holds a whole matrix. Serve with "
            "--tensor-parallel-size 1; --pipeline-parallel-size spreads a large model by layers."
        )
    if isinstance(layer, RoutedExperts):
        return PackedExperts(layer)
    # Embedding and head have matrices of 16 bits; blocks are restored as they are loaded (vllm_plugin).
    return PackedLinear(prefix, parts) if isinstance(layer, LinearBase) else None


class PackedLinear(LinearMethodBase):
    """A linear layer that vLLM has merged from one or more of the checkpoint's matrices.

    parts: last words of their names, in the order of their rows; None for a layer that is not merged.
    """

    def __init__(self, prefix: str, parts: Sequence[str] | None) -> None:
        self.prefix = prefix
        self.parts = parts
        self.arrived: dict[tuple[int, int], Tensor] = {}
        """First and last part that a tensor stands for, mostly the same."""
        self.rows: list[int] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """A placeholder that collects."""
        self.sizes, self.columns, self.dtype = list(output_partition_sizes), input_size, params_dtype
        _placeholder(layer, "weight", self.collect)

    def collect(self, parameter: Tensor, loaded: Tensor, shard: Any = None) -> None:
        """Called by vLLM for every matrix."""
        span = (0, len(self.sizes) - 1) if shard is None else shard if isinstance(shard, tuple) else (shard, shard)
        first, last = (PLACES[one] if isinstance(one, str) else one for one in (span[0], span[-1]))
        self.arrived[first, last] = _owned(loaded, parameter.device)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Blocks become `PackedWeights`; a layer that was kept altogether becomes an ordinary one of vLLM's."""
        blocks = sorted(self.arrived.items())
        self.arrived = {}
        covered = [part for (first, last), _ in blocks for part in range(first, last + 1)]
        for part in range(len(self.sizes)):
            if part not in covered:
                raise _missing(self._name(part), self.prefix)
        if all(tensor.ndim == 2 for _, tensor in blocks):
            self._keep(layer, [tensor for _, tensor in blocks])
            return
        runs: list[tuple[int, list[str], list[Tensor]]] = []  # one call of the kernel for neighbours of as many rows
        for (first, last), tensor in blocks:
            rows = sum(self.sizes[first : last + 1])
            name = self._name(first) if first == last else f"{self.prefix}.weight"
            if not runs or runs[-1][0] != rows:
                runs.append((rows, [], []))
            runs[-1][1].append(name)
            runs[-1][2].append(tensor)
        self.rows = [rows for rows, _, _ in runs]
        for place, (rows, names, tensors) in enumerate(runs):
            _attach(layer, f"packed_{place}", [[name] for name in names], (rows, self.columns), [[t] for t in tensors])

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] → [..., rows of all parts]."""
        inputs = x.reshape(-1, x.shape[-1])
        tokens = torch.arange(inputs.shape[0], device=x.device)
        experts = torch.zeros_like(tokens)
        outputs = [
            packed_linear(inputs, getattr(layer, f"packed_{place}_table"), rows, experts, tokens)
            for place, rows in enumerate(self.rows)
        ]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if bias is not None:
            output = output + bias
        return output.view(*x.shape[:-1], output.shape[1])

    def _name(self, part: int) -> str:
        """A part's name in the checkpoint, where vLLM says it."""
        if len(self.sizes) == 1:
            return f"{self.prefix}.weight"
        if self.parts is not None and len(self.parts) == len(self.sizes):
            return f"{self.prefix.rpartition('.')[0]}.{self.parts[part]}.weight"
        return f"part {part} of {self.prefix}.weight"

    def _keep(self, layer: nn.Module, matrices: list[Tensor]) -> None:
        merged = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        if merged.shape != (sum(self.sizes), self.columns):
            raise CheckpointError(
                f"{self.prefix}.weight has shape {list(merged.shape)}, vLLM's layer expects "
                f"{[sum(self.sizes), self.columns]}. Quantize the model again."
            )
        weight = nn.Parameter(merged.to(self.dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        layer.weight = weight
        method = UnquantizedLinearMethod()
        layer.quant_method = method
        method.process_weights_after_loading(layer)


class PackedExperts(FusedMoEMethodBase):
    """The routed experts of a layer."""

    def __init__(self, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self.prefix = layer.layer_name
        named = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name, "w3": layer.ckpt_up_proj_name}
        self.projections = {shard: name for shard, name in named.items() if name is not None}
        self.arrived: dict[tuple[str, int], Tensor] = {}
        """Shard and expert."""
        moe = layer.moe_config
        if moe.tp_size > 1 or moe.use_ep:
            raise CheckpointError(
                f"{self.prefix}: experts of a native checkpoint cannot be spread over processes. Serve without "
                "--enable-expert-parallel and with --data-parallel-size 1; for more throughput, start more servers."
            )
        if moe.has_bias:
            raise CheckpointError(f"{self.prefix}: experts with biases cannot be served from packed blocks by vLLM.")
        activation, limited = moe.activation, moe.swiglu_limit is not None
        usable = not activation.is_gated or (activation in HALVES and not limited)
        if not usable and (current_platform.is_cpu() or activation not in HALVES | CLAMPED):
            raise CheckpointError(
                f"{self.prefix}: vLLM has no activation {activation.value}{' with a limit' * limited} for packed "
                "experts on this device. Use `alphaq generate`, or another engine's profile (`alphaq engines`)."
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Two placeholders that collect, under the names that vLLM's loaders look for."""
        self.hidden, self.intermediate = hidden_size, intermediate_size_per_partition
        for name in ("w13_weight", "w2_weight"):
            _placeholder(layer, name, self.collect)

    def collect(
        self,
        param: Tensor,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Called by vLLM for every matrix of every expert; whether it was taken."""
        self.arrived[shard_id, expert_id] = _owned(loaded_weight, param.device)
        return True if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Blocks become two `PackedWeights`: gate and up, and down."""
        experts = range(layer.global_num_experts)
        up_shards = ["w1", "w3"] if self.moe.is_act_and_mul else ["w1"]
        shapes: dict[str, Shape] = {"w13": (self.intermediate, self.hidden), "w2": (self.hidden, self.intermediate)}
        for target, shards in (("w13", up_shards), ("w2", ["w2"])):
            names, blocks = [], []
            for shard in shards:
                names.append([f"{self.prefix}.{one}.{self.projections[shard]}.weight" for one in experts])
                for name, one in zip(names[-1], experts, strict=True):
                    if (shard, one) not in self.arrived:
                        raise _missing(name, self.prefix)
                blocks.append([self.arrived.pop((shard, one)) for one in experts])
            _attach(layer, target, names, shapes[target], blocks)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Nothing of vLLM's own quantization."""
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [tokens, hidden], routed by vLLM to topk_ids [tokens, k] → [tokens, hidden]."""
        experts = topk_ids.flatten().long()
        pairs = torch.arange(experts.shape[0], device=x.device)
        if layer.apply_router_weight_on_input:  # vLLM allows it for one expert per token only
            x = x * topk_weights.to(x.dtype)
        gate_up = packed_linear(x, layer.w13_table, self.intermediate, experts, pairs // topk_ids.shape[1])
        inner = gate_up.new_empty(gate_up.shape[0], self.intermediate)
        config = ApplyMoEActivationConfig.from_configs(self.moe, self.moe_quant_config or FusedMoEQuantConfig.make())
        apply_moe_activation(layer.activation, inner, gate_up, activation_config=config)
        output = packed_linear(inner, layer.w2_table, self.hidden, experts, pairs)
        output = output.view(*topk_ids.shape, self.hidden)
        if not layer.apply_router_weight_on_input:
            output = output.mul_(topk_weights.unsqueeze(-1))
        return output.sum(dim=1)


def _placeholder(layer: nn.Module, name: str, collect: Any) -> None:
    """An empty parameter for vLLM's loaders to find."""
    parameter = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": collect})
    layer.register_parameter(name, parameter)


def _owned(loaded: Tensor, device: torch.device) -> Tensor:
    """A copy that lives on: some of vLLM's loaders reuse their buffers, and files may change under a server."""
    return loaded.detach().to(device, copy=True).contiguous()


def _attach(layer: nn.Module, name: str, names: list[list[str]], shape: Shape, blocks: list[list[Tensor]]) -> None:
    """Fill `PackedWeights`, and make its table a buffer: a compiled graph must not hold this process's addresses."""
    packed = PackedWeights(names, shape)
    packed.fill(blocks)
    layer.add_module(name, packed)
    layer.register_buffer(f"{name}_table", packed.table, persistent=False)


def _missing(name: str, layer: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is not in the checkpoint, or vLLM did not hand it to its layer {layer}. Check the folder with "
        "`alphaq verify`; if it is complete, this alphaq does not support the family in vLLM."
    )
