"""What the kernels and the trainer are worth, measured beside their rivals.

`kernels/` one op each; `rollouts/` and `rollout_tree.py` the growing of trees; `train_step.py` and
`shared_prefix.py` one stage of training each; `evidence/` and `end_to_end.py` whole training runs;
`figures/` the committed results and the pages made of them; `check.py` this commit against another.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
