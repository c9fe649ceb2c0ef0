"""The loop on models that are not the tiny doctor: other families, other caches, other chat templates, half precision, a card.

Each model is tiny and knows nothing. What it is held to is transformers' own full forward, one answer at a time, without padding and without a cache.
"""
import copy, random
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from transformers import (
    AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
from m2kit.clinic.persona import draw_script
from m2kit.core.errors import UserError
from m2kit.core.step import Step
from m2kit.lm.local import end_ids, turn_tail
from m2kit.tiny.model import make_tokenizer
from m2kit.train import grpo
from m2kit.train.consultant import reference_patient
from m2kit.train.grpo import GRPOConfig, answer_logps, between, encode_prompts, rollout, sample_tokens, train, update
from m2kit.train.multiturn import play, session_rollout

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
             max_position_embeddings=512, initializer_range=.2, tie_word_embeddings=True, bos_token_id=None)
SLIDING = dict(layer_types=["sliding_attention"]*3 + ["full_attention"], sliding_window=8)
FAMILIES = dict(
    llama=(LlamaConfig, {}),
    qwen2=(Qwen2Config, {}),
    mistral=(MistralConfig, dict(sliding_window=8)),
    gemma2=(Gemma2Config, SLIDING | dict(head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.)),
    gemma3=(Gemma3TextConfig, SLIDING | dict(head_dim=8, query_pre_attn_scalar=8)),
    qwen3=(Qwen3Config, dict(head_dim=8)),
    qwen3_sliding=(Qwen3Config, SLIDING | dict(head_dim=8, use_sliding_window=True)),
)
IM = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
         "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
ASKS = [[dict(role="user", content=t)] for t in
        ("I have a cough.", "I have a fever, and a cough, and since the day before yesterday a swollen knee that hurts.", "Hm.")]
CFG = GRPOConfig(prompts=3, group=4, steps=1, max_new=40, l_max=40, lr=1e-2, updates=2, save_every=1)

def make(family, dtype=torch.float32, seed=1):
    "A random model and its tokenizer; Gemma's way of ending a turn for the Gemmas, Qwen's for the others."
    tok, gemma = make_tokenizer(["I have a cough and a fever.", "Order a chest X-ray."]*20, vocab=280), family.startswith("gemma")
    marks = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"] if gemma else ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    tok.add_tokens(marks, special_tokens=True)
    tok.chat_template, tok.eos_token = (GEMMA, "<eos>") if gemma else (IM, "<|im_end|>")
    if gemma: tok.bos_token = "<bos>"
    else: tok.pad_token = None                                  # as Llama has it
    kind, more = FAMILIES[family]
    ends = tok.convert_tokens_to_ids(["<eos>", "<end_of_turn>"] if gemma else ["<|endoftext|>", "<|im_end|>"])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tok), eos_token_id=ends, pad_token_id=0, **SIZES | more))
    model.generation_config.eos_token_id = ends
    return model.to(dtype).eval(), tok

def alone(model, tok, i, group, max_new, seed):
    "Answer i, token by token, each from a full forward of all that came before."
    prompt, _ = encode_prompts(tok, [ASKS[i//group]], model.device)
    u, ids = torch.rand(max_new, group*len(ASKS), generator=torch.Generator().manual_seed(seed)).to(model.device), prompt
    for t in range(max_new):
        with torch.no_grad(): logits = model(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, sample_tokens(logits, u[t, i:i + 1])[:, None]], 1)
        if ids[0, -1] in end_ids(model, tok): break
    return ids[0, prompt.shape[1]:].tolist()

@pytest.mark.parametrize("family", FAMILIES)
def test_rollout(family):
    "Every answer is the one that it would be alone, and ends with any of the end tokens."
    model, tok = make(family)
    ro = rollout(model, tok, ASKS, 4, 40, seed=3)
    assert ro.completion_ids == [alone(model, tok, i, 4, 40, 3) for i in range(12)]
    assert ro.ended.tolist() == [i[-1] in end_ids(model, tok) for i in ro.completion_ids]
    assert 0 < ro.ended.sum() < 12                                # some end early: their rows leave
    assert ro.texts == [tok.decode(i[:-1] if e else i, skip_special_tokens=True) for i, e in zip(ro.completion_ids, ro.ended)]

def test_both_end_tokens_are_heard():
    model, tok = make("gemma3")
    ends = end_ids(model, tok)
    assert tok.convert_ids_to_tokens(ends) == ["<eos>", "<end_of_turn>"]
    ro = rollout(model, tok, ASKS*8, 8, 40, seed=1)
    assert {i[-1] for i, e in zip(ro.completion_ids, ro.ended) if e} == set(ends)
    assert not any(t in ends for i in ro.completion_ids for t in i[:-1])
    model.generation_config.eos_token_id = ends[0]                # a checkpoint that forgets the turn's mark: its template knows it
    assert sorted(end_ids(model, tok)) == sorted(ends)

def test_the_step_by_hand_is_taken_for_a_plain_qwen3_only(monkeypatch):
    assert [f for f in FAMILIES if grpo.plain_qwen3(make(f)[0])] == ["qwen3"]
    model, tok = make("qwen3")
    by_hand = rollout(model, tok, ASKS, 8, 60, seed=5).ids
    monkeypatch.setattr(grpo, "plain_qwen3", lambda model: False)
    assert rollout(model, tok, ASKS, 8, 60, seed=5).ids.tolist() == by_hand.tolist()

def by_full_forward(model, ro):
    "Log-probabilities of the answers, each read alone."
    out, rows = torch.zeros(ro.ids.shape), list(zip(ro.prompt.repeat_interleave(ro.group, 0), ro.prompt_mask.repeat_interleave(ro.group, 0), ro.completion_ids))
    for r, (p, m, ids) in enumerate(rows):
        p, ids = p[m.bool()], torch.tensor(ids)
        logits = model(torch.cat([p, ids])[None], use_cache=False).logits[0, len(p) - 1:-1].float().log_softmax(-1)
        out[r, :len(ids)] = logits.gather(1, ids[:, None]).squeeze(1)
    return out

def gradients(model, logps):
    model.zero_grad()
    (logps**2).sum().backward()
    return [p.grad.clone() for p in model.parameters()]

@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients(family):
    model, tok = make(family)
    ro = rollout(model, tok, ASKS, 4, 40, seed=3)
    ours, theirs = answer_logps(model, ro, parts=3)[0], by_full_forward(model, ro)
    assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=2e-4) and theirs.std() > .5
    for a, b in zip(gradients(model, ours), gradients(model, theirs)): assert torch.allclose(a, b, atol=1e-3*float(b.abs().max() + 1))

def vowels(prompts, completions, completion_ids, **columns): return [c[-1]["content"].count("e")/10 - len(i)/40 for c, i in zip(completions, completion_ids)]

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step(family, dtype, tmp_path):
    "Rollout, reward, update, in the model's own precision; saved, and gone on with."
    model, tok = make(family, dtype)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    row, = train(model, tok, [dict(prompt=a) for a in ASKS], [vowels], CFG, Step("a", {}, base=tmp_path))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert row["grad_norm"] > 0 and 0 <= row["clipped"] < 1 and abs(row["ratio"] - 1) > 1e-4
    assert sum((p != start[n]).any().item() for n, p in model.named_parameters()) > len(start)//2
    again, _ = make(family, dtype)
    train(again, tok, [dict(prompt=a) for a in ASKS], [vowels], CFG, Step("a", {}, base=tmp_path))        # nothing is left to do: it is loaded
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in model.named_parameters())

@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_half_precision_is_near(family):
    "bfloat16 keeps 8 bits: what it samples, float32 finds about as likely."
    half, tok = make(family, torch.bfloat16)
    whole = copy.deepcopy(half).float()
    ro = rollout(half, tok, ASKS, 4, 40, seed=2)
    a, b = answer_logps(half, ro)[0], answer_logps(whole, ro)[0]
    assert a.dtype == torch.float32 and (a - b).abs().mean() < .05 and b.std() > .5

# ---- turns ----

def templates():
    "The chat templates of well-known checkpoints, as TRL carries them, with the token that ends a turn."
    ends = dict(qwen3="<|im_end|>", qwen3_5_think="<|im_end|>", qwen2_5="<|im_end|>", gemma3="<end_of_turn>", llama3="<|eot_id|>", phi3="<|end|>")
    trl = pytest.importorskip("trl", reason="TRL is not installed; it comes with the extra [train]: pip install 'm2kit[train]'")
    return [(n, (Path(trl.__file__).parent/f"chat_templates/{n}.jinja").read_text(), e) for n, e in ends.items()]

def test_turns_come_from_real_templates():
    for name, template, mark in templates():
        model, tok = make("llama")
        marks = ["<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>", "<|user|>", "<|assistant|>"]
        tok.add_tokens(marks, special_tokens=True)
        tok.chat_template, tok.bos_token = template, "<bos>"
        end = tok.convert_tokens_to_ids(mark)
        model.generation_config.eos_token_id = tok.eos_token_id
        assert end in end_ids(model, tok), name
        tail = turn_tail(tok, "Since May.")
        assert tail.startswith(mark) and tail.count("Since May.") == 1, name
        # the whole consultation, spelled turn by turn, is what the template says of it (thinking that it adds or drops aside)
        ids = between(tok, end_ids(model, tok), end, "Since May.")
        talk = [dict(role=r, content=t) for r, t in (("user", "My knee hurts."), ("assistant", "Since when?"), ("user", "Since May."))]
        whole = tok.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert whole.endswith(tok.decode(ids)) and whole.removesuffix(tok.decode(ids)).endswith(f"Since when?{mark}"), name

def test_a_template_for_one_turn_is_told():
    _, tok = make("llama")
    tok.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="leaves out what the assistant said"): between(tok, [1], 1, "Since May.")

@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_sessions(family):
    "Whole consultations: what the policy did not write is the template's, and a step learns from the rest."
    model, tok = make(family)
    scripts = [draw_script(random.Random(i)) for i in range(4)]
    talks, doctor = play(model, tok, scripts, reference_patient(0), seed=4, turns=3, max_new=20)
    said = [doctor.said[i] for i in range(4)]
    ro, ends = session_rollout(model, tok, talks, said, group=2), end_ids(model, tok)
    mark = "<end_of_turn>" if family == "gemma3" else "<|im_end|>"
    for ids, learned, talk, turns in zip(ro.completion_ids, ro.learned, talks, said):
        assert [t for t, l in zip(ids, learned) if l] == [t for turn in turns for t in turn]
        given = [t for t, l in zip(ids, learned) if not l]
        heard = [turn_tail(tok, talk[2*n + 1]["content"]) for n in range(1, len(turns))]
        cut = [turn[-1] not in ends for turn in turns]
        assert tok.decode(given) == "".join(h if c else h.removeprefix(mark) for h, c in zip(heard, cut))
    before = [p.detach().clone() for p in model.parameters()]
    stats = update(model, torch.optim.SGD(model.parameters(), lr=.1), ro, torch.tensor([1., -1, .5, -.5]), CFG)
    assert stats["grad_norm"] > 0 and any((p != q).any() for p, q in zip(model.parameters(), before))

def test_on_trl_any_end_token_ends_an_answer():
    pytest.importorskip("trl", reason="TRL is not installed; it comes with the extra [train]: pip install 'm2kit[train]'")
    from m2kit.train.trl import Session, as_rollout
    model, tok = make("gemma3")
    ends = end_ids(model, tok)
    batch = dict(completion_ids=[[9, ends[0]], [9, 8, ends[1]], [9, 8, 7]], completions=["a", "b", "c"])
    ro = as_rollout(tok, ends, batch, 3)
    assert ro.ended.tolist() == [True, True, False] and ro.lengths.tolist() == [2, 3, 3]
    s = Session(tok, ends, None, ASKS[0])
    s.say([9, ends[0]]); s.hear("Since May."); s.say([9, ends[1]]); s.hear("No."); s.say([9])
    text = tok.decode(s.ids)
    assert text.startswith(tok.decode([9]) + "<eos>\n<start_of_turn>user\nSince May.<end_of_turn>\n<start_of_turn>model\n")
    assert s.ids[-1] == ends[1] and s.learned[-1] == 0 and sum(s.learned) == 5

# ---- a card ----

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card here")

@CUDA
@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_draws_the_same(family):
    "The same uniforms on every device: in float32 the same answers, but for a draw in a thousand that falls on an edge."
    model, tok = make(family)
    here = rollout(model, tok, ASKS, 8, 40, seed=3)
    there = rollout(model.to("cuda"), tok, ASKS, 8, 40, seed=3)
    assert there.ids.device.type == "cuda"
    same = [a == b for a, b in zip(here.completion_ids, there.completion_ids)]
    assert sum(same) >= len(same) - 1
    assert there.completion_ids[0] == alone(model, tok, 0, 8, 40, 3)

@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_a_card(family, dtype, tmp_path):
    model, tok = make(family, dtype)
    model = model.to("cuda")
    row, = train(model, tok, [dict(prompt=a) for a in ASKS], [vowels], CFG, Step("a", {}, base=tmp_path))
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype, "cuda")} and row["grad_norm"] > 0
