// Lets the node library find our nodes by the words that a beginner types. Newer editors search a
// node's own aliases; older ones only its names, so there the words stand behind the name, in the
// library alone: the node on the canvas keeps its title.
import { app } from "../../../scripts/app.js";

// They find a word only if it begins within a name's first 30 letters, so there are few.
/** @type {Record<string, string[]>} */
const WORDS = {
  Omini2ConditionEncode: ["reference"],
  Omini2ApplyLoRA: ["control", "reference"],
  Omini2CompactTokens: ["inpaint", "outpaint"],
  Omini2SpotEdit: ["edit", "inpaint"],
  Omini2KeepUnchanged: ["composite", "compare"],
};

app.registerExtension({
  name: "Omini2.Search",
  beforeRegisterVueAppNodeDefs(defs) {
    defs.forEach((def, i) => {
      const words = WORDS[def.name];
      if (!words || def.search_aliases?.length) return;
      defs[i] = { ...def, display_name: `${def.display_name} (${words.join(", ")})` };
    });
  },
});
