"""What entropy-coded files take beside the planned matrices: known once everything else in them has been coded."""

from __future__ import annotations

import hashlib

from alphaq.checkpoint.safetensors_format import FILE_OVERHEAD
from alphaq.formats.coding import coder_version
from alphaq.measuring.measurement import CodedTask, coded_bytes
from alphaq.measuring.resources import Resources
from alphaq.planning.scope import Scope
from alphaq.quantizers.base import QUANTIZERS
from alphaq.work.workers import Workers


def coded_rest(scope: Scope, resources: Resources) -> int:
    """Bytes of the coded files without the planned matrices, from the cache where it knows them."""
    if resources.cache is None:
        return _measured_rest(scope, resources)
    request = scope.request
    versions = f"{coder_version(str(request.config.codec))} {QUANTIZERS[request.profile.quantizer].version}"
    key = hashlib.sha256(f"{versions} {sorted(scope.fixed.items())}".encode()).hexdigest()[:16]
    return resources.cache.recall(f"rest-{key}.txt", lambda: str(_measured_rest(scope, resources)), int)


def _measured_rest(scope: Scope, resources: Resources) -> int:
    checkpoint, tasks = scope.checkpoint, _tasks(scope)
    pool = resources.pool(checkpoint)
    local = Workers(1, checkpoint) if pool.cluster else pool

    def size(task: CodedTask) -> int:
        source = task.source
        return checkpoint.info(source).nbytes if isinstance(source, str) else 2 * source.parameters

    sizes = resources.wrap(local.map(coded_bytes, tasks, size), len(tasks), "measure the rest")
    return FILE_OVERHEAD * len(checkpoint.shards) + sum(sizes)


def _tasks(scope: Scope) -> list[CodedTask]:
    """Every tensor that is kept, then every matrix that is quantized outside the budget."""
    checkpoint, quantizer = scope.checkpoint, scope.request.profile.quantizer
    planned = {matrix.name for matrix in scope.planned}
    within = checkpoint.matrices_by_tensor(scope.fixed.keys() | planned)
    stored = (tensor for tensors in checkpoint.shards.values() for tensor in tensors)
    kept = [CodedTask(tensor, None, quantizer) for tensor in stored if tensor not in within]
    rounded = (matrix for matrices in within.values() for matrix in matrices if matrix.name not in planned)
    return kept + [CodedTask(matrix, scope.fixed[matrix.name], quantizer) for matrix in rounded]
