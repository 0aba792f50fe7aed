// The server runs what it can of a graph and leaves out the rest without a word: a preview still
// runs while the picture doesn't. So what is left out, and why, is said at the node that it is for.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { dismiss, notify } from "./notices.js";
import { active } from "./runs.js";

const SAYS = "queue";

app.registerExtension({
  name: "Omini2.LeftOut",
  setup() {
    const { queuePrompt } = api;
    api.queuePrompt = async function (...given) {
      const workflow = active();
      dismiss((notice) => notice.from === SAYS && notice.workflow === workflow);
      const answer = await queuePrompt.apply(this, given);
      if (answer?.prompt_id && app.graph.nodes.some(isOurs)) say(workflow, answer.node_errors);
      return answer;
    };
  },
});

/** @param {any} node */
function isOurs(node) {
  return node.comfyClass?.startsWith("Omini2") || node.subgraph?.nodes.some(isOurs);
}

/**
 * @param {any} workflow
 * @param {Record<string, any>} [errors] by node, as the server refuses it
 */
function say(workflow, errors) {
  for (const [at, { errors: reasons }] of Object.entries(errors ?? {})) {
    const message = `Left out of this run, with all that follows it. ${reasons.map(words).join(" ")}`;
    notify({ workflow, at, from: SAYS, message, remedies: [] });
  }
}

/** @param {any} reason */
function words({ type, message, details, extra_info }) {
  const name = extra_info?.input_name;
  if (type === "required_input_missing") {
    return `${name}: nothing is connected, or what is connected is muted; connect it or unmute it.`;
  }
  const [input, rest] = type === "custom_validation_failed" ? split(details) : ["", ""];
  return rest ? `${input}: ${rest}` : `${message}: ${details}.`;
}

/** @param {string} details */
function split(details) {
  const at = details.indexOf(" - ");
  return at < 0 ? ["", ""] : [details.slice(0, at), details.slice(at + 3)];
}
