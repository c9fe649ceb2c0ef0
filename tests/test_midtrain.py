"Mid-training under a real kill: what a notebook cannot do to itself."
import os, signal, subprocess, sys, time
from pathlib import Path
import pytest

CODE = "import sys; from m2kit.train.midtrain import midtrain_stage, tiny_base; print(midtrain_stage(tiny_base(), 5, base=sys.argv[1], steps=12, batch=5, save_every=2))"

def start(folder):
    return subprocess.Popen([sys.executable, "-c", CODE, str(folder)], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))

def steps(folder):
    return sum(len(f.read_text().splitlines()) for f in Path(folder).glob("midtrain-*/metrics.jsonl"))

@pytest.mark.slow
def test_killed_stage_goes_on(tmp_path):
    cut, whole = start(tmp_path/"cut"), None
    for _ in range(6000):
        if steps(tmp_path/"cut") >= 5 or cut.poll() is not None: break
        time.sleep(.02)
    assert cut.poll() is None, "it ended before it could be killed"
    cut.send_signal(signal.SIGKILL); cut.wait()
    assert not list((tmp_path/"cut").glob("midtrain-*/done.json"))
    paths = []
    for name in ("cut", "whole"):
        out, _ = start(tmp_path/name).communicate()
        paths.append(Path(out.strip().splitlines()[-1]))
    cut, whole = paths
    assert (cut/"model.safetensors").read_bytes() == (whole/"model.safetensors").read_bytes()
    assert (cut.parent/"metrics.jsonl").read_bytes() == (whole.parent/"metrics.jsonl").read_bytes()
    assert not (whole.parent/"state.safetensors").exists()
