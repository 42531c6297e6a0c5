"""The head of other trainers and models, replaced by `linear_token_logprobs` where you ask for it.

Importing this package imports none of them, and replaces nothing.
"""

from spo_kernels.integrations.transformers_model import patch_transformers
from spo_kernels.integrations.trl_head import patch_trl_head
from spo_kernels.integrations.verl_head import patch_verl_head

__all__ = ["patch_transformers", "patch_trl_head", "patch_verl_head"]
