"Co-evolving policy distillation (CoPD), its baselines and the gap analysis that explains them."
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads slow a shared machine down
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a short spin still pays: small models run up to twice as fast
__version__ = "0.2.0"

_NAMES = {  # module → the public names that come from it
    "data.capability": "Capability Example",
    "data.faults": "problems",
    "data.files": "capability_from read_examples",
    "data.guess": "guess_from",
    "data.scoring": "score",
    "data.verifiers": "named_reward",
    "policy.core": "Policy",
    "policy.lora_branches": "lora",
    "policy.pair": "minis_branch",
    "policy.suites": "load_suite",
    "policy.toys": "minis minis_base",
    "signals.compare": "compare_states",
    "signals.divergences": "divergence symmetric_kl topk_overlap",
    "signals.estimators": "Estimator",
    "signals.objectives": "clipped_surrogate grpo_advantages opd_advantages",
    "signals.rollouts": "Rollouts",
    "signals.sampling": "sample",
    "schedule.copd_schedules": "copd",
    "schedule.core": "Schedule Sync",
    "schedule.merging": "merge",
    "schedule.neighbours": "camopd codistill_grpo reward_and_teacher semi_opd",
    "schedule.paradigms": "expert merged_experts mixed_rlvr mopd schedule_from static_opd",
    "schedule.live": "Average Snapshot",
    "schedule.adaptive": "Control",
    "schedule.parts": "OPD RL SFT Merge Phase Update",
    "schedule.rules": "Setting control_rule",
    "schedule.local": "local_rlvr synced",
    "engine.config": "Config",
    "engine.evaluation": "evaluate",
    "engine.runs": "Run list_runs",
    "engine.training": "train",
    "analysis.absorption_ratio": "absorption",
    "analysis.audits": "audit",
    "analysis.gradients": "gradient_conflict",
    "analysis.outlook": "preflight",
    "analysis.token_gap": "behavior_gap",
    "study.experiment": "Experiment read_experiment",
    "study.jobs": "Job",
    "study.reuse": "reuse_table",
    "study.memory": "plan_for priced",
    "study.rehearsal": "rehearse",
    "view.browser": "RunBrowser",
    "view.designer": "ScheduleDesigner",
    "view.gap_explorer": "GapExplorer",
    "view.monitor": "RunMonitor",
    "view.story": "RunStory save_story shipped_run",
    "view.token_inspector": "TokenInspector",
    "view.token_views": "token_view",
    "scale.callbacks": "GapCallback",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    "Public names are imported on first use (PEP 562), so that `import copd_nb` costs nothing."
    if name not in _HOME: raise AttributeError(f"module 'copd_nb' has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f"copd_nb.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
