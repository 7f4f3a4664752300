"""fastssl: fast self-supervised pretraining of vision backbones, judged by accuracy per minute."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl.weights import load_backbone as load_backbone

__all__ = ["load_backbone"]


def __getattr__(name: str) -> Any:
    """`load_backbone`, imported when it is first asked for: torch takes seconds to import."""
    if name == "load_backbone":
        from fastssl.weights import load_backbone

        return load_backbone
    raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
