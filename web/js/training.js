// Omini2 Train LoRA: what one must choose in sight, the rest on demand, and a seed that stays.
import { app } from "../../../scripts/app.js";
import { redraw } from "./redraw.js";

const MORE = "more options";
const FEWER = "fewer options";
const SPACE = 4; // pixels that the canvas keeps between widgets

app.registerExtension({
  name: "Omini2.Training",
  nodeCreated(node) {
    if (node.comfyClass !== "Omini2TrainLoRA") return;
    keepSeed(node);
    if (!foldsByItself(node)) addButton(node);
    const { onConfigure } = node;
    node.onConfigure = function (saved) {
      const result = onConfigure?.apply(this, arguments);
      fold(this, typeof saved?.showAdvanced === "boolean");
      return result;
    };
    fold(node);
  },
});

/**
 * The editor draws a new seed after each run unless told otherwise; training goes on with its own.
 * @param {any} node
 */
function keepSeed(node) {
  const control = node.widgets?.find((w) => w.name === "control_after_generate");
  if (!control) return;
  control.value = "fixed";
  control.options.advanced = true;
}

/** @param {any} node */
function addButton(node) {
  const button = node.addWidget("button", MORE, null, () => {
    node.showAdvanced = !node.showAdvanced;
    button.name = node.showAdvanced ? FEWER : MORE;
    fold(node);
  });
  button.serialize = false;
  button.options.serialize = false;
}

/**
 * Leaves of what may stay as it is only that in sight which isn't as usual.
 * @param {any} node
 * @param {boolean} [decided] whether a file says what is in sight
 */
function fold(node, decided = false) {
  const options = node.widgets.filter((w) => w.options?.advanced);
  if (foldsByItself(node)) {
    if (!decided) node.showAdvanced ||= options.some((w) => !isUsual(node, w));
    return;
  }
  for (const widget of options) {
    widget.hidden = !node.showAdvanced && isUsual(node, widget);
    widget.options.hidden = widget.hidden;
    // Older editors leave room for what they don't draw.
    if (widget.hidden) widget.computeSize = () => [0, -SPACE];
    else delete widget.computeSize;
  }
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), height]);
  redraw(node);
}

/**
 * Newer editors do so in Nodes 2.0.
 * @param {any} node
 */
function foldsByItself(node) {
  return LiteGraph.vueNodesMode && "hasAdvancedWidgets" in node;
}

/**
 * @param {any} node
 * @param {any} widget
 */
function isUsual(node, widget) {
  if (widget.name === "control_after_generate") return widget.value === "fixed";
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  const [, given] = { ...required, ...optional }[widget.name] ?? [];
  return widget.value === (given?.default ?? given?.options?.[0]);
}
