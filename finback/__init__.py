"""finback: the DeepSeek-V3/R1 system, whole, in one readable Python package.

The public names below are found on first use, so that `import finback` stays fast and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finback.config import InputError, ModelConfig, ParamCounts, count_params
    from finback.engine.config import SamplingParams
    from finback.engine.grammar_config import Grammar
    from finback.engine.llm import LLM
    from finback.model.checkpoint import hf_tensors, load, save

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Grammar",
    "InputError",
    "ModelConfig",
    "ParamCounts",
    "SamplingParams",
    "__version__",
    "count_params",
    "hf_tensors",
    "load",
    "save",
]

_HOME_OF = {
    "LLM": "finback.engine.llm",
    "Grammar": "finback.engine.grammar_config",
    "InputError": "finback.config",
    "ModelConfig": "finback.config",
    "ParamCounts": "finback.config",
    "SamplingParams": "finback.engine.config",
    "count_params": "finback.config",
    "hf_tensors": "finback.model.checkpoint",
    "load": "finback.model.checkpoint",
    "save": "finback.model.checkpoint",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'finback' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
