"The monitors on real trainings: five healthy ones and four failures, recorded in data/monitors and watched again here; `-m long` trains them anew."
import json, random
from pathlib import Path
import numpy as np
import pytest
from m2kit.core.errors import UserError
from m2kit.core.jobs import run_jobs
from m2kit.core.step import Step
from m2kit.tiny.model import make_model, make_tokenizer
from m2kit.train.grpo import GRPOConfig
from m2kit.tiny.trials import watchers
from m2kit.train.monitors import Alarm, EntropyCollapse, Forgetting, Monitors, RewardHacking, SimulatorDrift, watched

OWN = dict(collapse="entropy collapse", hacking="reward hacking", forgetting="forgetting", drift="simulator drift")
DATA = {p.stem: json.loads(p.read_text()) for p in sorted((Path(__file__).parent/"data"/"monitors").glob("*.json"))}
HEALTHY, FAILED = [k for k, d in DATA.items() if d["kind"] == "healthy"], [k for k, d in DATA.items() if d["kind"] != "healthy"]

def alarms(rows):
    "The first alarm of each monitor."
    found = {m.name: next((a for i in range(len(rows)) if (a := m.look(rows[:i + 1]))), None) for m in watchers()}
    return {k: a for k, a in found.items() if a}

def feed(rows, run, **kw):
    "Rows as the loop gives them, to monitors with a folder."
    watch = Monitors(watchers(), run, tell=lambda text: None, **kw)
    for r in rows:
        if r["step"] < 0: watch.begin(lambda: {k: v for k, v in r.items() if k != "step"}); continue
        run.log(**r); watch(r)
    return watch

def test_what_was_recorded():
    assert len(HEALTHY) >= 5 and {DATA[k]["kind"] for k in FAILED} == set(OWN)
    for d in DATA.values(): assert [r["step"] for r in d["rows"]] == list(range(-1, d["config"]["steps"]))

@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_left_alone(name):
    assert alarms(DATA[name]["rows"]) == {}

@pytest.mark.parametrize("name", FAILED)
def test_every_failure_is_caught(name):
    "By the monitor that it was made for, before three quarters of the run are over."
    found, d = alarms(DATA[name]["rows"]), DATA[name]
    assert OWN[d["kind"]] in found and found[OWN[d["kind"]]].step < .75*d["config"]["steps"], found

def test_drift_of_the_patient_alone_is_blamed_on_the_patient():
    for name in FAILED:
        if DATA[name]["kind"] == "drift":
            assert set(alarms(DATA[name]["rows"])) == {"simulator drift"}
            assert alarms(DATA[name]["rows"])["simulator drift"].step >= DATA[name]["config"]["steps"]//2

@pytest.mark.parametrize("name", FAILED)
def test_a_resumed_run_gives_the_same_alarms(name, tmp_path):
    rows = DATA[name]["rows"]
    whole = feed(rows, Step("whole", {}, base=tmp_path)).alarms()
    assert {a.monitor for a in whole} == set(alarms(rows))
    for cut in (3, 7, 12, len(rows) - 3):
        run = Step("cut", dict(at=cut), base=tmp_path)
        feed(rows[:cut + 1], run)
        run.rewind(back := max(0, cut - 4))                             # the last checkpoint was before the kill
        assert feed([r for r in rows if r["step"] >= back], run).alarms() == whole

@pytest.mark.parametrize("name", FAILED)
def test_stopping(name, tmp_path):
    rows = DATA[name]["rows"]
    first = min(a.step for a in alarms(rows).values())
    run = Step("stops", {}, base=tmp_path)
    with pytest.raises(UserError, match=f"stopped by a monitor: .*step {first}:.*stop=False"): feed(rows, run, stop=True)
    assert run.rows()[-1]["step"] == first

def null_run(rng, steps=40, every=5):
    "A run in which nothing happens, with the scatter of the healthy recorded runs."
    probe = lambda: dict(oracle=rng.normal(.65, .03), held_out=rng.normal(.66, .03), oracle_se=.04, held_out_se=.04, diagnosis=rng.binomial(48, .96)/48, diagnosis_se=.03, lessons=.3,
                         patient=dict(n=160, counts={k: int(rng.binomial(160, p)) for k, p in [("fact", .95), ("privacy", .98), *((f"kind {i}", .3/(i + 1)) for i in range(35))]}))
    return [dict(step=-1, **probe())] + [dict(step=i, score=rng.normal(.75, .06), entropy=rng.normal(.28, .02)) | ({} if (i + 1) % every else probe()) for i in range(steps)]

def test_noise_alone_raises_no_alarm():
    rng = np.random.default_rng(0)
    found = [k for _ in range(60) for k in alarms(null_run(rng))]
    assert len(found) <= 1, found

def test_missing_columns_are_no_alarm():
    "A run without probes, without a score, with gaps and with NaN."
    rows = DATA[HEALTHY[0]]["rows"]
    for drop in ("oracle", "score", "entropy", "patient", "lessons"): assert alarms([{k: v for k, v in r.items() if k != drop} for r in rows]) == {}
    assert alarms([dict(r, score=float("nan")) if i % 3 else r for i, r in enumerate(rows)]) == {}
    assert alarms([]) == {} and all(m.look([dict(step=0)]) is None for m in watchers())

@pytest.fixture(scope="module")
def toy():
    tok = make_tokenizer(["I have a cough and a fever.", "Order a chest X-ray.", "Likely gout."]*20, terms=["gout"], vocab=280)
    return tok, lambda: make_model(tok, hidden=32, layers=2, heads=2, kv_heads=1, ff=64, seed=1), [dict(prompt=[dict(role="user", content=c)]) for c in ("I have a cough.", "I have a fever.")]*4

def test_a_stopped_training_keeps_its_checkpoint_and_goes_on(toy, tmp_path):
    "Through the real loop: stopped at an alarm, again at the same one, and on to the end without stop."
    tok, fresh, tasks = toy
    brief = lambda prompts, completions, completion_ids, **c: [-len(i)/12 for i in completion_ids]
    cfg, quiet = GRPOConfig(prompts=4, group=4, steps=30, max_new=12, l_max=12, lr=2e-2, save_every=4), lambda text: None
    def go(run, stop, monitors=(EntropyCollapse(window=3),)): return watched(fresh(), tok, tasks, [brief], cfg, run, list(monitors), stop=stop, say=quiet)
    whole = go(Step("whole", {}, base=tmp_path), False)
    (alarm,) = Monitors([], Step("whole", {}, base=tmp_path)).alarms()
    run = Step("stopped", {}, base=tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match=f"step {alarm.step}:"): go(run, True)
    assert (run.path/"state.safetensors").exists() and run.rows()[-1]["step"] == alarm.step
    assert go(run, False) == whole and Monitors([], run).alarms() == [alarm]

def test_a_reader_who_stops_the_run_is_heard_first(toy, tmp_path):
    tok, fresh, tasks = toy
    def enough(row): raise UserError("enough")
    with pytest.raises(UserError, match="enough"):
        watched(fresh(), tok, tasks, [lambda completions, **c: [0.]*len(completions)], GRPOConfig(prompts=2, group=2, steps=2, max_new=4, l_max=4), Step("x", {}, base=tmp_path), watchers(), tell=enough)

@pytest.mark.long
def test_train_them_all_again(tmp_path):
    "Five healthy runs and four failures, trained here; about ten minutes of one core."
    from m2kit.tiny.doctor import tiny_doctor
    jobs = [dict(kind=d["kind"], doctor=str(tiny_doctor()), seed=d["seed"], base=str(tmp_path)) for d in DATA.values()]
    for job, rows in zip(jobs, run_jobs("m2kit.train.monitors:run_trial", jobs, workers=2)):
        found = set(alarms(rows))
        assert OWN[job["kind"]] in found if job["kind"] in OWN else not found, (job, found)
