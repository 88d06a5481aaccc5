"Co-evolving policy distillation (CoPD), its baselines and the gap analysis that explains them."
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning OpenMP threads make shared machines crawl
__version__ = "0.1.0"
