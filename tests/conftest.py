"Set before torch loads: spinning OpenMP threads make a shared machine crawl."
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
