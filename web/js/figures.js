// Shows on a node what it said about its last run.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const WIDGET = "omini2_figures";

function show(node, text) {
  let widget = node.widgets?.find((w) => w.name === WIDGET);
  if (!widget) {
    const element = document.createElement("div");
    element.style.cssText =
      "white-space: pre-line; overflow: hidden; padding: 4px 8px; font-size: 12px; line-height: 1.5;" +
      "color: var(--input-text); background: var(--comfy-input-bg); border-radius: 6px;";
    const lines = text.split("\n").length;
    const height = lines * 18 + 32; // with the margins that the canvas keeps around a widget
    widget = node.addDOMWidget(WIDGET, "figures", element, {
      serialize: false, // what a run said is not part of the workflow
      getMinHeight: () => height,
      getMaxHeight: () => height,
    });
    const [width, needed] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], needed)]);
  }
  widget.element.textContent = text;
  app.graph.setDirtyCanvas(true);
}

app.registerExtension({
  name: "Omini2.Figures",
  setup() {
    // The figures of a run are for scripts; without a listener the editor warns about them.
    api.addEventListener("omini2.run", () => {});
  },
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "Omini2CompactTokens") return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.omini2) show(this, output.omini2.join("\n"));
    };
  },
});
