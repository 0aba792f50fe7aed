// The server runs what it can of a graph and leaves out the rest without a word: a preview still
// runs while the picture doesn't. So what is left out, and why, is said at the node that it is for.
// Where nothing is left, the editor says so; at our nodes it is said too, since its window goes away.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { dismiss, notify } from "./notices.js";
import { active, find } from "./runs.js";

const SAYS = "queue";
const LEFT_OUT = "Left out of this run, with all that follows it.";
const REFUSED = "Nothing was run.";

app.registerExtension({
  name: "Omini2.LeftOut",
  setup() {
    const { queuePrompt } = api;
    api.queuePrompt = async function (...given) {
      const workflow = active();
      dismiss((notice) => notice.from === SAYS && notice.workflow === workflow);
      try {
        const answer = await queuePrompt.apply(this, given);
        const concerned = answer?.prompt_id && app.graph.nodes.some(isOurs);
        if (concerned) say(workflow, LEFT_OUT, Object.entries(answer.node_errors ?? {}));
        return answer;
      } catch (error) {
        const refused = Object.entries(error?.response?.node_errors ?? {});
        const ours = refused.filter(([at]) => isOurs(find(app.graph, at.split(":"))));
        say(workflow, REFUSED, ours);
        throw error;
      }
    };
  },
});

/** @param {any} node */
function isOurs(node) {
  return node?.comfyClass?.startsWith("Omini2") || node?.subgraph?.nodes.some(isOurs);
}

/**
 * @param {any} workflow
 * @param {string} what has come of it
 * @param {[string, any][]} refused nodes, as the server says it
 */
function say(workflow, what, refused) {
  for (const [at, { errors }] of refused) {
    const message = `${what} ${errors.map(words).join(" ")}`;
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
  if (!rest) return `${message}: ${details}.`;
  return /^\w+: /.test(rest) ? rest : `${input}: ${rest}`; // it may name another input
}

/** @param {string} details */
function split(details) {
  const at = details.indexOf(" - ");
  return at < 0 ? ["", ""] : [details.slice(0, at), details.slice(at + 3)];
}
