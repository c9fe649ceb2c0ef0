"""Equation 2 in our loop against TRL's GRPOTrainer: the same loss, gradients, updates and advantages on the same batch; the same rewards, unchanged, on both; and the time of a step.

The benchmark is marked slow; `pytest -m slow tests/test_trl.py` runs it alone and prints the ratio.
"""
import copy, random, statistics, time
import pytest
pytest.importorskip("trl", reason="TRL is not installed; it comes with the extra [train]: pip install 'm2kit[train]'")
import torch, trl
from datasets import Dataset
from transformers import TrainerCallback
from m2kit.clinic.synthesize import Style, answer, draw_case, opening
from m2kit.tiny.model import make_model
from m2kit.train.sft import encode_dialogue, fit
from m2kit.rubrics.reference import ClauseGrader, reference_rubric
from m2kit.rubrics.rubric import score
from m2kit.train.grpo import GRPOConfig, Rollout, answer_logps, encode_prompts, group_advantage, grpo_step, policy_loss, update
from m2kit.train.rewards import LengthReward, RubricReward, length_reward
from m2kit.lm.local import load_policy
from m2kit.tiny.doctor import clinic_tokenizer, tiny_doctor

LMAX = 24
CASES = [draw_case(random.Random(i)) for i in range(16)]

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.fixture(scope="module")
def tok(): return clinic_tokenizer()

def fresh(tok, seed=1): return make_model(tok, hidden=32, layers=2, heads=2, kv_heads=1, ff=64, seed=seed)

def stand_in(prompts, completions, **columns): return [0.]*len(completions)

class Keeps(trl.GRPOTrainer):
    "TRL's trainer that keeps what it computed its losses from."
    def _compute_loss(self, model, inputs):
        self.seen = [*getattr(self, "seen", []), {k: v.clone() for k, v in inputs.items()}]
        return super()._compute_loss(model, inputs)

def trainer(out, model, tok, rewards, rows, group=4, lr=1e-3, **changes):
    "TRL set to equation 2, on one CPU thread: nothing is logged, saved or recomputed that need not be."
    dull = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                dataloader_pin_memory=False)
    eq2 = dict(loss_type="dr_grpo", scale_rewards="none", beta=0., epsilon=.2, epsilon_high=.28, importance_sampling_level="token",
               temperature=1., top_p=1., top_k=0)
    ours = dict(max_completion_length=LMAX, max_steps=1, num_generations=group, per_device_train_batch_size=len(rows)*group, learning_rate=lr, lr_scheduler_type="constant",
                adam_beta2=.95, weight_decay=0., shuffle_dataset=False)
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    optimizers = changes.pop("optimizers", (None, None))
    args = trl.GRPOConfig(output_dir=str(out), **(dull | eq2 | ours | changes))
    return Keeps(model=model, args=args, reward_funcs=rewards, train_dataset=data, processing_class=tok, optimizers=optimizers)

def questions(n): return [dict(prompt=opening(c)) for c in CASES[:n]]

def hand_made(tok, group=3):
    "Answers of every length from one token to LMAX, of random tokens; the longest are cut off. Prompts differ in length too."
    g = torch.Generator().manual_seed(0)
    prompt, pmask = encode_prompts(tok, [[dict(role="user", content="I feel ill. "*k)] for k in (2, 1, 4, 3)])
    n = torch.tensor([1, 2, 5, LMAX, LMAX, 7, 3, 12, 20, 9, 23, 16])
    mask = (torch.arange(LMAX) < n[:, None]).long()
    ids = torch.randint(5, len(tok), (len(n), LMAX), generator=g)
    ids[(torch.arange(LMAX) == n[:, None] - 1) & (n[:, None] < LMAX)] = tok.eos_token_id
    return Rollout(prompt, pmask, ids.masked_fill(mask == 0, tok.pad_token_id), mask, n < LMAX, [""]*len(n))

def as_inputs(ro, advantage, old):
    rep = lambda x: x.repeat_interleave(ro.group, 0)
    return dict(prompt_ids=rep(ro.prompt), prompt_mask=rep(ro.prompt_mask), completion_ids=ro.ids, completion_mask=ro.mask, advantages=advantage, old_per_token_logps=old)

def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}

@pytest.fixture(scope="module")
def one_batch(tok, tmp_path_factory):
    "One batch: the policy, the rollout, its advantages, the old log-probabilities, TRL's loss and TRL's gradients."
    t = trainer(tmp_path_factory.mktemp("loss"), fresh(tok), tok, stand_in, questions(4))
    t.current_gradient_accumulation_steps = 1                                # the training loop sets it
    ro, g = hand_made(tok), torch.Generator().manual_seed(1)
    with torch.no_grad(): logp, _ = answer_logps(t.model, ro)
    old = (logp + torch.empty_like(logp).uniform_(-.6, .6, generator=g))*ro.mask   # ratios from 0.55 to 1.8
    advantage = torch.linspace(-1, 1, len(ro.ids))[torch.randperm(len(ro.ids), generator=g)]
    loss = t.compute_loss(t.model.train(), as_inputs(ro, advantage, old))
    return t.model, ro, advantage, old, loss.item(), gradients(t.model, loss)

def our_loss(model, ro, advantage, old, l_max=LMAX, **eps): return policy_loss(answer_logps(model, ro)[0], old, advantage, ro.mask, l_max, **eps)

def apart(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)

def test_the_clip_binds_on_both_sides_and_only_there(one_batch):
    model, ro, advantage, old, _, _ = one_batch
    with torch.no_grad(): ratio, a = (answer_logps(model, ro)[0] - old).exp(), advantage[:, None].expand_as(old)
    on = ro.mask.bool()
    for side in (ratio > 1.28, ratio < .8, (ratio > 1.2) & (ratio < 1.28), (ratio > .72) & (ratio < .8)):
        for sign in (a > 0, a < 0): assert (side & sign & on).any()
    binds = ((ratio > 1.28) & (a > 0) | (ratio < .8) & (a < 0)) & on
    assert our_loss(*one_batch[:4])[1]["clipped"] == pytest.approx((binds.sum()/on.sum()).item())

def test_loss_and_gradients(one_batch):
    model, *batch, loss, grads = one_batch
    ours, _ = our_loss(model, *batch)
    assert ours.item() == pytest.approx(loss, abs=1e-5) and abs(loss) > 1e-2
    assert apart(gradients(model, ours), grads) < 1e-5 < 1e-2 < max(g.abs().max() for g in grads.values())

@pytest.mark.parametrize("wrong", [dict(eps_high=.2), dict(eps_low=.28), dict(eps_low=.28, eps_high=.2), dict(eps_high=1e9),
                                   dict(l_max=LMAX + 1), dict(advantage=-1), dict(mask=1)], ids=str)
def test_a_wrong_loss_is_seen(one_batch, wrong):
    model, ro, advantage, old, loss, grads = one_batch
    eps = {k: v for k, v in wrong.items() if k not in ("mask", "advantage")}
    if "mask" in wrong: ro = Rollout(**(vars(ro) | dict(mask=ro.mask*(torch.arange(LMAX) < LMAX - 1))))      # the longest answers lose a token
    ours, _ = our_loss(model, ro, advantage*wrong.get("advantage", 1), old, **eps)
    assert max(abs(ours.item() - loss), apart(gradients(model, ours), grads)) > 1e-4

def logged(trainer, key): return [l[key] for l in trainer.state.log_history if key in l]

@pytest.mark.parametrize("updates", [1, 2, 3])
def test_updates_of_one_batch(tok, tmp_path, updates):
    "TRL samples, scores and takes 1 to 3 steps on its batch; `update` on the same batch ends at the same weights."
    def many_e(prompts, completions, **columns): return [c[-1]["content"].count("e")/10 for c in completions]
    model = fresh(tok)
    ours, sgd = copy.deepcopy(model), lambda m: torch.optim.SGD(m.parameters(), lr=100.)  # not Adam, which blows rounding errors of tiny gradients up to full steps
    t = trainer(tmp_path, model, tok, many_e, questions(4), num_iterations=updates, max_steps=updates, max_grad_norm=.02, optimizers=(sgd(model), None),
                logging_strategy="steps", logging_steps=1)
    t.train()
    assert len(t.seen) == updates and all(torch.equal(t.seen[0]["completion_ids"], s["completion_ids"]) for s in t.seen)
    b, start = t.seen[0], {n: p.detach().clone() for n, p in ours.named_parameters()}
    ro = Rollout(b["prompt_ids"], b["prompt_mask"], b["completion_ids"], b["completion_mask"], None, None)   # shuffled: each answer has its own prompt
    m = update(ours, sgd(ours), ro, b["advantages"], GRPOConfig(updates=updates, l_max=LMAX, clip_grad=.02))
    ended, theirs = dict(ours.named_parameters()), dict(model.named_parameters())
    assert apart(ended, theirs) < 1e-5 < 1e-2 < apart(ended, start)
    for key, name in dict(loss="loss", entropy="entropy", grad_norm="grad_norm", clipped="clip_ratio/region_mean").items():
        assert m[key] == pytest.approx(logged(t, name)[-1], abs=2e-5), name
    for key, name in dict(clipped_up="clip_ratio/high_mean", clipped_down="clip_ratio/low_mean").items():       # means over the updates
        assert m[key] == pytest.approx(statistics.mean(logged(t, name)), abs=2e-5), name
    assert (m["clipped"] > 0) == (updates > 1) and m["grad_norm"] > .02       # both clips were put to the test

@pytest.mark.parametrize("scale", [False, True])
def test_advantages(tok, tmp_path, scale):
    table = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    table[1, 2] = table[3, 0] = table[3, 5] = float("nan")                    # unknown
    def from_table(prompts, completions, **columns): return [None if x != x else x for x in table.flatten().tolist()]
    t = trainer(tmp_path, fresh(tok), tok, from_table, questions(4), group=6, scale_rewards=scale, max_completion_length=2)
    t.model.train()
    theirs = t._generate_and_score_completions([q for q in questions(4) for _ in range(6)])["advantages"].view(4, 6)
    ours = group_advantage(table, scale)
    assert torch.allclose(ours, theirs, atol=1e-3 if scale else 1e-6)         # 1e-3: the 1e-4 beside the deviation
    assert (theirs == 0).sum() == 3 and theirs.abs().max() > .3

def with_rubrics(cases):
    "A data set for TRL. Arrow holds no objects, so the rubric travels as a dict."
    return Dataset.from_list([dict(prompt=opening(c), rubric=reference_rubric(c).to_dict()) for c in cases])

@pytest.fixture(scope="module")
def pupil(tok):
    "A model that has learned answers to four cases by heart, in seconds: not good, but its scores differ."
    rng, model = random.Random(0), make_model(tok, hidden=64, layers=1, heads=2, kv_heads=1, ff=128, seed=0)
    lessons = [encode_dialogue(tok, [*opening(c), dict(role="assistant", content=answer(c, Style(.7, 0, 0, 0, 0), rng))]) for c in CASES[:4]*6]
    fit(model.train(), iter(lambda: rng.choice(lessons), None), steps=150, batch=8, pad=tok.pad_token_id)
    return model

def test_the_same_rewards_run_on_trl(tok, tmp_path, pupil):
    seen, rubric = [], RubricReward(ClauseGrader())
    def witness(prompts, completions, completion_ids, **columns):
        seen.append((prompts, [c[-1]["content"] for c in completions], completion_ids))
        return [0.]*len(completions)
    options = dict(coef=.5, thresh=.01)
    t = trainer(tmp_path, copy.deepcopy(pupil), tok, [rubric, LengthReward(rubric, 4, **options), witness], with_rubrics(CASES[:4]), max_steps=2,
                max_completion_length=128, logging_strategy="steps", logging_steps=1)
    t.train()
    means = []
    for prompts, texts, ids in seen:
        known = {opening(c)[-1]["content"]: reference_rubric(c) for c in CASES[:4]}
        rubrics = [known[p[-1]["content"]] for p in prompts]
        scores = torch.tensor([score(r, v) for r, v in zip(rubrics, ClauseGrader().grade([(None, x, r) for x, r in zip(texts, rubrics)]))]).view(4, 4)
        bonus = torch.stack([torch.as_tensor(length_reward(s, [len(i) for i in n], **options)) for s, n in zip(scores, [ids[k:k + 4] for k in range(0, 16, 4)])])
        means.append((scores.mean().item(), bonus.mean().item()))
        assert [tok.decode(i, skip_special_tokens=True) for i in ids] == texts
        assert scores.std() > .02 and 0 < (bonus > 0).float().mean() < 1     # or the comparison below would say little
    assert len(means) == 2 and means[0] != means[1]
    assert logged(t, "rewards/rubric/mean") == pytest.approx([s for s, _ in means], abs=1e-6)
    assert logged(t, "rewards/length/mean") == pytest.approx([b for _, b in means], abs=1e-6)

class InTurn(TrainerCallback):
    "Times TRL's steps, and runs one of ours after each, so that both meet the same machine."
    def __init__(self, ours): self.ours, self.trl, self.own, self.length = ours, [], [], []
    def on_step_begin(self, *args, **kwargs): self.start = time.perf_counter()
    def on_step_end(self, args, state, *rest, **kwargs):
        self.trl.append(time.perf_counter() - self.start)
        start = time.perf_counter()
        self.length.append(self.ours(state.global_step)["length"])
        self.own.append(time.perf_counter() - start)

@pytest.mark.slow
def test_benchmark(tmp_path, capsys):
    "Rollout, score and update of 16 prompts x 8 answers of at most 192 tokens; the median of 7 steps of each, after one to warm up."
    steps, group, lr = 8, 8, 1e-5                                             # the rate is small so that both policies stay what they are
    model, tok = load_policy(tiny_doctor())                                   # trained here, if no chapter has done so yet
    rows, rubric = [dict(prompt=opening(c), rubric=reference_rubric(c)) for c in CASES], RubricReward(ClauseGrader())
    rewards, lengths = [rubric, LengthReward(rubric, group)], []
    def seen(prompts, completions, completion_ids, **columns): lengths.append(statistics.mean(map(len, completion_ids))); return [0.]*len(completions)
    mine, cfg = copy.deepcopy(model).train(), GRPOConfig(group=group, prompts=len(rows), lr=lr)
    adam = torch.optim.AdamW(mine.parameters(), lr=lr, betas=(.9, .95), weight_decay=0.)
    turn = InTurn(lambda k: grpo_step(mine, tok, adam, rows, rewards, cfg, seed=k))
    t = trainer(tmp_path, model, tok, [*rewards, seen], with_rubrics(CASES), group=group, lr=lr, max_steps=steps, max_completion_length=cfg.max_new,
                optim="adamw_torch")
    t.add_callback(turn)
    t.train()
    theirs, ours = (statistics.median(x[1:]) for x in (turn.trl, turn.own))
    with capsys.disabled():
        print(f"\na GRPO step of the tiny doctor, {len(rows)} prompts x {group} answers: ours {ours:.2f} s (answers of {statistics.mean(turn.length):.0f} tokens), "
              f"TRL {trl.__version__} {theirs:.2f} s ({statistics.mean(lengths):.0f} tokens); ratio {theirs/ours:.1f}")
    assert statistics.mean(turn.length) == pytest.approx(statistics.mean(lengths), rel=.1)    # both did the same work
    assert theirs > ours
