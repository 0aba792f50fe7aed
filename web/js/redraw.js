// Nodes 2.0 draws what it once read of a node's inputs; here it reads that again.
import { app } from "../../../scripts/app.js";

/**
 * After an input has been hidden or shown again; the canvas sees that by itself.
 * @param {any} node
 */
export function redraw(node) {
  const { widgets, graph } = node;
  if (widgets.some((w) => "_state" in w)) {
    widgets.push(widgets.pop()); // newer editors look when the list changes
  } else if (LiteGraph.vueNodesMode && graph && graph === app.canvas.graph && !app.configuringGraph) {
    // Older ones have let go of the list once a value has changed, and read nodes that are new. That
    // wraps each input's callback once more.
    const callbacks = widgets.map((w) => w.callback);
    graph.onNodeAdded?.(node);
    widgets.forEach((w, i) => (w.callback = callbacks[i]));
  }
  graph?.setDirtyCanvas(true, true);
}
