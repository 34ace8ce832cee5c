"use strict";
// The heat map of a rollout's tokens.
const heat = { measure: "gap", teacher: 0 };
const at = (values, i) => Array.isArray(values) ? values[i] : values ?? null;
const perTeacher = (name) => (tok, i, k) => tok[name] && tok[name][k] !== undefined ? at(tok[name][k], i) : null;

function gapOf(tok, i, k) {
  const theirs = perTeacher("teacher_logprob")(tok, i, k), own = at(tok.student_logprob, i);
  return theirs === null || own === null ? null : theirs - own;
}

/** The mean over the teachers, by their weights. */
function mixed(of) {
  return (tok, i) => {
    let sum = 0, weight = 0;
    (tok.teacher_logprob || []).forEach((_, k) => {
      const value = of(tok, i, k), share = tok.mix ? at(tok.mix[k], i) : 1;
      if (value !== null && share !== null) { sum += share * value; weight += share; }
    });
    return weight ? sum / weight : null;
  };
}

// key: [title, value of (tokens, place, teacher), whether it has a sign, whether it is of a teacher]
const MEASURES = {
  gap: ["gap: teacher less student log-prob (before calibration)", mixed(gapOf), true, false],
  advantage: ["advantage in the loss (after calibration)", (tok, i) => at(tok.advantage, i), true, false],
  gap_k: ["gap of a teacher", gapOf, true, true],
  reverse_kl: ["KL of a teacher", perTeacher("reverse_kl"), false, true],
  divergence: ["divergence in the loss", (tok, i) => at(tok.divergence, i), false, false],
  mix: ["weight of a teacher", perTeacher("mix"), false, true],
  kl_weight: ["weight of the divergence", (tok, i) => at(tok.kl_weight, i), false, false],
  student_entropy: ["entropy of the student", (tok, i) => at(tok.student_entropy, i), false, false],
  teacher_entropy: ["entropy of a teacher", perTeacher("teacher_entropy"), false, true],
  student_logprob: ["surprise of the student (-log p)", (tok, i) => { const p = at(tok.student_logprob, i); return p === null ? null : -p; }, false, false],
  policy_logratio: ["log-ratio to the policy that sampled", (tok, i) => at(tok.policy_logratio, i), true, false],
};

function heatMap(row) {
  const tok = row.tok, teachers = row.teachers || [], box = el("div");
  const known = (key) => tok.p.some((_, i) => MEASURES[key][1](tok, i, 0) !== null);
  const offered = Object.keys(MEASURES).filter((key) => known(key) && !(key === "gap_k" && teachers.length < 2));
  if (!tok.p.length || !offered.length) return el("p", { class: "dim" }, "No number is known of the tokens of this rollout: it was dropped before it was judged, or it has none.");
  if (!offered.includes(heat.measure)) heat.measure = offered[0];
  if (heat.teacher >= teachers.length) heat.teacher = 0;

  function fill() {
    const [, of, signed, one] = MEASURES[heat.measure];
    const values = tok.p.map((_, i) => of(tok, i, heat.teacher));
    const sizes = values.filter((value) => value !== null).map(Math.abs).sort((a, b) => a - b);
    const top = sizes[Math.floor(sizes.length * 0.98)] || sizes[sizes.length - 1] || 1;
    const facts = el("div", { class: "facts", "aria-live": "polite" });
    const tint = (value) => value === null ? "transparent" : `rgba(var(${value < 0 ? "--minus" : "--plus"}), ${Math.min(Math.abs(value) / top, 1) * 0.75})`;
    const spans = tok.p.map((piece, i) => el("span", { style: `background:${tint(values[i])}`, "data-i": i }, visible(piece)));
    const tokens = el("div", { class: "tokens", tabindex: "0" }, spans);
    let current = 0;
    function choose(i) {
      spans[current].classList.remove("on");
      current = Math.max(0, Math.min(i, spans.length - 1));
      spans[current].classList.add("on");
      facts.replaceChildren(...factsOf(tok, current, teachers));
    }
    const touched = (event) => { const i = event.target.dataset && event.target.dataset.i; if (i !== undefined) choose(Number(i)); };
    tokens.addEventListener("mouseover", touched);
    tokens.addEventListener("click", touched);
    tokens.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move) { event.preventDefault(); choose(current + move); }
    });
    choose(0);
    const low = signed ? `${short(-top)}` : "0";
    const ramp = signed ? `linear-gradient(90deg, rgba(var(--minus), .75), transparent, rgba(var(--plus), .75))` : `linear-gradient(90deg, transparent, rgba(var(--plus), .75))`;
    box.replaceChildren(el("div", null, el("div", { class: "bar" },
      select("colour", offered.map((key) => [key, MEASURES[key][0]]), heat.measure, (key) => { heat.measure = key; fill(); }),
      one && teachers.length > 1 ? select("teacher", teachers.map((name, k) => [k, name]), heat.teacher, (k) => { heat.teacher = Number(k); fill(); }) : null,
      el("span", { class: "legend" }, low, el("span", { class: "ramp", style: `background:${ramp}` }), short(top))),
    tokens, tok.more ? el("p", { class: "meta" }, `${short(tok.more)} more tokens are in the run's files.`) : null, facts));
  }
  fill();
  return box;
}

/** A token as it can be seen: line ends and blanks at its edge get a mark. */
function visible(piece) {
  if (piece === "") return "∅";
  return piece.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t");
}

function factsOf(tok, i, teachers) {
  const fact = (name, value) => value === null ? null : el("div", null, el("span", { class: "dim" }, name), " ", el("b", null, typeof value === "number" ? short(value) : value));
  const rows = [fact("token", JSON.stringify(tok.p[i])), fact("gap", MEASURES.gap[1](tok, i)), fact("advantage", at(tok.advantage, i)),
    fact("weight", at(tok.kl_weight, i)), fact("divergence", at(tok.divergence, i)),
    fact("student log p", at(tok.student_logprob, i)), fact("student entropy", at(tok.student_entropy, i)), fact("sampler log p", at(tok.sampler_logprob, i)), fact("log-ratio", at(tok.policy_logratio, i))];
  teachers.forEach((name, k) => {
    rows.push(fact(`${name}: log q`, perTeacher("teacher_logprob")(tok, i, k)), fact(`${name}: KL`, perTeacher("reverse_kl")(tok, i, k)),
      fact(`${name}: entropy`, perTeacher("teacher_entropy")(tok, i, k)), fact(`${name}: share`, perTeacher("mix")(tok, i, k)));
  });
  if (tok.top && tok.top[i].length) rows.push(el("div", { style: "grid-column:1/-1" }, el("span", { class: "dim" }, "likeliest for the teacher "), tok.top[i].map(([piece, p]) => badge(`${JSON.stringify(piece)} ${short(100 * p)} %`))));
  return rows.filter(Boolean);
}
