// The live pieces as forms: every control is a native input with a label, every answer stands in
// a region that is read out when it changes. A page says where a piece goes: <div
// class="m2-live" data-piece="length"></div>. Numbers come from pieces.js, and what they start
// from (a rubric, cards, layouts, models) from pieces_data.js, which the package writes.
(() => {
  "use strict";
  const k = globalThis.m2kit;
  let ids = 0;

  function el(tag, props = {}, ...children) {
    const e = document.createElement(tag);
    for (const [name, v] of Object.entries(props))
      name in e ? (e[name] = v) : e.setAttribute(name, v);
    e.append(...children.filter(c => c !== null));
    return e;
  }

  const svg = (tag, props) => {
    const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, v] of Object.entries(props)) e.setAttribute(name, v);
    return e;
  };
  const number = (x, digits = 3) =>
    x === null || Number.isNaN(x) ? "unknown" : (Object.is(x, -0) ? 0 : x).toFixed(digits);
  const whole = x => Math.round(x).toLocaleString("en");

  // Controls: each is {node, value()}
  function slider(label, min, max, step, value, show = x => x) {
    const id = `m2-${++ids}`,
      out = el("output", { htmlFor: id });
    const input = el("input", { id, type: "range", min, max, step, value });
    const told = () => {
      out.textContent = show(+input.value);
    };
    input.addEventListener("input", told);
    told();
    return {
      node: el("div", { className: "m2-control" }, el("label", { htmlFor: id }, label), input, out),
      value: () => +input.value,
    };
  }

  function choice(label, names, value) {
    const id = `m2-${++ids}`;
    const input = el(
      "select",
      { id },
      ...names.map(n => el("option", { value: n, selected: n === value }, n)),
    );
    return {
      node: el("div", { className: "m2-control" }, el("label", { htmlFor: id }, label), input),
      value: () => input.value,
    };
  }

  function tick(label, value = false) {
    const input = el("input", { type: "checkbox", checked: value });
    return {
      node: el("label", { className: "m2-tick" }, input, " ", label),
      value: () => input.checked,
      input,
    };
  }

  function table(caption, head, rows) {
    const cell = (tag, x, more = {}) => el(tag, more, x instanceof Node ? x : String(x));
    return el(
      "table",
      {},
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, ...head.map(h => cell("th", h, { scope: "col" })))),
      el(
        "tbody",
        {},
        ...rows.map(([first, ...rest]) =>
          el("tr", {}, cell("th", first, { scope: "row" }), ...rest.map(x => cell("td", x))),
        ),
      ),
    );
  }

  // A bar from the middle: to the right for what is positive
  function bar(x, most) {
    const share = Math.min(Math.abs(x) / most, 1) * 50;
    const style = `width:${share}%;margin-left:${x < 0 ? 50 - share : 50}%`;
    return el(
      "span",
      { className: "m2-bar", "aria-hidden": "true" },
      el("span", { className: x < 0 ? "m2-minus" : "m2-plus", style }),
    );
  }

  const line = text => el("p", { className: "m2-said" }, text);

  // The pieces: controls, and what they show
  function score() {
    const rows = k.data.rubric.map(c => {
      const met = tick("met", c.met),
        unknown = tick("unknown");
      unknown.input.addEventListener("input", () => {
        met.input.disabled = unknown.value();
      });
      const node = el(
        "fieldset",
        {},
        el("legend", {}, `${c.text} (${c.points > 0 ? "+" : ""}${c.points})`),
        met.node,
        unknown.node,
      );
      return { node, met: () => (unknown.value() ? null : met.value()) };
    });
    return {
      title: "Score a rubric",
      about:
        "Tick what a grader would say of one answer. A met item with negative points is harm done.",
      nodes: rows.map(r => r.node),
      show() {
        const s = k.by_rule(
          k.data.rubric.map(c => c.points),
          rows.map(r => r.met()),
        );
        return [
          table(
            "The same verdicts by each rule",
            ["rule", "score"],
            [
              ["reward: clipped at 0, unknown left out", number(s.reward)],
              ["one example of HealthBench: not clipped", number(s.example)],
              ["unknown counts as not met", number(s.unknown_is_false)],
              [
                "lowest and highest that the unknown allow",
                `${number(s.low)} to ${number(s.high)}`,
              ],
            ],
          ),
        ];
      },
    };
  }

  function length() {
    const start = [
      [0.9, 180],
      [0.8, 90],
      [0.7, 140],
      [0.3, 30],
    ];
    const scores = start.map(([s], i) =>
      slider(`answer ${i + 1}: score`, 0, 1, 0.01, s, x => x.toFixed(2)),
    );
    const lengths = start.map(([, n], i) => slider(`answer ${i + 1}: tokens`, 1, 400, 1, n));
    const coef = slider("coefficient", 0, 8, 0.1, 4),
      q = slider("quantile", 0, 1, 0.05, 0.2),
      thresh = slider("threshold", 0, 1, 0.05, 0.5);
    return {
      title: "The length gate",
      about:
        "A short answer earns a bonus only where it is good enough, in a group that is good enough (equation 3).",
      nodes: [
        ...scores.flatMap((s, i) => [s.node, lengths[i].node]),
        coef.node,
        q.node,
        thresh.node,
      ],
      show() {
        const s = scores.map(x => x.value()),
          n = lengths.map(x => x.value());
        const bonus = k.length_reward(s, n, coef.value(), q.value(), thresh.value()),
          p = k.quantile(s, q.value());
        const most = Math.max(...bonus, 1e-9),
          open = p > thresh.value();
        return [
          line(
            `The group's quantile is ${number(p)}: the gate is ${open ? "open" : "shut, nobody earns a bonus"}.`,
          ),
          table(
            "Bonuses",
            ["answer", "score", "tokens", "bonus", ""],
            bonus.map((b, i) => [i + 1, number(s[i], 2), n[i], number(b), bar(b, most)]),
          ),
        ];
      },
    };
  }

  function advantage() {
    const rewards = [0.9, 0.6, 0.5, 0.2].map((r, i) =>
      slider(`reward of answer ${i + 1}`, 0, 1, 0.01, r, x => x.toFixed(2)),
    );
    const scale = tick("divide by the group's deviation, as GRPO first did");
    return {
      title: "Group advantage",
      about: "An answer is pushed toward as far as it is better than its group (equation 2).",
      nodes: [...rewards.map(r => r.node), scale.node],
      show() {
        const r = rewards.map(x => x.value()),
          a = k.group_advantage(r, scale.value()),
          most = Math.max(...a.map(Math.abs), 1e-9);
        const equal = Math.max(...r) === Math.min(...r);
        return [
          line(
            equal
              ? "All answers earned the same: nothing is learned from this question."
              : "Better than the group's mean: more likely from now on. Worse: less.",
          ),
          table(
            "Advantages",
            ["answer", "reward", "advantage", ""],
            a.map((x, i) => [i + 1, number(r[i], 2), number(x), bar(x, most)]),
          ),
        ];
      },
    };
  }

  function curve(advantage, ratio, low, high) {
    // the token's term over the ratio, and where it stands
    const x = r => 20 + (r / 2) * 260,
      y = g => 80 - g * 35;
    const points = Array.from({ length: 101 }, (_, i) => i / 50).map(
      r => `${x(r)},${y(k.token_gain(r, advantage, low, high).gain)}`,
    );
    const at = k.token_gain(ratio, advantage, low, high);
    const picture = svg("svg", {
      viewBox: "0 0 300 160",
      class: "m2-curve",
      role: "img",
      "aria-label": `The token's term over the ratio; at ${number(ratio, 2)} it is ${number(at.gain, 2)}`,
    });
    picture.append(
      svg("line", { x1: 20, x2: 280, y1: 80, y2: 80, class: "m2-axis" }),
      svg("line", { x1: x(1), x2: x(1), y1: 5, y2: 155, class: "m2-axis" }),
      svg("polyline", { points: points.join(" "), class: "m2-line" }),
      svg("circle", { cx: x(ratio), cy: y(at.gain), r: 5, class: "m2-dot" }),
    );
    return picture;
  }

  function clip() {
    const ratio = slider("ratio, new probability over old", 0, 2, 0.01, 1.4, x => x.toFixed(2));
    const a = slider("advantage", -1, 1, 0.05, 0.5),
      low = slider("epsilon below", 0, 0.9, 0.01, 0.2),
      high = slider("epsilon above", 0, 0.9, 0.01, 0.28);
    return {
      title: "The clip",
      about:
        "Beyond the clip a token's gradient is zero: it has moved far enough for this update. Across: the ratio, 0 to 2; up: the token's term.",
      nodes: [ratio, a, low, high].map(c => c.node),
      show() {
        const { gain, binds } = k.token_gain(ratio.value(), a.value(), low.value(), high.value());
        return [
          line(
            `The term is ${number(gain)}; the clip ${binds ? "binds, and this token learns nothing" : "does not bind"}.`,
          ),
          curve(a.value(), ratio.value(), low.value(), high.value()),
        ];
      },
    };
  }

  function stack(parts, total) {
    // where a card's bytes go
    return el(
      "div",
      { className: "m2-stack", "aria-hidden": "true" },
      ...parts.map(([name, bytes]) =>
        el("span", {
          className: `m2-part m2-${name}`,
          style: `width:${(Math.max(0, bytes) / total) * 100}%`,
        }),
      ),
    );
  }

  function card() {
    const d = k.data,
      pick = (label, of, value) => choice(label, Object.keys(of), value);
    const model = pick("model", d.models, "Baichuan-M2-32B"),
      on = pick("card", d.cards, "RTX 4090"),
      layout = pick("weights", d.layouts, "W4A16");
    const kv = pick("cache", d.kv, "BF16"),
      use = slider("share of the card that the engine may use", 0.5, 1, 0.01, 0.9, x =>
        x.toFixed(2),
      );
    const draft = tick("with an EAGLE-3 draft");
    return {
      title: "What fits on a card",
      about: "The longest input and output of a single request, counted byte by byte.",
      nodes: [model, on, layout, kv, use, draft].map(c => c.node),
      show() {
        const sizes = d.models[model.value()],
          each = d.kv[kv.value()];
        const extra = draft.value() ? k.draft_bytes(sizes, d.draft_vocab, each) : [0, 0];
        const b = k.budget(
          sizes,
          d.cards[on.value()],
          d.layouts[layout.value()],
          each,
          d.overhead,
          use.value(),
          extra,
        );
        const parts = [
          ["weights", b.weights],
          ["draft", extra[0]],
          ["engine", b.reserve + d.overhead],
          ["pool", b.pool],
        ];
        const gib = x => `${number(x / 2 ** 30, 2)} GiB`;
        return [
          line(b.tokens ? `${whole(b.tokens)} tokens fit.` : "The weights do not fit."),
          stack(parts, b.card),
          table(
            `${gib(b.card)} in all`,
            ["part", "size"],
            [
              ["weights", gib(b.weights)],
              ["draft", gib(extra[0])],
              ["engine and reserve", gib(b.reserve + d.overhead)],
              ["cache", b.pool > 0 ? gib(b.pool) : "none"],
              ["cache a token", `${whole(b.per_token + extra[1])} bytes`],
            ],
          ),
        ];
      },
    };
  }

  function speed() {
    const d = k.data,
      depth = slider("guesses a round", 1, 6, 1, 3);
    const places = [80, 70, 60, 50, 45, 40].map((p, i) =>
      slider(`accepted at place ${i + 1}, of 100 judged`, 0, 100, 1, p),
    );
    const verify = slider("cost of checking, in passes over one token", 1, 4, 0.05, 1.2, x =>
      x.toFixed(2),
    );
    const draft = slider("cost of a guess, in the same unit", 0, 1, 0.01, 0.1, x => x.toFixed(2));
    const on = choice(
      "projected for Baichuan-M2-32B in W4A16 on",
      Object.keys(d.rates),
      "RTX 4090",
    );
    return {
      title: "Acceptance and speed-up",
      about: "A draft guesses ahead; the target checks all guesses in one pass.",
      nodes: [depth, ...places, verify, draft, on].map(c => c.node),
      show() {
        const n = depth.value();
        places.forEach((p, i) => {
          p.node.hidden = i >= n;
        });
        const { places: shares, overall } = k.acceptance_of(
            places.slice(0, n).map(p => [p.value(), 100]),
          ),
          tau = k.tokens_a_round(shares);
        const s = k.speedup(tau, verify.value(), draft.value(), n);
        const there = k.project(
          d.models["Baichuan-M2-32B"],
          tau,
          n,
          d.rates[on.value()],
          d.draft_vocab,
          4096,
          d.layouts.W4A16,
          d.kv.BF16,
        );
        return [
          line(
            `${number(tau, 2)} tokens a round: ${number(s, 2)} times the speed, ${s < 1 ? "slower than without a draft" : "faster"}.`,
          ),
          table(
            "In numbers",
            ["what", "value"],
            [
              ["accepted overall", number(overall, 2)],
              ["tokens a round", number(tau, 2)],
              ["speed-up with your costs", number(s, 2)],
              [`checking on the card`, number(there.verify, 2)],
              ["a guess on the card", number(there.draft, 2)],
              ["speed-up at the card's peak rates", number(there.speedup, 2)],
            ],
          ),
        ];
      },
    };
  }

  const PIECES = { score, length, advantage, clip, card, speed };

  function mount(root) {
    const { title, about, nodes, show } = PIECES[root.dataset.piece](),
      id = `m2-${++ids}`;
    const out = el("div", { className: "m2-out", role: "status" });
    const form = el("form", {}, ...nodes),
      draw = () => out.replaceChildren(...show());
    form.addEventListener("input", draw);
    form.addEventListener("submit", e => e.preventDefault());
    root.setAttribute("role", "region");
    root.setAttribute("aria-labelledby", id);
    root.replaceChildren(
      el("p", { id, className: "m2-live-title" }, title),
      el("p", {}, about),
      form,
      out,
    );
    draw();
  }

  document.querySelectorAll(".m2-live[data-piece]").forEach(mount);
})();
