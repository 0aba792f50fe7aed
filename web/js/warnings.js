// Warnings of a run reach the person, not only the console: at the node that they are about, and
// where there is none, as a message.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { dismiss, notify } from "./notices.js";
import { active, workflowOf } from "./runs.js";

const LIFE = 20000; // ms; long enough to read a sentence that wasn't expected

const KEPT = "omini2.warnings"; // in the tab's own memory, which outlives a reload of the page

/**
 * @typedef {Object} Kept
 * @property {string} graph the id of the workflow's graph
 * @property {string} at
 * @property {string} from
 * @property {string} message
 * @property {import("./notices.js").Remedy[]} remedies
 */

/** @type {Set<string>} what has been said of the prompt that runs */
let said = new Set();
/** @type {Kept[]} what was last said of each node */
let kept = [];
/** @type {Kept[]} of that, what was said before the page was loaded */
let before = [];

app.registerExtension({
  name: "Omini2.Warnings",
  setup() {
    before = kept = remembered();
    api.addEventListener("execution_start", () => (said = new Set()));
    api.addEventListener("execution_cached", ({ detail }) => {
      const workflow = workflowOf(detail.prompt_id);
      const again = before.filter((k) => isOf(k, workflow) && detail.nodes?.includes(k.from));
      before = before.filter((k) => !again.includes(k));
      for (const each of again) notify({ workflow, ...each });
    });
    // A node that runs says anew what there is to say; one whose result is kept has nothing new.
    api.addEventListener("executing", ({ detail }) => {
      const node = String(detail?.node ?? detail);
      dismiss((notice) => notice.from === node && notice.workflow === active());
      const speaks = (k) => isOf(k, active()) && k.from === node;
      before = before.filter((k) => !speaks(k));
      if (kept.some(speaks)) remember(kept.filter((k) => !speaks(k)));
    });
    api.addEventListener("omini2.warning", ({ detail }) => {
      const message = String(detail?.message ?? "");
      if (!message) return;
      const remedies = Array.isArray(detail.remedies) ? detail.remedies : [];
      const from = String(detail.node ?? "");
      const at = String(remedies[0]?.node ?? from);
      const workflow = workflowOf(detail.prompt_id);
      if (from && notify({ workflow, at, from, message, remedies })) {
        const graph = graphOf(workflow);
        if (graph) remember([...kept, { graph, at, from, message, remedies }]);
        return;
      }
      if (said.has(message)) return;
      said.add(message);
      // The toast shows both as text: a file's name may hold anything.
      const toast = { severity: "warn", summary: "Omini2", detail: message, life: LIFE };
      app.extensionManager?.toast?.add(toast);
    });
  },
});

/** @param {any} workflow */
function graphOf(workflow) {
  return workflow?.activeState?.id ?? null;
}

/**
 * @param {Kept} one
 * @param {any} workflow
 */
function isOf(one, workflow) {
  return one.graph === graphOf(workflow);
}

/** @returns {Kept[]} */
function remembered() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  } catch {
    return [];
  }
}

/** @param {Kept[]} all */
function remember(all) {
  kept = all;
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(kept));
  } catch {
    // Full or forbidden: a reload forgets them.
  }
}
