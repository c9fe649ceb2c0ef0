"""Speculation against exact distributions, other implementations and wrong rules; drafts on disk; serve plans for odd configs; engines whose flags have changed."""
import json, random, shlex, subprocess, sys
import numpy as np, pytest, torch
from m2kit.core.errors import UserError
from m2kit.lm.memory import CARDS, LAYOUTS, QWEN25_32B, decoder, parameters
from m2kit.infer.serve import ENGINES, ServePlan, describe_plan, draft_tensors, engine_flags, read_serve, serve_doctor, serve_plan
from m2kit.infer.speculate import (Draft, Shape, Speculator, accept, acceptance, check_pair, continuations, decode, draft_config, fits_target, guesses, load_draft,
                                   pick, save_draft, walk)
from m2kit.infer.speedup import RATES, project

torch.set_num_threads(1)
SMALL = dict(vocab_size=6, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.6, max_position_embeddings=96)


def make(family="Qwen3", seed=0, **changes):
    import transformers
    kw = SMALL | changes | (dict(head_dim=8) if family in ("Qwen3", "Llama") else {})
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**kw)).eval()


# The rule

def exact_outcome(p, q, count):
    "The distribution of `accept` over `count` guesses without replacement, by enumeration instead of chance."
    if not count or q.sum() < 1e-12: return p
    out, q = np.zeros_like(p), q/q.sum()
    rest = np.maximum(p - q, 0)
    rest = rest/rest.sum() if rest.sum() > 0 else p
    for t in np.flatnonzero(q):
        taken = min(1, p[t]/q[t])
        out[t] += q[t]*taken
        left = np.where(np.arange(len(q)) == t, 0, q)
        out += q[t]*(1 - taken)*exact_outcome(rest, left, count - 1)
    return out


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_rule_gives_the_target_whatever_the_draft(count, seed):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet([.3]*4), rng.dirichlet([.3]*4)
    assert exact_outcome(p, q, count) == pytest.approx(p, abs=1e-12)
    draw = random.Random(seed).random
    seen = np.bincount([accept(p, *guesses(q, count, draw), draw)[0] for _ in range(6000)], minlength=4)/6000
    assert abs(seen - p).sum() < .06          # the code does what the enumeration does


def test_no_token_of_probability_zero_is_ever_said():
    draw = random.Random(0).random
    p, q = np.array([0, .5, 0, .5]), np.array([.9, .1, 0, 0])
    assert {accept(p, *guesses(q, 3, draw), draw)[0] for _ in range(500)} == {1, 3}
    assert pick(np.array([0, 1., 0]), 0.) == 1 and pick(np.array([0, 1., 0]), .999999999999) == 1


def test_a_chain_agrees_with_transformers():
    "Its own implementation of Leviathan's algorithm 1, which is private: skipped when it has moved."
    utils = pytest.importorskip("transformers.generation.utils")
    theirs = getattr(utils, "_speculative_sampling", None) or pytest.skip("no _speculative_sampling in this transformers")
    rng = np.random.default_rng(3)
    P, Q, K, n = rng.dirichlet([.5]*4, 3), rng.dirichlet([.5]*4, 2), 2, 3000
    ours, other, draw = np.zeros((K + 1, 4)), np.zeros((K + 1, 4)), random.Random(0).random
    torch.manual_seed(0)
    from m2kit.infer.speculate import Tree
    for _ in range(n):
        guess = [pick(q, draw()) for q in Q]
        tree = Tree([0])
        tree.add(tree.add(0, guess[0], Q[0], 0.), guess[1], Q[1], 0.)
        path, own, _ = walk(tree, P, draw)
        ours[len(path), own] += 1/n
        valid, matches = theirs(torch.tensor([[0, *guess]]), torch.tensor(Q).log()[None], K, torch.tensor(P).log()[None], False)
        other[int(matches), int(valid[0, -1])] += 1/n
    assert abs(ours - other).sum() < .1


WRONG = {
    "target's own after a refusal": lambda p, tokens, qs, draw: next(((t, True) for t, q in zip(tokens, qs) if draw()*q[t] < p[t]), (pick(p, draw()), False)),
    "takes what is likely enough": lambda p, tokens, qs, draw: next(((t, True) for t in tokens if p[t] > .1), (pick(p, draw()), False)),
    "forgets the draft's probability": lambda p, tokens, qs, draw: accept(p, tokens, [np.where(q > 0, 1/len(q), 0) for q in qs], draw),
}


def draws(target, draft, shape, n, rule=accept, temperature=1.):
    return [tuple(Speculator(target, draft, shape, temperature, seed=i, rule=rule)([1, 2], 4).ids) for i in range(n)]


@pytest.fixture(scope="module")
def pair():
    target = make()
    return target, Draft(draft_config(target.config)).eval(), continuations(target, [1, 2], 4)


@pytest.mark.parametrize("shape, temperature", [(Shape(3), 1.), (Shape(3, 2, 2), 1.), (Shape(2, 4, 1), .7)])
def test_sampling_is_the_targets(pair, shape, temperature):
    target, draft, exact = pair
    if temperature != 1: exact = continuations(target, [1, 2], 4, temperature)
    assert fits_target(draws(target, draft, shape, 250, temperature=temperature), exact) > .001


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(pair, name):
    target, draft, exact = pair
    assert fits_target(draws(target, draft, Shape(3), 250, WRONG[name]), exact) < 1e-4


def test_the_test_passes_what_is_drawn_directly(pair):
    target, _, exact = pair
    keys = list(exact)
    rng = random.Random(1)
    chances = [fits_target(rng.choices(keys, [exact[k] for k in keys], k=400), exact) for _ in range(200)]
    assert .3 < np.mean(chances) < .7 and np.mean(np.array(chances) < .05) < .12


# Decoding

@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_greedy_is_token_for_token(family):
    target = make(family, seed=2, vocab_size=40, **(dict(sliding_window=None) if family == "Mistral" else {}))
    draft = Draft(draft_config(target.config), seed=1).eval()
    for prompt in ([1], [5, 4, 3, 2], list(range(20))):
        alone = target.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
        for shape in (Shape(0), Shape(1), Shape(5), Shape(4, 2, 2), Shape(3, 4, 3)):
            assert Speculator(target, draft, shape, 0)(prompt, 30).ids == alone


@pytest.mark.parametrize("shape", [Shape(4), Shape(4, 3, 2)])
def test_a_draft_that_is_the_target_is_never_refused(shape, monkeypatch):
    "Guesses taken from the target itself are all accepted, and the answer stays the same."
    target = make(seed=5, vocab_size=30)
    draft = Draft(draft_config(target.config)).eval()
    alone = decode(target, [1, 2], 41, 0).ids

    def oracle(self, depth):
        from m2kit.infer.speculate import Tree, keep_columns, one_hot
        n, known = len(self.ids) - 1, self.slots.get_seq_length()
        self.slot(self.fresh, self.ids[known + 1:], list(range(known, n)), torch.ones(n - known, n, dtype=torch.bool).tril(known))
        tree, at = Tree(self.ids[-1:]), 0
        for t in alone[len(self.ids) - 2:][:depth]: at = tree.add(at, t, one_hot(t, 30), 0.)
        keep_columns(self.slots, n)
        return tree
    monkeypatch.setattr(Speculator, "grow", oracle)
    got = Speculator(target, draft, shape, 0)([1, 2], 41)
    assert got.ids == alone and all(r.accepted == r.tested for r in got.rounds) and len(got.rounds) == 8   # 1 + 8 rounds of 5


def test_caches_hold_exactly_the_text():
    "After any rounds, what the draft would guess next is what a fresh start on the same text would guess, and the target's cache is that of the text."
    target = make(seed=3, vocab_size=40)
    draft = Draft(draft_config(target.config), seed=4).eval()
    with torch.no_grad():
        s = Speculator(target, draft, Shape(4, 3, 2), 1., seed=2)
        with s.taps:
            s.start([1, 2, 3])
            for _ in range(6): s.round(20)
            kept = [l.keys.clone() for l in s.cache.layers], len(s.ids)
            s.temperature = 0
            tree = s.grow(4)
        fresh = Speculator(target, draft, Shape(4, 3, 2), 0)
        with fresh.taps:
            fresh.start(s.ids[:-1])
            fresh.ids[-1] = s.ids[-1]
            again = fresh.grow(4)
    assert tree.tokens == again.tokens and tree.parent == again.parent
    for a, l in zip(kept[0], fresh.cache.layers):
        assert a.shape == l.keys.shape and a.shape[2] == kept[1] - 1
        assert torch.allclose(a, l.keys, atol=1e-5)


def test_nothing_comes_after_the_end_of_the_turn(pair):
    target, draft, _ = pair
    for seed in range(20):
        got = Speculator(target, draft, Shape(4, 2, 2), 1., seed, end=3)([1, 2], 40)
        assert 3 not in got.ids[:-1] and got.ended == (got.ids[-1] == 3)
        assert sum(r.tokens for r in got.rounds) == len(got.ids) - 1
        assert all(r.accepted <= r.tested <= 4 and r.tested - r.accepted in (0, 1) for r in got.rounds)


def test_intervals_hold_dialogues_together():
    from m2kit.infer.speculate import Decoded, Round
    good, bad = Decoded([], [Round(4, 4, 5, 4)]*10, True), Decoded([], [Round(0, 1, 1, 4)]*10, True)
    value, low, high = acceptance([good, bad]*3, 4)["tokens a round"]
    assert value == 3 and low <= 5/3 + .1 and high >= 4.3          # six dialogues of two kinds tell little, however many rounds they have


# The doctor

@pytest.fixture(scope="module")
def doctor():
    from m2kit.tiny.draft import tiny_draft
    from m2kit.lm.local import load_policy
    from m2kit.tiny.doctor import tiny_doctor
    target, tok = load_policy(tiny_doctor())
    return target, tok, load_draft(tiny_draft(), target)


def test_the_doctor_says_the_same_with_its_draft(doctor):
    from m2kit.tiny.draft import held_out
    target, tok, draft = doctor
    prompts = held_out(tok, 10, seed=13_000_000)
    runs = {s: [Speculator(target, draft, s, 0, end=tok.eos_token_id)(p, 224) for p in prompts] for s in (Shape(6), Shape(6, 2, 2))}
    for i, p in enumerate(prompts):
        alone = target.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p), dtype=torch.long), max_new_tokens=224, do_sample=False)[0, len(p):].tolist()
        for r in runs.values(): assert r[i].ids == alone
    chain, tree = (acceptance(r, 6)["tokens a round"][0] for r in runs.values())
    assert chain > 2 and tree > chain - .1


def test_an_untrained_draft_is_no_worse_than_slow(doctor):
    from m2kit.tiny.draft import held_out
    target, tok, _ = doctor
    p = held_out(tok, 1, seed=14_000_000)[0]
    assert Speculator(target, Draft(draft_config(target.config), seed=3).eval(), Shape(4), 0, end=tok.eos_token_id)(p, 224).ids == decode(target, p, 224, 0, end=tok.eos_token_id).ids


# Drafts on disk

def test_a_draft_in_the_engines_layout(tmp_path):
    "Names and shapes as vLLM 0.32 and SGLang 0.5.23 load them: fc, midlayer.*, norm, lm_head; config with the architecture and the layers read."
    from safetensors.torch import load_file
    target = make(vocab_size=40, num_hidden_layers=12)
    draft = Draft(draft_config(target.config)).eval()
    save_draft(draft, tmp_path, target)
    state = load_file(tmp_path/"model.safetensors")
    assert {k: tuple(v.shape) for k, v in state.items()} == draft_tensors(decoder(target.config), 40)
    assert torch.equal(state["lm_head.weight"], target.lm_head.weight)
    c = json.loads((tmp_path/"config.json").read_text())
    assert c["architectures"] == ["LlamaForCausalLMEagle3"] and c["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 6, 9] and c["draft_vocab_size"] == 40 and c["num_hidden_layers"] == 1
    back = load_draft(tmp_path, target)
    assert Speculator(target, back, Shape(3), 0)([1], 20).ids == decode(target, [1], 20, 0).ids


@pytest.mark.parametrize("spoil, says", [
    (lambda d: (d/"model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda d: (d/"config.json").write_text('{"model_type": "llama"}'), "eagle_aux_hidden_state_layer_ids"),
    (lambda d: (d/"config.json").write_text((d/"config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')), "."),
])
def test_a_spoiled_draft_is_refused(tmp_path, spoil, says):
    target = make()
    save_draft(Draft(draft_config(target.config)), tmp_path, target)
    spoil(tmp_path)
    with pytest.raises((UserError, RuntimeError), match=says): load_draft(tmp_path, target)


@pytest.mark.parametrize("changes, says", [(dict(vocab_size=7), "vocab_size is 6 and the target's 7"), (dict(hidden_size=64), "hidden_size is 32"), (dict(num_hidden_layers=1), "reads layer 2 of a target with 1")])
def test_a_draft_belongs_to_its_target(changes, says):
    with pytest.raises(UserError, match=says): check_pair(make(**changes), Draft(draft_config(make().config)))


def test_a_sliding_window_is_refused():
    target = make("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0)
    with pytest.raises(UserError, match="sliding window"): Speculator(target, Draft(draft_config(target.config)))


# Serve

LLAMA8 = dict(model_type="llama", vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, max_position_embeddings=131072)
TIED = dict(model_type="qwen3", vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True, max_position_embeddings=40960)


def write(path, config):
    path.mkdir(exist_ok=True)
    (path/"config.json").write_text(json.dumps(config))
    return path


def test_a_checkpoint_folder_is_a_question(tmp_path):
    d = write(tmp_path/"llama", LLAMA8)
    for asked in (d, d/"config.json", str(d)):
        plan = serve_plan(asked, card="RTX 4090")
        assert plan.fits and 35_000 < plan.tokens < 55_000 and str(d) in plan.commands["vllm"]
    small = serve_plan(write(tmp_path/"small", TIED), card="RTX 4090")
    assert small.each == 40960 < small.tokens                                     # trained for less than memory holds
    assert sum(small.budget.weights.values()) == 2*parameters(TIED)


@pytest.mark.parametrize("ending, text", [("toml", 'model = "Qwen2.5-32B"\nweights = "W4A16"\nkv = "FP8"\ncontext = 16000\n'), ("yaml", "model: Qwen2.5-32B\nweights: W4A16\nkv: fp8\ncontext: 16000\n"),
                                          ("json", '{"model": "Qwen2.5-32B", "weights": "W4A16", "kv": "KV8", "context": 16000}')])
def test_three_ways_to_write_a_question(tmp_path, ending, text, capsys):
    path = tmp_path/f"serve.{ending}"
    path.write_text(text)
    assert serve_doctor(path, "rtx4090") == 0 and serve_doctor(path, "L4") == 1
    said = capsys.readouterr().out
    assert "--kv-cache-dtype fp8_e4m3" in said and "--max-model-len 16000" in said and "DOES NOT FIT" in said and "it would fit with" in said


QUANTIZED = {
    "gptq": (dict(quant_method="gptq", bits=4, group_size=128, sym=True), "W4A16-sym"),
    "awq": (dict(quant_method="awq", bits=4, group_size=128), "W4A16"),
    "auto-round": (dict(quant_method="auto-round", bits=4, group_size=128, sym=True), "W4A16-sym"),
    "compressed-tensors": (dict(quant_method="compressed-tensors", config_groups=dict(g=dict(weights=dict(num_bits=8, group_size=None, symmetric=True)))), None),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_checkpoint_is_counted_as_it_says(tmp_path, name):
    q, layout = QUANTIZED[name]
    plan = serve_plan(write(tmp_path/"m", LLAMA8 | dict(quantization_config=q)), card="A10")
    if layout:
        from m2kit.lm.memory import weight_bytes
        assert plan.budget.weights == weight_bytes(LLAMA8, LAYOUTS[layout])
    with pytest.raises(UserError, match="already quantized"): serve_plan(write(tmp_path/"m", LLAMA8 | dict(quantization_config=q)), weights="BF16")


@pytest.mark.parametrize("config, says", [
    (dict(LLAMA8, model_type="mixtral", num_local_experts=8), "mixture of experts"),
    (dict(LLAMA8, model_type="qwen3_moe", num_experts=128), "mixture of experts"),
    (dict(model_type="qwen2_5_vl", text_config=LLAMA8), "multimodal"),
    (dict(LLAMA8, model_type="gpt2"), "no model family"),
    ({k: v for k, v in LLAMA8.items() if k != "num_key_value_heads"}, "num_key_value_heads is missing"),
    (dict(LLAMA8, quantization_config=dict(quant_method="hqq")), "quantization method"),
    (dict(LLAMA8, quantization_config=dict(quant_method="gptq")), "bits is None"),
    (dict(LLAMA8, quantization_config=dict(quant_method="compressed-tensors", config_groups={})), "0 config_groups"),
    ([1, 2], "holds a list"), ({}, "model is missing")])
def test_odd_configs_are_refused_by_name(tmp_path, config, says):
    with pytest.raises(UserError, match=says): serve_plan(write(tmp_path/"m", config), card="RTX 4090")


@pytest.mark.parametrize("fields, says", [
    (dict(card="RTX 9999"), "no card named"), (dict(card="a100"), "A100 40GB or A100 80GB"), (dict(kv="int3"), "cache dtype"), (dict(weights="W4A61"), "weight layout"), (dict(context=0), "context is 0"),
    (dict(context=True), "context is True"), (dict(requests=2.5), "requests is 2.5"), (dict(utilization=9), "utilization is 9"), (dict(depth="4"), "depth is '4'"), (dict(darft="x"), "did you mean draft"), (dict(model=7), "model is missing")])
def test_bad_fields_are_named(fields, says):
    with pytest.raises(UserError, match=says): serve_plan(dict(model="Qwen2.5-32B") | fields)


def test_broken_files_are_named(tmp_path):
    for name, text in (("a.toml", "model = "), ("a.yaml", "a: [1"), ("a.json", "{"), ("a.ini", "x")):
        (tmp_path/name).write_text(text)
        with pytest.raises(UserError, match="not (TOML|YAML|JSON)|kind of config file"): read_serve(tmp_path/name)


def test_a_draft_takes_room_and_gets_its_flags(tmp_path):
    with_draft = serve_plan(dict(model="Qwen2.5-32B", weights="W4A16", kv="FP8", draft="my draft", depth=5))
    without = serve_plan(dict(model="Qwen2.5-32B", weights="W4A16", kv="FP8"))
    assert 0 < with_draft.tokens < without.tokens
    words = shlex.split(with_draft.commands["vllm"])
    assert json.loads(words[words.index("--speculative-config") + 1]) == dict(method="eagle3", model="my draft", num_speculative_tokens=5)
    words = shlex.split(with_draft.commands["sglang"])
    assert words[words.index("--speculative-num-draft-tokens") + 1] == "6" and words[words.index("--speculative-draft-model-path") + 1] == "my draft"
    other = make(vocab_size=40)
    save_draft(Draft(draft_config(other.config)), tmp_path/"d", other)
    with pytest.raises(UserError, match="belongs to another model"): serve_plan(dict(model="Qwen2.5-32B", draft=str(tmp_path/"d")))


def test_many_requests_share_the_cache():
    one, four = (serve_plan(dict(model="Qwen2.5-32B", weights="W4A16", kv="FP8", requests=n)) for n in (1, 4))
    assert one.tokens == four.tokens and four.each == four.tokens//4//16*16 and "--max-num-seqs 4" in four.commands["vllm"]
    assert "4 requests of" in describe_plan(four)


def test_an_installed_engine_is_asked_itself(tmp_path, monkeypatch):
    "A vllm that renamed a flag, an sglang that fills a parser, and one that does not import."
    (tmp_path/"vllm"/"engine").mkdir(parents=True); (tmp_path/"sglang"/"srt").mkdir(parents=True)
    (tmp_path/"vllm"/"__init__.py").write_text(""); (tmp_path/"vllm"/"engine"/"__init__.py").write_text("")
    (tmp_path/"vllm"/"engine"/"arg_utils.py").write_text("from dataclasses import dataclass\n@dataclass\nclass EngineArgs:\n    model: str = ''\n    max_len: int = 0\n    gpu_memory_utilization: float = 0\n    max_num_seqs: int = 0\n")
    (tmp_path/"sglang"/"__init__.py").write_text(""); (tmp_path/"sglang"/"srt"/"__init__.py").write_text("")
    args = tmp_path/"sglang"/"srt"/"server_args.py"
    args.write_text("class ServerArgs:\n    @staticmethod\n    def add_cli_args(p):\n        for f in ('model-path', 'context-length', 'mem-fraction-static', 'max-running-requests'): p.add_argument('--' + f)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        plan = serve_plan(dict(model="Qwen2.5-32B", weights="W4A16"))
        notes = "\n".join(plan.notes)
        assert "does NOT know --max-model-len" in notes and "installed vllm" in notes and "installed sglang" in notes and notes.count("NOT know") == 1
        for m in [m for m in sys.modules if m.startswith("sglang")]: del sys.modules[m]
        args.write_text("raise OSError('no GPU')\n")
        assert "does not load here (OSError)" in engine_flags("sglang")[1] and engine_flags("sglang")[0] == set(ENGINES["sglang"]["flags"])
    finally:
        for m in [m for m in sys.modules if m.split(".")[0] in ("vllm", "sglang")]: del sys.modules[m]


def test_every_card_has_rates():
    assert set(RATES) == set(CARDS)
    assert all(project(QWEN25_32B, 3.28, 4, c)["speedup"] > 1 for c in CARDS)


def test_no_torch_at_import():
    code = "import sys, m2kit.infer.serve as s, m2kit.infer.speedup; s.serve_plan(dict(model='Qwen2.5-32B', weights='W4A16')); print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
