// Loaded instead of web/ where ComfyUI lacks what the nodes need: says why they are missing.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "Omini2.Refused",
  setup() {
    const detail =
      "This ComfyUI lacks something that the Omini2 nodes need, so they are left out: its log " +
      "names it. Update ComfyUI to 0.3.76 or newer.";
    const toast = { severity: "error", summary: "Omini2", detail };
    app.extensionManager?.toast?.add(toast);
  },
});
