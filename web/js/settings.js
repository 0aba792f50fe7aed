// An input's value in the graph, wherever it is held: by the node's own widget, or, in a subgraph,
// by the widget that stands for it outside.
import { app } from "../../../scripts/app.js";
import { find } from "./runs.js";

const OUTSIDE = -10; // what a subgraph's links from its own inputs give as their node

/**
 * @typedef {Object} Setting
 * @property {any} node
 * @property {any} widget
 */

/**
 * @param {any} node
 * @param {string} name
 */
export function widget(node, name) {
  return node?.widgets?.find((w) => w.name === name) ?? null;
}

/**
 * Where the value of a node's input is set; null where a wire brings it.
 * @param {string[]} path
 * @param {string} name
 * @returns {Setting | null}
 */
export function settingOf(path, name) {
  const node = find(app.graph, path);
  const input = node?.inputs?.find((i) => (i.widget?.name ?? i.name) === name);
  if (input?.link != null) {
    const link = node.graph.getLink(input.link);
    if (link?.origin_id !== OUTSIDE) return null;
    const outside = find(app.graph, path.slice(0, -1))?.inputs?.[link.origin_slot];
    return outside ? settingOf(path.slice(0, -1), outside.widget?.name ?? outside.name) : null;
  }
  const found = widget(node, name);
  return found ? { node, widget: found } : null;
}

/** @param {Setting} setting */
export function read(setting) {
  return setting.widget.value;
}

/**
 * Sets a value as the person would: the callback tells Nodes 2.0.
 * @param {Setting} setting
 * @param {unknown} value
 */
export function set({ node, widget }, value) {
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}
