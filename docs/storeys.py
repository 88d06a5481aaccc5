"""A short example for each package, shown on the first page of the API and run by its test."""
STOREYS = dict(
    data='''from copd_nb.data.capability import Example
from copd_nb.data.verifiers import named_reward

reward = named_reward("numeric?tolerance=0.01")
reward(["It is 5.001.", "It is 6."], [Example("2 + 3 = ", "5", "sums")] * 2)  # one reward a completion''',
    policy='''from copd_nb.policy.toys import text, tiny_policy

policy, capability = tiny_policy(), text(8)
policy.width, capability.train[0].prompt  # size of the vocabulary, a prompt''',
    signals='''import torch
from copd_nb.signals.divergences import topk_overlap

a, b = torch.randn(2, 5, 100).log_softmax(-1)  # two policies at five positions
topk_overlap(a, b, 10)  # the share of their ten most likely tokens in common''',
    schedule='''from copd_nb import copd

schedule = copd(["text", "image"], cycles=2, s_rl=3, s_opd=2)
schedule.total_steps, schedule.critical_steps  # in Jupyter it draws itself''',
    engine='''from copd_nb import Config, copd, minis, minis_base, train

config = Config(prompts=2, opd_prompts=2, group_size=2, max_new_tokens=3, eval_every=0)
schedule = copd(["text", "image"], cycles=1, s_rl=1, s_opd=1)
run = train(schedule, minis(("text", "image")), minis_base(), config, out="runs/first")
run.events.query("kind == 'train'")[["branch", "stream", "reward"]]''',
    analysis='''import numpy as np
from copd_nb.analysis.intervals import crossed_bootstrap

right = np.random.default_rng(0).random((3, 64)) > 0.4
crossed_bootstrap(right.astype(float))  # 3 seeds, 64 prompts: mean and 95 % interval''',
    study='''from copd_nb.study.experiment import read_experiment, rows_of

experiment = read_experiment("minis")
[p.label for p in rows_of(experiment)["two_branch"]]  # the rows of its comparison''',
    view='''import pandas as pd
from copd_nb.view import plots

scores = pd.DataFrame([dict(paradigm=p, capability="text", mean=m, low=m - 2, high=m + 2)
                       for p, m in dict(CoPD=71.0, MOPD=68.5).items()])
plots.intervals(scores)''',
    report='''from copd_nb.report.parameters import parameters_of

parameters_of("experiment")  # what `copd report experiment -p NAME VALUE` takes''',
    scale='''from copd_nb.scale.places import placed

placed(dict(text=0.8, image=1.6), devices=3)  # seconds of a step of each branch: the heavier one gets two devices''')
