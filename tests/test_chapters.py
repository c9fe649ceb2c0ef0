"""Every chapter is its own test: its examples run from top to bottom, in a process of its own, two at a time. (Exhibits are run by `make reproduce`.)"""
import os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = [*(p for p in sorted((ROOT/"nbs").glob("*/*.ipynb")) if p.parent.name != "exhibits"), ROOT/"nbs"/"index.ipynb"]

def run(path):
    "nbdev's test of one notebook: passed, what it said, seconds."
    start = time.perf_counter()
    r = subprocess.run([Path(sys.executable).parent/"nbdev_test", "--path", path, "--n_workers", "0"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    return r.returncode == 0 and "Success." in r.stdout, r.stdout + r.stderr, time.perf_counter() - start   # nothing found to test is no success

@pytest.fixture(scope="module")
def results(request):
    "A future for each chapter that was asked for."
    asked = [i.callspec.params["path"] for i in request.session.items if i.path == Path(__file__)]
    pool = ThreadPoolExecutor(int(os.environ.get("M2KIT_JOBS", 2)))
    yield {p: pool.submit(run, p) for p in asked}
    pool.shutdown(cancel_futures=True)

@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.relative_to(ROOT/"nbs").with_suffix("").as_posix())
def test_chapter(path, results, capsys):
    passed, said, seconds = results[path].result()
    with capsys.disabled(): print(f" {path.relative_to(ROOT)} {seconds:.1f} s ", end="", flush=True)
    assert passed, said
