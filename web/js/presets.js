// Choosing a LoRA fills in what it was trained with, as values that can be changed.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { showOn } from "./panel.js";
import { set, widget } from "./settings.js";

/**
 * What the server knows of a LoRA file; see the extension's table of presets.
 * @typedef {Object} Preset
 * @property {boolean} known
 * @property {string} [title]
 * @property {string} [note]
 * @property {Record<string, string | number | null>} [values] by widget name
 */

/** @type {WeakMap<object, Record<string, unknown>>} what a preset has put into a node's widgets */
const filled = new WeakMap();

app.registerExtension({
  name: "Omini2.Presets",
  nodeCreated(node) {
    if (node.comfyClass !== "Omini2ApplyLoRA") return;
    const lora = widget(node, "lora_name");
    if (!lora) return;
    let before = lora.value;
    const { onConfigure } = node;
    node.onConfigure = function () {
      before = lora.value; // a file's own values stand
      return onConfigure?.apply(this, arguments);
    };
    const { callback } = lora;
    lora.callback = function (value) {
      const result = callback?.apply(this, arguments);
      if (value !== before && !app.configuringGraph) choose(node, value);
      before = value;
      return result;
    };
  },
});

/**
 * @param {any} node Apply Omini2 LoRA
 * @param {string} name a file in the loras folder
 */
async function choose(node, name) {
  const { encode, compression } = source(node);
  const preset = await presetOf(name, compression);
  // Another file may have been chosen while the server was asked.
  if (!preset || widget(node, "lora_name")?.value !== name) return;
  const fits = encode?.comfyClass === "Omini2ConditionEncode" && untouched(encode);
  for (const target of fits ? [node, encode] : [node]) {
    takeBack(target);
    for (const [key, value] of Object.entries(preset.values ?? {})) {
      if (value != null && widget(target, key)) fill(target, key, value);
    }
  }
  showOn(node, { note: [preset.title, preset.note].filter(Boolean).join("\n") });
  app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
}

/**
 * Where a node's condition is from, and by how much it is compressed on its way.
 * @param {any} node
 */
function source(node) {
  let compression = 1;
  let from = feeding(node, "condition");
  while (from?.comfyClass === "Omini2CompactTokens") {
    if (widget(from, "position_correcting")?.value) {
      compression *= Number(widget(from, "compression")?.value) || 1;
    }
    from = feeding(from, "condition");
  }
  return { encode: from, compression };
}

/**
 * @param {string} name
 * @param {number} compression
 * @returns {Promise<Preset | null>} null where the server has no presets
 */
async function presetOf(name, compression) {
  const graph = compression === 1 ? "" : `compression=${compression}&`;
  const route = `/omini2/preset?${graph}lora=${encodeURIComponent(name)}`;
  const answer = await api.fetchApi(route).catch(() => null); // the server may be away
  return answer?.ok ? await answer.json() : null;
}

/**
 * The node that an input comes from, through reroutes of the canvas.
 * @param {any} node
 * @param {string} name
 */
function feeding(node, name) {
  const slot = node.inputs?.findIndex((input) => input.name === name) ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}

/**
 * Whether a node's widgets are as they were made, or as a preset left them.
 * @param {any} node
 */
function untouched(node) {
  const given = filled.get(node) ?? {};
  return Object.entries({ ...defaultsOf(node), ...given }).every(
    ([name, value]) => widget(node, name)?.value === value,
  );
}

/**
 * Takes back what the last preset put into a node, where nobody has changed it since.
 * @param {any} node
 */
function takeBack(node) {
  const defaults = defaultsOf(node);
  for (const [name, value] of Object.entries(filled.get(node) ?? {})) {
    if (widget(node, name)?.value === value) fill(node, name, defaults[name]);
  }
  filled.delete(node);
}

/**
 * @param {any} node
 * @returns {Record<string, unknown>}
 */
function defaultsOf(node) {
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  const found = Object.entries({ ...required, ...optional }).map(([name, [kind, options]]) => [
    name,
    options?.default ?? (Array.isArray(kind) ? kind[0] : options?.options?.[0]),
  ]);
  return Object.fromEntries(found.filter(([name]) => widget(node, name)));
}

/**
 * @param {any} node
 * @param {string} name
 * @param {unknown} value
 */
function fill(node, name, value) {
  set({ node, widget: widget(node, name) }, value);
  filled.set(node, { ...filled.get(node), [name]: value });
}
