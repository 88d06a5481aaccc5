"Where a model is: paths that don't exist are refused at once, a hub is asked once and for a short time."
import time
from pathlib import Path

import pytest

from copd_nb.policy import paths
from copd_nb.policy.core import Policy
from copd_nb.policy.paths import located, looks_like_path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("name", ["./x", "../x", "/x/y", "~/x", "a/b/c", "x.gguf", "a\\b", "models/x", "x/"])
def test_a_path_that_does_not_exist_never_reaches_a_hub(name, monkeypatch):
    monkeypatch.setattr(paths, "_hub_error", lambda seconds: pytest.fail("asked the hub"))
    assert looks_like_path(name)
    with pytest.raises(FileNotFoundError, match="there is no model "): located(name)
    with pytest.raises(FileNotFoundError, match="there is no model "): Policy.load(name)


def test_the_nearest_folder_is_named():
    with pytest.raises(FileNotFoundError, match=r"no model 'models/smolm2' \(did you mean 'smollm2'\?\)$"):
        located("models/smolm2")
    with pytest.raises(FileNotFoundError, match=r"no model './none/x': there is no folder 'none'$"): located("./none/x")
    with pytest.raises(FileNotFoundError, match="no model 'x'"): located(Path("x"))
    with pytest.raises(ValueError, match="is empty"): located("")


def test_what_exists_is_taken_as_it_is(tmp_path):
    assert located("models/smollm2") == "models/smollm2" and located(tmp_path) == str(tmp_path)
    assert located("~/models") == str(tmp_path / "models")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_name_is_left_alone_if_the_hub_answers_and_refused_in_one_sentence_if_not(name, monkeypatch):
    assert not looks_like_path(name)
    monkeypatch.setattr(paths, "_hub_error", lambda seconds: None)
    assert located(name) == name
    monkeypatch.setattr(paths, "_hub_error", lambda seconds: "no answer")
    with pytest.raises(FileNotFoundError, match=rf"no folder '{name}' here and no such model in .*no answer"):
        located(name)


def test_a_cached_model_is_read_from_the_cache_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_cached", lambda name: tmp_path / "snapshot")
    monkeypatch.setattr(paths, "_hub_error", lambda seconds: "no answer")
    assert located("org/name") == str(tmp_path / "snapshot")


def test_offline_is_respected_and_a_hub_that_hangs_is_given_up(monkeypatch):
    from huggingface_hub import constants, utils
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert paths._hub_error(1) == "HF_HUB_OFFLINE is set"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(utils, "get_session", lambda: type("S", (), dict(head=lambda *a, **k: time.sleep(5)))())
    began = time.monotonic()
    assert paths._hub_error(0.2) == "no answer within 0.2 s" and time.monotonic() - began < 2
