"""The experiments' arms: killed and continued, watched without a trace, and told what is wrong with them."""
import json
import numpy as np
import pytest
from m2kit.core.errors import UserError
from m2kit.tiny.model import make_model
from m2kit.train import experiments, grpo
from m2kit.tiny.doctor import clinic_tokenizer

SMALL = dict(steps=4, prompts=2, group=2, max_new=24, l_max=24, save_every=2, updates=2)


@pytest.fixture(scope="module")
def doctor(tmp_path_factory):
    "A doctor that knows nothing: enough to train."
    path, tokenizer = tmp_path_factory.mktemp("doctor"), clinic_tokenizer()
    make_model(tokenizer, 32, 2, heads=2, kv_heads=1, ff=64, seed=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def easy_reward(monkeypatch):
    "A reward that a doctor who knows nothing can gain from: to write tokens of an even number."
    def even(prompts, completions, completion_ids, **columns): return [sum(t % 2 == 0 for t in i)/24 for i in completion_ids]
    monkeypatch.setattr(experiments, "RubricReward", lambda grader: even)


@pytest.mark.parametrize("changes", [dict(), dict(coef=1., quantile=.8, thresh=-1.), dict(l_max=None, scale=True)])
def test_a_killed_arm_goes_on_as_if_nothing_had_been(doctor, tmp_path, monkeypatch, changes):
    arm = dict(doctor=doctor, seed=3, **SMALL | changes)
    whole = experiments.train_arm(base=tmp_path/"whole", **arm)
    probes, real = [], experiments.held_out
    def killed(*args):
        probes.append(1)
        if len(probes) == 2: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(experiments, "held_out", killed)
    with pytest.raises(KeyboardInterrupt): experiments.train_arm(base=tmp_path/"cut", **arm)
    assert len(experiments.arm_step(base=tmp_path/"cut", **arm).rows()) == 3       # its last checkpoint is at 2
    monkeypatch.setattr(experiments, "held_out", real)
    assert experiments.train_arm(base=tmp_path/"cut", **arm) == whole
    assert [("held_score" in r) for r in whole] == [False, True, False, True]
    assert whole[0]["deviation"] > 0 and whole[0]["grad_norm"] > 0


def test_the_statistics_of_the_loss_change_nothing(doctor, tmp_path, monkeypatch):
    arm = dict(doctor=doctor, seed=4, **SMALL)
    seen = experiments.train_arm(base=tmp_path/"seen", **arm)
    none = dict.fromkeys(("clipped_up", "clipped_down", "p_clipped", "ratio"))
    monkeypatch.setattr(grpo, "clip_stats", lambda *args: none)
    unseen = experiments.train_arm(base=tmp_path/"unseen", **arm)
    assert [r | none for r in seen] == unseen and seen[0]["ratio"] != 1
    json.dumps(seen, allow_nan=False)


def test_a_policy_that_is_never_right_has_no_mixed_tasks(doctor, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "checklist_rates", lambda model, tokenizer, tasks, group, seed: np.zeros(len(tasks)))
    with pytest.raises(UserError, match="fewer than 2 of some level"): experiments.mixed_tasks(doctor, 2, base=tmp_path)


@pytest.mark.parametrize("bad, message", [(dict(tsak="rubric"), "did you mean task"), (dict(task="rule"), "checklist"), (dict(group=1), "take 2 or more"), (dict(coef=1., quantile=20), "between 0 and 1")])
def test_bad_settings_are_told(doctor, tmp_path, bad, message):
    with pytest.raises(UserError, match=message): experiments.train_arm(doctor, 0, base=tmp_path, **SMALL | bad)
