"""Quantization against libraries and against odd checkpoints.

The libraries: compressed-tensors reads what `infer.export` writes, llm-compressor's GPTQ and ours round one shared layer alike, bitsandbytes rounds activations as we do. Each test runs where its library is installed.
llm-compressor pins other versions than this kit does, so for CI its answer is kept in tests/data/gptq_llmcompressor.json, which names the versions and the command that made it: `python tests/test_quantize.py`, in an environment that has it.
"""
import base64, json, shutil, zlib
from pathlib import Path
import pytest, torch
from m2kit.core.errors import UserError
from m2kit.infer.export import SCHEMES, Scheme, check_weights, export, load_quantized, pack_codes, quantize_checkpoint, read_tensors, source_config
from m2kit.infer.quantize import METHODS, Grid, Hessian, gptq, layer_error, nearest, quantize_model
from m2kit.infer.rotate import rotate, round_tokens
from m2kit.lm.local import load
from m2kit.lm.local import save_checkpoint
from m2kit.tiny.model import make_model, make_tokenizer
from m2kit.train.sft import encode_dialogue, pad_batch

RECORD = Path(__file__).parent/"data"/"gptq_llmcompressor.json"
TEXTS = [f"the doctor asks {a} and the patient says {b}" for a in ("why", "when", "where", "how long") for b in ("today", "since May", "at night", "on the stairs")]


@pytest.fixture(scope="module")
def tok():
    return make_tokenizer(TEXTS, vocab=280)


@pytest.fixture
def folder(tok, tmp_path):
    "A small untrained checkpoint; what is tested here does not hang on what it says."
    def make(name="m", change=None, config=None, **sizes):
        model = make_model(tok, **(dict(hidden=64, heads=2, kv_heads=1, ff=96) | sizes))
        if change: change(model)
        path = save_checkpoint(model, tok, tmp_path/name)
        if config:
            c = json.loads((path/"config.json").read_text()) | config
            (path/"config.json").write_text(json.dumps({k: v for k, v in c.items() if v is not None}))
        return path
    return make


def logits(model, tok):
    ids, _, mask = pad_batch([encode_dialogue(tok, [dict(role="user", content=t)]) for t in TEXTS[:4]], tok.pad_token_id)
    with torch.no_grad(): return model(ids, attention_mask=mask).logits[mask.bool()]


# ---- one shared layer

def shared_layer():
    "64 x 128, inputs that go together; the same numbers on every machine that has torch's CPU generator."
    g = torch.Generator().manual_seed(7)
    mix = torch.randn(128, 24, generator=g) @ torch.randn(24, 128, generator=g)/24 + .3*torch.eye(128)
    h = Hessian(); h.add(torch.randn(1000, 128, generator=g) @ mix)
    return torch.randn(64, 128, generator=g)/128**.5, h.mean


CASES = [(bits, symmetric) for bits in (3, 4) for symmetric in (True, False)]


def ours(bits, symmetric):
    w, h = shared_layer()
    return gptq(w, h, Grid(bits, 32, symmetric))


def llmcompressor_gptq(bits, symmetric):
    "The same layer through llm-compressor."
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, apply_quantization_config
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer
    w, h = shared_layer()
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32, observer="minmax")
    layer = torch.nn.Linear(128, 64, bias=False); layer.weight.data = w.clone()
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args, module=layer)
    layer.weight_observer = observer
    observer(layer.weight)
    _, made = quantize_weight(module=layer, quant_args=args, hessian=h.clone(), blocksize=128, percdamp=.01)
    return made["weight"]


def agree(theirs, q):
    "Share of weights that are the same, and the ratio of the layer's errors."
    w, h = shared_layer()
    return (theirs - q.weight).abs().lt(1e-4*w.abs().max()).float().mean().item(), layer_error(w, q.weight, h)/layer_error(w, theirs, h)


@pytest.mark.parametrize("bits, symmetric", CASES)
def test_gptq_agrees_with_llmcompressor(bits, symmetric):
    pytest.importorskip("llmcompressor", reason="pins other versions of compressed-tensors than constraints.txt; its recorded answer is tested below")
    same, ratio = agree(llmcompressor_gptq(bits, symmetric), ours(bits, symmetric))
    assert same > .99 and abs(ratio - 1) < .02, (same, ratio)


@pytest.mark.parametrize("bits, symmetric", CASES)
def test_gptq_agrees_with_the_record_of_llmcompressor(bits, symmetric):
    record = json.loads(RECORD.read_text())
    assert record["library"].startswith("llmcompressor ") and record["command"]
    row = next(r for r in record["rows"] if (r["bits"], r["symmetric"]) == (bits, symmetric))
    codes = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(row["codes"]))), dtype=torch.int8).view(64, 128)
    q = ours(bits, symmetric)
    same = (codes == q.codes).float().mean().item()
    w, h = shared_layer()
    assert same > .99, same                                            # float32 sums differ in their last bits from machine to machine, and a weight on a boundary goes either way
    assert abs(layer_error(w, q.weight, h)/row["error"] - 1) < .02
    assert layer_error(w, q.weight, h) < .7*layer_error(w, nearest(w, q.grid).weight, h)


def test_activations_agree_with_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).half()
    codes, top, _ = functional.int8_vectorwise_quant(x)
    theirs = codes.float()*top[:, None].float()/127
    step = x.float().abs().amax(1, keepdim=True)/127
    assert (theirs - x.float()).abs().le(.51*step).all() and (round_tokens(x.float()) - x.float()).abs().le(.51*step).all()
    assert (theirs - round_tokens(x.float())).abs().le(1.01*step).all()       # 254 steps over the span there, 255 here


# ---- the format

def test_transformers_reads_what_we_write(folder, tok, tmp_path):
    "compressed-tensors through transformers gives the very weights, and the same logits."
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM
    for i, (grid, method) in enumerate([(Grid(4, 32), "gptq"), (Grid(4, 32, symmetric=False), "nearest"), (Grid(8, 0), "nearest"), (Grid(4, 16), "autoround")]):
        scheme = Scheme(grid, 16, method, rotate=i == 1)
        out = quantize_checkpoint(folder(f"m{i}"), tmp_path/f"q{i}", scheme, TEXTS, device="cpu", **(dict(steps=5) if method == "autoround" else {}))
        theirs, own = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), load_quantized(out)[0]
        assert torch.allclose(logits(theirs, tok), logits(own, tok), atol=1e-4), scheme


def test_packing_is_the_libraries():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits in (3, 4, 8):
        codes = torch.randint(-2**(bits - 1), 2**(bits - 1), (10, 37), dtype=torch.int8)
        assert torch.equal(pack_codes(codes, bits), helpers.pack_to_int32(codes, bits))


def test_packing_by_the_formats_definition():
    "Bit by bit, without the code under test: code j of a word sits at bits 4j to 4j + 3, offset by 8."
    codes = torch.randint(-8, 8, (3, 16), dtype=torch.int8)
    for row, words in zip(codes.tolist(), pack_codes(codes, 4).tolist()):
        assert [w % 2**32 for w in words] == [sum((c + 8) << 4*j for j, c in enumerate(row[a:a + 8])) for a in (0, 8)]


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_says_what_the_measured_one_says(method, folder, tok, tmp_path):
    model, _ = load(folder(), "cpu", torch.float32)
    kept = quantize_model(model, Grid(4, 32), method, [(i, m) for i, _, m in [pad_batch([encode_dialogue(tok, [dict(role="user", content=t)]) for t in TEXTS], 0)]], **(dict(steps=5) if method == "autoround" else {}))
    back, _ = load_quantized(export(model, tok, kept, tmp_path/"q"))
    assert torch.equal(logits(back, tok), logits(model, tok))


# ---- odd checkpoints: they work, or they are refused in one line

def test_odd_widths_are_refused_and_the_way_out_works(folder, tok, tmp_path):
    path = folder(ff=100)                                              # down_proj has 100 inputs
    with pytest.raises(UserError, match="model.layers.0.mlp.down_proj: 100 inputs do not divide into groups of 32; choose a group that divides them .the largest power of two is 4."):
        quantize_checkpoint(path, tmp_path/"q", Scheme(Grid(4, 32), 16, "nearest", False), device="cpu")
    assert not (tmp_path/"q").exists()
    for i, group in enumerate((4, 0)):
        out = quantize_checkpoint(path, tmp_path/f"q{i}", Scheme(Grid(8, group), 16, "nearest", False), device="cpu")
        assert torch.allclose(logits(load_quantized(out)[0], tok), logits(load(path, "cpu", torch.float32)[0], tok), atol=.05)


def test_a_width_without_a_hadamard_matrix_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no Hadamard matrix of order 70; leave|no Hadamard matrix of order 70 here"):
        quantize_checkpoint(folder(hidden=70, heads=1, kv_heads=1), tmp_path/"q", Scheme(Grid(4, 2), 16, "nearest", True), device="cpu")


def test_tied_embeddings_stay_tied_and_come_apart_when_rotated(folder, tok, tmp_path):
    path, plain = folder(), Scheme(Grid(8, 32), 16, "nearest", False)
    tied, apart = (load_quantized(quantize_checkpoint(path, tmp_path/n, s, device="cpu"))[0] for n, s in (("a", plain), ("b", Scheme(Grid(8, 32), 16, "nearest", True))))
    was = logits(load(path, "cpu", torch.float32)[0], tok)
    assert tied.config.tie_word_embeddings and "lm_head.weight" not in read_tensors(tmp_path/"a")
    assert not apart.config.tie_word_embeddings and "lm_head.weight" in read_tensors(tmp_path/"b")
    for m in (tied, apart): assert torch.allclose(logits(m, tok), was, atol=.02)


def test_rotated_and_saved_by_transformers(folder, tok, tmp_path):
    model, _ = load(folder(), "cpu", torch.float32)
    was = logits(model, tok)
    save_checkpoint(rotate(model), tok, tmp_path/"r", torch.float32)
    assert torch.allclose(logits(load(tmp_path/"r", "cpu", torch.float32)[0], tok), was, atol=1e-4)


def test_a_config_that_ties_another_output_layer_is_refused(folder, tmp_path):
    "transformers would take the embedding for the output layer, and the model would be another."
    from m2kit.infer.rotate import untie
    def other(model): untie(model).lm_head.weight.data.add_(.1)
    path = folder(change=other, config=dict(tie_word_embeddings=True))
    with pytest.raises(UserError, match="has another output layer; set tie_word_embeddings to false"):
        quantize_checkpoint(path, tmp_path/"q", Scheme(Grid(8, 32), 16, "nearest", False), device="cpu")


@pytest.mark.parametrize("config, words", [
    (dict(num_key_value_heads=None), "num_key_value_heads is missing"), (dict(head_dim=None), "head_dim is missing"), (dict(intermediate_size=None), "intermediate_size is missing"),
    (dict(vocab_size="many"), "vocab_size is 'many'"), (dict(model_type="mamba"), "no model family"), (dict(model_type=None), "no model family"),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), "is quantized already .gptq."),
    (dict(num_hidden_layers=1, layer_types=["full_attention"]), "has no place in the model that config.json describes")])
def test_configs_that_do_not_fit(config, words, folder, tmp_path):
    with pytest.raises(UserError, match=words) as e: quantize_checkpoint(folder(config=config), tmp_path/"q", Scheme(Grid(8, 32), 16, "nearest", False), device="cpu")
    assert "\n" not in str(e.value) and not (tmp_path/"q").exists()


def test_nothing_is_quantized_twice(folder, tok, tmp_path):
    out = quantize_checkpoint(folder(), tmp_path/"q", Scheme(Grid(4, 32), 16, "nearest", False), device="cpu")
    with pytest.raises(UserError, match="quantized already .compressed-tensors."): quantize_checkpoint(out, tmp_path/"again", device="cpu")
    model, _ = load(folder("n"), "cpu", torch.float32)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(96, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="quantized already"): quantize_model(model, Grid(4, 32), "nearest")


def test_missing_files(tmp_path, folder):
    with pytest.raises(UserError, match="hf download"): source_config("nobody/nothing")
    (tmp_path/"empty").mkdir()
    with pytest.raises(UserError, match="has no config.json"): source_config(tmp_path/"empty")
    path = folder()
    (path/"model.safetensors").unlink()
    with pytest.raises(UserError, match="no usable checkpoint"): quantize_checkpoint(path, tmp_path/"q", Scheme(Grid(8, 32), 16, "nearest", False), device="cpu")


def test_an_existing_folder_is_not_written_over(folder, tmp_path):
    (tmp_path/"q").mkdir(); (tmp_path/"q"/"precious").write_text("x")
    with pytest.raises(UserError, match="exists already"): quantize_checkpoint(folder(), tmp_path/"q", Scheme(Grid(8, 32), 16, "nearest", False), device="cpu")
    assert [p.name for p in (tmp_path/"q").iterdir()] == ["precious"]


if __name__ == "__main__":                                              # writes the record
    import importlib.metadata as md
    rows = []
    for bits, symmetric in CASES:
        q, theirs = ours(bits, symmetric), llmcompressor_gptq(bits, symmetric)
        codes = (theirs.view(64, -1, 32)/q.scale[..., None] + q.zero[..., None]).round().to(torch.int8).view(64, 128)
        w, h = shared_layer()
        rows.append(dict(bits=bits, symmetric=symmetric, error=layer_error(w, theirs, h), codes=base64.b64encode(zlib.compress(codes.numpy().tobytes(), 9)).decode()))
        print(bits, symmetric, agree(theirs, q))
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(dict(what="codes that GPTQ of llm-compressor gives the layer of tests/test_quantize.py (zlib, base64), and the layer's mean squared error", library=f"llmcompressor {md.version('llmcompressor')}",
        with_=dict(compressed_tensors=md.version("compressed-tensors"), torch=torch.__version__), command="pip install --no-deps llmcompressor==0.12.0.2 compressed-tensors==0.17.1 loguru && python tests/test_quantize.py", rows=rows), indent=1) + "\n")
