// Warnings of a run reach the person, not only the console.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const LIFE = 20000; // ms; long enough to read a sentence that wasn't expected

/** @type {Set<string>} what has been said of the prompt that runs */
let said = new Set();

app.registerExtension({
  name: "Omini2.Warnings",
  setup() {
    api.addEventListener("execution_start", () => (said = new Set()));
    api.addEventListener("omini2.warning", ({ detail }) => {
      const message = String(detail?.message ?? "");
      if (!message || said.has(message)) return;
      said.add(message);
      // The toast shows both as text: a file's name may hold anything.
      const toast = { severity: "warn", summary: "Omini2", detail: message, life: LIFE };
      app.extensionManager?.toast?.add(toast);
    });
  },
});
