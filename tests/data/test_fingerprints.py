"Code of one's own by its source: functions, classes, objects, partials, parts of sums, closures, notebooks."
import sys
from functools import partial
from types import ModuleType

import pytest

from copd_nb.data.capability import Capability, Example
from copd_nb.data.fingerprints import is_own, own_code, own_modules
from copd_nb.data.names import imported
from copd_nb.data.rewards import Choice, Exact, Failed, Noisy, Numeric, Weighted
from copd_nb.data.verifiers import named_reward

MINE = '''
import json, os.path
import numpy as np
from functools import lru_cache
from pkg import part
from pkg.deep.leaf import LEAF

def plain(completions, examples): return [part.score(c) for c in completions]

class Object:
    calls = 0
    def __init__(self, least=1): self.least, self._cache = least, {}
    def __call__(self, completions, examples): return [float(len(c) >= self.least) for c in completions]
    def method(self, completions, examples): return self(completions, examples)

class Below(Object): pass

def made(least):
    def inner(completions, examples): return [float(len(c) >= least) for c in completions]
    return inner

def late(completions, examples):
    from other import late
    return late(completions)

@lru_cache
def kept(completions, examples): return [0.0]
'''
FILES = {"mine.py": MINE, "pkg/__init__.py": "", "pkg/part.py": "from . import sibling\ndef score(c): return 1.0\n",
         "pkg/sibling.py": "X = 1\n", "pkg/deep/__init__.py": "", "pkg/deep/leaf.py": "LEAF = 1\n",
         "other.py": "def late(c): return c\n", "unrelated.py": "Y = 1\n"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder of modules; called with file and text it changes one of them and loads all anew."
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] in ("mine", "pkg", "other", "unrelated")]:
            del sys.modules[name]
    def change(file=None, old="", new=""):
        if file: (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new))
        forget()
        return ModuleLike()
    for file, text in FILES.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    yield change
    forget()


class ModuleLike:
    "The names of module mine."
    def __getattr__(self, name): return imported(f"mine:{name}")


FORMS = dict(function=lambda m: m.plain, kind=lambda m: m.Object, instance=lambda m: m.Object(2),
             below=lambda m: m.Below(), method=lambda m: m.Object().method,
             partial=lambda m: partial(m.plain, examples=[]),
             weighted=lambda m: Weighted(((1, Exact()), (0.1, m.plain))), noisy=lambda m: Noisy(m.Object(), 0.1),
             closure=lambda m: m.made(3), mark=lambda m: Exact(m.plain), cached=lambda m: m.kept,
             function_in_a_list=lambda m: [dict(a=(m.plain,))])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("file, old, new", [("mine.py", "return [0.0]", "return [1.0]"), ("pkg/part.py", "1.0", "0.5"),
                                            ("pkg/sibling.py", "1", "2"), ("pkg/deep/leaf.py", "1", "2"),
                                            ("pkg/deep/__init__.py", "", "Z = 1"),
                                            ("other.py", "return c", "return 1")])
def test_a_change_in_any_module_that_is_reached_is_seen(here, form, file, old, new):
    make, before = FORMS[form], own_code(FORMS[form](here()))
    assert before and own_code(make(here())) == before
    assert own_code(make(here(file, old, new))) != before


@pytest.mark.parametrize("form", FORMS)
def test_comments_and_other_modules_are_no_part_of_it(here, form):
    before = own_code(FORMS[form](here()))
    assert own_code(FORMS[form](here("unrelated.py", "1", "2"))) == before
    assert own_code(FORMS[form](here("mine.py", "def plain", "# a comment\n\n\ndef plain"))) == before


def test_values_of_objects_and_closures_count(here):
    mine = here()
    assert own_code(mine.Object(1)) != own_code(mine.Object(2)) and own_code(mine.made(1)) != own_code(mine.made(2))
    assert own_code(mine.Object(1)) == own_code(mine.Object(1))
    used = mine.Object(1)
    used._cache["seen"] = 3  # private: what it remembers, not what it is
    assert own_code(used) == own_code(mine.Object(1))


@pytest.mark.parametrize("reward", [Exact(), Numeric(tolerance=0.1), Choice(), Noisy(Exact(), 0.5), Failed("x"), len,
                                    Weighted(((1, Exact()), (2, Numeric()))), named_reward("exact"), None, "text",
                                    partial(sorted, key=len)])
def test_code_of_packages_counts_by_its_name(reward): assert own_code(reward) == ""


def test_built_in_rewards_have_the_fingerprints_that_they_had():
    pair = [Example("1+1=", "2", "sums"), Example("4+4=", "8", "sums")]
    def found(reward): return Capability("sums", pair[:1], pair[1:], reward).fingerprint
    assert found(Exact()) == "0af78e895f07a006"
    assert found(Weighted(((1, Exact()), (0.5, Numeric())))) == "a43b3d31c8062bd4"


def test_edits_without_a_reload_are_not_the_code_that_runs(here, tmp_path):
    import importlib
    plain = here().plain
    before = own_code(plain)
    (tmp_path / "mine.py").write_text(MINE.replace("return [0.0]", "return [1.0]"))
    assert own_code(plain) == before
    importlib.reload(sys.modules["mine"])
    assert own_code(imported("mine:plain")) != before


def notebook(text):
    "The names of a notebook whose cells hold a text; as typed, without a file."
    module = ModuleType("__main__")
    exec(text, vars(module))  # noqa: S102 – the text is ours
    return module


NOTEBOOK = '''
LIMIT = 3
def helper(c): return len(c) < LIMIT
def reward(completions, examples): return [float(helper(c)) for c in completions]
class Reward:
    by = 1
    def __call__(self, completions, examples): return [self.by * helper(c) for c in completions]
def unrelated(): return 1
'''


@pytest.mark.parametrize("name", ["reward", "Reward"])
def test_functions_and_classes_of_a_notebook(name):
    def hashed(text): return own_code(getattr(notebook(text), name))
    before = hashed(NOTEBOOK)
    assert before and hashed(NOTEBOOK) == before == hashed(NOTEBOOK.replace("return 1", "return 2"))
    assert hashed(NOTEBOOK.replace("LIMIT = 3", "LIMIT = 4")) != before != hashed(NOTEBOOK.replace("<", ">"))
    if name == "Reward": assert hashed(NOTEBOOK.replace("by = 1", "by = 2")) != before


def test_a_module_with_an_error_or_a_circle(here):
    assert set(own_modules("pkg.part")) == {"pkg", "pkg.part", "pkg.sibling"}
    assert set(own_modules("pkg.deep.leaf")) == {"pkg", "pkg.deep", "pkg.deep.leaf"}
    here("pkg/sibling.py", "X = 1", "from pkg import part")
    assert "pkg.sibling" in own_modules("pkg.part")
    here("pkg/sibling.py", "from", "frm")
    assert "pkg.sibling" in own_modules("pkg.part") and own_modules("no_such_module") == {} == own_modules("numpy")


def test_whose_file_it_is(tmp_path):
    import json
    import pandas
    assert is_own(str(tmp_path / "mine.py")) and is_own(__file__)
    assert not is_own(json.__file__) and not is_own(pandas.__file__)
    assert not is_own(str(tmp_path / "site-packages" / "a.py"))
