"use strict";
const articles = [...document.querySelectorAll("article")];
const nameField = document.getElementById("name");
const storageKey = "srcfast-labels-" + document.body.dataset.page;
const keys = { "1": "first", "0": "tie", "2": "second" };
let state = { name: "", verdicts: {} };
let shown = 0;

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(storageKey));
    if (stored && typeof stored.verdicts === "object") state = stored;
  } catch (error) {
    // Without storage, answers last as long as the page is open.
  }
}

function store() {
  try {
    localStorage.setItem(storageKey, JSON.stringify(state));
  } catch (error) {
    // As above.
  }
}

function show(index) {
  shown = Math.max(0, Math.min(articles.length - 1, index));
  articles.forEach((article, number) => { article.hidden = number !== shown; });
  const verdict = state.verdicts[articles[shown].dataset.pair];
  for (const button of articles[shown].querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.verdict === verdict));
  }
  const done = articles.filter((article) => article.dataset.pair in state.verdicts).length;
  document.getElementById("progress").textContent = `pair ${shown + 1} of ${articles.length}, ${done} judged`;
}

function judge(verdict) {
  state.verdicts[articles[shown].dataset.pair] = verdict;
  store();
  show(shown + 1);
}

function lines() {
  const by = nameField.value.trim();
  return articles
    .filter((article) => article.dataset.pair in state.verdicts)
    .map((article) => JSON.stringify({ pair: article.dataset.pair, verdict: state.verdicts[article.dataset.pair], by }) + "\n")
    .join("");
}

function save() {
  if (!nameField.value.trim()) {
    nameField.focus();
    return;
  }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines()], { type: "application/jsonl" }));
  link.download = "labels.jsonl";
  link.click();
}

document.addEventListener("keydown", (event) => {
  if (event.target === nameField || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in keys) judge(keys[event.key]);
  else if (event.key === "ArrowLeft") show(shown - 1);
  else if (event.key === "ArrowRight") show(shown + 1);
});
for (const button of document.querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", () => judge(button.dataset.verdict));
}
nameField.addEventListener("input", () => { state.name = nameField.value; store(); });
document.getElementById("save").addEventListener("click", save);
load();
nameField.value = state.name || "";
const first = articles.findIndex((article) => !(article.dataset.pair in state.verdicts));
show(first < 0 ? 0 : first);
