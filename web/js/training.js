// Omini2 Train LoRA: what one must choose in sight, the rest on demand, and a seed that stays.
import { app } from "../../../scripts/app.js";

const TOGGLE = "omini2_more";

app.registerExtension({
  name: "Omini2.Training",
  nodeCreated(node) {
    if (node.comfyClass !== "Omini2TrainLoRA") return;
    keepSeed(node);
    addToggle(node);
    const { onConfigure } = node;
    node.onConfigure = function (saved) {
      const result = onConfigure?.apply(this, arguments);
      // What a file has set otherwise than usual stays in sight.
      this.showAdvanced = saved?.showAdvanced ?? options(this).some((w) => w.value !== usual(this, w));
      showOptions(this);
      return result;
    };
    showOptions(node);
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
  control.advanced = true;
  control.options = { ...control.options, advanced: true };
}

/** @param {any} node */
function addToggle(node) {
  const button = node.addWidget("button", TOGGLE, null, () => {
    node.showAdvanced = !node.showAdvanced;
    showOptions(node);
  });
  button.serialize = false;
  button.options.serialize = false;
}

/**
 * The inputs that may be left as they are, and the seed's control.
 * @param {any} node
 * @returns {any[]}
 */
function options(node) {
  return node.widgets.filter((/** @type {any} */ w) => w.options?.advanced);
}

/**
 * @param {any} node
 * @param {any} widget
 */
function usual(node, widget) {
  const { required, optional } = node.constructor.nodeData?.input ?? {};
  const [kind, given] = { ...required, ...optional }[widget.name] ?? [];
  if (!kind) return widget.value; // the seed's control
  return given?.default ?? given?.options?.[0];
}

/**
 * @param {any} node
 */
function showOptions(node) {
  const shown = Boolean(node.showAdvanced);
  for (const widget of options(node)) {
    widget.hidden = !shown;
    widget.options.hidden = !shown;
  }
  const button = node.widgets.find((/** @type {any} */ w) => w.name === TOGGLE);
  if (button) button.label = shown ? "fewer options" : "more options";
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), height]);
  app.graph?.setDirtyCanvas(true, true);
}
