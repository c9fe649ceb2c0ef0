// Gate, patient and checker as the package's simulator has them: the same prompts, the same reading
// of replies, the same decisions, turn for turn. Messages: "user" is the patient, "assistant" the doctor.
(() => {
  "use strict";
  const k = globalThis.m2kit;
  const { pattern, strip, split, first, has_word, casefold, repr, str } = k;
  const message = (role, content) => ({ role, content });
  const trouble = (unit, kind, detail, done) => ({ unit, kind, detail, done });

  // lm.chat: the reasoning parted from the answer; marks inside of JSON objects do not count
  function spans(text) {
    const out = [],
      open = pattern("chat._OBJECT", "g");
    for (let i = 0, m; i < 100 && (m = open.exec(text)); i++) {
      try {
        const r = new k.Reader(text, m.index);
        r.value();
        out.push([m.index, r.at]);
        open.lastIndex = r.at;
      } catch {
        open.lastIndex = m.index + 1;
      }
    }
    return out;
  }

  function part_thinking(text) {
    const inside = text.includes("{") ? spans(text) : [];
    const marks = [...text.matchAll(pattern("chat._MARK", "g"))].filter(
      m => !inside.some(([a, b]) => a < m.index && m.index < b),
    );
    const closing = Object.values(k.kit.THINK_MARKS);
    const last = marks.findLast(m => closing.includes(m[0]));
    if (marks.some(m => !last || m.index > last.index)) return [strip(text), null];
    if (!last) return [null, text];
    const thought = strip(text.slice(0, last.index)),
      head = pattern("chat._MARK", "y").exec(thought);
    return [
      strip(thought.slice(head?.[0].length ?? 0)),
      strip(text.slice(last.index + last[0].length)),
    ];
  }

  // lm.local: one answer. Control characters and invisible ones do not get out of it
  function ask({ model, tokenizer }, messages, sampling, sample = 0) {
    const prompt = tokenizer.spell(messages),
      room = model.config.max_position_embeddings;
    if (prompt.length + sampling.max_tokens > room)
      return {
        text: "",
        finish: "error",
        error: no_room(model, prompt.length, sampling.max_tokens, room),
      };
    const seed = sampling.temperature ? k.answer_seed(messages, sampling.seed, sample) : 0;
    const ids = model.generate(prompt, sampling, seed);
    const [thinking, answer] = part_thinking(tokenizer.decode(ids));
    const ended = ids.at(-1) === model.config.eos_token_id && answer !== null;
    const text = (answer ?? "").replace(pattern("calls._UNSPOKEN", "g"), "");
    return { text, thinking, finish: ended ? "stop" : "length" };
  }

  function no_room(model, n, most, room) {
    const short = `Sampling(max_tokens=${room - n}) or less, or a shorter dialogue`;
    return (
      `${n} prompt tokens and max_tokens=${most} exceed the ${room} positions of ${model.name}; ` +
      (n < room ? short : "shorten the dialogue")
    );
  }

  // lm.reply.read_object: the pairs in a unit's reply, and what is wrong with it
  function read_object(c) {
    if (c.finish === "error") return [[], `no reply: ${c.error}`];
    if (c.finish === "length")
      return [[], c.thinking && !c.text ? "unfinished thinking" : "cut at max_tokens"];
    if (!strip(c.text)) return [[], "empty reply"];
    const objects = k.json_objects(c.text);
    return [
      k.json_fields(objects),
      objects.length ? "" : `no readable JSON: ${repr(first(strip(c.text), 60))}`,
    ];
  }

  // simulator.gate
  const line = text => split(text).join(" ") || "...";
  const normal = text => (casefold(text).match(/[\p{L}\p{N}_]+/gu) ?? []).join(" ");

  function gate_messages(dialogue) {
    const before = dialogue.length > 1 ? line(dialogue.at(-2).content) : "...";
    const asked = `Patient: ${before}\nDoctor: ${line(dialogue.at(-1).content)}`;
    return [message("system", k.kit.gate.block), message("user", asked)];
  }

  const decision = (stop = false, trigger = "", fault = null) => ({ stop, trigger, fault });

  function read_gate(completion) {
    let [pairs, fault] = read_object(completion);
    const named = pairs
      .filter(([key]) => key === "trigger")
      .map(([, v]) => strip(str(or(v, "none"))).toLowerCase());
    const said = [...new Set(named)],
      known = [...k.kit.gate.triggers, "none"];
    if (!fault && !said.length) fault = "no field trigger";
    if (!fault && said.length > 1) fault = `contradiction: ${said.sort().join(", ")}`;
    if (!fault && !known.includes(said[0]))
      fault = `no trigger is named ${repr(first(said[0], 40))}`;
    if (fault) return decision(false, "", fault);
    return said[0] === "none" ? decision() : decision(true, said[0]);
  }

  const or = (v, other) =>
    v === null ||
    v === false ||
    v === "" ||
    (Array.isArray(v) && !v.length) ||
    /^-?0(\.0)?$/.test(v.text)
      ? other
      : v;

  function gate(watcher, dialogue, calls) {
    const { max_turns, repeats, sampling } = k.kit.gate;
    const turns = dialogue.filter(m => m.role === "assistant").map(m => m.content);
    const same = turns
      .slice(-2 * repeats)
      .map(normal)
      .filter(t => t === normal(turns.at(-1)));
    if (same.length >= repeats) return decision(true, "repetition");
    calls.gate = (calls.gate ?? 0) + 1;
    const d = read_gate(ask(watcher, gate_messages(dialogue), sampling));
    return !d.stop && turns.length >= max_turns ? decision(true, "budget", d.fault) : d;
  }

  // simulator.affect: what a patient may say
  const sentences = text => text.split(pattern("affect._END")).map(strip).filter(Boolean);

  function letters(c) {
    // of which script; the table holds runs of letters
    const n = c.codePointAt(0),
      runs = k.kit.letters;
    let low = 0,
      high = runs.length;
    while (low < high) {
      const mid = (low + high) >> 1;
      if (runs[mid][0] <= n) low = mid + 1;
      else high = mid;
    }
    const run = runs[low - 1];
    return run && n < run[0] + run[1] ? run[2] : null;
  }

  function writing(text) {
    const found = new Map();
    for (const c of text) {
      const name = letters(c);
      if (name) found.set(name, (found.get(name) ?? 0) + 1);
    }
    return found;
  }

  function foreign(text, doctor) {
    const w = writing(text),
      known = writing(doctor);
    const strange = [...w].filter(([name]) => !known.has(name));
    const total = xs => xs.reduce((a, [, n]) => a + n, 0);
    if (!known.size || 2 * total(strange) <= total([...w])) return null;
    const most = strange.reduce((a, b) => (b[1] > a[1] ? b : a));
    return [`written in ${most[0].toLowerCase()} letters`, ""];
  }

  function json(text) {
    let bare = strip(text);
    if (bare.startsWith("```json")) bare = bare.slice(7);
    bare = k.strip_of(bare, "` \n");
    let other = bare === "null";
    if (bare.startsWith("["))
      try {
        const r = new k.Reader(bare, 0);
        r.value();
        r.space();
        other = r.at === bare.length;
      } catch {
        /* no list */
      }
    if (!other && !(bare.startsWith("{") && k.json_objects(bare).length)) return null;
    return [`JSON instead of speech: ${repr(first(strip(text), 40))}`, ""];
  }

  function marker(text) {
    const own = pattern("affect._TAG").exec(text),
      from = own ? own[0].length : 0;
    const search = pattern("affect._MARK", "g");
    search.lastIndex = from;
    const m = search.exec(text);
    if (!own && !m) return null;
    return [
      `the mark ${repr(strip((m ?? own)[0]))}`,
      strip(text.slice(from, m ? m.index : undefined)),
    ];
  }

  function as_doctor(text, doctor) {
    const said = normal(text),
      words = normal(doctor),
      all = sentences(text);
    if (split(words).length >= 4 && said === words) return ["the doctor's own words", ""];
    const kept = all.filter(s => !pattern("affect._AS_DOCTOR").test(s));
    if (kept.length === all.length) return null;
    return [
      `speaks as the doctor: ${repr(pattern("affect._AS_DOCTOR").exec(text)[0])}`,
      kept.join(" "),
    ];
  }

  function first_words(text, most) {
    let kept = "";
    for (const s of sentences(text)) {
      if (split(`${kept} ${s}`).length > most) break;
      kept = strip(`${kept} ${s}`);
    }
    return kept;
  }

  function length(text, cut, most) {
    const found = [];
    if (cut) {
      const whole = sentences(text),
        ends = /[.!?…。！？]["'”)]*$/.test(strip(text));
      text = (ends ? whole : whole.slice(0, -1)).join(" ");
      found.push(["cut", "cut at max_tokens", text]);
    }
    const n = split(text).length;
    if (n > most) found.push(["long", `${n} words, ${most} allowed`, first_words(text, most)]);
    return found;
  }

  function hear(completion, doctor) {
    const { END, max_words } = k.kit.affect,
      faults = [];
    if (completion.finish === "error") return { text: "", faults: [["error", completion.error]] };
    let text = completion.text;
    if (text.includes(END)) {
      text = text.replaceAll(END, " ");
      faults.push(["end", `wrote ${END}`]);
    }
    const last = doctor.slice(doctor.lastIndexOf("\n") + 1),
      rules = { json, marker, doctor: as_doctor, script: foreign };
    for (const [kind, rule] of Object.entries(rules)) {
      const found = rule(text, kind === "script" ? doctor : last);
      if (!found) continue;
      faults.push([kind, found[0]]);
      text = found[1];
    }
    for (const [kind, detail, rest] of length(text, completion.finish === "length", max_words)) {
      faults.push([kind, detail]);
      text = rest;
    }
    if (!has_word(text)) text = "";
    const said = strip(completion.text);
    if (!text && !faults.length)
      faults.push([
        "empty",
        said ? `no word in ${repr(first(said, 30))}` : "the model wrote nothing",
      ]);
    return { text: split(text).join(" "), faults };
  }

  function affect_messages(script, dialogue) {
    const flip = { user: "assistant", assistant: "user" };
    const talk = dialogue.map(m => message(flip[m.role], m.content));
    if (!talk.length || talk[0].role === "assistant")
      talk.unshift(message("user", k.kit.affect.GREETING));
    return [message("system", `${k.kit.affect.block}\n\n${script.text}`), ...talk];
  }

  function draft(patient, script, dialogue, attempt, sample, calls) {
    const { sampling, redraws, STRIDE } = k.kit.affect,
      tries = [];
    const heard = dialogue.filter(m => m.role === "assistant").map(m => split(m.content).join(" "));
    const doctor = heard.join("\n") || k.kit.affect.GREETING;
    const messages = affect_messages(script, dialogue);
    for (let i = 0; i <= redraws; i++) {
      const warm = { ...sampling, temperature: Math.max(sampling.temperature, 0.7) };
      calls.affect = (calls.affect ?? 0) + 1;
      const c = ask(
        patient,
        messages,
        i || attempt ? warm : sampling,
        sample * STRIDE + attempt * (redraws + 1) + i,
      );
      tries.push(hear(c, doctor));
      if (!tries.at(-1).faults.length) break;
    }
    const rest = h => (h.text ? "the rest is said" : "nothing is left to say");
    const done = (h, i) => (i < tries.length - 1 ? "drawn again" : rest(h));
    const troubles = tries.flatMap((h, i) =>
      h.faults.map(([kind, detail]) => trouble("affect", kind, detail, done(h, i))),
    );
    return { text: tries.at(-1).text, troubles };
  }

  // simulator.facts
  function check_messages(script, question, some) {
    const listed = some.map((s, i) => `[${i + 1}] ${line(s)}`).join("\n");
    const asked = `Doctor: ${line(question)}\nReply:\n${listed}`;
    return [message("system", `${k.kit.facts.block}\n\n${script.facts}`), message("user", asked)];
  }

  function fault(item, some) {
    const d =
      item instanceof k.Pairs
        ? new Map([...item].map(([key, v]) => [strip(key).toLowerCase(), v]))
        : new Map();
    const kind = strip(str(d.get("kind") ?? (d.has("kind") ? null : ""))).toLowerCase();
    const number = k.strip_of(str(d.get("sentence") ?? (d.has("sentence") ? null : "")), "[]. ");
    if (!k.kit.facts.kinds.includes(kind))
      return `no kind of fault is named ${repr(first(kind, 30))}`;
    if (!/^[0-9]+$/.test(number) || +number < 1 || +number > some.length)
      return `there is no sentence ${repr(first(number, 20))} among ${some.length}`;
    return { kind, span: some[+number - 1] };
  }

  const same = (a, b) => a.kind === b.kind && a.span === b.span;
  const unique = faults => faults.filter((f, i) => faults.findIndex(g => same(f, g)) === i);

  function read_check(completion, some) {
    let [pairs, error] = read_object(completion);
    const lists = pairs.filter(([key]) => key === "faults").map(p => p[1]);
    if (!error && !lists.length) error = "no field faults";
    if (!error && lists.length > 1) error = "contradiction: two lists of faults";
    if (!error && !Array.isArray(lists[0])) error = "the field faults holds no list";
    if (error) return { faults: [], error };
    const read = [...lists[0]].map(x => fault(x, some));
    const faults = unique(read.filter(f => typeof f !== "string"));
    const at = f => some.indexOf(f.span);
    faults.sort((a, b) => at(a) - at(b) || (a.kind < b.kind ? -1 : a.kind > b.kind ? 1 : 0));
    return { faults, error: read.find(f => typeof f === "string") ?? null };
  }

  function parted(said) {
    // question by question; the last holds what remains
    const { at_once, parts } = k.kit.facts,
      cut = [];
    for (let i = 0; i < said.length; i += at_once) cut.push(said.slice(i, i + at_once));
    return cut.length > parts ? [...cut.slice(0, parts - 1), cut.slice(parts - 1).flat()] : cut;
  }

  function check(checker, script, question, reply, calls) {
    const checks = parted(sentences(reply)).map(some => {
      calls.facts = (calls.facts ?? 0) + 1;
      return read_check(
        ask(checker, check_messages(script, question, some), k.kit.facts.sampling),
        some,
      );
    });
    return {
      faults: unique(checks.flatMap(c => c.faults)),
      error: checks.find(c => c.error)?.error ?? null,
    };
  }

  function doubt(c) {
    if (c.error === null) return [];
    const done = c.faults.length ? "drawn again or dropped" : "the reply passes unchecked";
    return [trouble("facts", "unreadable", c.error, done)];
  }

  function settle(models, script, dialogue, sample, calls) {
    const steps = [],
      troubles = [],
      question = dialogue.at(-1).content;
    const see = text => {
      const c = check(models.checker, script, question, text, calls);
      troubles.push(...doubt(c));
      return c;
    };
    const settled = (text, action) => ({ text, action, steps, troubles });
    const heard = dialogue.slice(-k.kit.window);
    for (let attempt = 0; attempt <= k.kit.facts.resamples; attempt++) {
      const d = draft(models.patient, script, heard, attempt, sample, calls);
      troubles.push(...d.troubles);
      if (!d.text) return settled("", "given up");
      const c = see(d.text),
        ok = !c.faults.length;
      steps.push({ text: d.text, check: c, done: ok ? "said" : "drawn again" });
      if (ok) return settled(d.text, "said");
    }
    const last = steps.at(-1),
      bad = last.check.faults.map(f => f.span);
    const rest = sentences(last.text)
      .filter(s => !bad.includes(s))
      .join(" ");
    last.done = rest ? "sentences dropped" : "given up";
    if (!rest) return settled("", "given up");
    const again = see(rest),
      ok = !again.faults.length;
    steps.push({ text: rest, check: again, done: ok ? "said" : "given up" });
    return ok ? settled(rest, "repaired") : settled("", "given up");
  }

  // simulator.patient: one turn, as a TurnRecord
  function heard_by(dialogue) {
    const most = k.kit.max_heard,
      n = split(dialogue.at(-1).content).length;
    const short = t => (split(t).length > most ? `${split(t).slice(0, most).join(" ")} ...` : t);
    const seen = dialogue.map(m =>
      message(m.role, (m.role === "assistant" ? short(m.content) : m.content) || "..."),
    );
    const long = trouble("doctor", "long", `${n} words`, `the units see the first ${most}`);
    return [seen, n > most ? [long] : []];
  }

  function turn(models, script, dialogue, sample = 0) {
    const calls = {},
      [seen, troubles] = heard_by(dialogue),
      doctor = dialogue.at(-1).content;
    const d = gate(models.gate, seen, calls);
    if (d.fault) troubles.push(trouble("gate", "unreadable", d.fault, "it stops nothing"));
    const record = {
      doctor,
      reply: null,
      action: "stopped",
      gate: d,
      steps: [],
      troubles,
      ended: false,
      calls,
    };
    if (d.stop) return record;
    const s = settle(models, script, seen, sample, calls);
    troubles.push(...s.troubles);
    if (!s.text) {
      const unit = s.steps.length ? "facts" : "affect";
      troubles.push(trouble(unit, "no usable draft", `${calls.affect} drawn`, "safe answer"));
    }
    return {
      ...record,
      reply: s.text || k.kit.safe,
      action: s.text ? s.action : "safe",
      steps: s.steps,
    };
  }

  // A doctor's turns to a patient, until something ends the dialogue
  function talk(models, script, turns) {
    const dialogue = [],
      records = [];
    for (const said of turns) {
      dialogue.push(message("assistant", said));
      records.push(turn(models, script, dialogue));
      if (records.at(-1).gate.stop) break;
      dialogue.push(message("user", records.at(-1).reply));
    }
    return records;
  }

  // Models from their files: {config, tokenizer, weights}, weights as base64
  function open_model({ config, tokenizer, weights }, name) {
    const text = atob(weights),
      bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const model = new k.Qwen3(config, k.read_safetensors(bytes.buffer), name);
    return { model, tokenizer: new k.Tokenizer(tokenizer) };
  }

  let opened = null;
  function models() {
    if (opened) return opened;
    opened = Object.fromEntries(Object.entries(k.weights).map(([n, w]) => [n, open_model(w, n)]));
    const { model, tokenizer } = opened.checker; // the gate's prompts do not push the checker's out
    opened.gate = { model: model.twin(), tokenizer };
    return opened;
  }
  const talks = all => all.map(([id, turns]) => talk(models(), k.patients[id], turns));
  const answers = (name, dialogues, sampling) =>
    dialogues.map(d => ask(models()[name], d, sampling));
  const spelled = (name, dialogues) => dialogues.map(d => models()[name].tokenizer.spell(d));
  const generated = (name, prompts, sampling) =>
    prompts.map(p => models()[name].model.generate(p, sampling));

  globalThis.m2kit = Object.assign(k, {
    ask,
    turn,
    talk,
    talks,
    spelled,
    generated,
    answers,
    models,
    sentences,
    normal,
    hear,
    read_gate,
    read_check,
    read_object,
    writing: t => [...writing(t)],
  });
})();
