// What Python does and JavaScript does otherwise: white space, case, the printing of texts, lenient
// JSON, hashes and random numbers. The units below read and write as the package's do, to the letter.
(() => {
  "use strict";
  const data = () => globalThis.m2kit.kit; // prompts, patterns and tables, written by the package

  // A pattern of the package, as `js_pattern` wrote it; `more` adds the flags "g" or "y"
  const compiled = new Map();
  function pattern(name, more = "") {
    const key = name + more;
    if (!compiled.has(key)) {
      const [source, flags] = data().patterns[name];
      compiled.set(key, new RegExp(source, flags + more));
    }
    const found = compiled.get(key);
    found.lastIndex = 0;
    return found;
  }

  // str.split() and str.strip(): U+FEFF is no space, U+001C to U+001F and U+0085 are
  const SPACE =
    "\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
  const ENDS = new RegExp(`^[${SPACE}]+|[${SPACE}]+$`, "g");
  const strip = text => text.replace(ENDS, "");
  const split = text => text.split(new RegExp(`[${SPACE}]+`)).filter(Boolean);

  function strip_of(text, chars) {
    const all = [...text];
    while (all.length && chars.includes(all[0])) all.shift();
    while (all.length && chars.includes(all.at(-1))) all.pop();
    return all.join("");
  }

  const first = (text, n) => [...text].slice(0, n).join(""); // text[:n]: whole characters
  const is_ascii = text => /^[\x00-\x7f]*$/.test(text);
  const has_word = text => /[\p{L}\p{N}_]/u.test(text);

  // str.casefold(), character by character; the table holds where it is not lower case
  const casefold = text => [...text].map(c => data().casefold[c] ?? c.toLowerCase()).join("");

  function repr(text) {
    const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
    const hex = (c, n) => c.codePointAt(0).toString(16).padStart(n, "0");
    const named = { "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\", [quote]: `\\${quote}` };
    const one = c => {
      if (named[c]) return named[c];
      if (c === " " || !/[\p{C}\p{Z}]/u.test(c)) return c;
      if (c < "\u0100") return `\\x${hex(c, 2)}`;
      return c.length === 1 ? `\\u${hex(c, 4)}` : `\\U${hex(c, 8)}`;
    };
    return quote + [...text].map(one).join("") + quote;
  }

  // JSON as Python's decoder reads it with strict=False: an object is the list of its pairs, a number
  // remembers how Python prints it
  class Pairs extends Array {}
  class Num {
    constructor(text) {
      this.text = /^-?\d+$/.test(text) ? text.replace(/^-0$/, "0") : this.float(+text);
    }
    float(x) {
      if (!Number.isFinite(x)) return Number.isNaN(x) ? "nan" : x > 0 ? "inf" : "-inf";
      const text = String(x).replace(/e([+-])(\d)$/, "e$10$2");
      return /[.e]/.test(text) ? text : `${text}.0`;
    }
  }

  function str(x) {
    if (typeof x === "string") return x;
    if (x === null) return "None";
    if (typeof x === "boolean") return x ? "True" : "False";
    if (x instanceof Num) return x.text;
    const inner = y => (typeof y === "string" ? repr(y) : str(y));
    if (x instanceof Pairs) return `[${x.map(([k, v]) => `(${repr(k)}, ${inner(v)})`).join(", ")}]`;
    return `[${[...x].map(inner).join(", ")}]`;
  }

  const NUMBER = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?/y;
  const WORDS = [
    ["null", null],
    ["true", true],
    ["false", false],
  ];
  const ODD = ["NaN", "Infinity", "-Infinity"];

  class Reader {
    constructor(text, at) {
      Object.assign(this, { text, at });
    }
    fail() {
      throw new SyntaxError(`no JSON at ${this.at}`);
    }
    space() {
      while (" \t\n\r".includes(this.text[this.at] ?? "x")) this.at++;
    }
    next(c) {
      if (this.text[this.at] !== c) this.fail();
      this.at++;
    }
    string() {
      const close = /"((?:\\[^]|[^"\\])*)"/y;
      close.lastIndex = this.at;
      const found = close.exec(this.text) ?? this.fail();
      this.at = close.lastIndex;
      return JSON.parse(
        `"${found[1].replace(/[\x00-\x1f]/g, c => `\\u00${c.charCodeAt(0) < 16 ? 0 : ""}${c.charCodeAt(0).toString(16)}`)}"`,
      );
    }
    list(close, out, one) {
      this.at++;
      this.space();
      if (this.text[this.at] === close) return (this.at++, out);
      for (;;) {
        out.push(one());
        this.space();
        if (this.text[this.at] === close) return (this.at++, out);
        this.next(",");
        this.space();
      }
    }
    pair() {
      const key = this.text[this.at] === '"' ? this.string() : this.fail();
      this.space();
      this.next(":");
      this.space();
      return [key, this.value()];
    }
    value() {
      const c = this.text[this.at];
      if (c === "{") return this.list("}", new Pairs(), () => this.pair());
      if (c === "[") return this.list("]", [], () => this.value());
      if (c === '"') return this.string();
      for (const [word, x] of WORDS)
        if (this.text.startsWith(word, this.at)) return ((this.at += word.length), x);
      NUMBER.lastIndex = this.at;
      const word = NUMBER.exec(this.text)?.[0] ?? ODD.find(w => this.text.startsWith(w, this.at));
      this.at += word ? word.length : this.fail();
      return new Num(word);
    }
  }

  // lm.reply: almost-JSON is mended token by token
  function escapes(text) {
    return text.replace(pattern("reply._ESCAPE", "g"), (all, c) => {
      if (c.length > 1 || '"\\/bfnrt'.includes(c)) return all;
      return c === "'" ? "'" : `\\${all}`;
    });
  }

  function as_json(token) {
    const inside = token.slice(1, -1);
    if (token[0] === "'") return `"${escapes(inside).replace(/(?<!\\)"/g, '\\"')}"`;
    if (token[0] === '"') return `"${escapes(inside)}"`;
    if (token[0] === "“") return JSON.stringify(inside);
    if (/[A-Za-z_]/.test(token[0]))
      return (
        { true: "true", false: "false", null: "null", none: "null" }[token.toLowerCase()] ??
        JSON.stringify(token)
      );
    return token;
  }

  const DEPTH = { "{": 1, "[": 1, "}": -1, "]": -1 };

  function mend(text, pos, late) {
    const out = [],
      doubtful = [];
    let depth = 0;
    const at = (name, i) => {
      const p = pattern(name, "y");
      p.lastIndex = i;
      return p.exec(text);
    };
    for (;;) {
      const value = late && out.at(-1) === ":" ? at("reply._VALUE", pos) : null;
      const m = value ?? at("reply._TOKEN", pos);
      if (!m) return [null, pos, doubtful];
      let token = m[0];
      pos += token.length;
      if (!strip(token)) continue;
      if (value && m[1].replace(/\\[^]/g, "").includes('"')) {
        doubtful.push(m[1]);
        token = JSON.stringify(m[1]);
      }
      if ("}]".includes(token) && out.at(-1) === ",") out.pop();
      out.push(as_json(token));
      depth += DEPTH[token] ?? 0;
      if (!depth) return [out.join(" "), pos, doubtful];
    }
  }

  function decode(text) {
    const r = new Reader(text, 0);
    r.space();
    const x = r.value();
    r.space();
    return r.at < text.length ? r.fail() : x;
  }

  function object(text, start, late) {
    try {
      const r = new Reader(text, start);
      return [r.value(), r.at, []];
    } catch {
      /* then it is mended */
    }
    let first_end;
    for (const how of late ? [false, true] : [false]) {
      const [mended, end, doubtful] = mend(text, start, how);
      try {
        if (mended) return [decode(mended), end, doubtful];
      } catch {
        /* not even so */
      }
      first_end ??= end;
    }
    return [null, first_end, []];
  }

  function json_objects(text) {
    const found = [];
    let pos = 0,
      tries = [...text].length <= 20000 ? 5 : 0;
    for (let start; (start = text.indexOf("{", pos)) >= 0;) {
      const [x, end] = object(text, start, tries > 0);
      pos = end;
      if (x === null) tries--;
      else found.push(x);
    }
    return found;
  }

  function json_fields(objects) {
    const out = [],
      stack = [...objects].reverse();
    const key = k =>
      strip_of(
        strip(k)
          .toLowerCase()
          .replace(/[^\p{L}\p{N}_]+/gu, "_"),
        "_",
      );
    while (stack.length) {
      const x = stack.pop();
      if (x instanceof Pairs) {
        out.push(...[...x].map(([k, v]) => [key(k), v]));
        stack.push(...[...x].map(p => p[1]).reverse());
      } else if (Array.isArray(x)) stack.push(...[...x].reverse());
    }
    return out;
  }

  // hashlib.sha256, of a text
  function constants(n, root) {
    const primes = [];
    for (let i = 2; primes.length < n; i++) if (primes.every(p => i % p)) primes.push(i);
    return primes.map(p => ((p ** (1 / root) % 1) * 2 ** 32) >>> 0);
  }
  const K = constants(64, 3),
    H = constants(8, 2);

  function compress(h, w) {
    const rotate = (x, n) => (x >>> n) | (x << (32 - n));
    for (let i = 16; i < 64; i++) {
      const a = w[i - 15],
        b = w[i - 2];
      w[i] =
        w[i - 16] +
        (rotate(a, 7) ^ rotate(a, 18) ^ (a >>> 3)) +
        w[i - 7] +
        (rotate(b, 17) ^ rotate(b, 19) ^ (b >>> 10));
    }
    let [a, b, c, d, e, f, g, k] = h;
    for (let i = 0; i < 64; i++) {
      const s = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      const t = (k + s + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0;
      const u =
        ((rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [a, b, c, d, e, f, g, k] = [(t + u) | 0, a, b, c, (d + t) | 0, e, f, g];
    }
    return [a, b, c, d, e, f, g, k].map((x, i) => (x + h[i]) | 0);
  }

  function sha256(text) {
    const bytes = new TextEncoder().encode(text),
      n = ((bytes.length + 8) >> 6) + 1;
    const block = new DataView(new ArrayBuffer(n * 64));
    new Uint8Array(block.buffer).set([...bytes, 128]);
    block.setUint32(n * 64 - 4, bytes.length * 8);
    let h = H;
    for (let at = 0; at < n * 64; at += 64) {
      const w = new Int32Array(64);
      for (let i = 0; i < 16; i++) w[i] = block.getInt32(at + 4 * i);
      h = compress(h, w);
    }
    return h.map(x => (x >>> 0).toString(16).padStart(8, "0")).join("");
  }

  // lm.chat.answer_seed: the seed of one answer, from json.dumps of what was asked
  function answer_seed(messages, seed, sample) {
    const quoted = m => `{"content": ${JSON.stringify(m.content)}, "role": "${m.role}"}`;
    const text = `[[${messages.map(quoted).join(", ")}], ${seed}, ${sample}]`;
    return parseInt(sha256(text).slice(0, 8), 16) % 2 ** 31;
  }

  // random.Random(seed).random(), for seeds below 2**32: the Mersenne Twister
  class Random {
    constructor(seed) {
      const mt = (this.mt = new Uint32Array(624));
      mt[0] = 19650218;
      const mix = (i, by) => Math.imul(mt[i - 1] ^ (mt[i - 1] >>> 30), by);
      for (let i = 1; i < 624; i++) mt[i] = mix(i, 1812433253) + i;
      let i = 1;
      const step = () => {
        if (++i < 624) return;
        mt[0] = mt[623];
        i = 1;
      };
      for (let k = 0; k < 624; k++) {
        mt[i] = (mt[i] ^ mix(i, 1664525)) + seed;
        step();
      }
      for (let k = 0; k < 623; k++) {
        mt[i] = (mt[i] ^ mix(i, 1566083941)) - i;
        step();
      }
      mt[0] = 0x80000000;
      this.at = 624;
    }
    twist() {
      const mt = this.mt;
      for (let k = 0; k < 624; k++) {
        const y = (mt[k] & 0x80000000) | (mt[(k + 1) % 624] & 0x7fffffff);
        mt[k] = mt[(k + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.at = 0;
    }
    word() {
      if (this.at === 624) this.twist();
      let y = this.mt[this.at++];
      y ^= y >>> 11;
      y ^= (y << 7) & 0x9d2c5680;
      y ^= (y << 15) & 0xefc60000;
      return (y ^ (y >>> 18)) >>> 0;
    }
    random() {
      const a = this.word() >>> 5,
        b = this.word() >>> 6;
      return (a * 67108864 + b) / 9007199254740992;
    }
  }

  const randoms = (seed, n) => {
    const r = new Random(seed);
    return Array.from({ length: n }, () => r.random());
  };

  globalThis.m2kit = Object.assign(globalThis.m2kit ?? {}, {
    pattern,
    strip,
    split,
    strip_of,
    first,
    is_ascii,
    has_word,
    casefold,
    repr,
    str,
    Pairs,
    Reader,
    json_objects,
    json_fields,
    sha256,
    answer_seed,
    Random,
    randoms,
  });
})();
