// Warnings of a run reach the person, not only the console: at the node that they are about, and
// where there is none, as a message.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { dismiss, notify } from "./notices.js";
import { active, workflowOf } from "./runs.js";

const LIFE = 20000; // ms; long enough to read a sentence that wasn't expected

/** @type {Set<string>} what has been said of the prompt that runs */
let said = new Set();

app.registerExtension({
  name: "Omini2.Warnings",
  setup() {
    api.addEventListener("execution_start", () => (said = new Set()));
    // A node that runs says anew what there is to say; one whose result is kept has nothing new.
    api.addEventListener("executing", ({ detail }) => {
      const node = String(detail?.node ?? detail);
      dismiss((notice) => notice.from === node && notice.workflow === active());
    });
    api.addEventListener("omini2.warning", ({ detail }) => {
      const message = String(detail?.message ?? "");
      if (!message) return;
      const remedies = Array.isArray(detail.remedies) ? detail.remedies : [];
      const from = String(detail.node ?? "");
      const at = String(remedies[0]?.node ?? from);
      const workflow = workflowOf(detail.prompt_id);
      if (from && notify({ workflow, at, from, message, remedies })) return;
      if (said.has(message)) return;
      said.add(message);
      // The toast shows both as text: a file's name may hold anything.
      const toast = { severity: "warn", summary: "Omini2", detail: message, life: LIFE };
      app.extensionManager?.toast?.add(toast);
    });
  },
});
