"A stage that is killed with -9 goes on to the same weights; a curriculum checks its order before it spends anything."
import os, random, signal, subprocess, sys, time
import pytest
from m2kit.core.errors import UserError
from m2kit.lm.local import save_checkpoint
from m2kit.tiny.model import make_model
from m2kit.train.sft import encode_dialogue, fit
from m2kit.tiny.base import ladder_tokenizer
from m2kit.tiny.ladder import check_order, ladder
from m2kit.train.stages import multiturn_stage, rule_stage

SMALL = dict(prompts=2, group=2, steps=6, max_new=24, l_max=24, save_every=2)
TALK = SMALL | dict(sessions=6, every=2)

@pytest.fixture(scope="module")
def pupil(tmp_path_factory):
    "A policy that has read a few sessions of reference doctors: it can ask a question, and little more."
    from m2kit.clinic.persona import draw_script
    from m2kit.train.consultant import draw_manner, hold, reference_doctor, reference_patient
    tok, rng = ladder_tokenizer(), random.Random(0)
    scripts = [draw_script(rng) for _ in range(128)]
    talks = hold(reference_doctor([draw_manner(rng) for _ in scripts], 0), reference_patient(0), scripts)
    rows = [encode_dialogue(tok, t) for t in talks]
    model = make_model(tok, hidden=48, layers=2, heads=2, kv_heads=1, ff=96, context=768)
    fit(model.train(), iter(rows*40), 120, 8, tok.pad_token_id)
    return save_checkpoint(model.eval(), tok, tmp_path_factory.mktemp("pupil")/"model")

def weights(path): return (path/"model.safetensors").read_bytes()

def killed(pupil, base):
    "Begin the stage in another process and kill it -9 once it has saved something and is in the middle of the next block."
    code = f"from m2kit.train.stages import multiturn_stage\nmultiturn_stage({str(pupil)!r}, 5, {str(base)!r}, tell=lambda row: print(row['step'], flush=True), **{TALK!r})"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    for line in p.stdout:
        if line.strip() == "2": p.send_signal(signal.SIGKILL); break
    p.wait()
    return p.returncode

@pytest.mark.slow
def test_a_stage_killed_with_9_goes_on(pupil, tmp_path):
    assert killed(pupil, tmp_path/"cut") == -signal.SIGKILL
    (folder,) = (tmp_path/"cut").glob("multiturn-*")
    assert (folder/"state.safetensors").exists() and not (folder/"done.json").exists()
    steps = []
    again = multiturn_stage(pupil, 5, tmp_path/"cut", tell=lambda row: steps.append(row["step"]), **TALK)
    assert steps == [2, 3, 4, 5]                                     # not from the beginning
    whole = multiturn_stage(pupil, 5, tmp_path/"whole", **TALK)
    assert weights(again) == weights(whole)
    assert (again.parent/"metrics.jsonl").read_text() == (whole.parent/"metrics.jsonl").read_text()
    assert (again.parent/"fragments.jsonl").read_text() == (whole.parent/"fragments.jsonl").read_text()

@pytest.mark.slow
def test_a_ladder_goes_on_where_it_was(pupil, tmp_path):
    small = {s: SMALL | dict(steps=2, pool=24) for s in ("rule", "rubric")} | {"rule": SMALL | dict(steps=2, pool=24, low=0., high=1.)}
    class Killed(Exception): pass
    def kill(line):
        if line.startswith("rule"): raise Killed
    with pytest.raises(Killed): ladder("rule,rubric", 1, start=pupil, base=tmp_path/"a", changes=small, n=0, tell=kill)
    cut = ladder("rule,rubric", 1, start=pupil, base=tmp_path/"a", changes=small, n=0)
    whole = ladder("rule,rubric", 1, start=pupil, base=tmp_path/"b", changes=small, n=0)
    for a, b in zip(cut, whole): assert open(f"{a['path']}/model.safetensors", "rb").read() == open(f"{b['path']}/model.safetensors", "rb").read()
    assert [r["stage"] for r in cut] == ["rule", "rubric"]

@pytest.mark.parametrize("stages, start, says", [
    ("rule", None, "needs a policy to start from"), ("midtrain,base", None, "cannot come after midtrain"), ("base,base", None, "cannot come after base"),
    ("base,multitrun", None, "did you mean multiturn"), ("", None, "no stage is named"), ("sft", "no/such/folder", "no checkpoint to start from")])
def test_a_wrong_order_says_so(stages, start, says):
    with pytest.raises(UserError, match=says): check_order(stages, start)

def test_any_order_and_any_single_stage(tmp_path):
    (tmp_path/"model.safetensors").write_bytes(b"")
    for stages in ("multiturn", "rubric,rule", "rule,rule", "multiturn,sft,midtrain"): assert check_order(stages, tmp_path) == stages.split(",")
    assert check_order("base,rule")[0] == "base"

def test_a_setting_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean steps"): rule_stage(tmp_path, 0, tmp_path, step=3)
