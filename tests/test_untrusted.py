"""Input from others is data: no pickle, no remote code, no path out of its folder, no markup.
Output to others reveals nothing about this machine."""
import ast
import base64
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import datasets
import mistune
import nbformat
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from PIL import Image

from copd_nb.engine import environment as environment_module
from copd_nb.policy import templates as templates_module
from copd_nb.report import driver as driver_module
from copd_nb.report import overview as index_module
from copd_nb.report import parameters as parameters_module
from copd_nb.view import browser as browser_module
from copd_nb.view import designer as designer_module
from copd_nb.view import gap_explorer as gap_explorer_module
from copd_nb.view import monitor as monitor_module
from copd_nb.view import pages as pages_module
from copd_nb.view import story as story_module
from copd_nb.view import token_inspector as token_inspector_module
from copd_nb.analysis.audits import audit
from copd_nb.data.capability import Capability, Example, check_name
from copd_nb.analysis.findings import finding
from copd_nb.analysis.page import claims_of, claims_page_markdown
from copd_nb.schedule.costs import Cost
from copd_nb.data.files import read_examples
from copd_nb.data.faults import problems
from copd_nb.data.guess import guess_from
from copd_nb.view.comparisons import AccuracyTable
from copd_nb.view.report_page import rendered
from copd_nb.policy.core import Policy
from copd_nb.policy.lora_branches import lora
from copd_nb.analysis.records import write_results
from copd_nb.report.command import main
from copd_nb.report.driver import _to_html
from copd_nb.report.overview import entries, publish, write_index
from copd_nb.report.parameters import (
    OPTIONAL, check_parameters, notebook_of, parameterised, parameters_of, report_names)
from copd_nb.signals.rollouts import Rollouts
from copd_nb.engine.checkpoints import load_checkpoint, save_checkpoint
from copd_nb.engine.log import EventLog
from copd_nb.engine.environment import without_places
from copd_nb.engine.runs import Run, create_run
from copd_nb.engine.storage import write_json
from copd_nb.scale.forecast import Forecast
from copd_nb.scale.simulate import Timeline
from copd_nb.schedule.core import Schedule
from copd_nb.schedule.parts import RL, Phase, Update
from copd_nb.schedule.rules import Rule
from copd_nb.policy.skills import text_policy
from copd_nb.view.token_pages import html_of, legend, prompt_of, save_page, token_panel
from copd_nb.view.token_data import METRICS, Choice, Completion, TokenView

ROOT = Path(__file__).parents[1]
LIBRARY = [p for p in sorted((ROOT / "copd_nb").rglob("*.py")) if "assets" not in p.parts]
SOURCES = [*LIBRARY, ROOT / "docs" / "build.py", *sorted((ROOT / "bench").glob("*.py"))]
spec = importlib.util.spec_from_file_location("docs_build_untrusted", ROOT / "docs" / "build.py")
docs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs)


def name(path): return path.relative_to(ROOT).as_posix()


# --- no pickle

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "eval", "exec", "compile", "__import__",
         "builtins.eval", "builtins.exec", "builtins.compile"}
ENDINGS = ("read_pickle", "to_pickle")


@cache
def nodes(source): return list(ast.walk(ast.parse(source)))


def sinks(source):
    "Where code could read a pickle or turn text into code."
    for node in nodes(source):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES | {"builtins"}:
            yield node.module
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False): yield node.arg
        if not isinstance(node, ast.Call): continue
        called = ast.unparse(node.func)
        if called in CALLS or called.endswith(ENDINGS): yield called
        automatic = re.search(r"\bAuto\w+\.from_pretrained$", called)
        if automatic and "trust_remote_code" not in {k.arg for k in node.keywords}: yield called


def test_no_source_reads_pickles_or_makes_code_of_text():
    found = {name(path): list(sinks(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert len(found) > 100 and not {path: calls for path, calls in found.items() if calls}


@pytest.mark.parametrize("line", [
    "import pickle", "import dill as d", "from marshal import loads", "from cloudpickle import load",
    "def f():\n import joblib", "torch.load(f)", "torch.save(x, f)", "np.load(f, allow_pickle=True)",
    "np.load(f, allow_pickle=flag)", "pd.read_pickle(f)", "frame.to_pickle(f)", "yaml.load(f)", "eval(x)", "exec(x)",
    "compile(x, '', 'exec')", "AutoModel.from_pretrained(f)",
    "m.AutoTokenizer.from_pretrained(f, trust_remote_code=True)", "from builtins import exec"])
def test_the_search_finds_every_form(line): assert list(sinks(line))


def test_code_is_made_of_text_in_the_sandbox_only():
    "The one program text that calls exec: the line that runs a model's program, and its tests, inside of the sandbox."
    texts = [(path.name, node.value) for path in SOURCES for node in nodes(path.read_text(encoding="utf-8"))
             if isinstance(node, ast.Constant) and isinstance(node.value, str)
             and re.search(r"\b(exec|eval|compile|__import__)\(|\bexec\b$|, exec$", node.value, re.M)]
    assert texts == [("launcher.py", "def _run(text, names): exec(compile(text, '<solution>', 'exec'), names)")]


def bomb(marker):
    "A pickle that writes a file when it is read."
    class Payload:
        def __reduce__(self): return Path.touch, (marker,)
    return pickle.dumps(Payload())


def sums(): return [dict(prompt=f"{a}+{a}=", answer=str(2 * a)) for a in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory): return text_policy(hidden=32, layers=1).save(tmp_path_factory.mktemp("model") / "text")


@pytest.fixture
def folder(model, tmp_path):
    "A copy of a small checkpoint."
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir(): (copy / file.name).write_bytes(file.read_bytes())
    return copy


def weights_become_a_pickle(folder, data): (folder / "model.safetensors").write_bytes(data)


def weights_are_pickled_only(folder, data):
    (folder / "model.safetensors").unlink()
    for file in ("pytorch_model.bin", "model.pkl"): (folder / file).write_bytes(data)


def an_index_names(*names):
    def change(folder, data):
        (folder / "pytorch_model.bin").write_bytes(data)
        (folder.parent / "other.safetensors").write_bytes(data)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(dict(metadata={}, weight_map={f"w{i}": n for i, n in enumerate(names)})))
    return change


def changed(file, **values):
    "Change a JSON file of the folder."
    def change(folder, data):
        path = folder / file
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    return change


REFUSED_WEIGHTS = [(weights_become_a_pickle, "model.safetensors is no safetensors file"),
                   (weights_are_pickled_only, "holds no safetensors"),
                   (an_index_names("pytorch_model.bin"), r"names \['pytorch_model.bin'\]"),
                   (an_index_names("../other.safetensors"),
                    r"names \['../other.safetensors'\]: only safetensors in its own folder"),
                   (an_index_names(7), r"names \['7'\]"),
                   (changed("model.safetensors.index.json", weight_map=[1]), "is no index of weights"),
                   (changed("config.json", transformers_weights="../other.safetensors"), "wants weights from"),
                   (changed("config.json", attn_implementation="someone/kernel"),
                    "wants attention from 'someone/kernel': no remote code is run"),
                   (changed("config.json", _attn_implementation="someone/kernel"),
                    "wants attention from 'someone/kernel'")]


@pytest.mark.parametrize("change, message", REFUSED_WEIGHTS, ids=[m for _, m in REFUSED_WEIGHTS])
def test_weights_that_are_not_safetensors_of_the_folder_are_refused_unread(folder, tmp_path, change, message):
    change(folder, bomb(tmp_path / "ran"))
    with pytest.raises(ValueError, match=message): Policy.load(folder)
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_safetensors_are_ignored(folder, tmp_path):
    for file in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "model.pkl",
                 "adapter_model.bin", "consolidated.pth"):
        (folder / file).write_bytes(bomb(tmp_path / "ran"))
    assert torch.equal(Policy.load(folder).parameters()[0], text_policy(hidden=32, layers=1).parameters()[0])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [True, False])
def test_an_adapter_that_is_pickled_is_refused(folder, tmp_path, kept):
    made = lora(Policy.load(folder), rank=2).save(tmp_path / "adapter")
    weights = made / "adapter_model.safetensors"
    weights.unlink()
    (weights if kept else made / "adapter_model.bin").write_bytes(bomb(tmp_path / "ran"))
    with pytest.raises(ValueError, match="adapter_model.safetensors is no safetensors file"): Policy.load(made)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_without_a_base_is_refused(folder, tmp_path):
    made = lora(Policy.load(folder), rank=2).save(tmp_path / "adapter")
    changed("adapter_config.json", base_model_name_or_path=None)(made, b"")
    with pytest.raises(ValueError, match="names no base"): Policy.load(made)


def test_a_checkpoint_of_a_run_is_safetensors_in_its_own_folder(tmp_path):
    save_checkpoint(tmp_path / "10", dict(text=dict(w=torch.ones(2))), dict(step=10))
    state = json.loads((tmp_path / "10" / "state.json").read_text())
    del state["sha256"]  # whoever writes the rest can write this
    data = bomb(tmp_path / "ran")
    (tmp_path / "10" / "text.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256 differs"): load_checkpoint(tmp_path / "10")
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "other.safetensors").write_bytes(data)
    (tmp_path / "10" / "text.pkl").write_bytes(data)
    for files, message in (({"text.safetensors": digest}, "is no safetensors file"),
                           ({"../other.safetensors": digest}, "has no readable state.json"),
                           ({"text.pkl": digest}, "does not match"), (None, "files: None is not of type")):
        (tmp_path / "10" / "state.json").write_text(json.dumps(state | dict(files=files)))
        with pytest.raises(ValueError, match=message): load_checkpoint(tmp_path / "10")
    (tmp_path / "10" / "state.json").write_bytes(data)
    with pytest.raises(ValueError, match="no readable state.json"): load_checkpoint(tmp_path / "10")
    assert not (tmp_path / "ran").exists()


def test_parquet_with_pandas_metadata_and_pickled_types_is_only_rows(tmp_path):
    kind = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb(tmp_path / "ran")}
    frame = pa.Table.from_pandas(pd.DataFrame(sums(), index=[f"i{i}" for i in range(40)]))
    fields = [pa.field(f.name, f.type, metadata=kind) for f in frame.schema]
    features = b'{"info": {"features": {"prompt": {"_type": "os.system"}}}}'
    metadata = {b"pandas": frame.schema.metadata[b"pandas"], b"huggingface": features}
    table = pa.Table.from_arrays(frame.columns, schema=pa.schema(fields, metadata=metadata))
    pq.write_table(table, tmp_path / "a.parquet")
    assert [e.prompt for e in read_examples(tmp_path / "a.parquet")] == [r["prompt"] for r in sums()]
    # an object column as pandas would pickle it
    pq.write_table(pa.table(dict(prompt=[bomb(tmp_path / "ran")])), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="row 1 of b.parquet: column 'prompt' is b"):
        read_examples(tmp_path / "b.parquet")
    assert not (tmp_path / "ran").exists()


def saved(path):
    datasets.Dataset.from_list(sums()).save_to_disk(path)
    return path


def state_of(path, **changes):
    (path / "state.json").write_text(json.dumps(json.loads((path / "state.json").read_text()) | changes))


def test_a_folder_of_datasets_reads_its_own_files_and_runs_no_script(tmp_path):
    script = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(script)
    with pytest.raises(ValueError, match="script was not written by `save_to_disk`"): read_examples(tmp_path / "script")
    other, mine = saved(tmp_path / "other"), saved(tmp_path / "mine")
    (mine / "mine.py").write_text(script)
    assert len(read_examples(mine)) == 40
    arrow = next(other.glob("*.arrow"))
    (mine / "link.arrow").symlink_to(arrow)
    for file in (f"../other/{arrow.name}", str(arrow), "link.arrow", "none.arrow"):
        state_of(mine, _data_files=[dict(filename=file)])
        with pytest.raises(ValueError, match="outside of the data file's folder|there is no file"): read_examples(mine)
    state_of(mine, _data_files=7)
    with pytest.raises(ValueError, match="mine was not written by"): read_examples(mine)
    datasets.DatasetDict(train=datasets.Dataset.from_list(sums())).save_to_disk(tmp_path / "many")
    (tmp_path / "many" / "dataset_dict.json").write_text(json.dumps(dict(splits=["../other"])))
    with pytest.raises(ValueError, match="split name '../other' is not allowed"): read_examples(tmp_path / "many")
    assert not (tmp_path / "ran").exists()


ARRAYS = dict(pickle=bomb, empty=lambda marker: b"",
              objects=lambda marker: made_array(np.array([[[[{}]]]], dtype=object)), archive=lambda marker: zipped(),
              huge=lambda marker: b"\x93NUMPY\x01\x00" + (lambda h: len(h).to_bytes(2, "little") + h)(
                  b"{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 4, 4, 3)}   \n"),
              code=lambda marker: b"\x93NUMPY\x01\x00" + (lambda h: len(h).to_bytes(2, "little") + h)(
                  f"__import__('pathlib').Path({str(marker)!r}).touch()\n".encode()))


def made_array(array):
    np.save(buffer := io.BytesIO(), array, allow_pickle=True)
    return buffer.getvalue()


def zipped():
    np.savez(buffer := io.BytesIO(), a=np.zeros((1, 2, 2, 3), np.uint8))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_none_is_refused_with_its_row(tmp_path, kind):
    (tmp_path / "film.npy").write_bytes(ARRAYS[kind](tmp_path / "ran"))
    (tmp_path / "a.jsonl").write_text(
        json.dumps(dict(prompt="fine")) + "\n" + json.dumps(dict(prompt="a", videos="film.npy")))
    with pytest.raises(ValueError, match="row 2 of a.jsonl: 'film.npy' is no array"):
        read_examples(tmp_path / "a.jsonl")
    assert not (tmp_path / "ran").exists()


# --- no remote code

FOREIGN = [changed("config.json", auto_map=dict(AutoConfig="mine.Mine", AutoModelForCausalLM="mine.Mine")),
           changed("config.json", model_type="mine", auto_map=dict(AutoConfig="mine.Mine")),
           changed("tokenizer_config.json", auto_map=dict(AutoTokenizer=["mine.Mine", "mine.Mine"])),
           changed("tokenizer_config.json", tokenizer_class="Mine", auto_map=dict(AutoTokenizer=["mine.Mine", None])),
           changed("processor_config.json", processor_class="Mine", auto_map=dict(AutoProcessor="mine.Mine")),
           changed("preprocessor_config.json", image_processor_type="Mine",
                   auto_map=dict(AutoImageProcessor="mine.Mine")),
           changed("generation_config.json", custom_generate="mine")]


@pytest.mark.parametrize("change", FOREIGN, ids=range(len(FOREIGN)))
def test_a_checkpoint_with_code_is_refused_or_loaded_without_it(folder, tmp_path, change, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("nobody is asked whether to trust it"))
    script = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass"
    (folder / "custom_generate").mkdir()
    for file in ("mine.py", "__init__.py", "modeling_mine.py", "custom_generate/generate.py"):
        (folder / file).write_text(script)
    change(folder, b"")
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(prompt="1+1=")))
    for use in (lambda: Policy.load(folder).encode([Example("1+1=", "2", "sums")]),
                lambda: problems(tmp_path / "a.jsonl", model=folder)):
        try: use()
        except ValueError as error: assert str(error)
    assert not (tmp_path / "ran").exists()
    assert not any("mine" in m.lower() and "transformers_modules" in m for m in sys.modules)


CHAT = [dict(role="user", content="1+1=")]
REACHES = ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__base__ }}",
           "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
           "{{ lipsum.__globals__['os'].system('touch MARK') }}",
           "{{ (messages|attr('__class__')).__mro__ }}",
           "{{ '{0.__class__.__init__.__globals__}'.format(messages)[0].x.y }}",
           "{% import 'os' as os %}{{ os.system('touch MARK') }}", "{{ raise_exception.__globals__['x'] }}"]
ENDLESS = {"{% for i in range(10 ** 12) %}{% endfor %}": "OverflowError",
           "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "more than 1 seconds",
           "{{ 'a' * 10 ** 10 }}": "takes more than 512 MiB",
           "{{ 'a' * 2 * 10 ** 6 }}": "2,000,000 characters of a prompt: it may add 1,000,000",
           "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "RecursionError|ends with",
           "{% if %}": "TemplateSyntaxError", "{{ raise_exception('roles must alternate') }}": "roles must alternate"}


def foreign(template):
    policy = text_policy(hidden=32, layers=1)
    policy.tokenizer.chat_template = template
    return policy


@pytest.mark.parametrize("template", REACHES)
def test_a_chat_template_reaches_nothing(template, tmp_path, monkeypatch):
    monkeypatch.setattr(templates_module, "_fault", lambda *a: "")  # the second wall alone
    with pytest.raises(ValueError, match="prompt .* of capability 'sums': the chat template fails: "):
        foreign(template.replace("MARK", str(tmp_path / "ran"))).encode([Example("1+1=", "2", "sums")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("template", ENDLESS)
def test_a_chat_template_that_does_not_end_is_an_error(template, monkeypatch):
    monkeypatch.setattr(templates_module, "_PATIENCE", 1)
    with pytest.raises(ValueError, match=ENDLESS[template]): foreign(template).encode([Example("1+1=", "2", "sums")])


def test_an_ordinary_template_is_tried_once(monkeypatch):
    template = ("{% for m in messages %}{% generation %}{{ m['content'] | tojson }}{% endgeneration %}"
                "{{ strftime_now('') }}{% if loop.first %}{% continue %}{% endif %}{% endfor %}{{ eos_token }}")
    outcomes, run = [], templates_module.run_code
    monkeypatch.setattr(templates_module, "run_code", lambda *a, **k: outcomes.append(run(*a, **k)) or outcomes[-1])
    policy = foreign(template)
    for prompt in ("1+1=", "2+2="): policy.encode([Example(prompt, "2", "sums")])
    assert policy.tokenizer.decode(policy.encode([Example("1+1=", "2", "sums")]).ids[0]) == '"1+1="<|im_end|>'
    assert [o.reason for o in outcomes] == [""], outcomes  # the trial's environment knows all that transformers' knows


# --- parameters of reports

@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    "A notebook with two parameters."
    path = tmp_path_factory.mktemp("parameters") / "tiny.ipynb"
    cells = [nbformat.v4.new_code_cell("x = 1\ny = 'a'", metadata=dict(tags=["parameters"])),
             nbformat.v4.new_code_cell("x")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def written(notebook, parameters):
    "The cell that would run."
    return next(c.source for c in parameterised(notebook, parameters).cells if "injected-parameters" in c.metadata.tags)


NASTY = st.sampled_from(
    ['"); import os #', "'''", '"""', "\\", "\n", "\r\nimport os\n", "{x}", "{{}}", "#", "\u2028", "\x00",
     "\\N{DIGIT ONE}", "%s", "$(touch x)", "f'{1}'", "\ufeff", "\\u0022"])
TEXT = st.one_of(st.text(), NASTY, st.builds("".join, st.lists(NASTY, max_size=4)))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=8)


@given(VALUES, VALUES)
@settings(max_examples=80, deadline=None)
def test_a_cell_of_parameters_is_nothing_but_the_values_given(notebook, x, y):
    body = ast.parse(written(notebook, dict(x=x, y=y))).body
    assert [type(b) for b in body] == [ast.Assign] * 2 and [[t.id for t in b.targets] for b in body] == [["x"], ["y"]]
    for line, value in zip(body, (x, y)): assert repr(ast.literal_eval(line.value)) == repr(value)


class Said:
    def __repr__(self): return "1\nimport os"


@pytest.mark.parametrize("value",
                         [float("nan"), float("inf"), [1, -float("inf")], (1, 2), {1: 2}, {"a": {None: 1}}, b"a", {1},
                          Said(), np.float64(1), np.int64(1), "\ud800", ["a", Said()], 10 ** 5000, print],
                          ids=lambda v: str(type(v).__name__))
def test_what_is_no_json_is_refused_by_name(value):
    with pytest.raises(ValueError, match="parameter 'config' (can't be written down|is)"):
        check_parameters("experiment", dict(config=value))


def test_json_with_a_number_that_is_none_is_refused_before_a_kernel_starts(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(driver_module, "_execute", None)
    for value in ("NaN", "Infinity", "1e999", "[-Infinity]"):
        assert main(["report", "ablation", "-p", "beta", value, "--out", str(tmp_path / "out")]) == 2
        assert "parameter 'beta'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_keys_that_are_code_are_refused(notebook):
    for key in ("x = 1\nimport os\ny", "x; import os; y", "x.y", "x, y", "*x", "1"):
        with pytest.raises(ValueError): parameterised(notebook, {key: 1})
        with pytest.raises(ValueError, match="has no parameters"): check_parameters("experiment", {key: 1})


@pytest.mark.parametrize("translate",
                         [lambda cls, v: f'"{v}"', lambda cls, v: "open('x', 'w')", lambda cls, v: "'other'",
                          lambda cls, v: "1; import os"])
def test_a_translator_that_interpolates_is_found_out(notebook, monkeypatch, translate):
    monkeypatch.setattr(PythonTranslator, "translate_str", classmethod(translate))
    with pytest.raises(ValueError): parameterised(notebook, dict(x='a"; import os #'))


@pytest.mark.parametrize("report, given, message", [
    ("experiment", dict(prompts="abc"), "'prompts' of report 'experiment' is 'abc': a whole number or null is needed"),
    ("pilot", dict(opd_steps="abc"),
     "'opd_steps' of report 'pilot' is 'abc': a whole number is needed, such as the default 40"),
    ("audit", dict(samples=1.5), "a whole number"), ("audit", dict(samples=True), "a whole number"),
    ("audit", dict(samples=None), "a whole number"), ("pilot", dict(taught=7), "a list, each a whole number"),
    ("pilot", dict(taught=["a"]), "a list, each"), ("sweep", dict(save=1), "true or false"),
    ("ablation", dict(beta="0.1"), "a number"), ("ablation", dict(beta=False), "a number"),
    ("ablation", dict(betas=[[1]]), "a list, each a number"), ("ablation", dict(names="add"), "a list, each text"),
    ("ablation", dict(store=5), "text"),
    ("experiment", dict(config=[1]), "an object or null"), ("experiment", dict(model=3), "text or an object or null"),
    ("experiment", dict(paradigms=[1]), "a list, each text or an object or null"),
    ("experiment", dict(file=3), "text or null"),
    ("experiment", dict(preset="../../x"), "preset name '../../x' is not allowed"),
    ("experiment", dict(preset="a/b"), "is not allowed"), ("ablation", dict(preset=".."), "unknown preset '..'")])
def test_a_value_of_the_wrong_kind_is_an_error_before_a_kernel_starts(
    report, given, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(driver_module, "_execute", None)
    monkeypatch.setattr(parameters_module, "report_folder", lambda: ROOT / "nbs" / "reports")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)): check_parameters(report, given)
    words = [w for k, v in given.items() for w in ("-p", k, v if isinstance(v, str) and v != "0.1" else json.dumps(v))]
    assert main(["report", report, *words]) == 2 and message in capsys.readouterr().err
    if report in index_module.STUDIES: assert main(["report", "all", *words]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("report", report_names())
def test_every_report_says_what_its_parameters_are(report):
    defaults = {k: ast.literal_eval(v) for k, v in parameters_of(report).items()}
    check_parameters(report, defaults)
    assert {k for k, v in defaults.items() if v is None} <= set(OPTIONAL)
    def example(like):
        "The first of several examples, inside lists, too."
        if isinstance(like, tuple): return example(like[0])
        return [example(one) for one in like] if isinstance(like, list) else like
    for key, value in defaults.items():
        if value is None and key != "model": check_parameters(report, {key: example(OPTIONAL[key])})  # it has to exist


@pytest.mark.parametrize("report",
                         ["../../x", "../experiment", "/etc/passwd", "reports/experiment", "experiment/../experiment",
                          "experiment.ipynb", "..", ".", "", "experiment\0", "experiment\n", "EXPERIMENT", "x" * 5000])
def test_a_report_is_one_of_the_list(report, monkeypatch):
    monkeypatch.setattr(driver_module, "_execute", None)
    with pytest.raises(ValueError, match="unknown report"): notebook_of(report)
    assert main(["report", report]) == 2


# --- paths

ELSEWHERE = ["/etc/passwd", "../outside.png", "pictures/../../outside.png", "link.png", "linked/outside.png",
             "/dev/zero", "/dev/stdin", "zero.png", "http://127.0.0.1:9/a.png", "https://example.org/a.png",
             "file:///etc/passwd",
             "file://outside.png", "data:image/png;base64,AAAA", "ftp://x/a.png", "fifo.png", "a\0b.png", "\0",
             "x" * 5000, "a/" * 3000, "C:\\a.png", "..\\outside.png", "\\\\host\\a.png", "~/a.png", "$HOME/a.png", ".",
             "pictures", "", " "]
SHAPES = dict(image=lambda n: dict(images=n), images=lambda n: dict(images=[n]),
              parquet=lambda n: dict(images=[dict(path=n, bytes=None)]), video=lambda n: dict(videos=n),
              array=lambda n: dict(videos=n + ".npy"),
              film=lambda n: dict(videos=n + ".mp4"), embedded=lambda n: dict(videos=dict(path=n + ".mp4", bytes=None)),
              frames=lambda n: dict(videos=[[n]]))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A data folder with links and a pipe that lead elsewhere, beside a picture that is none of its business."
    above = tmp_path_factory.mktemp("paths")
    inner = above / "data"
    (inner / "pictures").mkdir(parents=True)
    for ending in ("", ".npy", ".mp4"):
        Image.new("RGB", (8, 8)).save(above / f"outside.png{ending}", format="PNG")
        (inner / f"link.png{ending}").symlink_to(above / f"outside.png{ending}")
        (inner / f"zero.png{ending}").symlink_to("/dev/zero")
        os.mkfifo(inner / f"fifo.png{ending}")
    (inner / "linked").symlink_to(above)
    return inner


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda p: ascii(p)[:30])
def test_a_path_of_a_data_file_stays_in_its_folder(pictures, path, shape):
    (pictures / "a.jsonl").write_text(
        json.dumps(dict(prompt="fine")) + "\n" + json.dumps(dict(prompt="a") | SHAPES[shape](path)))
    with pytest.raises(ValueError, match="row 2 of a.jsonl: "): read_examples(pictures / "a.jsonl")


@pytest.mark.parametrize("content",
                         ["#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
                          "ffconcat version 1.0\nfile '/etc/passwd'\n",
                          "<SMIL><video src='http://127.0.0.1:9/a'/></SMIL>",
                          "[playlist]\nFile1=http://127.0.0.1:9/a\n"])
def test_a_film_that_names_other_files_is_none(pictures, content):
    pytest.importorskip("av")
    (pictures / "film.mp4").write_text(content)
    (pictures / "b.jsonl").write_text(json.dumps(dict(prompt="a", videos="film.mp4")))
    with pytest.raises(ValueError, match="row 1 of b.jsonl: 'film.mp4' can't be read as a video"):
        read_examples(pictures / "b.jsonl")


NAMES = ["../x", "a/b", "/x", "", ".", "..", "...", "a\0", "a\n", "a\\b", "C:x", "~", "a b", "ü", "$x", "-\u2028",
         "x" * 101, "<b>"]


@pytest.mark.parametrize("bad", NAMES, ids=ascii)
def test_names_that_become_folders_can_not_lead_elsewhere(bad, tmp_path):
    one = [Example("1", "1", "a")]
    def schedule(name="s", branch="b", capability="c"):
        return Schedule(name, {branch: "base"}, [Phase("p", 1, [Update(branch, [RL(capability)])])], branch).validate()
    for make in (lambda: check_name(bad, "capability"), lambda: Capability(bad, one, [Example("2", "2", "a")], len),
                 lambda: schedule(name=bad), lambda: schedule(branch=bad), lambda: schedule(capability=bad)):
        with pytest.raises(ValueError, match="is not allowed"): make()
    run = create_run(tmp_path / "run", dict(schedule=schedule().to_dict(), config=dict(seed=0), content_hash="a"))
    (tmp_path / "run" / "branches").mkdir()
    write_json(tmp_path / "run" / "manifest.json", run.manifest | dict(status="finished"))
    with pytest.raises(KeyError, match="no final branch"): run.branch(bad)


def test_a_record_can_not_name_files_elsewhere(tmp_path):
    out = tmp_path / "reports" / "a"
    record = write_results(out, "a", {}, "h", {}, [], [])
    (tmp_path / "reports" / "secret.html").write_text("secret")
    (tmp_path / "secret.ipynb").write_text(json.dumps(dict(cells=[dict(source=["# secret"])])))
    (out / "linked.html").symlink_to(tmp_path / "reports" / "secret.html")
    for named in ("../secret", "../../secret", "linked", str(tmp_path / "secret"), "x" * 5000, "a\0"):
        (out / "results.json").write_text(json.dumps(record | dict(report=named)))
        entry, = entries(tmp_path / "reports")
        assert [f.name for f in entry.files()] == ["results.json"] and entry.title == named
        site = publish(tmp_path / "reports", tmp_path / f"docs{len(named)}").parent
        assert "secret" not in "".join(f.read_text() for f in site.rglob("*.html") if f.name != "index.html")


# --- markup

PAYLOADS = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)' x='",
            "</style></title></textarea></code></pre><script>alert(1)</script>",
            "<svg onload=alert(1)><a xlink:href='javascript:alert(1)'>x</a></svg>",
            '<iframe srcdoc="<script>alert(1)</script>"></iframe>', "&lt;script&gt;&#60;b&#62;",
            "--><base href=//x>]]>", "[x](javascript:alert(1)) ![y](http://x/y.png)\n\n<object data=x>"]
FORBIDDEN = {"script", "iframe", "object", "embed", "base", "frame", "applet", "link", "video", "audio", "textarea"}


class Page(HTMLParser):
    "Elements with their attributes, and the text outside of styles."
    def __init__(self, source):
        super().__init__()
        self.elements, self.text, self.styles, self.inside = [], "", "", False
        self.feed(source)
        self.close()
    def handle_starttag(self, tag, attrs): self.elements.append((tag, dict(attrs))); self.inside = tag == "style"
    def handle_endtag(self, tag): self.inside = False
    def handle_data(self, data):
        if self.inside: self.styles += data
        else: self.text += data


def faults(source):
    "What a page holds that could only come from the data, its pictures that are drawn with tags included."
    page, drawn = Page(source), "data:image/svg+xml;base64,"
    yield from (tag for tag, _ in page.elements if tag in FORBIDDEN)
    for tag, attributes in page.elements:
        for key, value in attributes.items():
            if key.startswith("on") or key == "srcdoc": yield f"{tag} {key}"
            if (tag, key) == ("img", "src") and (value or "").startswith(drawn):
                yield from faults(base64.b64decode(value.removeprefix(drawn)).decode())
                continue
            known = r"#|data:image/png;base64,|[\w./%-]+$" + "|https?://" * (tag == "a")
            if key.endswith(("href", "src", "action", "data")) and not re.match(known, value or ""):
                yield f"{tag} {key}={value}"
    if "alert" in page.styles: yield "style"


def example(p): return Example(p, p, p, trace=p, info={p: p})


def view(p):
    top = [[Choice(0, p, 0.5), Choice(1, "b", 0.1)]]
    return TokenView(p, p, "given", 1.0, 2,
                     [Completion(example(p), True, [0], [p], {m: [0.1] for m in METRICS}, top, top)])


def capability(p):
    class Reward:
        def __call__(self, completions, examples): return [0.0]
        def __repr__(self): return p
    return Capability("c", [Example("other", p, p)], [example(p)], Reward())


def rollouts(p):
    return Rollouts(SimpleNamespace(examples=[example(p)]), 1, torch.zeros(1, 1), torch.ones(1, 1),
                    torch.tensor([False]), [p])


def drawn(p): return Schedule("s", {"b": "base"}, [Phase(" ".join(p.split()), 1, [Update("b", [RL("c")])])], "b")


def run(p, tmp_path):
    folder = tmp_path / "store" / re.sub("[/\0]", "|", p)[:60]
    made = create_run(folder, dict(schedule=drawn(p).to_dict(), config=dict(seed=0, probe_k=10), content_hash=p))
    write_json(folder / "manifest.json", made.manifest | dict(status=p))
    rows = [
        dict(kind="train", branch=p, stream=p, phase=p, phase_index=0, step=i, global_step=i, reward=0.5, seconds=1.0)
        for i in (0, 1)]
    rows += [
        dict(kind="probe", a=p, b="b", owner=p, capability=p, phase=p, phase_index=0, step=i, global_step=i,
             overlap=0.5, jsd=0.1) for i in (0, 1)]
    EventLog(folder / "events.jsonl").append(rows)
    return Run(folder)


def monitored(p, tmp_path):
    state = monitor_module.MonitorState(run(p, tmp_path).path)
    state.tail.read()
    state.error = RuntimeError(p)
    return state.html()


def gaps(p, tmp_path): return gap_explorer_module.gap_state(run(p, tmp_path)).html()


def story(p, tmp_path): return story_module.RunStory(run(p, tmp_path)).frame()


def store(p, tmp_path):
    run(p, tmp_path)
    return browser_module.Store(tmp_path / "store").html()


def explorer(p, tmp_path):
    state = SimpleNamespace(x=p, html=lambda: (_ for _ in ()).throw(ValueError(p)))
    return pages_module.Explorer(state, {p: pages_module.choose(p, [p], p)})._repr_mimebundle_()["text/html"]


def figure(p, tmp_path):
    def refuse(ax): raise ValueError(p)
    drawn = pages_module.figure(lambda ax: None, p) + pages_module.figure(refuse, p)
    return drawn + pages_module.table(pd.DataFrame({p: [p], "n": [1]}), p)


def inspected(p, tmp_path): return token_inspector_module.TokenInspector(view(p))._repr_mimebundle_()["text/html"]


def page(p, tmp_path): return save_page(view(p), tmp_path / "page.html").read_text()


def parts(p, tmp_path):
    return "".join([token_panel(view(p), 0, 0), prompt_of(view(p), 0), *(legend(view(p), m) for m in METRICS)])


def record(p, tmp_path, name="r"):
    found = finding("copd_over_mopd", 1.0, -1.0, 3.0, 2, p)
    rows = [dict(paradigm=n, capability=c, mean=1., low=0., high=2.) for n in ("base", p) for c in (p, "mean")]
    return write_results(tmp_path / "reports" / "r", name, dict(preset=p, title=p, seeds=[p], steps=1), p,
                         {"main/greedy": pd.DataFrame(rows)}, [p], [p],
                         {"copd_over_mopd": found | dict(sentence=p), p: found},
                         verdicts={"main/greedy": [dict(paradigm=p, other="mixed RLVR", sentence=p)]})


def index(p, tmp_path):
    record(p, tmp_path)
    (tmp_path / "reports" / "broken").mkdir()
    (tmp_path / "reports" / "broken" / "results.json").write_text(json.dumps({p: p, "schema": p}))
    return write_index(tmp_path / "reports").read_text()


def report(p, tmp_path):
    "A report's page with what cells may have shown."
    out = nbformat.v4.new_output
    shown = [out("stream", name="stdout", text=p), out("display_data", data={"text/plain": p}),
             out("display_data", data={"text/markdown": p}), out("display_data", data={"application/json": p}),
             out("error", ename=p, evalue=p, traceback=[p])]
    cells = [nbformat.v4.new_markdown_cell("# Title"),
             nbformat.v4.new_code_cell(f"preset = {p!r}", outputs=shown, metadata=dict(tags=["injected-parameters"]))]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "r.ipynb")
    return _to_html(tmp_path / "r.ipynb").read_text()


def site(p, tmp_path):
    "What the documentation makes of a record, by a renderer that lets HTML through."
    record(p, tmp_path, "experiment")
    before, docs.REPORTS = docs.REPORTS, tmp_path / "reports"
    try:
        text = "\n\n".join(
            [docs.results([docs.harmless(p)]), docs.studies("all", ""), docs.measured(),
             claims_page_markdown(claims_of({e.folder.name: e.record for e in docs.chosen("all")}))])
    finally: docs.REPORTS = before
    return mistune.create_markdown(escape=False, plugins=["table"])(text)


def audited(p, t):
    "An audit of a reward of that name, with that answer and form."
    return replace(
        audit(lambda c, e: [1.0] * len(c), [Example(p, p, "c"), Example("q", p + "1", "c")], form=p + "{answer}"),
        reward=p)._repr_html_()


def timeline(p, tmp_path):
    "One call at a place with a name of others."
    call = SimpleNamespace(name="c", worker="w", seconds=1.0, step=0, stage="update")
    place = SimpleNamespace(name=p, workers=("w",), speed=1.0)
    return Timeline([call], [place], {"c": (0.0, 1.0, None)}, pd.DataFrame(dict(bytes=[1.0])))._repr_html_()


BUILDERS = dict(
    example=lambda p, t: example(p)._repr_html_(), capability=lambda p, t: capability(p)._repr_html_(),
    rollouts=lambda p, t: rollouts(p)._repr_html_(), cost=lambda p, t: Cost(1, 2, 3)._repr_html_(),
    accuracy=lambda p, t: AccuracyTable(pd.DataFrame({p: [p, p + "▲"]}, index=[p, "b"]))._repr_html_(),
    schedule=lambda p, t: drawn(p)._repr_html_() + drawn(p).svg(), run=lambda p, t: run(p, t)._repr_html_(),
    tokens=lambda p, t: html_of(view(p)),
    page=page, parts=parts, inspector=inspected, explorer=explorer, figure=figure,
    card=lambda p, t: designer_module.Design(("a", "b"), topology="hub", hub="a").html(),
    rule=lambda p, t: Rule(lambda schedule, cycle, rows: None, words=p)._repr_html_(), timeline=timeline,
    markdown=lambda p, t: rendered(p), index=index, report=report, site=site, audit=audited,
    guess=lambda p, t: guess_from([{"question": p + "?", "answer": p}] * 3, p)._repr_html_(),
    forecast=lambda p, t: Forecast(pd.DataFrame([dict(what=p, times=1, seconds=1.0, total=1.0, idle=0.0, bytes=1.0)]),
                                   p)._repr_html_())
DRAWINGS = dict(monitor=monitored, gaps=gaps, store=store, story=story)  # they draw, so one payload has to do
SILENT = {"cost", "card"}  # take no text of others


@pytest.mark.parametrize("p", PAYLOADS, ids=range(len(PAYLOADS)))
@pytest.mark.parametrize("builder", BUILDERS)
def test_what_is_shown_as_html_is_text(builder, p, tmp_path):
    source = BUILDERS[builder](p, tmp_path)
    assert list(faults(source)) == []
    if builder not in SILENT and "alert(1)</script>" in p: assert "alert(1)" in Page(source).text


@pytest.mark.parametrize("builder", DRAWINGS)
def test_what_is_drawn_stays_text(builder, tmp_path):
    assert list(faults(DRAWINGS[builder]("<img src=x onerror=alert(1)>'\"</style>", tmp_path))) == []


def test_the_search_for_markup_finds_it():
    for p in PAYLOADS:
        if "&lt;" not in p: assert list(faults(f"<p title='{p}'>{mistune.html(p) if p.startswith('[') else p}</p>")), p


HTML_NAMES = ("_repr_html_", "_repr_mimebundle_", "html", "html_of", "save_page", "svg")


def test_every_html_builder_is_in_the_list():
    "Functions that write tags, by package: a new one has to be added to DRAWINGS, and counted here."
    found = Counter(p.parent.name for p in LIBRARY for f in nodes(p.read_text(encoding="utf-8"))
                    if isinstance(f, ast.FunctionDef) and f.name in HTML_NAMES)
    assert found == dict(data=3, signals=1, schedule=4, engine=1, analysis=1, view=10, scale=2)


def test_a_page_of_a_report_allows_no_script_and_no_network(tmp_path):
    assert [a["content"] for tag, a in Page(report("a", tmp_path)).elements
            if a.get("http-equiv")] == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


# --- what reports tell of this machine

TINY = """
import itertools, json, os, pickle, sys, warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from IPython.display import Markdown, display
if fail: raise RuntimeError(f"no base in {os.getcwd()}")
from copd_nb.schedule.paradigms import expert
from copd_nb.data.files import capability_from
from copd_nb.engine.config import Config
from copd_nb.engine.training import train
from copd_nb.policy.core import Policy
from copd_nb.analysis.records import write_results
from copd_nb.data.rewards import Exact
from copd_nb.engine.runs import Run
from copd_nb.policy.skills import text_policy

seen, on, calls, place = [], False, itertools.count(), os.path.abspath(store)
state = SimpleNamespace(cut=True)  # a plain global would be a part of what the reward is
def hook(event, arguments):
    if on and event == "pickle.find_class": seen.append(f"{event} {arguments[1]}")
    if on and event == "exec" and getattr(arguments[0], "co_filename", "").startswith(os.getcwd()): seen.append(event)
sys.addaudithook(hook)
class Stopping(Exact):
    def __call__(self, completions, examples):
        if state.cut and next(calls) > 1: raise KeyboardInterrupt
        return super().__call__(completions, examples)
def go():
    suite = {"sums": replace(sets["sums.jsonl"], reward=Stopping())}
    return train(expert("sums", 4), suite, base, config, f"{place}/run", progress=False)

on = True
sets = {f: capability_from(f, "sums", "exact") for f in ("sums.jsonl", "sums.parquet", "sums")}
assert len({c.fingerprint for c in sets.values()}) == 1
base = Policy.load(text_policy(hidden=32, layers=1).save(f"{place}/base"))
config = Config(prompts=2, group_size=2, max_new_tokens=3, probe_every=0, eval_every=0, checkpoint_every=1,
                device="cpu")
try: go()
except KeyboardInterrupt: pass
assert list(Path(place, "run", "checkpoints").iterdir())
state.cut = False
assert go().finished and (run := Run(f"{place}/run")).result.encode(sets["sums"].test[:1])
on, before = False, list(seen)
on = True
pickle.loads(pickle.dumps(Path))
Path(out_dir, "seen.json").write_text(json.dumps([before, seen]))
warnings.warn("it is small")
print(run.path, os.path.expanduser("~"))
display(sets["sums"], run, Markdown(f"**{run.path}** <b onclick=alert(1)>b</b> ![p](/etc/hostname)"))
run.events.to_parquet(f"{out_dir}/events.parquet")
table = run.events[["kind", "step"]].assign(path=str(run.path))
shown = write_results(out_dir, "tiny", dict(preset=preset, store=place), f"in {run.path}", dict(events=table), [],
                      [os.path.expanduser("~/x")])
display({"application/json": shown}, raw=True)
"""
SECRET = "unlikely-string-5f1c"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "A report that trains, and one that fails, run as somebody with a home and a secret; every file they wrote."
    above = tmp_path_factory.mktemp("machine")
    home, work = above / "homes" / "someone", above / "homes" / "someone" / "work {preset} {0}"
    (work / "nbs" / "reports").mkdir(parents=True)
    rows = [r | dict(prompt=r["prompt"] + PAYLOADS[3]) for r in sums()]
    (work / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(work / "sums.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(work / "sums")
    for folder in (work, work / "sums"): (folder / "sums.py").write_text("open('ran', 'w')")
    cells = [nbformat.v4.new_markdown_cell("# Tiny\n\n> report"),
             nbformat.v4.new_code_cell('preset = "quick"\nstore = "runs/store"\nfail = False\nout_dir = ""',
                                       metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(TINY)]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"),
                  language_info=dict(name="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), work / "nbs" / "reports" / "tiny.ipynb")
    code = ("import sys; from copd_nb.report.command import main\n"
            "a = main(['report', 'tiny', '-p', 'preset', 'smoke'])\n"
            "try: main(['report', 'tiny', '-p', 'fail', 'true', '--out', sys.argv[1]])\n"
            "except Exception as error: print(type(error).__name__)\n"
            "sys.exit(a)")
    names = os.environ | dict(PYTHONPATH=str(ROOT), HOME=str(home), COPD_SECRET=SECRET, USER="someone",
                              LOGNAME="someone")
    done = subprocess.run([sys.executable, "-c", code, str(work / "failed")], cwd=work, env=names, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "PapermillExecutionError" in done.stdout, done.stdout + done.stderr
    files = {f.relative_to(work).as_posix(): f for place in (work / "runs", work / "failed") for f in place.rglob("*")
             if f.is_file()}
    return above, files


def test_training_resuming_and_reading_data_never_unpickle_or_run_code_of_a_folder(told):
    before, after = json.loads(told[1]["runs/reports/tiny-smoke/seen.json"].read_text())
    assert before == [] and after == ["pickle.find_class Path"]  # the hook hears what it listens for
    assert not list(told[0].rglob("ran"))


def test_a_report_and_its_run_write_what_they_should(told):
    out = "runs/reports/tiny-smoke/"
    assert {f"{out}tiny.ipynb", f"{out}tiny.html", f"{out}results.json", f"{out}events.parquet",
            "runs/store/run/manifest.json", "runs/store/run/events.jsonl", "failed/tiny.ipynb"} <= set(told[1])
    assert json.loads(told[1][f"{out}results.json"].read_text())["parameters"]["store"] == "./runs/store"
    assert "RuntimeError" in told[1]["failed/tiny.ipynb"].read_text()
    assert "no base in ." in told[1]["failed/tiny.ipynb"].read_text()


def test_no_file_of_a_report_or_run_tells_of_the_machine(told):
    above, files = told
    places = [SECRET, "COPD_SECRET", str(above), "someone", str(ROOT), sys.prefix, os.path.realpath(sys.prefix),
              sys.base_prefix]
    for file, path in files.items():
        data = path.read_bytes()
        if path.suffix == ".parquet": data += pd.read_parquet(path).to_json().encode()
        assert [p for p in places if p.encode() in data] == [], file
        assert b'"papermill"' not in data, file


def test_the_page_of_a_report_shows_prompts_as_text(told):
    source = told[1]["runs/reports/tiny-smoke/tiny.html"].read_text()
    assert list(faults(source)) == [] and "alert(1)" in Page(source).text


@pytest.mark.parametrize("text, short",
                         [("/home/me/work/a b", "./a b"), ("/home/me", "~"), ("/home/me.", "~."),
                          ("/home/me.txt", "/home/me.txt"), ("/home/mean/x", "/home/mean/x"),
                          ("file:///home/me/x", "file://~/x"), ("\x1b[32m/home/me/x\x1b[0m", "\x1b[32m~/x\x1b[0m"),
                          ("a=/home/me/work", "a=."), ("x/home/me/y", "x/home/me/y"),
                          ('"/home/me/work/r":3', '"./r":3'), ("/home/me/work:/home/me/x", ".:~/x"),
                          ("/lib/py/site/x.py", "<python>/site/x.py")])
def test_folders_are_taken_out_of_texts_only_as_a_whole(text, short, monkeypatch):
    places = {"/home/me/work": ".", "/home/me": "~", "/lib/py": "<python>"}
    monkeypatch.setattr(environment_module, "_places", lambda: places)
    assert without_places(text) == short
    assert without_places({text: [text, 1, None, {"a": text}]}) == {short: [short, 1, None, {"a": short}]}
