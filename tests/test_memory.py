"""The memory model against real checkpoints' code, published sizes and table 2."""
import json, subprocess, sys
import pytest
from m2kit.core.errors import UserError
from m2kit.core.run import data_dir
from m2kit.lm.memory import CARDS, LAYOUTS, QWEN25_32B, budget, decoder, fit_overhead, fits, kv_bytes, max_length, parameters, tensors, weight_bytes

# Sizes as in the checkpoints' config.json, counts as transformers gives them on the meta device.
REAL = {
    "Qwen2.5-0.5B": (dict(model_type="qwen2", vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, tie_word_embeddings=True), 494_032_768),
    "Qwen2.5-32B": (QWEN25_32B, 32_763_876_352),
    "Qwen3-8B": (dict(model_type="qwen3", vocab_size=151936, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, intermediate_size=12288), 8_190_735_360),
    "Llama-3.1-8B": (dict(model_type="llama", vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336), 8_030_261_248),
}

@pytest.mark.parametrize("name", REAL)
def test_parameters_of_real_models(name):
    config, count = REAL[name]
    assert parameters(config) == count

@pytest.mark.parametrize("name", REAL)
def test_tensors_are_those_of_transformers(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = dict(REAL[name][0])
    with torch.device("meta"): model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    assert tensors(model.config) == {n: tuple(p.shape) for n, p in model.named_parameters()}

def test_config_from_a_checkpoint_folder(tmp_path):
    from transformers import Qwen3Config
    Qwen3Config(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=64).save_pretrained(tmp_path)
    assert decoder(tmp_path) == decoder(tmp_path/"config.json") == decoder(str(tmp_path)) and decoder(tmp_path).head_dim == 16

@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "8", 2.5, True])
def test_a_bad_field_is_named(field, value):
    with pytest.raises(UserError, match=field): max_length(dict(QWEN25_32B, **{field: value}))

@pytest.mark.parametrize("call, says", [
    (lambda: decoder(dict(QWEN25_32B, model_type="mixtral")), "there are: llama, qwen2, qwen3"),
    (lambda: decoder({}), "model_type"),
    (lambda: decoder(7), "pass a dict"),
    (lambda: max_length(QWEN25_32B, card="RTX 4080"), "there are: A10, A100 40GB"),
    (lambda: max_length(QWEN25_32B, card=-3), "no card named -3"),
    (lambda: max_length(QWEN25_32B, weights="W2A16"), "weight layout"),
    (lambda: max_length(QWEN25_32B, kv="FP4"), "cache dtype"),
    (lambda: max_length(QWEN25_32B, utilization=0), "above 0"),
    (lambda: fits(dict(QWEN25_32B, num_attention_heads=12, head_dim=128), 5), "num_key_value_heads")])
def test_user_errors(call, says):
    with pytest.raises(UserError, match=says): call()

def test_broken_json_names_the_line(tmp_path):
    (tmp_path/"config.json").write_text('{\n"a": 1,\n')
    with pytest.raises(UserError, match="config.json:3"): decoder(tmp_path)

def published():
    import csv
    rows = csv.DictReader((data_dir()/"paper"/"published.csv").open(encoding="utf-8"))
    return {r["subject"]: int(r["value"]) for r in rows if r["exhibit"] == "table2"}

TABLE2 = {"W4A16": ("W4A16", "BF16"), "W4A16-KV8": ("W4A16", "FP8"), "W4A8": ("W4A8", "BF16"), "W4A8-KV8": ("W4A8", "FP8")}

@pytest.mark.parametrize("fitted_on", TABLE2)
def test_table2_within_two_percent_whichever_row_is_fitted(fitted_on):
    paper = published()
    w, kv = TABLE2[fitted_on]
    o = fit_overhead(QWEN25_32B, paper[fitted_on], weights=w, kv=kv)
    ours = {n: max_length(QWEN25_32B, weights=w, kv=kv, overhead=o) for n, (w, kv) in TABLE2.items()}
    assert ours[fitted_on] == paper[fitted_on]
    assert {n: abs(ours[n]/paper[n] - 1) < 0.02 for n in ours} == dict.fromkeys(TABLE2, True), ours

def test_the_default_overhead_is_the_fitted_one():
    assert all(abs(max_length(QWEN25_32B, weights=w, kv=kv)/published()[n] - 1) < 0.02 for n, (w, kv) in TABLE2.items())

def test_without_a_fit_it_is_far_off():
    assert max_length(QWEN25_32B, overhead=0) > 1.4 * published()["W4A16"]

@pytest.mark.parametrize("kv", ["BF16", "FP8"])
@pytest.mark.parametrize("weights", LAYOUTS)
@pytest.mark.parametrize("card", CARDS)
def test_the_sum_holds_everywhere(card, weights, kv):
    "The last token fits and the next one does not; whatever fits, the parts make up the card."
    b = budget(QWEN25_32B, card, weights, kv)
    n, used = b.tokens, b.reserve + b.overhead + sum(b.weights.values())
    assert b.card == pytest.approx(used + b.pool)
    if n: assert used + n*kv_bytes(QWEN25_32B, kv) <= b.card < used + (n + 1)*kv_bytes(QWEN25_32B, kv)
    else: assert used + b.per_token > b.card
    assert fits(QWEN25_32B, n, card, weights, kv) == (n > 0) and not fits(QWEN25_32B, n + 1, card, weights, kv)

def test_packed_weights_of_a_real_quantizer():
    "Codes, scales and zero points of a GPTQ-packed layer (int32 columns of eight 4-bit numbers, 16-bit scales), counted by its own shapes."
    from m2kit.lm.memory import matrix_bytes
    rows, cols, group = 5120, 27648, 128
    packed = dict(codes=4*(cols//8)*rows, scales=2*(cols//group)*rows, zeros=4*(cols//group)*(rows//8))
    assert matrix_bytes((rows, cols), "W4A16") == packed
    assert sum(weight_bytes(QWEN25_32B, "W4A16").values()) == 19_328_804_864

def test_no_torch_at_import():
    code = "import sys, m2kit.lm.memory as m; m.max_length(m.QWEN25_32B); print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
