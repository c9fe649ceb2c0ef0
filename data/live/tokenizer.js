// Reads tokenizer.json (a byte-level BPE with added tokens) and spells dialogues as lm.spell does:
// only the chat template writes control tokens, whatever people say.
(() => {
  "use strict";
  const k = globalThis.m2kit;

  // The 256 letters that stand for bytes: printable ones for themselves, the others from U+0100 on
  const LETTERS = (() => {
    const own = b => (b > 32 && b < 127) || (b > 160 && b < 256 && b !== 173);
    let next = 256;
    return Array.from({ length: 256 }, (_, b) => String.fromCharCode(own(b) ? b : next++));
  })();
  const BYTES = new Map(LETTERS.map((c, b) => [c, b]));
  const S = "\\p{White_Space}";
  const WORDS = new RegExp(
    `'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${S}\\p{L}\\p{N}]+|${S}+(?![^${S}])|${S}+`,
    "gu",
  );
  const STAND_IN = 0xf0000; // private use: in the place of what must not command

  const escaped = text => text.replace(/[.*+?^${}()|[\]\\\/]/g, "\\$&");
  const any_of = texts => {
    const longest_first = [...texts].sort((a, b) => [...b].length - [...a].length);
    return new RegExp(`(${longest_first.map(escaped).join("|") || "(?!)"})`, "u");
  };

  class Tokenizer {
    constructor(spec) {
      const added = spec.added_tokens,
        whole = new RegExp(`^(?:${k.pattern("spell._BRACKETS").source})$`, "u");
      this.vocab = new Map(Object.entries(spec.model.vocab));
      this.rank = new Map(spec.model.merges.map((m, i) => [Array.isArray(m) ? m.join(" ") : m, i]));
      this.texts = new Map([...this.vocab].map(([t, i]) => [i, t]));
      for (const t of added) this.texts.set(t.id, t.content);
      this.special = new Set(added.filter(t => t.special).map(t => t.id));
      this.control = new Map(
        added.filter(t => t.special || whole.test(t.content)).map(t => [t.content, t.id]),
      );
      const long = t => [...t.content].length > k.kit.LONG;
      this.blocks = added.filter(long).map(t => t.content);
      const free = added.filter(t => !this.control.has(t.content));
      this.ids = new Map(free.map(t => [t.content, t.id]));
      this.plain = any_of(free.map(t => t.content)); // all but control tokens
      this.bare = any_of(free.filter(t => !long(t)).map(t => t.content)); // and without instructions
      this.block = any_of(this.blocks);
      this.stand_ins = this.control.size + this.blocks.length;
      this.words = new Map();
      this.pieces = new Map();
    }

    // The ids of a word, by the merges that were learned first
    bpe(word) {
      if (this.words.has(word)) return this.words.get(word);
      let parts = [...new TextEncoder().encode(word)].map(b => LETTERS[b]);
      for (;;) {
        const ranks = parts.slice(1).map((p, i) => this.rank.get(`${parts[i]} ${p}`) ?? Infinity);
        const i = ranks.indexOf(Math.min(...ranks));
        if (i < 0 || ranks[i] === Infinity) break;
        parts.splice(i, 2, parts[i] + parts[i + 1]);
      }
      const ids = parts.map(p => this.vocab.get(p));
      this.words.set(word, ids);
      return ids;
    }

    encode(text, added) {
      return text
        .split(added)
        .flatMap((part, i) =>
          i % 2 ? [this.ids.get(part)] : (part.match(WORDS) ?? []).flatMap(w => this.bpe(w)),
        );
    }

    // What stands in a message; a block of instruction is one token in a system message alone
    content(role, text) {
      const safe = [...text]
        .map(c => {
          const n = c.codePointAt(0) - STAND_IN;
          return n >= 0 && n < this.stand_ins ? "\ufffd" : c;
        })
        .join("");
      if (role === "system") return this.encode(safe, this.plain);
      return safe
        .split(this.block)
        .flatMap((p, i) => this.encode(p, i % 2 ? this.bare : this.plain));
    }

    piece(role, text) {
      const key = `${role} ${text}`;
      if (this.pieces.size > 10_000) this.pieces.clear();
      if (!this.pieces.has(key)) this.pieces.set(key, this.content(role, text));
      return this.pieces.get(key);
    }

    // tiny.model.CHAT_TEMPLATE: <|role|>content<|end|>, and <|assistant|> for the answer
    spell(messages) {
      const mark = t => this.control.get(`<|${t}|>`);
      const one = m => [mark(m.role), ...this.piece(m.role, m.content), mark("end")];
      return [...messages.flatMap(one), mark("assistant")];
    }

    decode(ids) {
      const texts = ids.filter(i => !this.special.has(i)).map(i => this.texts.get(i));
      const bytes = texts.flatMap(t =>
        [...t].every(c => BYTES.has(c))
          ? [...t].map(c => BYTES.get(c))
          : [...new TextEncoder().encode(t)],
      );
      return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
    }
  }

  globalThis.m2kit = Object.assign(k, { Tokenizer });
})();
