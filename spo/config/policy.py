"""`policy`: the model that is trained."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spo.config.lora import LoraConfig

EMBEDDED = Path(__file__).parents[1] / "assets" / "policy"
CHUNK, STRIDE = 1 << 20, 1 << 26  # CHUNK bytes of every STRIDE are hashed


@dataclass(frozen=True)
class PolicyConfig:
    """The policy that is trained."""

    path: str = "embedded"
    """Folder with config.json, safetensors weights and tokenizer.json, or a hub id. `embedded` is
    the small policy that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights and their gradients; `train.master_weights` keeps what bfloat16
    rounds off. A checkpoint's policy has the type of the folder that the run began with."""
    autocast: bool = False
    """Run the forward in bfloat16 over float32 weights."""
    device: str = "cpu"
    """Device of the trainer and the engine: cpu or cuda."""
    packing: Literal["tree", "rows"] = "tree"
    """tree: every unique token once. rows: one row per node with its whole prefix, for models
    whose layers cannot be packed."""
    attention: Literal["auto", "dense", "grouped", "flex", "varlen"] = "auto"
    """Attention over a pack. auto: grouped on the CPU, flex on CUDA. varlen needs flash-attn."""
    dropout: bool = False
    """Train with the dropout and the router noise of the model's configuration. Off, a logprob is
    the same whenever it is computed, and the ratio of a token to itself is 1."""
    gradient_checkpointing: bool = False
    """Keep only the input of each layer for the backward and compute the rest again there: less
    memory, a forward more, the same gradient. docs/memory.md says what it saves."""
    compile: bool = False
    """Let torch.compile fuse what the layers do between their products: faster steps after about
    half a minute of compiling. On a CPU it needs a C++ compiler."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in place of the weights: {rank: 16, alpha: 32, targets: all-linear}.
    The reference is then the model without them, and checkpoints hold them alone."""
    trust_remote_code: bool = False
    """Run code that comes with the model folder. Leave it off for models you did not write."""

    def __post_init__(self) -> None:
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"policy.device: expected cpu or cuda, found {self.device}")

    @property
    def source(self) -> str:
        """The folder or hub id that `path` names."""
        return str(EMBEDDED) if self.path == "embedded" else self.path

    def content(self) -> str:
        """A digest of the folder's model and tokenizer files, wherever it is; a hub id as it is.

        Of large files one megabyte in every 64 is read: after training all of them differ.
        """
        folder = Path(self.source)
        if not folder.is_dir():
            return self.path
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            if path.suffix not in (".json", ".safetensors", ".model", ".txt"):
                continue
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for start in range(0, size, STRIDE):
                    file.seek(start)
                    digest.update(file.read(CHUNK if size > STRIDE else size))
        return digest.hexdigest()[:16]
