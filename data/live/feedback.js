// service.feedback: the student graded by words. A paraphrase can be missed; the page says so.
(() => {
  "use strict";
  const k = globalThis.m2kit;
  const { pattern, strip } = k;
  const known = () => k.kit.grading;

  function content_words(text) {
    const found = text.toLowerCase().match(/[\p{L}\p{Nl}\p{No}]+/gu) ?? [];
    const kept = found.filter(w => !known().small.includes(w));
    const plural = w => [...w].length > 3 && w.endsWith("s") && !w.endsWith("ss");
    return new Set(kept.map(w => (plural(w) ? w.slice(0, -1) : w)));
  }

  const within = (small, large) => [...small].every(w => large.has(w));

  function holds(text, term) {
    const wanted = content_words(term);
    return wanted.size > 0 && within(wanted, content_words(text));
  }

  function utterances(turn) {
    const found = (turn.match(/[^.!?;\n]+[.!?;\n]*/g) ?? []).map(s => {
      const offer = pattern("feedback.OFFER", "y").test(s),
        asks = s.includes("?");
      return {
        text: strip(s),
        asks,
        offers: asks && offer,
        denies: pattern("feedback.AGAINST").test(s),
        unsure: pattern("feedback.UNSURE").test(s),
      };
    });
    return found.filter(u => u.text);
  }

  let names = null;
  function diagnosis_said(turns) {
    names ??= known().names.map(([[source, flags], name]) => [new RegExp(source, flags), name]);
    let said = "";
    for (const u of turns.flatMap(utterances))
      if (!(u.asks || u.denies || u.unsure))
        said = names.find(([p]) => p.test(u.text))?.[1] ?? said;
    return said;
  }

  // What the doctor did: [kind, item] pairs
  function actions_said(turns, of) {
    const all = turns.flatMap(utterances),
      does = all.filter(u => !u.denies && (u.offers || !u.asks));
    const named = kind =>
      known()
        [kind].filter(n => does.some(u => holds(u.text, n)))
        .map(n => [kind, n]);
    const terms = [...named("test"), ...named("treatment")];
    const shorter = (n, m) => {
      const a = content_words(n),
        b = content_words(m);
      return a.size < b.size && within(a, b);
    };
    const done = terms.filter(([kind, n]) => !terms.some(([j, m]) => j === kind && shorter(n, m)));
    for (const r of of.red_flags) if (all.some(u => holds(u.text, r))) done.push(["red_flag", r]);
    for (const a of of.advice) if (does.some(u => holds(u.text, a))) done.push(["advice", a]);
    const diagnosis = diagnosis_said(turns);
    return diagnosis ? [...done, ["diagnosis", diagnosis]] : done;
  }

  // rubrics.reference.clause_verdict, for a criterion's tag
  function clause_verdict(tag, done) {
    const [, kind, item] = /^said:([^:]*):([^]*)$/.exec(tag),
      of = done.filter(d => d[0] === kind);
    if (item[0] !== "!") return of.some(d => d[1] === item);
    return of.some(d => !item.slice(1).split("|").includes(d[1]));
  }

  function came_out(item, lay, dialogue) {
    const short = item.replace(/ (use|allergy)\n?$/, "");
    let asked = "";
    for (const { role, content } of dialogue) {
      if (role === "assistant") {
        asked = content;
        continue;
      }
      if (/^[^\p{L}\p{N}_]*(no|not|never)(?![\p{L}\p{N}_])/iu.test(content)) continue;
      const yes = /^[^\p{L}\p{N}_]*(yes|right|that is so|i do)(?![\p{L}\p{N}_])/iu.test(content);
      if (holds(content, short) || holds(content, lay) || (yes && holds(asked, short))) return true;
    }
    return false;
  }

  function warnings_for(of, done, dialogue) {
    const given = b => done.some(([kind, item]) => kind === "treatment" && item === b.treatment);
    return of.barred.filter(given).map(b => {
      const knew = came_out(b.fact, b.lay, dialogue)
        ? "the patient told you of it"
        : "you did not ask";
      return `${b.treatment} in a patient with ${b.fact} (${knew}): ${b.why} Better: ${b.instead}.`;
    });
  }

  function percent(x) {
    // Python's f"{100*x:.0f}%": a half goes to the even number
    const p = 100 * x,
      low = Math.floor(p);
    const whole = p - low === 0.5 ? low + (low % 2 ? 1 : 0) : Math.round(p);
    return `${whole === 0 && p < 0 ? "-0" : whole}%`;
  }

  function feedback(of, dialogue) {
    const turns = dialogue.filter(m => m.role === "assistant").map(m => m.content);
    const done = actions_said(turns, of),
      met = of.rubric.map(c => clause_verdict(c.tag, done));
    const some = (is_met, good) =>
      of.rubric.filter((c, i) => met[i] === is_met && c.points > 0 === good);
    const unheard = of.known.filter(([x, lay]) => !came_out(x, lay, dialogue)).map(x => x[0]);
    const score = Math.max(
      0,
      k.score_points(
        of.rubric.map(c => c.points),
        met,
      ),
    );
    return {
      said: diagnosis_said(turns),
      score,
      met: some(true, true),
      missed: some(false, true),
      harm: some(true, false),
      unheard,
      warnings: warnings_for(of, done, dialogue),
    };
  }

  // The report, line by line
  function feedback_lines(of, dialogue) {
    const f = feedback(of, dialogue),
      points = c => `${c.text} (${c.points > 0 ? "+" : ""}${c.points})`;
    const right = f.said === of.condition ? "right" : `the patient has ${of.condition}`;
    const told = f.said ? `you said ${f.said}: ${right}` : `you stated none; ${right}`;
    const flag = c => c.tag.startsWith("said:red_flag:");
    const part = (title, items) => (items.length ? [title, ...items.map(x => `  - ${x}`)] : []);
    return [
      "What you did, read by words (a paraphrase can be missed):",
      `diagnosis: ${told}`,
      `the case's rubric: ${percent(f.score)} of its points`,
      ...part("met:", f.met.map(points)),
      ...part("missed:", f.missed.filter(c => !flag(c)).map(points)),
      ...part("red flags missed:", f.missed.filter(flag).map(points)),
      ...part("contraindications overlooked:", f.warnings),
      ...part("harm:", f.harm.map(points)),
      ...part("never came out:", f.unheard),
    ];
  }

  const graded = all =>
    all.map(([id, dialogue]) => feedback_lines(k.patients[id].grading, dialogue));
  globalThis.m2kit = Object.assign(k, { feedback, feedback_lines, graded });
})();
