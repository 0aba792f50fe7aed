// Lets a condition's sockets be seen in Nodes 2.0, which draws those of types that it doesn't know
// in no colour at all. Theirs is that of their wires.
import { app } from "../../../scripts/app.js";

app.registerExtension({
  name: "Omini2.Sockets",
  setup() {
    // The editor sets its own types' colours on the body, and would take ours away there.
    const { style } = document.documentElement;
    style.setProperty("--color-datatype-OMINI2_CONDITION", LiteGraph.LINK_COLOR);
  },
});
