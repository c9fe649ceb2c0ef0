// A Qwen3 in plain JavaScript: weights from safetensors, one token at a time, keys and values kept.
// What a prompt shares with the one before it is not read again.
(() => {
  "use strict";
  const k = globalThis.m2kit;

  function half(_, h) {
    // the float16 with these bits
    const sign = h & 0x8000 ? -1 : 1,
      e = (h >> 10) & 31,
      m = h & 1023;
    if (e === 31) return m ? NaN : sign * Infinity;
    return sign * (e ? 2 ** (e - 15) * (1 + m / 1024) : 2 ** -14 * (m / 1024));
  }
  const HALVES = Float32Array.from({ length: 65536 }, half); // a table: a model has a million of them

  // name -> Float32Array; the header says where each tensor stands
  function read_safetensors(buffer) {
    const n = Number(new DataView(buffer).getBigUint64(0, true)),
      out = {};
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, n)));
    for (const [name, t] of Object.entries(header)) {
      if (name === "__metadata__") continue;
      const bytes = buffer.slice(8 + n + t.data_offsets[0], 8 + n + t.data_offsets[1]);
      if (t.dtype === "F32") out[name] = new Float32Array(bytes);
      else if (t.dtype === "F16")
        out[name] = Float32Array.from(new Uint16Array(bytes), h => HALVES[h]);
      else throw new Error(`${name} is ${t.dtype}; only F16 and F32 are read here`);
    }
    return out;
  }

  // y = W x, W with a row for each output; sizes are multiples of four
  function matvec(w, x, rows) {
    const y = new Float32Array(rows),
      n = x.length;
    for (let r = 0, at = 0; r < rows; r++) {
      let a = 0,
        b = 0,
        c = 0,
        d = 0; // four sums, so that none waits for the one before it
      for (let i = 0; i < n; i += 4, at += 4) {
        a += w[at] * x[i];
        b += w[at + 1] * x[i + 1];
        c += w[at + 2] * x[i + 2];
        d += w[at + 3] * x[i + 3];
      }
      y[r] = a + b + c + d;
    }
    return y;
  }

  function rms_norm(x, w, eps, from = 0, n = x.length, out = new Float32Array(n)) {
    let s = 0;
    for (let i = 0; i < n; i++) s += x[from + i] ** 2;
    const by = 1 / Math.sqrt(s / n + eps);
    for (let i = 0; i < n; i++) out[i] = x[from + i] * by * w[i];
    return out;
  }

  class Qwen3 {
    constructor(config, tensors, name) {
      const c = (this.config = config),
        d = c.head_dim,
        theta = (c.rope_parameters ?? c).rope_theta;
      Object.assign(this, { w: tensors, name, ids: [] });
      this.embed = tensors["model.embed_tokens.weight"];
      this.head = c.tie_word_embeddings ? this.embed : tensors["lm_head.weight"];
      this.freq = Array.from({ length: d / 2 }, (_, i) => Math.fround(1 / theta ** ((2 * i) / d)));
      const room = c.max_position_embeddings * c.num_key_value_heads * d;
      const slot = () => ({ keys: new Float32Array(room), values: new Float32Array(room) });
      this.cache = Array.from({ length: c.num_hidden_layers }, slot);
      this.layers = this.cache.map((_, i) => n => tensors[`model.layers.${i}.${n}.weight`]);
    }

    // Another reader with the same weights and a cache of its own
    twin() {
      return new Qwen3(this.config, this.w, this.name);
    }

    // Each head normed and turned by its position, in place
    heads(x, norm, position) {
      const d = this.config.head_dim,
        half = d / 2;
      for (let at = 0; at < x.length; at += d) {
        const h = rms_norm(x, norm, this.config.rms_norm_eps, at, d);
        for (let i = 0; i < half; i++) {
          const angle = Math.fround(position * this.freq[i]);
          const cos = Math.fround(Math.cos(angle)),
            sin = Math.fround(Math.sin(angle));
          x[at + i] = h[i] * cos - h[i + half] * sin;
          x[at + i + half] = h[i + half] * cos + h[i] * sin;
        }
      }
      return x;
    }

    attend(layer, cache, h, position) {
      const c = this.config,
        d = c.head_dim,
        kv = c.num_key_value_heads * d;
      const group = c.num_attention_heads / c.num_key_value_heads;
      const project = (n, rows) => matvec(layer(`self_attn.${n}_proj`), h, rows);
      const q = this.heads(
        project("q", c.num_attention_heads * d),
        layer("self_attn.q_norm"),
        position,
      );
      cache.keys.set(
        this.heads(project("k", kv), layer("self_attn.k_norm"), position),
        position * kv,
      );
      cache.values.set(project("v", kv), position * kv);
      const out = new Float32Array(q.length),
        p = new Float32Array(position + 1);
      for (let head = 0; head < c.num_attention_heads; head++)
        this.look(q, cache, p, out, head * d, Math.floor(head / group) * d, kv);
      return matvec(layer("self_attn.o_proj"), out, c.hidden_size);
    }

    // One head over all positions up to now: softmax of the products, then the mean of the values
    look(q, { keys, values }, p, out, at, from, kv) {
      const d = this.config.head_dim,
        scale = d ** -0.5;
      let most = -Infinity,
        sum = 0;
      for (let t = 0; t < p.length; t++) {
        let s = 0;
        for (let i = 0; i < d; i++) s += q[at + i] * keys[t * kv + from + i];
        p[t] = s * scale;
        if (p[t] > most) most = p[t];
      }
      for (let t = 0; t < p.length; t++) sum += p[t] = Math.exp(p[t] - most);
      for (let t = 0; t < p.length; t++)
        for (let i = 0; i < d; i++) out[at + i] += (p[t] / sum) * values[t * kv + from + i];
    }

    mlp(layer, h) {
      const n = this.config.intermediate_size,
        gate = matvec(layer("mlp.gate_proj"), h, n);
      const up = matvec(layer("mlp.up_proj"), h, n);
      for (let i = 0; i < n; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
      return matvec(layer("mlp.down_proj"), gate, this.config.hidden_size);
    }

    // Read one more token; what the last layer makes of it
    step(id) {
      const c = this.config,
        H = c.hidden_size,
        position = this.ids.length;
      const x = this.embed.slice(id * H, (id + 1) * H);
      const add = y => y.forEach((v, i) => (x[i] += v));
      this.layers.forEach((layer, i) => {
        const before = rms_norm(x, layer("input_layernorm"), c.rms_norm_eps);
        add(this.attend(layer, this.cache[i], before, position));
        add(this.mlp(layer, rms_norm(x, layer("post_attention_layernorm"), c.rms_norm_eps)));
      });
      this.ids.push(id);
      return x;
    }

    logits(x) {
      const normed = rms_norm(x, this.w["model.norm.weight"], this.config.rms_norm_eps);
      return matvec(this.head, normed, this.config.vocab_size);
    }

    // Read a prompt behind what it shares with the cache; the logits behind its last token
    read(prompt) {
      let same = 0,
        x;
      while (same < prompt.length - 1 && this.ids[same] === prompt[same]) same++;
      this.ids.length = same;
      for (const id of prompt.slice(same)) x = this.step(id);
      return this.logits(x);
    }

    // The answer's ids, the end token included where there is one; temperature 0 is greedy
    generate(prompt, { temperature, max_tokens }, seed = 0) {
      const random = temperature ? new k.Random(seed) : null,
        out = [];
      for (let logits = this.read(prompt); ; logits = this.logits(this.step(out.at(-1)))) {
        out.push(random ? draw(logits, random.random(), temperature) : greedy(logits));
        if (out.at(-1) === this.config.eos_token_id || out.length === max_tokens) return out;
      }
    }
  }

  const greedy = logits => logits.reduce((best, x, i) => (x > logits[best] ? i : best), 0);

  // lm.local.draw: the distribution inverted at u
  function draw(logits, u, temperature) {
    const x = Float64Array.from(logits, v => v / temperature),
      most = x.reduce((a, b) => Math.max(a, b));
    const e = x.map(v => Math.exp(v - most)),
      sum = e.reduce((a, b) => a + b);
    let total = 0;
    const c = e.map(v => (total += v / sum)),
      i = c.findIndex(v => v > u * total);
    return i < 0 ? c.length - 1 : i;
  }

  globalThis.m2kit = Object.assign(k, { read_safetensors, Qwen3, draw });
})();
