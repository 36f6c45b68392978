"""The operations that a call dispatches."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NO_KERNEL = frozenset(
    "aten." + name for name in (
        "empty", "empty_like", "empty_strided", "new_empty", "detach", "view", "alias", "select",
        "slice", "as_strided", "unsqueeze", "expand", "is_pinned", "split", "_unsafe_view",
    )
)  # fmt: skip


class Operations(TorchDispatchMode):
    """The operations dispatched; those without a kernel of their own left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        if name not in NO_KERNEL:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
