"Co-evolving policy distillation (CoPD), its baselines and the gap analysis that explains them."
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: threads that spin without end make shared machines crawl
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # but some microseconds between two operations are worth waiting for: small models are up to twice as fast
__version__ = "0.1.0"
