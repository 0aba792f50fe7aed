// The panel at the bottom of our nodes. What it shows is in the node's properties, so that it is
// saved, copied and undone with the node, and no widget value of a shared workflow moves.
import { app } from "../../../scripts/app.js";
import { mapOf } from "./map.js";
import { linesOf } from "./words.js";

const WIDGET = "omini2_panel";
const PROPERTY = "omini2";
const LINE = 18;
const PADDING = 6;
const SIDE = 8;
const MARGIN = 10; // what the canvas keeps around a widget
const REPLACED = [50, 400]; // ms, soon and once everything is drawn
const LETTER = 6.2; // the mean width of one

/** @type {WeakMap<Element, number>} what a panel needs of its node's height */
const heights = new WeakMap();

/**
 * What a node's properties hold of us.
 * @typedef {Object} Shown
 * @property {import("./words.js").Figures} [figures] of the last run
 * @property {string} [note] about the chosen LoRA
 */

/**
 * Gives a node its panel; empty until there is something to show. It is there from the start:
 * Nodes 2.0 doesn't see widgets that come later.
 * @param {any} node
 */
export function addPanel(node) {
  const element = document.createElement("div");
  element.style.cssText = `padding: ${PADDING}px ${SIDE}px; font-size: 12px; line-height: ${LINE}px;
    color: var(--input-text); background: var(--comfy-input-bg); border-radius: 6px;
    overflow: hidden; box-sizing: border-box; display: none;`;
  element.dataset.testid = WIDGET;
  const height = () => heights.get(element) ?? 0;
  const widget = node.addDOMWidget(WIDGET, "omini2", element, {
    serialize: false,
    getMinHeight: height,
    getMaxHeight: height,
  });
  widget.serialize = false; // neither in the prompt nor among the workflow's widget values
}

/**
 * Draws what a node's properties say.
 * @param {any} node
 */
export function drawPanel(node) {
  const element = node.widgets?.find((w) => w.name === WIDGET)?.element;
  if (!element) return;
  /** @type {Shown} */
  const { figures, note } = node.properties?.[PROPERTY] ?? {};
  const parts = [];
  let height = 0;
  if (note) {
    parts.push(paragraph(String(note), "pre-line"));
    height += LINE * wrapped(String(note), node.size[0] - 2 * MARGIN - 2 * SIDE);
  }
  for (const line of figures ? linesOf(figures) : []) {
    parts.push(paragraph(line, "nowrap"));
    height += LINE;
  }
  const map = figures ? mapOf(figures) : null;
  if (map) {
    parts.push(map);
    height += Math.ceil(Number(map.getAttribute("height"))) + 4;
  }
  element.replaceChildren(...parts);
  element.style.display = parts.length ? "" : "none";
  heights.set(element, parts.length ? height + 2 * PADDING + 2 * MARGIN : 0);
  const [width, needed] = node.computeSize();
  if (node.size[0] < width || node.size[1] < needed) {
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], needed)]);
  }
  app.graph?.setDirtyCanvas(true, true);
  for (const wait of REPLACED) setTimeout(() => takePlace(node, element), wait);
}

/**
 * Nodes 2.0 goes on to show the panel of the node that undo has just replaced.
 * @param {any} node
 * @param {HTMLElement} element
 */
function takePlace(node, element) {
  if (element.isConnected || node.graph !== app.canvas?.graph) return;
  const drawn = document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"]`);
  drawn?.querySelector(`[data-testid="${WIDGET}"]`)?.replaceWith(element);
}

/**
 * Adds to what a node shows.
 * @param {any} node
 * @param {Shown} change
 */
export function showOn(node, change) {
  node.properties[PROPERTY] = { ...node.properties[PROPERTY], ...change };
  drawPanel(node);
}

/**
 * The same in a saved state of the graph.
 * @param {any} saved the node's part of it
 * @param {Shown} change
 */
export function showOnSaved(saved, change) {
  saved.properties ??= {};
  saved.properties[PROPERTY] = { ...saved.properties[PROPERTY], ...change };
}

/**
 * About how many lines a text takes.
 * @param {string} text
 * @param {number} width
 */
function wrapped(text, width) {
  const columns = Math.max(20, Math.floor(width / LETTER));
  const lines = text.split("\n").map((line) => Math.max(1, Math.ceil(line.length / columns)));
  return lines.reduce((sum, count) => sum + count, 0);
}

/**
 * Text, always as text.
 * @param {string} text
 * @param {string} whiteSpace
 */
function paragraph(text, whiteSpace) {
  const line = document.createElement("div");
  line.style.cssText = `white-space: ${whiteSpace}; overflow: hidden; text-overflow: ellipsis;`;
  line.textContent = text;
  line.title = text;
  return line;
}
