// The book's live pieces: what the package computes, computed again in the page. Names are the
// package's own; tests/test_live.py holds every function to the package on 200 random inputs. A
// classic script without modules: a page opened from a disk loads it too.
(() => {
  "use strict";
  const sum = xs => xs.reduce((a, b) => a + b, 0);
  const known = xs => xs.filter(x => x !== null); // null is Python's None, and its nan

  // rubrics.rubric: points of the met criteria over the positive points; `met` is true, false
  // or null (unknown)
  function bounds_of_points(points, met) {
    const best = sum(points.filter(p => p > 0));
    if (!best) return null;
    const got = sum(points.filter((p, i) => met[i]));
    const pending = points.filter((p, i) => met[i] === null);
    return [
      (got + sum(pending.filter(p => p < 0))) / best,
      (got + sum(pending.filter(p => p > 0))) / best,
    ];
  }

  function score_points(points, met) {
    const best = sum(points.filter((p, i) => p > 0 && met[i] !== null));
    if (!best) return null;
    const got = sum(points.filter((p, i) => met[i]));
    if (got >= 0 || !met.includes(null)) return got / best;
    const [low, high] = bounds_of_points(points, met); // no worse than any outcome of what is unknown
    return Math.min(Math.max(got / best, low), high);
  }

  // One answer's verdicts under the rules that harnesses follow
  function by_rule(points, met) {
    const [low, high] = bounds_of_points(points, met),
      s = score_points(points, met);
    return {
      example: s,
      reward: s === null ? null : Math.max(0, s),
      unknown_is_false: score_points(points, met.map(Boolean)),
      low,
      high,
    };
  }

  // train.rewards: the conditional length reward of equation 3
  function quantile(xs, q) {
    // numpy's "linear", rounding included
    const sorted = [...xs].sort((a, b) => a - b),
      at = (sorted.length - 1) * q;
    const i = Math.floor(at),
      t = at - i,
      a = sorted[i],
      b = sorted[Math.min(i + 1, sorted.length - 1)];
    return t >= 0.5 ? b - (b - a) * (1 - t) : a + (b - a) * t;
  }

  function length_reward(scores, lengths, coef = 4, q = 0.2, thresh = 0.5) {
    const some = known(scores);
    if (!some.length) return scores.map(() => 0);
    const p80 = quantile(some, q);
    return scores.map((s, i) =>
      s !== null && s >= p80 && p80 > thresh ? coef / Math.sqrt(Math.max(lengths[i], 1)) : 0,
    );
  }

  // train.grpo: reward minus the group's mean (equation 2), here for one group
  function group_advantage(rewards, scale = false) {
    const some = known(rewards),
      mean = sum(some) / some.length;
    const spread =
      Math.sqrt(sum(some.map(r => (r - mean) ** 2)) / Math.max(1, some.length - 1)) + 1e-4;
    return rewards.map(r => (r === null ? 0 : (r - mean) / (scale ? spread : 1)));
  }

  // One token's term of equation 2, and whether the clip binds
  function token_gain(ratio, advantage, eps_low = 0.2, eps_high = 0.28) {
    const gain = ratio * advantage,
      clipped = Math.min(Math.max(ratio, 1 - eps_low), 1 + eps_high) * advantage;
    return { gain: Math.min(gain, clipped), binds: clipped < gain };
  }

  function policy_loss(logp, old_logp, advantage, mask, l_max, eps_low = 0.2, eps_high = 0.28) {
    let total = 0,
      bound = 0,
      tokens = 0;
    mask.forEach((row, i) =>
      row.forEach((on, t) => {
        if (!on) return;
        const { gain, binds } = token_gain(
          Math.exp(logp[i][t] - old_logp[i][t]),
          advantage[i],
          eps_low,
          eps_high,
        );
        total += gain / (l_max || Math.max(1, sum(row))); // without l_max: by the answer's own length, as GRPO first did
        bound += binds;
        tokens += 1;
      }),
    );
    return { loss: -total / mask.length, clipped: tokens ? bound / tokens : 0 };
  }

  // lm.memory: `d` is a Decoder's fields, `layout` a Layout's
  function linear_layers(d) {
    // shape (out, in) and bias of a layer's matrices
    const q = d.heads * d.head_dim,
      kv = d.kv_heads * d.head_dim;
    return [
      [q, d.hidden, d.qkv_bias],
      [kv, d.hidden, d.qkv_bias],
      [kv, d.hidden, d.qkv_bias],
      [d.hidden, q, d.o_bias],
      [d.intermediate, d.hidden, d.mlp_bias],
      [d.intermediate, d.hidden, d.mlp_bias],
      [d.hidden, d.intermediate, d.mlp_bias],
    ];
  }

  function plain_parameters(d) {
    // everything that stays in 16 bits
    const biases = sum(linear_layers(d).map(([out, , bias]) => (bias ? out : 0)));
    const layer = biases + 2 * d.hidden + (d.qk_norm ? 2 * d.head_dim : 0);
    return d.vocab * d.hidden * (d.tied ? 1 : 2) + d.hidden + d.layers * layer;
  }

  function parameters(d) {
    return plain_parameters(d) + d.layers * sum(linear_layers(d).map(([out, inp]) => out * inp));
  }

  function matrix_bytes(out, inp, layout) {
    const groups = out * (layout.group ? Math.ceil(inp / layout.group) : 1),
      bytes = bits => Math.ceil(bits / 8);
    return (
      bytes(out * inp * layout.bits) +
      bytes(groups * layout.scale_bits + out * layout.channel_bits) +
      bytes(groups * layout.zero_bits)
    );
  }

  function weight_bytes(d, layout) {
    return (
      2 * plain_parameters(d) +
      d.layers * sum(linear_layers(d).map(([out, inp]) => matrix_bytes(out, inp, layout)))
    );
  }

  function kv_bytes(d, each) {
    return 2 * d.layers * d.kv_heads * d.head_dim * each;
  } // `each`: bytes a number

  // infer.serve: an EAGLE-3 draft's weights in 16 bits, and its cache per token
  function draft_bytes(d, vocab, each, taps = 3) {
    const h = d.hidden,
      q = d.heads * d.head_dim,
      kv = d.kv_heads * d.head_dim;
    const weights =
      taps * h * h + 2 * h * (q + 2 * kv) + h * q + 3 * h * d.intermediate + 4 * h + vocab * h;
    return [2 * weights, 2 * d.kv_heads * d.head_dim * each];
  }

  // The tokens that memory holds: card in MiB, overhead in bytes; a draft's bytes as above, or none
  function budget(d, card, layout, each, overhead, utilization, draft = [0, 0]) {
    const size = card * 2 ** 20,
      reserve = size * (1 - utilization),
      weights = weight_bytes(d, layout),
      per_token = kv_bytes(d, each);
    const pool = size - reserve - overhead - weights - draft[0];
    return {
      card: size,
      reserve,
      weights,
      per_token,
      pool,
      tokens: Math.max(0, Math.floor(pool / (per_token + draft[1]))),
    };
  }

  // infer.acceptance and infer.speedup; counts are (accepted, judged) at each place
  function acceptance_of(counts) {
    return {
      places: counts.map(([a, n]) => (n ? a / n : null)),
      overall: sum(counts.map(c => c[0])) / sum(counts.map(c => c[1])),
    };
  }

  function tokens_a_round(acceptance) {
    let reached = 1;
    return 1 + sum(acceptance.map(a => (reached *= a)));
  }

  function speedup(tau, verify, draft, depth) {
    return tau / (verify + depth * draft);
  }

  function roofline(read, flops, [bandwidth, peak]) {
    return Math.max(read / (bandwidth * 1e9), flops / (peak * 1e12));
  }

  function target_seconds(d, rates, tokens, context, layout, each) {
    const table = d.tied ? 0 : 2 * d.vocab * d.hidden; // of the two tables only the output layer is read in whole
    const read = weight_bytes(d, layout) - table + kv_bytes(d, each) * (context + tokens);
    const flops =
      2 * tokens * (parameters(d) - table / 2) +
      4 * tokens * context * d.layers * d.heads * d.head_dim;
    return roofline(read, flops, rates);
  }

  function project(d, tau, depth, rates, vocab, context, layout, each) {
    const one = target_seconds(d, rates, 1, context, layout, each);
    const verify = target_seconds(d, rates, depth + 1, context, layout, each) / one;
    const [size, per_token] = draft_bytes(d, vocab, each);
    const draft = roofline(size + per_token * context, size, rates) / one;
    return { verify, draft, speedup: speedup(tau, verify, draft, depth), roof: 1 / one };
  }

  globalThis.m2kit = Object.assign(globalThis.m2kit ?? {}, {
    bounds_of_points,
    score_points,
    by_rule,
    quantile,
    length_reward,
    group_advantage,
    token_gain,
    policy_loss,
    parameters,
    weight_bytes,
    kv_bytes,
    draft_bytes,
    budget,
    acceptance_of,
    tokens_a_round,
    speedup,
    target_seconds,
    project,
  });
})();
