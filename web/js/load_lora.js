// A condition LoRA in stock Load LoRA gives static without a word; so the editor says where it goes.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { dismiss, notify } from "./notices.js";
import { active } from "./runs.js";
import { widget } from "./settings.js";

const KINDS = ["LoraLoader", "LoraLoaderModelOnly"];
const SAYS = "load lora";
const OPENED = [300, 1500, 4000]; // ms in which a graph's workflow has become the active one

/** @type {Map<string, Promise<string>>} what the server says of a file, by its name */
const notes = new Map();

app.registerExtension({
  name: "Omini2.LoadLora",
  nodeCreated(node) {
    const lora = KINDS.includes(node.comfyClass) ? widget(node, "lora_name") : null;
    if (!lora) return;
    const { callback } = lora;
    lora.callback = function () {
      const result = callback?.apply(this, arguments);
      if (!app.configuringGraph) look();
      return result;
    };
  },
  afterConfigureGraph() {
    for (const wait of OPENED) setTimeout(look, wait);
  },
});

/** Says it at each such node of the graph that is open. */
async function look() {
  const workflow = active();
  const found = await Promise.all(
    loaders(app.graph).map(async ([at, node]) => {
      const name = widget(node, "lora_name")?.value;
      return { at, message: node.mode === 0 && name ? await noteOf(String(name)) : "" };
    }),
  );
  if (workflow !== active()) return;
  dismiss((notice) => notice.from === SAYS); // another workflow's are found anew when it is opened
  for (const { at, message } of found) {
    if (message) notify({ workflow, at, from: SAYS, message, remedies: [] });
  }
}

/**
 * @param {any} graph
 * @param {string} before path of the graph
 * @returns {[string, any][]}
 */
function loaders(graph, before = "") {
  return graph.nodes.flatMap((node) => {
    const at = `${before}${node.id}`;
    if (node.subgraph) return loaders(node.subgraph, `${at}:`);
    return KINDS.includes(node.comfyClass) ? [[at, node]] : [];
  });
}

/** @param {string} name */
function noteOf(name) {
  if (!notes.has(name)) notes.set(name, ask(name));
  return notes.get(name);
}

/** @param {string} name */
async function ask(name) {
  const route = `/omini2/load_lora?lora=${encodeURIComponent(name)}`;
  const answer = await api.fetchApi(route).catch(() => null); // the server may be away
  return answer?.ok ? String((await answer.json()).note) : "";
}
