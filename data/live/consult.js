// The consult as a page: a patient to choose, a line to type, questions to pick, what the units
// decided under each reply, and the grading at the end.
(() => {
  "use strict";
  const k = globalThis.m2kit,
    root = document.getElementById("m2-consult");
  let script, dialogue, over;

  function el(tag, props = {}, ...children) {
    const e = document.createElement(tag);
    for (const [name, v] of Object.entries(props))
      name in e ? (e[name] = v) : e.setAttribute(name, v);
    e.append(...children);
    return e;
  }

  const people = Object.values(k.patients);
  const called = (p, i) =>
    `patient ${i + 1}: ${[p.sex, p.age === null ? "" : `${p.age} years`].filter(Boolean).join(", ")}`;
  const who = el(
    "select",
    { id: "m2-who" },
    ...people.map((p, i) => el("option", { value: p.id }, called(p, i))),
  );
  const log = el("div", {
    className: "m2-log",
    role: "log",
    "aria-label": "The consultation",
    tabIndex: 0,
  });
  const said = el("input", { id: "m2-say", autocomplete: "off", maxLength: 2000 });
  const send = el("button", { type: "submit" }, "Say");
  const hints = el("select", { id: "m2-hint" });
  const note = el("p", { className: "m2-note", role: "status" });
  const form = el(
    "form",
    { className: "m2-ask" },
    el("label", { htmlFor: "m2-say" }, "You say"),
    said,
    send,
  );
  const end = el("button", { type: "button" }, "End it and be graded");
  const letter = el("button", { type: "button" }, "What would the tiny doctor write?");
  const result = el("div", { className: "m2-result", role: "status" });

  // What the units decided, as `m2kit consult` shows it
  function decisions(r) {
    const faults = s => s.check.faults.map(f => `${f.kind}: ${f.span}`).join(", ");
    const drafts = r.steps
      .filter(s => s.check.faults.length)
      .map(s => `draft: ${s.text} ← ${faults(s)}; ${s.done}`);
    const troubles = r.troubles.map(t => `${t.unit}: ${t.kind} (${t.detail}); ${t.done}`);
    const checked = r.steps.at(-1)?.check;
    const verdict = !checked
      ? "nobody checked"
      : checked.error
        ? "unreadable check"
        : checked.faults.length
          ? r.action
          : "clear";
    const gate = r.gate.stop ? `stops: ${r.gate.trigger}` : "goes on";
    return [
      ...drafts,
      ...troubles,
      `gate: ${gate}${r.reply === null ? "" : ` · checker: ${verdict}`}`,
    ];
  }

  function show(who_speaks, text, more = []) {
    const units = more.map(t => el("div", { className: "m2-units" }, t));
    log.append(
      el("div", { className: `m2-${who_speaks}` }, el("b", {}, `${who_speaks}: `), text, ...units),
    );
    log.scrollTop = log.scrollHeight;
  }

  function grade() {
    over = true;
    said.disabled = send.disabled = end.disabled = true;
    const lines = k.feedback_lines(script.grading, dialogue);
    result.replaceChildren(
      el("h2", {}, "How you did"),
      el("pre", { tabIndex: 0 }, lines.join("\n")),
    );
    note.textContent = "The consultation is over. Choose a patient to begin another one.";
  }

  function answer(text) {
    dialogue.push({ role: "assistant", content: text });
    const start = performance.now(),
      r = k.turn(k.models(), script, dialogue);
    const lines = decisions(r),
      seconds = ((performance.now() - start) / 1000).toFixed(1);
    lines[lines.length - 1] += ` · ${seconds} s`;
    if (r.reply !== null) dialogue.push({ role: "user", content: r.reply });
    show("patient", r.reply ?? "(the gate ends the consultation)", lines);
    note.textContent = "";
    said.disabled = send.disabled = false;
    if (r.gate.stop) grade();
    else said.focus();
  }

  function say(text) {
    if (over || !k.strip(text)) return;
    show("doctor", k.strip(text));
    said.value = "";
    said.disabled = send.disabled = true;
    note.textContent = "The patient thinks ...";
    setTimeout(() => answer(k.strip(text)), 30); // after the browser has drawn the question
  }

  function begin() {
    script = k.patients[who.value];
    [dialogue, over] = [[], false];
    log.replaceChildren();
    result.replaceChildren();
    said.disabled = send.disabled = end.disabled = false;
    hints.replaceChildren(
      el("option", { value: "" }, "pick a question"),
      ...script.hints.map(h => el("option", {}, h)),
    );
    note.textContent = "In comes the patient. Ask what brings them here.";
  }

  function write_letter() {
    const { model, tokenizer } = k.models().doctor;
    const c = k.ask({ model, tokenizer }, script.opening, { temperature: 0, max_tokens: 224 });
    const asked = script.opening.at(-1).content;
    result.replaceChildren(
      el("h2", {}, "The tiny doctor's answer to this patient's letter"),
      el("p", {}, el("b", {}, "The letter: "), asked),
      el("p", {}, c.text),
    );
  }

  who.addEventListener("change", begin);
  form.addEventListener("submit", e => {
    e.preventDefault();
    say(said.value);
  });
  hints.addEventListener("change", () => {
    said.value = hints.value;
    hints.selectedIndex = 0;
    said.focus();
  });
  end.addEventListener("click", grade);
  letter.addEventListener("click", write_letter);
  const row = (label, id, control) =>
    el("div", { className: "m2-control" }, el("label", { htmlFor: id }, label), control);
  root.replaceChildren(
    row("In comes", "m2-who", who),
    log,
    form,
    row("Questions it understands", "m2-hint", hints),
    note,
    el("p", { className: "m2-buttons" }, end, letter),
    result,
  );
  begin();
})();
