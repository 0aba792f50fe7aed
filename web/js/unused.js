// Hides what has no meaning yet: an input that another one switches on. Its place among the values
// of a workflow stays as it is.
import { app } from "../../../scripts/app.js";
import { redraw } from "./redraw.js";
import { widget } from "./settings.js";

/** @type {Record<string, Record<string, [string, unknown]>>} node -> input -> what switches it off */
const OFF = { Omini2ConditionEncode: { size: ["resize", "off"] } };

app.registerExtension({
  name: "Omini2.Unused",
  nodeCreated(node) {
    const rules = OFF[node.comfyClass];
    if (!rules) return;
    const update = () => {
      for (const [name, [by, off]] of Object.entries(rules)) {
        const shown = widget(node, name);
        const linked = node.inputs?.some((i) => i.widget?.name === name && i.link != null);
        if (shown) hide(node, shown, !linked && widget(node, by)?.value === off);
      }
    };
    for (const [by] of Object.values(rules)) {
      const switching = widget(node, by);
      const { callback } = switching;
      switching.callback = function () {
        const result = callback?.apply(this, arguments);
        update();
        return result;
      };
    }
    const { onConfigure } = node;
    node.onConfigure = function () {
      const result = onConfigure?.apply(this, arguments);
      update();
      return result;
    };
    update();
  },
});

/**
 * @param {any} node
 * @param {any} shown
 * @param {boolean} hidden
 */
function hide(node, shown, hidden) {
  if (Boolean(shown.hidden) === hidden) return;
  shown.hidden = hidden; // for the canvas
  shown.options.hidden = hidden; // for Nodes 2.0
  const needed = node.computeSize()[1];
  if (node.size[1] < needed) node.setSize([node.size[0], needed]);
  redraw(node);
}
