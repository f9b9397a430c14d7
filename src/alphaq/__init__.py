"""AlphaQ: fit Mixture-of-Experts models into the memory you have.

Importing the package is light and makes native checkpoints loadable: `import alphaq`, then
`AutoModelForCausalLM.from_pretrained(folder)`.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"

_HOOKED = "transformers.quantizers.auto"
_PLUGIN = "alphaq.runtime.transformers_plugin"


class _PluginFinder(importlib.abc.MetaPathFinder):
    """Registers the plug-in right after transformers loads its quantizers, and not before.

    transformers has no entry point for quantizers; importing it here would cost every user of the
    package several seconds and all of torch.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _PluginLoader(spec.loader)
        return spec


class _PluginLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_PLUGIN)


if _HOOKED in sys.modules:
    importlib.import_module(_PLUGIN)
else:
    sys.meta_path.insert(0, _PluginFinder())
