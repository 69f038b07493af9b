// The page: loads the backbone, fetches adapters on choice, answers, and marks the tokens that are edited.

import { Template } from "./vendor/jinja.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { Backbone, chooseProvider, download, loadRuntime } from "./backbone.mjs";
import { fitEdits, readEdits } from "./edits.mjs";
import { editMask } from "./mask.mjs";

const PENALTY = 1.15; // without sampling so small a model tends to say the same again and again
const find = (id) => document.getElementById(id);
const page = { adapters: new Map(), chosen: null };
const inBytes = (size) => (size < 1e6 ? `${(size / 1e3).toFixed(0)} kB` : `${(size / 1e6).toFixed(0)} MB`);
const json = async (url) => JSON.parse(new TextDecoder().decode(await download(url)));

/** Runs something; what it throws is shown, and nothing else changes. */
async function attempt(action) {
  find("error").textContent = "";
  try {
    return await action();
  } catch (error) {
    find("error").textContent = error.message;
    return undefined;
  }
}

async function start() {
  const say = (text) => (find("status").textContent = text);
  const chosen = await chooseProvider(new URLSearchParams(location.search).get("on"));
  const description = await json("model/backbone.json");
  const graph = await download(`model/${description.file}`, (size, total) =>
    say(`Loading ${description.base_model}: ${inBytes(size)} of ${inBytes(total)}`),
  );
  const [tokenizer, config] = await Promise.all([json("model/tokenizer.json"), json("model/tokenizer_config.json")]);
  const template = new TextDecoder().decode(await download("model/chat_template.jinja"));
  say("Preparing the model ...");
  const vendor = new URL("./vendor", location.href).href;
  page.backbone = await Backbone.open((provider) => loadRuntime(vendor, provider), chosen, description, graph);
  page.tokenizer = new Tokenizer(tokenizer, config);
  page.template = new Template(template);
  for (const { name, file, bytes } of await json("adapters.json")) addChoice(name, `${name} (${inBytes(bytes)})`, file);
  const { provider, why } = page.backbone;
  page.ready = `${description.base_model}, ${inBytes(graph.byteLength)}, on ${provider}${why && ` (${why})`}`;
  say(page.ready);
  for (const id of ["question", "send", "adapter", "strength", "file"]) find(id).disabled = false;
  showPrompt();
}

function addChoice(name, label, file) {
  find("adapter").add(new Option(label, name));
  page.adapters.set(name, { file });
}

/** The adapter of a name, fetched when it is chosen for the first time. */
async function choose(name) {
  const entry = page.adapters.get(name);
  if (entry && !entry.edits) {
    const edits = readEdits(await download(entry.file));
    Object.assign(entry, { edits, inputs: fitEdits(edits, page.backbone.description) });
  }
  page.chosen = entry ?? null;
  find("about").textContent = entry ? `${entry.edits.positions}, rank ${entry.edits.rank}, ${entry.edits.blocks.length} blocks` : "";
  showPrompt();
}

function prompt() {
  const messages = [{ role: "user", content: find("question").value }];
  const text = page.template.render({ messages, add_generation_prompt: true });
  return page.tokenizer.encode(text, { add_special_tokens: false }).ids;
}

/** The prompt as the model sees it, the tokens that are edited marked. */
function showPrompt() {
  const ids = prompt();
  const edits = page.chosen?.edits;
  const { mask, groups } = edits
    ? editMask(edits.positions, edits.shareWeights, ids.length)
    : { mask: new Float32Array(ids.length), groups: 1 };
  const tokens = ids.map((id, i) => {
    const element = document.createElement(mask.subarray(i * groups, (i + 1) * groups).some(Boolean) ? "mark" : "span");
    element.textContent = page.tokenizer.decode([id]).replaceAll("\n", "↵");
    return element;
  });
  find("prompt").replaceChildren(...tokens);
}

async function answer() {
  const ids = prompt();
  const turn = document.createElement("div");
  const [question, reply] = [document.createElement("p"), document.createElement("p")];
  [question.className, reply.className] = ["question", "answer"];
  question.textContent = find("question").value;
  turn.append(question, reply);
  find("talk").append(turn);
  find("send").disabled = true;
  const strength = Number(find("strength").value);
  const begun = performance.now();
  const found = [];
  let first = 0;
  try {
    const { edits = null, inputs = null } = page.chosen ?? {};
    for await (const token of page.backbone.answer(ids, edits, inputs, { strength, penalty: PENALTY })) {
      if (!found.length) first = performance.now() - begun;
      found.push(token);
      reply.textContent = page.tokenizer.decode(found, { skip_special_tokens: true });
      await new Promise((resolve) => setTimeout(resolve)); // lets the page be drawn
    }
  } finally {
    find("send").disabled = false;
  }
  const rate = (found.length - 1) / ((performance.now() - begun - first) / 1000);
  find("status").textContent = `${page.ready}: ${ids.length} tokens of prompt in ${(first / 1000).toFixed(1)} s, then ${rate.toFixed(1)} tokens/s`;
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(answer);
});
find("question").addEventListener("input", showPrompt);
find("strength").addEventListener("input", () => (find("strength-value").value = Number(find("strength").value).toFixed(1)));
find("adapter").addEventListener("change", async () => {
  const before = page.chosen;
  const name = find("adapter").value;
  await attempt(() => choose(name));
  if (find("error").textContent) { // the choice stays what it was
    page.adapters.forEach((entry, known) => entry === before && (find("adapter").value = known));
    if (!before) find("adapter").value = "";
  }
});
find("file").addEventListener("change", () =>
  attempt(async () => {
    const [file] = find("file").files;
    if (!file) return;
    const edits = readEdits(await file.arrayBuffer());
    const inputs = fitEdits(edits, page.backbone.description);
    addChoice(file.name, `${file.name} (${inBytes(file.size)})`, null);
    Object.assign(page.adapters.get(file.name), { edits, inputs });
    find("adapter").value = file.name;
    await choose(file.name);
  }),
);
attempt(start);
