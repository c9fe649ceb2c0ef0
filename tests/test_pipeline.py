"""`m2kit reproduce` from outside: order, kill and resume, failures, orphans, overrides, and the redrawn exhibits for real."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import psutil, pytest
from filelock import FileLock

M2KIT = str(Path(sys.executable).with_name("m2kit"))
RUN = "import sys, json; from m2kit.reproduce.pipeline import reproduce; sys.exit(reproduce(**json.loads(sys.argv[1])))"
KEYS = ["exhibit", "title", "scale", "label", "values", "intervals", "seeds", "versions", "commit", "freshness",
        "seconds", "claims"]
PARAMETERS = "scale = 'tiny'\nout = 'figures'\nsteps = 3"


def cell(i, source):
    tags = ["parameters"] if source.startswith("scale =") else []
    return dict(cell_type="code", id=f"c{i}", metadata=dict(tags=tags), source=source, outputs=[], execution_count=None)


def notebook(path, *sources):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [dict(cell_type="markdown", id="title", metadata={}, source=f"# {path.stem}"), *(cell(i, s) for i, s in enumerate(sources))]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    path.write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))


def drawing(name):
    return f"""import matplotlib.pyplot as plt, numpy as np
from m2kit.core.plot import style
from m2kit.reproduce.exhibits import save_exhibit
with style():
    fig, ax = plt.subplots()
    walk = np.random.default_rng(0).normal(size=steps).cumsum()
    ax.plot(walk)
    save_exhibit(fig, "{name}", title="A walk", label="measured", values=dict(walk=walk), seeds=[0], out=out)"""


@pytest.fixture
def desk(tmp_path, monkeypatch):
    "A folder for notebooks, runs and figures."
    monkeypatch.setenv("M2KIT_RUNS", str(tmp_path/"runs"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path/"nbs").mkdir()
    return tmp_path


def start(desk, **kw):
    job = json.dumps(dict(nbs=str(desk/"nbs"), out=str(desk/"figures"), jobs=2) | kw)
    return subprocess.Popen([sys.executable, "-c", RUN, job], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(desk, **kw):
    p = start(desk, **kw)
    said = p.communicate(timeout=120)[0]
    return p.returncode, said


def until(what, seconds=40):
    end = time.time() + seconds
    while time.time() < end:
        if what(): return
        time.sleep(.05)
    raise AssertionError(f"waited {seconds} s in vain")


def all_gone(processes, seconds=5):
    "Whether none of `processes` is alive after at most `seconds`."
    end = time.time() + seconds
    alive = processes
    while alive and time.time() < end:
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        time.sleep(.1)
    return not alive


# A slow exhibit: it starts a process of its own (as one that trains does) and then waits, until `flag` is there.
SLOW = """import subprocess, sys, time
from pathlib import Path
flag, mark = Path(out).parent/"go", Path(out).parent/"started"
if not flag.exists():
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    mark.write_text(str(helper.pid))
    time.sleep(120)"""


def test_kill_resume_and_no_orphans(desk, monkeypatch):
    notebook(desk/"nbs/core/run.ipynb", "1 + 1")
    notebook(desk/"nbs/exhibits/fig91_quick.ipynb", PARAMETERS, "import m2kit.core.run", drawing("fig91"))
    notebook(desk/"nbs/exhibits/fig92_slow.ipynb", PARAMETERS, "import m2kit.core.run", SLOW, drawing("fig92"))
    p = start(desk)
    until(lambda: (desk/"started").exists() and (desk/"runs/tiny/pipeline/exhibits/fig91.json").exists())
    below = psutil.Process(p.pid).children(recursive=True)
    assert int((desk/"started").read_text()) in [b.pid for b in below] and len(below) >= 3   # papermill, kernel, the kernel's own child
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert all_gone(below), "processes outlived the killed pipeline"
    assert not (desk/"figures/fig92.json").exists()

    (desk/"go").touch()
    status, said = run(desk)
    assert status == 0, said
    assert said.count("already done") == 2 + 2 and "fig92 starts" in said and "fig91 starts" not in said   # (each is told once, and once more in the table)
    resumed = {f.name: f.read_bytes() for f in (desk/"figures").glob("fig9*")}

    (desk/"whole").mkdir(); (desk/"whole/go").touch()                   # the same, never broken off
    monkeypatch.setenv("M2KIT_RUNS", str(desk/"whole/runs"))
    status, said = run(desk, out=str(desk/"whole/figures"))
    assert status == 0 and "already done" not in said, said
    assert len(resumed) == 6 and {f.name: f.read_bytes() for f in (desk/"whole/figures").glob("fig9*")} == resumed


def test_a_failure_stays_alone(desk):
    notebook(desk/"nbs/core/run.ipynb", "1 + 1", "raise RuntimeError('the scale is off')")
    notebook(desk/"nbs/core/scale.ipynb", "2 + 2", "#| eval: false\n1/0")
    notebook(desk/"nbs/exhibits/fig91_on_run.ipynb", PARAMETERS, "from m2kit.core.run import root", drawing("fig91"))
    notebook(desk/"nbs/exhibits/fig92_on_scale.ipynb", PARAMETERS, "from m2kit.core import scale as s", drawing("fig92"))
    status, said = run(desk)
    assert status == 1, said
    assert "core/run" in said and "cell 3 of 3" in said and "RuntimeError: the scale is off" in said
    assert "skipped: it builds on core/run, which failed" in said and "not done: core/run, fig91" in said
    assert (desk/"figures/fig92.json").exists() and not (desk/"figures/fig91.json").exists()
    page = (desk/"figures/report.html").read_text()
    assert "it builds on core/run, which failed" in page and 'id="fig92"' in page

    notebook(desk/"nbs/core/run.ipynb", "1 + 1")      # mended: only what was not done runs
    status, said = run(desk)
    assert status == 0 and "fig92 starts" not in said and "fig91 starts" in said, said
    assert "failed" not in (desk/"figures/report.html").read_text()


def test_what_nobody_keeps_evidence_of_is_left_as_it_is(desk):
    "An exhibit whose step is not in the evidence costs nothing and is no failure; with another size than the book's it is computed."
    asks = "from m2kit.core.step import Step\nsteps = Step('walk', dict(steps=steps)).result(lambda: dict(n=steps))['n']"
    notebook(desk/"nbs/exhibits/fig91_asks.ipynb", PARAMETERS + "\nminutes = 7", asks, drawing("fig91"))
    status, said = run(desk)
    assert status == 0 and "fig91                    left as it is" in said and not (desk/"figures/fig91.json").exists(), said
    assert "about 7 min: m2kit evidence fig91" in said and "failed" not in (desk/"figures/report.html").read_text()
    status, said = run(desk, sets=["fig91.steps=4"])
    assert status == 0 and len(json.loads((desk/"figures/fig91.json").read_text())["values"]["walk"]) == 4, said


def test_what_a_notebook_declares_is_what_it_gets(desk):
    notebook(desk/"nbs/exhibits/fig91_many.ipynb", PARAMETERS + "\nworkers = 2\nminutes = 3", "import os\nassert os.environ['M2KIT_JOBS'] == '2' and os.environ['OMP_NUM_THREADS'] == '1'", drawing("fig91"))
    status, said = run(desk, sets=["fig91.steps=5"])
    assert status == 0 and "about 3 min 00 s" in said, said
    assert len(json.loads((desk/"figures/fig91.json").read_text())["values"]["walk"]) == 5
    status, said = run(desk, sets=["fig91.steps=5"])
    assert status == 0 and "already done" in said
    status, said = run(desk, sets=["fig91.steps=5"], fresh=True)
    assert status == 0 and "already done" not in said


def test_wrong_notebooks_are_named(desk):
    from m2kit.core.errors import UserError
    from m2kit.reproduce.pipeline import reproduce
    notebook(desk/"nbs/exhibits/fig91_bare.ipynb", "1 + 1")
    with pytest.raises(UserError, match="fig91_bare.ipynb: no cell tagged 'parameters' that sets out and scale"): reproduce(nbs=desk/"nbs")
    (desk/"nbs/torn.ipynb").write_text('{"cells"')
    with pytest.raises(UserError, match="torn.ipynb: not a notebook"): reproduce(nbs=desk/"nbs")
    with pytest.raises(UserError, match="run this in a clone"): reproduce(nbs=desk/"nowhere")


def m2kit(*argv, **kw):
    return subprocess.run([M2KIT, *argv], capture_output=True, text=True, timeout=120, **kw)


def test_one_at_a_time(desk):
    (desk/"runs/tiny/pipeline").mkdir(parents=True)
    with FileLock(desk/"runs/tiny/pipeline/lock"):
        r = m2kit("reproduce", "--only", "fig06", "--out", str(desk/"figures"))
    assert r.returncode == 2 and r.stderr.count("\n") == 1 and "another m2kit reproduce is at work" in r.stderr


def test_interrupt(desk):
    p = subprocess.Popen([M2KIT, "reproduce", "--only", "fig06", "--out", str(desk/"figures")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: len(psutil.Process(p.pid).children(recursive=True)) >= 2)
    below = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=20)[1]
    assert p.returncode == 130 and "the same command goes on from here" in err and "Traceback" not in err
    assert all_gone(below)


def test_the_redrawn_exhibits(desk):
    names, figures = ["fig06", "fig07", "fig08"], desk/"figures"
    go = ["reproduce", "--only", ",".join(names), "--out", str(figures)]
    r = m2kit(*go)
    assert r.returncode == 0, r.stdout + r.stderr
    for n in names:
        made = json.loads((figures/f"{n}.json").read_text())
        assert list(made) == KEYS and made["exhibit"] == n and made["label"] == "redrawn" and made["claims"] and made["values"]
        assert {c["verdict"] for c in made["claims"]} == {"not tested here"} and made["freshness"] is None
        assert (figures/f"{n}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and "<svg" in (figures/f"{n}.svg").read_text()[:800]
    ledger = json.loads((figures/"claims.json").read_text())
    assert [c["exhibit"] for c in ledger["claims"]] == sorted(c["exhibit"] for c in ledger["claims"]) and ledger["counts"]["paper"]["reproduced"] == 0
    page = (figures/"report.html").read_text()
    assert all(f'id="{n}"' in page for n in names) and "Grok 3" in page and "secondary" in page

    first = {f.name: f.read_bytes() for f in figures.iterdir()}
    (figures/"fig07.png").unlink()
    r = m2kit(*go)                                    # only what is missing is made again, and it is the same
    assert r.returncode == 0 and "fig07 starts" in r.stdout and "fig06 starts" not in r.stdout
    assert {f.name: f.read_bytes() for f in figures.iterdir()} == first


def small_figure_5(desk, runs, monkeypatch):
    "Figure 5 with two short arms, in runs of its own, on the tiny doctor that the chapters use."
    from m2kit.tiny.doctor import tiny_doctor
    monkeypatch.delenv("M2KIT_RUNS")
    models = tiny_doctor().parent
    monkeypatch.setenv("M2KIT_RUNS", str(desk/runs))
    (desk/runs).mkdir()
    (desk/runs/"models").symlink_to(models)
    return [M2KIT, "reproduce", "--only", "fig05,table2", "--set", "fig05.steps=5", "--set", "fig05.seeds=[1]", "--out", str(desk/f"figures-{runs}")]


def fig05(desk, runs):
    "What the exhibit says, but for the time it took."
    made = json.loads((desk/f"figures-{runs}"/"fig05.json").read_text())
    assert list(made) == KEYS and made["label"] == "measured" and made.pop("seconds") > 0
    return made


@pytest.mark.slow
def test_figure_5_killed_and_resumed(desk, monkeypatch):
    whole, cut = small_figure_5(desk, "whole", monkeypatch), None
    done = subprocess.run(whole, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    cut = small_figure_5(desk, "cut", monkeypatch)
    p = subprocess.Popen(cut, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until(lambda: any(len(f.read_text().splitlines()) >= 2 for f in (desk/"cut").glob("length-*/metrics.jsonl")), 120)
    p.kill(); p.wait()
    assert not (desk/"figures-cut"/"fig05.json").exists()
    done = subprocess.run(cut, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert fig05(desk, "cut") == fig05(desk, "whole")
    assert {c["verdict"] for c in fig05(desk, "cut")["claims"]} == {"cannot tell"}      # one seed proves nothing, and the exhibit says so
