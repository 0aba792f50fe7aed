// What there is to say at a node: a frame around it and a card beside it, with buttons that set what
// helps. It lies over the canvas and not in the node, which may be anybody's and keeps its size.
import { app } from "../../../scripts/app.js";
import { active, find } from "./runs.js";
import { read, set, settingOf } from "./settings.js";

const GAP = 6; // px between a node and its card
const BAR = 70; // px at the top, where the editor's own lies over the graph
const TOOLS = 64; // px above a node that is selected, where the editor lays its tools
const WIDTH = [260, 420]; // px that a card takes at least and at most
const SCALE = [0.65, 1]; // of its letters, as the canvas is zoomed
const AMBER = "#d99a2b";
const LAYER = "omini2_notices";

/**
 * What helps: values for one node's inputs.
 * @typedef {Object} Remedy
 * @property {string} node as the host executes it: "12:3" is node 3 in subgraph 12
 * @property {Record<string, string | number | boolean>} values
 */

/**
 * @typedef {Object} Notice
 * @property {any} workflow that it belongs to
 * @property {string} at the node that it is about
 * @property {string} from what says it: it is gone once that speaks again
 * @property {string} message
 * @property {Remedy[]} remedies
 */

/** @type {Notice[]} */
let notices = [];
/** @type {Map<string, {frame: HTMLElement, card: HTMLElement}>} by the nodes that are drawn */
const drawn = new Map();
let following = false;

/**
 * Says something at a node.
 * @param {Notice} notice
 * @returns {boolean} whether there is such a node
 */
export function notify(notice) {
  if (notice.workflow === active() && !find(app.graph, path(notice.at))) return false;
  const same = (n) =>
    n.workflow === notice.workflow && n.at === notice.at && n.message === notice.message;
  notices = [...notices.filter((n) => !same(n)), notice];
  changed();
  return true;
}

/**
 * Takes back what something has said.
 * @param {(notice: Notice) => boolean} which
 */
export function dismiss(which) {
  const left = notices.filter((notice) => !which(notice));
  if (left.length === notices.length) return;
  notices = left;
  changed();
}

/** @param {string} id */
function path(id) {
  return String(id).split(":");
}

function changed() {
  for (const { frame, card } of drawn.values()) {
    frame.remove();
    card.remove();
  }
  drawn.clear();
  if (!following && notices.length) {
    following = true;
    requestAnimationFrame(follow);
  }
}

/** Keeps cards at their nodes while there are any. */
function follow() {
  following = notices.length > 0;
  if (!following) return;
  dismiss(isDone);
  /** @type {Map<string, Notice[]>} */
  const shown = new Map();
  for (const notice of notices.filter((n) => n.workflow === active())) {
    shown.set(notice.at, [...(shown.get(notice.at) ?? []), notice]);
  }
  for (const [at, { frame, card }] of drawn) {
    if (shown.has(at)) continue;
    frame.remove();
    card.remove();
    drawn.delete(at);
  }
  for (const [at, of] of shown) lay(at, of);
  requestAnimationFrame(follow);
}

/**
 * Whether it has no more reason: the values are as a remedy sets them, or the node is gone.
 * @param {Notice} notice
 */
function isDone(notice) {
  if (notice.workflow !== active()) return false;
  if (!find(app.graph, path(notice.at))) return true;
  return notice.remedies.some(({ node, values }) =>
    Object.entries(values).every(([name, value]) => {
      const setting = settingOf(path(node), name);
      return setting !== null && read(setting) === value;
    }),
  );
}

/**
 * Draws a node's notices, or moves them to where the node is now.
 * @param {string} at
 * @param {Notice[]} of
 */
function lay(at, of) {
  const node = onScreen(path(at));
  const parts = drawn.get(at) ?? draw(at, of);
  for (const part of Object.values(parts)) part.style.display = node ? "" : "none";
  if (!node) return;
  const { scale, offset } = app.canvas.ds;
  const screen = ([x, y, w, h]) => [
    (x + offset[0]) * scale,
    (y + offset[1]) * scale,
    w * scale,
    h * scale,
  ];
  const [x, y, w, h] = screen(node.boundingRect);
  Object.assign(parts.frame.style, rectangle(x, y, w, h));
  const { card } = parts;
  const letters = Math.min(SCALE[1], Math.max(SCALE[0], scale));
  card.style.fontSize = `${12 * letters}px`;
  const wide = Math.min(WIDTH[1] * letters, Math.max(WIDTH[0] * letters, w));
  const high = card.offsetHeight;
  const tools = app.canvas.selectedItems?.has(node) ? TOOLS : 0;
  const above = [x, y - tools - high - GAP, wide, high];
  const below = [x, y + h + GAP, wide, high];
  const pictures = app.canvas.graph.nodes.filter((n) => n !== node && showsPicture(n));
  const covers = (box) => pictures.some((n) => overlap(box, screen(n.boundingRect)));
  const hidden = above[1] < BAR || covers(above);
  const [left, top] = hidden && !covers(below) ? below : above;
  const clear = y + h > BAR ? Math.max(top, BAR) : top;
  Object.assign(card.style, { left: `${left}px`, top: `${clear}px`, width: `${wide}px` });
}

/** @param {number[]} box */
function rectangle(...box) {
  const [left, top, width, height] = box.map((n) => `${n}px`);
  return { left, top, width, height };
}

/** @param {any} node */
function showsPicture(node) {
  return Boolean(node.imgs?.length || app.nodeOutputs?.[node.id]?.images?.length);
}

/**
 * @param {number[]} a
 * @param {number[]} b
 */
function overlap([x, y, w, h], [left, top, width, height]) {
  return x < left + width && left < x + w && y < top + height && top < y + h;
}

/**
 * The node in the graph that is open, or the subgraph's node there that holds it.
 * @param {string[]} ids
 */
function onScreen(ids) {
  for (let depth = ids.length; depth > 0; depth--) {
    const node = find(app.graph, ids.slice(0, depth));
    if (node && node.graph === app.canvas.graph) return node;
  }
  return null;
}

/**
 * @param {string} at
 * @param {Notice[]} of
 */
function draw(at, of) {
  const frame = document.createElement("div");
  frame.style.cssText = `position: absolute; border: 2px solid ${AMBER}; border-radius: 8px;
    box-sizing: border-box; pointer-events: none;`;
  const card = document.createElement("div");
  card.style.cssText = `position: absolute; box-sizing: border-box; padding: 0.4em 0.6em;
    line-height: 1.35; color: var(--input-text); background: var(--comfy-menu-bg);
    border: 1px solid ${AMBER}; border-radius: 6px; pointer-events: auto;`;
  card.dataset.testid = "omini2_notice";
  card.dataset.at = at;
  for (const notice of of) card.append(...paragraph(notice));
  layer().append(frame, card);
  const parts = { frame, card };
  drawn.set(at, parts);
  return parts;
}

/** @param {Notice} notice */
function paragraph(notice) {
  const line = document.createElement("div");
  line.style.cssText = "display: flex; gap: 0.5em; align-items: flex-start;";
  const text = document.createElement("div");
  text.style.cssText = "flex: 1; overflow-wrap: anywhere;";
  text.textContent = notice.message; // always as text: a file's name may hold anything
  line.append(text, button("×", "Dismiss", () => dismiss((n) => n === notice)));
  const row = document.createElement("div");
  row.style.cssText = "display: flex; flex-wrap: wrap; gap: 0.5em; margin: 0.3em 0;";
  for (const remedy of notice.remedies) {
    if (Object.keys(remedy.values).some((name) => !settingOf(path(remedy.node), name))) continue;
    const words = label(remedy, notice.at);
    const helps = button(words, words, () => {
      for (const [name, value] of Object.entries(remedy.values)) {
        set(settingOf(path(remedy.node), name), value);
      }
      app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
      dismiss((n) => n === notice);
    });
    Object.assign(helps.style, { background: AMBER, color: "black", borderColor: AMBER });
    row.append(helps);
  }
  return row.childElementCount ? [line, row] : [line];
}

/**
 * @param {Remedy} remedy
 * @param {string} at where it is shown
 */
function label({ node, values }, at) {
  const words = Object.entries(values).map(([name, value]) => {
    if (value === true) return `${name} on`;
    return value === false ? `${name} off` : `${name} to ${value}`;
  });
  const title = node === at ? "" : ` in ${find(app.graph, path(node))?.title}`;
  return `Set ${words.join(", ")}${title}`;
}

/**
 * @param {string} words
 * @param {string} title
 * @param {() => void} press
 */
function button(words, title, press) {
  const element = document.createElement("button");
  element.style.cssText = `font: inherit; color: inherit; cursor: pointer; padding: 0 0.5em;
    background: var(--comfy-input-bg); border: 1px solid var(--border-color); border-radius: 4px;`;
  element.textContent = words;
  element.title = title;
  element.ariaLabel = title;
  element.addEventListener("click", press);
  return element;
}

/** Over the canvas, below the editor's own menus. */
function layer() {
  const known = document.getElementById(LAYER);
  if (known) return known;
  const element = document.createElement("div");
  element.id = LAYER;
  element.style.cssText =
    "position: absolute; inset: 0; overflow: hidden; pointer-events: none; z-index: 1;";
  app.canvas.canvas.parentElement.append(element);
  return element;
}
