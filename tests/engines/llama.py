"""The real llama.cpp, as the package itself runs it."""

from alphaq.engines.gguf.library import Llama, LlamaError, _Batch, _ContextParams, _library, _ModelParams

__all__ = ["Llama", "LlamaError", "_Batch", "_ContextParams", "_ModelParams", "_library"]
