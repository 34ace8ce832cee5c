"use strict";
// Overview, rollouts, debates, evaluations, drops and settings.
const wanted = { run: "all", step: "all", key: "all", kind: "all", text: "" };
const REASONS = {
  balance: "too many rollouts of one outcome; left out before the teachers judged",
  margin: "in the way of the margin between correct and incorrect rollouts",
  selection: "not among the rollouts that hold the wanted share of the gap",
  min_tokens: "shorter than camopd.min_tokens", gap_not_finite: "a gap that is not finite",
  teacher_window: "longer than the teacher's window", teacher_failure: "every teacher's call failed",
  debate_too_long: "the debate does not fit a teacher's window", empty: "no token", not_chosen: "turns of an episode that opad.sampling left out",
  token_beyond_vocabulary: "a token that no tokenizer knows", environment: "the environment broke",
  teacher_without_answer: "judged without this teacher, whose call failed", teacher_not_finite: "judged without this teacher, whose states were not finite",
};
const reasonText = (reason) => REASONS[reason.split("/")[0]] || "a reason of the method's own";
const textOf = (place) => place === undefined ? "" : DATA.texts[place];
const last = (run, name) => run.curves[name] ? run.curves[name][1][run.curves[name][1].length - 1] : null;
const first = (run, name) => run.curves[name] ? run.curves[name][1][0] : null;

tab("overview", "Overview", () => {
  const cards = runs().map((run) => {
    const evals = Object.keys(run.curves).filter((name) => /^eval\/(accuracy|.*\/success)$/.test(name) || name === "reward/mean");
    const total = Object.entries(run.totals.seconds).filter(([phase]) => phase !== "step");
    const sum = total.reduce((all, [, value]) => all + value, 0) || 1;
    const lost = Object.values(run.totals.dropped).reduce((all, value) => all + value, 0);
    return el("section", { class: "card" }, el("h2", { style: "margin-top:0" }, dot(run.index), " ", run.name),
      el("p", { class: "meta" }, run.method, " · step ", short(run.steps), run.max_steps ? ` of ${short(run.max_steps)}` : "", " · ", run.finished ? "finished" : el("span", { class: "warn" }, "not finished")),
      el("table", null, evals.map((name) => el("tr", null, el("td", null, name), el("td", { class: "n" }, short(first(run, name)), " → ", el("b", null, short(last(run, name))))))),
      total.length ? [el("h3", { style: "margin-top:.8rem" }, "time ", seconds(sum)),
        el("div", { class: "share" }, total.map(([, value], i) => el("i", { style: `width:${100 * value / sum}%;background:${color(i)}` }))),
        el("p", { class: "meta phases" }, total.map(([phase, value], i) => el("span", null, dot(i), ` ${phase} ${seconds(value)}`)))] : null,
      el("p", { class: "meta" }, `${short(run.totals.sampled)} rollouts sampled, ${short(run.totals.kept)} trained on`, lost ? `; ${short(lost)} dropped` : ""),
      el("p", { class: "meta", style: "overflow-wrap:anywhere" }, run.path));
  });
  const names = KEY_METRICS.filter((name) => runs().some((run) => run.curves[name]));
  return [el("div", { class: "grid" }, cards), el("h2", null, "At a glance"), el("div", { class: "grid" }, names.map(chart)), el("p", { class: "meta" }, `opdengine ${DATA.version}`)];
});

function rolloutRows() {
  const text = wanted.text.toLowerCase();
  return runs().flatMap((run) => run.rollouts.rows.map((row) => ({ run, row }))).filter(({ run, row }) =>
    (wanted.run === "all" || String(run.index) === wanted.run) && (wanted.step === "all" || String(row.step) === wanted.step)
    && (wanted.key === "all" || (row.data_source || "") === wanted.key) && kindFits(row, wanted.kind)
    && (!text || JSON.stringify([row.text, row.turns, row.prompt_id, textOf(row.prompt)]).toLowerCase().includes(text)));
}

function kindFits(row, kind) {
  if (kind === "all") return true;
  if (kind === "kept") return !row.drop;
  if (kind === "dropped") return Boolean(row.drop);
  if (kind === "tokens") return Boolean(row.tok);
  if (kind === "right") return row.reward === 1 || row.success === true;
  if (kind === "wrong") return row.success === false || (typeof row.reward === "number" && row.reward < 1);
  return row.drop === kind.slice(5);
}

const rewardBadge = (value) => typeof value === "number" ? badge(`reward ${short(value)}`, value >= 1 ? "good" : value > 0 ? "warn" : "bad") : null;

tab("rollouts", "Rollouts", () => {
  const box = el("div"), all = runs().flatMap((run) => run.rollouts.rows);
  const unique = (of) => [...new Set(all.map(of))];
  const fill = () => box.replaceChildren(el("p", { class: "meta" }, `${short(rolloutRows().length)} of the ${short(all.length)} rollouts on this page`), browser(rolloutRows(), rolloutTitle, rolloutDetail, "No rollout fits; widen the filter, or set log_completions: true for the next run."));
  const set = (name) => (value) => { wanted[name] = value; fill(); };
  fill();
  const drops = unique((row) => row.drop || "").filter(Boolean).map((reason) => [`drop:${reason}`, `dropped: ${reason}`]);
  const notes = runs().map((run) => `${run.name}: rollouts of ${run.rollouts.steps} of ${short(run.rollouts.all_steps)} steps`);
  return [el("div", { class: "bar" },
    runs().length > 1 ? select("run", [["all", "all"], ...runs().map((run) => [String(run.index), run.name])], wanted.run, set("run")) : null,
    select("step", [["all", "all"], ...unique((row) => row.step).sort((a, b) => a - b).map((step) => [String(step), String(step)])], wanted.step, set("step")),
    select("show", [["all", "everything"], ["kept", "trained on"], ["dropped", "dropped"], ["right", "right"], ["wrong", "wrong"], ["tokens", "with tokens"], ...drops], wanted.kind, set("kind")),
    unique((row) => row.data_source || "").length > 1 ? select("source", [["all", "all"], ...unique((row) => row.data_source || "").map((key) => [key, key || "none"])], wanted.key, set("key")) : null,
    search("text", wanted.text, set("text"))),
  box, el("p", { class: "meta" }, "Shown is a sample: ", notes.join("; "), ". The files hold all of them."), runs().flatMap((run) => run.rollouts.unread.map((text) => el("p", { class: "warn" }, text)))];
});

function rolloutTitle({ run, row }) {
  const beginning = row.text !== undefined ? row.text : (row.turns || []).filter((turn) => turn.role === "assistant").map((turn) => turn.chat.map(([, text]) => text).join(" ")).join(" · ");
  return [el("small", null, dot(run.index), ` step ${row.step} · ${row.prompt_id ?? row.id ?? ""}`.slice(0, 60)), el("span", { class: "one" }, beginning.slice(0, 160) || "(empty)"), rewardBadge(row.reward), row.drop ? badge(row.drop, "warn") : null];
}

function rolloutDetail({ run, row }) {
  const facts = [["run", run.name], ["step", row.step], ["rollout", row.id], ["prompt", row.prompt_id], ["source", row.data_source], ["teachers", (row.teachers || []).join(", ")], ["tokens", row.tokens], ["ended by", row.stop_reason], ["policy version", row.policy_version]].filter(([, value]) => value !== undefined && value !== "");
  const prompt = textOf(row.prompt) || [];
  return el("div", { class: "card" },
    el("div", null, rewardBadge(row.reward), row.success === undefined ? null : badge(row.success ? "success" : "no success", row.success ? "good" : "bad"), row.drop ? badge(`dropped: ${row.drop}`, "warn") : badge("trained on", "good")),
    row.drop ? el("p", { class: "warn" }, `Dropped: ${reasonText(row.drop)}.`) : null,
    el("p", { class: "meta" }, facts.map(([name, value]) => `${name} ${short(value)}`).join(" · ")),
    el("h2", null, "Prompt"), prompt.length ? prompt.map(([role, text]) => message(role, text)) : el("p", { class: "dim" }, "not in this run's log"),
    el("h2", null, row.turns ? "Turn by turn" : "Completion"), row.turns ? row.turns.map(turnView) : says(row.text || "(empty)"),
    row.answer === undefined ? null : [el("h2", null, "Expected answer"), says(textOf(row.answer))],
    el("h2", null, "Tokens"), row.tok ? heatMap(row) : el("p", { class: "dim" }, "The tokens of this rollout are not on this page (log_tokens: all writes those of every rollout)."),
    debateOf(run, row));
}

function turnView(turn) {
  const told = [turn.failure ? badge(turn.failure, "bad") : null, turn.stop_reason === "length" ? badge("cut off", "warn") : null];
  const verdict = turn.verdict && [badge(turn.verdict.label, { skip: "dim", weak: "warn", strong: "good" }[turn.verdict.label] || "bad"), `weight ${short(turn.verdict.weight)}`, turn.verdict.reply ? el("div", { class: "one", title: turn.verdict.reply }, `“${turn.verdict.reply.trim()}”`) : null];
  return el("div", { class: "turn" }, el("div", null, turn.chat.map(([role, text]) => message(turn.role === "assistant" ? "assistant" : role, text))), el("aside", null, told, turn.action ? el("div", null, `action: ${turn.action}`) : null, verdict));
}

function debateOf(run, row) {
  const found = run.debates.find((debate) => debate.step === row.step && debate.prompt_id === row.prompt_id);
  return found ? [el("h2", null, "Debate of its teachers"), debateView(found)] : null;
}

function debateView(debate) {
  if (debate.failed) return el("p", { class: "warn" }, `There was no debate: ${debate.failed}.`);
  const rounds = (debate.rounds || []).map((texts, r) => el("section", null, el("h3", null, `round ${r + 1}${r === 0 ? " (blind)" : ""}`), el("div", { class: "round" }, texts.map((text, k) => el("div", { class: "card" }, el("h3", null, debate.teachers[k]), says(text || "(said nothing)"))))));
  const weights = el("table", null, el("tr", null, el("th", null, "teacher"), el("th", { class: "n" }, "stated confidence"), el("th", { class: "n" }, "weight"), el("th", null, "")), debate.teachers.map((name, k) => el("tr", null, el("td", null, name), el("td", { class: "n" }, short(debate.confidences[k])), el("td", { class: "n" }, short(debate.weights[k])), el("td", { style: "width:40%" }, el("div", { class: "meter" }, el("i", { style: `width:${100 * debate.weights[k]}%` }))))));
  const problems = Object.entries(debate.problems || {}).map(([name, count]) => badge(`${name} ${count}`, "warn"));
  return el("div", null, rounds, weights, problems);
}

tab("debates", "Debates", () => {
  const rows = runs().flatMap((run) => run.debates.map((row) => ({ run, row })));
  return browser(rows, ({ run, row }) => [el("small", null, dot(run.index), ` step ${row.step}`), el("span", { class: "one" }, row.prompt_id), row.failed ? badge(row.failed, "warn") : el("small", null, (row.weights || []).map((w) => short(w)).join(" : "))],
    ({ run, row }) => el("div", { class: "card" }, el("p", { class: "meta" }, `${run.name} · step ${row.step} · prompt ${row.prompt_id}`), (textOf(row.prompt) || []).map(([role, text]) => message(role, text)), debateView(row)),
    "No debate is in these runs' logs.");
});

tab("evaluations", "Evaluations", () => {
  const groups = {};
  for (const run of runs()) for (const row of run.evaluations) (groups[`${row.split || ""} ${row.id}`] ||= []).push({ run, row });
  const scores = (rows) => rows.map(({ row }) => short(row.score)).join(" → ");
  return browser(Object.values(groups), (rows) => [el("span", { class: "one" }, rows[0].row.id), el("small", null, scores(rows).slice(0, 60))],
    (rows) => el("div", { class: "card" }, (textOf(rows[0].row.prompt) || []).map(([role, text]) => message(role, text)),
      textOf(rows[0].row.answer) ? [el("h3", null, "expected answer"), says(textOf(rows[0].row.answer))] : null,
      rows.map(({ run, row }) => el("section", null, el("h2", null, dot(run.index), ` ${run.name}, step ${row.step} `, badge(`score ${short(row.score)}`, row.score >= 1 ? "good" : "bad")), row.chat ? row.chat.map(([role, text]) => message(role, text)) : says(row.text || "(empty)")))),
    "No evaluation is in these runs' logs; name prompts with answers as eval_data.");
});

tab("dropped", "Dropped", () => {
  const reasons = [...new Set(runs().flatMap((run) => Object.keys(run.totals.dropped)))];
  const share = (run, reason) => run.totals.dropped[reason] ? `${short(run.totals.dropped[reason])} (${short(Math.round(1000 * run.totals.dropped[reason] / Math.max(run.totals.sampled, run.totals.dropped[reason])) / 10)} %)` : "–";
  const table = el("div", { class: "card scroll" }, el("table", null,
    el("tr", null, el("th", null, "reason"), runs().map((run) => el("th", { class: "n" }, run.name)), el("th", null, "what it means")),
    el("tr", null, el("td", null, "sampled"), runs().map((run) => el("td", { class: "n" }, short(run.totals.sampled))), el("td", null, "rollouts of the whole run")),
    el("tr", null, el("td", null, "trained on"), runs().map((run) => el("td", { class: "n" }, short(run.totals.kept))), el("td", null, "not dropped")),
    reasons.map((reason) => el("tr", null, el("td", null, el("a", { href: "#rollouts", onclick: () => { wanted.kind = `drop:${reason}`; } }, reason)), runs().map((run) => el("td", { class: "n" }, share(run, reason))), el("td", { class: "dim" }, reasonText(reason))))));
  const names = metricNames().filter((name) => name.startsWith("dropped/") || name.startsWith("data/dropped/"));
  return [table, reasons.length ? null : el("p", { class: "good" }, "Nothing was dropped."), el("h2", null, "Over the steps"), el("div", { class: "grid" }, ["completions/sampled", "completions/kept", ...names].filter((name) => metricNames().includes(name)).map(chart))].filter(Boolean);
});

const look = { text: "", differing: DATA.runs.length > 1 };
tab("settings", "Settings", () => {
  const box = el("div", { class: "card scroll settings" });
  function fill() {
    const shown = runs(), names = [...new Set(shown.flatMap((run) => Object.keys(run.settings)))];
    const differs = (name) => new Set(shown.map((run) => run.settings[name] ?? "")).size > 1;
    const chosen = names.filter((name) => (!look.differing || differs(name)) && name.toLowerCase().includes(look.text.toLowerCase()));
    box.replaceChildren(el("table", { style: `min-width:${9 + 9 * shown.length}rem` }, el("tr", null, el("th", null, "setting"), shown.map((run) => el("th", null, dot(run.index), " ", run.name))),
      chosen.map((name) => el("tr", { class: differs(name) ? "differs" : null }, el("td", null, name), shown.map((run) => el("td", null, run.settings[name] ?? "–"))))),
    chosen.length ? "" : el("p", { class: "dim" }, look.differing && runs().length > 1 ? "The settings do not differ." : "No setting has such a name."));
  }
  fill();
  return [el("div", { class: "bar" }, search("setting", look.text, (text) => { look.text = text; fill(); }), runs().length > 1 ? check("only what differs", look.differing, (on) => { look.differing = on; fill(); }) : null), box];
});

tabs.sort((a, b) => ["overview", "curves", "rollouts", "debates", "evaluations", "dropped", "settings"].indexOf(a.key) - ["overview", "curves", "rollouts", "debates", "evaluations", "dropped", "settings"].indexOf(b.key));
start();
