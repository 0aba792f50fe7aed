// Loaded instead of web/ where ComfyUI is too old for the nodes: says why they are missing.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Omini2.Refused",
  setup() {
    const detail =
      "This ComfyUI is too old for the Omini2 nodes, so they are left out; update ComfyUI to " +
      "0.3.76 or newer.";
    const toast = { severity: "error", summary: "Omini2", detail };
    app.extensionManager?.toast?.add(toast);
  },
});
