"Fine-tuning that is killed with -9 goes on to the same weights, and dialogues with the simulator to the same lines."
import os, signal, subprocess, sys
import pytest
from m2kit.lm.local import save_checkpoint
from m2kit.tiny.model import make_model
from m2kit.tiny.base import ladder_tokenizer
from m2kit.train.curate import dialogues, sft_stage

SMALL = dict(pool=200, prompts=40, talks=24, simulated=12, questions=8, steps=14, batch=4, save_every=4)

def killed(code, at):
    "Run the code in another process and kill it when it prints `at`."
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    for line in p.stdout:
        if line.strip() == at: p.send_signal(signal.SIGKILL); break
    return p.wait()

@pytest.mark.slow
def test_fine_tuning_killed_with_9_goes_on(tmp_path):
    tok = ladder_tokenizer()
    start = save_checkpoint(make_model(tok, hidden=48, layers=2, heads=2, kv_heads=1, ff=96, context=768).eval(), tok, tmp_path/"start")
    code = f"""
import m2kit.train.curate as here
save = here.save_state
def save_and_say(path, model, optimizer, step): save(path, model, optimizer, step); print(step, flush=True)
here.save_state = save_and_say
here.sft_stage({str(start)!r}, 3, {str(tmp_path/'cut')!r}, **{SMALL!r})"""
    assert killed(code, "8") == -signal.SIGKILL
    (folder,) = (tmp_path/"cut").glob("sft-*")
    assert (folder/"state.safetensors").exists() and not (folder/"done.json").exists()
    again, whole = (sft_stage(start, 3, tmp_path/b, **SMALL) for b in ("cut", "whole"))
    assert (again/"model.safetensors").read_bytes() == (whole/"model.safetensors").read_bytes()
    assert (again.parent/"metrics.jsonl").read_text() == (whole.parent/"metrics.jsonl").read_text()
    other = sft_stage(start, 4, tmp_path/"whole", **SMALL)
    assert (other/"model.safetensors").read_bytes() != (whole/"model.safetensors").read_bytes()

@pytest.mark.slow
def test_dialogues_killed_with_9_go_on(tmp_path):
    code = f"from m2kit.train.curate import dialogues\ndialogues(24, 1, {str(tmp_path/'cut')!r}, lambda done, n: print(done, flush=True), batch=8)"
    assert killed(code, "16") == -signal.SIGKILL
    assert dialogues(24, 1, tmp_path/"cut", batch=8) == dialogues(24, 1, tmp_path/"whole", batch=8)
