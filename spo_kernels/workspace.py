"""CUDA launches of the ops that check their input on the device: a workspace, and one read-back."""

from __future__ import annotations

from typing import Any

import torch


def run_checked(native: Any, kernel: str, args: Any, device: torch.device) -> bool | int:
    """Run `<kernel>_cuda` with a workspace from torch. Returns what `<kernel>_cpu` returns.

    The native side never waits for the device. It leaves an int64 at the start of the workspace:
    the number of segments or 0, and -1 if the input is malformed. Reading it is the one wait of
    the call. While a CUDA graph is captured nothing is read: the call counts as well-formed, and
    the outputs of malformed input are NaN when the graph runs.
    """
    size = getattr(native, f"{kernel}_workspace")(args)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    args.workspace = workspace.data_ptr()
    getattr(native, f"{kernel}_cuda")(args)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    result = int(workspace[:8].view(torch.int64))
    return result if kernel == "segments" else result == 0
