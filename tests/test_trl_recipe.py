"""The recipe on TRL and beyond: accumulation, unknown rewards, kills, two processes, and the names that unsloth, vLLM, verl and DeepSpeed give to things.

What is not installed is skipped. unsloth, vLLM and verl are read, not imported, so that no card is needed: `PYTHONPATH=FOLDER_OF_UNPACKED_WHEELS pytest tests/test_trl_recipe.py`.
"""
import ast, json, os, signal, subprocess, sys, time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
import pytest
pytest.importorskip("trl", reason="TRL is not installed; it comes with the extra [train]: pip install 'm2kit[train]'")
import torch, yaml
from m2kit.core.errors import UserError
from m2kit.core.run import read_jsonl, root
from m2kit.core.step import Step
from m2kit.tiny.model import make_model, make_tokenizer
from m2kit.train.configs import accelerate_config, deepspeed_config, verl_overrides
from m2kit.train.grpo import GRPOConfig, train
from m2kit.train.trl import trl_config, trl_train, trl_trainer, unsloth_calls, vllm_fields

TOY = GRPOConfig(prompts=4, group=4, steps=2, max_new=12, l_max=12, lr=3e-3, save_every=2)
ASKS = [[dict(role="user", content=t)] for t in ("I have a cough.", "I have a fever and a cough.")]
TASKS = [dict(prompt=a) for a in ASKS]*4

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def tok(): return make_tokenizer(["I have a cough and a fever.", "Order a chest X-ray.", "Likely gout."]*20, terms=["gout"], vocab=280)

def fresh(tok): return make_model(tok, hidden=32, layers=2, heads=2, kv_heads=1, ff=64, seed=1)

def vowels(prompts, completions, completion_ids, **columns): return [c[-1]["content"].count("e")/10 - len(i)/12 for c, i in zip(completions, completion_ids)]

@pytest.mark.parametrize("updates", [1, 2])
def test_accumulation_changes_nothing(tok, tmp_path, updates):
    "The same answers and, to rounding, the same gradients, whether a process takes its share at once or in four."
    cfg = replace(TOY, updates=updates, steps=1)
    def run(n): return trl_train(fresh(tok), tok, TASKS, [vowels], cfg, Step(f"a{n}", {}, base=tmp_path), gradient_accumulation_steps=n)[0]
    whole, parts = run(1), run(4)
    for k in ("score", "length", "entropy", "grad_norm", "loss"): assert parts[k] == pytest.approx(whole[k], rel=2e-3, abs=2e-6), k

def test_an_unknown_reward_leaves_the_sample_out_as_our_loop_does(tok, tmp_path):
    "TRL alone would add up the rewards that are known."
    def often(prompts, completions, completion_ids, **columns): return [None if i % 3 == 0 else 1. for i in range(len(completion_ids))]
    rewards = [vowels, often]
    t = trl_trainer(fresh(tok), tok, TASKS, rewards, TOY, Step("u", {}, base=tmp_path))
    t.model.train()
    rows = [r for r in TASKS[:4] for _ in range(4)]
    got = t._generate_and_score_completions(rows)
    together = t.reward_funcs[0].__closure__
    answers = [i[m.bool()].tolist() for i, m in zip(got["completion_ids"], got["completion_mask"])]
    texts = tok.batch_decode(answers, skip_special_tokens=True)
    known = torch.tensor([float("nan") if i % 3 == 0 else v + 1 for i, v in enumerate(vowels(None, [[dict(content=x)] for x in texts], answers))]).view(4, 4)
    expected = (known - known.nanmean(1, keepdim=True)).nan_to_num(0.)
    assert torch.allclose(got["advantages"].view(4, 4), expected, atol=1e-5) and together
    assert (got["advantages"][::3] == 0).all() and got["advantages"].abs().max() > .01

def test_a_file_named_trl_is_not_taken_for_the_library(tmp_path):
    (tmp_path/"trl.py").write_text("x = 1\n")
    code = "from m2kit.core.errors import UserError\nfrom m2kit.train.trl import library\ntry: library()\nexcept UserError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root())))
    assert "not the library" in out.stdout and "Traceback" not in out.stderr

KILLED = """
import sys, torch, time
torch.set_num_threads(1)
from dataclasses import asdict, replace
from test_trl_recipe import TASKS, TOY, fresh, vowels
from m2kit.core.step import Step
from m2kit.tiny.model import make_tokenizer
from m2kit.train.trl import trl_train
tok = make_tokenizer(["I have a cough and a fever.", "Order a chest X-ray.", "Likely gout."]*20, terms=["gout"], vocab=280)
trl_train(fresh(tok), tok, TASKS, [vowels], replace(TOY, steps=8), Step(sys.argv[1], {}, base=sys.argv[2]), tell=lambda row: time.sleep(float(sys.argv[3])))
"""

@pytest.mark.long
def test_killed_outright_it_goes_on(tmp_path):
    "SIGKILL at some step, then again: the rows are those of a run that was never touched."
    def start(name, pause): return subprocess.Popen([sys.executable, "-c", KILLED, name, str(tmp_path), str(pause)], cwd=Path(__file__).parent, env=os.environ | dict(PYTHONPATH=str(root())))
    metrics = Step("cut", {}, base=tmp_path).metrics
    for least in (3, 5):
        p = start("cut", .3)
        while len(read_jsonl(metrics)) < least:
            assert p.poll() is None
            time.sleep(.05)
        p.send_signal(signal.SIGKILL); p.wait()
    assert start("cut", 0).wait() == 0 == start("whole", 0).wait()
    whole = Step("whole", {}, base=tmp_path).rows()
    assert Step("cut", {}, base=tmp_path).rows() == whole and len(whole) == 8

@pytest.mark.long
@pytest.mark.parametrize("kind", ["cpu", "fsdp2"])
def test_two_processes(tmp_path, kind):
    "The recipe's script under `accelerate launch`. On a CPU accelerate leaves FSDP aside and both kinds run as plain data parallelism: of the FSDP file this tests the launch only."
    from m2kit.tiny.doctor import tiny_doctor
    (tmp_path/"c.yaml").write_text(yaml.safe_dump(accelerate_config(kind, 2, family="qwen3") | dict(mixed_precision="no")))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "c.yaml", str(root()/"data/recipes/train_trl.py"), "--scale", "tiny", "--model", str(tiny_doctor()), "--out", "out",
               *"--prompts 4 --group 2 --steps 2 --max_new 96 --coef .6".split()]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root()), OMP_NUM_THREADS="1"))
    assert out.returncode == 0, out.stderr[-2000:]
    rows = [json.loads(l) for l in out.stdout.splitlines() if l.startswith("{")]
    assert [r["step"] for r in rows] == [0, 1] and all(0 < r["score"] < 1 for r in rows)     # one process writes
    run, = (tmp_path/"out").glob("grpo-*")
    assert read_jsonl(run/"metrics.jsonl") == rows and (run/"trl"/"checkpoint-2"/"rng_state_1.pth").exists()     # and there were two

def test_fsdp_plugin_takes_the_config(tok, tmp_path, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env
    (tmp_path/"c.yaml").write_text(yaml.safe_dump(accelerate_config("fsdp2", 16, family="qwen3")))
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(tmp_path/"c.yaml"), "x.py"]))
    for k, v in prepare_multi_gpu_env(args).items():
        if k.startswith(("FSDP", "ACCELERATE")): monkeypatch.setenv(k, v)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True and type(plugin.cpu_offload).__name__ == "OffloadPolicy"    # the one that offloads is CPUOffloadPolicy
    assert "SHARDED" in str(plugin.state_dict_type)
    model = fresh(tok)
    plugin.set_auto_wrap_policy(model)
    wrapped = [n for n, m in model.named_modules() if plugin.auto_wrap_policy(m, False, 0)]
    assert wrapped == ["model.layers.0", "model.layers.1"]                    # the family's layer has that name

def test_the_trainer_fills_in_deepspeeds_autos(tok, tmp_path):
    "transformers' own filling in, without DeepSpeed: no value stays open, and none contradicts the trainer's."
    from accelerate.utils.deepspeed import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
    class Filled(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
        def __init__(self, config): HfDeepSpeedConfig.__init__(self, config); self._dtype, self.mismatches = None, []
    filled, args = Filled(deepspeed_config()), trl_config(TOY, tmp_path)
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, fresh(tok), num_training_steps=2)
    assert not filled.mismatches and '"auto"' not in json.dumps(filled.config)
    assert filled.config["train_micro_batch_size_per_gpu"] == 16 and filled.config["gradient_clipping"] == TOY.clip_grad and filled.is_zero3()

def source(package, path):
    spec = find_spec(package)
    if spec is None: pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])/path

def arguments(tree, cls, name):
    "Names of a method's arguments, read from the source."
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls).body
    a = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name).args
    return {x.arg for x in (*a.args, *a.kwonlyargs)}

def test_unsloth_knows_the_arguments():
    calls = unsloth_calls("Qwen/Qwen3-8B", 4096)
    loader, llama = (ast.parse(source("unsloth", f"models/{f}.py").read_text()) for f in ("loader", "llama"))
    assert set(calls["from_pretrained"]) <= arguments(loader, "FastLanguageModel", "from_pretrained")
    assert set(calls["get_peft_model"]) <= arguments(llama, "FastLlamaModel", "get_peft_model")

def test_verl_knows_the_keys():
    config = yaml.safe_load(source("verl", "trainer/config/_generated_ppo_trainer.yaml").read_text())
    for key in verl_overrides("model"):
        at = config
        for part in key.split("."):
            assert part in at, key
            at = at[part]

def test_verls_loss_is_equation_2():
    "verl's own `agg_loss` and clipping, cut out of its source, on random numbers."
    from m2kit.train.grpo import policy_loss
    text = source("verl", "trainer/ppo/core_algos.py").read_text()
    named = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
    agg = named["agg_loss"]; agg.decorator_list = []
    space = dict(torch=torch, Optional=__import__("typing").Optional, verl_F=type("F", (), dict(masked_sum=staticmethod(lambda x, m: (x*m).sum()), masked_mean=staticmethod(lambda x, m: (x*m).sum()/m.sum()))))
    exec(compile(ast.Module([agg], []), "agg", "exec"), space)
    o, g = verl_overrides("m", max_new=20), torch.Generator().manual_seed(0)
    key = lambda k: o[f"actor_rollout_ref.actor.{k}"]
    logp, old = torch.randn(6, 20, generator=g)*.7, torch.zeros(6, 20)
    a, mask = torch.linspace(-1, 1, 6), (torch.arange(20) < torch.tensor([20, 3, 7, 20, 1, 12])[:, None]).float()
    ratio, A = (logp - old).exp(), a[:, None]
    loss = torch.maximum(-A*ratio, -A*ratio.clamp(1 - key("clip_ratio_low"), 1 + key("clip_ratio_high")))
    loss = torch.where(A < 0, torch.minimum(-A*key("clip_ratio_c"), loss), loss)      # the dual clip
    theirs = space["agg_loss"](loss_mat=loss, loss_mask=mask, loss_agg_mode=key("loss_agg_mode"), loss_scale_factor=key("loss_scale_factor"))
    assert theirs.item() == pytest.approx(policy_loss(logp, old, a, mask, 20)[0].item(), abs=1e-6)

def test_vllm_is_missed_in_words(tok, tmp_path):
    if find_spec("vllm"): pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match="needs vLLM"): trl_trainer(fresh(tok), tok, TASKS, [vowels], TOY, Step("v", {}, base=tmp_path), **vllm_fields())

def test_both_loops_take_the_same_call(tok, tmp_path):
    rows = [f(fresh(tok), tok, TASKS, [vowels], TOY, Step(f.__name__, asdict(TOY), base=tmp_path)) for f in (train, trl_train)]
    ours, theirs = (list(r[0]) for r in rows)
    assert [k for k in ours if k not in ("p_clipped", "ratio")] == theirs             # which TRL does not tell
