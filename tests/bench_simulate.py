"""`m2kit simulate`: turns a CPU second and memory at 64, 256, 1,024 and 4,096 dialogues, models loaded, medians of three.

`pytest -s -m slow tests/bench_simulate.py` measures 64 and 256 (minutes); `python tests/bench_simulate.py 64 256 1024 4096` whatever is named. Each run is a process of its own,
which opens the models, simulates one small part that is not counted, and then runs.
"""
import json, statistics, subprocess, sys, tempfile
import pytest

CODE = """
import json, resource, sys, time
from m2kit.service.simulate import SimulationPlan, run_simulation
import m2kit.service.simulate as s
n, seed, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
plan, silent = SimulationPlan(seed=seed), lambda line: None
cast = s.Cast(plan, out)
s.talks_of(cast, range(10**6, 10**6 + 4))
s.Cast = lambda *words: cast        # models loaded
began = time.process_time()
r = run_simulation(plan, n, out, tell=silent)
print(json.dumps(dict(turns=r["turns"], cpu=time.process_time() - began, mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)))
"""

def once(n, seed):
    "Turns a CPU second and the peak of memory (MB) of one run."
    with tempfile.TemporaryDirectory() as out:
        r = subprocess.run([sys.executable, "-c", CODE, str(n), str(seed), out + "/run"], capture_output=True, text=True)
        assert not r.returncode, r.stderr
    row = json.loads(r.stdout.splitlines()[-1])
    return row["turns"]/row["cpu"], row["mb"]

def measure(sizes, times=3):
    "Medians by size; the sizes take turns, so that a busy machine disturbs all alike."
    runs = {n: [] for n in sizes}
    for seed in range(times):
        for n in sizes: runs[n].append(once(n, seed)); print(n, *(f"{x:.1f}" for x in runs[n][-1]), flush=True)
    print("\n| dialogues | turns a CPU second | peak memory, MB |\n| --- | --- | --- |")
    out = {n: tuple(map(statistics.median, zip(*r))) for n, r in runs.items()}
    for n, (rate, mb) in out.items(): print(f"| {n:,} | {rate:.1f} | {mb:.0f} |", flush=True)
    return out

@pytest.mark.slow
def test_more_dialogues_cost_no_more_a_turn():
    "The same CPU time a turn and the same memory, however many there are."
    small, large = measure((64, 256)).values()
    assert large[0] > .8*small[0] and large[1] < 1.15*small[1] and large[1] < 1000, (small, large)

if __name__ == "__main__": measure([int(x) for x in sys.argv[1:]] or [64, 256, 1024, 4096])
